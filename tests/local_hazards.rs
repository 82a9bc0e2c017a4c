//! What a bus in a file of this host survives: processes that are killed or stopped at any moment, a file that is damaged or
//! cut, clocks that step, and systems that are small, old or full.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::TryRng;
use rand::rngs::SysRng;
use serde_json::json;
use shortbus::bus::{self, IdempotencyKey, Publish};
use shortbus::limits;
use shortbus::stores::block_on;
use shortbus::stores::local::folder::Folder as StoreFolder;
use shortbus::stores::local::{Local, WholeProcess};

use crate::fixtures::daemon::wait_for;
use crate::fixtures::fastcgi_client::Client;
use crate::fixtures::fastcgi_server::Worker;
use crate::fixtures::host::{Host, USER, answer};
use crate::fixtures::http_client::Reply;
use crate::fixtures::local_bus::LocalBus;
use crate::fixtures::stepped::Stepped;

/// The number in a variable, for more by hand than `make test` has time for.
fn count(variable: &str, usual: usize) -> usize {
    std::env::var(variable).map_or(usual, |count| count.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

fn below(bound: u64) -> u64 {
    SysRng.try_next_u64().unwrap() % bound
}

fn missed(reply: &Reply) -> bool {
    reply.header("shortbus-missed").is_some()
}

/// A message as heard: its id, and what it says.
type Heard = Vec<(u64, String)>;

/// One page after a cursor, which goes on behind it; whether anything was missed.
#[track_caller]
fn read_page(reply: &Reply, cursor: &mut u64) -> (Heard, bool) {
    assert_eq!(reply.status, 200, "{reply:?}");
    let json = reply.json();
    let messages = json.as_array().unwrap().iter();
    *cursor = reply.header("shortbus-last-id").unwrap().parse().unwrap();
    (messages.map(|m| (m["id"].as_u64().unwrap(), m["data"].as_str().unwrap().into())).collect(), missed(reply))
}

/// What the processes of a bus were told, and for how long those waited that were not killed.
#[derive(Default)]
struct Ledger {
    /// By text.
    acknowledged: Mutex<BTreeMap<String, u64>>,
    /// The texts of each batch that was sent.
    batches: Mutex<Vec<Vec<String>>>,
    /// What was sent with `once` and was not answered: the query, and the text.
    unanswered: Mutex<Vec<(String, String)>>,
    killed: AtomicUsize,
    /// Publishes that others were always faster than: the 503 `busy`.
    refused: AtomicUsize,
    waits: Mutex<Vec<Duration>>,
}

impl Ledger {
    /// Goes by the reply to a request that was to publish these; whether they were published.
    fn take_note(&self, texts: &[String], reply: &Reply) -> bool {
        if reply.outcome() == (503, "busy".into()) {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return false;
        }
        assert_eq!(reply.status, 200, "{reply:?}");
        let json = reply.json();
        let ids = json["ids"].as_array().map_or_else(|| vec![json["id"].clone()], Vec::clone);
        assert_eq!(ids.len(), texts.len());
        let noted = texts.iter().cloned().zip(ids.iter().map(|id| id.as_u64().unwrap()));
        self.acknowledged.lock().unwrap().extend(noted);
        true
    }

    fn killed(&self) -> usize {
        self.killed.load(Ordering::SeqCst)
    }
}

/// What a publisher of a number sends the n-th time: singles, batches of several sizes, or singles with `once`.
fn request(publisher: usize, n: usize, ledger: &Ledger) -> (Vec<String>, String, String) {
    let size = if publisher % 3 == 1 { [2, 16, 3, 64][n % 4] } else { 1 };
    let texts: Vec<String> = (0..size).map(|k| format!("{publisher}-{n}-{k}")).collect();
    match publisher % 3 {
        0 => (texts.clone(), format!("user={publisher}"), json!(texts[0]).to_string()),
        1 => {
            ledger.batches.lock().unwrap().push(texts.clone());
            (texts.clone(), format!("user={publisher}&batch=1"), json!(texts).to_string())
        }
        _ => (texts.clone(), format!("user={publisher}&once={n}"), json!(texts[0]).to_string()),
    }
}

/// Publishes by CGI, each time by a process that may be killed at any moment.
fn publish_and_kill(bus: &LocalBus, publisher: usize, kills: usize, ledger: &Ledger) {
    for n in 0.. {
        if ledger.killed() >= kills {
            break;
        }
        let (texts, query, body) = request(publisher, n, ledger);
        let began = Instant::now();
        let mut child = bus.start("POST", &query, &body);
        if n % 4 > 0 {
            // At any moment of its millisecond or two.
            thread::sleep(Duration::from_micros(below(2_000)));
            let _ = child.kill();
        }
        let output = child.wait_with_output().unwrap();
        if output.status.code().is_some() {
            ledger.waits.lock().unwrap().push(began.elapsed());
        } else {
            ledger.killed.fetch_add(1, Ordering::SeqCst);
        }
        let published = Reply::parse(&output.stdout).is_some_and(|reply| ledger.take_note(&texts, &reply));
        if !published && query.contains("once") {
            ledger.unanswered.lock().unwrap().push((query, body));
        }
    }
}

/// The same by a FastCGI process that is killed and started anew, with several connections at a time.
fn serve_and_kill(bus: &LocalBus, kills: usize, ledger: &Ledger) {
    for round in 0.. {
        if ledger.killed() >= kills {
            break;
        }
        let worker = bus.worker("chat.s");
        thread::scope(|scope| {
            for client in 0..4 {
                // Here, before the kill.
                let mut connection = Client::connect(&worker.socket);
                // Two of singles, one of batches and one with `once`.
                let publisher = 100 + client * 4;
                scope.spawn(move || {
                    for n in (round * 100_000).. {
                        let (texts, query, body) = request(publisher, n, ledger);
                        let reply = connection.try_ask("POST", &query, body.as_bytes());
                        let published = reply.as_ref().is_some_and(|reply| ledger.take_note(&texts, reply));
                        if !published && query.contains("once") {
                            ledger.unanswered.lock().unwrap().push((query, body));
                        }
                        if reply.is_none() {
                            break;
                        }
                        thread::sleep(Duration::from_millis(1));
                    }
                });
            }
            thread::sleep(Duration::from_micros(3_000 + below(20_000)));
            worker.daemon.signal("KILL");
        });
        ledger.killed.fetch_add(1, Ordering::SeqCst);
        drop(worker);
        fs::remove_file(bus.folder.join("chat.s")).unwrap();
    }
}

/// Publishes inside this process, which is not killed: how long it has to wait for those that are.
fn publish_beside(bus: &LocalBus, kills: usize, ledger: &Ledger) -> Vec<Duration> {
    let mut waits = vec![];
    for n in 0.. {
        if ledger.killed() >= kills {
            break;
        }
        let text = format!("beside-{n}");
        let data = json!(text).to_string();
        let publish = Publish { user: 9, messages: vec![data.as_bytes()], key: None };
        let began = Instant::now();
        let mut store = Local::new(StoreFolder::named(bus.store()), b"chat", bus.bytes, WholeProcess);
        let published = block_on(bus::publish(&mut store, publish, bus.ttl));
        waits.push(began.elapsed());
        match published {
            Ok(ids) => drop(ledger.acknowledged.lock().unwrap().insert(text, ids[0])),
            Err(bus::Error::Busy) => drop(ledger.refused.fetch_add(1, Ordering::SeqCst)),
            Err(error) => panic!("{error:?}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
    waits
}

/// Polls that are killed leave nothing behind.
fn poll_and_kill(bus: &LocalBus, start: u64, over: &AtomicBool) {
    while !over.load(Ordering::SeqCst) {
        let mut child = bus.start("GET", &format!("id={start}"), "");
        thread::sleep(Duration::from_micros(below(2_000)));
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Hears all of a bus from a cursor on, until nothing is new when it is over.
fn hear(bus: &LocalBus, start: u64, over: &AtomicBool) -> Heard {
    let (mut cursor, mut all) = (start, vec![]);
    loop {
        let last_round = over.load(Ordering::SeqCst);
        let before = cursor;
        let (heard, missed) = read_page(&bus.get(&format!("id={cursor}")), &mut cursor);
        assert!(!missed);
        all.extend(heard);
        if cursor == before {
            if last_round {
                return all;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn publishers_and_pollers_that_are_killed_lose_nothing() {
    let kills = count("TEST_KILLS", 300);
    let mut bus = LocalBus::new(limits::STORE_BYTES * 16);
    bus.ttl = 3_600;
    let start = bus.join();
    let (ledger, over) = (Ledger::default(), AtomicBool::new(false));
    let (beside, meanwhile) = thread::scope(|scope| {
        let (bus, ledger, over) = (&bus, &ledger, &over);
        scope.spawn(|| poll_and_kill(bus, start, over));
        let poller = scope.spawn(|| hear(bus, start, over));
        let beside = scope.spawn(|| publish_beside(bus, kills, ledger));
        let mut publishers: Vec<_> =
            (0..3).map(|n| scope.spawn(move || publish_and_kill(bus, n, kills, ledger))).collect();
        publishers.push(scope.spawn(|| serve_and_kill(bus, kills, ledger)));
        let failed = publishers.into_iter().filter_map(|publisher| publisher.join().err()).count();
        ledger.killed.fetch_add(if failed > 0 { kills } else { 0 }, Ordering::SeqCst);
        let beside = beside.join();
        // Also where something failed: else the others would go on for ever.
        over.store(true, Ordering::SeqCst);
        assert_eq!(failed, 0);
        (beside.unwrap(), poller.join().unwrap())
    });
    // What was sent with `once` and has had no answer is sent again, and answered.
    let unanswered = ledger.unanswered.lock().unwrap().clone();
    for (query, body) in &unanswered {
        wait_for("the first request's lease to end", || {
            let reply = bus.post(query, body);
            let undecided = reply.outcome() == (409, "once_undecided".into());
            !undecided && ledger.take_note(&[body.trim_matches('"').into()], &reply)
        });
    }
    let heard = hear(&bus, start, &AtomicBool::new(true));
    assert_eq!(heard[..meanwhile.len()], meanwhile, "who polls meanwhile hears the same in the same order");
    assert!(heard.windows(2).all(|pair| pair[0].0 < pair[1].0), "ids rise");
    let mut slots: Vec<u64> = heard.iter().map(|(id, _)| id / limits::SLOT_MESSAGES).collect();
    slots.dedup();
    let first = (start + 1) / limits::SLOT_MESSAGES;
    assert_eq!(slots, (first..first + slots.len() as u64).collect::<Vec<_>>(), "no slot is left out");
    let by_text: BTreeMap<&String, u64> = heard.iter().map(|(id, text)| (text, *id)).collect();
    assert_eq!(by_text.len(), heard.len(), "none is heard twice");
    let acknowledged = ledger.acknowledged.lock().unwrap();
    for (text, id) in acknowledged.iter() {
        assert_eq!(by_text.get(text), Some(id), "{text}");
    }
    for batch in ledger.batches.lock().unwrap().iter() {
        let ids: Vec<u64> = batch.iter().filter_map(|text| by_text.get(text).copied()).collect();
        let slots: BTreeSet<u64> = ids.iter().map(|id| id / limits::SLOT_MESSAGES).collect();
        let whole = ids.len() == batch.len() && slots.len() == 1 && ids.is_sorted();
        assert!(ids.is_empty() || whole, "a batch is heard whole or not at all: {batch:?} {ids:?}");
    }
    assert!(!bus.aside().exists());
    let mut waits = ledger.waits.lock().unwrap().clone();
    waits.sort();
    let worst = |waits: &[Duration]| waits.iter().max().copied().unwrap_or_default();
    println!(
        "{} killed; {} acknowledged, {} of them by a repeat, {} heard, {} refused as busy; waited: inside a process {:?} at most ({} publishes), \
         a whole process {:?}, at most {:?} ({})",
        ledger.killed(),
        acknowledged.len(),
        unanswered.len(),
        heard.len(),
        ledger.refused.load(Ordering::SeqCst),
        worst(&beside),
        beside.len(),
        waits.get(waits.len() / 2),
        worst(&waits),
        waits.len()
    );
    assert!(worst(&beside) < limits::STORE_DEADLINE);
}

/// A system call of a request's process: its name, and which of this name it is.
type Call = (String, usize);

/// The system calls that this publish makes from the reading of its body on.
fn calls_of(bus: &LocalBus, query: &str, body: &str) -> Vec<Call> {
    let output = bus.start_under(&["strace"], "POST", query, body).wait_with_output().unwrap();
    assert_eq!(Reply::parse(&output.stdout).map(|reply| reply.status), Some(200));
    let (text, mut seen) = (String::from_utf8_lossy(&output.stderr).into_owned(), BTreeMap::new());
    let names = text.lines().filter_map(|line| line.split_once('(')).map(|(name, _)| name.to_owned());
    let numbered = names.map(|name| {
        let number: &mut usize = seen.entry(name.clone()).or_default();
        *number += 1;
        (name, *number)
    });
    numbered.skip_while(|(name, _)| name != "read").take_while(|(name, _)| name != "exit_group").collect()
}

/// What runs a program to which this happens when it makes the call.
fn injected((name, number): &Call, what: &str) -> [String; 3] {
    ["strace".into(), "-o/dev/null".into(), format!("-einject={name}:{what}:when={number}")]
}

/// All that is new behind the cursor.
#[track_caller]
fn read_all(bus: &LocalBus, cursor: &mut u64) -> Heard {
    let mut all = vec![];
    loop {
        let before = *cursor;
        let (heard, missed) = read_page(&bus.get(&format!("id={cursor}")), cursor);
        assert!(!missed, "after {all:?}");
        all.extend(heard);
        if *cursor == before {
            return all;
        }
    }
}

#[test]
fn a_publisher_that_is_killed_or_failed_at_any_of_its_system_calls_publishes_all_or_nothing() {
    let bus = LocalBus::new(limits::STORE_BYTES_MIN);
    let mut cursor = bus.join();
    let kinds = [("user=1", "\"a\"", 1), ("user=1&batch=1", "[\"a\",\"b\"]", 2), ("user=1&once=ONCE", "\"a\"", 1)];
    let hazards = ["signal=KILL", "error=EIO", "error=ENOSPC", "error=EINTR"];
    let (mut outcomes, mut repeats) = (BTreeMap::<String, usize>::new(), vec![]);
    for (query, body, size) in kinds {
        let calls = calls_of(&bus, query, body);
        assert_eq!(read_all(&bus, &mut cursor).len(), size);
        for (call, hazard) in calls.iter().flat_map(|call| hazards.map(|hazard| (call, hazard))) {
            let what = format!("{query} {call:?} {hazard}");
            let query = query.replace("ONCE", &format!("{}-{}-{}", call.0, call.1, &hazard[6..]).replace('=', "-"));
            let words = injected(call, hazard);
            let words = words.each_ref().map(|word| &word[..]);
            let output = bus.start_under(&words, "POST", &query, body).wait_with_output().unwrap();
            let heard = read_all(&bus, &mut cursor);
            assert!([0, size].contains(&heard.len()), "{what}: {heard:?}");
            let outcome = match Reply::parse(&output.stdout) {
                None => "no reply".into(),
                Some(reply) if reply.status == 200 => {
                    assert_eq!(heard.last().map(|(id, _)| *id), reply.json()["id"].as_u64(), "{what}");
                    "published".into()
                }
                Some(reply) => {
                    let (status, code) = reply.outcome();
                    assert!(status >= 400 && !code.is_empty(), "{what}: {reply:?}");
                    assert!(heard.is_empty() || code == "outcome_unknown", "{what}: {reply:?}");
                    code
                }
            };
            *outcomes.entry(format!("{hazard}: {outcome}")).or_default() += 1;
            let began = Instant::now();
            let id = bus.publish("\"next\"");
            assert!(began.elapsed() < limits::STORE_DEADLINE, "{what}");
            assert_eq!(read_all(&bus, &mut cursor), [(id, "next".into())], "{what}");
            if query.contains("once") {
                repeats.push((query, heard.last().map(|(id, _)| *id)));
            }
        }
    }
    println!("{outcomes:?}");
    for (query, published) in repeats {
        let mut reply = bus.post(&query, "\"a\"");
        wait_for("the first request's lease to end", || {
            reply = bus.post(&query, "\"a\"");
            reply.outcome() != (409, "once_undecided".into())
        });
        let id = reply.json()["id"].as_u64();
        assert!(id.is_some() && published.is_none_or(|published| Some(published) == id), "{query}: {reply:?}");
        assert_eq!(read_all(&bus, &mut cursor).len(), usize::from(published.is_none()), "{query}");
    }
    assert!(!bus.aside().exists());
}

#[test]
fn a_publisher_that_is_stopped_at_any_of_its_system_calls_holds_up_no_poll_and_others_only_while_it_has_the_lock() {
    let bus = LocalBus::new(limits::STORE_BYTES_MIN);
    let mut cursor = bus.join();
    let calls = calls_of(&bus, "user=1", "\"a\"");
    assert_eq!(read_all(&bus, &mut cursor).len(), 1);
    let is_lock = |call: &Call| call.0 == "flock";
    let locked = calls.iter().position(is_lock).unwrap()..calls.iter().rposition(is_lock).unwrap();
    for (n, call) in calls.iter().enumerate() {
        let trace = bus.folder.join("trace");
        let [strace, _, inject] = injected(call, "signal=STOP");
        // The tracer apart: so that the child is the publisher itself.
        let words = [&strace[..], "-D", "-o", trace.to_str().unwrap(), &inject];
        let publisher = bus.start_under(&words, "POST", "user=1", "\"stopped\"");
        let pid = publisher.id().to_string();
        wait_for("the publisher to stop", || {
            fs::read_to_string(&trace).unwrap_or_default().contains("stopped by SIGSTOP")
        });
        let heard = read_all(&bus, &mut cursor);
        let reply = bus.post("user=2", "\"other\"");
        // It stops behind the call.
        let expected = if locked.contains(&n) { (503, "store_busy".into()) } else { (200, String::new()) };
        assert_eq!(reply.outcome(), expected, "{call:?}: {reply:?}");
        assert!(Command::new("kill").args(["-CONT", &pid]).status().unwrap().success());
        let stopped = answer(publisher);
        assert_eq!(stopped.status, 200, "{call:?}: {stopped:?}");
        let all = [heard, read_all(&bus, &mut cursor)].concat();
        let texts: BTreeSet<&str> = all.iter().map(|(_, text)| &text[..]).collect();
        assert_eq!((all.len(), texts.len()), (1 + usize::from(reply.status == 200), all.len()), "{call:?}: {all:?}");
        assert!(all.contains(&(stopped.json()["id"].as_u64().unwrap(), "stopped".into())), "{call:?}: {all:?}");
        fs::remove_file(trace).unwrap();
    }
    assert!(locked.len() > 3, "{calls:?}");
}

/// A bus with messages of several kinds, and its file as it then was.
struct Template {
    bus: LocalBus,
    start: u64,
    heard: Heard,
    bytes: Vec<u8>,
}

/// The address space of a process that meets a damaged file: it must not ask for what the damage says.
const SMALL: [&str; 2] = ["prlimit", "--as=33554432"];

impl Template {
    fn new() -> Template {
        // Nothing expires while it is damaged again and again.
        let bus = LocalBus { ttl: 3_600, ..LocalBus::new(limits::STORE_BYTES_MIN) };
        let start = bus.join();
        bus.publish("\"one\"");
        bus.publish(&json!("x".repeat(9_000)).to_string());
        assert_eq!(bus.post("user=1&batch=1", "[\"two\",\"three\"]").status, 200);
        assert_eq!(bus.post("user=1&once=k", "\"once\"").status, 200);
        let (heard, bytes) = (read_all(&bus, &mut start.clone()), fs::read(bus.file()).unwrap());
        assert_eq!(heard.len(), 5);
        Template { bus, start, heard, bytes }
    }

    /// The file as it was, with its holes.
    fn restore(&self) -> fs::File {
        let _ = fs::remove_file(self.bus.file());
        let _ = fs::remove_file(self.bus.aside());
        let file = fs::File::options().create_new(true).read(true).write(true).open(self.bus.file()).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
        file.set_len(self.bytes.len() as u64).unwrap();
        for (n, page) in self.bytes.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|&byte| byte != 0)) {
            file.write_all_at(page, n as u64 * 4096).unwrap();
        }
        file
    }

    /// A place in the file that is in use.
    fn used(&self) -> usize {
        loop {
            let at = below(self.bytes.len() as u64) as usize;
            let page = at / 4096 * 4096;
            if self.bytes[page..(page + 4096).min(self.bytes.len())].iter().any(|&byte| byte != 0) {
                return at;
            }
        }
    }

    #[track_caller]
    fn ask(&self, what: &str, method: &str, query: &str, body: &str) -> Reply {
        let began = Instant::now();
        let output = self.bus.start_under(&SMALL, method, query, body).wait_with_output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "{what}: {:?}", began.elapsed());
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(log.is_empty() || log.ends_with("messages were lost\n") && log.lines().count() == 1, "{what}: {log}");
        Reply::parse(&output.stdout).unwrap_or_else(|| panic!("{what}: {output:?}"))
    }

    /// Damages the file, and looks that nobody hears what was not said, that the next publish works, that ids rise and that
    /// what was lost is told. Whether the file was set aside.
    #[track_caller]
    fn assert_survives(&self, what: &str, damage: impl FnOnce(&fs::File)) -> bool {
        damage(&self.restore());
        let query = format!("id={}", self.start);
        let (heard, _) = read_page(&self.ask(what, "GET", &query, ""), &mut 0);
        assert!(heard.iter().all(|message| self.heard.contains(message)), "{what}: {heard:?}");
        let reply = self.ask(what, "POST", "user=1", "\"next\"");
        let id = reply.json()["id"].as_u64().unwrap_or_else(|| panic!("{what}: {reply:?}"));
        assert!(self.heard.iter().all(|(earlier, _)| *earlier < id), "{what}: {id}");
        let (heard, missed) = read_page(&self.ask(what, "GET", &query, ""), &mut 0);
        assert_eq!(heard.last(), Some(&(id, "next".into())), "{what}");
        assert!(heard[..heard.len() - 1].iter().all(|message| self.heard.contains(message)), "{what}: {heard:?}");
        assert!(missed || heard.len() == self.heard.len() + 1, "{what}: {heard:?}");
        self.bus.aside().exists()
    }
}

/// Repeats what was sent before the damage. A record that is damaged is none, so it may be published a second time; but it
/// is never acknowledged without being heard.
#[track_caller]
fn assert_repeat_is_heard(template: &Template, what: &str) {
    let reply = template.ask(what, "POST", "user=1&once=k", "\"once\"");
    let id = reply.json()["id"].as_u64().unwrap_or_else(|| panic!("{what}: {reply:?}"));
    let (heard, _) = read_page(&template.ask(what, "GET", &format!("id={}", template.start), ""), &mut 0);
    assert!(heard.contains(&(id, "once".into())), "{what}: {id} {heard:?}");
    assert!(heard.iter().filter(|(_, text)| text == "once").count() <= 2, "{what}: {heard:?}");
}

#[test]
fn a_header_with_any_byte_changed_loses_messages_but_tells_so() {
    let template = Template::new();
    for at in 0..256 {
        for _ in 0..2 * count("TEST_DAMAGES", 1) {
            let byte = template.bytes[at as usize].wrapping_add(1 + below(255) as u8);
            let aside = template
                .assert_survives(&format!("byte {at} is {byte}"), |file| file.write_all_at(&[byte], at).unwrap());
            assert!(aside, "byte {at}");
        }
    }
    for round in 0..20 {
        let bytes: Vec<u8> = (0..256).map(|_| below(256) as u8).collect();
        template.assert_survives(&format!("round {round}"), |file| file.write_all_at(&bytes, 0).unwrap());
    }
}

#[test]
fn a_file_that_is_damaged_anywhere_loses_messages_but_tells_so() {
    let template = Template::new();
    // Within the lease a repeat whose message was damaged, and not its record, is told to ask again.
    thread::sleep(Duration::from_secs(limits::ONCE_LEASE.into()));
    let mut aside = 0;
    for round in 0..1_000 * count("TEST_DAMAGES", 1) {
        // A bit, a byte, several bytes, or a page of zeros or of anything.
        let at = template.used();
        let (from, bytes) = match round % 5 {
            0 => (at, vec![template.bytes[at] ^ (1 << below(8))]),
            1 => (at, vec![below(256) as u8]),
            2 => (at, (0..=below(64)).map(|_| below(256) as u8).collect()),
            3 => (at / 4096 * 4096, vec![0; 4096]),
            _ => (at / 4096 * 4096, (0..4096).map(|_| below(256) as u8).collect()),
        };
        let what = format!("round {round}, {} bytes at {from}", bytes.len());
        aside += usize::from(template.assert_survives(&what, |file| file.write_all_at(&bytes, from as u64).unwrap()));
        assert_repeat_is_heard(&template, &what);
    }
    println!("set aside {aside} times");
    assert!(aside > 0);
}

#[test]
fn a_file_that_is_cut_anywhere_loses_messages_but_tells_so() {
    let template = Template::new();
    let length = template.bytes.len() as u64;
    let odd = [1, 7, 255, 256, 257, 2_047, 2_049, 3_000].into_iter().chain((0..20).map(|_| below(length)));
    for length in (0..length).step_by(4096).chain(odd).chain([length - 1, length + 1, length * 2]) {
        template.assert_survives(&format!("{length} bytes"), |file| file.set_len(length).unwrap());
    }
}

/// Publishes on a connection, waits a little where the file is just damaged, and notes what was acknowledged.
fn publish_until(
    over: &AtomicBool,
    publisher: usize,
    acknowledged: &Mutex<BTreeMap<u64, String>>,
    mut ask: impl FnMut(&str) -> Reply,
) {
    for n in 0.. {
        if over.load(Ordering::SeqCst) {
            break;
        }
        // A file whose counter is lost begins anew by the clock, a slot for 256 µs, which is not to be outrun.
        thread::sleep(Duration::from_millis(3));
        let text = format!("{publisher}-{n}");
        let reply = ask(&json!(text).to_string());
        match reply.outcome() {
            (200, _) => {
                let id = reply.json()["id"].as_u64().unwrap();
                assert_eq!(acknowledged.lock().unwrap().insert(id, text), None, "an id twice");
            }
            (503, code) if ["store_broken", "store_busy", "outcome_unknown", "busy"].contains(&&code[..]) => {}
            _ => panic!("{reply:?}"),
        }
    }
}

#[test]
fn processes_at_work_on_a_file_that_is_cut_and_overwritten_go_on() {
    let bus = LocalBus::new(limits::STORE_BYTES_MIN);
    let start = bus.join();
    let mut worker = bus.worker("chat.s");
    let mut stream = Client::connect(&worker.socket);
    stream.ask("GET", &format!("id={start}&stream=1"), &[], b"");
    let (acknowledged, over) = (Mutex::default(), AtomicBool::new(false));
    thread::scope(|scope| {
        let (acknowledged, over, bus, socket) = (&acknowledged, &over, &bus, &worker.socket);
        for publisher in 0..2 {
            scope.spawn(move || {
                let mut client = Client::connect(socket);
                let ask = |body: &str| client.ask("POST", "user=1", &[], body.as_bytes()).answer().reply;
                publish_until(over, publisher, acknowledged, ask);
            });
        }
        scope.spawn(|| publish_until(over, 2, acknowledged, |body| bus.post("user=1", body)));
        let damage = scope.spawn(move || {
            for round in 0..200 * count("TEST_DAMAGES", 1) {
                thread::sleep(Duration::from_millis(3 + below(10)));
                // Just now it is set aside.
                let Ok(file) = fs::File::options().read(true).write(true).open(bus.file()) else {
                    continue;
                };
                let length = file.metadata().unwrap().len().max(1);
                match round % 3 {
                    0 => file.set_len(below(length) / 4096 * 4096).unwrap(),
                    1 => file.set_len(below(length)).unwrap(),
                    _ => file.write_all_at(&[below(256) as u8; 64], below(256)).unwrap(),
                }
            }
        });
        let damaged = damage.join();
        over.store(true, Ordering::SeqCst);
        damaged.unwrap();
    });
    // Whatever the last damage did.
    bus.publish("\"last but one\"");
    bus.publish("\"the last\"");
    let told = stream.until("\"the last\"}");
    assert!(worker.daemon.is_alive());
    let acknowledged = acknowledged.into_inner().unwrap();
    let messages = told.lines().filter_map(|line| line.strip_prefix("data: {\"id\":"));
    let (mut last, mut heard) = (start, 0);
    for line in messages {
        let message: serde_json::Value =
            serde_json::from_str(&format!("{{\"id\":{}", line.trim_end_matches(']'))).unwrap();
        let id = message["id"].as_u64().unwrap();
        assert!(id > last, "{line}");
        let text = message["data"].as_str().unwrap();
        assert!(acknowledged.get(&id).is_none_or(|acknowledged| acknowledged == text), "{line}");
        (last, heard) = (id, heard + 1);
    }
    println!(
        "{} acknowledged, {heard} heard on a stream, missed {} times",
        acknowledged.len(),
        told.matches("event: missed").count()
    );
    assert!(heard > 10 && told.contains("event: missed"));
}

/// One request by a program on a host: the reply, where there is one, and what went to the log.
fn ask_by(
    command: &mut Command,
    settings: &[(&str, &str)],
    method: &str,
    query: &str,
    body: &str,
) -> (Option<Reply>, String) {
    command.env_clear().env("REQUEST_METHOD", method).env("QUERY_STRING", query);
    command.env("CONTENT_LENGTH", body.len().to_string()).envs(settings.iter().copied());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(body.as_bytes());
    let output = child.wait_with_output().unwrap();
    (Reply::parse(&output.stdout), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_chroot_with_nothing_but_the_executable_is_enough_with_a_place_for_the_bus() {
    const NOBODY: &str = "65534:65534";
    let host = Host::new();
    let root = host.folder.join("root");
    fs::create_dir(&root).unwrap();
    fs::copy(host.folder.join("chat"), root.join("chat")).unwrap();
    let ask = |settings: &[(&str, &str)], method: &str, query: &str, body: &str| {
        let mut command = host.command(0, "/usr/sbin/chroot");
        command.arg(format!("--userspec={NOBODY}")).args([root.to_str().unwrap(), "/chat"]);
        ask_by(&mut command, settings, method, query, body)
    };
    let assert_works = |settings: &[(&str, &str)]| {
        for query in ["user=1", "user=1&once=k"] {
            let (reply, log) = ask(settings, "POST", query, "\"hello\"");
            let id = reply.unwrap().json()["id"].as_u64().unwrap();
            let (reply, _) = ask(settings, "GET", &format!("user=2&id={}", id - 1), "");
            assert_eq!(reply.unwrap().json(), json!([{"id": id, "user": 1, "data": "hello"}]));
            assert_eq!(log, "");
        }
        assert!(ask(settings, "GET", "", "").0.unwrap().json()["user"].is_number());
    };
    // No /dev, no /proc, no /tmp.
    for (method, query) in [("GET", ""), ("GET", "id=1"), ("POST", "user=1")] {
        let (reply, log) = ask(&[], method, query, "1");
        assert_eq!(reply.unwrap().outcome(), (500, "bad_setting".into()));
        assert!(log.contains("/dev/shm") && log.lines().count() == 1, "{log}");
    }
    let store = root.join("store");
    fs::create_dir(&store).unwrap();
    let named = [("SHORTBUS_STORE", "/store")];
    let (reply, log) = ask(&named, "POST", "user=1", "1");
    assert_eq!((reply.unwrap().outcome(), log.lines().count()), ((503, "store_denied".into()), 1), "{log}");
    chown(&store, Some(65_534), None).unwrap();
    assert_works(&named);
    // As a container has it.
    host.sh(&format!("mkdir -p {0}/dev/shm; mount -t tmpfs -o size=64m,mode=1777 tmpfs {0}/dev/shm", root.display()));
    assert_works(&[]);
    let listed = host.sh(&format!("cd {}/dev/shm/shortbus-65534; ls; readlink chat", root.display()));
    assert_eq!(listed, "chat\nchat:messages\nlocal\n");
    // A process that stays, with a stream.
    let mut command = host.command(0, "/usr/sbin/chroot");
    command.arg(format!("--userspec={NOBODY}")).args([root.to_str().unwrap(), "/chat"]).env_clear();
    let worker = Worker::run(&mut command, host.folder.join("chat.s"), &host.folder);
    let mut stream = Client::connect(&worker.socket);
    stream.ask("GET", "stream=1&id=1", &[], b"").until("\n\n");
    assert!(ask(&[], "POST", "user=1", "\"to the stream\"").0.is_some_and(|reply| reply.status == 200));
    stream.until("\"to the stream\"");
}

#[test]
fn limits_of_memory_and_of_a_files_size_are_kept_or_told() {
    let bus = LocalBus::new(limits::STORE_BYTES);
    let under = |limit: &str, method: &str, query: &str, body: &str| {
        let output = bus.start_under(&["prlimit", limit], method, query, body).wait_with_output().unwrap();
        let log = String::from_utf8(output.stderr.clone()).unwrap();
        (Reply::parse(&output.stdout).unwrap_or_else(|| panic!("{output:?}")), log)
    };
    let memory = ["--as=33554432", "--data=33554432", "--stack=262144", "--nofile=8"];
    for limit in memory {
        let start = bus.join();
        for n in 0..100 {
            let batch = json!(vec!["x".repeat(9_000); 100]).to_string();
            let (reply, log) = under(limit, "POST", &format!("user=1&batch=1&once={n}{}", &limit[2..4]), &batch);
            assert_eq!((reply.status, &log[..]), (200, ""), "{limit}: {reply:?}");
            if n > 1 && limit != memory[0] {
                break;
            }
        }
        let (mut cursor, mut heard) = (start, 0);
        loop {
            let before = cursor;
            heard += read_page(&under(limit, "GET", &format!("id={cursor}"), "").0, &mut cursor).0.len();
            if cursor == before {
                break;
            }
        }
        assert!(heard >= 300, "{limit}: {heard}");
    }
    // Below where the messages begin; `SIGXFSZ` would end the process without a word.
    fs::remove_file(bus.file()).unwrap();
    let start = bus.join();
    for query in ["user=1", "user=1&once=k"] {
        let (reply, log) = under("--fsize=100000", "POST", query, "1");
        assert_eq!((reply.outcome(), log.lines().count()), ((503, "store_full".into()), 1), "{log}");
    }
    assert_eq!(read_page(&under("--fsize=100000", "GET", &format!("id={start}"), "").0, &mut 0).0, []);
    assert!(!bus.aside().exists());
}

#[test]
fn a_web_server_that_opens_no_standard_streams_does_no_harm() {
    let bus = LocalBus::new(limits::STORE_BYTES_MIN);
    let mut cursor = bus.join();
    for closed in ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"] {
        let line = format!("exec \"$0\" {closed}");
        let ask = |method: &str, query: &str, body: &str| {
            let child = bus.start_under(&["sh", "-c", &line], method, query, body);
            Reply::parse(&child.wait_with_output().unwrap().stdout)
        };
        let told = !closed.split(' ').any(|stream| stream.starts_with('>'));
        let poll = ask("GET", &format!("id={cursor}"), "");
        assert_eq!(poll.map(|reply| reply.status), told.then_some(200), "{closed}");
        let has_body = !closed.contains('<');
        let publish = ask("POST", "user=1", "\"hello\"");
        assert_eq!(publish.map(|reply| reply.status), told.then_some(if has_body { 200 } else { 400 }), "{closed}");
        assert_eq!(read_all(&bus, &mut cursor).len(), usize::from(has_body), "{closed}");
        let wrong = ask("POST", "user=x", "1");
        assert_eq!(wrong.map(|reply| reply.status), told.then_some(400), "{closed}");
        assert!(!bus.aside().exists(), "{closed}");
        // What is said of a damaged file does not get into the new one.
        fs::File::options().write(true).open(bus.file()).unwrap().write_all_at(b"?", 20).unwrap();
        ask("GET", &format!("id={cursor}"), "");
        fs::remove_file(bus.aside()).unwrap();
        cursor = bus.publish("\"anew\"");
        assert_eq!(read_all(&bus, &mut cursor), [], "{closed}");
        assert!(!bus.aside().exists(), "{closed}");
    }
}

#[test]
fn a_small_dev_shm_that_fills_up_refuses_for_certain_and_goes_on_when_there_is_room() {
    let host = Host::new();
    host.sh("mount -o remount,size=64m /dev/shm");
    host.copy("other");
    let settings = [("SHORTBUS_MAX_BYTES", "1000000")];
    let body = json!("x".repeat(990_000)).to_string();
    let post = |bus: &str| {
        let mut command = host.command(USER, host.folder.join(bus));
        let (reply, log) = ask_by(&mut command, &settings, "POST", "user=1", &body);
        let outcome = reply.unwrap().outcome();
        assert_eq!(log.lines().count(), usize::from(outcome.0 != 200), "{log}");
        outcome
    };
    // One bus of 32 MB has room, however much is published; what two have is less than they may take.
    for n in 0..70 {
        assert_eq!(post("chat").0, 200, "{n}");
    }
    let full = (503, "store_full".into());
    host.sh("head -c 30000000 /dev/zero > /dev/shm/theirs");
    let refused = (0..40).map(|_| post("other")).find(|outcome| outcome.0 != 200);
    assert_eq!(refused, Some(full.clone()));
    // A bus that has its memory already goes on.
    assert_eq!(post("chat").0, 200);
    host.sh("rm /dev/shm/theirs");
    assert_eq!(post("other").0, 200);
    // Full before anything is decided.
    host.sh(&format!("rm -r /dev/shm/shortbus-{USER}; cat /dev/zero > /dev/shm/theirs 2>/dev/null || :"));
    assert_eq!(post("chat"), full);
    assert_eq!(host.get(USER, "id=1", &[]).status, 200);
    host.sh("rm /dev/shm/theirs");
    assert_eq!(post("chat").0, 200);
    // Nor has it room for a folder.
    host.sh(&format!("rm -r /dev/shm/shortbus-{USER}; mount -o remount,nr_inodes=1 /dev/shm"));
    assert_eq!(post("chat"), full);
    host.sh("mount -o remount,nr_inodes=100 /dev/shm");
    assert_eq!(post("chat").0, 200);
}

#[test]
fn steps_of_the_wall_clock_change_nothing() {
    const HOUR: i64 = 3_600_000_000;
    let bus = LocalBus::new(limits::STORE_BYTES_MIN);
    let ahead = Cell::new(0);
    let open = || Stepped {
        store: Local::new(StoreFolder::named(bus.store()), b"chat", bus.bytes, WholeProcess),
        ahead: ahead.get(),
    };
    let publish = |data: &str, name: Option<&str>| {
        let key = name.map(|name| IdempotencyKey { name, token: below(1 << 53), ttl: 123 });
        let publish = Publish { user: 1, messages: vec![data.as_bytes()], key };
        block_on(bus::publish(&mut open(), publish, 60)).unwrap()[0]
    };
    let poll = |after: u64| {
        let page = block_on(bus::poll(&mut open(), after, None)).unwrap();
        (page.messages.iter().map(|message| message.id).collect::<Vec<u64>>(), page.missed)
    };
    let start = block_on(bus::join(&mut open())).unwrap();
    let mut ids = vec![];
    for step in [0, HOUR, -HOUR, 24 * HOUR, -24 * HOUR, 8_760 * HOUR, -8_760 * HOUR] {
        ahead.set(step);
        let name = format!("1:{step}");
        for name in [None, Some(&name[..])] {
            ids.push(publish("1", name));
            assert_eq!(ids.last(), Some(&(start + ids.len() as u64 * limits::SLOT_MESSAGES)), "{step}");
            assert_eq!(poll(start), (ids.clone(), false), "{step}");
        }
        // A repeat, on either side of a step.
        assert_eq!(publish("1", Some(&name)), *ids.last().unwrap(), "{step}");
        ahead.set(-step);
        assert_eq!(publish("1", Some(&name)), *ids.last().unwrap(), "{step}");
        assert_eq!((poll(start), block_on(bus::join(&mut open())).ok()), ((ids.clone(), false), ids.last().copied()));
    }
    // A new file, while the clock is a day behind: its ids are lower, and the clients from before are told.
    ahead.set(-24 * HOUR);
    fs::remove_file(bus.file()).unwrap();
    let id = publish("1", None);
    assert!(id < start);
    assert_eq!(poll(*ids.last().unwrap()), (vec![id], true));
}

#[test]
fn messages_go_by_the_clock_since_the_host_started_and_by_no_other() {
    let bus = LocalBus::new(limits::STORE_BYTES_MIN);
    // Runs where the host has been up for so many seconds more.
    let ask = |seconds: u32, method: &str, query: &str, body: &str| {
        let boottime = format!("--boottime={seconds}");
        answer(bus.start_under(&["unshare", "--time", &boottime, "--fork"], method, query, body))
    };
    let start = bus.join();
    let first = bus.publish("\"first\"");
    let poll = |seconds: u32, after: u64| {
        let (heard, missed) = read_page(&ask(seconds, "GET", &format!("id={after}"), ""), &mut 0);
        (heard.into_iter().map(|(_, text)| text).collect::<Vec<_>>(), missed)
    };
    assert_eq!(poll(30, start), (vec!["first".into()], false));
    for later in [62, 3_600, 86_400] {
        assert_eq!(poll(later, start), (vec![], true), "{later}");
    }
    // Half a minute later: the second one outlives the first.
    let reply = ask(30, "POST", "user=1", "\"second\"");
    assert_eq!(reply.json()["id"], first + limits::SLOT_MESSAGES);
    assert_eq!(poll(75, start), (vec!["second".into()], true));
    assert_eq!(poll(92, start), (vec![], true));
    // A day later and then back, as after a start of the host: nothing from before lives, ids go on, nobody waits.
    assert_eq!(ask(86_400, "POST", "user=1&once=k", "\"third\"").json()["id"], first + 2 * limits::SLOT_MESSAGES);
    assert_eq!(poll(86_400, start), (vec!["third".into()], true));
    assert_eq!(poll(0, start), (vec![], true));
    let fourth = bus.publish("\"fourth\"");
    assert_eq!(fourth, first + 3 * limits::SLOT_MESSAGES);
    assert_eq!(poll(0, start), (vec!["fourth".into()], true));
    assert_eq!(poll(62, start), (vec![], true));
}
