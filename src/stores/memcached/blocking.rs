//! The blocking driver: one connection, one write and its replies at a time.
//!
//! Its system calls in an empty poll, of 25 in all (`make bench` lists them; the 14 before are the C library's start):
//! socket; SO_SNDTIMEO, which bounds connect; connect; TCP_NODELAY; then, before send and before recv, the time-out of
//! each set to what is left of the request's time; close. Without NODELAY, or without closing, it is no faster.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use memcache::exp::Error;

use super::codec::{
    Parts, Responses, command, connect_error, key_prefix, replies, server_for, split_response, store_error, unexpected,
};
use super::connect::{connect, left};
use crate::bus::store::{Op, Reply, Store, StoreError};
use crate::limits;
use crate::stores::{random_pause, unix_micros};

/// A bus's keys in the memcached it lives on.
pub struct Memcached {
    reader: BufReader<TcpStream>,
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
        Ok(Memcached { reader: BufReader::new(socket), server, prefix: key_prefix(bus), started })
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
        let ask = || -> io::Result<Vec<u8>> {
            let mut socket = connect(&self.server, Instant::now())?;
            socket.set_read_timeout(Some(limits::STORE_DEADLINE))?;
            // More than once: with -B binary it takes 24 bytes until it closes. A memcached that closed may have said why.
            let sent = socket.write_all(&b"version\r\n".repeat(3));
            let mut line = Vec::new();
            match BufReader::new(socket.take(100)).read_until(b'\n', &mut line)? {
                0 => Err(sent.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into())),
                _ => Ok(line),
            }
        };
        let line = ask().map_err(|error| store_error(&self.server, Error::Io(error)))?;
        match line.strip_prefix(b"VERSION ") {
            Some(version) => Ok(String::from_utf8_lossy(version.trim_ascii()).into()),
            // What answers so to this, answers so to all.
            None => match split_response(&mut &line[..]) {
                Err(error) => Err(store_error(&self.server, error)),
                Ok(_) => Err(unexpected(&self.server)),
            },
        }
    }

    /// Sends a batch and waits for its responses.
    fn exchange(&mut self, batch: &[Op<'_>]) -> Result<Vec<Parts>, StoreError> {
        let failed = |error| store_error(&self.server, error);
        let mut output = Vec::new();
        for op in batch {
            command(&self.prefix, op).encode_into(&mut output).map_err(failed)?;
        }
        // A memcached that closed may have said why: what it sent is read first.
        let sent = send(self.reader.get_ref(), &output, self.started);
        let (mut input, mut responses) = (Vec::new(), Responses::new(batch.len()));
        while !responses.are_complete() {
            match receive(&mut self.reader, &mut input, self.started) {
                Ok(1..) => {}
                ended => {
                    let closed = || io::ErrorKind::UnexpectedEof.into();
                    return Err(failed(Error::Io(sent.err().or(ended.err()).unwrap_or_else(closed))));
                }
            }
            let mut rest = &input[..];
            while !responses.are_complete()
                && let Some(response) = split_response(&mut rest).transpose()
            {
                responses.push(response.map_err(failed))?;
            }
            let taken = input.len() - rest.len();
            input.drain(..taken);
        }
        match input[..] {
            [] => responses.into_result(),
            // More than was asked for.
            _ => Err(unexpected(&self.server)),
        }
    }
}

fn send(mut stream: &TcpStream, mut bytes: &[u8], started: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(time_left(started)?))?;
        match stream.write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            // With a time-out the system takes no call up again after the process was stopped (signal(7)).
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Appends what comes next to `input`: how many bytes, 0 at the end.
fn receive(reader: &mut BufReader<TcpStream>, input: &mut Vec<u8>, started: Instant) -> io::Result<usize> {
    loop {
        reader.get_ref().set_read_timeout(Some(time_left(started)?))?;
        match reader.fill_buf() {
            Ok(bytes) => {
                let length = bytes.len();
                input.extend_from_slice(bytes);
                reader.consume(length);
                return Ok(length);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// More than nothing, which would mean "for ever".
fn time_left(started: Instant) -> io::Result<Duration> {
    Some(left(started)).filter(|left| !left.is_zero()).ok_or(io::ErrorKind::TimedOut.into())
}

impl Store for Memcached {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError> {
        if left(self.started).is_zero() {
            return Err(StoreError::Late(self.server.clone()));
        }
        let responses = self.exchange(batch)?;
        replies(&self.server, batch, responses)
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
