//! What people type who come from llama.cpp: its short options of several letters, its underscores, its escapes.

use std::ffi::OsString;

/// llama.cpp's short options of several letters, and what they are called in full. To this program's parser `-ngl 99`
/// would be `-n gl 99`.
const LONG: [(&str, &str); 10] = [
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
];

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
    fn escapes_are_llama_cpp_s() {
        assert_eq!(unescaped(r#"a\nb\t\"\\n\q\"#), "a\nb\t\"\\n\\q\\");
        assert_eq!(unescaped(r"\x41\xe9\x4"), r"A\xe9\x4");
        assert_eq!(unescaped("é\\né"), "é\né");
    }
}
