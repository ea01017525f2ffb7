//! Ctrl-C: the first one asks the reply to stop, the second one, or one while nothing is generated, ends the
//! program.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gguf_tools::tell;

use crate::type_ahead;

/// Two flags shared with the thread that waits for the signal.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    stop: Arc<AtomicBool>,
    generating: Arc<AtomicBool>,
}

impl Interrupt {
    /// Starts to watch SIGINT. Where that is not possible, Ctrl-C ends the program as usual.
    pub fn watch() -> Interrupt {
        let interrupt = Interrupt::default();
        let flags = interrupt.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
        let Ok(runtime) = runtime else { return interrupt };
        std::thread::spawn(move || {
            runtime.block_on(async {
                let mut has_asked = false;
                while hear(&mut has_asked, &flags).await {}
            });
        });
        interrupt
    }

    /// The same for SIGTERM, by which services are stopped.
    pub fn and_terminate(self) -> Interrupt {
        #[cfg(unix)]
        {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
            let Ok(runtime) = runtime else { return self };
            let flags = self.clone();
            std::thread::spawn(move || {
                runtime.block_on(async {
                    let kind = tokio::signal::unix::SignalKind::terminate();
                    let Ok(mut terminate) = tokio::signal::unix::signal(kind) else { return };
                    while terminate.recv().await.is_some() {
                        if !flags.generating.load(Ordering::SeqCst) || flags.stop.swap(true, Ordering::SeqCst)
                        {
                            type_ahead::restore();
                            // as of the first one
                            llama_sys_patch::end_process(EXIT_TERMINATED);
                        }
                    }
                });
            });
        }
        self
    }

    /// Set while the person wants the reply to stop.
    pub fn stop_flag(&self) -> &AtomicBool {
        &self.stop
    }

    /// Runs `reply`; a Ctrl-C during it sets [`stop_flag`](Self::stop_flag) instead of ending the program.
    pub fn during<T>(&self, reply: impl FnOnce() -> T) -> T {
        self.stop.store(false, Ordering::SeqCst);
        self.generating.store(true, Ordering::SeqCst);
        let result = reply();
        self.generating.store(false, Ordering::SeqCst);
        result
    }
}

/// Waits for the next Ctrl-C and does what it asks for; says so where that takes long. Whether there can be more.
async fn hear(has_asked: &mut bool, flags: &Interrupt) -> bool {
    let is_stopping = || flags.generating.load(Ordering::SeqCst) && flags.stop.load(Ordering::SeqCst);
    let signal = match *has_asked {
        false => tokio::signal::ctrl_c().await,
        true => match tokio::time::timeout(SOON, tokio::signal::ctrl_c()).await {
            Ok(signal) => signal,
            Err(_) => {
                *has_asked = false;
                if is_stopping() {
                    tell!("\n[stopping; Ctrl-C again ends this]");
                }
                return true;
            }
        },
    };
    if !flags.generating.load(Ordering::SeqCst) || flags.stop.swap(true, Ordering::SeqCst) {
        tell!();
        type_ahead::restore();
        // the main thread may be anywhere in C++: its objects must not be taken down under it
        llama_sys_patch::end_process(EXIT_INTERRUPTED);
    }
    *has_asked = true;
    signal.is_ok()
}

/// What takes longer is worth a word.
const SOON: Duration = Duration::from_millis(150);
/// 128 + SIGTERM.
#[cfg(unix)]
const EXIT_TERMINATED: i32 = 143;
/// 128 + SIGINT, as shells report it.
const EXIT_INTERRUPTED: i32 = 130;
