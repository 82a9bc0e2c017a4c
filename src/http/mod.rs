//! From a request's variables and body to a response: routes, parameters, origins, headers.
//!
//! What keeps a bus safe, each point with its test in `tests/`:
//! 1. argv is never looked at under a web server (CVE-2012-1823, CVE-2024-4577).
//! 2. Only variables named in this crate are read; a request header can set none but its own `HTTP_...` (CVE-2016-5385).
//! 3. A foreign page can neither publish nor read, unless its origin is allowed.
//! 4. The body is bounded and read to its end before anything is answered.
//! 5. Every number is checked before it gets into a key, every name is encoded.
//! 6. A reply is JSON with an exact type and `nosniff`; nothing of a request gets into its headers but an allowed
//!    origin.
//! 7. All waiting for memcached is bounded by [`crate::limits::STORE_DEADLINE`].
//! 8. stderr gets one line, control characters escaped.
//! 9. On a signed bus nothing is stored for a publish before its signature is checked, in constant time.

pub mod error;
pub mod event_stream;
pub mod message;
pub mod signature;

use std::borrow::Cow;
use std::io::Read;

use rand::TryRng;
use rand::rngs::SysRng;
use url::form_urlencoded;

use crate::browser::{self, File};
use crate::bus::store::{Store, StoreError};
use crate::bus::{self, Once, Page};
use crate::config::{Auth, Config, Vars, whole_number};
use crate::http::error::Error;
use crate::http::signature::Signed;
use crate::limits;
use crate::stores::memcached::blocking as memcached;

const METHODS: &str = "GET, HEAD, POST, OPTIONS";

/// A whole response, to be written at once.
#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    status: u16,
    headers: String,
    body: Vec<u8>,
    /// The line for stderr, where something went wrong.
    pub log: Option<String>,
    /// It is not to be sent yet, or is to go on.
    pub held: Option<Box<Held>>,
}

/// A poll that waits for messages: what the process that serves it has to do.
#[derive(Debug, PartialEq, Eq)]
pub struct Held {
    /// The bus.
    pub config: Config,
    /// Whose messages are left out.
    pub user: Option<u64>,
    /// What was there at once. The cursor to go on from is in it.
    pub page: Page,
    /// The response is the head of an event stream ([`crate::http::event_stream`]). Else it is to be filled with a page
    /// that is not empty, or with the last one when the time is over.
    pub stream: bool,
    /// The time, seconds.
    pub seconds: u32,
}

impl Response {
    fn new(status: u16, media_type: &str, cache: &str, body: impl Into<Vec<u8>>) -> Response {
        let mut response =
            Response { status, headers: String::with_capacity(256), body: body.into(), log: None, held: None };
        if !media_type.is_empty() {
            response.header("Content-Type", media_type);
        }
        response.header("Cache-Control", cache);
        response
    }

    fn json(body: impl Into<Vec<u8>>) -> Response {
        Response::new(200, "application/json", "no-store", body)
    }

    /// A poll's result.
    fn page(page: Page) -> Response {
        let mut response = Response::json("");
        response.fill(page);
        response
    }

    /// A poll that waits, or a stream's head.
    fn held(held: Held) -> Response {
        let mut response = match held.stream {
            true => Response::new(200, "text/event-stream", "no-store", ""),
            false => Response::json(""),
        };
        if held.stream {
            // Else nginx holds events back until they fill a buffer.
            response.header("X-Accel-Buffering", "no");
        }
        response.held = Some(Box::new(held));
        response
    }

    /// Fills in a poll's result.
    pub fn fill(&mut self, page: Page) {
        self.body = page.json;
        self.header("Shortbus-Last-Id", page.last_id);
        if page.missed {
            self.header("Shortbus-Missed", 1);
        }
    }

    /// Whether it reports success.
    pub fn is_ok(&self) -> bool {
        self.status == 200
    }

    fn header(&mut self, name: &str, value: impl std::fmt::Display) {
        self.headers.push_str(&format!("{name}: {value}\r\n"));
    }

    /// As CGI has it (RFC 3875 section 6): `Status` first, which some servers insist on; no body for HEAD.
    ///
    /// Apache hands on the output of a file called `nph-...` as it stands (section 5): then it starts with a
    /// status line, which other servers pass over.
    pub fn to_cgi(&self, head: bool, nph: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            204 => "No Content",
            304 => "Not Modified",
            400 => "Bad Request",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            409 => "Conflict",
            413 => "Content Too Large",
            431 => "Request Header Fields Too Large",
            500 => "Internal Server Error",
            _ => "Service Unavailable",
        };
        let status = self.status;
        let mut out = Vec::with_capacity(512 + self.body.len());
        if nph {
            out.extend_from_slice(format!("HTTP/1.1 {status} {reason}\r\nConnection: close\r\n").as_bytes());
        }
        out.extend_from_slice(format!("Status: {status} {reason}\r\n{}", self.headers).as_bytes());
        out.extend_from_slice(b"X-Content-Type-Options: nosniff\r\n");
        let streams = self.held.as_ref().is_some_and(|held| held.stream);
        if ![204, 304].contains(&self.status) && !streams {
            out.extend_from_slice(format!("Content-Length: {}\r\n", self.body.len()).as_bytes());
        }
        out.extend_from_slice(b"\r\n");
        if !head {
            out.extend_from_slice(&self.body);
        }
        out
    }
}

/// Serves one request; `open` connects to the bus's memcached where one is needed.
pub async fn answer<S: Store>(
    vars: Vars<'_>,
    config: Result<Config, Error>,
    body: Result<Vec<u8>, Error>,
    open: impl FnOnce(&Config) -> Result<S, StoreError>,
) -> Response {
    let (bus, result) = match &config {
        Ok(config) => (&config.bus[..], route(vars, config, body, open).await),
        Err(error) => (&b"-"[..], Err(error.clone())),
    };
    let mut response = result.unwrap_or_else(|error| failure(bus, &error));
    if let Ok(config) = &config {
        allow_origin(vars, config, &mut response);
    }
    response
}

async fn route<S: Store>(
    vars: Vars<'_>,
    config: &Config,
    body: Result<Vec<u8>, Error>,
    open: impl FnOnce(&Config) -> Result<S, StoreError>,
) -> Result<Response, Error> {
    let path = vars("PATH_INFO").unwrap_or_default();
    let method = vars("REQUEST_METHOD").unwrap_or_default();
    if !path.is_empty() {
        let file = browser::find(&path).ok_or_else(|| Error::Path(String::from_utf8_lossy(&path).into_owned()))?;
        return match &method[..] {
            b"GET" | b"HEAD" => Ok(serve(file, &vars("HTTP_IF_NONE_MATCH").unwrap_or_default())),
            other => Err(Error::Method(String::from_utf8_lossy(other).into_owned(), "GET, HEAD")),
        };
    }
    let query = vars("QUERY_STRING").unwrap_or_default();
    match &method[..] {
        b"GET" | b"HEAD" => {
            let stream = wants_stream(vars, config, &query)?;
            match (parameter(&query, "user")?, cursor(vars, &query, stream)?) {
                (None, None) if !stream => join(&mut open(config)?, config).await,
                (_, None) => Err(Error::Parameter("id", "is missing")),
                (user, Some(after)) => {
                    let wait = if config.wait > 0 { parameter(&query, "wait")?.unwrap_or_default() } else { 0 };
                    let page = bus::poll(&mut open(config)?, after, user).await?;
                    let held = match () {
                        () if method == b"HEAD" => None,
                        () if stream => Some(config.wait),
                        () if page.is_empty() && wait > 0 => Some(wait.min(config.wait.into()) as u32),
                        () => None,
                    };
                    Ok(match held {
                        Some(seconds) => Response::held(Held { config: config.clone(), user, page, stream, seconds }),
                        None => Response::page(page),
                    })
                }
            }
        }
        b"POST" => {
            check_origin(vars, config)?;
            let user = parameter(&query, "user")?.ok_or(Error::Parameter("user", "is missing"))?;
            let body = body?;
            publish(config, &query, user, &body, open).await
        }
        b"OPTIONS" => {
            check_origin(vars, config)?;
            let mut response = Response::new(204, "", "no-store", "");
            response.header("Allow", METHODS);
            Ok(response)
        }
        other => Err(Error::Method(String::from_utf8_lossy(other).into_owned(), METHODS)),
    }
}

async fn join(store: &mut impl Store, config: &Config) -> Result<Response, Error> {
    let (id, user) = (bus::join(store).await?, random_id());
    let mut json = format!("{{\"user\":{user},\"id\":{id}");
    if config.wait > 0 {
        json.push_str(&format!(",\"wait\":{},\"stream\":true", config.wait));
    }
    if let Some(key) = bus_key(store, config, true).await? {
        let (bus, secret) = (memcached::encode_name(&config.bus), signature::secret(&key, user));
        json.push_str(&format!(",\"bus\":\"{bus}\",\"secret\":\"{secret}\""));
    }
    Ok(Response::json(json + "}"))
}

async fn publish<S: Store>(
    config: &Config,
    query: &[u8],
    user: u64,
    body: &[u8],
    open: impl FnOnce(&Config) -> Result<S, StoreError>,
) -> Result<Response, Error> {
    let once = once(query)?;
    let data = message::check(body)?;
    let signed = match config.auth {
        Auth::Open => None,
        Auth::Signed(_) => Some(Signed::read(query, user, once.as_deref(), body)?),
    };
    let mut store = open(config)?;
    if let Some(signed) = signed {
        let key = bus_key(&mut store, config, false).await?;
        signed.check(key.as_deref(), &config.bus, store.unix_micros() / 1_000, config.clock_window())?;
    }
    let name = once.map(|once| format!("{user}:{once}"));
    let once = name.as_ref().map(|name| Once { name, token: random_id(), ttl: config.once_ttl() });
    let id = bus::publish(&mut store, user, data, config.ttl, once).await?;
    Ok(Response::json(format!("{{\"user\":{user},\"id\":{id}}}")))
}

/// A file of our own, or 304 where the browser has it already. Kept, but asked for each time: `no-cache`.
fn serve(file: &File, if_none_match: &[u8]) -> Response {
    let tag = format!("\"{:032x}\"", file.tag);
    // Weak comparison (RFC 9110 section 13.1.2), and a compressing server may have put something behind the tag.
    let known = String::from_utf8_lossy(if_none_match).contains(&tag[..tag.len() - 1]);
    let mut response = match known {
        true => Response::new(304, "", "no-cache", ""),
        false => Response::new(200, file.media_type, "no-cache", file.body),
    };
    response.header("ETag", tag);
    // For the page: nothing but what comes from here, and nothing inline.
    response.header(
        "Content-Security-Policy",
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    );
    response
}

/// Answers without a look at the request: the shell cannot serve it.
pub fn refuse(error: &Error) -> Response {
    failure(b"-", error)
}

fn failure(bus: &[u8], error: &Error) -> Response {
    let (status, code) = error.status();
    let message = serde_json::Value::from(error.to_string());
    let mut response = Response::json(format!("{{\"error\":\"{code}\",\"message\":{message}}}"));
    response.status = status;
    match error {
        Error::Method(_, allowed) => response.header("Allow", allowed),
        Error::Undecided => response.header("Retry-After", limits::RETRY_AFTER),
        _ if status == 503 => response.header("Retry-After", limits::RETRY_AFTER),
        _ => {}
    }
    let line = format!("{}: {code}: {}", String::from_utf8_lossy(bus), error.cause());
    response.log = Some(format!("shortbus: {}", line.chars().flat_map(printable).collect::<String>()));
    response
}

/// A log line stays one line, reads from left to right, and tells a terminal that shows it nothing to do.
fn printable(char: char) -> impl Iterator<Item = char> {
    let plain = char.is_ascii_graphic() || char == ' ';
    plain.then_some(char).into_iter().chain((!plain).then(|| char.escape_debug()).into_iter().flatten())
}

/// Whether a poll asks for an event stream, by its type or, where no header can be set, by a parameter; and gets one.
fn wants_stream(vars: Vars, config: &Config, query: &[u8]) -> Result<bool, Error> {
    if config.wait == 0 {
        return Ok(false);
    }
    let accept = vars("HTTP_ACCEPT").unwrap_or_default().to_ascii_lowercase();
    let named = accept.split(|&byte| byte == b',').any(|range| range.trim_ascii().starts_with(b"text/event-stream"));
    Ok(named || parameter(query, "stream")? == Some(1))
}

/// Where a poll starts: `id`, but for a stream that is taken up again, what its browser has heard last (WHATWG HTML
/// section 9.2.4).
fn cursor(vars: Vars, query: &[u8], stream: bool) -> Result<Option<u64>, Error> {
    let heard = vars("HTTP_LAST_EVENT_ID").filter(|_| stream).and_then(|id| whole_number(&id));
    heard.filter(|&id| id <= limits::MAX_ID).map_or_else(|| parameter(query, "id"), |id| Ok(Some(id)))
}

/// A query parameter by the WHATWG's rules (`application/x-www-form-urlencoded`), if it is there.
///
/// # Errors
/// [`Error::Parameter`] where it is given twice.
pub fn value<'a>(query: &'a [u8], name: &'static str) -> Result<Option<Cow<'a, str>>, Error> {
    let mut values = form_urlencoded::parse(query).filter(|(key, _)| key == name);
    let first = values.next().map(|(_, value)| value);
    match values.next() {
        Some(_) => Err(Error::Parameter(name, "is given twice")),
        None => Ok(first),
    }
}

/// A query parameter that is an id, if it is there.
fn parameter(query: &[u8], name: &'static str) -> Result<Option<u64>, Error> {
    let Some(value) = value(query, name)? else {
        return Ok(None);
    };
    match whole_number(value.as_bytes()) {
        Some(id) if id <= limits::MAX_ID => Ok(Some(id)),
        _ => Err(Error::Parameter(name, "is not such a number")),
    }
}

/// The user's name for a send that may be repeated, if it has one.
fn once(query: &[u8]) -> Result<Option<Cow<'_, str>>, Error> {
    let once = value(query, "once")?;
    let fits = |once: &str| {
        (1..=limits::ONCE_MAX).contains(&once.len())
            && once.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    match once {
        Some(once) if !fits(&once) => Err(Error::Parameter("once", "is not what it has to be")),
        once => Ok(once),
    }
}

/// The key of a signed bus: the operator's, or what memcached keeps, made where there is none yet if `create`.
async fn bus_key(store: &mut impl Store, config: &Config, create: bool) -> Result<Option<Vec<u8>>, Error> {
    let Auth::Signed(key) = &config.auth else {
        return Ok(None);
    };
    if key.is_some() {
        return Ok(key.clone());
    }
    let mut fresh = [0; limits::KEY_MIN];
    if create {
        SysRng.try_fill_bytes(&mut fresh).expect("getrandom");
    }
    bus::key(store, create.then_some(&fresh)).await
}

/// A random id, so that two users, or two sends, never meet, also after a restart.
fn random_id() -> u64 {
    // The kernel always has random bytes once it is up: getrandom(2) fails on no system that runs a web server.
    SysRng.try_next_u64().expect("getrandom") & limits::MAX_ID
}

/// Refuses what a foreign page asks for (RFC 6454): a bus on an intranet must not be writable by any page on the
/// internet that its user visits. A request without Origin does not come from a page.
fn check_origin(vars: Vars, config: &Config) -> Result<(), Error> {
    let Some(origin) = vars("HTTP_ORIGIN") else {
        return Ok(());
    };
    // No page can set Sec-Fetch-Site (W3C Fetch Metadata), and it is right also where a proxy rewrote Host.
    let same = vars("HTTP_SEC_FETCH_SITE").is_some_and(|site| site == b"same-origin") || is_host(vars, &origin);
    if same || allowed(config, &origin).is_some() {
        return Ok(());
    }
    Err(Error::Origin(String::from_utf8_lossy(&origin).into_owned()))
}

/// Whether the origin is this host, whatever the scheme: behind a proxy that speaks https we are asked by http.
///
/// Debian's fastcgi_params for nginx leave the port out of Host; then SERVER_PORT may stand in for it.
fn is_host(vars: Vars, origin: &[u8]) -> bool {
    let bare = |name: &[u8]| {
        let name = name.to_ascii_lowercase();
        let port = [&b":80"[..], b":443"].iter().find_map(|port| name.strip_suffix(*port)).map(<[u8]>::len);
        name[..port.unwrap_or(name.len())].to_vec()
    };
    let host = vars("HTTP_HOST").unwrap_or_default();
    let with_port = || [&host[..], b":", &vars("SERVER_PORT").unwrap_or_default()].concat();
    let scheme = |scheme: &&[u8]| origin.strip_prefix(*scheme);
    let Some(authority) = [&b"http://"[..], b"https://"].iter().find_map(scheme).map(bare) else {
        return false;
    };
    !host.is_empty() && (authority == bare(&host) || authority == bare(&with_port()))
}

/// The value of Access-Control-Allow-Origin for this origin, if it has one.
fn allowed<'a>(config: &'a Config, origin: &[u8]) -> Option<&'a String> {
    config.allow_origin.iter().find(|allowed| *allowed == "*" || allowed.as_bytes() == origin)
}

/// CORS (WHATWG Fetch): lets an allowed page read the reply, errors and our headers included.
fn allow_origin(vars: Vars, config: &Config, response: &mut Response) {
    if config.allow_origin.is_empty() {
        return;
    }
    response.header("Vary", "Origin");
    let Some(origin) = vars("HTTP_ORIGIN").and_then(|origin| allowed(config, &origin)) else {
        return;
    };
    response.header("Access-Control-Allow-Origin", origin);
    if response.status == 204 {
        response.header("Access-Control-Allow-Methods", METHODS);
        response.header("Access-Control-Allow-Headers", "Content-Type");
        response.header("Access-Control-Max-Age", limits::PREFLIGHT_AGE);
    } else {
        response.header("Access-Control-Expose-Headers", "Shortbus-Last-Id, Shortbus-Missed, Retry-After, Date");
    }
}

/// Reads a request's body from `input`, keeping at most `limit` bytes; none for a GET without one.
///
/// Reads to the end also what it does not keep: a reply before that is lost with mod_cgid and is a 502 with
/// fcgiwrap. The server bounds how much and how long. Never reads beyond CONTENT_LENGTH (RFC 3875 section 4.2);
/// without one, as with chunked requests, the body ends where the input does.
///
/// # Errors
/// [`Error::Length`], [`Error::TooLarge`], [`Error::Incomplete`].
pub fn read_body(vars: Vars, mut input: impl Read, limit: usize) -> Result<Vec<u8>, Error> {
    let length = match vars("CONTENT_LENGTH").filter(|text| !text.is_empty()) {
        Some(text) => Some(whole_number(&text).ok_or(Error::Length)?),
        None if matches!(&vars("REQUEST_METHOD").unwrap_or_default()[..], b"GET" | b"HEAD" | b"OPTIONS") => Some(0),
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
