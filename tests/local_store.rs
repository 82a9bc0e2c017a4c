//! Buses in files of this host: where a bus lives and who decides, what another user can't do, and what survives kills,
//! damage and full disks.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use shortbus::limits;

use crate::fixtures::daemon::{Folder, wait_for};
use crate::fixtures::fastcgi_client::Client;
use crate::fixtures::fastcgi_server::{Worker, copy};
use crate::fixtures::fronts::Front;
use crate::fixtures::host::{Host, OTHER, Request, USER, answer};
use crate::fixtures::http_client::Reply;
use crate::fixtures::memcached::STEP;
use crate::fixtures::site::{Site, on_the_local_store};

#[track_caller]
fn id_of(reply: &Reply) -> u64 {
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()["id"].as_u64().unwrap()
}

#[track_caller]
fn heard(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json().as_array().unwrap().clone()
}

#[track_caller]
fn assert_outcome(reply: &Reply, status: u16, code: &str) {
    assert_eq!(reply.outcome(), (status, code.into()), "{reply:?}");
}

/// The decision for a bus of the user of these tests; none where there is no link.
fn decision(host: &Host, bus: &str) -> Option<String> {
    let line = format!("readlink /dev/shm/shortbus-{USER}/{bus} || echo none");
    Some(host.sh(&line).trim().to_owned()).filter(|text| text != "none")
}

#[test]
fn a_blank_host_is_enough_and_a_memcached_that_comes_later_changes_nothing() {
    let host = Host::new();
    let start = id_of(&host.get(USER, "", &[]));
    assert_eq!(decision(&host, "chat").as_deref(), Some("local"));
    let id = id_of(&host.post(USER, "user=1", "\"hello\"", &[]));
    assert_eq!(id, start + STEP);
    let memcached = host.memcached();
    let told = [json!({"id": id, "user": 1, "data": "hello"})];
    assert_eq!(heard(&host.get(USER, &format!("id={start}"), &[])), told);
    assert_eq!(decision(&host, "chat").as_deref(), Some("local"));
    drop(memcached);
    assert_eq!(heard(&host.get(USER, &format!("id={start}"), &[])), told);
    let modes = host.sh(&format!("cd /dev/shm/shortbus-{USER}; stat -c %a . chat:messages; ls"));
    assert_eq!(modes, "700\n600\nchat\nchat:messages\n");
}

#[test]
fn a_memcached_that_answers_is_taken_and_its_end_changes_nothing() {
    let host = Host::new();
    let memcached = host.memcached();
    id_of(&host.post(USER, "user=1", "1", &[]));
    assert_eq!(decision(&host, "chat").as_deref(), Some("memcached"));
    drop(memcached);
    assert_outcome(&host.post(USER, "user=1", "1", &[]), 503, "memcached_unreachable");
    assert_eq!(decision(&host, "chat").as_deref(), Some("memcached"));
    // The operator's way to have it decided anew.
    host.sh(&format!("rm /dev/shm/shortbus-{USER}/chat"));
    id_of(&host.post(USER, "user=1", "1", &[]));
    assert_eq!(decision(&host, "chat").as_deref(), Some("local"));
}

#[test]
fn a_silent_memcached_is_a_503_and_decides_nothing() {
    let host = Host::new();
    let memcached = host.memcached();
    memcached.signal("STOP");
    let started = Instant::now();
    assert_outcome(&host.get(USER, "", &[]), 503, "memcached_timeout");
    assert!(started.elapsed() < Duration::from_secs(2));
    assert_eq!(decision(&host, "chat"), None);
    memcached.signal("CONT");
    id_of(&host.get(USER, "", &[]));
    assert_eq!(decision(&host, "chat").as_deref(), Some("memcached"));
}

#[test]
fn a_hundred_first_requests_at_once_go_by_one_decision() {
    let host = Host::new();
    let mut decisions = HashSet::new();
    // Where memcached comes up in the middle, goes down in the middle, or is not there.
    for round in 0..12 {
        let bus = format!("bus{round}");
        host.copy(&bus);
        let mut memcached = (round % 3 == 1).then(|| host.memcached());
        let request = |n: usize| (format!("user={n}"), n.to_string());
        let mut children = vec![];
        for n in 0..100 {
            if n == 20 + 5 * round {
                match round % 3 {
                    0 => memcached = Some(host.memcached()),
                    1 => drop(memcached.take()),
                    _ => {}
                }
            }
            let (query, body) = request(n);
            children.push(
                host.start(USER, &Request { bus: &bus, method: "POST", query: &query, body: &body, settings: &[] }),
            );
        }
        let replies: Vec<Reply> = children.into_iter().map(answer).collect();
        let decision = decision(&host, &bus).unwrap();
        let ids: HashSet<u64> = replies
            .iter()
            .filter(|reply| reply.status == 200)
            .map(|reply| reply.json()["id"].as_u64().unwrap())
            .collect();
        let lost = decision == "memcached" && memcached.is_none();
        assert!(lost || ids.len() == 100, "{round} {decision}: {replies:?}");
        if !lost {
            let poll = host.ask(USER, &Request { bus: &bus, method: "GET", query: "id=0", body: "", settings: &[] });
            assert_eq!(heard(&poll).iter().map(|message| message["id"].as_u64().unwrap()).collect::<HashSet<_>>(), ids);
        }
        let file = host.sh(&format!("ls /dev/shm/shortbus-{USER} | grep -cxF {bus}:messages || :"));
        assert_eq!(file.trim(), if decision == "local" { "1" } else { "0" });
        decisions.insert(decision);
    }
    assert_eq!(decisions.len(), 2);
}

/// What a user plants, before another user's first request: a line of shell, with these users' numbers.
const PLANTED: [&str; 9] = [
    // The folder: another user's, in several ways; or one that lets others in.
    "mkdir -m 777 $DIR; chown OTHER $DIR",
    "mkdir -m 700 $DIR; chown OTHER $DIR",
    "mkdir -m 777 $DIR; chown OTHER $DIR; ln -s local $DIR/chat; chown -h OTHER $DIR/chat",
    "mkdir -m 777 $DIR; chown OTHER $DIR; ln -s memcached $DIR/chat; chown -h OTHER $DIR/chat",
    "mkdir -m 777 /dev/shm/theirs; ln -s /dev/shm/theirs $DIR; chown -h OTHER $DIR",
    "mkdir -m 750 $DIR; chown USER:OTHER $DIR",
    "echo > $DIR; chown OTHER $DIR",
    // The file.
    "mkdir -m 700 $DIR; chown USER $DIR; echo secret > /dev/shm/x; chown USER /dev/shm/x; ln -s /dev/shm/x $DIR/chat:messages",
    "mkdir -m 700 $DIR; chown USER $DIR; : > $DIR/chat:messages; chown OTHER $DIR/chat:messages; chmod 666 $DIR/chat:messages",
];

#[test]
fn what_another_user_has_planted_is_refused() {
    for planted in PLANTED {
        let host = Host::new();
        let line = planted.replace("USER", &USER.to_string()).replace("OTHER", &OTHER.to_string());
        host.sh(&format!("DIR=/dev/shm/shortbus-{USER}; {line}"));
        let before = host.sh("find /dev/shm -ls; cat /dev/shm/x 2>/dev/null || :");
        for reply in [
            host.get(USER, "id=0", &[]),
            host.post(USER, "user=1", "1", &[]),
            host.post(USER, "user=1&once=k", "1", &[]),
        ] {
            assert_outcome(&reply, 503, "store_denied");
            assert!(!reply.text().contains("/dev/shm"), "{reply:?}");
        }
        assert!(host.check(USER, &[]).contains("shortbus: "), "{planted}");
        let after = host.sh("find /dev/shm -ls; cat /dev/shm/x 2>/dev/null || :");
        // The decision itself may be there where the folder was the user's.
        let kept =
            before.lines().filter(|line| !line.ends_with(&format!("shortbus-{USER}"))).all(|line| after.contains(line));
        assert!(kept, "{planted}: {before} {after}");
    }
}

#[test]
fn what_is_no_file_is_refused_and_holds_nobody() {
    for planted in ["mkfifo $FILE", "mkdir $FILE", "ln -s /dev/zero $FILE", "ln -s chat:messages $FILE"] {
        let host = Host::new();
        let folder = format!("/dev/shm/shortbus-{USER}");
        host.sh(&format!("mkdir -m 700 {folder}; FILE={folder}/chat:messages; {planted}; chown -hR {USER} {folder}"));
        let started = Instant::now();
        assert_outcome(&host.get(USER, "id=0", &[]), 503, "store_denied");
        assert_outcome(&host.post(USER, "user=1", "1", &[]), 503, "store_denied");
        assert!(started.elapsed() < Duration::from_secs(1), "{planted}");
    }
}

#[test]
fn a_decision_that_this_version_does_not_know_is_refused() {
    for text in ["elsewhere", "x", "memcached 10.0.0.1:11211"] {
        let host = Host::new();
        let folder = format!("/dev/shm/shortbus-{USER}");
        host.sh(&format!("mkdir -m 700 {folder}; ln -s '{text}' {folder}/chat; chown -hR {USER} {folder}"));
        // One that is as long as a known one is none of this version's either.
        if text.len() != "memcached".len() {
            assert_outcome(&host.get(USER, "", &[]), 503, "store_denied");
        }
    }
}

#[test]
fn users_have_buses_of_their_own_and_a_check_tells_of_the_others() {
    let host = Host::new();
    let mine = id_of(&host.post(USER, "user=1", "\"mine\"", &[]));
    id_of(&host.post(OTHER, "user=1", "\"theirs\"", &[]));
    let reply = host.get(USER, &format!("id={}", mine - 1), &[]);
    assert_eq!(heard(&reply), [json!({"id": mine, "user": 1, "data": "mine"})]);
    let check = host.check(0, &[]);
    for text in [&format!("user {USER} has a bus of this name")[..], &format!("user {OTHER} has"), "not decided yet"] {
        assert!(check.contains(text), "{check}");
    }
    assert_eq!(host.sh("ls /dev/shm"), format!("shortbus-{USER}\nshortbus-{OTHER}\n"), "a check leaves nothing");
    let check = host.check(USER, &[]);
    assert!(check.contains(&format!("a process of user {USER} decided")) && check.ends_with("\nok\n"), "{check}");
    assert_eq!(host.get(USER, "", &[]).json()["id"], mine, "the check is not heard on the bus");
}

#[test]
fn without_a_place_in_memory_the_settings_that_help_are_named() {
    for line in [
        "mount -t tmpfs -o mode=755 tmpfs /dev/shm",
        "mount -t tmpfs -o ro tmpfs /dev/shm",
        "mount -t tmpfs tmpfs /dev; mknod -m 666 /dev/urandom c 1 9; mknod -m 666 /dev/random c 1 8",
    ] {
        let host = Host::new();
        host.sh(line);
        for reply in [host.get(USER, "", &[]), host.post(USER, "user=1&once=k", "1", &[])] {
            assert_outcome(&reply, 500, "bad_setting");
            let message = reply.json()["message"].as_str().unwrap().to_owned();
            assert!(message.contains("SHORTBUS_STORE") && message.contains("SHORTBUS_MEMCACHED"), "{message}");
        }
        let folder = host.folder.join("store");
        fs::create_dir(&folder).unwrap();
        chown(&folder, Some(USER), Some(USER)).unwrap();
        id_of(&host.post(USER, "user=1", "1", &[("SHORTBUS_STORE", folder.to_str().unwrap())]));
    }
}

#[test]
fn both_settings_at_once_are_refused() {
    let site = Site::with(Front::Bare, &[("chat", &[("SHORTBUS_STORE", "/tmp"), ("SHORTBUS_MEMCACHED", "/nowhere")])]);
    let reply = site.get("chat");
    assert_outcome(&reply, 500, "bad_setting");
    let message = reply.json()["message"].as_str().unwrap().to_owned();
    assert!(message.contains("SHORTBUS_STORE") && message.contains("SHORTBUS_MEMCACHED"), "{message}");
}

/// A folder of its own for the bus `chat`, by `SHORTBUS_STORE`.
struct Store {
    host: Host,
    folder: PathBuf,
    bytes: String,
    ttl: String,
}

impl Store {
    fn new() -> Store {
        Store::of_bytes(limits::STORE_BYTES)
    }

    fn of_bytes(bytes: u64) -> Store {
        let host = Host::new();
        let folder = host.folder.join("store");
        fs::create_dir(&folder).unwrap();
        chown(&folder, Some(USER), Some(USER)).unwrap();
        Store { host, folder, bytes: bytes.to_string(), ttl: "60".into() }
    }

    fn file(&self) -> PathBuf {
        self.folder.join("chat:messages")
    }

    fn aside(&self) -> PathBuf {
        self.folder.join("chat:messages.damaged")
    }

    fn settings(&self) -> [(&str, &str); 4] {
        let folder = self.folder.to_str().unwrap();
        [
            ("SHORTBUS_STORE", folder),
            ("SHORTBUS_STORE_BYTES", &self.bytes),
            ("SHORTBUS_TTL", &self.ttl),
            ("SHORTBUS_MAX_BYTES", "1000000"),
        ]
    }

    fn get(&self, query: &str) -> Reply {
        self.host.get(USER, query, &self.settings())
    }

    fn post(&self, query: &str, body: &str) -> Reply {
        self.host.post(USER, query, body, &self.settings())
    }

    #[track_caller]
    fn publish(&self, body: &str) -> u64 {
        id_of(&self.post("user=1", body))
    }

    #[track_caller]
    fn join(&self) -> u64 {
        id_of(&self.get(""))
    }
}

fn missed(reply: &Reply) -> bool {
    reply.header("shortbus-missed").is_some()
}

#[test]
fn a_folder_that_is_missing_or_no_folder_or_closed_is_named_in_the_log_alone() {
    let store = Store::new();
    let closed = store.host.folder.join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let program = store.host.folder.join("chat").display().to_string();
    for path in ["/nowhere", &program, closed.to_str().unwrap()] {
        let settings = [("SHORTBUS_STORE", path)];
        let request = Request { bus: "chat", method: "POST", query: "user=1&once=k", body: "1", settings: &settings };
        let output = store.host.start(USER, &request).wait_with_output().unwrap();
        let reply = Reply::parse(&output.stdout).unwrap();
        assert_outcome(&reply, 503, "store_denied");
        assert!(!reply.text().contains(path), "{reply:?}");
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(
            log.starts_with("shortbus: chat: store_denied: ") && log.contains(path) && log.lines().count() == 1,
            "{log}"
        );
    }
}

#[test]
fn users_whom_the_folders_group_lets_in_share_a_bus() {
    let host = Host::new();
    let folder = host.folder.join("shared");
    fs::create_dir(&folder).unwrap();
    chown(&folder, Some(0), Some(OTHER)).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o2770)).unwrap();
    let ask = |user: u32, method: &str, query: &str| {
        let mut command = Command::new("/usr/bin/setpriv");
        command.args([format!("--reuid={user}"), format!("--regid={user}"), format!("--groups={OTHER}")]);
        command.arg(host.folder.join("chat")).env_clear().env("REQUEST_METHOD", method).env("QUERY_STRING", query);
        command.env("SHORTBUS_STORE", &folder).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A GET reads no body.
        let _ = child.stdin.take().unwrap().write_all(b"\"hello\"");
        answer(child)
    };
    let first = id_of(&ask(USER, "POST", "user=1"));
    assert_eq!(id_of(&ask(OTHER, "POST", "user=2")), first + STEP);
    assert_eq!(heard(&ask(USER, "GET", &format!("id={}", first - 1))).len(), 2);
    // But not where everyone may write.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o1777)).unwrap();
    assert_outcome(&ask(OTHER, "GET", "id=0"), 503, "store_denied");
}

#[test]
fn a_full_disk_refuses_for_certain_and_polls_go_on() {
    let store = Store::new();
    let folder = store.folder.display();
    store.host.sh(&format!("mount -t tmpfs -o size=64k,uid={USER} tmpfs {folder}"));
    let start = store.join();
    let mut told = vec![];
    let body = format!("\"{}\"", "x".repeat(5_000));
    let refused = loop {
        let reply = store.post(&format!("user=1&once=k{}", told.len()), &body);
        if reply.status != 200 {
            break reply;
        }
        told.push(id_of(&reply));
        assert!(told.len() < 20);
    };
    assert_outcome(&refused, 503, "store_full");
    assert_outcome(&store.post("user=1", &body), 503, "store_full");
    let reply = store.get(&format!("id={start}"));
    assert_eq!(heard(&reply).iter().map(|message| message["id"].as_u64().unwrap()).collect::<Vec<_>>(), told);
    assert!(!missed(&reply));
    store.host.sh(&format!("mount -o remount,size=1m {folder}"));
    // The same request, now that there is room: one message.
    let query = format!("user=1&once=k{}", told.len());
    let mut reply = store.post(&query, &body);
    wait_for("the first request's lease to end", || {
        reply = store.post(&query, &body);
        reply.status != 409
    });
    let id = id_of(&reply);
    assert_eq!((id, id_of(&store.post(&query, &body))), (told.last().unwrap() + STEP, id));
}

#[test]
fn a_full_disk_makes_room_of_what_has_expired() {
    let mut store = Store::new();
    store.host.sh(&format!("mount -t tmpfs -o size=64k,uid={USER} tmpfs {}", store.folder.display()));
    store.ttl = "1".into();
    let body = format!("\"{}\"", "x".repeat(5_000));
    let mut full = false;
    while !full {
        full = store.post("user=1", &body).status == 503;
    }
    for _ in 0..30 {
        wait_for("room", || store.post("user=1", &body).status == 200);
    }
}

#[test]
fn a_read_only_folder_is_polled_and_refuses_for_certain() {
    let store = Store::new();
    let start = store.join();
    let id = store.publish("\"hello\"");
    store.host.sh(&format!("mount --bind {0} {0}; mount -o remount,bind,ro {0}", store.folder.display()));
    assert_eq!(heard(&store.get(&format!("id={start}"))), [json!({"id": id, "user": 1, "data": "hello"})]);
    for query in ["user=1", "user=1&once=k"] {
        assert_outcome(&store.post(query, "1"), 503, "store_denied");
    }
    store.host.sh(&format!("umount {}", store.folder.display()));
    assert_eq!(id_of(&store.post("user=1&once=k", "1")), id + STEP);
}

#[test]
fn names_of_any_bytes_and_255_of_them_are_buses_of_their_own() {
    let host = Host::new();
    let long = ["x".repeat(255), "x".repeat(254) + "y", "é".repeat(127)];
    let names: Vec<&str> = [".", "..", "a/b", "chat", "chat:messages", "%2E", "a b", "*"]
        .into_iter()
        .chain(long.iter().map(String::as_str))
        .collect();
    for name in &names {
        id_of(&host.post(USER, "user=1", &json!(name).to_string(), &[("SHORTBUS_BUS", name)]));
    }
    for name in &names {
        let messages = heard(&host.get(USER, "id=0", &[("SHORTBUS_BUS", name)]));
        assert_eq!(messages.iter().map(|message| &message["data"]).collect::<Vec<_>>(), [name]);
    }
    let files = host.sh(&format!("ls /dev/shm/shortbus-{USER} | wc -l"));
    assert_eq!(files.trim(), (2 * names.len()).to_string());
}

#[test]
fn messages_live_for_the_ttl_that_they_were_published_with() {
    let mut store = Store::new();
    let start = store.join();
    store.ttl = "2".into();
    let started = Instant::now();
    let id = store.publish("\"two\"");
    store.ttl = "1".into();
    store.publish("\"one\"");
    let texts = |store: &Store| -> Vec<String> {
        heard(&store.get(&format!("id={start}")))
            .iter()
            .map(|message| message["data"].as_str().unwrap().into())
            .collect()
    };
    assert_eq!(texts(&store), ["two", "one"]);
    // A second more than told, as memcached's clock needs it.
    wait_for("the shorter to expire", || texts(&store) == ["two"]);
    assert!(started.elapsed() > Duration::from_secs(2) && started.elapsed() < Duration::from_millis(2_900));
    wait_for("the longer to expire", || texts(&store).is_empty());
    assert!(started.elapsed() > Duration::from_secs(3) && started.elapsed() < Duration::from_millis(3_900));
    assert!(missed(&store.get(&format!("id={start}"))));
    store.ttl = "60".into();
    assert_eq!(store.publish("\"three\""), id + 2 * STEP);
    assert_eq!(texts(&store), ["three"]);
}

#[test]
fn a_file_is_bounded_and_the_oldest_messages_go_first() {
    let store = Store::of_bytes(limits::STORE_BYTES_MIN);
    let start = store.join();
    let body = format!("\"{}\"", "x".repeat(100_000));
    let ids: Vec<u64> = (0..60).map(|_| store.publish(&body)).collect();
    assert_eq!(ids, (1..=60).map(|n| start + n * STEP).collect::<Vec<_>>());
    let metadata = fs::metadata(store.file()).unwrap();
    assert!(metadata.len() <= limits::STORE_BYTES_MIN && metadata.blocks() * 512 <= limits::STORE_BYTES_MIN);
    let (mut at, mut lives) = (start, vec![]);
    loop {
        let reply = store.get(&format!("id={at}"));
        assert_eq!(missed(&reply), at == start);
        lives.extend(heard(&reply).iter().map(|message| message["id"].as_u64().unwrap()));
        let next = reply.header("shortbus-last-id").unwrap().parse().unwrap();
        if next == at {
            break;
        }
        at = next;
    }
    assert!((20..30).contains(&lives.len()), "{}", lives.len());
    assert_eq!(lives, (61 - lives.len() as u64..61).map(|n| start + n * STEP).collect::<Vec<_>>());
    // The setting of a process that comes later changes nothing.
    let larger = Store { bytes: (8 << 20).to_string(), ..store };
    for _ in 0..60 {
        larger.publish(&body);
    }
    assert!(fs::metadata(larger.file()).unwrap().len() <= limits::STORE_BYTES_MIN);
}

#[test]
fn a_writer_that_is_stopped_holds_up_no_poll_and_publishers_for_less_than_two_seconds() {
    let store = Store::new();
    let start = store.join();
    let id = store.publish("\"hello\"");
    let file = fs::File::open(store.file()).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    for query in ["user=1", "user=1&once=k"] {
        let began = Instant::now();
        assert_eq!(heard(&store.get(&format!("id={start}"))).len(), 1);
        assert!(began.elapsed() < Duration::from_secs(1));
        let began = Instant::now();
        assert_outcome(&store.post(query, "1"), 503, "store_busy");
        assert!((1_400..2_000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    }
    drop(file);
    assert_eq!(id_of(&store.post("user=1&once=k", "1")), id + STEP);
}

#[test]
fn a_damaged_file_is_set_aside_and_one_line_says_so() {
    let store = Store::new();
    let id = store.publish("\"hello\"");
    OpenOptions::new().write(true).open(store.file()).unwrap().set_len(200).unwrap();
    let settings = store.settings();
    let request = Request { bus: "chat", method: "POST", query: "user=1", body: "1", settings: &settings };
    let output = store.host.start(USER, &request).wait_with_output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("set aside as chat:messages.damaged; messages were lost"), "{log}");
    let reply = Reply::parse(&output.stdout).unwrap();
    assert!(id_of(&reply) > id && store.aside().exists());
    assert!(missed(&store.get(&format!("id={id}"))));
}

/// A FastCGI process of a bus on the local store, and the executable beside it for CGI.
struct Persistent {
    worker: Worker,
    folder: Folder,
}

impl Persistent {
    fn start() -> Persistent {
        let folder = Folder::new();
        fs::create_dir(folder.join("store")).unwrap();
        let program = copy(&folder);
        let store = folder.join("store").display().to_string();
        let worker = Worker::start(&program, folder.join("chat.s"), &folder, &[("SHORTBUS_STORE", &store)]);
        Persistent { worker, folder }
    }

    fn file(&self) -> PathBuf {
        self.folder.join("store/chat:messages")
    }

    fn connect(&self) -> Client {
        Client::connect(&self.worker.socket)
    }

    fn publish_by_cgi(&self, body: &str) -> u64 {
        let mut command = Command::new(self.folder.join("chat"));
        command.env_clear().env("REQUEST_METHOD", "POST").env("QUERY_STRING", "user=1");
        command.env("CONTENT_LENGTH", body.len().to_string()).env("SHORTBUS_STORE", self.folder.join("store"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
        id_of(&answer(child))
    }

    /// How often the process has waited.
    fn waits(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.worker.daemon.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        line.trim().parse().unwrap()
    }
}

#[test]
fn a_stream_hears_at_once_what_other_processes_publish_and_idles_at_nothing() {
    let bus = Persistent::start();
    let id = bus.publish_by_cgi("\"first\"");
    let mut streams: Vec<Client> = (0..3).map(|_| bus.connect()).collect();
    for stream in &mut streams {
        stream.ask("GET", &format!("id={}&stream=1", id - 1), &[], b"").until("\"first\"}\n\n");
    }
    let mut times: Vec<Duration> = (0..30)
        .map(|n| {
            let (text, began) = (format!("\"{n}\""), Instant::now());
            bus.publish_by_cgi(&text);
            streams.iter_mut().for_each(|stream| drop(stream.until(&format!("{text}}}\n\n"))));
            began.elapsed()
        })
        .collect();
    times.sort();
    println!("from the start of a publishing process to three streams: {:?}, at most {:?}", times[15], times[29]);
    assert!(times[15] < limits::WATCH_INTERVAL, "{times:?}");
    // Nothing but what the kernel does of itself: a watcher that asked now and then would wait a hundred times.
    let before = bus.waits();
    thread::sleep(Duration::from_secs(1));
    assert!(bus.waits() - before < 5, "{}", bus.waits() - before);
}

#[test]
fn a_stream_hears_what_comes_after_the_file_was_removed_replaced_or_was_not_there_yet() {
    let bus = Persistent::start();
    let mut stream = bus.connect();
    // There is no file yet.
    stream.ask("GET", "id=1&stream=1", &[], b"").until("\n\n");
    for n in 0..6 {
        let text = format!("\"message {n}\"");
        bus.publish_by_cgi(&text);
        stream.until(&format!("{text}}}\n\n"));
        match n % 3 {
            0 => fs::remove_file(bus.file()).unwrap(),
            1 => OpenOptions::new().write(true).open(bus.file()).unwrap().set_len(3).unwrap(),
            _ => fs::rename(bus.file(), bus.folder.join("moved")).unwrap(),
        }
    }
}

#[test]
fn a_process_that_stays_goes_at_once_by_what_is_at_the_files_path() {
    let mut bus = Persistent::start();
    let mut client = bus.connect();
    let store = bus.folder.join("store");
    for n in 0..12 {
        let moved = bus.folder.join(format!("moved {n}"));
        let id = bus.publish_by_cgi("\"by CGI\"");
        let reply = client.ask("GET", &format!("id={}", id - 1), &[], b"").answer().reply;
        assert_eq!(heard(&reply).len(), 1, "round {n}: {reply:?}");
        client.ask("POST", "user=2", &[], b"1").answer();
        match n % 4 {
            0 => fs::remove_file(bus.file()).unwrap(),
            1 => fs::rename(bus.file(), &moved).unwrap(),
            2 => {
                fs::rename(&store, &moved).unwrap();
                fs::create_dir(&store).unwrap();
            }
            _ => {
                // Now every user may write to it.
                fs::set_permissions(bus.file(), fs::Permissions::from_mode(0o666)).unwrap();
                assert_outcome(&client.ask("GET", "id=1", &[], b"").answer().reply, 503, "store_denied");
                fs::set_permissions(bus.file(), fs::Permissions::from_mode(0o600)).unwrap();
            }
        }
    }
    assert!(bus.worker.daemon.is_alive());
    let files = || fs::read_dir(format!("/proc/{}/fd", bus.worker.daemon.pid())).unwrap().count();
    let before = files();
    for n in 0..3 * limits::OPEN_FILES {
        let name = format!("bus {n}");
        assert_eq!(client.ask("POST", "user=1", &[("SHORTBUS_BUS", &name)], b"1").answer().reply.status, 200);
    }
    // None was open before: the last one was refused. Now each has its folder.
    assert_eq!(files(), before + 2 * limits::OPEN_FILES);
}

#[test]
fn a_publisher_that_waits_for_the_lock_holds_up_nobody_else_in_its_process() {
    let bus = Persistent::start();
    let id = bus.publish_by_cgi("\"first\"");
    let file = fs::File::open(bus.file()).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    let mut publishers: Vec<Client> = (0..3).map(|_| bus.connect()).collect();
    let began = Instant::now();
    for publisher in &mut publishers {
        publisher.ask("POST", "user=1&once=k", &[], b"1");
    }
    let poll = bus.connect().ask("GET", &format!("id={}", id - 1), &[], b"").answer().reply;
    assert_eq!(heard(&poll).len(), 1);
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    for publisher in &mut publishers {
        assert_outcome(&publisher.answer().reply, 503, "store_busy");
    }
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    drop(file);
    assert_eq!(id_of(&bus.connect().ask("POST", "user=1&once=k", &[], b"1").answer().reply), id + STEP);
}

#[test]
fn processes_that_stay_decide_as_those_that_end() {
    let host = Host::new();
    let socket = host.folder.join("chat.s");
    let mut command = host.command(USER, host.folder.join("chat"));
    let worker = Worker::run(command.env_clear(), socket.clone(), &host.folder);
    let ask = |method: &str, query: &str, body: &str| {
        Client::connect(&worker.socket).ask(method, query, &[], body.as_bytes()).answer().reply
    };
    // Files need no decision.
    assert_eq!(ask("OPTIONS", "", "").status, 204);
    assert_eq!(decision(&host, "chat"), None);
    let id = id_of(&ask("POST", "user=1", "\"stays\""));
    assert_eq!(decision(&host, "chat").as_deref(), Some("local"));
    assert_eq!(id_of(&host.post(USER, "user=1", "\"ends\"", &[])), id + STEP);
    assert_eq!(heard(&ask("GET", &format!("id={}", id - 1), "")).len(), 2);
    host.sh(&format!("rm /dev/shm/shortbus-{USER}/chat"));
    let memcached = host.memcached();
    memcached.signal("STOP");
    assert_outcome(&ask("GET", "", ""), 503, "memcached_timeout");
    assert_eq!(decision(&host, "chat"), None);
    memcached.signal("CONT");
    wait_for("memcached", || ask("GET", "", "").status == 200);
    assert_eq!(decision(&host, "chat").as_deref(), Some("memcached"));
}

#[test]
fn a_stream_follows_its_bus_where_it_is_decided_anew() {
    let host = Host::new();
    let mut command = host.command(USER, host.folder.join("chat"));
    let worker = Worker::run(command.env_clear(), host.folder.join("chat.s"), &host.folder);
    let id = id_of(&host.post(USER, "user=1", "\"in a file\"", &[]));
    let mut stream = Client::connect(&worker.socket);
    stream.ask("GET", &format!("id={}&stream=1", id - 1), &[], b"").until("\"in a file\"}\n\n");
    let memcached = host.memcached();
    // Nothing is published and nobody asks: the process decides because it has seen the decision go.
    host.sh(&format!("rm /dev/shm/shortbus-{USER}/chat"));
    wait_for("a decision", || decision(&host, "chat").as_deref() == Some("memcached"));
    id_of(&host.post(USER, "user=1", "\"in memcached\"", &[]));
    stream.until("\"in memcached\"}\n\n");
    // And back, where another decides.
    drop(memcached);
    host.sh(&format!("cd /dev/shm/shortbus-{USER}; rm chat; ln -s local new; chown -h {USER} new; mv new chat"));
    id_of(&host.post(USER, "user=1", "\"in the file again\"", &[]));
    stream.until("\"in the file again\"}\n\n");
    // The whole folder goes, though it may be there again before rm is done.
    host.sh(&format!("rm -r /dev/shm/shortbus-{USER} || :"));
    wait_for("a decision", || decision(&host, "chat").as_deref() == Some("local"));
    id_of(&host.post(USER, "user=1", "\"in a new file\"", &[]));
    stream.until("\"in a new file\"}\n\n");
}

#[test]
fn a_site_on_the_local_store_has_no_memcached() {
    on_the_local_store(|| {
        let site = Site::start(Front::Bare);
        site.copy("chat");
        site.publish("chat", 1, "1");
        assert!(site.is_local && Path::new(&site.store_file("chat")).exists());
        let link = site.store_file("other");
        symlink("chat:messages", &link).unwrap();
        site.copy("other");
        assert_outcome(&site.get("other"), 503, "store_denied");
    });
}
