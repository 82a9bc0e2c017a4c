//! What README says is so.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::fixtures::daemon::executable;
use crate::fixtures::fronts::Front;
use crate::fixtures::site::Site;

fn file(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// The indented lines that follow a line with this text.
fn block(after: &str) -> String {
    let readme = file("README.md");
    let (_, rest) = readme.split_once(after).unwrap_or_else(|| panic!("README has no {after:?}"));
    let lines = rest.lines().skip(1).skip_while(|line| line.is_empty());
    lines.take_while(|line| line.starts_with("    ")).map(|line| format!("{}\n", line.trim_start())).collect()
}

#[test]
fn its_curl_lines_work_as_written() {
    let site = Site::start(Front::ApacheCgid);
    site.copy("chat");
    let lines = block("From a terminal (").replace("http://localhost/", &site.url());
    assert_eq!(lines.lines().count(), 4, "{lines}");
    let output = Command::new("sh").args(["-ec", &lines.replace("curl", "curl -sS")]).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{printed}");
    let id = site.join("chat").1;
    assert!(printed.contains(&format!("{{\"user\":1,\"id\":{id}}}")), "{printed}");
    assert!(printed.contains(&format!("Shortbus-Last-Id: {id}\r\n")), "{printed}");
    assert!(printed.ends_with(&format!("[{{\"id\":{id},\"user\":1,\"data\":{{\"move\": \"e4\"}}}}]\n")), "{printed}");
}

#[test]
fn its_stream_is_heard_by_curl_as_written() {
    let site = Site::start(Front::ApacheProxyFcgi);
    let id = site.post("chat?user=1", "\"hello\"").json()["id"].clone();
    let line = block("as browsers send it by themselves:").replace("curl", "curl -sS --max-time 3");
    let script = format!("B={}cgi-bin/chat\n{line}", site.url());
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let event = format!("id: {id}\ndata: {{\"id\":{id},\"user\":1,\"data\":\"hello\"}}\n\n");
    // It would go on for as long as it is let.
    assert!(printed.contains(&event) && output.status.code() == Some(28), "{printed} {:?}", output.status);
}

#[test]
fn its_signature_by_openssl_is_right_as_written() {
    let site = Site::with(Front::ApacheCgid, &[("", &[("SHORTBUS_AUTH", "signed")])]);
    site.copy("chat");
    let lines = block("From a terminal, on a signed bus").replace("http://localhost/", &site.url());
    assert_eq!(lines.lines().count(), 9, "{lines}");
    // A secret may begin with any of base64url's characters, a hyphen too; and '+' and '/' have to go.
    for _ in 0..20 {
        let output = Command::new("sh").args(["-ec", &lines.replace("curl", "curl -sS")]).output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{printed}");
        let id = site.join("chat").1;
        assert!(printed.starts_with("{\"user\":") && printed.ends_with(&format!(",\"id\":{id}}}\n")), "{printed}");
    }
}

#[test]
fn it_lists_every_error_with_its_status() {
    let source = file("src/http/error.rs");
    let in_source: BTreeSet<(String, String)> = (source.split("=> (").skip(1))
        .filter_map(|rest| rest.split_once(')')?.0.split_once(", \""))
        .map(|(status, code)| (status.into(), code.trim_end_matches('"').into()))
        .collect();
    let readme = file("README.md");
    let in_readme: BTreeSet<(String, String)> = (readme.lines())
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| ")?.split(" | ");
            let status = cells.next().filter(|status| status.parse::<u16>().is_ok())?;
            Some((status.to_owned(), cells.next()?.to_owned()))
        })
        .flat_map(|(status, codes)| {
            let codes: Vec<String> = codes.split(", ").map(|code| code.trim_matches('`').into()).collect();
            codes.into_iter().map(move |code| (status.clone(), code))
        })
        .collect();
    assert!(in_source.len() > 15, "{in_source:?}");
    assert_eq!(in_readme, in_source);
}

#[test]
fn readme_help_and_examples_name_the_same_settings() {
    let help = String::from_utf8(Command::new(executable()).env_clear().output().unwrap().stdout).unwrap();
    let names = |text: &str| -> BTreeSet<String> {
        let words = text.split(|char: char| !char.is_ascii_uppercase() && char != '_');
        words
            .filter(|word| word.starts_with("SHORTBUS_") && !word.contains("KEEP") && !word.contains("SOAK"))
            .map(String::from)
            .collect()
    };
    let source = names(&file("src/config.rs"));
    assert_eq!(source.len(), 8, "{source:?}");
    assert_eq!(names(&file("README.md")), source);
    assert_eq!(names(&help), source);
    for example in ["apache-example.conf", "examples/nginx.conf"] {
        let names = names(&file(example));
        assert_eq!(names.difference(&source).filter(|name| *name != "SHORTBUS_CGI_BIN").count(), 0, "{example}");
        assert!(names.is_superset(&source), "{example}: {names:?}");
    }
}

#[test]
fn its_limits_are_the_sources() {
    let readme = file("README.md");
    use shortbus::limits::*;
    for text in [
        format!("| `SHORTBUS_TTL` | {TTL_DEFAULT} | seconds a message lives, 1 to {TTL_MAX};"),
        format!("| `SHORTBUS_MAX_BYTES` | {BYTES_DEFAULT} | largest message body, 1 to {BYTES_MAX} |"),
        format!("nested at most {DEPTH_MAX} levels"),
        format!("then the {WINDOW} slots after the cursor"),
        format!("K is 1 to {ONCE_MAX} characters"),
        format!("| the bus key of a signed bus, at least {KEY_MIN} bytes,"),
        format!("| longest time a poll may wait for a message, seconds, 0 to {WAIT_MAX};"),
        format!("headers are longer than {} KB in all", PARAMETERS_BYTES >> 10),
        format!("and {} more are kept free", FILES_SPARE + CONNECTIONS_REFUSED),
        format!("reads `last` every {} ms", WATCH_INTERVAL.as_millis()),
        format!("a comment every {} seconds", HEARTBEAT.as_secs()),
    ] {
        assert!(readme.contains(&text), "{text}");
    }
    // In words.
    assert!(readme.contains("remembered for twice the TTL, and a minute at least") && ONCE_LEAST == 60);
    assert!(readme.contains("for at most\n  about three seconds") && ONCE_LEASE == 3);
    assert!(readme.contains("is gone within\nfive seconds") && (GRACE + ACCEPT_PAUSE).as_secs() < 5);
    assert!(
        readme.contains("at most 1,000 messages and about 1 MiB") && (REPLY_MESSAGES, REPLY_BYTES) == (1_000, 1 << 20)
    );
}

#[test]
fn its_client_is_as_small_as_it_says() {
    let bytes = shortbus::browser::find(b"/shortbus.js").unwrap().body.len();
    assert!(file("README.md").contains(&format!("It is\n{bytes} bytes as it stands")), "{bytes}");
}
