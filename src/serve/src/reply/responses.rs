//! A reply as OpenAI's `/v1/responses` has it: each block is an item of the output, and each event has a number.

use serde_json::{Map, Value, json};

use super::blocks::{Block, BlockKind, Dialect, Reply, Step, push_event};
use super::unix_time;
use crate::error::ApiError;

/// OpenAI's newer words.
pub(crate) struct Responses {
    created: u64,
    /// fields of the request that every response repeats
    told_back: Map<String, Value>,
    /// events so far
    n_events: u64,
}

impl Responses {
    pub(crate) fn new(told_back: Map<String, Value>) -> Responses {
        Responses { created: unix_time(), told_back, n_events: 0 }
    }

    fn event(&mut self, name: &str, mut data: Value, out: &mut String) {
        data["sequence_number"] = self.n_events.into();
        self.n_events += 1;
        push_event(name, data, out);
    }

    fn response(&self, reply: &Reply) -> Value {
        let (predicted, cached) = reply.counts();
        let usage = reply.ended.map(|_| {
            json!({
                "input_tokens": reply.n_prompt,
                "input_tokens_details": {"cached_tokens": cached},
                "output_tokens": predicted,
                "output_tokens_details": {"reasoning_tokens": reply.n_thought.min(predicted)},
                "total_tokens": reply.n_prompt + predicted,
            })
        });
        let status = match reply.ended {
            None => "in_progress",
            Some(_) if reply.is_cut() => "incomplete",
            Some(_) => "completed",
        };
        let n_items = if reply.ended.is_some() { reply.blocks.len() } else { 0 };
        let mut response = json!({
            "id": format!("resp_{}", reply.name),
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": null,
            "incomplete_details": reply.is_cut().then(|| json!({"reason": "max_output_tokens"})),
            "model": reply.model,
            "output": (0..n_items).map(|i| item(reply, i, true)).collect::<Vec<_>>(),
            "previous_response_id": null,
            "store": false,
            "usage": usage,
        });
        for (name, value) in &self.told_back {
            response[name] = value.clone();
        }
        response
    }

    /// The one part of a message or of a thought, where it has ended.
    fn end_part(&mut self, i: usize, block: &Block, id: &str, out: &mut String) {
        let part = part(&block.kind, &block.text);
        let mut done = in_part(i, id, json!({"text": block.text}));
        if block.kind == BlockKind::Text {
            done["logprobs"] = json!([]);
            self.event("response.output_text.done", done, out);
        } else {
            self.event("response.reasoning_text.done", done, out);
        }
        self.event("response.content_part.done", in_part(i, id, json!({"part": part})), out);
    }
}

impl Dialect for Responses {
    const QUIET: &'static str = "";

    fn begin(&mut self, reply: &Reply, out: &mut String) {
        let response = self.response(reply);
        self.event("response.created", json!({"response": response}), out);
        self.event("response.in_progress", json!({"response": response}), out);
    }

    fn step(&mut self, reply: &Reply, step: Step, out: &mut String) {
        match step {
            Step::Begin(i) => {
                let item = item(reply, i, false);
                self.event("response.output_item.added", json!({"output_index": i, "item": item}), out);
                let kind = &reply.blocks[i].kind;
                if !matches!(kind, BlockKind::Call { .. }) {
                    let data = in_part(i, &id(reply, i), json!({"part": part(kind, "")}));
                    self.event("response.content_part.added", data, out);
                }
            }
            Step::More(i, text) => {
                let id = id(reply, i);
                let (name, data) = match reply.blocks[i].kind {
                    BlockKind::Thought => {
                        ("response.reasoning_text.delta", in_part(i, &id, json!({"delta": text})))
                    }
                    BlockKind::Text => {
                        let data = json!({"delta": text, "logprobs": []});
                        ("response.output_text.delta", in_part(i, &id, data))
                    }
                    BlockKind::Call { .. } => {
                        let data = json!({"item_id": id, "output_index": i, "delta": text});
                        ("response.function_call_arguments.delta", data)
                    }
                };
                self.event(name, data, out);
            }
            Step::End(i) => {
                let (block, id) = (&reply.blocks[i], id(reply, i));
                match &block.kind {
                    BlockKind::Call { name, .. } => {
                        let data = json!({
                            "item_id": id, "output_index": i, "name": name, "arguments": block.text,
                        });
                        self.event("response.function_call_arguments.done", data, out);
                    }
                    _ => self.end_part(i, block, &id, out),
                }
                let item = item(reply, i, true);
                self.event("response.output_item.done", json!({"output_index": i, "item": item}), out);
            }
        }
    }

    fn end(&mut self, reply: &Reply, out: &mut String) {
        let response = self.response(reply);
        let name = if reply.is_cut() { "response.incomplete" } else { "response.completed" };
        self.event(name, json!({"response": response}), out);
    }

    fn fail(&mut self, error: &ApiError, out: &mut String) {
        let mut body = error.body();
        let error = body["error"].take();
        let data = json!({"code": error["code"], "message": error["message"], "param": error["param"]});
        self.event("error", data, out);
    }

    fn whole(&self, reply: &Reply) -> Value {
        self.response(reply)
    }
}

/// A block as an item; as it begins, or as it has ended: a reply that is cut is cut in its last one.
fn item(reply: &Reply, i: usize, has_ended: bool) -> Value {
    let Block { kind, text } = &reply.blocks[i];
    let is_last = i + 1 == reply.blocks.len();
    let status = match has_ended {
        false => "in_progress",
        true if is_last && reply.is_cut() => "incomplete",
        true => "completed",
    };
    let text = if has_ended { text.as_str() } else { "" };
    let content = if has_ended { vec![part(kind, text)] } else { Vec::new() };
    let id = id(reply, i);
    match kind {
        BlockKind::Thought => {
            json!({"type": "reasoning", "id": id, "status": status, "summary": [], "content": content})
        }
        BlockKind::Text => {
            json!({"type": "message", "id": id, "status": status, "role": "assistant", "content": content})
        }
        BlockKind::Call { id: call_id, name } => json!({
            "type": "function_call", "id": id, "call_id": call_id, "name": name, "arguments": text, "status": status,
        }),
    }
}

/// What an item is called.
fn id(reply: &Reply, i: usize) -> String {
    let prefix = match reply.blocks[i].kind {
        BlockKind::Thought => "rs",
        BlockKind::Text => "msg",
        BlockKind::Call { .. } => "fc",
    };
    format!("{prefix}_{}_{i}", reply.name)
}

/// The one part that a message or a thought consists of.
fn part(kind: &BlockKind, text: &str) -> Value {
    match kind {
        BlockKind::Text => json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []}),
        _ => json!({"type": "reasoning_text", "text": text}),
    }
}

/// `data` of the one part of item `i`.
fn in_part(i: usize, id: &str, mut data: Value) -> Value {
    data["item_id"] = id.into();
    (data["output_index"], data["content_index"]) = (i.into(), 0.into());
    data
}
