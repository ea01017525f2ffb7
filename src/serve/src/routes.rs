//! What is served under which path.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::middleware::{self, Next};
use axum::routing::{MethodRouter, get, post};
use dim::Host;
use dim::host::template::ChatTemplate;
use serde_json::json;
use tokio::sync::{Semaphore, mpsc};

use crate::access::Access;
use crate::door::Connection;
use crate::error::{ApiError, json_response};
use crate::markdown;
use crate::metrics::Metrics;
use crate::page;
use crate::prepare::{Prepared, prepare, text_of};
use crate::queue::Client;
use crate::reply::{FINGERPRINT, InBlocks, Kind, Messages, Reply, Responses, Tell, Teller};
use crate::request::{self, Defaults, Prompt, Prompts, Wanted};
use crate::slots::Slots;
use crate::stream::Events;
use crate::watch::Watch;
use crate::work::Job;

/// What every request sees.
pub(crate) struct App {
    pub access: Access,
    pub defaults: Defaults,
    pub model_alias: Option<String>,
    pub metrics: Arc<Metrics>,
    pub watch: Watch,
    /// once the model is loaded
    pub loaded: OnceLock<Loaded>,
    /// who may render and tokenise at a time
    pub readers: Arc<Semaphore>,
}

/// What there is when the model is.
pub(crate) struct Loaded {
    pub host: Arc<Host>,
    pub template: Result<ChatTemplate, ApiError>,
    /// whether answers have a reasoning part
    pub thinks: bool,
    pub slots: Slots,
}

type Answer = Result<Response<Body>, ApiError>;

/// All of it.
pub(crate) fn router(app: Arc<App>) -> Router {
    let keyed = Router::new()
        .route("/v1/chat/completions", replies(Dialect::Choices(Kind::Chat)))
        .route("/chat/completions", replies(Dialect::Choices(Kind::Chat)))
        .route("/v1/completions", replies(Dialect::Choices(Kind::Completion)))
        .route("/v1/messages", replies(Dialect::Messages))
        .route("/v1/messages/count_tokens", post(count_tokens))
        .route("/v1/responses", replies(Dialect::Responses))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .route("/props", get(props))
        .route("/split", get(split))
        .route("/metrics", get(metrics))
        .route("/markdown", post(rendered))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), only_with_a_key));
    Router::new()
        .merge(keyed)
        .route("/health", get(health))
        .route("/v1/health", get(health))
        .merge(page::routes())
        .fallback(async || ApiError::new(StatusCode::NOT_FOUND, "there is nothing under this path"))
        .method_not_allowed_fallback(async || {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this path is not asked with this method")
        })
        .layer(middleware::from_fn_with_state(Arc::clone(&app), door))
        .with_state(app)
}

/// Every request: which name it comes by, and from whose page.
async fn door(State(app): State<Arc<App>>, request: Request, next: Next) -> Response<Body> {
    let origin = match app.access.door(request.headers(), request.uri()) {
        Ok(origin) => origin,
        Err(error) => return error.response(),
    };
    let is_preflight = Access::is_preflight(request.method(), request.headers());
    let mut response = match (&origin, is_preflight) {
        (Some(_), true) => {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NO_CONTENT;
            let headers = response.headers_mut();
            let allow = HeaderValue::from_static;
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, allow("GET, POST"));
            headers.insert(
                header::ACCESS_CONTROL_ALLOW_HEADERS,
                allow(
                    "authorization, content-type, x-api-key, anthropic-version, anthropic-beta, \
                     anthropic-dangerous-direct-browser-access",
                ),
            );
            response
        }
        _ => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(origin) = origin.and_then(|origin| HeaderValue::try_from(origin).ok()) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

async fn only_with_a_key(
    State(app): State<Arc<App>>,
    Extension(connection): Extension<Connection>,
    mut request: Request,
    next: Next,
) -> Response<Body> {
    match app.access.client(request.headers(), connection.peer.ip()) {
        Ok(client) => {
            request.extensions_mut().insert(client);
            next.run(request).await
        }
        Err(error) => error.response(),
    }
}

impl App {
    pub(crate) fn loaded(&self) -> Result<&Loaded, ApiError> {
        self.loaded.get().ok_or_else(|| ApiError::busy("the model is being loaded", 2))
    }

    fn model_name<'a>(&'a self, host: &'a Host) -> &'a str {
        self.model_alias.as_deref().unwrap_or_else(|| host.model_name())
    }
}

async fn health(State(app): State<Arc<App>>) -> Response<Body> {
    let is_loaded = app.loaded.get().is_some();
    let status = if is_loaded { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut health = app.watch.health(is_loaded);
    // whoever has no key need not know who is where
    if app.access.keys.is_some() {
        health = json!({"status": health["status"]});
    }
    json_response(status, &health)
}

async fn metrics(State(app): State<Arc<App>>) -> Response<Body> {
    let mut response = Response::new(Body::from(app.metrics.text()));
    let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    response
}

/// A text as the page shows it. Not here: a text that was made for it takes its time.
async fn rendered(State(app): State<Arc<App>>, request: Request) -> Answer {
    let body = body_within(request, markdown::MAX_BYTES).await?;
    let text = String::from_utf8(body.into())
        .map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "the body is no UTF-8"))?;
    let permit = Arc::clone(&app.readers).acquire_owned().await;
    let task = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        markdown::pieces(&text).map(serde_json::Value::from)
    });
    match task.await {
        Ok(Some(pieces)) => Ok(json_response(StatusCode::OK, &pieces)),
        Ok(None) => Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "the text has too many parts")),
        Err(e) => Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, e.to_string())),
    }
}

fn model_object(app: &App, host: &Host) -> serde_json::Value {
    json!({
        "id": app.model_name(host),
        "object": "model",
        "created": 0,
        "owned_by": "dim",
        "meta": {
            "n_vocab": host.vocabulary().n_vocab(),
            "n_ctx_train": host.vocabulary().n_ctx_train(),
            "n_ctx": host.n_ctx(),
            "n_embd": host.vocabulary().n_embd(),
        },
    })
}

async fn models(State(app): State<Arc<App>>) -> Answer {
    let model = model_object(&app, &app.loaded()?.host);
    Ok(json_response(StatusCode::OK, &json!({"object": "list", "data": [model]})))
}

async fn model(State(app): State<Arc<App>>, axum::extract::Path(id): axum::extract::Path<String>) -> Answer {
    let host = &app.loaded()?.host;
    if id != app.model_name(host) {
        return Err(
            ApiError::new(StatusCode::NOT_FOUND, format!("there is no model {id:?}")).code("model_not_found")
        );
    }
    Ok(json_response(StatusCode::OK, &model_object(&app, host)))
}

async fn props(State(app): State<Arc<App>>) -> Answer {
    let Loaded { host, slots, .. } = app.loaded()?;
    let (total, busy, waiting) = slots.load();
    let sampling = &app.defaults.sampling;
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "model_alias": app.model_name(host),
            "total_slots": total,
            "slots_busy": busy,
            "requests_waiting": waiting,
            "chat_template": host.vocabulary().chat_template(),
            "build_info": FINGERPRINT,
            "default_generation_settings": {
                "n_ctx": host.n_ctx(),
                "params": {
                    "temperature": sampling.temperature,
                    "top_k": sampling.top_k,
                    "top_p": sampling.top_p,
                    "min_p": sampling.min_p,
                    "repeat_penalty": sampling.repeat_penalty,
                    "presence_penalty": sampling.presence_penalty,
                    "frequency_penalty": sampling.frequency_penalty,
                    "max_tokens": app.defaults.limit,
                },
            },
        }),
    ))
}

async fn split(State(app): State<Arc<App>>) -> Response<Body> {
    let loaded = app.loaded.get();
    let mut picture = app.watch.picture(loaded.is_some());
    if let Some(Loaded { host, slots, .. }) = loaded {
        let (total, busy, waiting) = slots.load();
        picture["model"] = app.model_name(host).into();
        picture["slots"] = json!({"total": total, "busy": busy, "waiting": waiting});
    }
    json_response(StatusCode::OK, &picture)
}

/// In whose words a request comes, and its reply.
#[derive(Clone, Copy)]
enum Dialect {
    Choices(Kind),
    Messages,
    Responses,
}

/// The way in of all dialects; what ends with an error is counted.
fn replies(dialect: Dialect) -> MethodRouter<Arc<App>> {
    post(
        async move |State(app): State<Arc<App>>,
                    Extension(connection): Extension<Connection>,
                    Extension(client): Extension<Client>,
                    request: Request| {
            let answer = take_in(&app, connection, client, request, dialect).await;
            if answer.is_err() {
                app.metrics.refused();
            }
            answer
        },
    )
}

/// body -> what is wanted -> tokens -> a slot -> events or a whole reply.
async fn take_in(
    app: &Arc<App>,
    connection: Connection,
    client: Client,
    request: Request,
    dialect: Dialect,
) -> Answer {
    let loaded = app.loaded()?;
    let body = body_of(request, &loaded.host).await?;
    let served = connection.served();
    let wanted = match dialect {
        Dialect::Choices(Kind::Chat) => request::chat(&body, &app.defaults)?,
        Dialect::Choices(Kind::Completion) => request::completion(&body, &app.defaults)?,
        Dialect::Messages => request::messages(&body, &app.defaults)?,
        Dialect::Responses => request::responses(&body, &app.defaults)?,
    };
    drop(body);
    let wanted = Arc::new(wanted);
    let Prepared { prompts, constraint, reading } = prepare(app, &wanted).await?;
    all_have_room(&loaded.host, &prompts)?;
    let mut teller = teller(app, &loaded.host, dialect, &wanted, &prompts);

    let (sender, mut updates) = mpsc::channel(UPDATES);
    let job = Job {
        client,
        prompts,
        wanted: Arc::clone(&wanted),
        constraint,
        reading,
        updates: sender,
        is_cancelled: Arc::default(),
        came_at: Instant::now(),
    };
    let ticket = loaded.slots.submit(job)?;
    app.metrics.request();
    if wanted.stream {
        let events = Events::new(updates, teller, ticket, app.watch.clone(), served);
        let mut response = Response::new(Body::from_stream(events));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        // a proxy that keeps what it gets is no stream
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        return Ok(response);
    }
    while !teller.is_complete() {
        match updates.recv().await {
            Some(update) => teller.hear(update)?,
            None => return Err(ApiError::stopped()),
        }
    }
    drop((ticket, served));
    Ok(json_response(StatusCode::OK, &teller.whole()))
}

/// How many tokens a request of Anthropic's form would have, whether or not there is room for them.
async fn count_tokens(State(app): State<Arc<App>>, request: Request) -> Answer {
    let body = body_of(request, &app.loaded()?.host).await?;
    let wanted = Arc::new(request::to_be_counted(&body, &app.defaults)?);
    let Prepared { prompts, .. } = prepare(&app, &wanted).await?;
    let n_tokens: usize = prompts.iter().map(Vec::len).sum();
    Ok(json_response(StatusCode::OK, &json!({"input_tokens": n_tokens})))
}

/// Whether there is something to continue, and a position for each token of it.
fn all_have_room(host: &Host, prompts: &[Vec<i32>]) -> Result<(), ApiError> {
    for prompt in prompts {
        let (n_tokens, n_ctx) = (prompt.len(), host.n_ctx());
        if n_tokens == 0 {
            return Err(ApiError::from(&dim::Error::EmptyPrompt));
        }
        if n_tokens > n_ctx as usize {
            return Err(ApiError::from(&dim::Error::PromptTooLong { n_tokens, n_ctx }));
        }
    }
    Ok(())
}

/// Who tells the client of its reply.
fn teller(app: &App, host: &Host, dialect: Dialect, wanted: &Wanted, prompts: &[Vec<i32>]) -> Box<dyn Tell> {
    let n = wanted.n as usize;
    let echo = |i: usize| match &wanted.prompts {
        Prompts::Texts(texts) if wanted.echo => match &texts[i / n] {
            Prompt::Text(text) => text.clone(),
            Prompt::Tokens(tokens) => text_of(host, tokens),
        },
        _ => String::new(),
    };
    let (model, n_prompt) = (app.model_name(host), prompts.iter().map(Vec::len).sum());
    match dialect {
        Dialect::Messages => {
            let reply = Reply::new(model, n_prompt, wanted.thinking, "toolu");
            Box::new(InBlocks::new(reply, Messages::new(wanted.stop.clone())))
        }
        Dialect::Responses => {
            let reply = Reply::new(model, n_prompt, wanted.thinking, "call");
            Box::new(InBlocks::new(reply, Responses::new(wanted.told_back.clone())))
        }
        Dialect::Choices(kind) => {
            let echoes = (0..prompts.len() * n).map(echo).collect();
            Box::new(Teller::new(kind, model, echoes, n_prompt, wanted))
        }
    }
}

/// A body, within a size that follows from the context.
async fn body_of(request: Request, host: &Host) -> Result<bytes::Bytes, ApiError> {
    body_within(request, BODY_BYTES + host.n_ctx() as usize * BYTES_PER_TOKEN).await
}

/// A body of `most` bytes at most, within a time.
async fn body_within(request: Request, most: usize) -> Result<bytes::Bytes, ApiError> {
    let too_large = || {
        let message = format!("the body is larger than {most} bytes, which is more than there is room for");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let length =
        request.headers().get(header::CONTENT_LENGTH).and_then(|n| n.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|n| n > most) {
        return Err(too_large());
    }
    match tokio::time::timeout(BODY_TIMEOUT, to_bytes(request.into_body(), most)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(_)) => Err(too_large()),
        Err(_) => {
            let message = format!("the body did not come within {} s", BODY_TIMEOUT.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}

/// Parts of a reply that wait for a client who reads slowly.
const UPDATES: usize = 256;
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Of a body, beside what its tokens take.
const BODY_BYTES: usize = 1 << 20;
const BYTES_PER_TOKEN: usize = 64;
