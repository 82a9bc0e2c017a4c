//! Publishing: a claim of the next slot, at most once for an idempotency key.

use std::time::Duration;

use super::store::{Counter, Op, Reply, Store, StoreError};
use super::{Error, read_last, slot, steady};
use crate::limits;

/// What makes several requests one send.
#[derive(Clone, Copy, Debug)]
pub struct IdempotencyKey<'a> {
    /// The user's id, a colon, the user's name for the send.
    pub name: &'a str,
    /// Random. What is stored for the first of the requests bears it, and what is stored for the others too.
    pub token: u64,
    /// Seconds for which the key is remembered, more than the TTL.
    pub ttl: u32,
}

/// Publishes `data`, a checked JSON value, as `user`, for `ttl` seconds: its id once it is stored and visible to
/// every poll. Two round trips unless others publish at the same moment.
///
/// With an idempotency key at most one message is published within the TTL, however many requests bear it: the others
/// get the first one's id. The key has a record, a list of the ids that were tried for it, and an id is in the record
/// before its slot is stored. A publisher reads `last`, then the record. If none of the listed slots up to `last` is of
/// this send, none was published up to `last`; and after it there is but one slot that a publisher who knew no more
/// could still store, the one it tries itself. Being the first request, or dying half-way, decides nothing.
///
/// A repeat cannot tell a slot that was stored too late from another. It takes a coincidence: a publisher that died
/// inside its one write, so that its slot was stored and `last` not moved; a bus on which then nobody published until
/// that slot was about to expire; and another's write under way, of a send that is repeated later, while it expires.
///
/// # Errors
/// [`Error::Busy`]: nothing was published. [`Error::Store`]: nothing was published.
/// [`Error::OutcomeUnknown`]: it may have been. [`Error::OnceUndecided`], [`Error::OnceExpired`],
/// [`Error::OnceDiffers`]: not by this request.
pub async fn publish(
    store: &mut impl Store,
    user: u64,
    data: &[u8],
    ttl: u32,
    key: Option<IdempotencyKey<'_>>,
) -> Result<u64, Error> {
    let stale = limits::STALE.min(Duration::from_secs(ttl.into()));
    let mut record = key.map(IdempotencyRecord::new);
    let mut known: Option<(Duration, Counter)> = None;
    for attempt in 1..=limits::TRIES {
        if attempt > 2 {
            // What was known before the pause is old by now.
            store.pause(limits::BACK_OFF * attempt).await;
            known = None;
        }
        let last = match known {
            Some((read_at, last)) if store.now() - read_at < stale => last,
            _ => {
                let read_at = store.now();
                let last = read_last(store, record.as_mut()).await?;
                if store.now() - read_at >= stale {
                    continue;
                }
                last
            }
        };
        if let Some(record) = &mut record
            && let Some(id) = record.find_published(store, user, data, ttl, last.value).await?
        {
            return Ok(id);
        }
        let sender = slot::Sender { user, token: record.as_ref().map(|record| record.token) };
        let sent_at = store.now();
        match claim(store, last, &slot::join(&sender, data), ttl, record.as_mut()).await? {
            Claim::Published(id) => return Ok(id),
            Claim::Taken(counter) => known = counter.map(|counter| (sent_at, counter)),
        }
    }
    Err(Error::Busy)
}

/// What came of one claim.
enum Claim {
    /// The message is published under this id.
    Published(u64),
    /// Another publisher was first. `last` as read behind the claim, where that is known.
    Taken(Option<Counter>),
}

/// Claims the slot behind `last`, in one write.
async fn claim(
    store: &mut impl Store,
    last: Counter,
    value: &[u8],
    ttl: u32,
    mut record: Option<&mut IdempotencyRecord<'_>>,
) -> Result<Claim, Error> {
    let id = last.value + 1;
    // Add before advance: `last` must never name a slot that is not there. A publisher that finds the slot taken
    // advances for its owner, who may have died. memcached's clock ticks once a second: an item lives up to one
    // second less than it was given.
    let add = Op::Add { id, value, ttl: (ttl + 1).min(limits::TTL_MAX) };
    let mut batch = vec![Op::Last, add, Op::Advance(last.cas), Op::Last, Op::Last];
    if let Some(record) = &record {
        // The id goes into the record before the message goes into the slot.
        batch.insert(0, Op::AppendRecord(record.key.name, id));
        batch.push(Op::Record(record.key.name));
    }
    let mut replies = store.run(&batch).await.map_err(|error| match error {
        _ if error.is_refusal() => Error::Store(error),
        // With a record it may be the record that was refused, and not the message.
        StoreError::Full(_) if record.is_none() => Error::Store(error),
        _ => Error::OutcomeUnknown(error.to_string()),
    })?;
    if let Some(record) = &mut record {
        record.update(replies.pop());
        record.passed += usize::from(replies.remove(0) == Reply::Stored);
    }
    Ok(match &replies[..] {
        [_, Reply::Stored, Reply::Stored, ..] => Claim::Published(id),
        // Another publisher moved `last`: over our message, if `last` had not moved before the message was stored.
        [Reply::Counter(before), Reply::Stored, Reply::Taken, ..] if before.cas == last.cas => Claim::Published(id),
        // `last` had moved before: polls have passed this slot, and what it held has expired since. Some will not see ours.
        [_, Reply::Stored, Reply::Taken, ..] => {
            return Err(Error::OutcomeUnknown(format!("slot {id} was published before, and has expired since")));
        }
        [_, Reply::Taken, _, twice @ ..] => Claim::Taken(steady(twice)),
        // The counter was lost meanwhile: no poll will ever look at this slot.
        _ => Claim::Taken(None),
    })
}

/// What is known of the record of an idempotency key.
pub struct IdempotencyRecord<'a> {
    pub(super) key: IdempotencyKey<'a>,
    /// The first request's.
    token: u64,
    /// This request was the first.
    pub(super) is_first: bool,
    /// The ids tried for the key, by all requests.
    ids: Vec<u64>,
    /// How many of `ids` are not this send's: tried here in vain, or looked at.
    passed: usize,
    /// Seconds since the first request, by memcached's clock.
    age: u32,
}

impl<'a> IdempotencyRecord<'a> {
    fn new(key: IdempotencyKey<'a>) -> Self {
        IdempotencyRecord { key, token: key.token, is_first: false, ids: vec![], passed: 0, age: 0 }
    }

    /// Goes by the record as memcached has it; nothing changes where it expired just now, or was evicted.
    pub(super) fn update(&mut self, reply: Option<Reply>) {
        let Some(Reply::Record(text, left)) = reply else {
            return;
        };
        let text = String::from_utf8_lossy(&text);
        let mut numbers = text.split(' ').map_while(|number| number.parse().ok());
        let token = numbers.next().unwrap_or(self.token);
        if token != self.token {
            // Another record than before: that one has expired.
            self.passed = 0;
        }
        self.token = token;
        self.ids = numbers.collect();
        self.age = self.key.ttl.saturating_sub(left);
    }

    /// The id under which the send was published, as far as `last` and a record read after it can tell.
    async fn find_published(
        &mut self,
        store: &mut impl Store,
        user: u64,
        data: &[u8],
        ttl: u32,
        last: u64,
    ) -> Result<Option<u64>, Error> {
        if self.is_first && self.ids.len() <= self.passed && self.age <= ttl {
            return Ok(None);
        }
        if self.ids.len() > self.passed {
            let ids: Vec<u64> = self.ids.iter().copied().filter(|&id| id <= last).collect();
            // The record again after them: its age tells whether a slot of this send would still have been there.
            let slots = ids.iter().copied().map(Op::Get).chain([Op::Record(self.key.name)]);
            let mut replies = store.run(&slots.collect::<Vec<_>>()).await?;
            let Some(Reply::Record(_, left)) = replies.pop() else {
                return Err(Error::OnceUndecided);
            };
            self.age = self.key.ttl.saturating_sub(left);
            let sender = slot::Sender { user, token: Some(self.token) };
            for (id, reply) in ids.iter().zip(&replies) {
                if let Reply::Value(value) = reply
                    && let Some((found, start)) = slot::split(value)
                    && found == sender
                {
                    return match value[start..] == *data {
                        // A publisher that slept may have stored it after the slot had expired, when polls were past it.
                        _ if self.age > ttl => Err(Error::OnceExpired),
                        true => Ok(Some(*id)),
                        false => Err(Error::OnceDiffers),
                    };
                }
            }
            self.passed = ids.len();
        }
        match self.age {
            age if age > ttl => Err(Error::OnceExpired),
            age if !self.is_first && age < limits::ONCE_LEASE => Err(Error::OnceUndecided),
            _ => Ok(None),
        }
    }
}
