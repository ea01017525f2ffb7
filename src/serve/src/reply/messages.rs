//! A reply as Anthropic's `/v1/messages` has it.

use serde_json::{Value, json};

use super::blocks::{Block, BlockKind, Dialect, Reply, Step, push_event};
use crate::error::ApiError;
use crate::work::Finish;

/// Anthropic's words.
pub(crate) struct Messages {
    /// texts at which it was to end
    stops: Vec<String>,
}

impl Messages {
    pub(crate) fn new(stops: Vec<String>) -> Messages {
        Messages { stops }
    }

    fn message(&self, reply: &Reply) -> Value {
        let content =
            if reply.ended.is_some() { reply.blocks.iter().map(block).collect() } else { Vec::new() };
        let (predicted, cached) = reply.counts();
        let (reason, stop) = match reply.ended.map(|(finish, _)| finish) {
            None => (None, None),
            Some(Finish::Length) => (Some("max_tokens"), None),
            Some(Finish::StopText(i)) => (Some("stop_sequence"), self.stops.get(i)),
            Some(Finish::ToolCalls) => (Some("tool_use"), None),
            Some(Finish::Stop) => (Some("end_turn"), None),
        };
        json!({
            "id": format!("msg_{}", reply.name),
            "type": "message",
            "role": "assistant",
            "model": reply.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": {
                // what the cache held is counted beside it, as there
                "input_tokens": reply.n_prompt - cached,
                "cache_read_input_tokens": cached,
                "cache_creation_input_tokens": 0,
                "output_tokens": predicted,
            },
        })
    }
}

/// A block as it stands in a message. The arguments of a call that was cut off are no object: clients see that by the reason
/// for which the message ended, and look for an object all the same.
fn block(block: &Block) -> Value {
    let text = block.text.as_str();
    match &block.kind {
        BlockKind::Thought => json!({"type": "thinking", "thinking": text, "signature": ""}),
        BlockKind::Text => json!({"type": "text", "text": text}),
        BlockKind::Call { id, name } => {
            let input: Option<Value> = serde_json::from_str(text).ok().filter(Value::is_object);
            json!({"type": "tool_use", "id": id, "name": name, "input": input.unwrap_or_else(|| json!({}))})
        }
    }
}

impl Dialect for Messages {
    const QUIET: &'static str = "event: ping\ndata: {\"type\": \"ping\"}\n\n";

    fn begin(&mut self, reply: &Reply, out: &mut String) {
        push_event("message_start", json!({"message": self.message(reply)}), out);
    }

    fn step(&mut self, reply: &Reply, step: Step, out: &mut String) {
        match step {
            Step::Begin(i) => {
                let empty = Block { kind: reply.blocks[i].kind.clone(), text: String::new() };
                let data = json!({"index": i, "content_block": block(&empty)});
                push_event("content_block_start", data, out);
            }
            Step::More(i, text) => {
                let delta = match reply.blocks[i].kind {
                    BlockKind::Thought => json!({"type": "thinking_delta", "thinking": text}),
                    BlockKind::Text => json!({"type": "text_delta", "text": text}),
                    BlockKind::Call { .. } => json!({"type": "input_json_delta", "partial_json": text}),
                };
                push_event("content_block_delta", json!({"index": i, "delta": delta}), out);
            }
            Step::End(i) => push_event("content_block_stop", json!({"index": i}), out),
        }
    }

    fn end(&mut self, reply: &Reply, out: &mut String) {
        let message = self.message(reply);
        let delta = json!({"stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"]});
        push_event("message_delta", json!({"delta": delta, "usage": message["usage"]}), out);
        push_event("message_stop", json!({}), out);
    }

    fn fail(&mut self, error: &ApiError, out: &mut String) {
        push_event("error", error.body(), out);
    }

    fn whole(&self, reply: &Reply) -> Value {
        self.message(reply)
    }
}
