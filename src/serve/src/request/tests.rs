use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn chat_of(more: Value) -> Result<Wanted, ApiError> {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    chat(body.to_string().as_bytes(), &Defaults::default())
}

fn completion_of(more: Value) -> Result<Wanted, ApiError> {
    completion(more.to_string().as_bytes(), &Defaults::default())
}

fn tool(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
}

fn with_parameters(parameters: Value) -> Value {
    json!({"type": "function", "function": {"name": "a", "parameters": parameters}})
}

fn nested(n: usize) -> Value {
    (0..n).fold(json!({}), |inner, _| json!({"not": inner}))
}

fn made(arguments: &str) -> Value {
    json!({"id": "1", "type": "function", "function": {"name": "a", "arguments": arguments}})
}

#[test]
fn a_conversation_with_tools_is_told_whole() {
    let messages = json!([
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": null, "tool_calls": [made("{\"x\": 1}")]},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
    ]);
    let wanted = chat_of(json!({
        "messages": messages, "tools": [tool("a"), tool("b")], "parallel_tool_calls": false,
        "tool_choice": {"type": "function", "function": {"name": "b"}},
    }));
    let Prompts::Dialogue(dialogue) = wanted.unwrap().prompts else { panic!("there are tools") };
    assert_eq!(dialogue.messages[0], json!({"role": "user", "content": "Hi"}));
    assert_eq!(dialogue.messages[1]["tool_calls"], json!([made("{\"x\": 1}")]));
    assert_eq!(dialogue.messages[2], json!({"role": "tool", "content": "5", "tool_call_id": "1"}));
    // the one that is named is the one there is, and has to be called
    assert_eq!(dialogue.tools.len(), 1);
    assert_eq!(dialogue.tools[0]["function"]["name"], "b");
    assert_eq!(dialogue.tool_choice, dim::host::template::dialogue::ToolChoice::Required);
    assert!(!dialogue.parallel_tool_calls);
    let plain = chat_of(json!({"tools": [], "tool_choice": "auto"})).unwrap();
    assert!(matches!(plain.prompts, Prompts::Chat(_)));
}

#[test]
fn what_is_not_said_is_as_the_server_was_started() {
    let defaults = Defaults { sampling: Sampling { top_k: 7, ..Sampling::greedy() }, limit: Some(9) };
    let body = br#"{"messages": [{"role": "user", "content": "Hi"}], "temperature": null, "stop": null}"#;
    let wanted = chat(body, &defaults).unwrap();
    assert_eq!((wanted.sampling, wanted.limit), (defaults.sampling, defaults.limit));
    assert_eq!((wanted.n, wanted.stream, wanted.cache_prompt, wanted.top_logprobs), (1, false, true, None));
    assert!(wanted.stop.is_empty());
}

#[test]
fn every_field_that_is_known_is_read() {
    let wanted = chat_of(json!({
        "temperature": 1, "top_p": 0.5, "min_p": 0.1, "top_k": 3, "seed": 5, "presence_penalty": -1, "frequency_penalty": 2,
        "repeat_penalty": 1.5, "repeat_last_n": -1, "logit_bias": {"7": -100, "2": 1.5}, "stop": ["a", "b"], "max_tokens": 4,
        "max_completion_tokens": 3, "n": 2, "stream": true, "stream_options": {"include_usage": true}, "logprobs": true,
        "top_logprobs": 4, "return_tokens": true, "cache_prompt": false, "ignore_eos": true, "timings_per_token": true,
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "model": "any", "user": {"a": [1]},
        "of_tomorrow": [[{}]],
    }))
    .unwrap();
    let sampling = Sampling {
        temperature: 1.0,
        top_p: 0.5,
        min_p: 0.1,
        top_k: 3,
        seed: Some(5),
        presence_penalty: -1.0,
        frequency_penalty: 2.0,
        repeat_penalty: 1.5,
        repeat_last_n: -1,
        logit_bias: vec![(2, 1.5), (7, f32::NEG_INFINITY)],
        constraint: None,
    };
    let turn = Turn { role: dim::host::template::Role::User, content: "Hi".to_owned() };
    let expected = Wanted {
        prompts: Prompts::Chat(vec![turn]),
        sampling,
        limit: Some(3),
        stop: vec!["a".to_owned(), "b".to_owned()],
        format: None,
        n: 2,
        top_logprobs: Some(4),
        stream: true,
        include_usage: true,
        timings_per_token: true,
        return_tokens: true,
        cache_prompt: false,
        ignore_eos: true,
        echo: false,
    };
    assert_eq!(wanted, expected);
}

#[test]
fn what_is_wrong_is_named() {
    let table = [
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": 1e300}), "temperature"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"min_p": -0.5}), "min_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 1e20}), "top_k"),
        (json!({"seed": "x"}), "seed"),
        (json!({"repeat_penalty": 0}), "repeat_penalty"),
        (json!({"repeat_last_n": 1_000_000}), "repeat_last_n"),
        (json!({"stop": 5}), "stop"),
        (json!({"stop": ["a", 5]}), "stop[1]"),
        (json!({"stop": vec!["x"; 17]}), "stop"),
        (json!({"stop": ["x".repeat(1025)]}), "stop[0]"),
        (json!({"max_tokens": -2}), "max_tokens"),
        (json!({"max_completion_tokens": 1.5}), "max_completion_tokens"),
        (json!({"n": 0}), "n"),
        (json!({"n": 129}), "n"),
        (json!({"n": -1}), "n"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
        (json!({"logprobs": 5}), "logprobs"),
        (json!({"top_logprobs": 5}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias[\"x\"]"),
        (json!({"logit_bias": {"-1": 1}}), "logit_bias[\"-1\"]"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias[\"5\"]"),
        (json!({"logit_bias": [1]}), "logit_bias"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"tools": [{"type": "retrieval"}]}), "tools[0].type"),
        (json!({"tools": [tool("a"), tool("a b")]}), "tools[1].function.name"),
        (json!({"tools": [tool("a"), tool("a")]}), "tools[1].function.name"),
        (json!({"tools": [with_parameters(json!(5))]}), "tools[0].function.parameters"),
        (json!({"tools": [with_parameters(nested(40))]}), "tools[0].function.parameters"),
        (
            json!({"tools": [with_parameters(json!({"enum": vec![1; 5_000]}))]}),
            "tools[0].function.parameters",
        ),
        (json!({"tools": vec![tool("a"); 129]}), "tools"),
        (json!({"tools": [tool("a")], "tool_choice": "perhaps"}), "tool_choice"),
        (
            json!({"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}),
            "tool_choice.function.name",
        ),
        (json!({"tools": [tool("a")], "response_format": {"type": "json_object"}}), "response_format.schema"),
        (json!({"functions": [{}]}), "functions"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": {"type": "function"}}), "tool_choice"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": 5}}),
            "response_format.json_schema",
        ),
        (json!({"response_format": {}}), "response_format"),
        (json!({"response_format": {"type": "json_object"}, "json_schema": {}}), "json_schema"),
        (json!({"response_format": {"type": "yaml"}}), "response_format.type"),
        (json!({"grammar": "root ::= [a]"}), "grammar"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "Hi"}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": [{"content": "x"}]}), "messages[0]"),
        (json!({"messages": [{"role": "user"}, {"role": "wizard", "content": "x"}]}), "messages[1].role"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].tool_call_id"),
        (json!({"messages": [{"role": "assistant", "tool_calls": [{}]}]}), "messages[0].tool_calls[0]"),
        (json!({"messages": [{"role": "user", "tool_calls": [made("{}")]}]}), "messages[0].tool_calls"),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [made("{")]}]}),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0]",
        ),
        (json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}), "messages[0].content[0]"),
    ];
    for (more, field) in table {
        let error = chat_of(more.clone()).expect_err(&more.to_string());
        assert_eq!(error.param.as_deref(), Some(field), "{more}: {error}");
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
        assert!(error.message.starts_with(field) && !error.message.contains("at line"), "{error}");
    }
    let table = [
        (json!({}), "prompt"),
        (json!({"prompt": ""}), ""),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [1, "x"]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt[0]"),
        (json!({"prompt": [3_000_000_000u64]}), "prompt[0]"),
        (json!({"prompt": vec!["x"; 129]}), "prompt"),
        (json!({"prompt": vec!["x"; 65], "n": 2}), "n"),
        (json!({"prompt": "x", "suffix": "y"}), "suffix"),
        (json!({"prompt": "x", "best_of": 2}), "best_of"),
        (json!({"prompt": "x", "logprobs": 21}), "logprobs"),
        (json!({"prompt": "x", "logprobs": 1, "echo": true}), "echo"),
    ];
    for (body, field) in table {
        let param = completion_of(body.clone()).err().and_then(|error| error.param).unwrap_or_default();
        assert_eq!(param, field, "{body}");
    }
}

#[test]
fn prompts_come_in_four_shapes() {
    let prompts = |prompt: Value| completion_of(json!({"prompt": prompt})).unwrap().prompts;
    let text = |text: &str| Prompt::Text(text.to_owned());
    assert_eq!(prompts(json!("a")), Prompts::Texts(vec![text("a")]));
    assert_eq!(prompts(json!(["a", "b"])), Prompts::Texts(vec![text("a"), text("b")]));
    assert_eq!(prompts(json!([1, 2])), Prompts::Texts(vec![Prompt::Tokens(vec![1, 2])]));
    let two = vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2])];
    assert_eq!(prompts(json!([[1], [2]])), Prompts::Texts(two));
    let parts = json!({"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"text": "b", "type": "text"}]}]});
    let Prompts::Chat(turns) = chat(parts.to_string().as_bytes(), &Defaults::default()).unwrap().prompts
    else {
        panic!("a chat")
    };
    assert_eq!(turns[0].content, "ab");
}

#[test]
fn a_schema_comes_in_three_fields_and_stays_as_it_was_sent() {
    let format = |more: Value| chat_of(more).unwrap().format.map(|f| (f.field, f.schema.to_string()));
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let schema = json!({"z": 1, "a": [1.50, {"x": null}]});
    let text = schema.to_string();
    let named = json!({"name": "n", "strict": true, "schema": schema});
    let expected = |field| Some((field, text.clone()));
    assert_eq!(
        format(json!({"response_format": {"type": "json_schema", "json_schema": named}})),
        expected("response_format.json_schema.schema")
    );
    assert_eq!(
        format(json!({"response_format": {"type": "json_object", "schema": schema}})),
        expected("response_format.schema")
    );
    assert_eq!(format(json!({"json_schema": schema})), expected("json_schema"));
    let any_object = Some(("response_format.schema", "{\"type\": \"object\"}".to_owned()));
    assert_eq!(format(json!({"response_format": {"type": "json_object"}})), any_object);
    assert_eq!(format(json!({"response_format": {"type": "text"}})), None);
    assert_eq!(format(json!({"response_format": null, "json_schema": null})), None);
    let body = format!("{{\"prompt\": \"x\", \"json_schema\": {deep}}}");
    assert_eq!(
        completion(body.as_bytes(), &Defaults::default()).unwrap().format.unwrap().schema.len(),
        deep.len()
    );
}

#[test]
fn any_seed_is_one_of_ours() {
    let seed = |seed: i64| chat_of(json!({"seed": seed})).unwrap().sampling.seed;
    assert_eq!(seed(-1), None);
    assert_eq!(seed(0), Some(0));
    assert_eq!(seed(4_294_967_294), Some(4_294_967_294));
    assert_eq!(seed(4_294_967_295), Some(0));
    assert!(seed(i64::MIN).is_some() && seed(i64::MAX).is_some() && seed(-2).is_some());
}

#[test]
fn what_is_no_json_is_said_so_and_what_nests_too_deep_is_no_harm() {
    for body in ["", "{", "[]", "null", "{} x", "\u{0}", "{\"messages\": [}"] {
        let error = chat(body.as_bytes(), &Defaults::default()).unwrap_err();
        assert_eq!(error.status, StatusCode::BAD_REQUEST, "{body}: {error}");
    }
    // in a field that is read, in one that is only counted, and in one that is not known
    for (field, is_read) in
        [("messages", true), ("prompt", true), ("stop", true), ("tools", true), ("of_tomorrow", false)]
    {
        let body = format!("{{\"{field}\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let error = chat(body.as_bytes(), &Defaults::default()).unwrap_err();
        assert_eq!(error.param.is_some_and(|param| param.starts_with(field)), is_read, "{}", error.message);
    }
}

/// Every form in which a request comes.
type Form = fn(&[u8], &Defaults) -> Result<Wanted, ApiError>;
const FORMS: [Form; 4] = [chat, completion, messages, responses];

/// A request of all of them.
const GOOD: &str = r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "a"}],
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], "prompt": [[1, 2], [3]], "system": "b",
    "instructions": "b", "max_tokens": 7, "max_output_tokens": 7, "temperature": 0.5, "top_p": 0.5, "stop": ["x", "y"],
    "stop_sequences": ["x"], "logit_bias": {"7": -100}, "stream": true, "stream_options": {"include_usage": true}}"#;

/// Of each of the rules below; `DIM_REQUESTS` says how many where there is time for more (`make fuzz`).
fn n_cases() -> u32 {
    std::env::var("DIM_REQUESTS").ok().and_then(|n| n.parse().ok()).unwrap_or(4096)
}

#[test]
fn a_good_request_is_one_in_every_form() {
    for form in FORMS {
        assert_eq!(form(GOOD.as_bytes(), &Defaults::default()).map(|wanted| wanted.stream), Ok(true));
    }
}

#[test]
fn the_two_plain_forms_are_read_and_what_is_wrong_is_named_as_they_name_it() {
    let wanted = messages(
        br#"{"system": [{"type": "text", "text": "s"}], "messages": [{"role": "user", "content": "u"}], "max_tokens": 3,
            "stop_sequences": ["a", "b"], "top_k": 4, "metadata": {"user_id": "x"}}"#,
        &Defaults::default(),
    )
    .unwrap();
    let turn = |role, content: &str| Turn { role, content: content.to_owned() };
    use dim::host::template::Role;
    assert_eq!(wanted.prompts, Prompts::Chat(vec![turn(Role::System, "s"), turn(Role::User, "u")]));
    assert_eq!((wanted.limit, wanted.stop.len(), wanted.sampling.top_k), (Some(3), 2, 4));
    let wanted =
        responses(br#"{"input": "u", "instructions": "s", "max_output_tokens": 3}"#, &Defaults::default())
            .unwrap();
    assert_eq!(wanted.prompts, Prompts::Chat(vec![turn(Role::System, "s"), turn(Role::User, "u")]));
    assert_eq!(wanted.limit, Some(3));
    let ask = r#""messages": [{"role": "user", "content": "u"}], "input": "u""#;
    let table: [(usize, &str, &str); 10] = [
        (2, r#"{"max_tokens": 1}"#, "messages"),
        (2, &format!("{{{ask}}}"), "max_tokens"),
        (2, &format!(r#"{{{ask}, "max_tokens": 0}}"#), "max_tokens"),
        (2, &format!(r#"{{{ask}, "max_tokens": 1, "tools": [{{}}]}}"#), "tools"),
        (
            2,
            &format!(r#"{{{ask}, "max_tokens": 1, "stop_sequences": ["{}"]}}"#, "x".repeat(1025)),
            "stop_sequences[0]",
        ),
        (3, r#"{"instructions": "s"}"#, "input"),
        (3, &format!(r#"{{{ask}, "previous_response_id": "r"}}"#), "previous_response_id"),
        (3, &format!(r#"{{{ask}, "text": {{"format": {{"type": "json_schema"}}}}}}"#), "text.format.type"),
        (3, &format!(r#"{{{ask}, "max_output_tokens": -3}}"#), "max_output_tokens"),
        (
            3,
            r#"{"input": [{"role": "user", "content": "a"}, {"role": "x", "content": "b"}]}"#,
            "input[1].role",
        ),
    ];
    for (form, body, field) in table {
        let error = FORMS[form](body.as_bytes(), &Defaults::default()).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(field), "{body}: {error}");
        assert!(error.message.starts_with(field), "{error}");
    }
}

/// JSON that is nearly a request.
fn nearly() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop_oneof!["user", "text", "auto", "[a-z]{0,4}"].prop_map(Value::from),
    ];
    let name = prop_oneof![
        "messages",
        "role",
        "content",
        "type",
        "text",
        "prompt",
        "stop",
        "n",
        "seed",
        "logprobs",
        "top_logprobs",
        "temperature",
        "max_tokens",
        "logit_bias",
        "stream",
        "stream_options",
        "tools",
        "tool_choice",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "parameters",
        "response_format",
        "input",
        "instructions",
        "system",
        "max_output_tokens",
        "stop_sequences",
        "format",
        "previous_response_id",
        "[0-9]{1,3}",
    ];
    leaf.prop_recursive(4, 64, 8, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::btree_map(name.clone(), inner, 0..8)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(n_cases()))]

    #[test]
    fn whatever_comes_is_a_request_or_an_error_with_a_sentence(body in nearly()) {
        for form in FORMS {
            match form(body.to_string().as_bytes(), &Defaults::default()) {
                Ok(wanted) => {
                    prop_assert!(wanted.prompts.count() * wanted.n as usize <= MAX_CHOICES);
                    prop_assert!(wanted.stop.len() <= MAX_STOPS);
                    prop_assert_eq!(wanted.sampling.check(), Ok(()));
                }
                Err(error) => prop_assert!(!error.message.is_empty() && error.status == StatusCode::BAD_REQUEST),
            }
        }
    }

    #[test]
    fn bytes_that_are_anything_are_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(FORMS.iter().all(|form| form(&bytes, &Defaults::default()).is_err()));
    }

    #[test]
    fn a_good_request_with_wrong_bytes_in_it_is_a_request_or_an_error(
        form in 0..FORMS.len(), at in any::<prop::sample::Index>(), wrong in proptest::collection::vec(any::<u8>(), 0..4), gone in 0usize..6,
    ) {
        let mut body = GOOD.as_bytes().to_vec();
        let at = at.index(body.len());
        body.splice(at..(at + gone).min(GOOD.len()), wrong);
        if let Err(error) = FORMS[form](&body, &Defaults::default()) {
            prop_assert!(!error.message.is_empty() && error.status == StatusCode::BAD_REQUEST);
        }
    }
}
