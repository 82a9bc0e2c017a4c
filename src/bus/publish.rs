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

/// What one request publishes: its messages get into one slot together.
#[derive(Clone, Debug)]
pub struct Publish<'a> {
    /// The sender.
    pub user: u64,
    /// Checked JSON values, at least one, and at most [`limits::SLOT_MESSAGES`].
    pub messages: Vec<&'a [u8]>,
    /// What makes several requests this one.
    pub key: Option<IdempotencyKey<'a>>,
}

/// `last` as a claim left it, and the [`Store::now`] before that claim was sent.
pub type Known = Option<(Duration, Counter)>;

/// Publishes what one request asks for, for `ttl` seconds: the messages' ids, once they are stored and visible to every
/// poll. Two round trips unless others publish at the same moment. Large messages that the store does not take use up no ids.
///
/// # Errors
/// Those of [`publish_group`].
pub async fn publish(store: &mut impl Store, publish: Publish<'_>, ttl: u32) -> Result<Vec<u64>, Error> {
    publish_group(store, vec![publish], ttl, &mut None).await.pop().expect("an answer each")
}

/// Publishes what several requests ask for, all in one slot, for `ttl` seconds: an answer each, in their order. They are
/// at most [`limits::SLOT_MESSAGES`] messages in all, and fit an item of the store. Two round trips unless others publish
/// at the same moment; one where `known` is still fresh and no request has an idempotency key.
///
/// With an idempotency key at most one request's messages are published within the TTL, however many requests bear it:
/// the others get the first one's ids. The key has a record, a list of the slots that were tried for it, and a slot is in
/// the record before it is stored. A publisher reads `last`, then the record. If none of the listed slots up to `last` is
/// of this send, none was published up to `last`; and after it there is but one slot that a publisher who knew no more
/// could still store, the one it tries itself. Being the first request, or dying half-way, decides nothing.
///
/// A repeat cannot tell a slot that was stored too late from another. It takes a coincidence: a publisher that died
/// inside its one write, so that its slot was stored and `last` not moved; a bus on which then nobody published until
/// that slot was about to expire; and another publisher that has read `last` before and writes when it has expired, for a
/// send that is repeated later.
///
/// # Errors
/// [`Error::Busy`]: nothing was published. [`Error::Store`]: nothing was published.
/// [`Error::OutcomeUnknown`]: it may have been, and so may the whole group. [`Error::OnceUndecided`],
/// [`Error::OnceExpired`], [`Error::OnceDiffers`]: not by this request.
pub async fn publish_group(
    store: &mut impl Store,
    group: Vec<Publish<'_>>,
    ttl: u32,
    known: &mut Known,
) -> Vec<Result<Vec<u64>, Error>> {
    let mut group: Vec<Pending> = group.into_iter().map(Pending::new).collect();
    if let Err(error) = publish_pending(store, &mut group, ttl, known).await {
        for pending in group.iter_mut().filter(|pending| pending.answer.is_none()) {
            pending.answer = Some(Err(error.clone()));
        }
    }
    group.into_iter().filter_map(|pending| pending.answer).collect()
}

/// Answers all of a group, or returns why the rest of it cannot be.
async fn publish_pending(
    store: &mut impl Store,
    group: &mut [Pending<'_>],
    ttl: u32,
    known: &mut Known,
) -> Result<(), Error> {
    let stale = limits::STALE.min(Duration::from_secs(ttl.into()));
    if group.iter().any(|pending| pending.record.is_some()) {
        // What a record is compared with is read in the same write.
        *known = None;
    }
    let bytes: usize = group.iter().flat_map(|pending| &pending.publish.messages).map(|message| message.len()).sum();
    let mut trial = (bytes > limits::TRIAL_BYTES).then(|| {
        let messages = group.iter().flat_map(|pending| &pending.publish.messages).copied();
        messages.flat_map(|message| [&[b' '; limits::TRIAL_EXTRA], message].concat()).collect::<Vec<u8>>()
    });
    if trial.is_some() {
        *known = None;
    }
    for attempt in 1..=limits::TRIES {
        if attempt > 2 {
            // What was known before the pause is old by now.
            store.pause(limits::BACK_OFF * attempt).await;
            *known = None;
        }
        let last = match known.take() {
            Some((read_at, last)) if store.now().saturating_sub(read_at) < stale => last,
            _ => {
                let read_at = store.now();
                let last = read_last(store, records(group), trial.take()).await?;
                if store.now() - read_at >= stale {
                    continue;
                }
                last
            }
        };
        for pending in group.iter_mut().filter(|pending| pending.answer.is_none()) {
            pending.answer = pending.find_published(store, ttl, last.value).await.transpose();
        }
        if group.iter().all(|pending| pending.answer.is_some()) {
            return Ok(());
        }
        let sent_at = store.now();
        let (is_published, counter) = claim(store, last, group, ttl).await?;
        *known = counter.map(|counter| (sent_at, counter));
        if is_published {
            return Ok(());
        }
    }
    Err(Error::Busy)
}

/// One request of a group.
struct Pending<'a> {
    publish: Publish<'a>,
    record: Option<IdempotencyRecord<'a>>,
    answer: Option<Result<Vec<u64>, Error>>,
}

impl<'a> Pending<'a> {
    fn new(publish: Publish<'a>) -> Self {
        Pending { record: publish.key.map(IdempotencyRecord::new), publish, answer: None }
    }

    fn sender(&self) -> slot::Sender {
        slot::Sender { user: self.publish.user, token: self.record.as_ref().map(|record| record.token) }
    }

    async fn find_published(&mut self, store: &mut impl Store, ttl: u32, last: u64) -> Result<Option<Vec<u64>>, Error> {
        match &mut self.record {
            Some(record) => record.find_published(store, &self.publish, ttl, last).await,
            None => Ok(None),
        }
    }
}

/// The records of those requests of a group that are not answered yet.
fn records<'g, 'a>(group: &'g mut [Pending<'a>]) -> Vec<&'g mut IdempotencyRecord<'a>> {
    group.iter_mut().filter(|pending| pending.answer.is_none()).filter_map(|pending| pending.record.as_mut()).collect()
}

/// Claims the slot behind `last`, in one write, for all that are not answered yet: whether it is theirs, and they are
/// answered. And `last` as read behind the claim, where that is known.
async fn claim(
    store: &mut impl Store,
    last: Counter,
    group: &mut [Pending<'_>],
    ttl: u32,
) -> Result<(bool, Option<Counter>), Error> {
    let slot = last.value + 1;
    let pending = || group.iter().filter(|pending| pending.answer.is_none());
    let messages: Vec<(slot::Sender, &[u8])> = pending()
        .flat_map(|pending| pending.publish.messages.iter().map(|&message| (pending.sender(), message)))
        .collect();
    let (value, count) = (slot::join(&messages), messages.len());
    // A slot goes into the records before the messages go into the slot.
    let keys: Vec<&str> = pending().filter_map(|pending| Some(pending.record.as_ref()?.key.name)).collect();
    let mut batch: Vec<Op> = keys.iter().map(|key| Op::AppendRecord(key, slot)).collect();
    // Add before advance: `last` must never name a slot that is not there. A publisher that finds the slot taken
    // advances for its owner, who may have died. memcached's clock ticks once a second: an item lives up to one
    // second less than it was given.
    let add = Op::Add { slot, value: &value, ttl: (ttl + 1).min(limits::TTL_MAX) };
    batch.extend([Op::Last, add, Op::Advance(last.cas), Op::Last, Op::Last]);
    batch.extend(keys.iter().map(|key| Op::Record(key)));
    let mut replies = store.run(&batch).await.map_err(|error| match error {
        _ if error.is_refusal() => Error::Store(error),
        // With a record it may be the record that was refused, and not the messages.
        StoreError::Full(_) | StoreError::ItemLimit(_) if keys.is_empty() => Error::Store(error),
        _ => Error::OutcomeUnknown(error.to_string()),
    })?;
    let keys = keys.len();
    let read = replies.split_off(keys + 5);
    for ((record, appended), read) in records(group).into_iter().zip(replies.drain(..keys)).zip(read) {
        record.update(read);
        record.passed += usize::from(appended == Reply::Stored);
    }
    let counter = steady(&replies[3..]);
    match &replies[..] {
        [_, Reply::Stored, Reply::Stored, ..] => {}
        // Another publisher moved `last`: over our slot, if `last` had not moved before the slot was stored.
        [Reply::Counter(before), Reply::Stored, Reply::Taken, ..] if before.cas == last.cas => {}
        // `last` had moved before: polls have passed this slot, and what it held has expired since. Some will not see ours.
        [_, Reply::Stored, Reply::Taken, ..] => {
            return Err(Error::OutcomeUnknown(format!("slot {slot} was published before, and has expired since")));
        }
        [_, Reply::Taken, ..] => return Ok((false, counter)),
        // The counter was lost meanwhile: no poll will ever look at this slot.
        _ => return Ok((false, None)),
    }
    let mut ids = slot::ids(slot, count);
    for pending in group.iter_mut().filter(|pending| pending.answer.is_none()) {
        pending.answer = Some(Ok(ids.by_ref().take(pending.publish.messages.len()).collect()));
    }
    Ok((true, counter))
}

/// What is known of the record of an idempotency key.
pub struct IdempotencyRecord<'a> {
    pub(super) key: IdempotencyKey<'a>,
    /// The first request's.
    token: u64,
    /// This request was the first.
    pub(super) is_first: bool,
    /// The slots tried for the key, by all requests.
    slots: Vec<u64>,
    /// How many of `slots` are not this send's: tried here in vain, or looked at.
    passed: usize,
    /// Seconds since the first request, by memcached's clock.
    age: u32,
}

impl<'a> IdempotencyRecord<'a> {
    fn new(key: IdempotencyKey<'a>) -> Self {
        IdempotencyRecord { key, token: key.token, is_first: false, slots: vec![], passed: 0, age: 0 }
    }

    /// Goes by the record as memcached has it; nothing changes where it expired just now, or was evicted.
    pub(super) fn update(&mut self, reply: Reply) {
        let Reply::Record(text, left) = reply else {
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
        self.slots = numbers.collect();
        self.age = self.key.ttl.saturating_sub(left);
    }

    /// The ids under which the send was published, as far as `last` and a record read after it can tell.
    async fn find_published(
        &mut self,
        store: &mut impl Store,
        publish: &Publish<'_>,
        ttl: u32,
        last: u64,
    ) -> Result<Option<Vec<u64>>, Error> {
        if self.is_first && self.slots.len() <= self.passed && self.age <= ttl {
            return Ok(None);
        }
        if self.slots.len() > self.passed {
            let slots: Vec<u64> = self.slots.iter().copied().filter(|&slot| slot <= last).collect();
            // The record again after them: its age tells whether a slot of this send would still have been there.
            let batch = slots.iter().copied().map(Op::Get).chain([Op::Record(self.key.name)]);
            let mut replies = store.run(&batch.collect::<Vec<_>>()).await?;
            let Some(Reply::Record(_, left)) = replies.pop() else {
                return Err(Error::OnceUndecided);
            };
            self.age = self.key.ttl.saturating_sub(left);
            let sender = slot::Sender { user: publish.user, token: Some(self.token) };
            for (slot, reply) in slots.iter().zip(&replies) {
                let Reply::Value(value) = reply else {
                    continue;
                };
                let parts = slot::split(value).unwrap_or_default();
                let ids = slot::ids(*slot, parts.len()).zip(&parts);
                let ours: Vec<(u64, &[u8])> = ids
                    .filter(|(_, (found, _))| *found == sender)
                    .map(|(id, (_, range))| (id, &value[range.clone()]))
                    .collect();
                if !ours.is_empty() {
                    return match ours.iter().map(|(_, message)| *message).eq(publish.messages.iter().copied()) {
                        // A publisher that slept may have stored it after the slot had expired, when polls were past it.
                        _ if self.age > ttl => Err(Error::OnceExpired),
                        true => Ok(Some(ours.into_iter().map(|(id, _)| id).collect())),
                        false => Err(Error::OnceDiffers),
                    };
                }
            }
            self.passed = slots.len();
        }
        match self.age {
            age if age > ttl => Err(Error::OnceExpired),
            age if !self.is_first && age < limits::ONCE_LEASE => Err(Error::OnceUndecided),
            _ => Ok(None),
        }
    }
}
