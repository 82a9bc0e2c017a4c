//! CGI (RFC 3875): the process's environment, stdin and stdout, once.

use std::fs::File;
use std::future::Future;
use std::io::Write;
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStringExt;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::bus;
use crate::config::Config;
use crate::http::event_stream;
use crate::http::{self, Response};
use crate::limits;
use crate::stores::memcached::blocking::Memcached;

/// A variable of the environment, whatever its bytes.
pub fn variable(name: &str) -> Option<Vec<u8>> {
    std::env::var_os(name).map(OsStringExt::into_vec)
}

/// Serves the one request of this process. A client that has gone is nobody's error.
pub fn serve(argv0: &[u8]) {
    let config = Config::read(&variable, argv0, 0);
    let limit = config.as_ref().map_or(0, |config| config.max_bytes);
    let body = http::read_body(&variable, &*fd(0), limit);
    let open = |config: &Config| Memcached::connect(&config.memcached, &config.bus);
    // The connection is closed again when this returns: what is written below goes to nobody else, even if the server
    // started us without a stdout or stderr.
    let response = block_on(http::answer(&variable, config, body, open));
    if let Some(line) = &response.log {
        let _ = fd(2).write_all(format!("{line}\n").as_bytes());
    }
    if response.held.is_some() {
        return hold(response, is_nph(argv0));
    }
    let head = variable("REQUEST_METHOD").is_some_and(|method| method == b"HEAD");
    let _ = fd(1).write_all(&response.to_cgi(head, is_nph(argv0)));
}

fn is_nph(argv0: &[u8]) -> bool {
    argv0.rsplit(|&byte| byte == b'/').next().is_some_and(|name| name.starts_with(b"nph-"))
}

/// Holds a poll until there is something new, or streams, for as long as `SHORTBUS_WAIT` lets it.
fn hold(mut response: Response, nph: bool) {
    let mut text = response.to_cgi(false, nph);
    let Some(held) = response.held.take() else {
        return;
    };
    let started = Instant::now();
    let mut page = held.page;
    let (mut at, mut heartbeat) = (page.last_id, started);
    if held.stream {
        event_stream::begin(&mut text);
        event_stream::page(&mut text, &page, 0);
        event_stream::cursor(&mut text, at);
    }
    while held.stream || page.is_empty() {
        if held.stream && !text.is_empty() {
            // A client that has gone ends it.
            if fd(1).write_all(&text).is_err() {
                return;
            }
            text.clear();
            heartbeat = Instant::now();
        }
        let left = Duration::from_secs(held.seconds.into()).saturating_sub(started.elapsed());
        if left.is_zero() {
            break;
        }
        std::thread::sleep(limits::CGI_WATCH_INTERVAL.min(left));
        // A memcached that is away may be back before the time is over.
        let store = Memcached::connect(&held.config.memcached, &held.config.bus);
        if let Ok(mut store) = store
            && let Ok(next) = block_on(bus::poll(&mut store, page.last_id, held.user))
        {
            page = next;
        } else {
            continue;
        }
        if held.stream {
            at = event_stream::page(&mut text, &page, at);
            if page.missed {
                at = page.last_id;
                event_stream::cursor(&mut text, at);
            }
        }
        if held.stream && heartbeat.elapsed() >= limits::HEARTBEAT {
            text.extend_from_slice(event_stream::HEARTBEAT);
            if at != page.last_id {
                at = page.last_id;
                event_stream::cursor(&mut text, at);
            }
        }
    }
    if !held.stream {
        response.fill(page);
        let _ = fd(1).write_all(&response.to_cgi(false, nph));
    }
}

/// Runs a future that never waits: every operation of a blocking store is ready at once.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("a blocking store is always ready"),
    }
}

/// A standard stream without the buffer and lock of std's own: one read or write, one system call.
fn fd(number: i32) -> ManuallyDrop<File> {
    // SAFETY: the standard streams are open for as long as the process; ManuallyDrop leaves them so.
    ManuallyDrop::new(unsafe { File::from_raw_fd(number) })
}
