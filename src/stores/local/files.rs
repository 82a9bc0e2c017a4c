//! The files that a process of many requests leaves open: to see that one is still at its path takes one system call, to open
//! it anew takes six.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rustix::fs::{Stat, lstat};

use super::Open;
use crate::limits;

/// Open files by their paths, at most [`limits::OPEN_FILES`].
#[derive(Default)]
pub struct Files(RefCell<HashMap<PathBuf, (Open, Identity)>>);

/// Which file it is, and what decides whether it may be trusted: device, inode, mode and owner.
type Identity = (u64, u64, u32, u32);

fn identity(stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino, stat.st_mode, stat.st_uid)
}

impl Files {
    /// The file at this path, if it is open and nothing about it has changed: removed, replaced, in a folder that was moved.
    pub(super) fn find(&self, path: &Path) -> Option<Open> {
        let (open, kept) = self.0.borrow().get(path)?.clone();
        match lstat(path) {
            Ok(stat) if identity(&stat) == kept => Some(open),
            _ => {
                self.0.borrow_mut().remove(path);
                None
            }
        }
    }

    /// Leaves it open.
    pub(super) fn keep(&self, path: PathBuf, open: Open, stat: &Stat) {
        let mut files = self.0.borrow_mut();
        if files.len() >= limits::OPEN_FILES
            && let Some(any) = files.keys().next().cloned()
        {
            files.remove(&any);
        }
        files.insert(path, (open, identity(stat)));
    }
}
