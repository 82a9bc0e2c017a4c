//! A lock for each bus: publishers on one bus in this process go one after the other. Without it they would only refuse
//! each other's claims, again and again, and wait longer each time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::timeout;

use crate::bus::name::Place;
use crate::limits;

/// The locks of the buses that somebody publishes on just now.
#[derive(Default)]
pub struct PublishLocks {
    buses: RefCell<HashMap<Place, Arc<Mutex<()>>>>,
}

/// A bus's lock, or at least the wait for it, until it is dropped.
pub struct PublishGuard {
    locks: Rc<PublishLocks>,
    place: Place,
    guard: Option<OwnedMutexGuard<()>>,
}

impl PublishLocks {
    /// Waits for this bus's lock, but not for long: where the store is silent, no publisher waits for others' time-outs.
    /// A publisher that goes on without the lock is one more publisher, as from another process.
    pub async fn acquire(self: &Rc<PublishLocks>, place: Place) -> PublishGuard {
        let lock = self.buses.borrow_mut().entry(place.clone()).or_default().clone();
        let mut guard = PublishGuard { locks: self.clone(), place, guard: None };
        guard.guard = timeout(limits::PUBLISH_LOCK, lock.lock_owned()).await.ok();
        guard
    }
}

impl Drop for PublishGuard {
    fn drop(&mut self) {
        self.guard = None;
        let mut buses = self.locks.buses.borrow_mut();
        // Held by the map alone: the last publisher has left.
        if buses.get(&self.place).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            buses.remove(&self.place);
        }
    }
}
