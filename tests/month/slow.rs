//! A way to memcached that is slow now and then, and a memcached with all its connections taken.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use crate::fixtures::daemon::Folder;

/// What a proxy does to what passes it.
#[derive(Default)]
struct Treatment {
    /// By how many milliseconds it delays each piece.
    delay: AtomicU64,
    /// How many pieces it passes half, and then no more of their connections.
    cuts: AtomicU64,
}

/// A proxy in front of a memcached.
pub(super) struct Slow {
    folder: Folder,
    treatment: Arc<Treatment>,
}

impl Slow {
    pub(super) fn start(memcached: &str) -> Slow {
        let slow = Slow { folder: Folder::new(), treatment: Arc::default() };
        let listener = UnixListener::bind(slow.address()).unwrap();
        // Whoever serves may use it.
        std::fs::set_permissions(slow.address(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let (memcached, treatment) = (memcached.to_owned(), slow.treatment.clone());
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = UnixStream::connect(&memcached) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let treatment = treatment.clone();
                    thread::spawn(move || pass(from, to, &treatment));
                }
            }
        });
        slow
    }

    pub(super) fn address(&self) -> String {
        self.folder.join("slow.sock").display().to_string()
    }

    /// Delays each piece for so long, while this lasts.
    pub(super) fn delay(&self, delay: Duration, lasts: Duration) {
        self.treatment.delay.store(delay.as_millis() as u64, SeqCst);
        thread::sleep(lasts);
        self.treatment.delay.store(0, SeqCst);
    }

    /// Cuts this many connections in the middle of what they pass next, if they do within so long.
    pub(super) fn cut(&self, times: u64, within: Duration) {
        self.treatment.cuts.store(times, SeqCst);
        thread::sleep(within);
        self.treatment.cuts.store(0, SeqCst);
    }
}

fn pass(mut from: UnixStream, mut to: UnixStream, treatment: &Treatment) {
    let mut buffer = vec![0; 65_536];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let delay = || treatment.delay.load(SeqCst);
        // It ends for what waits, too.
        let mut waited = 0;
        while waited < delay() {
            thread::sleep(Duration::from_millis(5));
            waited += 5;
        }
        let is_cut = treatment.cuts.fetch_update(SeqCst, SeqCst, |cuts| cuts.checked_sub(1)).is_ok();
        let length = if is_cut { length / 2 } else { length };
        if to.write_all(&buffer[..length]).is_err() || is_cut {
            break;
        }
    }
    for stream in [from, to] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// Takes all connections that a memcached may have, until they are dropped.
pub(super) fn crowd(memcached: &Path) -> Vec<BufReader<UnixStream>> {
    let mut taken = vec![];
    loop {
        let mut stream = BufReader::new(UnixStream::connect(memcached).unwrap());
        let mut line = String::new();
        let asked = stream.get_mut().write_all(b"version\r\n").and_then(|()| stream.read_line(&mut line));
        if asked.is_err() || !line.starts_with("VERSION") {
            return taken;
        }
        taken.push(stream);
    }
}
