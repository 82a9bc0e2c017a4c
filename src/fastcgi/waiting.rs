//! Requests that wait in the persistent mode: long polls and event streams.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::bus::Page;
use crate::fastcgi::codec as fastcgi;
use crate::fastcgi::connection::{Connection, within};
use crate::fastcgi::hub::{Hubs, Waiter};
use crate::http::event_stream;
use crate::http::{Held, Response};
use crate::limits;
use crate::stores::memcached::blocking::home;

/// Holds a poll until there is something new, or streams for as long as the client stays; until `ends` at most.
///
/// # Errors
/// The connection's: it is to be closed.
pub async fn hold(
    id: u16,
    mut response: Response,
    connection: &mut Connection,
    hubs: &Rc<Hubs>,
    ends: &Cell<bool>,
) -> io::Result<()> {
    let head = response.to_cgi(false, false);
    let Some(held) = response.held.take() else {
        return Ok(());
    };
    let server = home(&held.config.memcached, &held.config.bus);
    let waiter = hubs.wait(server, &held.config.bus, held.page.last_id, held.user);
    if held.stream {
        return stream(id, head, held, waiter, connection, ends).await;
    }
    drop(head);
    let deadline = Instant::now() + Duration::from_secs(held.seconds.into());
    drop(held);
    wait(id, response, deadline, waiter, connection, ends).await
}

async fn wait(
    id: u16,
    mut response: Response,
    deadline: Instant,
    mut waiter: Waiter,
    connection: &mut Connection,
    ends: &Cell<bool>,
) -> io::Result<()> {
    let page = loop {
        let look_again = match Box::pin(waiter.poll()).await {
            Ok(Some(page)) if !page.is_empty() => break page,
            Ok(_) => deadline,
            Err(_) => deadline.min(Instant::now() + limits::WATCH_RETRY),
        };
        if ends.get() || Instant::now() >= deadline {
            break Page { json: b"[]".to_vec(), last_id: waiter.after(), missed: false };
        }
        // It may have come with the request itself.
        if connection.parser.is_aborted() {
            fastcgi::end(&mut connection.out, id);
            return Ok(());
        }
        connection.idle(&mut waiter, look_again).await?;
    };
    response.fill(page);
    fastcgi::reply(&mut connection.out, id, &response.to_cgi(false, false), b"");
    Ok(())
}

async fn stream(
    id: u16,
    head: Vec<u8>,
    held: Box<Held>,
    mut waiter: Waiter,
    connection: &mut Connection,
    ends: &Cell<bool>,
) -> io::Result<()> {
    let mut text = head;
    event_stream::begin(&mut text);
    event_stream::page(&mut text, &held.page, 0);
    event_stream::cursor(&mut text, waiter.after());
    drop(held);
    let mut at = waiter.after();
    let mut heartbeat = Instant::now() + limits::HEARTBEAT;
    loop {
        if !text.is_empty() {
            fastcgi::output(&mut connection.out, id, &text);
            text = Vec::new();
            heartbeat = Instant::now() + limits::HEARTBEAT;
            // One that does not read is cut off. What is new meanwhile waits in memcached.
            within(limits::STREAM_STALL, connection.flush()).await?;
        }
        let look_again = match Box::pin(waiter.poll()).await {
            Ok(Some(page)) => {
                at = event_stream::page(&mut text, &page, at);
                if page.missed {
                    // Now: what was missed may be all there was.
                    at = page.last_id;
                    event_stream::cursor(&mut text, at);
                }
                continue;
            }
            Ok(None) => heartbeat,
            Err(_) => heartbeat.min(Instant::now() + limits::WATCH_RETRY),
        };
        if ends.get() || connection.parser.is_aborted() {
            fastcgi::end(&mut connection.out, id);
            return Ok(());
        }
        connection.idle(&mut waiter, look_again).await?;
        if Instant::now() >= heartbeat {
            text.extend_from_slice(event_stream::HEARTBEAT);
            if at != waiter.after() {
                at = waiter.after();
                event_stream::cursor(&mut text, at);
            }
        }
    }
}
