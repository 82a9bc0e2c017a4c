//! The subscribers of this process, and one watcher for each bus that has some.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::{Notify, watch};
use tokio::task::{spawn_local, yield_now};
use tokio::time::sleep;

use super::snapshot::{CachedStore, Snapshot, refresh};
use crate::bus::name::Place;
use crate::bus::{self, Page};
use crate::limits;
use crate::stores::pooled::{Address, Stores};
use crate::stores::watches::Followed;

/// The buses of this process that have subscribers.
pub struct Hubs {
    stores: Stores,
    hubs: RefCell<HashMap<Place, Rc<Hub>>>,
    /// The watchers ask together, so that they share round trips.
    started: Instant,
}

struct Hub {
    place: Place,
    address: Address,
    snapshot: RefCell<Snapshot>,
    /// Each wakes [`limits::WOKEN`] subscribers at most.
    wakers: RefCell<Vec<Rc<watch::Sender<()>>>>,
    /// Something was published in this process.
    published: Notify,
}

impl Hubs {
    /// None yet.
    pub fn new(stores: Stores) -> Hubs {
        Hubs { stores, hubs: RefCell::default(), started: Instant::now() }
    }

    /// Waits for the messages after `after` of the bus at this address, but those of `except`.
    pub fn subscribe(self: &Rc<Hubs>, address: Address, after: u64, except: Option<u64>) -> Subscriber {
        let mut hubs = self.hubs.borrow_mut();
        let hub = hubs.entry(address.place()).or_insert_with_key(|place| {
            let hub = Rc::new(Hub {
                place: place.clone(),
                address,
                snapshot: RefCell::default(),
                wakers: RefCell::default(),
                published: Notify::new(),
            });
            spawn_local(self.clone().watch(hub.clone()));
            hub
        });
        Subscriber {
            stores: self.stores.clone(),
            changed: hub.subscribe(),
            hub: hub.clone(),
            after,
            except,
            epoch: None,
        }
    }

    /// Tells the watcher of this bus, if there is one, that something was published.
    pub fn published(&self, place: &Place) {
        if let Some(hub) = self.hubs.borrow().get(place) {
            hub.published.notify_one();
        }
    }

    /// Wakes all subscribers.
    pub fn wake(&self) {
        for hub in self.hubs.borrow().values() {
            hub.wakers.borrow().iter().for_each(|waker| waker.send_replace(()));
        }
    }

    /// Asks the store for as long as there are subscribers: when it tells of a change, or now and then where it does not.
    async fn watch(self: Rc<Hubs>, hub: Rc<Hub>) {
        let mut failures = 0;
        while hub.has_subscribers() {
            let mut store = self.stores.open(hub.address.clone());
            // Before the look: what is published behind it is told.
            let mut followed = store.follow().await;
            let update = refresh(&mut store, &hub.snapshot).await;
            failures = if update.is_ok() { 0 } else { failures + 1 };
            if update.is_ok_and(|update| hub.snapshot.borrow_mut().apply(update)) {
                hub.wake().await;
            }
            let pause = limits::WATCH_INTERVAL * (1 << failures.min(7));
            let at_once = failures == 0 && followed.is_some();
            select! {
                () = hub.published.notified() => {}
                () = changed(&mut followed), if at_once => {}
                () = hub.left(), if at_once => {}
                () = sleep(pause - self.phase(pause)), if !at_once => {}
            }
        }
        self.hubs.borrow_mut().remove(&hub.place);
    }

    /// How much of an interval is over.
    fn phase(&self, interval: Duration) -> Duration {
        Duration::from_micros((self.started.elapsed().as_micros() % interval.as_micros()) as u64)
    }
}

impl Hub {
    fn subscribe(&self) -> watch::Receiver<()> {
        let mut wakers = self.wakers.borrow_mut();
        match wakers.iter().find(|waker| waker.receiver_count() < limits::WOKEN) {
            Some(waker) => waker.subscribe(),
            None => {
                let (sender, receiver) = watch::channel(());
                wakers.push(Rc::new(sender));
                receiver
            }
        }
    }

    /// Wakes all subscribers, so many at a time: who publishes meanwhile need not wait until thousands have written.
    async fn wake(&self) {
        let wakers = self.wakers.borrow().clone();
        for (number, waker) in wakers.iter().enumerate() {
            if number > 0 {
                yield_now().await;
            }
            waker.send_replace(());
        }
    }

    fn has_subscribers(&self) -> bool {
        self.wakers.borrow().iter().any(|waker| waker.receiver_count() > 0)
    }

    /// Returns when no subscriber is left.
    async fn left(&self) {
        let wakers = self.wakers.borrow().clone();
        for waker in wakers {
            waker.closed().await;
        }
    }
}

/// Waits for a change of what is followed.
async fn changed(followed: &mut Option<Followed>) {
    if let Some(followed) = followed {
        followed.changed().await;
    }
}

/// A request that waits for a bus's messages.
pub struct Subscriber {
    stores: Stores,
    hub: Rc<Hub>,
    changed: watch::Receiver<()>,
    after: u64,
    except: Option<u64>,
    /// [`Snapshot::epoch`] when the store itself was asked.
    epoch: Option<u64>,
}

impl Subscriber {
    /// Returns when there may be something new.
    pub async fn changed(&mut self) {
        // The sender lives in the hub, and the hub as long as its subscribers.
        let _ = self.changed.changed().await;
    }

    /// What is new, if anything may be. Asks the store itself the first time: something may have come since the cursor
    /// was read and before this one subscribed.
    ///
    /// # Errors
    /// As [`bus::poll`]. The cursor stays, and the store itself is asked again the next time.
    pub async fn poll(&mut self) -> Result<Option<Page>, bus::Error> {
        self.changed.mark_unchanged();
        let (last, epoch) = (self.hub.snapshot.borrow().last(), self.hub.snapshot.borrow().epoch());
        if self.epoch == Some(epoch) && last.is_none_or(|last| bus::last_id(last) <= self.after) {
            return Ok(None);
        }
        let (hub, after, except) = (&self.hub, self.after, self.except);
        let mut store = self.stores.open(hub.address.clone());
        let page = match self.epoch.replace(epoch) == Some(epoch) {
            true => bus::poll(&mut CachedStore { snapshot: &hub.snapshot, store }, after, except).await,
            false => bus::poll(&mut store, after, except).await,
        };
        match &page {
            Ok(page) => self.after = page.last_id,
            Err(_) => self.epoch = None,
        }
        page.map(Some)
    }
}
