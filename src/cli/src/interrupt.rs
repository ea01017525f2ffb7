//! Ctrl-C: the first one asks the reply to stop, the second one, or one while nothing is generated, ends the
//! program.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gguf_tools::tell;

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
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let Ok(runtime) = runtime else { return interrupt };
        std::thread::spawn(move || {
            runtime.block_on(async {
                while tokio::signal::ctrl_c().await.is_ok() {
                    let reply_runs = flags.generating.load(Ordering::SeqCst);
                    if !reply_runs || flags.stop.swap(true, Ordering::SeqCst) {
                        tell!();
                        // the main thread may be anywhere in C++: its objects must not be taken down under it
                        llama_sys_patch::end_process(EXIT_INTERRUPTED);
                    }
                }
            });
        });
        interrupt
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

/// 128 + SIGINT, as shells report it.
const EXIT_INTERRUPTED: i32 = 130;
