//! What a request asks for: its variables, query parameters and body.

use std::borrow::Cow;
use std::io::Read;

use url::form_urlencoded;

use super::error::Error;
use crate::config::Config;
use crate::limits;
use crate::variables::{Variables, whole_number};

/// A request's line.
pub struct Request<'a> {
    /// All its variables.
    pub variables: Variables<'a>,
    /// REQUEST_METHOD.
    pub method: Vec<u8>,
    /// PATH_INFO: what stands in the URL behind the bus's name.
    pub path: Vec<u8>,
    /// QUERY_STRING.
    pub query: Vec<u8>,
}

/// What a poll asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollQuery {
    /// The cursor.
    pub after: u64,
    /// The user whose messages are left out.
    pub user: Option<u64>,
    /// Seconds for which it may be kept waiting.
    pub wait: u32,
    /// The answer is to be an event stream.
    pub stream: bool,
}

impl<'a> Request<'a> {
    /// Reads the request's line from its variables.
    pub fn read(variables: Variables<'a>) -> Request<'a> {
        let variable = |name| variables(name).unwrap_or_default();
        let [method, path, query] = ["REQUEST_METHOD", "PATH_INFO", "QUERY_STRING"].map(variable);
        Request { variables, method, path, query }
    }

    /// What a GET asks for; nothing where it is a join.
    ///
    /// # Errors
    /// [`Error::BadParameter`].
    pub fn poll_query(&self, config: &Config) -> Result<Option<PollQuery>, Error> {
        let stream = self.wants_stream(config)?;
        let user = self.id("user")?;
        let after = match self.last_event_id().filter(|_| stream) {
            Some(id) => Some(id),
            None => self.id("id")?,
        };
        let Some(after) = after else {
            let joins = user.is_none() && !stream;
            return if joins { Ok(None) } else { Err(Error::BadParameter("id", "is missing")) };
        };
        let wait = if config.wait > 0 { self.id("wait")?.unwrap_or_default() } else { 0 };
        Ok(Some(PollQuery { after, user, wait: wait.min(config.wait.into()) as u32, stream }))
    }

    /// Whether a poll asks for an event stream, by its type or, where no header can be set, by a parameter; and may have
    /// one.
    fn wants_stream(&self, config: &Config) -> Result<bool, Error> {
        if config.wait == 0 {
            return Ok(false);
        }
        let accept = (self.variables)("HTTP_ACCEPT").unwrap_or_default().to_ascii_lowercase();
        let mut ranges = accept.split(|&byte| byte == b',');
        let named = ranges.any(|range| range.trim_ascii().starts_with(b"text/event-stream"));
        Ok(named || self.id("stream")? == Some(1))
    }

    /// The last event that a browser heard of a stream that it takes up again (WHATWG HTML section 9.2.4).
    fn last_event_id(&self) -> Option<u64> {
        let id = (self.variables)("HTTP_LAST_EVENT_ID")?;
        whole_number(&id).filter(|&id| id <= limits::MAX_ID)
    }

    /// A query parameter by the WHATWG's rules (`application/x-www-form-urlencoded`), if it is there.
    ///
    /// # Errors
    /// [`Error::BadParameter`] where it is given twice.
    pub fn parameter(&self, name: &'static str) -> Result<Option<Cow<'_, str>>, Error> {
        let mut values = form_urlencoded::parse(&self.query).filter(|(key, _)| key == name);
        let first = values.next().map(|(_, value)| value);
        match values.next() {
            Some(_) => Err(Error::BadParameter(name, "is given twice")),
            None => Ok(first),
        }
    }

    /// A query parameter that is an id, if it is there.
    ///
    /// # Errors
    /// [`Error::BadParameter`].
    pub fn id(&self, name: &'static str) -> Result<Option<u64>, Error> {
        let Some(value) = self.parameter(name)? else {
            return Ok(None);
        };
        match whole_number(value.as_bytes()) {
            Some(id) if id <= limits::MAX_ID => Ok(Some(id)),
            _ => Err(Error::BadParameter(name, "is not such a number")),
        }
    }

    /// The user's name for a send that may be repeated, if it has one.
    ///
    /// # Errors
    /// [`Error::BadParameter`].
    pub fn once(&self) -> Result<Option<Cow<'_, str>>, Error> {
        let once = self.parameter("once")?;
        let fits = |once: &str| {
            (1..=limits::ONCE_MAX).contains(&once.len())
                && once.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        };
        match once {
            Some(once) if !fits(&once) => Err(Error::BadParameter("once", "is not what it has to be")),
            once => Ok(once),
        }
    }
}

/// Reads a request's body from `input`, keeping at most `limit` bytes; none for a GET without one.
///
/// Reads to the end also what it does not keep: a reply before that is lost with mod_cgid and is a 502 with
/// fcgiwrap. The server bounds how much and how long. Never reads beyond CONTENT_LENGTH (RFC 3875 section 4.2);
/// without one, as with chunked requests, the body ends where the input does.
///
/// # Errors
/// [`Error::BadLength`], [`Error::TooLarge`], [`Error::Incomplete`].
pub fn read_body(variables: Variables, mut input: impl Read, limit: usize) -> Result<Vec<u8>, Error> {
    let length = match variables("CONTENT_LENGTH").filter(|text| !text.is_empty()) {
        Some(text) => Some(whole_number(&text).ok_or(Error::BadLength)?),
        None if matches!(&variables("REQUEST_METHOD").unwrap_or_default()[..], b"GET" | b"HEAD" | b"OPTIONS") => {
            Some(0)
        }
        None => None,
    };
    let mut body = Vec::new();
    let kept = length.unwrap_or(u64::MAX).min(limit as u64 + 1);
    let result = input.by_ref().take(kept).read_to_end(&mut body);
    if body.len() > limit {
        let rest = length.map_or(u64::MAX, |length| length - kept);
        let _ = std::io::copy(&mut input.take(rest), &mut std::io::sink());
        return Err(Error::TooLarge { limit });
    }
    if result.is_err() || length.is_some_and(|length| (body.len() as u64) < length) {
        return Err(Error::Incomplete { read: body.len() });
    }
    Ok(body)
}
