//! A conversation as a file: a JSON array of messages, as OpenAI's API has them.

use std::io::Write as _;
use std::path::Path;

use dim::host::template::{Role, Turn};
use gguf_tools::failure::Failure;
use gguf_tools::gguf::write::TempFile;
use serde_json::{Value, json};

use crate::text;

const ROLES: [(Role, &str); 3] =
    [(Role::System, "system"), (Role::User, "user"), (Role::Assistant, "assistant")];

/// Writes it beside and puts it in its place, so that a full disk keeps the one before.
///
/// # Errors
/// It cannot be written.
pub(super) fn write(path: &Path, turns: &[Turn]) -> Result<(), Failure> {
    let name = |role| ROLES.iter().find(|(r, _)| *r == role).map_or("user", |(_, name)| name);
    let messages: Vec<Value> =
        turns.iter().map(|turn| json!({ "role": name(turn.role), "content": turn.content })).collect();
    let cannot = |e: std::io::Error| {
        Failure::failed(format!("cannot keep the conversation in {}: {e}", path.display()))
    };
    let text = serde_json::to_string_pretty(&messages).map_err(Failure::failed)?;
    let (temp, mut file) = TempFile::create(path).map_err(cannot)?;
    writeln!(file, "{text}").map_err(cannot)?;
    temp.publish(path).map_err(cannot)
}

/// Reads one.
///
/// # Errors
/// It cannot be read, or is none.
pub(super) fn read(path: &Path) -> Result<Vec<Turn>, Failure> {
    let file = path.display();
    let text =
        text::read(path, MAX_MIB).map_err(|why| Failure::misuse(format!("cannot read {file}: {why}")))?;
    let none = |why: String| {
        Failure::misuse(format!("{file} is not a conversation: {why}"))
            .hint("`--save FILE` and `/save FILE` write one")
    };
    let messages: Vec<Value> = serde_json::from_str(&text).map_err(|e| none(e.to_string()))?;
    let turn = |(i, message): (usize, &Value)| {
        let field = |name| message.get(name).and_then(Value::as_str);
        let role = field("role").and_then(|given| ROLES.iter().find(|(_, name)| *name == given));
        match (role, field("content")) {
            (Some((role, _)), Some(content)) => Ok(Turn { role: *role, content: content.to_owned() }),
            _ => Err(none(format!(
                "message {} has no `role` of system, user, assistant with a `content`",
                i + 1
            ))),
        }
    };
    messages.iter().enumerate().map(turn).collect()
}

/// Far above what any context holds.
const MAX_MIB: u64 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_again_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("talk.json");
        let turn = |role, content: &str| Turn { role, content: content.to_owned() };
        let turns =
            [turn(Role::System, "Be \"brief\"."), turn(Role::User, "é\n\u{1b}"), turn(Role::Assistant, "")];
        write(&file, &turns).unwrap();
        assert_eq!(read(&file).unwrap(), turns);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        for wrong in ["", "{}", "[1]", r#"[{"role":"tool","content":"x"}]"#, r#"[{"role":"user"}]"#] {
            std::fs::write(&file, wrong).unwrap();
            let failure = read(&file).unwrap_err();
            assert!(failure.message().contains("is not a conversation"), "{failure}");
        }
    }
}
