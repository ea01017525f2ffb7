//! Who may talk with the server: API keys, and which Host and Origin a browser may come with.
//!
//! A page that somebody visits can make his browser send requests to addresses that only he reaches. It cannot forge two
//! headers: `Origin`, which says where the page is from, and `Host`, which says by which name the server was found, so that a
//! name of the page's own that was made to mean this machine (DNS rebinding) shows. An address by its digits is nobody's own
//! name.

use std::fmt;
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::error::{ApiError, ServeError};
use crate::queue::Client;

/// API keys. Of each only a digest is kept: equal lengths, and nothing to be shown.
#[derive(Clone)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

impl ApiKeys {
    /// Of a file: one a line; empty lines and those that begin with `#` are left out.
    ///
    /// # Errors
    /// It cannot be read, has none, or one that no header can carry.
    pub fn from_file(path: impl AsRef<Path>) -> Result<ApiKeys, ServeError> {
        let path = path.as_ref();
        let wrong = |why: String| ServeError::Keys { path: path.display().to_string(), why };
        let file = std::fs::File::open(path).map_err(|e| wrong(e.to_string()))?;
        let mut text = String::new();
        // what a pipe or a device has to say has no size that could be asked for first
        file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|e| wrong(e.to_string()))?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(wrong(format!("longer than {MAX_FILE_BYTES} bytes")));
        }
        ApiKeys::from_lines(&text).map_err(wrong)
    }

    fn from_lines(text: &str) -> Result<ApiKeys, String> {
        let mut keys = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let key = line.trim();
            if key.is_empty() || key.starts_with('#') {
                continue;
            }
            if !(8..=256).contains(&key.len()) || !key.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(format!("line {} is no key", i + 1));
            }
            keys.push(Sha256::digest(key.as_bytes()).into());
        }
        if keys.is_empty() { Err("there is no key in it".to_owned()) } else { Ok(ApiKeys(keys)) }
    }

    /// The number of a key, found without a hint of how much of it was right.
    fn find(&self, given: &[u8]) -> Option<usize> {
        let given: [u8; 32] = Sha256::digest(given).into();
        let mut found = None;
        for (i, key) in self.0.iter().enumerate() {
            if bool::from(key.ct_eq(&given)) {
                found = Some(i);
            }
        }
        found
    }
}

const MAX_FILE_BYTES: u64 = 1 << 20;

/// The rules of a server.
#[derive(Clone, Debug, Default)]
pub(crate) struct Access {
    pub keys: Option<ApiKeys>,
    /// names beside `localhost` and addresses by which it may be asked for, in lower case
    pub hosts: Vec<String>,
    /// origins of pages elsewhere that may use it; `*`: all
    pub origins: Vec<String>,
}

impl Access {
    /// Which name it is asked for by, and where the page is from that asks. The origin that may read the answer, if it is
    /// another one's page.
    pub(crate) fn door(&self, headers: &HeaderMap, uri: &Uri) -> Result<Option<String>, ApiError> {
        let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
        let host = uri.authority().map(|a| a.as_str()).or_else(|| text(header::HOST));
        let host = host
            .ok_or_else(|| ApiError::new(StatusCode::BAD_REQUEST, "no Host header"))?
            .to_ascii_lowercase();
        if !self.is_ours(&host) {
            let message = format!("this server is not {host:?}; --allow-host names what else it is called");
            return Err(ApiError::new(StatusCode::FORBIDDEN, message).code("host_not_allowed"));
        }
        let Some(origin) = text(header::ORIGIN) else { return Ok(None) };
        if self.origins.iter().any(|allowed| allowed == "*" || allowed == origin) {
            return Ok(Some(origin.to_owned()));
        }
        // its own page
        if origin.split_once("://").is_some_and(|(_, from)| from.eq_ignore_ascii_case(&host)) {
            return Ok(None);
        }
        let message =
            format!("pages of {origin:?} may not use this server; --allow-origin names those that may");
        Err(ApiError::new(StatusCode::FORBIDDEN, message).code("origin_not_allowed"))
    }

    fn is_ours(&self, host: &str) -> bool {
        if host.parse::<SocketAddr>().is_ok() || host.parse::<IpAddr>().is_ok() {
            return true;
        }
        let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        if bracketed.is_some_and(|h| h.parse::<IpAddr>().is_ok()) {
            return true;
        }
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        let name = name.trim_end_matches('.');
        name == "localhost"
            || name.ends_with(".localhost")
            || self.hosts.iter().any(|allowed| allowed == name)
    }

    /// Who asks, if he may.
    pub(crate) fn client(&self, headers: &HeaderMap, peer: IpAddr) -> Result<Client, ApiError> {
        let Some(keys) = &self.keys else { return Ok(Client(peer.to_string())) };
        let bearer = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes()).and_then(|value| {
            let (scheme, key) = value.split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
        });
        let given = bearer.or_else(|| headers.get("x-api-key").map(|value| value.as_bytes()));
        match given.and_then(|given| keys.find(given.trim_ascii())) {
            Some(i) => Ok(Client(format!("key {i}"))),
            None => {
                let message = "no valid API key: send one as `Authorization: Bearer KEY`";
                Err(ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key"))
            }
        }
    }

    /// Whether a browser asks what it may ask.
    pub(crate) fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
        method == Method::OPTIONS && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(given: &[(&'static str, &str)]) -> HeaderMap {
        given
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect::<HeaderMap>()
    }

    #[test]
    fn a_name_that_was_made_to_mean_this_machine_is_refused() {
        let access = Access { hosts: vec!["box.example".to_owned()], ..Access::default() };
        let asked =
            |host: &str| access.door(&headers(&[("host", host)]), &Uri::from_static("/")).map_err(|e| e.code);
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "a.localhost:1",
            "127.0.0.1",
            "127.0.0.1:80",
            "[::1]",
            "[::1]:80",
            "192.168.1.4",
            "box.example:8080",
            "box.example.",
        ] {
            assert_eq!(asked(host), Ok(None), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "xlocalhost",
            "",
            "[::1",
            "box.example.evil",
        ] {
            assert_eq!(asked(host), Err(Some("host_not_allowed")), "{host}");
        }
        assert!(access.door(&HeaderMap::new(), &Uri::from_static("/")).is_err());
        // what stands in the request's line counts before the header
        let of_line =
            access.door(&headers(&[("host", "localhost")]), &Uri::from_static("http://evil.example/"));
        assert!(of_line.is_err());
    }

    #[test]
    fn a_page_of_somewhere_else_is_refused_unless_it_is_named() {
        let from = |access: &Access, origin: &str| {
            access
                .door(&headers(&[("host", "localhost:8080"), ("origin", origin)]), &Uri::from_static("/"))
                .map_err(|e| e.code)
        };
        let access = Access { origins: vec!["https://chat.example".to_owned()], ..Access::default() };
        assert_eq!(from(&access, "http://localhost:8080"), Ok(None));
        assert_eq!(from(&access, "https://chat.example"), Ok(Some("https://chat.example".to_owned())));
        for origin in [
            "http://localhost:9090",
            "http://localhost",
            "null",
            "https://chat.example.evil",
            "https://evil.example",
            "",
        ] {
            assert_eq!(from(&access, origin), Err(Some("origin_not_allowed")), "{origin}");
        }
        let all = Access { origins: vec!["*".to_owned()], ..Access::default() };
        assert_eq!(from(&all, "null"), Ok(Some("null".to_owned())));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_of_keys_that_does_not_end_is_refused() {
        let endless = ApiKeys::from_file("/dev/zero").unwrap_err();
        assert_eq!(endless.to_string(), format!("/dev/zero: longer than {MAX_FILE_BYTES} bytes"));
    }

    #[test]
    fn keys_are_told_apart_and_never_shown() {
        let keys = ApiKeys::from_lines("# ours\nfirst-key\n\n  second-key  \n").unwrap();
        assert_eq!(format!("{keys:?}"), "2 keys");
        let access = Access { keys: Some(keys), ..Access::default() };
        let peer = IpAddr::from([127, 0, 0, 1]);
        let client = |given: &[(&'static str, &str)]| {
            access.client(&headers(given), peer).map_err(|e| e.status.as_u16())
        };
        assert_eq!(client(&[("authorization", "Bearer first-key")]), Ok(Client("key 0".to_owned())));
        assert_eq!(client(&[("authorization", "bearer second-key")]), Ok(Client("key 1".to_owned())));
        assert_eq!(client(&[("x-api-key", "second-key")]), Ok(Client("key 1".to_owned())));
        for wrong in [
            "Bearer first-ke",
            "Bearer first-key1",
            "Bearer ",
            "Bearer",
            "Basic first-key",
            "first-key",
            "Bearer # ours",
        ] {
            assert_eq!(client(&[("authorization", wrong)]), Err(401), "{wrong}");
        }
        assert_eq!(client(&[]), Err(401));
        for wrong in ["", "# none\n", "short", "with space in it", &"x".repeat(257)] {
            assert!(ApiKeys::from_lines(wrong).is_err(), "{wrong}");
        }
    }
}
