//! Requests that wait for messages: long polls and event streams.
//!
//! A front differs in how it sleeps and how it writes, in nothing else.

use std::io;
use std::time::{Duration, Instant};

use super::event_stream;
use super::message;
use super::response::Response;
use crate::bus::Page;
use crate::config::Config;
use crate::limits;

/// A poll that waits for messages.
#[derive(Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The bus.
    pub config: Config,
    /// Whose messages are left out.
    pub user: Option<u64>,
    /// What was there at once. The cursor to go on from is in it.
    pub page: Page,
    /// The response is the head of an event stream ([`event_stream`]), and not one that a page is to be filled in: one
    /// that is not empty, or the last one when the time is over.
    pub stream: bool,
    /// The longest time that a long poll waits, seconds.
    pub seconds: u32,
}

/// What comes next for a request that waits.
#[derive(Debug)]
pub enum Next {
    /// The bus has something new; the front's cursor is behind it.
    Page(Page),
    /// The time was over first.
    Time,
    /// The front has no more time for it.
    Ending,
    /// Nobody wants the reply any more.
    Gone,
}

/// What the front does for a request that waits.
#[allow(async_fn_in_trait, reason = "each front is used by name, on one thread")]
pub trait Front {
    /// Waits for what is new, at most until `until`.
    ///
    /// # Errors
    /// The connection is good for nothing any more.
    async fn next(&mut self, until: Instant) -> io::Result<Next>;

    /// Writes a part of an event stream, at once.
    ///
    /// # Errors
    /// The client has gone, or reads nothing.
    async fn send(&mut self, text: Vec<u8>) -> io::Result<()>;

    /// Writes what is left of the reply, and ends it.
    ///
    /// # Errors
    /// The client has gone.
    async fn finish(&mut self, text: &[u8]) -> io::Result<()>;
}

/// Serves a request that waits, to its end.
///
/// # Errors
/// Those of the front.
pub async fn serve(mut response: Response, waiting: Box<Waiting>, nph: bool, front: &mut impl Front) -> io::Result<()> {
    if waiting.stream {
        let mut text = response.to_cgi(false, nph);
        let after = waiting.page.last_id;
        event_stream::opening(&mut text, &waiting.page);
        drop((response, waiting));
        return stream(text, after, front).await;
    }
    let (mut last_id, deadline) = (waiting.page.last_id, Instant::now() + Duration::from_secs(waiting.seconds.into()));
    drop(waiting);
    let page = loop {
        match front.next(deadline).await? {
            Next::Page(page) => {
                last_id = page.last_id;
                let page = message::readable(page);
                if !page.is_empty() {
                    break page;
                }
            }
            Next::Time | Next::Ending => break Page { last_id, ..Page::default() },
            Next::Gone => return front.finish(b"").await,
        }
    };
    response.fill(page);
    front.finish(&response.to_cgi(false, nph)).await
}

/// An event stream, from its first text on.
async fn stream(mut text: Vec<u8>, mut after: u64, front: &mut impl Front) -> io::Result<()> {
    // The id that the client has been told.
    let mut told = after;
    let mut heartbeat = Instant::now() + limits::HEARTBEAT;
    loop {
        if !text.is_empty() {
            front.send(std::mem::take(&mut text)).await?;
            heartbeat = Instant::now() + limits::HEARTBEAT;
        }
        match front.next(heartbeat).await? {
            Next::Page(page) => {
                after = page.last_id;
                let page = message::readable(page);
                told = event_stream::page(&mut text, &page, told);
                if page.missed {
                    // Now: what was missed may be all there was.
                    told = after;
                    event_stream::cursor(&mut text, told);
                }
            }
            Next::Time => {
                text.extend_from_slice(event_stream::HEARTBEAT);
                if told != after {
                    told = after;
                    event_stream::cursor(&mut text, told);
                }
            }
            Next::Ending | Next::Gone => return front.finish(b"").await,
        }
    }
}
