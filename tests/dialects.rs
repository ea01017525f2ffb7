//! What `dim-host serve` says in the dialects of others, `/v1/messages` and `/v1/responses`, is what it says in a chat: the same
//! texts, calls and thoughts, of the same prompts, whole and in streams.

mod common;

use std::io::{BufRead as _, BufReader};

use common::served::{Server, parallel};
use common::{Cut, Worker};
use serde_json::{Value, json};

/// `body` with the fields of `more`.
fn with(mut body: Value, more: &Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn answered(server: &Server, path: &str, body: &Value) -> Value {
    let answer = server.post(path, body);
    assert_eq!(answer.0, 200, "{path}: {}", answer.2);
    answer.json()
}

#[test]
fn a_text_is_the_same_in_every_dialect() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let server = Server::start(&cut, &worker.address, &["--chat-template", "chatml", "--temp", "0"]);
    let messages = json!([{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}]);
    let chat = server.post("/v1/chat/completions", &json!({"messages": messages, "max_tokens": 9})).json();
    let text = chat["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let anthropic =
        json!({"messages": [{"role": "user", "content": "Hi"}], "system": "Brief.", "max_tokens": 9});
    let openai = json!({"input": "Hi", "instructions": "Brief.", "max_output_tokens": 9});
    let whole = server.post("/v1/messages", &anthropic).json();
    assert_eq!((&whole["content"][0]["text"], &whole["type"]), (&json!(text), &json!("message")));
    let counted = |of: &str| whole["usage"][of].as_u64().unwrap();
    assert_eq!(counted("input_tokens") + counted("cache_read_input_tokens"), chat["usage"]["prompt_tokens"]);
    assert_eq!(whole["usage"]["output_tokens"], chat["usage"]["completion_tokens"]);
    let whole = server.post("/v1/responses", &openai).json();
    assert_eq!(whole["output"][0]["content"][0]["text"], json!(text));
    assert_eq!(whole["usage"]["total_tokens"], chat["usage"]["total_tokens"]);

    // every event says its name twice, and the deltas are the text
    let streamed = |path: &str, mut body: Value, delta: &str, at: &str| {
        body["stream"] = true.into();
        let stream = server.post(path, &body).2;
        let mut names = Vec::new();
        let mut said = String::new();
        for event in stream.split("event: ").filter(|event| event.contains("data: ")) {
            let (name, data) = event.split_once('\n').unwrap();
            let json = data.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
            let json: Value = serde_json::from_str(json).unwrap_or_else(|e| panic!("{e}: {json}"));
            assert_eq!(json["type"], name);
            if name == delta {
                said.push_str(json.pointer(at).and_then(Value::as_str).unwrap());
            } else {
                names.push(name.to_owned());
            }
        }
        assert_eq!(said, text, "{path}");
        names.join(" ")
    };
    assert_eq!(
        streamed("/v1/messages", anthropic, "content_block_delta", "/delta/text"),
        "message_start content_block_start content_block_stop message_delta message_stop"
    );
    let names = streamed("/v1/responses", openai, "response.output_text.delta", "/delta");
    let begin = "response.created response.in_progress response.output_item.added response.content_part.added \
                 response.output_text.done response.content_part.done response.output_item.done";
    let last = names.strip_prefix(begin).unwrap_or_else(|| panic!("{names}"));
    assert!([" response.completed", " response.incomplete"].contains(&last), "{names}");

    let refused = server.post("/v1/messages", &json!({"messages": messages}));
    assert_eq!((refused.0, refused.word().as_str()), (400, "max_tokens"));
    assert_eq!(refused.json()["type"], "error");
}

/// Three servers' words for the same tools, of which the first is to be called.
fn with_tools(chat: &Value, anthropic: &Value, openai: &Value) -> (Value, Value, Value) {
    let days = json!({"type": "boolean"});
    let city = json!({"type": "string", "enum": ["Paris", "Oslo"]});
    let schema = json!({
        "type": "object", "properties": {"city": city, "days": days}, "required": ["city", "days"], "additionalProperties": false,
    });
    let function =
        |name: &str| json!({"name": name, "description": format!("The {name}"), "parameters": schema});
    let names = ["weather", "time"];
    let wrapped = names.map(|name| json!({"type": "function", "function": function(name)}));
    let flat = names.map(|name| with(function(name), &json!({"type": "function"})));
    let theirs =
        names.map(|name| json!({"name": name, "description": format!("The {name}"), "input_schema": schema}));
    let one = json!({"parallel_tool_calls": false});
    let chat = with(chat.clone(), &with(one.clone(), &json!({"tools": wrapped, "tool_choice": "required"})));
    let openai = with(openai.clone(), &with(one, &json!({"tools": flat, "tool_choice": "required"})));
    let any = json!({"type": "any", "disable_parallel_tool_use": true});
    (chat, with(anthropic.clone(), &json!({"tools": theirs, "tool_choice": any})), openai)
}

/// By random weights: what they call is what the grammar lets them, and with temperature 0 always the same.
#[test]
fn a_call_and_what_came_of_it_are_the_same_in_every_dialect() {
    let cut = Cut::tiny("qwen2");
    let ctx = ["--ctx", "2048"];
    let worker =
        Worker::start_at("127.0.0.1:0", &cut.slice(1), &cut.key, &[&ctx[..], &["--parallel", "2"]].concat());
    let template = concat!(env!("CARGO_MANIFEST_DIR"), "/../../llama-sys-patch/tests/templates/hermes.jinja");
    let options = [&ctx[..], &["--chat-template", template, "--temp", "0"]].concat();
    let server = Server::start(&cut, &worker.address, &options);
    let asked = json!([{"role": "user", "content": "Where is it warm?"}]);
    let (chat, anthropic, openai) = with_tools(
        &json!({"messages": asked, "max_tokens": 200}),
        &json!({"messages": asked, "max_tokens": 200}),
        &json!({"input": asked, "max_output_tokens": 200}),
    );

    let told = answered(&server, "/v1/chat/completions", &chat);
    let call = &told["choices"][0]["message"]["tool_calls"][0];
    let (name, arguments) = (&call["function"]["name"], call["function"]["arguments"].as_str().unwrap());
    let n_prompt = &told["usage"]["prompt_tokens"];
    let message = answered(&server, "/v1/messages", &anthropic);
    let input: Value = serde_json::from_str(arguments).unwrap();
    assert_eq!((&message["stop_reason"], &message["content"][0]["name"]), (&json!("tool_use"), name));
    assert_eq!(message["content"][0]["input"], input);
    let response = answered(&server, "/v1/responses", &openai);
    let item = &response["output"][0];
    assert_eq!((&item["type"], &item["name"]), (&json!("function_call"), name));
    assert_eq!(item["arguments"], arguments);
    assert_eq!(&response["usage"]["input_tokens"], n_prompt);
    assert_eq!(&answered(&server, "/v1/messages/count_tokens", &anthropic)["input_tokens"], n_prompt);

    let pieces = |path: &str, body: &Value, delta: &str| -> String {
        server.events_at(path, body).filter_map(|e| e.pointer(delta)?.as_str().map(str::to_owned)).collect()
    };
    assert_eq!(pieces("/v1/messages", &anthropic, "/delta/partial_json"), arguments);
    assert_eq!(pieces("/v1/responses", &openai, "/delta"), arguments);

    // given back with what came of it, each as its dialect has it, it is the same prompt again
    let result = |of: Value| with(json!({"role": "tool", "content": "5", "name": name}), &of);
    let made = json!({"role": "assistant", "content": null, "tool_calls": [call]});
    let history = json!([asked[0], made, result(json!({"tool_call_id": call["id"]})), {"role": "user", "content": "And?"}]);
    let told = answered(
        &server,
        "/v1/chat/completions",
        &with(chat, &json!({"messages": history, "max_tokens": 1})),
    );
    let results = json!([
        {"type": "tool_result", "tool_use_id": message["content"][0]["id"], "content": "5"}, {"type": "text", "text": "And?"},
    ]);
    // as the other client wrote its arguments, which the prompt repeats
    let content = with(message["content"][0].clone(), &json!({"input": input}));
    let history =
        json!([asked[0], {"role": "assistant", "content": [content]}, {"role": "user", "content": results}]);
    let counted =
        answered(&server, "/v1/messages/count_tokens", &with(anthropic, &json!({"messages": history})));
    let output = json!({"type": "function_call_output", "call_id": item["call_id"], "output": "5"});
    let history = json!([asked[0], item, output, {"role": "user", "content": "And?"}]);
    let response =
        answered(&server, "/v1/responses", &with(openai, &json!({"input": history, "max_output_tokens": 1})));
    let n_prompt = &told["usage"]["prompt_tokens"];
    assert_eq!((&response["usage"]["input_tokens"], &counted["input_tokens"]), (n_prompt, n_prompt));
}

/// Clients give up on a stream in which no event comes for long: a prompt takes its time, and so may a worker.
#[test]
fn a_stream_begins_at_once_and_says_that_it_lives() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let server = Server::start(&cut, &worker.address, &["--chat-template", "chatml", "--temp", "0"]);
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let begins = |path: &str, first: &str, then: Option<&str>| {
        answered(&server, "/v1/messages", &json!({"messages": messages, "max_tokens": 1}));
        worker.signal("STOP");
        let body = json!({"messages": messages, "input": messages, "max_tokens": 3, "max_output_tokens": 3, "stream": true});
        let stream = server.send(&format!("POST {path} HTTP/1.1\r\nHost: localhost"), &body.to_string());
        let lines = BufReader::new(stream).lines().map_while(Result::ok);
        let mut names = lines.filter_map(|line| line.strip_prefix("event: ").map(str::to_owned));
        assert_eq!(names.next().as_deref(), Some(first));
        if let Some(then) = then {
            assert_eq!(names.next().as_deref(), Some(then));
        }
        worker.signal("CONT");
        names.last()
    };
    assert_eq!(begins("/v1/messages", "message_start", Some("ping")).as_deref(), Some("message_stop"));
    let last = begins("/v1/responses", "response.created", Some("response.in_progress")).unwrap();
    assert!(["response.completed", "response.incomplete"].contains(&last.as_str()), "{last}");
}

#[test]
fn thoughts_are_told_to_whoever_asked_for_them() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    // with the beginning of a thought in the prompt, as some models have it: random weights begin none
    let quiet = "{{- '<think>\\n\\n</think>\\n\\n' }}";
    let thinks = include_str!("../llama-sys-patch/tests/templates/thinks.jinja");
    let aloud = thinks.replace(quiet, &format!("{quiet}{{%- else %}}{{{{- '<think>\\n' }}}}"));
    assert_ne!(aloud, thinks);
    let template = cut.folder.path().join("aloud.jinja");
    std::fs::write(&template, aloud).unwrap();
    let template = template.to_str().unwrap();
    let server = Server::start(&cut, &worker.address, &["--chat-template", template, "--temp", "0"]);
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let chat = answered(&server, "/v1/chat/completions", &json!({"messages": messages, "max_tokens": 9}));
    let thought = &chat["choices"][0]["message"]["reasoning_content"];
    assert!(thought.as_str().is_some_and(|text| !text.is_empty()), "{chat}");

    let ask = |thinking: Value| json!({"messages": messages, "max_tokens": 9, "thinking": thinking});
    let said = |thinking: Value| answered(&server, "/v1/messages", &ask(thinking))["content"].clone();
    assert_eq!(
        said(json!({"type": "enabled"})),
        json!([{"type": "thinking", "thinking": thought, "signature": ""}])
    );
    assert_eq!(said(Value::Null), json!([{"type": "text", "text": ""}]));
    let answer = said(json!({"type": "disabled"}));
    assert!(answer[0]["type"] == "text" && answer[0]["text"] != "", "{answer}");
    let events = server.events_at("/v1/messages", &ask(json!({"type": "adaptive"})));
    let pieces: String =
        events.filter_map(|e| e.pointer("/delta/thinking")?.as_str().map(str::to_owned)).collect();
    assert_eq!(thought, &pieces);

    let ask = |effort: &str| json!({"input": "Hi", "max_output_tokens": 9, "reasoning": {"effort": effort}});
    let output = answered(&server, "/v1/responses", &ask("high"))["output"].clone();
    assert_eq!((&output[0]["type"], &output[0]["content"][0]["text"]), (&json!("reasoning"), thought));
    let output = answered(&server, "/v1/responses", &ask("none"))["output"].clone();
    assert_eq!(
        (&output[0]["type"], &output[0]["content"][0]["text"]),
        (&json!("message"), &answer[0]["text"])
    );
}
