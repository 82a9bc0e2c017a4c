//! What is sent: each message is told by its text, and is acknowledged and heard by an id.

use super::Random;

/// What a message is known by: its publisher, which of its sends it is of, and which of that one's messages.
pub(super) fn key(publisher: u64, send: u64, part: u64) -> u64 {
    publisher << 48 | send << 16 | part
}

pub(super) fn publisher_of(key: u64) -> u64 {
    key >> 48
}

/// The message that has this key, which nobody can mistake for another: a JSON string without escapes, of a length that
/// goes by the key.
pub(super) fn text(key: u64) -> String {
    let mut random = Random(key);
    // Every third publisher sends batches, of small messages.
    let length = match random.below(20) {
        _ if is_batcher(publisher_of(key)) => random.below(100),
        0 => random.below(9_000),
        1..6 => random.below(2_000),
        _ => random.below(100),
    };
    format!("{} {}", name(key), "x".repeat(length as usize))
}

/// How it begins.
pub(super) fn name(key: u64) -> String {
    format!("{}-{}-{}", publisher_of(key), key >> 16 & 0xffff_ffff, key & 0xffff)
}

pub(super) fn key_of(text: &str) -> Option<u64> {
    let mut numbers = text.split(' ').next()?.split('-').map(str::parse);
    let mut number = || numbers.next()?.ok();
    Some(key(number()?, number()?, number()?))
}

/// Of three publishers in a row the first never sends anything again, the second does until it is answered, and so does
/// the third with batches.
pub(super) fn is_batcher(publisher: u64) -> bool {
    publisher % 3 == 2
}

/// A message as one reader heard it: id and key.
pub(super) type Message = (u64, u64);
