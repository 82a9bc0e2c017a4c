//! Those who publish.

use std::sync::atomic::Ordering::SeqCst;
use std::thread;

use shortbus::limits;

use super::checker::{Ack, Sent};
use super::faults::Fault;
use super::messages::{is_batcher, key, name, text};
use super::sites::{Bus, Deployment, STEPS, Way};
use super::{CLOSER, Random, Stops};
use crate::fixtures::signer::{Signer, unix_millis};

/// One who publishes on a bus.
pub(super) struct Publisher<'a> {
    pub(super) at: &'a Deployment<'a>,
    pub(super) bus: &'a Bus,
    pub(super) number: u64,
    /// Sends everything again until it is answered.
    pub(super) repeats: bool,
    pub(super) random: Random,
    pub(super) signer: Option<Signer>,
    pub(super) joined: u64,
    /// Its newest id.
    pub(super) newest: u64,
}

impl Deployment<'_> {
    pub(super) fn publisher<'b>(&'b self, bus: &'b Bus, number: u64) -> Publisher<'b> {
        let random = Random(self.month.seed << 20 | 0x20000 | number);
        let repeats = !number.is_multiple_of(3);
        Publisher { at: self, bus, number, repeats, random, signer: None, joined: 0, newest: 0 }
    }

    /// Publishes a bus's last message.
    pub(super) fn close(&self, bus: &Bus) -> Option<()> {
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
}

impl Publisher<'_> {
    pub(super) fn join(&mut self) -> Option<()> {
        let (json, asked) = self.at.join(self.bus)?;
        let text = |name: &str| json[name].as_str().unwrap().to_owned();
        self.signer = Some(Signer { user: json["user"].as_u64().unwrap(), bus: text("bus"), secret: text("secret") });
        self.joined = asked;
        Some(())
    }

    /// Publishes until there are no faults any more, and then until it works: one message at least.
    pub(super) fn work(mut self) -> Option<()> {
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

    fn target(&self, keys: &[u64], body: &str, ahead: i64) -> String {
        let once = format!("k{}", keys[0]);
        let batch = if is_batcher(self.number) { "&batch=1" } else { "" };
        match &self.signer {
            Some(signer) => {
                let signed = if batch.is_empty() { body.to_owned() } else { format!("batch=1\n{body}") };
                format!("{}{batch}", signer.query(unix_millis().saturating_add_signed(ahead), &once, signed))
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
            let way = at.way(&mut self.random);
            // A user goes by the server's clock, but for now and then.
            let is_off = bus.signed && self.random.percent(3);
            let ahead = match way {
                _ if is_off => self.random.choose(&STEPS),
                Way::Stepped(ahead) => ahead,
                _ => 0,
            };
            let target = self.target(keys, &body, ahead);
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
                    (403, code) if is_off && ["signature_too_old", "signature_clock_ahead"].contains(&&code[..]) => {}
                    (status, code) => {
                        at.pardon(&format!("{} by {way:?}", first), status, &code, asked);
                        if !self.repeats && !["", "outcome_unknown", "store_broken"].contains(&&code[..]) {
                            bus.log.lock().unwrap().refused.extend(keys.iter().map(|&key| (key, code.clone())));
                        }
                    }
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
