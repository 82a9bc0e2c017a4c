//! Long polls and event streams in the persistent mode: how they sleep and write.

use std::cell::Cell;
use std::io;
use std::time::Instant;

use super::codec;
use super::connection::{Connection, timeout};
use super::hub::Subscriber;
use crate::http::waiting::{Front, Next};
use crate::limits;

/// A request that waits, on its connection.
pub struct Waiter<'a> {
    /// The request's number on the connection.
    pub id: u16,
    /// The connection.
    pub connection: &'a mut Connection,
    /// Hears of what is published.
    pub subscriber: Subscriber,
    /// Whether waits have to end.
    pub ending: &'a Cell<bool>,
    /// When this one has to.
    pub ends: Instant,
}

impl Front for Waiter<'_> {
    async fn next(&mut self, until: Instant) -> io::Result<Next> {
        loop {
            // In a box: what a poll needs is given back while the request waits.
            let look_again = match Box::pin(self.subscriber.poll()).await {
                Ok(Some(page)) => return Ok(Next::Page(page)),
                Ok(None) => until,
                Err(_) => until.min(Instant::now() + limits::WATCH_RETRY),
            };
            // The abort may have come with the request itself.
            if self.connection.parser.is_aborted() {
                return Ok(Next::Gone);
            }
            if self.ending.get() || Instant::now() >= self.ends {
                return Ok(Next::Ending);
            }
            if Instant::now() >= until {
                return Ok(Next::Time);
            }
            self.connection.idle(self.subscriber.changed(), look_again.min(self.ends)).await?;
        }
    }

    async fn send(&mut self, text: Vec<u8>) -> io::Result<()> {
        codec::output(&mut self.connection.out, self.id, &text);
        drop(text);
        // A client that does not read is cut off. What is new meanwhile waits in the store.
        timeout(limits::STREAM_STALL, self.connection.flush()).await
    }

    async fn finish(&mut self, text: &[u8]) -> io::Result<()> {
        codec::output(&mut self.connection.out, self.id, text);
        codec::end(&mut self.connection.out, self.id);
        Ok(())
    }
}
