//! Run by hand: the file explains itself.

use std::fs;
use std::time::Instant;

use crate::bus;
use crate::bus::store::{Op, Store, StoreError};
use crate::config::{Auth, Config, StoreSetting};
use crate::http::error::Error;
use crate::http::response::one_line;
use crate::stores::block_on;
use crate::stores::decision::{self, Decision};
use crate::stores::local::folder::Folder;
use crate::stores::local::{Local, WholeProcess};
use crate::stores::memcached::blocking::Memcached;
use crate::variables::Variables;

/// The manual page begins with it too: see `packaging/man.awk`.
const HELP: &str = include_str!("help.txt");

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
        Err(error) => return (1, format!("shortbus: {}\n", one_line(&cause(error.into())))),
    };
    let source = |name: &str, default| if environment.get(name).is_some() { "environment" } else { default };
    let origins = if config.allow_origin.is_empty() { "none".into() } else { config.allow_origin.join(" ") };
    let auth = if config.auth == Auth::Open { "open" } else { "signed" };
    // Never the key itself: what is shown here is pasted into reports.
    let key = match (&config.auth, environment.get("SHORTBUS_KEY").map(<[u8]>::len)) {
        (Auth::Open, _) => "none".into(),
        (Auth::Signed(_), Some(length)) => format!("{length} bytes"),
        (Auth::Signed(_), None) => "made by the bus, in its store".into(),
    };
    let none = || "none".to_owned();
    let (memcached, folder) = match &config.store {
        StoreSetting::Memcached(servers) => (servers.join(" "), none()),
        StoreSetting::Folder(folder) => (none(), folder.display().to_string()),
        StoreSetting::Unset => (none(), none()),
    };
    let mut out = "With the settings of this shell, and as its user; a request has the web server's.\n".to_owned();
    for (name, value, default) in [
        ("SHORTBUS_BUS", String::from_utf8_lossy(&config.bus).into_owned(), "the file's name"),
        ("SHORTBUS_TTL", config.ttl.to_string(), "default"),
        ("SHORTBUS_MAX_BYTES", config.max_bytes.to_string(), "default"),
        ("SHORTBUS_MEMCACHED", memcached, "default"),
        ("SHORTBUS_STORE", folder, "default"),
        ("SHORTBUS_STORE_BYTES", config.store_bytes.to_string(), "default"),
        ("SHORTBUS_ALLOW_ORIGIN", origins, "default"),
        ("SHORTBUS_WAIT", config.wait.to_string(), "default, and 60 in FastCGI"),
        ("SHORTBUS_AUTH", auth.into(), "default"),
        ("SHORTBUS_KEY", key, "default"),
    ] {
        out.push_str(&format!("{name:22} {}  ({})\n", one_line(&value), source(name, default)));
    }
    let result = home(&config).and_then(|(home, decided)| {
        out.push_str(&format!("{:22} {decided}\n", "lives in"));
        test_message(&config, home)
    });
    for user in decision::other_users(&config.bus) {
        let warning = "has a bus of this name too; it is another bus, unless a setting names one store for both";
        out.push_str(&format!("{:22} user {user} {warning}\n", "warning"));
    }
    match result {
        Ok(line) => (0, format!("{out}{}\nok\n", one_line(&line))),
        Err(error) => (1, format!("{out}shortbus: {}\n", one_line(&error))),
    }
}

/// Where a bus lives.
enum Home {
    Memcached(Vec<String>),
    Local(Folder),
}

/// Where the bus lives, and by which rule, for the person who checks. Decides nothing.
fn home(config: &Config) -> Result<(Home, String), String> {
    let folder = match &config.store {
        StoreSetting::Memcached(servers) => {
            return Ok((Home::Memcached(servers.clone()), "memcached, by SHORTBUS_MEMCACHED".into()));
        }
        StoreSetting::Folder(folder) => {
            return Ok((Home::Local(Folder::named(folder)), "a file of this host, by SHORTBUS_STORE".into()));
        }
        StoreSetting::Unset => Folder::own(),
    };
    let servers = vec![decision::MEMCACHED.to_owned()];
    let decided = decision::read(&config.bus).map_err(|error| error.to_string())?;
    let (decision, how) = match decided {
        Some(decision) => (decision, decision::origin(&config.bus)),
        None => {
            let store = Memcached::connect(&servers, &config.bus);
            let how = "not decided yet: the first request will find it so";
            match store.and_then(|store| store.version()) {
                Ok(_) => (Decision::Memcached, how.into()),
                Err(StoreError::Refused(_)) => (Decision::Local, how.into()),
                Err(error) => return Err(error.to_string()),
            }
        }
    };
    Ok(match decision {
        Decision::Memcached => (Home::Memcached(servers), format!("memcached at {}, {how}", decision::MEMCACHED)),
        Decision::Local => (Home::Local(folder), format!("a file of this host, {how}")),
    })
}

/// Writes a message and reads it back, where the bus lives but in keys or a file of its own: its users hear nothing of it.
fn test_message(config: &Config, home: Home) -> Result<String, String> {
    let bus = [&config.bus[..], b"/check"].concat();
    match home {
        Home::Memcached(servers) => {
            let store = Memcached::connect(&servers, &config.bus).map_err(|error| error.to_string())?;
            let version = store.version().map_err(|error| error.to_string())?;
            let server = store.server().to_owned();
            let store = Memcached::connect(std::slice::from_ref(&server), &bus).map_err(|error| error.to_string())?;
            let micros = try_store(store, config)?;
            let line = format!("{server}  {version}, test messages up to {} bytes in {micros} µs", config.max_bytes);
            Ok(format!("{:22} {line}", "memcached"))
        }
        Home::Local(folder) => {
            let mut own = Local::new(folder.clone(), &config.bus, config.store_bytes, WholeProcess);
            block_on(own.run(&[Op::Last])).map_err(|error| error.to_string())?;
            let file = own.path();
            let store = Local::new(folder.clone(), &bus, config.store_bytes, WholeProcess);
            let test = store.path();
            let micros = try_store(store, config);
            let micros = micros?;
            let _ = fs::remove_file(test);
            if folder.own {
                // It goes if nothing else is in it.
                let _ = fs::remove_dir(&folder.path);
            }
            let line =
                format!("{}  test messages up to {} bytes beside it in {micros} µs", file.display(), config.max_bytes);
            Ok(format!("{:22} {line}", "file"))
        }
    }
}

/// Tries all that a bus needs of its store: how many microseconds that takes.
fn try_store(mut store: impl Store, config: &Config) -> Result<u128, String> {
    let started = Instant::now();
    block_on(bus::check(&mut store, config.ttl, config.max_bytes)).map_err(|error| cause(error.into()))?;
    Ok(started.elapsed().as_micros())
}

/// What went wrong, for the person who checks.
fn cause(error: Error) -> String {
    error.cause(&error.row().2)
}
