//! What is typed while a reply runs waits for the next prompt, however long it is.
//!
//! A terminal that collects lines drops, without a word, what of a line is beyond 4,095 bytes; one that does not lets whoever
//! pastes wait. So between two prompts it is told not to. A prompt's editor has its own way, and comes back to this one.

#[cfg(unix)]
use std::io::stdin;
#[cfg(unix)]
use std::sync::{Mutex, PoisonError};

#[cfg(unix)]
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};

/// How the terminal was; here, because whoever ends the program in another thread has to put it back, too.
#[cfg(unix)]
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// As long as there is one.
#[derive(Debug)]
pub struct TypeAhead(());

impl TypeAhead {
    /// On standard input, which is a terminal.
    pub fn begin() -> TypeAhead {
        #[cfg(unix)]
        if let Ok(before) = tcgetattr(stdin()) {
            let mut open = before.clone();
            open.local_modes.remove(LocalModes::ICANON);
            open.special_codes[SpecialCodeIndex::VMIN] = 1;
            open.special_codes[SpecialCodeIndex::VTIME] = 0;
            *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
            let _ = tcsetattr(stdin(), OptionalActions::Now, &open);
        }
        TypeAhead(())
    }
}

impl Drop for TypeAhead {
    fn drop(&mut self) {
        restore();
    }
}

/// The terminal as it was before the conversation, if there is one.
pub fn restore() {
    #[cfg(unix)]
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}
