//! Chooses a mode and reports.
//!
//! C's `main` in the place of Rust's: std's own start-up makes some twenty system calls for threads, stack guards and
//! signals that a process of one request has no use for. SIGPIPE keeps its default (end quietly), and std's
//! sockets do not raise it.

#![no_main]

use std::io::Write;
use std::os::unix::ffi::OsStringExt;

use shortbus::{cgi, cli, fastcgi};

// SAFETY: no_main leaves C's name to this one function. It may take none of the arguments that C passes.
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    let mut arguments = std::env::args_os().map(OsStringExt::into_vec);
    let argv0 = arguments.next().unwrap_or_default();
    // Under a web server argv says nothing: a query without '=' gets there (RFC 3875 section 4.4).
    if ["GATEWAY_INTERFACE", "REQUEST_METHOD"].iter().any(|name| std::env::var_os(name).is_some()) {
        cgi::serve(&argv0);
        return 0;
    }
    if let Some(listener) = fastcgi::listener() {
        let ended = fastcgi::serve(&argv0, listener);
        return ended.map_or_else(|error| report(&format!("shortbus: cannot serve: {error}\n")), |()| 0);
    }
    let (code, text) = cli::run(&argv0, &arguments.collect::<Vec<_>>());
    let written = match code {
        2 => std::io::stderr().write_all(text.as_bytes()),
        _ => std::io::stdout().write_all(text.as_bytes()),
    };
    if written.is_err() { 1 } else { code }
}

/// Tells the operator: exit code 1.
fn report(line: &str) -> i32 {
    let _ = std::io::stderr().write_all(line.as_bytes());
    1
}
