//! A whole response, and its CGI form.

use std::fmt::Display;

use super::error::Error;
use super::waiting::Waiting;
use super::{event_stream, message};
use crate::bus::{self, Page};
use crate::limits;

/// A whole response, to be written at once.
#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    status: u16,
    headers: String,
    /// None where there can be none (RFC 9110 section 6.4.1), or where it is to come: then it has no length either.
    body: Option<Vec<u8>>,
    /// The line for stderr, where something went wrong.
    pub log: Option<String>,
    /// It is not to be sent yet, or is to go on.
    pub waiting: Option<Box<Waiting>>,
}

impl Response {
    fn new(status: u16, media_type: &str, cache: &str, body: Option<Vec<u8>>) -> Response {
        let headers = String::with_capacity(256);
        let mut response = Response { status, headers, body, log: None, waiting: None };
        if !media_type.is_empty() {
            response.header("Content-Type", media_type);
        }
        response.header("Cache-Control", cache);
        response
    }

    /// What a call gives, as JSON.
    pub fn json(body: impl Into<Vec<u8>>) -> Response {
        Response::new(200, "application/json", "no-store", Some(body.into()))
    }

    /// No body.
    pub fn no_content() -> Response {
        Response::new(204, "", "no-store", None)
    }

    /// A file of our own, or 304 where the browser has it. It is kept, but asked for each time: `no-cache`.
    pub fn file(media_type: &str, tag: &str, body: Option<&str>) -> Response {
        let mut response = match body {
            Some(body) => Response::new(200, media_type, "no-cache", Some(body.into())),
            None => Response::new(304, "", "no-cache", None),
        };
        response.header("ETag", tag);
        // For the page: nothing but what comes from here, and nothing inline.
        let policy = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'";
        response.header("Content-Security-Policy", policy);
        response
    }

    /// A poll's result.
    pub fn page(page: Page) -> Response {
        let mut response = Response::json("");
        response.fill(page);
        response
    }

    /// An event stream, or its head where it is to go on.
    pub fn events(body: Option<Vec<u8>>) -> Response {
        // Proxies that compress hold events back until they fill a block (RFC 9111 section 5.2.2.6).
        let mut response = Response::new(200, "text/event-stream", "no-store, no-transform", body);
        // Without it nginx holds events back until they fill a buffer.
        response.header("X-Accel-Buffering", "no");
        response
    }

    /// A poll that waits, or the head of an event stream.
    pub fn waiting(waiting: Waiting) -> Response {
        let mut response = match waiting.stream {
            true => Response::events(None),
            false => Response::json(""),
        };
        response.waiting = Some(Box::new(waiting));
        response
    }

    /// The same error for an EventSource, which takes any other status for the end and never comes back: a stream that
    /// ends at once.
    pub fn into_events(self) -> Response {
        let mut text = Vec::new();
        event_stream::begin(&mut text);
        event_stream::unavailable(&mut text, self.body.as_deref().unwrap_or_default());
        Response { log: self.log, ..Response::events(Some(text)) }
    }

    /// Fills in a poll's result.
    pub fn fill(&mut self, page: Page) {
        self.body = Some(message::array(&page));
        self.header("Shortbus-Last-Id", page.last_id);
        if page.missed {
            self.header("Shortbus-Missed", 1);
        }
    }

    /// An error, for the client and for the operator. `bus` is the bus's name, empty where it is not known.
    pub fn error(bus: &[u8], error: &Error) -> Response {
        let (status, code, sentence) = error.row();
        let message = serde_json::Value::from(&sentence[..]);
        let element = match error {
            Error::Message(message::Error::Element(index, _)) => format!(",\"element\":{index}"),
            _ => String::new(),
        };
        let mut response = Response::json(format!("{{\"error\":\"{code}\",\"message\":{message}{element}}}"));
        response.status = status;
        match error {
            Error::BadMethod(_, allowed) => response.header("Allow", allowed),
            Error::ContentEncoding(_) => response.header("Accept-Encoding", "identity"),
            Error::Bus(bus::Error::OnceUndecided) => response.header("Retry-After", limits::RETRY_AFTER),
            _ if status == 503 => response.header("Retry-After", limits::RETRY_AFTER),
            _ => {}
        }
        let bus = if bus.is_empty() { "-".into() } else { String::from_utf8_lossy(bus) };
        let line = format!("shortbus: {bus}: {code}: {}", error.cause(&sentence));
        response.log = Some(one_line(&line));
        response
    }

    /// Adds a header.
    pub fn header(&mut self, name: &str, value: impl Display) {
        self.headers.push_str(&format!("{name}: {value}\r\n"));
    }

    /// Whether it reports success.
    pub fn is_ok(&self) -> bool {
        self.status == 200
    }

    /// Whether it may be another if it is asked for again: the server is at fault (RFC 9110 section 15.6).
    pub fn is_server_error(&self) -> bool {
        self.status >= 500
    }

    /// Whether it answers a preflight.
    pub fn is_no_content(&self) -> bool {
        self.status == 204
    }

    /// As CGI has it (RFC 3875 section 6): `Status` first, which some servers insist on; no body for HEAD.
    ///
    /// Apache hands on the output of a file called `nph-...` as it stands (section 5): then it starts with a
    /// status line, which other servers pass over.
    pub fn to_cgi(&self, head: bool, nph: bool) -> Vec<u8> {
        let status = self.status;
        let reason = reason(status);
        let body = self.body.as_deref().unwrap_or_default();
        let mut out = Vec::with_capacity(512 + body.len());
        if nph {
            out.extend_from_slice(format!("HTTP/1.1 {status} {reason}\r\nConnection: close\r\n").as_bytes());
        }
        out.extend_from_slice(format!("Status: {status} {reason}\r\n{}", self.headers).as_bytes());
        out.extend_from_slice(b"X-Content-Type-Options: nosniff\r\n");
        if self.body.is_some() {
            out.extend_from_slice(format!("Content-Length: {}\r\n", body.len()).as_bytes());
        }
        out.extend_from_slice(b"\r\n");
        if !head {
            out.extend_from_slice(body);
        }
        out
    }
}

/// A status's reason phrase (RFC 9110 section 15).
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        304 => "Not Modified",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        _ => "Service Unavailable",
    }
}

/// A line that stays one, reads from left to right, and tells a terminal that shows it nothing to do.
pub fn one_line(text: &str) -> String {
    text.chars().flat_map(printable).collect()
}

fn printable(char: char) -> impl Iterator<Item = char> {
    let plain = char.is_ascii_graphic() || char == ' ';
    plain.then_some(char).into_iter().chain((!plain).then(|| char.escape_debug()).into_iter().flatten())
}
