//! CGI (RFC 3875): the process's environment, stdin and stdout, once.

use std::fs::File;
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;
use std::time::{Duration, Instant};

use crate::bus;
use crate::bus::store::StoreError;
use crate::config::Config;
use crate::http::request::{self, Gateway};
use crate::http::response::Response;
use crate::http::waiting::{self, Front, Next, Waiting};
use crate::http::{self, Backend};
use crate::limits;
use crate::stores::{self, Blocking, block_on};
use crate::variables::Variables;

/// Serves the one request of this process. A client that has gone is nobody's error.
pub fn serve(argv0: &[u8]) {
    let variables = Variables::environment();
    let config = Config::read(&variables, &Variables::default(), argv0, 0);
    let limit = config.as_ref().map_or(0, |config| request::body_limit(&variables, config));
    let body = request::read_body(&variables, &*fd(0), limit);
    // The connection is closed again when this returns: what is written below goes to nobody else, even if the server
    // started us without a stdout or stderr.
    let mut response = block_on(http::answer(&variables, Gateway::Cgi, config, body, &Direct));
    if let Some(line) = &response.log {
        let _ = fd(2).write_all(format!("{line}\n").as_bytes());
    }
    let nph = argv0.rsplit(|&byte| byte == b'/').next().is_some_and(|name| name.starts_with(b"nph-"));
    let _ = match response.waiting.take() {
        None => {
            let head = variables.text("REQUEST_METHOD") == b"HEAD";
            fd(1).write_all(&response.to_cgi(head, nph))
        }
        Some(waiting) => wait(response, waiting, nph),
    };
}

/// Answers a request that waits. Not inlined: few do, and all would pay for the stack that it takes.
#[inline(never)]
fn wait(response: Response, waiting: Box<Waiting>, nph: bool) -> io::Result<()> {
    let (config, user, after) = (waiting.config.clone(), waiting.user, waiting.page.last_id);
    let ends = Instant::now() + Duration::from_secs(config.wait.into());
    block_on(waiting::serve(response, waiting, nph, &mut Process { config, user, after, ends }))
}

/// A store for each request.
struct Direct;

impl Backend for Direct {
    type Store = Blocking;

    fn open(&self, config: &Config) -> Result<Blocking, StoreError> {
        stores::open(config)
    }
}

/// A process that waits: it asks the store now and then, for as long as `SHORTBUS_WAIT` lets it.
struct Process {
    config: Config,
    user: Option<u64>,
    after: u64,
    ends: Instant,
}

impl Front for Process {
    async fn next(&mut self, until: Instant) -> io::Result<Next> {
        loop {
            let left = until.min(self.ends).saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(if self.ends <= until { Next::Ending } else { Next::Time });
            }
            std::thread::sleep(limits::CGI_WATCH_INTERVAL.min(left));
            // A store that is away may be back before the time is over.
            if let Ok(mut store) = stores::open(&self.config)
                && let Ok(page) = bus::poll(&mut store, self.after, self.user).await
                && page.last_id != self.after
            {
                self.after = page.last_id;
                return Ok(Next::Page(page));
            }
        }
    }

    async fn send(&mut self, text: Vec<u8>) -> io::Result<()> {
        fd(1).write_all(&text)
    }

    async fn finish(&mut self, text: &[u8]) -> io::Result<()> {
        fd(1).write_all(text)
    }
}

/// A standard stream without the buffer and lock of std's own: one read or write, one system call.
fn fd(number: i32) -> ManuallyDrop<File> {
    // SAFETY: nothing in this program closes fd 0, 1 or 2, and ManuallyDrop does not either. Where the server started us without
    // one, its system calls fail; what else might have that number now is closed when they are made.
    ManuallyDrop::new(unsafe { File::from_raw_fd(number) })
}
