//! Whom to ask, where to keep it, and as whom: the variables that the hub's own tools read.

use std::{env, ffi::OsString, fmt, fs, path::PathBuf, time::Duration};

use super::HubError;

/// What a fetch needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The hub, without a slash at the end: `HF_ENDPOINT`, or the public one.
    pub endpoint: String,
    /// The cache's folder: `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub cache: PathBuf,
    /// Who asks: `HF_TOKEN`, or the text of the file `HF_TOKEN_PATH`, or of `token` in `HF_HOME`.
    pub token: Option<Token>,
    /// How long to wait, and how often.
    pub patience: Patience,
}

/// A token. It is shown to nobody but the hub.
#[derive(Clone)]
pub struct Token(String);

/// How long to wait, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a connection.
    pub connect: Duration,
    /// For an answer to begin, and for each next piece of it.
    pub answer: Duration,
    /// Time in which at least 16 KiB have to come.
    pub stall: Duration,
    /// Failures in a row, nothing having come in between, after which it is over.
    pub tries: u32,
    /// Before the second try; each next wait is twice as long, up to 30 s.
    pub pause: Duration,
    /// Longest wait that a server may ask for.
    pub longest_wait: Duration,
}

impl Settings {
    /// As the environment says.
    ///
    /// # Errors
    /// There is no folder for a cache, or the token's file cannot be read.
    pub fn from_env() -> Result<Settings, HubError> {
        Settings::from_lookup(|name| env::var_os(name).filter(|value| !value.is_empty()))
    }

    /// As these variables say.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Settings, HubError> {
        let folder = |name| lookup(name).map(PathBuf::from);
        let text = |name| lookup(name).and_then(|value| value.into_string().ok());
        let cache_home = || {
            let of_user = || Some(folder("HOME").or_else(|| folder("USERPROFILE"))?.join(".cache"));
            Some(folder("XDG_CACHE_HOME").or_else(of_user)?.join("huggingface"))
        };
        let home = folder("HF_HOME").or_else(cache_home);
        let cache = folder("HF_HUB_CACHE").or_else(|| Some(home.as_ref()?.join("hub")));
        let token = match text("HF_TOKEN") {
            Some(token) => Some(token),
            None => {
                let path = folder("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")));
                path.map(read_token).transpose()?.flatten()
            }
        };
        Ok(Settings {
            endpoint: text("HF_ENDPOINT").unwrap_or(ENDPOINT.into()).trim_end_matches('/').to_owned(),
            cache: cache.ok_or(HubError::NoCache)?,
            token: token.map(Token::new).transpose()?.flatten(),
            patience: Patience::default(),
        })
    }
}

/// The text of a token's file, if there is one.
fn read_token(path: PathBuf) -> Result<Option<String>, HubError> {
    match fs::metadata(&path) {
        Ok(meta) if meta.len() > MAX_TOKEN_BYTES as u64 => return Err(HubError::Token),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        _ => {}
    }
    fs::read_to_string(&path).map(Some).map_err(|source| HubError::Io { path, source })
}

impl Token {
    /// A token, without the space around it; `None` where nothing is left.
    ///
    /// # Errors
    /// It cannot be sent.
    pub fn new(text: impl AsRef<str>) -> Result<Option<Token>, HubError> {
        let text = text.as_ref().trim();
        match text.len() {
            0 => Ok(None),
            1..=MAX_TOKEN_BYTES if text.bytes().all(|b| b.is_ascii_graphic()) => {
                Ok(Some(Token(text.to_owned())))
            }
            _ => Err(HubError::Token),
        }
    }

    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            connect: Duration::from_secs(15),
            answer: Duration::from_secs(30),
            stall: Duration::from_secs(60),
            tries: 6,
            pause: Duration::from_millis(500),
            longest_wait: Duration::from_secs(300),
        }
    }
}

/// The public hub: the one host that this project knows by name.
const ENDPOINT: &str = "https://huggingface.co";
/// Far more than a token has.
const MAX_TOKEN_BYTES: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, HubError> {
        let of = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v));
        Settings::from_lookup(of)
    }

    #[test]
    fn variables_mean_what_they_mean_to_the_hub_s_own_tools() {
        let plain = settings(&[("HOME", "/h")]).unwrap();
        assert_eq!(plain.cache, PathBuf::from("/h/.cache/huggingface/hub"));
        assert_eq!(plain.endpoint, ENDPOINT);
        assert!(plain.token.is_none());
        let home = settings(&[("HOME", "/h"), ("HF_HOME", "/hf"), ("HF_TOKEN", " hf_x\n")]).unwrap();
        assert_eq!(home.cache, PathBuf::from("/hf/hub"));
        assert_eq!(home.token.unwrap().header(), "Bearer hf_x");
        let all = [("HF_HUB_CACHE", "/c"), ("HF_ENDPOINT", "http://localhost:1/"), ("HF_HOME", "/hf")];
        let all = settings(&all).unwrap();
        assert_eq!((all.cache, all.endpoint), (PathBuf::from("/c"), "http://localhost:1".to_owned()));
        assert!(matches!(settings(&[]), Err(HubError::NoCache)));
    }

    #[test]
    fn a_token_is_read_from_its_file_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "hf_secret\n").unwrap();
        let found = settings(&[("HF_HOME", folder.path().to_str().unwrap())]).unwrap();
        assert_eq!(found.token.as_ref().unwrap().header(), "Bearer hf_secret");
        assert!(!format!("{found:?}").contains("secret"));
        assert!(matches!(settings(&[("HF_HOME", "/h"), ("HF_TOKEN", "a\r\nb")]), Err(HubError::Token)));
    }
}
