//! A web server's connection, on tokio.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{sleep_until, timeout};

use crate::fastcgi::codec::{Parameters, Parser};
use crate::fastcgi::hub::Waiter;
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
        poll_fn(|context| self.poll_read(context, body_limit)).await
    }

    fn poll_read(&mut self, context: &mut Context, body_limit: &dyn Fn(&Parameters) -> usize) -> Poll<io::Result<()>> {
        let mut buffer = [0; BUFFER];
        let mut buffer = ReadBuf::new(&mut buffer);
        ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer))?;
        if buffer.filled().is_empty() {
            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        let fed = self.parser.feed(buffer.filled(), &mut self.out, body_limit);
        Poll::Ready(fed.map_err(|malformed| io::Error::new(io::ErrorKind::InvalidData, malformed.0)))
    }

    /// Waits until there may be something new, or `until`, or the web server gives up; or a record wants an answer.
    ///
    /// # Errors
    /// As [`Connection::read`] and [`Connection::flush`].
    pub async fn idle(&mut self, waiter: &mut Waiter, until: Instant) -> io::Result<()> {
        let mut changed = pin!(waiter.changed());
        let mut alarm = pin!(sleep_until(until.into()));
        poll_fn(|context| {
            while let Poll::Ready(read) = self.poll_read(context, &|_| 0) {
                read?;
                if self.parser.is_aborted() || !self.out.is_empty() {
                    return Poll::Ready(Ok(()));
                }
            }
            if changed.as_mut().poll(context).is_ready() || alarm.as_mut().poll(context).is_ready() {
                return Poll::Ready(io::Result::Ok(()));
            }
            Poll::Pending
        })
        .await?;
        within(limits::STREAM_STALL, self.flush()).await
    }

    /// Writes all, as long as the other side keeps taking it.
    ///
    /// # Errors
    /// It is closed, or takes nothing for [`limits::PEER_DEADLINE`].
    pub async fn flush(&mut self) -> io::Result<()> {
        let out = std::mem::take(&mut self.out);
        let mut rest = &out[..];
        while !rest.is_empty() {
            let write = poll_fn(|context| Pin::new(&mut self.stream).poll_write(context, rest));
            let written = within(limits::PEER_DEADLINE, write).await?;
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
pub async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
