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
    let defaults = Defaults {
        sampling: Sampling { top_k: 7, ..Sampling::greedy() },
        limit: Some(9),
        takes_grammars: false,
    };
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
        thinking: Thinking::Told,
        told_back: Map::new(),
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
        (json!({"tool_choice": {"type": "function"}}), "tool_choice.function"),
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
    let format = |more: Value| chat_of(more).unwrap().format.map(|f| (f.field, f.text.to_string()));
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
        completion(body.as_bytes(), &Defaults::default()).unwrap().format.unwrap().text.len(),
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
const FORMS: [Form; 5] = [chat, completion, messages, responses, to_be_counted];

/// A request of all of them, with a call and what came of it in the two that have those under names of their own.
const GOOD: &str = r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "a"}],
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "5"}],
    "prompt": [[1, 2], [3]], "system": "b", "instructions": "b", "max_tokens": 7, "max_output_tokens": 7, "temperature": 0.5,
    "top_p": 0.5, "stop": ["x", "y"], "stop_sequences": ["x"], "logit_bias": {"7": -100}, "stream": true,
    "thinking": {"type": "enabled"}, "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"},
    "output_config": {"effort": "low"}, "parallel_tool_calls": false, "stream_options": {"include_usage": true}}"#;

/// The same in Anthropic's form, with tools.
const CALLS: &str = r#"{"system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}], "max_tokens": 7, "stream": true,
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "t", "signature": ""}, {"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "a"},
        {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}, {"type": "tool_use", "id": "2", "name": "g", "input": {}}]},
      {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "tool_result", "tool_use_id": "1", "content": "5"},
        {"type": "tool_result", "tool_use_id": "2", "is_error": true, "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "way"}]}]}],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}, {"type": "custom", "name": "g", "input_schema": {}}],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": true}, "thinking": {"type": "adaptive"}}"#;

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
    let table: [(usize, &str, &str); 9] = [
        (2, r#"{"max_tokens": 1}"#, "messages"),
        (2, &format!("{{{ask}}}"), "max_tokens"),
        (2, &format!(r#"{{{ask}, "max_tokens": 0}}"#), "max_tokens"),
        (
            2,
            &format!(r#"{{{ask}, "max_tokens": 1, "stop_sequences": ["{}"]}}"#, "x".repeat(1025)),
            "stop_sequences[0]",
        ),
        (3, r#"{"instructions": "s"}"#, "input"),
        (3, &format!(r#"{{{ask}, "previous_response_id": "r"}}"#), "previous_response_id"),
        (3, &format!(r#"{{{ask}, "text": {{"format": {{"type": "yaml"}}}}}}"#), "text.format.type"),
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

fn told(form: Form, body: Value) -> Result<Wanted, ApiError> {
    form(body.to_string().as_bytes(), &Defaults::default())
}

fn dialogue(wanted: Wanted) -> dim::host::template::dialogue::Dialogue {
    let Prompts::Dialogue(dialogue) = wanted.prompts else { panic!("there are tools: {:?}", wanted.prompts) };
    dialogue
}

/// A call as templates read it.
fn call_of(id: &str, name: &str, arguments: &str) -> Value {
    json!({"type": "function", "function": {"name": name, "arguments": arguments}, "id": id})
}

fn declared(name: &str, description: &str, parameters: Value) -> Value {
    json!({"type": "function", "function": {"name": name, "description": description, "parameters": parameters}})
}

#[test]
fn anthropics_blocks_are_messages_in_the_order_that_templates_need() {
    use dim::host::template::dialogue::ToolChoice;
    let wanted = messages(CALLS.as_bytes(), &Defaults::default()).unwrap();
    assert_eq!((wanted.thinking, wanted.stream, wanted.limit), (Thinking::Told, true, Some(7)));
    let dialogue = dialogue(wanted);
    let expected = json!([
        {"role": "system", "content": "s"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "a", "reasoning_content": "t",
            "tool_calls": [call_of("1", "f", "{\"x\": 1}"), call_of("2", "g", "{}")]},
        {"role": "tool", "content": "5", "tool_call_id": "1", "name": "f"},
        {"role": "tool", "content": "Error: no\nway", "tool_call_id": "2", "name": "g"},
        {"role": "user", "content": "And?"},
    ]);
    assert_eq!(Value::from(dialogue.messages), expected);
    assert_eq!(dialogue.tools, [declared("f", "d", json!({"type": "object"})), declared("g", "", json!({}))]);
    assert_eq!((dialogue.tool_choice, dialogue.parallel_tool_calls), (ToolChoice::Required, false));
    // what is counted is the same conversation
    let counted = to_be_counted(CALLS.as_bytes(), &Defaults::default()).unwrap();
    assert!(
        matches!(counted.prompts, Prompts::Dialogue(same) if Value::from(same.messages.clone()) == expected)
    );

    let of = |more: Value| {
        let mut body: Value = serde_json::from_str(CALLS).unwrap();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        told(messages, body)
    };
    // who says nothing beside what came of a call says nothing
    let body: Value = serde_json::from_str(CALLS).unwrap();
    let mut history = body["messages"].clone();
    history[2]["content"].as_array_mut().unwrap().remove(0);
    let only_results = dialogue_of(of(json!({"messages": history})));
    let roles: Vec<&Value> = only_results.messages.iter().map(|message| &message["role"]).collect();
    assert_eq!(json!(roles), json!(["system", "user", "assistant", "tool", "tool"]));
    let one = dialogue_of(of(json!({"tool_choice": {"type": "tool", "name": "g"}})));
    assert_eq!((one.tools.len(), one.tool_choice, one.parallel_tool_calls), (1, ToolChoice::Required, true));
    assert_eq!(dialogue_of(of(json!({"tool_choice": {"type": "none"}}))).tool_choice, ToolChoice::None);
    let thinking = |given: Value| of(json!({"thinking": given})).unwrap();
    let quiet = thinking(json!({"type": "disabled"}));
    assert_eq!(quiet.thinking, Thinking::Off);
    assert!(!dialogue_of(Ok(quiet)).enable_thinking);
    assert_eq!(thinking(Value::Null).thinking, Thinking::Hidden);
    assert!(dialogue_of(Ok(thinking(Value::Null))).enable_thinking);
    let omitted = thinking(json!({"type": "enabled", "budget_tokens": 1024, "display": "omitted"}));
    assert_eq!(omitted.thinking, Thinking::Hidden);
    // several blocks are one text, and a conversation in which nobody calls stays one of turns
    let plain = json!({"max_tokens": 1, "tools": [], "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null}]});
    let turn = |role, content: &str| Turn { role, content: content.to_owned() };
    use dim::host::template::Role::{Assistant, System, User};
    assert_eq!(
        told(messages, plain).unwrap().prompts,
        Prompts::Chat(vec![turn(User, "a\nb"), turn(Assistant, "")])
    );
    // what the system says later is no message of its own, nor is what a person says in two
    let later = json!({"max_tokens": 1, "system": "s", "messages": [{"role": "system", "content": "t"}, {"role": "user", "content": "a"},
        {"role": "system", "content": "u"}, {"role": "user", "content": "b"}]});
    assert_eq!(
        told(messages, later).unwrap().prompts,
        Prompts::Chat(vec![turn(System, "s\n\nt"), turn(User, "a\n\n<system>\nu\n</system>\n\nb")])
    );
    let held = json!({"max_tokens": 1, "messages": [{"role": "user", "content": "a"}],
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}});
    let format = told(messages, held).unwrap().format.unwrap();
    assert_eq!((format.field, &*format.text), ("output_config.format.schema", r#"{"type":"object"}"#));
}

fn dialogue_of(wanted: Result<Wanted, ApiError>) -> dim::host::template::dialogue::Dialogue {
    dialogue(wanted.unwrap())
}

#[test]
fn items_are_messages_in_the_order_that_templates_need() {
    use dim::host::template::dialogue::ToolChoice;
    let made = |id: &str, name: &str| json!({"type": "function_call", "id": "fc_x", "call_id": id, "name": name, "arguments": "{}"});
    let output =
        |id: &str, output: Value| json!({"type": "function_call_output", "call_id": id, "output": output});
    let f = json!({"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true});
    let g = json!({"type": "function", "name": "g"});
    let body = json!({
        "instructions": "s", "tools": [f, g], "tool_choice": "required", "parallel_tool_calls": false, "max_output_tokens": 9,
        "temperature": 0.5, "top_p": 1, "reasoning": {"effort": "none"},
        "input": [
            {"role": "developer", "content": "d"},
            {"role": "user", "content": "Of"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
            made("1", "f"), made("2", "g"),
            output("1", json!("5")), output("2", json!([{"type": "input_text", "text": "6"}])),
            made("3", "f"), output("3", json!("7")),
            {"type": "reasoning", "summary": [], "content": null},
            {"role": "assistant", "content": "b"},
            {"role": "assistant", "content": "c"},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "q"}]},
            {"role": "assistant", "content": "e"},
        ],
    });
    let wanted = told(responses, body.clone()).unwrap();
    assert_eq!((wanted.thinking, wanted.limit), (Thinking::Off, Some(9)));
    assert_eq!(wanted.told_back["tools"][0], f);
    assert_eq!(wanted.told_back["tools"][1]["name"], "g");
    assert_eq!(wanted.told_back["tool_choice"], "required");
    assert_eq!(wanted.told_back["parallel_tool_calls"], false);
    assert_eq!(
        (&wanted.told_back["instructions"], &wanted.told_back["temperature"]),
        (&json!("s"), &json!(0.5))
    );
    let told_as = dialogue(wanted);
    let expected = json!([
        {"role": "system", "content": "s\n\nd"},
        {"role": "user", "content": "Of\n\nHi"},
        {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [call_of("1", "f", "{}"), call_of("2", "g", "{}")]},
        {"role": "tool", "content": "5", "tool_call_id": "1", "name": "f"},
        {"role": "tool", "content": "6", "tool_call_id": "2", "name": "g"},
        {"role": "assistant", "content": "", "tool_calls": [call_of("3", "f", "{}")]},
        {"role": "tool", "content": "7", "tool_call_id": "3", "name": "f"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "e", "reasoning_content": "q"},
    ]);
    assert_eq!(Value::from(told_as.messages), expected);
    assert_eq!(
        (told_as.tool_choice, told_as.parallel_tool_calls, told_as.enable_thinking),
        (ToolChoice::Required, false, false)
    );
    // one that is named is the one there is, and the reply still says all of them
    let mut named = body;
    named["tool_choice"] = json!({"type": "function", "name": "g"});
    let wanted = told(responses, named.clone()).unwrap();
    assert_eq!(wanted.told_back["tools"].as_array().unwrap().len(), 2);
    assert_eq!(wanted.told_back["tool_choice"], named["tool_choice"]);
    assert_eq!(dialogue(wanted).tools, [declared("g", "", json!({"type": "object", "properties": {}}))]);
    let held =
        |format: Value| told(responses, json!({"input": "a", "text": {"format": format}})).unwrap().format;
    let format =
        held(json!({"type": "json_schema", "name": "n", "schema": {"a": 1}, "strict": true})).unwrap();
    assert_eq!((format.field, &*format.text), ("text.format.schema", r#"{"a":1}"#));
    assert_eq!(&*held(json!({"type": "json_object"})).unwrap().text, r#"{"type": "object"}"#);
    assert_eq!(held(json!({"type": "text"})), None);
}

#[test]
fn what_is_wrong_with_tools_is_named_in_the_words_of_the_dialect() {
    let tool = json!({"name": "f", "input_schema": {"type": "object"}});
    let user = json!({"role": "user", "content": "Hi"});
    let says = |role: &str, block: Value| json!({"messages": [user, {"role": role, "content": [block]}]});
    let table = [
        (json!({"tools": [{"name": "f"}]}), "tools[0].input_schema"),
        (json!({"tools": [tool, {"input_schema": {}}]}), "tools[1].name"),
        (json!({"tools": [{"name": "f", "input_schema": 5}]}), "tools[0].input_schema"),
        (json!({"tools": [{"name": "f", "input_schema": nested(40)}]}), "tools[0].input_schema"),
        (json!({"tools": [{"name": "x".repeat(129), "input_schema": {}}]}), "tools[0].name"),
        (json!({"tools": [tool, tool]}), "tools[1].name"),
        (json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}), "tools[0].type"),
        (json!({"tools": "f"}), "tools"),
        (json!({"tool_choice": {"type": "any"}}), "tool_choice"),
        (json!({"tools": [tool], "tool_choice": {"type": "required"}}), "tool_choice.type"),
        (json!({"tools": [tool], "tool_choice": {}}), "tool_choice.type"),
        (json!({"tools": [tool], "tool_choice": "any"}), "tool_choice"),
        (json!({"tools": [tool], "tool_choice": {"type": "tool"}}), "tool_choice.name"),
        (json!({"tools": [tool], "tool_choice": {"type": "tool", "name": "g"}}), "tool_choice.name"),
        (json!({"thinking": {"type": "perhaps"}}), "thinking.type"),
        (json!({"thinking": true}), "thinking"),
        (json!({"output_config": {"format": {"type": "json_schema"}}}), "output_config.format.schema"),
        (json!({"output_config": {"format": {"type": "yaml"}}}), "output_config.format.type"),
        (
            json!({"tools": [tool], "output_config": {"format": {"type": "json_schema", "schema": {}}}}),
            "output_config.format.schema",
        ),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].role"),
        (says("user", json!({"type": "image", "source": {}})), "messages[1].content[0].type"),
        (
            says("user", json!({"type": "tool_use", "id": "1", "name": "f", "input": {}})),
            "messages[1].content[0].type",
        ),
        (
            says("assistant", json!({"type": "tool_result", "tool_use_id": "1"})),
            "messages[1].content[0].type",
        ),
        (
            says("user", json!({"type": "tool_result", "tool_use_id": "1"})),
            "messages[1].content[0].tool_use_id",
        ),
        (says("user", json!({"type": "tool_result"})), "messages[1].content[0].tool_use_id"),
        (
            says("user", json!({"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]})),
            "messages[1].content[0].content[0]",
        ),
        (
            says("assistant", json!({"type": "tool_use", "name": "f", "input": {}})),
            "messages[1].content[0].id",
        ),
        (
            says("assistant", json!({"type": "tool_use", "id": "1", "input": {}})),
            "messages[1].content[0].name",
        ),
        (
            says("assistant", json!({"type": "tool_use", "id": "1", "name": "f"})),
            "messages[1].content[0].input",
        ),
        (
            says("assistant", json!({"type": "tool_use", "id": "1", "name": "f", "input": "{}"})),
            "messages[1].content[0].input",
        ),
        (
            says("assistant", json!({"type": "tool_use", "id": "1", "name": "f g", "input": {}})),
            "messages[1].content[0].name",
        ),
        (says("assistant", json!({"type": "thinking"})), "messages[1].content[0].thinking"),
        (says("user", json!({"type": "text"})), "messages[1].content[0].text"),
        (says("user", json!({"text": "x"})), "messages[1].content[0]"),
    ];
    for (more, field) in table {
        let mut body = json!({"messages": [user], "max_tokens": 5});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        names_the_field(messages, &body, field);
    }
    let tool = json!({"type": "function", "name": "f"});
    let items = |items: Value| json!({"input": items});
    let table = [
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [tool, {"type": "function"}]}), "tools[1].name"),
        (json!({"tools": [{"type": "function", "name": "a b"}]}), "tools[0].name"),
        (json!({"tools": [tool, tool]}), "tools[1].name"),
        (json!({"tools": [{"type": "function", "name": "f", "parameters": []}]}), "tools[0].parameters"),
        (json!({"tools": [{}]}), "tools[0]"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tools": [tool], "tool_choice": "any"}), "tool_choice"),
        (json!({"tools": [tool], "tool_choice": {"type": "function"}}), "tool_choice.name"),
        (json!({"tools": [tool], "tool_choice": {"type": "function", "name": "g"}}), "tool_choice.name"),
        (json!({"tools": [tool], "tool_choice": {"type": "allowed_tools"}}), "tool_choice.type"),
        (json!({"tools": [tool], "text": {"format": {"type": "json_object"}}}), "text.format.schema"),
        (json!({"text": {"format": {"type": "json_schema"}}}), "text.format.schema"),
        (items(json!([])), "input"),
        (items(json!([{"content": "x"}])), "input[0].role"),
        (items(json!([{"type": "item_reference", "id": "x"}])), "input[0].type"),
        (items(json!([{"role": "tool", "content": "x"}])), "input[0].role"),
        (items(json!([{"type": "function_call", "name": "f", "arguments": "{}"}])), "input[0].call_id"),
        (items(json!([{"type": "function_call", "call_id": "1", "arguments": "{}"}])), "input[0].name"),
        (items(json!([{"type": "function_call", "call_id": "1", "name": "f"}])), "input[0].arguments"),
        (
            items(json!([{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}])),
            "input[0].arguments",
        ),
        (items(json!([user, {"type": "function_call_output", "output": "x"}])), "input[1].call_id"),
        (
            items(json!([user, {"type": "function_call_output", "call_id": "1", "output": "x"}])),
            "input[1].call_id",
        ),
        (items(json!([{"type": "function_call_output", "call_id": "1"}])), "input[0].output"),
    ];
    for (more, field) in table {
        let mut body = json!({"input": "Hi"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        names_the_field(responses, &body, field);
    }
}

fn names_the_field(form: Form, body: &Value, field: &str) {
    let error = told(form, body.clone()).expect_err(&body.to_string());
    assert_eq!(error.param.as_deref(), Some(field), "{body}: {error}");
    assert!(error.message.starts_with(field) && !error.message.contains("struct"), "{error}");
}

/// JSON that is nearly a request.
fn nearly() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop_oneof![
            "user",
            "assistant",
            "text",
            "auto",
            "tool",
            "tool_use",
            "tool_result",
            "thinking",
            "function",
            "function_call",
            "function_call_output",
            "reasoning",
            "json_schema",
            "enabled",
            "[a-z]{0,4}"
        ]
        .prop_map(Value::from),
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
        "input_schema",
        "tool_use_id",
        "is_error",
        "thinking",
        "id",
        "call_id",
        "output",
        "output_config",
        "schema",
        "reasoning",
        "effort",
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
        form in 0..FORMS.len(), has_calls in any::<bool>(), at in any::<prop::sample::Index>(),
        wrong in proptest::collection::vec(any::<u8>(), 0..4), gone in 0usize..6,
    ) {
        let mut body = if has_calls { CALLS } else { GOOD }.as_bytes().to_vec();
        let at = at.index(body.len());
        body.splice(at..(at + gone).min(body.len()), wrong);
        if let Err(error) = FORMS[form](&body, &Defaults::default()) {
            prop_assert!(!error.message.is_empty() && error.status == StatusCode::BAD_REQUEST);
        }
    }
}
