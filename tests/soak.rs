//! Long ordinary use: many readers that never reconnect and some who publish, through two FastCGI processes on one bus
//! and now and then CGI. What leaks, or is lost once in a hundred thousand messages, shows in no shorter test.
//!
//! `TEST_SOAK=<seconds> cargo test soak::for_a_while -- --ignored --nocapture`; an hour where that is not set.

mod crowd;

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::fixtures::daemon::wait_for;
use crate::fixtures::fastcgi_client::{Client, STDOUT, request, take_record};
use crate::fixtures::fastcgi_server::Bus;

/// In each process.
const STREAMS: usize = 100;
const PUBLISHERS: usize = 10;
/// The number of the one that publishes by CGI.
const CGI: usize = 2 * PUBLISHERS;
const CGI_PAUSE: Duration = Duration::from_secs(20);
/// By when every stream has a message, and its publisher the answer.
const WINDOW: Duration = Duration::from_secs(10);
/// How often the streams are read: waking for each message would cost more than all the rest.
const READ_PAUSE: Duration = Duration::from_millis(20);

/// A message that someone has heard of.
struct Message {
    data: String,
    since: Instant,
    acknowledged: bool,
    streams: usize,
}

/// Who heard of what of late; what all have heard of is only counted.
struct Window {
    messages: BTreeMap<u64, Message>,
    /// All up to this id are verified.
    verified: u64,
    count: u64,
    /// Each publisher's next number.
    next: [u64; CGI + 1],
}

impl Window {
    fn hear(&mut self, id: u64, data: &str) -> &mut Message {
        assert!(id > self.verified, "{id}, {data}: more than {WINDOW:?} late, or a duplicate");
        let new = || Message { data: data.into(), since: Instant::now(), acknowledged: false, streams: 0 };
        let message = self.messages.entry(id).or_insert_with(new);
        assert_eq!(message.data, data, "{id} is two messages");
        message
    }

    /// Those that are older than this: that all streams had them. None had one twice, as each checks that ids ascend.
    fn verify(&mut self, age: Duration) {
        while let Some(entry) = self.messages.first_entry()
            && entry.get().since.elapsed() >= age
        {
            let (id, message) = entry.remove_entry();
            let what = format!("{id}, {}", message.data);
            assert!(message.acknowledged, "{what}: delivered, but its publisher has no answer");
            assert_eq!(message.streams, 2 * STREAMS, "{what}: streams that had it");
            let (publisher, number) = message.data.split_once(' ').unwrap();
            let next = &mut self.next[publisher.parse::<usize>().unwrap()];
            assert_eq!(number.parse(), Ok(*next), "{what}: the publisher's next");
            *next += 1;
            self.verified = id;
            self.count += 1;
        }
    }
}

/// An event stream, as far as it was read.
struct Stream {
    socket: UnixStream,
    records: Vec<u8>,
    text: String,
    begun: bool,
    id: u64,
}

impl Stream {
    fn open(socket: &Path, id: u64) -> Stream {
        let mut socket = UnixStream::connect(socket).unwrap();
        socket.write_all(&request("GET", &format!("id={id}&stream=1"), &[], b"")).unwrap();
        socket.set_nonblocking(true).unwrap();
        Stream { socket, records: vec![], text: String::new(), begun: false, id }
    }

    /// Reads what is there.
    fn read(&mut self, buffer: &mut [u8], window: &Mutex<Window>) {
        match self.socket.read(buffer) {
            Ok(0) => panic!("the server closed a stream at {}", self.id),
            Ok(length) => self.records.extend_from_slice(&buffer[..length]),
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => return,
            Err(error) => panic!("a stream at {}: {error}", self.id),
        }
        while let Some((kind, _, content)) = take_record(&mut self.records) {
            let content = str::from_utf8(&content).unwrap();
            assert_eq!(kind, STDOUT, "the server ended a stream at {}: {content:?}", self.id);
            self.text.push_str(content);
        }
        if !self.begun
            && let Some(end) = self.text.find("\r\n\r\n")
        {
            assert!(self.text.starts_with("Status: 200 OK\r\nContent-Type: text/event-stream\r\n"), "{}", self.text);
            self.text.drain(..end + 4);
            self.begun = true;
        }
        while self.begun
            && let Some(end) = self.text.find("\n\n")
        {
            let event: String = self.text.drain(..end + 2).collect();
            self.take_event(&event, window);
        }
    }

    fn take_event(&mut self, event: &str, window: &Mutex<Window>) {
        let message = event.strip_prefix("id: ").and_then(|rest| rest.trim_end().split_once("\ndata: "));
        let Some((id, data)) = message else {
            let known = ["retry: ", "event: cursor\n", ":\n"].iter().any(|start| event.starts_with(start));
            assert!(known, "behind {}: {event:?}", self.id);
            return;
        };
        let id: u64 = id.parse().unwrap();
        let json: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(json["id"], id, "{event}");
        assert!(id > self.id, "{id} behind {}", self.id);
        self.id = id;
        window.lock().unwrap().hear(id, json["data"].as_str().unwrap()).streams += 1;
    }
}

/// Ends all when one fails.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, SeqCst);
        }
    }
}

/// Publishes until it has an answer, as the protocol says: the id, and how often it tried.
fn publish(client: &mut Client, publisher: usize, number: u64) -> (u64, u64) {
    let query = format!("user={}&once=soak-{publisher}-{number}", publisher + 1);
    for tries in 1..=20 {
        let reply = client.ask("POST", &query, &[], format!("\"{publisher} {number}\"").as_bytes()).answer().reply;
        match reply.status {
            200 => return (reply.json()["id"].as_u64().unwrap(), tries),
            409 | 503 => println!("{query}: {:?}", reply.outcome()),
            _ => panic!("{query}: {reply:?}"),
        }
        thread::sleep(Duration::from_millis(250));
    }
    panic!("{query}: no answer");
}

fn publish_by_cgi(program: &Path, memcached: &str, number: u64) -> u64 {
    let body = format!("\"{CGI} {number}\"");
    let mut cgi = Command::new(program);
    cgi.env_clear().env("SHORTBUS_MEMCACHED", memcached).env("REQUEST_METHOD", "POST");
    cgi.env("QUERY_STRING", format!("user={}&once=soak-{CGI}-{number}", CGI + 1));
    cgi.env("CONTENT_LENGTH", body.len().to_string());
    let mut cgi = cgi.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    cgi.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
    let stdout = String::from_utf8(cgi.wait_with_output().unwrap().stdout).unwrap();
    let id = stdout.split_once("\r\n\r\n").and_then(|(_, json)| serde_json::from_str::<serde_json::Value>(json).ok());
    id.and_then(|json| json["id"].as_u64()).unwrap_or_else(|| panic!("{stdout:?}"))
}

/// What a process takes: memory in KiB, files, and time in hundredths of a second.
struct Usage {
    memory: u64,
    files: usize,
    time: u64,
}

impl Usage {
    fn of(pid: u32) -> Usage {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        Usage {
            memory: memory.trim().trim_end_matches(" kB").parse().unwrap(),
            files: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
            time: fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap(),
        }
    }
}

/// Usage of both processes, and when it was.
type Sample = (Duration, [Usage; 2]);

/// What the threads of a soak share.
struct Soak {
    /// The newest id before it all.
    start: u64,
    window: Mutex<Window>,
    /// Publishers end.
    stop: AtomicBool,
    /// All end.
    failed: AtomicBool,
    /// Readers go on.
    reading: AtomicBool,
    /// Streams that have begun.
    opened: AtomicUsize,
    retries: AtomicU64,
    /// The newest id that was acknowledged.
    newest: AtomicU64,
}

impl Soak {
    fn new(start: u64) -> Soak {
        let window = Window { messages: BTreeMap::new(), verified: start, count: 0, next: [0; CGI + 1] };
        Soak {
            start,
            window: Mutex::new(window),
            stop: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            reading: AtomicBool::new(true),
            opened: AtomicUsize::new(0),
            retries: AtomicU64::new(0),
            newest: AtomicU64::new(start),
        }
    }

    fn ends(&self) -> bool {
        self.failed.load(SeqCst) || self.stop.load(SeqCst)
    }

    fn acknowledge(&self, id: u64, data: &str) {
        self.window.lock().unwrap().hear(id, data).acknowledged = true;
        self.newest.fetch_max(id, SeqCst);
    }

    /// Pauses, unless all ends meanwhile.
    fn rest(&self, pause: Duration) {
        let end = Instant::now() + pause;
        while Instant::now() < end && !self.ends() {
            thread::sleep(Duration::from_millis(100).min(end - Instant::now()));
        }
    }

    /// Reads the streams of one process: where each of them is at the end.
    fn read_streams(&self, socket: &Path) -> Vec<u64> {
        let _stops = Stops(&self.failed);
        let mut streams: Vec<Stream> = (0..STREAMS).map(|_| Stream::open(socket, self.start)).collect();
        let mut buffer = vec![0; 65_536];
        while self.reading.load(SeqCst) && !self.failed.load(SeqCst) {
            thread::sleep(READ_PAUSE);
            for stream in &mut streams {
                let begun = stream.begun;
                stream.read(&mut buffer, &self.window);
                self.opened.fetch_add(usize::from(stream.begun && !begun), SeqCst);
            }
        }
        streams.iter().map(|stream| stream.id).collect()
    }

    fn publish_often(&self, socket: &Path, publisher: usize) {
        let _stops = Stops(&self.failed);
        let mut client = Client::connect(socket);
        let mut number = 0;
        while !self.ends() {
            let (id, tries) = publish(&mut client, publisher, number);
            self.acknowledge(id, &format!("{publisher} {number}"));
            self.retries.fetch_add(tries - 1, SeqCst);
            number += 1;
            // About 500 ms, with no beat in common.
            self.rest(Duration::from_millis(450 + (publisher as u64 * 31 + number * 17) % 100));
        }
    }

    fn publish_often_by_cgi(&self, program: &Path, memcached: &str) {
        let _stops = Stops(&self.failed);
        let mut number = 0;
        while !self.ends() {
            self.acknowledge(publish_by_cgi(program, memcached, number), &format!("{CGI} {number}"));
            number += 1;
            self.rest(CGI_PAUSE);
        }
    }

    /// Verifies messages for as long as it takes, with a sample each minute, or ten in all.
    fn watch(&self, pids: [u32; 2], duration: Duration) -> Vec<Sample> {
        let begun = Instant::now();
        let pause = (duration / 10).min(Duration::from_secs(60));
        let mut samples: Vec<Sample> = vec![];
        println!("minute    RSS, KiB       files     CPU, %      messages verified");
        while !self.failed.load(SeqCst) {
            let at = begun.elapsed();
            self.window.lock().unwrap().verify(WINDOW);
            if at >= pause * samples.len() as u32 || at >= duration {
                let sample = (at, pids.map(Usage::of));
                self.print(samples.last(), &sample);
                samples.push(sample);
            }
            if at >= duration {
                break;
            }
            thread::sleep(Duration::from_millis(200));
        }
        samples
    }

    fn print(&self, before: Option<&Sample>, (at, usage): &Sample) {
        let since = before.map_or(Duration::ZERO, |(at, _)| *at);
        let share = |n: usize| {
            let before = before.map_or(usage[n].time, |(_, usage)| usage[n].time);
            (usage[n].time - before) as f64 / (*at - since).as_secs_f64().max(0.01)
        };
        let [first, second] = usage;
        println!(
            "{:6.2} {:7} {:7} {:6} {:4} {:6.1} {:5.1} {:12}",
            at.as_secs_f64() / 60.0,
            first.memory,
            second.memory,
            first.files,
            second.files,
            share(0),
            share(1),
            self.window.lock().unwrap().count,
        );
    }

    /// All that was acknowledged has come to all streams, and nothing behind it.
    fn check(self, ids: &[u64]) {
        let mut window = self.window.into_inner().unwrap();
        window.verify(Duration::ZERO);
        let newest = self.newest.into_inner();
        assert_eq!(ids, vec![newest; 2 * STREAMS], "where the streams are");
        assert_eq!(window.verified, newest);
        println!(
            "{} messages, each {} times; {} ids unused, {} requests repeated, {} by CGI",
            window.count,
            2 * STREAMS,
            newest - self.start - window.count,
            self.retries.into_inner(),
            window.next[CGI],
        );
    }
}

/// Neither process takes more and more, once it is warm.
fn check_usage(samples: &[Sample], duration: Duration) {
    let (_, warm) = samples.iter().find(|(at, _)| *at >= duration / 5).unwrap();
    let (end, last) = samples.last().unwrap();
    for (n, (warm, last)) in warm.iter().zip(last).enumerate() {
        println!(
            "process {n}: {} -> {} KiB, {} -> {} files, {:.1} % CPU",
            warm.memory,
            last.memory,
            warm.files,
            last.files,
            (last.time - samples[0].1[n].time) as f64 / end.as_secs_f64(),
        );
        assert!(last.memory * 4 <= warm.memory * 5 + 4 * 512, "the memory of process {n} grows");
        assert_eq!(last.files, warm.files, "files of process {n}");
    }
}

#[test]
#[ignore = "takes an hour"]
fn for_a_while() {
    let seconds = std::env::var("TEST_SOAK").map_or(3600, |text| text.parse().expect("TEST_SOAK: seconds"));
    let duration = Duration::from_secs(seconds);
    let mut bus = Bus::start();
    let mut another = bus.another();
    let sockets = [bus.worker.socket.clone(), another.socket.clone()];
    let pids = [bus.worker.daemon.pid(), another.daemon.pid()];
    let (program, memcached) = (bus.folder.join("chat"), bus.memcached.address.clone());
    let soak = Soak::new(bus.join());

    let (samples, ids) = thread::scope(|scope| {
        let soak = &soak;
        let _stops = Stops(&soak.failed);
        let readers = sockets.each_ref().map(|socket| scope.spawn(move || soak.read_streams(socket)));
        wait_for("the streams", || soak.opened.load(SeqCst) == 2 * STREAMS || soak.failed.load(SeqCst));
        let spawn = |publisher: usize| {
            let socket = sockets[publisher % 2].as_path();
            scope.spawn(move || soak.publish_often(socket, publisher))
        };
        let mut publishers: Vec<_> = (0..2 * PUBLISHERS).map(spawn).collect();
        publishers.push(scope.spawn(|| soak.publish_often_by_cgi(&program, &memcached)));
        let samples = soak.watch(pids, duration);
        soak.stop.store(true, SeqCst);
        publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
        // What was acknowledged last is still on its way.
        thread::sleep(WINDOW / 2);
        soak.reading.store(false, SeqCst);
        (samples, readers.map(|reader| reader.join().unwrap()).concat())
    });
    soak.check(&ids);
    assert!(bus.worker.daemon.is_alive() && another.daemon.is_alive());
    println!("log: {:?}", bus.folder.text("start.log"));
    check_usage(&samples, duration);
}
