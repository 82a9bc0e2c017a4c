//! Those who publish on one bus in this process take turns: they would only refuse each other's claims, again and again,
//! and wait longer each time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::timeout;

use crate::limits;

/// The buses that somebody publishes on just now.
#[derive(Default)]
pub struct Turns {
    buses: RefCell<HashMap<Vec<u8>, Arc<Mutex<()>>>>,
}

/// One's turn, until it is dropped.
pub struct Turn {
    turns: Rc<Turns>,
    bus: Vec<u8>,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Turns {
    /// Waits for one's turn on this bus, but not for long: where memcached is silent, nobody is to wait for others'
    /// time-outs. Whoever comes out of turn is one more publisher, as from another process.
    pub async fn take(self: &Rc<Turns>, bus: Vec<u8>) -> Turn {
        let lock = self.buses.borrow_mut().entry(bus.clone()).or_default().clone();
        let mut turn = Turn { turns: self.clone(), bus, guard: None };
        turn.guard = timeout(limits::TURN, lock.lock_owned()).await.ok();
        turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.guard = None;
        let mut buses = self.turns.buses.borrow_mut();
        // Held by the map alone: the last one has left.
        if buses.get(&self.bus).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            buses.remove(&self.bus);
        }
    }
}
