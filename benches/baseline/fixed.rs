//! The least that a CGI program can do: prints an empty poll's reply. Starts and writes as shortbus does.

#![no_main]

use std::fs::File;
use std::io::Write;
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;

#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    // SAFETY: stdout is open for as long as the process; ManuallyDrop leaves it so.
    let mut stdout = ManuallyDrop::new(unsafe { File::from_raw_fd(1) });
    stdout.write_all(include_bytes!("reply.http")).is_err().into()
}
