//! Run by hand, the executable explains itself.

use std::process::{Command, Output};

use crate::fixtures::daemon::executable;
use crate::fixtures::fronts::Front;
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
    assert!(headers.contains("LOAD") && headers.contains(".text"), "{headers}");
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
