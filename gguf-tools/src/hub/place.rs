//! Which repository and which of its files: `hf:ORG/REPO[/FILE|:QUANT]`.

use std::{collections::BTreeMap, path::Path};

use super::HubError;
use crate::gguf::PartName;

/// A model on the hub, as people write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// `ORG/NAME`.
    pub repo: String,
    /// Which of its models.
    pub wanted: Wanted,
}

/// Which of a repository's models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The only one.
    Any,
    /// The one with this path, or that this is a part of.
    File(String),
    /// The one whose file's name has this word, as `Q4_K_M`.
    Quant(String),
}

impl HubName {
    /// Reads `hf:ORG/REPO`, `hf:ORG/REPO/FILE` or `hf:ORG/REPO:QUANT`.
    ///
    /// # Errors
    /// It is something else.
    pub fn parse(text: &str) -> Result<HubName, HubError> {
        let wrong = |why| HubError::Spelling { text: text.to_owned(), why };
        let rest = text.strip_prefix(PREFIX).ok_or_else(|| wrong("does not begin with hf:"))?;
        let (path, quant) = match rest.split_once(':') {
            Some((path, quant)) => (path, Some(quant)),
            None => (rest, None),
        };
        let mut parts = path.splitn(3, '/');
        let (org, name, file) = (parts.next(), parts.next(), parts.next());
        let repo = format!("{}/{}", org.unwrap_or_default(), name.unwrap_or_default());
        if !is_repo(&repo) {
            return Err(wrong("has no ORG/REPO, of letters, digits, - _ and ."));
        }
        let wanted = match (file, quant) {
            (None, None) => Wanted::Any,
            (Some(file), None) if is_inside(file) => Wanted::File(file.to_owned()),
            (Some(_), None) => return Err(wrong("names no file of a repository")),
            (None, Some(quant)) if !quant.is_empty() && quant.bytes().all(is_word) => {
                Wanted::Quant(quant.to_owned())
            }
            (None, Some(_)) => return Err(wrong("names no type as Q4_K_M after the colon")),
            (Some(_), Some(_)) => return Err(wrong("names a file and a type")),
        };
        Ok(HubName { repo, wanted })
    }

    /// The files of the model that is meant, in order, among all files of the repository.
    ///
    /// # Errors
    /// None or more than one is, or a part of it is missing.
    pub(super) fn choose(&self, all: &[String]) -> Result<Vec<String>, HubError> {
        let mut models: BTreeMap<String, Vec<&String>> = BTreeMap::new();
        for name in all.iter().filter(|name| is_model(name)) {
            models.entry(model_of(name)).or_default().push(name);
        }
        let names = || models.values().filter_map(|files| files.first()).map(|s| (*s).clone()).collect();
        let fail = |why: String| HubError::Choice { repo: self.repo.clone(), why, names: names() };
        let meant = |files: &Vec<&String>| match &self.wanted {
            Wanted::Any => true,
            Wanted::File(file) => files.contains(&file),
            Wanted::Quant(quant) => files.first().is_some_and(|name| has_word(name, quant)),
        };
        let found: Vec<_> = models.values().filter(|files| meant(files)).collect();
        let [files] = found[..] else {
            let of = match &self.wanted {
                Wanted::Any => "models".to_owned(),
                Wanted::File(file) => format!("files \"{file}\""),
                Wanted::Quant(quant) => format!("models of type {quant}"),
            };
            return Err(fail(format!(
                "{} {of}",
                if found.is_empty() { "no".into() } else { found.len().to_string() }
            )));
        };
        let mut files: Vec<String> = files.iter().map(|name| (*name).clone()).collect();
        files.sort();
        files.dedup();
        let count = PartName::parse(Path::new(&files[0])).map_or(1, |part| part.count as usize);
        if files.len() != count {
            return Err(fail(format!("{} of the model's {count} parts", files.len())));
        }
        Ok(files)
    }
}

/// Whether a text is `ORG/NAME`.
pub(super) fn is_repo(text: &str) -> bool {
    let word = |part: &str| {
        !part.is_empty() && part.len() <= 96 && part.bytes().all(is_word) && !part.starts_with('.')
    };
    text.split_once('/').is_some_and(|(org, name)| word(org) && word(name))
}

/// Whether a name leads to a file inside the folder that it is taken from, on every system.
pub(super) fn is_inside(name: &str) -> bool {
    let part = |part: &str| !matches!(part, "" | "." | "..") && !part.ends_with('.');
    let allowed = |c: char| !c.is_control() && !matches!(c, '\\' | ':' | '?' | '*' | '"' | '<' | '>' | '|');
    name.len() <= 512 && name.chars().all(allowed) && name.split('/').all(part)
}

/// Whether a text is a commit's or a blob's name.
pub(super) fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

/// A GGUF with text weights; a projector is for images and sound.
fn is_model(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
    file.ends_with(".gguf") && !file.starts_with("mmproj")
}

/// What the parts of one model have in common.
fn model_of(name: &str) -> String {
    match PartName::parse(Path::new(name)) {
        Some(part) => format!("{}/{} of {}", part.folder.display(), part.stem, part.count),
        None => name.to_owned(),
    }
}

/// Whether a file's name has a word: `Q4_K` is none of `Q4_K_M`, and `Q4_0` none of `IQ4_0`.
fn has_word(name: &str, word: &str) -> bool {
    let name = name.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
    let word = word.to_ascii_lowercase();
    name.match_indices(&word).any(|(at, _)| {
        let before = name[..at].bytes().next_back();
        let after = name[at + word.len()..].bytes().next();
        !before.is_some_and(|b| b.is_ascii_alphanumeric())
            && !after.is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_')
    })
}

/// How a place on the hub begins.
const PREFIX: &str = "hf:";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Explained;

    #[test]
    fn places_are_read_as_people_write_them() {
        let place = |repo: &str, wanted| HubName { repo: repo.to_owned(), wanted };
        assert_eq!(HubName::parse("hf:a/b").unwrap(), place("a/b", Wanted::Any));
        assert_eq!(HubName::parse("hf:a/b:Q4_K_M").unwrap(), place("a/b", Wanted::Quant("Q4_K_M".into())));
        assert_eq!(HubName::parse("hf:a/b/c/d.gguf").unwrap(), place("a/b", Wanted::File("c/d.gguf".into())));
        let bad = ["hf:", "hf:a", "hf:/b", "hf:a/..", "hf:../b", "hf:a/b/", "hf:a/b:", "hf:a/b/../c.gguf"];
        let worse = ["hf:a/b//c", "hf:a/b/c:Q4_0", "hf:a/b:Q4/x", "hf:a b/c", "hf:a/b/c\\d", "m.gguf"];
        for text in bad.into_iter().chain(worse) {
            let error = HubName::parse(text).unwrap_err();
            assert!(error.is_misuse() && error.hint().is_some(), "{text}");
        }
    }

    #[test]
    fn a_type_chooses_the_one_file_whose_name_has_it() {
        let names = [
            "m-Q4_K_M.gguf",
            "m-IQ4_XS.gguf",
            "m.q8_0.gguf",
            "mmproj-m-F16.gguf",
            "README.md",
            "m-Q4_K_S.gguf",
        ];
        let all: Vec<String> = names.map(str::to_owned).to_vec();
        let choose = |text: &str| HubName::parse(text).unwrap().choose(&all);
        assert_eq!(choose("hf:a/b:q4_k_m").unwrap(), ["m-Q4_K_M.gguf"]);
        assert_eq!(choose("hf:a/b:Q8_0").unwrap(), ["m.q8_0.gguf"]);
        assert_eq!(choose("hf:a/b/m-IQ4_XS.gguf").unwrap(), ["m-IQ4_XS.gguf"]);
        for (missing, why) in
            [("hf:a/b:Q4_K", "no models"), ("hf:a/b:F16", "no models"), ("hf:a/b", "4 models")]
        {
            let error = choose(missing).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("m-Q4_K_S.gguf"), "{error}");
        }
    }

    #[test]
    fn a_model_in_parts_is_chosen_whole_or_not_at_all() {
        let part = |n: u32| format!("q/m-Q8_0-{n:05}-of-00003.gguf");
        let all = vec![part(3), part(1), part(2)];
        let whole = vec![part(1), part(2), part(3)];
        for text in ["hf:a/b", "hf:a/b:Q8_0", "hf:a/b/q/m-Q8_0-00002-of-00003.gguf"] {
            assert_eq!(HubName::parse(text).unwrap().choose(&all).unwrap(), whole, "{text}");
        }
        let error = HubName::parse("hf:a/b").unwrap().choose(&all[..2]).unwrap_err().to_string();
        assert!(error.contains("2 of the model's 3 parts"), "{error}");
    }

    #[test]
    fn a_name_stays_in_its_folder() {
        assert!(is_inside("a/b.gguf") && is_inside("ä b.gguf"));
        for bad in ["", "/a", "a//b", "../a", "a/..", "./a", "C:\\a", "a\0b", "a\nb", "..\\a"] {
            assert!(!is_inside(bad), "{bad:?}");
        }
    }
}
