//! Run by hand: the file explains itself.

use std::time::Instant;

use crate::bus;
use crate::config::{Auth, Config};
use crate::http::error::Error;
use crate::stores::block_on;
use crate::stores::memcached::blocking::Memcached;
use crate::variables::Variables;

const HELP: &str = "\
shortbus: a broadcasting message bus for browser pages, in one executable, for CGI and FastCGI.

Copy this file into a web server's cgi-bin. The copy's name is a bus:
  cp cgi-bin/shortbus /usr/lib/cgi-bin/chat

  GET  /cgi-bin/chat                join: {\"user\":U,\"id\":N}
  GET  /cgi-bin/chat?user=U&id=N    poll: the messages after N that U did not send
  POST /cgi-bin/chat?user=U         publish the JSON value in the body; with &once=K at most once for each K

Started with a listening socket as fd 0 (spawn-fcgi, systemd), this file stays up and serves FastCGI. Polls may then wait,
&wait=60, or stream, &stream=1. README.md and docs/ tell more, also of signed buses.

By hand:
  --check      show the settings, reach memcached, try all that a bus needs of it
  --version    show the version
  --help       show this

The web server sets settings, as environment variables: SHORTBUS_TTL, SHORTBUS_MAX_BYTES, SHORTBUS_MEMCACHED,
SHORTBUS_BUS, SHORTBUS_ALLOW_ORIGIN, SHORTBUS_WAIT, SHORTBUS_AUTH, SHORTBUS_KEY. docs/settings.md says what each does.
A bus needs no setting, but a memcached 1.6.10 or later on 127.0.0.1:11211.
";

/// Runs one command. Returns the exit code (0 well, 1 the check failed, 2 no such command) and the text: for stderr
/// where the code is 2, else for stdout.
pub fn run(argv0: &[u8], arguments: &[Vec<u8>]) -> (i32, String) {
    match arguments {
        [] => (0, HELP.into()),
        [flag] if flag == b"--help" || flag == b"-h" => (0, HELP.into()),
        [flag] if flag == b"--version" || flag == b"-V" => (0, format!("shortbus {}\n", env!("CARGO_PKG_VERSION"))),
        [flag] if flag == b"--check" => check(argv0),
        _ => (2, "shortbus: unknown arguments; try --help\n".into()),
    }
}

/// Shows what a request would meet, with this shell's environment in the place of the web server's.
fn check(argv0: &[u8]) -> (i32, String) {
    let environment = Variables::environment();
    let config = match Config::read(&environment, &Variables::default(), argv0, 0) {
        Ok(config) => config,
        Err(error) => return (1, format!("shortbus: {}\n", cause(error.into()))),
    };
    let source = |name: &str, default| if environment.get(name).is_some() { "environment" } else { default };
    let origins = if config.allow_origin.is_empty() { "none".into() } else { config.allow_origin.join(" ") };
    let auth = if config.auth == Auth::Open { "open" } else { "signed" };
    // Never the key itself: what is shown here is pasted into reports.
    let key = match (&config.auth, environment.get("SHORTBUS_KEY").map(<[u8]>::len)) {
        (Auth::Open, _) => "none".into(),
        (Auth::Signed(_), Some(length)) => format!("{length} bytes"),
        (Auth::Signed(_), None) => "made by the bus, in memcached".into(),
    };
    let mut out = "With the settings of this shell, and as its user; a request has the web server's.\n".to_owned();
    for (name, value, default) in [
        ("SHORTBUS_BUS", String::from_utf8_lossy(&config.bus).into_owned(), "the file's name"),
        ("SHORTBUS_TTL", config.ttl.to_string(), "default"),
        ("SHORTBUS_MAX_BYTES", config.max_bytes.to_string(), "default"),
        ("SHORTBUS_MEMCACHED", config.memcached.join(" "), "default"),
        ("SHORTBUS_ALLOW_ORIGIN", origins, "default"),
        ("SHORTBUS_WAIT", config.wait.to_string(), "default, and 60 in FastCGI"),
        ("SHORTBUS_AUTH", auth.into(), "default"),
        ("SHORTBUS_KEY", key, "default"),
    ] {
        out.push_str(&format!("{name:22} {value}  ({})\n", source(name, default)));
    }
    match try_memcached(&config, &mut out) {
        Ok(()) => (0, out + "ok\n"),
        Err(error) => (1, format!("{out}shortbus: {}\n", cause(error))),
    }
}

/// Writes messages and reads them back, and tries what else the bus needs, where the bus lives but in keys of its own: its
/// users hear nothing of it.
fn try_memcached(config: &Config, out: &mut String) -> Result<(), Error> {
    let store = Memcached::connect(&config.memcached, &config.bus)?;
    let (server, version) = (store.server().to_owned(), store.version()?);
    out.push_str(&format!("{:22} {server}  {version}\n", "memcached"));
    let mut store = Memcached::connect(&[server], &[&config.bus[..], b"/check"].concat())?;
    let started = Instant::now();
    block_on(bus::check(&mut store, config.ttl, config.max_bytes))?;
    let (bytes, micros) = (config.max_bytes, started.elapsed().as_micros());
    out.push_str(&format!("{:22} written and read back, up to {bytes} bytes, in {micros} µs\n", "test messages"));
    Ok(())
}

/// What went wrong, for the person who checks.
fn cause(error: Error) -> String {
    error.cause(&error.row().2)
}
