//! What a slot tells, as OpenAI's chats and completions have it: choices, chunk by chunk and whole.

use std::time::Duration;

use dim::host::template::dialogue::{Call, Message};
use serde_json::{Map, Value, json};

use super::{FINGERPRINT, Tell, id_of, random_name, unix_time};
use crate::error::ApiError;
use crate::work::{Finish, Likely, Logprobs, Timings, Update};

/// Which of the two dialects that tell choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Chat,
    Completion,
}

/// What every part of a reply says.
#[derive(Clone, Debug)]
pub(crate) struct Teller {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
    return_tokens: bool,
    include_usage: bool,
    wants_logprobs: bool,
    choices: Vec<Choice>,
    n_prompt: usize,
}

/// A choice so far.
#[derive(Clone, Debug, Default)]
struct Choice {
    message: Message,
    /// of each call that is told in a stream
    call_ids: Vec<String>,
    /// put before the text when it begins: a completion's prompt
    echo: String,
    has_begun: bool,
    tokens: Vec<i32>,
    logprobs: Vec<Logprobs>,
    /// characters of the text before the tokens that are not told yet, for `text_offset`
    offset: usize,
    ended: Option<(Finish, Timings)>,
}

impl Teller {
    /// For as many choices as `echoes`, each with what stands before it; `n_prompt`: tokens of all prompts.
    pub(crate) fn new(
        kind: Kind,
        model: &str,
        echoes: Vec<String>,
        n_prompt: usize,
        wanted: &crate::request::Wanted,
    ) -> Teller {
        let choice = |echo: String| Choice { offset: echo.chars().count(), echo, ..Choice::default() };
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        Teller {
            kind,
            id: format!("{prefix}-{}", random_name()),
            created: unix_time(),
            model: model.to_owned(),
            return_tokens: wanted.return_tokens,
            include_usage: wanted.include_usage,
            wants_logprobs: wanted.top_logprobs.is_some(),
            choices: echoes.into_iter().map(choice).collect(),
            n_prompt,
        }
    }

    /// What a choice begins with.
    fn begin(&mut self, i: usize, out: &mut String) {
        if std::mem::replace(&mut self.choices[i].has_begun, true) {
            return;
        }
        let echo = std::mem::take(&mut self.choices[i].echo);
        let said = match self.kind {
            Kind::Chat => ("delta", json!({"role": "assistant", "content": ""})),
            Kind::Completion if echo.is_empty() => return,
            Kind::Completion => ("text", echo.into()),
        };
        self.event(vec![part(i, said, Value::Null, None)], None, out);
    }

    fn event(&self, choices: Vec<Value>, extra: Option<(&str, Value)>, out: &mut String) {
        let object = if self.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" };
        push_event(out, &self.object(object, choices, extra));
    }

    fn object(&self, object: &str, choices: Vec<Value>, extra: Option<(&str, Value)>) -> Value {
        let mut all = Map::new();
        all.insert("id".into(), self.id.as_str().into());
        all.insert("object".into(), object.into());
        all.insert("created".into(), self.created.into());
        all.insert("model".into(), self.model.as_str().into());
        all.insert("system_fingerprint".into(), FINGERPRINT.into());
        all.insert("choices".into(), choices.into());
        all.extend(extra.map(|(name, value)| (name.to_owned(), value)));
        all.into()
    }

    /// A prompt counts once, however many choices there are of it.
    fn usage(&self) -> Value {
        let ended = || self.choices.iter().filter_map(|choice| choice.ended.map(|(_, timings)| timings));
        let completion: usize = ended().map(|timings| timings.predicted).sum();
        let cached: usize = ended().map(|timings| timings.cached).sum();
        json!({
            "prompt_tokens": self.n_prompt,
            "completion_tokens": completion,
            "total_tokens": self.n_prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached.min(self.n_prompt)},
        })
    }
}

impl Tell for Teller {
    fn is_complete(&self) -> bool {
        self.choices.iter().all(|choice| choice.ended.is_some())
    }

    fn hear(&mut self, update: Update) -> Result<(), ApiError> {
        match update {
            Update::Token { choice, id, said, logprobs, .. } => {
                let choice = &mut self.choices[choice];
                choice.hear(said);
                choice.tokens.push(id);
                choice.logprobs.extend(logprobs);
            }
            Update::Ended { choice, said, finish, timings } => {
                self.choices[choice].hear(said);
                self.choices[choice].ended = Some((finish, timings));
            }
            Update::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn chunks(&mut self, update: Update, out: &mut String) {
        match update {
            Update::Token { choice: i, id, said, logprobs, timings } => {
                self.begin(i, out);
                let choice = &mut self.choices[i];
                let logprobs = logprobs.map(|logprobs| {
                    let told = self.kind.logprobs(std::slice::from_ref(&logprobs), choice.offset);
                    choice.offset += characters(&logprobs.chosen);
                    told
                });
                if said == Message::default() && logprobs.is_none() && !self.return_tokens {
                    return;
                }
                let said = match self.kind {
                    Kind::Chat => ("delta", choice.delta(said)),
                    Kind::Completion => ("text", said.content.into()),
                };
                let mut part = part(i, said, logprobs.unwrap_or_default(), None);
                if self.return_tokens {
                    part["tokens"] = json!([id]);
                }
                let extra = timings.map(|t| ("timings", timings_of(&t)));
                self.event(vec![part], extra, out);
            }
            Update::Ended { choice: i, said, finish, timings } => {
                self.begin(i, out);
                if said != Message::default() {
                    let said = ("delta", self.choices[i].delta(said));
                    self.event(vec![part(i, said, Value::Null, None)], None, out);
                }
                self.choices[i].ended = Some((finish, timings));
                let said = match self.kind {
                    Kind::Chat => ("delta", json!({})),
                    Kind::Completion => ("text", "".into()),
                };
                let part = part(i, said, Value::Null, Some(finish));
                self.event(vec![part], Some(("timings", timings_of(&timings))), out);
                if self.is_complete() {
                    if self.include_usage {
                        let usage = self.usage();
                        self.event(Vec::new(), Some(("usage", usage)), out);
                    }
                    out.push_str("data: [DONE]\n\n");
                }
            }
            Update::Failed(error) => push_event(out, &error.body()),
        }
    }

    fn whole(&self) -> Value {
        let choices = self.choices.iter().enumerate().map(|(i, choice)| {
            let logprobs = match self.wants_logprobs {
                true => self.kind.logprobs(&choice.logprobs, choice.offset),
                false => Value::Null,
            };
            let said = match self.kind {
                Kind::Chat => ("message", choice.whole()),
                Kind::Completion => ("text", format!("{}{}", choice.echo, choice.message.content).into()),
            };
            let mut told = part(i, said, logprobs, choice.ended.map(|(finish, _)| finish));
            if self.return_tokens {
                told["tokens"] = json!(choice.tokens);
            }
            told
        });
        let object = if self.kind == Kind::Chat { "chat.completion" } else { "text_completion" };
        let mut whole = self.object(object, choices.collect(), Some(("usage", self.usage())));
        if let Some((_, timings)) = self.choices.last().and_then(|choice| choice.ended) {
            whole["timings"] = timings_of(&timings);
        }
        whole
    }
}

impl Choice {
    /// Takes in what is new.
    fn hear(&mut self, said: Message) {
        self.message.content.push_str(&said.content);
        self.message.reasoning.push_str(&said.reasoning);
        for (k, call) in said.calls.into_iter().enumerate() {
            match self.message.calls.get_mut(k) {
                Some(known) => {
                    known.arguments.push_str(&call.arguments);
                    (known.name, known.id) = (call.name, call.id);
                }
                None => self.message.calls.push(call),
            }
        }
    }

    /// What is new, as a stream has it: of a call its name and a number once, its arguments in pieces.
    fn delta(&mut self, said: Message) -> Value {
        let mut delta = Map::new();
        if !said.reasoning.is_empty() {
            delta.insert("reasoning_content".into(), said.reasoning.as_str().into());
        }
        // a part without anything has at least this, as a token without text has
        if !said.content.is_empty() || said.reasoning.is_empty() && said.calls.is_empty() {
            delta.insert("content".into(), said.content.as_str().into());
        }
        let n_calls = said.calls.len();
        let mut calls = Vec::new();
        for (k, call) in said.calls.iter().enumerate() {
            let is_new = k >= self.call_ids.len();
            // a name is whole once arguments follow it, or another call
            if is_new && call.name.is_empty() || !is_new && call.arguments.is_empty() {
                continue;
            }
            let mut told = json!({"index": k, "function": {"arguments": call.arguments}});
            if is_new {
                self.call_ids.push(id_of(call, "call"));
                told["id"] = self.call_ids[k].as_str().into();
                told["type"] = "function".into();
                told["function"]["name"] = call.name.as_str().into();
            }
            calls.push(told);
        }
        if !calls.is_empty() {
            delta.insert("tool_calls".into(), calls.into());
        } else if n_calls > 0 && delta.is_empty() {
            delta.insert("content".into(), "".into());
        }
        self.hear(said);
        delta.into()
    }

    /// All of it, as a reply that comes at once has it.
    fn whole(&self) -> Value {
        let Message { content, reasoning, calls } = &self.message;
        let mut whole = json!({"role": "assistant", "content": content, "refusal": null});
        if !reasoning.is_empty() {
            whole["reasoning_content"] = reasoning.as_str().into();
        }
        if !calls.is_empty() {
            if content.is_empty() {
                whole["content"] = Value::Null;
            }
            let call = |call: &Call| {
                json!({"id": id_of(call, "call"), "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments}})
            };
            whole["tool_calls"] = calls.iter().map(call).collect();
        }
        whole
    }
}

/// A choice or a part of it; `said`: what it says, under the name by which its dialect says it.
fn part(i: usize, (name, said): (&str, Value), logprobs: Value, finish: Option<Finish>) -> Value {
    json!({"index": i, name: said, "logprobs": logprobs, "finish_reason": finish.map(Finish::name)})
}

impl Kind {
    /// How likely tokens were; the first one begins `offset` characters into the text.
    fn logprobs(self, tokens: &[Logprobs], mut offset: usize) -> Value {
        if self == Kind::Chat {
            let entry = |likely: &Likely| json!({"token": text_of(likely), "logprob": likely.logprob, "bytes": likely.bytes});
            let content = tokens.iter().map(|logprobs| {
                let mut told = entry(&logprobs.chosen);
                told["top_logprobs"] = logprobs.top.iter().map(entry).collect();
                told
            });
            return json!({"content": content.collect::<Vec<_>>(), "refusal": null});
        }
        let mut offsets = Vec::new();
        for logprobs in tokens {
            offsets.push(offset);
            offset += characters(&logprobs.chosen);
        }
        let top = |logprobs: &Logprobs| -> Map<String, Value> {
            logprobs.top.iter().map(|likely| (text_of(likely), likely.logprob.into())).collect()
        };
        json!({
            "tokens": tokens.iter().map(|l| text_of(&l.chosen)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|l| l.chosen.logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }
}

fn text_of(likely: &Likely) -> String {
    String::from_utf8_lossy(&likely.bytes).into_owned()
}

fn characters(likely: &Likely) -> usize {
    text_of(likely).chars().count()
}

/// As llama-server says it.
fn timings_of(timings: &Timings) -> Value {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let per_second =
        |n: usize, time: Duration| if time.is_zero() { 0.0 } else { n as f64 / time.as_secs_f64() };
    // the first token comes with the prompt
    let steps = timings.predicted.saturating_sub(1);
    json!({
        "cache_n": timings.cached,
        "prompt_n": timings.prompt,
        "prompt_ms": ms(timings.prompt_time),
        "prompt_per_token_ms": ms(timings.prompt_time) / timings.prompt.max(1) as f64,
        "prompt_per_second": per_second(timings.prompt, timings.prompt_time),
        "predicted_n": timings.predicted,
        "predicted_ms": ms(timings.predicted_time),
        "predicted_per_token_ms": ms(timings.predicted_time) / steps.max(1) as f64,
        "predicted_per_second": per_second(steps, timings.predicted_time),
    })
}

fn push_event(out: &mut String, event: &Value) {
    out.push_str("data: ");
    out.push_str(&event.to_string());
    out.push_str("\n\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(content: &str, name: &str, arguments: &str) -> Message {
        let calls = vec![Call { name: name.into(), arguments: arguments.into(), id: String::new() }];
        Message {
            content: content.into(),
            reasoning: String::new(),
            calls: if name.is_empty() { Vec::new() } else { calls },
        }
    }

    #[test]
    fn a_call_is_told_by_its_name_once_and_its_arguments_in_pieces() {
        let mut choice = Choice::default();
        assert_eq!(choice.delta(said("I look.", "", "")), json!({"content": "I look."}));
        let first = choice.delta(said("", "weather", ""));
        let call = &first["tool_calls"][0];
        assert_eq!((&call["index"], &call["type"]), (&json!(0), &json!("function")));
        assert_eq!(call["function"], json!({"name": "weather", "arguments": ""}));
        assert!(call["id"].as_str().unwrap().starts_with("call_"));
        for piece in ["{\"city\": ", "\"Paris\"}"] {
            let told = json!({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]});
            assert_eq!(choice.delta(said("", "weather", piece)), told);
        }
        assert_eq!(choice.delta(said("", "weather", "")), json!({"content": ""}));
        let whole = choice.whole();
        assert_eq!(whole["content"], "I look.");
        assert_eq!(whole["tool_calls"][0]["function"]["arguments"], "{\"city\": \"Paris\"}");
        assert_eq!(whole["tool_calls"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn reasoning_is_told_beside_the_content() {
        let mut choice = Choice::default();
        let thought = Message { reasoning: "Hm.".into(), ..Message::default() };
        assert_eq!(choice.delta(thought), json!({"reasoning_content": "Hm."}));
        choice.hear(said("Yes.", "", ""));
        let whole = choice.whole();
        assert_eq!((&whole["content"], &whole["reasoning_content"]), (&json!("Yes."), &json!("Hm.")));
    }
}
