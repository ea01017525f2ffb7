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

/// What llama.cpp would not come to an end with, or not before memory does.
#[test]
fn a_grammar_that_has_no_end_is_refused() {
    let model = model();
    let refused = |gbnf: &str| match Grammar::new(&model, gbnf, &[]) {
        Err(Error::Refused(why)) => why,
        other => panic!("{}: {other:?}", &gbnf[..gbnf.len().min(80)]),
    };
    assert!(refused("root ::= \"a\"{5,3}").contains("{5,3}: it is repeated"));
    assert!(refused("# [ \" \nroot ::= [\"] \"[\" <\"> x { 5 , 3 }\nx ::= \"a\"").contains("{5,3}"));
    for repeated in [format!("\"{}\"{{2000}}", "a".repeat(10_000)), format!("\"a\"{}", "+".repeat(100_000))] {
        assert!(refused(&format!("root ::= {repeated}")).contains("its repetitions make"));
    }
    // every other way through 40 rules, each of which begins with the next one twice
    let mut diamonds = String::from("root ::= r0\n");
    for i in 0..40 {
        diamonds.push_str(&format!("r{i} ::= r{n} | r{n}\n", n = i + 1));
    }
    diamonds.push_str("r40 ::= \"a\"");
    assert!(refused(&diamonds).contains("ways to begin"));
    // e may be empty by way of f alone, which llama.cpp does not see
    let hidden = "root ::= \"a\" x\nx ::= e x \"b\" | \"c\"\ne ::= f\nf ::= | \"q\"";
    assert!(refused(hidden).contains("left recursion: the rule \"x\""));
    let round = "root ::= a\na ::= b\nb ::= c\nc ::= a \"x\" | \"y\"";
    assert!(refused(round).contains("left recursion"));
    // a comment may stand where a number is expected, within brackets
    let hidden = format!("root ::= (\"{}\" {{#\n2000 #\n}})", "a".repeat(10_000));
    assert!(refused(&hidden).contains("its repetitions make"));
    // each of them is a rule whose name is that of its rule and a number
    for many in [".?".repeat(100_000), "(.)".repeat(100_000)] {
        let named = format!("root ::= \"a\"\n{} ::= {many}", "a".repeat(100_000));
        assert!(refused(&named).contains("with a name of 100000 bytes"));
    }
    // ways that all are others, by 516 bytes; ways beside each other; one way through rules one below the other
    let twice: String = (0..20).map(|i| format!("r{i} ::= r{n} \"a\" | r{n} \"b\"\n", n = i + 1)).collect();
    let below: String = (0..20_000).map(|i| format!("r{i} ::= r{} \"b\"\n", i + 1)).collect();
    for many in [
        format!("root ::= r0\n{twice}r20 ::= \"x\""),
        format!("root ::= \"y\" r0\n{twice}r20 ::= \"x\""),
        format!("root ::= {}", vec!["."; 300_000].join("|")),
        format!("root ::= \"a\" r0 \"b\"\n{below}r20000 ::= \"c\""),
    ] {
        let why = refused(&many);
        assert!(why.contains("may go on in too many ways"), "{why}");
    }
    let words: Vec<String> = (0..8_000).map(|i| format!("\"{i}\"")).collect();
    let words = format!("root ::= \"aa\" | {}", words.join(" | "));
    // what may be nothing is known of the last rule first
    let rules: String = (0..60_000).map(|i| format!("r{i}::=r{}\n", i + 1)).collect();
    let nothing = format!("root ::= \"aa\" r0\n{rules}r60000::=");
    for fine in [
        words.as_str(),
        nothing.as_str(),
        "root ::= \"a\"{2} [a-z\\]]{0,3} (\"b\" | \"c\"){1,} \"{5,3}\"?",
        "root ::= x\nx ::= \"a\" x | e\ne ::= f f\nf ::= | \"q\"",
        // round and round through what may be nothing, and nothing is left behind
        "root ::= (\"a\"* e)*\ne ::= f f\nf ::= | \"q\"",
        "root ::= ((\"b\"? \"a\"?)* \"c\"?)*",
        "root ::= \"a\"{0,1000000}",
    ] {
        assert!(takes(&model, &mut grammar(&model, fine), "aa"), "{fine}");
    }
}

/// Each letter can be that of either alternative, and no text says yet which.
#[test]
fn an_ambiguous_grammar_ends_with_an_error_before_memory_does() {
    let model = model();
    let ambiguous = "root ::= x\nx ::= \"a\" x \"b\" | \"a\" x \"c\" | \"d\"";
    let mut grammar = grammar(&model, ambiguous);
    let token = model.tokenize("a", false, false).unwrap()[0];
    let error = (0..64).find_map(|_| grammar.accept(token).err()).expect("an error");
    assert!(error.to_string().contains("ambiguous"), "{error}");
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
