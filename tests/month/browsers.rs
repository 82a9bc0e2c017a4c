//! The browser client in Node, as a page has it: one client for each bus, which reads and publishes, and whose connections
//! are cut.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::checker::{Ack, Sent};
use super::faults::Fault;
use super::messages::{key, name, text};
use super::readers::{Kind, Missed, Reader};
use super::sites::{Bus, Deployment, STEPS};
use super::{Month, Random, Stops};

/// Where the publishers that are browsers begin.
const BROWSERS: u64 = 0x600;
/// Within what a publish of a browser may be answered: the time of its tries.
const DEADLINE: u64 = 15_000;

/// All browsers, which are one process of Node.
pub(super) struct Browsers<'a> {
    month: &'a Month,
    node: Mutex<Child>,
    commands: Mutex<ChildStdin>,
    clients: Vec<Client<'a>>,
    /// When the last of them had heard the last message of its bus, microseconds of the run.
    pub(super) closed: AtomicU64,
    pub(super) failed: AtomicU64,
}

/// A browser's client of a bus.
struct Client<'a> {
    at: &'a Deployment<'a>,
    bus: &'a Bus,
    /// As a publisher.
    number: u64,
    state: Mutex<State>,
}

struct State {
    reader: Reader,
    /// How many it has sent, and when those were given that have no answer yet.
    sends: u64,
    pending: BTreeMap<u64, u64>,
    /// The newest id of its own, and of which send that is.
    newest: (u64, u64),
}

impl Display for State {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let State { reader, sends, pending, newest } = self;
        write!(f, "{} began at {}, has sent {sends}, newest {newest:?}, pending {pending:?}", reader.name, reader.first)
    }
}

impl<'a> Browsers<'a> {
    pub(super) fn start(month: &'a Month, sites: &'a [Deployment]) -> (Browsers<'a>, ChildStdout) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser/month.mjs");
        let mut command = Command::new("node");
        command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(sites[0].folder.start_log());
        let mut node = command.spawn().unwrap_or_else(|error| panic!("node: {error}; make test installs it"));
        let (commands, told) = (node.stdin.take().unwrap(), node.stdout.take().unwrap());
        let clients = sites.iter().flat_map(|at| at.buses.iter().map(|bus| Client::new(at, bus))).collect();
        let (node, commands) = (Mutex::new(node), Mutex::new(commands));
        let (closed, failed) = Default::default();
        (Browsers { month, node, commands, clients, closed, failed }, told)
    }

    /// Has Node do something; where it has ended, whoever listens to it says so.
    fn command(&self, command: Value) {
        let _ = self.commands.lock().unwrap().write_all(format!("{command}\n").as_bytes());
    }

    /// Has them publish, and cuts connections, until there are no faults any more; then each publishes until that works.
    pub(super) fn work(&self, mut random: Random) {
        let _stops = Stops(self.month);
        for (n, client) in self.clients.iter().enumerate() {
            // Those of signed buses hear themselves, too.
            let user = (!client.bus.signed).then_some(client.number);
            let deadline = DEADLINE.min(client.bus.ttl * 1_000 / 2);
            let options = json!({"interval": 250, "deadline": deadline, "echo": client.bus.signed, "user": user});
            let options: Value =
                options.as_object().unwrap().clone().into_iter().filter(|(_, v)| !v.is_null()).collect();
            self.command(json!(["open", n, client.at.site.address, client.bus.name, options]));
        }
        while !self.month.is_calm() && !self.month.failed.load(SeqCst) {
            thread::sleep(random.millis(10, 60));
            let n = random.below(self.clients.len() as u64) as usize;
            match random.below(100) {
                _ if random.below(100) == 0 => {
                    let ahead = if random.percent(30) { 0 } else { random.choose(&STEPS) };
                    self.command(json!(["step", ahead]));
                    self.month.count(Fault::Step, 1);
                }
                0..15 => {
                    let how = random.choose(&["now", "client", "site"]);
                    self.command(json!(["cut", n, random.below(100), how]));
                }
                15..20 => (0..random.below(20)).for_each(|_| self.send(n)),
                _ => self.send(n),
            }
        }
        for n in 0..self.clients.len() {
            let state = || self.clients[n].state.lock().unwrap();
            let wait_until = |is_so: &dyn Fn() -> bool| {
                while !is_so() && !self.month.is_lost(|| state().to_string()) {
                    thread::sleep(Duration::from_millis(20));
                }
            };
            wait_until(&|| state().reader.first > 0);
            let before = state().sends;
            while state().newest.1 <= before && !self.month.failed.load(SeqCst) {
                self.send(n);
                wait_until(&|| state().pending.is_empty());
            }
        }
    }

    fn send(&self, n: usize) {
        let client = &self.clients[n];
        let mut state = client.state.lock().unwrap();
        if state.reader.first == 0 {
            return;
        }
        state.sends += 1;
        let send = state.sends;
        state.pending.insert(send, self.month.now());
        drop(state);
        self.command(json!(["send", n, send, text(key(client.number, send, 0))]));
    }

    /// Ends Node when all have heard the last message of their bus, or nothing is to be had of them any more.
    pub(super) fn watch(&self) {
        let is_open = |client: &&Client| !client.state.lock().unwrap().reader.closed;
        let name = |client: &Client| client.state.lock().unwrap().reader.name.clone();
        let open = || self.clients.iter().find(is_open);
        while let Some(client) = open() {
            if self.month.is_lost(|| format!("{} hears the last message", name(client))) {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.node.lock().unwrap().kill();
    }

    /// Takes note of all that they tell.
    pub(super) fn listen(&self, told: ChildStdout) {
        let _stops = Stops(self.month);
        for line in BufReader::new(told).lines() {
            let line = line.unwrap();
            let event: Value = serde_json::from_str(&line).unwrap();
            let client = &self.clients[event[0].as_u64().expect("a bus's number") as usize];
            if let Err(what) = self.note(client, &event) {
                let state = client.state.lock().unwrap();
                self.month.fail(format!("{}, at {}: {what}", state.reader.name, state.reader.cursor));
            }
        }
        let _ = self.node.lock().unwrap().wait();
        for client in &self.clients {
            let mut state = client.state.lock().unwrap();
            if !state.reader.closed && !self.month.failed.load(SeqCst) {
                self.month.fail(format!("{}: Node ended before the last message", state.reader.name));
            }
            let reader = std::mem::replace(&mut state.reader, Reader::new(String::new(), Kind::Browser, None));
            client.bus.log.lock().unwrap().readers.push(reader);
        }
    }

    fn note(&self, client: &Client, event: &Value) -> Result<(), String> {
        let mut state = client.state.lock().unwrap();
        let (at, now) = (client.at, self.month.now());
        let number = |n: usize| event[n].as_u64().ok_or_else(|| format!("{event}"));
        let reader = &mut state.reader;
        match event[1].as_str().unwrap_or_default() {
            "open" if reader.first == 0 => {
                (reader.first, reader.cursor) = (number(2)?, number(2)?);
            }
            "open" => {}
            "message" => {
                reader.hear(client.bus, &event[2])?;
                self.closed.fetch_max(if reader.closed { now } else { 0 }, SeqCst);
            }
            "missed" => {
                let (before, after) = (number(2)?, number(3)?);
                reader.cursor = reader.cursor.max(after);
                reader.missed.push(Missed { before, after, since: 0, at: now });
            }
            "sent" => {
                let (send, id) = (number(2)?, number(3)?);
                let start = state.pending.remove(&send).ok_or("an answer to nothing")?;
                let key = key(client.number, send, 0);
                if (id, send) <= state.newest || send <= state.newest.1 {
                    return Err(format!("{} is {id}, behind {:?}", name(key), state.newest));
                }
                state.newest = (id, send);
                let mut log = client.bus.log.lock().unwrap();
                log.sends.insert(key, Sent { start, end: now });
                log.acks.push(Ack { message: (id, key), start });
            }
            "failed" => {
                let send = number(2)?;
                let start = state.pending.remove(&send).ok_or("an answer to nothing")?;
                let sent = Sent { start, end: now };
                client.bus.log.lock().unwrap().sends.insert(key(client.number, send, 0), sent);
                self.failed.fetch_add(1, SeqCst);
                let code = event[3].as_str().unwrap_or_default();
                // What the bus itself said is told apart.
                let is_code = !code.is_empty() && code.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
                if !is_code || ["insecure_context", "signed_bus"].contains(&code) {
                    return Err(format!("a send failed: {event}"));
                }
            }
            "told" => {
                let status = number(2)? as u16;
                let error: Value = serde_json::from_str(event[3].as_str().unwrap_or_default()).unwrap_or_default();
                let code = error["error"].as_str().unwrap_or_default();
                let asked = now.saturating_sub((event[4].as_f64().unwrap_or_default() * 1_000.0) as u64 + 1_000_000);
                match (status, code) {
                    (403, "signature_wrong") if at.plan.loses => {
                        let what = format!("{}: signature_wrong", reader.name);
                        client.bus.log.lock().unwrap().excuses.push((what, 0, now));
                    }
                    // By a clock that was set since the last reply.
                    (403, "signature_too_old" | "signature_clock_ahead") => {}
                    _ => at.pardon(&format!("a request of {}", reader.name), status, code, asked),
                }
            }
            "rejoin" => {
                let what = format!("{} is another user now", reader.name);
                client.bus.log.lock().unwrap().excuses.push((what, 0, now));
            }
            "cut" => self.month.count(Fault::Cut, 1),
            _ => return Err(format!("what is {event}?")),
        }
        Ok(())
    }
}

impl Drop for Browsers<'_> {
    fn drop(&mut self) {
        let mut node = self.node.lock().unwrap();
        let _ = node.kill();
        let _ = node.wait();
    }
}

impl<'a> Client<'a> {
    fn new(at: &'a Deployment<'a>, bus: &'a Bus) -> Client<'a> {
        let number = BROWSERS + bus.plain + 1;
        let own = (!bus.signed).then_some(number);
        let reader = Reader::new(format!("{:?} {} {:?}", at.plan.front, bus.name, Kind::Browser), Kind::Browser, own);
        let state = State { reader, sends: 0, pending: BTreeMap::new(), newest: (0, 0) };
        Client { at, bus, number, state: Mutex::new(state) }
    }
}
