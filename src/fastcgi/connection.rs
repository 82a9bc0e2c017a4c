//! Bytes on a web server's connection, on tokio.

use std::future::Future;
use std::io;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::select;
use tokio::time::sleep_until;

use super::codec::{Parameters, Parser};
use crate::limits;

/// One connection of a web server. It holds no buffer while it waits.
pub struct Connection {
    /// Whatever kind of socket it is: to read and write they are the same.
    stream: TcpStream,
    /// What has arrived.
    pub parser: Parser,
    /// What is to be written.
    pub out: Vec<u8>,
}

impl Connection {
    /// A new one; a unix socket may come as a TCP stream.
    pub fn new(stream: TcpStream) -> Connection {
        Connection { stream, parser: Parser::default(), out: Vec::new() }
    }

    /// Reads what there is into the parser; waits for it as long as it takes.
    ///
    /// # Errors
    /// It is closed, or speaks no FastCGI: it is good for nothing any more.
    pub async fn read(&mut self, body_limit: &dyn Fn(&Parameters) -> usize) -> io::Result<()> {
        loop {
            self.stream.readable().await?;
            match self.try_read(body_limit) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
        }
    }

    fn try_read(&mut self, body_limit: &dyn Fn(&Parameters) -> usize) -> io::Result<()> {
        let mut buffer = [0; BUFFER];
        let read = self.stream.try_read(&mut buffer)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let fed = self.parser.feed(&buffer[..read], &mut self.out, body_limit);
        fed.map_err(|malformed| io::Error::new(io::ErrorKind::InvalidData, malformed.0))
    }

    /// Waits until `changed`, or `until`, or the web server gives up; or a record wants an answer, which is written.
    ///
    /// # Errors
    /// As [`Connection::read`] and [`Connection::flush`].
    pub async fn idle(&mut self, changed: impl Future<Output = ()>, until: Instant) -> io::Result<()> {
        let heard = async {
            loop {
                self.read(&|_| 0).await?;
                if self.parser.is_aborted() || !self.out.is_empty() {
                    return io::Result::Ok(());
                }
            }
        };
        select! {
            biased;
            heard = heard => heard,
            () = changed => Ok(()),
            () = sleep_until(until.into()) => Ok(()),
        }?;
        timeout(limits::STREAM_STALL, self.flush()).await
    }

    /// Writes all, as long as the other side keeps taking it.
    ///
    /// # Errors
    /// It is closed, or takes nothing for [`limits::PEER_DEADLINE`].
    pub async fn flush(&mut self) -> io::Result<()> {
        let out = std::mem::take(&mut self.out);
        let mut rest = &out[..];
        while !rest.is_empty() {
            let written = timeout(limits::PEER_DEADLINE, self.stream.write(rest)).await?;
            rest = &rest[written..];
        }
        Ok(())
    }
}

/// Bytes read at a time: a request with a browser's headers.
const BUFFER: usize = 4096;

/// Does the work, or fails when the time is over.
///
/// # Errors
/// `TimedOut`, and the work's own.
pub async fn timeout<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
