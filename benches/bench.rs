//! How fast: prints one table, in Markdown. `make bench` builds everything alike and runs this.
//!
//! What is compared is measured in turns, in an order drawn anew for every round, so that whatever else the machine
//! does hits all alike. The bench judges nothing but that the replies are right.

#[path = "../tests/fixtures/mod.rs"]
#[allow(dead_code, unused_macros, reason = "each bench uses its part")]
mod fixtures;
mod measure;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64ct::{Base64UrlUnpadded, Encoding};
use fixtures::daemon::{Folder, executable, is_root};
use fixtures::fronts::Front;
use fixtures::http_client::Stream;
use fixtures::memcached::Memcached;
use fixtures::site::{NOBODY, Site, on_the_local_store};
use hmac::{Hmac, KeyInit, Mac};
use measure::{Table, baseline, interleave, machine, median, quantile, spread};
use sha2::Sha256;
use shortbus::bus::store::Store;
use shortbus::bus::{self, Publish};
use shortbus::http::signature;
use shortbus::limits;
use shortbus::stores::block_on;
use shortbus::stores::local::{Local, WholeProcess, folder as store_folder};
use shortbus::stores::memcached::blocking;

/// Processes started of each kind, one after the other.
const SPAWNS: usize = 2_000;
const COPIES: usize = 4;
/// Times that each kind of request has a web server for itself, and for how long.
const ROUNDS: usize = 9;
const ROUND: Duration = Duration::from_millis(500);
/// Connections to a web server, each with one request at a time.
const CLIENTS: usize = 4;
/// Publishers at the same time, and how long they publish, in each of `CROWD_ROUNDS`.
const CROWDS: [usize; 3] = [1, 16, 64];
const CROWD_ROUNDS: usize = 5;
const CROWD: Duration = Duration::from_secs(1);

/// Of the signed buses.
const KEY: &str = "A key of thirty-two bytes or more";
const BODY: &str = r#"{"text":"Hello, everyone!"}"#;
/// What replies hold.
const EMPTY: &str = "\r\n\r\n[]";
const PUBLISHED: &str = r#"{"user":1,"id":"#;
const REFUSED: &str = "Status: 503 ";
const MESSAGE: &str = r#","user":1,"data":{"text":"Hello, everyone!"}},{"#;

const LEGEND: &str = "\
Medians, quartiles in parentheses. A process's time is from before it is started, with a CGI environment, until its
reply is read to the end and it is gone. *Fixed* prints an empty poll's reply. *Raw* connects to the same memcached,
reads one key that is not there, once or twice, and prints the same; it checks, limits and parses nothing. Both are
built like the executable: static, the same profile, no start-up code; but the linker puts their code where it likes, and
*laid out* like the executable's in one row alone. *Behind* is how far a poll's cursor lies behind the newest message;
*live* is how many messages there are. Through a web server: requests a second of 4 connections that are kept, memcached
over TCP or a local store in memory, ratio to fixed in the same server. Apache's mod_cgid waits where the process is not
quite gone when its reply is read, most times after a POST. Publishers: processes over TCP, each of them in a loop; tries
by memcached's count of sets (a lone publish is one try), *refused* with a 503.";

fn main() {
    let mut table = Table::new();
    let (tcp, unix) = (Memcached::start_tcp(), Memcached::start(&[]));
    one_process(&mut table, &tcp, &unix);
    crowds(&mut table, &tcp);
    web_servers(&mut table);
    table.row("Machine", machine(), "");
    println!("{}\n{LEGEND}", table.0);
}

/// Several copies of one file, to be run in turns. The same file costs a tenth more or less by luck: by how the kernel
/// has laid it out in its cache, for one. So each is copied in the same way, as people copy it, and more than once.
struct Program {
    copies: Vec<PathBuf>,
    turn: AtomicUsize,
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").args([from, to]).status().unwrap().success());
}

impl Program {
    fn new(folder: &Folder, file: &Path) -> Program {
        let copy = |number: usize| {
            let path = folder.join(format!("{number}-{}", file.file_name().unwrap().display()));
            copy(file, &path);
            path
        };
        Program { copies: (0..COPIES).map(copy).collect(), turn: AtomicUsize::new(0) }
    }

    fn file(&self) -> &Path {
        &self.copies[self.turn.fetch_add(1, Ordering::Relaxed) % COPIES]
    }
}

/// A program with a request to run it on.
struct Job<'a> {
    program: &'a Program,
    env: Vec<(&'static str, String)>,
    body: String,
    /// What the reply holds.
    expect: &'a str,
    /// A send that may be repeated: whether it is signed.
    once: Option<bool>,
}

impl<'a> Job<'a> {
    /// A poll.
    fn get(program: &'a Program, memcached: &Memcached, bus: &str, cursor: u64, expect: &'a str) -> Job<'a> {
        let env = vec![
            ("GATEWAY_INTERFACE", "CGI/1.1".into()),
            ("REQUEST_METHOD", "GET".into()),
            ("QUERY_STRING", format!("user=2&id={cursor}")),
            ("SHORTBUS_MEMCACHED", memcached.address.clone()),
            ("SHORTBUS_BUS", bus.into()),
        ];
        Job { program, env, body: String::new(), expect, once: None }
    }

    /// A publish.
    fn post(program: &'a Program, memcached: &Memcached, bus: &str, expect: &'a str) -> Job<'a> {
        let mut job = Job::get(program, memcached, bus, 0, expect);
        job.env[1].1 = "POST".into();
        job.env[2].1 = "user=1".into();
        job.with_body(BODY.into())
    }

    /// A publish of sixteen messages.
    fn batch(program: &'a Program, memcached: &Memcached, bus: &str) -> Job<'a> {
        let mut job = Job::post(program, memcached, bus, PUBLISHED);
        job.env[2].1.push_str("&batch=1");
        job.env.pop();
        job.with_body(format!("[{}]", [BODY; 16].join(",")))
    }

    fn with_body(mut self, body: String) -> Job<'a> {
        self.env.push(("CONTENT_LENGTH", body.len().to_string()));
        Job { body, ..self }
    }

    /// A publish with `once`, on a bus with these settings: signed where there are any.
    fn once(program: &'a Program, memcached: &Memcached, bus: &str, settings: &[(&'static str, &str)]) -> Job<'a> {
        let mut job = Job::post(program, memcached, bus, PUBLISHED);
        job.env.extend(settings.iter().map(|&(name, value)| (name, value.into())));
        Job { once: Some(!settings.is_empty()), ..job }
    }

    /// The same on the local store.
    fn in_file(mut self, store: &Memory) -> Job<'a> {
        self.env[3] = ("SHORTBUS_STORE", store.0.display().to_string());
        self
    }

    /// The query of a send that was never made before.
    fn new_query(&self, signed: bool) -> String {
        static SENDS: AtomicUsize = AtomicUsize::new(0);
        let once = SENDS.fetch_add(1, Ordering::Relaxed);
        if !signed {
            return format!("user=1&once={once}");
        }
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
        let bus = &self.env.iter().find(|(name, _)| *name == "SHORTBUS_BUS").unwrap().1;
        let mut mac = Hmac::<Sha256>::new_from_slice(signature::secret(KEY.as_bytes(), 1).as_bytes()).unwrap();
        mac.update(format!("{bus}\n1\n{time}\n{once}\n{BODY}").as_bytes());
        let sig = Base64UrlUnpadded::encode_string(&mac.finalize().into_bytes());
        format!("user=1&once={once}&time={time}&sig={sig}")
    }

    /// The process to be, with its body ready at stdin, under another program where one is named.
    fn command(&self, under: &[&str]) -> Command {
        let mut words = under.iter().map(Path::new).chain([self.program.file()]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).env_clear().envs(self.env.iter().map(|(name, value)| (name, value)));
        command.envs(self.once.map(|signed| ("QUERY_STRING", self.new_query(signed))));
        command.stdin(Stdio::null());
        if !self.body.is_empty() {
            let (reader, mut writer) = std::io::pipe().unwrap();
            writer.write_all(self.body.as_bytes()).unwrap();
            command.stdin(reader);
        }
        command
    }

    fn check(&self, reply: &str) {
        assert!(reply.starts_with("Status: 200 OK\r\n") && reply.contains(self.expect), "{reply}");
    }

    /// Runs it: milliseconds, and the reply.
    fn run(&self) -> (f64, String) {
        let mut command = self.command(&[]);
        let mut reply = String::new();
        let start = Instant::now();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        child.stdout.take().unwrap().read_to_string(&mut reply).unwrap();
        child.wait().unwrap();
        (start.elapsed().as_secs_f64() * 1e3, reply)
    }

    fn time(&self) -> f64 {
        let (time, reply) = self.run();
        self.check(&reply);
        time
    }

    /// What another program says of it on stderr.
    fn under(&self, words: &[&str]) -> String {
        let output = self.command(words).output().unwrap_or_else(|error| panic!("{}: {error}", words[0]));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{words:?}: {text}");
        self.check(&String::from_utf8_lossy(&output.stdout));
        text
    }

    fn instructions(&self) -> f64 {
        let text = self.under(&["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]);
        let total = text.lines().find_map(|line| line.split_once("Collected : ")).expect("callgrind's total").1;
        total.trim().parse().unwrap()
    }

    /// In the order of their occurrence.
    fn system_calls(&self) -> Vec<String> {
        let text = self.under(&["strace"]);
        text.lines().filter_map(|line| line.split_once('(')).map(|(name, _)| name.to_owned()).collect()
    }

    /// KiB: read while it waits to write its reply to a pipe that is full. What wait4(2) tells of a child is at
    /// least what its parent had.
    fn peak_memory(&self) -> u64 {
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        let filler = [b' '; 65_536];
        writer.write_all(&filler).unwrap();
        let mut child = self.command(&[]).stdout(writer).spawn().unwrap();
        thread::sleep(Duration::from_millis(200));
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let mut reply = String::new();
        reader.read_to_string(&mut reply).unwrap();
        child.wait().unwrap();
        self.check(&reply[filler.len()..]);
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("still there");
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

/// Makes a bus with so many messages, by the library: the newest id.
fn fill(memcached: &Memcached, bus: &str, messages: u64) -> u64 {
    for _ in 0..messages {
        let publish = Publish { user: 1, messages: vec![BODY.as_bytes()], key: None };
        block_on(bus::publish(&mut open(memcached, bus), publish, 3_600)).unwrap();
    }
    block_on(bus::join(&mut open(memcached, bus))).unwrap()
}

fn open(memcached: &Memcached, bus: &str) -> impl Store {
    blocking::Memcached::connect(std::slice::from_ref(&memcached.address), bus.as_bytes()).unwrap()
}

/// A folder in memory, as `/dev/shm/shortbus-UID` is one.
struct Memory(PathBuf);

impl Memory {
    fn new() -> Memory {
        let path = Path::new("/dev/shm").join(format!("shortbus-bench-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Memory(path)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn one_process(table: &mut Table, tcp: &Memcached, unix: &Memcached) {
    let folder = Folder::new();
    let [shortbus, fixed, raw] =
        &[executable(), baseline("fixed"), baseline("raw")].map(|file| Program::new(&folder, &file));
    let laid_out = &Program::new(&folder, &baseline("fixed-laid-out"));
    let (idle, thousand, busy) = (fill(tcp, "idle", 0), fill(tcp, "thousand", 1_000), fill(tcp, "busy", 10_000));
    block_on(bus::signing_key(&mut open(tcp, "kept"), Some(KEY.as_bytes()))).unwrap();
    let store = Memory::new();
    let mut local = Local::new(store_folder::Folder::named(&store.0), b"idle", limits::STORE_BYTES, WholeProcess);
    let local_idle = block_on(bus::join(&mut local)).unwrap();
    let far = 1_000_000_000_000_000;
    let behind = thousand - 1_000 * limits::SLOT_MESSAGES;
    let first = format!(r#"[{{"id":{},"user":1,"#, behind + limits::SLOT_MESSAGES);
    let jobs = [
        Job::get(fixed, tcp, "idle", idle, EMPTY),
        Job::get(raw, tcp, "idle", idle, EMPTY),
        Job::get(shortbus, tcp, "idle", idle, EMPTY),
        Job::post(raw, tcp, "published", EMPTY),
        Job::post(shortbus, tcp, "published", PUBLISHED),
        Job::get(raw, unix, "idle", idle, EMPTY),
        Job::get(shortbus, unix, "idle", fill(unix, "idle", 0), EMPTY),
        Job::post(raw, unix, "published", EMPTY),
        Job::post(shortbus, unix, "published", PUBLISHED),
        Job::get(shortbus, tcp, "thousand", behind, &first),
        Job::get(shortbus, tcp, "idle", idle - far, EMPTY),
        Job::get(shortbus, tcp, "busy", busy - far, MESSAGE),
        Job::once(shortbus, tcp, "published", &[]),
        Job::once(shortbus, tcp, "signed", &[("SHORTBUS_AUTH", "signed"), ("SHORTBUS_KEY", KEY)]),
        Job::once(shortbus, tcp, "kept", &[("SHORTBUS_AUTH", "signed")]),
        Job::get(shortbus, tcp, "idle", local_idle, EMPTY).in_file(&store),
        Job::post(shortbus, tcp, "published", PUBLISHED).in_file(&store),
        Job::once(shortbus, tcp, "published", &[]).in_file(&store),
        Job::batch(shortbus, tcp, "published"),
        Job::get(laid_out, tcp, "idle", idle, EMPTY),
    ];
    let samples = interleave(jobs.len(), SPAWNS, |job| jobs[job].time());
    let ratio = |job: usize, to: usize| median(&samples[job]) / median(&samples[to]);
    let time = |job: usize| spread(&samples[job], 3, "ms");
    table.row("One process: fixed", time(0), "");
    table.row("– the same, laid out", time(19), format!("{:.2} × fixed", ratio(19, 0)));
    for (first, kind) in [(1, "TCP"), (5, "unix socket")] {
        let [raw, poll, raw_twice, publish] = [0, 1, 2, 3].map(|n| first + n);
        let compare = |job, to, trips| format!("{:.2} × {trips}, {:.2} × fixed", ratio(job, to), ratio(job, 0));
        table.row(&format!("Raw round trip, {kind}"), time(raw), format!("{:.2} × fixed", ratio(raw, 0)));
        table.row(&format!("**Empty poll**, {kind}"), time(poll), compare(poll, raw, "raw"));
        let what = format!("Two raw round trips, {kind}");
        table.row(&what, time(raw_twice), format!("{:.2} × fixed", ratio(raw_twice, 0)));
        table.row(&format!("**Publish**, {kind}"), time(publish), compare(publish, raw_twice, "two raw"));
    }
    let behind = |job| format!("{:.2} × empty poll", ratio(job, 2));
    table.row("Poll 1,000 behind, 1,000 live", time(9), behind(9));
    table.row("Poll 10<sup>15</sup> behind, none live", time(10), behind(10));
    let bound = 2.0 + ratio(9, 2) - 1.0;
    let compared = format!("{}; two empty polls and what it returns: {bound:.2}", behind(11));
    table.row("Poll 10<sup>15</sup> behind, 10,000 live", time(11), compared);

    for (job, what) in [(12, "with `once`"), (13, "signed"), (14, "signed, key in memcached")] {
        let compared = format!("{:.2} × publish", ratio(job, 4));
        table.row(&format!("**Publish** {what}, TCP"), time(job), compared);
    }

    for (job, what) in [(15, "Empty poll"), (16, "Publish"), (17, "Publish with `once`")] {
        table.row(&format!("**{what}**, local store"), time(job), format!("{:.2} × fixed", ratio(job, 0)));
    }

    let compared = format!("{:.2} × publish", ratio(18, 4));
    table.row("**Publish** of a batch of 16, TCP", time(18), compared);

    let counts = [0, 1, 2, 4, 12, 13, 18].map(|job| jobs[job].instructions());
    let counts = counts.map(|count| format!("{:.0},000", count / 1e3));
    let others = |[fixed, raw, _, publish, once, signed, batch]: &[String; 7]| {
        let publishes = format!("publish {publish}, with `once` {once}, signed {signed}, of a batch of 16 {batch}");
        format!("fixed {fixed}, raw {raw}, {publishes}")
    };
    table.row("Instructions, empty poll", &counts[2], others(&counts));
    let calls = [0, 1, 2, 4, 12, 13, 18].map(|job| jobs[job].system_calls());
    let counts = [0, 1, 2, 3, 4, 5, 6].map(|n| calls[n].len().to_string());
    table.row("System calls, empty poll", &counts[2], others(&counts));
    let list: Vec<String> = calls[2]
        .chunk_by(|a, b| a == b)
        .map(|same| if same.len() > 1 { format!("{} {}", same.len(), same[0]) } else { same[0].clone() })
        .collect();
    table.row("– in their order", list.join(", "), "");
    let [fixed, raw, poll, publish, behind] = [0, 1, 2, 4, 9].map(|job| jobs[job].peak_memory());
    let others = format!("fixed {fixed}, raw {raw}, publish {publish}, 1,000 behind {behind}");
    table.row("Peak memory, empty poll", format!("{poll} KiB"), others);
    let [fixed, raw, size] = [0, 1, 2].map(|job| std::fs::metadata(jobs[job].program.file()).unwrap().len());
    table.row("Executable", format!("{size} bytes"), format!("fixed {fixed}, raw {raw}"));
}

/// Several publishers on one bus at the same time.
fn crowds(table: &mut Table, memcached: &Memcached) {
    let sets = || -> f64 {
        let stats = memcached.ask("stats\r\n");
        stats.lines().find_map(|line| line.strip_prefix("STAT cmd_set ")).unwrap().trim().parse().unwrap()
    };
    fill(memcached, "alone", 0);
    let before = sets();
    fill(memcached, "alone", 1);
    let per_try = sets() - before;
    let folder = Folder::new();
    let program = Program::new(&folder, &executable());
    let mut times = CROWDS.map(|_| Vec::new());
    let (mut tries, mut refused) = ([0.0; CROWDS.len()], [0; CROWDS.len()]);
    let rates = interleave(CROWDS.len(), CROWD_ROUNDS, |crowd| {
        let bus = format!("crowd of {}", CROWDS[crowd]);
        fill(memcached, &bus, 0);
        let job = Job::post(&program, memcached, &bus, PUBLISHED);
        let (before, start) = (sets(), Instant::now());
        let publish =
            || -> Vec<(f64, String)> { std::iter::from_fn(|| (start.elapsed() < CROWD).then(|| job.run())).collect() };
        let replies: Vec<(f64, String)> = thread::scope(|scope| {
            let threads: Vec<_> = (0..CROWDS[crowd]).map(|_| scope.spawn(publish)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let (no, done): (Vec<_>, Vec<_>) = replies.iter().partition(|(_, reply)| reply.starts_with(REFUSED));
        done.iter().for_each(|(_, reply)| job.check(reply));
        tries[crowd] += sets() - before;
        refused[crowd] += no.len();
        times[crowd].extend(done.iter().map(|(time, _)| time));
        done.len() as f64 / start.elapsed().as_secs_f64()
    });
    for (crowd, publishers) in CROWDS.iter().enumerate() {
        let times = &mut times[crowd];
        times.sort_by(f64::total_cmp);
        let value = format!("{}, 99 % within {:.0}", spread(times, 2, "ms"), quantile(times, 0.99));
        let (published, refused) = (times.len(), refused[crowd]);
        let [tries, rate] = [tries[crowd] / per_try / published as f64, median(&rates[crowd])];
        let compared =
            format!("{tries:.2} tries each, {rate:.0} a second; {refused} of {} refused", published + refused);
        table.row(&format!("{publishers} at once publishing"), value, compared);
    }
}

fn web_servers(table: &mut Table) {
    for (front, name) in [(Front::ApacheCgid, "Apache, mod_cgid"), (Front::NginxFcgiwrap, "nginx, fcgiwrap")] {
        let site = Site::on(front, Memcached::start_tcp(), &[]);
        let store = Memory::new();
        let local = local_site(front, &store);
        let programs = [executable(), executable(), baseline("fixed"), baseline("raw")];
        for (program, name) in programs.iter().zip(["chat", "published", "fixed", "raw"]) {
            copy(program, &site.cgi_bin(name));
        }
        let [(_, id), (_, local_id)] = [&site, &local].map(|site| site.join("chat"));
        let get = |target: &str| format!("GET /cgi-bin/{target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let post = |target: &str| {
            let head = format!("POST /cgi-bin/{target} HTTP/1.1\r\nHost: localhost\r\nContent-Length:");
            format!("{head} {}\r\n\r\n{BODY}", BODY.len())
        };
        let requests = [
            ("fixed", &site, get("fixed"), "[]"),
            ("fixed, to a POST", &site, post("fixed"), "[]"),
            ("one raw round trip", &site, get("raw"), "[]"),
            ("**empty poll**", &site, get(&format!("chat?user=2&id={id}")), "[]"),
            ("**publish**", &site, post("published?user=1"), PUBLISHED),
            ("**empty poll**, local store", &local, get(&format!("chat?user=2&id={local_id}")), "[]"),
            ("**publish**, local store", &local, post("published?user=1"), PUBLISHED),
        ];
        let rates = interleave(requests.len(), ROUNDS, |n| {
            let (_, site, request, expect) = &requests[n];
            requests_a_second(site, request, expect)
        });
        for (n, (what, ..)) in requests.iter().enumerate() {
            let ratio = |to: usize| median(&rates[n]) / median(&rates[to]);
            let compared = match n {
                0 => String::new(),
                1 | 2 | 5 => format!("{:.2} × fixed", ratio(0)),
                3 => format!("{:.2} × fixed, {:.2} × one raw", ratio(0), ratio(2)),
                4 => format!("{:.2} × fixed to a POST, {:.2} × one raw", ratio(1), ratio(2)),
                _ => format!("{:.2} × fixed to a POST", ratio(1)),
            };
            table.row(&format!("{name}: {what}"), spread(&rates[n], 0, "a second"), compared);
        }
    }
}

/// The same web server with its buses on a local store in memory.
fn local_site(front: Front, store: &Memory) -> Site {
    let mut site = None;
    on_the_local_store(|| site = Some(Site::on(front, Memcached::absent(), &[])));
    let site = site.unwrap();
    let folder = site.store().1;
    std::fs::remove_dir(&folder).unwrap();
    std::os::unix::fs::symlink(&store.0, folder).unwrap();
    // Apache's programs run as this user.
    let owner = (is_root() && front == Front::ApacheCgid).then_some(NOBODY);
    std::os::unix::fs::chown(&store.0, owner, None).unwrap();
    ["chat", "published"].iter().for_each(|name| site.copy(name));
    site
}

fn requests_a_second(site: &Site, request: &str, expect: &str) -> f64 {
    let start = Instant::now();
    let client = || {
        let mut connection = None;
        let mut count = 0;
        while start.elapsed() < ROUND {
            let body = exchange(&mut connection, site, request);
            assert!(body.starts_with(expect), "{body}");
            count += 1;
        }
        count
    };
    let count: u32 = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    f64::from(count) / start.elapsed().as_secs_f64()
}

type Connection = BufReader<Box<dyn Stream>>;

fn connect(site: &Site) -> Connection {
    BufReader::new(match site.front {
        Front::NginxFcgiwrap => Box::new(UnixStream::connect(&site.address).unwrap()),
        _ => Box::new(TcpStream::connect(&site.address).unwrap()),
    })
}

/// One request on a connection that is kept, or made anew where the server closed it: the reply's body.
fn exchange(connection: &mut Option<Connection>, site: &Site, request: &str) -> String {
    let stream = connection.get_or_insert_with(|| connect(site));
    stream.get_mut().write_all(request.as_bytes()).unwrap();
    let line = |stream: &mut Connection| {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        line.trim_end().to_ascii_lowercase()
    };
    let status = line(stream);
    assert!(status.starts_with("http/1.1 200 "), "{status}");
    let (mut length, mut chunked, mut close) = (0, false, false);
    loop {
        match line(stream).split_once(": ") {
            None => break,
            Some(("content-length", value)) => length = value.parse().unwrap(),
            Some(("transfer-encoding", value)) => chunked = value == "chunked",
            Some(("connection", value)) => close = value == "close",
            _ => {}
        }
    }
    let mut body = Vec::new();
    let mut take = |stream: &mut Connection, length| stream.take(length).read_to_end(&mut body).unwrap();
    if chunked {
        loop {
            let size = u64::from_str_radix(&line(stream), 16).unwrap();
            take(stream, size);
            line(stream);
            if size == 0 {
                break;
            }
        }
    } else {
        take(stream, length);
    }
    if close {
        *connection = None;
    }
    String::from_utf8(body).unwrap()
}
