//! One request, its redirects, and patience: what is tried again, and what is the end.

use std::{
    io::Read,
    thread,
    time::{Duration, Instant},
};

use ureq::{
    Agent, Body, RequestBuilder,
    http::{HeaderMap, Response, Uri},
    typestate::WithoutBody,
};

use super::{HubError, Settings};

/// Asks servers.
pub(super) struct Client<'a> {
    agent: Agent,
    pub(super) settings: &'a Settings,
    hub: Origin,
}

/// A file on a server, as requests name it.
pub(super) struct Remote<'a> {
    /// Its address.
    pub(super) url: String,
    /// What errors call it.
    pub(super) what: &'a str,
    /// Its bytes.
    pub(super) bytes: u64,
    /// What the hub calls this version of it, where that is known.
    pub(super) etag: Option<&'a str>,
}

/// What the hub says about a file before it sends any of it.
#[derive(Debug, Default)]
pub(super) struct Described {
    pub(super) etag: Option<String>,
    pub(super) bytes: Option<u64>,
}

/// Who a request goes to: scheme, host, port.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Origin(bool, String, u16);

/// Why a try failed.
enum Fault {
    /// It may work next time, after this wait at least.
    Again(String, Option<Duration>),
    /// It will not.
    End(HubError),
}

impl From<HubError> for Fault {
    fn from(error: HubError) -> Fault {
        Fault::End(error)
    }
}

fn again(why: impl ToString) -> Fault {
    Fault::Again(why.to_string(), None)
}

/// Failures in a row.
struct Tries<'a> {
    what: &'a str,
    failed: u32,
}

impl<'a> Client<'a> {
    pub(super) fn new(settings: &'a Settings) -> Result<Client<'a>, HubError> {
        let patience = &settings.patience;
        let config = Agent::config_builder()
            // redirects are followed here: the token goes no further than the hub
            .max_redirects(0)
            .http_status_as_error(false)
            .max_response_header_size(64 << 10)
            .timeout_resolve(Some(patience.connect))
            .timeout_connect(Some(patience.connect))
            .timeout_send_request(Some(patience.answer))
            .timeout_recv_response(Some(patience.answer))
            .timeout_per_read(Some(patience.answer))
            .user_agent(concat!("dim/", env!("CARGO_PKG_VERSION")))
            .build();
        let (_, hub) = parse(&settings.endpoint)?;
        Ok(Client { agent: config.into(), settings, hub })
    }

    /// The whole of a small answer.
    ///
    /// # Errors
    /// It is larger than `most`, or cannot be had.
    pub(super) fn small(&self, url: &str, what: &str, most: u64) -> Result<Vec<u8>, HubError> {
        self.patiently(what, || {
            let (response, _) = self.follow(url, what, None)?;
            let mut body = Vec::new();
            let mut from = response.into_body().into_reader().take(most + 1);
            self.copy(&mut from, most + 1, &mut |bytes| {
                body.extend_from_slice(bytes);
                Ok(())
            })?;
            match body.len() as u64 > most {
                true => Err(answer(what, "does not end").into()),
                false => Ok(body),
            }
        })
    }

    /// What the hub says about a file. Only redirects to the hub itself are followed: a large file's digest stands in the
    /// answer that leads away from there.
    pub(super) fn describe(&self, url: &str, what: &str) -> Result<Described, HubError> {
        self.patiently(what, || {
            let mut url = url.to_owned();
            for _ in 0..MAX_REDIRECTS {
                let (uri, origin) = parse(&url)?;
                let response = self.send(self.agent.head(uri), &origin)?;
                let status = response.status().as_u16();
                if is_redirect(status) {
                    let next = self.next(&url, &origin, response.headers(), what)?;
                    if parse(&next)?.1 == self.hub && header(response.headers(), "x-linked-etag").is_none() {
                        url = next;
                        continue;
                    }
                } else if status != 200 {
                    return Err(self.refused(status, response.headers(), true, what));
                }
                let headers = response.headers();
                let length = header(headers, "content-length").filter(|_| status == 200);
                let bytes = header(headers, "x-linked-size").or(length);
                return Ok(Described { etag: etag(headers), bytes: bytes.and_then(|n| n.parse().ok()) });
            }
            Err(answer(what, "leads in a circle").into())
        })
    }

    /// Hands bytes `at..end` of a file to `take`, in order and each once, however often the connection is cut.
    ///
    /// # Errors
    /// It cannot be had, or `take` fails.
    pub(super) fn range(
        &self,
        file: &Remote<'_>,
        at: u64,
        end: u64,
        take: &mut dyn FnMut(&[u8]) -> Result<(), HubError>,
    ) -> Result<(), HubError> {
        let (mut at, mut since) = (at, at);
        let mut tries = Tries { what: file.what, failed: 0 };
        while at < end {
            let to = end.min(at.saturating_add(MAX_RANGE_BYTES));
            let fault = self.piece(file, at, to, &mut |bytes| {
                take(bytes)?;
                at += bytes.len() as u64;
                Ok(())
            });
            if at - since >= SOME_BYTES || at >= end {
                (since, tries.failed) = (at, 0);
            }
            if let Err(fault) = fault {
                self.wait(&mut tries, fault)?;
            }
        }
        Ok(())
    }

    /// One request for a range. Less may come than was asked for.
    fn piece(
        &self,
        file: &Remote<'_>,
        at: u64,
        to: u64,
        take: &mut dyn FnMut(&[u8]) -> Result<(), HubError>,
    ) -> Result<(), Fault> {
        let what = file.what;
        let (response, version) = self.follow(&file.url, what, Some((at, to)))?;
        if let (Some(expected), Some(found)) = (file.etag, version)
            && expected != found
        {
            return Err(HubError::Changed(what.to_owned()).into());
        }
        let n_bytes = match response.status().as_u16() {
            206 => {
                let range = header(response.headers(), "content-range").and_then(content_range);
                let (first, last, all) =
                    range.ok_or_else(|| answer(what, "does not say which bytes it has"))?;
                if all.is_some_and(|all| all != file.bytes) {
                    return Err(answer(what, "is about a file of another size").into());
                }
                if first != at || last >= to || last < first {
                    return Err(answer(what, "has other bytes than were asked for").into());
                }
                last + 1 - first
            }
            // a server may send a small file whole
            _ if at == 0 => to,
            _ => {
                return Err(answer(
                    what,
                    "begins at the file's start: it cannot go on where a connection was cut",
                )
                .into());
            }
        };
        let got = self.copy(&mut response.into_body().into_reader().take(n_bytes), n_bytes, take)?;
        if got < n_bytes {
            return Err(again(format!("the connection ended {} bytes early", n_bytes - got)));
        }
        Ok(())
    }

    /// Reads a body, at most `most` bytes of it, and not slower than anybody's patience. Returns how many.
    fn copy(
        &self,
        from: &mut dyn Read,
        most: u64,
        take: &mut dyn FnMut(&[u8]) -> Result<(), HubError>,
    ) -> Result<u64, Fault> {
        let mut buf = vec![0; BUFFER_BYTES];
        let (mut done, mut seen, mut since) = (0, 0, Instant::now());
        while done < most {
            let n = from.read(&mut buf).map_err(again)?;
            if n == 0 {
                break;
            }
            take(&buf[..n])?;
            done += n as u64;
            if since.elapsed() > self.settings.patience.stall {
                if done - seen < SOME_BYTES {
                    return Err(again("next to nothing arrives"));
                }
                (seen, since) = (done, Instant::now());
            }
        }
        Ok(done)
    }

    /// One GET with its redirects. The answer is 200 or 206; beside it the file's version, where the hub named one.
    fn follow(
        &self,
        url: &str,
        what: &str,
        range: Option<(u64, u64)>,
    ) -> Result<(Response<Body>, Option<String>), Fault> {
        let (mut url, mut version) = (url.to_owned(), None);
        for _ in 0..MAX_REDIRECTS {
            let (uri, origin) = parse(&url)?;
            let mut request = self.agent.get(uri);
            if let Some((at, to)) = range {
                request = request.header("range", format!("bytes={at}-{}", to - 1));
            }
            let response = self.send(request, &origin)?;
            let status = response.status().as_u16();
            if origin == self.hub
                && (!is_redirect(status) || response.headers().contains_key("x-linked-etag"))
            {
                version = etag(response.headers());
            }
            match status {
                200 | 206 => return Ok((response, version)),
                _ if is_redirect(status) => url = self.next(&url, &origin, response.headers(), what)?,
                _ => return Err(self.refused(status, response.headers(), origin == self.hub, what)),
            }
        }
        Err(answer(what, "leads in a circle").into())
    }

    /// Sends a request to `origin`. The token goes to the hub and to nobody else.
    fn send(&self, request: RequestBuilder<WithoutBody>, origin: &Origin) -> Result<Response<Body>, Fault> {
        let mut request = request.header("accept-encoding", "identity");
        if let Some(token) = self.settings.token.as_ref().filter(|_| *origin == self.hub) {
            request = request.header("authorization", token.header());
        }
        request.call().map_err(again)
    }

    /// Where a redirect leads.
    fn next(&self, url: &str, from: &Origin, headers: &HeaderMap, what: &str) -> Result<String, HubError> {
        let to = header(headers, "location").ok_or_else(|| answer(what, "leads nowhere"))?;
        let scheme_end = url.find("://").map_or(0, |at| at + 3);
        let host_end = url[scheme_end..].find('/').map_or(url.len(), |at| scheme_end + at);
        let next = match to {
            _ if to.starts_with("//") => format!("{}{to}", &url[..scheme_end.saturating_sub(2)]),
            _ if to.starts_with('/') => format!("{}{to}", &url[..host_end]),
            _ => to.to_owned(),
        };
        let (_, origin) = parse(&next).map_err(|_| answer(what, "leads to no address"))?;
        if from.0 && !origin.0 {
            return Err(answer(what, "leads away from https"));
        }
        Ok(next)
    }

    /// What a status says.
    fn refused(&self, status: u16, headers: &HeaderMap, is_hub: bool, what: &str) -> Fault {
        let what = || what.to_owned();
        let has_token = self.settings.token.is_some();
        match status {
            408 | 429 | 500..=599 => {
                let seconds: Option<u64> =
                    header(headers, "retry-after").and_then(|text| text.trim().parse().ok());
                match seconds {
                    Some(seconds) if seconds > self.settings.patience.longest_wait.as_secs() => {
                        HubError::Busy { what: what(), seconds }.into()
                    }
                    _ => Fault::Again(format!("status {status}"), seconds.map(Duration::from_secs)),
                }
            }
            // a signed address that is no longer good: the hub gives another
            400..=499 if !is_hub => again(format!("status {status}")),
            401 => HubError::Unauthorized { what: what(), has_token }.into(),
            403 => HubError::Forbidden { what: what(), page: self.settings.endpoint.clone() }.into(),
            404 => HubError::NotFound { what: what() }.into(),
            status => HubError::Status { what: what(), status }.into(),
        }
    }

    fn patiently<T>(&self, what: &str, mut step: impl FnMut() -> Result<T, Fault>) -> Result<T, HubError> {
        let mut tries = Tries { what, failed: 0 };
        loop {
            match step() {
                Ok(done) => return Ok(done),
                Err(fault) => self.wait(&mut tries, fault)?,
            }
        }
    }

    /// Waits before the next try, if there is to be one.
    fn wait(&self, tries: &mut Tries<'_>, fault: Fault) -> Result<(), HubError> {
        let patience = &self.settings.patience;
        let (why, asked) = match fault {
            Fault::End(error) => return Err(error),
            Fault::Again(why, asked) => (why, asked),
        };
        tries.failed += 1;
        if tries.failed >= patience.tries {
            return Err(HubError::Network { what: tries.what.to_owned(), tries: tries.failed, why });
        }
        let pause = patience.pause.saturating_mul(1 << (tries.failed - 1).min(16)).min(LONGEST_PAUSE);
        thread::sleep(pause.max(asked.unwrap_or_default()));
        Ok(())
    }
}

/// An address, taken apart by who makes the connection, so that both mean the same host.
fn parse(url: &str) -> Result<(Uri, Origin), HubError> {
    let wrong = || HubError::Address(url.to_owned());
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let is_secure = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(wrong()),
    };
    let authority =
        uri.authority().filter(|authority| !authority.as_str().contains('@')).ok_or_else(wrong)?;
    let port = authority.port_u16().unwrap_or(if is_secure { 443 } else { 80 });
    let origin = Origin(is_secure, authority.host().to_ascii_lowercase(), port);
    Ok((uri, origin))
}

fn answer(what: &str, why: &'static str) -> HubError {
    HubError::Answer { what: what.to_owned(), why }
}

fn is_redirect(status: u16) -> bool {
    matches!(status, 301 | 302 | 303 | 307 | 308)
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// The digest of a large file, or what else its version is called; without quotes.
fn etag(headers: &HeaderMap) -> Option<String> {
    let text = header(headers, "x-linked-etag").or_else(|| header(headers, "etag"))?;
    Some(text.trim().trim_start_matches("W/").trim_matches('"').to_owned())
}

/// `bytes FIRST-LAST/ALL`; `*` for all is `None`.
fn content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, all) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let all = if all == "*" { None } else { Some(all.parse().ok()?) };
    Some((first.parse().ok()?, last.parse().ok()?, all))
}

/// Most bytes that one request asks for.
const MAX_RANGE_BYTES: u64 = 64 << 20;
/// What counts as progress.
const SOME_BYTES: u64 = 16 << 10;
const BUFFER_BYTES: usize = 256 << 10;
const MAX_REDIRECTS: usize = 6;
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let origin = |url| parse(url).unwrap().1;
        assert_eq!(origin("https://Hub.example/a"), origin("https://hub.example:443/b?c"));
        assert_ne!(origin("https://hub.example"), origin("http://hub.example"));
        assert_ne!(origin("http://hub.example:1"), origin("http://hub.example:2"));
        assert_ne!(origin("http://hub.example"), origin("http://hub.example.evil"));
        for bad in ["", "/a", "ftp://a/b", "http://", "https://hub.example@evil/a", "hub.example/a"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges_are_read_strictly() {
        assert_eq!(content_range("bytes 1-4/9"), Some((1, 4, Some(9))));
        assert_eq!(content_range("bytes 1-4/*"), Some((1, 4, None)));
        for bad in ["", "1-4/9", "bytes 1-4", "bytes -4/9", "bytes 1-/9", "bytes */9", "bytes a-b/c"] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
