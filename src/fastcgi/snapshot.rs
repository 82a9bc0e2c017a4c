//! What is new on a bus, asked for once however many wait for it.
//!
//! One watcher [`look`]s now and then, and puts what it found into a [`Window`]: the newest messages, as memcached had
//! them. Whoever waits polls through a [`View`], which answers from the window what it holds and asks memcached the
//! rest; the protocol stays [`crate::bus::poll`]'s. A view's `last` is older than memcached's by as long as the watcher
//! paused, and every slot up to it was read after it, so it is what a poll of that moment would have found.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::Duration;

use crate::bus::store::{Counter, Op, Reply, Store, StoreError};
use crate::limits;

/// The newest messages of a bus.
#[derive(Debug, Default)]
pub struct Window {
    last: Option<u64>,
    /// The slots up to `last`.
    slots: VecDeque<Reply>,
    /// Bytes of their values.
    bytes: usize,
    turns: u64,
}

/// What a look found.
#[derive(Debug)]
pub struct News {
    last: Option<u64>,
    /// The slots up to `last` that the window lacks, unless they are too many.
    slots: Vec<Reply>,
}

/// Looks what is new behind `window`. One round trip where nothing is, two where little is.
///
/// # Errors
/// As [`Store::run`].
pub async fn look(store: &mut impl Store, window: &RefCell<Window>) -> Result<News, StoreError> {
    let known = window.borrow().last;
    let last = match store.run(&[Op::Last]).await?.first() {
        Some(Reply::Counter(counter)) => Some(counter.value),
        _ => None,
    };
    let mut slots = vec![];
    if let (Some(known), Some(last)) = (known, last) {
        // Backwards, as many as a window holds.
        let (mut from, mut bytes) = (last + 1, 0);
        while from > known + 1 && bytes <= limits::SHARED_BYTES && (slots.len() as u64) < limits::BATCH {
            let to = from;
            from = from.saturating_sub(limits::WINDOW).max(known + 1);
            let part = store.run(&(from..to).map(Op::Get).collect::<Vec<_>>()).await?;
            bytes += part.iter().map(size).sum::<usize>();
            slots.splice(..0, part);
        }
    }
    Ok(News { last, slots })
}

impl Window {
    /// Takes what a look behind this window found; whether it changes anything for those who wait.
    pub fn take(&mut self, news: News) -> bool {
        if news.last == self.last && self.turns > 0 {
            return false;
        }
        match (self.last, news.last) {
            (Some(known), Some(last)) if known < last => {
                if news.slots.len() as u64 != last - known {
                    self.slots.clear();
                    self.bytes = 0;
                }
            }
            // The first look; or the counter was lost, or came back lower.
            _ => *self = Window { turns: self.turns + 1, ..Window::default() },
        }
        self.last = news.last;
        self.bytes += news.slots.iter().map(size).sum::<usize>();
        self.slots.extend(news.slots);
        while self.bytes > limits::SHARED_BYTES || self.slots.len() as u64 > limits::BATCH {
            self.bytes -= self.slots.pop_front().as_ref().map_or(0, size);
        }
        true
    }

    /// Id of the newest message; none where it is not known, or there is no counter.
    pub fn last(&self) -> Option<u64> {
        self.last
    }

    /// How often `last` did not simply go on. A cursor of before is to be checked with memcached itself.
    pub fn turns(&self) -> u64 {
        self.turns
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

/// A bus as of the watcher's latest look: for polls from a cursor below [`Window::last`], and nothing else.
pub struct View<'a, S> {
    /// What the watcher found.
    pub window: &'a RefCell<Window>,
    /// For what the window does not hold.
    pub store: S,
}

impl<S: Store> Store for View<'_, S> {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError> {
        let answer = self.window.borrow().answer(batch);
        match answer {
            Some(replies) => Ok(replies),
            None => self.store.run(batch).await,
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
