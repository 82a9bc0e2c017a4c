//! Run by hand, the executable explains itself.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output};
use std::thread;

use crate::fixtures::daemon::{Folder, executable};
use crate::fixtures::fronts::Front;
use crate::fixtures::memcached::Memcached;
use crate::fixtures::site::Site;

fn run(site: &Site, arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    let mut command = Command::new(site.cgi_bin("chat"));
    command.env_clear().env("SHORTBUS_MEMCACHED", &site.memcached.address);
    command.args(arguments).envs(settings.iter().copied()).output().unwrap()
}

fn site() -> Site {
    let site = Site::start(Front::Bare);
    site.copy("chat");
    site
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn it_is_one_static_stripped_executable() {
    let output = Command::new("readelf").args(["-lS", executable().to_str().unwrap()]).output().unwrap();
    let headers = text(&output.stdout);
    // The last is what packaging/order.ld lays side by side.
    for present in ["LOAD", ".text ", ".text.request"] {
        assert!(headers.contains(present), "{present}: {headers}");
    }
    for absent in ["INTERP", "DYNAMIC", ".symtab", ".debug"] {
        assert!(!headers.contains(absent), "{absent}: {headers}");
    }
}

#[test]
fn without_arguments_and_with_help_it_says_what_it_is() {
    let site = site();
    for arguments in [&[][..], &["--help"], &["-h"]] {
        let output = run(&site, arguments, &[]);
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
        for word in ["cp cgi-bin/shortbus", "--check", "--version", "SHORTBUS_TTL", "SHORTBUS_ALLOW_ORIGIN"] {
            assert!(text(&output.stdout).contains(word), "{word}");
        }
    }
}

#[test]
fn it_knows_its_version() {
    let output = run(&site(), &["--version"], &[]);
    assert_eq!(text(&output.stdout), format!("shortbus {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn unknown_arguments_are_refused() {
    let site = site();
    for arguments in [&["--nonsense"][..], &["x"], &["--check", "--help"], &[""]] {
        let output = run(&site, arguments, &[]);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""));
        assert!(text(&output.stderr).contains("--help"));
    }
}

#[test]
fn a_check_shows_each_setting_and_where_it_comes_from_and_touches_no_message() {
    let site = site();
    let (_, before) = site.join("chat");
    let output = run(&site, &["--check"], &[("SHORTBUS_TTL", "5"), ("SHORTBUS_ALLOW_ORIGIN", "*")]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    let lines: Vec<Vec<&str>> = text(&output.stdout).lines().map(|line| line.split_whitespace().collect()).collect();
    let memcached = &site.memcached.address[..];
    for line in [
        ["SHORTBUS_BUS", "chat", "(the file's name)"],
        ["SHORTBUS_TTL", "5", "(environment)"],
        ["SHORTBUS_MAX_BYTES", "10240", "(default)"],
        ["SHORTBUS_MEMCACHED", memcached, "(environment)"],
        ["SHORTBUS_ALLOW_ORIGIN", "*", "(environment)"],
        ["SHORTBUS_WAIT", "0", "(default, and 60 in FastCGI)"],
        ["SHORTBUS_AUTH", "open", "(default)"],
        ["SHORTBUS_KEY", "none", "(default)"],
    ] {
        let words: Vec<&str> = line.iter().flat_map(|part| part.split(' ')).collect();
        assert!(lines.contains(&words), "{words:?}: {lines:?}");
    }
    assert!(lines.iter().any(|line| line.starts_with(&["memcached", memcached])), "{lines:?}");
    assert_eq!(lines.last().unwrap(), &["ok"]);
    assert_eq!(site.join("chat").1, before, "the check is not heard on the bus");
}

#[test]
fn a_check_shows_each_value_on_one_line() {
    let output = run(&site(), &["--check"], &[("SHORTBUS_BUS", "a\nok\u{1b}[2J")]);
    assert!(text(&output.stdout).contains("SHORTBUS_BUS           a\\nok\\u{1b}[2J  (environment)\n"), "{output:?}");
}

#[test]
fn a_check_tells_of_a_key_but_never_the_key() {
    let site = site();
    let key = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
    for (auth, key, code) in [("signed", key, 0), ("signed", &key[..31], 1), ("open", key, 1)] {
        let output = run(&site, &["--check"], &[("SHORTBUS_AUTH", auth), ("SHORTBUS_KEY", key)]);
        let all = [text(&output.stdout), text(&output.stderr)].concat();
        assert_eq!(output.status.code(), Some(code), "{all}");
        let lines: Vec<Vec<&str>> = all.lines().map(|line| line.split_whitespace().collect()).collect();
        for line in
            [&["SHORTBUS_AUTH", "signed", "(environment)"][..], &["SHORTBUS_KEY", "44", "bytes", "(environment)"]]
        {
            assert_eq!(lines.iter().any(|words| words == line), code == 0, "{all}");
        }
        assert!(!all.contains(&key[4..12]), "{all}");
    }
}

#[test]
fn a_check_that_fails_says_why_and_ends_with_1() {
    let mut site = site();
    for (settings, word) in [
        (&[("SHORTBUS_TTL", "0")][..], "(it is '0')"),
        (&[("SHORTBUS_TTLS", "secret")], "(it is 6 bytes long)"),
        (&[("SHORTBUS_AUTH", "signed"), ("SHORTBUS_KEY", "short")], "(it is 5 bytes long)"),
        (&[("SHORTBUS_MEMCACHED", "/nowhere")], "cannot reach memcached"),
        (&[("SHORTBUS_MEMCACHED", "127.0.0.1:1")], "cannot reach memcached"),
    ] {
        let output = run(&site, &["--check"], settings);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stdout).contains(word), "{word}: {output:?}");
        assert!(!text(&output.stdout).ends_with("ok\n"));
    }
    site.memcached.stop();
    assert_eq!(run(&site, &["--check"], &[]).status.code(), Some(1));
}

#[test]
fn a_closed_stdout_or_stderr_is_no_crash() {
    let site = site();
    for close in ["", ">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full"] {
        for setup in ["", "REQUEST_METHOD=GET", "REQUEST_METHOD=GET QUERY_STRING=id=x"] {
            let store = format!("SHORTBUS_MEMCACHED={}", site.memcached.address);
            let line = format!("env {store} {setup} {} {close} | cat > /dev/null", site.cgi_bin("chat").display());
            let line = format!("set -o pipefail; {line}");
            let output = Command::new("bash").args(["-c", &line]).output().unwrap();
            assert!(output.status.code().is_some_and(|code| code <= 1), "{line}: {output:?}");
        }
    }
}

/// A check of this memcached fails, and says this.
#[track_caller]
fn assert_check_fails(address: &str, settings: &[(&str, &str)], words: &[&str]) {
    let output = run(&site(), &["--check"], &[&[("SHORTBUS_MEMCACHED", address)], settings].concat());
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), ""));
    let last = text(&output.stdout).lines().last().unwrap();
    assert!(last.starts_with("shortbus: ") && words.iter().all(|word| last.contains(word)), "{words:?}: {output:?}");
}

#[test]
fn a_check_says_what_to_do_about_a_memcached_that_the_bus_cannot_use() {
    let large = [("SHORTBUS_MAX_BYTES", "600000")];
    assert_check_fails(&Memcached::start(&["-C"]).address, &[], &["no CAS", "without -C"]);
    assert_check_fails(&Memcached::start(&["-B", "binary"]).address, &[], &["-B binary"]);
    assert_check_fails(&Memcached::start(&["-I", "512k"]).address, &large, &["larger -I", "SHORTBUS_MAX_BYTES"]);

    let folder = Folder::new();
    std::fs::write(folder.join("users"), "user:password\n").unwrap();
    let users = folder.join("users").to_str().unwrap().to_owned();
    assert_check_fails(&Memcached::start(&["-Y", &users]).address, &[], &["password", "without -Y"]);

    let full = Memcached::start(&["-M", "-m", "2"]);
    let value = "x".repeat(600_000);
    (0..10).for_each(|n| drop(full.ask(format!("ms full{n} 600000\r\n{value}\r\n"))));
    assert_check_fails(&full.address, &large, &["out of memory", "-m"]);

    let crowded = Memcached::start(&["-c", "40", "-t", "1"]);
    let connect = || BufReader::new(UnixStream::connect(&crowded.address).unwrap());
    let answer = |stream: &mut BufReader<UnixStream>| {
        let (mut line, _) = (String::new(), stream.get_mut().write_all(b"mn\r\n"));
        let _ = stream.read_line(&mut line);
        line
    };
    let held: Vec<_> = std::iter::repeat_with(connect)
        .map_while(|mut stream| (answer(&mut stream) == "MN\r\n").then_some(stream))
        .collect();
    assert_check_fails(&crowded.address, &[], &["connections", "-c"]);
    drop(held);
    crate::fixtures::daemon::wait_for("a free connection", || answer(&mut connect()) == "MN\r\n");
}

#[test]
fn a_check_tells_of_a_memcached_that_closes_each_connection_at_once() {
    let folder = Folder::new();
    let address = folder.join("socket").to_str().unwrap().to_owned();
    let listener = UnixListener::bind(&address).unwrap();
    thread::spawn(move || listener.incoming().for_each(drop));
    // Often it has closed before the check writes, which SIGPIPE would end.
    (0..200).for_each(|_| assert_check_fails(&address, &[], &[&address]));
}

#[test]
fn a_check_notices_what_a_work_alike_does_not_do() {
    let memcached = Memcached::start(&[]);
    // A memcached that is asked for something else.
    for (asked, instead, word) in [(" ME", " MS", "with ME"), (" C", " O", "with C"), (" T", " F", "(T, t)")] {
        let folder = Folder::new();
        let address = folder.join("socket").to_str().unwrap().to_owned();
        let (listener, real) = (UnixListener::bind(&address).unwrap(), memcached.address.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut client, mut server) = (stream.unwrap(), UnixStream::connect(&real).unwrap());
                let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || std::io::copy(&mut from, &mut to));
                thread::spawn(move || {
                    let mut bytes = [0; 65_536];
                    while let Ok(length @ 1..) = client.read(&mut bytes) {
                        let text = std::str::from_utf8(&bytes[..length]).unwrap().replace(asked, instead);
                        server.write_all(text.as_bytes()).unwrap();
                    }
                    let _ = server.shutdown(std::net::Shutdown::Both);
                });
            }
        });
        assert_check_fails(&address, &[], &[word, "use memcached itself"]);
        memcached.ask("flush_all\r\n");
    }
}
