//! Ten thousand event streams on one bus, of which some read slowly and some break off at random: what they cost the
//! process, and that the others hear all the same.
//!
//! `TEST_SOAK=<seconds> cargo test soak::crowd::ten_thousand_streams_of -- --ignored --nocapture`; ten minutes where that
//! is not set.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use rand::TryRng;
use rand::rngs::SysRng;
use shortbus::limits;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, LocalOptions};
use tokio::select;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};

use super::{READ_PAUSE, Usage};
use crate::fixtures::fastcgi_client::{END_REQUEST, STDERR, STDOUT, request, take_record};
use crate::fixtures::fastcgi_server::{Bus, memory};
use crate::fixtures::fronts::Front;
use crate::fixtures::http_client::Reply;
use crate::fixtures::site::Site;

/// How many of each kind, and what is published.
struct Plan {
    /// Read what comes.
    ordinary: usize,
    /// Read nothing for [`PAUSE`], then all that is there.
    pausing: usize,
    /// Read [`TRICKLE`] bytes a second.
    trickling: usize,
    /// Read what comes, and break off at random after [`BREAK`] on average.
    breaking: usize,
    /// Messages a second.
    rate: u32,
    /// Bytes of each.
    bytes: usize,
}

const CROWD: Plan = Plan { ordinary: 8_000, pausing: 500, trickling: 500, breaking: 1_000, rate: 50, bytes: 100 };

const PAUSE: Duration = Duration::from_secs(30);
const TRICKLE: usize = 2_048;
const BREAK: Duration = Duration::from_secs(10);
/// So many that each has its answer before its next message is due.
const PUBLISHERS: u32 = 50;
/// How long a publisher tries, which is no longer than the bus remembers its `once`; and how long the last message may take
/// to the last stream: those that lag come back, and read what they have missed.
const LAST: Duration = Duration::from_secs(120);
/// Memory that a stream may take, KiB: the bench's goal.
const STREAM: u64 = 8;
/// KiB that all buffers may take: the allocator keeps some of what was freed between them.
const GROWN: u64 = limits::BUFFERS_BYTES as u64 / 1024 * 2;
/// Streams that begin at a time, at the start: else they fill the sockets' queues.
const OPENINGS: usize = 100;
/// Bytes read at a time.
const BUFFER: usize = 16_384;
/// Milliseconds; longer delays count as this.
const LONGEST: usize = 120_000;

impl Plan {
    fn streams(&self) -> usize {
        self.ordinary + self.pausing + self.trickling + self.breaking
    }
}

/// Where the streams are opened: the FastCGI process's socket, or nginx's in front of it.
#[derive(Clone)]
enum Place {
    FastCgi(PathBuf),
    Nginx(PathBuf),
}

impl Place {
    /// Where many connect at once, the socket's queue may be full for a moment.
    async fn connect(&self) -> UnixStream {
        let (Place::FastCgi(socket) | Place::Nginx(socket)) = self;
        loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => return stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => sleep(Duration::from_millis(10)).await,
                Err(error) => panic!("{}: {error}", socket.display()),
            }
        }
    }

    fn request(&self, method: &str, query: &str, body: &str) -> Vec<u8> {
        match self {
            Place::FastCgi(_) => request(method, query, &[], body.as_bytes()),
            Place::Nginx(_) => format!(
                "{method} /cgi-bin/chat?{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .into_bytes(),
        }
    }

    /// A request on a connection of its own: its reply, unless it was cut off.
    async fn ask(&self, method: &str, query: &str, body: &str) -> Option<Reply> {
        let mut bytes = self.request(method, query, body);
        if let Place::FastCgi(_) = self {
            // Without FCGI_KEEP_CONN, so that the connection ends with the reply.
            bytes[10] = 0;
        }
        let mut socket = self.connect().await;
        socket.write_all(&bytes).await.ok()?;
        let mut received = Vec::new();
        socket.read_to_end(&mut received).await.ok()?;
        if let Place::FastCgi(_) = self {
            let mut stdout = Vec::new();
            while let Some((kind, _, content)) = take_record(&mut received) {
                stdout.extend(if kind == STDOUT { content } else { vec![] });
            }
            received = stdout;
        }
        Reply::parse(&received)
    }
}

/// What became of the streams of one kind.
#[derive(Default)]
struct Fate {
    /// The process closed them in the middle.
    cut: Cell<u64>,
    /// They had lasted for long enough, and the process ended them.
    ended: Cell<u64>,
    /// They broke off themselves.
    broken: Cell<u64>,
    /// They had no stream: no place, or no answer.
    refused: Cell<u64>,
    /// They were told that they have missed messages.
    missed: Cell<u64>,
    /// Messages that they had.
    heard: Cell<u64>,
}

impl Fate {
    fn print(&self, what: &str) {
        let [cut, ended, broken, refused, missed, heard] =
            [&self.cut, &self.ended, &self.broken, &self.refused, &self.missed, &self.heard].map(Cell::get);
        println!(
            "{what}: heard {heard} messages; {cut} times cut off, {broken} times broke off, {ended} times ended at \
             their age, {refused} times refused; {missed} times told that they missed some"
        );
    }
}

/// How many took so many milliseconds.
struct Delays(RefCell<Vec<u64>>);

impl Delays {
    fn new() -> Delays {
        Delays(RefCell::new(vec![0; LONGEST + 1]))
    }

    fn add(&self, delay: Duration) {
        self.0.borrow_mut()[(delay.as_millis() as usize).min(LONGEST)] += 1;
    }

    fn print(&self, what: &str) {
        let numbers = self.0.borrow();
        let [median, most, all] = [0.5, 0.99, 1.0].map(|share| {
            let goal = (numbers.iter().sum::<u64>() as f64 * share).ceil() as u64;
            let mut sum = 0;
            let reaches = |&number: &u64| {
                sum += number;
                sum >= goal
            };
            numbers.iter().position(reaches).unwrap()
        });
        println!("{what}: {median} ms, 99 % within {most}, all within {all}");
    }
}

fn count(cell: &Cell<u64>, more: u64) {
    cell.set(cell.get() + more);
}

/// A message, as all streams have to hear it.
struct Message {
    id: u64,
    event: Vec<u8>,
    sent: Instant,
}

/// What all share, on one thread.
struct Crowd {
    place: Place,
    plan: Plan,
    /// The newest id before it all.
    start: u64,
    began: Instant,
    /// Every message, in the order in which it was heard by those who have missed none.
    log: RefCell<Vec<Message>>,
    /// The ids that publishers were told.
    acknowledged: RefCell<Vec<u64>>,
    /// Codes of the errors after which publishers and readers asked again.
    errors: RefCell<Vec<String>>,
    /// So many streams begin at a time.
    openings: Semaphore,
    /// Streams that have begun, of those that are there from the start.
    begun: Cell<usize>,
    /// Nobody is slow any more, breaks off or publishes.
    ending: watch::Sender<bool>,
    /// The last message, once it was heard.
    last: Cell<Option<u64>>,
    /// By their kinds: ordinary, pausing, trickling, breaking.
    fates: [Fate; 4],
    /// Messages to ordinary streams.
    delays: Delays,
    /// Publishes that were answered, tries that failed included.
    answers: Delays,
}

/// The kinds' numbers in [`Crowd::fates`].
const ORDINARY: usize = 0;
const PAUSING: usize = 1;
const TRICKLING: usize = 2;
const BREAKING: usize = 3;

/// Someone who reads one stream after the other, each from where the one before it ended.
struct Reader {
    crowd: Rc<Crowd>,
    kind: usize,
    /// Its cursor.
    id: u64,
    /// How many of the log it has had; none where it was told that it missed some, until it hears where it is.
    position: Option<usize>,
    socket: Option<UnixStream>,
    received: Vec<u8>,
    text: Vec<u8>,
    /// The head of the reply is read.
    begun: bool,
}

/// What reading a stream came to.
#[derive(PartialEq)]
enum Outcome {
    Bytes(usize),
    Nothing,
    Over,
}

impl Reader {
    fn new(crowd: &Rc<Crowd>, kind: usize) -> Reader {
        let (crowd, id) = (crowd.clone(), crowd.start);
        let (received, text) = (Vec::new(), Vec::new());
        Reader { crowd, kind, id, position: Some(0), socket: None, received, text, begun: false }
    }

    fn fate(&self) -> &Fate {
        &self.crowd.fates[self.kind]
    }

    /// It is behind the last message.
    fn is_done(&self) -> bool {
        self.crowd.last.get().is_some_and(|last| self.id >= last)
    }

    /// Opens a stream, unless one is open.
    async fn open(&mut self) {
        if self.socket.is_some() {
            return;
        }
        let mut socket = self.crowd.place.connect().await;
        let request = self.crowd.place.request("GET", &format!("id={}&stream=1", self.id), "");
        // Where it is closed by then, the first read says so.
        let _ = socket.write_all(&request).await;
        (self.received, self.text, self.begun) = (Vec::new(), Vec::new(), false);
        self.socket = Some(socket);
    }

    /// Reads once, at most so many bytes: waits for some, or takes what is there.
    async fn read(&mut self, most: usize, waits: bool) -> Outcome {
        let socket = self.socket.as_mut().expect("it is open");
        let received = &mut self.received;
        let read = poll_fn(|context| {
            let mut buffer = [0; BUFFER];
            let mut buffer = ReadBuf::new(&mut buffer[..most.min(BUFFER)]);
            match Pin::new(&mut *socket).poll_read(context, &mut buffer) {
                Poll::Pending if !waits => return Poll::Ready(Ok(None)),
                read => ready!(read)?,
            }
            received.extend_from_slice(buffer.filled());
            Poll::Ready(io::Result::Ok(Some(buffer.filled().len())))
        });
        let length = match read.await {
            Ok(None) => return Outcome::Nothing,
            Ok(Some(length)) => length,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("{error}"),
        };
        let is_over = self.unwrap_text();
        while !self.hear() {
            sleep(READ_PAUSE).await;
        }
        if !is_over && length > 0 {
            return Outcome::Bytes(length);
        }
        self.socket = None;
        if !self.begun {
            let error: serde_json::Value =
                serde_json::from_slice(&[&self.text[..], &self.received].concat()).unwrap_or_default();
            self.crowd.errors.borrow_mut().push(error["error"].as_str().unwrap_or_default().into());
            count(&self.fate().refused, 1);
            sleep(Duration::from_secs(1)).await;
        } else {
            count(if is_over { &self.fate().ended } else { &self.fate().cut }, 1);
        }
        Outcome::Over
    }

    /// Reads until it has had the last message.
    async fn read_on(&mut self) {
        while !self.is_done() {
            self.open().await;
            self.read(BUFFER, true).await;
        }
    }

    /// Takes the stream's text out of what it came in; whether the reply is over.
    fn unwrap_text(&mut self) -> bool {
        match self.crowd.place {
            Place::FastCgi(_) => {
                while let Some((kind, _, content)) = take_record(&mut self.received) {
                    match kind {
                        STDOUT => self.text.extend_from_slice(&content),
                        STDERR => {}
                        END_REQUEST => return true,
                        other => panic!("a record of type {other}"),
                    }
                    if !self.begun
                        && let Some(end) = find(&self.text, b"\r\n\r\n")
                    {
                        let head: Vec<u8> = self.text.drain(..end + 4).collect();
                        self.begin(&head, b"Status: ");
                    }
                }
                false
            }
            Place::Nginx(_) => {
                if !self.begun {
                    let Some(end) = find(&self.received, b"\r\n\r\n") else { return false };
                    let head: Vec<u8> = self.received.drain(..end + 4).collect();
                    self.begin(&head, b"HTTP/1.1 ");
                }
                while self.begun
                    && let Some(line) = find(&self.received, b"\r\n")
                {
                    let size = str::from_utf8(&self.received[..line]).unwrap();
                    let (from, size) = (line + 2, usize::from_str_radix(size, 16).unwrap());
                    if self.received.len() < from + size + 2 {
                        return false;
                    }
                    self.text.extend_from_slice(&self.received[from..from + size]);
                    self.received.drain(..from + size + 2);
                    if size == 0 {
                        return true;
                    }
                }
                false
            }
        }
    }

    fn begin(&mut self, head: &[u8], status: &[u8]) {
        let head = String::from_utf8_lossy(head);
        let status = head.strip_prefix(str::from_utf8(status).unwrap()).unwrap_or_else(|| panic!("{head}"));
        // nginx's 502: the queue of the process's socket is full.
        if ["502 ", "503 "].iter().any(|refusal| status.starts_with(refusal)) {
            return;
        }
        assert!(status.starts_with("200 ") && head.contains("Content-Type: text/event-stream\r\n"), "{head}");
        self.begun = true;
    }

    /// Takes the events that are there. False where it is to try again: it has missed messages, and is the first to
    /// hear the next one.
    fn hear(&mut self) -> bool {
        let (crowd, now, mut at) = (self.crowd.clone(), Instant::now(), 0);
        let mut log = crowd.log.borrow_mut();
        let mut is_early = false;
        while self.begun && !is_early {
            let rest = &self.text[at..];
            let next = self.position.and_then(|position| log.get(position));
            // Nearly always it is one that another stream has heard before.
            if let Some(message) = next.filter(|message| rest.starts_with(&message.event)) {
                self.id = message.id;
                self.position = self.position.map(|position| position + 1);
                at += message.event.len();
                count(&self.fate().heard, 1);
                if self.kind == ORDINARY {
                    crowd.delays.add(now.saturating_duration_since(message.sent));
                }
                continue;
            }
            let Some(end) = find(rest, b"\n\n") else { break };
            let event = String::from_utf8(rest[..end + 2].to_vec()).unwrap();
            match self.take_event(&event, &mut log) {
                Some(length) => at += length,
                None => is_early = true,
            }
        }
        self.text.drain(..at);
        !is_early
    }

    /// Takes an event that is not the next in the log: how many of its bytes are done with. None where it is to be looked
    /// at later, when others have heard what it tells of.
    fn take_event(&mut self, event: &str, log: &mut Vec<Message>) -> Option<usize> {
        let next = self.position.and_then(|position| log.get(position));
        if let Some((id, data)) = event.strip_prefix("id: ").and_then(|rest| rest.split_once("\ndata: ")) {
            let id: u64 = id.parse().unwrap();
            assert!(id > self.id, "{event} behind {}", self.id);
            if self.position.is_some() {
                let others = next.map(|message| String::from_utf8_lossy(&message.event));
                assert!(others.is_none(), "behind {}, a stream heard {event}, others {others:?}", self.id);
                log.push(self.crowd.read(id, data, event));
                return Some(0);
            }
            let Ok(position) = log.binary_search_by_key(&id, |message| message.id) else {
                assert!(log.last().is_none_or(|last| last.id < id), "a stream heard {event}, others did not");
                return None;
            };
            assert_eq!(event.as_bytes(), log[position].event);
            count(&self.fate().heard, 1);
            self.id = id;
        } else if let Some(rest) = event.strip_prefix("event: cursor\nid: ") {
            let id: u64 = rest.split('\n').next().unwrap().parse().unwrap();
            assert!(id >= self.id && next.is_none_or(|next| next.id > id), "{event} behind {}", self.id);
            if self.position.is_none() {
                // From here on it misses nothing.
                log.last().filter(|last| last.id >= id)?;
                self.position = Some(log.partition_point(|message| message.id <= id));
            }
            self.id = id;
        } else if event.starts_with("event: missed\n") {
            assert!([PAUSING, TRICKLING].contains(&self.kind), "a stream that was read has missed messages");
            count(&self.fate().missed, 1);
            self.position = None;
        } else {
            assert!(event.starts_with("retry: ") || event == ":\n\n", "{event}");
        }
        Some(event.len())
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

/// Up to twice this.
fn random(average: Duration) -> Duration {
    average * (SysRng.try_next_u32().unwrap() % 2_000) / 1_000
}

/// Reads the stream's beginning: all are there before the first message.
async fn begin(crowd: &Rc<Crowd>, kind: usize) -> Reader {
    let mut reader = Reader::new(crowd, kind);
    let _turn = crowd.openings.acquire().await.unwrap();
    while !reader.begun {
        reader.open().await;
        reader.read(BUFFER, true).await;
    }
    crowd.begun.set(crowd.begun.get() + 1);
    reader
}

async fn read_all(crowd: Rc<Crowd>) {
    begin(&crowd, ORDINARY).await.read_on().await;
}

/// Reads so many bytes after each pause, until the crowd ends.
async fn read_slowly(crowd: Rc<Crowd>, kind: usize, pause: Duration, bytes: usize) {
    let mut reader = begin(&crowd, kind).await;
    let mut ending = crowd.ending.subscribe();
    while timeout(random(pause), ending.wait_for(|&ending| ending)).await.is_err() {
        reader.open().await;
        let mut rest = bytes;
        while rest > 0
            && let Outcome::Bytes(length) = reader.read(rest, false).await
        {
            rest -= length;
        }
    }
    reader.read_on().await;
}

/// Breaks off now and then, in one of three ways.
async fn break_off(crowd: Rc<Crowd>) {
    let mut reader = begin(&crowd, BREAKING).await;
    let mut ending = crowd.ending.subscribe();
    loop {
        select! {
            _ = ending.wait_for(|&ending| ending) => break,
            () = reader.read_on() => panic!("it has heard the last message before it was sent"),
            () = sleep(random(BREAK)) => {}
        }
        match SysRng.try_next_u32().unwrap() % 3 {
            // With something unread, which resets the connection.
            0 => sleep(READ_PAUSE * 10).await,
            // In the middle of its next request.
            1 => {
                let request = crowd.place.request("GET", &format!("id={}&stream=1", reader.id), "");
                let _ = crowd.place.connect().await.write_all(&request[..request.len() / 2]).await;
            }
            _ => {}
        }
        reader.socket = None;
        count(&reader.fate().broken, 1);
    }
    reader.read_on().await;
}

/// Publishes this until it has an answer, as the protocol says.
async fn publish(crowd: &Crowd, once: &str, what: &str) {
    let at = crowd.began.elapsed().as_micros();
    let body = format!("{{\"at\":{at},{what},\"text\":\"{}\"}}", "x".repeat(crowd.plan.bytes));
    let begun = Instant::now();
    while begun.elapsed() < LAST {
        let reply = crowd.place.ask("POST", &format!("user=1&once={once}"), &body).await;
        match reply.as_ref().map(|reply| reply.status) {
            Some(200) => {
                crowd.answers.add(begun.elapsed());
                return crowd.acknowledged.borrow_mut().push(reply.unwrap().json()["id"].as_u64().unwrap());
            }
            Some(409 | 502 | 503) => crowd.errors.borrow_mut().push(reply.unwrap().outcome().1),
            _ => panic!("{once}: {reply:?}"),
        }
        sleep(Duration::from_millis(250)).await;
    }
    panic!("{once}: no answer");
}

/// Publishes at its beat, which differs from the others' in where it begins.
async fn publish_often(crowd: Rc<Crowd>, publisher: u32) {
    let beat = Duration::from_secs(1) * PUBLISHERS / crowd.plan.rate;
    let begin = Instant::now() + beat * publisher / PUBLISHERS;
    for number in 0.. {
        sleep_until((begin + beat * number).into()).await;
        if *crowd.ending.borrow() {
            return;
        }
        publish(&crowd, &format!("crowd-{publisher}-{number}"), &format!("\"by\":[{publisher},{number}]")).await;
    }
}

/// Runs a crowd until `is_enough`, which is asked every tenth of a second; and what has to hold of it.
fn run(plan: Plan, place: Place, pid: u32, is_enough: impl Fn(Duration) -> bool) -> Rc<Crowd> {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(async {
        let join = place.ask("GET", "", "").await.unwrap();
        let crowd = Rc::new(Crowd {
            place,
            plan,
            start: join.json()["id"].as_u64().unwrap(),
            began: Instant::now(),
            log: RefCell::default(),
            acknowledged: RefCell::default(),
            errors: RefCell::default(),
            openings: Semaphore::new(OPENINGS),
            begun: Cell::default(),
            ending: watch::Sender::new(false),
            last: Cell::default(),
            fates: Default::default(),
            delays: Delays::new(),
            answers: Delays::new(),
        });
        let before = Usage::of(pid);
        let mut tasks = JoinSet::new();
        (0..crowd.plan.ordinary).for_each(|_| drop(tasks.spawn_local(read_all(crowd.clone()))));
        for (kind, number, pause, bytes) in [
            (PAUSING, crowd.plan.pausing, PAUSE, usize::MAX),
            (TRICKLING, crowd.plan.trickling, Duration::from_secs(1), TRICKLE),
        ] {
            (0..number).for_each(|_| drop(tasks.spawn_local(read_slowly(crowd.clone(), kind, pause, bytes))));
        }
        (0..crowd.plan.breaking).for_each(|_| drop(tasks.spawn_local(break_off(crowd.clone()))));
        let mut publishers = JoinSet::new();
        let act = async {
            while crowd.begun.get() < crowd.plan.streams() {
                sleep(READ_PAUSE).await;
            }
            let idle = Usage::of(pid);
            println!("{} streams: {} KiB, {} before", crowd.plan.streams(), idle.memory, before.memory);
            (0..PUBLISHERS).for_each(|n| drop(publishers.spawn_local(publish_often(crowd.clone(), n))));
            watch_usage(&crowd, pid, is_enough).await;
            crowd.ending.send_replace(true);
            while let Some(publisher) = publishers.join_next().await {
                publisher.unwrap();
            }
            publish(&crowd, "crowd-last", "\"last\":true").await;
        };
        select! {
            () = act => {}
            Some(reader) = tasks.join_next() => panic!("a reader ended: {reader:?}"),
        }
        let rest = timeout(LAST, async {
            while let Some(reader) = tasks.join_next().await {
                reader.unwrap();
            }
        });
        if rest.await.is_err() {
            panic!("{} streams have not heard the last message after {LAST:?}", tasks.len());
        }
        crowd.check();
        let (peak, most) = (memory(pid, "VmHWM"), before.memory + STREAM * crowd.plan.streams() as u64 + GROWN);
        println!("peak memory of the process: {peak} KiB");
        assert!(peak < most, "{peak} KiB, and {most} would be bounded");
        crowd
    })
}

/// Prints what the process takes, ten times in a short crowd and each minute in a long one.
async fn watch_usage(crowd: &Crowd, pid: u32, is_enough: impl Fn(Duration) -> bool) {
    let (began, first, own) = (Instant::now(), Usage::of(pid), Usage::of(std::process::id()));
    let (mut at, mut usage) = (Duration::ZERO, Usage::of(pid));
    println!("minute  RSS, KiB  files  CPU, %  messages  errors");
    loop {
        let elapsed = began.elapsed();
        let is_over = is_enough(elapsed);
        if is_over || elapsed >= at + Duration::from_secs(60) {
            let now = Usage::of(pid);
            let share = (now.time - usage.time) as f64 / (elapsed - at).as_secs_f64();
            let messages = crowd.acknowledged.borrow().len();
            let (minutes, errors) = (elapsed.as_secs_f64() / 60.0, crowd.errors.borrow().len());
            println!("{minutes:6.2} {:9} {:6} {share:7.1} {messages:9} {errors:7}", now.memory, now.files);
            (at, usage) = (elapsed, now);
        }
        if is_over {
            let seconds = elapsed.as_secs_f64();
            let share = (usage.time - first.time) as f64 / seconds;
            let own = (Usage::of(std::process::id()).time - own.time) as f64 / seconds;
            let rate = crowd.acknowledged.borrow().len() as f64 / seconds;
            return println!("{rate:.1} messages a second; CPU {share:.1} %, clients {own:.1} %");
        }
        sleep(Duration::from_millis(100)).await;
    }
}

impl Crowd {
    /// Reads a message that nobody has heard before.
    fn read(&self, id: u64, data: &str, event: &str) -> Message {
        let json: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(json["id"], id, "{event}");
        if json["data"]["last"] == true {
            self.last.set(Some(id));
        }
        let sent = self.began + Duration::from_micros(json["data"]["at"].as_u64().unwrap());
        Message { id, event: event.into(), sent }
    }

    /// Every message that was acknowledged, and no other, came to each ordinary stream and to each that broke off, once and
    /// in one order; the slow ones had the same, but for what they were told that they have missed.
    fn check(&self) {
        let mut acknowledged = self.acknowledged.borrow().clone();
        acknowledged.sort_unstable();
        let log = self.log.borrow();
        assert_eq!(log.iter().map(|message| message.id).collect::<Vec<_>>(), acknowledged);
        let messages = acknowledged.len() as u64;
        println!(
            "{messages} messages, {} errors told: {:?}",
            self.errors.borrow().len(),
            BTreeSet::from_iter(&*self.errors.borrow())
        );
        let kinds = [
            ("ordinary", self.plan.ordinary),
            ("pausing", self.plan.pausing),
            ("trickling", self.plan.trickling),
            ("breaking off", self.plan.breaking),
        ];
        for ((kind, number), fate) in kinds.iter().zip(&self.fates) {
            fate.print(&format!("{number} {kind}"));
            let all = messages * *number as u64;
            assert!(fate.heard.get() == all || fate.missed.get() > 0 && fate.heard.get() < all, "{kind}: {all}");
        }
        self.delays.print("delay to ordinary streams");
        self.answers.print("answers to publishers");
    }
}

/// For the streams, here and in the process, which keeps an eighth of its places for those who do not wait.
fn raise_file_limit(streams: usize) {
    let needed = streams as u64 * 8 / 7 + 200;
    let files = crate::fixtures::daemon::raise_file_limit(needed);
    assert!(
        files >= needed,
        "{streams} streams need {needed} open files a process (ulimit -n), and {files} is the most"
    );
}

fn duration() -> Duration {
    Duration::from_secs(std::env::var("TEST_SOAK").map_or(600, |text| text.parse().expect("TEST_SOAK: seconds")))
}

#[test]
#[ignore = "takes ten minutes"]
fn ten_thousand_streams_of_which_some_are_slow_and_some_break_off() {
    raise_file_limit(CROWD.streams());
    let bus = Bus::start();
    let duration = duration();
    let place = Place::FastCgi(bus.worker.socket.clone());
    run(CROWD, place, bus.worker.daemon.pid(), |elapsed| elapsed >= duration);
    println!("log: {:?}", bus.folder.text("start.log"));
}

/// nginx takes two files for each stream, and cuts off whom the process cuts off.
#[test]
#[ignore = "takes ten minutes"]
fn ten_thousand_streams_behind_nginx() {
    raise_file_limit(CROWD.streams());
    let site = Site::edited(Front::NginxFastcgi, &[], |config, _| {
        let config = config.replace("worker_processes 1;", "worker_processes 4;");
        config.replace("worker_connections 512;", &format!("worker_connections {};", 2 * CROWD.streams()))
    });
    site.copy("chat");
    site.join("chat");
    let pid = site.workers.lock().unwrap()[OsStr::new("chat")].daemon.pid();
    let duration = duration();
    let crowd = run(CROWD, Place::Nginx(site.address.clone().into()), pid, |elapsed| elapsed >= duration);
    // nginx's own have none.
    crowd.errors.borrow().iter().filter(|code| !code.is_empty()).for_each(|code| site.expect_error(code));
    for text in ["while reading upstream", "Resource temporarily unavailable"] {
        site.foresee(text);
    }
}

#[test]
fn slow_streams_and_those_that_break_off_cost_the_others_no_message() {
    let plan = Plan { ordinary: 200, pausing: 20, trickling: 20, breaking: 20, rate: 20, bytes: 6_000 };
    let slow = plan.pausing + plan.trickling;
    let bus = Bus::start();
    let pid = bus.worker.daemon.pid();
    let others = Usage::of(pid).files + plan.streams() - slow;
    let begun = Cell::new(false);
    let crowd = run(plan, Place::FastCgi(bus.worker.socket.clone()), pid, |elapsed| {
        assert!(elapsed < LAST, "no slow stream is cut off");
        let files = Usage::of(pid).files;
        begun.set(begun.get() || files >= others + slow);
        // Some of those that break off, and of those that publish, are away or twice there.
        begun.get() && files < others + slow / 2
    });
    // Those that were cut off came back, and had what they missed or were told; else the run had not come to its end.
    assert!(crowd.fates[PAUSING].cut.get() + crowd.fates[TRICKLING].cut.get() >= slow as u64 / 4);
    assert!(crowd.fates[BREAKING].broken.get() > 0);
}
