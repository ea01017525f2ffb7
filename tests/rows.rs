//! What crosses a cut, over real sockets: rows of several parts with token ids, steps that fail and leave the others, and
//! steps that are called off.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;
use dim_core::stage::TakeBack;
use dim_wire::keys::Key;
use dim_wire::link_error::LinkErrorKind;
use dim_wire::message::{ErrorCode, Farewell, Fault, Span};
use dim_wire::rows::{Layout, Part, PartType, RowType, RowTypes, RowsRef, Shape};
use dim_wire::terms::{Reason, SliceRole, Terms};
use dim_wire::transport::{
    ComputeTime, Event, Link, LinkError, Listener, ListenerConfig, Readiness, Receiver as LinkReceiver,
    Sender, Timing, dial,
};
use half::f16;

/// A worker that gives back the first part of each row, plus the token id; a row whose first value is [`BAD`] it cannot do.
struct Worker {
    listener: Arc<Listener>,
    /// held: it computes nothing
    gate: Arc<Mutex<()>>,
    /// (step, rows' token ids) of what it computed
    computed: Receiver<(u32, Vec<i32>)>,
    /// of the host that is served
    sender: Arc<Mutex<Option<Arc<Sender>>>>,
}

const BAD: f32 = 1000.0;

fn key() -> Key {
    Key::from_bytes([7; 32])
}

fn terms(shape: Shape) -> Terms {
    Terms {
        row_types: RowTypes::ALL,
        role: SliceRole::Middle,
        shape,
        n_blocks: 12,
        blocks: BlockRange { first: 4, last: 7 },
        n_ctx: 4096,
        max_rows: 64,
        max_sessions: 4,
        max_in_flight: 4,
        take_back: TakeBack::ALL,
        model: Some(Sha([1; 32])),
        arch: "qwen2".into(),
        ..Terms::blank(2, "test 0", "worker")
    }
}

/// 4 F32, 2 I32, 2 F32 that may not be rounded, with token ids; back, only the first part.
fn several_parts() -> Shape {
    let part = |part_type, may_round, values| Part { part_type, may_round, values };
    let input = Layout {
        parts: vec![
            part(PartType::F32, true, 4),
            part(PartType::I32, false, 2),
            part(PartType::F32, false, 2),
        ],
    };
    Shape { output: Layout::hidden(4), input, reads_tokens: true }
}

impl Worker {
    fn start(shape: Shape) -> Worker {
        let config = ListenerConfig {
            keys: Arc::new(key()),
            readiness: Readiness::Ready(terms(shape)),
            timing: Timing::default(),
            notice: Box::new(|_| {}),
        };
        let listener = Arc::new(Listener::bind("127.0.0.1:0", config).unwrap());
        let gate = Arc::new(Mutex::new(()));
        let (told, computed) = channel();
        let (listening, gated) = (Arc::clone(&listener), Arc::clone(&gate));
        let sender = Arc::new(Mutex::new(None));
        let serving = Arc::clone(&sender);
        std::thread::spawn(move || {
            while let Some(link) = listening.accept(None) {
                let (sender, receiver) = link.split();
                let sender = Arc::new(sender);
                *serving.lock().unwrap() = Some(Arc::clone(&sender));
                let _ = serve(&sender, receiver, &gated, |step, tokens| drop(told.send((step, tokens))));
            }
        });
        Worker { listener, gate, computed, sender }
    }

    /// Returns once it has read all that this host has said so far.
    fn has_read(&self, host: &Link) {
        let said = host.sender().traffic().bytes_sent;
        let read =
            || self.sender.lock().unwrap().as_ref().map_or(0, |sender| sender.traffic().bytes_received);
        let deadline = soon();
        while read() < said {
            assert!(Some(Instant::now()) < deadline, "it does not read while it computes");
            std::thread::yield_now();
        }
    }

    fn dial(&self, need: Terms) -> Result<Link, LinkError> {
        dial(&self.listener.address().to_string(), &key(), &need, &Timing::default())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.listener.close(Farewell::ShuttingDown);
    }
}

fn serve(
    sender: &Sender,
    mut receiver: LinkReceiver,
    gate: &Mutex<()>,
    told: impl Fn(u32, Vec<i32>),
) -> Result<(), LinkError> {
    let width = sender.agreed().shape.input.width(sender.agreed().row_type);
    loop {
        let Event::Step { step, spans, tokens, rows, .. } = receiver.receive(None)? else { continue };
        let n_rows: u32 = spans.iter().map(|span| span.count).sum();
        let tokens = tokens.to_vec();
        let first: Vec<f32> = match rows {
            RowsRef::F16(v) => v.chunks(width).flat_map(|row| row[..4].iter().map(|x| x.to_f32())).collect(),
            RowsRef::F32(v) => v.chunks(width).flat_map(|row| row[..4].to_vec()).collect(),
        };
        let row_type = rows.row_type();
        let began = Instant::now();
        drop(gate.lock());
        told(step, tokens.clone());
        if first.contains(&BAD) {
            let fault = Fault { count: 1, block: Some(5), ..Fault::new(ErrorCode::NonFinite, "a bad value") };
            receiver.step_failed(fault)?;
            continue;
        }
        let id = |row: usize| tokens.get(row).map_or(0.0, |&id| id as f32);
        let out: Vec<f32> = first.iter().enumerate().map(|(i, x)| x + id(i / 4)).collect();
        let time = ComputeTime { began, compute: began.elapsed(), wait: Duration::ZERO };
        let half: Vec<f16> = out.iter().map(|&x| f16::from_f32(x)).collect();
        match row_type {
            RowType::F16 => sender.send_done(step, n_rows, RowsRef::F16(&half), time)?,
            RowType::F32 => sender.send_done(step, n_rows, RowsRef::F32(&out), time)?,
        }
    }
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(10))
}

fn host(row_types: RowTypes, shape: Shape) -> Terms {
    Terms { row_types, take_back: TakeBack::NOTHING, name: "host".into(), ..terms(shape) }
}

/// What the host hears next: the step, and its first value or why there is none.
fn heard(link: &mut Link) -> (u32, Result<f32, Option<ErrorCode>>) {
    match link.receive(soon()).unwrap() {
        Event::Done { step, rows: RowsRef::F32(rows), .. } => (step, Ok(rows[0])),
        Event::Done { step, rows: RowsRef::F16(rows), .. } => (step, Ok(rows[0].to_f32())),
        Event::Failed { step, fault } => (step, Err(fault.map(|fault| fault.code))),
        other => panic!("{other:?}"),
    }
}

fn span(session: u32, position: u32, count: u32) -> [Span; 1] {
    [Span { session, position, count }]
}

#[test]
fn rows_of_several_parts_and_their_token_ids_arrive_as_they_were_sent() {
    for (row_types, known) in [(RowTypes::F32, true), (RowTypes::F16, true), (RowTypes::F16, false)] {
        let worker = Worker::start(several_parts());
        // a host that does not know the parts takes the worker's
        let shape = if known { several_parts() } else { Shape::default() };
        let mut link = worker.dial(host(row_types, shape)).unwrap();
        let agreed = link.agreed().clone();
        assert_eq!(agreed.shape, several_parts());
        let width = agreed.shape.input.width(agreed.row_type);
        // of 20 rows, more than one of them odd in number
        let (mut position, mut sum) = (0, 0);
        for n in [1usize, 2, 7, 10] {
            let tokens: Vec<i32> = (0..n as i32).map(|i| i * 3 - 2).collect();
            let half: Vec<f16> = (0..n * width).map(|i| f16::from_f32((i % width) as f32)).collect();
            let full: Vec<f32> = (0..n * width).map(|i| (i % width) as f32).collect();
            let rows = match agreed.row_type {
                RowType::F16 => RowsRef::F16(&half),
                RowType::F32 => RowsRef::F32(&full),
            };
            link.send_step(&span(0, position, n as u32), &tokens, rows).unwrap();
            let out: Vec<f32> = match link.receive(soon()).unwrap() {
                Event::Done { rows: RowsRef::F32(rows), .. } => rows.to_vec(),
                Event::Done { rows: RowsRef::F16(rows), .. } => rows.iter().map(|x| x.to_f32()).collect(),
                other => panic!("{other:?}"),
            };
            let right: Vec<f32> =
                tokens.iter().flat_map(|&id| (0..4).map(move |i| (i + id) as f32)).collect();
            assert_eq!(out, right);
            assert_eq!(worker.computed.recv().unwrap().1, tokens);
            position += n as u32;
            sum += n;
        }
        assert_eq!(sum, 20);
    }
}

#[test]
fn other_parts_are_refused_and_the_side_to_fix_is_named() {
    let worker = Worker::start(several_parts());
    let refused = worker.dial(host(RowTypes::F32, Shape::hidden(4))).unwrap_err();
    let LinkErrorKind::Refused { reason, mismatches, .. } = &refused.kind else { panic!("{refused}") };
    assert_eq!((*reason, mismatches.len()), (Reason::Layout, 1));
    let text = refused.to_string();
    assert!(text.contains("the host's rows are 4 F32 in") && text.contains("token ids"), "{text}");
    assert!(text.contains("2 I32") && text.contains("give the worker the right one"), "{text}");
}

#[test]
fn a_step_that_fails_leaves_other_sessions_and_its_own_goes_on_where_it_is_rewound_to() {
    let worker = Worker::start(Shape::hidden(4));
    let mut link = worker.dial(host(RowTypes::F32, Shape::hidden(4))).unwrap();
    let row = |x: f32| [x; 4];
    let send = |link: &Link, session, position, x: f32| {
        link.send_step(&span(session, position, 1), &[], RowsRef::F32(&row(x))).unwrap()
    };
    for (session, position, x) in [(0, 0, 1.0), (0, 1, BAD), (0, 2, 3.0), (1, 0, 4.0)] {
        send(&link, session, position, x);
    }
    assert_eq!(heard(&mut link), (1, Ok(1.0)));
    assert_eq!(heard(&mut link), (2, Err(Some(ErrorCode::NonFinite))));
    assert_eq!(heard(&mut link), (3, Err(None)), "it stands on the one that failed");
    assert_eq!(heard(&mut link), (4, Ok(4.0)), "another session does not");
    // a rewind that does not reach the failed row mends nothing
    link.sender().rewind(0, 2).unwrap();
    send(&link, 0, 2, 5.0);
    assert_eq!(heard(&mut link), (5, Err(None)));
    link.sender().rewind(0, 1).unwrap();
    send(&link, 0, 1, 6.0);
    assert_eq!(heard(&mut link), (6, Ok(6.0)));
    let computed: Vec<u32> = worker.computed.try_iter().map(|(step, _)| step).collect();
    assert_eq!(computed, [1, 2, 4, 6]);
}

#[test]
fn a_step_that_is_called_off_before_it_begins_is_not_computed_nor_what_stands_on_it() {
    let worker = Worker::start(Shape::hidden(4));
    let mut link = worker.dial(host(RowTypes::F32, Shape::hidden(4))).unwrap();
    let send = |link: &Link, session, position, x: f32| {
        link.send_step(&span(session, position, 1), &[], RowsRef::F32(&[x; 4])).unwrap()
    };
    // the first one may have begun; what is said behind it is there before it ends
    for round in 0..20u32 {
        let base = 4 * round;
        let gate = worker.gate.lock().unwrap();
        send(&link, 0, 0, 1.0);
        let guess = send(&link, 0, 1, 2.0);
        send(&link, 0, 2, 3.0);
        link.sender().cancel(guess).unwrap();
        send(&link, 1, round, 4.0);
        // of no step there is, or ever was: nothing
        link.sender().cancel(0).unwrap();
        link.sender().cancel(base + 400).unwrap();
        link.sender().rewind(0, 1).unwrap();
        worker.has_read(&link);
        drop(gate);
        assert_eq!(heard(&mut link), (base + 1, Ok(1.0)));
        assert_eq!(heard(&mut link), (base + 2, Err(None)));
        assert_eq!(heard(&mut link), (base + 3, Err(None)));
        assert_eq!(heard(&mut link), (base + 4, Ok(4.0)));
        // called off after its answer: nothing
        link.sender().cancel(base + 4).unwrap();
        link.sender().rewind(0, 0).unwrap();
        let computed: Vec<u32> = worker.computed.try_iter().map(|(step, _)| step).collect();
        assert_eq!(computed, [base + 1, base + 4]);
    }
}
