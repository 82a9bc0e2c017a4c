//! A bus in one file of this host, shared by processes of which each may be killed at any moment.
//!
//! Slots are appended to a [`ring`], and an index entry per id says where. Both are written into space that the header does
//! not name yet; then one write of the header makes the whole batch visible. So a process that is killed leaves either all
//! of a batch or nothing, and what lies beyond the header's ends is overwritten by the next one. [`format`] says where each
//! part is, [`records`] how idempotency records are kept, [`folder`] which files are refused.
//!
//! Batches that write run under flock(2), which the kernel releases with the process. Batches that read take no lock: what
//! the header names is never changed, only evicted, and every part carries its own id and checksum. A reader that meets
//! something else reads the header again. Either the part is evicted by now or, read once more under the lock, the file is
//! damaged: it is set aside, and a new one begun.
//!
//! A batch is all or nothing, which is more than the protocol asks. An id up to the newest stored one is *taken* for ever,
//! also when its slot has expired: nobody can store a message behind a cursor that has passed.

pub mod folder;
mod format;
mod records;
mod ring;

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::{random_pause, unix_micros};
use crate::bus::store::{Op, Reply, Store, StoreError};
use crate::limits;
use folder::{Folder, OpenFolder, failed};
use format::{Found, Header, MOVED};
use ring::View;

/// How a process waits: blocking under CGI, on its event loop under FastCGI.
#[allow(async_fn_in_trait, reason = "each is used by name, on one thread")]
pub trait Sleep {
    /// Waits for so long.
    async fn sleep(&self, time: Duration);
}

/// The whole process waits.
pub struct WholeProcess;

impl Sleep for WholeProcess {
    async fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// One task of the event loop waits.
pub struct OneTask;

impl Sleep for OneTask {
    async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}

/// Looks at a file that is just being evicted from, set aside or replaced.
const ATTEMPTS: u32 = 8;

/// A bus's keys in a file.
pub struct Local<S> {
    folder: Folder,
    /// The file's name.
    name: String,
    /// Bytes of the file, where this process begins it.
    bytes: u64,
    sleep: S,
    started: Instant,
    open: Option<Open>,
}

/// An open file, in its folder.
#[derive(Clone)]
struct Open {
    folder: Rc<OpenFolder>,
    file: Rc<File>,
    /// It may be read and not written.
    read_only: bool,
}

/// Why a batch was not carried out.
#[derive(Debug)]
enum Trouble {
    /// The store's own reason.
    Store(StoreError),
    /// A system call's.
    Io(io::Error),
    /// The file is no longer the one at its path.
    Moved,
    /// Something is not what it should be. Without the lock it may just have been evicted.
    Suspect,
    /// It is beyond use.
    Damaged {
        /// The word for it.
        how: &'static str,
        /// The counter, as far as it is known.
        last: Option<u64>,
    },
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Trouble {
        Trouble::Io(error)
    }
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Trouble {
        Trouble::Store(error)
    }
}

impl<S: Sleep> Local<S> {
    /// The bus in this folder, in a file that the first write creates; `bytes` bounds it then.
    pub fn new(folder: Folder, bus: &[u8], bytes: u64, sleep: S) -> Local<S> {
        Local { folder, name: folder::file_name(bus), bytes, sleep, started: Instant::now(), open: None }
    }

    /// Where the file is.
    pub fn path(&self) -> PathBuf {
        self.folder.path.join(&self.name)
    }

    /// Opens the file, unless it is open; none where there is none.
    fn open(&mut self, create: bool) -> Result<Option<Open>, StoreError> {
        if let Some(open) = &self.open {
            return match create && open.read_only {
                true => Err(self.failed(ErrorKind::ReadOnlyFilesystem.into())),
                false => Ok(Some(open.clone())),
            };
        }
        let Some(folder) = self.folder.open(create)? else {
            return Ok(None);
        };
        let opened = folder.open_file(&self.name, create).map_err(|error| self.failed(error))?;
        let Some((file, read_only)) = opened else {
            return Ok(None);
        };
        let open = Open { folder: Rc::new(folder), file: Rc::new(file), read_only };
        Ok(Some(self.open.insert(open).clone()))
    }

    /// Waits for the lock, no longer than a request may take. flock(2) knows no time limit, so it is tried: three times at
    /// once, as a batch is over in microseconds, then with growing pauses.
    async fn lock(&self, file: &Rc<File>) -> Result<Lock, StoreError> {
        let mut pause = Duration::from_micros(50);
        for attempt in 0.. {
            match flock(file, FlockOperation::NonBlockingLockExclusive).map_err(io::Error::from) {
                Ok(()) => return Ok(Lock(file.clone())),
                Err(error) if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    return Err(self.failed(error));
                }
                Err(_) if self.started.elapsed() >= limits::STORE_DEADLINE => break,
                Err(_) if attempt < 3 => std::thread::yield_now(),
                Err(_) => {
                    self.sleep.sleep(pause).await;
                    pause = (pause * 2).min(limits::STORE_LOCK_PAUSE);
                }
            }
        }
        Err(StoreError::StoreBusy(format!("{}: another process holds its lock", self.path().display())))
    }

    /// Puts a damaged file aside and begins anew, with ids that go on rising. Under the file's lock.
    fn set_aside(&mut self, damaged: &Open, how: &str, last: Option<u64>) -> Result<(), StoreError> {
        self.open = None;
        let error = |error| failed(&self.path(), error);
        if !damaged.folder.names(&self.name, &damaged.file).map_err(error)? {
            return Ok(());
        }
        let aside = folder::damaged_name(&self.name);
        damaged.folder.rename(&self.name, &aside).map_err(error)?;
        // Every process that has it open learns of it by its next look at the header. Should this fail, by its damage.
        let _ = Header { format: MOVED, ..Header::default() }.write(&damaged.file);
        let path = self.path().display().to_string().escape_debug().to_string();
        let line = format!("shortbus: {path} was {how}: set aside as {aside}; messages were lost\n");
        let _ = io::stderr().write_all(line.as_bytes());
        let floor = last.map_or(0, |last| last + 1);
        let Some(Open { file, .. }) = self.open(true)? else {
            return Ok(());
        };
        // Another process that was faster begins by the time.
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _lock = Lock(file.clone());
            if let Ok(Found::New) = Header::read(&file) {
                return Header::new(self.bytes, floor).write(&file).map_err(|error| self.failed(error));
            }
        }
        Ok(())
    }

    fn failed(&self, error: io::Error) -> StoreError {
        failed(&self.path(), error)
    }

    /// A batch that only reads, without the lock.
    fn read(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, Trouble> {
        let known = self.open.is_some();
        let Some(Open { file, .. }) = self.open(false)? else {
            return Ok(nothing(batch));
        };
        // One that was just opened is there; one that was set aside says so in its header.
        if known && file.metadata()?.nlink() == 0 {
            return Err(Trouble::Moved);
        }
        match Header::read(&file)? {
            Found::Header(header) => View::new(&file, header).run(batch),
            Found::New => Ok(nothing(batch)),
            Found::Other(trouble) => Err(trouble),
        }
    }

    /// A batch under the lock.
    fn write(&mut self, file: &File, batch: &[Op<'_>]) -> Result<Vec<Reply>, Trouble> {
        let metadata = file.metadata()?;
        if metadata.nlink() == 0 {
            return Err(Trouble::Moved);
        }
        let header = match Header::read(file)? {
            Found::Header(header) => header,
            Found::New => Header::new(self.bytes, 0),
            Found::Other(Trouble::Suspect) => return Err(Trouble::Damaged { how: "damaged", last: None }),
            Found::Other(trouble) => return Err(trouble),
        };
        let mut view = View::new(file, header);
        if metadata.len() < view.layout.length(&header) {
            return Err(Trouble::Damaged { how: "cut short", last: header.last });
        }
        let mut replies = view.run_and_publish(batch);
        if let Err(Trouble::Io(error)) = &replies
            && folder::is_full(error)
        {
            // The disk is full, perhaps of what has expired here. Nothing of the batch is visible: once more.
            view = View::new(file, view.published);
            replies = view.tidy().and_then(|()| view.run_and_publish(batch));
        }
        replies.map_err(|trouble| match trouble {
            Trouble::Suspect => Trouble::Damaged { how: "damaged", last: header.last },
            trouble => trouble,
        })
    }
}

impl<S: Sleep> Store for Local<S> {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError> {
        let reads = |op: &Op| matches!(op, Op::Last | Op::Get(_) | Op::Probe(_) | Op::Record(_) | Op::SigningKey);
        let writes = !batch.iter().all(reads);
        for attempt in 0..ATTEMPTS {
            if !writes && attempt < ATTEMPTS / 2 {
                match self.read(batch) {
                    Ok(replies) => return Ok(replies),
                    Err(Trouble::Store(error)) => return Err(error),
                    Err(Trouble::Io(error)) => return Err(self.failed(error)),
                    Err(Trouble::Moved) => self.open = None,
                    Err(Trouble::Suspect | Trouble::Damaged { .. }) => {}
                }
                continue;
            }
            let Some(open) = self.open(writes)? else {
                return Ok(nothing(batch));
            };
            let lock = self.lock(&open.file).await?;
            match self.write(&open.file, batch) {
                Ok(replies) => return Ok(replies),
                Err(Trouble::Damaged { how, last }) => self.set_aside(&open, how, last)?,
                Err(Trouble::Store(error)) => return Err(error),
                Err(Trouble::Io(error)) => return Err(self.failed(error)),
                Err(Trouble::Moved | Trouble::Suspect) => self.open = None,
            }
            drop(lock);
        }
        Err(StoreError::StoreBroken(format!("{}: never the same twice", self.path().display())))
    }

    /// A batch of reads costs a microsecond: `last` first, then what it says there is.
    fn ahead(&self) -> u64 {
        0
    }

    async fn pause(&mut self, longest: Duration) {
        self.sleep.sleep(random_pause(longest)).await;
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn unix_micros(&self) -> u64 {
        unix_micros()
    }
}

/// The answer where there is no file.
fn nothing(batch: &[Op<'_>]) -> Vec<Reply> {
    vec![Reply::Missing; batch.len()]
}

/// Released when it goes, also on the way out with an error.
struct Lock(Rc<File>);

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}
