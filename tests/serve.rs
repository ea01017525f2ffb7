//! `dim-host serve` as a process, over workers that are processes: what its clients get is what `generate` gives, whatever
//! happens to the worker and to each other, and what is wrong is answered.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::served::{BEGINNINGS, N, Server, command, generated, greedy, parallel};
use common::{Cut, PROMPT, Worker, failure, report, signal};
use serde_json::{Value, json};

/// What a model of random weights comes to the end of.
fn short_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "kind": {"enum": ["small", "large"]},
            "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
            "n": {"type": "integer", "minimum": 10, "maximum": 99},
        },
        "required": ["kind", "flags", "n"],
        "additionalProperties": false,
    })
}

fn is_valid(text: &str) -> bool {
    let Ok(Value::Object(object)) = serde_json::from_str::<Value>(text) else { return false };
    let flags = object.get("flags").and_then(Value::as_array);
    object.len() == 3
        && matches!(object["kind"].as_str(), Some("small" | "large"))
        && flags.is_some_and(|flags| (1..=3).contains(&flags.len()) && flags.iter().all(Value::is_boolean))
        && object["n"].as_u64().is_some_and(|n| (10..=99).contains(&n))
}

#[test]
fn an_answer_is_what_its_schema_wants_however_it_is_sampled() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let schema = short_schema().to_string();
    let options = ["--wire", "f32", "--temp", "0", "-n", "200", "-j", &schema];
    let generated = report(&mut cut.generate(&[&worker.address], &options)).text;
    let server = Server::start(&cut, &worker.address, &["--parallel", "3"]);
    let format = |schema: Value| json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}});
    let body = |more: Value| {
        let mut body =
            json!({"prompt": PROMPT, "max_tokens": 200, "response_format": format(short_schema())});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let texts = |body: &Value| -> Vec<String> {
        let answer = server.post("/v1/completions", body);
        assert_eq!(answer.0, 200, "{}", answer.2);
        let ended = |choice: &Value| {
            assert_eq!(choice["finish_reason"], "stop", "{choice}");
            choice["text"].as_str().unwrap().to_owned()
        };
        answer.json()["choices"].as_array().unwrap().iter().map(ended).collect()
    };
    let ways = [
        json!({"temperature": 0}),
        json!({"temperature": 2, "top_p": 1, "top_k": 0, "seed": 3, "n": 8}),
        // what may not follow does not, however much it is wanted; and a reply that is complete has ended
        json!({"temperature": 0, "logit_bias": {"65": 100, "300": 100}, "ignore_eos": true}),
        json!({"temperature": 0, "logit_bias": {"0": -100, "1": -100}, "repeat_penalty": 2, "min_p": 0.9}),
        json!({"temperature": 1, "seed": 1, "logprobs": 5}),
    ];
    for way in ways {
        let texts = texts(&body(way.clone()));
        assert!(texts.iter().all(|text| is_valid(text)), "{way}: {texts:?}");
        assert_eq!(texts.len(), way["n"].as_u64().unwrap_or(1) as usize);
    }
    let several = texts(&body(json!({"temperature": 2, "top_p": 1, "top_k": 0, "seed": 3, "n": 8})));
    assert!(several.iter().any(|text| *text != several[0]), "{several:?}");

    let greedy = body(json!({"temperature": 0}));
    let streamed: String = server
        .events(&greedy)
        .filter_map(|event| event["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(texts(&greedy).concat(), streamed);
    assert_eq!(generated, streamed);
    let mut stopped = greedy.clone();
    stopped["stop"] = json!(["flags"]);
    assert_eq!(texts(&stopped), [streamed.split("flags").next().unwrap().to_owned()]);
    let any = json!({"prompt": PROMPT, "max_tokens": 4, "response_format": {"type": "json_object"}, "temperature": 0});
    let any = server.post("/v1/completions", &any).json();
    assert!(any["choices"][0]["text"].as_str().unwrap().starts_with('{'), "{any}");

    // beside each other, each its own
    std::thread::scope(|scope| {
        for i in 0..6 {
            let (server, body) =
                (&server, body(json!({"temperature": 0, "response_format": format(json!({"const": i}))})));
            scope.spawn(move || {
                let answer = server.post("/v1/completions", &body).json();
                assert_eq!(answer["choices"][0]["text"], i.to_string(), "{answer}");
            });
        }
    });
}

#[test]
fn a_grammar_of_a_client_is_followed_where_that_was_allowed_and_ends_nothing_where_it_is_made_to() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let server = Server::start(&cut, &worker.address, &["--client-grammars"]);
    let ask = |more: Value| {
        let mut body = json!({"prompt": PROMPT, "max_tokens": 40, "temperature": 1, "seed": 5});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", &body)
    };
    let gbnf = "root ::= (\"yes\" | \"no\") \", \" [0-9]{3}";
    for _ in 0..2 {
        let answer = ask(json!({"grammar": gbnf})).json();
        let text = answer["choices"][0]["text"].as_str().unwrap();
        let (word, number) = text.split_once(", ").unwrap();
        assert!(matches!(word, "yes" | "no") && number.len() == 3, "{text}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    let ambiguous = "root ::= x\nx ::= \"a\" x \"b\" | \"a\" x \"c\" | \"a\" x \"d\"";
    for (more, expected) in [
        (json!({"grammar": "root ::= \"a\"{5,3}"}), "{5,3}: it is repeated"),
        (json!({"grammar": "root ::= e root \"a\" | \"b\"\ne ::= f\nf ::= "}), "left recursion"),
        (json!({"grammar": "root"}), "expecting ::="),
        (json!({"grammar": gbnf, "json_schema": {}}), "beside it"),
        (json!({"grammar": gbnf, "response_format": {"type": "json_object"}}), "beside it"),
        (json!({"grammar": ambiguous}), "ambiguous"),
    ] {
        let answer = ask(more.clone());
        assert!(answer.2.contains(expected), "{more}: {}", answer.2);
        assert!(expected == "ambiguous" || answer.0 == 400 && answer.2.contains("grammar"), "{}", answer.2);
    }
    assert_eq!(ask(json!({"grammar": gbnf})).0, 200, "it serves on");
    drop(server);
    let refused = Server::start(&cut, &worker.address, &[])
        .post("/v1/completions", &json!({"prompt": "x", "grammar": gbnf}));
    assert_eq!(refused.0, 400);
    assert!(refused.2.contains("follows no grammars"), "{}", refused.2);
}

#[test]
fn a_schema_that_is_not_enforced_is_refused_by_its_field() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let failed = failure(&mut cut.generate(&[&worker.address], &["-j", r#"{"not": {}}"#]), 2);
    assert!(failed.contains("--json-schema: \"not\" is not supported"), "{failed}");
    let server = Server::start(&cut, &worker.address, &[]);
    let deep = format!("{}{}", "{\"items\":".repeat(100), "{}".to_owned() + &"}".repeat(100));
    let table = [
        (r#"{"properties": {"a": {"not": {}}}}"#, "\"not\" is not supported (in #/properties/a)"),
        (r#"{"type": "array", "uniqueItems": true}"#, "\"uniqueItems\" is not supported (in #)"),
        (r#"{"minItems": 2, "maxItems": 1, "type": "array"}"#, "nothing can be valid"),
        (r##"{"$ref": "#"}"##, "nothing can be valid"),
        ("false", "nothing can be valid"),
        (r#"{"pattern": "(?=a)b"}"#, "a pattern cannot be read: look-around"),
        (r#"{"minProperties": 3}"#, "minProperties"),
        (r#"{"const": "a\u0000b"}"#, "control characters"),
        ("5", "a schema is an object"),
        (&deep, "more than 64 levels"),
    ];
    for (schema, expected) in table {
        let body = format!(
            r#"{{"prompt": "x", "max_tokens": 5, "response_format": {{"type": "json_schema", "json_schema": {{"name": "x", "schema": {schema}}}}}}}"#
        );
        let answer = server.ask("POST /v1/completions HTTP/1.1\r\nHost: localhost", &body);
        assert_eq!(
            (answer.0, answer.word().as_str()),
            (400, "response_format.json_schema.schema"),
            "{}",
            answer.2
        );
        assert!(answer.json()["error"]["message"].as_str().unwrap().contains(expected), "{}", answer.2);
    }
    assert_eq!(server.tokens(&greedy("x", 2)).len(), 2);
}

#[test]
fn greedy_answers_are_those_of_generate_with_and_without_what_the_caches_hold() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let expected = generated(&cut, &worker.address);
    let server = Server::start(&cut, &worker.address, &["--model-alias", "tiny"]);
    assert_eq!(server.get("/v1/models")["data"][0]["id"], "tiny");
    for (begin, expected) in BEGINNINGS.into_iter().zip(&expected) {
        let mut body = greedy(&PROMPT[begin..], N);
        assert_eq!(&server.tokens(&body), expected);
        assert_eq!(&server.streamed(&body), expected, "with what the cache holds, streamed");
        body["cache_prompt"] = false.into();
        assert_eq!(&server.tokens(&body), expected, "without it");
    }
    let again = server.post("/v1/completions", &greedy(&PROMPT[BEGINNINGS[3]..], 2)).json();
    assert_eq!(again["timings"]["prompt_n"], 1, "all but the last token was held");
    assert!(again["timings"]["cache_n"].as_u64().unwrap() > 20, "{again}");
}

#[test]
fn four_clients_at_once_and_a_worker_that_is_killed_change_no_token() {
    let cut = Cut::tiny("qwen2");
    let mut worker = parallel(&cut, "127.0.0.1:0");
    let address = worker.address.clone();
    let expected = generated(&cut, &address);
    let server = Server::start(&cut, &address, &["--parallel", "4", "--exact"]);
    for round in 0..3 {
        std::thread::scope(|scope| {
            for (begin, expected) in BEGINNINGS.into_iter().zip(&expected) {
                let server = &server;
                scope.spawn(move || assert_eq!(&server.streamed(&greedy(&PROMPT[begin..], N)), expected));
            }
            std::thread::sleep(Duration::from_millis(60));
            if round > 0 {
                worker.kill();
                worker = parallel(&cut, &address);
            }
        });
    }
    assert_eq!(server.get("/health")["status"], "ok");
    assert!(server.get("/health")["lost"].as_u64().unwrap() > 0, "it was never noticed");
}

#[test]
fn a_worker_that_stays_away_ends_the_request_and_not_the_server() {
    let cut = Cut::tiny("qwen2");
    let mut worker = parallel(&cut, "127.0.0.1:0");
    let address = worker.address.clone();
    let expected = generated(&cut, &address);
    let server = Server::start(&cut, &address, &["--give-up-after", "2"]);
    let body = greedy(PROMPT, N);
    let mut events = server.events(&body);
    assert!(events.next().is_some());
    worker.kill();
    let last = events.last().expect("an error at the end");
    assert_eq!(last["error"]["code"], "worker_unavailable", "{last}");
    assert_eq!(server.get("/health")["status"], "waiting for a worker");
    let refused = server.post("/v1/completions", &body);
    assert_eq!((refused.0, refused.word().as_str()), (503, "worker_unavailable"));
    assert!(refused.1.contains("retry-after:"), "{}", refused.1);
    let _worker = parallel(&cut, &address);
    assert_eq!(server.tokens(&body), expected[0]);
    assert_eq!(server.get("/health")["status"], "ok");
}

#[test]
fn a_client_that_leaves_is_not_computed_for_and_one_too_many_is_told_so() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let server = Server::start(&cut, &worker.address, &["--queue", "2"]);
    let busy = |server: &Server| server.get("/props")["slots_busy"].as_u64().unwrap();
    let mut long = greedy(PROMPT, 0);
    (long["max_tokens"], long["n"]) = ((-1).into(), 128.into());
    let mut events = server.events(&long);
    assert!(events.next().is_some());
    assert_eq!(busy(&server), 1);
    // one waits, as this client is to have half of the queue; one more is one too many
    let waits = server.events(&greedy(PROMPT, 3));
    server.comes_true("one waits", |server| server.get("/props")["requests_waiting"] == 1);
    let refused = server.post("/v1/completions", &greedy(PROMPT, 3));
    assert_eq!((refused.0, refused.word().as_str()), (503, "unavailable"));
    assert!(refused.1.contains("retry-after:"), "{}", refused.1);
    drop(events);
    assert!(waits.count() > 3, "it has had its turn");
    server.comes_true("the slot is free", |server| busy(server) == 0);
    // far from all that was asked for
    let metrics = server.ask("GET /metrics HTTP/1.1\r\nHost: localhost", "").2;
    let line = metrics.lines().find(|line| line.starts_with("dim_generated_tokens_total ")).expect(&metrics);
    let n: u64 = line.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(n < 20_000, "{n} tokens");
    assert!(
        metrics.contains("dim_clients_left_total") && metrics.contains("dim_slot_wait_seconds_count"),
        "{metrics}"
    );
}

/// A worker that says nothing holds a prompt for as long as it likes, and nobody's slot.
#[test]
fn a_client_that_leaves_during_its_prompt_leaves_a_free_slot() {
    let cut = Cut::tiny("qwen2");
    let mut worker = parallel(&cut, "127.0.0.1:0");
    let address = worker.address.clone();
    let server = Server::start(&cut, &address, &["--parallel", "2", "--give-up-after", "120"]);
    let busy = |server: &Server| server.get("/props")["slots_busy"].as_u64().unwrap();
    let expected = server.tokens(&greedy(PROMPT, N));
    for is_killed in [false, true] {
        if is_killed {
            worker.kill();
        } else {
            worker.signal("STOP");
        }
        for is_stream in [false, true] {
            let mut body = greedy(&PROMPT[60..], N);
            (body["cache_prompt"], body["stream"]) = (false.into(), is_stream.into());
            let asks = || server.send("POST /v1/completions HTTP/1.1\r\nHost: localhost", &body.to_string());
            let leave = [asks(), asks()];
            server.comes_true("both have a slot", |server| busy(server) == 2);
            std::thread::sleep(Duration::from_millis(100));
            drop(leave);
            let start = Instant::now();
            server.comes_true("the slots are free", |server| busy(server) == 0);
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        }
        if is_killed {
            worker = parallel(&cut, &address);
        } else {
            worker.signal("CONT");
        }
        assert_eq!(server.tokens(&greedy(PROMPT, N)), expected);
    }
}

#[test]
fn who_is_cut_short_by_the_server_s_end_is_told_so_and_connections_are_counted_while_they_are_open() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let server = Server::start(&cut, &worker.address, &[]);
    let open: Vec<TcpStream> = (0..3).map(|_| TcpStream::connect(&server.address).unwrap()).collect();
    // and the one that asks
    server.comes_true("four connections", |server| {
        let metrics = server.ask("GET /metrics HTTP/1.1\r\nHost: localhost", "").2;
        metrics.lines().any(|line| line == "dim_connections 4")
    });
    drop(open);
    let mut long = greedy(PROMPT, 0);
    (long["max_tokens"], long["n"]) = ((-1).into(), 128.into());
    let mut events = server.events(&long);
    assert!(events.next().is_some());
    signal(server.pid(), "INT");
    let last = events.last().expect("an error at the end");
    assert_eq!(
        (&last["error"]["code"], &last["error"]["status"]),
        (&json!("unavailable"), &json!(503)),
        "{last}"
    );
}

#[test]
fn replies_are_as_openai_s_clients_read_them() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let server = Server::start(&cut, &worker.address, &["--chat-template", "chatml"]);
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 4, "ignore_eos": true,
        "logprobs": true, "top_logprobs": 2, "n": 2});
    let whole = server.post("/v1/chat/completions", &chat).json();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["usage"]["completion_tokens"], 8);
    for (i, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(i), &json!("length")));
        let content = choice["logprobs"]["content"].as_array().unwrap();
        assert_eq!(content.len(), 4);
        // greedy: the chosen one is the likeliest
        assert!(content.iter().all(|c| c["top_logprobs"][0]["logprob"] == c["logprob"]), "{choice}");
    }
    // a bias of -100 bans what greedy would take, and a stop text ends a reply before itself
    let first = server.tokens(&greedy(PROMPT, 1))[0];
    let mut banned = greedy(PROMPT, 1);
    banned["logit_bias"] = json!({first.to_string(): -100});
    assert_ne!(server.tokens(&banned)[0], first);
    let text = server.post("/v1/completions", &greedy(PROMPT, 20)).json()["choices"][0]["text"]
        .as_str()
        .unwrap()
        .to_owned();
    let cut_at = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[cut_at..].chars().take(3).collect();
    let mut stopped = greedy(PROMPT, 20);
    stopped["stop"] = json!(["never in it at all", stop]);
    let stopped = server.post("/v1/completions", &stopped).json();
    assert_eq!(stopped["choices"][0]["text"], text[..text.find(&stop).unwrap()]);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    // the same seed, the same text; choices of one request differ
    let mut random = json!({"prompt": PROMPT, "seed": 7, "max_tokens": 16, "n": 2, "ignore_eos": true, "temperature": 1.5});
    let texts = |random: &Value| {
        let choices = server.post("/v1/completions", random).json()["choices"].clone();
        (choices[0]["text"].clone(), choices[1]["text"].clone())
    };
    let once = texts(&random);
    assert_ne!(once.0, once.1);
    assert_eq!(texts(&random), once);
    random["stream"] = true.into();
    random["stream_options"] = json!({"include_usage": true});
    let last = server.events(&random).last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(32)));
}

/// By random weights, which say nothing by themselves: what they call is what the grammar lets them.
#[test]
fn a_tool_that_must_be_called_is_called_with_what_its_schema_says() {
    let cut = Cut::tiny("qwen2");
    let ctx = ["--ctx", "2048"];
    let parallel = [&ctx[..], &["--parallel", "2"]].concat();
    let worker = Worker::start_at("127.0.0.1:0", &cut.slice(1), &cut.key, &parallel);
    let template = concat!(env!("CARGO_MANIFEST_DIR"), "/../../llama-sys-patch/tests/templates/hermes.jinja");
    let server = Server::start(&cut, &worker.address, &[&ctx[..], &["--chat-template", template]].concat());
    let one_of = |values: &[&str]| json!({"type": "string", "enum": values});
    let tool = |name: &str| {
        json!({"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "required": ["city", "days"], "additionalProperties": false,
            "properties": {"city": one_of(&["Paris", "Oslo"]), "days": {"type": "boolean"}},
        }}})
    };
    let ask = |more: Value| {
        let mut body = json!({
            "messages": [{"role": "user", "content": "Where <tool_call> is it warm?"}], "max_tokens": 200, "temperature": 1.5,
            "tools": [tool("weather"), tool("time")], "parallel_tool_calls": false,
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    for seed in 0..6 {
        let body = ask(json!({"tool_choice": "required", "seed": seed}));
        let answer = server.post("/v1/chat/completions", &body);
        assert_eq!(answer.0, 200, "{}", answer.2);
        let choice = &answer.json()["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
        let call = &choice["message"]["tool_calls"][0];
        assert!(["weather", "time"].contains(&call["function"]["name"].as_str().unwrap()), "{call}");
        let arguments = call["function"]["arguments"].as_str().unwrap();
        let read: Value = serde_json::from_str(arguments).unwrap_or_else(|e| panic!("{e}: {arguments}"));
        assert!(
            ["Paris", "Oslo"].contains(&read["city"].as_str().unwrap()) && read["days"].is_boolean(),
            "{read}"
        );

        let mut told = String::new();
        let mut names = Vec::new();
        for event in server.events_at("/v1/chat/completions", &body) {
            for call in event["choices"][0]["delta"]["tool_calls"].as_array().into_iter().flatten() {
                names.extend(call["function"]["name"].as_str().map(str::to_owned));
                told.push_str(call["function"]["arguments"].as_str().unwrap_or_default());
            }
        }
        assert_eq!(
            (told.as_str(), names),
            (arguments, vec![call["function"]["name"].as_str().unwrap().to_owned()])
        );
    }
    let named = json!({"type": "function", "function": {"name": "time"}});
    let answer = server.post("/v1/chat/completions", &ask(json!({"tool_choice": named}))).json();
    assert_eq!(answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "time", "{answer}");
    let free =
        server.post("/v1/chat/completions", &ask(json!({"tool_choice": "auto", "max_tokens": 20}))).json();
    assert!(free["choices"][0]["message"].is_object(), "{free}");

    drop(server);
    let plain = Server::start(&cut, &worker.address, &[&ctx[..], &["--chat-template", "chatml"]].concat());
    let refused = plain.post("/v1/chat/completions", &ask(json!({})));
    assert_eq!((refused.0, refused.word().as_str()), (400, "tools"), "{}", refused.2);
}

#[test]
fn markdown_is_elements() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let server = Server::start(&cut, &worker.address, &[]);
    let head = "POST /markdown HTTP/1.1\r\nHost: localhost";
    let pieces = server.ask(head, "**a** <b>").json();
    assert_eq!(pieces, json!([{"open": "p"}, {"open": "strong"}, "a", null, " ", "<b>", null]));
    assert_eq!(server.ask(head, &"*a* ".repeat(70_000)).0, 413);
}

#[test]
fn what_is_wrong_is_answered_and_who_may_not_is_kept_out() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let keys = cut.folder.path().join("api-keys");
    std::fs::write(&keys, "# of the test\na-key-of-a-client\n").unwrap();
    let server = Server::start(&cut, &worker.address, &["--api-key-file", keys.to_str().unwrap()]);
    let key = "Authorization: Bearer a-key-of-a-client";
    let post = |head: &str, body: &str| server.ask(&format!("POST /v1/completions HTTP/1.1\r\n{head}"), body);
    let good = greedy("Hi", 1).to_string();
    assert_eq!(post(&format!("Host: localhost\r\n{key}"), &good).0, 200);
    let table = [
        ("Host: localhost".to_owned(), good.clone(), 401, "invalid_api_key"),
        (
            "Host: localhost\r\nAuthorization: Bearer a-key-of-a-clienT".to_owned(),
            good.clone(),
            401,
            "invalid_api_key",
        ),
        (format!("Host: evil.example\r\n{key}"), good.clone(), 403, "host_not_allowed"),
        (
            format!("Host: localhost\r\nOrigin: https://evil.example\r\n{key}"),
            good.clone(),
            403,
            "origin_not_allowed",
        ),
        (format!("Host: localhost\r\n{key}"), "{".to_owned(), 400, ""),
        (format!("Host: localhost\r\n{key}"), json!({"prompt": [999_999_999]}).to_string(), 400, "prompt[0]"),
        (format!("Host: localhost\r\n{key}"), json!({"prompt": "x", "top_p": 7}).to_string(), 400, "top_p"),
        (
            format!("Host: localhost\r\n{key}"),
            json!({"prompt": vec![7; 513]}).to_string(),
            400,
            "context_length_exceeded",
        ),
    ];
    for (head, body, status, word) in table {
        let answer = post(&head, &body);
        assert_eq!((answer.0, answer.word().as_str()), (status, word), "{head} {body}: {}", answer.2);
    }
    // in words for whoever asks, who has no Rust
    let long = post(&format!("Host: localhost\r\n{key}"), &json!({"prompt": vec![7; 513]}).to_string()).2;
    assert!(long.contains("a context of 1024 or more") && !long.contains("::"), "{long}");
    let path = |line: &str| server.ask(&format!("{line} HTTP/1.1\r\nHost: localhost\r\n{key}"), "").0;
    assert_eq!(
        (path("GET /nothing"), path("GET /v1/completions"), path("GET /v1/models/nobody")),
        (404, 405, 404)
    );
    // it is not read to its end, and not kept
    let mut large = TcpStream::connect(&server.address).unwrap();
    write!(
        large,
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{key}\r\nContent-Length: 99999999999\r\n\r\n{{"
    )
    .unwrap();
    let mut line = String::new();
    BufReader::new(large).read_line(&mut line).unwrap();
    assert!(line.contains(" 413 "), "{line}");
    // who has no key learns that it lives, and no more
    assert_eq!(server.get("/health"), json!({"status": "ok"}));
    let says = failure(&mut command(&cut, &worker.address, &["--listen", "0.0.0.0:0"]), 2);
    assert!(says.contains("--api-key-file") && says.contains("--no-api-key"), "{says}");
}

/// Connections that send half a request keep nobody away.
#[test]
fn half_open_clients_are_shown_out_for_one_who_speaks() {
    let cut = Cut::tiny("qwen2");
    let worker = parallel(&cut, "127.0.0.1:0");
    let server = Server::start(&cut, &worker.address, &[]);
    let half: Vec<TcpStream> = (0..700)
        .map_while(|_| {
            let mut stream = TcpStream::connect(&server.address).ok()?;
            stream.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: local").ok()?;
            Some(stream)
        })
        .collect();
    assert!(half.len() > 520, "{} connections: more open files are needed (ulimit -n)", half.len());
    for _ in 0..5 {
        let start = Instant::now();
        assert_eq!(server.post("/v1/completions", &greedy("Hi", 2)).0, 200);
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
