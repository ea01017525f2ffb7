//! A reply of one text in the two other dialects: Anthropic's `/v1/messages` and OpenAI's `/v1/responses`. Both name each event
//! of a stream, and begin and end each part of a reply. What a model thinks before is no part of it.

use serde_json::{Value, json};

use crate::error::ApiError;
use crate::reply::{Tell, random_name, unix_time};
use crate::work::{Finish, Timings, Update};

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Messages,
    Responses,
}

/// Tells a reply in one of them.
pub(crate) struct Plain {
    dialect: Dialect,
    /// of the reply and of the message that is its one part, without what says which they are
    name: String,
    model: String,
    created: u64,
    n_prompt: usize,
    stops: Vec<String>,
    text: String,
    ended: Option<(Finish, Timings)>,
    /// events so far
    n_events: u64,
}

impl Plain {
    pub(crate) fn new(
        dialect: Dialect,
        model: &str,
        n_prompt: usize,
        wanted: &crate::request::Wanted,
    ) -> Plain {
        Plain {
            dialect,
            name: random_name(),
            model: model.to_owned(),
            created: unix_time(),
            n_prompt,
            stops: wanted.stop.clone(),
            text: String::new(),
            ended: None,
            n_events: 0,
        }
    }

    /// `data` as an event, with what every one of its dialect says.
    fn event(&mut self, name: &str, mut data: Value, out: &mut String) {
        data["type"] = name.into();
        if self.dialect == Dialect::Responses {
            data["sequence_number"] = self.n_events.into();
        }
        self.n_events += 1;
        out.push_str(&format!("event: {name}\ndata: {data}\n\n"));
    }

    fn begin(&mut self, out: &mut String) {
        if self.n_events > 0 {
            return;
        }
        match self.dialect {
            Dialect::Messages => {
                let message = self.message();
                self.event("message_start", json!({"message": message}), out);
                let block = json!({"index": 0, "content_block": {"type": "text", "text": ""}});
                self.event("content_block_start", block, out);
            }
            Dialect::Responses => {
                let response = self.response();
                self.event("response.created", json!({"response": response}), out);
                self.event("response.in_progress", json!({"response": response}), out);
                let item = self.item();
                self.event("response.output_item.added", json!({"output_index": 0, "item": item}), out);
                let part = self.of_part(json!({"part": part("")}));
                self.event("response.content_part.added", part, out);
            }
        }
    }

    fn push(&mut self, text: &str, out: &mut String) {
        self.text.push_str(text);
        if text.is_empty() {
            return;
        }
        match self.dialect {
            Dialect::Messages => {
                let delta = json!({"index": 0, "delta": {"type": "text_delta", "text": text}});
                self.event("content_block_delta", delta, out);
            }
            Dialect::Responses => {
                let delta = self.of_part(json!({"delta": text, "logprobs": []}));
                self.event("response.output_text.delta", delta, out);
            }
        }
    }

    fn end(&mut self, out: &mut String) {
        match self.dialect {
            Dialect::Messages => {
                self.event("content_block_stop", json!({"index": 0}), out);
                let message = self.message();
                let delta =
                    json!({"stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"]});
                self.event("message_delta", json!({"delta": delta, "usage": message["usage"]}), out);
                self.event("message_stop", json!({}), out);
            }
            Dialect::Responses => {
                let done = self.of_part(json!({"text": self.text, "logprobs": []}));
                self.event("response.output_text.done", done, out);
                let done = self.of_part(json!({"part": part(&self.text)}));
                self.event("response.content_part.done", done, out);
                let item = self.item();
                self.event("response.output_item.done", json!({"output_index": 0, "item": item}), out);
                let response = self.response();
                let name = if self.is_cut() { "response.incomplete" } else { "response.completed" };
                self.event(name, json!({"response": response}), out);
            }
        }
    }

    /// Where the one part of a response stands.
    fn of_part(&self, mut data: Value) -> Value {
        data["item_id"] = format!("msg_{}", self.name).into();
        (data["output_index"], data["content_index"]) = (0.into(), 0.into());
        data
    }

    fn is_cut(&self) -> bool {
        matches!(self.ended, Some((Finish::Length, _)))
    }

    /// Tokens generated, and those of the prompt that a cache held.
    fn counts(&self) -> (usize, usize) {
        self.ended.map_or((0, 0), |(_, timings)| (timings.predicted, timings.cached.min(self.n_prompt)))
    }

    /// As Anthropic's clients read it.
    fn message(&self) -> Value {
        let content = match self.ended {
            Some(_) => json!([{"type": "text", "text": self.text}]),
            None => json!([]),
        };
        let (predicted, cached) = self.counts();
        let (reason, stop) = match self.ended {
            None => (None, None),
            Some((Finish::Length, _)) => (Some("max_tokens"), None),
            Some((Finish::StopText(i), _)) => (Some("stop_sequence"), self.stops.get(i)),
            Some(_) => (Some("end_turn"), None),
        };
        json!({
            "id": format!("msg_{}", self.name),
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": {
                // what the cache held is counted beside it, as there
                "input_tokens": self.n_prompt - cached,
                "cache_read_input_tokens": cached,
                "cache_creation_input_tokens": 0,
                "output_tokens": predicted,
            },
        })
    }

    /// What a response consists of.
    fn item(&self) -> Value {
        let status = match self.ended {
            None => "in_progress",
            Some(_) if self.is_cut() => "incomplete",
            Some(_) => "completed",
        };
        let content = if self.ended.is_some() { vec![part(&self.text)] } else { Vec::new() };
        json!({
            "type": "message",
            "id": format!("msg_{}", self.name),
            "status": status,
            "role": "assistant",
            "content": content,
        })
    }

    /// As OpenAI's clients read it.
    fn response(&self) -> Value {
        let item = self.item();
        let (predicted, cached) = self.counts();
        let usage = self.ended.map(|_| {
            json!({
                "input_tokens": self.n_prompt,
                "input_tokens_details": {"cached_tokens": cached},
                "output_tokens": predicted,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.n_prompt + predicted,
            })
        });
        let why = self.is_cut().then(|| json!({"reason": "max_output_tokens"}));
        json!({
            "id": format!("resp_{}", self.name),
            "object": "response",
            "created_at": self.created,
            "status": item["status"],
            "error": null,
            "incomplete_details": why,
            "model": self.model,
            "output": if self.ended.is_some() { vec![item] } else { Vec::new() },
            "parallel_tool_calls": false,
            "tool_choice": "none",
            "tools": [],
            "store": false,
            "usage": usage,
        })
    }
}

impl Tell for Plain {
    fn is_complete(&self) -> bool {
        self.ended.is_some()
    }

    fn hear(&mut self, update: Update) -> Result<(), ApiError> {
        match update {
            Update::Token { said, .. } => self.text.push_str(&said.content),
            Update::Ended { said, finish, timings, .. } => {
                self.text.push_str(&said.content);
                self.ended = Some((finish, timings));
            }
            Update::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn chunks(&mut self, update: Update, out: &mut String) {
        if let Update::Failed(error) = update {
            let body = error.body();
            let data = match self.dialect {
                Dialect::Messages => body,
                Dialect::Responses => json!({
                    "code": body["error"]["code"], "message": body["error"]["message"], "param": body["error"]["param"],
                }),
            };
            return self.event("error", data, out);
        }
        self.begin(out);
        match update {
            Update::Token { said, .. } => self.push(&said.content, out),
            Update::Ended { said, finish, timings, .. } => {
                self.push(&said.content, out);
                self.ended = Some((finish, timings));
                self.end(out);
            }
            Update::Failed(_) => {}
        }
    }

    fn whole(&self) -> Value {
        match self.dialect {
            Dialect::Messages => self.message(),
            Dialect::Responses => self.response(),
        }
    }
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}
