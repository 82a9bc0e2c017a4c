//! Everything that can go wrong, and the one place where it becomes a status, a code and a sentence.

use std::fmt;

use crate::bus::store::StoreError;

/// Why a request was not served. `Display` is the sentence for the client: what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// A query parameter is missing, repeated or not what it has to be.
    Parameter(&'static str, &'static str),
    /// A publish on a signed bus is not by the user it names.
    Signature(Signature),
    /// The first request with this `once` may still be at work.
    Undecided,
    /// The first request with this `once` was longer than the TTL ago: nobody can tell what became of it.
    Expired,
    /// An earlier request with this `once` had another body.
    Differs,
    /// CONTENT_LENGTH is not a number.
    Length,
    /// The body ended before CONTENT_LENGTH, or could not be read.
    Incomplete {
        /// Bytes that came.
        read: usize,
    },
    /// The body is not UTF-8.
    NotUtf8 {
        /// Offset of the first byte that is wrong.
        at: usize,
    },
    /// The body is not one JSON value.
    NotJson(String),
    /// The body nests deeper than [`crate::limits::DEPTH_MAX`].
    TooDeep,
    /// A page of another origin published (RFC 6454), or asked in a preflight whether it may.
    Origin(String),
    /// PATH_INFO names nothing.
    Path(String),
    /// A method that is not among those allowed here, which are listed.
    Method(String, &'static str),
    /// The body is longer than `SHORTBUS_MAX_BYTES`.
    TooLarge {
        /// `SHORTBUS_MAX_BYTES`.
        limit: usize,
    },
    /// FastCGI parameters, the request's headers among them, are longer than [`crate::limits::PARAMETERS_BYTES`].
    Parameters,
    /// More connections than a FastCGI process serves.
    Crowded,
    /// A setting that cannot be used: its name, its value, and what it may be.
    Setting(&'static str, String, &'static str),
    /// Too many publishers at once; nothing was published.
    Busy,
    /// memcached could not be used; nothing was published.
    Store(StoreError),
    /// memcached failed or was late while publishing: the message may have been published or not. With the cause.
    OutcomeUnknown(String),
}

/// What is wrong with a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signature {
    /// This query parameter is missing.
    Missing(&'static str),
    /// This query parameter is not what it has to be.
    Malformed(&'static str),
    /// It is not by this user's secret, over this request.
    Wrong,
    /// Its time is further back than the TTL.
    TooOld,
    /// Its time is further ahead than the TTL.
    ClockAhead,
}

impl From<Signature> for Error {
    fn from(wrong: Signature) -> Error {
        Error::Signature(wrong)
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Error {
        Error::Store(error)
    }
}

impl Error {
    /// HTTP status (RFC 9110) and the stable code that programs can go by.
    pub fn status(&self) -> (u16, &'static str) {
        match self {
            Error::Parameter(..) => (400, "bad_parameter"),
            Error::Length => (400, "bad_length"),
            Error::Incomplete { .. } => (400, "incomplete"),
            Error::NotUtf8 { .. } => (400, "not_utf8"),
            Error::NotJson(_) => (400, "not_json"),
            Error::TooDeep => (400, "too_deep"),
            Error::Origin(_) => (403, "foreign_origin"),
            Error::Signature(Signature::Missing(_)) => (403, "signature_missing"),
            Error::Signature(Signature::Malformed(_)) => (403, "signature_malformed"),
            Error::Signature(Signature::Wrong) => (403, "signature_wrong"),
            Error::Signature(Signature::TooOld) => (403, "signature_too_old"),
            Error::Signature(Signature::ClockAhead) => (403, "signature_clock_ahead"),
            Error::Path(_) => (404, "unknown_path"),
            Error::Method(..) => (405, "bad_method"),
            Error::Undecided => (409, "once_undecided"),
            Error::Expired => (409, "once_expired"),
            Error::Differs => (409, "once_differs"),
            Error::TooLarge { .. } => (413, "too_large"),
            Error::Parameters => (431, "headers_too_large"),
            Error::Crowded => (503, "crowded"),
            Error::Setting(..) => (500, "bad_setting"),
            Error::Busy => (503, "busy"),
            Error::OutcomeUnknown(_) => (503, "outcome_unknown"),
            Error::Store(StoreError::Unreachable(_)) => (503, "memcached_unreachable"),
            Error::Store(StoreError::Timeout(_) | StoreError::Late(_)) => (503, "memcached_timeout"),
            Error::Store(StoreError::TooOld(_)) => (503, "memcached_too_old"),
            Error::Store(StoreError::Full(_)) => (503, "memcached_full"),
            Error::Store(StoreError::Broken(_)) => (503, "memcached_broken"),
        }
    }

    /// The cause, for the operator; it may name what a client has no business knowing.
    pub fn cause(&self) -> String {
        match self {
            Error::Store(error) => error.to_string(),
            Error::OutcomeUnknown(cause) => cause.clone(),
            Error::Setting(_, value, _) => format!("{self} (it is '{value}')"),
            Error::Origin(origin) => format!("{self} (Origin: {origin})"),
            Error::Path(path) => format!("{self} (PATH_INFO: {path})"),
            Error::Method(method, _) => format!("{self} (REQUEST_METHOD: {method})"),
            other => other.to_string(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Parameter(name, wrong) => {
                let right = match *name {
                    "once" => "1 to 64 characters of A-Z a-z 0-9 - _",
                    "wait" => "a whole number of seconds",
                    "stream" => "0 or 1",
                    _ => "a whole number from 0 to 2^53-1",
                };
                write!(f, "The query parameter '{name}' {wrong}; give it one time, as {right}.")
            }
            Error::Signature(Signature::Missing(name)) => {
                write!(f, "This bus is signed: join it for a secret, and publish with once, time and sig; '{name}' is missing.")
            }
            Error::Signature(Signature::Malformed(name)) => {
                let right = match *name {
                    "sig" => "43 characters of base64url, without padding",
                    _ => "the Unix time in milliseconds",
                };
                write!(f, "The query parameter '{name}' has to be given one time, as {right}.")
            }
            Error::Signature(Signature::Wrong) => {
                f.write_str(
                    "The signature is not this user's over this message: the bus's name, user, time and once, each with a \
                     line feed behind it, and the body's bytes. Where the bus lost its key with memcached, join again.",
                )
            }
            Error::Signature(Signature::TooOld) => {
                f.write_str(
                    "The signature's time, in milliseconds, is too long ago; sign again, and check this device's clock.",
                )
            }
            Error::Signature(Signature::ClockAhead) => {
                f.write_str("The signature's time is too far in the future; check this device's clock.")
            }
            Error::Undecided => {
                f.write_str("A message of this user with this 'once' is just being published; ask again in a moment.")
            }
            Error::Expired => f.write_str(
                "This 'once' is older than the bus remembers its messages: it was published or not; do not send it again.",
            ),
            Error::Differs => f.write_str(
                "This user has published another message with this 'once'; take a new one for a new message.",
            ),
            Error::Length => f.write_str("Content-Length is not a number."),
            Error::Incomplete { read } => {
                write!(f, "The body ended after {read} bytes, before its Content-Length; send it again.")
            }
            Error::NotUtf8 { at } => write!(f, "The body is not UTF-8, as JSON has to be (byte {at})."),
            Error::NotJson(why) => write!(f, "The body has to be one JSON value: {why}. A text needs its quotes."),
            Error::TooDeep => write!(f, "The body nests deeper than {} levels.", crate::limits::DEPTH_MAX),
            Error::Origin(_) => f.write_str(
                "Pages of this origin may not use this bus; to allow them, name the origin in SHORTBUS_ALLOW_ORIGIN.",
            ),
            Error::Path(_) => f.write_str("There is nothing at this path; the bus is the URL that ends with its name."),
            Error::Method(_, allowed) => write!(f, "Use one of {allowed}: GET joins, polls and fetches, POST publishes."),
            Error::TooLarge { limit } => {
                write!(f, "The body is longer than the {limit} bytes this bus takes; SHORTBUS_MAX_BYTES sets that.")
            }
            Error::Parameters => f.write_str("The request's headers are longer than 64 KB in all."),
            Error::Crowded => f.write_str("The bus has all the connections it can serve; try again later."),
            Error::Setting(name, _, allowed) => write!(f, "{name} cannot be used as it is; it has to be {allowed}."),
            Error::Busy => f.write_str("Too many are publishing at this moment; nothing was published, send it again."),
            Error::Store(StoreError::TooOld(_)) => f.write_str("The bus needs memcached 1.6.10 or later."),
            Error::Store(StoreError::Full(_)) => {
                f.write_str("memcached is out of memory; nothing was published, try again later.")
            }
            Error::Store(_) => f.write_str("The bus cannot use its memcached at the moment; try again later."),
            Error::OutcomeUnknown(_) => f.write_str(
                "memcached failed or was late while publishing: the message may have been published or not; poll to find out.",
            ),
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Unreachable(cause) => write!(f, "cannot reach memcached: {cause}"),
            StoreError::Timeout(cause) => write!(f, "memcached does not answer in time: {cause}"),
            StoreError::Late(cause) => write!(f, "no time left to ask memcached: {cause}"),
            StoreError::TooOld(cause) => write!(f, "memcached is older than 1.6.10, no meta commands: {cause}"),
            StoreError::Full(cause) => write!(f, "memcached will not store the message: {cause}"),
            StoreError::Broken(cause) => write!(f, "memcached does not answer as memcached: {cause}"),
        }
    }
}
