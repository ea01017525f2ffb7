//! A reply as server-sent events. Whoever stops reading or leaves drops it, and with it the request.

use std::convert::Infallible;
use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep, sleep};

use crate::door::Served;
use crate::error::ApiError;
use crate::reply::Tell;
use crate::slots::Ticket;
use crate::watch::Watch;
use crate::work::Update;

/// A body that is a stream of events.
pub(crate) struct Events {
    updates: mpsc::Receiver<Update>,
    teller: Box<dyn Tell>,
    /// calls the request off when the client has left
    _ticket: Ticket,
    /// its connection is not shown out before the stream has ended
    _served: Served,
    watch: Watch,
    quiet: Pin<Box<Sleep>>,
    has_begun: bool,
    is_over: bool,
}

impl Events {
    pub(crate) fn new(
        updates: mpsc::Receiver<Update>,
        teller: Box<dyn Tell>,
        ticket: Ticket,
        watch: Watch,
        served: Served,
    ) -> Events {
        let quiet = Box::pin(sleep(KEEP_ALIVE));
        let (has_begun, is_over) = (false, false);
        Events { updates, teller, _ticket: ticket, _served: served, watch, quiet, has_begun, is_over }
    }

    /// Why nothing comes, as a comment: proxies see that the connection lives, clients leave it out. Some of those want an
    /// event too.
    fn comment(&self) -> String {
        let event = self.teller.quiet();
        match self.watch.waits_for() {
            Some(stage) => format!(": waiting for {}\n\n{event}", stage.replace(['\r', '\n'], " ")),
            None => format!(": \n\n{event}"),
        }
    }
}

impl Stream for Events {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let mut out = String::new();
        if !std::mem::replace(&mut this.has_begun, true) {
            this.teller.begin(&mut out);
        }
        while !this.is_over && out.len() < LARGE {
            match this.updates.poll_recv(cx) {
                Poll::Ready(Some(update)) => {
                    this.is_over = matches!(update, Update::Failed(_));
                    this.teller.chunks(update, &mut out);
                    this.is_over |= this.teller.is_complete();
                }
                // the slot has let go of it
                Poll::Ready(None) => {
                    this.teller.chunks(Update::Failed(ApiError::stopped()), &mut out);
                    this.is_over = true;
                }
                Poll::Pending => break,
            }
        }
        if out.is_empty() {
            if this.is_over {
                return Poll::Ready(None);
            }
            std::task::ready!(this.quiet.as_mut().poll(cx));
            out = this.comment();
        }
        this.quiet.as_mut().reset(Instant::now() + KEEP_ALIVE);
        Poll::Ready(Some(Ok(out.into())))
    }
}

/// How long a stream says nothing: shorter than any proxy's patience.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Bytes that go in one piece.
const LARGE: usize = 16 * 1024;
