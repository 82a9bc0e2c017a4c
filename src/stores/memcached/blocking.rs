//! The blocking driver: one connection, one write and its replies at a time.
//!
//! Its system calls in an empty poll, of 27 in all (`make bench` lists them; the 14 before are the C library's start):
//! socket; SO_SNDTIMEO, which bounds connect; connect; TCP_NODELAY; then, around send and again around recv, the two
//! time-outs set to what is left of the request's time; close. Without NODELAY, or without closing, it is no faster.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use memcache::exp::{Error, MetaCommand, MetaConnection};

use super::codec::{command, connect_error, key_prefix, parts, reply, server_for, store_error, unexpected};
use super::connect::{connect, left};
use crate::bus::store::{Op, Reply, Store, StoreError};
use crate::limits;
use crate::stores::{random_pause, unix_micros};

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
        let server = server_for(servers, bus).to_owned();
        let started = Instant::now();
        let socket = connect(&server, started).map_err(|error| connect_error(&server, error))?;
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
        ask().map_err(|error| store_error(&self.server, Error::Io(error)))
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
        let responses = self.connection.execute_batch(&commands).map_err(|error| store_error(&self.server, error))?;
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
