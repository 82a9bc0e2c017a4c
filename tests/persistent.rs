//! The persistent mode: FastCGI's own ways, requests that wait, and what must not harm others. The scenarios of every
//! front run on it too (`tests/scenarios.rs`, `tests/failures.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use shortbus::limits;

use crate::fixtures::daemon::{Daemon, Folder, executable, wait_for};
use crate::fixtures::fastcgi_client::{
    ABORT_REQUEST, AUTHORIZER, BEGIN_REQUEST, CANNOT_MULTIPLEX, Client, END_REQUEST, GET_VALUES, GET_VALUES_RESULT,
    PARAMS, REQUEST_COMPLETE, RESPONDER, STDIN, STDOUT, UNKNOWN_ROLE, UNKNOWN_TYPE, parameters, record, request,
};
use crate::fixtures::fastcgi_server::{Bus, Worker, copy};
use crate::fixtures::fronts::Front;
use crate::fixtures::http_client::Reply;
use crate::fixtures::memcached::{Memcached, STEP};
use crate::fixtures::site::Site;

/// More than any wake-up takes, less than any wait.
const SOON: Duration = Duration::from_millis(900);

#[track_caller]
fn data(reply: &Reply) -> Vec<serde_json::Value> {
    let json = reply.json();
    json.as_array().unwrap_or_else(|| panic!("{reply:?}")).iter().map(|message| message["data"].clone()).collect()
}

#[test]
fn a_connection_serves_one_request_after_the_other() {
    let bus = Bus::start();
    let mut client = bus.connect();
    for n in 0..50 {
        let id = client.ask("POST", "user=1", &[], format!("{n}").as_bytes()).answer().reply.json()["id"].as_u64();
        let poll = client.ask("GET", &format!("id={}", id.unwrap() - 1), &[], b"").answer();
        assert_eq!(data(&poll.reply), [n]);
    }
    // In the smallest pieces.
    for byte in request("GET", "user=x&id=1", &[], b"") {
        client.send([byte]);
    }
    let answer = client.answer();
    assert_eq!(answer.reply.outcome(), (400, "bad_parameter".into()));
    assert!(answer.log.starts_with("shortbus: chat: bad_parameter: "), "{}", answer.log);
    // Without FCGI_KEEP_CONN it is closed.
    let mut bytes = request("HEAD", "", &[], b"");
    bytes[10] = 0;
    let answer = client.send(bytes).answer();
    assert_eq!((answer.reply.status, answer.reply.text()), (200, ""));
    assert!(client.is_closed());
}

#[test]
fn settings_come_from_the_parameters_then_the_environment_and_nothing_else_does() {
    let bus = Bus::with(&[
        ("SHORTBUS_MAX_BYTES", "5"),
        ("QUERY_STRING", "user=1&id=x"),
        ("PATH_INFO", "/nothing"),
        ("HTTP_ORIGIN", "http://evil.example"),
    ]);
    let ask = |extra: &[(&str, &str)]| bus.connect().ask("POST", "user=1", extra, b"123456").answer().reply.outcome();
    assert_eq!(ask(&[]), (413, "too_large".into()));
    assert_eq!(ask(&[("SHORTBUS_MAX_BYTES", "6")]), (200, "".into()));
    assert_eq!(ask(&[("SHORTBUS_MAX_BYTES", "x")]), (500, "bad_setting".into()));
    assert_eq!(bus.ask("GET", "id=0", "").reply.status, 200);
    // One process, two buses.
    let other = [("SHORTBUS_BUS", "other"), ("SCRIPT_NAME", "/cgi-bin/third"), ("SCRIPT_FILENAME", "/fourth")];
    let poll = |extra| data(&bus.connect().ask("GET", "id=0", extra, b"").answer().reply).len();
    assert_eq!((poll(&[]), poll(&other)), (1, 0));
}

/// Who reaches the socket, or a location that serves any URL, chooses it: it is no path, no command, no other bus.
#[test]
fn a_bus_name_of_any_bytes_is_a_bus_of_its_own() {
    let (folder, memcached) = (Folder::new(), Memcached::start(&[]));
    let store = folder.join("store");
    fs::create_dir(&store).unwrap();
    let worker = Worker::start(&copy(&folder), folder.join("chat.s"), &folder, &[]);
    let stores = [("SHORTBUS_MEMCACHED", &memcached.address[..]), ("SHORTBUS_STORE", store.to_str().unwrap())];
    let long = ["x".repeat(60_000), "x".repeat(59_999) + "y"];
    let names =
        [".", "..", "../chat", "/etc/passwd", "a\0b", "a", "a\r\nflush_all\r\n", "a b", "a:1", "a%00b", "a:messages"];
    for store in stores {
        for (n, name) in names.iter().copied().chain(long.iter().map(|name| &name[..])).enumerate() {
            let extra = [("SHORTBUS_BUS", name), store];
            let ask = |method, query, body: &[u8]| {
                Client::connect(&worker.socket).ask(method, query, &extra, body).answer().reply
            };
            assert_eq!(data(&ask("GET", "id=0", b"")), [0; 0], "{name:.40?}");
            assert_eq!(ask("POST", "user=1", n.to_string().as_bytes()).outcome(), (200, "".into()), "{name:.40?}");
            assert_eq!(data(&ask("GET", "id=0", b"")), [n], "{name:.40?}");
        }
    }
    assert_eq!(fs::read_dir(&store).unwrap().count(), names.len() + long.len());
}

/// A process's own lines; those about a request go to its web server.
#[test]
fn a_log_that_nobody_reads_ends_no_process() {
    let folder = Folder::new();
    fs::create_dir(folder.join("store")).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let listener = UnixListener::bind(folder.join("chat.s")).unwrap();
    let mut command = Command::new(copy(&folder));
    command
        .env_clear()
        .env("SHORTBUS_STORE", folder.join("store"))
        .stdin(OwnedFd::from(listener))
        .stderr(writer)
        .process_group(0);
    let mut daemon = Daemon { child: command.spawn().unwrap() };
    let ask = |method, query, body: &[u8]| {
        Client::connect(&folder.join("chat.s")).ask(method, query, &[], body).answer().reply.outcome()
    };
    assert_eq!(ask("POST", "user=1", b"1"), (200, "".into()));
    fs::File::options().write(true).open(folder.join("store/chat:messages")).unwrap().write_all_at(b"?", 20).unwrap();
    assert_eq!(ask("GET", "id=0", b""), (200, "".into()));
    assert!(folder.join("store/chat:messages.damaged").exists(), "it has said so");
    assert!(daemon.is_alive());
}

#[test]
fn systemd_may_hand_the_socket_over_as_fd_3() {
    let (folder, memcached) = (Folder::new(), Memcached::start(&[]));
    let program = copy(&folder);
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec 3<&0 0</dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$0\""]).arg(program);
    let worker = Worker::run(shell.env("SHORTBUS_MEMCACHED", &memcached.address), folder.join("s"), &folder);
    assert_eq!(Client::connect(&worker.socket).ask("GET", "", &[], b"").answer().reply.status, 200);
}

#[test]
fn malformed_records_close_their_connection_and_no_other() {
    let bus = Bus::start();
    let id = bus.join();
    let (mut other, mut stream) = (bus.connect(), bus.connect());
    stream.ask("GET", &format!("id={id}&stream=1"), &[], b"").until("event: cursor");
    let begin = record(BEGIN_REQUEST, 1, &RESPONDER);
    let cases: [Vec<u8>; 7] = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 8],
        [&begin[..], &begin].concat(),
        [begin.clone(), record(STDIN, 1, b"x")].concat(),
        [begin.clone(), record(PARAMS, 1, b"\xff"), record(PARAMS, 1, b"")].concat(),
        [begin.clone(), record(PARAMS, 1, &[0xff; 9]), record(PARAMS, 1, b"")].concat(),
        record(GET_VALUES, 0, &[0; 600]),
    ];
    for bytes in cases {
        let mut client = bus.connect();
        client.send(&bytes);
        assert!(client.is_closed(), "{bytes:?}");
        assert_eq!(other.ask("GET", "id=0", &[], b"").answer().reply.status, 200);
    }
    // Half a request, for as long as it likes; and one that ends in the middle.
    let mut half = bus.connect();
    half.send(&begin[..5]);
    bus.connect().send(&begin);
    bus.publish(1, "\"on\"");
    stream.until("\"data\":\"on\"");
    half.send(&request("GET", "id=0", &[], b"")[5..]);
    assert_eq!(half.answer().reply.status, 200);
}

#[test]
fn what_goes_beyond_a_limit_gets_an_answer_and_the_connection_goes_on() {
    let bus = Bus::start();
    let mut client = bus.connect();
    let header = "x".repeat(65_536);
    let answer = client.ask("GET", "", &[("HTTP_COOKIE", &header)], b"").answer();
    assert_eq!(answer.reply.outcome(), (431, "headers_too_large".into()));
    let header = "x".repeat(60_000);
    assert_eq!(client.ask("GET", "", &[("HTTP_COOKIE", &header)], b"").answer().reply.status, 200);
    let memory = bus.memory();
    let body = vec![b'1'; 50 << 20];
    let mut sender = client.stream.try_clone().unwrap();
    let bytes = request("POST", "user=1", &[], &body);
    let sending = thread::spawn(move || sender.write_all(&bytes));
    assert_eq!(client.answer().reply.outcome(), (413, "too_large".into()));
    sending.join().unwrap().unwrap();
    assert!(bus.memory() < memory + 2_000, "{memory} -> {}", bus.memory());
    assert_eq!(client.ask("POST", "user=1", &[], b"1").answer().reply.status, 200);
}

#[test]
fn management_records_and_other_roles_are_answered() {
    let bus = Bus::start();
    let mut client = bus.connect();
    client.send(record(GET_VALUES, 0, &parameters(&[("FCGI_MPXS_CONNS", ""), ("NOTHING", "")])));
    assert_eq!(client.record().unwrap(), (GET_VALUES_RESULT, 0, b"\x0f\x01FCGI_MPXS_CONNS0".to_vec()));
    client.send(record(77, 0, b""));
    assert_eq!(client.record().unwrap(), (UNKNOWN_TYPE, 0, vec![77, 0, 0, 0, 0, 0, 0, 0]));
    client.send(record(BEGIN_REQUEST, 3, &AUTHORIZER));
    assert_eq!(client.record().unwrap(), (END_REQUEST, 3, UNKNOWN_ROLE.to_vec()));
    // While a request waits, another on its connection is refused, and a question answered.
    let id = bus.join();
    client.ask("GET", &format!("id={id}&wait=60"), &[], b"");
    client.send(record(BEGIN_REQUEST, 2, &RESPONDER)).send(record(GET_VALUES, 0, b""));
    assert_eq!(client.record().unwrap(), (END_REQUEST, 2, CANNOT_MULTIPLEX.to_vec()));
    assert_eq!(client.record().unwrap(), (GET_VALUES_RESULT, 0, vec![]));
    bus.publish(1, "1");
    assert_eq!(data(&client.answer().reply), [1]);
}

#[test]
fn an_aborted_request_ends_and_its_connection_goes_on() {
    let bus = Bus::start();
    let id = bus.join();
    let mut client = bus.connect();
    client.send(record(BEGIN_REQUEST, 1, &RESPONDER)).send(record(ABORT_REQUEST, 1, b""));
    assert_eq!(client.record().unwrap(), (END_REQUEST, 1, REQUEST_COMPLETE.to_vec()));
    for query in [format!("id={id}&wait=60"), format!("id={id}&stream=1")] {
        client.ask("GET", &query, &[], b"");
        thread::sleep(Duration::from_millis(50));
        client.send(record(ABORT_REQUEST, 1, b""));
        while client.record().unwrap().0 != END_REQUEST {}
        assert_eq!(client.ask("GET", "id=0", &[], b"").answer().reply.status, 200);
    }
    // Also where it comes with its request, and nothing else wakes that.
    let mut other = bus.connect();
    other.ask("GET", &format!("id={id}&stream=1"), &[], b"").until("event: cursor");
    client.send([request("GET", &format!("id={id}&wait=60"), &[], b""), record(ABORT_REQUEST, 1, b"")].concat());
    while client.record().unwrap().0 != END_REQUEST {}
}

#[test]
fn a_poll_waits_until_there_is_a_message_of_another() {
    let bus = Bus::start();
    let id = bus.join();
    let started = Instant::now();
    let mut client = bus.connect();
    client.ask("GET", &format!("user=1&id={id}&wait=60"), &[], b"");
    thread::sleep(Duration::from_millis(300));
    bus.publish(1, "\"own\"");
    thread::sleep(Duration::from_millis(300));
    assert_eq!(bus.publish(2, "\"other\""), id + 2 * STEP);
    let answer = client.answer();
    assert_eq!(
        (data(&answer.reply), answer.reply.header("shortbus-last-id")),
        (vec!["other".into()], Some(&*(id + 2 * STEP).to_string()))
    );
    assert!((Duration::from_millis(600)..Duration::from_millis(600) + SOON).contains(&started.elapsed()));
    // With a message there it does not wait; nor where nobody lets it.
    let started = Instant::now();
    assert_eq!(data(&bus.ask("GET", &format!("id={id}&wait=60"), "").reply).len(), 2);
    assert_eq!(data(&bus.ask("GET", &format!("id={}&wait=0", id + 2 * STEP), "").reply).len(), 0);
    assert_eq!(data(&bus.ask("GET", &format!("id={}", id + 2 * STEP), "").reply).len(), 0);
    assert_eq!(bus.ask("GET", &format!("id={id}&wait=x"), "").reply.outcome(), (400, "bad_parameter".into()));
    assert!(started.elapsed() < SOON);
}

#[test]
fn a_wait_ends_empty_when_its_time_is_over() {
    let bus = Bus::start();
    let id = bus.join();
    for (wait, variables) in [(1, &[][..]), (60, &[("SHORTBUS_WAIT", "1")])] {
        let started = Instant::now();
        bus.publish(5, "\"own\"");
        let query = format!("user=5&id={id}&wait={wait}");
        let reply = bus.connect().ask("GET", &query, variables, b"").answer().reply;
        assert_eq!((reply.status, reply.text()), (200, "[]"));
        assert!(reply.header("shortbus-last-id").unwrap().parse::<u64>().unwrap() > id);
        assert!((Duration::from_secs(1)..Duration::from_secs(1) + SOON).contains(&started.elapsed()));
    }
}

#[test]
fn a_message_from_another_process_or_from_cgi_wakes_who_waits() {
    let bus = Bus::start();
    let another = bus.another();
    let id = bus.join();
    let (mut poll, mut stream) = (bus.connect(), bus.connect());
    stream.ask("GET", &format!("id={id}&stream=1"), &[], b"").until("event: cursor");
    poll.ask("GET", &format!("id={id}&wait=60"), &[], b"");
    thread::sleep(Duration::from_millis(100));
    let started = Instant::now();
    Client::connect(&another.socket).ask("POST", "user=1", &[], b"\"process\"").answer();
    assert_eq!(data(&poll.answer().reply), ["process"]);
    stream.until("\"data\":\"process\"");
    let mut cgi = Command::new(executable());
    cgi.env_clear().env("SHORTBUS_BUS", "chat").env("SHORTBUS_MEMCACHED", &bus.memcached.address);
    cgi.env("REQUEST_METHOD", "POST").env("QUERY_STRING", "user=1").env("CONTENT_LENGTH", "5");
    let mut cgi = cgi.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    cgi.stdin.take().unwrap().write_all(b"\"cgi\"").unwrap();
    stream.until("\"data\":\"cgi\"");
    assert!(cgi.wait().unwrap().success() && started.elapsed() < SOON);
}

#[test]
fn an_event_stream_tells_messages_cursors_and_misses_and_is_resumed() {
    let bus = Bus::with(&[("SHORTBUS_TTL", "1")]);
    let id = bus.join();
    let first = bus.publish(1, "{\"a\":\r\n1,\r\"b\":\n\"\\n\"}");
    let mut stream = bus.connect();
    stream.ask("GET", &format!("user=9&id={id}"), &[("HTTP_ACCEPT", "text/event-stream")], b"");
    let head = stream.until("\r\n\r\n");
    assert!(
        head.starts_with(
            "Status: 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store, no-transform\r\n"
        ),
        "{head}"
    );
    assert!(head.contains("X-Accel-Buffering: no\r\n") && !head.contains("Content-Length"), "{head}");
    let start = stream.until("event: cursor\n");
    let message = format!(
        "id: {first}\ndata: {{\"id\":{first},\"user\":1,\"data\":{{\"a\":\ndata: 1,\ndata: \"b\":\ndata: \"\\n\"}}}}\n\n"
    );
    assert!(start.starts_with("retry: ") && start.ends_with(&format!("\n\n{message}event: cursor\n")), "{start}");
    stream.until(&format!("id: {first}\ndata: {first}\n\n"));
    bus.publish(9, "\"own\"");
    let second = bus.publish(2, "2");
    let event = stream.until("\n\n");
    assert_eq!(event, format!("id: {second}\ndata: {{\"id\":{second},\"user\":2,\"data\":2}}\n\n"));
    // Goes on from where the browser was; the header beats the parameter, unless it makes no sense.
    let third = bus.publish(2, "3");
    for (last, from) in [(second.to_string(), third), ("x".into(), first)] {
        let mut again = bus.connect();
        let extra = [("HTTP_ACCEPT", "text/html, Text/Event-Stream;q=1"), ("HTTP_LAST_EVENT_ID", &last[..])];
        again.ask("GET", &format!("id={id}"), &extra, b"");
        again.until("\r\n\r\n");
        again.until("\n\n");
        assert!(again.until("\n").starts_with(&format!("id: {from}")), "{last}");
    }
    // Without a cursor it begins at the newest message.
    let newest = bus.join();
    bus.connect().ask("GET", "stream=1", &[], b"").until(&format!("event: cursor\nid: {newest}\n"));
    thread::sleep(Duration::from_millis(3_100));
    bus.publish(3, "4");
    let mut late = bus.connect();
    late.ask("GET", &format!("id={id}&stream=1"), &[], b"").until("event: missed\ndata: 1\n\nid: ");
}

#[test]
fn a_silent_stream_has_a_heartbeat_that_moves_the_cursor() {
    let bus = Bus::start();
    let id = bus.join();
    let mut stream = bus.connect();
    stream.ask("GET", &format!("user=1&id={id}&stream=1"), &[], b"").until("data: ");
    let own = bus.publish(1, "1");
    let started = Instant::now();
    assert!(!stream.until(":\n\n").contains("data: {"));
    assert!((14..17).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    assert_eq!(stream.until("\n\n"), format!("event: cursor\nid: {own}\ndata: {own}\n\n"));
}

#[test]
fn one_watcher_asks_for_all_and_none_when_nobody_waits() {
    let bus = Bus::start();
    let id = bus.join();
    let mut waiting: Vec<Client> = (0..100).map(|_| bus.connect()).collect();
    for client in &mut waiting {
        client.ask("GET", &format!("id={id}&stream=1"), &[], b"").until("event: cursor");
    }
    thread::sleep(Duration::from_millis(200));
    let before = bus.gets();
    thread::sleep(Duration::from_secs(1));
    let asked = bus.gets() - before;
    assert!((20..200).contains(&asked), "{asked}");
    let before = bus.gets();
    bus.publish(1, "1");
    waiting.iter_mut().for_each(|client| drop(client.until("\"data\":1}")));
    assert!(bus.gets() - before < 60, "the slot was read once: {}", bus.gets() - before);
    // They leave: their places are free at once.
    drop(waiting);
    thread::sleep(Duration::from_millis(300));
    let before = bus.gets();
    thread::sleep(Duration::from_millis(500));
    assert_eq!(bus.gets(), before);
    let files = std::fs::read_dir(format!("/proc/{}/fd", bus.worker.daemon.pid())).unwrap().count();
    assert!(files < 25, "{files}");
}

#[test]
fn sigterm_finishes_what_is_answered_and_ends_what_waits() {
    for signal in ["TERM", "USR1", "HUP"] {
        let mut bus = Bus::start();
        let id = bus.join();
        let (mut poll, mut stream, mut idle, mut slow) = (bus.connect(), bus.connect(), bus.connect(), bus.connect());
        stream.ask("GET", &format!("id={id}&stream=1"), &[], b"").until(&format!("data: {id}\n\n"));
        poll.ask("GET", &format!("id={id}&wait=60"), &[], b"");
        idle.ask("GET", "id=0", &[], b"").answer();
        thread::sleep(Duration::from_millis(100));
        bus.memcached.signal("STOP");
        slow.ask("GET", "id=0", &[], b"");
        thread::sleep(Duration::from_millis(100));
        let started = Instant::now();
        bus.worker.daemon.signal(signal);
        assert_eq!(poll.answer().reply.text(), "[]");
        assert_eq!(stream.end(), "");
        assert!(started.elapsed() < SOON);
        assert_eq!(slow.answer().reply.outcome(), (503, "memcached_timeout".into()));
        assert!([poll, stream, idle, slow].iter_mut().all(Client::is_closed));
        wait_for("the end", || !bus.worker.daemon.is_alive());
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        bus.memcached.signal("CONT");
    }
}

#[test]
fn sigterm_leaves_nothing_unanswered_that_has_arrived() {
    let bus = Bus::start();
    let id = bus.join();
    let mut kept = bus.connect();
    kept.ask("GET", "id=0", &[], b"").answer();
    bus.worker.daemon.signal("STOP");
    kept.ask("POST", "user=1", &[], b"1");
    bus.worker.daemon.signal("TERM");
    bus.worker.daemon.signal("CONT");
    assert_eq!(kept.answer().reply.text(), format!("{{\"user\":1,\"id\":{}}}", id + STEP));
}

#[test]
fn streams_outlive_a_memcached_that_restarts_or_is_silent() {
    let mut bus = Bus::start();
    let id = bus.join();
    let (mut stream, mut poll) = (bus.connect(), bus.connect());
    stream.ask("GET", &format!("id={id}&stream=1"), &[], b"").until("event: cursor");
    poll.ask("GET", &format!("id={id}&wait=60"), &[], b"");
    thread::sleep(Duration::from_millis(100));
    bus.memcached.stop();
    thread::sleep(Duration::from_millis(500));
    assert_eq!(bus.ask("GET", &format!("id={id}&stream=1"), "").reply.outcome(), (503, "memcached_unreachable".into()));
    assert_eq!(bus.ask("GET", &format!("id={id}&wait=9"), "").reply.outcome(), (503, "memcached_unreachable".into()));
    bus.memcached.restart();
    let back = bus.publish(1, "\"back\"");
    stream.until("\"data\":\"back\"");
    assert_eq!(data(&poll.answer().reply), ["back"]);
    bus.memcached.signal("STOP");
    thread::sleep(Duration::from_millis(2_500));
    bus.memcached.signal("CONT");
    assert!(back > id && bus.publish(1, "\"again\"") > back);
    stream.until("\"data\":\"again\"");
}

#[test]
fn requests_together_share_a_round_trip_and_a_silent_memcached_costs_each_no_more_than_its_time() {
    let bus = Bus::start();
    bus.join();
    bus.memcached.signal("STOP");
    let started = Instant::now();
    let mut clients: Vec<Client> = (0..50).map(|_| bus.connect()).collect();
    clients.iter_mut().for_each(|client| _ = client.ask("GET", "id=0", &[], b""));
    for client in &mut clients {
        assert_eq!(client.answer().reply.outcome(), (503, "memcached_timeout".into()));
    }
    assert!((1_400..2_000).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
    // One that comes shortly before the others give up has its own time.
    let mut late = bus.connect();
    clients[0].ask("GET", "id=0", &[], b"");
    thread::sleep(Duration::from_millis(1_200));
    late.ask("GET", "id=0", &[], b"");
    thread::sleep(Duration::from_millis(600));
    bus.memcached.signal("CONT");
    assert_eq!(clients[0].answer().reply.status, 503);
    let reply = late.answer().reply;
    assert_eq!(reply.status, 200, "{reply:?}");
}

#[test]
fn a_reader_that_does_not_read_is_cut_off_and_nothing_is_kept_for_it() {
    let bus = Bus::start();
    let id = bus.join();
    let (mut slow, mut quick) = (bus.connect(), bus.connect());
    for stream in [&mut slow, &mut quick] {
        stream.ask("GET", &format!("id={id}&stream=1"), &[], b"").until("event: cursor");
    }
    let memory = bus.memory();
    let text = format!("\"{}\"", "x".repeat(10_000));
    for _ in 0..500 {
        bus.publish(1, &text);
    }
    let last = bus.publish(1, "\"last\"");
    quick.until(&format!("id: {last}\n"));
    assert!(bus.memory() < memory + 6_000, "{memory} -> {}", bus.memory());
    thread::sleep(Duration::from_secs(11));
    assert!(bus.gets() > 0);
    while let Some((kind, ..)) = slow.record() {
        assert_eq!(kind, STDOUT);
    }
}

/// So many that all together would take three times what a process lets them.
const TOO_MANY: usize = 3 * limits::BUFFERS_BYTES / LARGE;
const LARGE: usize = 900_000;
/// KiB that a process may have grown by then: the allocator keeps some of what was freed between the buffers.
const GROWN: u64 = limits::BUFFERS_BYTES as u64 / 1024 * 2;

#[test]
fn readers_that_do_not_read_take_no_more_together_than_a_process_lets_them() {
    let bus = Bus::with(&[("SHORTBUS_MAX_BYTES", "1000000")]);
    let id = bus.join();
    let last = bus.publish(1, &format!("\"{}\"", "x".repeat(LARGE)));
    let memory = bus.memory();
    let mut slow: Vec<_> = (0..TOO_MANY).map(|_| bus.connect()).collect();
    for (n, reader) in slow.iter_mut().enumerate() {
        let query = if n % 2 == 0 { format!("id={id}&stream=1") } else { format!("id={id}") };
        reader.ask("GET", &query, &[], b"");
    }
    // Who reads is served meanwhile, and by then all have been looked at.
    let mut quick = bus.connect();
    quick.ask("GET", &format!("id={id}&stream=1"), &[], b"").until(&format!("id: {last}\n"));
    assert!(bus.memory() < memory + GROWN, "{memory} -> {}", bus.memory());
    // The others had all that they asked for, or were cut off.
    let whole = slow.iter_mut().filter_map(reads_whole).count();
    println!("{whole} of {TOO_MANY} read");
    assert!((TOO_MANY / 6..TOO_MANY / 2).contains(&whole), "{whole} of {TOO_MANY}");
    // There is room again.
    let mut again = bus.connect();
    assert_eq!(again.ask("GET", &format!("id={id}"), &[], b"").answer().reply.status, 200);
}

/// Something where the reader gets all of the message or page, and was not cut off.
fn reads_whole(reader: &mut Client) -> Option<()> {
    let mut length = 0;
    while length < LARGE
        && let Some((_, _, content)) = reader.record()
    {
        length += content.len();
    }
    (length >= LARGE).then_some(())
}

/// All at once, as after a restart, and all behind by nearly a page, which is read in two parts.
#[test]
fn readers_that_come_together_take_no_more_than_a_process_lets_them() {
    let bus = Bus::with(&[("SHORTBUS_MAX_BYTES", "1000000")]);
    let id = bus.join();
    let text = format!("\"{}\"", "x".repeat(LARGE / limits::WINDOW as usize));
    (0..=limits::WINDOW).for_each(|_| _ = bus.publish(1, &text));
    let memory = bus.memory();
    let mut readers: Vec<_> = (0..TOO_MANY).map(|_| bus.connect()).collect();
    bus.worker.daemon.signal("STOP");
    for reader in &mut readers {
        reader.ask("GET", &format!("id={id}"), &[], b"");
    }
    bus.worker.daemon.signal("CONT");
    let whole = readers.iter_mut().filter_map(reads_whole).count();
    println!("{whole} of {TOO_MANY} read");
    assert!(whole >= TOO_MANY / 6, "{whole} of {TOO_MANY}");
    assert!(bus.peak_memory() < memory + GROWN, "{memory} -> {}", bus.peak_memory());
}

#[test]
fn bodies_on_their_way_take_no_more_together_than_a_process_lets_them() {
    let bus = Bus::with(&[("SHORTBUS_MAX_BYTES", "1000000")]);
    bus.join();
    let memory = bus.memory();
    let bytes = request("POST", "user=1", &[], format!("\"{}\"", "x".repeat(LARGE)).as_bytes());
    let (most, rest) = bytes.split_at(LARGE - 1_000);
    let mut slow: Vec<_> = (0..TOO_MANY).map(|_| bus.connect()).collect();
    for client in &mut slow {
        client.send(most);
    }
    assert_eq!(bus.connect().send(&bytes).answer().reply.outcome(), (503, "crowded".into()));
    assert_eq!(bus.connect().ask("GET", "", &[], b"").answer().reply.status, 200);
    assert!(bus.memory() < memory + GROWN, "{memory} -> {}", bus.memory());
    let mut statuses = BTreeMap::<u16, usize>::new();
    for client in &mut slow {
        *statuses.entry(client.send(rest).answer().reply.status).or_default() += 1;
    }
    println!("{statuses:?}");
    assert!(statuses.keys().eq(&[200, 503]) && statuses[&200] >= TOO_MANY / 6, "{statuses:?}");
    assert_eq!(bus.connect().ask("POST", "user=2", &[], b"[1]").answer().reply.status, 200);
}

#[test]
fn too_few_files_are_survived() {
    let (folder, memcached) = (Folder::new(), Memcached::start(&[]));
    copy(&folder);
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -n 64; exec \"$0\""]).arg(folder.join("chat"));
    let worker = Worker::run(shell.env("SHORTBUS_MEMCACHED", &memcached.address), folder.join("s"), &folder);
    let mut bus = Bus { folder, memcached, worker };
    let id = bus.join();
    // A burst: all have arrived before the first is looked at. Whoever is not told to come back is served.
    bus.worker.daemon.signal("STOP");
    let mut clients: Vec<Client> = (0..100).map(|_| bus.connect()).collect();
    clients.iter_mut().for_each(|client| _ = client.ask("GET", "", &[], b""));
    bus.worker.daemon.signal("CONT");
    let codes: BTreeSet<String> = clients.iter_mut().map(|client| client.answer().reply.outcome().1).collect();
    assert_eq!(codes, BTreeSet::from(["".into(), "crowded".into()]));
    drop(clients);
    let mut clients: Vec<Client> = (0..100).map(|_| bus.connect()).collect();
    clients.iter_mut().for_each(|client| _ = client.ask("GET", &format!("id={id}&wait=60"), &[], b""));
    thread::sleep(Duration::from_millis(300));
    let cpu = cpu(&bus);
    thread::sleep(Duration::from_secs(1));
    assert!(bus.worker.daemon.is_alive());
    assert!(self::cpu(&bus) - cpu < 20, "it spins");
    // Some wait, some are told to come back, the others stand in line; all are served when there is room.
    drop(clients);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(bus.ask("GET", &format!("id={id}"), "").reply.status, 200);
}

/// Hundredths of a second.
fn cpu(bus: &Bus) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", bus.worker.daemon.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn nginx_hands_on_streams_at_once_and_tells_when_a_client_leaves() {
    let site = Site::start(Front::NginxFastcgi);
    site.copy("chat");
    let (user, id) = site.join("chat");
    thread::scope(|scope| {
        let poll = scope.spawn(|| site.get(&format!("chat?user={user}&id={id}&wait=30")));
        let stream = scope.spawn(|| site.get(&format!("chat?id={id}&stream=1")));
        thread::sleep(Duration::from_millis(200));
        let started = Instant::now();
        site.publish("chat", 7, "\"hello\"");
        assert_eq!(data(&poll.join().unwrap()), ["hello"]);
        assert!(started.elapsed() < SOON);
        site.workers.lock().unwrap()[std::ffi::OsStr::new("chat")].daemon.signal("TERM");
        let reply = stream.join().unwrap();
        assert_eq!(reply.header("content-type"), Some("text/event-stream"));
        assert!(reply.text().contains("\"data\":\"hello\"}\n\n"), "{reply:?}");
    });
}

#[test]
fn in_cgi_waiting_is_off_unless_a_setting_allows_it() {
    let waiting: &[(&str, &str)] = &[("SHORTBUS_WAIT", "2")];
    let site = Site::with(Front::Bare, &[("waits", waiting), ("chat", &[])]);
    let (_, id) = site.join("chat");
    let started = Instant::now();
    assert_eq!(site.get("chat").json().as_object().unwrap().len(), 3);
    // A stream ends at once, and its client comes back.
    let stream = site.get(&format!("chat?id={id}&stream=1"));
    assert_eq!(stream.header("content-type"), Some("text/event-stream"));
    for query in ["wait=9", "wait=9&stream=0"] {
        let reply = site.get(&format!("chat?id={id}&{query}"));
        assert_eq!((reply.text(), reply.header("content-type")), ("[]", Some("application/json")));
    }
    assert!(started.elapsed() < SOON);
    let join = site.get("waits").json();
    assert_eq!((&join["wait"], &join["stream"]), (&2.into(), &true.into()));
    let id = join["id"].as_u64().unwrap();
    assert_eq!(site.get(&format!("waits?id={id}&wait=9")).text(), "[]");
    assert!((2_000..2_900).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
    thread::scope(|scope| {
        let poll = scope.spawn(|| site.get(&format!("waits?user=1&id={id}&wait=9")));
        let stream = scope.spawn(|| site.get(&format!("waits?user=1&id={id}&stream=1")));
        thread::sleep(Duration::from_millis(300));
        site.publish("waits", 2, "\"hello\"");
        assert_eq!(data(&poll.join().unwrap()), ["hello"]);
        let text = stream.join().unwrap().text().to_owned();
        assert!(text.starts_with("retry: ") && text.ends_with("\"user\":2,\"data\":\"hello\"}\n\n"), "{text}");
    });
}
