//! What goes over the wire to memcached and back: keys, commands, responses and what a failure means. No input or output.

use std::io;

use memcache::exp::{Error, MetaCommand, MetaOp, MetaResponse, Rendezvous, ReturnCode, Router};

use crate::bus::store::{Counter, Op, Reply, StoreError};
use crate::limits;
use crate::stores::short_name;
use crate::variables::whole_number;

/// What asks memcached for `op`.
pub fn command(prefix: &str, op: &Op) -> MetaCommand {
    let slot = |number: &u64| format!("{prefix}{number}");
    // A slot's key is a number, a record's has a colon.
    let named = |name: &str| format!("{prefix}{name}");
    // Not "last", which counted messages before 1.0.
    let last = || named("newest");
    match op {
        Op::Last => MetaCommand::new(MetaOp::Get, last()).flag("v").flag("c"),
        Op::Create(start) => MetaCommand::new(MetaOp::Set, last()).flag("ME").value(start.to_string()),
        Op::Advance(cas) => MetaCommand::new(MetaOp::Arithmetic, last()).flag(format!("C{cas}")),
        Op::Add { slot: number, value, ttl } => {
            MetaCommand::new(MetaOp::Set, slot(number)).flag("ME").flag(format!("T{ttl}")).value(*value)
        }
        // No slot, no record, nor any other key of a bus is called so.
        Op::Trial(value) => MetaCommand::new(MetaOp::Set, named("trial")).flag("T1").value(*value),
        Op::EndTrial => MetaCommand::new(MetaOp::Delete, named("trial")),
        Op::Get(id) => MetaCommand::new(MetaOp::Get, slot(id)).flag("v"),
        Op::Probe(id) => MetaCommand::new(MetaOp::Get, slot(id)),
        Op::CreateRecord { key, token, ttl } => {
            MetaCommand::new(MetaOp::Set, named(key)).flag("ME").flag(format!("T{ttl}")).value(token.to_string())
        }
        Op::AppendRecord(key, id) => MetaCommand::new(MetaOp::Set, named(key)).flag("MA").value(format!(" {id}")),
        Op::Record(key) => MetaCommand::new(MetaOp::Get, named(key)).flag("v").flag("t"),
        Op::SigningKey => MetaCommand::new(MetaOp::Get, named("key")).flag("v"),
        Op::CreateSigningKey(key) => MetaCommand::new(MetaOp::Set, named("key")).flag("ME").value(*key),
    }
}

/// A response: return code, CAS token, value.
pub type Parts = (ReturnCode, Option<u64>, Option<Vec<u8>>);

/// The responses to one batch, as they come.
pub struct Responses {
    /// How many are still to come.
    missing: usize,
    result: Result<Vec<Parts>, StoreError>,
}

impl Responses {
    /// Of a batch of so many operations.
    pub fn new(operations: usize) -> Responses {
        Responses { missing: operations, result: Ok(Vec::with_capacity(operations)) }
    }

    /// Whether all have come.
    pub fn are_complete(&self) -> bool {
        self.missing == 0
    }

    /// Takes the next one. An error here is the connection's: nobody knows what is whose after it.
    pub fn push(&mut self, response: Result<Parts, StoreError>) -> Result<(), StoreError> {
        match response {
            Ok(parts) => drop(self.result.as_mut().map(|all| all.push(parts))),
            // memcached refused one operation and goes on with the next.
            Err(error @ (StoreError::Full(_) | StoreError::ItemLimit(_))) => self.result = Err(error),
            Err(error) => return Err(error),
        }
        self.missing -= 1;
        Ok(())
    }

    /// All of them, or why an operation was refused.
    pub fn into_result(self) -> Result<Vec<Parts>, StoreError> {
        self.result
    }
}

/// Splits one response off the front, where it is complete; also one that is an error.
pub fn split_response(input: &mut &[u8]) -> Result<Option<Parts>, Error> {
    let Some(end) = input.iter().position(|&byte| byte == b'\n') else {
        return match input.len() {
            ..=LINE_MAX => Ok(None),
            _ => Err(Error::Protocol("a line without an end".into())),
        };
    };
    let (line, mut rest) = (&input[..end], &input[end + 1..]);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let header = MetaResponse::parse_header(line).map_err(|error| {
        *input = rest;
        match error {
            // Of a line that begins with ERROR the crate keeps no more than that.
            Error::Rejected(_) => Error::Rejected(String::from_utf8_lossy(line).into()),
            error => error,
        }
    })?;
    let mut value = None;
    if header.rc() == ReturnCode::Va {
        // Checked just now, but not told.
        let length = line.split(|&byte| byte == b' ').filter(|token| !token.is_empty()).nth(1).and_then(whole_number);
        let length = length.unwrap_or_default() as usize;
        let Some((data, after)) = rest.split_at_checked(length + 2) else {
            return Ok(None);
        };
        let Some(data) = data.strip_suffix(b"\r\n") else {
            return Err(Error::Protocol("a value of another length".into()));
        };
        value = Some(data.to_vec());
        rest = after;
    }
    *input = rest;
    Ok(Some((header.rc(), numeric_flag(&header), value)))
}

/// Longest line of a response. memcached's own end below 2,048.
const LINE_MAX: usize = 4096;

/// What it means that there is no connection.
pub fn connect_error(server: &str, error: io::Error) -> StoreError {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::PermissionDenied | io::ErrorKind::NetworkUnreachable => {
            StoreError::Refused(format!("{server}: {error}"))
        }
        _ => store_error(server, Error::Io(error)),
    }
}

/// What a failure of the exchange means.
pub fn store_error(server: &str, error: Error) -> StoreError {
    let cause = format!("{server}: {error}");
    match error {
        Error::Io(error) => match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => StoreError::Timeout(cause),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                StoreError::Broken(format!("{cause} (it closed; with -B binary it closes on all that the bus says)"))
            }
            _ => StoreError::Unreachable(cause),
        },
        Error::Timeout { .. } => StoreError::Timeout(cause),
        Error::Rejected(line) if line.contains("open connections") => StoreError::Crowded(cause),
        Error::Rejected(line) if line.contains("unauthenticated") => StoreError::Password(cause),
        Error::Rejected(_) => StoreError::TooOld(cause),
        Error::Server(message) if message.contains("too large") => StoreError::ItemLimit(cause),
        // The second of an item in several chunks, from half a megabyte on.
        Error::Server(message) if ["storing object", "during read"].iter().any(|when| message.contains(when)) => {
            StoreError::Full(cause)
        }
        _ => StoreError::Broken(cause),
    }
}

/// The number that a flag of a response brings: the CAS token, or how many seconds are left.
fn numeric_flag(response: &MetaResponse) -> Option<u64> {
    let number = |flag: &[u8]| whole_number(flag.strip_prefix(b"c").or(flag.strip_prefix(b"t"))?);
    response.flags().find_map(number)
}

/// The replies to a batch, from its responses.
pub fn replies(server: &str, batch: &[Op<'_>], responses: Vec<Parts>) -> Result<Vec<Reply>, StoreError> {
    let checked = |(op, parts)| match reply(op, parts) {
        // memcached counts from 1. To compare with 0 is no comparison: each of many publishers would win the same id.
        Some(Reply::Counter(Counter { cas: 0, .. })) => Err(StoreError::NoCas(server.into())),
        reply => reply.ok_or_else(|| unexpected(server)),
    };
    batch.iter().zip(responses).map(checked).collect()
}

/// The reply to `op`, from a response's return code, number and value; none where it makes no sense for it.
fn reply(op: &Op, (rc, number, value): Parts) -> Option<Reply> {
    match (op, rc) {
        (Op::Last, ReturnCode::Va) => {
            let value = whole_number(&value?).filter(|&value| value < limits::MAX_SLOT)?;
            Some(Reply::Counter(Counter { value, cas: number? }))
        }
        (Op::Get(_) | Op::SigningKey, ReturnCode::Va) => value.map(Reply::Value),
        (Op::Record(_), ReturnCode::Va) => Some(Reply::Record(value?, u32::try_from(number?).ok()?)),
        (Op::Last | Op::Get(_) | Op::Probe(_) | Op::Record(_) | Op::SigningKey, ReturnCode::En) => Some(Reply::Missing),
        (Op::Advance(_), ReturnCode::Nf) => Some(Reply::Missing),
        (Op::Advance(_), ReturnCode::Ex) => Some(Reply::Taken),
        (Op::Get(_) | Op::Last | Op::Record(_) | Op::SigningKey, _) => None,
        (Op::Advance(_) | Op::Probe(_), ReturnCode::Hd) => Some(Reply::Stored),
        (Op::Advance(_) | Op::Probe(_), _) => None,
        // Another publisher may have ended its own just now.
        (Op::EndTrial, ReturnCode::Nf) => Some(Reply::Stored),
        // The rest are writes that depend on what is there.
        (_, ReturnCode::Hd) => Some(Reply::Stored),
        (_, ReturnCode::Ns) => Some(Reply::Taken),
        _ => None,
    }
}

/// Memcached, or what is there in its place, answered something else than it was asked.
pub fn unexpected(server: &str) -> StoreError {
    StoreError::Broken(format!("{server}: unexpected reply"))
}

/// The one of `servers` that a bus lives on, by rendezvous hashing: adding or removing another moves no other bus.
pub fn server_for<'a>(servers: &'a [String], bus: &[u8]) -> &'a str {
    match servers {
        [only] => only,
        _ => &servers[Rendezvous::new().route(bus, servers)],
    }
}

/// `shortbus:NAME:`, where no two names share a key and no key holds a space.
pub fn key_prefix(bus: &[u8]) -> String {
    format!("shortbus:{}:", short_name(bus))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_the_response_to_one_operation() {
        let mut input = &b"SERVER_ERROR out of memory storing object\r\nHD\r\nEN\r\n"[..];
        assert!(matches!(split_response(&mut input), Err(Error::Server(_))));
        assert!(matches!(split_response(&mut input), Ok(Some((ReturnCode::Hd, None, None)))));
        assert!(matches!(split_response(&mut input), Ok(Some((ReturnCode::En, None, None)))));
        assert!(matches!(split_response(&mut input), Ok(None)));
    }

    #[test]
    fn every_name_has_keys_of_its_own_within_memcached_s_250_bytes() {
        let long = |last: u8| [vec![0xff; 254], vec![last]].concat();
        let names: Vec<Vec<u8>> =
            ["chat", "Chat", "a b", "a%20b", "a:last", "a", "last", "π", ".", "%", "*", "a\u{7f}b", "nph-chat"]
                .iter()
                .map(|name| name.as_bytes().to_vec())
                .chain([
                    vec![0xff],
                    vec![0xfe],
                    long(1),
                    long(2),
                    vec![b'x'; limits::NAME_MAX],
                    vec![b'x'; limits::NAME_MAX + 1],
                    vec![b'x'; 255],
                ])
                .collect();
        let keys: std::collections::HashSet<String> = names.iter().map(|name| key_prefix(name)).collect();
        assert_eq!(keys.len(), names.len());
        for key in keys {
            assert!(key.len() + limits::MAX_ID.to_string().len() + 1 + limits::ONCE_MAX <= 250, "{key}");
            assert!(key.bytes().all(|byte| byte.is_ascii_graphic()), "{key}");
        }
    }
}
