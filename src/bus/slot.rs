//! What a slot holds: the messages of one write, and how they are numbered.
//!
//! A slot with one message is its sender, as `USER` or `USER.TOKEN`, a space and the message's own bytes. With several it
//! is all of them one after the other, each with the length of its bytes: `USER:LENGTH` or `USER.TOKEN:LENGTH`, a space,
//! the bytes. A slot is written once and read whole: its messages are published together, in their order, or not at all.
//!
//! Ids have room for [`limits::SLOT_MESSAGES`] messages in each slot. The last message of a slot has the highest of its
//! ids: so a cursor tells whether it stands inside a slot, and what follows there is read or known to be missed.

use std::fmt;
use std::ops::Range;

use crate::limits;
use crate::variables::whole_number;

/// The id of the last message in a slot.
pub fn last_id(slot: u64) -> u64 {
    slot * limits::SLOT_MESSAGES + limits::SLOT_MESSAGES - 1
}

/// The ids of a slot's messages, `count` of them.
pub fn ids(slot: u64, count: usize) -> impl Iterator<Item = u64> {
    let first = slot * limits::SLOT_MESSAGES;
    (first..).take(count.saturating_sub(1)).chain([last_id(slot)])
}

/// The slot that holds what follows a cursor.
pub fn after(cursor: u64) -> u64 {
    (cursor + 1) / limits::SLOT_MESSAGES
}

/// The sender of a message: the user, and the token of its idempotency record where it has one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Sender {
    /// The user's id.
    pub user: u64,
    /// [`super::IdempotencyKey::token`].
    pub token: Option<u64>,
}

impl fmt::Display for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.user)?;
        self.token.map_or(Ok(()), |token| write!(f, ".{token}"))
    }
}

/// A slot's value.
pub fn join(messages: &[(Sender, &[u8])]) -> Vec<u8> {
    if let [(sender, data)] = messages {
        return [sender.to_string().as_bytes(), b" ", data].concat();
    }
    let mut value = Vec::new();
    for (sender, data) in messages {
        value.extend_from_slice(format!("{sender}:{} ", data.len()).as_bytes());
        value.extend_from_slice(data);
    }
    value
}

/// The senders in a slot's value, and where their messages are in it; none where no shortbus wrote it.
pub fn split(value: &[u8]) -> Option<Vec<(Sender, Range<usize>)>> {
    let mut messages = Vec::with_capacity(1);
    let mut at = 0;
    loop {
        let start = at + value[at..].iter().position(|&byte| byte == b' ')? + 1;
        let head = &value[at..start - 1];
        let (sender, length) = match head.iter().position(|&byte| byte == b':') {
            Some(colon) => (&head[..colon], Some(whole_number(&head[colon + 1..])?)),
            None => (head, None),
        };
        at = match length {
            Some(length) => start.checked_add(usize::try_from(length).ok()?).filter(|&end| end <= value.len())?,
            None if messages.is_empty() => value.len(),
            None => return None,
        };
        messages.push((split_sender(sender)?, start..at));
        if at == value.len() {
            return (messages.len() as u64 <= limits::SLOT_MESSAGES).then_some(messages);
        }
    }
}

fn split_sender(text: &[u8]) -> Option<Sender> {
    Some(match text.iter().position(|&byte| byte == b'.') {
        Some(dot) => Sender { user: whole_number(&text[..dot])?, token: Some(whole_number(&text[dot + 1..])?) },
        None => Sender { user: whole_number(text)?, token: None },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_joined_is_split() {
        let [one, two] = [None, Some(7)].map(|token| Sender { user: 5, token });
        let lists: [&[(Sender, &[u8])]; 4] =
            [&[(one, b"[1, 2]")], &[(two, b"")], &[(one, b"\" \""), (two, b"5:3 x")], &[(two, b""), (two, b"")]];
        for list in lists {
            let value = join(list);
            let again = split(&value).unwrap();
            assert_eq!(again.len(), list.len());
            for ((sender, data), (found, range)) in list.iter().zip(again) {
                assert!(found == *sender && value[range] == **data);
            }
        }
        for wrong in ["", "5", "x 1", "5.x 1", "5:9 1", "5:1 1x", "5:1 12 3", "5:18446744073709551615 1", "5:1 16 2"] {
            assert!(split(wrong.as_bytes()).is_none(), "{wrong}");
        }
    }

    #[test]
    fn a_cursor_tells_what_follows_it() {
        assert_eq!(ids(3, 1).collect::<Vec<_>>(), [1023]);
        assert_eq!(ids(3, 3).collect::<Vec<_>>(), [768, 769, 1023]);
        assert_eq!(ids(3, 256).last(), Some(last_id(3)));
        assert_eq!([767, 768, 1022, 1023].map(after), [3, 3, 3, 4]);
    }
}
