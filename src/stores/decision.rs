//! Where a bus without a setting lives: decided once, by the first of a user's processes that needs to know, until the host
//! boots.
//!
//! The decision is a symbolic link named by the bus, in a folder in memory that only this user may enter. The link's *text*
//! is the decision; it leads nowhere. symlink(2) fails if another process was first, so all go by one decision.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::fs::symlinkat;
use rustix::io::Errno;

use super::effective_user;
use super::local::folder::{Folder, failed, plain_name};
use crate::bus::store::StoreError;

/// The memcached of a bus that names none.
pub const MEMCACHED: &str = "127.0.0.1:11211";

/// Where a bus lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// In [`MEMCACHED`].
    Memcached,
    /// In [`Folder::own`].
    Local,
}

impl Decision {
    /// The link's text. The texts differ in length, which lstat(2) tells along with the owner: one system call a request.
    fn text(self) -> &'static str {
        match self {
            Decision::Memcached => "memcached",
            Decision::Local => "local",
        }
    }
}

/// The link of a bus.
pub fn link(bus: &[u8]) -> PathBuf {
    Folder::own().path.join(OsStr::from_bytes(plain_name(bus).as_bytes()))
}

/// The decision; where there is none yet, it is made. `ask` asks the memcached that may be there.
///
/// # Errors
/// What memcached answers but that nobody is there; then nothing is decided. [`StoreError::StoreDenied`],
/// [`StoreError::NoPlace`].
pub async fn decision(bus: &[u8], ask: impl AsyncFnOnce() -> Result<(), StoreError>) -> Result<Decision, StoreError> {
    if let Some(decision) = read(bus)? {
        return Ok(decision);
    }
    let decision = match ask().await {
        Ok(()) => Decision::Memcached,
        Err(StoreError::Refused(_)) => Decision::Local,
        Err(error) => return Err(error),
    };
    decide(bus, decision)
}

/// The decision, if there is one.
///
/// # Errors
/// [`StoreError::StoreDenied`] where another user made what is there, or it is no decision.
pub fn read(bus: &[u8]) -> Result<Option<Decision>, StoreError> {
    let path = link(bus);
    let denied = |why: String| Err(StoreError::StoreDenied(format!("{}: {why}", path.display())));
    let metadata = match fs::symlink_metadata(&path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(&path, error)),
    };
    // Only its owner can make a link of this owner, so the folder need not be looked at.
    if metadata.uid() != effective_user() {
        return denied(format!("user {} owns it, and this is user {}", metadata.uid(), effective_user()));
    }
    let is = |decision: &Decision| metadata.is_symlink() && metadata.len() == decision.text().len() as u64;
    match [Decision::Memcached, Decision::Local].into_iter().find(is) {
        Some(decision) => Ok(Some(decision)),
        None => denied("it is no decision of this version; remove it".into()),
    }
}

/// Decides, unless another process was first.
fn decide(bus: &[u8], decision: Decision) -> Result<Decision, StoreError> {
    let folder = Folder::own();
    for _ in 0..ATTEMPTS {
        let Some(open) = folder.open(true).map_err(|error| no_place(&folder, error))? else {
            continue;
        };
        match symlinkat(decision.text(), open.fd(), plain_name(bus)) {
            Ok(()) => return Ok(decision),
            Err(Errno::EXIST) => {
                if let Some(decided) = read(bus)? {
                    return Ok(decided);
                }
            }
            // The empty folder was removed just now.
            Err(Errno::NOENT) => {}
            Err(error) => return Err(no_place(&folder, failed(&link(bus), error.into()))),
        }
    }
    Err(StoreError::StoreDenied(format!("{}: never the same twice", link(bus).display())))
}

/// Tries to decide, while others remove what is there.
const ATTEMPTS: u32 = 8;

/// What it means that the folder could not be used: where it is not there, settings are needed.
fn no_place(folder: &Folder, error: StoreError) -> StoreError {
    match error {
        StoreError::StoreDenied(cause) if !folder.path.exists() => StoreError::NoPlace(cause),
        error => error,
    }
}

/// Who decided, when, and where that is written.
pub fn origin(bus: &[u8]) -> String {
    let link = link(bus);
    let age = fs::symlink_metadata(&link).and_then(|metadata| metadata.modified()).map(|time| time.elapsed());
    let seconds = age.map_or(0, |age| age.unwrap_or_default().as_secs());
    format!("as a process of user {} decided {seconds} seconds ago: {}", effective_user(), link.display())
}

/// The other users who have decided for a bus of this name, as far as this user may look.
pub fn other_users(bus: &[u8]) -> Vec<u32> {
    let own = Folder::own().path;
    let folders = own.parent().and_then(|parent| fs::read_dir(parent).ok()).into_iter().flatten().flatten();
    let others = folders.filter(|entry| entry.path() != own && entry.file_name().as_bytes().starts_with(b"shortbus-"));
    let links = others.filter_map(|entry| fs::symlink_metadata(entry.path().join(plain_name(bus))).ok());
    let mut users: Vec<u32> = links.map(|metadata| metadata.uid()).collect();
    users.sort_unstable();
    users
}
