//! A month in an hour: several sites at once, with publishers and readers of every kind, while what they stand on is
//! killed, stopped, held, emptied, filled and reloaded, at random. At the end each log is read: nothing acknowledged
//! was lost untold, nothing came twice or in another order, and nothing was told as missed that was there.
//!
//! `TEST_MONTH=<seconds> TEST_SEED=<n> cargo test month -- --nocapture`; a short one where that is not set. A run that
//! fails keeps its folders, each with what was done to its site in `faults.log`. The seed chooses the faults and the
//! messages; at which moment they meet is the machine's choice.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::ops::Bound::{Excluded, Included};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use shortbus::limits;

use crate::fixtures::daemon::{Folder, PATIENCE, executable, keep_folders, wait_for};
use crate::fixtures::fastcgi_client::{END_REQUEST, STDOUT, request, take_record};
use crate::fixtures::fastcgi_server::Worker;
use crate::fixtures::fronts::Front;
use crate::fixtures::http_client::Reply;
use crate::fixtures::memcached::Memcached;
use crate::fixtures::signer::{Signer, unix_millis};
use crate::fixtures::site::{Hold, Settings, Site, on_the_local_store};

/// How long the short form lasts, seconds.
const SHORT: u64 = 20;
/// How long everything may take to be well again behind the last fault: when the test gives up.
const RECOVERY: Duration = Duration::from_secs(120);
/// For how long a message lives on buses whose readers are away for longer now and then, seconds.
const BRIEF: u64 = 8;
/// For how long a request may still be at work after its client has given it up: stopped for three seconds, say.
const STRAGGLES: u64 = 15_000_000;
/// memcached goes by whole seconds: what comes right behind a flush_all may count as before it.
const FLUSH: u64 = 2_000_000;
/// The user, and first part of the text, of each bus's last message.
const CLOSER: u64 = 0xfff;

/// What a site stands on, and what is done to it.
struct Plan {
    front: Front,
    /// memcached's arguments; none where the buses are on the local store.
    memcached: Option<&'static [&'static str]>,
    /// Its memcached is restarted, flushed and away for a while.
    loses: bool,
    /// It is filled, too, and evicts.
    fills: bool,
    /// Seconds that a message of its open bus lives.
    ttl: u64,
}

#[rustfmt::skip]
const PLANS: [Plan; 6] = [
    Plan { front: Front::ApacheCgid, memcached: Some(&[]), loses: false, fills: false, ttl: BRIEF },
    Plan { front: Front::ApacheProxyFcgi, memcached: None, loses: false, fills: false, ttl: 60 },
    Plan { front: Front::NginxFastcgi, memcached: Some(&[]), loses: true, fills: false, ttl: 60 },
    Plan { front: Front::NginxFcgiwrap, memcached: None, loses: false, fills: false, ttl: BRIEF },
    Plan { front: Front::LighttpdFastcgi, memcached: Some(&["-m", "4"]), loses: true, fills: true, ttl: 60 },
    Plan { front: Front::NginxFastcgiShared, memcached: Some(&[]), loses: false, fills: false, ttl: 60 },
];

const SIGNED: &[(&str, &str)] = &[("SHORTBUS_AUTH", "signed")];
const BRIEFLY: &[(&str, &str)] = &[("SHORTBUS_TTL", "8")];
/// As CGI a poll waits, and a stream lasts, for so long only where a setting says so.
const SIGNED_WAIT: &[(&str, &str)] = &[("SHORTBUS_AUTH", "signed"), ("SHORTBUS_WAIT", "4")];
const BRIEFLY_WAIT: &[(&str, &str)] = &[("SHORTBUS_TTL", "8"), ("SHORTBUS_WAIT", "4")];

impl Plan {
    fn settings(&self) -> Settings<'static> {
        match (self.front, self.ttl) {
            (Front::ApacheCgid, _) => &[("open", BRIEFLY_WAIT), ("signed", SIGNED_WAIT)],
            (_, BRIEF) => &[("open", BRIEFLY), ("signed", SIGNED)],
            _ => &[("open", &[]), ("signed", SIGNED)],
        }
    }

    /// Polls may wait, and messages be streamed.
    fn waits(&self) -> bool {
        self.front.can_wait() || self.front == Front::ApacheCgid
    }

    fn faults(&self) -> Vec<Fault> {
        use Fault::*;
        let mut faults = vec![Kill, Kill, Kill, End, Stop, Stop, Hold, Hold, Reload];
        faults.extend([Restart, Flush, Away].iter().filter(|_| self.loses));
        faults.extend([Fill, Fill].iter().filter(|_| self.fills));
        faults
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// SIGKILL to processes of the bus.
    Kill,
    /// SIGTERM.
    End,
    /// SIGSTOP, and SIGCONT after three seconds at most.
    Stop,
    /// The store takes no write for a while.
    Hold,
    /// The web server reads its configuration anew.
    Reload,
    /// memcached is killed, and another one started at once.
    Restart,
    Flush,
    /// memcached is killed, and another one started after a while.
    Away,
    /// Others fill memcached.
    Fill,
    /// A client leaves in the middle of a request or a stream.
    Cut,
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn percent(&mut self, share: u64) -> bool {
        self.below(100) < share
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }

    fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// What a message is known by: its publisher, which of its sends it is of, and which of that one's messages.
fn key(publisher: u64, send: u64, part: u64) -> u64 {
    publisher << 48 | send << 16 | part
}

fn publisher_of(key: u64) -> u64 {
    key >> 48
}

/// The message that has this key, which nobody can mistake for another: a JSON string without escapes, of a length that
/// goes by the key.
fn text(key: u64) -> String {
    let mut random = Random(key);
    // Every third publisher sends batches, of small messages.
    let length = match random.below(20) {
        _ if is_batcher(publisher_of(key)) => random.below(100),
        0 => random.below(9_000),
        1..6 => random.below(2_000),
        _ => random.below(100),
    };
    format!("{} {}", name(key), "x".repeat(length as usize))
}

/// How it begins.
fn name(key: u64) -> String {
    format!("{}-{}-{}", publisher_of(key), key >> 16 & 0xffff_ffff, key & 0xffff)
}

fn key_of(text: &str) -> Option<u64> {
    let mut numbers = text.split(' ').next()?.split('-').map(str::parse);
    let mut number = || numbers.next()?.ok();
    Some(key(number()?, number()?, number()?))
}

/// Of three publishers in a row the first never sends anything again, the second does until it is answered, and so does
/// the third with batches.
fn is_batcher(publisher: u64) -> bool {
    publisher % 3 == 2
}

/// A message as one reader heard it: id and key.
type Message = (u64, u64);

/// What a reader was told is gone: all of it, or some, behind `before` and up to `after`.
struct Missed {
    before: u64,
    after: u64,
    /// When the reader had all up to `before`, at the latest, and when it was told, microseconds of the run.
    since: u64,
    at: u64,
}

/// How a reader listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Polls, by `Shortbus-Last-Id`.
    Header,
    /// Polls, by the last id in the array.
    Array,
    /// Polls as the user who sends without `once`, whose messages it is not told.
    Own,
    /// Polls, and is away for longer than the TTL now and then.
    Away,
    /// Polls that wait.
    Wait,
    Stream,
}

struct Reader {
    name: String,
    kind: Kind,
    /// Where it began.
    first: u64,
    cursor: u64,
    since: u64,
    messages: Vec<Message>,
    missed: Vec<Missed>,
    /// The last message has come.
    closed: bool,
}

/// What was sent: when it was sent first, and when it was given up or answered last.
struct Sent {
    start: u64,
    end: u64,
}

/// An acknowledged message.
struct Ack {
    message: Message,
    start: u64,
}

/// All that is known of a bus at the end.
#[derive(Default)]
struct Log {
    acks: Vec<Ack>,
    sends: BTreeMap<u64, Sent>,
    readers: Vec<Reader>,
    /// What only a store that lost something may cause, and between which moments.
    excuses: Vec<(String, u64, u64)>,
}

struct Bus {
    name: &'static str,
    signed: bool,
    settings: &'static [(&'static str, &'static str)],
    ttl: u64,
    /// Its first publisher, which never sends anything again.
    plain: u64,
    log: Mutex<Log>,
    /// The last message is acknowledged.
    closed: AtomicBool,
}

/// A FastCGI process that this test starts, again and again.
struct Own {
    program: PathBuf,
    socket: PathBuf,
    environment: Vec<(&'static str, String)>,
    worker: Option<Worker>,
}

/// How a request gets to a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By the web server.
    Front,
    /// As CGI, on the store of a site with FastCGI.
    Cgi,
    /// As FastCGI, on the store of a site with CGI.
    Fastcgi,
}

/// What all share.
struct Month {
    seed: u64,
    began: Instant,
    /// No further fault begins.
    over: AtomicBool,
    /// When the last fault had ended, microseconds of the run.
    calm: AtomicU64,
    failed: AtomicBool,
    violations: Mutex<Vec<String>>,
    faults: Mutex<BTreeMap<Fault, usize>>,
    repeated: AtomicUsize,
    unanswered: AtomicUsize,
}

impl Month {
    /// Microseconds since the run began.
    fn now(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    fn fail(&self, what: String) {
        self.violations.lock().unwrap().push(format!("{:.3} s: {what}", self.now() as f64 / 1e6));
        self.failed.store(true, SeqCst);
    }

    fn count(&self, fault: Fault, times: usize) {
        *self.faults.lock().unwrap().entry(fault).or_default() += times;
    }

    fn is_calm(&self) -> bool {
        self.calm.load(SeqCst) != u64::MAX
    }

    /// Whether there is no use in going on: something is wrong, or `what` does not come about.
    fn is_lost(&self, what: impl Fn() -> String) -> bool {
        let calm = self.calm.load(SeqCst);
        if calm != u64::MAX && self.now() > calm + RECOVERY.as_micros() as u64 {
            self.fail(format!("{RECOVERY:?} after the last fault, and not yet: {}", what()));
        }
        self.failed.load(SeqCst)
    }
}

/// Ends the run where a thread panics, and keeps the folders.
struct Stops<'a>(&'a Month);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            keep_folders();
            self.0.failed.store(true, SeqCst);
        }
    }
}

/// Processes that go on when this is dropped.
struct Stopped(Vec<String>);

impl Drop for Stopped {
    fn drop(&mut self) {
        signal("CONT", &self.0);
    }
}

/// A memcached that goes on when this is dropped.
struct Silent<'a>(MutexGuard<'a, Memcached>);

impl Drop for Silent<'_> {
    fn drop(&mut self) {
        self.0.signal("CONT");
    }
}

fn signal(name: &str, pids: &[String]) {
    if !pids.is_empty() {
        let _ = Command::new("kill").args(["-s", name]).args(pids).stderr(Stdio::null()).status();
    }
}

/// The processes whose executable is one of these, by pid.
fn processes(is_one: impl Fn(&Path, &Path) -> bool) -> Vec<String> {
    let pids = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let pids = pids.filter(|path| fs::read_link(path.join("exe")).is_ok_and(|exe| is_one(path, &exe)));
    pids.map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
}

/// A site, what it stands on, and what happens to it.
struct Deployment<'a> {
    month: &'a Month,
    plan: &'static Plan,
    site: Site,
    memcached: Option<Mutex<Memcached>>,
    root: PathBuf,
    folder: Folder,
    buses: Vec<Bus>,
    own: Mutex<Vec<Own>>,
    /// When the store may have lost something: from, to; microseconds of the run.
    losses: Mutex<Vec<(u64, u64)>>,
    /// What memcached counts of items that it gave up, and when it did.
    evicted: Mutex<(u64, u64)>,
}

impl<'a> Deployment<'a> {
    fn start(month: &'a Month, number: usize, plan: &'static Plan) -> Deployment<'a> {
        let settings = plan.settings();
        let memcached = plan.memcached.map(Memcached::start);
        let mut site = None;
        match &memcached {
            None => on_the_local_store(|| site = Some(Site::with(plan.front, settings))),
            Some(memcached) => {
                // Of the site's own, so that it can be killed while the site is in use.
                let mut elsewhere = Memcached::absent();
                elsewhere.address.clone_from(&memcached.address);
                site = Some(Site::on(plan.front, elsewhere, settings));
            }
        }
        let site = site.unwrap();
        // What servers say of all this is not foreseen line by line.
        site.foresee("");
        site.foresee_kills();
        let bus = |n: usize| Bus {
            name: settings[n].0,
            signed: n > 0,
            settings: settings[n].1,
            ttl: if n == 0 { plan.ttl } else { limits::TTL_DEFAULT.into() },
            plain: (number * settings.len() + n) as u64 * 3,
            log: Mutex::default(),
            closed: AtomicBool::new(false),
        };
        let root = site.cgi_bin("open").parent().unwrap().parent().unwrap().to_owned();
        let deployment = Deployment {
            month,
            plan,
            memcached: memcached.map(Mutex::new),
            folder: Folder::new(),
            buses: (0..settings.len()).map(bus).collect(),
            own: Mutex::default(),
            losses: Mutex::default(),
            evicted: Mutex::default(),
            root,
            site,
        };
        deployment.take_over();
        deployment
    }

    /// Starts the FastCGI processes that are not the web server's own.
    fn take_over(&self) {
        let store = self.site.store();
        let mut own = self.own.lock().unwrap();
        if self.plan.front.names_buses() {
            let variable = format!("{}={}", store.0, store.1);
            let is_ours = |path: &Path, exe: &Path| {
                let environ = fs::read(path.join("environ")).unwrap_or_default();
                exe == executable() && environ.split(|&byte| byte == 0).any(|pair| pair == variable.as_bytes())
            };
            signal("TERM", &processes(is_ours));
            wait_for("the process to end", || processes(is_ours).is_empty());
            let environment = vec![store.clone()];
            let (program, socket) = (self.site.cgi_bin("open"), self.root.join("shortbus.sock"));
            own.push(Own { program, socket, environment, worker: None });
        }
        if self.beside() == Way::Fastcgi {
            for bus in &self.buses {
                let settings = bus.settings.iter().map(|(name, value)| (*name, value.to_string()));
                let environment = settings.chain([store.clone()]).collect();
                let (program, socket) = (self.site.cgi_bin(bus.name), self.socket(bus));
                own.push(Own { program, socket, environment, worker: None });
            }
        }
        drop(own);
        self.revive();
    }

    /// How else than by the web server one gets to its buses.
    fn beside(&self) -> Way {
        if self.plan.front.can_wait() { Way::Cgi } else { Way::Fastcgi }
    }

    fn socket(&self, bus: &Bus) -> PathBuf {
        self.folder.join(format!("{}.s", bus.name))
    }

    /// Starts those processes again that nobody else does.
    fn revive(&self) {
        for own in self.own.lock().unwrap().iter_mut() {
            if own.worker.as_mut().is_some_and(|worker| worker.daemon.is_alive()) {
                continue;
            }
            let _ = fs::remove_file(&own.socket);
            let variables: Vec<(&str, &str)> =
                own.environment.iter().map(|(name, value)| (*name, &value[..])).collect();
            own.worker = Some(Worker::start(&own.program, own.socket.clone(), &self.folder, &variables));
            fs::set_permissions(&own.socket, fs::Permissions::from_mode(0o777)).unwrap();
        }
        if self.plan.front == Front::NginxFastcgi {
            self.site.workers.lock().unwrap().retain(|_, worker| worker.daemon.is_alive());
            self.buses.iter().for_each(|bus| self.site.ensure_worker(bus.name));
        }
    }

    /// The site's processes of the bus.
    fn processes(&self) -> Vec<String> {
        processes(|_, exe| exe.starts_with(&self.root))
    }

    /// Some of them, at most so many. With a store that is held they are between a request and its reply.
    fn some(&self, random: &mut Random, most: u64) -> Vec<String> {
        let mut all = self.processes();
        let count = random.below(most) as usize + 1;
        while all.len() > count {
            all.remove(random.below(all.len() as u64) as usize);
        }
        all
    }

    fn hold(&self) -> (Option<Hold<'_>>, Option<Silent<'_>>) {
        let silent = self.memcached.as_ref().map(|memcached| {
            let memcached = memcached.lock().unwrap();
            memcached.signal("STOP");
            Silent(memcached)
        });
        (silent.is_none().then(|| self.site.hold()), silent)
    }

    /// Does what makes the store lose something, until so long after it.
    fn lose(&self, after: u64, act: impl FnOnce(&mut Memcached)) {
        let start = self.month.now();
        self.losses.lock().unwrap().push((start, u64::MAX));
        act(&mut self.memcached.as_ref().unwrap().lock().unwrap());
        let mut losses = self.losses.lock().unwrap();
        losses.iter_mut().find(|(from, to)| (*from, *to) == (start, u64::MAX)).unwrap().1 = self.month.now() + after;
    }

    /// Whether the store may have lost something between these moments.
    fn lost(&self, from: u64, to: u64) -> bool {
        self.losses.lock().unwrap().iter().any(|&(start, end)| start <= to && from <= end)
    }

    /// Takes note of what memcached has given up since the last look.
    fn look(&self) {
        let Some(memcached) = &self.memcached else { return };
        let stats = memcached.lock().unwrap().ask("stats\r\n");
        let now = self.month.now();
        let names = ["evictions", "slab_reassign_evictions_nomem", "slab_reassign_inline_reclaim"];
        let names = names.iter().chain(&["slab_reassign_busy_deletes"]);
        let count = |name: &&str| {
            stats.lines().find_map(|line| line.strip_prefix(&format!("STAT {name} "))?.trim().parse::<u64>().ok())
        };
        let sum = names.filter_map(count).sum();
        let (before, at) = std::mem::replace(&mut *self.evicted.lock().unwrap(), (sum, now));
        if sum != before {
            self.losses.lock().unwrap().push((at, now));
        }
    }

    /// Does one thing after the other to this site, until the month is over.
    fn torment(&self, mut random: Random) {
        let _stops = Stops(self.month);
        let faults = self.plan.faults();
        while !self.month.over.load(SeqCst) && !self.month.failed.load(SeqCst) {
            thread::sleep(random.millis(50, 800));
            self.look();
            let fault = random.choose(&faults);
            let times = self.inflict(fault, &mut random);
            self.month.count(fault, times);
        }
        self.look();
        self.revive();
    }

    /// Does it: how often, or to how many.
    fn inflict(&self, fault: Fault, random: &mut Random) -> usize {
        let begun = self.month.now();
        let mut times = 1;
        match fault {
            Fault::Kill | Fault::End => {
                let hold = random.percent(50).then(|| self.hold());
                thread::sleep(random.millis(0, 30));
                let pids = self.some(random, 3);
                signal(if fault == Fault::Kill { "KILL" } else { "TERM" }, &pids);
                drop(hold);
                thread::sleep(random.millis(0, 300));
                self.revive();
                times = pids.len();
            }
            Fault::Stop => {
                let hold = random.percent(50).then(|| self.hold());
                thread::sleep(random.millis(0, 30));
                let stopped = Stopped(self.some(random, 3));
                signal("STOP", &stopped.0);
                drop(hold);
                thread::sleep(random.millis(1, 3_000));
                times = stopped.0.len();
            }
            Fault::Hold => {
                let _hold = self.hold();
                thread::sleep(random.millis(1, 2_500));
            }
            Fault::Reload => {
                let name = if self.plan.front.is_nginx() { "HUP" } else { "USR1" };
                signal(name, &[self.site.server_pid().to_string()]);
            }
            Fault::Restart => self.lose(0, Memcached::restart),
            Fault::Flush => self.lose(FLUSH, |memcached| drop(memcached.ask("flush_all\r\n"))),
            Fault::Away => {
                let pause = random.millis(1, 2_000);
                self.lose(0, |memcached| {
                    memcached.stop();
                    thread::sleep(pause);
                    memcached.restart();
                });
            }
            Fault::Fill => self.lose(0, |memcached| {
                let item = |n: u64| {
                    let size = [50, 200, 700, 3_000, 12_000][n as usize % 5];
                    format!("set fill{n} 0 1 {size} noreply\r\n{}\r\n", "y".repeat(size))
                };
                memcached.ask((0..4_000).map(item).collect::<String>());
            }),
            Fault::Cut => unreachable!("by the clients"),
        }
        let line = format!("{begun} to {} us: {fault:?} {times}\n", self.month.now());
        let file = fs::File::options().create(true).append(true).open(self.root.join("faults.log"));
        file.unwrap().write_all(line.as_bytes()).unwrap();
        times
    }

    /// One request; none where there is no whole reply to it.
    fn ask(&self, way: Way, method: &str, bus: &Bus, query: &str, body: &str) -> Option<Reply> {
        let asked = Instant::now();
        let reply = match way {
            Way::Front => {
                let length = body.len().to_string();
                let headers: &[(&str, &str)] = if method == "POST" { &[("Content-Length", &length)] } else { &[] };
                self.site.send(method, &format!("{}?{query}", bus.name), headers, body.as_bytes())
            }
            Way::Cgi => self.run(method, bus, query, body).and_then(|bytes| Reply::parse(&bytes)),
            Way::Fastcgi => exchange(&self.socket(bus), method, query, body).and_then(|bytes| Reply::parse(&bytes)),
        };
        let reply = reply.filter(|reply| reply.status != 200 || serde_json::from_slice::<Value>(&reply.body).is_ok());
        if reply.is_none() {
            self.month.unanswered.fetch_add(1, SeqCst);
            if asked.elapsed() >= PATIENCE {
                self.month
                    .fail(format!("{:?} {}: no answer to {method} {query} by {way:?}", self.plan.front, bus.name));
            }
        }
        reply
    }

    /// The bare executable, as a web server would run it: what it wrote, unless it was killed.
    fn run(&self, method: &str, bus: &Bus, query: &str, body: &str) -> Option<Vec<u8>> {
        let mut command = Command::new(self.site.cgi_bin(bus.name));
        command.env_clear().envs(bus.settings.iter().copied()).envs([self.site.store()]);
        command.env("GATEWAY_INTERFACE", "CGI/1.1").env("HTTP_HOST", "localhost");
        command.env("REQUEST_METHOD", method).env("QUERY_STRING", query);
        command.env("CONTENT_LENGTH", body.len().to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(self.folder.start_log());
        let mut child = command.spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(body.as_bytes());
        let output = child.wait_with_output().unwrap();
        output.status.success().then_some(output.stdout)
    }

    /// Whether a reply that is not the one hoped for is one that these faults may cause.
    fn pardon(&self, what: &str, status: u16, code: &str, asked: u64) {
        let now = self.month.now();
        let fits = match (status, code) {
            // The web server's own.
            (500.., "") => true,
            (409, "once_undecided") => true,
            (503, "memcached_unreachable" | "memcached_timeout") => self.memcached.is_some(),
            // Killed in the middle of an answer.
            (503, "memcached_broken") => self.plan.loses,
            (503, "store_busy") => self.memcached.is_none(),
            (503, "busy" | "outcome_unknown") => true,
            (503, "memcached_full") => self.plan.fills,
            _ => false,
        };
        if !fits {
            self.month.fail(format!("{:?}: {what} was answered {status} {code}", self.plan.front));
        }
        if self.plan.fills && ["memcached_full", "outcome_unknown"].contains(&code) {
            // An id may be used up.
            self.losses.lock().unwrap().push((asked, now));
        }
    }

    /// Joins, until that works: the reply, and when it was asked for; none where the run has failed.
    fn join(&self, bus: &Bus) -> Option<(Value, u64)> {
        loop {
            let asked = self.month.now();
            match self.ask(Way::Front, "GET", bus, "", "") {
                Some(reply) if reply.status == 200 => return Some((reply.json(), asked)),
                Some(reply) => self.pardon("a join", reply.status, &reply.outcome().1, asked),
                None => {}
            }
            if self.month.is_lost(|| format!("a join of {:?} {}", self.plan.front, bus.name)) {
                return None;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// One request to a FastCGI process: what it answered, if it did.
fn exchange(socket: &Path, method: &str, query: &str, body: &str) -> Option<Vec<u8>> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(&request(method, query, &[("HTTP_HOST", "localhost")], body.as_bytes())).ok()?;
    let (mut received, mut answer, mut buffer) = (vec![], vec![], vec![0; 65_536]);
    loop {
        while let Some((kind, _, content)) = take_record(&mut received) {
            match kind {
                STDOUT => answer.extend(content),
                END_REQUEST => return Some(answer),
                _ => {}
            }
        }
        match stream.read(&mut buffer).ok()? {
            0 => return None,
            length => received.extend_from_slice(&buffer[..length]),
        }
    }
}

/// One who publishes on a bus.
struct Publisher<'a> {
    at: &'a Deployment<'a>,
    bus: &'a Bus,
    number: u64,
    /// Sends everything again until it is answered.
    repeats: bool,
    random: Random,
    signer: Option<Signer>,
    joined: u64,
    /// Its newest id.
    newest: u64,
}

impl Publisher<'_> {
    fn join(&mut self) -> Option<()> {
        let (json, asked) = self.at.join(self.bus)?;
        let text = |name: &str| json[name].as_str().unwrap().to_owned();
        self.signer = Some(Signer { user: json["user"].as_u64().unwrap(), bus: text("bus"), secret: text("secret") });
        self.joined = asked;
        Some(())
    }

    /// Publishes until there are no faults any more, and then until it works: one message at least.
    fn work(mut self) -> Option<()> {
        let _stops = Stops(self.at.month);
        if self.bus.signed {
            self.join()?;
        }
        for send in 0.. {
            let last = self.at.month.is_calm();
            let size = match is_batcher(self.number) {
                true if self.random.percent(2) => limits::SLOT_MESSAGES,
                true => 1 + self.random.below(20),
                false => 1,
            };
            let keys: Vec<u64> = (0..size).map(|part| key(self.number, send, part)).collect();
            let answered = self.send(&keys);
            if self.at.month.is_lost(|| format!("publisher {} is answered", self.number)) || last && answered {
                break;
            }
            thread::sleep(self.random.millis(50, 400));
        }
        Some(())
    }

    fn target(&self, keys: &[u64], body: &str) -> String {
        let once = format!("k{}", keys[0]);
        let batch = if is_batcher(self.number) { "&batch=1" } else { "" };
        match &self.signer {
            Some(signer) => {
                let signed = if batch.is_empty() { body.to_owned() } else { format!("batch=1\n{body}") };
                format!("{}{batch}", signer.query(unix_millis(), &once, signed))
            }
            None if self.repeats => format!("user={}&once={once}{batch}", self.number),
            None => format!("user={}{batch}", self.number),
        }
    }

    /// Sends these messages, again and again or one time: whether they were acknowledged.
    fn send(&mut self, keys: &[u64]) -> bool {
        let (at, bus) = (self.at, self.bus);
        let texts: Vec<String> = keys.iter().map(|&key| text(key)).collect();
        let body = if is_batcher(self.number) { format!("{texts:?}") } else { format!("{:?}", texts[0]) };
        let (first, start) = (name(keys[0]), at.month.now());
        let mut answer: Option<Vec<u64>> = None;
        for tries in 0.. {
            let asked = at.month.now();
            let target = self.target(keys, &body);
            let way = self.random.choose(&[Way::Front, Way::Front, at.beside()]);
            at.month.repeated.fetch_add(usize::from(tries > 0), SeqCst);
            if !at.month.is_calm() && self.random.percent(3) {
                // Sent, and gone before the answer.
                let length = body.len().to_string();
                let target = format!("{}?{target}", bus.name);
                drop(at.site.open("POST", &target, &[("Content-Length", &length)], body.as_bytes()));
                at.month.count(Fault::Cut, 1);
            } else if let Some(reply) = at.ask(way, "POST", bus, &target, &body) {
                match reply.outcome() {
                    (200, _) => {
                        let json = reply.json();
                        let ids = json["ids"].as_array().cloned().unwrap_or_else(|| vec![json["id"].clone()]);
                        let ids: Vec<u64> = ids.iter().map(|id| id.as_u64().unwrap()).collect();
                        if answer.as_ref().is_some_and(|answer| *answer != ids) {
                            let what = format!("{} was answered {answer:?} and {ids:?}", first);
                            bus.log.lock().unwrap().excuses.push((what, start, at.month.now()));
                        }
                        let again = answer.is_none() && self.repeats && self.random.percent(10);
                        answer.get_or_insert(ids);
                        if !again {
                            break;
                        }
                    }
                    (409, code) if code == "once_expired" && at.month.now() - start >= bus.ttl * 1_000_000 => break,
                    (403, code) if code == "signature_wrong" && at.plan.loses => {
                        let what = format!("{}: signature_wrong", first);
                        bus.log.lock().unwrap().excuses.push((what, self.joined, at.month.now()));
                        if self.join().is_none() {
                            break;
                        }
                    }
                    (status, code) => at.pardon(&format!("{} by {way:?}", first), status, &code, asked),
                }
            }
            // What is sent again after the TTL is another message.
            let late = at.month.now() - start >= (bus.ttl - 1) * 1_000_000;
            if !self.repeats || late || at.month.is_lost(|| format!("{} is answered", first)) {
                break;
            }
            thread::sleep(self.random.millis(20, 300));
        }
        let mut log = bus.log.lock().unwrap();
        log.sends.insert(keys[0], Sent { start, end: at.month.now() });
        let Some(ids) = answer else { return false };
        if ids.len() != keys.len() || !ids.is_sorted_by(|a, b| a < b) || ids[0] <= self.newest {
            at.month.fail(format!("{} was answered {ids:?} behind {}", first, self.newest));
        }
        self.newest = *ids.last().unwrap();
        log.acks.extend(ids.into_iter().zip(keys).map(|(id, &key)| Ack { message: (id, key), start }));
        true
    }
}

impl Reader {
    /// Takes a message as a poll's array or a stream's event has it.
    fn hear(&mut self, bus: &Bus, message: &Value) -> Result<(), String> {
        let id = message["id"].as_u64().unwrap_or_default();
        let text_heard = message["data"].as_str().unwrap_or_default();
        let key = key_of(text_heard).filter(|&key| text(key) == text_heard);
        let key = key.ok_or_else(|| format!("{message} is no message of this test"))?;
        if id <= self.cursor {
            return Err(format!("{id}, {}, comes again, or behind {}", name(key), self.cursor));
        }
        let user = publisher_of(key);
        if !bus.signed && message["user"].as_u64() != Some(user) {
            return Err(format!("{message} is by another user"));
        }
        if self.kind == Kind::Own && user == bus.plain {
            return Err(format!("{message} is the reader's own"));
        }
        self.cursor = id;
        self.closed |= user == CLOSER;
        self.messages.push((id, key));
        Ok(())
    }
}

/// One who listens to a bus.
struct Listener<'a> {
    at: &'a Deployment<'a>,
    bus: &'a Bus,
    reader: Reader,
    random: Random,
}

impl Listener<'_> {
    fn fail(&self, what: &str) {
        self.at.month.fail(format!("{}, at {}: {what}", self.reader.name, self.reader.cursor));
    }

    /// Listens until the bus's last message.
    fn work(mut self) {
        let _stops = Stops(self.at.month);
        let Some((json, asked)) = self.at.join(self.bus) else { return };
        let id = json["id"].as_u64().unwrap();
        (self.reader.first, self.reader.cursor, self.reader.since) = (id, id, asked);
        // How many polls began after the last message was acknowledged.
        let mut polls = 0;
        while !self.reader.closed {
            if self.at.month.is_lost(|| format!("{} hears the last message", self.reader.name)) {
                break;
            }
            let closed = self.bus.closed.load(SeqCst);
            if self.reader.kind == Kind::Stream {
                self.stream();
            } else if self.poll() && closed {
                polls += 1;
                if polls == 2 && !self.reader.closed {
                    self.fail("two polls, and the last message is not there");
                }
            }
            thread::sleep(self.random.millis(30, 300));
            if self.reader.kind == Kind::Away && self.random.percent(10) {
                let until = self.at.month.now() + (self.bus.ttl + 2 + self.random.below(3)) * 1_000_000;
                while self.at.month.now() < until && !self.at.month.is_calm() && !self.at.month.failed.load(SeqCst) {
                    thread::sleep(Duration::from_millis(50));
                }
            }
        }
        self.bus.log.lock().unwrap().readers.push(self.reader);
    }

    /// Takes note that all up to the cursor is known as of `asked`: where it moved to the end, or where it stands there
    /// and the store cannot have lost what is behind it. A wait may be told what its process read before the store lost
    /// it.
    fn confirm(&mut self, before: u64, asked: u64) {
        let moved = self.reader.cursor > before && self.reader.kind != Kind::Wait;
        if moved || !self.at.lost(self.reader.since, self.at.month.now()) {
            self.reader.since = asked;
        }
    }

    /// Polls: whether there was an answer that had room for all.
    fn poll(&mut self) -> bool {
        let (asked, before) = (self.at.month.now(), self.reader.cursor);
        let mut query = format!("id={before}");
        match self.reader.kind {
            Kind::Own => query += &format!("&user={}", self.bus.plain),
            Kind::Wait => query += &format!("&wait={}", 1 + self.random.below(4)),
            _ => {}
        }
        let way = if self.reader.kind == Kind::Wait {
            Way::Front
        } else {
            self.random.choose(&[Way::Front, Way::Front, self.at.beside()])
        };
        let Some(reply) = self.at.ask(way, "GET", self.bus, &query, "") else { return false };
        if reply.status != 200 {
            self.at.pardon(&format!("a poll of {}", self.reader.name), reply.status, &reply.outcome().1, asked);
            return false;
        }
        let json = reply.json();
        let Some(messages) = json.as_array() else {
            self.fail(&format!("{json} is no page"));
            return false;
        };
        for message in messages {
            if let Err(what) = self.reader.hear(self.bus, message) {
                self.fail(&what);
            }
        }
        let told: u64 = reply.header("shortbus-last-id").and_then(|id| id.parse().ok()).unwrap_or_default();
        if told < self.reader.cursor {
            self.fail(&format!("the cursor goes back to {told}"));
        }
        if self.reader.kind != Kind::Array {
            self.reader.cursor = told;
        }
        let missed = reply.header("shortbus-missed").is_some();
        if missed {
            let (after, since, at) = (self.reader.cursor, self.reader.since, self.at.month.now());
            self.reader.missed.push(Missed { before, after, since, at });
        }
        let full = messages.len() as u64 > limits::REPLY_MESSAGES as u64 - 2 * limits::SLOT_MESSAGES
            || reply.body.len() > limits::REPLY_BYTES / 2;
        // Who goes by the array alone may be behind what is told.
        if !full && self.reader.cursor == told && !(missed && self.reader.cursor == before) {
            self.confirm(before, asked);
        }
        !full
    }

    /// Reads an event stream until it ends, or for a while.
    fn stream(&mut self) {
        let (asked, before) = (self.at.month.now(), self.reader.cursor);
        let id = before.to_string();
        let (query, header) = match self.random.percent(50) {
            true => (format!("id={id}&stream=1"), None),
            false => ("stream=1".to_owned(), Some(("Last-Event-ID", &id[..]))),
        };
        let target = format!("{}?{query}", self.bus.name);
        let headers: Vec<(&str, &str)> = header.into_iter().collect();
        let Some(mut connection) = self.at.site.open("GET", &target, &headers, b"") else { return };
        let until = asked + (1 + self.random.below(14)) * 1_000_000;
        let (mut events, mut buffer) = (Events::default(), vec![0; 65_536]);
        let (mut opening, mut missed) = (true, None);
        while let Ok(length @ 1..) = connection.read(&mut buffer) {
            events.feed(&buffer[..length]);
            while let Some(event) = events.next() {
                match event.name.as_str() {
                    "missed" => {
                        let (cursor, since, at) = (self.reader.cursor, self.reader.since, self.at.month.now());
                        missed = Some(self.reader.missed.len());
                        self.reader.missed.push(Missed { before: cursor, after: cursor, since, at });
                    }
                    "unavailable" => {
                        let error: Value = serde_json::from_str(&event.data).unwrap_or_default();
                        let code = error["error"].as_str().unwrap_or("no error at all");
                        self.at.pardon(&format!("a stream of {}", self.reader.name), 503, code, asked);
                    }
                    "" if event.data.is_empty() => {}
                    "" => {
                        let message = serde_json::from_str(&event.data).unwrap_or_default();
                        let heard = self.reader.hear(self.bus, &message);
                        if let Err(what) = heard {
                            self.fail(&what);
                        } else if event.id != Some(self.reader.cursor) {
                            self.fail(&format!("the event's id is {:?}", event.id));
                        }
                    }
                    "cursor" => {
                        let id = event.id.unwrap_or_default();
                        if id < self.reader.cursor {
                            self.fail(&format!("the cursor goes back to {id}"));
                        }
                        self.reader.cursor = id;
                    }
                    name => self.fail(&format!("an event {name}")),
                }
                if let Some(missed) = missed {
                    self.reader.missed[missed].after = self.reader.cursor;
                }
                if event.name == "cursor" {
                    let first = std::mem::take(&mut opening);
                    if first
                        && events.bytes < limits::REPLY_BYTES / 8
                        && !(missed.is_some() && self.reader.cursor == before)
                    {
                        self.confirm(before, asked);
                    }
                    missed = None;
                }
            }
            if self.reader.closed || self.at.month.failed.load(SeqCst) {
                return;
            }
            if self.at.month.now() > until {
                self.at.month.count(Fault::Cut, 1);
                return;
            }
        }
        if let Some((status, body)) = events.refusal() {
            let code = serde_json::from_slice::<Value>(body).unwrap_or_default();
            self.at.pardon(
                &format!("a stream of {}", self.reader.name),
                status,
                code["error"].as_str().unwrap_or(""),
                asked,
            );
        }
    }
}

/// A reply with an event stream, as it comes.
#[derive(Default)]
struct Events {
    raw: Vec<u8>,
    /// Without the chunks' lengths.
    text: Vec<u8>,
    status: u16,
    chunked: bool,
    /// Of text, so far.
    bytes: usize,
}

#[derive(Default)]
struct Event {
    name: String,
    id: Option<u64>,
    data: String,
}

impl Events {
    fn feed(&mut self, bytes: &[u8]) {
        self.raw.extend_from_slice(bytes);
        if self.status == 0
            && let Some(end) = self.raw.windows(4).position(|four| four == b"\r\n\r\n")
        {
            let head = String::from_utf8_lossy(&self.raw[..end]).to_ascii_lowercase();
            self.status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(599);
            self.chunked = head.contains("\r\ntransfer-encoding: chunked");
            self.raw.drain(..end + 4);
        }
        let before = self.text.len();
        if self.status > 0 && !self.chunked {
            self.text.append(&mut self.raw);
        }
        while self.chunked
            && let Some(line) = self.raw.windows(2).position(|two| two == b"\r\n")
        {
            let size = String::from_utf8_lossy(&self.raw[..line]).into_owned();
            let end = line + 2 + usize::from_str_radix(&size, 16).expect("a chunk's size");
            if self.raw.len() < end + 2 {
                break;
            }
            self.text.extend_from_slice(&self.raw[line + 2..end]);
            self.raw.drain(..end + 2);
        }
        self.bytes += self.text.len() - before;
    }

    /// The next event, all of it.
    fn next(&mut self) -> Option<Event> {
        let end = self.text.windows(2).position(|two| two == b"\n\n").filter(|_| self.status == 200)?;
        let lines = String::from_utf8(self.text.drain(..end + 2).collect()).expect("UTF-8");
        let mut event = Event::default();
        for (field, value) in lines.lines().filter_map(|line| line.split_once(": ")) {
            match field {
                "event" => event.name = value.into(),
                "id" => event.id = value.parse().ok(),
                "data" if event.data.is_empty() => event.data = value.into(),
                "data" => event.data += &format!("\n{value}"),
                _ => {}
            }
        }
        Some(event)
    }

    /// Status and body of a reply that is no stream.
    fn refusal(&self) -> Option<(u16, &[u8])> {
        (![0, 200].contains(&self.status)).then_some((self.status, &self.text))
    }
}

/// What came of it.
#[derive(Default)]
struct Tally {
    acknowledged: usize,
    heard: usize,
    /// Messages that a reader was told it missed, which others heard or their publishers were told of.
    passed: usize,
    missed: BTreeMap<&'static str, usize>,
    readers: usize,
}

impl Deployment<'_> {
    fn check(&self, bus: &Bus, tally: &mut Tally) {
        let log = bus.log.lock().unwrap();
        let fail = |what: String| self.month.fail(format!("{:?} {}: {what}", self.plan.front, bus.name));
        let mut known = BTreeMap::new();
        let heard = log.readers.iter().flat_map(|reader| &reader.messages);
        for &(id, key) in log.acks.iter().map(|ack| &ack.message).chain(heard) {
            let other = *known.entry(id).or_insert(key);
            if other != key {
                fail(format!("{id} is two messages, {} and {}", name(other), name(key)));
            }
        }
        for (what, from, to) in &log.excuses {
            if !self.lost(*from, *to) {
                fail(format!("{what}, though the store lost nothing"));
            }
        }
        self.check_once(&log, &known, &fail);
        let mut starts: Vec<(u64, u64)> = log.acks.iter().map(|ack| (ack.message.0, ack.start)).collect();
        starts.sort_unstable();
        for reader in &log.readers {
            for missed in &reader.missed {
                // What is behind a message was published after that was sent.
                let before = starts.partition_point(|(id, _)| *id <= missed.before).checked_sub(1);
                let since = before.map_or(0, |before| starts[before].1).max(missed.since);
                let why = match missed.at - since >= bus.ttl * 1_000_000 {
                    _ if self.lost(since, missed.at) => "the store lost some",
                    true => "away for longer than the TTL",
                    false => {
                        let Missed { before, after, at, .. } = missed;
                        fail(format!(
                            "{} was told at {at} us that {before} to {after} were missed, but none since {since}",
                            reader.name
                        ));
                        "nobody knows"
                    }
                };
                *tally.missed.entry(why).or_default() += 1;
            }
            self.check_reader(reader, bus, &known, tally, &fail);
        }
        tally.acknowledged += log.acks.len();
        tally.readers += log.readers.len();
    }

    /// No message is there twice, unless the store lost that it was there.
    fn check_once(&self, log: &Log, known: &BTreeMap<u64, u64>, fail: &impl Fn(String)) {
        let mut ids = BTreeMap::new();
        for (&id, &key) in known {
            let Some(first) = ids.insert(key, id) else { continue };
            let sent = log.sends.get(&(key >> 16 << 16));
            if !sent.is_some_and(|sent| self.lost(sent.start, sent.end + STRAGGLES)) {
                fail(format!("{} is {first} and {id}, though the store lost nothing", name(key)));
            }
        }
    }

    /// A reader heard all that it was not told it missed.
    fn check_reader(
        &self,
        reader: &Reader,
        bus: &Bus,
        known: &BTreeMap<u64, u64>,
        tally: &mut Tally,
        fail: &impl Fn(String),
    ) {
        tally.heard += reader.messages.len();
        let mut heard = reader.messages.iter().peekable();
        let mut lost = 0;
        for (&id, &key) in known.range((Excluded(reader.first), Included(reader.cursor))) {
            if heard.next_if(|(next, _)| *next == id).is_some() {
                continue;
            }
            if reader.kind == Kind::Own && publisher_of(key) == bus.plain {
                continue;
            }
            if reader.missed.iter().any(|missed| missed.before < id && id <= missed.after) {
                tally.passed += 1;
                continue;
            }
            lost += 1;
            if lost <= 5 {
                fail(format!("LOST: {} never heard {id}, {}", reader.name, name(key)));
            }
        }
    }

    fn kinds(&self, bus: &Bus) -> Vec<Kind> {
        let mut kinds = vec![Kind::Header, Kind::Array];
        if self.plan.waits() {
            kinds.extend([Kind::Wait, Kind::Stream]);
        }
        if !bus.signed {
            kinds.push(Kind::Own);
        }
        if bus.ttl == BRIEF {
            kinds.push(Kind::Away);
        }
        kinds
    }

    fn listener<'b>(&'b self, bus: &'b Bus, kind: Kind, number: u64) -> Listener<'b> {
        let name = format!("{:?} {} {kind:?}", self.plan.front, bus.name);
        let reader =
            Reader { name, kind, first: 0, cursor: 0, since: 0, messages: vec![], missed: vec![], closed: false };
        Listener { at: self, bus, reader, random: Random(self.month.seed << 20 | 0x10000 | number) }
    }

    fn publisher<'b>(&'b self, bus: &'b Bus, number: u64) -> Publisher<'b> {
        let random = Random(self.month.seed << 20 | 0x20000 | number);
        let repeats = !number.is_multiple_of(3);
        Publisher { at: self, bus, number, repeats, random, signer: None, joined: 0, newest: 0 }
    }

    /// Publishes a bus's last message.
    fn close(&self, bus: &Bus) -> Option<()> {
        let mut closer = Publisher { repeats: true, ..self.publisher(bus, CLOSER) };
        if bus.signed {
            closer.join()?;
        }
        for send in 0.. {
            if closer.send(&[key(CLOSER, send, 0)])
                || self.month.is_lost(|| format!("the last message of {}", bus.name))
            {
                break;
            }
        }
        bus.closed.store(true, SeqCst);
        Some(())
    }

    /// Asks all processes to end, which they do.
    fn end(&self) {
        let pids = self.processes();
        signal("TERM", &pids);
        wait_for("the processes to end", || !self.processes().iter().any(|pid| pids.contains(pid)));
    }
}

fn run(month: &Month, sites: &[Deployment], duration: Duration) {
    thread::scope(|scope| {
        let _stops = Stops(month);
        let (mut tormentors, mut publishers) = (vec![], vec![]);
        let mut number = 0;
        for (n, site) in sites.iter().enumerate() {
            for bus in &site.buses {
                for kind in site.kinds(bus) {
                    number += 1;
                    let listener = site.listener(bus, kind, number);
                    scope.spawn(move || listener.work());
                }
                publishers.extend((bus.plain..bus.plain + 3).map(|number| {
                    let publisher = site.publisher(bus, number);
                    scope.spawn(move || publisher.work())
                }));
            }
            tormentors.push(scope.spawn(move || site.torment(Random(month.seed << 20 | n as u64))));
        }
        let end = Instant::now() + duration;
        while Instant::now() < end && !month.failed.load(SeqCst) {
            thread::sleep(Duration::from_millis(50));
        }
        month.over.store(true, SeqCst);
        tormentors.into_iter().for_each(|tormentor| tormentor.join().unwrap());
        month.calm.store(month.now(), SeqCst);
        for publisher in publishers {
            publisher.join().unwrap();
        }
        for site in sites {
            for bus in &site.buses {
                site.close(bus);
            }
        }
    });
}

#[test]
fn nothing_is_lost_in_a_month() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let seed = number("TEST_SEED").unwrap_or_else(|| unix_millis() % 1_000_000);
    let month = Month {
        seed,
        began: Instant::now(),
        over: AtomicBool::new(false),
        calm: AtomicU64::new(u64::MAX),
        failed: AtomicBool::new(false),
        violations: Mutex::default(),
        faults: Mutex::default(),
        repeated: AtomicUsize::new(0),
        unanswered: AtomicUsize::new(0),
    };
    println!("TEST_SEED={seed}");
    let sites: Vec<Deployment> =
        PLANS.iter().enumerate().map(|(number, plan)| Deployment::start(&month, number, plan)).collect();
    run(&month, &sites, Duration::from_secs(number("TEST_MONTH").unwrap_or(SHORT)));

    let mut tally = Tally::default();
    for site in &sites {
        site.look();
        site.buses.iter().for_each(|bus| site.check(bus, &mut tally));
        let log = site.site.log() + &site.folder.text("start.log");
        log.lines().filter(|line| line.contains("panicked")).for_each(|line| month.fail(line.into()));
    }
    println!("{} s, {} sites, faults: {:?}", month.now() / 1_000_000, sites.len(), month.faults.lock().unwrap());
    println!(
        "{} messages acknowledged; {} heard by {} readers; {} sends repeated, {} requests without an answer",
        tally.acknowledged,
        tally.heard,
        tally.readers,
        month.repeated.load(SeqCst),
        month.unanswered.load(SeqCst),
    );
    println!("told that some were missed: {:?}, in all {} messages", tally.missed, tally.passed);
    let violations = month.violations.lock().unwrap();
    println!("violations: {}", violations.len());
    let first = violations.first().cloned();
    if first.is_some() {
        keep_folders();
        sites.iter().for_each(|site| println!("kept: {} {}", site.root.display(), site.folder.path().display()));
        violations.iter().take(30).for_each(|violation| println!("{violation}"));
    } else {
        sites.iter().for_each(Deployment::end);
    }
    drop(sites);
    assert_eq!(first, None, "TEST_SEED={seed}");
}
