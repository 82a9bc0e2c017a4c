//! What the promise assumes of a store, tried: for an operator who asks, on a bus of its own.

use super::store::{Op, Reply, Store, StoreError};
use super::{Error, Publish, poll, publish, read_last, slot};
use crate::limits;

/// Tries a store, as a bus whose messages have up to `bytes` bytes and live for `ttl` seconds needs it.
///
/// # Errors
/// [`Error::Store`], with what the store does wrong; any other, as [`publish`].
pub async fn check(store: &mut impl Store, ttl: u32, bytes: usize) -> Result<(), Error> {
    let message = |data| Publish { user: 1, messages: vec![data], key: None };
    let stale = read_last(store, vec![], None).await?;
    let small = publish(store, message(b"\"test\""), ttl).await?[0];
    read_back(store, small, b"\"test\"").await?;
    let large = vec![b'1'; bytes];
    let id = publish(store, message(&large), ttl).await?[0];
    read_back(store, id, &large).await?;

    // What is written once stays, also where another publisher writes it at the same moment.
    let add = Op::Add { slot: slot::after(small - 1), value: b"1 \"other\"", ttl };
    if store.run(&[add, add]).await? != [Reply::Taken, Reply::Taken] {
        return Err(wrong("it stores what is stored already, where it was asked not to (ms with ME)"));
    }
    // The counter has moved on since this token was read.
    if store.run(&[Op::Advance(stale.cas)]).await? != [Reply::Taken] {
        return Err(wrong("it counts up, though the CAS token is an old one (ma with C)"));
    }
    read_back(store, small, b"\"test\"").await?;

    // An id is a key that no earlier check has used. memcached's clock ticks once a second.
    let (key, ttl) = (format!("1:{id}"), (ttl + 1).min(limits::TTL_MAX));
    let record = Op::CreateRecord { key: &key, token: 1, ttl };
    match store.run(&[record, record, Op::Record(&key)]).await.as_deref() {
        Ok([Reply::Stored, Reply::Taken, Reply::Record(_, left)]) if (ttl - 1..=ttl).contains(left) => Ok(()),
        // Of an item that never expires it tells no number.
        Ok(_) | Err(StoreError::Broken(_)) => Err(wrong("it does not keep an item for as long as it was told (T, t)")),
        Err(error) => Err(error.clone().into()),
    }
}

async fn read_back(store: &mut impl Store, id: u64, data: &[u8]) -> Result<(), Error> {
    let page = poll(store, id - 1, None).await?;
    match page.messages.first() {
        Some(message) if message.id == id && message.data() == data => Ok(()),
        _ => Err(wrong("it does not give back what was stored")),
    }
}

fn wrong(what: &str) -> Error {
    StoreError::Broken(format!("{what}; use memcached itself, 1.6.10 or later")).into()
}
