//! What people type who come from llama.cpp: its short options of several letters, its underscores, its escapes, and its
//! options that have no place here.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// llama.cpp's short options of several letters, and what they are called in full. To this program's parser `-ngl 99`
/// would be `-n gl 99`.
const LONG: [(&str, &str); 34] = [
    ("-ngl", "--gpu-layers"),
    ("-ub", "--ubatch-size"),
    ("-fa", "--flash-attn"),
    ("-jf", "--json-schema-file"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-sys", "--system-prompt"),
    ("-sp", "--special"),
    ("-tb", "--threads-batch"),
    ("-hf", "--hf-repo"),
    ("-cnv", "--conversation"),
    ("-no-cnv", "--no-conversation"),
    ("-dev", "--device"),
    ("-sm", "--split-mode"),
    ("-ts", "--tensor-split"),
    ("-mg", "--main-gpu"),
    ("-md", "--model-draft"),
    ("-np", "--parallel"),
    ("-st", "--single-turn"),
    ("-sysf", "--system-prompt-file"),
    ("-mli", "--multiline-input"),
    ("-nkvo", "--no-kv-offload"),
    ("-nr", "--no-repack"),
    ("-ot", "--override-tensor"),
    ("-cmoe", "--cpu-moe"),
    ("-ncmoe", "--n-cpu-moe"),
    ("-kvu", "--kv-unified"),
    ("-cb", "--cont-batching"),
    ("-cram", "--cache-ram"),
    ("-fit", "--fit"),
    ("-mm", "--mmproj"),
    ("-bf", "--binary-file"),
    ("-to", "--timeout"),
    ("--n-predict", "--predict"),
];

/// llama.cpp's options that a program here does not have, and what to do instead.
const INSTEAD: [(&[&str], &str); 13] = [
    (
        &["--cache-ram", "--slot-save-path"],
        "`dim-host serve` keeps prompts: --cache-ram MiB, --cache-dir DIR",
    ),
    (
        &["--model", "-m"],
        "it runs the slices of a model: --split STEM.split.json, which `dim-split MODEL.gguf --middle A..B` writes; `dim-host \
         stock -m MODEL.gguf` runs a whole one",
    ),
    (&["--hf-repo"], "`dim-split hf:ORG/REPO:QUANT --middle A..B` fetches a model and cuts it"),
    (&["--conversation", "--interactive", "-i"], "`dim-host chat` is the conversation"),
    (&["--no-conversation", "--single-turn"], "leave it out: only `dim-host chat` is a conversation"),
    (&["--host", "--port"], "--listen ADDR:PORT says both"),
    (&["--parallel"], "one reply at a time here; `dim-host serve --parallel N` gives several"),
    (
        &["--jinja", "--system-prompt-file", "--multiline-input"],
        "templates are for conversations: `dim-host chat` and `dim-host serve` read the model's, or --chat-template; --system \
         begins a chat, and a pasted text of several lines is one message",
    ),
    (&["--threads-batch"], "leave it out: --threads is for prompts, too"),
    (
        &["--mlock", "--numa", "--poll", "--prio", "--no-repack", "--kv-unified", "--cont-batching"],
        "leave it out: memory and threads are left to the system and to this program here",
    ),
    (
        &[
            "--device",
            "--split-mode",
            "--tensor-split",
            "--main-gpu",
            "--no-kv-offload",
            "--override-tensor",
            "--cpu-moe",
            "--n-cpu-moe",
            "--fit",
        ],
        "--gpu-layers says how many blocks go to the GPU; what else leaves this machine goes to a worker",
    ),
    (
        &["--typical", "--mirostat", "--dry-multiplier", "--xtc-probability", "--samplers"],
        "--temp, --top-k, --top-p, --min-p and --repeat-penalty are the samplers here",
    ),
    (
        &["--lora", "--control-vector", "--model-draft", "--mmproj"],
        "adapters, draft models and projectors are not used here",
    ),
];

/// Ends the program as clap does, with a hint for who comes from llama.cpp.
pub fn explain(error: &clap::Error) -> ! {
    let _ = error.print();
    if let Some(hint) = instead(error) {
        eprintln!("hint: {hint}");
    }
    std::process::exit(error.exit_code())
}

/// What to do instead of what was typed.
fn instead(error: &clap::Error) -> Option<&'static str> {
    let typed = match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(ContextValue::String(typed))) => typed,
        _ => return None,
    };
    let name = typed.split(['=', ' ']).next().unwrap_or_default();
    INSTEAD.iter().find(|(names, _)| names.contains(&name)).map(|(_, hint)| *hint)
}

/// The command line with llama.cpp's short options of several letters in full, and its underscores as hyphens
/// (`--top_k`). What follows `--` stays, and so does every value: an argument is only ever replaced whole.
pub fn long_words(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut options_end = false;
    let in_full = |arg: OsString| {
        options_end |= arg == "--";
        let Some(text) = arg.to_str().filter(|_| !options_end) else { return arg };
        if let Some((_, long)) = LONG.iter().find(|(short, _)| *short == text) {
            return OsString::from(long);
        }
        let name = text.split('=').next().unwrap_or_default();
        let is_name =
            name.starts_with("--") && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
        match is_name && name.contains('_') {
            true => OsString::from(format!("{}{}", name.replace('_', "-"), &text[name.len()..])),
            false => arg,
        }
    };
    args.into_iter().map(in_full).collect()
}

/// Text with llama.cpp's escapes: `\n`, `\r`, `\t`, `\'`, `\"`, `\\` and `\xHH` of one byte below 80; another backslash
/// stays what it is.
pub fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let hex = escape.get(2..4).and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(u8::is_ascii);
        let (c, len) = match (escape.as_bytes().get(1), hex) {
            (Some(b'n'), _) => ('\n', 2),
            (Some(b'r'), _) => ('\r', 2),
            (Some(b't'), _) => ('\t', 2),
            (Some(b'\''), _) => ('\'', 2),
            (Some(b'"'), _) => ('"', 2),
            (Some(b'\\'), _) => ('\\', 2),
            (Some(b'x'), Some(byte)) => (char::from(byte), 4),
            _ => ('\\', 1),
        };
        out.push(c);
        rest = &escape[len..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_full(args: &[&str]) -> Vec<String> {
        let words = long_words(args.iter().map(OsString::from));
        words.into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn llama_cpp_s_short_words_are_understood_and_values_stay() {
        assert_eq!(in_full(&["x", "-ngl", "99", "-n", "5"]), ["x", "--gpu-layers", "99", "-n", "5"]);
        assert_eq!(
            in_full(&["--top_k=4", "--min_p", "a_b", "-p", "--x y_z"]),
            ["--top-k=4", "--min-p", "a_b", "-p", "--x y_z"]
        );
        assert_eq!(in_full(&["--", "-ngl", "--top_k"]), ["--", "-ngl", "--top_k"]);
    }

    #[test]
    fn what_has_no_place_here_is_answered_with_what_has() {
        let command =
            || clap::Command::new("x").arg(clap::arg!(-n --predict <N>)).arg(clap::arg!(-c --ctx <N>));
        let hint = |args: &[&str]| {
            let error =
                command().try_get_matches_from(long_words(args.iter().map(OsString::from))).unwrap_err();
            instead(&error)
        };
        for (args, says) in [
            (["x", "-m", "a.gguf"].as_slice(), "--split"),
            (&["x", "-cnv"], "chat"),
            (&["x", "-no-cnv"], "leave it out"),
            (&["x", "--port=80"], "--listen"),
            (&["x", "-tb", "4"], "--threads"),
            (&["x", "-np", "4"], "serve --parallel"),
            (&["x", "-cmoe"], "--gpu-layers"),
            (&["x", "-ncmoe", "4"], "--gpu-layers"),
            (&["x", "-nkvo"], "--gpu-layers"),
            (&["x", "-cram", "9"], "serve"),
            (&["x", "--jinja"], "chat"),
        ] {
            assert!(hint(args).is_some_and(|hint| hint.contains(says)), "{args:?}: {:?}", hint(args));
        }
        assert_eq!(hint(&["x", "--nothing-of-llama.cpp-s"]), None);
        assert_eq!(hint(&["x", "-n"]), None);
        command().try_get_matches_from(long_words(["x", "--n-predict", "4"].map(OsString::from))).unwrap();
    }

    #[test]
    fn escapes_are_llama_cpp_s() {
        assert_eq!(unescaped(r#"a\nb\t\"\\n\q\"#), "a\nb\t\"\\n\\q\\");
        assert_eq!(unescaped(r"\x41\xe9\x4"), r"A\xe9\x4");
        assert_eq!(unescaped("é\\né"), "é\né");
    }
}
