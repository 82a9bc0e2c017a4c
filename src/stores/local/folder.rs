//! The folder of the files, and what is refused there: what another user could have put in the bus's way.
//!
//! Owner, mode and type are checked on open descriptors, and no link is followed that another user could have made.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fchmod, fstat, mkdir, open, openat, renameat, statat};
use rustix::io::Errno;

use crate::bus::store::StoreError;
use crate::stores::{effective_user, short_name};

/// The folder that holds buses' files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    /// Where it is.
    pub path: PathBuf,
    /// It is the one that this user's processes make themselves, for this user alone; else `SHORTBUS_STORE`.
    pub own: bool,
}

/// An open folder that may be trusted.
pub struct OpenFolder {
    fd: OwnedFd,
    own: bool,
    mode: u32,
}

/// The bus's file in its folder. ':' stands in no encoded name, so it is never a link that tells where a bus lives.
pub fn file_name(bus: &[u8]) -> String {
    format!("{}:messages", plain_name(bus))
}

/// What a damaged file is called from then on.
pub fn damaged_name(file_name: &str) -> String {
    format!("{file_name}.damaged")
}

/// A bus's name as a file may have it: no two names share one.
pub fn plain_name(bus: &[u8]) -> String {
    match bus {
        b"." | b".." => "%2E".repeat(bus.len()),
        _ => short_name(bus),
    }
}

impl Folder {
    /// The one of this user, in memory.
    pub fn own() -> Folder {
        Folder { path: Path::new("/dev/shm").join(format!("shortbus-{}", effective_user())), own: true }
    }

    /// The one that `SHORTBUS_STORE` names.
    pub fn named(path: impl Into<PathBuf>) -> Folder {
        Folder { path: path.into(), own: false }
    }

    /// Opens it. Where it is this user's own it may be missing: none, unless it is to be created.
    ///
    /// # Errors
    /// [`StoreError::StoreDenied`] above all.
    pub fn open(&self, create: bool) -> Result<Option<OpenFolder>, StoreError> {
        if self.own && create {
            match mkdir(&self.path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(failed(&self.path, error.into())),
            }
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // The way to SHORTBUS_STORE is the operator's, links included.
        let flags = if self.own { flags | OFlags::NOFOLLOW } else { flags };
        let opened = open(&self.path, flags, Mode::empty()).and_then(|fd| fstat(&fd).map(|stat| (fd, stat)));
        let (fd, stat) = match opened {
            Err(Errno::NOENT) if self.own && !create => return Ok(None),
            opened => opened.map_err(|error| failed(&self.path, error.into()))?,
        };
        if self.own {
            only_ours(&stat).map_err(|error| failed(&self.path, error))?;
        }
        Ok(Some(OpenFolder { fd, own: self.own, mode: stat.st_mode }))
    }
}

impl OpenFolder {
    /// The folder's descriptor.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Opens a file, and says whether only to be read, and what fstat(2) says of it; none where there is none.
    ///
    /// # Errors
    /// Those of open(2), and what [`OpenFolder::check`] refuses.
    pub fn open_file(&self, name: &str, create: bool) -> io::Result<Option<(File, bool, Stat)>> {
        // NONBLOCK: another user's named pipe must not hold us.
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let mut read_only = false;
        let mut opened = openat(&self.fd, name, flags | OFlags::RDWR, Mode::empty());
        if let Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) = opened
            && !create
        {
            // Polls need no more.
            read_only = true;
            opened = openat(&self.fd, name, flags | OFlags::RDONLY, Mode::empty());
        }
        if let Err(Errno::NOENT) = opened {
            if !create {
                return Ok(None);
            }
            opened = self.create_file(name, flags | OFlags::RDWR);
        }
        let fd = opened?;
        let stat = fstat(&fd)?;
        self.check(&stat)?;
        Ok(Some((File::from(fd), read_only, stat)))
    }

    /// Creates a file for this user, and for the folder's group where that may write in the folder; whatever the umask is.
    fn create_file(&self, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        match openat(&self.fd, name, flags | OFlags::CREATE | OFlags::EXCL, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => {
                if self.is_shared() {
                    fchmod(&fd, Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP)?;
                }
                Ok(fd)
            }
            Err(Errno::EXIST) => openat(&self.fd, name, flags, Mode::empty()),
            Err(error) => Err(error),
        }
    }

    /// Whether the operator lets the folder's group in, and not everyone.
    fn is_shared(&self) -> bool {
        !self.own && self.mode & 0o022 == 0o020
    }

    /// Refuses what is no file, and what another user could have put there or could write to.
    fn check(&self, stat: &Stat) -> io::Result<()> {
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refused("it is no file"));
        }
        if self.own || self.mode & 0o002 != 0 {
            return only_ours(stat);
        }
        // Where not everyone may write, the operator has said who may.
        if stat.st_mode & 0o002 != 0 {
            return Err(refused("every user may write to it"));
        }
        Ok(())
    }

    /// Whether the file of this name is the one that is open.
    ///
    /// # Errors
    /// Those of stat(2).
    pub fn names(&self, name: &str, file: &File) -> io::Result<bool> {
        let open = fstat(file)?;
        match statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok((stat.st_dev, stat.st_ino) == (open.st_dev, open.st_ino)),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives a file another name.
    ///
    /// # Errors
    /// Those of rename(2).
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.fd, from, &self.fd, to)?)
    }
}

/// Refuses what another user owns or could open.
fn only_ours(stat: &Stat) -> io::Result<()> {
    let (owner, ours) = (stat.st_uid, effective_user());
    if owner != ours {
        return Err(refused(&format!("user {owner} owns it, and this is user {ours}")));
    }
    match stat.st_mode & 0o077 {
        0 => Ok(()),
        _ => Err(refused(&format!("its mode {:o} lets other users in", stat.st_mode & 0o7777))),
    }
}

fn refused(why: &str) -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, why)
}

/// Whether there is no room for another byte.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
}

/// What a failed system call means.
pub fn failed(path: &Path, error: io::Error) -> StoreError {
    let cause = format!("{}: {error}", path.display());
    match error.kind() {
        _ if is_full(&error) => StoreError::StoreFull(cause),
        ErrorKind::PermissionDenied
        | ErrorKind::ReadOnlyFilesystem
        | ErrorKind::NotFound
        | ErrorKind::NotADirectory
        | ErrorKind::IsADirectory => StoreError::StoreDenied(cause),
        // A link, where none is followed.
        _ if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => StoreError::StoreDenied(cause),
        _ => StoreError::StoreBroken(cause),
    }
}
