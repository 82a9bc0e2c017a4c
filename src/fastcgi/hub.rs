//! Those who wait for messages in this process, and one watcher for each bus that somebody waits for.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::task::spawn_local;
use tokio::time::timeout;

use crate::bus::{self, Page};
use crate::fastcgi::snapshot::{View, Window, look};
use crate::http::error::Error;
use crate::limits;
use crate::stores::memcached::pipelined::{Pipelined, Pool};

/// The buses of this process that somebody waits for.
pub struct Hubs {
    pool: Rc<Pool>,
    hubs: RefCell<HashMap<Vec<u8>, Rc<Hub>>>,
    /// The watchers ask together, so that they share round trips.
    started: Instant,
}

struct Hub {
    key: Vec<u8>,
    server: String,
    bus: Vec<u8>,
    window: RefCell<Window>,
    changed: watch::Sender<()>,
    /// Something was published in this process.
    published: Notify,
}

impl Hubs {
    /// None yet.
    pub fn new(pool: Rc<Pool>) -> Hubs {
        Hubs { pool, hubs: RefCell::default(), started: Instant::now() }
    }

    /// Waits for the messages after `after` of a bus in this memcached, but those of `except`.
    pub fn wait(self: &Rc<Hubs>, server: &str, bus: &[u8], after: u64, except: Option<u64>) -> Waiter {
        let key = key(server, bus);
        let mut hubs = self.hubs.borrow_mut();
        let hub = hubs.entry(key).or_insert_with_key(|key| {
            let hub = Rc::new(Hub {
                key: key.clone(),
                server: server.into(),
                bus: bus.into(),
                window: RefCell::default(),
                changed: watch::Sender::default(),
                published: Notify::new(),
            });
            spawn_local(self.clone().watch(hub.clone()));
            hub
        });
        Waiter {
            pool: self.pool.clone(),
            changed: hub.changed.subscribe(),
            hub: hub.clone(),
            after,
            except,
            turns: None,
        }
    }

    /// Tells the watcher of the bus with this [`key`], if there is one, that something was published.
    pub fn published(&self, key: &[u8]) {
        if let Some(hub) = self.hubs.borrow().get(key) {
            hub.published.notify_one();
        }
    }

    /// Makes all who wait look up.
    pub fn wake(&self) {
        self.hubs.borrow().values().for_each(|hub| hub.changed.send_replace(()));
    }

    /// Asks memcached for as long as somebody waits.
    async fn watch(self: Rc<Hubs>, hub: Rc<Hub>) {
        let mut failures = 0;
        while hub.changed.receiver_count() > 0 {
            let found = look(&mut hub.store(&self.pool), &hub.window).await;
            failures = if found.is_ok() { 0 } else { failures + 1 };
            if found.is_ok_and(|news| hub.window.borrow_mut().take(news)) {
                hub.changed.send_replace(());
            }
            let pause = limits::WATCH_INTERVAL * (1 << failures.min(7));
            let _ = timeout(pause - self.phase(pause), hub.published.notified()).await;
        }
        self.hubs.borrow_mut().remove(&hub.key);
    }

    /// How much of an interval is over.
    fn phase(&self, interval: Duration) -> Duration {
        Duration::from_micros((self.started.elapsed().as_micros() % interval.as_micros()) as u64)
    }
}

/// A bus's place, whatever the bytes of its name.
pub fn key(server: &str, bus: &[u8]) -> Vec<u8> {
    [server.as_bytes(), b" ", bus].concat()
}

impl Hub {
    fn store(&self, pool: &Rc<Pool>) -> Pipelined {
        pool.open(std::slice::from_ref(&self.server), &self.bus)
    }
}

/// One who waits.
pub struct Waiter {
    pool: Rc<Pool>,
    hub: Rc<Hub>,
    changed: watch::Receiver<()>,
    after: u64,
    except: Option<u64>,
    /// [`Window::turns`] when memcached itself was asked.
    turns: Option<u64>,
}

impl Waiter {
    /// The cursor.
    pub fn after(&self) -> u64 {
        self.after
    }

    /// Returns when there may be something new.
    pub async fn changed(&mut self) {
        // The sender lives in the hub, and the hub as long as its waiters.
        let _ = self.changed.changed().await;
    }

    /// What is new, if anything may be. Asks memcached the first time: something may have come since the cursor was
    /// read and before this one waited.
    ///
    /// # Errors
    /// As [`bus::poll`]. The cursor stays, and memcached is asked again the next time.
    pub async fn poll(&mut self) -> Result<Option<Page>, Error> {
        self.changed.mark_unchanged();
        let (last, turns) = (self.hub.window.borrow().last(), self.hub.window.borrow().turns());
        if self.turns == Some(turns) && last.is_none_or(|last| last <= self.after) {
            return Ok(None);
        }
        let (hub, after, except) = (&self.hub, self.after, self.except);
        let mut store = hub.store(&self.pool);
        let page = match self.turns.replace(turns) == Some(turns) {
            true => bus::poll(&mut View { window: &hub.window, store }, after, except).await,
            false => bus::poll(&mut store, after, except).await,
        };
        match &page {
            Ok(page) => self.after = page.last_id,
            Err(_) => self.turns = None,
        }
        page.map(Some)
    }
}
