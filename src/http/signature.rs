//! Signed buses: who publishes is who it says, also where the web server knows no users.
//!
//! A join gives a user its secret, which proves by HMAC-SHA-256 (RFC 2104, FIPS 180-4) that the bus gave it out:
//!
//! ```text
//! secret = base64url(HMAC-SHA-256(signing key, USER))
//! sig    = base64url(HMAC-SHA-256(secret, BUS "\n" USER "\n" TIME "\n" ONCE "\n" BATCH BODY))
//! ```
//!
//! USER and TIME are decimal digits, TIME the Unix time in milliseconds; BUS is the bus's name, percent-encoded, as
//! the join gives it; ONCE is the query parameter; BATCH is `"batch=1\n"` for a batch, else nothing; BODY is the
//! request's body, byte for byte. base64url (RFC 4648 section 5) goes without padding: 43 characters. The secret is a key
//! as those characters, so that a shell can use it. No two requests share such a text: of the parts before BATCH none
//! holds a line feed, and no JSON begins as BATCH does.

use base64ct::{Base64UrlUnpadded, Encoding};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::bus::name;
use crate::variables::whole_number;

/// What is wrong with a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// This query parameter is missing.
    Missing(&'static str),
    /// This query parameter has the wrong form.
    Malformed(&'static str),
    /// It is not by this user's secret, over this request.
    Wrong,
    /// Its time is further back than the TTL.
    TooOld,
    /// Its time is further ahead than the TTL.
    ClockAhead,
}

/// Bytes of an HMAC-SHA-256.
const SIZE: usize = 32;

/// The secret of a user.
pub fn secret(signing_key: &[u8], user: u64) -> String {
    let mac = mac(signing_key, &[user.to_string().as_bytes()]).finalize().into_bytes();
    Base64UrlUnpadded::encode_string(&mac)
}

/// A signed publish, its form checked but not yet whether it is true.
pub struct Signed<'a> {
    user: u64,
    once: &'a str,
    batch: &'static str,
    body: &'a [u8],
    time: u64,
    sig: [u8; SIZE],
}

impl<'a> Signed<'a> {
    /// Reads the query parameters `time` and `sig`.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Malformed`].
    pub fn read(
        user: u64,
        once: Option<&'a str>,
        time: Option<&str>,
        sig: Option<&str>,
        is_batch: bool,
        body: &'a [u8],
    ) -> Result<Signed<'a>, Error> {
        let once = once.ok_or(Error::Missing("once"))?;
        let time = time.ok_or(Error::Missing("time"))?;
        let sig = sig.ok_or(Error::Missing("sig"))?;
        let time = whole_number(time.as_bytes()).ok_or(Error::Malformed("time"))?;
        let batch = if is_batch { "batch=1\n" } else { "" };
        let mut bytes = [0; SIZE];
        match Base64UrlUnpadded::decode(sig.as_bytes(), &mut bytes) {
            Ok(whole) if whole.len() == SIZE => Ok(Signed { user, once, batch, body, time, sig: bytes }),
            _ => Err(Error::Malformed("sig")),
        }
    }

    /// Whether it is by this user's secret, and its time within `window` seconds of `now`, in Unix milliseconds.
    /// A client without a secret learns nothing of the time.
    ///
    /// # Errors
    /// [`Error::Wrong`], also where the bus has no key: nobody has a secret then. [`Error::TooOld`],
    /// [`Error::ClockAhead`].
    pub fn check(&self, signing_key: Option<&[u8]>, bus: &[u8], now: u64, window: u32) -> Result<(), Error> {
        let secret = secret(signing_key.ok_or(Error::Wrong)?, self.user);
        let head = format!("{}\n{}\n{}\n{}\n{}", name::encode(bus), self.user, self.time, self.once, self.batch);
        // In constant time.
        let verified = mac(secret.as_bytes(), &[head.as_bytes(), self.body]).verify_slice(&self.sig);
        verified.map_err(|_| Error::Wrong)?;
        let window = u64::from(window) * 1_000;
        match self.time {
            time if time.saturating_add(window) < now => Err(Error::TooOld),
            time if time > now + window => Err(Error::ClockAhead),
            _ => Ok(()),
        }
    }
}

fn mac(key: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    parts.iter().for_each(|part| mac.update(part));
    mac
}
