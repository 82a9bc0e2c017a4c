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
use crate::fixtures::site::Site;

const PUBLISHERS: usize = 16;
const POLLERS: usize = 8;
const MESSAGES: usize = 30;
/// What each publisher sends in all where it sends everything twice, and for how long some are killed.
const SENDS: usize = 30;
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

#[test]
fn every_acknowledged_message_reaches_every_poller_once_and_in_one_order() {
    let site = Site::start(Front::ApacheCgid);
    site.copy("chat");
    site.foresee_kills();
    let (_, start) = site.join("chat");
    let acknowledged = Mutex::new(BTreeMap::new());
    let (working, killed) = (AtomicUsize::new(PUBLISHERS), AtomicUsize::new(0));
    let over = AtomicBool::new(false);
    let mut all_heard: Vec<Heard> = Vec::new();
    thread::scope(|scope| {
        for publisher in 0..PUBLISHERS {
            let (site, acknowledged, working) = (&site, &acknowledged, &working);
            scope.spawn(move || {
                for n in 0..MESSAGES {
                    let text = format!("{publisher}-{n}");
                    let reply = site.post(&format!("chat?user={publisher}"), format!("\"{text}\""));
                    if reply.status == 200 {
                        let id = reply.json()["id"].as_u64().unwrap();
                        assert_eq!(acknowledged.lock().unwrap().insert(id, text), None, "an id twice");
                    }
                }
                working.fetch_sub(1, Ordering::SeqCst);
            });
        }
        // Kills publishers wherever they are; memcached pauses now and then, so that some are caught between a
        // write and its reply.
        let killer = scope.spawn(|| {
            for round in 0.. {
                if over.load(Ordering::SeqCst) {
                    break;
                }
                let pause = round % 2 == 0;
                if pause {
                    site.memcached.signal("STOP");
                    thread::sleep(Duration::from_millis(round % 7 * 3));
                }
                killed.fetch_add(kill_some(&site), Ordering::SeqCst);
                if pause {
                    site.memcached.signal("CONT");
                }
                thread::sleep(Duration::from_millis(20));
            }
        });
        let pollers: Vec<_> = (0..POLLERS)
            .map(|n| {
                let (site, working) = (&site, &working);
                scope.spawn(move || {
                    let (mut cursor, mut heard) = (start, Vec::new());
                    loop {
                        let last_round = working.load(Ordering::SeqCst) == 0;
                        if poll(site, n % 2 == 0, &mut cursor, &mut heard) == 0 && last_round {
                            return heard;
                        }
                        thread::sleep(Duration::from_millis(5));
                    }
                })
            })
            .collect();
        all_heard = pollers.into_iter().map(|poller| poller.join().unwrap()).collect();
        over.store(true, Ordering::SeqCst);
        killer.join().unwrap();
    });
    let acknowledged = acknowledged.into_inner().unwrap();
    let total = PUBLISHERS * MESSAGES;
    let killed = killed.into_inner();
    println!(
        "{} of {total} acknowledged, {} heard, {killed} publishers killed",
        acknowledged.len(),
        all_heard[0].len()
    );
    assert!(killed > 0 && acknowledged.len() < total, "none was killed");
    assert!(acknowledged.len() > total / 2, "too many were killed to prove anything");
    let first = &all_heard[0];
    assert!(first.windows(2).all(|pair| pair[0].0 < pair[1].0), "ids rise");
    assert!(all_heard.iter().all(|heard| heard == first), "all hear the same, in the same order");
    let texts: std::collections::HashSet<&String> = first.iter().map(|(_, text)| text).collect();
    assert_eq!(texts.len(), first.len(), "none is heard twice");
    let by_id: BTreeMap<u64, String> = first.iter().cloned().collect();
    for (id, text) in &acknowledged {
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

fn every_send_is_one_message(signed: bool) {
    let settings: &[(&str, &str)] = if signed { &[("SHORTBUS_AUTH", "signed")] } else { &[] };
    let site = Site::with(Front::ApacheCgid, &[("chat", settings)]);
    site.foresee_kills();
    let (_, start) = site.join("chat");
    let (working, killed, again) = (AtomicUsize::new(PUBLISHERS), AtomicUsize::new(0), AtomicUsize::new(0));
    let told = Mutex::new(BTreeMap::new());
    let started = Instant::now();
    // One request, made again until it is answered: the id.
    let ask = |target: &str, body: &str| loop {
        let reply = site.post(target, body);
        match reply.outcome() {
            (200, _) => return reply.json()["id"].as_u64().unwrap(),
            // It was killed; or its first is at work, or was killed; or its end is unknown.
            (500, code) if code.is_empty() => {}
            (409, code) if code == "once_undecided" => thread::sleep(Duration::from_millis(200)),
            (503, _) => {}
            _ => panic!("{reply:?}"),
        }
        again.fetch_add(1, Ordering::SeqCst);
        assert!(started.elapsed() < Duration::from_secs(60), "{reply:?}");
    };
    thread::scope(|scope| {
        for publisher in 0..PUBLISHERS {
            let (site, told, working, ask) = (&site, &told, &working, &ask);
            scope.spawn(move || {
                let signer = signed.then(|| site.join_signed("chat"));
                for n in 0..SENDS {
                    let (text, once) = (format!("{publisher}-{n}"), format!("k{n}"));
                    let body = format!("\"{text}\"");
                    let target = match &signer {
                        Some(signer) => format!("chat?{}", signer.query(unix_millis(), &once, &body)),
                        None => format!("chat?user={publisher}&once={once}"),
                    };
                    // At the same moment, and one right after the other.
                    let ids = match n % 2 {
                        0 => thread::scope(|both| {
                            let twin = both.spawn(|| ask(&target, &body));
                            [ask(&target, &body), twin.join().unwrap()]
                        }),
                        _ => [ask(&target, &body), ask(&target, &body)],
                    };
                    assert_eq!(ids[0], ids[1], "{text}");
                    assert_eq!(told.lock().unwrap().insert(ids[0], text), None, "an id twice");
                }
                working.fetch_sub(1, Ordering::SeqCst);
            });
        }
        // Only for a while, so that all come to an end: each one killed may cost a publisher the lease. While
        // memcached stops, all are between a write and its reply.
        scope.spawn(|| {
            for round in 0.. {
                if working.load(Ordering::SeqCst) == 0 || started.elapsed() > KILLING {
                    break;
                }
                site.memcached.signal("STOP");
                thread::sleep(Duration::from_millis(5 + round % 4 * 5));
                killed.fetch_add(kill_some(&site), Ordering::SeqCst);
                site.memcached.signal("CONT");
                thread::sleep(Duration::from_millis(40));
            }
        });
    });
    let (mut cursor, mut heard) = (start, Vec::new());
    while poll(&site, true, &mut cursor, &mut heard) > 0 {}
    let (told, killed) = (told.into_inner().unwrap(), killed.into_inner());
    println!(
        "{} heard, {killed} killed, {} requests made again, {:?}",
        heard.len(),
        again.into_inner(),
        started.elapsed()
    );
    assert_eq!(told.len(), PUBLISHERS * SENDS);
    assert_eq!(heard, told.into_iter().collect::<Heard>());
    assert!(killed >= 10, "too few were killed to prove anything");
}

/// memcached's incr hands the new token to one who is just reading the old value. Two reads that agree are true.
#[test]
fn a_counter_that_reads_twice_the_same_is_not_torn() {
    let memcached = Memcached::start(&[]);
    memcached.ask("ms last 2\r\n10\r\n");
    let read = |line: &mut String, reader: &mut BufReader<UnixStream>| -> (u64, u64) {
        line.clear();
        reader.read_line(line).unwrap();
        let token = line.trim_end().rsplit_once(" c").expect("VA <length> c<token>").1.parse().unwrap();
        line.clear();
        reader.read_line(line).unwrap();
        (line.trim_end().parse().unwrap(), token)
    };
    // Every increment adds one to the value and one to the token: what lies between them stays.
    let apart = |(value, token): (u64, u64)| value.wrapping_sub(token);
    let connect = || UnixStream::connect(&memcached.address).unwrap();
    let over = AtomicBool::new(false);
    let (torn, agreed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut stream = connect();
                let mut answers = [0; 4];
                while !over.load(Ordering::Relaxed) {
                    stream.write_all(b"ma last\r\n").unwrap();
                    stream.read_exact(&mut answers).unwrap();
                }
            });
        }
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut stream = connect();
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    let mut line = String::new();
                    let mut truth = None;
                    for _ in 0..100_000 {
                        stream.write_all(b"mg last v c\r\nmg last v c\r\n").unwrap();
                        let (one, two) = (read(&mut line, &mut reader), read(&mut line, &mut reader));
                        if one == two {
                            agreed.fetch_add(1, Ordering::Relaxed);
                            assert_eq!(apart(one), *truth.get_or_insert(apart(one)), "torn twice in the same way");
                        }
                        torn.fetch_add(usize::from(truth.is_some_and(|truth| apart(one) != truth)), Ordering::Relaxed);
                    }
                    truth
                })
            })
            .collect();
        let truths: Vec<Option<u64>> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
        over.store(true, Ordering::Relaxed);
        assert!(truths[0].is_some() && truths[0] == truths[1], "{truths:?}");
    });
    println!("{} of 200000 single reads torn, {} pairs agree", torn.into_inner(), agreed.into_inner());
}
