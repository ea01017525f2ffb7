//! `strftime_now` of templates: the local time as Python's `datetime.now().strftime` writes it, in the C locale.

use jiff::Zoned;
use jiff::fmt::strtime;

/// The time now.
pub(super) fn now(format: &str) -> String {
    written(format, &Zoned::now())
}

/// `time` by a format of Python's, on Linux. A time from `now()` has no time zone there, so `%z` and `%Z` are empty; what
/// is no directive stays as it is.
pub(crate) fn written(format: &str, time: &Zoned) -> String {
    let mut out = String::with_capacity(format.len());
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        // %, flags and a width, an alternative that the C locale does not have, the letter
        let is_flag = |c: char| "-_0^#".contains(c) || c.is_ascii_digit();
        let flags = &rest[1..rest[1..].find(|c| !is_flag(c)).map_or(rest.len(), |n| n + 1)];
        let after_flags = &rest[1 + flags.len()..];
        let letters = after_flags.strip_prefix(['E', 'O']).unwrap_or(after_flags);
        let Some(letter) = letters.chars().next() else { break };
        let (directive, after) = rest.split_at(rest.len() - letters.len() + letter.len_utf8());
        match one(flags, letter, time) {
            Some(text) => out.push_str(&text),
            None => out.push_str(directive),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// One directive; `None`: it is none.
fn one(flags: &str, letter: char, time: &Zoned) -> Option<String> {
    Some(match letter {
        'c' => written("%a %b %e %H:%M:%S %Y", time),
        'x' | 'D' => written("%m/%d/%y", time),
        'X' => written("%H:%M:%S", time),
        'r' => written("%I:%M:%S %p", time),
        'f' => format!("{:06}", time.subsec_nanosecond() / 1000),
        'z' | 'Z' => String::new(),
        'y' if flags.is_empty() => format!("{:02}", time.year().rem_euclid(100)),
        letter if KNOWN.contains(letter) && flags.len() < 4 => {
            strtime::format(format!("%{flags}{letter}"), time).ok()?
        }
        _ => return None,
    })
}

/// What Python hands to the system, and both read alike.
const KNOWN: &str = "aAbBCdeFgGhHIjklmMnpPRsStTuUVwWyY%";

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by Python: tests/oracle/chat_templates.py.
    #[derive(serde::Deserialize)]
    struct Date {
        time: String,
        format: String,
        written: String,
    }

    #[test]
    fn dates_are_written_as_python_writes_them() {
        let dates: Vec<Date> = serde_json::from_str(include_str!("../../../tests/texts/dates.json")).unwrap();
        assert!(dates.len() > 100);
        for Date { time, format, written: expected } in dates {
            let time = time.parse::<jiff::civil::DateTime>().unwrap().in_tz("UTC").unwrap();
            assert_eq!(written(&format, &time), expected, "{format:?} at {time}");
        }
    }
}
