//! A seeded simulation of the delivery protocol: the real `join`, `publish`, `publish_group` and `poll` over a model of
//! memcached, one operation at a time, with crashes, pauses, lost answers and expiry. The promise is checked at every
//! poll. Several send the same with an idempotency key, and no two messages come of it. Processes publish for several at
//! once, and a slot's messages are heard together and in their order.
//!
//! The local store is not modelled: a batch there runs whole under a lock or not at all, so a model of it would be one
//! mutex, the easy case of what is modelled here. What can go wrong there is the file, and that is tried on the real one:
//! processes that are killed, stopped and failed at each system call, with batches and repeats, in `local_hazards`.
//!
//! *Clean* schedules keep to what the promise assumes; *dirty* ones evict, restart, lose the counter and refuse
//! memory, and the bus has to work again afterwards. Each rule of the protocol is also broken, to see it caught, and so is
//! what it assumes of memcached's clock.
//!
//! `TEST_SEED=<n> cargo test simulation::<test> -- --nocapture` runs one schedule and prints its trace.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use shortbus::bus::store::{Counter, Op, Reply, Store, StoreError};
use shortbus::bus::{self, Error, IdempotencyKey, Known, Page, Publish};
use shortbus::fastcgi::snapshot::{CachedStore, Snapshot, refresh};
use shortbus::limits;

const SECOND: u64 = 1_000_000;
/// Unix time of the model's microsecond 0.
const EPOCH: u64 = 1_700_000_000 * SECOND;
const SEED: u64 = 20_240_229;
const CLEAN: u64 = 75_000;
const DIRTY: u64 = 25_000;
/// How many schedules a broken protocol may take until it is caught.
const CAUGHT: u64 = 2_000;
const STEPS_MAX: usize = 100_000;
/// Most disturbances of a dirty schedule.
const DISTURBANCES: u64 = 5;
/// Schedules around a tick of memcached's clock.
const TICKS: u64 = 20_000;
/// By how much other data for the same send is larger.
const OTHER: u64 = 5_000;
/// Most messages of a request.
const BATCH: u64 = 5;
/// Ids of a slot.
const IDS: u64 = 256;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Protocol {
    #[default]
    Correct,
    /// Incr before store, as the PHP bus did.
    AdvanceBeforeAdd,
    SlotsBeforeLast,
    AckOnTaken,
    /// Nothing ever looks stale: no two-second rule.
    ClockStandsStill,
    /// Nor does a publisher that comes too late see that `last` has moved.
    MovedLastUnseen,
    /// One read of `last` is believed, though it may be torn.
    TornReadBelieved,
    /// The slot is stored first, its id noted in the record then.
    SlotBeforeNote,
    /// And no lease, which keeps requests from meeting.
    RecordBeforeLast,
    /// The record says that there was a first request, not which ids were tried.
    IdsUnseen,
    /// Any message of the user is taken for the one sent.
    TokenIgnored,
    /// A repeat never waits for the first to be over.
    NoLease,
    /// The record is kept for the TTL after the first request, not after the last that may publish.
    ShortRecord,
    /// What a process knows of `last` never looks stale, nor does it see that `last` has moved.
    StaleKnown,
    /// A process goes by what it knew of `last` before its connection was lost.
    KnownOfAnotherConnection,
    /// Of a slot with several messages the first is not read.
    HalfGroup,
    /// A slot's messages are read in another order.
    GroupReversed,
    /// A cursor inside a slot is taken for one behind it.
    InsideIsBehind,
}

/// splitmix64.
#[derive(Default)]
struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound.max(1)
    }

    fn one_in(&mut self, n: u64) -> bool {
        n > 0 && self.below(n) == 0
    }
}

/// How often things go wrong, one in so many; 0 is never.
#[derive(Default)]
struct Hazards {
    /// Of a publisher's writes: it dies before.
    crash: u64,
    /// Of the batches: the answer is there, but its client sleeps.
    freeze: u64,
    /// Of the batches: it is long under way, or its client sleeps with it in hand.
    lag: u64,
    /// Of the steps: memcached evicts, restarts, ...
    disturb: u64,
    /// Of the adds: no memory.
    full: u64,
    /// Of the sends that may be repeated: it has other data.
    differ: u64,
}

/// A batch on its way, or answered.
struct Exchange {
    /// Who waits for it, unless it died or gave up.
    owner: Option<usize>,
    ops: VecDeque<(Op<'static>, Vec<u8>)>,
    replies: Vec<Reply>,
    error: Option<StoreError>,
    arrives: u64,
    deadline: u64,
    /// How often `last` had been advanced at its operation before.
    seen: u64,
    /// When its sender had read which record.
    record_read: BTreeMap<String, u64>,
}

/// A message that went into a slot. Its data is a number used once, and says whose it is.
#[derive(Clone, Copy)]
struct Stored {
    slot: u64,
    id: u64,
    /// The number of the write that brought it, with the others of its slot.
    write: u64,
    /// Its sender, unless that had died.
    by: Option<usize>,
    data: u64,
    at: u64,
    expires: u64,
    /// The token of a send that may be repeated.
    token: Option<u64>,
    /// When polls were past the slot.
    late: bool,
    /// How long after its record was read.
    slept: u64,
}

/// What is kept of a send that may be repeated, also when it has expired.
struct Record {
    text: String,
    /// The first sender, unless it had died, and when.
    claimed_by: Option<usize>,
    claimed_at: u64,
    /// The tick at which it was claimed, and the one it expires at.
    claimed: u64,
    expires: u64,
    /// The ids that were answered.
    answered: Vec<Vec<u64>>,
}

/// What the model knows of an actor.
#[derive(Default)]
struct Life {
    /// When it goes on.
    wake: u64,
    /// Errors it was answered.
    errors: u64,
    /// Since it last began something: batches, operations and tries to claim a slot.
    cost: [u64; 3],
    /// When it last read which record.
    record_read: BTreeMap<String, u64>,
    /// Requests that it publishes together.
    group: usize,
}

#[derive(Default)]
struct World {
    rng: Rng,
    protocol: Protocol,
    hazards: Hazards,
    disturbances: u64,
    clean: bool,
    /// Seconds, the same for all: a bus has one setting.
    ttl: u64,
    /// Seconds for which a record is kept.
    once_ttl: u64,
    /// True time, microseconds.
    now: u64,
    /// How far memcached's ticks are from true seconds.
    phase: u64,
    /// How far the wall clock was set back.
    set_back: u64,
    last: Option<Counter>,
    /// What a reader may have got of `last` while it was advanced for the latest time: the old value, the new token.
    torn: Option<Counter>,
    advances: u64,
    /// Where the counter started.
    start: u64,
    /// Its highest value, and whether it once came back lower.
    highest: u64,
    came_back_lower: bool,
    /// How often all connections were lost.
    connections_lost: u64,
    cas: u64,
    /// Value and the tick it expires at.
    slots: BTreeMap<u64, (Vec<u8>, u64)>,
    /// By name.
    records: BTreeMap<Vec<u8>, Record>,
    /// The bus key, and those before, each with the time since when.
    keys: Vec<(u64, Option<Vec<u8>>)>,
    exchanges: Vec<Exchange>,
    /// The sender of the operation that runs, and when it had read which record.
    owner: Option<usize>,
    record_read: BTreeMap<String, u64>,
    lives: Vec<Life>,
    /// Publishers at work.
    publishing: usize,
    /// Since when the promise holds: from the start, or from the end of the disturbances.
    promised: u64,
    messages: u64,
    /// Slots that were ever stored.
    writes: u64,
    /// All that was ever stored, in this order.
    stored: Vec<Stored>,
    /// With the times when its publishing began and ended.
    acknowledged: Vec<(Stored, u64, u64)>,
    violations: Vec<(&'static str, String)>,
    counts: BTreeMap<&'static str, u64>,
    trace: bool,
}

type Shared = Rc<RefCell<World>>;

impl World {
    fn new(seed: u64, protocol: Protocol, clean: bool) -> World {
        let mut rng = Rng(seed);
        let mut often = |n| if rng.one_in(3) { 0 } else { n };
        let mut hazards =
            Hazards { crash: often(25), freeze: often(12), lag: often(12), differ: often(12), ..Hazards::default() };
        if !clean {
            hazards = Hazards { full: often(10), disturb: 30 << rng.below(4), ..hazards };
        }
        let (ttl, phase, disturbances) = (1 + rng.below(8), rng.below(SECOND), 1 + rng.below(DISTURBANCES));
        // A repeat may publish until the TTL is over, and what it published is remembered for as long again.
        let kept = if protocol == Protocol::ShortRecord { ttl } else { 2 * ttl };
        let once_ttl = kept + u64::from(limits::ONCE_SLACK);
        let promised = if clean { 0 } else { u64::MAX };
        World {
            rng,
            protocol,
            hazards,
            disturbances,
            clean,
            ttl,
            once_ttl,
            phase,
            promised,
            keys: vec![(0, None)],
            ..World::default()
        }
    }

    fn log(&self, line: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>4}.{:06} {}", self.now / SECOND, self.now % SECOND, line());
        }
    }

    fn count(&mut self, event: &'static str) {
        *self.counts.entry(event).or_default() += 1;
    }

    fn violate(&mut self, violation: &'static str, why: String) {
        self.log(|| format!("VIOLATION, {violation}: {why}"));
        self.violations.push((violation, why));
    }

    /// memcached's clock, which ticks once a second.
    fn tick(&self) -> u64 {
        (self.now + self.phase) / SECOND
    }

    fn send<'a>(&mut self, actor: usize, batch: impl Iterator<Item = Op<'a>>) {
        let ops: VecDeque<_> = batch.map(owned).collect();
        let tries = ops.iter().filter(|(op, _)| matches!(op, Op::Add { .. })).count() as u64;
        assert!(!ops.is_empty(), "a batch of nothing");
        if matches!(ops[0].0, Op::Probe(_)) {
            self.count("gallop");
        }
        let cost = &mut self.lives[actor].cost;
        *cost = [cost[0] + 1, cost[1] + ops.len() as u64, cost[2] + tries];
        let longest = 4 * SECOND;
        let lag = if self.rng.one_in(self.hazards.lag) { self.rng.below(longest) } else { 0 };
        let deadline = self.now + limits::STORE_DEADLINE.as_micros() as u64;
        let arrives = self.now + lag;
        let publishes = matches!(ops[0].0, Op::AppendRecord(..));
        let record_read = if publishes { self.lives[actor].record_read.clone() } else { BTreeMap::new() };
        let seen = self.advances;
        self.exchanges.push(Exchange {
            owner: Some(actor),
            ops,
            replies: vec![],
            error: None,
            arrives,
            deadline,
            seen,
            record_read,
        });
    }

    fn answer(&mut self, actor: usize) -> Poll<Result<Vec<Reply>, StoreError>> {
        let at = self.exchanges.iter().position(|exchange| exchange.owner == Some(actor)).expect("it sent one");
        let result = if self.exchanges[at].ops.is_empty() {
            let exchange = self.exchanges.swap_remove(at);
            exchange.error.map_or(Ok(exchange.replies), Err)
        } else if self.now >= self.exchanges[at].deadline {
            self.abandon(at, ["timeout, cut off", "timeout, runs on"]);
            Err(StoreError::Timeout("the model".into()))
        } else {
            return Poll::Pending;
        };
        if let Err(error) = &result {
            self.lives[actor].errors += 1;
            self.log(|| format!("{actor}: {error:?}"));
        }
        Poll::Ready(result)
    }

    /// The client died or gave up: memcached may still run all that was sent, or only so much of it.
    fn abandon(&mut self, at: usize, [cut_off, runs_on]: [&'static str; 2]) {
        let sent = self.exchanges[at].ops.len() as u64;
        let runs = if self.rng.one_in(2) { sent } else { self.rng.below(sent) };
        self.count(if runs < sent { cut_off } else { runs_on });
        self.exchanges[at].ops.truncate(runs as usize);
        self.exchanges[at].owner = None;
    }

    /// Runs the next operation of an exchange, or tells who dies instead.
    fn run_next(&mut self, at: usize) -> Option<usize> {
        let owner = self.exchanges[at].owner;
        let write = !matches!(
            self.exchanges[at].ops[0].0,
            Op::Last | Op::Get(_) | Op::Probe(_) | Op::Record(_) | Op::SigningKey
        );
        if write && owner.is_some() && self.rng.one_in(self.hazards.crash) {
            self.abandon(at, ["crash, cut off", "crash, runs on"]);
            if owner.is_some_and(|actor| self.lives[actor].group > 1) {
                self.count("crash of a group");
            }
            return owner;
        }
        let (op, value) = self.exchanges[at].ops.pop_front()?;
        self.owner = owner;
        self.record_read.clone_from(&self.exchanges[at].record_read);
        let is_told = self.trace || matches!(op, Op::Record(_));
        let name = if is_told { String::from_utf8_lossy(&value).into_owned() } else { String::new() };
        let mut reply = self.execute(&op, value);
        // As memcached's incr does it, to one who reads just then.
        let torn = self.torn.filter(|torn| self.last.is_some_and(|last| last.cas == torn.cas));
        if let (Op::Last, Some(torn)) = (op, torn)
            && self.advances > self.exchanges[at].seen
            && self.rng.one_in(4)
        {
            self.count("torn read");
            reply = Ok(Reply::Counter(torn));
        }
        self.exchanges[at].seen = self.advances;
        if let (Some(actor), Ok(Reply::Record(..))) = (owner, &reply) {
            self.lives[actor].record_read.insert(name.clone(), self.now);
        }
        self.log(|| {
            format!("{}: {op:?} {name} -> {reply:?}", owner.map_or("nobody".into(), |actor| actor.to_string()))
        });
        let taken = self.exchanges[at].replies.last() == Some(&Reply::Taken);
        if taken && matches!((op, &reply), (Op::Advance(_), Ok(Reply::Stored))) {
            self.count("helped advance");
        }
        let exchange = &mut self.exchanges[at];
        match reply {
            Ok(reply) => exchange.replies.push(reply),
            Err(error) => exchange.error = Some(error),
        }
        if let (true, Some(actor)) = (exchange.ops.is_empty(), owner)
            && self.rng.one_in(self.hazards.freeze)
        {
            let long = self.rng.below(5 * SECOND);
            self.count(if long > 2 * SECOND { "pause beyond 2 s" } else { "pause" });
            self.log(|| format!("{actor} sleeps for {long} us"));
            self.lives[actor].wake = self.now + long;
        }
        None
    }

    /// What lives under an id.
    fn slot(&mut self, id: u64) -> Option<&[u8]> {
        let tick = self.tick();
        if self.slots.get(&id).is_some_and(|&(_, expires)| tick >= expires) {
            self.slots.remove(&id);
            self.count("expiry");
        }
        self.slots.get(&id).map(|(value, _)| &value[..])
    }

    /// The record of this name, if it lives.
    fn record(&mut self, name: &[u8]) -> Option<&mut Record> {
        let tick = self.tick();
        self.records.get_mut(name).filter(|record| tick < record.expires)
    }

    /// One operation, as memcached does it.
    fn execute(&mut self, op: &Op, value: Vec<u8>) -> Result<Reply, StoreError> {
        Ok(match *op {
            Op::Last => self.last.map_or(Reply::Missing, Reply::Counter),
            Op::Create(_) if self.last.is_some() => Reply::Taken,
            Op::Create(start) => {
                self.start = start;
                self.came_back_lower |= start < self.highest;
                self.set_last(start)
            }
            Op::Advance(cas) => match self.last {
                Some(counter) if counter.cas == cas => {
                    self.advances += 1;
                    self.torn = Some(Counter { value: counter.value, cas: self.cas + 1 });
                    self.set_last(counter.value + 1);
                    self.check_twice(counter.value + 1);
                    Reply::Stored
                }
                Some(_) => Reply::Taken,
                None => Reply::Missing,
            },
            Op::Add { .. } | Op::CreateRecord { .. } | Op::AppendRecord(..) if self.rng.one_in(self.hazards.full) => {
                // It drops what the key held, too: "avoid stale data" in process_mset_command.
                match *op {
                    Op::Add { slot, .. } => drop(self.slots.remove(&slot)),
                    _ => drop(self.records.remove(&value)),
                }
                self.count("refusal");
                return Err(StoreError::Full("the model".into()));
            }
            Op::Add { slot, .. } if self.slot(slot).is_some() => {
                self.count("taken");
                Reply::Taken
            }
            Op::Add { slot, ttl, .. } => {
                let expires = self.tick() + u64::from(ttl);
                // A slot that expired before `last` named it, its publisher being dead, was nobody's.
                let unseen = self.clean && self.last.is_some_and(|last| last.value < slot);
                for stored in self.stored.iter_mut().filter(|stored| unseen && stored.slot == slot) {
                    (stored.slot, stored.id) = (0, 0);
                }
                let late = self.last.is_some_and(|last| slot <= last.value);
                self.writes += 1;
                let (at, write, by) = (self.now, self.writes, self.owner);
                for (id, (_, token, data)) in numbered(slot, parse(&value)) {
                    let record_read = token.and_then(|_| self.record_read.get(&name_of(data)));
                    let slept = record_read.map_or(0, |read| at - read);
                    self.stored.push(Stored { slot, id, write, by, data, at, expires, token, late, slept });
                }
                if late {
                    self.check_twice(slot);
                }
                self.slots.insert(slot, (value, expires));
                Reply::Stored
            }
            Op::Trial(_) | Op::EndTrial => Reply::Stored,
            Op::Get(id) => self.slot(id).map_or(Reply::Missing, |value| Reply::Value(value.into())),
            Op::Probe(id) => self.slot(id).map_or(Reply::Missing, |_| Reply::Stored),
            Op::CreateRecord { .. } if self.record(&value).is_some() => Reply::Taken,
            Op::CreateRecord { token, ttl, .. } => {
                let claimed = self.tick();
                let (text, expires) = (token.to_string(), claimed + u64::from(ttl));
                let (claimed_by, claimed_at) = (self.owner, self.now);
                let record = Record { text, claimed_by, claimed_at, claimed, expires, answered: vec![] };
                if self.records.insert(value, record).is_some() {
                    self.count("claimed again");
                }
                Reply::Stored
            }
            Op::AppendRecord(_, id) => self.record(&value).map_or(Reply::Taken, |record| {
                record.text += &format!(" {id}");
                Reply::Stored
            }),
            Op::Record(_) => {
                let tick = self.tick();
                let left = |record: &Record| (record.expires - tick) as u32;
                let reply = |record: &mut Record| Reply::Record(record.text.clone().into(), left(record));
                self.record(&value).map_or(Reply::Missing, reply)
            }
            Op::SigningKey => self.key().map_or(Reply::Missing, Reply::Value),
            Op::CreateSigningKey(_) if self.key().is_some() => Reply::Taken,
            Op::CreateSigningKey(_) => {
                self.set_key(Some(value));
                Reply::Stored
            }
        })
    }

    fn key(&self) -> Option<Vec<u8>> {
        self.keys.last().and_then(|(_, key)| key.clone())
    }

    fn set_key(&mut self, key: Option<Vec<u8>>) {
        self.keys.push((self.now, key));
    }

    fn set_last(&mut self, value: u64) -> Reply {
        self.cas += 1;
        self.highest = self.highest.max(value);
        self.last = Some(Counter { value, cas: self.cas });
        Reply::Stored
    }

    /// What the promise excepts.
    fn disturb(&mut self) {
        let events = ["slot evicted", "record evicted", "counter lost", "flush", "restart", "clock set back"];
        let event = events[self.rng.below(6) as usize];
        self.befall(event);
    }

    fn befall(&mut self, event: &'static str) {
        self.count(event);
        self.log(|| event.into());
        match event {
            "slot evicted" => {
                let nth = self.rng.below(self.slots.len() as u64);
                let mut n = 0..;
                self.slots.retain(|_, _| n.next() != Some(nth));
            }
            "record evicted" => drop(self.records.pop_first()),
            "counter lost" => self.last = None,
            "clock set back" => self.set_back += self.rng.below(3 * SECOND),
            _ => {
                self.slots.clear();
                self.records.clear();
                self.last = None;
                self.set_key(None);
            }
        }
        if event == "restart" {
            // Tokens start again, but whoever holds an old one loses its connection.
            self.cas = 0;
            self.connections_lost += 1;
            self.exchanges.retain(|exchange| exchange.owner.is_some());
            for exchange in &mut self.exchanges {
                exchange.ops.clear();
                exchange.error = Some(StoreError::Broken("the model".into()));
            }
        }
    }

    /// Ends the disturbances, and what is left of them.
    fn calm(&mut self) {
        self.hazards = Hazards::default();
        self.disturbances = 0;
        self.exchanges.retain(|exchange| exchange.owner.is_some());
        self.exchanges.iter_mut().for_each(|exchange| exchange.arrives = 0);
        self.lives.iter_mut().for_each(|life| life.wake = life.wake.min(self.now));
        self.promised = self.now;
    }

    /// Of a send that may be repeated, one slot's messages are published within the TTL, and each of them once.
    fn check_twice(&mut self, slot: u64) {
        let last = self.last.map_or(0, |last| last.value);
        let Some(write) = self.stored.iter().rfind(|stored| stored.slot == slot).map(|stored| stored.write) else {
            return;
        };
        let mut twice = None;
        for new in self.stored.iter().filter(|stored| self.clean && stored.write == write && stored.token.is_some()) {
            let published = |old: &&Stored| match old.write == write {
                true => old.id != new.id,
                false => old.slot != slot && (1..=last).contains(&old.slot),
            };
            let again = self.stored.iter().filter(published).find(|old| self.same(old, new));
            twice = twice.or(again.map(|old| format!("{} as {}, {} as {}", old.data, old.id, new.data, new.id)));
        }
        if let Some(twice) = twice {
            self.violate("twice", twice);
        }
    }

    /// Whether these are of one send, and, where that may be repeated, less than the TTL apart. Of one write they may be
    /// two of a batch.
    ///
    /// But for two of publishers that slept with their write under way, which nothing can recall. One slept until
    /// the slot it was for, another's by then, had expired; some hear what it stored, and it is not acknowledged. The
    /// other slept for longer than any request may take, at the end of its record's time, and beyond that.
    fn same(&self, old: &Stored, new: &Stored) -> bool {
        if new.token.is_none() || old.write == new.write {
            return old.data == new.data;
        }
        let one = old.token.is_some() && name_of(old.data) == name_of(new.data);
        let longest = u64::from(limits::ONCE_SLACK - 1) * SECOND;
        let forgotten = old.token != new.token && old.slept.max(new.slept) > longest;
        one && old.at.abs_diff(new.at) < self.ttl * SECOND && !old.late && !new.late && !forgotten
    }

    /// The messages that were stored in a slot, those of its first write first: these are what all hear. Others are there
    /// where the counter was lost, or where a publisher came too late, and may not be acknowledged then.
    fn under(&self, slot: u64) -> impl Iterator<Item = &Stored> {
        self.stored.iter().filter(move |stored| stored.slot == slot)
    }

    /// Where in `stored` a message is that was acknowledged, and whether all hear it.
    fn find(&self, id: u64, data: u64) -> Option<(usize, bool)> {
        let first = self.under(id / IDS).next()?.write;
        let at = self.stored.iter().rposition(|stored| (stored.id, stored.data) == (id, data))?;
        Some((at, !self.clean || self.stored[at].write == first))
    }

    /// A request with messages that nobody sent before.
    fn plain_request(&mut self, user: u64) -> Request {
        let count = if self.rng.one_in(3) { 2 + self.rng.below(BATCH - 1) } else { 1 };
        let first = PLAIN + self.messages;
        self.messages += count;
        let data = (first..first + count).map(|n| user_data(user, n)).collect();
        Request { user, data, token: None, name: String::new(), begun: self.now }
    }

    /// A request for one of a user's first few sends, with its idempotency key.
    fn keyed_request(&mut self, user: u64, sends: u64) -> Request {
        let send = 1 + self.rng.below(sends);
        let count = [1, 1, 3, 2, BATCH][(user + send) as usize % 5];
        let mut data: Vec<u64> = (0..count).map(|n| user_data(user, send * 10 + n)).collect();
        let name = name_of(data[0]);
        if self.rng.one_in(self.hazards.differ) {
            match count > 1 && self.rng.one_in(2) {
                true => drop(data.pop()),
                false => data.iter_mut().for_each(|data| *data += OTHER),
            }
        }
        Request { user, data, token: Some(self.rng.below(limits::MAX_ID)), name, begun: self.now }
    }
}

/// Messages without an idempotency key have numbers from here on, below [`OTHER`]; others the send's number, and a digit.
const PLAIN: u64 = 1_000;

fn user_data(user: u64, n: u64) -> u64 {
    user * 10_000 + n
}

fn user_of(data: u64) -> u64 {
    data / 10_000
}

/// The name of an idempotency key, for the messages sent with it.
fn name_of(data: u64) -> String {
    format!("{}:{}", user_of(data), data % OTHER / 10)
}

/// User, token and data of a message.
type Part = (u64, Option<u64>, u64);

/// The messages in a slot's value.
fn parse(value: &[u8]) -> Vec<Part> {
    let (mut parts, mut rest) = (vec![], std::str::from_utf8(value).expect("text"));
    while !rest.is_empty() {
        let (head, data) = rest.split_once(' ').expect("sender, space, data");
        let (sender, length) = head.split_once(':').unwrap_or((head, ""));
        let length = if head == sender { data.len() } else { length.parse().expect("a length") };
        let (user, token) = sender.split_once('.').map_or((sender, None), |(user, token)| (user, Some(token)));
        let token = token.map(|token| token.parse().expect("a token"));
        parts.push((user.parse().expect("a user"), token, data[..length].parse().expect("a number")));
        rest = &data[length..];
    }
    parts
}

fn render(parts: &[Part]) -> Vec<u8> {
    let mut value = String::new();
    for (user, token, data) in parts {
        let (token, data) = (token.map_or(String::new(), |token| format!(".{token}")), data.to_string());
        let length = if parts.len() == 1 { String::new() } else { format!(":{}", data.len()) };
        value += &format!("{user}{token}{length} {data}");
    }
    value.into()
}

/// A slot's messages with their ids: the last one has the slot's last.
fn numbered(slot: u64, parts: Vec<Part>) -> impl Iterator<Item = (u64, Part)> {
    let last = parts.len() - 1;
    parts.into_iter().enumerate().map(move |(n, part)| (slot * IDS + if n == last { IDS - 1 } else { n as u64 }, part))
}

/// An operation, and what it borrows: a value, or a record's name.
fn owned(op: Op) -> (Op<'static>, Vec<u8>) {
    let op = match op {
        Op::Add { slot, value, ttl } => return (Op::Add { slot, value: &[], ttl }, value.into()),
        Op::CreateRecord { key, token, ttl } => return (Op::CreateRecord { key: "", token, ttl }, key.into()),
        Op::AppendRecord(once, id) => return (Op::AppendRecord("", id), once.into()),
        Op::Record(once) => return (Op::Record(""), once.into()),
        Op::CreateSigningKey(key) => return (Op::CreateSigningKey(&[]), key.into()),
        Op::Trial(value) => return (Op::Trial(&[]), value.into()),
        Op::EndTrial => Op::EndTrial,
        Op::SigningKey => Op::SigningKey,
        Op::Last => Op::Last,
        Op::Create(start) => Op::Create(start),
        Op::Advance(cas) => Op::Advance(cas),
        Op::Get(id) => Op::Get(id),
        Op::Probe(id) => Op::Probe(id),
    };
    (op, vec![])
}

/// An actor's way to memcached. A broken protocol is the right one over a crooked store.
struct Client {
    world: Shared,
    actor: usize,
    protocol: Protocol,
    /// The token of the record that was read last.
    token: Option<u64>,
    /// The counter's token, where it is known from a group before.
    known: Option<u64>,
    /// [`Store::ahead`].
    ahead: u64,
}

impl Store for Client {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError> {
        let mut order: Vec<usize> = (0..batch.len()).collect();
        let add = batch.iter().position(|op| matches!(op, Op::Add { .. }));
        let twice = batch.windows(2).rposition(|ops| ops == [Op::Last, Op::Last]);
        match (self.protocol, add, batch) {
            (Protocol::AdvanceBeforeAdd, Some(add), _) => order.swap(add, add + 1),
            (Protocol::SlotsBeforeLast, _, [Op::Last, Op::Get(_), ..]) => order.rotate_left(1),
            (Protocol::SlotBeforeNote, Some(add), _) => order[..=add].rotate_left(add - 1),
            _ => {}
        }
        if let (Protocol::RecordBeforeLast, Some(twice), [.., Op::Record(_)]) = (self.protocol, twice, batch) {
            order[twice..].rotate_left(2);
        }
        self.world.borrow_mut().send(self.actor, order.iter().map(|&at| batch[at]));
        let answer = poll_fn(|_| self.world.borrow_mut().answer(self.actor)).await?;
        if self.protocol == Protocol::Correct {
            return Ok(answer);
        }
        let mut replies = answer.clone();
        order.iter().zip(answer).for_each(|(&at, reply)| replies[at] = reply);
        match (self.protocol, add, twice) {
            (Protocol::AckOnTaken, Some(add), _) => replies[add] = Reply::Stored,
            (Protocol::MovedLastUnseen | Protocol::StaleKnown, Some(add), _) => {
                if let (Op::Advance(read), Reply::Counter(last)) = (batch[add + 1], &mut replies[add - 1])
                    && (self.protocol == Protocol::MovedLastUnseen || self.known == Some(read))
                {
                    last.cas = read;
                }
            }
            (Protocol::TornReadBelieved, _, Some(twice)) => replies[twice + 1] = replies[twice].clone(),
            _ => {}
        }
        for reply in &mut replies {
            self.bend(reply);
        }
        Ok(replies)
    }

    fn ahead(&self) -> u64 {
        self.ahead
    }

    async fn pause(&mut self, longest: Duration) {
        let half = longest.as_micros() as u64 / 2;
        let random = self.world.borrow_mut().rng.below(half);
        self.sleep(half + random).await;
    }

    fn now(&self) -> Duration {
        let stands_still = matches!(self.protocol, Protocol::ClockStandsStill | Protocol::MovedLastUnseen);
        Duration::from_micros(if stands_still { 0 } else { self.world.borrow().now })
    }

    fn unix_micros(&self) -> u64 {
        let world = self.world.borrow();
        EPOCH + world.now - world.set_back
    }
}

impl Client {
    fn new(world: Shared, actor: usize) -> Client {
        let protocol = world.borrow().protocol;
        Client { world, actor, protocol, token: None, known: None, ahead: limits::WINDOW }
    }

    /// What the broken protocols make of records, and of slots where they look for a send.
    fn bend(&mut self, reply: &mut Reply) {
        match (self.protocol, reply) {
            (Protocol::IdsUnseen, Reply::Record(text, _)) => text.retain({
                let mut token = true;
                move |&byte| {
                    token &= byte != b' ';
                    token
                }
            }),
            (Protocol::NoLease | Protocol::RecordBeforeLast, Reply::Record(_, left)) => {
                *left = left.saturating_sub(limits::ONCE_LEASE)
            }
            (Protocol::TokenIgnored, Reply::Record(text, _)) => {
                self.token = String::from_utf8_lossy(text).split(' ').next().and_then(|token| token.parse().ok());
            }
            (Protocol::TokenIgnored, Reply::Value(value)) if self.token.is_some() => {
                let mut parts = parse(value);
                parts.iter_mut().for_each(|part| part.1 = self.token);
                *value = render(&parts);
            }
            (Protocol::HalfGroup | Protocol::GroupReversed, Reply::Value(value)) => {
                let mut parts = parse(value);
                match self.protocol {
                    Protocol::GroupReversed => parts.reverse(),
                    _ if parts.len() > 1 => drop(parts.remove(0)),
                    _ => {}
                }
                *value = render(&parts);
            }
            _ => {}
        }
    }

    async fn sleep(&self, micros: u64) {
        let wake = self.world.borrow().now + micros;
        self.world.borrow_mut().lives[self.actor].wake = wake;
        let mut slept = false;
        poll_fn(|_| if std::mem::replace(&mut slept, true) { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    async fn idle(&self, longest: u64) {
        let idle = self.world.borrow_mut().idle_for(longest);
        self.sleep(idle).await;
    }
}

/// What one request publishes.
struct Request {
    user: u64,
    data: Vec<u64>,
    /// With an idempotency key: a token, and the key's name.
    token: Option<u64>,
    name: String,
    /// When it came.
    begun: u64,
}

impl Request {
    fn publish<'a>(&'a self, texts: &'a [String], ttl: u32) -> Publish<'a> {
        let key = self.token.map(|token| IdempotencyKey { name: &self.name, token, ttl });
        Publish { user: self.user, messages: texts.iter().map(String::as_bytes).collect(), key }
    }
}

/// Publishes one request after the other, without an idempotency key.
async fn publisher(mut client: Client, user: u64, requests: u64) {
    for _ in 0..requests {
        client.idle(2 * SECOND).await;
        let request = client.world.borrow_mut().plain_request(user);
        publish(&mut client, vec![request], None).await;
    }
}

/// One of several that send the same few requests, each with its idempotency key, time and again.
async fn repeater(mut client: Client, user: u64, sends: u64, mut requests: u64) {
    let world = client.world.clone();
    let longest = (world.borrow().ttl + 4) * SECOND;
    while requests > 0 {
        client.idle(longest).await;
        let (request, calm) = {
            let world = &mut *world.borrow_mut();
            (world.keyed_request(user, sends), !world.clean && world.promised <= world.now)
        };
        // Where nothing goes wrong any more, it gets its id.
        let answered = publish(&mut client, vec![request], None).await[0];
        requests -= u64::from(answered || !calm);
    }
}

/// A process that publishes for several users at a time: the requests that come while a claim is under way form the next
/// group.
#[derive(Default)]
struct Process {
    users: RefCell<Vec<User>>,
    /// `last` as the latest claim left it, and [`World::connections_lost`] then.
    known: Cell<(Known, u64)>,
    /// When the latest claim began, while it is under way.
    claims_since: Cell<Option<u64>>,
    is_over: Cell<bool>,
}

/// A user who publishes through a process, one request after the other.
struct User {
    user: u64,
    /// How many sends it repeats with their idempotency keys; none if it repeats nothing.
    sends: Option<u64>,
    requests: u64,
    /// When its next request comes; never while one is under way.
    next: u64,
    longest: u64,
}

impl Process {
    /// The users whose requests go together: all that have come, in this order, but each idempotency key once.
    fn next_group(&self, world: &mut World) -> Vec<(usize, Request)> {
        let mut users = self.users.borrow_mut();
        let mut waiting: Vec<usize> = (0..users.len()).collect();
        waiting.retain(|&user| users[user].requests > 0 && users[user].next <= world.now);
        waiting.sort_by_key(|&user| users[user].next);
        let mut group = Vec::<(usize, Request)>::new();
        for at in waiting {
            let user = &mut users[at];
            let request = match user.sends {
                Some(sends) => world.keyed_request(user.user, sends),
                None => world.plain_request(user.user),
            };
            if request.token.is_some() && group.iter().any(|(_, other)| other.name == request.name) {
                break;
            }
            group.push((at, Request { begun: user.next, ..request }));
            user.requests -= 1;
            user.next = u64::MAX;
        }
        group
    }
}

/// Serves a process's users. Of two servers one waits while the other's claim is under way, but for no longer than
/// requests may wait for others. If one dies, both do.
async fn server(mut client: Client, process: Rc<Process>) {
    struct Guard(Rc<Process>);
    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.is_over.set(true);
        }
    }
    let _guard = Guard(process.clone());
    let world = client.world.clone();
    let lock = limits::PUBLISH_LOCK.as_micros() as u64;
    loop {
        let next = process.users.borrow().iter().filter(|user| user.requests > 0).map(|user| user.next).min();
        let Some(next) = next.filter(|_| !process.is_over.get()) else { break };
        let ready = next.max(process.claims_since.get().map_or(0, |since| since + lock));
        let now = world.borrow().now;
        if now < ready {
            client.sleep((ready - now).min(lock)).await;
            continue;
        }
        if process.claims_since.replace(Some(now)).is_some() {
            world.borrow_mut().count("group beside another");
        }
        let (numbers, group): (Vec<_>, Vec<_>) = process.next_group(&mut world.borrow_mut()).into_iter().unzip();
        let (mut known, connections_lost) = process.known.take();
        if connections_lost != world.borrow().connections_lost && client.protocol != Protocol::KnownOfAnotherConnection
        {
            known = None;
        }
        if let (Protocol::StaleKnown, Some((read_at, counter))) = (client.protocol, &mut known) {
            (*read_at, client.known) = (client.now(), Some(counter.cas));
        }
        let answered = publish(&mut client, group, Some(&mut known)).await;
        let world = &mut *world.borrow_mut();
        process.known.set((known, world.connections_lost));
        if process.claims_since.get() == Some(now) {
            process.claims_since.set(None);
        }
        let calm = !world.clean && world.promised <= world.now;
        for (number, answered) in numbers.into_iter().zip(answered) {
            let user = &mut process.users.borrow_mut()[number];
            user.next = world.now + world.idle_for(user.longest);
            user.requests += u64::from(!answered && calm);
        }
    }
}

/// How things are when a group goes to be published.
struct Before {
    begun: u64,
    tick: u64,
    errors: u64,
    writes: u64,
    advances: u64,
    /// There is no counter.
    is_new: bool,
    /// `last` is known; and it is, and young enough to be gone by.
    is_known: bool,
    is_fresh: bool,
}

/// Publishes one request, or a process's group with what the process knows of `last`; which of them succeeded.
async fn publish(client: &mut Client, group: Vec<Request>, known: Option<&mut Known>) -> Vec<bool> {
    let (world, me) = (client.world.clone(), client.actor);
    let (ttl, once_ttl) = (world.borrow().ttl as u32, world.borrow().once_ttl as u32);
    let stale = limits::STALE.min(Duration::from_secs(ttl.into()));
    let last = known.as_deref().copied().flatten();
    let is_young = last.is_some_and(|(read_at, _)| client.now() - read_at < stale);
    let before = {
        let world = &mut *world.borrow_mut();
        world.lives[me] = Life { cost: [0; 3], group: group.len(), ..std::mem::take(&mut world.lives[me]) };
        let is_current = last.map(|(_, last)| last) == world.last;
        Before {
            begun: world.now,
            tick: world.tick(),
            errors: world.lives[me].errors,
            writes: world.writes,
            advances: world.advances,
            is_new: world.last.is_none(),
            is_known: last.is_some(),
            is_fresh: is_young && is_current && group.iter().all(|request| request.token.is_none()),
        }
    };
    let texts = |request: &Request| request.data.iter().map(u64::to_string).collect();
    let texts: Vec<Vec<String>> = group.iter().map(texts).collect();
    let mut publishes: Vec<Publish> =
        group.iter().zip(&texts).map(|(request, texts)| request.publish(texts, once_ttl)).collect();
    let results = match known {
        Some(known) => bus::publish_group(client, publishes, ttl, known).await,
        None => vec![bus::publish(client, publishes.remove(0), ttl).await],
    };
    assert_eq!(results.len(), group.len(), "an answer each");
    let world = &mut *world.borrow_mut();
    world.lives[me].group = 0;
    world.check_group(me, &before, &group, &results);
    for (request, result) in group.iter().zip(&results) {
        world.log(|| format!("{me}: {:?} {result:?}", request.data));
        world.check_answer(me, &before, request, result);
    }
    results.iter().map(Result::is_ok).collect()
}

type Answer = Result<Vec<u64>, Error>;

impl World {
    /// Whether the request has no idempotency key, or was the first with it.
    fn is_first(&self, me: usize, before: &Before, request: &Request) -> bool {
        let by_me = |record: &Record| record.claimed_by == Some(me) && record.claimed_at >= before.begun;
        request.token.is_none() || self.records.get(request.name.as_bytes()).is_some_and(by_me)
    }

    fn check_group(&mut self, me: usize, before: &Before, group: &[Request], results: &[Answer]) {
        let [batches, _, tries] = self.lives[me].cost;
        let is_plain = group.iter().all(|request| request.token.is_none());
        // To read `last` takes a batch, and one more where it has to be created.
        if self.clean && is_plain && batches > tries + 2 {
            self.count("stale re-read");
        }
        // A taken slot is another's success, or, once, what a dead publisher left behind. Others may have changed `last`
        // since a process knew it.
        let others = self.writes - before.writes;
        if self.clean && tries > others + 2 + u64::from(before.is_known) {
            self.violate("cost", format!("{:?}: {tries} tries, {others} others", group[0].data));
        }
        let is_first = group.iter().all(|request| self.is_first(me, before, request));
        let is_alone = self.now - before.begun < SECOND && !before.is_new && self.advances == before.advances + 1;
        let is_published = results.iter().all(Result::is_ok);
        if self.clean && is_published && is_first && is_alone && self.protocol != Protocol::NoLease {
            self.count(match (before.is_fresh, is_plain, group.len()) {
                (true, _, 1) => "send in one round trip",
                (true, ..) => "group in one round trip",
                (_, true, 1) => "send in two round trips",
                (_, _, 1) => "first send in two round trips",
                _ => "group in two round trips",
            });
            if batches > if before.is_fresh { 1 } else { 2 } {
                self.violate("cost", format!("{:?}: {batches} round trips", group[0].data));
            }
        }
        // All requests without an idempotency key are in one slot, and all that is there is in the requests' order.
        let slot = |answer: &Answer| answer.as_ref().ok().map(|ids| ids[0] / IDS);
        let plain = group.iter().zip(results).filter(|(request, _)| request.token.is_none());
        let slots: Vec<Option<u64>> = plain.map(|(_, answer)| slot(answer)).collect();
        if slots.windows(2).any(|two| two[0] != two[1]) {
            self.violate("half a group", format!("{:?}: {results:?}", group[0].data));
        }
        let same_slot = results.iter().filter(|answer| slots.first().is_some_and(|first| slot(answer) == *first));
        if !same_slot.filter_map(|answer| answer.as_ref().ok()).flatten().is_sorted_by(|one, next| one < next) {
            self.violate("disorder", format!("{:?}: {results:?}", group[0].data));
        }
        let keyed = group.iter().filter(|request| request.token.is_some()).count();
        if is_published && slots.len().min(keyed) > 0 {
            self.count("group with and without idempotency keys");
        }
    }

    fn check_answer(&mut self, me: usize, before: &Before, request: &Request, result: &Answer) {
        let (data, is_keyed, clean, tick) = (&request.data, request.token.is_some(), self.clean, self.tick());
        let is_first = self.is_first(me, before, request);
        let claimed = self.records.get(request.name.as_bytes()).map_or(tick, |record| record.claimed);
        let age = |tick: u64| tick.saturating_sub(claimed);
        match result {
            Ok(ids) => {
                let found: Vec<_> = ids.iter().zip(data).filter_map(|(&id, &data)| self.find(id, data)).collect();
                let places: Vec<usize> = found.iter().map(|&(at, _)| at).collect();
                if found.len() < data.len().max(ids.len()) || found.iter().any(|&(_, by_all)| !by_all) {
                    // A repeat cannot tell a slot that was stored too late from another: see `publish_group`.
                    let earlier = |stored: &Stored| stored.by != Some(me) || stored.at < before.begun;
                    let untold = |&at: &usize| self.stored[at].late && earlier(&self.stored[at]);
                    if is_keyed && places.len() == data.len() && places.iter().all(untold) {
                        self.count("late slot told to a repeat");
                        return;
                    }
                    self.violate("wrongly acknowledged", format!("{data:?} as {ids:?}"));
                }
                if places.is_empty() {
                    return;
                }
                // All of it, in its order, and nothing in between.
                if places.windows(2).any(|two| two[0] + 1 != two[1]) {
                    self.violate("disorder", format!("{data:?} as {ids:?}"));
                }
                let first = self.stored[places[0]];
                // Else it was stored under the record before.
                let record = self.records.get_mut(request.name.as_bytes()).filter(|_| is_keyed);
                if let Some(record) = record.filter(|record| record.claimed_at <= first.at) {
                    record.answered.push(ids.clone());
                    let answered = format!("{data:?}: {:?}", record.answered);
                    if clean && record.answered.iter().any(|other| other != ids) {
                        self.violate("answers differ", answered);
                    }
                }
                if is_keyed && !is_first {
                    self.count(if first.at < before.begun { "answer to a repeat" } else { "published by a repeat" });
                }
                if data.len() > 1 {
                    self.count(if is_keyed { "batch with an idempotency key" } else { "batch" });
                }
                let (begun, now) = (request.begun.min(first.at), self.now);
                self.acknowledged.extend(places.iter().map(|&place| (self.stored[place], begun, now)));
            }
            Err(Error::OnceUndecided | Error::OnceExpired) if is_keyed => {
                // A working repeat has to wait for the lease, and to come in time, and for nothing else.
                let due = is_first || age(before.tick) >= u64::from(limits::ONCE_LEASE);
                let in_time = age(tick) <= self.ttl;
                self.count(if in_time { "first at work" } else { "too long ago" });
                if clean && due && in_time && self.protocol != Protocol::NoLease {
                    self.violate("undecided", format!("{data:?}"));
                }
            }
            Err(Error::OnceDiffers) if is_keyed => {
                self.count("differs");
                let mut writes = BTreeMap::<u64, Vec<u64>>::new();
                let is_it = |stored: &&Stored| stored.token.is_some() && name_of(stored.data) == request.name;
                for stored in self.stored.iter().filter(is_it) {
                    writes.entry(stored.write).or_default().push(stored.data);
                }
                if clean && writes.values().all(|stored| stored == data) {
                    self.violate("differs from nothing", format!("{data:?}"));
                }
            }
            // It came too late, and says so.
            Err(Error::OutcomeUnknown(_))
                if self.stored.iter().any(|stored| stored.late && data.contains(&stored.data)) =>
            {
                self.count("late")
            }
            Err(error) if clean && self.lives[me].errors == before.errors => {
                self.violate("refused", format!("{data:?}: {error:?}"));
            }
            Err(_) => {}
        }
    }

    /// How long one idles: often for next to no time, so that actors meet.
    fn idle_for(&mut self, longest: u64) -> u64 {
        let bound = [500, 2_000, longest][self.rng.below(3) as usize];
        self.rng.below(bound)
    }
}

/// A client that polls, and what it has heard.
#[derive(Default)]
struct Poller {
    except: Option<u64>,
    /// Knows the array only, not `Shortbus-Last-Id`.
    old: bool,
    /// Waits, and asks for nothing but `last` first.
    waits: bool,
    /// Reads an event stream, which breaks anywhere now and then, also between two messages of a slot.
    streams: bool,
    /// When its cursor was taken.
    joined: u64,
    cursor: u64,
    /// Id and data.
    heard: Vec<(u64, u64)>,
}

async fn poller(mut client: Client, mut poller: Poller, joins: bool) {
    let (world, me) = (client.world.clone(), client.actor);
    let longest = world.borrow().ttl * SECOND * 9 / 10;
    while joins && poller.joined == 0 {
        client.idle(2 * SECOND).await;
        if let Ok(id) = bus::join(&mut client).await {
            (poller.joined, poller.cursor) = (world.borrow().now, id);
        }
    }
    loop {
        let (begun, all_published) = (world.borrow().now, world.borrow().publishing == 0);
        world.borrow_mut().lives[me].cost = [0; 3];
        poller.bend(client.protocol);
        if let Ok(page) = bus::poll(&mut client, poller.cursor, poller.except).await {
            poller.check(&mut world.borrow_mut(), me, &page, begun);
            if all_published {
                break;
            }
        }
        client.idle(longest).await;
    }
}

/// What one process's watcher found.
#[derive(Default)]
struct Watched {
    snapshot: RefCell<Snapshot>,
    /// When the look began that the window is from.
    begun: Cell<u64>,
    /// It will not look again.
    done: Cell<bool>,
}

async fn watcher(mut client: Client, watched: Rc<Watched>) {
    let world = client.world.clone();
    while !watched.done.get() {
        let (begun, all_published) = (world.borrow().now, world.borrow().publishing == 0);
        if let Ok(update) = refresh(&mut client, &watched.snapshot).await {
            watched.snapshot.borrow_mut().apply(update);
            watched.begun.set(begun);
            watched.done.set(all_published);
        }
        client.idle(SECOND / 10).await;
    }
}

/// A client that waits, as the persistent mode has it: asks memcached itself at first and whenever the counter did not
/// simply go on, else takes what the watcher found.
async fn waiter(mut client: Client, mut poller: Poller, watched: Rc<Watched>) {
    let (world, me) = (client.world.clone(), client.actor);
    while poller.joined == 0 {
        client.idle(2 * SECOND).await;
        if let Ok(id) = bus::join(&mut client).await {
            (poller.joined, poller.cursor) = (world.borrow().now, id);
        }
    }
    client.ahead = 0;
    let mut asked = None;
    loop {
        world.borrow_mut().lives[me].cost = [0; 3];
        let (done, last, epoch) =
            (watched.done.get(), watched.snapshot.borrow().last(), watched.snapshot.borrow().epoch());
        let mut begun = world.borrow().now;
        poller.bend(client.protocol);
        let page = if asked.replace(epoch) != Some(epoch) {
            bus::poll(&mut client, poller.cursor, poller.except).await
        } else if last.is_some_and(|last| bus::last_id(last) > poller.cursor) {
            begun = watched.begun.get();
            world.borrow_mut().count("poll of a snapshot");
            let store = Client::new(world.clone(), me);
            bus::poll(&mut CachedStore { snapshot: &watched.snapshot, store }, poller.cursor, poller.except).await
        } else if done {
            break;
        } else {
            client.idle(SECOND / 10).await;
            continue;
        };
        match page {
            Ok(page) => poller.check(&mut world.borrow_mut(), me, &page, begun),
            Err(_) => asked = None,
        }
    }
}

/// Id and data of a page's messages.
fn messages(page: &Page) -> Vec<(u64, u64)> {
    let message = |message: &bus::Message| {
        let data = std::str::from_utf8(message.data()).unwrap().parse().expect("a number");
        assert_eq!(message.user, user_of(data), "the sender of {data}, {}", message.id);
        (message.id, data)
    };
    page.messages.iter().map(message).collect()
}

impl Poller {
    /// What a broken protocol makes of the cursor.
    fn bend(&mut self, protocol: Protocol) {
        if protocol == Protocol::InsideIsBehind {
            self.cursor |= IDS - 1;
        }
    }

    fn check(&mut self, world: &mut World, me: usize, page: &Page, begun: u64) {
        let (messages, after, last_id) = (messages(page), self.cursor, page.last_id);
        world.log(|| format!("{me}: after {after} heard {messages:?}, up to {last_id}, missed {}", page.missed));
        let mut before = after;
        if last_id < after {
            // The documented exception: the counter was lost, and came back lower.
            world.count("lower counter");
            self.heard.clear();
            before = 0;
            if world.clean || !page.missed {
                world.violate("disorder", format!("from {after} back to {last_id}"));
            }
        }
        for &(id, data) in &messages {
            if id <= before || id > last_id {
                world.violate("disorder", format!("{id} after {before}, up to {last_id}, to {me}"));
            }
            before = id;
            let stored = |id, data| world.stored.iter().rfind(move |stored| (stored.id, stored.data) == (id, data));
            let again = |heard: &(u64, u64)| {
                let both = stored(heard.0, heard.1).zip(stored(id, data));
                world.clean && both.is_some_and(|(old, new)| world.same(old, new))
            };
            if self.heard.iter().any(|heard| heard.0 == id || again(heard)) {
                world.violate("duplicate", format!("{data} as {id}, to {me}"));
            }
            self.heard.push((id, data));
            if self.except == Some(user_of(data)) {
                world.violate("own message", format!("{data} as {id}, to {me}"));
            }
            if world.under(id / IDS).all(|stored| (stored.id, stored.data) != (id, data)) {
                world.violate("content", format!("{data} as {id}, to {me}"));
            }
        }
        let behind = if last_id < after { 0 } else { after };
        for heard in messages.chunk_by(|one, next| one.0 / IDS == next.0 / IDS) {
            let slot = heard[0].0 / IDS;
            let wanted = |stored: &&Stored| stored.id > behind && self.except != Some(user_of(stored.data));
            let part = |write| world.under(slot).filter(wanted).filter(move |stored| stored.write == write);
            let is_all = |write| part(write).map(|stored| (stored.id, stored.data)).eq(heard.iter().copied());
            if !world.under(slot).any(|stored| is_all(stored.write)) {
                world.violate("half a group", format!("{heard:?}, to {me}"));
            }
            if heard[0].0 % IDS < heard.len() as u64 && heard.len() > 1 {
                world.count("group heard");
            }
            if behind / IDS == slot {
                world.count("cursor inside a slot");
            }
        }
        self.check_owed(world, me, begun, last_id);
        if world.clean {
            self.check_missed(world, me, page);
        }
        self.check_cost(world, me, last_id);
        self.cursor = if self.old { messages.last().map_or(after, |message| message.0) } else { last_id };
        if self.streams && world.rng.one_in(3) {
            let unread = world.rng.below(messages.len() as u64 + 1) as usize;
            self.heard.truncate(self.heard.len() - unread);
            let read = &messages[..messages.len() - unread];
            self.cursor = if unread > 0 { read.last().map_or(after, |message| message.0) } else { self.cursor };
        }
    }

    /// The promise.
    fn check_owed(&self, world: &mut World, me: usize, begun: u64, last_id: u64) {
        let owed = |&&(message, published, acknowledged): &&(Stored, u64, u64)| {
            let lived = world.now < message.at + world.ttl * SECOND;
            // A counter that comes back lower and passes the cursor between two polls: nobody can tell.
            let passed = world.came_back_lower && message.id <= self.cursor && self.cursor <= last_id;
            let expected = self.joined <= message.at && acknowledged <= begun && world.promised <= published;
            expected && lived && !passed && self.except != Some(user_of(message.data))
        };
        let owed: Vec<Stored> = world.acknowledged.iter().filter(owed).map(|&(message, ..)| message).collect();
        for Stored { id, data, .. } in owed {
            world.count("owed");
            if !self.heard.contains(&(id, data)) {
                world.violate("lost", format!("{data}, acknowledged as {id}, to {me} at {last_id}"));
            }
        }
    }

    fn check_missed(&self, world: &mut World, me: usize, page: &Page) {
        let tick = world.tick();
        let heard = |id| self.heard.iter().any(|heard| heard.0 == id);
        let one = |slot| world.under(slot).is_sorted_by(|one, next| one.write == next.write);
        let passed = |stored: &&Stored| stored.id > self.cursor && stored.id <= page.last_id;
        let mut passed = world.stored.iter().filter(passed);
        let expired = passed.clone().any(|stored| tick >= stored.expires);
        let wanted = |stored: &Stored| self.except != Some(user_of(stored.data));
        let gone = passed.any(|stored| wanted(stored) && !heard(stored.id) && one(stored.slot));
        if gone {
            world.count("missed");
        }
        if gone && !page.missed {
            world.violate("missed unreported", format!("{} to {}, to {me}", self.cursor, page.last_id));
        }
        // One that never joined asks for all there ever was.
        if page.missed && !expired && self.cursor / IDS >= world.start {
            world.violate("missed for nothing", format!("{} to {}, to {me}", self.cursor, page.last_id));
        }
    }

    fn check_cost(&self, world: &mut World, me: usize, last_id: u64) {
        let [batches, ops, _] = world.lives[me].cost;
        // Slots behind the cursor, and the one that it stands in.
        let few = last_id >= self.cursor && (last_id + 1) / IDS - (self.cursor + 1) / IDS <= limits::WINDOW;
        // Every loss of the counter leaves a gap, with a batch fetched in vain before it.
        let search = if world.clean { search_ops(2) } else { (search_ops(13) + limits::BATCH) * (DISTURBANCES + 1) };
        if few && batches > 1 + u64::from(self.waits) || ops > search + world.writes {
            let (from, to) = (self.cursor, last_id);
            world.violate("cost", format!("{batches} batches, {ops} operations from {from} to {to}"));
        }
    }
}

/// Operations of a poll beside those that fetch its messages: `last` and a window, a gallop over 53 bits, rounds of
/// bisecting, and the slots within which these stop.
fn search_ops(rounds: u64) -> u64 {
    1 + limits::WINDOW + (53 + rounds * limits::PROBES) * limits::PROBE_SLOTS + limits::WINDOW
}

type Actor = Pin<Box<dyn Future<Output = ()>>>;

struct Simulation {
    world: Shared,
    /// Whether it publishes; what it does until it ends or dies.
    actors: Vec<(bool, Option<Actor>)>,
}

impl Simulation {
    fn new(world: World) -> Simulation {
        Simulation { world: Rc::new(RefCell::new(world)), actors: vec![] }
    }

    fn spawn<F: Future<Output = ()> + 'static>(&mut self, publishes: bool, act: impl FnOnce(Client) -> F) {
        let mut world = self.world.borrow_mut();
        world.lives.push(Life::default());
        world.publishing += usize::from(publishes);
        drop(world);
        let client = Client::new(self.world.clone(), self.actors.len());
        self.actors.push((publishes, Some(Box::pin(act(client)))));
    }

    /// Publishers and pollers of every kind.
    fn populate(&mut self) {
        let world = self.world.clone();
        let random = |bound| world.borrow_mut().rng.below(bound);
        let publishers = 1 + random(4);
        for user in 1..=publishers {
            let requests = if random(6) == 0 { 15 } else { 1 + random(5) };
            self.spawn(true, |client| publisher(client, user, requests));
        }
        for _ in 0..random(3) {
            let users = (0..1 + random(5)).map(|_| self.process_user()).collect();
            self.spawn_process(users);
        }
        let repeaters = random(3);
        for user in 5..5 + repeaters {
            let sends = 1 + random(3);
            for _ in 0..1 + random(4) {
                let requests = 1 + random(5);
                self.spawn(true, |client| repeater(client, user, sends, requests));
            }
        }
        for _ in 0..1 + random(4) {
            let except = (random(2) == 0).then(|| [1, 5][random(2) as usize] + random(publishers.max(2)));
            let (old, streams, joins) = (random(2) == 0, random(3) == 0, random(6) > 0);
            let listener = Poller { except, old, streams, ..Poller::default() };
            self.spawn(false, |client| poller(client, listener, joins));
        }
        let watched = Rc::<Watched>::default();
        for n in 0..random(4) {
            if n == 0 {
                self.spawn(false, |client| watcher(client, watched.clone()));
            }
            let except = (random(2) == 0).then(|| 1 + random(publishers));
            let listener = Poller { except, waits: true, streams: random(3) == 0, ..Poller::default() };
            self.spawn(false, |client| waiter(client, listener, watched.clone()));
        }
    }

    /// One like the others who publish without a process, or repeat.
    fn process_user(&self) -> User {
        let world = &mut *self.world.borrow_mut();
        let (user, repeats) = (world.rng.below(4), world.rng.one_in(3));
        let (sends, requests) = (repeats.then(|| 1 + world.rng.below(3)), 1 + world.rng.below(4));
        let longest = if world.rng.one_in(3) { world.ttl + 4 } else { 1 } * SECOND;
        let next = world.idle_for(longest);
        User { user: user + if repeats { 5 } else { 1 }, sends, requests, next, longest }
    }

    fn spawn_process(&mut self, users: Vec<User>) {
        let process = Rc::new(Process { users: RefCell::new(users), ..Process::default() });
        let servers = if self.world.borrow_mut().rng.one_in(3) { 2 } else { 1 };
        for _ in 0..servers {
            self.spawn(true, |client| server(client, process.clone()));
        }
    }

    fn run(&mut self) {
        for _ in 0..STEPS_MAX {
            let (publishing, promised) = (self.world.borrow().publishing, self.world.borrow().promised);
            if publishing == 0 && promised == u64::MAX {
                self.world.borrow_mut().calm();
                self.spawn(true, |client| publisher(client, 9, 2));
                (0..2).for_each(|_| self.spawn(true, |client| repeater(client, 8, 2, 3)));
                let users = (0..3).map(|_| self.process_user()).collect();
                self.spawn_process(users);
            }
            if self.actors.iter().all(|(_, actor)| actor.is_none()) {
                return;
            }
            self.step();
        }
        self.world.borrow_mut().violate("endless", format!("{STEPS_MAX} steps"));
    }

    /// One operation in memcached, or one actor up to its next exchange; where there is neither, time passes.
    fn step(&mut self) {
        let mut world = self.world.borrow_mut();
        let disturb = world.hazards.disturb;
        if world.disturbances > 0 && world.rng.one_in(disturb) {
            world.disturbances -= 1;
            world.disturb();
        }
        world.exchanges.retain(|exchange| exchange.owner.is_some() || !exchange.ops.is_empty());
        // When who can go on: the exchanges, and behind them the actors.
        let exchanges = world.exchanges.len();
        let under_way = || world.exchanges.iter().enumerate().filter(|(_, exchange)| !exchange.ops.is_empty());
        let mut next: Vec<(u64, usize)> = Vec::with_capacity(exchanges + self.actors.len());
        next.extend(under_way().map(|(at, exchange)| (exchange.arrives, at)));
        for (actor, _) in self.actors.iter().enumerate().filter(|(_, (_, future))| future.is_some()) {
            let waits_for = under_way().find(|(_, exchange)| exchange.owner == Some(actor));
            let deadline = waits_for.map_or(0, |(_, exchange)| exchange.deadline);
            next.push((world.lives[actor].wake.max(deadline), exchanges + actor));
        }
        let soonest = next.iter().min().map_or(0, |&(when, _)| when);
        world.now = world.now.max(soonest) + 1 + world.rng.below(20);
        next.retain(|&(when, _)| when <= world.now);
        let (_, chosen) = next[world.rng.below(next.len() as u64) as usize];
        let died = if chosen < exchanges { world.run_next(chosen) } else { None };
        drop(world);
        let Some(actor) = died.or(chosen.checked_sub(exchanges)) else { return };
        let (publishes, future) = &mut self.actors[actor];
        let ends = |future: &mut Actor| future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready();
        if died.is_some() || future.as_mut().is_some_and(ends) {
            *future = None;
            let mut world = self.world.borrow_mut();
            world.publishing -= usize::from(*publishes);
            world.log(|| format!("{actor} {}", if died.is_some() { "dies" } else { "is done" }));
        }
    }
}

fn simulate(world: World) -> (Vec<(&'static str, String)>, BTreeMap<&'static str, u64>) {
    let mut simulation = Simulation::new(world);
    simulation.populate();
    simulation.run();
    let world = &mut *simulation.world.borrow_mut();
    (std::mem::take(&mut world.violations), std::mem::take(&mut world.counts))
}

/// Runs the correct protocol through the schedules of `seeds`, or of TEST_SEED alone. Each of `events` has to
/// come about.
fn simulate_all(test: &str, seeds: Range<u64>, clean: bool, events: &[&str]) {
    if let Some(seed) = std::env::var("TEST_SEED").ok().map(|seed| seed.parse().expect("TEST_SEED: a number")) {
        let (violations, _) = simulate(World { trace: true, ..World::new(seed, Protocol::Correct, clean) });
        assert_eq!(violations, [], "seed {seed}");
        return;
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let total = Mutex::new(BTreeMap::<_, u64>::new());
    let run = |thread| {
        for seed in seeds.clone().skip(thread).step_by(threads) {
            let (violations, counts) = simulate(World::new(seed, Protocol::Correct, clean));
            let again = format!("TEST_SEED={seed} cargo test simulation::{test} -- --nocapture");
            assert_eq!(violations, [], "to see the schedule: {again}");
            let mut total = total.lock().expect("no schedule failed");
            counts.into_iter().for_each(|(event, n)| *total.entry(event).or_default() += n);
        }
    };
    std::thread::scope(|scope| (0..threads).for_each(|thread| drop(scope.spawn(move || run(thread)))));
    let total = total.into_inner().expect("no schedule failed");
    println!("{} schedules: {total:?}", seeds.count());
    for event in events {
        assert!(total.contains_key(event), "{event} in none of the schedules");
    }
}

#[test]
fn an_acknowledged_message_reaches_everyone_exactly_once_in_one_order() {
    let test = "an_acknowledged_message_reaches_everyone_exactly_once_in_one_order";
    let crashes = ["crash, cut off", "crash, runs on", "timeout, cut off", "timeout, runs on"];
    let time = ["pause", "pause beyond 2 s", "expiry", "stale re-read", "missed"];
    let paths =
        ["taken", "torn read", "helped advance", "gallop", "owed", "send in two round trips", "poll of a snapshot"];
    let batches = ["batch", "batch with an idempotency key", "group heard", "cursor inside a slot"];
    let groups = [
        "crash of a group",
        "group beside another",
        "group in one round trip",
        "group in two round trips",
        "group with and without idempotency keys",
        "send in one round trip",
    ];
    let firsts = ["first at work", "too long ago", "claimed again", "first send in two round trips"];
    let repeats = ["answer to a repeat", "published by a repeat", "differs"];
    simulate_all(
        test,
        SEED..SEED + CLEAN,
        true,
        &[&crashes[..], &time, &paths, &batches, &groups, &firsts, &repeats].concat(),
    );
}

#[test]
fn after_eviction_restart_and_refusal_the_bus_works_again() {
    let test = "after_eviction_restart_and_refusal_the_bus_works_again";
    let events = [
        "slot evicted",
        "record evicted",
        "counter lost",
        "flush",
        "restart",
        "clock set back",
        "refusal",
        "lower counter",
    ];
    simulate_all(test, SEED + CLEAN..SEED + CLEAN + DIRTY, false, &[&events[..], &["owed"]].concat());
}

#[test]
fn the_bus_key_is_the_first_one_created() {
    for seed in SEED..SEED + 2_000 {
        let mut simulation = Simulation::new(World::new(seed, Protocol::Correct, true));
        for n in 1..=4 {
            simulation.spawn(true, |client| key_asker(client, n));
        }
        simulation.spawn(true, |client| async move {
            client.idle(SECOND).await;
            client.world.borrow_mut().set_key(None);
        });
        simulation.run();
        assert_eq!(simulation.world.borrow().violations, [], "seed {seed}");
    }
}

/// A schedule around the tick at which a slot expires whose publisher died before it advanced `last`. Two publish there and
/// one polls. All begin before the tick, or all at it.
fn around_a_tick(seed: u64, is_before: bool) -> Vec<(&'static str, String)> {
    let mut world = World { ttl: 1, hazards: Hazards::default(), ..World::new(seed, Protocol::Correct, true) };
    let start = EPOCH / IDS;
    world.set_last(start);
    world.start = start;
    let dead = user_data(1, PLAIN);
    let add = Op::Add { slot: start + 1, value: &[], ttl: 2 };
    world.execute(&add, render(&[(1, None, dead)])).expect("nothing goes wrong");
    let tick = (world.tick() + 2) * SECOND - world.phase;
    let mut simulation = Simulation::new(world);
    let begins = || {
        let world = &mut *simulation.world.borrow_mut();
        let apart = world.rng.below(100);
        if is_before { tick - apart } else { tick + apart }
    };
    let [one, other, poll] = [begins(), begins(), begins()];
    for (user, begins) in [(2, one), (3, other)] {
        simulation.spawn(true, |mut client| async move {
            client.sleep(begins).await;
            let request = client.world.borrow_mut().plain_request(user);
            publish(&mut client, vec![request], None).await;
        });
    }
    simulation.spawn(false, |client| async move {
        client.sleep(poll).await;
        poller(client, Poller { joined: 1, cursor: bus::last_id(start), ..Poller::default() }, false).await;
    });
    simulation.run();
    std::mem::take(&mut simulation.world.borrow_mut().violations)
}

/// What the protocol assumes: no slot expires between two operations of a write.
#[test]
fn only_a_slot_that_expires_in_the_midst_of_a_write_for_it_loses_a_message() {
    let mut found = BTreeMap::<&str, u64>::new();
    for seed in SEED..SEED + TICKS {
        assert_eq!(around_a_tick(seed, false), [], "seed {seed}");
        for (violation, _) in around_a_tick(seed, true) {
            *found.entry(violation).or_default() += 1;
        }
    }
    println!("{TICKS} schedules with a tick in a write: {found:?}");
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), ["lost", "wrongly acknowledged"]);
}

/// Asks for the bus key, offering a fresh one or not.
async fn key_asker(mut client: Client, n: u64) {
    let world = client.world.clone();
    for request in 1..=6 {
        client.idle(SECOND).await;
        let begun = world.borrow().now;
        let fresh = world.borrow_mut().rng.one_in(2).then(|| vec![n as u8, request]);
        if let Ok(key) = bus::signing_key(&mut client, fresh.as_deref()).await {
            let world = &mut *world.borrow_mut();
            // One that was the bus's meanwhile: at most two, and none where there is none.
            let during = world.keys.iter().rposition(|&(since, _)| since <= begun).unwrap_or(0);
            let was = world.keys[during..].iter().any(|(_, was)| *was == key);
            if !was || world.keys.iter().filter(|(_, key)| key.is_some()).count() > 2 {
                let keys = format!("{:?}", world.keys);
                world.violate("not the key", format!("{key:?} of {keys}"));
            }
        }
    }
}

/// Runs schedules that the correct protocol passes.
fn assert_caught(protocol: Protocol, violation: &str) {
    let violations = |seed| simulate(World::new(seed, protocol, true)).0;
    let caught = |&seed: &u64| violations(seed).iter().any(|(found, _)| *found == violation);
    let seed = (SEED..SEED + CAUGHT).find(caught);
    println!("{protocol:?}: {violation:?} in schedule {:?}", seed.map(|seed| seed - SEED + 1));
    assert!(seed.is_some(), "{protocol:?} is not caught");
}

#[test]
fn to_advance_before_the_message_is_stored_loses_messages() {
    assert_caught(Protocol::AdvanceBeforeAdd, "lost");
}

#[test]
fn to_read_slots_before_last_loses_messages() {
    assert_caught(Protocol::SlotsBeforeLast, "lost");
}

#[test]
fn to_acknowledge_a_taken_slot_gives_away_another_s_id() {
    assert_caught(Protocol::AckOnTaken, "wrongly acknowledged");
}

#[test]
fn to_claim_an_old_slot_unknowingly_loses_messages() {
    assert_caught(Protocol::MovedLastUnseen, "lost");
}

#[test]
fn to_believe_a_torn_read_of_the_counter_publishes_slots_that_are_empty() {
    assert_caught(Protocol::TornReadBelieved, "missed for nothing");
}

#[test]
fn to_store_the_slot_before_its_id_is_noted_publishes_twice() {
    assert_caught(Protocol::SlotBeforeNote, "twice");
}

#[test]
fn to_read_the_record_before_last_publishes_twice() {
    assert_caught(Protocol::RecordBeforeLast, "twice");
}

#[test]
fn to_know_of_a_first_request_only_publishes_twice() {
    assert_caught(Protocol::IdsUnseen, "twice");
}

#[test]
fn without_tokens_one_message_is_taken_for_another() {
    assert_caught(Protocol::TokenIgnored, "differs from nothing");
}

#[test]
fn to_keep_the_record_for_the_first_message_s_time_publishes_twice() {
    assert_caught(Protocol::ShortRecord, "twice");
}

#[test]
fn to_go_by_what_was_long_known_unknowingly_loses_messages() {
    assert_caught(Protocol::StaleKnown, "lost");
}

/// A schedule in which memcached restarts, in the midst of publishing; the promise holds from then on.
fn restart(seed: u64, protocol: Protocol) -> Vec<(&'static str, String)> {
    let world = World { hazards: Hazards::default(), ..World::new(seed, protocol, false) };
    let mut simulation = Simulation::new(world);
    for user in 1..=2 {
        simulation.spawn(true, |client| publisher(client, user, 4));
        simulation.spawn(false, |client| poller(client, Poller::default(), true));
    }
    let users = (0..2).map(|_| simulation.process_user()).collect();
    simulation.spawn_process(users);
    simulation.spawn(true, |client| async move {
        // By then the time is past all slots that there are, and the counter comes back higher.
        client.sleep(SECOND).await;
        client.idle(SECOND).await;
        let world = &mut *client.world.borrow_mut();
        world.befall("restart");
        world.promised = world.now;
    });
    simulation.run();
    std::mem::take(&mut simulation.world.borrow_mut().violations)
}

#[test]
fn to_go_by_what_was_known_on_another_connection_loses_messages() {
    for seed in SEED..SEED + CAUGHT {
        assert_eq!(restart(seed, Protocol::Correct), [], "seed {seed}");
    }
    let violations = |seed| restart(seed, Protocol::KnownOfAnotherConnection);
    let caught = |&seed: &u64| violations(seed).iter().any(|(found, _)| *found == "lost");
    let seed = (SEED..SEED + CAUGHT).find(caught);
    println!("KnownOfAnotherConnection: \"lost\" in schedule {:?}", seed.map(|seed| seed - SEED + 1));
    assert!(seed.is_some());
}

#[test]
fn to_read_a_part_of_a_slot_loses_messages() {
    assert_caught(Protocol::HalfGroup, "half a group");
    assert_caught(Protocol::HalfGroup, "lost");
}

#[test]
fn to_read_a_slot_in_another_order_is_noticed() {
    assert_caught(Protocol::GroupReversed, "content");
}

#[test]
fn to_take_a_cursor_inside_a_slot_for_one_behind_it_loses_messages() {
    assert_caught(Protocol::InsideIsBehind, "lost");
}

#[test]
fn without_the_lease_requests_get_in_each_other_s_way_but_nothing_is_published_twice() {
    for seed in SEED..SEED + CAUGHT {
        assert_eq!(simulate(World::new(seed, Protocol::NoLease, true)).0, [], "seed {seed}");
    }
}

#[test]
fn without_the_two_second_rule_publishers_are_late_but_nothing_is_lost() {
    let mut late = 0;
    for seed in SEED..SEED + CAUGHT {
        let (violations, counts) = simulate(World::new(seed, Protocol::ClockStandsStill, true));
        assert_eq!(violations, [], "seed {seed}");
        late += counts.get("late").unwrap_or(&0);
    }
    assert!(late > 0);
}

#[test]
fn a_poll_finds_every_live_message_at_once_however_far_behind() {
    let newest = EPOCH / IDS;
    for seed in SEED..SEED + 400 {
        let mut rng = Rng(seed);
        let behind = [rng.below(40), 1_000, 1_000_000, 1_000_000_000_000][rng.below(4) as usize];
        let live = [rng.below(40), rng.below(400), rng.below(4_000)][rng.below(3) as usize];
        // Often inside a slot, of those that live or not.
        let after = match rng.one_in(4) {
            true => (newest + rng.below(live + 1)) * IDS + rng.below(4),
            false => (newest - behind) * IDS + [IDS - 1, rng.below(IDS)][rng.below(2) as usize],
        };
        let (last, except) = (newest + live, rng.one_in(2).then_some(3));
        let mut world = World { rng, last: Some(Counter { value: last, cas: 1 }), ..World::default() };
        let mut wanted = vec![];
        for slot in newest + 1..=last {
            // Holes, as refused and evicted messages leave them, narrower than a probe.
            if slot % limits::PROBE_SLOTS > 0 && world.rng.one_in(8) {
                continue;
            }
            let count = [1, 1, 1 + world.rng.below(BATCH), 1 + world.rng.below(IDS)][world.rng.below(4) as usize];
            let count = if live > 400 { count.min(BATCH) } else { count };
            let user = |world: &mut World| 1 + world.rng.below(4);
            let parts: Vec<Part> = (0..count).map(|n| (user(&mut world), None, slot % 1_000 * 10 + n % 10)).collect();
            let parts: Vec<Part> = parts.into_iter().map(|(user, _, n)| (user, None, user_data(user, n))).collect();
            world.slots.insert(slot, (render(&parts), u64::MAX));
            let numbered = numbered(slot, parts).filter(|&(id, (user, ..))| id > after && except != Some(user));
            wanted.extend(numbered.map(|(id, (.., data))| (id, data)));
        }
        let mut simulation = Simulation::new(world);
        simulation.spawn(false, |client| read_to_the_end(client, after, except, wanted));
        simulation.run();
        assert_eq!(simulation.world.borrow().violations, [], "seed {seed}: {live} live, {behind} behind");
    }
}

#[test]
fn a_cursor_inside_a_slot_that_is_not_there_yet_is_of_a_counter_that_was_lost() {
    let (last, behind) = (EPOCH / IDS, (EPOCH / IDS + 1) * IDS);
    for (after, missed) in [(behind - 1, false), (behind, true), (behind + IDS - 2, true), (behind + IDS - 1, true)] {
        let mut simulation = Simulation::new(World { last: Some(Counter { value: last, cas: 1 }), ..World::default() });
        simulation.spawn(false, |mut client| async move {
            let page = bus::poll(&mut client, after, None).await.expect("nothing goes wrong");
            assert_eq!((page.last_id, page.missed), (behind - 1, missed), "{after}");
        });
        simulation.run();
    }
}

async fn read_to_the_end(mut client: Client, mut after: u64, except: Option<u64>, wanted: Vec<(u64, u64)>) {
    let (world, me) = (client.world.clone(), client.actor);
    let last = world.borrow().last.expect("there is one").value * IDS + IDS - 1;
    let mut heard = vec![];
    loop {
        world.borrow_mut().lives[me].cost = [0; 3];
        let page = bus::poll(&mut client, after, except).await.expect("nothing goes wrong");
        let world = world.borrow();
        let ([_, ops, _], found) = (world.lives[me].cost, messages(&page));
        // The slot that the cursor stands in counts: its last message is behind the cursor.
        let behind = (after + 1) / IDS..(page.last_id + 1) / IDS;
        let passed = world.slots.range(behind.clone()).count() as u64;
        assert_eq!(page.missed, behind.end - behind.start > passed, "{after} to {}", page.last_id);
        // One in eight is a hole, and the last batch may be more than the page takes.
        assert!(ops <= search_ops(3) + passed * 5 / 4 + limits::BATCH, "{ops} operations from {after}, {passed} there");
        assert!(found.len() <= limits::REPLY_MESSAGES);
        heard.extend_from_slice(&found);
        after = page.last_id;
        if after == last {
            break;
        }
    }
    assert_eq!(heard, wanted);
}
