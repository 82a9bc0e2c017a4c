//! What README and the pages of `docs/` say is so.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::fixtures::daemon::executable;
use crate::fixtures::fronts::Front;
use crate::fixtures::signer::base64url_hmac;
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

/// Runs a page's lines on this site's bus: what they print.
fn paste(site: &Site, lines: &str) -> (String, Option<i32>) {
    let lines = lines.replace("http://localhost/", &site.url()).replace("curl", "curl -sS");
    let output = Command::new("sh").args(["-ec", &lines]).output().unwrap();
    (String::from_utf8(output.stdout).unwrap(), output.status.code())
}

#[test]
fn readme_is_a_front_page() {
    let readme = file("README.md");
    assert!(readme.lines().count() <= 90, "{} lines", readme.lines().count());
    let words = readme.split_whitespace().count();
    assert!(words <= 700, "{words} words");
    for page in entries("docs").iter().filter(|page| page.ends_with(".md")) {
        assert!(readme.contains(&format!("]({page})")), "{page} is not in the index");
    }
}

#[test]
fn the_curl_lines_work_as_written() {
    for (page, after, number) in [("README.md", "Join, publish as user 1", 3), ("docs/http.md", "From a terminal (", 4)]
    {
        let site = Site::start(Front::ApacheCgid);
        site.copy("chat");
        let lines = block(page, after);
        assert_eq!(lines.lines().count(), number, "{lines}");
        let (printed, code) = paste(&site, &lines);
        assert_eq!(code, Some(0), "{printed}");
        let id = site.join("chat").1;
        assert!(printed.contains(&format!("{{\"user\":1,\"id\":{id}}}")), "{printed}");
        let head = format!("Shortbus-Last-Id: {id}\r\n");
        assert_eq!(printed.contains(&head), lines.contains(" -i "), "{printed}");
        let heard = format!("[{{\"id\":{id},\"user\":1,\"data\":{{\"move\": \"e4\"}}}}]\n");
        assert!(printed.ends_with(&heard), "{printed}");
    }
}

#[test]
fn the_streams_are_heard_by_curl_as_written() {
    let site = Site::start(Front::ApacheProxyFcgi);
    let id = site.post("chat?user=1", "\"hello\"").json()["id"].clone();
    let lines = |page, after| block(page, after).replace("curl -N", "curl -N --max-time 3");
    let line = lines("docs/fastcgi.md", "From a terminal:");
    let (printed, code) = paste(&site, &format!("B=http://localhost/cgi-bin/chat\n{line}"));
    let event = format!("id: {id}\ndata: {{\"id\":{id},\"user\":1,\"data\":\"hello\"}}\n\n");
    // It would go on for as long as it is let.
    assert!(printed.contains(&event) && code == Some(28), "{printed} {code:?}");

    // A message with line feeds, as the page shows it.
    let site = Site::start(Front::ApacheProxyFcgi);
    let (printed, code) = paste(&site, &lines("docs/http.md", "it as [FastCGI](fastcgi.md)"));
    let (reply, stream) = printed.split_once('\n').unwrap();
    let id = serde_json::from_str::<serde_json::Value>(reply).unwrap()["id"].to_string();
    let page = file("docs/http.md");
    let shown = page.split("```\n").nth(1).unwrap();
    let of = |text: &str, start: &str| {
        let (_, rest) = text.split_once(start).unwrap();
        rest.chars().take_while(char::is_ascii_digit).collect::<String>()
    };
    let retry = |text: &str| format!("retry: {}\n", of(text, "retry: "));
    let shown = shown.replace(&of(shown, "id: "), &id).replace(&retry(shown), &retry(stream));
    assert_eq!((stream, code), (&shown[..], Some(28)));
}

#[test]
fn the_signature_by_openssl_is_right_as_written() {
    let site = Site::with(Front::ApacheCgid, &[("", &[("SHORTBUS_AUTH", "signed")])]);
    site.copy("chat");
    let lines = block("docs/signed.md", "From a terminal, on a signed bus");
    assert_eq!(lines.lines().count(), 9, "{lines}");
    // A secret may begin with any of base64url's characters, a hyphen too; and '+' and '/' have to go.
    for _ in 0..20 {
        let (printed, code) = paste(&site, &lines);
        assert_eq!(code, Some(0), "{printed}");
        let id = site.join("chat").1;
        assert!(printed.starts_with("{\"user\":") && printed.ends_with(&format!(",\"id\":{id}}}\n")), "{printed}");
    }
}

#[test]
fn errors_are_listed_each_with_its_status_and_whether_to_send_it_again() {
    let source = file("src/http/error.rs");
    let in_source: BTreeSet<(String, String)> = (source.split('(').skip(1))
        .map(|rest| rest.split([',', '"']).map(str::trim).filter(|part| !part.is_empty()))
        .filter_map(|mut parts| Some((parts.next()?.to_owned(), parts.next()?.to_owned())))
        .filter(|(status, _)| status.parse::<u16>().is_ok())
        .collect();
    let page = file("docs/http.md");
    let mut in_page = BTreeSet::new();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    for cells in rows.map(|row| row.split(" | ").collect::<Vec<_>>()).filter(|cells| cells[0].parse::<u16>().is_ok()) {
        let [status, codes, _when, again] = cells[..] else { panic!("{cells:?}") };
        for code in codes.split(", ").map(|code| code.trim_matches('`')) {
            // The browser client's rule.
            let is_again =
                status.starts_with('5') && code != "bad_setting" || ["incomplete", "once_undecided"].contains(&code);
            assert_eq!(again.starts_with("yes") || again.starts_with("with `once` yes"), is_again, "{code}: {again}");
            in_page.insert((status.to_owned(), code.to_owned()));
        }
    }
    assert!(in_source.len() > 15, "{in_source:?}");
    assert_eq!(in_page, in_source);
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
fn the_limits_are_the_sources() {
    use shortbus::limits::*;
    let pages =
        ["http", "protocol", "settings", "fastcgi"].map(|page| words(&file(&format!("docs/{page}.md")))).concat();
    for text in [
        format!("| `SHORTBUS_TTL` | {TTL_DEFAULT} | seconds a message lives, 1 to {TTL_MAX};"),
        format!("| `SHORTBUS_MAX_BYTES` | {BYTES_DEFAULT} | largest message body, 1 to {BYTES_MAX} |"),
        format!("| {STORE_BYTES} | bytes of that file at most, {STORE_BYTES_MIN} to {STORE_BYTES_MAX};"),
        format!("nested at most {DEPTH_MAX} levels"),
        format!("then the {WINDOW} slots after the cursor"),
        format!("| `once` | publish | 1 to {ONCE_MAX} characters"),
        format!("with 1 to {ONCE_MAX} characters"),
        format!("up to {SLOT_MESSAGES} messages"),
        format!("has 1 to {SLOT_MESSAGES} elements, and at most 1,000,000 bytes"),
        format!("| the bus key of a signed bus, at least {KEY_MIN} bytes,"),
        format!("| longest time a poll may wait for a message, seconds, 0 to {WAIT_MAX};"),
        format!("headers are longer than {} KB in all", PARAMETERS_BYTES >> 10),
        format!("and {} more are kept free", FILES_SPARE + CONNECTIONS_REFUSED),
        format!("reads `last` every {} ms", WATCH_INTERVAL.as_millis()),
        format!("a comment every {} seconds", HEARTBEAT.as_secs()),
        format!("that clients do not read, take at most {} MiB of the process in all", BUFFERS_BYTES >> 20),
        format!("{READING} at a time read what they have missed"),
    ] {
        assert!(pages.contains(&text), "{text}");
    }
    // In words.
    assert!(BATCH_BYTES == 1_000_000 && pages.contains("at most 10,240 bytes, unless") && BYTES_DEFAULT == 10_240);
    assert!(pages.contains("after five to ten minutes") && STREAM_LIFE.as_secs() == 300);
    assert!(pages.contains("remembered for twice the TTL, and a minute at least") && ONCE_LEAST == 60);
    assert!(pages.contains("for at most about three seconds") && ONCE_LEASE == 3);
    assert!(pages.contains("is gone within five seconds") && (GRACE + ACCEPT_PAUSE).as_secs() < 5);
    assert!(
        pages.contains("at most 1,000 messages and about 1 MiB") && (REPLY_MESSAGES, REPLY_BYTES) == (1_000, 1 << 20)
    );
}

#[test]
fn the_client_is_as_small_as_its_page_says() {
    let bytes = shortbus::browser::find(b"/shortbus.js").unwrap().body.len();
    assert!(words(&file("docs/browser.md")).contains(&format!("It is {bytes} bytes as it stands")), "{bytes}");
}

/// The members of the interface or class that begins so in the client's types.
fn members(types: &str, start: &str) -> BTreeSet<String> {
    let (_, rest) = types.split_once(start).unwrap();
    let body = rest.split_once("{\n").unwrap().1.split("\n}\n").next().unwrap();
    let bare = |line: &str| line.trim().trim_start_matches("readonly ").to_owned();
    let name = |line: String| line.split(|char: char| !char.is_alphanumeric()).next().unwrap().to_owned();
    // Members are indented by two, and their comments begin with a slash.
    let lines = body.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    lines.map(bare).map(name).filter(|name| !name.is_empty() && name != "constructor").collect()
}

#[test]
fn every_option_member_and_event_of_the_client_is_told() {
    let (types, page) = (file("src/browser/shortbus.d.ts"), file("docs/browser.md"));
    let options = members(&types, "interface MessageBusOptions ");
    let events = members(&types, "interface MessageBusEventMap");
    let own = members(&types, "class MessageBus<");
    let handlers: BTreeSet<String> = events.iter().map(|event| format!("on{event}")).collect();
    assert!(options.len() >= 3 && events.len() >= 8 && own.len() >= 15, "{options:?} {events:?} {own:?}");
    let tables: String = page.lines().filter(|line| line.starts_with("| ")).collect();
    for name in
        options.iter().chain(&events).chain(own.difference(&handlers)).filter(|name| *name != "removeEventListener")
    {
        assert!(tables.contains(&format!("`{name}`")) || tables.contains(&format!("`{name}(")), "{name}");
    }
}

#[test]
fn the_vectors_of_the_protocol_are_true() {
    let page = file("docs/protocol.md");
    let rows: Vec<Vec<&str>> = (page.lines())
        .filter_map(|line| line.strip_prefix("| `")?.strip_suffix("` |").map(|row| row.split("` | `").collect()))
        .filter(|cells: &Vec<_>| cells.len() == 3 && cells[0].len() == 43)
        .collect();
    assert!(rows.len() >= 4, "{rows:?}");
    for row in rows {
        let [secret, text, sig] = row[..] else { panic!("{row:?}") };
        assert_eq!(base64url_hmac(secret.as_bytes(), text.replace("\\n", "\n").as_bytes()), sig);
    }
}

#[test]
fn figures_are_those_of_the_bench_and_explained_alike() {
    let figures = file("docs/figures.md");
    for bench in ["benches/bench.rs", "benches/persistent.rs"] {
        let source = file(bench);
        let (_, legend) = source.split_once("const LEGEND: &str = \"\\\n").unwrap();
        assert!(figures.contains(legend.split_once("\";").unwrap().0), "{bench}");
    }
    let told_in = |page: &str| words(file(page).split("| | | |").next().unwrap());
    let summary = told_in("README.md") + &told_in("docs/figures.md");
    for (told, figure) in [
        ("an empty poll takes 0.628 ms", "| **Empty poll**, TCP | 0.628 ms "),
        ("0.478 ms on the local store", "| **Empty poll**, local store | 0.478 ms "),
        ("prints a fixed reply takes 0.458 ms", "| One process: fixed | 0.458 ms "),
        ("some 23,000 polls a second over four connections", "| **empty poll**, 4 connections | 22660 a second "),
        ("10,000 streams at 3.6 KB each", "| 10000 streams in one process | 3.6 KB each |"),
        ("[10,000 on streams]", "| 10000 streams in one process | 3.6 KB each |"),
        // Each page polls twice a second.
        ("348 pages as CGI under Apache", "| Apache, mod_cgid: **empty poll** | 697 a second "),
        ("1,944, that is 972 pages", "| nginx, fcgiwrap: **empty poll** | 1944 a second "),
    ] {
        assert!(summary.contains(told) && figures.contains(figure), "{told}");
    }
}

/// The anchors that a page's headings make, as GitHub and GitLab make them.
fn anchors(page: &str) -> BTreeSet<String> {
    let heading = |line: &str| line.strip_prefix('#').map(|rest| rest.trim_start_matches('#').trim().to_lowercase());
    let kept = |char: char| char.is_alphanumeric() || " -_".contains(char);
    page.lines()
        .filter_map(heading)
        .map(|text| text.chars().filter(|&char| kept(char)).collect::<String>().replace(' ', "-"))
        .collect()
}

/// What is wrong with the links of a page to files and anchors.
fn dead_links(name: &str, page: &str) -> (usize, Vec<String>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let targets: Vec<&str> = page.split("](").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    let own: Vec<_> = targets.into_iter().filter(|target| !target.contains("://")).collect();
    let is_dead = |target: &str| {
        let (path, anchor) = target.split_once('#').map_or((target, None), |(path, anchor)| (path, Some(anchor)));
        let path = if path.is_empty() { root.join(name) } else { root.join(name).parent().unwrap().join(path) };
        let has = |anchor: &str| fs::read_to_string(&path).is_ok_and(|text| anchors(&text).contains(anchor));
        !path.exists() || anchor.is_some_and(|anchor| !has(anchor))
    };
    (own.len(), own.iter().filter(|target| is_dead(target)).map(|target| format!("{name}: {target}")).collect())
}

#[test]
fn links_lead_to_files_and_headings_that_exist() {
    let mut links = 0;
    for (name, page) in texts(&[".", "docs", "examples"]).iter().filter(|(name, _)| name.ends_with(".md")) {
        let (number, dead) = dead_links(name, page);
        assert_eq!(dead, [""; 0]);
        links += number;
    }
    assert!(links > 50, "{links}");
    // A dead one is found.
    for target in ["docs/nothing.md", "docs/http.md#nothing", "#nothing"] {
        assert_eq!(dead_links("README.md", &format!("[a]({target})")).1.len(), 1, "{target}");
    }
    assert_eq!(dead_links("docs/http.md", "[a](#errors) [b](servers.md#apache-and-http2)"), (2, vec![]));
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
