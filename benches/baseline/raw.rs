//! The least that talks to memcached: connects, reads one missing key (twice for a POST, as a publish has to wait
//! twice), prints an empty poll's reply. No checks, no time limits, no buffers.

#![no_main]

use std::fs::File;
use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;

// SAFETY: no_main leaves C's name to this one function. It may take none of the arguments that C passes.
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    let address = std::env::var("SHORTBUS_MEMCACHED").unwrap();
    if address.starts_with('/') {
        serve(UnixStream::connect(address).unwrap());
    } else {
        serve(TcpStream::connect(address.parse::<SocketAddr>().unwrap()).unwrap());
    }
    0
}

fn serve(mut memcached: impl Read + Write) {
    let mut reply = [0; 64];
    for _ in 0..if std::env::var_os("REQUEST_METHOD").is_some_and(|method| method == "POST") { 2 } else { 1 } {
        memcached.write_all(b"mg shortbus:bench:1234567890123456 v\r\n").unwrap();
        let length = memcached.read(&mut reply).unwrap();
        assert_eq!(&reply[..length], b"EN\r\n");
    }
    // SAFETY: stdout is open for as long as the process; ManuallyDrop leaves it so.
    let mut stdout = ManuallyDrop::new(unsafe { File::from_raw_fd(1) });
    stdout.write_all(include_bytes!("reply.http")).unwrap();
}
