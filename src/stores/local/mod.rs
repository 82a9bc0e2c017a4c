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

mod files;
pub mod folder;
mod format;
mod records;
mod ring;

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Once;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::{random_pause, unix_micros};
use crate::bus::store::{Op, Reply, Store, StoreError};
use crate::limits;
pub use files::Files;
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
    files: Option<Rc<Files>>,
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
        Local { folder, name: folder::file_name(bus), bytes, sleep, started: Instant::now(), open: None, files: None }
    }

    /// Goes on with what is open in this process, and leaves open for the next request what it opens.
    pub fn sharing(self, files: Rc<Files>) -> Local<S> {
        Local { files: Some(files), ..self }
    }

    /// Where the file is.
    pub fn path(&self) -> PathBuf {
        self.folder.path.join(&self.name)
    }

    /// Opens the file, unless it is open; none where there is none.
    fn open(&mut self, create: bool) -> Result<Option<Open>, StoreError> {
        if create {
            ignore_file_limit_signal();
        }
        if let Some(open) = &self.open {
            return match create && open.read_only {
                true => Err(self.failed(ErrorKind::ReadOnlyFilesystem.into())),
                false => Ok(Some(open.clone())),
            };
        }
        if let Some(files) = &self.files
            && let Some(open) = files.find(&self.path())
        {
            return Ok(Some(self.open.insert(open).clone()));
        }
        let Some(folder) = self.folder.open(create)? else {
            return Ok(None);
        };
        let opened = folder.open_file(&self.name, create).map_err(|error| self.failed(error))?;
        let Some((file, read_only, stat)) = opened else {
            return Ok(None);
        };
        let open = Open { folder: Rc::new(folder), file: Rc::new(file), read_only };
        // What keeps it from being written to may change without a trace on it.
        if !read_only && let Some(files) = &self.files {
            files.keep(self.path(), open.clone(), &stat);
        }
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
    fn write(&mut self, open: &Open, batch: &[Op<'_>], asked: Instant) -> Result<Vec<Reply>, Trouble> {
        let file = &*open.file;
        let metadata = file.metadata()?;
        if metadata.nlink() == 0 {
            return Err(Trouble::Moved);
        }
        let header = match Header::read(file)? {
            Found::Header(header) => header,
            // Set aside while this process waited for the lock, and then emptied, it no longer says so itself.
            Found::New if !open.folder.names(&self.name, file)? => return Err(Trouble::Moved),
            Found::New => Header::new(self.bytes, 0),
            Found::Other(Trouble::Suspect) => return Err(Trouble::Damaged { how: "damaged", last: None }),
            Found::Other(trouble) => return Err(trouble),
        };
        let late = asked.elapsed();
        let mut view = View::new(file, header).late(late);
        if metadata.len() < view.layout.length(&header) {
            return Err(Trouble::Damaged { how: "cut short", last: header.last });
        }
        let mut replies = view.run_and_publish(batch);
        if let Err(Trouble::Io(error)) = &replies
            && folder::is_full(error)
        {
            // The disk is full, perhaps of what has expired here. Nothing of the batch is visible: once more.
            view = View::new(file, view.published).late(late);
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
        // A record is found by way of what publishers overwrite: it is read under the lock.
        let takes_no_lock = |op: &Op| matches!(op, Op::Last | Op::Get(_) | Op::Probe(_) | Op::SigningKey);
        let lock_free = batch.iter().all(takes_no_lock);
        let writes = !batch.iter().all(|op| takes_no_lock(op) || matches!(op, Op::Record(_)));
        let asked = Instant::now();
        for attempt in 0..ATTEMPTS {
            if lock_free && attempt < ATTEMPTS / 2 {
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
            match self.write(&open, batch, asked) {
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

/// A write beyond `ulimit -f` is an error from now on, and no longer the end of the process.
fn ignore_file_limit_signal() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: it gives the kernel two numbers. Ignored is no handler: none of our code runs at a signal.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    });
}

/// The answer where there is no file.
fn nothing(batch: &[Op<'_>]) -> Vec<Reply> {
    vec![Reply::Missing; batch.len()]
}

/// Released when it goes, also on the way out with an error. Requests of one process share the open file, and with it the
/// lock: so none waits for anything while it holds it.
struct Lock(Rc<File>);

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::bus::store::Counter;
    use crate::stores::block_on;

    /// A folder for the bus `chat`, removed at the end.
    struct Place(PathBuf);

    impl Place {
        fn new() -> Place {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let name = format!("shortbus-unit-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir(&path).unwrap();
            Place(path)
        }

        fn try_run(&self, batch: &[Op]) -> Result<Vec<Reply>, StoreError> {
            let folder = Folder::named(&self.0);
            block_on(Local::new(folder, b"chat", limits::STORE_BYTES_MIN, WholeProcess).run(batch))
        }

        #[track_caller]
        fn run(&self, batch: &[Op]) -> Vec<Reply> {
            self.try_run(batch).unwrap()
        }

        /// A counter of 7, and a slot with this value behind it.
        fn begin(&self, value: &[u8]) -> Counter {
            self.run(&[Op::Create(7)]);
            self.run(&[add(8, value), Op::Advance(self.counter().cas)]);
            self.counter()
        }

        fn counter(&self) -> Counter {
            match self.run(&[Op::Last])[0] {
                Reply::Counter(counter) => counter,
                ref other => panic!("{other:?}"),
            }
        }

        fn file(&self) -> PathBuf {
            self.0.join("chat:messages")
        }

        /// Changes the header as a process of this version would not.
        fn change(&self, change: impl FnOnce(&mut Header)) {
            let file = File::options().read(true).write(true).open(self.file()).unwrap();
            let Ok(Found::Header(mut header)) = Header::read(&file) else { panic!("no header") };
            change(&mut header);
            header.write(&file).unwrap();
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn add(id: u64, value: &[u8]) -> Op<'_> {
        Op::Add { slot: id, value, ttl: 60 }
    }

    #[test]
    fn every_operation_answers_as_the_trait_says() {
        let place = Place::new();
        assert_eq!(place.run(&[Op::Last, Op::Get(1), Op::SigningKey, Op::Record("1:a")]), vec![Reply::Missing; 4]);
        assert!(!place.file().exists(), "reading makes no file");
        let replies = place.run(&[Op::Advance(1), add(1, b"x"), Op::Create(7), Op::Create(9)]);
        assert_eq!(replies, [Reply::Missing, Reply::Taken, Reply::Stored, Reply::Taken]);
        let counter = place.counter();
        assert_eq!(counter.value, 7);
        let batch = [Op::Last, add(8, b"eight"), Op::Advance(counter.cas), Op::Get(8), Op::Probe(8), Op::Probe(9)];
        let replies = place.run(&batch);
        assert_eq!(replies[..3], [Reply::Counter(counter), Reply::Stored, Reply::Stored]);
        assert_eq!(replies[3..], [Reply::Value(b"eight".to_vec()), Reply::Stored, Reply::Missing]);
        // The token is old, the slot taken; and one far behind is of a counter that this file never had.
        let replies = place.run(&[add(8, b"x"), Op::Advance(counter.cas), add(99, b"x")]);
        assert_eq!(replies, [Reply::Taken, Reply::Taken, Reply::Taken]);
        // Slots that are ahead of the counter stay.
        assert_eq!(place.run(&[add(9, b"nine"), add(10, b"ten")]), [Reply::Stored, Reply::Stored]);
        assert_eq!(place.run(&[add(9, b"x"), Op::Advance(place.counter().cas)]), [Reply::Taken, Reply::Stored]);
        assert_eq!(place.run(&[Op::Get(9), Op::Get(10)]), [b"nine".to_vec(), b"ten".to_vec()].map(Reply::Value));
        let replies = place.run(&[Op::CreateSigningKey(b"one"), Op::CreateSigningKey(b"two"), Op::SigningKey]);
        assert_eq!(replies, [Reply::Stored, Reply::Taken, Reply::Value(b"one".to_vec())]);
        let create = Op::CreateRecord { key: "1:a", token: 5, ttl: 60 };
        let replies = place.run(&[Op::AppendRecord("1:a", 1), create, create, Op::AppendRecord("1:a", 9)]);
        assert_eq!(replies, [Reply::Taken, Reply::Stored, Reply::Taken, Reply::Stored]);
        assert_eq!(place.run(&[Op::Record("1:a")]), [Reply::Record(b"5 9".to_vec(), 60)]);
    }

    #[test]
    fn a_batch_that_is_refused_has_done_nothing() {
        let place = Place::new();
        let counter = place.begin(b"x");
        let huge = vec![b'x'; limits::STORE_BYTES_MIN as usize / 3];
        let record = Op::CreateRecord { key: "1:a", token: 1, ttl: 60 };
        let batch = [record, add(9, b"a"), Op::Advance(counter.cas), add(10, &huge), add(11, &huge)];
        assert!(matches!(place.try_run(&batch), Err(StoreError::StoreFull(_))));
        assert_eq!(place.counter(), counter);
        assert_eq!(place.run(&[Op::Record("1:a"), Op::Get(9), Op::Get(8)])[..2], [Reply::Missing, Reply::Missing]);
        assert_eq!(place.run(&batch[..4]), vec![Reply::Stored; 4]);
    }

    #[test]
    fn records_are_found_among_many_and_the_oldest_go_first() {
        let place = Place::new();
        place.begin(b"x");
        let names: Vec<String> = (0..20_000).map(|n| format!("{n}:a-name-of-its-own-for-the-send")).collect();
        for part in names.chunks(1_000) {
            let created = part.iter().map(|key| Op::CreateRecord { key, token: 1, ttl: 60 });
            let batch: Vec<Op> = created.chain(part.iter().map(|key| Op::AppendRecord(key, 17))).collect();
            assert!(place.run(&batch).iter().all(|reply| *reply == Reply::Stored));
        }
        let mut lives = names.iter().map(|name| place.run(&[Op::Record(name)]) != [Reply::Missing]).collect::<Vec<_>>();
        let gone = lives.iter().filter(|lives| !**lives).count();
        assert!((8_000..15_000).contains(&gone), "{gone}");
        // But for the two versions that a part of this test has of each.
        lives.drain(..gone + 1_000);
        assert!(lives.iter().all(|lives| *lives));
        assert!(std::fs::metadata(place.file()).unwrap().len() <= limits::STORE_BYTES_MIN);
    }

    #[test]
    fn the_index_is_a_bound_too() {
        let place = Place::new();
        place.begin(b"x");
        let values = vec![b"1 7".to_vec(); 1_000];
        for _ in 0..40 {
            let counter = place.counter();
            let mut batch: Vec<Op> = (1..).zip(&values).map(|(n, value)| add(counter.value + n, value)).collect();
            batch.extend((0..values.len() as u64).map(|n| Op::Advance(counter.cas + n)));
            assert!(place.run(&batch).iter().all(|reply| *reply == Reply::Stored));
        }
        let (last, slots) = (place.counter().value, limits::STORE_BYTES_MIN / 64 * 8 / 32);
        assert_eq!(place.run(&[Op::Probe(last + 1 - slots), Op::Probe(last - slots)]), [Reply::Stored, Reply::Missing]);
    }

    #[test]
    fn what_was_written_before_the_host_started_is_gone_and_ids_go_on() {
        let place = Place::new();
        let counter = place.begin(b"x");
        place.run(&[Op::CreateRecord { key: "1:a", token: 5, ttl: 60 }]);
        place.change(|header| header.written = u64::MAX / 2);
        assert_eq!(place.run(&[Op::Get(8), Op::Record("1:a")]), [Reply::Missing, Reply::Missing]);
        assert_eq!(place.counter(), counter);
        assert_eq!(place.run(&[add(8, b"x"), add(9, b"nine"), Op::Advance(counter.cas)])[1..], vec![Reply::Stored; 2]);
        assert_eq!(place.run(&[Op::Get(8), Op::Get(9)]), [Reply::Missing, Reply::Value(b"nine".to_vec())]);
    }

    #[test]
    fn a_file_of_a_newer_version_is_left_alone_and_one_of_an_older_set_aside() {
        let place = Place::new();
        place.begin(b"x");
        place.change(|header| header.format = 2);
        let before = std::fs::read(place.file()).unwrap();
        for batch in [[Op::Last], [Op::Create(7)]] {
            assert!(matches!(place.try_run(&batch), Err(StoreError::StoreBroken(_))));
        }
        assert_eq!(std::fs::read(place.file()).unwrap(), before);
        let place = Place::new();
        place.begin(b"x");
        place.change(|header| header.format = 0);
        assert_eq!(place.run(&[Op::Last]), [Reply::Missing]);
        assert!(Path::new(&place.0).join("chat:messages.damaged").exists());
    }

    #[test]
    fn a_counter_never_begins_below_that_of_a_file_that_was_set_aside() {
        let place = Place::new();
        place.begin(b"x");
        let file = File::options().write(true).open(place.file()).unwrap();
        file.set_len(5_000).unwrap();
        // The clock was set back meanwhile.
        assert_eq!(place.run(&[Op::Create(3)]), [Reply::Stored]);
        assert_eq!(place.counter().value, 9);
    }

    #[test]
    fn a_file_that_waited_to_be_begun_begins_by_the_clock_as_it_then_is() {
        let place = Place::new();
        let file = File::create(place.file()).unwrap();
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| place.run(&[Op::Create(7)]));
            std::thread::sleep(Duration::from_millis(300));
            flock(&file, FlockOperation::Unlock).unwrap();
        });
        assert!(place.counter().value > 7, "{:?}", place.counter());
    }

    #[test]
    fn a_file_that_was_set_aside_and_then_emptied_is_not_begun_anew() {
        let place = Place::new();
        place.begin(b"x");
        let mut kept = Local::new(Folder::named(&place.0), b"chat", limits::STORE_BYTES_MIN, WholeProcess);
        assert_eq!(block_on(kept.run(&[Op::Probe(8)])), Ok(vec![Reply::Stored]));
        let aside = place.0.join("aside");
        std::fs::rename(place.file(), &aside).unwrap();
        File::create(&aside).unwrap();
        assert_eq!(block_on(kept.run(&[Op::Create(9)])), Ok(vec![Reply::Stored]));
        assert_eq!((std::fs::metadata(&aside).unwrap().len(), place.counter().value), (0, 9));
    }

    #[test]
    fn a_process_that_keeps_the_file_open_goes_on_in_the_one_that_took_its_place() {
        let place = Place::new();
        place.begin(b"x");
        let folder = Folder::named(&place.0);
        let mut kept = Local::new(folder, b"chat", limits::STORE_BYTES_MIN, WholeProcess);
        assert_eq!(block_on(kept.run(&[Op::Probe(8)])), Ok(vec![Reply::Stored]));
        std::fs::remove_file(place.file()).unwrap();
        assert_eq!(block_on(kept.run(&[Op::Probe(8)])), Ok(vec![Reply::Missing]));
        place.begin(b"y");
        assert_eq!(block_on(kept.run(&[Op::Get(8)])), Ok(vec![Reply::Value(b"y".to_vec())]));
    }
}
