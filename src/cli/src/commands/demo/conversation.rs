//! One conversation, as often as there are ways to compute it: the same turns, the most likely token each time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use dim::host::report::{Report, Stop};
use dim::host::template::{ChatTemplate, Role, Turn};
use dim::{Sampling, Session};
use gguf_tools::failure::Failure;
use gguf_tools::terminal;

use super::page::Page;
use crate::explain;

/// What is said to the model: questions where it has a chat template, else a text to go on with.
pub(super) struct Script<'a> {
    pub(super) questions: Vec<String>,
    pub(super) text: &'a str,
    pub(super) template: Option<&'a ChatTemplate>,
    /// most tokens of a reply
    pub(super) n_predict: usize,
}

/// The conversation as one way of computing it had it.
pub(super) struct Arm {
    /// What the table calls it.
    pub(super) name: &'static str,
    pub(super) replies: Vec<Reply>,
}

/// One reply.
pub(super) struct Reply {
    pub(super) report: Report,
    /// The text of each token; of a character that takes several, it comes with the last.
    pub(super) pieces: Vec<String>,
}

impl Script<'_> {
    /// Holds the conversation. What is said is shown on `page` as it comes, if there is one.
    ///
    /// # Errors
    /// The prompt is too long, a stage fails, or `stop` was set.
    pub(super) fn play(
        &self,
        name: &'static str,
        session: &mut Session,
        page: Option<&Page>,
        stop: &AtomicBool,
    ) -> Result<Arm, Failure> {
        let mut arm = Arm { name, replies: Vec::new() };
        let mut turns = Vec::new();
        let text = [self.text.to_owned()];
        let said: &[String] = if self.template.is_some() { &self.questions } else { &text };
        for (i, said) in said.iter().enumerate() {
            turns.push(Turn { role: Role::User, content: said.clone() });
            let prompt = self.prompt(session, &turns)?;
            session.set_tokens(&prompt).map_err(explain)?;
            if i == 0 {
                // what is read and touched for the first time is not what is compared
                session.warm_up().map_err(explain)?;
            }
            if let Some(page) = page {
                page.said(said, self.template.is_some())?;
            }
            let reply = self.reply(session, page.is_some(), stop)?;
            if let Some(page) = page {
                page.line(if reply.report.stop == Stop::Length { " [...]\n" } else { "\n" })?;
            }
            turns.push(Turn { role: Role::Assistant, content: reply.report.text.clone() });
            arm.replies.push(reply);
        }
        Ok(arm)
    }

    fn prompt(&self, session: &Session, turns: &[Turn]) -> Result<Vec<i32>, Failure> {
        let tokens = match self.template {
            Some(template) => session.tokenize_chat(template, turns),
            None => session.tokenize(self.text, true),
        };
        tokens.map_err(explain)
    }

    fn reply(&self, session: &mut Session, show: bool, stop: &AtomicBool) -> Result<Reply, Failure> {
        let mut generation = session.generate(Sampling::greedy()).limit(Some(self.n_predict)).stop_when(stop);
        let mut pieces = Vec::new();
        for token in generation.by_ref() {
            let token = token.map_err(explain)?;
            if show {
                terminal::print(&token.text)?;
            }
            pieces.push(token.text);
        }
        if stop.load(Ordering::SeqCst) {
            return Err(Failure::failed("stopped"));
        }
        Ok(Reply { report: generation.report(Instant::now()), pieces })
    }
}

impl Arm {
    /// The tokens of all replies.
    pub(super) fn tokens(&self) -> Vec<i32> {
        self.replies.iter().flat_map(|reply| reply.report.tokens.iter().copied()).collect()
    }

    /// How many tokens are those of `other`, reply by reply from the start of each.
    pub(super) fn agreeing(&self, other: &Arm) -> usize {
        let replies = self.replies.iter().zip(&other.replies);
        replies.map(|(a, b)| agreeing(&a.report.tokens, &b.report.tokens)).sum()
    }

    /// Prompt tokens per second, over all replies.
    pub(super) fn prompt_tok_s(&self) -> f64 {
        self.per_second(|report| (report.prompt_tokens, report.prompt_ms))
    }

    /// Tokens per second after each reply's first.
    pub(super) fn gen_tok_s(&self) -> f64 {
        self.per_second(|report| (report.tokens.len().saturating_sub(1), report.gen_ms))
    }

    fn per_second(&self, of: impl Fn(&Report) -> (usize, f64)) -> f64 {
        let sum = |(n, ms): (usize, f64), (n2, ms2)| (n + n2, ms + ms2);
        let (n, ms) = self.replies.iter().map(|reply| of(&reply.report)).fold((0, 0.0), sum);
        if ms > 0.0 { n as f64 / ms * 1e3 } else { 0.0 }
    }

    /// Bytes sent and received per generated token; `None` where nothing crossed a socket.
    pub(super) fn bytes_per_token(&self) -> Option<(u64, u64)> {
        let mut sums = (0, 0, 0);
        for report in self.replies.iter().map(|reply| &reply.report).filter(|r| r.wire.round_trips > 0) {
            sums.0 += report.tokens.len().saturating_sub(1) as u64;
            sums.1 += report.wire.gen_bytes_sent;
            sums.2 += report.wire.gen_bytes_received;
        }
        (sums.0 > 0).then(|| (sums.1 / sums.0, sums.2 / sums.0))
    }
}

/// How many tokens are the same from the start.
pub(super) fn agreeing(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
