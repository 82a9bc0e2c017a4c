//! The least that a CGI program can do: reads a small body, if there is one, and prints an empty poll's reply. Starts and
//! writes as shortbus does.

#![no_main]

use std::fs::File;
use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;

// SAFETY: no_main leaves C's name to this one function. It may take none of the arguments that C passes.
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    if std::env::var_os("CONTENT_LENGTH").is_some_and(|length| !length.is_empty()) {
        // SAFETY: stdin is open for as long as the process; ManuallyDrop leaves it so.
        let mut stdin = ManuallyDrop::new(unsafe { File::from_raw_fd(0) });
        let _ = stdin.read(&mut [0; 256]);
    }
    // SAFETY: stdout is open for as long as the process; ManuallyDrop leaves it so.
    let mut stdout = ManuallyDrop::new(unsafe { File::from_raw_fd(1) });
    stdout.write_all(include_bytes!("reply.http")).is_err().into()
}
