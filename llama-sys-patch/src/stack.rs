//! Room on the stack for code that recurses as deep as its input is long.
//!
//! llama.cpp splits a text by regular expressions before it makes tokens of it, and libstdc++'s `std::regex` calls
//! itself once per character of a match: 30,000 times `A` overflow 8 MiB with the pre-tokenizers of Mistral or Phi 4
//! mini, and nothing can be caught then (ggml-org/llama.cpp #27783). So the tokenizer runs on a stack as large as the
//! longest match can need.

use crate::Error;

/// Stack that one character of a match takes at most. Seen with libstdc++ 12: 330 bytes; `tests/tokenizer.rs` shows
/// that this is enough for every pre-tokenizer.
const BYTES_PER_CHARACTER: usize = 1 << 10;
/// Beside it, for everything else.
const BASE: usize = 1 << 20;
/// Runs this short need no stack of their own: the smallest that a thread of Rust has is 2 MiB.
const SHORT: usize = 512;
/// The longest run there may be: 1 GiB of stack, which is only touched as far as a match goes.
pub(crate) const LONGEST: usize = 1 << 20;

/// Stack that a bracket of an answer takes at most in llama.cpp's parsers. Seen with g++ 12: 2 KiB; `tests/chat.rs` shows that
/// this is enough.
const BYTES_PER_BRACKET: usize = 8 << 10;
/// Brackets there may be in a text: 1 GiB of stack.
const MOST_BRACKETS: usize = 1 << 17;
/// So few need no stack of their own.
const FEW_BRACKETS: usize = 64;

/// Runs `work`, which may recurse once for every character of a match in `text`.
///
/// # Errors
/// [`Error::InvalidArgument`] if the text has a run that is too long, [`Error::OutOfMemory`] if there is no room.
pub(crate) fn with_room_for<T: Send>(text: &str, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let (at, run) = longest_run(text);
    if run <= SHORT {
        return Ok(work());
    }
    if run > LONGEST {
        return Err(Error::InvalidArgument(format!(
            "the text has a line of {run} characters at byte {at}: the tokenizer takes at most {LONGEST}; break it \
             into lines"
        )));
    }
    on_a_stack_of(run * BYTES_PER_CHARACTER, work)
}

/// Runs `work`, which may recurse once for every one of `brackets`, opening and closing ones by turns, that is open in `text`.
///
/// How many are open nobody knows who does not know what is a string there and what isn't. So the count that takes no notice
/// of strings has a bound, and the stack is for all brackets that the text opens, as if none were ever closed: it is only
/// touched as far as `work` goes.
///
/// # Errors
/// [`Error::Refused`]: more than `max_depth` are open at a time, or the text opens too many; [`Error::OutOfMemory`] if there
/// is no room.
pub(crate) fn with_room_for_brackets<T: Send>(
    text: &str,
    brackets: &[u8],
    max_depth: usize,
    work: impl FnOnce() -> T + Send,
) -> Result<T, Error> {
    let (mut depth, mut deepest, mut opened) = (0usize, 0, 0usize);
    for byte in text.bytes() {
        match brackets.iter().position(|&bracket| bracket == byte) {
            Some(i) if i % 2 == 0 => {
                opened += 1;
                depth += 1;
                deepest = deepest.max(depth);
            }
            Some(_) => depth = depth.saturating_sub(1),
            None => {}
        }
    }
    if deepest > max_depth {
        return Err(Error::Refused(format!("it has more than {max_depth} brackets open at a time")));
    }
    if opened > MOST_BRACKETS {
        return Err(Error::Refused(format!("it has {opened} brackets: at most {MOST_BRACKETS}")));
    }
    if opened <= FEW_BRACKETS {
        return Ok(work());
    }
    on_a_stack_of(opened * BYTES_PER_BRACKET, work)
}

/// Runs `work` on a stack of at least so many bytes.
///
/// # Errors
/// [`Error::OutOfMemory`] if there is no room.
pub(crate) fn on_a_stack_of<T: Send>(bytes: usize, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let thread = std::thread::Builder::new().stack_size(BASE + bytes);
    std::thread::scope(|scope| match thread.spawn_scoped(scope, work) {
        Ok(running) => running.join().map_err(|panic| std::panic::resume_unwind(panic)),
        Err(e) => Err(Error::OutOfMemory(format!("no stack of {} MiB: {e}", (BASE + bytes) >> 20))),
    })
}

/// Where the longest part of the text begins that a single match can span, and its characters. No pre-tokenizer's
/// match goes on over a line's end into something that is no white space.
fn longest_run(text: &str) -> (usize, usize) {
    let (mut longest, mut begin, mut count, mut after_line) = ((0, 0), 0, 0, false);
    for (at, character) in text.char_indices() {
        if after_line && !character.is_whitespace() {
            (begin, count) = (at, 0);
        }
        after_line = character == '\n' || (after_line && character.is_whitespace());
        count += 1;
        if count > longest.1 {
            longest = (begin, count);
        }
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::longest_run;

    #[test]
    fn a_run_ends_where_a_line_with_something_in_it_begins() {
        assert_eq!(longest_run(""), (0, 0));
        assert_eq!(longest_run("abc"), (0, 3));
        assert_eq!(longest_run("ab\nabcd"), (3, 4));
        assert_eq!(longest_run("ab\n \n  cdefghij"), (7, 8), "white space over lines is one match");
        assert_eq!(longest_run("ä\n\n\n"), (0, 4));
        assert_eq!(longest_run("a b c d"), (0, 7), "some pre-tokenizers match whole lines");
    }
}
