//! A vocabulary as a trie, and schemas as grammars over it.
//!
//! A schema comes from whoever may ask for a reply. It is bounded before (schema.rs), the library counts its own steps, and
//! since the product of small numbers can still be large, nobody waits longer than [`PATIENCE`] for one: what takes longer
//! goes on in a thread of its own to its end, and while [`MOST_AT_ONCE`] do, no other is begun.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use llama_sys_patch::Model;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::{Constraint, ConstraintError, JsonSchema, error, schema};

/// Makes constraints for one vocabulary. The trie is built for the first of them, once.
#[derive(Default)]
pub(crate) struct Compiler {
    factory: OnceLock<Result<Arc<ParserFactory>, ConstraintError>>,
    running: Arc<AtomicUsize>,
}

impl Compiler {
    /// The JSON schema that `text` is, for the vocabulary of `model`.
    pub(crate) fn json_schema(&self, model: &Model, text: &str) -> Result<Constraint, ConstraintError> {
        let schema = schema::read(text)?;
        let factory = self.factory.get_or_init(|| factory(model).map(Arc::new)).clone()?;
        let matcher = self.in_time(factory, schema)?;
        Ok(Constraint::JsonSchema(Arc::new(JsonSchema { matcher, n_vocab: model.n_vocab() })))
    }

    fn in_time(&self, factory: Arc<ParserFactory>, schema: Value) -> Result<Matcher, ConstraintError> {
        let running = Running::begin(&self.running).ok_or(ConstraintError::Busy)?;
        let (sender, receiver) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("schema".to_owned()).stack_size(STACK_BYTES);
        let compile = move || {
            let compiled = compiled(&factory, schema);
            // who has the answer may ask for the next one at once
            drop(running);
            let _ = sender.send(compiled);
        };
        thread.spawn(compile).map_err(|_| ConstraintError::Busy)?;
        match receiver.recv_timeout(PATIENCE) {
            Ok(matcher) => matcher,
            Err(RecvTimeoutError::Timeout) => {
                Err(ConstraintError::TooComplex(format!("it takes longer than {} s", PATIENCE.as_secs())))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(ConstraintError::Unsupported("the library that enforces schemas failed".to_owned()))
            }
        }
    }
}

/// One of the threads that compile, counted until it ends.
struct Running(Arc<AtomicUsize>);

impl Running {
    fn begin(count: &Arc<AtomicUsize>) -> Option<Running> {
        let one_more = |n| (n < MOST_AT_ONCE).then_some(n + 1);
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(Running(Arc::clone(count)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The grammar of `schema`, at its beginning.
fn compiled(factory: &ParserFactory, schema: Value) -> Result<Matcher, ConstraintError> {
    let mut with_options = match &schema {
        Value::Bool(false) => return Err(ConstraintError::Unsatisfiable("it is false".to_owned())),
        Value::Object(_) => schema.clone(),
        _ => json!({}),
    };
    // takes the place of what a client may have written there
    with_options["x-guidance"] = json!({
        "whitespace_pattern": WHITESPACE,
        "json_allowed_escapes": ESCAPES,
    });
    let parser = factory.create_parser(TopLevelGrammar::from_json_schema(with_options));
    let parser = parser.map_err(|e| error::while_compiling(&format!("{e:#}"), &schema))?;
    let mut matcher = Matcher::new(Ok(parser));
    // a schema by which nothing is valid may be known by this alone
    match matcher.compute_mask() {
        Ok(_) => Ok(matcher),
        Err(e) => Err(match error::while_running(&e.to_string()) {
            ConstraintError::NothingFollows => ConstraintError::Unsatisfiable(
                "it has no beginning that this vocabulary can write".to_owned(),
            ),
            other => other,
        }),
    }
}

/// The vocabulary as llguidance wants it.
fn factory(model: &Model) -> Result<ParserFactory, ConstraintError> {
    let n_vocab = model.n_vocab();
    let ids = 0..i32::try_from(n_vocab).unwrap_or(i32::MAX);
    let ends: Vec<u32> =
        ids.clone().filter(|&id| model.is_eog(id)).filter_map(|id| u32::try_from(id).ok()).collect();
    let Some(&end) = ends.first() else {
        return Err(ConstraintError::Vocabulary("its vocabulary has no token that ends a reply"));
    };
    let words: Vec<Vec<u8>> = ids.map(|id| word(model, id)).collect();
    // the trie asserts what it has room for
    let n_bytes: usize = words.iter().map(Vec::len).sum();
    if n_vocab >= MOST_TOKENS || n_bytes >= MOST_BYTES {
        return Err(ConstraintError::Vocabulary("its vocabulary is too large"));
    }
    let info = TokRxInfo::new(u32::try_from(n_vocab).unwrap_or(u32::MAX), end);
    // a model may end a reply with any of them
    let trie = TokTrie::from(&info, &words).with_eos_tokens(&ends);
    let environment: llguidance::toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let slices = SlicedBiasComputer::json_slices();
    let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
        .map_err(|_| ConstraintError::Vocabulary("its vocabulary cannot be read as a trie"))?;
    factory.quiet();
    *factory.limits_mut() = limits();
    Ok(factory)
}

/// What a token adds to the text; nothing for one that may not stand in it.
fn word(model: &Model, id: i32) -> Vec<u8> {
    if model.is_eog(id) {
        return Vec::new();
    }
    let bytes = model.token_bytes(id).unwrap_or_default();
    // 0xff is no byte of any text; in the trie it would be the mark of a control token
    match bytes.len() > LONGEST_TOKEN || bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER) {
        true => Vec::new(),
        false => bytes,
    }
}

/// What one schema and one token may cost, in the library's own units: 50,000 to 14,000 of them a millisecond.
fn limits() -> ParserLimits {
    ParserLimits {
        // an object of 500 optional properties has 2,000
        max_items_in_row: 8_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 100_000,
        // 2 KiB each at most
        max_lexer_states: 50_000,
        max_grammar_size: 500_000,
        precompute_large_lexemes: true,
        // what it says is for clients
        verbose_errors: false,
    }
}

/// Between the parts of a document, as llama.cpp's own grammars have it: an endless row of blanks is valid JSON, and no
/// answer.
const WHITESPACE: &str = " |\n{1,2}[ \t]{0,20}";
/// Without `u`, so that a name is written in one way only: `"\u0061"` would be another name than `"a"` for the grammar, and
/// the same for whoever reads it.
const ESCAPES: &str = "nrbtf\\\"";

/// How long anybody waits for a schema to be compiled. The ordinary ones take milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);
/// How many are compiled at once, those included that nobody waits for any more.
const MOST_AT_ONCE: usize = 4;
/// Of a thread that compiles: the library recurses over what it reads.
const STACK_BYTES: usize = 64 << 20;
/// What the trie has room for: 24 bits for tokens, 22 for its nodes (not more than there are bytes), 10 for a token's.
const MOST_TOKENS: usize = (1 << 24) - 1;
const MOST_BYTES: usize = (1 << 22) - 1;
const LONGEST_TOKEN: usize = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_are_compiled_at_once_than_may_be() {
        let compiler = Compiler::default();
        let mut running: Vec<_> =
            (0..MOST_AT_ONCE).map(|_| Running::begin(&compiler.running).unwrap()).collect();
        let bytes = ApproximateTokEnv::single_byte_env();
        let factory = Arc::new(ParserFactory::new(&bytes, InferenceCapabilities::default(), &[]).unwrap());
        let compile = |schema| compiler.in_time(Arc::clone(&factory), schema).err();
        assert_eq!(compile(json!({})), Some(ConstraintError::Busy));
        running.pop();
        for _ in 0..3 * MOST_AT_ONCE {
            assert_eq!(compile(json!({})), None);
        }
        assert!(matches!(compile(json!(false)), Some(ConstraintError::Unsatisfiable(_))));
    }

    /// What a schema's strings may be written like, in words of single bytes.
    fn takes(schema: Value, text: &str) -> bool {
        let bytes = ApproximateTokEnv::single_byte_env();
        let factory = ParserFactory::new(&bytes, InferenceCapabilities::default(), &[]).unwrap();
        let mut matcher = compiled(&factory, schema).unwrap();
        let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
        matcher.try_consume_tokens(&tokens).unwrap() == tokens.len() && matcher.is_accepting().unwrap()
    }

    #[test]
    fn a_name_is_written_in_one_way_and_blanks_come_to_an_end() {
        let schema = || json!({"properties": {"a": {"type": "integer"}, "\n": {"type": "integer"}}, "x-guidance": {"lenient": true}});
        assert!(takes(schema(), r#"{"a": 1, "b": "x"}"#));
        assert!(!takes(schema(), r#"{"a": "x"}"#) && !takes(schema(), r#"{"\u0061": "x"}"#));
        assert!(!takes(schema(), r#"{"\n": "x"}"#) && !takes(schema(), r#"{"\u000a": "x"}"#));
        assert!(takes(schema(), "{\n\n  \"a\": 1}") && !takes(schema(), "{\n\n\n\"a\": 1}"));
        assert!(!takes(schema(), &format!("{{\n{}\"a\": 1}}", " ".repeat(21))) && !takes(schema(), " {}"));
    }
}
