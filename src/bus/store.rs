//! What the delivery protocol asks of a store, memcached or a file of this host, and nothing more.
//!
//! The stores are [`crate::stores`], and the model under a seeded scheduler in the simulation. [`crate::fastcgi::snapshot`]
//! answers from memory what it can.

use std::fmt;
use std::time::Duration;

/// One operation on a bus's keys: the counter `last`, and numbered slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op<'a> {
    /// Read `last` with its CAS token: [`Reply::Counter`] or [`Reply::Missing`]. Where it is written at the same
    /// moment, memcached may answer with the old value and the new token.
    Last,
    /// Create `last` with this value unless it exists; it never expires: [`Reply::Stored`] or [`Reply::Taken`].
    Create(u64),
    /// Increment `last` by one if its CAS token is still this one: [`Reply::Stored`], [`Reply::Taken`] if not,
    /// [`Reply::Missing`].
    Advance(u64),
    /// Write a slot that does not exist yet: [`Reply::Stored`] or [`Reply::Taken`].
    Add {
        /// Its number.
        slot: u64,
        /// The sender, a space, the message.
        value: &'a [u8],
        /// Seconds, as the store counts them.
        ttl: u32,
    },
    /// Store a value under a key of its own, for no longer than a second: [`Reply::Stored`], or an error where a slot would not
    /// be stored either.
    Trial(&'a [u8]),
    /// Drop what [`Op::Trial`] stored: [`Reply::Stored`].
    EndTrial,
    /// Read a slot: [`Reply::Value`] or [`Reply::Missing`].
    Get(u64),
    /// Whether a slot lives, without its value: [`Reply::Stored`] or [`Reply::Missing`].
    Probe(u64),
    /// Write an idempotency record, unless there is one: [`Reply::Stored`] or [`Reply::Taken`].
    CreateRecord {
        /// The idempotency key: the user's id, a colon, the user's name for the send.
        key: &'a str,
        /// What the record begins with.
        token: u64,
        /// Seconds, as the store counts them.
        ttl: u32,
    },
    /// Append a space and a slot's number to a record: [`Reply::Stored`] or [`Reply::Taken`], where there is none.
    AppendRecord(&'a str, u64),
    /// Read a record: [`Reply::Record`] or [`Reply::Missing`].
    Record(&'a str),
    /// Read the signing key: [`Reply::Value`] or [`Reply::Missing`].
    SigningKey,
    /// Write the signing key, which never expires, unless there is one: [`Reply::Stored`] or [`Reply::Taken`].
    CreateSigningKey(&'a [u8]),
}

/// The answer to one [`Op`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `last` and its CAS token.
    Counter(Counter),
    /// A slot's value, or the signing key.
    Value(Vec<u8>),
    /// A record, and for how many seconds, as the store counts them, it lives still.
    Record(Vec<u8>, u32),
    /// Done, or there.
    Stored,
    /// Not done: another was first.
    Taken,
    /// No such key.
    Missing,
}

/// `last` as read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    /// Number of the newest slot; at most [`crate::limits::MAX_SLOT`].
    pub value: u64,
    /// Changes with every write of the key.
    pub cas: u64,
}

/// Why a store could not be used. Whether a write was carried out is unknown, but with `Full`, `ItemLimit` and where
/// [`StoreError::is_refusal`] says so: it was not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// Nothing listens, or the name does not resolve.
    Unreachable(String),
    /// No answer within [`crate::limits::STORE_DEADLINE`].
    Timeout(String),
    /// The time was over before anything was sent.
    Late(String),
    /// It does not know the meta commands of 1.6.10.
    TooOld(String),
    /// It has all the connections that it may have.
    Crowded(String),
    /// It wants a password.
    Password(String),
    /// It gives no CAS tokens.
    NoCas(String),
    /// It would not store the value: it is out of memory.
    Full(String),
    /// It would not store the value: it takes no item as large as this.
    ItemLimit(String),
    /// It closed the connection in the middle, or answered something else than memcached would.
    Broken(String),
    /// Nothing listens there, or the system lets this process connect to nothing.
    Refused(String),

    /// The local store's disk has no room; nothing was done.
    StoreFull(String),
    /// The local store's folder or file may not be used, by its owner, mode or type, or is missing; nothing was done.
    StoreDenied(String),
    /// The local store's file cannot be read or written, or is of a later version.
    StoreBroken(String),
    /// Another process had the local store's lock for all of the request's time; nothing was done.
    StoreBusy(String),
    /// The bus lives nowhere: it has no setting, and no folder of its own could be made; nothing was done.
    NoPlace(String),
}

impl StoreError {
    /// Whether nothing was done, for certain, whatever the batch was.
    pub fn is_refusal(&self) -> bool {
        use StoreError::{Late, NoPlace, Refused, StoreBusy, StoreDenied, StoreFull};
        matches!(self, Late(_) | Refused(_) | StoreFull(_) | StoreDenied(_) | StoreBusy(_) | NoPlace(_))
    }
}

impl fmt::Display for StoreError {
    /// For the operator.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Unreachable(cause) => {
                write!(f, "cannot reach memcached; is it running, and where SHORTBUS_MEMCACHED says? {cause}")
            }
            StoreError::Timeout(cause) => {
                write!(f, "memcached does not answer in time; is it stopped, overloaded or behind a firewall? {cause}")
            }
            StoreError::Late(cause) => write!(f, "no time left to ask memcached: {cause}"),
            StoreError::TooOld(cause) => {
                write!(f, "memcached has no meta commands; run 1.6.10 or later, or set SHORTBUS_STORE: {cause}")
            }
            StoreError::Crowded(cause) => {
                write!(f, "memcached has all the connections it may have; give it more with -c: {cause}")
            }
            StoreError::Password(cause) => {
                write!(f, "memcached wants a password, and the bus gives none; start it without -Y: {cause}")
            }
            StoreError::NoCas(server) => write!(
                f,
                "memcached has no CAS, and publishers would overwrite each other's messages; start it without -C: {server}"
            ),
            StoreError::Full(cause) => write!(f, "memcached is out of memory; give it more with -m: {cause}"),
            StoreError::ItemLimit(cause) => write!(
                f,
                "memcached takes no item as large as this; start it with a larger -I or lower SHORTBUS_MAX_BYTES: {cause}"
            ),
            StoreError::Broken(cause) => write!(f, "memcached does not answer as memcached: {cause}"),
            StoreError::Refused(cause) => write!(f, "cannot reach memcached: {cause}"),

            StoreError::StoreFull(cause) => write!(f, "no room in the local store: {cause}"),
            StoreError::StoreDenied(cause) => write!(f, "the local store may not be used: {cause}"),
            StoreError::StoreBroken(cause) => write!(f, "the local store cannot be used: {cause}"),
            StoreError::StoreBusy(cause) => write!(f, "the local store is busy: {cause}"),
            StoreError::NoPlace(cause) => write!(f, "no folder for the local store: {cause}"),
        }
    }
}

/// A bus's keys in its store.
#[allow(async_fn_in_trait, reason = "each driver is used by name, on one thread")]
pub trait Store {
    /// Carries out the operations in this order, sent in one write on one connection: one reply each, or an
    /// error, after which nothing is known of any of them.
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError>;

    /// Waits for the room that a poll's messages take, where many polls share it; it is given back with the store.
    async fn take_room(&mut self) {}

    /// How many slots a poll reads along with `last`, in case they hold something new. Worth it where the next round
    /// trip costs more than the reading.
    fn ahead(&self) -> u64 {
        crate::limits::WINDOW
    }

    /// Waits for a random time between half of `longest` and `longest`.
    async fn pause(&mut self, longest: Duration);

    /// Time from any fixed moment, never going back.
    fn now(&self) -> Duration;

    /// Microseconds since 1970, where a new counter starts.
    fn unix_micros(&self) -> u64;
}
