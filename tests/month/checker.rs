//! What the logs of a bus have to say at the end.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Included};

use super::STRAGGLES;
use super::messages::{Message, name, publisher_of};
use super::readers::{Missed, Reader};
use super::sites::{Bus, Deployment};

/// What was sent: when it was sent first, and when it was given up or answered last.
pub(super) struct Sent {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// An acknowledged message.
pub(super) struct Ack {
    pub(super) message: Message,
    pub(super) start: u64,
}

/// All that is known of a bus at the end.
#[derive(Default)]
pub(super) struct Log {
    pub(super) acks: Vec<Ack>,
    pub(super) sends: BTreeMap<u64, Sent>,
    pub(super) readers: Vec<Reader>,
    /// What was sent one time and refused, by which code: it was not published.
    pub(super) refused: BTreeMap<u64, String>,
    /// What only a store that lost something may cause, and between which moments.
    pub(super) excuses: Vec<(String, u64, u64)>,
}

/// What came of it.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) acknowledged: usize,
    pub(super) heard: usize,
    /// Messages that a reader was told it missed, which others heard or their publishers were told of.
    pub(super) passed: usize,
    pub(super) missed: BTreeMap<&'static str, usize>,
    pub(super) readers: usize,
    /// Messages that were sent one time, by the code that said they were not published.
    pub(super) refused: BTreeMap<String, usize>,
}

impl Deployment<'_> {
    pub(super) fn check(&self, bus: &Bus, tally: &mut Tally) {
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
        for (id, key) in &known {
            if let Some(code) = log.refused.get(key) {
                fail(format!("{} was refused, {code}, and is {id}", name(*key)));
            }
        }
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
            self.check_reader(reader, &known, tally, &fail);
        }
        tally.acknowledged += log.acks.len();
        tally.readers += log.readers.len();
        log.refused.values().for_each(|code| *tally.refused.entry(code.clone()).or_default() += 1);
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
    fn check_reader(&self, reader: &Reader, known: &BTreeMap<u64, u64>, tally: &mut Tally, fail: &impl Fn(String)) {
        tally.heard += reader.messages.len();
        let mut heard = reader.messages.iter().peekable();
        let mut lost = 0;
        for (&id, &key) in known.range((Excluded(reader.first), Included(reader.cursor))) {
            if heard.next_if(|(next, _)| *next == id).is_some() {
                continue;
            }
            if reader.own == Some(publisher_of(key)) {
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
}
