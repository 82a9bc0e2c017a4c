//! Who waits for changes of which file: one inotify(7) descriptor for all of a process.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::{Rc, Weak};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use tokio::io::unix::AsyncFd;
use tokio::select;
use tokio::sync::watch;
use tokio::task::spawn_local;

/// What tells of changes of a bus.
pub struct Followed {
    /// Its file.
    pub file: watch::Receiver<()>,
    /// The decision that it lives there, where there is one.
    pub decision: Option<watch::Receiver<()>>,
}

impl Followed {
    /// Waits for a change of either.
    pub async fn changed(&mut self) {
        let decision = async {
            match &mut self.decision {
                Some(decision) => decision.changed().await.is_ok(),
                None => pending().await,
            }
        };
        // An error is a change as well: the kernel has forgotten the file, and it is to be followed anew.
        select! {
            _ = self.file.changed() => {}
            _ = decision => {}
        }
    }
}

/// The files that are waited for.
#[derive(Default)]
pub struct Watches {
    /// From the first one on.
    inotify: RefCell<Option<Rc<AsyncFd<OwnedFd>>>>,
    /// By the kernel's number of the watch.
    files: RefCell<HashMap<i32, watch::Sender<()>>>,
}

impl Watches {
    /// Notified from now on when the file may have changed, was removed, replaced, or made where it is missing. None where
    /// the system has no watch for it.
    ///
    /// To be called before each look at the file: a file that has taken its place is another to the kernel.
    pub fn follow(self: &Rc<Watches>, path: &Path) -> Option<watch::Receiver<()>> {
        let inotify = self.inotify().ok()?;
        let gone = WatchFlags::MOVE_SELF | WatchFlags::DELETE_SELF | WatchFlags::ATTRIB;
        let file = WatchFlags::MODIFY | gone | WatchFlags::DONT_FOLLOW;
        let watch = |path: &Path, flags| inotify::add_watch(inotify.get_ref(), path, flags).ok();
        let number = watch(path, file).or_else(|| {
            let folder = watch(path.parent()?, WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR);
            // It may have been made just now.
            watch(path, file).or(folder)
        })?;
        Some(self.files.borrow_mut().entry(number).or_default().subscribe())
    }

    fn inotify(self: &Rc<Watches>) -> io::Result<Rc<AsyncFd<OwnedFd>>> {
        if let Some(inotify) = &*self.inotify.borrow() {
            return Ok(inotify.clone());
        }
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // SAFETY: an OwnedFd's descriptor is open and the same one until it is dropped, and this AsyncFd has it to the end.
        let inotify = Rc::new(unsafe { AsyncFd::register(fd)? });
        spawn_local(read(Rc::downgrade(self), inotify.clone()));
        Ok(self.inotify.borrow_mut().insert(inotify).clone())
    }

    /// Tells those who wait for this file, and forgets files that nobody waits for.
    fn notify(&self, inotify: &AsyncFd<OwnedFd>, number: i32, flags: ReadFlags) {
        let mut files = self.files.borrow_mut();
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            files.values().for_each(|file| file.send_replace(()));
            return;
        }
        let Some(file) = files.get(&number) else {
            return;
        };
        file.send_replace(());
        if flags.contains(ReadFlags::IGNORED) {
            files.remove(&number);
        } else if file.receiver_count() == 0 {
            files.remove(&number);
            let _ = inotify::remove_watch(inotify.get_ref(), number);
        }
    }
}

/// Reads events for as long as anybody wants them.
async fn read(watches: Weak<Watches>, inotify: Rc<AsyncFd<OwnedFd>>) {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    loop {
        let Ok(mut ready) = inotify.readable().await else {
            return;
        };
        let Some(watches) = watches.upgrade() else {
            return;
        };
        let mut events = Reader::new(inotify.get_ref(), &mut buffer);
        while let Ok(event) = events.next() {
            watches.notify(&inotify, event.wd(), event.events());
        }
        ready.clear_ready();
    }
}
