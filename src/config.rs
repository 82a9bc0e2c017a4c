//! Settings: environment variables. A bus needs none.

use std::ops::RangeInclusive;

use crate::limits;
use crate::variables::{Variables, whole_number};

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The setting's name.
    pub name: &'static str,
    /// Its value, for the operator; of a secret, what is wrong with it.
    pub value: String,
    /// What it may be.
    pub allowed: &'static str,
}

impl Error {
    fn new(name: &'static str, value: impl Into<String>, allowed: &'static str) -> Error {
        Error { name, value: value.into(), allowed }
    }
}

const TTL_ALLOWED: &str = "a whole number of seconds from 1 to 2592000";
const BYTES_ALLOWED: &str = "a whole number of bytes from 1 to 1000000";
const MEMCACHED_ALLOWED: &str = "host:port, or the path of a unix socket; several are separated by spaces";
const WAIT_ALLOWED: &str = "a whole number of seconds from 0, for no waiting, to 60";
const AUTH_ALLOWED: &str = "signed, or left out";
const KEY_ALLOWED: &str = "at least 32 bytes that nobody can guess; make one with: openssl rand -base64 32";
const BUS_ALLOWED: &str = "a name of at least one byte";
const ORIGIN_ALLOWED: &str =
    "*, or origins separated by spaces, each as a browser sends it: lower case, no path, like https://example.org";

/// How one bus is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The bus's name, any bytes.
    pub bus: Vec<u8>,
    /// Seconds a message lives.
    pub ttl: u32,
    /// Bytes of the largest message body.
    pub max_bytes: usize,
    /// `host:port` or a unix socket's path; the bus lives on one of them.
    pub memcached: Vec<String>,
    /// Origins whose pages may use the bus, `*` for all.
    pub allow_origin: Vec<String>,
    /// Longest time a poll may wait, seconds; 0 turns waits and streams off.
    pub wait: u32,
    /// Who may publish.
    pub auth: Auth,
}

/// Who may publish.
#[derive(Clone, PartialEq, Eq)]
pub enum Auth {
    /// Anyone, as any user.
    Open,
    /// Each user as itself, by a signature. With the bus key; `None` where memcached keeps it.
    Signed(Option<Vec<u8>>),
}

impl std::fmt::Debug for Auth {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Auth::Open { "open" } else { "signed" })
    }
}

impl Config {
    /// Reads the settings. `argv0` is the executable's path as the web server gave it, `wait` the default of
    /// `SHORTBUS_WAIT`.
    ///
    /// # Errors
    /// An [`Error`] for the first setting that cannot be used; no default takes its place.
    pub fn read(variables: Variables, argv0: &[u8], wait: u32) -> Result<Config, Error> {
        let number = |name, default, range, allowed| number(variables, name, default, range, allowed);
        let bus = match variables("SHORTBUS_BUS") {
            Some(name) => name,
            None => argv0.rsplit(|&byte| byte == b'/').next().unwrap_or_default().to_vec(),
        };
        if bus.is_empty() {
            return Err(Error::new("SHORTBUS_BUS", String::new(), BUS_ALLOWED));
        }
        Ok(Config {
            bus,
            ttl: number("SHORTBUS_TTL", limits::TTL_DEFAULT, 1..=limits::TTL_MAX, TTL_ALLOWED)?,
            max_bytes: number(
                "SHORTBUS_MAX_BYTES",
                limits::BYTES_DEFAULT as u32,
                1..=limits::BYTES_MAX as u32,
                BYTES_ALLOWED,
            )? as usize,
            memcached: match list(variables, "SHORTBUS_MEMCACHED", MEMCACHED_ALLOWED, is_server)? {
                servers if servers.is_empty() => vec!["127.0.0.1:11211".into()],
                servers => servers,
            },
            allow_origin: list(variables, "SHORTBUS_ALLOW_ORIGIN", ORIGIN_ALLOWED, is_origin)?,
            wait: number("SHORTBUS_WAIT", wait, 0..=limits::WAIT_MAX, WAIT_ALLOWED)?,
            auth: auth(variables)?,
        })
    }

    /// Seconds by which a signature's time may differ from the clock.
    pub fn clock_window(&self) -> u32 {
        self.ttl.min(limits::CLOCK_MAX)
    }

    /// Seconds for which the bus remembers a `once`. A repeat may publish up to a TTL after the first request, and the
    /// bus remembers it for a TTL from then. On a signed bus a signature is valid for as long, if the client's clock is
    /// ahead by a TTL.
    pub fn once_ttl(&self) -> u32 {
        ((2 * self.ttl).max(limits::ONCE_LEAST) + limits::ONCE_SLACK).min(limits::TTL_MAX)
    }
}

fn auth(variables: Variables) -> Result<Auth, Error> {
    let Some(auth) = variables("SHORTBUS_AUTH") else {
        return Ok(Auth::Open);
    };
    if auth != b"signed" {
        return Err(Error::new("SHORTBUS_AUTH", String::from_utf8_lossy(&auth).into_owned(), AUTH_ALLOWED));
    }
    match variables("SHORTBUS_KEY") {
        // Only the key's length: many people read logs.
        Some(key) if key.len() < limits::KEY_MIN => {
            Err(Error::new("SHORTBUS_KEY", format!("{} bytes long", key.len()), KEY_ALLOWED))
        }
        key => Ok(Auth::Signed(key)),
    }
}

fn number(
    variables: Variables,
    name: &'static str,
    default: u32,
    range: RangeInclusive<u32>,
    allowed: &'static str,
) -> Result<u32, Error> {
    let Some(value) = variables(name) else {
        return Ok(default);
    };
    match whole_number(&value).and_then(|number| u32::try_from(number).ok()) {
        Some(number) if range.contains(&number) => Ok(number),
        _ => Err(Error::new(name, String::from_utf8_lossy(&value).into_owned(), allowed)),
    }
}

/// A list separated by white space. It is empty only where the variable is unset.
fn list(
    variables: Variables,
    name: &'static str,
    allowed: &'static str,
    good: fn(&str) -> bool,
) -> Result<Vec<String>, Error> {
    let Some(value) = variables(name) else {
        return Ok(Vec::new());
    };
    let text = String::from_utf8_lossy(&value);
    let items: Vec<String> = text.split_ascii_whitespace().map(String::from).collect();
    if items.is_empty() || !items.iter().all(|item| good(item)) || std::str::from_utf8(&value).is_err() {
        return Err(Error::new(name, text.into_owned(), allowed));
    }
    Ok(items)
}

fn is_server(text: &str) -> bool {
    let port = |port: &str| matches!(whole_number(port.as_bytes()), Some(1..=65535));
    let name = |host: &str| host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    let host = |host: &str| !host.is_empty() && (name(host) || host.starts_with('[') && host.ends_with(']'));
    text.starts_with('/') || text.rsplit_once(':').is_some_and(|(name, number)| host(name) && port(number))
}

/// An origin as browsers serialise it (RFC 6454 section 6.2).
fn is_origin(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_graphic() && !byte.is_ascii_uppercase() && !b"/?#@*,\"'".contains(&byte);
    text == "*"
        || text.split_once("://").is_some_and(|(scheme, host)| {
            [scheme, host].iter().all(|part| !part.is_empty() && part.bytes().all(plain)) && !host.ends_with(':')
        })
}
