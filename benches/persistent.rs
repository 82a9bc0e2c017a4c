//! How fast the persistent mode is: prints a second table, in Markdown. `make bench` builds everything alike and runs
//! this.
//!
//! What is compared is measured in turns, in an order drawn anew for every round, so that whatever else the machine
//! does hits all alike. The bench judges nothing but that replies are right and that nobody misses a message.

mod clients;
#[path = "../tests/fixtures/mod.rs"]
#[allow(dead_code, unused_macros, reason = "each bench uses its part")]
mod fixtures;
mod measure;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clients::{Client, Epoll, Place, cpu, get, own_cpu, post};
use fixtures::daemon::{Daemon, Folder, executable, raise_file_limit, wait_for};
use fixtures::fastcgi_client;
use fixtures::fastcgi_server::{self, Bus, Worker};
use fixtures::memcached::Memcached;
use measure::{Random, Table, baseline, interleave, machine, median, quantile, spread};

/// Times that each kind of request has nginx for itself, for how long, and over how many connections.
const ROUNDS: usize = 7;
const ROUND: Duration = Duration::from_millis(400);
const CONNECTIONS: [usize; 2] = [4, 32];

/// Delivery: those who hear, times that each way of hearing has its turn, messages in one, and the pause between two.
const SUBSCRIBERS: usize = 10;
const DELIVERY_ROUNDS: usize = 5;
const MESSAGES: usize = 80;
const PAUSE: Duration = Duration::from_millis(50);
/// Messages to streams on a local store, and streams that idle there.
const LOCAL_MESSAGES: usize = 200;
const IDLE_STREAMS: usize = 1_000;
/// How often pages poll that do not wait.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Whoever has not heard a message by then has missed it.
const PATIENCE: Duration = Duration::from_secs(10);

/// The client that comes back after a while: polls, messages, and bytes of each.
const BEHIND_POLLS: usize = 200;
const BEHIND: usize = 1_000;
const BEHIND_BYTES: usize = 100;

/// Streams of one process, and messages to all of them, from each of two processes.
const STREAMS: usize = 10_000;
const STREAM_MESSAGES: usize = 10;
/// Each stream says something once in this time.
const IDLE: Duration = Duration::from_secs(15);

/// Pages that poll plainly, times that they do, and for how long.
const PAGES: usize = 1_000;
const PAGES_ROUNDS: usize = 3;
const PAGES_ROUND: Duration = Duration::from_secs(4);

/// Buses beside the hot one, those who hear on each, and messages on all of them together.
const BUSES: usize = 7;
const BUS_SUBSCRIBERS: usize = 2;
const BUS_MESSAGES: usize = 100;
const BUS_PAUSE: Duration = Duration::from_millis(20);
const BUS_ROUNDS: usize = 4;
const HOT_PUBLISHERS: usize = 16;

/// Two of shortbus with memcached, two with a local store, and one that answers without doing anything.
const PROCESSES: [&str; 5] = ["one", "two", "local", "beside", "nothing"];

/// Messages of a batch.
const BATCH: usize = 16;

const BODY: &str = r#"{"text":"Hello, everyone!"}"#;
/// What a publish answers.
const PUBLISHED: &str = r#"{"user":1,"id":"#;

const LEGEND: &str = "\
Medians, quartiles in parentheses. All through one nginx with one worker and its keep-alive, over TCP, with the
example configuration, but for the 10,000 streams, which are connections to the FastCGI socket itself; memcached over
TCP. *Nothing* is a FastCGI responder that reads each request and answers at once with an empty poll's reply. The
clients are one thread with epoll that reads and checks every reply, on the same machine; *CPU* says what each part
of it takes. Delivery: from just before the publisher sends its request, or starts the CGI process, until a subscriber
has the message, 20 messages a second in irregular intervals, each published by another way than the one before it;
pages that poll plainly do so every 500 ms. The browser client: in Node, messages of 100 bytes to another client in the
same process, which hears by a stream; in a loop, from its start until all are acknowledged. A longer round trip is made
by a proxy in front of the sender alone. *Idle*: with each stream's heartbeat. A page's time is from when its poll is
due.";

fn main() {
    let load = load_average();
    let files = raise_file_limit((STREAMS * 2) as u64);
    let mut table = Table::new();
    let site = Site::start();
    requests(&mut table, &site);
    delivery(&mut table, &site);
    local_delivery(&mut table, &site);
    idle(&mut table, &site);
    behind(&mut table, &site);
    sender(&mut table, &site);
    streams(&mut table, files);
    pages(&mut table, &site);
    buses(&mut table, &site);
    table.row("Machine", machine(), format!("load average {load} before, {} after", load_average()));
    println!("Persistent mode\n\n{}\n{LEGEND}", table.0);
}

fn load_average() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap().split(' ').take(1).collect()
}

/// nginx before five processes, at the addresses that begin with their names.
struct Site {
    place: Place,
    nginx: u32,
    memcached: Memcached,
    /// By the numbers in [`PROCESSES`].
    pids: Vec<u32>,
    folder: Folder,
    _daemons: Vec<Daemon>,
}

impl Site {
    fn start() -> Site {
        let (folder, memcached) = (Folder::new(), Memcached::start_tcp());
        let program = fastcgi_server::copy(&folder);
        let variables = [("SHORTBUS_MEMCACHED", &memcached.address[..])];
        let local = [("SHORTBUS_STORE", local_store(&folder))];
        let local = local.each_ref().map(|(name, value)| (*name, &value[..]));
        let mut daemons: Vec<Daemon> = PROCESSES[..4]
            .iter()
            .enumerate()
            .map(|(n, name)| (name, if n < 2 { variables } else { local }))
            .map(|(name, set)| Worker::start(&program, folder.join(format!("{name}.s")), &folder, &set).daemon)
            .collect();
        let mut nothing = Command::new(baseline("responder"));
        daemons.push(Daemon::start(nothing.arg(folder.join("nothing.s")), "nothing: it is built by make bench"));
        wait_for("the responder", || UnixStream::connect(folder.join("nothing.s")).is_ok());
        let pids = daemons.iter().map(Daemon::pid).collect();
        let (address, nginx) = start_nginx(&folder);
        let master = nginx.pid();
        daemons.push(nginx);
        let children = std::fs::read_to_string(format!("/proc/{master}/task/{master}/children")).unwrap();
        let nginx = children.trim().parse().expect("nginx's one worker");
        Site { place: Place::Http(address), nginx, memcached, pids, folder, _daemons: daemons }
    }

    fn client(&self) -> Client {
        Client::connect(&self.place)
    }

    /// The newest id of the bus at this address.
    fn join(&self, bus: &str) -> u64 {
        number_after(&self.client().exchange(&get(bus)).body, "\"id\":")
    }

    fn pid(&self, process: &str) -> u32 {
        self.pids[PROCESSES.iter().position(|name| *name == process).unwrap()]
    }

    fn memcached_pid(&self) -> u32 {
        number_after(&self.memcached.ask("stats\r\n"), "STAT pid ") as u32
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        std::fs::remove_dir_all(local_store(&self.folder)).ok();
    }
}

/// The folder of the local store, in memory as a bus without a setting has it.
fn local_store(folder: &Folder) -> String {
    let name = folder.join("").file_name().unwrap().to_str().unwrap().to_owned();
    let path = std::path::Path::new("/dev/shm").join(name);
    std::fs::create_dir_all(&path).unwrap();
    path.display().to_string()
}

/// The buses that nginx knows, each at the name of the process that serves it, `-` and its own.
fn bus_names() -> Vec<String> {
    let numbered = (0..BUSES).map(|n| format!("bus{n}"));
    ["chat", "published", "batches", "once", "delivery", "behind", "idle", "hot", "sender"]
        .map(String::from)
        .into_iter()
        .chain(numbered)
        .collect()
}

/// On a port that the kernel picks.
fn start_nginx(folder: &Folder) -> (SocketAddr, Daemon) {
    let root = folder.join("").display().to_string();
    // The repository's example, but for names, and with connections that are kept, as it advises.
    let block = include_str!("../examples/nginx-fastcgi.conf").rsplit_once('}').unwrap().0;
    let (mut upstreams, mut locations) = (String::new(), String::new());
    for process in PROCESSES {
        upstreams += &format!("upstream {process} {{ server unix:{root}{process}.s; keepalive 32; }}\n");
        for bus in bus_names() {
            let one = block.replace("cgi-bin/chat", &format!("cgi-bin/{process}-{bus}"));
            let pass = format!("fastcgi_keep_conn on; fastcgi_pass {process};");
            let one = one.replace("fastcgi_pass unix:/run/shortbus.sock;", &pass);
            locations += &format!("{}}}\n", one.replace("SHORTBUS_BUS chat;", &format!("SHORTBUS_BUS {bus};")));
        }
    }
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("{name}_temp_path {root}{name};\n"))
        .concat();
    let user = if rustix::process::geteuid().is_root() { "user root;\n" } else { "" };
    for _ in 0..20 {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = format!(
            "{user}daemon off;\npid {root}pid;\nerror_log {root}error.log warn;\nworker_processes 1;\n\
             worker_rlimit_nofile 8192;\nevents {{ worker_connections 4096; }}\n\
             http {{ access_log off; {temp} {upstreams}\nserver {{ listen {address} backlog=1024; {locations} }} }}\n"
        );
        std::fs::write(folder.join("nginx.conf"), config).unwrap();
        let mut nginx = Command::new("/usr/sbin/nginx");
        nginx.args(["-e", &format!("{root}error.log"), "-c", &format!("{root}nginx.conf")]).stderr(Stdio::null());
        let mut daemon = Daemon::start(&mut nginx, "nginx-light");
        let mut up = false;
        wait_for("nginx", || {
            // The pid file is written after the port is bound; so what answers there is this nginx.
            up = folder.join("pid").exists() && TcpStream::connect(address).is_ok();
            up || !daemon.is_alive()
        });
        if up {
            return (address, daemon);
        }
        let log = folder.text("error.log");
        assert!(log.contains("Address already in use"), "nginx ended: {log}");
    }
    panic!("nginx found no port");
}

/// The number behind this text.
fn number_after(text: &str, label: &str) -> u64 {
    let rest = text.split_once(label).unwrap_or_else(|| panic!("no {label} in {text}")).1;
    rest.split(|char: char| !char.is_ascii_digit()).next().unwrap().parse().unwrap()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Sorts times, in milliseconds: median and 99th percentile.
fn latency(times: &mut [f64]) -> String {
    times.sort_by(f64::total_cmp);
    format!("{:.2} ms, 99 % within {:.2}", median(times), quantile(times, 0.99))
}

/// Requests as fast as they are answered.
fn requests(table: &mut Table, site: &Site) {
    let poll = |process: &str, newest: &str| {
        let request = get(&format!("{process}-chat?user=2&id={}", site.join(newest)));
        Box::new(move || request.clone()) as Box<dyn Fn() -> Vec<u8>>
    };
    let publish = |query: &str, body: &str| {
        let request = post(query, body);
        Box::new(move || request.clone()) as Box<dyn Fn() -> Vec<u8>>
    };
    let keys = AtomicU64::new(0);
    let once = |process: &'static str| {
        let keys = &keys;
        let key = move || keys.fetch_add(1, Ordering::Relaxed);
        Box::new(move || post(&format!("{process}-once?user=1&once={}", key()), BODY)) as Box<dyn Fn() -> Vec<u8>>
    };
    let batch = format!("[{}]", vec![BODY; BATCH].join(","));
    // What, served by whom, how a reply begins, the request, and the messages in one.
    let kinds = [
        ("nothing", "nothing", "[]", poll("nothing", "one-chat"), 1),
        ("nothing, to a POST", "nothing", "[]", publish("nothing-published?user=1", BODY), 1),
        ("**empty poll**", "one", "[]", poll("one", "one-chat"), 1),
        ("**publish**", "one", PUBLISHED, publish("one-published?user=1", BODY), 1),
        ("**publish** with `once`", "one", PUBLISHED, once("one"), 1),
        ("messages in **batches** of 16", "one", PUBLISHED, publish("one-batches?user=1&batch=1", &batch), BATCH),
        ("**empty poll**, local store", "local", "[]", poll("local", "local-chat"), 1),
        ("**publish**, local store", "local", PUBLISHED, publish("local-published?user=1", BODY), 1),
        ("**publish** with `once`, local store", "local", PUBLISHED, once("local"), 1),
        (
            "messages in **batches** of 16, local store",
            "local",
            PUBLISHED,
            publish("local-batches?user=1&batch=1", &batch),
            BATCH,
        ),
    ];
    // The process's, nginx's, memcached's and the clients' time, microseconds a request.
    let memcached = site.memcached_pid();
    let mut costs = vec![Vec::new(); kinds.len() * CONNECTIONS.len()];
    let rates = interleave(costs.len(), ROUNDS, |job| {
        let (_, process, expect, request, messages) = &kinds[job / CONNECTIONS.len()];
        let used = || [cpu(site.pid(process)), cpu(site.nginx), cpu(memcached), own_cpu()];
        let before = used();
        let (count, time) = closed_loop(&site.place, CONNECTIONS[job % CONNECTIONS.len()], request, expect);
        let after = used();
        costs[job].push([0, 1, 2, 3].map(|n| (after[n] - before[n]).as_secs_f64() * 1e6 / count as f64));
        (count * messages) as f64 / time.as_secs_f64()
    });
    for (c, connections) in CONNECTIONS.iter().enumerate() {
        for (n, (what, ..)) in kinds.iter().enumerate() {
            let job = n * CONNECTIONS.len() + c;
            let ratio = |to: usize| median(&rates[job]) / median(&rates[to * CONNECTIONS.len() + c]);
            let cost = |part: usize| {
                let mut values: Vec<f64> = costs[job].iter().map(|cost| cost[part]).collect();
                values.sort_by(f64::total_cmp);
                median(&values)
            };
            let [own, nginx, memcached, clients] = [0, 1, 2, 3].map(cost);
            let cpu =
                format!("CPU {own:.0} µs a request, nginx {nginx:.0}, memcached {memcached:.0}, clients {clients:.0}");
            let compared = match n {
                0 => cpu,
                2 => format!("{:.2} × nothing (goal 0.7); {cpu}", ratio(0)),
                3 => format!("{:.2} × nothing, {:.2} × empty poll (goal 0.55); {cpu}", ratio(0), ratio(2)),
                6 => format!("{:.2} × nothing (goal 0.9); {cpu}", ratio(0)),
                7 => format!("{:.2} × nothing (goal 0.75), {:.2} × to a POST; {cpu}", ratio(0), ratio(1)),
                _ => format!("{:.2} × nothing; {cpu}", ratio(0)),
            };
            table.row(&format!("{what}, {connections} connections"), spread(&rates[job], 0, "a second"), compared);
        }
    }
}

/// Each of the connections sends its next request when it has its reply: how many there were, in what time.
fn closed_loop(place: &Place, connections: usize, request: &dyn Fn() -> Vec<u8>, expect: &str) -> (usize, Duration) {
    let mut epoll = Epoll::new();
    let mut clients: Vec<Client> = (0..connections).map(|_| Client::connect_nonblocking(place)).collect();
    let start = Instant::now();
    for (n, client) in clients.iter_mut().enumerate() {
        epoll.add(client, n);
        client.send(&request());
    }
    let (mut count, mut open) = (0, connections);
    while open > 0 {
        for n in epoll.wait(start + PATIENCE) {
            let client = &mut clients[n];
            assert!(client.read(), "closed without a reply");
            let Some(reply) = client.take_reply() else { continue };
            assert!(reply.body.starts_with(expect), "{}", reply.body);
            count += 1;
            if start.elapsed() >= ROUND {
                open -= 1;
                continue;
            }
            if reply.closes() {
                client.reconnect();
                epoll.add(client, n);
            }
            client.send(&request());
        }
        assert!(start.elapsed() < PATIENCE, "{open} were not answered");
    }
    (count, start.elapsed())
}

/// The messages of a delivery: when each was sent, by its number.
struct Sent {
    start: Instant,
    times: Vec<AtomicU64>,
}

impl Sent {
    fn new(messages: usize) -> Sent {
        Sent { start: Instant::now(), times: (0..messages).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Message number `n`, which is sent now.
    fn message(&self, n: usize) -> String {
        self.times[n].store(self.start.elapsed().as_nanos() as u64, Ordering::Release);
        format!("{{\"n\":{n},\"text\":\"Hello, everyone!\"}}")
    }

    /// Milliseconds from then to now.
    fn age(&self, n: usize) -> f64 {
        millis(self.start.elapsed().saturating_sub(Duration::from_nanos(self.times[n].load(Ordering::Acquire))))
    }
}

/// The numbers of the messages in a reply or events.
fn numbers(text: &str) -> impl Iterator<Item = usize> {
    text.match_indices("\"data\":{\"n\":").map(|(at, label)| number_after(&text[at..], label) as usize)
}

/// Whole events that have come; the rest stays.
fn take_events(text: &mut Vec<u8>) -> String {
    let end = text.windows(2).rposition(|two| two == b"\n\n").map_or(0, |at| at + 2);
    let events: Vec<u8> = text.drain(..end).collect();
    let events = String::from_utf8(events).unwrap();
    assert!(!events.contains("event: missed"), "{events}");
    events
}

/// Those who hear by event streams, each of them of every message on its bus, in their order.
struct Streams {
    epoll: Epoll,
    clients: Vec<Client>,
    /// How many messages each has had.
    had: Vec<usize>,
}

impl Streams {
    /// Returns when all have begun.
    fn open(place: &Place, requests: &[Vec<u8>]) -> Streams {
        let epoll = Epoll::new();
        let mut clients = Vec::new();
        for (n, request) in requests.iter().enumerate() {
            let mut client = Client::connect_nonblocking(place);
            client.send(request);
            epoll.add(&client, n);
            clients.push(client);
        }
        let mut streams = Streams { epoll, had: vec![0; clients.len()], clients };
        let mut begun = 0;
        streams.read_until(|_, events| {
            begun += events.matches("event: cursor").count();
            begun == requests.len()
        });
        streams
    }

    /// Reads events, and hands them to `done` with their client's number until that says so.
    fn read_until(&mut self, mut done: impl FnMut(usize, &str) -> bool) {
        let mut deadline = Instant::now() + PATIENCE;
        loop {
            for n in self.epoll.wait(deadline) {
                let client = &mut self.clients[n];
                assert!(client.read(), "stream {n} has ended");
                client.take_text();
                let events = take_events(&mut client.text);
                // Heartbeats alone are no progress.
                if events.contains("id: ") {
                    deadline = Instant::now() + PATIENCE;
                }
                if done(n, &events) {
                    return;
                }
            }
            assert!(Instant::now() < deadline, "somebody has missed a message: they had {:?}", self.had);
        }
    }

    /// The share of a core that their process takes while nothing happens, percent.
    fn idle(&mut self, pid: u32) -> f64 {
        let (before, start) = (cpu(pid), Instant::now());
        let end = start + IDLE;
        while Instant::now() < end {
            for n in self.epoll.wait(end) {
                assert!(self.clients[n].read(), "stream {n} has ended");
            }
        }
        100.0 * (cpu(pid) - before).as_secs_f64() / start.elapsed().as_secs_f64()
    }

    /// Hears `messages` by each; `heard` is told the client's number and the message's.
    fn hear(&mut self, messages: usize, mut heard: impl FnMut(usize, usize)) {
        let mut had = std::mem::take(&mut self.had);
        let goal: usize = had.iter().sum::<usize>() + messages * had.len();
        let mut sum = goal - messages * had.len();
        self.read_until(|n, events| {
            for number in numbers(events) {
                assert_eq!(number, had[n] % messages, "stream {n}: every message, once and in order");
                had[n] += 1;
                sum += 1;
                heard(n, number);
            }
            sum == goal
        });
        self.had = had;
    }
}

/// From publish to received.
fn delivery(table: &mut Table, site: &Site) {
    let sources = ["same process", "another process", "CGI"];
    let ways = ["Stream", "Long poll", "Plain polls"];
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); ways.len() * sources.len()];
    interleave(ways.len(), DELIVERY_ROUNDS, |way| {
        let sent = Sent::new(MESSAGES);
        let id = site.join("one-delivery");
        let publish = || publish_by_turns(site, &sent);
        thread::scope(|scope| {
            let mut heard = |_: usize, n: usize| times[way * sources.len() + n % sources.len()].push(sent.age(n));
            if way == 0 {
                let request = get(&format!("one-delivery?user=2&id={id}&stream=1"));
                let mut streams = Streams::open(&site.place, &vec![request; SUBSCRIBERS]);
                scope.spawn(publish);
                streams.hear(MESSAGES, heard);
            } else {
                scope.spawn(publish);
                poll_all(site, id, way == 1, &mut heard);
            }
        });
        0.0
    });
    for (n, times) in times.iter_mut().enumerate() {
        let (way, source) = (n / sources.len(), n % sources.len());
        let compared = match (way, source) {
            (0, 0) => "goal 1.5 and 4",
            (0, _) => "goal 6 and 15",
            _ => "",
        };
        let messages = times.len() / SUBSCRIBERS;
        let compared = format!("{compared}{}{messages} messages", if compared.is_empty() { "" } else { "; " });
        table.row(&format!("{}, published by {}", ways[way], sources[source]), latency(times), compared);
    }
}

/// Publishes all of them, some 20 a second, through the process of the subscribers, another one, and by CGI.
fn publish_by_turns(site: &Site, sent: &Sent) {
    let mut client = site.client();
    let mut random = Random(2);
    for n in 0..sent.times.len() {
        // At no certain moment of the watcher's or the pages' intervals.
        thread::sleep(PAUSE / 2 + PAUSE * random.below(1_000) as u32 / 1_000);
        let target = |process: &str| format!("{process}-delivery?user=1");
        let reply = match n % 3 {
            0 => client.exchange(&post(&target("one"), &sent.message(n))).body,
            1 => client.exchange(&post(&target("two"), &sent.message(n))).body,
            _ => cgi(("SHORTBUS_MEMCACHED", &site.memcached.address), &sent.message(n)),
        };
        assert!(reply.contains(PUBLISHED), "{reply}");
    }
}

/// Publishes by CGI, with the setting that says where the bus lives.
fn cgi(place: (&str, &str), body: &str) -> String {
    let mut command = Command::new(executable());
    command.env_clear().envs([
        ("GATEWAY_INTERFACE", "CGI/1.1"),
        ("REQUEST_METHOD", "POST"),
        ("QUERY_STRING", "user=1"),
        ("CONTENT_LENGTH", &body.len().to_string()),
        place,
        ("SHORTBUS_BUS", "delivery"),
    ]);
    let (reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, body.as_bytes()).unwrap();
    drop(writer);
    String::from_utf8(command.stdin(reader).output().unwrap().stdout).unwrap()
}

/// Hears all messages by polls, which wait or come every [`POLL_INTERVAL`].
fn poll_all(site: &Site, id: u64, wait: bool, heard: &mut dyn FnMut(usize, usize)) {
    let mut epoll = Epoll::new();
    let start = Instant::now();
    let mut random = Random(3);
    // When each polls next; none while it has no reply.
    let mut due: Vec<Option<Instant>> = (0..SUBSCRIBERS)
        .map(|_| Some(start + if wait { Duration::ZERO } else { POLL_INTERVAL * random.below(1_000) as u32 / 1_000 }))
        .collect();
    let mut ids = [id; SUBSCRIBERS];
    let mut had = [0; SUBSCRIBERS];
    let mut clients: Vec<Client> = (0..SUBSCRIBERS).map(|_| Client::connect_nonblocking(&site.place)).collect();
    clients.iter().enumerate().for_each(|(n, client)| epoll.add(client, n));
    while had.iter().any(|&had| had < MESSAGES) {
        for n in 0..SUBSCRIBERS {
            if due[n].is_some_and(|due| due <= Instant::now()) {
                due[n] = None;
                let wait = if wait { "&wait=60" } else { "" };
                clients[n].send(&get(&format!("one-delivery?user=2&id={}{wait}", ids[n])));
            }
        }
        let next = due.iter().flatten().min().copied();
        for n in epoll.wait(next.unwrap_or(start + PATIENCE * 2)) {
            let client = &mut clients[n];
            assert!(client.read(), "closed without a reply");
            let Some(reply) = client.take_reply() else { continue };
            assert!(reply.header("shortbus-missed").is_none(), "{reply:?}");
            ids[n] = reply.header("shortbus-last-id").unwrap().parse().unwrap();
            for number in numbers(&reply.body) {
                assert_eq!(number, had[n], "subscriber {n}: every message, once and in order");
                had[n] += 1;
                heard(n, number);
            }
            if reply.closes() {
                client.reconnect();
                epoll.add(client, n);
            }
            due[n] = Some(Instant::now() + if wait { Duration::ZERO } else { POLL_INTERVAL });
        }
        assert!(start.elapsed() < PATIENCE * 2, "somebody has missed a message: they had {had:?}");
    }
}

/// One poll of a client that was away for a while.
fn behind(table: &mut Table, site: &Site) {
    let mut client = site.client();
    let body = format!("\"{}\"", "x".repeat(BEHIND_BYTES - 2));
    let polls = ["one", "local"].map(|process| {
        let id = site.join(&format!("{process}-behind"));
        for _ in 0..BEHIND {
            client.exchange(&post(&format!("{process}-behind?user=1"), &body));
        }
        let newest = site.join(&format!("{process}-behind"));
        [newest, id].map(|id| get(&format!("{process}-behind?user=2&id={id}")))
    });
    let polls = polls.as_flattened();
    let times = interleave(polls.len(), BEHIND_POLLS, |poll| {
        let start = Instant::now();
        let reply = client.exchange(&polls[poll]);
        let time = millis(start.elapsed());
        assert_eq!(reply.body.matches(&body).count(), poll % 2 * BEHIND);
        time
    });
    for (n, (store, goal)) in [("", "goal 3 ms"), (", local store", "goal 1 ms")].iter().enumerate() {
        let [empty, behind] = [0, 1].map(|poll| spread(&times[n * 2 + poll], 2, "ms"));
        let what = format!("One poll, 1,000 messages of 100 bytes behind{store}");
        table.row(&what, behind, format!("{goal}; empty poll {empty}"));
    }
}

/// From the reply to the publisher until a stream has the message, which another process has published.
fn local_delivery(table: &mut Table, site: &Site) {
    let id = site.join("local-delivery");
    let request = get(&format!("local-delivery?user=2&id={id}&stream=1"));
    let mut streams = Streams::open(&site.place, &vec![request; SUBSCRIBERS]);
    let sent = Sent::new(LOCAL_MESSAGES);
    let replied = Sent::new(LOCAL_MESSAGES);
    let mut received = vec![Vec::new(); LOCAL_MESSAGES];
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = site.client();
            let mut random = Random(5);
            for n in 0..LOCAL_MESSAGES {
                thread::sleep(PAUSE / 2 + PAUSE * random.below(1_000) as u32 / 1_000);
                let message = sent.message(n);
                let reply = match n % 2 {
                    0 => client.exchange(&post("beside-delivery?user=1", &message)).body,
                    _ => cgi(("SHORTBUS_STORE", &local_store(&site.folder)), &message),
                };
                replied.message(n);
                assert!(reply.contains(PUBLISHED), "{reply}");
            }
        });
        streams.hear(LOCAL_MESSAGES, |_, n| received[n].push(Instant::now()));
    });
    for (way, source) in ["another process", "CGI"].iter().enumerate() {
        let numbers = (0..LOCAL_MESSAGES).filter(|n| n % 2 == way);
        let times = |from: &Sent| -> Vec<f64> {
            let begin = |n: usize| from.start + Duration::from_nanos(from.times[n].load(Ordering::Acquire));
            let each = |n: usize| received[n].iter().map(move |at: &Instant| (n, at));
            let times = numbers.clone().flat_map(each);
            times.map(|(n, at)| millis(at.saturating_duration_since(begin(n)))).collect()
        };
        let [mut whole, mut beyond] = [times(&sent), times(&replied)];
        let compared = format!("goal 1 and 3; from the request on {}", latency(&mut whole));
        let what = format!("Stream, local store, published by {source}: beyond the publisher's reply");
        table.row(&what, latency(&mut beyond), compared);
    }
}

/// Streams on a local store, on which nothing happens.
fn idle(table: &mut Table, site: &Site) {
    let id = site.join("local-idle");
    let request = get(&format!("local-idle?user=2&id={id}&stream=1"));
    let mut crowd = Streams::open(&site.place, &vec![request; IDLE_STREAMS]);
    let share = crowd.idle(site.pid("local"));
    table.row(
        &format!("{IDLE_STREAMS} streams, local store, idle for 15 s"),
        format!("{share:.2} % of a core"),
        "goal 0.3 %",
    );
}

/// The browser client in Node: messages in a loop, and messages in regular intervals over long round trips.
fn sender(table: &mut Table, site: &Site) {
    let Place::Http(address) = site.place else { unreachable!() };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/clients/sender.mjs");
    let output = Command::new("node").arg(script).arg(format!("http://{address}/cgi-bin/one-sender")).output();
    let output = output.expect("node: make bench installs it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let (what, numbers) = line.split_once(' ').unwrap();
        let mut numbers: Vec<f64> = numbers.split(' ').map(|number| number.parse().unwrap()).collect();
        numbers.sort_by(f64::total_cmp);
        let Ok(round_trip) = what.parse::<f64>() else {
            table.row("The browser client, 10,000 messages in a loop", spread(&numbers, 0, "a second"), "goal 10,000");
            continue;
        };
        let (goal, worst) = (1.5 * round_trip + 50.0, quantile(&numbers, 1.0));
        let what = format!("– 60 messages a second, round trip {round_trip} ms longer");
        table.row(&what, format!("{}, worst {worst:.0}", latency(&mut numbers)), format!("goal: worst {goal}"));
    }
}

/// Many streams in one process, and a message to all of them.
fn streams(table: &mut Table, files: u64) {
    // The process keeps an eighth of its connections for those who do not wait.
    let streams = STREAMS.min(files.saturating_sub(100) as usize * 7 / 8);
    let bus = Bus::start();
    let another = bus.another();
    let place = Place::FastCgi(bus.worker.socket.clone());
    let id = bus.join();
    let request = fastcgi_client::request("GET", &format!("user=2&id={id}&stream=1"), &[], b"");
    drop(Streams::open(&place, &vec![request.clone(); 10]));
    thread::sleep(Duration::from_millis(200));
    let pid = bus.worker.daemon.pid();
    let (memory, used, start) = (bus.memory(), cpu(pid), Instant::now());
    let mut crowd = Streams::open(&place, &vec![request; streams]);
    let (time, used) = (start.elapsed(), cpu(pid) - used);
    let growth = |memory_now: u64| (memory_now - memory) as f64 / streams as f64;
    thread::sleep(Duration::from_secs(1));
    let name = format!("{} streams in one process", streams);
    let limits = format!("RLIMIT_NOFILE at least {} in it; {files} here", streams * 8 / 7 + 100);
    let started =
        format!("begun in {:.0} ms, CPU {:.0} µs each", millis(time), used.as_secs_f64() * 1e6 / streams as f64);
    let size = bus.memory();
    table.row(
        &name,
        format!("{:.1} KB each", growth(size)),
        format!("goal 8 KB; {size} KB in all; {started}; {limits}"),
    );

    let share = crowd.idle(pid);
    table.row("– idle for 15 s", format!("{share:.2} % of a core"), "goal 2 %");

    for (what, socket) in [("same process", &bus.worker.socket), ("another process", &another.socket)] {
        let mut publisher = fastcgi_client::Client::connect(socket);
        let (mut times, mut used) = (Vec::new(), Vec::new());
        for _ in 0..STREAM_MESSAGES {
            thread::sleep(Duration::from_millis(300));
            let sent = Sent::new(1);
            let before = cpu(pid);
            publisher.ask("POST", "user=1", &[], sent.message(0).as_bytes());
            let mut last = 0.0;
            crowd.hear(1, |_, n| last = sent.age(n));
            assert_eq!(publisher.answer().reply.status, 200);
            times.push(last);
            used.push((cpu(pid) - before).as_secs_f64() * 1e6 / streams as f64);
        }
        times.sort_by(f64::total_cmp);
        used.sort_by(f64::total_cmp);
        let compared = format!("goal 300 ms; CPU {:.1} µs each; nobody missed any of {STREAM_MESSAGES}", median(&used));
        table.row(&format!("– one message to all, {what}"), spread(&times, 0, "ms"), compared);
    }
    let growth = growth(bus.memory());
    table.row("– memory afterwards", format!("{growth:.1} KB each"), "");
}

/// Many pages that poll plainly.
fn pages(table: &mut Table, site: &Site) {
    let id = site.join("one-chat");
    let mut times = [const { Vec::new() }; 2];
    let shares = RefCell::new([const { Vec::new() }; 2]);
    let memcached = site.memcached_pid();
    let mut others = [const { Vec::new() }; 3];
    let processes = ["nothing", "one"];
    interleave(processes.len(), PAGES_ROUNDS, |n| {
        let (process, pid) = (processes[n], site.pid(processes[n]));
        let used = || [cpu(pid), cpu(site.nginx), cpu(memcached), own_cpu()];
        let (before, start) = (used(), Instant::now());
        times[n].extend(poll_at_intervals(site, &get(&format!("{process}-chat?user=2&id={id}"))));
        let after = used();
        let share = |n: usize| 100.0 * (after[n] - before[n]).as_secs_f64() / start.elapsed().as_secs_f64();
        shares.borrow_mut()[n].push(share(0));
        if n == 1 {
            (0..others.len()).for_each(|n| others[n].push(share(n + 1)));
        }
        0.0
    });
    let share = |samples: &mut Vec<f64>| {
        samples.sort_by(f64::total_cmp);
        median(samples)
    };
    let [nothing, own] = &mut *shares.borrow_mut();
    let [nothing_times, own_times] = &mut times;
    let polls = own_times.len();
    let what = format!("{PAGES} pages that poll every 500 ms");
    let compared = format!("goal 99 % within 10; nothing {}; all {polls} served", latency(nothing_times));
    table.row(&what, latency(own_times), compared);
    let [nginx, memcached, clients] = others.each_mut().map(share);
    let compared = format!(
        "nothing {:.1} %; nginx {nginx:.1} %, memcached {memcached:.1} %, clients {clients:.1} %",
        share(nothing)
    );
    table.row("– share of a core", format!("{:.1} %", share(own)), compared);
}

/// Each page polls at its times, whatever happens: how long after them it had its reply, milliseconds.
fn poll_at_intervals(site: &Site, request: &[u8]) -> Vec<f64> {
    let mut epoll = Epoll::new();
    let mut clients: Vec<Client> = (0..PAGES).map(|_| Client::connect_nonblocking(&site.place)).collect();
    clients.iter().enumerate().for_each(|(n, client)| epoll.add(client, n));
    let start = Instant::now();
    let end = start + PAGES_ROUND;
    let mut next: VecDeque<(Instant, usize)> =
        (0..PAGES).map(|n| (start + POLL_INTERVAL * n as u32 / PAGES as u32, n)).collect();
    // Since when each page has waited.
    let mut waits: Vec<VecDeque<Instant>> = vec![VecDeque::new(); PAGES];
    let (mut sent, mut times) = (0, Vec::new());
    while !next.is_empty() || times.len() < sent {
        while let Some(&(due, n)) = next.front()
            && due <= Instant::now()
        {
            next.pop_front();
            sent += 1;
            waits[n].push_back(due);
            if waits[n].len() == 1 {
                clients[n].send(request);
            }
            if due + POLL_INTERVAL < end {
                next.push_back((due + POLL_INTERVAL, n));
            }
        }
        for n in epoll.wait(next.front().map_or(end + PATIENCE, |(due, _)| *due)) {
            let client = &mut clients[n];
            assert!(client.read(), "closed without a reply");
            let Some(reply) = client.take_reply() else { continue };
            assert_eq!(reply.body, "[]");
            times.push(millis(waits[n].pop_front().unwrap().elapsed()));
            if reply.closes() {
                client.reconnect();
                epoll.add(client, n);
            }
            if !waits[n].is_empty() {
                client.send(request);
            }
        }
        assert!(Instant::now() < end + PATIENCE, "{} polls were not answered", sent - times.len());
    }
    times
}

/// Several buses in one process, one of them hot.
fn buses(table: &mut Table, site: &Site) {
    let hot = [None, Some("two-hot"), Some("one-hot")];
    let mut times = hot.map(|_| Vec::new());
    let mut rates = hot.map(|_| Vec::new());
    interleave(hot.len(), BUS_ROUNDS, |job| {
        let requests: Vec<Vec<u8>> = (0..BUSES * BUS_SUBSCRIBERS)
            .map(|n| format!("bus{}", n % BUSES))
            .map(|bus| get(&format!("one-{bus}?user=2&id={}&stream=1", site.join(&format!("one-{bus}")))))
            .collect();
        let mut streams = Streams::open(&site.place, &requests);
        let (sent, stop) = (Sent::new(BUS_MESSAGES * BUSES), AtomicBool::new(false));
        thread::scope(|scope| {
            let publishers = hot[job].map(|target| scope.spawn(|| publish_until(site, target, &stop)));
            scope.spawn(|| publish_on_all(site, &sent));
            // Of all messages, each hears those of its bus.
            let goal = BUS_MESSAGES * requests.len();
            let mut count = 0;
            let mut had = vec![0; requests.len()];
            streams.read_until(|n, events| {
                for number in numbers(events) {
                    assert_eq!(number, had[n] * BUSES + n % BUSES, "stream {n}: every message, once and in order");
                    had[n] += 1;
                    count += 1;
                    times[job].push(sent.age(number));
                }
                count == goal
            });
            stop.store(true, Ordering::Relaxed);
            rates[job].extend(publishers.map(|thread| thread.join().unwrap()));
        });
        0.0
    });
    let whose = ["no hot one", "the hot one in a process of its own", "the hot one in the same process"];
    for (job, whose) in whose.iter().enumerate() {
        rates[job].sort_by(f64::total_cmp);
        let rate = if rates[job].is_empty() { "".into() } else { spread(&rates[job], 0, "a second on the hot one") };
        table.row(&format!("{BUSES} buses, streams; {whose}"), latency(&mut times[job]), rate);
    }
}

/// Publishes on each bus in turn.
fn publish_on_all(site: &Site, sent: &Sent) {
    let mut client = site.client();
    let mut random = Random(4);
    for n in 0..sent.times.len() {
        thread::sleep(BUS_PAUSE / BUSES as u32 / 2 + BUS_PAUSE * random.below(1_000) as u32 / (1_000 * BUSES as u32));
        let reply = client.exchange(&post(&format!("one-bus{}?user=1", n % BUSES), &sent.message(n)));
        assert!(reply.body.contains(PUBLISHED), "{}", reply.body);
    }
}

/// Publishes as fast as it goes: how many a second.
fn publish_until(site: &Site, target: &str, stop: &AtomicBool) -> f64 {
    let request = post(&format!("{target}?user=1"), BODY);
    let (mut count, mut total) = (0, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let (more, time) = closed_loop(&site.place, HOT_PUBLISHERS, &|| request.clone(), PUBLISHED);
        count += more;
        total += time;
    }
    count as f64 / total.as_secs_f64()
}
