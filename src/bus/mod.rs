//! The delivery protocol: how a message gets its id and how a poll finds what is new.
//!
//! Per bus there are a counter `last`, without TTL, and slots with the TTL, each written once with one message or several
//! ([`slot`]). Slots are claimed at the tail, and `last` names a slot only after it is stored; so a reader that reads
//! `last` first never meets a message in flight. While the store neither evicts nor restarts, a message that was
//! acknowledged reaches every client that polls within its TTL, exactly once, and all clients see the same order.
//!
//! Two things are assumed of a store: it runs the operations of one write one after the other, and no slot expires between
//! two operations of one write. memcached's clock ticks once a second and a write takes microseconds, so the second fails
//! only if a tick falls into a write for the very slot that expires at it, and even then it takes two more publishers: one
//! that died before it advanced `last`, and one that advances `last` over its slot in that moment. The simulation shows how.
//! No clock is trusted for the promise otherwise: a publisher that slept, or finds a slot that a dead one left behind long
//! ago, acknowledges only what all polls will see. `tests/simulation.rs` checks the promise, and that each rule is needed.

mod check;
pub mod error;
pub mod name;
mod poll;
mod publish;
mod slot;
pub mod store;

pub use check::check;
pub use error::Error;
pub use poll::{Message, Page, poll};
pub use publish::{IdempotencyKey, Known, Publish, publish, publish_group};

use crate::limits;
use publish::IdempotencyRecord;
use store::{Counter, Op, Reply, Store, StoreError};

/// The id of the newest message, for a client that wants what comes after it. One round trip, two on a new bus.
///
/// Creates the counter where there is none, so that the first poll can tell "nothing was missed".
///
/// # Errors
/// [`Error::Store`].
pub async fn join(store: &mut impl Store) -> Result<u64, Error> {
    Ok(slot::last_id(read_last(store, vec![], None).await?.value))
}

/// The id of the last message in a slot: for the newest slot, that of the newest message.
pub use slot::last_id;

/// The signing key that the store keeps for a bus: the first of all that were offered, as `fresh` is here. `None`
/// where there is none yet.
///
/// # Errors
/// [`Error::Store`].
pub async fn signing_key(store: &mut impl Store, fresh: Option<&[u8]>) -> Result<Option<Vec<u8>>, Error> {
    let mut batch = vec![Op::SigningKey];
    batch.splice(..0, fresh.map(Op::CreateSigningKey));
    Ok(match store.run(&batch).await?.pop() {
        Some(Reply::Value(key)) => Some(key),
        _ => None,
    })
}

/// Reads `last`, and creates it first where there is none. In the same write it creates the records before that, and
/// reads them behind it: no slot that `last` does not name yet is older than the records then. And in the first write it
/// tries whether the store takes `trial`.
async fn read_last(
    store: &mut impl Store,
    mut records: Vec<&mut IdempotencyRecord<'_>>,
    mut trial: Option<Vec<u8>>,
) -> Result<Counter, StoreError> {
    for _ in 0..limits::TRIES {
        let keys: Vec<IdempotencyKey> = records.iter().map(|record| record.key).collect();
        let trial = trial.take();
        let mut batch: Vec<Op> = trial.iter().flat_map(|value| [Op::Trial(value), Op::EndTrial]).collect();
        batch.extend(keys.iter().map(|&IdempotencyKey { name, token, ttl }| Op::CreateRecord {
            key: name,
            token,
            ttl,
        }));
        batch.extend([Op::Last, Op::Last]);
        batch.extend(keys.iter().map(|key| Op::Record(key.name)));
        let mut replies = store.run(&batch).await?;
        if trial.is_some() {
            replies.drain(..2);
        }
        let read = replies.split_off(keys.len() + 2);
        for ((record, created), read) in records.iter_mut().zip(replies.drain(..keys.len())).zip(read) {
            record.update(read);
            record.is_first |= created == Reply::Stored;
        }
        if let Some(counter) = steady(&replies) {
            return Ok(counter);
        }
        if replies[1] == Reply::Missing {
            // The time, so that ids go on rising when memcached restarts and every client's cursor stays good.
            let start = store.unix_micros() / limits::SLOT_MESSAGES;
            store.run(&[Op::Create(start)]).await?;
        }
    }
    Err(StoreError::Broken("the counter is never the same twice".into()))
}

/// `last`, where two reads of it, one right after the other, agree.
///
/// A single read may be torn: memcached's incr, while another connection reads the item, writes its new token onto the
/// old value (`do_add_delta`: "Overwrite the older item's CAS"). With such a token a publisher would advance `last`
/// past a slot that nobody has claimed.
fn steady(replies: &[Reply]) -> Option<Counter> {
    match replies {
        [Reply::Counter(first), Reply::Counter(second)] if first == second => Some(*first),
        _ => None,
    }
}
