//! What README and the other pages say is so.

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

/// A text whose lines may be folded elsewhere.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The indented lines that follow a line with this text.
fn block(page: &str, after: &str) -> String {
    let text = file(page);
    let (_, rest) = text.split_once(after).unwrap_or_else(|| panic!("{page} has no {after:?}"));
    let lines = rest.lines().skip(1).skip_while(|line| line.is_empty());
    lines.take_while(|line| line.starts_with("    ")).map(|line| format!("{}\n", line.trim_start())).collect()
}

#[test]
fn its_curl_lines_work_as_written() {
    let site = Site::start(Front::ApacheCgid);
    site.copy("chat");
    let lines = block("README.md", "From a terminal (").replace("http://localhost/", &site.url());
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
    let line = block("docs/fastcgi.md", "From a terminal:").replace("curl", "curl -sS --max-time 3");
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
    let lines = block("docs/signed.md", "From a terminal, on a signed bus").replace("http://localhost/", &site.url());
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
    let in_source: BTreeSet<(String, String)> = (source.split('(').skip(1))
        .map(|rest| rest.split([',', '"']).map(str::trim).filter(|part| !part.is_empty()))
        .filter_map(|mut parts| Some((parts.next()?.to_owned(), parts.next()?.to_owned())))
        .filter(|(status, _)| status.parse::<u16>().is_ok())
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

/// What is in a folder, by its path in the repository.
fn entries(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap();
    entries.map(|entry| format!("{folder}/{}", entry.unwrap().file_name().to_str().unwrap())).collect()
}

/// Every text file in these folders and below, with its text; in the repository's own folder no deeper.
fn texts(folders: &[&str]) -> Vec<(String, String)> {
    let read = |name: String| match Path::new(env!("CARGO_MANIFEST_DIR")).join(&name) {
        path if path.is_dir() && (name.starts_with("./") || name.ends_with("/node_modules")) => vec![],
        path if path.is_dir() => texts(&[&name]),
        path => fs::read_to_string(path).map(|text| (name, text)).into_iter().collect(),
    };
    folders.iter().flat_map(|folder| entries(folder)).flat_map(read).collect()
}

/// The settings that the source reads.
fn settings() -> BTreeSet<String> {
    shortbus::config::SETTINGS.map(String::from).into()
}

/// What a page gets wrong about settings: it names one that does not exist, or claims to list all and omits one.
fn settings_faults(page: &str, lists_all: bool) -> Vec<String> {
    let names = |text: &str| -> BTreeSet<String> {
        let words = text.split(|char: char| !char.is_ascii_uppercase() && !char.is_ascii_digit() && char != '_');
        words.filter(|word| word.starts_with("SHORTBUS_") && *word != "SHORTBUS_").map(String::from).collect()
    };
    // Apache's own variables, and those that tests read.
    let is_known = |name: &str| {
        let reads =
            |text: &str| ["var", "var_os"].iter().any(|call| text.contains(&format!("env::{call}(\"{name}\")")));
        page.contains(&format!("Define {name} ")) || texts(&["tests"]).iter().any(|(_, text)| reads(text))
    };
    let settings = settings();
    let unknown = names(page).into_iter().filter(|name| !settings.contains(name) && !is_known(name));
    let mut faults: Vec<String> = unknown.map(|name| format!("{name} is no setting")).collect();
    if lists_all {
        // A table lists what its rows begin with.
        let rows: Vec<&str> =
            page.lines().filter_map(|line| line.strip_prefix("| `SHORTBUS_")?.split('`').next()).collect();
        let listed =
            names(&if rows.is_empty() { page.into() } else { format!("SHORTBUS_{}", rows.join(" SHORTBUS_")) });
        faults.extend(settings.difference(&listed).map(|name| format!("{name} is not listed")));
    }
    faults
}

#[test]
fn pages_and_examples_name_only_settings_that_exist_and_lists_of_settings_are_whole() {
    let help = String::from_utf8(Command::new(executable()).env_clear().output().unwrap().stdout).unwrap();
    assert_eq!(settings().len(), 10, "{:?}", settings());
    assert_eq!(settings_faults(&help, true), [""; 0], "--help");
    let pages = texts(&[".", "docs", "examples", "src"]);
    for (name, page) in &pages {
        assert_eq!(settings_faults(page, name == "docs/settings.md"), [""; 0], "{name}");
    }
    // Told once: an example shows how to set one, and where to read of all.
    let is_example = |name: &str| name.ends_with(".conf") || name.ends_with(".service");
    let examples: Vec<_> = pages.iter().filter(|(name, _)| is_example(name)).collect();
    assert_eq!(examples.len(), 6);
    for (name, page) in examples {
        assert!(page.contains("docs/settings.md lists them") && page.contains("SHORTBUS_TTL"), "{name}");
    }
}

#[test]
fn a_setting_that_is_misspelt_or_left_out_is_found() {
    let page = file("docs/settings.md");
    for name in settings() {
        assert_eq!(settings_faults(&format!("SetEnv {name}S 1"), false), [format!("{name}S is no setting")]);
        let row = format!("| `{name}` |");
        let shorter: Vec<&str> = page.lines().filter(|line| !line.starts_with(&row)).collect();
        assert_eq!(settings_faults(&shorter.join("\n"), true), [format!("{name} is not listed")]);
    }
    assert_eq!(settings_faults("SHORTBUS_CGI_BIN", false), ["SHORTBUS_CGI_BIN is no setting"]);
}

#[test]
fn its_limits_are_the_sources() {
    use shortbus::limits::*;
    let pages = ["README.md", "docs/settings.md", "docs/fastcgi.md"].map(|page| words(&file(page))).concat();
    for text in [
        format!("| `SHORTBUS_TTL` | {TTL_DEFAULT} | seconds a message lives, 1 to {TTL_MAX};"),
        format!("| `SHORTBUS_MAX_BYTES` | {BYTES_DEFAULT} | largest message body, 1 to {BYTES_MAX} |"),
        format!("| {STORE_BYTES} | bytes of that file at most, {STORE_BYTES_MIN} to {STORE_BYTES_MAX};"),
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
        assert!(pages.contains(&text), "{text}");
    }
    // In words.
    assert!(pages.contains("remembered for twice the TTL, and a minute at least") && ONCE_LEAST == 60);
    assert!(pages.contains("for at most about three seconds") && ONCE_LEASE == 3);
    assert!(pages.contains("is gone within five seconds") && (GRACE + ACCEPT_PAUSE).as_secs() < 5);
    assert!(
        pages.contains("at most 1,000 messages and about 1 MiB") && (REPLY_MESSAGES, REPLY_BYTES) == (1_000, 1 << 20)
    );
}

#[test]
fn its_client_is_as_small_as_it_says() {
    let bytes = shortbus::browser::find(b"/shortbus.js").unwrap().body.len();
    assert!(words(&file("README.md")).contains(&format!("It is {bytes} bytes as it stands")), "{bytes}");
}

#[test]
fn its_figures_are_those_of_the_bench_and_explained_alike() {
    let figures = file("docs/figures.md");
    for bench in ["benches/bench.rs", "benches/persistent.rs"] {
        let source = file(bench);
        let (_, legend) = source.split_once("const LEGEND: &str = \"\\\n").unwrap();
        assert!(figures.contains(legend.split_once("\";").unwrap().0), "{bench}");
    }
    let readme = words(&file("README.md"));
    for (told, figure) in [
        ("an empty poll takes 0.677 ms", "| **Empty poll**, TCP | 0.677 ms "),
        ("prints a fixed reply takes 0.511 ms", "| One process: fixed | 0.511 ms "),
        ("some 23,000 polls a second over four connections", "| **empty poll**, 4 connections | 23374 a second "),
        ("10,000 streams at 3.3 KB each", "| 10000 streams in one process | 3.3 KB each |"),
    ] {
        assert!(readme.contains(told) && figures.contains(figure), "{told}");
    }
}

#[test]
fn its_links_to_files_lead_to_one() {
    let mut links = 0;
    for (name, page) in texts(&[".", "docs", "examples"]).iter().filter(|(name, _)| name.ends_with(".md")) {
        let targets = page.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        for target in targets.filter(|target| !target.is_empty() && !target.contains("://")) {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name).parent().unwrap().join(target);
            assert!(path.exists(), "{name}: {target}");
            links += 1;
        }
    }
    assert!(links > 10, "{links}");
}

/// The points of a numbered list: each point's sentence, without Markdown's and rustdoc's marks, and the tests it names.
fn points(text: &str) -> Vec<(String, Vec<String>)> {
    let mut points: Vec<(String, Vec<String>)> = Vec::new();
    for line in text.lines().map(|line| line.trim_start_matches("//!").trim()) {
        let bare = line.replace(['`', '[', ']'], "").replace("crate::limits::", "");
        if line.starts_with(&format!("{}. ", points.len() + 1)) {
            points.push((bare, vec![]));
            continue;
        }
        let Some((sentence, tests)) = points.last_mut() else { continue };
        match line.strip_prefix("- `").and_then(|test| test.strip_suffix('`')) {
            Some(test) => tests.push(test.into()),
            None if line.is_empty() => break,
            None if tests.is_empty() => *sentence += &format!(" {bare}"),
            None => {}
        }
    }
    points
}

#[test]
fn each_point_of_security_is_that_of_the_source_and_has_tests_that_exist() {
    let source = file("src/http/mod.rs");
    let in_source = points(source.split_once("\npub mod ").unwrap().0);
    let page = file("SECURITY.md");
    let told = points(page.split_once("## What keeps a bus safe").unwrap().1);
    assert!(in_source.len() >= 9 && told.len() == in_source.len(), "{told:?} {in_source:?}");
    for ((told, tests), (in_source, _)) in told.iter().zip(&in_source) {
        assert_eq!(told, in_source);
        assert!(!tests.is_empty(), "{told}");
        for test in tests {
            let (module, function) = test.split_once("::").unwrap();
            assert!(file(&format!("tests/{module}.rs")).contains(&format!("\nfn {function}(")), "{test}");
        }
    }
}
