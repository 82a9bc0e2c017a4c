//! Every error's status, code and sentence: the one table.

use std::borrow::Cow;

use super::{message, signature};
use crate::bus::store::StoreError;
use crate::{bus, config, limits};

/// Why a request was not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// A query parameter, and what is wrong with it.
    BadParameter(&'static str, &'static str),
    /// CONTENT_LENGTH is not a number.
    BadLength,
    /// The body ended before CONTENT_LENGTH, or could not be read.
    Incomplete {
        /// Bytes that came.
        read: usize,
    },
    /// The body is packed, by this encoding.
    ContentEncoding(String),
    /// The body is a number, and nothing says where it ends.
    LengthRequired,
    /// The message is longer than `SHORTBUS_MAX_BYTES`.
    TooLarge {
        /// `SHORTBUS_MAX_BYTES`.
        limit: usize,
    },
    /// The body is not a message.
    Message(message::Error),
    /// A publish on a signed bus is not by the user it names.
    Signature(signature::Error),
    /// A page of another origin published (RFC 6454), or asked in a preflight whether it may.
    ForeignOrigin {
        /// The header that told of the page.
        header: &'static str,
        /// Its value.
        value: String,
        /// The host that the bus was asked as.
        host: String,
    },
    /// A redirect made a GET of a publish.
    Redirected,
    /// PATH_INFO names nothing.
    UnknownPath(String),
    /// A method that is not among those allowed here, which are listed.
    BadMethod(String, &'static str),
    /// FastCGI parameters, the request's headers among them, are longer than [`limits::PARAMETERS_BYTES`].
    HeadersTooLarge,
    /// More connections than a FastCGI process serves.
    Crowded,
    /// A setting cannot be used.
    Setting(config::Error),
    /// The bus did not do it.
    Bus(bus::Error),
}

impl From<message::Error> for Error {
    fn from(error: message::Error) -> Error {
        Error::Message(error)
    }
}

impl From<signature::Error> for Error {
    fn from(error: signature::Error) -> Error {
        Error::Signature(error)
    }
}

impl From<config::Error> for Error {
    fn from(error: config::Error) -> Error {
        Error::Setting(error)
    }
}

impl From<bus::Error> for Error {
    fn from(error: bus::Error) -> Error {
        Error::Bus(error)
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Error {
        Error::Bus(error.into())
    }
}

/// What the client is told of a store that cannot be used.
const STORE: &str =
    "The bus cannot use its memcached at the moment; try again later. The web server's error log says why.";

impl Error {
    /// HTTP status (RFC 9110), the stable code that programs can go by, and the sentence for the client: what to do.
    pub fn row(&self) -> (u16, &'static str, Cow<'static, str>) {
        use bus::Error as Bus;
        use message::Error as Message;
        use signature::Error as Signature;
        match self {
            Error::BadParameter(name, wrong) => (400, "bad_parameter", {
                let right = match *name {
                    "once" => "1 to 64 characters of A-Z a-z 0-9 - _",
                    "wait" => "a whole number of seconds",
                    "stream" | "batch" => "0 or 1",
                    _ => "a whole number from 0 to 2^53-1",
                };
                format!("The query parameter '{name}' {wrong}; give it one time, as {right}.").into()
            }),
            Error::BadLength => (400, "bad_length", "Content-Length is not a number.".into()),
            Error::Incomplete { read } => (
                400,
                "incomplete",
                format!("The body ended after {read} bytes, before its Content-Length; send it again.").into(),
            ),
            Error::ContentEncoding(encoding) => (
                415,
                "content_encoding",
                format!("The body is packed (Content-Encoding: {encoding}); send it as it is, without that header.").into(),
            ),
            Error::LengthRequired => (
                411,
                "length_required",
                "The request has no Content-Length, so that a number may be a part of one; send the length.".into(),
            ),
            Error::TooLarge { limit } => (
                413,
                "too_large",
                format!("The message is longer than the {limit} bytes this bus takes; SHORTBUS_MAX_BYTES sets that.").into(),
            ),
            Error::Message(Message::NotBatch) => (
                400,
                "bad_batch",
                format!(
                    "With batch=1 the body has to be an array of 1 to {} messages; publish more as several.",
                    limits::SLOT_MESSAGES
                )
                .into(),
            ),
            Error::Message(Message::TooLarge { limit }) => Error::TooLarge { limit: *limit }.row(),
            Error::Message(Message::LongBatch) => (
                413,
                "too_large",
                format!("The batch is longer than {} bytes; publish it as several.", limits::BATCH_BYTES).into(),
            ),
            Error::Message(Message::Element(_, wrong)) => Error::Message((**wrong).clone()).row(),
            Error::Message(Message::NotUtf8 { at }) => {
                (400, "not_utf8", format!("The body is not UTF-8, as JSON has to be (byte {at}).").into())
            }
            Error::Message(Message::NotJson { why, is_text }) => (400, "not_json", {
                let quotes = if *is_text { " A text needs its quotes." } else { "" };
                format!("The body has to be one JSON value: {why}.{quotes}").into()
            }),
            Error::Message(Message::ByteOrderMark) => {
                (400, "not_json", "The body begins with a byte order mark, which JSON has not; send it without.".into())
            }
            Error::Message(Message::LongNumber) => (
                400,
                "number_too_long",
                format!("A number in the message has more than {} characters.", limits::NUMBER_MAX).into(),
            ),
            Error::Message(Message::TooDeep) => {
                (400, "too_deep", format!("The message nests deeper than {} levels.", limits::DEPTH_MAX).into())
            }
            Error::Signature(Signature::Missing(name)) => (
                403,
                "signature_missing",
                format!(
                    "This bus is signed: join it for a secret, and publish with once, time and sig; '{name}' is missing."
                )
                .into(),
            ),
            Error::Signature(Signature::Malformed(name)) => (403, "signature_malformed", {
                let right = match *name {
                    "sig" => "43 characters of base64url, without padding",
                    _ => "the Unix time in milliseconds",
                };
                format!("The query parameter '{name}' has to be given one time, as {right}.").into()
            }),
            Error::Signature(Signature::Wrong) => (
                403,
                "signature_wrong",
                "The signature is not this user's over this message: the bus's name, user, time, once and, for a batch, \
                 batch=1, each with a line feed behind it, and the body's bytes. Where the bus lost its key, join again."
                    .into(),
            ),
            Error::Signature(Signature::TooOld) => (
                403,
                "signature_too_old",
                "The signature's time, in milliseconds, is too long ago; sign again, and check this device's clock."
                    .into(),
            ),
            Error::Signature(Signature::ClockAhead) => (
                403,
                "signature_clock_ahead",
                "The signature's time is too far in the future; check this device's clock.".into(),
            ),
            Error::ForeignOrigin { header, value, host } => (403, "foreign_origin", {
                let pages = match (*header, &value[..]) {
                    ("Sec-Fetch-Site", _) | (_, "") => "another site",
                    (_, url) => url,
                };
                let host = if host.is_empty() { "without a Host" } else { host };
                format!(
                    "Pages of {pages} may not use this bus, which was asked as {host}. If that is its own page, a proxy \
                     has to hand Host on as it came, with the port; else name the origin in SHORTBUS_ALLOW_ORIGIN."
                )
                .into()
            }),
            Error::Redirected => (
                400,
                "redirected",
                "A redirect has made a GET of this publish, and its body is lost: send it to the URL that the redirect \
                 leads to. Look at http or https, and at the slash behind the bus's name."
                    .into(),
            ),
            Error::UnknownPath(_) => (
                404,
                "unknown_path",
                "There is nothing at this path; the bus is the URL that ends with its name.".into(),
            ),
            Error::BadMethod(_, allowed) => {
                (405, "bad_method", format!("Use one of {allowed}.").into())
            }
            Error::HeadersTooLarge => {
                (431, "headers_too_large", "The request's headers are longer than 64 KB in all.".into())
            }
            Error::Crowded => {
                (503, "crowded", "The bus has as many requests as it can serve at a time; try again later.".into())
            }
            Error::Setting(config::Error { name, wrong, .. }) => (500, "bad_setting", format!("{name} {wrong}").into()),
            Error::Bus(Bus::OnceUndecided) => (
                409,
                "once_undecided",
                "A message of this user with this 'once' is just being published; ask again in a moment.".into(),
            ),
            Error::Bus(Bus::OnceExpired) => (
                409,
                "once_expired",
                "This 'once' is older than the bus remembers its messages: it was published or not; do not send it again."
                    .into(),
            ),
            Error::Bus(Bus::OnceDiffers) => (
                409,
                "once_differs",
                "This user has published another message with this 'once'; take a new one for a new message.".into(),
            ),
            Error::Bus(Bus::Busy) => (
                503,
                "busy",
                "Too many are publishing at this moment; nothing was published, send it again.".into(),
            ),
            Error::Bus(Bus::OutcomeUnknown(_)) => (
                503,
                "outcome_unknown",
                "The store failed or was late while publishing: the message may have been published or not; poll to \
                 find out."
                    .into(),
            ),
            Error::Bus(Bus::Store(error)) => match error {
                StoreError::Unreachable(_) => (503, "memcached_unreachable", STORE.into()),
                StoreError::Timeout(_) | StoreError::Late(_) => (503, "memcached_timeout", STORE.into()),
                StoreError::TooOld(_) => (
                    503,
                    "memcached_too_old",
                    "The bus needs memcached 1.6.10 or later; or name a folder in SHORTBUS_STORE, and it needs none.".into(),
                ),
                StoreError::Crowded(_) => (
                    503,
                    "memcached_crowded",
                    "memcached has all the connections it may have; try again later, or give it more with -c.".into(),
                ),
                StoreError::Password(_) => (
                    503,
                    "memcached_password",
                    "memcached wants a password, and the bus gives none; start it without -Y.".into(),
                ),
                StoreError::NoCas(_) => (
                    503,
                    "memcached_no_cas",
                    "The bus needs a memcached with CAS; start it without -C.".into(),
                ),
                StoreError::Full(_) => (
                    503,
                    "memcached_full",
                    "memcached is out of memory; nothing was published, try again later.".into(),
                ),
                StoreError::ItemLimit(_) => (
                    413,
                    "memcached_item_limit",
                    "memcached takes no item as large as this; start it with a larger -I or lower SHORTBUS_MAX_BYTES."
                        .into(),
                ),
                StoreError::Broken(_) => (503, "memcached_broken", STORE.into()),
                StoreError::Refused(_) => (503, "memcached_unreachable", STORE.into()),

                StoreError::StoreFull(_) => (
                    503,
                    "store_full",
                    "There is no room where the bus's file is; nothing was published. Make room there, and try again.".into(),
                ),
                StoreError::StoreDenied(_) => (
                    503,
                    "store_denied",
                    "The web server's user may not use the bus's folder or file, or another user made it; nothing was \
                     published. The web server's error log names it: mend its owner and mode, or set SHORTBUS_STORE."
                        .into(),
                ),
                StoreError::StoreBroken(_) => (
                    503,
                    "store_broken",
                    "The bus's file cannot be read or written. The web server's error log says why; with that mended, \
                     try again."
                        .into(),
                ),
                StoreError::StoreBusy(_) => (
                    503,
                    "store_busy",
                    "Another process holds the bus's file and does not go on; nothing was published. Try again later; \
                     if it stays so, look for a stopped process."
                        .into(),
                ),
                StoreError::NoPlace(_) => (
                    500,
                    "bad_setting",
                    "This host has no /dev/shm that the bus may use: set SHORTBUS_STORE to a folder of the web server's \
                     user, or SHORTBUS_MEMCACHED to a memcached."
                        .into(),
                ),
            },
        }
    }

    /// The cause, for the operator; it may name what a client has no business knowing. `sentence` is the client's.
    pub fn cause(&self, sentence: &str) -> String {
        match self {
            Error::Bus(bus::Error::Store(error)) => error.to_string(),
            Error::Bus(bus::Error::OutcomeUnknown(cause)) => cause.clone(),
            Error::Setting(config::Error { value, .. }) => format!("{sentence} (it is {value})"),
            Error::ForeignOrigin { header, value, host } => format!("{sentence} ({header}: {value}, Host: {host})"),
            Error::UnknownPath(path) => format!("{sentence} (PATH_INFO: {path})"),
            Error::BadMethod(method, _) => format!("{sentence} (REQUEST_METHOD: {method})"),
            _ => sentence.into(),
        }
    }
}
