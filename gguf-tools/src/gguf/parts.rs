//! Models in several files: `NAME-00001-of-0000N.gguf` and its siblings, read as one.

use std::path::{Path, PathBuf};

use super::{
    error::{Error, Place, Rule},
    part::Part,
    value::Value,
};

/// Opens the other parts of a model whose first-named part is open.
///
/// Whichever part was named, the result is in order and complete.
pub(super) fn open_all(given: Part) -> Result<Vec<Part>, Error> {
    let count = number(&given, "split.count").unwrap_or(0);
    let Some(name) = PartName::parse(&given.path) else {
        return match count {
            0 | 1 => Ok(vec![given]),
            n => Err(error(&given, "split.count", Rule::PartName(n))),
        };
    };
    if count == 0 {
        // a name like a part's, but no part: one model in one file
        return Ok(vec![given]);
    }
    let mut parts = Vec::new();
    let mut given = Some(given);
    for no in 1..=name.count {
        let part = match given.take_if(|_| no == name.no) {
            Some(part) => part,
            None => match Part::open(&name.path(no)) {
                Err(e) if matches!(&*e.rule, Rule::Io(io) if io.kind() == std::io::ErrorKind::NotFound) => {
                    return Err(Error::file(name.path(no), Rule::PartMissing { no, count: name.count }));
                }
                other => other?,
            },
        };
        let says_no = number(&part, "split.no").map(|n| n.saturating_add(1));
        let says_count = number(&part, "split.count");
        if (says_no, says_count) != (Some(no.into()), Some(name.count.into())) {
            let (want_no, want_count) = (no, name.count);
            let rule = Rule::PartMismatch { no: says_no, count: says_count, want_no, want_count };
            return Err(error(&part, "split.no", rule));
        }
        parts.push(part);
    }
    let found = parts.iter().map(|p| p.header.tensors.len() as u64).sum();
    match number(&parts[0], "split.tensors.count") {
        Some(announced) if announced != found => {
            Err(error(&parts[0], "split.tensors.count", Rule::PartTensors { found, announced }))
        }
        _ => Ok(parts),
    }
}

fn number(part: &Part, key: &str) -> Option<u64> {
    part.get(key).as_ref().and_then(Value::as_u64)
}

fn error(part: &Part, key: &str, rule: Rule) -> Error {
    Error { file: part.path.clone(), place: Place::Key(key.to_owned()), offset: None, rule: Box::new(rule) }
}

/// A file name of the form `NAME-00002-of-00004.gguf`.
pub(crate) struct PartName {
    pub(crate) folder: PathBuf,
    pub(crate) stem: String,
    no: u32,
    pub(crate) count: u32,
}

impl PartName {
    pub(crate) fn parse(path: &Path) -> Option<PartName> {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = name.rsplit_once("-of-")?;
        let (stem, no) = rest.rsplit_once('-')?;
        let five =
            |s: &str| (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok())?;
        let (no, count) = (five(no)?, five(count)?);
        let folder = path.parent().map(Path::to_owned).unwrap_or_default();
        (1..=count).contains(&no).then(|| PartName { folder, stem: stem.to_owned(), no, count })
    }

    fn path(&self, no: u32) -> PathBuf {
        self.folder.join(format!("{}-{no:05}-of-{:05}.gguf", self.stem, self.count))
    }
}
