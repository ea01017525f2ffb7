//! An answer as a list of blocks, which two dialects have: what the model thinks, what it says, and each call, one after the
//! other. Both begin a block, tell what is new in it, and end it before the next one begins.

use dim::host::template::dialogue::{Call, Message};
use serde_json::Value;

use super::{Tell, id_of, random_name};
use crate::error::ApiError;
use crate::request::Thinking;
use crate::work::{Finish, Timings, Update};

/// A part of an answer so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub kind: BlockKind,
    /// what is thought or said; of a call its arguments, JSON as far as they were said
    pub text: String,
}

/// What a block is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BlockKind {
    Thought,
    Text,
    Call { id: String, name: String },
}

/// What happens to a block, by its place in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Begin(usize),
    /// this is new in it
    More(usize, String),
    End(usize),
}

/// What there is of a reply, whichever dialect tells it.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    /// without what says what it is the name of
    pub name: String,
    pub model: String,
    pub n_prompt: usize,
    pub blocks: Vec<Block>,
    pub ended: Option<(Finish, Timings)>,
    /// tokens with which the model thought, shown or not
    pub n_thought: usize,
    /// what the numbers of calls begin with that have none of their own
    call_prefix: &'static str,
    shows_thoughts: bool,
    /// the blocks that are calls, in their order
    calls: Vec<usize>,
    open: Option<usize>,
}

impl Reply {
    /// To a prompt of `n_prompt` tokens; `thinking`: whether thoughts are blocks of it.
    pub(crate) fn new(model: &str, n_prompt: usize, thinking: Thinking, call_prefix: &'static str) -> Reply {
        Reply {
            name: random_name(),
            model: model.to_owned(),
            n_prompt,
            blocks: Vec::new(),
            ended: None,
            n_thought: 0,
            call_prefix,
            shows_thoughts: thinking == Thinking::Told,
            calls: Vec::new(),
            open: None,
        }
    }

    /// Tokens generated, and those of the prompt that a cache held.
    pub(crate) fn counts(&self) -> (usize, usize) {
        self.ended.map_or((0, 0), |(_, timings)| (timings.predicted, timings.cached.min(self.n_prompt)))
    }

    /// Whether it ended where there was no more room.
    pub(crate) fn is_cut(&self) -> bool {
        matches!(self.ended, Some((Finish::Length, _)))
    }

    /// Takes in what is new, in the order in which models say it.
    fn hear(&mut self, said: Message, steps: &mut Vec<Step>) {
        if !said.reasoning.is_empty() {
            self.n_thought += 1;
            if self.shows_thoughts {
                self.say(BlockKind::Thought, said.reasoning, steps);
            }
        }
        if !said.content.is_empty() {
            self.say(BlockKind::Text, said.content, steps);
        }
        for (k, call) in said.calls.into_iter().enumerate() {
            self.call(k, call, steps);
        }
    }

    fn say(&mut self, kind: BlockKind, text: String, steps: &mut Vec<Step>) {
        let i = match self.open {
            Some(i) if self.blocks[i].kind == kind => i,
            _ => self.begin(kind, steps),
        };
        self.more(i, text, steps);
    }

    /// The `k`th call: as it was told before, or a new one.
    fn call(&mut self, k: usize, call: Call, steps: &mut Vec<Step>) {
        let i = match self.calls.get(k) {
            Some(i) => *i,
            // its name is whole, or not there yet
            None if call.name.is_empty() => return,
            None => {
                let id = id_of(&call, self.call_prefix);
                let i = self.begin(BlockKind::Call { id, name: call.name }, steps);
                self.calls.push(i);
                i
            }
        };
        if !call.arguments.is_empty() {
            self.more(i, call.arguments, steps);
        }
    }

    fn begin(&mut self, kind: BlockKind, steps: &mut Vec<Step>) -> usize {
        steps.extend(self.open.take().map(Step::End));
        let i = self.blocks.len();
        self.blocks.push(Block { kind, text: String::new() });
        self.open = Some(i);
        steps.push(Step::Begin(i));
        i
    }

    fn more(&mut self, i: usize, text: String, steps: &mut Vec<Step>) {
        self.blocks[i].text.push_str(&text);
        steps.push(Step::More(i, text));
    }

    /// Nothing follows. Clients look for a block in every answer.
    fn end(&mut self, ended: (Finish, Timings), steps: &mut Vec<Step>) {
        if self.blocks.is_empty() {
            self.begin(BlockKind::Text, steps);
        }
        steps.extend(self.open.take().map(Step::End));
        self.ended = Some(ended);
    }
}

/// The words of a dialect that has blocks. What is told is pushed as events.
pub(crate) trait Dialect: Send {
    /// An event that says nothing, where there is one.
    const QUIET: &'static str;

    /// Before the first block.
    fn begin(&mut self, reply: &Reply, out: &mut String);
    /// Of a block; `reply` is as it is after all of the steps that are told at once.
    fn step(&mut self, reply: &Reply, step: Step, out: &mut String);
    /// Behind the last block.
    fn end(&mut self, reply: &Reply, out: &mut String);
    /// Where nothing follows that should.
    fn fail(&mut self, error: &ApiError, out: &mut String);
    /// All of it.
    fn whole(&self, reply: &Reply) -> Value;
}

/// Tells a reply in a dialect that has blocks.
pub(crate) struct InBlocks<D> {
    reply: Reply,
    dialect: D,
}

impl<D: Dialect> InBlocks<D> {
    pub(crate) fn new(reply: Reply, dialect: D) -> InBlocks<D> {
        InBlocks { reply, dialect }
    }

    /// Takes an update in, and gives what happens to the blocks.
    fn take(&mut self, update: Update) -> Result<Vec<Step>, ApiError> {
        let (said, ended) = match update {
            Update::Token { said, .. } => (said, None),
            Update::Ended { said, finish, timings, .. } => (said, Some((finish, timings))),
            Update::Failed(error) => return Err(error),
        };
        let mut steps = Vec::new();
        self.reply.hear(said, &mut steps);
        if let Some(ended) = ended {
            self.reply.end(ended, &mut steps);
        }
        Ok(steps)
    }
}

impl<D: Dialect> Tell for InBlocks<D> {
    fn is_complete(&self) -> bool {
        self.reply.ended.is_some()
    }

    fn hear(&mut self, update: Update) -> Result<(), ApiError> {
        self.take(update).map(drop)
    }

    fn begin(&mut self, out: &mut String) {
        self.dialect.begin(&self.reply, out);
    }

    fn quiet(&self) -> &'static str {
        D::QUIET
    }

    fn chunks(&mut self, update: Update, out: &mut String) {
        match self.take(update) {
            Ok(steps) => {
                for step in steps {
                    self.dialect.step(&self.reply, step, out);
                }
                if self.is_complete() {
                    self.dialect.end(&self.reply, out);
                }
            }
            Err(error) => self.dialect.fail(&error, out),
        }
    }

    fn whole(&self) -> Value {
        self.dialect.whole(&self.reply)
    }
}

/// `data` as an event of that name, which stands in it too.
pub(super) fn push_event(name: &str, mut data: Value, out: &mut String) {
    data["type"] = name.into();
    out.push_str(&format!("event: {name}\ndata: {data}\n\n"));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{Messages, Responses};
    use super::*;

    fn thought(text: &str) -> Message {
        Message { reasoning: text.into(), ..Message::default() }
    }

    fn text(text: &str) -> Message {
        Message { content: text.into(), ..Message::default() }
    }

    /// Of all calls so far, as a parser tells them: the name, and what is new of the arguments.
    fn calls(all: &[(&str, &str)]) -> Message {
        let call = |(name, arguments): &(&str, &str)| Call {
            name: (*name).into(),
            arguments: (*arguments).into(),
            id: String::new(),
        };
        Message { calls: all.iter().map(call).collect(), ..Message::default() }
    }

    /// A thought, a text and two calls; what ends the first call comes with the second one.
    fn answer() -> Vec<Message> {
        vec![
            thought("Hm"),
            thought("."),
            text("I "),
            text("look."),
            calls(&[("", "")]),
            calls(&[("f", "")]),
            calls(&[("f", "{\"x\":")]),
            calls(&[("f", " 1}"), ("g", "{")]),
            calls(&[("f", ""), ("g", "}")]),
        ]
    }

    fn updates(said: Vec<Message>, finish: Finish) -> Vec<Update> {
        let token = |said| Update::Token { choice: 0, id: 1, said, logprobs: None, timings: None };
        let timings = Timings { predicted: said.len(), cached: 2, ..Timings::default() };
        let ended = Update::Ended { choice: 0, said: Message::default(), finish, timings };
        said.into_iter().map(token).chain([ended]).collect()
    }

    fn reply(thinking: Thinking) -> Reply {
        Reply::new("m", 9, thinking, "toolu")
    }

    fn in_messages(thinking: Thinking) -> InBlocks<Messages> {
        InBlocks::new(reply(thinking), Messages::new(vec!["x".to_owned()]))
    }

    fn in_responses(told_back: Value) -> InBlocks<Responses> {
        let Value::Object(told_back) = told_back else { panic!("an object") };
        InBlocks::new(reply(Thinking::Told), Responses::new(told_back))
    }

    fn events<D: Dialect>(teller: &mut InBlocks<D>, updates: Vec<Update>) -> Vec<Value> {
        let mut out = String::new();
        teller.begin(&mut out);
        updates.into_iter().for_each(|update| teller.chunks(update, &mut out));
        let event = |event: &str| -> Value {
            let (name, data) = event.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
            let data: Value = serde_json::from_str(data).unwrap();
            assert_eq!(data["type"], name);
            data
        };
        out.split_terminator("\n\n").map(event).collect()
    }

    fn names(events: &[Value]) -> Vec<&str> {
        events.iter().map(|event| event["type"].as_str().unwrap()).collect()
    }

    fn whole<D: Dialect>(mut teller: InBlocks<D>, updates: Vec<Update>) -> Value {
        updates.into_iter().for_each(|update| teller.hear(update).unwrap());
        assert!(teller.is_complete());
        teller.whole()
    }

    /// Anthropic's blocks as its clients put them together.
    fn put_together(events: &[Value]) -> Vec<Value> {
        let mut blocks = Vec::new();
        let (mut open, mut json) = (None, String::new());
        for event in events {
            match event["type"].as_str().unwrap() {
                "content_block_start" => {
                    assert_eq!((open, &event["index"]), (None, &json!(blocks.len())));
                    open = Some(blocks.len());
                    blocks.push(event["content_block"].clone());
                    json.clear();
                }
                "content_block_delta" => {
                    let i = open.unwrap();
                    assert_eq!(event["index"], i);
                    let delta = &event["delta"];
                    let field = match delta["type"].as_str().unwrap() {
                        "thinking_delta" => "thinking",
                        "text_delta" => "text",
                        "input_json_delta" => {
                            json.push_str(delta["partial_json"].as_str().unwrap());
                            continue;
                        }
                        other => panic!("{other}"),
                    };
                    let so_far = blocks[i][field].as_str().unwrap().to_owned();
                    blocks[i][field] = (so_far + delta[field].as_str().unwrap()).into();
                }
                "content_block_stop" => {
                    assert_eq!(event["index"], open.take().unwrap());
                    if !json.is_empty() {
                        blocks.last_mut().unwrap()["input"] = serde_json::from_str(&json).unwrap();
                    }
                }
                _ => assert_eq!(open, None),
            }
        }
        blocks
    }

    #[test]
    fn anthropics_blocks_follow_each_other_and_are_those_of_the_whole_message() {
        let told = events(&mut in_messages(Thinking::Told), updates(answer(), Finish::ToolCalls));
        let names = names(&told);
        assert_eq!(names[0], "message_start");
        assert_eq!(names[names.len() - 2..], ["message_delta", "message_stop"]);
        let end = &told[told.len() - 2];
        assert_eq!(end["delta"], json!({"stop_reason": "tool_use", "stop_sequence": null}));
        assert_eq!((&end["usage"]["input_tokens"], &end["usage"]["output_tokens"]), (&json!(7), &json!(9)));

        let mut whole = whole(in_messages(Thinking::Told), updates(answer(), Finish::ToolCalls));
        assert_eq!((&whole["stop_reason"], &whole["type"]), (&json!("tool_use"), &json!("message")));
        let mut blocks = put_together(&told);
        for blocks in [&mut blocks, whole["content"].as_array_mut().unwrap()] {
            let ids: Vec<Value> = blocks[2..].iter_mut().map(|block| block["id"].take()).collect();
            assert!(ids[0] != ids[1] && ids.iter().all(|id| id.as_str().unwrap().starts_with("toolu_")));
        }
        assert_eq!(json!(blocks), whole["content"]);
        assert_eq!(
            json!(blocks),
            json!([
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": null, "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": null, "name": "g", "input": {}},
            ])
        );
    }

    #[test]
    fn who_did_not_ask_for_thoughts_gets_none_and_always_a_block() {
        let told = events(&mut in_messages(Thinking::Hidden), updates(answer(), Finish::ToolCalls));
        assert_eq!(put_together(&told)[0], json!({"type": "text", "text": "I look."}));
        let only_thoughts = || updates(vec![thought("Hm")], Finish::Length);
        let told = events(&mut in_messages(Thinking::Hidden), only_thoughts());
        assert_eq!(put_together(&told), [json!({"type": "text", "text": ""})]);
        let whole = whole(in_messages(Thinking::Hidden), only_thoughts());
        assert_eq!(whole["content"], json!([{"type": "text", "text": ""}]));
        assert_eq!(whole["stop_reason"], "max_tokens");
    }

    #[test]
    fn a_call_that_is_cut_off_is_an_object_all_the_same() {
        let cut = || updates(vec![calls(&[("f", "{\"x\": \"a")])], Finish::Length);
        let message = whole(in_messages(Thinking::Hidden), cut());
        assert_eq!(
            (&message["content"][0]["input"], &message["stop_reason"]),
            (&json!({}), &json!("max_tokens"))
        );
        let response = whole(in_responses(json!({})), cut());
        assert_eq!(
            (&response["status"], &response["output"][0]["status"]),
            (&json!("incomplete"), &json!("incomplete"))
        );
        assert_eq!(response["output"][0]["arguments"], "{\"x\": \"a");
        assert_eq!(response["incomplete_details"], json!({"reason": "max_output_tokens"}));
    }

    #[test]
    fn each_item_of_a_response_begins_goes_on_and_ends_at_its_place() {
        let told =
            events(&mut in_responses(json!({"tool_choice": "auto"})), updates(answer(), Finish::ToolCalls));
        for (i, event) in told.iter().enumerate() {
            assert_eq!(event["sequence_number"], i);
        }
        let names: Vec<String> =
            names(&told).iter().map(|name| name.strip_prefix("response.").unwrap().to_owned()).collect();
        let expected = "created in_progress \
            output_item.added content_part.added reasoning_text.delta reasoning_text.delta reasoning_text.done \
            content_part.done output_item.done \
            output_item.added content_part.added output_text.delta output_text.delta output_text.done \
            content_part.done output_item.done \
            output_item.added function_call_arguments.delta function_call_arguments.delta \
            function_call_arguments.done output_item.done \
            output_item.added function_call_arguments.delta function_call_arguments.delta \
            function_call_arguments.done output_item.done completed";
        assert_eq!(names.join(" "), expected);
        let places: Vec<u64> = told.iter().filter_map(|event| event["output_index"].as_u64()).collect();
        assert!(places.is_sorted() && places.last() == Some(&3), "{places:?}");

        // the last event has all items, as the events that ended them have, and what was asked for
        let response = &told.last().unwrap()["response"];
        let done: Vec<&Value> =
            told.iter().filter(|e| e["type"] == "response.output_item.done").map(|e| &e["item"]).collect();
        assert_eq!(response["output"], json!(done));
        assert_eq!((&response["status"], &response["tool_choice"]), (&json!("completed"), &json!("auto")));
        assert_eq!(response["usage"]["output_tokens_details"]["reasoning_tokens"], 2);
        let kinds: Vec<&str> = done.iter().map(|item| item["type"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["reasoning", "message", "function_call", "function_call"]);
        assert_eq!((&done[2]["name"], &done[2]["arguments"]), (&json!("f"), &json!("{\"x\": 1}")));
        // deltas are of the item that was added under that name
        let mut added = Vec::new();
        for event in &told {
            match event.get("item") {
                Some(item) if event["type"] == "response.output_item.added" => added.push(&item["id"]),
                _ => assert!(event.get("item_id").is_none_or(|id| Some(&id) == added.last())),
            }
        }
        assert_eq!(added.len(), 4);
    }

    #[test]
    fn what_fails_is_an_event_of_the_dialect() {
        let failed = || vec![Update::Failed(ApiError::stopped())];
        let told = events(&mut in_messages(Thinking::Hidden), failed());
        assert_eq!(
            (names(&told), &told[1]["error"]["code"]),
            (vec!["message_start", "error"], &json!("unavailable"))
        );
        let told = events(&mut in_responses(json!({})), failed());
        assert_eq!(names(&told), ["response.created", "response.in_progress", "error"]);
        assert_eq!((&told[2]["code"], &told[2]["sequence_number"]), (&json!("unavailable"), &json!(2)));
        assert!(in_messages(Thinking::Hidden).hear(failed().remove(0)).is_err());
    }
}
