//! The ways out of the library's errors, in the words of the command line: which option to write, which program to run.
//!
//! The library names its own methods. What it says without naming one is said as it is.

use dim::Error;
use dim::host::template::TemplateError;
use dim_core::pipeline::PipelineError;
use dim_core::stage::StageError;
use dim_wire::HandshakeError;
use dim_wire::keys::KeyError;
use dim_wire::message::{ErrorCode, Fault};
use dim_wire::terms::Reason;
use dim_wire::transport::{LinkError, LinkErrorKind};

/// What an option of the library is called here, behind its dashes.
pub(crate) fn option(library: &str) -> String {
    match library {
        "n_ctx" => "ctx".to_owned(),
        "n_ubatch" => "ubatch".to_owned(),
        "n_threads" => "threads".to_owned(),
        "temperature" => "temp".to_owned(),
        "sessions" | "max_sessions" => "parallel".to_owned(),
        other => other.replace('_', "-"),
    }
}

/// What to do about an error.
pub(crate) fn hint(error: &Error) -> Option<String> {
    let text = match error {
        Error::NotTheModel(_) => {
            "give the file that dim-split cut; the slices run with --split STEM.split.json"
        }
        Error::CutFromAnother { .. } => {
            "give the file that dim-split cut, or cut this one: dim-split MODEL.gguf --middle A..B"
        }
        Error::WrongRole { .. } => "--split STEM.split.json names all files at once",
        Error::NotAMiddle { .. } => "the head and the tail stay with dim-host",
        Error::NobodyHas { .. } => {
            "name the worker that holds them with --worker ADDR:PORT, or the file with --middle FILE"
        }
        Error::NotHere { .. } | Error::Discover(_) => NAME_THE_WORKER,
        Error::NoReserve { .. } | Error::NoReserveNamed { .. } => {
            "copy the workers' slices beside STEM.split.json, or name them with --middle FILE; or do without --fallback local"
        }
        Error::NoKey { address, .. } => {
            let pair = format!("dim-host pair {address}, with the code that the worker shows");
            return Some(format!("{pair}; or --key-file FILE, the same on both sides"));
        }
        Error::Key(KeyError::NoHome) => "name a key with --key-file FILE",
        Error::NothingAtAssumedPort { .. } => {
            "start dim-worker there first, and name the port that it shows: --worker ADDR:PORT"
        }
        Error::NoSliceThere { .. } => {
            "packages reach a phone with `dim-host push STEM.middle-A..B.coreml --worker ADDR:PORT`"
        }
        Error::NoneFound { any_seen: false, .. } => {
            "none was seen: is it running on this network, the phone's app in the foreground? or name the worker \
             with --worker ADDR:PORT"
        }
        Error::NoneFound { any_seen: true, .. } => {
            "the lines above say what is wrong with each that was seen; or name the worker with --worker ADDR:PORT"
        }
        Error::Listen(_) => "--listen takes an address of this machine and a port, as 0.0.0.0:7878",
        Error::TooFewSessions { needed, .. } => {
            return Some(format!("start it with --parallel {needed}, or the host with fewer sessions"));
        }
        Error::Load { .. } | Error::Llama(llama_sys_patch::Error::OutOfMemory(_)) => LESS_MEMORY,
        Error::EmptyPrompt => "give at least one character with -p or -f",
        Error::PromptTooLong { n_tokens, .. } => {
            let enough = n_tokens.next_power_of_two();
            return Some(format!("start with --ctx {enough} or more, on the workers too"));
        }
        Error::Template(TemplateError::None) => {
            "--chat-template chatml talks to it all the same; for plain text: dim-host generate -p TEXT"
        }
        Error::Template(error) if !matches!(error, TemplateError::NotStarted(_)) => {
            "`--chat-template chatml`, or a template of yours, takes its place"
        }
        Error::Pipeline(PipelineError::WorkerGone { .. } | PipelineError::WorkerKeepsFailing { .. }) => {
            "start the worker again, then run the same command; what was generated so far stands above"
        }
        Error::Check { source, .. } if source.may_pass() => "start it again, then run the same command",
        Error::Link(link) => return of_link(link).map(str::to_owned).or_else(|| error.hint()),
        Error::Check { source, .. } | Error::Pipeline(PipelineError::Stage { source, .. }) => {
            return of_stage(source).map(str::to_owned).or_else(|| error.hint());
        }
        _ => return error.hint(),
    };
    Some(text.to_owned())
}

fn of_link(error: &LinkError) -> Option<&'static str> {
    match &error.kind {
        LinkErrorKind::Refused { reason: Reason::NoMemory, .. } => {
            Some("close other apps on it, take a smaller --ctx, or give it fewer blocks")
        }
        LinkErrorKind::Handshake(HandshakeError::Key) => Some(
            "pair again: `dim-worker --pair`, then `dim-host pair ADDR:PORT`; or give both the same --key-file",
        ),
        LinkErrorKind::Fault(Fault { code: ErrorCode::Revoked, .. }) => {
            Some("`dim-worker --pair`, then `dim-host pair ADDR:PORT`")
        }
        LinkErrorKind::Fault(Fault { code: ErrorCode::NoMemory, .. }) => {
            Some("a smaller --ctx takes less memory there")
        }
        _ => None,
    }
}

fn of_stage(error: &StageError) -> Option<&'static str> {
    match error {
        StageError::Wrong { .. } => Some(
            "don't use that worker as it is: start it with --verify always, and if its slice is whole, with --gpu-layers \
             0; a phone: push its blocks again",
        ),
        StageError::NotFinite { .. } | StageError::TooLargeForF16 { .. } => {
            Some("repeat with --wire f32, or give these blocks to the host")
        }
        _ => None,
    }
}

const LESS_MEMORY: &str = "a smaller --ctx needs less memory, and so do fewer blocks here; or close other programs, or allow \
                           this one more (ulimit -v, the limit of its container)";
const NAME_THE_WORKER: &str = "name the worker with --worker ADDR:PORT";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_library_says_in_its_own_words_is_said_in_options_here() {
        let said = |error: &Error| (error.hint().unwrap(), hint(error).unwrap());
        let (library, here) = said(&Error::PromptTooLong { n_tokens: 300, n_ctx: 256 });
        assert!(library.contains("n_ctx") && here == "start with --ctx 512 or more, on the workers too");
        let source = StageError::NotFinite { block: Some(1), count: 1, said: None };
        let error = Error::Pipeline(PipelineError::Stage { stage: "middle".to_owned(), source });
        let (library, here) = said(&error);
        assert!(library.contains("F32 rows") && here.contains("--wire f32"));
        let (library, here) = said(&Error::Link(LinkErrorKind::Handshake(HandshakeError::Key).with("here")));
        assert!(library.contains("the same key") && here.contains("--key-file"));
        // and an option by the name that it has here
        for (library, here) in [("sessions", "parallel"), ("n_ubatch", "ubatch"), ("top_k", "top-k")] {
            assert_eq!(option(library), here);
        }
        // what has no option is said by the library alone
        let (library, here) = said(&Error::TwoHave { block: 1, held: Vec::new() });
        assert_eq!(library, here);
    }
}
