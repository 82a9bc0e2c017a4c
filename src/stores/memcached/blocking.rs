//! The blocking driver: one connection, one write and its replies at a time.
//!
//! Its system calls in an empty poll, of 27 in all (`make bench` lists them; the 14 before are the C library's start):
//! socket; SO_SNDTIMEO, which bounds connect; connect; TCP_NODELAY; then, around send and again around recv, the two
//! time-outs set to what is left of the request's time; close. Without NODELAY, or without closing, it is no faster.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use memcache::exp::{Error, MetaCommand, MetaConnection, MetaOp, MetaResponse, Rendezvous, ReturnCode, Router};
use rand::TryRng;
use rand::rngs::SysRng;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::bus::store::{Counter, Op, Reply, Store, StoreError};
use crate::config::whole_number;
use crate::hash;
use crate::limits;

/// A bus's keys in the memcached it lives on.
pub struct Memcached {
    connection: MetaConnection,
    server: String,
    prefix: String,
    started: Instant,
}

impl Memcached {
    /// Connects to the one of `servers` that `bus` lives on.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] and [`StoreError::Timeout`].
    pub fn connect(servers: &[String], bus: &[u8]) -> Result<Memcached, StoreError> {
        let server = home(servers, bus).to_owned();
        let started = Instant::now();
        let socket = connect(&server, started).map_err(|error| at(&server, Error::Io(error)))?;
        // The crate speaks over a TcpStream; to read, write and time-outs a connected unix socket is the same.
        let connection = MetaConnection::from_stream(TcpStream::from(OwnedFd::from(socket)));
        Ok(Memcached { connection, server, prefix: key_prefix(bus), started })
    }

    /// Which of the servers it is, as it was configured.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// What the server calls its version, such as `1.6.18`. For a person who checks; requests never ask.
    ///
    /// # Errors
    /// As [`Store::run`].
    pub fn version(&self) -> Result<String, StoreError> {
        let ask = || -> io::Result<String> {
            let mut socket = connect(&self.server, Instant::now())?;
            socket.set_read_timeout(Some(limits::STORE_DEADLINE))?;
            socket.write_all(b"version\r\n")?;
            let mut line = String::new();
            BufReader::new(socket.take(100)).read_line(&mut line)?;
            let version = line.trim_end().strip_prefix("VERSION ").map(String::from);
            version.ok_or_else(|| io::Error::other(format!("it calls its version {line:?}")))
        };
        ask().map_err(|error| at(&self.server, Error::Io(error)))
    }
}

impl Store for Memcached {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError> {
        let left = left(self.started);
        if left.is_zero() {
            return Err(StoreError::Late(self.server.clone()));
        }
        self.connection.set_io_timeout(Some(left));
        let commands: Vec<MetaCommand> = batch.iter().map(|op| command(&self.prefix, op)).collect();
        let responses = self.connection.execute_batch(&commands).map_err(|error| at(&self.server, error))?;
        let parts = |response: MetaResponse| (response.rc(), cas(&response), response.into_value());
        let replies = batch.iter().zip(responses).map(|(op, response)| reply(op, parts(response)));
        replies.collect::<Option<_>>().ok_or_else(|| unexpected(&self.server))
    }

    async fn pause(&mut self, longest: Duration) {
        std::thread::sleep(random_pause(longest));
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn unix_micros(&self) -> u64 {
        unix_micros()
    }
}

/// Between half of `longest` and `longest`.
pub(crate) fn random_pause(longest: Duration) -> Duration {
    let random = SysRng.try_next_u32().unwrap_or_default();
    longest / 2 + longest.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0)
}

pub(crate) fn unix_micros() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros() as u64)
}

/// What asks memcached for `op`.
pub(crate) fn command(prefix: &str, op: &Op) -> MetaCommand {
    let slot = |id: &u64| format!("{prefix}{id}");
    // A slot's key is a number, a record's has a colon.
    let named = |name: &str| format!("{prefix}{name}");
    let last = || named("last");
    match op {
        Op::Last => MetaCommand::new(MetaOp::Get, last()).flag("v").flag("c"),
        Op::Create(start) => MetaCommand::new(MetaOp::Set, last()).flag("ME").value(start.to_string()),
        Op::Advance(cas) => MetaCommand::new(MetaOp::Arithmetic, last()).flag(format!("C{cas}")),
        Op::Add { id, value, ttl } => {
            MetaCommand::new(MetaOp::Set, slot(id)).flag("ME").flag(format!("T{ttl}")).value(*value)
        }
        Op::Get(id) => MetaCommand::new(MetaOp::Get, slot(id)).flag("v"),
        Op::Probe(id) => MetaCommand::new(MetaOp::Get, slot(id)),
        Op::Claim { once, token, ttl } => {
            MetaCommand::new(MetaOp::Set, named(once)).flag("ME").flag(format!("T{ttl}")).value(token.to_string())
        }
        Op::Note(once, id) => MetaCommand::new(MetaOp::Set, named(once)).flag("MA").value(format!(" {id}")),
        Op::Record(once) => MetaCommand::new(MetaOp::Get, named(once)).flag("v").flag("t"),
        Op::Key => MetaCommand::new(MetaOp::Get, named("key")).flag("v"),
        Op::CreateKey(key) => MetaCommand::new(MetaOp::Set, named("key")).flag("ME").value(*key),
    }
}

/// What is left of [`limits::STORE_DEADLINE`].
pub(crate) fn left(started: Instant) -> Duration {
    limits::STORE_DEADLINE.saturating_sub(started.elapsed())
}

/// Connects, looking the name up first where it is one. SO_SNDTIMEO bounds connect(2) for both kinds of socket;
/// without it a memcached that accepts no more holds every request that comes to a unix socket for ever.
pub(crate) fn connect(server: &str, started: Instant) -> io::Result<Socket> {
    if server.starts_with('/') {
        return dial(Domain::UNIX, &SockAddr::unix(server)?, left(started));
    }
    let addresses = match server.parse() {
        Ok(address) => vec![address],
        Err(_) => resolve(server, left(started))?,
    };
    let mut result = Err(io::ErrorKind::AddrNotAvailable.into());
    for (address, more) in addresses.iter().zip((1..=addresses.len() as u32).rev()) {
        result = dial(Domain::for_address(*address), &SockAddr::from(*address), left(started) / more);
        if let Ok(socket) = &result {
            // Without it the end of a large message waits for a delayed acknowledgement, 40 ms.
            socket.set_tcp_nodelay(true)?;
            break;
        }
    }
    result
}

/// Looks a host name up. On a thread, the only way to bound the resolver: it would wait ten seconds and more for a
/// silent name server. Nobody waits for the thread; it ends with the process.
fn resolve(server: &str, timeout: Duration) -> io::Result<Vec<SocketAddr>> {
    let (sender, receiver) = mpsc::channel();
    let name = server.to_owned();
    std::thread::Builder::new().spawn(move || sender.send(name.to_socket_addrs().map(Iterator::collect)))?;
    let late = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "host name lookup timed out"));
    receiver.recv_timeout(timeout).unwrap_or_else(late)
}

fn dial(domain: Domain, address: &SockAddr, timeout: Duration) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM, None)?;
    // Zero would mean "for ever".
    socket.set_write_timeout(Some(timeout.max(Duration::from_millis(1))))?;
    socket.connect(address).map_err(|error| match error.raw_os_error() {
        // What connect(2) answers when SO_SNDTIMEO has passed, for TCP and for unix sockets.
        Some(EINPROGRESS | EAGAIN) => io::Error::new(io::ErrorKind::TimedOut, "connect timed out"),
        _ => error,
    })?;
    Ok(socket)
}

const EAGAIN: i32 = 11;
const EINPROGRESS: i32 = 115;

/// What a failure of the exchange means.
pub(crate) fn at(server: &str, error: Error) -> StoreError {
    let cause = format!("{server}: {error}");
    match error {
        Error::Io(error) => match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => StoreError::Timeout(cause),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                StoreError::Broken(cause)
            }
            _ => StoreError::Unreachable(cause),
        },
        Error::Timeout { .. } => StoreError::Timeout(cause),
        Error::Rejected(_) => StoreError::TooOld(cause),
        Error::Server(message) if message.contains("storing object") || message.contains("too large") => {
            StoreError::Full(cause)
        }
        _ => StoreError::Broken(cause),
    }
}

/// The number that a flag of a response brings: the CAS token, or how many seconds are left.
pub(crate) fn cas(response: &MetaResponse) -> Option<u64> {
    let number = |flag: &[u8]| whole_number(flag.strip_prefix(b"c").or(flag.strip_prefix(b"t"))?);
    response.flags().find_map(number)
}

/// The reply to `op`, from a response's return code, number and value; none where it makes no sense for it.
pub(crate) fn reply(op: &Op, (rc, number, value): (ReturnCode, Option<u64>, Option<Vec<u8>>)) -> Option<Reply> {
    match (op, rc) {
        (Op::Last, ReturnCode::Va) => {
            let value = whole_number(&value?).filter(|&value| value < limits::MAX_ID)?;
            Some(Reply::Counter(Counter { value, cas: number? }))
        }
        (Op::Get(_) | Op::Key, ReturnCode::Va) => value.map(Reply::Value),
        (Op::Record(_), ReturnCode::Va) => Some(Reply::Record(value?, u32::try_from(number?).ok()?)),
        (Op::Last | Op::Get(_) | Op::Probe(_) | Op::Record(_) | Op::Key, ReturnCode::En) => Some(Reply::Missing),
        (Op::Advance(_), ReturnCode::Nf) => Some(Reply::Missing),
        (Op::Advance(_), ReturnCode::Ex) => Some(Reply::Taken),
        (Op::Get(_) | Op::Last | Op::Record(_) | Op::Key, _) => None,
        (Op::Advance(_) | Op::Probe(_), ReturnCode::Hd) => Some(Reply::Stored),
        (Op::Advance(_) | Op::Probe(_), _) => None,
        // The rest are writes that depend on what is there.
        (_, ReturnCode::Hd) => Some(Reply::Stored),
        (_, ReturnCode::Ns) => Some(Reply::Taken),
        _ => None,
    }
}

/// Memcached, or what is there in its place, answered something else than it was asked.
pub(crate) fn unexpected(server: &str) -> StoreError {
    StoreError::Broken(format!("{server}: unexpected reply"))
}

/// The one of `servers` that a bus lives on, by rendezvous hashing: adding or removing another moves no other bus.
pub(crate) fn home<'a>(servers: &'a [String], bus: &[u8]) -> &'a str {
    match servers {
        [only] => only,
        _ => &servers[Rendezvous::new().route(bus, servers)],
    }
}

/// `shortbus:NAME:`, where no two names share a key and no key holds a space. A name too long for memcached's 250
/// bytes is cut and hashed.
pub(crate) fn key_prefix(bus: &[u8]) -> String {
    let mut name = encode_name(bus);
    if name.len() > limits::NAME_MAX {
        // '*' stands in no encoded name, so a cut name is never another bus's whole one.
        name.truncate(limits::NAME_MAX - 33);
        name.push_str(&format!("*{:032x}", hash::fnv1a_128(bus)));
    }
    format!("shortbus:{name}:")
}

/// A bus's name, percent-encoded (RFC 3986 section 2.1) but for unreserved characters.
pub fn encode_name(bus: &[u8]) -> String {
    let mut name = String::with_capacity(bus.len());
    for &byte in bus {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => name.push(byte.into()),
            _ => name.push_str(&format!("%{byte:02X}")),
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

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
