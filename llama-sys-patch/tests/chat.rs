//! Chat templates of the forms that families have, each with what its models answer: rendered, and read again. The
//! templates are written for this test, as short as the family's own marks allow; llama.cpp tells families by those marks.

use gguf_tools::synth::Spec;
use llama_sys_patch::{AnswerParser, ChatTemplate, Error, Grammar};

mod common;

/// One way of writing a call, and what a model of that family says.
struct Family {
    name: &'static str,
    template: &'static str,
    /// with a call of `weather({"city": "Paris"})`
    answer: &'static str,
    /// what it says beside the call
    content: &'static str,
    reasoning: &'static str,
}

const FAMILIES: [Family; 5] = [
    Family {
        name: "Hermes, Qwen 2.5 and 3",
        template: include_str!("templates/hermes.jinja"),
        answer: "I look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>",
        content: "I look.",
        reasoning: "",
    },
    Family {
        name: "with a reasoning part",
        template: include_str!("templates/thinks.jinja"),
        answer: "<think>\nWhere?\n</think>\n\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>",
        content: "",
        reasoning: "Where?",
    },
    Family {
        name: "Llama 3",
        template: include_str!("templates/llama3.jinja"),
        answer: "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}",
        content: "",
        reasoning: "",
    },
    Family {
        name: "Mistral",
        template: include_str!("templates/mistral.jinja"),
        answer: "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}, \"id\": \"123456789\"}]",
        content: "",
        reasoning: "",
    },
    Family {
        name: "Qwen 3 Coder",
        template: include_str!("templates/coder.jinja"),
        answer: "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        content: "",
        reasoning: "",
    },
];

const TOOLS: &str = r#"[{"type": "function", "function": {"name": "weather", "description": "How it is outside",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]"#;

fn request(choice: &str, tools: &str) -> String {
    format!(
        r#"{{"messages": [{{"role": "user", "content": "What is it like in Paris?"}}], "tools": {tools},
            "tool_choice": "{choice}"}}"#
    )
}

/// A member of what llama.cpp answers. JSON as it writes it, without a reader of our own: `"name":` and a text or a word.
fn member(json: &str, name: &str) -> String {
    let at = json.find(&format!("\"{name}\":")).unwrap_or_else(|| panic!("{name} in {json}"));
    let value = &json[at + name.len() + 3..];
    let Some(text) = value.strip_prefix('"') else {
        let end = value.find([',', '}']).unwrap();
        return value[..end].to_owned();
    };
    let mut out = String::new();
    let mut chars = text.chars();
    loop {
        match chars.next().unwrap() {
            '"' => return out,
            '\\' => match chars.next().unwrap() {
                'n' => out.push('\n'),
                'r' => out.push('\r'),
                't' => out.push('\t'),
                'u' => {
                    let code: String = chars.by_ref().take(4).collect();
                    out.push(char::from_u32(u32::from_str_radix(&code, 16).unwrap()).unwrap());
                }
                other => out.push(other),
            },
            other => out.push(other),
        }
    }
}

fn apply(family: &Family, choice: &str) -> String {
    let template = ChatTemplate::new(family.template, "<s>", "</s>").unwrap();
    template.apply(&request(choice, TOOLS)).unwrap_or_else(|e| panic!("{}: {e}", family.name))
}

#[test]
fn a_call_of_every_family_is_read_again() {
    for family in &FAMILIES {
        let applied = apply(family, "auto");
        let prompt = member(&applied, "prompt");
        assert!(
            prompt.contains("What is it like in Paris?") && prompt.contains("weather"),
            "{}: {prompt}",
            family.name
        );
        assert_eq!(member(&applied, "takes_tools"), "true", "{}", family.name);
        let parser = AnswerParser::new(&member(&applied, "parser")).unwrap();
        let message = parser.parse(family.answer, false).unwrap_or_else(|e| panic!("{}: {e}", family.name));
        assert_eq!(member(&message, "name"), "weather", "{}: {message}", family.name);
        let arguments: String = member(&message, "arguments").split_whitespace().collect();
        assert_eq!(arguments, "{\"city\":\"Paris\"}", "{}: {message}", family.name);
        assert_eq!(member(&message, "content").trim(), family.content, "{}: {message}", family.name);
        assert_eq!(
            member(&message, "reasoning_content").trim(),
            family.reasoning,
            "{}: {message}",
            family.name
        );
    }
}

#[test]
fn every_beginning_of_an_answer_can_be_read_and_says_no_more_than_the_whole() {
    for family in &FAMILIES {
        let parser = AnswerParser::new(&member(&apply(family, "auto"), "parser")).unwrap();
        let whole = parser.parse(family.answer, false).unwrap();
        let reasoning = member(&whole, "reasoning_content");
        let mut n_read = 0;
        for end in 0..=family.answer.len() {
            let message = match parser.parse(&family.answer[..end], true) {
                Ok(message) => message,
                Err(Error::Refused(_)) => continue,
                Err(e) => panic!("{}: {e}", family.name),
            };
            n_read += 1;
            assert!(
                reasoning.starts_with(&member(&message, "reasoning_content")),
                "{}: {message}",
                family.name
            );
            let calls = message.matches("\"arguments\":").count();
            assert!(calls <= 1, "{}: {message}", family.name);
            // whoever streams it tells a name once
            assert!(
                calls == 0 || ["", "weather"].contains(&member(&message, "name").as_str()),
                "{}: {message}",
                family.name
            );
        }
        assert!(2 * n_read > family.answer.len(), "{}: {n_read}", family.name);
    }
}

/// What is refused of grammars that are made to hang is nothing that llama.cpp itself makes.
#[test]
fn every_family_s_grammar_is_followed() {
    let model = common::load(&Spec::tiny("qwen2").unwrap());
    for family in &FAMILIES {
        for choice in ["auto", "required"] {
            let gbnf = member(&apply(family, choice), "grammar");
            if !gbnf.is_empty() {
                Grammar::new(&model, &gbnf, &[]).unwrap_or_else(|e| panic!("{}, {choice}: {e}", family.name));
            }
        }
    }
}

#[test]
fn a_call_that_must_come_has_a_grammar_from_its_beginning() {
    for family in &FAMILIES {
        let (required, auto) = (apply(family, "required"), apply(family, "auto"));
        assert!(member(&required, "grammar").contains("root ::="), "{}", family.name);
        assert_eq!(member(&required, "grammar_lazy"), "false", "{}", family.name);
        assert!(!required.contains("\"triggers\":[\""), "{}", family.name);
        if member(&auto, "grammar_lazy") == "true" {
            assert!(auto.contains("\"triggers\":[\""), "{}: {auto}", family.name);
        }
        assert_eq!(member(&apply(family, "none"), "grammar"), "", "{}", family.name);
    }
}

#[test]
fn what_is_wrong_is_refused_with_a_sentence() {
    for bad in ["{% for %}", "{{ 1 +", "{% if %}", ""] {
        assert!(matches!(ChatTemplate::new(bad, "", ""), Err(Error::Refused(_))), "{bad:?}");
    }
    let raises = ChatTemplate::new("{{ raise_exception('no, not this') }}", "", "");
    let raised = raises.and_then(|template| template.apply(&request("auto", "[]")));
    assert!(matches!(&raised, Err(Error::Refused(why)) if why.contains("no, not this")), "{raised:?}");

    let template = ChatTemplate::new(FAMILIES[0].template, "", "").unwrap();
    let requests = [
        "",
        "{",
        "[]",
        "{}",
        r#"{"messages": 1}"#,
        r#"{"messages": [1]}"#,
        r#"{"messages": [{"role": "user"}]}"#,
        r#"{"messages": [{"role": "user", "content": "x"}], "tools": 1}"#,
        r#"{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}"#,
        r#"{"messages": [{"role": "user", "content": "x"}], "tool_choice": "perhaps"}"#,
        r#"{"messages": [{"role": "user", "content": "x"}], "tool_choice": 7}"#,
        r#"{"messages": [{"role": 7, "content": "x"}]}"#,
    ];
    for bad in requests {
        assert!(matches!(template.apply(bad), Err(Error::Refused(_))), "{bad}");
    }
    for bad in [
        "",
        "{}",
        "[]",
        r#"{"format": 99, "prefill": "", "rules": ""}"#,
        r#"{"format": 1, "prefill": "", "rules": "{}"}"#,
    ] {
        assert!(matches!(AnswerParser::new(bad), Err(Error::Refused(_))), "{bad}");
    }
}

/// A stack that overflows ends this whole test program.
#[test]
fn an_answer_may_nest_as_deep_as_it_likes() {
    for family in &FAMILIES {
        let parser = AnswerParser::new(&member(&apply(family, "auto"), "parser")).unwrap();
        let (before, _) = family.answer.split_once("Paris").unwrap();
        let before = before.trim_end_matches('"');
        for bracket in ["[", "{\"a\":", "(", "<tool_call>", "<a>", "[{\"a\":", "\"[", "[\"]\","] {
            for n in [900, 5_000, 100_000] {
                for is_partial in [true, false] {
                    let answer = format!("{before}{}", bracket.repeat(n));
                    match parser.parse(&answer, is_partial) {
                        Ok(_) | Err(Error::Refused(_)) => {}
                        Err(e) => panic!("{}: {n} x {bracket}: {e}", family.name),
                    }
                    let answer = bracket.repeat(n);
                    match parser.parse(&answer, is_partial) {
                        Ok(_) | Err(Error::Refused(_)) => {}
                        Err(e) => panic!("{}: {n} x {bracket}: {e}", family.name),
                    }
                }
            }
        }
        let deep = parser.parse(&"[".repeat(AnswerParser::MAX_DEPTH + 1), true);
        assert!(matches!(&deep, Err(Error::Refused(why)) if why.contains("1000 brackets")), "{deep:?}");
    }
}
