//! Those who listen.

use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use shortbus::limits;

use super::faults::Fault;
use super::messages::{Message, key_of, name, publisher_of, text};
use super::sites::{Bus, Deployment, Way};
use super::{BRIEF, CLOSER, Random, Stops};

/// What a reader was told is gone: all of it, or some, behind `before` and up to `after`.
pub(super) struct Missed {
    pub(super) before: u64,
    pub(super) after: u64,
    /// When the reader had all up to `before`, at the latest, and when it was told, microseconds of the run.
    pub(super) since: u64,
    pub(super) at: u64,
}

/// How a reader listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
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
    /// The browser client, by whatever works.
    Browser,
}

pub(super) struct Reader {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// The publisher whose messages it is not told.
    pub(super) own: Option<u64>,
    /// Where it began.
    pub(super) first: u64,
    pub(super) cursor: u64,
    pub(super) since: u64,
    pub(super) messages: Vec<Message>,
    pub(super) missed: Vec<Missed>,
    /// The last message has come.
    pub(super) closed: bool,
}

impl Reader {
    pub(super) fn new(name: String, kind: Kind, own: Option<u64>) -> Reader {
        let (messages, missed) = Default::default();
        Reader { name, kind, own, first: 0, cursor: 0, since: 0, messages, missed, closed: false }
    }

    /// Takes a message as a poll's array or a stream's event has it.
    pub(super) fn hear(&mut self, bus: &Bus, message: &Value) -> Result<(), String> {
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
        if self.own == Some(user) {
            return Err(format!("{message} is the reader's own"));
        }
        self.cursor = id;
        self.closed |= user == CLOSER;
        self.messages.push((id, key));
        Ok(())
    }
}

impl Deployment<'_> {
    pub(super) fn kinds(&self, bus: &Bus) -> Vec<Kind> {
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

    pub(super) fn listener<'b>(&'b self, bus: &'b Bus, kind: Kind, number: u64) -> Listener<'b> {
        let name = format!("{:?} {} {kind:?}", self.plan.front, bus.name);
        let reader = Reader::new(name, kind, (kind == Kind::Own).then_some(bus.plain));
        Listener { at: self, bus, reader, random: Random(self.month.seed << 20 | 0x10000 | number) }
    }
}

/// One who listens to a bus.
pub(super) struct Listener<'a> {
    pub(super) at: &'a Deployment<'a>,
    pub(super) bus: &'a Bus,
    pub(super) reader: Reader,
    pub(super) random: Random,
}

impl Listener<'_> {
    fn fail(&self, what: &str) {
        self.at.month.fail(format!("{}, at {}: {what}", self.reader.name, self.reader.cursor));
    }

    /// Listens until the bus's last message.
    pub(super) fn work(mut self) {
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
        let way = if self.reader.kind == Kind::Wait { Way::Front } else { self.at.way(&mut self.random) };
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
pub(super) struct Events {
    pub(super) raw: Vec<u8>,
    /// Without the chunks' lengths.
    pub(super) text: Vec<u8>,
    pub(super) status: u16,
    pub(super) chunked: bool,
    /// Of text, so far.
    pub(super) bytes: usize,
}

#[derive(Default)]
pub(super) struct Event {
    pub(super) name: String,
    pub(super) id: Option<u64>,
    pub(super) data: String,
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
