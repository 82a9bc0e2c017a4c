//! What people download: the archive, the package, the manual page.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::fixtures::daemon::{Folder, executable};

const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");

/// Runs a line of the shell in a folder: what it prints.
fn sh(folder: &Path, line: &str) -> String {
    let output = Command::new("sh").args(["-euc", line]).current_dir(folder).output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{line}\n{stdout}{stderr}");
    stdout
}

/// A copy of all that make needs to build.
fn copy_sources(folder: &Folder) {
    let entries = "Cargo.toml Cargo.lock Makefile README.md CHANGELOG.md LICENSE SECURITY.md apache-example.conf \
                   benches docs examples packaging src tests/needs.sh cgi-bin/.gitignore";
    sh(Path::new(REPOSITORY), &format!("tar -c {entries} | tar -x -C '{}'", folder.path().display()));
}

fn hashes(folder: &Folder) -> String {
    sh(folder.path(), "cd dist && sha256sum -c --quiet *.sha256 && cat *.sha256")
}

#[test]
fn a_download_is_the_same_wherever_it_is_built() {
    let (here, there) = (Folder::new(), Folder::new());
    copy_sources(&here);
    copy_sources(&there);
    fs::copy(executable(), here.join("cgi-bin/shortbus")).unwrap();
    let target = sh(here.path(), "rustc -vV | sed -n 's/^host: //p'");
    let target = target.trim();
    sh(here.path(), &format!("umask 077; make -o build dist HOST={target}"));
    // Another folder, and another place of Cargo's own files.
    let line = r#"ln -s "${CARGO_HOME:-$HOME/.cargo}" cargo && CARGO_HOME=$PWD/cargo make dist"#;
    sh(there.path(), line);
    assert_eq!(hashes(&here), hashes(&there));

    let unpacked = sh(here.path(), "mkdir unpacked && cd unpacked && tar -xf ../dist/*.tar.gz && ls");
    let folder = here.join("unpacked").join(unpacked.trim());
    assert_eq!(unpacked.trim(), format!("shortbus-{}-linux-{}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH));
    let version = sh(&folder, "cgi-bin/shortbus --version");
    assert_eq!(version, format!("shortbus {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(fs::read(folder.join("cgi-bin/shortbus")).unwrap(), fs::read(executable()).unwrap());
    sh(Path::new(REPOSITORY), &format!("diff -r docs '{0}/docs' && diff -r examples '{0}/examples'", folder.display()));
    let licences = fs::read_to_string(folder.join("LICENSES-OF-CRATES")).unwrap();
    for name in ["memcache v", "serde_json v", "tokio v", "Permission is hereby granted"] {
        assert!(licences.contains(name), "{name}");
    }

    lintian_finds_no_error(&here);
    the_package_is_installed_upgraded_removed_and_purged(&here, target);
}

fn lintian_finds_no_error(folder: &Folder) {
    let found = sh(folder.path(), "lintian --fail-on none --allow-root dist/*.deb");
    assert!(!found.lines().any(|line| line.starts_with("E:")), "{found}");
}

fn the_package_is_installed_upgraded_removed_and_purged(folder: &Folder, target: &str) {
    let root = folder.join("root");
    sh(
        folder.path(),
        "mkdir -p root/var/lib/dpkg/info root/var/lib/dpkg/updates root/usr/lib/cgi-bin && touch root/var/lib/dpkg/status",
    );
    let dpkg = |arguments: &str| {
        let options = "--force-not-root --force-script-chrootless --force-bad-path --log=/dev/null";
        sh(folder.path(), &format!("dpkg --root=\"$PWD/root\" {options} {arguments} 2>&1"))
    };
    dpkg("--install dist/*.deb");
    sh(&root, "ln -s ../../bin/shortbus usr/lib/cgi-bin/chat");
    let bus = || sh(&root, "SHORTBUS_STORE=\"$PWD\" usr/lib/cgi-bin/chat --check");
    assert!(bus().contains("SHORTBUS_BUS           chat") && bus().ends_with("\nok\n"), "{}", bus());
    let unit = fs::read_to_string(root.join("usr/lib/systemd/system/shortbus.service")).unwrap();
    assert!(unit.contains("\nExecStart=/usr/bin/shortbus\n"), "{unit}");
    // A newer one.
    sh(
        folder.path(),
        &format!(
            "packaging/dist.sh 99.0 {target} README.md CHANGELOG.md LICENSE SECURITY.md docs examples apache-example.conf"
        ),
    );
    dpkg("--install dist/*.deb");
    assert!(dpkg("--list shortbus").contains(" 99.0-1 "), "{}", dpkg("--list shortbus"));
    assert!(bus().ends_with("\nok\n"));
    dpkg("--remove shortbus");
    let left = || sh(&root, "find . ! -type d ! -path './var/*' | LC_ALL=C sort");
    assert_eq!(left(), "./usr/lib/cgi-bin/chat\n", "the administrator's own stays");
    dpkg("--purge shortbus");
    assert_eq!(sh(&root, "cat var/lib/dpkg/status"), "");
}

#[test]
fn make_install_and_uninstall_keep_to_their_place() {
    let folder = Folder::new();
    let root = folder.path().display();
    let make = |target: &str| sh(Path::new(REPOSITORY), &format!("make -s {target} DESTDIR='{root}' prefix=/opt/it"));
    for _ in 0..2 {
        make("install");
        assert_eq!(sh(folder.path(), "opt/it/bin/shortbus --version | cut -d ' ' -f 1"), "shortbus\n");
        let unit = fs::read_to_string(folder.join("opt/it/lib/systemd/system/shortbus.service")).unwrap();
        assert!(unit.contains("\nExecStart=/opt/it/bin/shortbus\n"), "{unit}");
    }
    assert!(folder.join("opt/it/share/doc/shortbus/examples/nginx.conf").exists());
    make("uninstall");
    assert_eq!(sh(folder.path(), "find . ! -type d"), "");
}

#[test]
fn the_manual_page_says_what_help_and_the_pages_say() {
    let repository = Path::new(REPOSITORY);
    let page = fs::read_to_string(repository.join("docs/shortbus.1")).unwrap();
    assert_eq!(page, sh(repository, "make -s man"), "make man >docs/shortbus.1");
    // As a reader sees it, without a complaint of the typesetter's.
    let line = "man --warnings -E UTF-8 -l -Tutf8 -Z docs/shortbus.1 2>&1 >/dev/null";
    assert_eq!(sh(repository, line), "");
    let shown = sh(repository, "MANWIDTH=200 man -E UTF-8 -l docs/shortbus.1 | col -bx");
    let readme = fs::read_to_string(repository.join("README.md")).unwrap();
    let lines: Vec<&str> = readme.lines().filter(|line| line.trim_start().starts_with("curl ")).collect();
    assert!(lines.len() > 2, "{lines:?}");
    for line in
        lines.iter().map(|line| line.trim()).chain(shortbus::config::SETTINGS).chain(["once_differs", "--check"])
    {
        assert!(shown.contains(line), "{line}: {shown}");
    }
}
