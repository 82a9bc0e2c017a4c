//! What a request asks for: its variables, query parameters and body.

use std::borrow::Cow;
use std::io::Read;

use url::form_urlencoded;

use super::error::Error;
use crate::config::Config;
use crate::limits;
use crate::variables::{Variables, whole_number};

/// How the web server hands a request over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gateway {
    /// By a process for each request.
    Cgi,
    /// By a socket.
    FastCgi,
}

/// A request's line.
pub struct Request<'a> {
    /// All its variables.
    pub variables: &'a Variables<'a>,
    /// REQUEST_METHOD.
    pub method: &'a [u8],
    /// What stands in the URL behind the bus's name: PATH_INFO, but for a slash that only the bus can be meant by.
    pub path: &'a [u8],
    /// QUERY_STRING.
    query: &'a [u8],
    /// Longest time a poll may wait here, seconds; 0 where waits cannot be offered.
    pub wait: u32,
    /// Whether events get through as they come.
    pub streams: bool,
}

/// What a poll asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollQuery {
    /// The cursor; none for a stream that begins with what comes.
    pub after: Option<u64>,
    /// The user whose messages are left out.
    pub user: Option<u64>,
    /// Seconds for which it may be kept waiting.
    pub wait: u32,
    /// The answer is to be an event stream.
    pub stream: bool,
}

impl<'a> Request<'a> {
    /// Reads the request's line from its variables.
    /// Its poll may wait for `wait` seconds, by the settings.
    pub fn read(variables: &'a Variables<'a>, gateway: Gateway, wait: u32) -> Request<'a> {
        let [method, path, query] = ["REQUEST_METHOD", "PATH_INFO", "QUERY_STRING"].map(|name| variables.text(name));
        let software = variables.text("SERVER_SOFTWARE");
        let names_bus = || form_urlencoded::parse(query).any(|(name, _)| ["user", "id", "stream"].contains(&&name[..]));
        let path = match (path, method) {
            // Servers and people add slashes. The page is what a browser opens; nobody publishes to it.
            (b"/", b"POST" | b"OPTIONS") => &b""[..],
            (b"/", b"GET" | b"HEAD") if names_bus() => b"",
            (b"", b"GET" | b"HEAD") if software.starts_with(b"uWSGI") && has_slash(variables) && !names_bus() => b"/",
            // BusyBox hands on no path that ends with a slash.
            (b"/index.html", b"GET" | b"HEAD") => b"/",
            _ => path,
        };
        // Apache's HTTP/2 serves few requests of a connection at a time, and hears only of writes that a client has
        // left: a handful of streams, or those that were left, stop all else on the connection for many seconds.
        let stalls = software.starts_with(b"Apache") && variables.text("SERVER_PROTOCOL").starts_with(b"HTTP/2");
        // fcgiwrap holds a CGI program's output back until its end, unless it is told not to.
        let held_back =
            gateway == Gateway::Cgi && software.starts_with(b"nginx") && variables.get("NO_BUFFERING").is_none();
        let wait = if stalls { 0 } else { wait };
        Request { variables, method, path, query, wait, streams: wait > 0 && !held_back }
    }

    /// What a GET asks for; nothing where it is a join.
    ///
    /// # Errors
    /// [`Error::BadParameter`], [`Error::Redirected`].
    pub fn poll_query(&self) -> Result<Option<PollQuery>, Error> {
        let stream = self.accepts_events() | self.flag("stream")?;
        let wait = self.id("wait")?.unwrap_or_default();
        let user = self.id("user")?;
        let after = match self.last_event_id()?.filter(|_| stream) {
            Some(id) => Some(id),
            None => self.id("id")?,
        };
        if after.is_some() || stream {
            return Ok(Some(PollQuery { after, user, wait: wait.min(self.wait.into()) as u32, stream }));
        }
        // No poll has one of these.
        let is_publish = self.once()?.is_some() | self.flag("batch")?;
        match user {
            None => Ok(None),
            Some(_) if is_publish => Err(Error::Redirected),
            Some(_) => Err(Error::BadParameter("id", "is missing")),
        }
    }

    /// Whether the client asked for an event stream by its type (RFC 9110 section 12.5.1), as EventSource does.
    pub fn accepts_events(&self) -> bool {
        let accept = self.variables.text("HTTP_ACCEPT").to_ascii_lowercase();
        let accepts = |range: &[u8]| {
            let mut parts = range.split(|&byte| byte == b';').map(<[u8]>::trim_ascii);
            let refused = |part: &[u8]| {
                part.strip_prefix(b"q=").is_some_and(|weight| weight.iter().all(|byte| b"0.".contains(byte)))
            };
            parts.next() == Some(b"text/event-stream") && !parts.any(refused)
        };
        accept.split(|&byte| byte == b',').any(accepts)
    }

    /// Whether CONTENT_LENGTH says where the body ends.
    pub fn has_length(&self) -> bool {
        whole_number(self.variables.text("CONTENT_LENGTH")).is_some()
    }

    /// The last event that a client heard of a stream that it takes up again (WHATWG HTML section 9.2.4): a header of
    /// browsers, a parameter of stand-ins for their EventSource.
    fn last_event_id(&self) -> Result<Option<u64>, Error> {
        let header = self.variables.get("HTTP_LAST_EVENT_ID").map(String::from_utf8_lossy);
        let id = header.map_or_else(|| self.parameter("lastEventId"), |id| Ok(Some(id)))?;
        Ok(id.and_then(|id| whole_number(id.as_bytes())).filter(|&id| id <= limits::MAX_ID))
    }

    /// A query parameter that is 0 or 1; no where it is missing.
    ///
    /// # Errors
    /// [`Error::BadParameter`].
    pub fn flag(&self, name: &'static str) -> Result<bool, Error> {
        match self.parameter(name)?.as_deref() {
            None | Some("0") => Ok(false),
            Some("1") => Ok(true),
            Some(_) => Err(Error::BadParameter(name, "has another value")),
        }
    }

    /// A query parameter by the WHATWG's rules (`application/x-www-form-urlencoded`), if it is there.
    ///
    /// # Errors
    /// [`Error::BadParameter`] where it is given twice.
    pub fn parameter(&self, name: &'static str) -> Result<Option<Cow<'_, str>>, Error> {
        let mut values = form_urlencoded::parse(self.query).filter(|(key, _)| key == name);
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

/// Whether the URL is the bus's with a slash behind it: uWSGI gives no PATH_INFO that is this slash alone.
fn has_slash(variables: &Variables) -> bool {
    let path = variables.text("REQUEST_URI").split(|&byte| byte == b'?').next();
    path.and_then(|path| path.strip_prefix(variables.text("SCRIPT_NAME"))) == Some(b"/")
}

/// Most bytes of a request's body.
pub fn body_limit(variables: &Variables, config: &Config) -> usize {
    let mut parameters = form_urlencoded::parse(variables.text("QUERY_STRING"));
    let is_batch = parameters.any(|(name, value)| (&name[..], &value[..]) == ("batch", "1"));
    if is_batch { limits::BATCH_BYTES.max(config.max_bytes) } else { config.max_bytes }
}

/// Reads a request's body from `input`, keeping at most `limit` bytes; none for a GET without one.
///
/// Reads to the end also what it does not keep: a reply before that is lost with mod_cgid and is a 502 with
/// fcgiwrap. The server bounds how much and how long. Never reads beyond CONTENT_LENGTH (RFC 3875 section 4.2): uWSGI's
/// input does not end there. Without one the body ends where the input does, if there is one.
///
/// # Errors
/// [`Error::ContentEncoding`], [`Error::BadLength`], [`Error::TooLarge`], [`Error::Incomplete`].
pub fn read_body(variables: &Variables, mut input: impl Read, limit: usize) -> Result<Vec<u8>, Error> {
    let bodiless = matches!(variables.text("REQUEST_METHOD"), b"GET" | b"HEAD" | b"OPTIONS");
    let length = match variables.text("CONTENT_LENGTH") {
        b"" if bodiless || has_no_body(variables) => Some(0),
        // Caddy's word for a length that it does not know.
        b"" | b"-1" => None,
        text => Some(whole_number(text).ok_or(Error::BadLength)?),
    };
    let encoding = variables.text("HTTP_CONTENT_ENCODING");
    if !bodiless && !encoding.is_empty() && !encoding.eq_ignore_ascii_case(b"identity") {
        // A filter of Apache's may have unpacked the body, and left the headers.
        let unpacks = variables.text("SERVER_SOFTWARE").starts_with(b"Apache");
        let rest = length.filter(|_| !unpacks).unwrap_or(u64::MAX);
        let _ = std::io::copy(&mut input.take(rest), &mut std::io::sink());
        return Err(Error::ContentEncoding(String::from_utf8_lossy(encoding).into_owned()));
    }
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

/// Whether a request without CONTENT_LENGTH has no body: by RFC 9112, section 6.3, where nothing says that it comes in
/// parts. HTTP/2 needs no such word.
fn has_no_body(variables: &Variables) -> bool {
    variables.text("SERVER_PROTOCOL").starts_with(b"HTTP/1.") && variables.get("HTTP_TRANSFER_ENCODING").is_none()
}
