//! Bytes on a web server's connection, on tokio.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tokio::select;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep_until;

use super::codec::{Parameters, Parser};
use crate::limits;

/// What the connections of a process may take together, [`limits::BUFFERS_BYTES`].
#[derive(Clone)]
pub struct Buffers(Arc<Semaphore>);

impl Default for Buffers {
    /// All of it free.
    fn default() -> Buffers {
        Buffers(Arc::new(Semaphore::new(limits::BUFFERS_BYTES / KILOBYTE)))
    }
}

impl Buffers {
    /// Reserves so many bytes until the permit is dropped; none where there is no room for them.
    pub fn reserve(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let permits = u32::try_from(bytes.div_ceil(KILOBYTE)).ok()?;
        self.0.clone().try_acquire_many_owned(permits).ok()
    }
}

const KILOBYTE: usize = 1024;

/// One connection of a web server. It holds no buffer while it waits.
pub struct Connection {
    /// Whatever kind of socket it is: to read and write they are the same.
    stream: TcpStream,
    /// What has arrived.
    pub parser: Parser,
    /// What is to be written.
    pub out: Vec<u8>,
    buffers: Buffers,
}

impl Connection {
    /// A new one; a unix socket may come as a TCP stream.
    pub fn new(stream: TcpStream, buffers: Buffers) -> Connection {
        Connection { stream, parser: Parser::default(), out: Vec::new(), buffers }
    }

    /// Reads what there is into the parser; waits for it as long as it takes.
    ///
    /// By `poll_read`, since after a short read it knows that there is no more: `readable` with `try_read` makes one more
    /// system call a request to hear it.
    ///
    /// # Errors
    /// It is closed, or speaks no FastCGI: it is good for nothing any more.
    pub async fn read(&mut self, body_limit: &dyn Fn(&Parameters) -> usize) -> io::Result<()> {
        poll_fn(|context| {
            let mut buffer = [0; BUFFER];
            let mut buffer = ReadBuf::new(&mut buffer);
            ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            let fed = self.parser.feed(buffer.filled(), &mut self.out, body_limit);
            Poll::Ready(fed.map_err(|malformed| io::Error::new(io::ErrorKind::InvalidData, malformed.0)))
        })
        .await
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
    /// It is closed, or takes nothing for [`limits::PEER_DEADLINE`], or there is no room for what it does not take.
    pub async fn flush(&mut self) -> io::Result<()> {
        let out = std::mem::take(&mut self.out);
        let (mut rest, mut reserved) = (&out[..], None);
        while !rest.is_empty() {
            match self.stream.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if reserved.is_none() {
                        reserved = Some(self.buffers.reserve(out.capacity()).ok_or(io::ErrorKind::OutOfMemory)?);
                    }
                    timeout(limits::PEER_DEADLINE, self.stream.writable()).await?;
                }
                Err(error) => return Err(error),
            }
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
