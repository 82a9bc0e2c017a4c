//! From a request's variables and body to a response, whichever front brought it.
//!
//! What keeps a bus safe; SECURITY.md names the tests of each point:
//! 1. argv is never looked at under a web server (CVE-2012-1823, CVE-2024-4577).
//! 2. Only variables named in this crate are read; a request header can set none but its own `HTTP_...` (CVE-2016-5385).
//! 3. A foreign page can neither publish nor read, unless its origin is allowed.
//! 4. The body is bounded, never unpacked, and read to its end before anything is answered.
//! 5. Every number is checked before it gets into a key, every name is encoded: a bus of any name reaches no other, no
//!    other file and no command (CWE-22, CWE-93).
//! 6. A reply is JSON with an exact type and `nosniff`; nothing of a request gets into its headers but an allowed
//!    origin and, for an origin that is named, the names of headers that it asks for.
//! 7. All waiting for the store is bounded by [`crate::limits::STORE_DEADLINE`].
//! 8. stderr gets one line, control characters escaped.
//! 9. On a signed bus nothing is stored for a publish before its signature is checked, in constant time; a publish that
//!    somebody sends again is no second message.
//! 10. What another user could have put in the place of a bus's folder, file or decision is refused.
//! 11. What a FastCGI process keeps for slow clients, and for those that come together, is bounded in all
//!     ([`crate::limits::BUFFERS_BYTES`], [`crate::limits::READING`], CVE-2007-6750).
//! 12. Under systemd the process has no privileges, and only the system calls of an ordinary service (seccomp(2)).
//! 13. The page `B/` runs its own scripts alone, no other site can frame it, and what a message holds is text in it (CWE-79,
//!     CWE-1021).
//! 14. A message that JSON readers of other languages refuse, or take ages for, is refused (CVE-2020-10735).
//! 15. What comes from a bus changes no object of a page, whatever its keys are called (CVE-2019-10744).

pub mod error;
pub mod event_stream;
pub mod message;
pub mod origin;
pub mod request;
pub mod response;
pub mod signature;
pub mod waiting;

use std::borrow::Cow;

use rand::TryRng;
use rand::rngs::SysRng;

use crate::browser;
use crate::bus::store::{Store, StoreError};
use crate::bus::{self, IdempotencyKey, Publish, name};
use crate::config::{self, Auth, Config};
use crate::limits;
use crate::variables::Variables;
use error::Error;
use origin::METHODS;
use request::{Gateway, PollQuery, Request};
use response::Response;
use signature::Signed;
use waiting::Waiting;

/// What a front has for requests: stores.
#[allow(async_fn_in_trait, reason = "each front is used by name, on one thread")]
pub trait Backend {
    /// A bus's keys.
    type Store: Store;

    /// Opens the store that a bus lives in.
    ///
    /// # Errors
    /// It cannot be reached.
    fn open(&self, config: &Config) -> Result<Self::Store, StoreError>;

    /// Publishes; with others on the same bus, where that saves time.
    ///
    /// # Errors
    /// As [`bus::publish`].
    async fn publish(&self, config: &Config, publish: Publish<'_>) -> Result<Vec<u64>, bus::Error> {
        bus::publish(&mut self.open(config)?, publish, config.ttl).await
    }
}

/// Serves one request.
pub async fn answer(
    variables: &Variables<'_>,
    gateway: Gateway,
    config: Result<Config, config::Error>,
    body: Result<Vec<u8>, Error>,
    backend: &impl Backend,
) -> Response {
    let request = Request::read(variables, gateway, config.as_ref().map_or(0, |config| config.wait));
    let config = match config {
        Ok(config) => config,
        // Files need no setting: the page shows what is wrong.
        Err(error) => return file(&request).unwrap_or_else(|_| Response::error(&error.bus.clone(), &error.into())),
    };
    let result = route(&request, &config, body, backend).await;
    let mut response = result.unwrap_or_else(|error| Response::error(&config.bus, &error));
    if response.is_server_error() && request.accepts_events() {
        response = response.into_events();
    }
    origin::allow(variables, &config, &mut response);
    response
}

async fn route(
    request: &Request<'_>,
    config: &Config,
    body: Result<Vec<u8>, Error>,
    backend: &impl Backend,
) -> Result<Response, Error> {
    match (request.path, request.method) {
        (b"", b"GET" | b"HEAD") => match request.poll_query()? {
            None => join(&mut backend.open(config)?, request, config).await,
            Some(query) => poll(&mut backend.open(config)?, request, query, config).await,
        },
        (b"", b"POST") => publish(request, config, body, backend).await,
        (b"", b"OPTIONS") => preflight(request, config),
        (b"", _) => Err(bad_method(request, METHODS)),
        _ => file(request),
    }
}

async fn join(store: &mut impl Store, request: &Request<'_>, config: &Config) -> Result<Response, Error> {
    let (id, user) = (bus::join(store).await?, random_id());
    let mut json = format!("{{\"user\":{user},\"id\":{id},\"batch\":{}", limits::SLOT_MESSAGES);
    if request.wait > 0 {
        json.push_str(&format!(",\"wait\":{},\"stream\":{}", request.wait, request.streams));
    }
    if let Some(key) = signing_key(store, config, true).await? {
        let (bus, secret) = (name::encode(&config.bus), signature::secret(&key, user));
        json.push_str(&format!(",\"bus\":\"{bus}\",\"secret\":\"{secret}\""));
    }
    Ok(Response::json(json + "}"))
}

async fn poll(
    store: &mut impl Store,
    request: &Request<'_>,
    query: PollQuery,
    config: &Config,
) -> Result<Response, Error> {
    let PollQuery { after, user, wait, stream } = query;
    let after = match after {
        Some(after) => after,
        None => bus::join(store).await?,
    };
    let page = message::readable(bus::poll(store, after, user).await?);
    let is_head = request.method == b"HEAD";
    Ok(if stream && (is_head || !request.streams) {
        // The client comes back for what follows.
        let mut text = Vec::new();
        event_stream::opening(&mut text, &page);
        Response::events(Some(text))
    } else if !is_head && (stream || wait > 0 && page.is_empty()) {
        Response::waiting(Waiting { config: config.clone(), user, page, stream, seconds: wait })
    } else {
        Response::page(page)
    })
}

async fn publish(
    request: &Request<'_>,
    config: &Config,
    body: Result<Vec<u8>, Error>,
    backend: &impl Backend,
) -> Result<Response, Error> {
    origin::check(request, config)?;
    let user = request.id("user")?.ok_or(Error::BadParameter("user", "is missing"))?;
    let is_batch = request.flag("batch")?;
    let body = match body {
        Err(Error::TooLarge { .. }) if is_batch => return Err(message::Error::LongBatch.into()),
        body => body?,
    };
    let once = request.once()?;
    let messages = match is_batch {
        true => message::check_batch(&body, config.max_bytes)?,
        false => vec![message::check(&body)?],
    };
    if !is_batch && message::is_number(messages[0]) && !request.has_length() {
        // A chunked body that broke off looks complete under Apache's CGI, now and then.
        return Err(Error::LengthRequired);
    }
    if let Auth::Signed(_) = config.auth {
        let signed = signed(request, user, once.as_deref(), is_batch, &body)?;
        let mut store = backend.open(config)?;
        let key = signing_key(&mut store, config, false).await?;
        signed.check(key.as_deref(), &config.bus, store.unix_micros() / 1_000, config.clock_window())?;
    }
    let name = once.map(|once| format!("{user}:{once}"));
    let key = name.as_ref().map(|name| IdempotencyKey { name, token: random_id(), ttl: config.once_ttl() });
    let ids = backend.publish(config, Publish { user, messages, key }).await?;
    let mut json = format!("{{\"user\":{user},\"id\":{}", ids.last().expect("an id for each message"));
    if is_batch {
        json.push_str(&format!(",\"ids\":{ids:?}").replace(' ', ""));
    }
    Ok(Response::json(json + "}"))
}

/// CORS (WHATWG Fetch): whether a page of another origin may publish.
fn preflight(request: &Request, config: &Config) -> Result<Response, Error> {
    origin::check(request, config)?;
    let mut response = Response::no_content();
    response.header("Allow", METHODS);
    Ok(response)
}

/// A file of the executable's own.
fn file(request: &Request) -> Result<Response, Error> {
    let path = || String::from_utf8_lossy(request.path).into_owned();
    let file = browser::find(request.path).ok_or_else(|| Error::UnknownPath(path()))?;
    if !matches!(request.method, b"GET" | b"HEAD") {
        // A POST to the slash is the bus's.
        return Err(bad_method(request, if request.path == b"/" { METHODS } else { "GET, HEAD" }));
    }
    let tag = format!("\"{:032x}\"", file.tag);
    let if_none_match = String::from_utf8_lossy(request.variables.text("HTTP_IF_NONE_MATCH"));
    // Weak comparison (RFC 9110 section 13.1.2), and a compressing server may have put something behind the tag.
    let known = if_none_match.contains(&tag[..tag.len() - 1]);
    Ok(Response::file(file.media_type, &tag, (!known).then_some(file.body)))
}

fn bad_method(request: &Request, allowed: &'static str) -> Error {
    Error::BadMethod(String::from_utf8_lossy(request.method).into_owned(), allowed)
}

/// The proof of a signed publish.
fn signed<'a>(
    request: &Request,
    user: u64,
    once: Option<&'a str>,
    is_batch: bool,
    body: &'a [u8],
) -> Result<Signed<'a>, signature::Error> {
    let parameter = |name| request.parameter(name).map_err(|_twice| signature::Error::Malformed(name));
    let (time, sig) = (parameter("time")?, parameter("sig")?);
    Signed::read(user, once, time.as_deref(), sig.as_deref(), is_batch, body)
}

/// The signing key of a signed bus: the operator's, or what the store keeps, made where there is none yet if `create`.
async fn signing_key<'a>(
    store: &mut impl Store,
    config: &'a Config,
    create: bool,
) -> Result<Option<Cow<'a, [u8]>>, Error> {
    match &config.auth {
        Auth::Open => Ok(None),
        Auth::Signed(Some(key)) => Ok(Some(key.into())),
        Auth::Signed(None) => {
            let mut fresh = [0; limits::KEY_MIN];
            if create {
                SysRng.try_fill_bytes(&mut fresh).expect("getrandom");
            }
            Ok(bus::signing_key(store, create.then_some(&fresh)).await?.map(Cow::from))
        }
    }
}

/// A random id, so that two users, or two sends, never meet, also after a restart.
fn random_id() -> u64 {
    // The kernel always has random bytes once it is up: getrandom(2) fails on no system that runs a web server.
    SysRng.try_next_u64().expect("getrandom") & limits::MAX_ID
}
