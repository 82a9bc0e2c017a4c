//! memcached away, in every way: a 503 with its code, nothing acknowledged that was not stored, and a bus again as
//! soon as memcached is back.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::fixtures::daemon::{Folder, wait_for};
use crate::fixtures::fronts::Front;
use crate::fixtures::memcached::{LEASE_OVER, Memcached, STEP};
use crate::fixtures::signer::unix_millis;
use crate::fixtures::site::Site;

on_main_fronts! {
    a_memcached_that_is_away_is_a_503_that_says_so
    what_is_no_memcached_is_a_503_that_says_so
    a_publish_whose_end_is_unknown_says_so
    a_full_memcached_refuses_and_nothing_is_acknowledged_that_is_not_stored
    a_stopped_memcached_costs_at_most_two_seconds_and_is_a_bus_again_when_it_runs
    a_memcached_that_comes_back_is_a_bus_again
    a_publish_whose_end_is_unknown_is_told_or_made_by_its_repeat
    a_full_memcached_makes_no_message_of_a_repeat_that_it_did_not_store
    a_signed_bus_whose_memcached_is_away_says_so
    a_memcached_without_cas_is_refused
    a_full_memcached_refuses_who_publishes_and_answers_all_others
    a_memcached_with_all_its_connections_says_so_and_is_a_bus_again_when_some_close
    a_memcached_that_wants_a_password_says_so
    a_message_above_memcached_s_item_limit_is_refused_and_uses_up_no_id
    a_large_message_that_a_full_memcached_refuses_uses_up_no_id
}

/// Something at a unix socket that is not a memcached: serves each connection with `behave`.
struct Impostor {
    folder: Folder,
}

impl Impostor {
    fn start(behave: impl Fn(UnixStream) + Clone + Send + 'static) -> Impostor {
        let folder = Folder::new();
        let listener = UnixListener::bind(folder.join("socket")).unwrap();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(folder.join("socket"), std::fs::Permissions::from_mode(0o777)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let behave = behave.clone();
                thread::spawn(move || behave(stream.unwrap()));
            }
        });
        Impostor { folder }
    }

    fn address(&self) -> String {
        self.folder.join("socket").to_str().unwrap().into()
    }
}

/// Join, poll and publish are all answered by this code.
#[track_caller]
fn assert_away(site: &Site, bus: &str, code: &str) {
    let publish = |once| site.post(&format!("{bus}?user=1{once}"), "1");
    for reply in [site.get(bus), site.get(&format!("{bus}?id=0")), publish(""), publish("&once=k")] {
        assert_eq!(reply.outcome(), (503, code.into()), "{bus}: {reply:?}");
        assert_eq!(reply.header("retry-after"), Some("1"));
        assert!(reply.json()["message"].as_str().is_some_and(|text| !text.contains('/')), "no business of a client");
    }
}

fn a_memcached_that_is_away_is_a_503_that_says_so(front: Front) {
    let silent = Impostor::start(|stream| drop(BufReader::new(stream).read_to_end(&mut Vec::new())));
    let refusing = Folder::new();
    drop(UnixListener::bind(refusing.join("socket")).unwrap());
    let refusing = refusing.join("socket").to_str().unwrap().to_owned();
    let silent_address = silent.address();
    let site = Site::with(
        front,
        &[
            ("nowhere", &[("SHORTBUS_MEMCACHED", "/nowhere")]),
            ("refusing", &[("SHORTBUS_MEMCACHED", &refusing)]),
            // Nothing may listen on the port of tcpmux.
            ("down", &[("SHORTBUS_MEMCACHED", "127.0.0.1:1")]),
            ("nameless", &[("SHORTBUS_MEMCACHED", "no-such-host.invalid:11211")]),
            ("silent", &[("SHORTBUS_MEMCACHED", &silent_address)]),
        ],
    );
    for bus in ["nowhere", "refusing", "down", "nameless"] {
        assert_away(&site, bus, "memcached_unreachable");
    }
    assert_away(&site, "silent", "memcached_timeout");
    // Input that is wrong is wrong whether memcached is there or not.
    assert_eq!(site.post("nowhere?user=1", "x").outcome(), (400, "not_json".into()));
}

fn what_is_no_memcached_is_a_503_that_says_so(front: Front) {
    type Behaviour = fn(UnixStream);
    /// Answers each line with the same.
    fn answer(stream: UnixStream, line: &[u8]) {
        let mut writer = stream.try_clone().unwrap();
        for _ in BufReader::new(stream).split(b'\n') {
            let _ = writer.write_all(line);
        }
    }
    let impostors: [(&str, Behaviour); 12] = [
        ("memcached_too_old", |stream| answer(stream, b"ERROR\r\n")),
        ("memcached_too_old", |stream| answer(stream, b"CLIENT_ERROR bad command line format\r\n")),
        ("memcached_broken", |stream| answer(stream, b"SERVER_ERROR too many open connections\r\n")),
        ("memcached_broken", |stream| answer(stream, b"HTTP/1.1 400 Bad Request\r\n\r\n")),
        ("memcached_broken", |stream| answer(stream, b"\0\0\0\0\r\n")),
        ("memcached_broken", |stream| answer(stream, b"VA x c1\r\n")),
        ("memcached_broken", |stream| answer(stream, b"VA 3 c1\r\nabc\r\n")),
        ("memcached_broken", |stream| answer(stream, b"VA 16 c1\r\n9007199254740991\r\n")),
        ("memcached_broken", |stream| answer(stream, b"VA 1 \r\n7\r\n")),
        ("memcached_broken", |stream| answer(stream, b"VA 99999999999999999999 c1\r\n")),
        ("memcached_broken", |stream| answer(stream, b"HD\r\n")),
        // Dies in the middle of a reply.
        ("memcached_broken", |mut stream| {
            let _ = stream.read(&mut [0; 20]);
            let _ = stream.write_all(b"VA 16 c1\r\n179536");
        }),
    ];
    let started: Vec<(Impostor, &str)> = impostors.map(|(code, behave)| (Impostor::start(behave), code)).into();
    let names: Vec<(String, [(&str, String); 1])> = (started.iter().enumerate())
        .map(|(n, (impostor, _))| (format!("bus{n}"), [("SHORTBUS_MEMCACHED", impostor.address())]))
        .collect();
    let lists: Vec<[(&str, &str); 1]> = names.iter().map(|(_, [(name, value)])| [(*name, &value[..])]).collect();
    let settings: Vec<(&str, &[(&str, &str)])> =
        names.iter().zip(&lists).map(|((bus, _), list)| (&bus[..], &list[..])).collect();
    let site = Site::with(front, &settings);
    for ((bus, _), (_, code)) in names.iter().zip(&started) {
        assert_away(&site, bus, code);
    }
}

fn a_publish_whose_end_is_unknown_says_so(front: Front) {
    /// A memcached up to the claim.
    fn read_claim(stream: UnixStream) -> (UnixStream, BufReader<UnixStream>) {
        let mut writer = stream.try_clone().unwrap();
        let mut reader = BufReader::new(stream);
        for _ in 0..2 {
            reader.read_line(&mut String::new()).unwrap();
            writer.write_all(b"VA 13 c7\r\n7000000000000\r\n").unwrap();
        }
        reader.read_line(&mut String::new()).unwrap();
        (writer, reader)
    }
    let silent = Impostor::start(|stream| drop(read_claim(stream).1.read_to_end(&mut Vec::new())));
    let dying = Impostor::start(|stream| drop(read_claim(stream).0.write_all(b"HD\r\nH")));
    let (silent, dying) = (silent.address(), dying.address());
    let site = Site::with(
        front,
        &[("silent", &[("SHORTBUS_MEMCACHED", &silent)]), ("dying", &[("SHORTBUS_MEMCACHED", &dying)])],
    );
    for bus in ["silent", "dying"] {
        let reply = site.post(&format!("{bus}?user=1"), "1");
        assert_eq!(reply.outcome(), (503, "outcome_unknown".into()), "{bus}: {reply:?}");
    }
}

fn a_full_memcached_refuses_and_nothing_is_acknowledged_that_is_not_stored(front: Front) {
    // Without evictions, and with so little memory that it is full soon.
    let site = Site::on(front, Memcached::start(&["-M", "-m", "2"]), &[("chat", &[("SHORTBUS_MAX_BYTES", "100000")])]);
    let (_, start) = site.join("chat");
    let text = format!("\"{}\"", "x".repeat(45_000));
    let batch = format!("[{text},{text}]");
    let (mut stored, mut refused) = (0, 0);
    // By turns a message, and two in one request.
    for (target, body, messages) in [("chat?user=1", &text, 1), ("chat?user=1&batch=1", &batch, 2)].iter().cycle() {
        if refused == 6 {
            break;
        }
        match site.post(target, body) {
            reply if reply.status == 200 => stored += messages,
            reply => {
                assert_eq!(reply.outcome(), (503, "memcached_full".into()));
                refused += 1;
            }
        }
        assert!(stored < 1_000, "2 MB are never full");
    }
    let (mut heard, mut at) = (0, start);
    loop {
        let reply = site.get(&format!("chat?id={at}"));
        let messages = reply.text().matches("\"user\":1").count();
        heard += messages;
        at = reply.header("shortbus-last-id").unwrap().parse().unwrap();
        if messages == 0 {
            break;
        }
    }
    assert_eq!(heard, stored);
    // Room again: a bus again, also for who is behind the holes.
    site.memcached.ask("flush_all\r\n");
    let id = site.publish("chat", 1, "\"again\"");
    let reply = site.get(&format!("chat?id={at}"));
    assert_eq!(reply.text(), format!("[{{\"id\":{id},\"user\":1,\"data\":\"again\"}}]"));
}

fn a_stopped_memcached_costs_at_most_two_seconds_and_is_a_bus_again_when_it_runs(front: Front) {
    // One that takes no more than a connection or two while it is stopped: connecting itself has to be bounded too.
    let site = Site::on(front, Memcached::start(&["-b", "1"]), &[]);
    site.copy("chat");
    let id = site.publish("chat", 1, "\"before\"");
    site.memcached.signal("STOP");
    let waiting: Vec<UnixStream> = std::iter::from_fn(|| {
        let address = site.memcached.address.clone();
        let (sender, receiver) = std::sync::mpsc::channel();
        thread::spawn(move || sender.send(UnixStream::connect(address)));
        receiver.recv_timeout(Duration::from_millis(500)).ok()?.ok()
    })
    .take(100)
    .collect();
    assert!(waiting.len() < 100, "the queue has no end");
    // The quickest of three: the machine may be busy with other things.
    let quickest = (0..3)
        .map(|_| {
            let started = Instant::now();
            assert_eq!(site.get("chat").outcome(), (503, "memcached_timeout".into()));
            started.elapsed()
        })
        .min();
    assert!(quickest < Some(Duration::from_secs(2)), "{quickest:?}");
    drop(waiting);
    site.memcached.signal("CONT");
    wait_for("memcached", || site.memcached.ask("version\r\n").starts_with("VERSION"));
    let reply = site.get(&format!("chat?id={}", id - 1));
    assert_eq!(reply.text(), format!("[{{\"id\":{id},\"user\":1,\"data\":\"before\"}}]"));
}

fn a_memcached_that_comes_back_is_a_bus_again(front: Front) {
    let mut site = Site::start(front);
    site.copy("chat");
    let old = site.publish("chat", 1, "\"before\"");
    site.memcached.stop();
    assert_away(&site, "chat", "memcached_unreachable");
    site.memcached.restart();
    let new = site.publish("chat", 1, "\"after\"");
    let reply = site.get(&format!("chat?id={old}"));
    assert_eq!(reply.text(), format!("[{{\"id\":{new},\"user\":1,\"data\":\"after\"}}]"));
}

fn a_publish_whose_end_is_unknown_is_told_or_made_by_its_repeat(front: Front) {
    /// A memcached, but for the write that stores a message: that gets there or not, and is never answered.
    fn proxy(memcached: &str, arrives: bool, closes: bool) -> Impostor {
        let memcached = memcached.to_owned();
        Impostor::start(move |mut stream| {
            let mut real = UnixStream::connect(&memcached).unwrap();
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut bytes) {
                let stores = bytes[..length].windows(5).any(|five| five == b"\r\nma ");
                if !stores || arrives {
                    real.write_all(&bytes[..length]).unwrap();
                    let length = real.read(&mut bytes).unwrap();
                    let _ = stream.write_all(if stores { b"" } else { &bytes[..length] });
                }
                if stores && closes {
                    return;
                }
            }
        })
    }
    let memcached = Memcached::start(&[]);
    let ways = [("closed", true, true), ("silent", true, false), ("lost", false, true)];
    let proxies =
        ways.map(|(_, arrives, closes)| proxy(&memcached.address, arrives, closes)).map(|it| (it.address(), it));
    let lists = proxies.each_ref().map(|(address, _)| [("SHORTBUS_MEMCACHED", &address[..]), ("SHORTBUS_BUS", "chat")]);
    let settings: Vec<(&str, &[(&str, &str)])> =
        ways.iter().zip(&lists).map(|(way, list)| (way.0, &list[..])).collect();
    let site = Site::on(front, memcached, &settings);
    site.copy("chat");
    let (_, start) = site.join("chat");
    for ((way, arrives, _), id) in ways.into_iter().zip((start + STEP..).step_by(STEP as usize)) {
        let post = |bus| site.post(&format!("{bus}?user=1&once={way}"), format!("\"{way}\""));
        assert_eq!(post(way).outcome(), (503, "outcome_unknown".into()), "{way}");
        if !arrives {
            let repeat = post("chat");
            assert_eq!((repeat.outcome(), repeat.header("retry-after")), ((409, "once_undecided".into()), Some("1")));
            site.memcached.ask(format!("mg shortbus:chat:1:{way} T{LEASE_OVER}\r\n"));
        }
        let told = format!("{{\"user\":1,\"id\":{id}}}");
        assert_eq!(post("chat").text(), told, "{way}");
        // Where it stores nothing, the proxy is a memcached.
        assert_eq!(post(way).text(), told, "{way}");
        assert_eq!(site.join("chat").1, id);
    }
}

fn a_full_memcached_makes_no_message_of_a_repeat_that_it_did_not_store(front: Front) {
    let site = Site::on(front, Memcached::start(&["-M", "-m", "2"]), &[("chat", &[("SHORTBUS_MAX_BYTES", "100000")])]);
    let (_, start) = site.join("chat");
    let body = format!("\"{}\"", "x".repeat(90_000));
    let (mut told, mut refused) = (Vec::new(), 0);
    for n in 0.. {
        // Each twice.
        for reply in [0, 1].map(|_| site.post(&format!("chat?user=1&once=k{n}"), &body)) {
            match (reply.outcome().1.as_str(), reply.status) {
                ("", 200) => told.push(reply.json()["id"].as_u64().unwrap()),
                ("memcached_full" | "outcome_unknown", 503) | ("once_undecided", 409) => {
                    assert_eq!(reply.header("retry-after"), Some("1"));
                    refused += 1;
                }
                _ => panic!("{reply:?}"),
            }
        }
        told.dedup();
        if refused >= 6 {
            break;
        }
        assert!(n < 1_000, "2 MB are never full");
    }
    let (mut heard, mut at) = (Vec::new(), start);
    while at < site.join("chat").1 {
        let reply = site.get(&format!("chat?id={at}"));
        heard.extend(reply.json().as_array().unwrap().iter().map(|message| message["id"].as_u64().unwrap()));
        at = reply.header("shortbus-last-id").unwrap().parse().unwrap();
    }
    assert_eq!(heard, told);
    // Room again: the last one can be made.
    site.memcached.ask("flush_all\r\n");
    assert_eq!(site.post("chat?user=1&once=k0", "1").status, 200);
}

fn a_signed_bus_whose_memcached_is_away_says_so(front: Front) {
    let key = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";
    let mut site = Site::with(
        front,
        &[("keyed", &[("SHORTBUS_AUTH", "signed"), ("SHORTBUS_KEY", key)]), ("chat", &[("SHORTBUS_AUTH", "signed")])],
    );
    let users = ["keyed", "chat"].map(|bus| (bus, site.join_signed(bus)));
    site.memcached.stop();
    for (bus, user) in &users {
        let signed = site.post(&format!("{bus}?{}", user.query(unix_millis(), "k", "1")), "1");
        for reply in [signed, site.get(bus), site.get(&format!("{bus}?id=0"))] {
            assert_eq!(reply.outcome(), (503, "memcached_unreachable".into()), "{bus}: {reply:?}");
        }
        assert_eq!(site.post(&format!("{bus}?user=1"), "1").outcome(), (403, "signature_missing".into()));
    }
}

fn a_memcached_without_cas_is_refused(front: Front) {
    let site = Site::on(front, Memcached::start(&["-C"]), &[]);
    site.copy("chat");
    assert_away(&site, "chat", "memcached_no_cas");
    let last =
        || site.memcached.ask("mg shortbus:chat:newest v\r\n").split("\r\n").nth(1).unwrap().parse::<u64>().unwrap();
    let before = last();
    // Each of them would take the same id, and all but one message would be lost.
    for reply in site.at_once(16, |n| site.post(&format!("chat?user={n}"), "1")) {
        assert_eq!(reply.outcome(), (503, "memcached_no_cas".into()));
        assert!(reply.json()["message"].as_str().unwrap().contains("-C"), "{reply:?}");
    }
    assert_eq!(last(), before);
    assert_eq!(site.memcached.ask(format!("mg shortbus:chat:{}\r\n", before + 1)), "EN\r\n");
}

fn a_full_memcached_refuses_who_publishes_and_answers_all_others(front: Front) {
    let site = Site::on(front, Memcached::start(&["-M", "-m", "2"]), &[("chat", &[("SHORTBUS_MAX_BYTES", "100000")])]);
    let (_, start) = site.join("chat");
    let body = format!("\"{}\"", "x".repeat(90_000));
    let full = (503, "memcached_full".into());
    crate::fixtures::daemon::wait_for("a full memcached", || site.post("chat?user=1", &body).outcome() == full);
    // In FastCGI they share a connection, and what is refused to one of them is no answer to another.
    let replies = site.at_once(16, |n| match n % 2 {
        0 => site.post("chat?user=1", &body),
        _ => site.get(&format!("chat?user=1&id={start}")),
    });
    for (n, reply) in replies.iter().enumerate() {
        assert_eq!(reply.outcome(), if n % 2 == 0 { full.clone() } else { (200, String::new()) }, "{reply:?}");
    }
}

fn a_memcached_with_all_its_connections_says_so_and_is_a_bus_again_when_some_close(front: Front) {
    let site = Site::on(front, Memcached::start(&["-c", "40", "-t", "1"]), &[]);
    site.copy("chat");
    // It counts a connection or two of its own.
    let mut held = Vec::new();
    loop {
        let mut stream = BufReader::new(UnixStream::connect(&site.memcached.address).unwrap());
        let _ = stream.get_mut().write_all(b"mn\r\n");
        let mut line = String::new();
        let _ = stream.read_line(&mut line);
        if line.starts_with("ERROR") {
            break;
        }
        held.push(stream);
    }
    // Time and again: what it says comes before or after it was asked.
    for _ in 0..5 {
        assert_away(&site, "chat", "memcached_crowded");
    }
    assert!(site.get("chat").json()["message"].as_str().unwrap().contains("-c"));
    drop(held);
    crate::fixtures::daemon::wait_for("a free connection", || site.get("chat").status == 200);
    site.publish("chat", 1, "1");
}

fn a_memcached_that_wants_a_password_says_so(front: Front) {
    let folder = Folder::new();
    std::fs::write(folder.join("users"), "user:password\n").unwrap();
    let site = Site::on(front, Memcached::start(&["-Y", folder.join("users").to_str().unwrap()]), &[]);
    site.copy("chat");
    assert_away(&site, "chat", "memcached_password");
    assert!(site.get("chat").json()["message"].as_str().unwrap().contains("-Y"));
    let large = format!("\"{}\"", "x".repeat(10_000));
    assert_eq!(site.post("chat?user=1", large).outcome(), (503, "memcached_password".into()));
}

fn a_message_above_memcached_s_item_limit_is_refused_and_uses_up_no_id(front: Front) {
    let list = &[("SHORTBUS_MAX_BYTES", "1000000")][..];
    let signed = &[list[0], ("SHORTBUS_AUTH", "signed")][..];
    let memcached = Memcached::start(&["-I", "512k"]);
    let site = Site::on(front, memcached, &[("chat", list), ("signed", signed)]);
    let text = |length: usize| format!("\"{}\"", "x".repeat(length - 2));
    let refused = (413, "memcached_item_limit".into());
    let (_, start) = site.join("chat");
    let signer = site.join_signed("signed");
    let signed_start = site.join("signed").1;
    for (n, length) in [524_288, 524_400, 900_000].into_iter().enumerate() {
        let (body, once) = (text(length), format!("k{n}"));
        let query = signer.query(unix_millis(), &once, &body);
        // Each twice.
        for target in ["chat?user=1".into(), format!("chat?user=1&once={once}"), format!("signed?{query}")] {
            for _ in 0..2 {
                let reply = site.post(&target, &body);
                assert_eq!((reply.outcome(), reply.header("retry-after")), (refused.clone(), None), "{length}");
                assert!(reply.json()["message"].as_str().unwrap().contains("-I"), "{reply:?}");
            }
        }
    }
    assert_eq!((site.join("chat").1, site.join("signed").1), (start, signed_start));
    // As large as it takes: where the trial passes, the message does.
    let largest = (523_000..524_288).rev().step_by(16).find(|&length| match site.post("chat?user=1", text(length)) {
        reply if reply.status == 200 => true,
        reply => {
            assert_eq!(reply.outcome(), refused);
            false
        }
    });
    assert!(largest.is_some());
    assert_eq!(site.publish("chat", 1, "1"), start + 2 * STEP);
    let reply = site.get(&format!("chat?id={start}"));
    assert_eq!((reply.header("shortbus-missed"), reply.json().as_array().unwrap().len()), (None, 2));
    assert_eq!(site.memcached.ask("mg shortbus:chat:trial\r\n"), "EN\r\n");
}

fn a_large_message_that_a_full_memcached_refuses_uses_up_no_id(front: Front) {
    // memcached keeps the second in several chunks.
    for length in [90_000, 600_000] {
        let memcached = Memcached::start(&["-M", "-m", "2"]);
        let site = Site::on(front, memcached, &[("chat", &[("SHORTBUS_MAX_BYTES", "1000000")])]);
        let (_, start) = site.join("chat");
        let body = format!("\"{}\"", "x".repeat(length));
        let (mut stored, mut refused) = (0, 0);
        while refused < 5 {
            match site.post("chat?user=1", &body) {
                reply if reply.status == 200 => stored += 1,
                reply => {
                    assert_eq!(reply.outcome(), (503, "memcached_full".into()));
                    refused += 1;
                }
            }
            assert!(stored < 1_000, "2 MB are never full");
        }
        assert!(stored > 0);
        assert_eq!(site.join("chat").1, start + stored * STEP);
        let reply = site.get(&format!("chat?user=1&id={start}"));
        assert_eq!(reply.header("shortbus-last-id"), Some(&(start + stored * STEP).to_string()[..]));
        assert_eq!(reply.header("shortbus-missed"), None);
    }
}
