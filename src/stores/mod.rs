//! Where messages live, and the clock and chance that every store needs.

pub mod memcached;

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::TryRng;
use rand::rngs::SysRng;

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
