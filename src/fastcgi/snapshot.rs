//! The newest messages of a bus, read once however many subscribers wait for them.
//!
//! One watcher [`refresh`]es a [`Snapshot`] now and then: the newest messages, as the store had them. A subscriber polls
//! through a [`CachedStore`], which answers from the snapshot what it holds and asks the store for the rest; the protocol
//! stays [`crate::bus::poll`]'s. A snapshot's `last` is older than the store's by as long as the watcher paused, and every
//! slot up to it was read after it, so it is what a poll of that moment would have found.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::Duration;

use crate::bus::store::{Counter, Op, Reply, Store, StoreError};
use crate::limits;

/// The newest messages of a bus.
#[derive(Debug, Default)]
pub struct Snapshot {
    last: Option<u64>,
    /// The slots up to `last`.
    slots: VecDeque<Reply>,
    /// Bytes of their values.
    bytes: usize,
    epoch: u64,
}

/// What a refresh found.
#[derive(Debug)]
pub struct Update {
    last: Option<u64>,
    /// The slots up to `last` that the snapshot lacks, unless they are too many.
    slots: Vec<Reply>,
}

/// Reads what is new behind `snapshot`. One round trip where nothing is, two where little is.
///
/// # Errors
/// As [`Store::run`].
pub async fn refresh(store: &mut impl Store, snapshot: &RefCell<Snapshot>) -> Result<Update, StoreError> {
    let known = snapshot.borrow().last;
    let last = match store.run(&[Op::Last]).await?.first() {
        Some(Reply::Counter(counter)) => Some(counter.value),
        _ => None,
    };
    let mut slots = vec![];
    if let (Some(known), Some(last)) = (known, last) {
        // Backwards, as many as a snapshot holds.
        let (mut from, mut bytes) = (last + 1, 0);
        while from > known + 1 && bytes <= limits::SHARED_BYTES && (slots.len() as u64) < limits::BATCH {
            let to = from;
            from = from.saturating_sub(limits::WINDOW).max(known + 1);
            let part = store.run(&(from..to).map(Op::Get).collect::<Vec<_>>()).await?;
            bytes += part.iter().map(size).sum::<usize>();
            slots.splice(..0, part);
        }
    }
    Ok(Update { last, slots })
}

impl Snapshot {
    /// Appends what a refresh of this snapshot found; whether it changes anything for the subscribers.
    pub fn apply(&mut self, update: Update) -> bool {
        if update.last == self.last && self.epoch > 0 {
            return false;
        }
        match (self.last, update.last) {
            (Some(known), Some(last)) if known < last => {
                if update.slots.len() as u64 != last - known {
                    self.slots.clear();
                    self.bytes = 0;
                }
            }
            // The first refresh; or the counter was lost, or came back lower.
            _ => *self = Snapshot { epoch: self.epoch + 1, ..Snapshot::default() },
        }
        self.last = update.last;
        self.bytes += update.slots.iter().map(size).sum::<usize>();
        self.slots.extend(update.slots);
        while self.bytes > limits::SHARED_BYTES || self.slots.len() as u64 > limits::BATCH {
            self.bytes -= self.slots.pop_front().as_ref().map_or(0, size);
        }
        true
    }

    /// Id of the newest message; none where it is not known, or there is no counter.
    pub fn last(&self) -> Option<u64> {
        self.last
    }

    /// How often `last` did not simply go on. A cursor of an earlier epoch is to be checked with the store itself.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The answer to a batch, if all of it is in here.
    fn answer(&self, batch: &[Op<'_>]) -> Option<Vec<Reply>> {
        let last = self.last?;
        let oldest = last + 1 - self.slots.len() as u64;
        let reply = |op: &Op| match op {
            Op::Last => Some(Reply::Counter(Counter { value: last, cas: 0 })),
            Op::Get(id) if *id > last => Some(Reply::Missing),
            Op::Get(id) => self.slots.get(id.checked_sub(oldest)? as usize).cloned(),
            _ => None,
        };
        batch.iter().map(reply).collect()
    }
}

fn size(slot: &Reply) -> usize {
    match slot {
        Reply::Value(value) => value.len(),
        _ => 0,
    }
}

/// A bus as of the watcher's latest refresh: for polls from a cursor below [`Snapshot::last`], and nothing else.
pub struct CachedStore<'a, S> {
    /// The watcher's snapshot.
    pub snapshot: &'a RefCell<Snapshot>,
    /// For what the snapshot does not hold.
    pub store: S,
}

impl<S: Store> Store for CachedStore<'_, S> {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError> {
        let answer = self.snapshot.borrow().answer(batch);
        match answer {
            Some(replies) => Ok(replies),
            None => {
                self.store.take_room().await;
                self.store.run(batch).await
            }
        }
    }

    fn ahead(&self) -> u64 {
        0
    }

    async fn pause(&mut self, longest: Duration) {
        self.store.pause(longest).await;
    }

    fn now(&self) -> Duration {
        self.store.now()
    }

    fn unix_micros(&self) -> u64 {
        self.store.unix_micros()
    }
}
