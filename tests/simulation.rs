//! A seeded simulation of the delivery protocol: the real `join`, `publish` and `poll` over a model of memcached,
//! one operation at a time, with crashes, pauses, lost answers and expiry, and the promise checked at every poll.
//!
//! *Clean* schedules keep to what the promise assumes; *dirty* ones evict, restart, lose the counter and refuse
//! memory, and the bus has to work again afterwards. Each rule of the protocol is also broken, to see it caught.
//!
//! `SHORTBUS_SEED=<n> cargo test --test simulation <test> -- --nocapture` runs one schedule and prints its trace.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use shortbus::bus::{self, Page};
use shortbus::error::Error;
use shortbus::limits;
use shortbus::store::{Counter, Op, Reply, Store, StoreError};

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
}

/// What went into a slot. A message's data is a number used once, and says whose it is.
#[derive(Clone, Copy)]
struct Stored {
    id: u64,
    data: u64,
    at: u64,
    expires: u64,
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
    cas: u64,
    /// Value and the tick it expires at.
    slots: BTreeMap<u64, (Vec<u8>, u64)>,
    exchanges: Vec<Exchange>,
    lives: Vec<Life>,
    /// Publishers at work.
    publishing: usize,
    /// Since when the promise holds: from the start, or from the end of the disturbances.
    promised: u64,
    messages: u64,
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
        let mut hazards = Hazards { crash: often(25), freeze: often(12), lag: often(12), ..Hazards::default() };
        if !clean {
            hazards = Hazards { full: often(10), disturb: 30 << rng.below(4), ..hazards };
        }
        let (ttl, phase, disturbances) = (1 + rng.below(5), rng.below(SECOND), 1 + rng.below(DISTURBANCES));
        let promised = if clean { 0 } else { u64::MAX };
        World { rng, protocol, hazards, disturbances, clean, ttl, phase, promised, ..World::default() }
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
        let seen = self.advances;
        self.exchanges.push(Exchange {
            owner: Some(actor),
            ops,
            replies: vec![],
            error: None,
            arrives,
            deadline,
            seen,
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
        let write = matches!(self.exchanges[at].ops[0].0, Op::Add { .. } | Op::Advance(_));
        if write && owner.is_some() && self.rng.one_in(self.hazards.crash) {
            self.abandon(at, ["crash, cut off", "crash, runs on"]);
            return owner;
        }
        let (op, value) = self.exchanges[at].ops.pop_front()?;
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
        self.log(|| format!("{}: {op:?} -> {reply:?}", owner.map_or("nobody".into(), |actor| actor.to_string())));
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

    /// One operation, as memcached does it.
    fn execute(&mut self, op: &Op, value: Vec<u8>) -> Result<Reply, StoreError> {
        Ok(match *op {
            Op::Last => self.last.map_or(Reply::Missing, Reply::Counter),
            Op::Create(_) if self.last.is_some() => Reply::Taken,
            Op::Create(start) => {
                self.start = start;
                self.set_last(start)
            }
            Op::Advance(cas) => match self.last {
                Some(counter) if counter.cas == cas => {
                    self.advances += 1;
                    self.torn = Some(Counter { value: counter.value, cas: self.cas + 1 });
                    self.set_last(counter.value + 1)
                }
                Some(_) => Reply::Taken,
                None => Reply::Missing,
            },
            Op::Add { id, .. } if self.rng.one_in(self.hazards.full) => {
                // It drops what the slot held, too: "avoid stale data" in process_mset_command.
                self.slots.remove(&id);
                self.count("refusal");
                return Err(StoreError::Full("the model".into()));
            }
            Op::Add { id, .. } if self.slot(id).is_some() => {
                self.count("taken");
                Reply::Taken
            }
            Op::Add { id, ttl, .. } => {
                let expires = self.tick() + u64::from(ttl);
                let text = std::str::from_utf8(&value).expect("text");
                let data = text.split_once(' ').and_then(|(_, data)| data.parse().ok()).expect("user, space, data");
                // A slot that expired before `last` named it, its publisher being dead, was nobody's.
                let unseen = self.clean && self.last.is_some_and(|last| last.value < id);
                self.stored.iter_mut().filter(|stored| unseen && stored.id == id).for_each(|stored| stored.id = 0);
                self.stored.push(Stored { id, data, at: self.now, expires });
                self.slots.insert(id, (value, expires));
                Reply::Stored
            }
            Op::Get(id) => self.slot(id).map_or(Reply::Missing, |value| Reply::Value(value.into())),
            Op::Probe(id) => self.slot(id).map_or(Reply::Missing, |_| Reply::Stored),
        })
    }

    fn set_last(&mut self, value: u64) -> Reply {
        self.cas += 1;
        self.last = Some(Counter { value, cas: self.cas });
        Reply::Stored
    }

    /// What the promise excepts.
    fn disturb(&mut self) {
        let event = ["slot evicted", "counter lost", "flush", "restart", "clock set back"][self.rng.below(5) as usize];
        self.count(event);
        self.log(|| event.into());
        match event {
            "slot evicted" => {
                let nth = self.rng.below(self.slots.len() as u64);
                let mut n = 0..;
                self.slots.retain(|_, _| n.next() != Some(nth));
            }
            "counter lost" => self.last = None,
            "clock set back" => self.set_back += self.rng.below(3 * SECOND),
            _ => {
                self.slots.clear();
                self.last = None;
            }
        }
        if event == "restart" {
            // Tokens start again, but whoever holds an old one loses its connection.
            self.cas = 0;
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

    /// The messages that were stored under an id. The first is the one that all hear. Another is there where the
    /// counter was lost, or where a publisher came too late, and may not be acknowledged then.
    fn under(&self, id: u64) -> impl Iterator<Item = u64> {
        self.stored.iter().filter(move |stored| stored.id == id).map(|stored| stored.data)
    }
}

fn user_data(user: u64, n: u64) -> u64 {
    user * 10_000 + n
}

fn user_of(data: u64) -> u64 {
    data / 10_000
}

fn owned(op: Op) -> (Op<'static>, Vec<u8>) {
    let op = match op {
        Op::Add { id, value, ttl } => return (Op::Add { id, value: &[], ttl }, value.into()),
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
}

impl Store for Client {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError> {
        let mut order: Vec<usize> = (0..batch.len()).collect();
        let add = batch.iter().position(|op| matches!(op, Op::Add { .. }));
        match (self.protocol, add, batch) {
            (Protocol::AdvanceBeforeAdd, Some(add), _) => order.swap(add, add + 1),
            (Protocol::SlotsBeforeLast, _, [Op::Last, Op::Get(_), ..]) => order.rotate_left(1),
            _ => {}
        }
        self.world.borrow_mut().send(self.actor, order.iter().map(|&at| batch[at]));
        let answer = poll_fn(|_| self.world.borrow_mut().answer(self.actor)).await?;
        let mut replies = answer.clone();
        order.iter().zip(answer).for_each(|(&at, reply)| replies[at] = reply);
        match (self.protocol, add, batch, &mut replies[0]) {
            (Protocol::AckOnTaken, Some(add), ..) => replies[add] = Reply::Stored,
            (Protocol::MovedLastUnseen, Some(_), [_, _, Op::Advance(read), ..], Reply::Counter(last)) => {
                last.cas = *read
            }
            _ => {}
        }
        if let (Protocol::TornReadBelieved, [.., one, two]) = (self.protocol, &mut replies[..])
            && let [.., Op::Last, Op::Last] = batch
        {
            *two = one.clone();
        }
        Ok(replies)
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
    async fn sleep(&self, micros: u64) {
        let wake = self.world.borrow().now + micros;
        self.world.borrow_mut().lives[self.actor].wake = wake;
        let mut slept = false;
        poll_fn(|_| if std::mem::replace(&mut slept, true) { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    /// Often for next to no time, so that actors meet.
    async fn idle(&self, longest: u64) {
        let below = |bound| self.world.borrow_mut().rng.below(bound);
        self.sleep(below([500, 2_000, longest][below(3) as usize])).await;
    }
}

async fn publisher(mut client: Client, user: u64, messages: u64) {
    let (world, me) = (client.world.clone(), client.actor);
    let (clean, ttl) = (world.borrow().clean, world.borrow().ttl as u32);
    for _ in 0..messages {
        client.idle(2 * SECOND).await;
        world.borrow_mut().messages += 1;
        world.borrow_mut().lives[me].cost = [0; 3];
        let (begun, data) = (world.borrow().now, user_data(user, world.borrow().messages));
        let (stored, errors) = (world.borrow().stored.len(), world.borrow().lives[me].errors);
        let result = bus::publish(&mut client, user, data.to_string().as_bytes(), ttl).await;
        let mut world = world.borrow_mut();
        let [batches, _, tries] = world.lives[me].cost;
        // To read `last` takes a batch, and one more where it has to be created.
        if clean && batches > tries + 2 {
            world.count("stale re-read");
        }
        // Whoever finds a slot taken finds another's success, or, once, what a dead publisher left behind.
        let others = (world.stored.len() - stored) as u64;
        if clean && tries > others + 2 {
            world.violate("cost", format!("{data}: {tries} tries, {others} others"));
        }
        match result {
            Ok(id) => {
                let mine = |stored| stored == data;
                if !if clean { world.under(id).next().is_some_and(mine) } else { world.under(id).any(mine) } {
                    world.violate("wrongly acknowledged", format!("{data} as {id}"));
                }
                world.log(|| format!("{me}: {data} acknowledged as {id}"));
                let message = world.stored.iter().rfind(|stored| stored.data == data).copied();
                let now = world.now;
                world.acknowledged.extend(message.map(|message| (message, begun, now)));
            }
            // It came too late, and says so.
            Err(Error::OutcomeUnknown(_))
                if world
                    .stored
                    .iter()
                    .any(|stored| stored.data == data && world.under(stored.id).next() != Some(data)) =>
            {
                world.count("late")
            }
            Err(error) if clean && world.lives[me].errors == errors => {
                world.violate("refused", format!("{data}: {error:?}"));
            }
            Err(_) => {}
        }
    }
}

/// A client that polls, and what it has heard.
#[derive(Default)]
struct Poller {
    except: Option<u64>,
    /// Knows the array only, not `Shortbus-Last-Id`.
    old: bool,
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
        if let Ok(page) = bus::poll(&mut client, poller.cursor, poller.except).await {
            poller.check(&mut world.borrow_mut(), me, &page, begun);
            if all_published {
                break;
            }
        }
        client.idle(longest).await;
    }
}

/// Id and data of a page's messages.
fn messages(page: &Page) -> Vec<(u64, u64)> {
    let json: serde_json::Value = serde_json::from_slice(&page.json).expect("JSON");
    let message = |row: &serde_json::Value| {
        let [id, user, data] = ["id", "user", "data"].map(|name| row[name].as_u64().expect(name));
        assert_eq!(user, user_of(data), "the sender of {data}, {id}");
        (id, data)
    };
    json.as_array().expect("an array").iter().map(message).collect()
}

impl Poller {
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
            if self.heard.iter().any(|heard| heard.0 == id || world.clean && heard.1 == data) {
                world.violate("duplicate", format!("{data} as {id}, to {me}"));
            }
            self.heard.push((id, data));
            if self.except == Some(user_of(data)) {
                world.violate("own message", format!("{data} as {id}, to {me}"));
            }
            if world.under(id).all(|stored| stored != data) {
                world.violate("content", format!("{data} as {id}, to {me}"));
            }
        }
        self.check_owed(world, me, begun, last_id);
        if world.clean {
            self.check_missed(world, me, page);
        }
        self.check_cost(world, me, last_id);
        self.cursor = if self.old { messages.last().map_or(after, |message| message.0) } else { last_id };
    }

    /// The promise.
    fn check_owed(&self, world: &mut World, me: usize, begun: u64, last_id: u64) {
        let owed = |&&(message, published, acknowledged): &&(Stored, u64, u64)| {
            let lived = world.now < message.at + world.ttl * SECOND;
            // A counter that comes back lower and passes the cursor between two polls: nobody can tell.
            let passed = !world.clean && message.id <= self.cursor && self.cursor <= last_id;
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
        let one = |id| world.under(id).count() == 1;
        let passed = |stored: &&Stored| stored.id > self.cursor && stored.id <= page.last_id;
        let mut passed = world.stored.iter().filter(passed);
        let expired = passed.clone().any(|stored| tick >= stored.expires);
        let wanted = |stored: &Stored| self.except != Some(user_of(stored.data)) && one(stored.id);
        let gone = passed.any(|stored| wanted(stored) && !heard(stored.id));
        if gone {
            world.count("missed");
        }
        if gone && !page.missed {
            world.violate("missed unreported", format!("{} to {}, to {me}", self.cursor, page.last_id));
        }
        // One that never joined asks for all there ever was.
        if page.missed && !expired && self.cursor >= world.start {
            world.violate("missed for nothing", format!("{} to {}, to {me}", self.cursor, page.last_id));
        }
    }

    fn check_cost(&self, world: &mut World, me: usize, last_id: u64) {
        let [batches, ops, _] = world.lives[me].cost;
        let few = last_id >= self.cursor && last_id - self.cursor <= limits::WINDOW;
        // Every loss of the counter leaves a gap, with a batch fetched in vain before it.
        let search = if world.clean { search_ops(2) } else { (search_ops(13) + limits::BATCH) * (DISTURBANCES + 1) };
        if few && batches > 1 || ops > search + world.stored.len() as u64 {
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
        let client = Client { world: self.world.clone(), actor: self.actors.len(), protocol: world.protocol };
        self.actors.push((publishes, Some(Box::pin(act(client)))));
    }

    /// Publishers and pollers of every kind.
    fn populate(&mut self) {
        let world = self.world.clone();
        let random = |bound| world.borrow_mut().rng.below(bound);
        let publishers = 1 + random(4);
        for user in 1..=publishers {
            let messages = if random(6) == 0 { 15 } else { 1 + random(5) };
            self.spawn(true, |client| publisher(client, user, messages));
        }
        for _ in 0..1 + random(4) {
            let except = (random(2) == 0).then(|| 1 + random(publishers));
            let (listener, joins) = (Poller { except, old: random(2) == 0, ..Poller::default() }, random(6) > 0);
            self.spawn(false, |client| poller(client, listener, joins));
        }
    }

    fn run(&mut self) {
        for _ in 0..STEPS_MAX {
            let (publishing, promised) = (self.world.borrow().publishing, self.world.borrow().promised);
            if publishing == 0 && promised == u64::MAX {
                self.world.borrow_mut().calm();
                self.spawn(true, |client| publisher(client, 9, 2));
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
        let mut next: Vec<(u64, usize)> = under_way().map(|(at, exchange)| (exchange.arrives, at)).collect();
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

/// Runs the correct protocol through the schedules of `seeds`, or of SHORTBUS_SEED alone. Each of `events` has to
/// come about.
fn simulate_all(test: &str, seeds: Range<u64>, clean: bool, events: &[&str]) {
    if let Some(seed) = std::env::var("SHORTBUS_SEED").ok().map(|seed| seed.parse().expect("SHORTBUS_SEED: a number")) {
        let (violations, _) = simulate(World { trace: true, ..World::new(seed, Protocol::Correct, clean) });
        assert_eq!(violations, [], "seed {seed}");
        return;
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let total = Mutex::new(BTreeMap::<_, u64>::new());
    let run = |thread| {
        for seed in seeds.clone().skip(thread).step_by(threads) {
            let (violations, counts) = simulate(World::new(seed, Protocol::Correct, clean));
            let again = format!("SHORTBUS_SEED={seed} cargo test --test simulation {test} -- --nocapture");
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
    let paths = ["taken", "torn read", "helped advance", "gallop", "owed"];
    simulate_all(test, SEED..SEED + CLEAN, true, &[&crashes[..], &time, &paths].concat());
}

#[test]
fn after_eviction_restart_and_refusal_the_bus_works_again() {
    let test = "after_eviction_restart_and_refusal_the_bus_works_again";
    let events = ["slot evicted", "counter lost", "flush", "restart", "clock set back", "refusal", "lower counter"];
    simulate_all(test, SEED + CLEAN..SEED + CLEAN + DIRTY, false, &[&events[..], &["owed"]].concat());
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
    for seed in SEED..SEED + 400 {
        let mut rng = Rng(seed);
        let behind = [rng.below(40), 1_000, 1_000_000, 1_000_000_000_000_000][rng.below(4) as usize];
        let live = [rng.below(40), rng.below(400), rng.below(4_000)][rng.below(3) as usize];
        let (after, last, except) = (EPOCH - behind, EPOCH + live, rng.one_in(2).then_some(3));
        let mut world = World { rng, last: Some(Counter { value: last, cas: 1 }), ..World::default() };
        let mut wanted = vec![];
        for id in EPOCH + 1..=last {
            // Holes, as refused and evicted messages leave them, narrower than a probe.
            if id % limits::PROBE_SLOTS > 0 && world.rng.one_in(8) {
                continue;
            }
            let user = 1 + world.rng.below(4);
            let data = user_data(user, id - EPOCH);
            world.slots.insert(id, (format!("{user} {data}").into(), u64::MAX));
            wanted.extend((except != Some(user)).then_some((id, data)));
        }
        let mut simulation = Simulation::new(world);
        simulation.spawn(false, |client| read_to_the_end(client, after, except, wanted));
        simulation.run();
        assert_eq!(simulation.world.borrow().violations, [], "seed {seed}: {live} live, {behind} behind");
    }
}

async fn read_to_the_end(mut client: Client, mut after: u64, except: Option<u64>, wanted: Vec<(u64, u64)>) {
    let (world, me) = (client.world.clone(), client.actor);
    let mut heard = vec![];
    loop {
        world.borrow_mut().lives[me].cost = [0; 3];
        let page = bus::poll(&mut client, after, except).await.expect("nothing goes wrong");
        let world = world.borrow();
        let ([_, ops, _], found) = (world.lives[me].cost, messages(&page));
        let passed = world.slots.range(after + 1..=page.last_id).count() as u64;
        assert_eq!(page.missed, page.last_id - after > passed, "{after} to {}", page.last_id);
        // One in eight is a hole, and the last batch may be more than the page takes.
        assert!(ops <= search_ops(3) + passed * 5 / 4 + limits::BATCH, "{ops} operations from {after}, {passed} there");
        heard.extend_from_slice(&found);
        after = page.last_id;
        if found.len() < limits::REPLY_MESSAGES {
            break;
        }
    }
    assert_eq!(heard, wanted);
    assert_eq!(Some(after), world.borrow().last.map(|last| last.value));
}
