//! The systemd unit's sandbox: how tight it is, and that the process does all that it has to in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::fixtures::daemon::Folder;
use crate::fixtures::fastcgi_client::Client;
use crate::fixtures::fastcgi_server::{Worker, copy};
use crate::fixtures::memcached::Memcached;

const UNIT: &str = include_str!("../examples/systemd/shortbus.service");

fn printed(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{program} {arguments:?}: {stdout}{stderr}");
    stdout + &stderr
}

#[test]
fn systemd_finds_little_that_the_unit_may_do() {
    let folder = Folder::new();
    // The executable has to be there; the warnings are what is looked for.
    let program = copy(&folder).display().to_string();
    fs::write(folder.join("shortbus.service"), UNIT.replace("/usr/local/bin/shortbus", &program)).unwrap();
    fs::write(folder.join("shortbus.socket"), include_str!("../examples/systemd/shortbus.socket")).unwrap();
    let units = ["shortbus.service", "shortbus.socket"].map(|name| folder.join(name).display().to_string());
    assert_eq!(printed("systemd-analyze", &["verify", &units[0], &units[1]]), "");
    // Fails above 2.0.
    let said = printed("systemd-analyze", &["security", "--offline=true", "--threshold=20", "--no-pager", &units[0]]);
    assert!(said.contains("Overall exposure level"), "{said}");
}

/// The system calls of each of systemd's sets, with what other sets it holds.
fn sets() -> BTreeMap<String, Vec<String>> {
    let (mut sets, mut name) = (BTreeMap::<String, Vec<String>>::new(), String::new());
    for line in printed("systemd-analyze", &["syscall-filter", "--no-pager"]).lines() {
        match line.trim() {
            _ if line.starts_with('@') => name = line.to_owned(),
            "" => {}
            call if call.starts_with('#') => {}
            call => sets.entry(name.clone()).or_default().push(call.to_owned()),
        }
    }
    sets
}

/// The system calls that the unit allows.
fn allowed() -> BTreeSet<String> {
    let sets = sets();
    fn add(name: &str, sets: &BTreeMap<String, Vec<String>>, found: &mut BTreeSet<String>) {
        match sets.get(name) {
            Some(calls) => calls.iter().for_each(|call| add(call, sets, found)),
            None => drop(found.insert(name.to_owned())),
        }
    }
    let resolve = |names: &str| {
        let mut found = BTreeSet::new();
        names.split(' ').for_each(|name| add(name, &sets, &mut found));
        found
    };
    // systemd adds it to every list of what is allowed.
    let mut calls = resolve("@default");
    for list in UNIT.lines().filter_map(|line| line.strip_prefix("SystemCallFilter=")) {
        match list.strip_prefix('~') {
            None => calls.extend(resolve(list)),
            Some(list) => calls = &calls - &resolve(list),
        }
    }
    calls
}

/// The numbers of system calls on this machine, by their names.
fn numbers() -> BTreeMap<String, u32> {
    let header = printed("sh", &["-c", "echo '#include <asm/unistd.h>' | cc -E -dM -"]);
    let lines = header.lines().filter_map(|line| line.strip_prefix("#define __NR_")?.split_once(' '));
    lines.filter_map(|(name, number)| Some((name.to_owned(), number.parse().ok()?))).collect()
}

/// What ends a process at any call but these (seccomp(2)).
fn filter(calls: &BTreeSet<u32>) -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let answer = |action: u32| statement(libc::BPF_RET | libc::BPF_K, action);
    // The number of the call is the first of seccomp_data.
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for &number in calls {
        let jump = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        program.push(libc::sock_filter { code: jump, jt: 0, jf: 1, k: number });
        program.push(answer(libc::SECCOMP_RET_ALLOW));
    }
    program.push(answer(libc::SECCOMP_RET_KILL_PROCESS));
    program
}

/// Lets a command call nothing else.
fn confine(command: &mut Command, calls: &BTreeSet<u32>) {
    let program = filter(calls);
    let install = move || {
        let length = program.len() as u16;
        let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
        // SAFETY: it takes numbers alone.
        let bounded = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } == 0;
        // SAFETY: the kernel copies the program, as many statements as it says, which live as long as this closure.
        let installed =
            bounded && unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) } == 0;
        if installed { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec it makes two system calls, and takes no memory and no lock.
    unsafe { command.pre_exec(install) };
}

/// All that a process does in its life.
fn live(folder: &Folder, socket: &str, store: (&str, &str), calls: &BTreeSet<u32>) {
    let mut command = Command::new(folder.join("chat"));
    command.env_clear().env(store.0, store.1);
    confine(&mut command, calls);
    let mut worker = Worker::run(&mut command, folder.join(socket), folder);
    let connect = || Client::connect(&worker.socket);
    let ask = |method: &str, query: &str, body: &[u8]| {
        let answer = connect().ask(method, query, &[], body).answer();
        assert_eq!(answer.reply.status, 200, "{query}: {answer:?}");
        answer.reply
    };
    // Makes the bus's key.
    assert_eq!(connect().ask("GET", "", &[("SHORTBUS_AUTH", "signed")], b"").answer().reply.status, 200);
    let id = ask("GET", "", b"").json()["id"].clone();
    let mut stream = connect();
    stream.ask("GET", &format!("id={id}&stream=1"), &[], b"").until("event: cursor");
    ask("POST", "user=1", b"\"hello\"");
    ask("POST", "user=1&batch=1&once=k", b"[1, 2]");
    ask("POST", "user=1&batch=1&once=k", b"[1, 2]");
    stream.until("hello");
    assert_eq!(ask("GET", &format!("id={id}"), b"").json().as_array().unwrap().len(), 3);
    ask("GET", &format!("id={id}&wait=1&user=1"), b"");
    assert!(worker.daemon.is_alive());
    worker.daemon.signal("TERM");
    stream.end();
    let status = worker.daemon.child.wait().unwrap();
    assert!(status.success(), "{status}: {}", folder.text("start.log"));
}

#[test]
fn a_process_lives_within_the_system_calls_that_the_unit_allows() {
    let numbers = numbers();
    let calls: BTreeSet<u32> = allowed().iter().filter_map(|name| numbers.get(name).copied()).collect();
    assert!(calls.len() > 200 && !calls.contains(&numbers["mount"]) && !calls.contains(&numbers["chown"]), "{calls:?}");
    let folder = Folder::new();
    copy(&folder);
    let (unix, tcp) = (Memcached::start(&[]), Memcached::start_tcp());
    live(&folder, "unix.sock", ("SHORTBUS_MEMCACHED", &unix.address), &calls);
    live(&folder, "tcp.sock", ("SHORTBUS_MEMCACHED", &tcp.address), &calls);
    fs::create_dir(folder.join("store")).unwrap();
    live(&folder, "local.sock", ("SHORTBUS_STORE", folder.join("store").to_str().unwrap()), &calls);
    assert!(folder.join("store").read_dir().unwrap().next().is_some());
    // What is not allowed would end it.
    let mut command = Command::new("true");
    confine(&mut command, &BTreeSet::from([numbers["execve"]]));
    assert!(!command.status().unwrap().success());
}
