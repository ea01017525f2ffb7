//! Connections: accepted, bounded, timed.
//!
//! A loop of its own, because `axum::serve` sets no timer, without which hyper's time limits are off, and because its
//! graceful stop waits for open streams for ever. Whoever has sent no whole request yet is shown out when somebody else
//! wants in and there is no room: thousands of half-open connections keep nobody away for longer than a moment.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tower_service::Service as _;

use crate::metrics::Metrics;

/// A connection, as a request knows it.
#[derive(Clone)]
pub(crate) struct Connection {
    pub peer: SocketAddr,
    n_served: Arc<AtomicUsize>,
}

/// While it lives, its connection is not shown out.
pub(crate) struct Served(Arc<AtomicUsize>);

impl Connection {
    /// Its request has come whole and is being answered.
    pub(crate) fn served(&self) -> Served {
        self.n_served.fetch_add(1, Ordering::Relaxed);
        Served(Arc::clone(&self.n_served))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All connections, oldest first, and where their number is told.
struct Open {
    connections: Mutex<Connections>,
    metrics: Arc<Metrics>,
}

type Connections = BTreeMap<u64, (AbortHandle, Arc<AtomicUsize>)>;

impl Open {
    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is room for one more, if need be because somebody who is not served goes.
    fn make_room(&self) -> bool {
        let mut open = self.lock();
        if open.len() < MAX_CONNECTIONS {
            return true;
        }
        let idle = open.iter().find(|(_, (_, n_served))| n_served.load(Ordering::Relaxed) == 0);
        let Some(id) = idle.map(|(id, _)| *id) else { return false };
        if let Some((task, _)) = open.remove(&id) {
            task.abort();
        }
        self.metrics.connections(open.len());
        true
    }

    fn add(&self, id: u64, task: AbortHandle, n_served: Arc<AtomicUsize>) {
        if !task.is_finished() {
            let mut open = self.lock();
            open.insert(id, (task, n_served));
            self.metrics.connections(open.len());
        }
    }

    fn remove(&self, id: u64) {
        let mut open = self.lock();
        open.remove(&id);
        self.metrics.connections(open.len());
    }
}

/// Serves `router` until `stop` says so, and then for as long as it takes to say goodbye, within bounds.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    metrics: Arc<Metrics>,
    mut stop: watch::Receiver<bool>,
) {
    let open = Arc::new(Open { connections: Mutex::default(), metrics });
    let mut next_id = 0u64;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stopped| *stopped) => break,
        };
        let Ok((stream, peer)) = accepted else {
            // no more files for now, or somebody who has left already
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        if !open.make_room() {
            // everybody is being served: dropping it is the answer
            continue;
        }
        next_id += 1;
        let id = next_id;
        let n_served = Arc::new(AtomicUsize::new(0));
        let connection = Connection { peer, n_served: Arc::clone(&n_served) };
        let (router, there) = (router.clone(), Arc::clone(&open));
        let task = tokio::spawn(async move {
            converse(stream, connection, router).await;
            there.remove(id);
        });
        open.add(id, task.abort_handle(), n_served);
    }
    drop(listener);
    // streams have been ended by whoever stops the server
    let _ = tokio::time::timeout(GOODBYE, async {
        while !open.lock().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
            open.lock().retain(|_, (task, n_served)| {
                let stays = n_served.load(Ordering::Relaxed) > 0;
                if !stays {
                    task.abort();
                }
                stays
            });
        }
    })
    .await;
}

async fn converse(stream: TcpStream, connection: Connection, router: Router) {
    let _ = stream.set_nodelay(true);
    let socket = socket2::SockRef::from(&stream);
    // what a client does not read waits here and not in the kernel: that is how it is noticed
    let _ = socket.set_send_buffer_size(SEND_BUFFER_BYTES);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(Duration::from_secs(60)));
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(connection.clone());
        let mut router = router.clone();
        async move {
            let answer: Result<_, Infallible> = router.call(request).await;
            answer
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_headers(64).max_buf_size(64 * 1024);
    // what a client does wrong is its own affair
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}

/// Fewer than the files that a process may usually have open.
const MAX_CONNECTIONS: usize = 512;
/// For a request's head to come; also between two requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(15);
const SEND_BUFFER_BYTES: usize = 64 * 1024;
/// For answers under way, when the server stops.
const GOODBYE: Duration = Duration::from_secs(3);
