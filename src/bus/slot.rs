//! What a slot's value looks like: its sender, as `USER` or `USER.TOKEN`, a space and the message's own bytes.

use std::fmt;

use crate::variables::whole_number;

/// The sender of a message: the user, and the token of its idempotency record where it has one.
#[derive(PartialEq, Eq)]
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
pub fn join(sender: &Sender, data: &[u8]) -> Vec<u8> {
    [sender.to_string().as_bytes(), b" ", data].concat()
}

/// The sender in a slot's value, and where the message begins in it.
pub fn split(value: &[u8]) -> Option<(Sender, usize)> {
    let space = value.iter().position(|&byte| byte == b' ')?;
    let (user, token) = match value[..space].iter().position(|&byte| byte == b'.') {
        Some(dot) => (&value[..dot], Some(whole_number(&value[dot + 1..space])?)),
        None => (&value[..space], None),
    };
    Some((Sender { user: whole_number(user)?, token }, space + 1))
}
