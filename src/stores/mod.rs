//! Where messages live: which store a bus lives in, and the clock and chance that every store needs.

pub mod decision;
pub mod local;
pub mod memcached;
pub mod pooled;
pub mod watches;

use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::TryRng;
use rand::rngs::SysRng;

use crate::bus::name;
use crate::bus::store::{Op, Reply, Store, StoreError};
use crate::config::{Config, StoreSetting};
use crate::hash;
use crate::limits;
use decision::Decision;
use local::folder::Folder;
use local::{Local, Sleep, WholeProcess};
use memcached::blocking::Memcached;

/// A bus in either of the stores; `M` is the driver of memcached.
pub enum Either<M, S> {
    /// In memcached.
    Memcached(M),
    /// In a file of this host.
    Local(Local<S>),
}

/// What a CGI process uses.
pub type Blocking = Either<Memcached, WholeProcess>;

/// Opens the store of a bus, and decides where it lives if nobody has.
///
/// # Errors
/// Those of the decision, and of connecting to memcached.
pub fn open(config: &Config) -> Result<Blocking, StoreError> {
    let bus = &config.bus[..];
    let local = |folder| Either::Local(Local::new(folder, bus, config.store_bytes, WholeProcess));
    let memcached = |servers: &[String]| Memcached::connect(servers, bus).map(Either::Memcached);
    match &config.store {
        StoreSetting::Memcached(servers) => memcached(servers),
        StoreSetting::Folder(folder) => Ok(local(Folder::named(folder))),
        StoreSetting::Unset => {
            let servers = [decision::MEMCACHED.to_owned()];
            let ask = async || Memcached::connect(&servers, bus)?.run(&[Op::Last]).await.map(drop);
            match block_on(decision::decision(bus, ask))? {
                Decision::Memcached => memcached(&servers),
                Decision::Local => Ok(local(Folder::own())),
            }
        }
    }
}

impl<M, S: Sleep> Either<M, S> {
    /// Where its file is, if it lives in one.
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Either::Memcached(_) => None,
            Either::Local(local) => Some(local.path()),
        }
    }
}

impl<M: Store, S: Sleep> Store for Either<M, S> {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError> {
        match self {
            Either::Memcached(store) => store.run(batch).await,
            Either::Local(store) => store.run(batch).await,
        }
    }

    fn ahead(&self) -> u64 {
        match self {
            Either::Memcached(store) => store.ahead(),
            Either::Local(store) => store.ahead(),
        }
    }

    async fn pause(&mut self, longest: Duration) {
        match self {
            Either::Memcached(store) => store.pause(longest).await,
            Either::Local(store) => store.pause(longest).await,
        }
    }

    fn now(&self) -> Duration {
        match self {
            Either::Memcached(store) => store.now(),
            Either::Local(store) => store.now(),
        }
    }

    fn unix_micros(&self) -> u64 {
        unix_micros()
    }
}

/// A bus's name as keys and files have it, at most [`limits::NAME_MAX`] bytes. No two names share one. A longer one is
/// cut and hashed.
fn short_name(bus: &[u8]) -> String {
    let mut name = name::encode(bus);
    if name.len() > limits::NAME_MAX {
        // '*' stands in no encoded name, so a cut name is never another bus's whole one.
        name.truncate(limits::NAME_MAX - 33);
        name.push_str(&format!("*{:032x}", hash::fnv1a_128(bus)));
    }
    name
}

/// The user that this process runs as. The kernel tells it every process at its start: no system call is needed.
fn effective_user() -> u32 {
    // SAFETY: it reads a value that is there for as long as the process.
    unsafe { libc::getauxval(libc::AT_EUID) as u32 }
}

/// A random time between half of `longest` and `longest`.
pub fn random_pause(longest: Duration) -> Duration {
    let random = SysRng.try_next_u32().unwrap_or_default();
    longest / 2 + longest.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0)
}

/// Microseconds since 1970.
fn unix_micros() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros() as u64)
}

/// Runs a future that never waits: every operation of a blocking store is ready at once.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("a blocking store is always ready"),
    }
}
