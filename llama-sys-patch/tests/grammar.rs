//! Grammars in GBNF: what they let through, what they refuse, and those that are made to end the process.

use gguf_tools::synth::Spec;
use llama_sys_patch::{Error, Grammar, Model};

mod common;

fn model() -> Model {
    common::load(&Spec::tiny("qwen2").unwrap())
}

fn grammar(model: &Model, gbnf: &str) -> Grammar {
    Grammar::new(model, gbnf, &[]).unwrap_or_else(|e| panic!("{gbnf}: {e}"))
}

/// The tokens of `text`, and whether `grammar` takes them one after the other.
fn takes(model: &Model, grammar: &mut Grammar, text: &str) -> bool {
    let tokens = model.tokenize(text, false, false).unwrap();
    tokens.iter().all(|&token| {
        let allowed = grammar.allows(token).unwrap();
        assert_eq!(grammar.accept(token).is_ok(), allowed, "{text}: {token}");
        allowed
    })
}

/// What may come next, by the whole vocabulary, held against the question about each token.
fn allowed(model: &Model, grammar: &Grammar) -> Vec<i32> {
    let mut logits = vec![0.0; model.n_vocab()];
    grammar.apply(&mut logits).unwrap();
    let ids = 0..i32::try_from(model.n_vocab()).unwrap();
    let all: Vec<i32> = ids.clone().filter(|&id| logits[id as usize] == 0.0).collect();
    assert_eq!(all, ids.filter(|&id| grammar.allows(id).unwrap()).collect::<Vec<_>>());
    all
}

#[test]
fn a_grammar_lets_through_what_it_says_and_nothing_else() {
    let model = model();
    let gbnf = "root ::= \"yes\" | \"no\" [0-9]+";
    assert!(takes(&model, &mut grammar(&model, gbnf), "no42"));
    assert!(!takes(&model, &mut grammar(&model, gbnf), "nope"));
    let mut yes = grammar(&model, gbnf);
    let eos = model.eos().unwrap();
    assert!(!yes.allows(eos).unwrap(), "it may not end before it has begun");
    assert!(matches!(yes.accept(eos), Err(Error::Refused(_))), "and that is no end of the process");
    assert!(takes(&model, &mut yes, "yes"));
    let next = allowed(&model, &yes);
    assert!(!next.is_empty() && next.iter().all(|&id| model.is_eog(id)), "{next:?}");
    yes.accept(eos).unwrap();
    let nothing = allowed(&model, &grammar(&model, "\n# nothing at all\nroot ::= "));
    assert!(nothing.contains(&eos) && nothing.iter().all(|&id| model.is_eog(id)), "{nothing:?}");
    let mut prefilled = grammar(&model, gbnf);
    prefilled.accept_text("n").unwrap();
    assert!(takes(&model, &mut prefilled, "o1"));
    assert!(matches!(grammar(&model, gbnf).accept_text("x"), Err(Error::Refused(_))));
    assert!(matches!(yes.allows(-1), Err(Error::UnknownToken { .. })));
    assert!(matches!(yes.accept(i32::MAX), Err(Error::UnknownToken { .. })));
}

#[test]
fn a_lazy_grammar_holds_from_its_trigger_on_however_late_it_comes() {
    let model = model();
    let lazy = || Grammar::new(&model, "root ::= \"<call>\" [0-9]+", &["<call>".to_owned()]).unwrap();
    let everything = model.n_vocab();
    for before in ["", "I look. ", &"nothing of the kind. ".repeat(1_000)] {
        let mut lazy = lazy();
        assert!(takes(&model, &mut lazy, before));
        assert_eq!(allowed(&model, &lazy).len(), everything);
        assert!(takes(&model, &mut lazy, "<call>"));
        assert!(allowed(&model, &lazy).len() < everything);
        assert!(!takes(&model, &mut lazy, "x"));
        assert!(takes(&model, &mut lazy, "42"));
    }
}

#[test]
fn what_is_no_grammar_is_refused_with_a_sentence() {
    let model = model();
    for bad in [
        "",
        "root",
        "root ::= x",
        "x ::= \"a\"",
        "root ::= \"a",
        "root ::= [a",
        "root ::= (\"a\"",
        "root ::= root \"a\"",
        "root ::= \"a\"{99999999}",
        "root ::= [[[",
    ] {
        let result = Grammar::new(&model, bad, &[]);
        assert!(matches!(&result, Err(Error::Refused(why)) if !why.is_empty()), "{bad:?}: {result:?}");
    }
    for (bad, what) in [
        ("root", "expecting ::="),
        ("# a comment\n", "no rule \"root\""),
        ("root ::= x", "no rule \"x\""),
        ("root ::= x x ::= y z", "expecting newline"),
    ] {
        let why = Grammar::new(&model, bad, &[]).unwrap_err().to_string();
        assert!(why.contains(what) && !why.contains('\n'), "{bad:?}: {why}");
    }
    assert!(matches!(Grammar::new(&model, "root ::= \"\0\"", &[]), Err(Error::InvalidArgument(_))));
    assert!(matches!(Grammar::new(&model, "root ::= \"a\"", &["(".into()]), Err(Error::Refused(_))));
    let long = format!("root ::= \"{}\"", "a".repeat(Grammar::MAX_BYTES));
    assert!(matches!(Grammar::new(&model, &long, &[]), Err(Error::Refused(why)) if why.contains("at most")));
}

/// A stack that overflows ends this whole test program.
#[test]
fn a_grammar_may_nest_as_deep_as_it_likes() {
    let model = model();
    let mut chain = String::from("root ::= r0\n");
    for i in 0..40_000 {
        chain.push_str(&format!("r{i}::=r{}\n", i + 1));
    }
    chain.push_str("r40000::=\"a\"\n");
    let deep = |n: usize| format!("root ::= {}\"a\"{}", "(".repeat(n), ")".repeat(n));
    for gbnf in [
        chain,
        deep(900),
        deep(100_000),
        format!("root ::= {}", "(".repeat(100_000)),
        format!("root ::= \"{}\"", "(".repeat(100_000)),
    ] {
        match Grammar::new(&model, &gbnf, &[]) {
            Ok(mut grammar) => assert!(takes(&model, &mut grammar, "a")),
            Err(e) => assert!(matches!(e, Error::Refused(_)), "{e}"),
        }
    }
}
