//! The promise on the real thing: an acknowledged message reaches every poller exactly once, and all in one order.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::fixtures::fronts::Front;
use crate::fixtures::memcached::Memcached;
use crate::fixtures::signer::unix_millis;
use crate::fixtures::site::{Site, on_the_local_store};

const PUBLISHERS: usize = 16;
const POLLERS: usize = 8;
const MESSAGES: usize = 30;
/// What each publisher sends in all where it sends everything twice, and for how long some are killed.
const SENDS: usize = 30;
/// Messages in each of them in turn: those of more than one are a batch.
const SIZES: [usize; 5] = [1, 2, 16, 1, 256];
const KILLING: Duration = Duration::from_secs(4);

/// A message as heard: its id, and what it says.
type Heard = Vec<(u64, String)>;

/// Polls once: half of the pollers go by `Shortbus-Last-Id`, the others know only the array.
fn poll(site: &Site, knows_header: bool, cursor: &mut u64, heard: &mut Heard) -> usize {
    let reply = site.get(&format!("chat?id={cursor}"));
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("shortbus-missed"), None);
    let json = reply.json();
    let messages = json.as_array().unwrap();
    for message in messages {
        *cursor = message["id"].as_u64().unwrap();
        heard.push((*cursor, message["data"].as_str().unwrap().into()));
    }
    if knows_header {
        *cursor = reply.header("shortbus-last-id").unwrap().parse().unwrap();
    }
    messages.len()
}

/// The processes that are publishing on this site just now.
fn publishing(site: &Site) -> Vec<String> {
    let bus = fs::metadata(site.cgi_bin("chat")).unwrap().ino();
    let pids = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let is_publisher = |pid: &String| {
        let process = Path::new("/proc").join(pid);
        fs::metadata(process.join("exe")).is_ok_and(|exe| exe.ino() == bus)
            && fs::read(process.join("environ"))
                .is_ok_and(|environ| environ.split(|&byte| byte == 0).any(|pair| pair == b"REQUEST_METHOD=POST"))
    };
    pids.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).filter(is_publisher).collect()
}

/// Kills two of them at most: how many it were.
fn kill_some(site: &Site) -> usize {
    let kill =
        |pid: &&String| Command::new("kill").args(["-KILL", pid]).stderr(Stdio::null()).status().unwrap().success();
    publishing(site).iter().step_by(3).take(2).filter(kill).count()
}

/// Publishes so many messages, and notes the id of each that is acknowledged.
fn publish_some(site: &Site, publisher: usize, acknowledged: &Mutex<BTreeMap<u64, String>>) {
    for n in 0..MESSAGES {
        let text = format!("{publisher}-{n}");
        let reply = site.post(&format!("chat?user={publisher}"), format!("\"{text}\""));
        if reply.status == 200 {
            let id = reply.json()["id"].as_u64().unwrap();
            assert_eq!(acknowledged.lock().unwrap().insert(id, text), None, "an id twice");
        }
    }
}

/// Polls until all publishers are done, and once more.
fn hear_all(site: &Site, knows_header: bool, start: u64, working: &AtomicUsize) -> Heard {
    let (mut cursor, mut heard) = (start, Vec::new());
    loop {
        let last_round = working.load(Ordering::SeqCst) == 0;
        if poll(site, knows_header, &mut cursor, &mut heard) == 0 && last_round {
            return heard;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Kills publishers wherever they are: how many it were. The store is held now and then, so that some are caught between
/// a write and its reply.
fn kill_here_and_there(site: &Site, over: &AtomicBool) -> usize {
    let mut killed = 0;
    for round in 0.. {
        if over.load(Ordering::SeqCst) {
            break;
        }
        let pause = round % 2 == 0;
        let hold = pause.then(|| site.hold());
        if pause {
            thread::sleep(Duration::from_millis(round % 7 * 3));
        }
        killed += kill_some(site);
        drop(hold);
        thread::sleep(Duration::from_millis(20));
    }
    killed
}

#[test]
fn every_acknowledged_message_reaches_every_poller_once_and_in_one_order() {
    all_hear_what_is_acknowledged();
}

#[test]
fn on_the_local_store_every_acknowledged_message_reaches_every_poller_once_and_in_one_order() {
    on_the_local_store(all_hear_what_is_acknowledged);
}

fn all_hear_what_is_acknowledged() {
    let site = Site::start(Front::ApacheCgid);
    site.copy("chat");
    site.foresee_kills();
    let (_, start) = site.join("chat");
    let acknowledged = Mutex::new(BTreeMap::new());
    let (working, over) = (AtomicUsize::new(PUBLISHERS), AtomicBool::new(false));
    let (all_heard, killed) = thread::scope(|scope| {
        let (site, acknowledged, working, over) = (&site, &acknowledged, &working, &over);
        for publisher in 0..PUBLISHERS {
            scope.spawn(move || {
                publish_some(site, publisher, acknowledged);
                working.fetch_sub(1, Ordering::SeqCst);
            });
        }
        let killer = scope.spawn(|| kill_here_and_there(site, over));
        let hear = |n| scope.spawn(move || hear_all(site, n % 2 == 0, start, working));
        let pollers: Vec<_> = (0..POLLERS).map(hear).collect();
        let all_heard: Vec<Heard> = pollers.into_iter().map(|poller| poller.join().unwrap()).collect();
        over.store(true, Ordering::SeqCst);
        (all_heard, killer.join().unwrap())
    });
    assert_enough_were_killed(&acknowledged.lock().unwrap(), &all_heard, killed);
    assert_all_were_heard(&acknowledged.into_inner().unwrap(), &all_heard);
}

fn assert_enough_were_killed(acknowledged: &BTreeMap<u64, String>, all_heard: &[Heard], killed: usize) {
    let (total, answered, heard) = (PUBLISHERS * MESSAGES, acknowledged.len(), all_heard[0].len());
    println!("{answered} of {total} acknowledged, {heard} heard, {killed} publishers killed");
    assert!(killed > 0 && answered < total, "none was killed");
    assert!(answered > total / 2, "too many were killed to prove anything");
}

fn assert_all_were_heard(acknowledged: &BTreeMap<u64, String>, all_heard: &[Heard]) {
    let first = &all_heard[0];
    assert!(first.windows(2).all(|pair| pair[0].0 < pair[1].0), "ids rise");
    assert!(all_heard.iter().all(|heard| heard == first), "all hear the same, in the same order");
    let texts: std::collections::HashSet<&String> = first.iter().map(|(_, text)| text).collect();
    assert_eq!(texts.len(), first.len(), "none is heard twice");
    let by_id: BTreeMap<u64, String> = first.iter().cloned().collect();
    for (id, text) in acknowledged {
        assert_eq!(by_id.get(id), Some(text), "acknowledged as {id}");
    }
}

#[test]
fn every_send_made_twice_and_again_until_answered_is_one_message_on_an_open_bus() {
    every_send_is_one_message(false);
}

#[test]
fn every_send_made_twice_and_again_until_answered_is_one_message_on_a_signed_bus() {
    every_send_is_one_message(true);
}

#[test]
fn on_the_local_store_every_send_made_twice_and_again_until_answered_is_one_message() {
    on_the_local_store(|| every_send_is_one_message(false));
    on_the_local_store(|| every_send_is_one_message(true));
}

/// Makes one request again and again until it is answered: the ids, and how often it was made again.
fn send_until_answered(site: &Site, target: &str, body: &str, started: Instant) -> (Vec<u64>, usize) {
    for again in 0.. {
        let reply = site.post(target, body);
        match reply.outcome() {
            (200, _) => {
                let json = reply.json();
                let ids = json["ids"].as_array().cloned().unwrap_or_else(|| vec![json["id"].clone()]);
                return (ids.iter().map(|id| id.as_u64().unwrap()).collect(), again);
            }
            // The web server's own answer: the process was killed.
            (500, code) if code.is_empty() => {}
            // The first request is at work, or was killed.
            (409, code) if code == "once_undecided" => thread::sleep(Duration::from_millis(200)),
            // Its outcome is unknown, for one.
            (503, _) => {}
            _ => panic!("{reply:?}"),
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{reply:?}");
    }
    unreachable!()
}

/// What those who send everything twice share.
struct Senders<'a> {
    site: &'a Site,
    signed: bool,
    started: Instant,
    /// Each message, by the id under which it was answered.
    told: Mutex<BTreeMap<u64, String>>,
    again: AtomicUsize,
    working: AtomicUsize,
}

impl Senders<'_> {
    fn send(&self, target: &str, body: &str) -> Vec<u64> {
        let (ids, again) = send_until_answered(self.site, target, body, self.started);
        self.again.fetch_add(again, Ordering::SeqCst);
        ids
    }

    /// Sends at the same moment, or one right after the other.
    fn send_twice(&self, target: &str, body: &str, together: bool) -> [Vec<u64>; 2] {
        if !together {
            return [self.send(target, body), self.send(target, body)];
        }
        thread::scope(|scope| {
            let twin = scope.spawn(|| self.send(target, body));
            [self.send(target, body), twin.join().unwrap()]
        })
    }

    fn send_some(&self, publisher: usize) {
        let signer = self.signed.then(|| self.site.join_signed("chat"));
        for n in 0..SENDS {
            let once = format!("k{n}");
            let size = SIZES[n % SIZES.len()];
            let texts: Vec<String> = (0..size).map(|part| format!("{publisher}-{n}-{part}")).collect();
            let (body, batch) =
                if size == 1 { (format!("{:?}", texts[0]), "") } else { (format!("{texts:?}"), "&batch=1") };
            let target = match &signer {
                Some(signer) => {
                    let text = if batch.is_empty() { body.clone() } else { format!("batch=1\n{body}") };
                    format!("chat?{}{batch}", signer.query(unix_millis(), &once, text))
                }
                None => format!("chat?user={publisher}&once={once}{batch}"),
            };
            let [ids, twice] = self.send_twice(&target, &body, n % 2 == 0);
            assert_eq!((&ids, ids.len()), (&twice, texts.len()), "{once}");
            let mut told = self.told.lock().unwrap();
            ids.into_iter().zip(texts).for_each(|(id, text)| assert_eq!(told.insert(id, text), None, "an id twice"));
        }
        self.working.fetch_sub(1, Ordering::SeqCst);
    }

    /// Kills some, only for a while, so that all come to an end: each one killed may cost a publisher the lease. While
    /// the store is held, all are between a write and its reply.
    fn kill_for_a_while(&self) -> usize {
        let mut killed = 0;
        for round in 0.. {
            if self.working.load(Ordering::SeqCst) == 0 || self.started.elapsed() > KILLING {
                break;
            }
            let hold = self.site.hold();
            thread::sleep(Duration::from_millis(5 + round % 4 * 5));
            killed += kill_some(self.site);
            drop(hold);
            thread::sleep(Duration::from_millis(40));
        }
        killed
    }
}

fn every_send_is_one_message(signed: bool) {
    let settings: &[(&str, &str)] = if signed { &[("SHORTBUS_AUTH", "signed")] } else { &[] };
    let site = Site::with(Front::ApacheCgid, &[("chat", settings)]);
    site.foresee_kills();
    let (_, start) = site.join("chat");
    let senders = Senders {
        site: &site,
        signed,
        started: Instant::now(),
        told: Mutex::default(),
        again: AtomicUsize::new(0),
        working: AtomicUsize::new(PUBLISHERS),
    };
    let killed = thread::scope(|scope| {
        let senders = &senders;
        (0..PUBLISHERS).for_each(|publisher| drop(scope.spawn(move || senders.send_some(publisher))));
        senders.kill_for_a_while()
    });
    let (mut cursor, mut heard) = (start, Vec::new());
    while poll(&site, true, &mut cursor, &mut heard) > 0 {}
    let (again, took) = (senders.again.into_inner(), senders.started.elapsed());
    println!("{} heard, {killed} killed, {again} requests made again, {took:?}", heard.len());
    let told = senders.told.into_inner().unwrap();
    assert_eq!(told.len(), PUBLISHERS * SENDS / SIZES.len() * SIZES.iter().sum::<usize>());
    assert_eq!(heard, told.into_iter().collect::<Heard>());
    assert!(killed >= 10, "too few were killed to prove anything");
}

/// The value of a counter and its token, as memcached answers one read.
fn read_counter(reader: &mut BufReader<UnixStream>) -> (u64, u64) {
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    };
    let token = line().rsplit_once(" c").expect("VA <length> c<token>").1.parse().unwrap();
    (line().parse().unwrap(), token)
}

fn increment_until(over: &AtomicBool, mut stream: UnixStream) {
    let mut answer = [0; 4];
    while !over.load(Ordering::Relaxed) {
        stream.write_all(b"ma last\r\n").unwrap();
        stream.read_exact(&mut answer).unwrap();
    }
}

/// What many reads of a counter, in pairs, came to.
#[derive(Default)]
struct Reads {
    /// Value less token, which stays: every increment adds one to both.
    truth: Option<u64>,
    agreed: usize,
    torn: usize,
}

fn read_in_pairs(mut stream: UnixStream) -> Reads {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let apart = |(value, token): (u64, u64)| value.wrapping_sub(token);
    let mut reads = Reads::default();
    for _ in 0..100_000 {
        stream.write_all(b"mg last v c\r\nmg last v c\r\n").unwrap();
        let (one, two) = (read_counter(&mut reader), read_counter(&mut reader));
        if one == two {
            reads.agreed += 1;
            assert_eq!(apart(one), *reads.truth.get_or_insert(apart(one)), "torn twice in the same way");
        }
        reads.torn += usize::from(reads.truth.is_some_and(|truth| apart(one) != truth));
    }
    reads
}

/// memcached's incr hands the new token to one who is just reading the old value. Two reads that agree are true.
#[test]
fn a_counter_that_reads_twice_the_same_is_not_torn() {
    let memcached = Memcached::start(&[]);
    memcached.ask("ms last 2\r\n10\r\n");
    let connect = || UnixStream::connect(&memcached.address).unwrap();
    let over = AtomicBool::new(false);
    let [one, two] = thread::scope(|scope| {
        (0..2).for_each(|_| drop(scope.spawn(|| increment_until(&over, connect()))));
        let readers = [(); 2].map(|()| scope.spawn(|| read_in_pairs(connect())));
        let reads = readers.map(|reader| reader.join());
        over.store(true, Ordering::Relaxed);
        reads.map(Result::unwrap)
    });
    assert!(one.truth.is_some() && one.truth == two.truth, "{:?} {:?}", one.truth, two.truth);
    println!("{} of 200000 single reads torn, {} pairs agree", one.torn + two.torn, one.agreed + two.agreed);
}
