//! What a client is told when something goes wrong, in the form that OpenAI's clients read:
//! `{"error": {"message", "type", "param", "code"}}`.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use dim::Error;
use dim::host::constraint::ConstraintError;

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status; in a stream that has begun it stands in the error object alone.
    pub status: StatusCode,
    /// One sentence, and what to do about it.
    pub message: String,
    /// The field of the request that is wrong, as a path: `messages[0].content`.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// When it is worth trying again, in seconds.
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    /// An error without a field.
    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None, retry_after_s: None }
    }

    /// A field that is wrong: `message` says what it has to be.
    pub fn field(param: impl Into<String>, message: impl AsRef<str>) -> ApiError {
        let param = param.into();
        let message = format!("{param}: {}", message.as_ref());
        ApiError { param: Some(param), ..ApiError::new(StatusCode::BAD_REQUEST, message) }
    }

    /// The same with a word for programs.
    pub fn code(mut self, code: &'static str) -> ApiError {
        self.code = Some(code);
        self
    }

    /// Somebody else may be served later, and this request too.
    pub fn busy(message: impl Into<String>, retry_after_s: u32) -> ApiError {
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message);
        ApiError { retry_after_s: Some(retry_after_s), code: Some("unavailable"), ..error }
    }

    /// Nothing follows, for whoever waits for more.
    pub(crate) fn stopped() -> ApiError {
        ApiError::busy("the server is being stopped", 5)
    }

    /// The class of errors, in OpenAI's words.
    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::SERVICE_UNAVAILABLE => "unavailable_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// The object, as it stands in a body and in a stream. The word before it is for Anthropic's clients.
    pub fn body(&self) -> Value {
        json!({"type": "error", "error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
            "status": self.status.as_u16(),
        }})
    }

    /// The whole answer.
    pub fn response(&self) -> Response<Body> {
        let mut response = json_response(self.status, &self.body());
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl axum::response::IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        self.response()
    }
}

/// What the library could not do, for whoever asked for it. Whose fault it is decides on the status.
impl From<&Error> for ApiError {
    fn from(error: &Error) -> ApiError {
        let hint = match error {
            // whoever asks has no `Resources` to set
            Error::PromptTooLong { n_tokens, .. } => Some(format!(
                "say less, or have server and workers started with a context of {} or more",
                n_tokens.next_power_of_two()
            )),
            _ => error.hint(),
        };
        let message = match hint {
            Some(hint) => format!("{error} ({hint})"),
            None => error.to_string(),
        };
        match error {
            Error::PromptTooLong { .. } => {
                ApiError::new(StatusCode::BAD_REQUEST, message).code("context_length_exceeded")
            }
            Error::Option(bad) => {
                // the fields of a request have the names of `Sampling`'s
                ApiError::field(bad.option, format!("{} must be {}", bad.value, bad.rule))
            }
            Error::Constraint(ConstraintError::Busy) => ApiError::busy(message, 2),
            // in the middle of a reply too: another schema, or another model, is what helps
            Error::Constraint(_) => {
                ApiError::new(StatusCode::BAD_REQUEST, message).code("schema_not_followed")
            }
            Error::Text(_) | Error::Template(_) | Error::EmptyPrompt => {
                ApiError::new(StatusCode::BAD_REQUEST, message)
            }
            Error::Pipeline(_) => ApiError::busy(message, 5).code("worker_unavailable"),
            _ => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message),
        }
    }
}

/// A JSON object as an answer.
pub(crate) fn json_response(status: StatusCode, body: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Why a server could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Nothing can be served at that address.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address as it was given.
        address: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// Others than this machine could talk with it, and nothing would tell them apart.
    #[error("{address} can be reached by other machines, and there is no API key")]
    Open {
        /// The address as it was given.
        address: String,
    },
    /// The keys cannot be used.
    #[error("{path}: {why}")]
    Keys {
        /// Their file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// What is to be allowed cannot be an origin or a host.
    #[error("{field} {value}: {rule}")]
    Allowed {
        /// The field of [`Options`](crate::Options) that names it.
        field: &'static str,
        /// What was given.
        value: String,
        /// What it has to be.
        rule: &'static str,
    },
    /// Prompts cannot be kept there.
    #[error("cannot keep prompts in {path}: {source}")]
    CacheDir {
        /// The folder as it was given.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The threads of a server could not be made.
    #[error("cannot start the server's threads: {0}")]
    Threads(std::io::Error),
    /// The model or its template cannot be used.
    #[error(transparent)]
    Library(#[from] Error),
}

impl ServeError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            ServeError::Listen { .. } => {
                "listen at an address of this machine and a free port, as 127.0.0.1:8080"
            }
            ServeError::Open { .. } => {
                "give it keys (`Options::keys`), or say that everybody there may use it (`Options::is_open`)"
            }
            ServeError::Keys { .. } => {
                "one key a line, 8 to 256 visible characters each; lines that begin with # are left out"
            }
            ServeError::CacheDir { .. } => "name a folder that this user can write to, or make",
            ServeError::Library(error) => return error.hint(),
            ServeError::Allowed { .. } | ServeError::Threads(_) => return None,
        };
        Some(text.to_owned())
    }

    /// Whether what was asked for is wrong.
    pub fn is_misuse(&self) -> bool {
        match self {
            ServeError::Library(error) => error.is_misuse(),
            ServeError::Threads(_) => false,
            _ => true,
        }
    }
}
