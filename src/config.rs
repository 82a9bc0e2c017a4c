//! Settings: environment variables. A bus needs none.

use std::ffi::OsStr;
use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::limits;
use crate::variables::{Variables, whole_number};

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The bus's name.
    pub bus: Vec<u8>,
    /// The setting's name.
    pub name: String,
    /// What is wrong, and what to do: the sentence goes on from the name.
    pub wrong: String,
    /// Its value in quotes, for the operator; of a secret, no more than its length.
    pub value: String,
}

impl Error {
    fn new(name: &str, value: &[u8], allowed: &str) -> Error {
        Error::told(name, format!("cannot be used as it is; it has to be {allowed}."), quoted(value))
    }

    /// Of which bus, [`Config::read`] adds.
    fn told(name: &str, wrong: impl Into<String>, value: String) -> Error {
        Error { bus: Vec::new(), name: name.into(), wrong: wrong.into(), value }
    }
}

/// All settings.
pub const SETTINGS: [&str; 10] = [
    "SHORTBUS_BUS",
    "SHORTBUS_TTL",
    "SHORTBUS_MAX_BYTES",
    "SHORTBUS_MEMCACHED",
    "SHORTBUS_STORE",
    "SHORTBUS_STORE_BYTES",
    "SHORTBUS_ALLOW_ORIGIN",
    "SHORTBUS_WAIT",
    "SHORTBUS_AUTH",
    "SHORTBUS_KEY",
];

const TTL_ALLOWED: &str = "a whole number of seconds from 1 to 2592000";
const BYTES_ALLOWED: &str = "a whole number of bytes from 1 to 1000000";
const MEMCACHED_ALLOWED: &str = "host:port, or the path of a unix socket; several are separated by spaces";
const STORE_ALLOWED: &str = "the path of a folder, from / on";
const STORE_BYTES_ALLOWED: &str = "a whole number of bytes from 4194304 to 68719476736";
const WAIT_ALLOWED: &str = "a whole number of seconds from 0, for no waiting, to 60";
const AUTH_ALLOWED: &str = "signed, or left out";
const KEY_ALLOWED: &str = "at least 32 bytes that nobody can guess; make one with: openssl rand -base64 32";
const BUS_ALLOWED: &str = "a name of at least one byte";
const ORIGIN_ALLOWED: &str = "*, or origins separated by spaces, each as a browser sends it: lower case, no path, no \
                              default port, like https://example.org";

/// How one bus is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The bus's name, any bytes.
    pub bus: Vec<u8>,
    /// Seconds a message lives.
    pub ttl: u32,
    /// Bytes of the largest message body.
    pub max_bytes: usize,
    /// Where it lives.
    pub store: StoreSetting,
    /// Bytes of the bus's file, where it lives in one.
    pub store_bytes: u64,
    /// Origins whose pages may use the bus, `*` for all.
    pub allow_origin: Vec<String>,
    /// Longest time a poll may wait, seconds; 0 turns waits and streams off.
    pub wait: u32,
    /// Who may publish.
    pub auth: Auth,
}

/// Where a bus lives, as far as its settings say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreSetting {
    /// On one of these memcached servers: `host:port` or a unix socket's path.
    Memcached(Vec<String>),
    /// In a file in this folder.
    Folder(PathBuf),
    /// They say nothing: [`crate::stores::decision`].
    Unset,
}

/// Who may publish.
#[derive(Clone, PartialEq, Eq)]
pub enum Auth {
    /// Anyone, as any user.
    Open,
    /// Each user as itself, by a signature. With the bus key; `None` where the store keeps it.
    Signed(Option<Vec<u8>>),
}

impl std::fmt::Debug for Auth {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Auth::Open { "open" } else { "signed" })
    }
}

impl Config {
    /// Reads the settings: of the request's variables, else of `environment`, this process's. `argv0` is the executable's
    /// path as the web server gave it, `wait` the default of `SHORTBUS_WAIT`.
    ///
    /// # Errors
    /// An [`Error`] for the first setting that cannot be used; no default takes its place.
    pub fn read(variables: &Variables, environment: &Variables, argv0: &[u8], wait: u32) -> Result<Config, Error> {
        let settings = Settings { variables, environment };
        let file_name = || argv0.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        let bus = settings.get("SHORTBUS_BUS").unwrap_or_else(file_name);
        Config::read_of(bus, &settings, wait).map_err(|error| Error { bus: bus.to_vec(), ..error })
    }

    fn read_of(bus: &[u8], settings: &Settings, wait: u32) -> Result<Config, Error> {
        check_names(settings.variables)?;
        check_names(settings.environment)?;
        if bus.is_empty() {
            return Err(Error::new("SHORTBUS_BUS", b"", BUS_ALLOWED));
        }
        let (bytes_default, bytes_max) = (limits::BYTES_DEFAULT as u32, limits::BYTES_MAX as u32);
        Ok(Config {
            bus: bus.to_vec(),
            ttl: settings.number("SHORTBUS_TTL", limits::TTL_DEFAULT, 1..=limits::TTL_MAX, TTL_ALLOWED)?,
            max_bytes: settings.number("SHORTBUS_MAX_BYTES", bytes_default, 1..=bytes_max, BYTES_ALLOWED)? as usize,
            store: settings.store()?,
            store_bytes: settings.number(
                "SHORTBUS_STORE_BYTES",
                limits::STORE_BYTES,
                limits::STORE_BYTES_MIN..=limits::STORE_BYTES_MAX,
                STORE_BYTES_ALLOWED,
            )?,
            allow_origin: settings.list("SHORTBUS_ALLOW_ORIGIN", ORIGIN_ALLOWED, is_origin)?,
            wait: settings.number("SHORTBUS_WAIT", wait, 0..=limits::WAIT_MAX, WAIT_ALLOWED)?,
            auth: settings.auth()?,
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

/// Refuses names that say that a setting was meant and would not be heard: a bus that its owner believes to be signed
/// must not be open.
fn check_names(variables: &Variables) -> Result<(), Error> {
    for name in variables.names() {
        let mut plain = name;
        while let Some(rest) = plain.strip_prefix(b"REDIRECT_") {
            plain = rest;
        }
        if !plain.starts_with(b"SHORTBUS_") {
            continue;
        }
        let error = |wrong: String| {
            let name = String::from_utf8_lossy(name);
            // A secret under a wrong name is one still.
            Err(Error::told(&name, wrong, length_of(variables.text(&name))))
        };
        let plain = String::from_utf8_lossy(plain);
        if name != plain.as_bytes() {
            if variables.get(&plain).is_none() {
                return error(format!(
                    "is what an internal redirect of the web server made of {plain}, which is missing; set {plain} where \
                     the redirect leads, too."
                ));
            }
        } else if !SETTINGS.contains(&&plain[..]) {
            return error(format!("is no setting; take it out, or correct it to one of {}.", SETTINGS.join(", ")));
        }
    }
    Ok(())
}

/// A value as the operator is shown it.
fn quoted(value: &[u8]) -> String {
    format!("'{}'", String::from_utf8_lossy(value))
}

/// How long a secret is.
fn length_of(secret: &[u8]) -> String {
    format!("{} bytes long", secret.len())
}

/// Where settings come from.
struct Settings<'a> {
    variables: &'a Variables<'a>,
    environment: &'a Variables<'a>,
}

impl<'a> Settings<'a> {
    fn get(&self, name: &str) -> Option<&'a [u8]> {
        self.variables.get(name).or_else(|| self.environment.get(name))
    }

    fn auth(&self) -> Result<Auth, Error> {
        let key = self.get("SHORTBUS_KEY");
        match (self.get("SHORTBUS_AUTH"), key) {
            (None, None) => Ok(Auth::Open),
            (None, Some(key)) => Err(Error::told(
                "SHORTBUS_KEY",
                "is set, but SHORTBUS_AUTH is not: the bus would be open; set SHORTBUS_AUTH to signed, or take the key \
                 out.",
                length_of(key),
            )),
            (Some(b"signed"), Some(key)) if key.len() < limits::KEY_MIN => {
                Err(Error { value: length_of(key), ..Error::new("SHORTBUS_KEY", b"", KEY_ALLOWED) })
            }
            (Some(b"signed"), key) => Ok(Auth::Signed(key.map(<[u8]>::to_vec))),
            (Some(auth), _) => Err(Error::new("SHORTBUS_AUTH", auth, AUTH_ALLOWED)),
        }
    }

    fn store(&self) -> Result<StoreSetting, Error> {
        let servers = self.list("SHORTBUS_MEMCACHED", MEMCACHED_ALLOWED, is_server)?;
        match self.get("SHORTBUS_STORE") {
            Some(folder) if !folder.starts_with(b"/") || folder.contains(&0) => {
                Err(Error::new("SHORTBUS_STORE", folder, STORE_ALLOWED))
            }
            Some(folder) if !servers.is_empty() => Err(Error::told(
                "SHORTBUS_STORE",
                "is set, and SHORTBUS_MEMCACHED is too: the bus can live in one place only; take one of them out.",
                quoted(folder),
            )),
            Some(folder) => Ok(StoreSetting::Folder(PathBuf::from(OsStr::from_bytes(folder)))),
            None if servers.is_empty() => Ok(StoreSetting::Unset),
            None => Ok(StoreSetting::Memcached(servers)),
        }
    }

    fn number<T: TryFrom<u64> + PartialOrd>(
        &self,
        name: &str,
        default: T,
        range: RangeInclusive<T>,
        allowed: &str,
    ) -> Result<T, Error> {
        let Some(value) = self.get(name) else {
            return Ok(default);
        };
        match whole_number(value).and_then(|number| T::try_from(number).ok()) {
            Some(number) if range.contains(&number) => Ok(number),
            _ => Err(Error::new(name, value, allowed)),
        }
    }

    /// A list separated by white space. It is empty only where the variable is unset.
    fn list(&self, name: &str, allowed: &str, good: fn(&str) -> bool) -> Result<Vec<String>, Error> {
        let Some(value) = self.get(name) else {
            return Ok(Vec::new());
        };
        let items: Vec<String> =
            std::str::from_utf8(value).unwrap_or_default().split_ascii_whitespace().map(String::from).collect();
        if items.is_empty() || !items.iter().all(|item| good(item)) {
            return Err(Error::new(name, value, allowed));
        }
        Ok(items)
    }
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
            let default_port = match scheme {
                "http" => ":80",
                "https" => ":443",
                _ => ":",
            };
            [scheme, host].iter().all(|part| !part.is_empty() && part.bytes().all(plain))
                && !host.ends_with(':')
                && !host.ends_with(default_port)
        })
}
