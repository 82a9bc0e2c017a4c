//! Random numbers, straight from the kernel: no generator to seed in a process that draws one number, and no device, which
//! an empty chroot has not.

use std::fs::File;
use std::io::{self, Read};

/// Fills at most 256 bytes, which the kernel gives in one piece.
///
/// # Panics
/// Where the kernel has no getrandom(2), as before Linux 3.17, and there is no `/dev/urandom` either.
pub fn fill(bytes: &mut [u8]) {
    // SAFETY: the kernel writes to these bytes and no others.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(filled) != Ok(bytes.len()) {
        let refused = io::Error::last_os_error();
        let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(bytes));
        read.unwrap_or_else(|error| panic!("no random numbers: getrandom: {refused}; /dev/urandom: {error}"));
    }
}

/// Any number.
pub fn number() -> u64 {
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_le_bytes(bytes)
}
