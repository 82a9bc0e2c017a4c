//! The client, its types and the page, as Node, TypeScript and real browsers have them: runs what is in `tests/browser`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser")
}

/// Runs a command there: what it printed, and whether it went well.
fn run(program: &str, arguments: &[&str]) -> (String, bool) {
    let output = Command::new(program).args(arguments).current_dir(folder()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; make test installs it"));
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (text, output.status.success())
}

/// Installs Node's packages as the lock file has them, and anew where that has changed since.
fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let stamp = folder().join("node_modules/.installed");
        let lock = fs::read(folder().join("package-lock.json")).unwrap();
        if fs::read(&stamp).ok().as_ref() != Some(&lock) {
            let (text, success) = run("npm", &["ci", "--ignore-scripts", "--no-audit", "--no-fund"]);
            assert!(success, "npm ci: {text}");
            fs::write(&stamp, lock).unwrap();
        }
    });
}

/// Runs the tests of a file, each of which has to be run and to pass.
fn test(file: &str) {
    // A test that hangs must not hang all.
    let (text, success) = run("timeout", &["--foreground", "900", "node", "--test", "--test-reporter=tap", file]);
    assert!(success, "{text}");
    let count = |what: &str| -> usize {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("# {what} ")));
        line.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no count of {what}: {text}"))
    };
    let source = fs::read_to_string(folder().join(file)).unwrap();
    let written = source.lines().filter(|line| line.trim_start().starts_with("test(")).count();
    assert!(written > 0 && count("pass") >= written, "{} of {written} have passed: {text}", count("pass"));
    for what in ["fail", "cancelled", "skipped", "todo"] {
        assert_eq!(count(what), 0, "{what}: {text}");
    }
}

#[test]
fn the_client_keeps_its_promises_in_node() {
    test("client.test.mjs");
}

#[test]
fn the_client_reads_streams_by_the_standard_however_they_are_cut() {
    test("fuzz.test.mjs");
}

#[test]
fn the_types_are_what_the_client_has() {
    install();
    test("types.test.mjs");
}

#[test]
fn browsers_talk_on_a_bus() {
    install();
    test("browser.test.mjs");
}

#[test]
fn the_examples_pages_work_in_a_browser() {
    install();
    test("recipes.test.mjs");
}
