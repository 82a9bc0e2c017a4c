//! The delivery protocol: how a message gets its id and how a poll finds what is new.
//!
//! Per bus there is a counter `last`, without TTL, and one slot per message id, write-once, with the TTL. Ids are
//! claimed at the tail, and `last` names a slot only after it is stored; so a reader that reads `last` first never
//! meets a message in flight. While memcached neither evicts nor restarts, a message that was acknowledged reaches
//! every client that polls within its TTL, exactly once, and all clients see the same order.
//!
//! One thing is assumed: memcached runs the operations of one write one after the other. No clock is trusted for the
//! promise: a publisher that slept, or finds a slot that a dead one left behind long ago, acknowledges only what all
//! polls will see. `tests/simulation.rs` checks the promise, and that each rule is needed.

pub mod store;

use std::time::Duration;

use crate::bus::store::{Counter, Op, Reply, Store, StoreError};
use crate::config::whole_number;
use crate::http::error::Error;
use crate::limits;

/// A poll's result.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// The messages, a JSON array.
    pub json: Vec<u8>,
    /// The cursor to use next: all up to here was delivered, left out as the user's own, or gone.
    pub last_id: u64,
    /// Something after the old cursor is gone: expired, evicted or lost with a restart.
    pub missed: bool,
}

impl Page {
    /// Whether it tells a client anything: a message, or that some were missed.
    pub fn is_empty(&self) -> bool {
        self.json == b"[]" && !self.missed
    }
}

/// The id of the newest message, for a client that wants what comes after it. One round trip, two on a new bus.
///
/// Creates the counter where there is none, so that the first poll can tell "nothing was missed".
pub async fn join(store: &mut impl Store) -> Result<u64, Error> {
    Ok(read_last(store, None).await?.value)
}

/// The bus's key: of those that anyone offers to create, as `fresh` here, the first; `None` where there is none yet.
pub async fn key(store: &mut impl Store, fresh: Option<&[u8]>) -> Result<Option<Vec<u8>>, Error> {
    let mut batch = vec![Op::Key];
    batch.splice(..0, fresh.map(Op::CreateKey));
    Ok(match store.run(&batch).await?.pop() {
        Some(Reply::Value(key)) => Some(key),
        _ => None,
    })
}

/// A send that may be repeated.
#[derive(Clone, Copy, Debug)]
pub struct Once<'a> {
    /// The user's id, a colon, the user's name for it.
    pub name: &'a str,
    /// Random. What is stored for the first of its requests bears it, and for the others too.
    pub token: u64,
    /// Seconds for which it is remembered, more than the TTL.
    pub ttl: u32,
}

/// Publishes `data`, a checked JSON value, as `user`, for `ttl` seconds: its id once it is stored and visible to
/// every poll. Two round trips unless others publish at the same moment.
///
/// With `once` it publishes at most once within the TTL, whoever asks how often: the others get the first one's id.
/// The send has a record, a list of the ids that were tried for it, and an id is in there before its slot is stored.
/// So whoever reads `last`, then the record, and finds none of the listed slots up to `last` to be this send's, knows
/// that none was published up to `last`; and after it there is but one slot that anyone who knew no more could still
/// store, the one it tries itself. To be the first, or to die half-way, decides nothing.
///
/// A repeat cannot tell a slot that was stored too late from another. It takes a coincidence: a publisher that died
/// inside its one write, so that its slot was stored and `last` not moved; a bus on which then nobody published until
/// that slot was about to expire; and another's write under way, of a send that is repeated later, while it expires.
///
/// # Errors
/// [`Error::Busy`]: nothing was published. [`Error::Store`]: nothing was published.
/// [`Error::OutcomeUnknown`]: it may have been. [`Error::Undecided`], [`Error::Expired`], [`Error::Differs`]: not by
/// this request.
pub async fn publish(
    store: &mut impl Store,
    user: u64,
    data: &[u8],
    ttl: u32,
    once: Option<Once<'_>>,
) -> Result<u64, Error> {
    let stale = limits::STALE.min(Duration::from_secs(ttl.into()));
    let mut record = once.map(|once| Record { once, token: once.token, first: false, ids: vec![], passed: 0, age: 0 });
    let mut known: Option<(Duration, Counter)> = None;
    for attempt in 1..=limits::TRIES {
        if attempt > 2 {
            // What was known before the pause is old by now.
            store.pause(limits::BACK_OFF * attempt).await;
            known = None;
        }
        let last = match known {
            Some((read_at, last)) if store.now() - read_at < stale => last,
            _ => {
                let read_at = store.now();
                let last = read_last(store, record.as_mut()).await?;
                if store.now() - read_at >= stale {
                    continue;
                }
                last
            }
        };
        if let Some(record) = &mut record
            && let Some(id) = record.published(store, user, data, ttl, last.value).await?
        {
            return Ok(id);
        }
        let id = last.value + 1;
        let sender = Sender { user, token: record.as_ref().map(|record| record.token) };
        let value = [sender.to_string().as_bytes(), b" ", data].concat();
        let sent_at = store.now();
        // Add before advance: `last` must never name a slot that is not there. Whoever finds the slot taken
        // advances for its owner, who may have died. memcached's clock ticks once a second: an item lives up to one
        // second less than it was given.
        let add = Op::Add { id, value: &value, ttl: (ttl + 1).min(limits::TTL_MAX) };
        let mut claim = vec![Op::Last, add, Op::Advance(last.cas), Op::Last, Op::Last];
        if let Some(record) = &mut record {
            // Into the record before into the slot.
            claim.insert(0, Op::Note(record.once.name, id));
            claim.push(Op::Record(record.once.name));
        }
        let mut replies = store.run(&claim).await.map_err(|error| match error {
            StoreError::Late(_) => Error::Store(error),
            // With a record it may be that which was refused, and not the message.
            StoreError::Full(_) if record.is_none() => Error::Store(error),
            _ => Error::OutcomeUnknown(error.to_string()),
        })?;
        if let Some(record) = &mut record {
            record.read(replies.pop());
            record.passed += usize::from(replies.remove(0) == Reply::Stored);
        }
        match &replies[..] {
            [_, Reply::Stored, Reply::Stored, ..] => return Ok(id),
            // Another moved `last`: for us, if it had not moved when our message was stored.
            [Reply::Counter(before), Reply::Stored, Reply::Taken, ..] if before.cas == last.cas => return Ok(id),
            // Else polls have passed this slot already, and what it held has expired since: some won't hear us.
            [_, Reply::Stored, Reply::Taken, ..] => {
                return Err(Error::OutcomeUnknown(format!("slot {id} was published before, and has expired since")));
            }
            [_, Reply::Taken, _, twice @ ..] => known = steady(twice).map(|counter| (sent_at, counter)),
            // The counter was lost meanwhile: no poll will ever look at this slot.
            _ => known = None,
        }
    }
    Err(Error::Busy)
}

/// What is known of a send that may be repeated.
struct Record<'a> {
    once: Once<'a>,
    /// The first request's.
    token: u64,
    /// This request was the first.
    first: bool,
    /// The ids tried for it, by all requests.
    ids: Vec<u64>,
    /// How many of `ids` are not this send's: tried here in vain, or looked at.
    passed: usize,
    /// Seconds since the first request, by memcached's clock.
    age: u32,
}

impl Record<'_> {
    /// Takes what memcached answered; nothing where the record expired just now, or was evicted.
    fn read(&mut self, reply: Option<Reply>) {
        let Some(Reply::Record(text, left)) = reply else {
            return;
        };
        let text = String::from_utf8_lossy(&text);
        let mut numbers = text.split(' ').map_while(|number| number.parse().ok());
        let token = numbers.next().unwrap_or(self.token);
        // Another record than before: the other has expired.
        self.passed = if token == self.token { self.passed } else { 0 };
        self.token = token;
        self.ids = numbers.collect();
        self.age = self.once.ttl.saturating_sub(left);
    }

    /// The id under which it was published, as far as `last` and a record read after it can tell.
    async fn published(
        &mut self,
        store: &mut impl Store,
        user: u64,
        data: &[u8],
        ttl: u32,
        last: u64,
    ) -> Result<Option<u64>, Error> {
        if self.first && self.ids.len() <= self.passed && self.age <= ttl {
            return Ok(None);
        }
        if self.ids.len() > self.passed {
            let ids: Vec<u64> = self.ids.iter().copied().filter(|&id| id <= last).collect();
            // The record again after them: its age tells whether a slot of this send would still have been there.
            let slots = ids.iter().copied().map(Op::Get).chain([Op::Record(self.once.name)]);
            let mut replies = store.run(&slots.collect::<Vec<_>>()).await?;
            let Some(Reply::Record(_, left)) = replies.pop() else {
                return Err(Error::Undecided);
            };
            self.age = self.once.ttl.saturating_sub(left);
            for (id, reply) in ids.iter().zip(&replies) {
                if let Reply::Value(value) = reply
                    && let Some((sender, published)) = split(value)
                    && sender == (Sender { user, token: Some(self.token) })
                {
                    return match published == data {
                        // One that slept may have stored it after the slot had expired, when polls were past it.
                        _ if self.age > ttl => Err(Error::Expired),
                        true => Ok(Some(*id)),
                        false => Err(Error::Differs),
                    };
                }
            }
            self.passed = ids.len();
        }
        match self.age {
            age if age > ttl => Err(Error::Expired),
            age if !self.first && age < limits::ONCE_LEASE => Err(Error::Undecided),
            _ => Ok(None),
        }
    }
}

/// Every live message after `after`, but those of `except`, in the order of their ids. One round trip where nothing
/// is new, or no more than [`Store::ahead`]; it costs what it returns, however far behind `after` is.
pub async fn poll(store: &mut impl Store, after: u64, except: Option<u64>) -> Result<Page, Error> {
    // `last` before the slots: a slot read earlier than `last` could be published in between, and skipped for ever.
    let mut batch = vec![Op::Last];
    batch.extend((1..=store.ahead()).map(|n| Op::Get(after + n)));
    let mut replies = store.run(&batch).await?.into_iter();
    let page = Page { json: vec![b'['], last_id: after, missed: false };
    let mut reader = Reader { page, except, count: 0, live: (0, 0), scanned: 0, full: false };
    let last = match replies.next() {
        Some(Reply::Counter(counter)) => counter.value,
        _ => after,
    };
    let mut live = false;
    if last < after {
        // The counter was lost and came back lower.
        reader.page.missed = true;
        reader.page.last_id = 0;
    } else {
        live = store.ahead() == 0 || reader.take(replies, last);
    }
    while reader.wants_more(last) {
        if !live {
            // A gap, as wide as it may be: on to where it ends.
            reader.page.last_id = oldest_live(store, reader.page.last_id, last).await? - 1;
            live = true;
            continue;
        }
        let from = reader.page.last_id + 1;
        let slots: Vec<Op> = (from..=last.min(from + reader.batch() - 1)).map(Op::Get).collect();
        let replies = store.run(&slots).await?;
        live = reader.take(replies.into_iter(), last);
    }
    reader.page.json.push(b']');
    Ok(reader.page)
}

/// Reads `last`, creating it first where there is none; and in the same write creates `record`, before, and reads it,
/// after. No slot that `last` does not name yet is older than the record then.
async fn read_last(store: &mut impl Store, mut record: Option<&mut Record<'_>>) -> Result<Counter, StoreError> {
    for _ in 0..limits::TRIES {
        let mut batch = vec![Op::Last, Op::Last];
        if let Some(record) = &record {
            let Once { name, token, ttl } = record.once;
            batch.insert(0, Op::Claim { once: name, token, ttl });
            batch.push(Op::Record(name));
        }
        let mut replies = store.run(&batch).await?;
        if let Some(record) = &mut record {
            record.read(replies.pop());
            record.first |= replies.remove(0) == Reply::Stored;
        }
        if let Some(counter) = steady(&replies) {
            return Ok(counter);
        }
        if replies[1] == Reply::Missing {
            // The time, so that ids go on rising when memcached restarts and every client's cursor stays good.
            let start = store.unix_micros();
            store.run(&[Op::Create(start)]).await?;
        }
    }
    Err(StoreError::Broken("the counter is never the same twice".into()))
}

/// `last` as two reads, one right after the other, agree on it.
///
/// One alone may be torn: memcached's incr, when another is just reading the item, writes its new token onto the
/// old value (`do_add_delta`: "Overwrite the older item's CAS"). With such a token we would advance `last` past a
/// slot that nobody has claimed.
fn steady(replies: &[Reply]) -> Option<Counter> {
    match replies {
        [Reply::Counter(one), Reply::Counter(two)] if one == two => Some(*one),
        _ => None,
    }
}

/// The smallest id from which slots may live, at most `last + 1`, given that none lives at `dead`.
///
/// Slots expire in the order of their ids, so the live ones are a suffix: gallop back from `last`, then bisect.
/// Stops within [`limits::WINDOW`] slots of the answer, which the fetch that follows passes over.
async fn oldest_live(store: &mut impl Store, mut dead: u64, last: u64) -> Result<u64, StoreError> {
    let back = (0..u64::BITS).map_while(|n| last.checked_sub((1 << n) - 1)).take_while(|&id| id > dead);
    let points: Vec<u64> = back.collect();
    let alive = probe(store, &points, last).await?;
    let Some(oldest) = alive.iter().rposition(|&alive| alive) else {
        return Ok(last + 1);
    };
    let mut live = points[oldest];
    dead = points.get(oldest + 1).copied().unwrap_or(dead);
    while live - dead > limits::WINDOW {
        let points: Vec<u64> = (1..=limits::PROBES).map(|n| dead + (live - dead) * n / (limits::PROBES + 1)).collect();
        let alive = probe(store, &points, last).await?;
        let first = alive.iter().position(|&alive| alive).unwrap_or(points.len());
        live = points.get(first).copied().unwrap_or(live);
        dead = if first == 0 { dead } else { points[first - 1] };
    }
    Ok(dead + 1)
}

/// Whether each of the points, or a slot just after it, lives. One round trip.
async fn probe(store: &mut impl Store, points: &[u64], last: u64) -> Result<Vec<bool>, StoreError> {
    let slots = |&id: &u64| id..=last.min(id + limits::PROBE_SLOTS - 1);
    let batch: Vec<Op> = points.iter().flat_map(slots).map(Op::Probe).collect();
    let mut replies = store.run(&batch).await?.into_iter();
    let alive = |id| slots(id).fold(false, |alive, _| alive | (replies.next() == Some(Reply::Stored)));
    Ok(points.iter().map(alive).collect())
}

/// Turns slots into a page.
struct Reader {
    page: Page,
    except: Option<u64>,
    /// Messages in the page.
    count: usize,
    /// Messages looked through, its user's own included, and their bytes.
    live: (usize, usize),
    /// Bytes looked through.
    scanned: usize,
    /// A limit was reached.
    full: bool,
}

impl Reader {
    /// Takes the slots that follow `last_id`, up to `last` or a limit; whether any of them lives.
    fn take(&mut self, replies: impl Iterator<Item = Reply>, last: u64) -> bool {
        let mut any = false;
        for reply in replies {
            if !self.wants_more(last) {
                break;
            }
            let id = self.page.last_id + 1;
            self.scanned += limits::SCAN_SLOT;
            // A value that no shortbus wrote counts as gone: it must not fail everyone's polls for a minute.
            match &reply {
                Reply::Value(value) if let Some((sender, data)) = split(value) => {
                    any = true;
                    self.message(id, sender.user, data);
                }
                _ => self.page.missed = true,
            }
            if !self.full {
                self.page.last_id = id;
                self.full = self.count == limits::REPLY_MESSAGES || self.scanned >= limits::SCAN_BYTES;
            }
        }
        any
    }

    /// Appends one message, unless it is the user's own or, as `full` then says, has to wait for the next reply.
    fn message(&mut self, id: u64, user: u64, data: &[u8]) {
        self.scanned += data.len();
        self.live = (self.live.0 + 1, self.live.1 + data.len());
        if self.except == Some(user) {
            return;
        }
        let json = &mut self.page.json;
        let separator = if self.count == 0 { "" } else { "," };
        let head = format!("{separator}{{\"id\":{id},\"user\":{user},\"data\":");
        if self.count > 0 && json.len() + head.len() + data.len() + 2 > limits::REPLY_BYTES {
            self.full = true;
            return;
        }
        json.extend_from_slice(head.as_bytes());
        json.extend_from_slice(data);
        json.push(b'}');
        self.count += 1;
    }

    fn wants_more(&self, last: u64) -> bool {
        self.page.last_id < last && !self.full
    }

    /// How many slots to fetch next: as many as fit the reply, were they like those so far.
    fn batch(&self) -> u64 {
        let room = limits::REPLY_BYTES.saturating_sub(self.page.json.len());
        match self.live {
            (0, _) => limits::WINDOW,
            (messages, bytes) => ((room / (bytes / messages + 1)) as u64).clamp(limits::WINDOW, limits::BATCH),
        }
    }
}

/// Who sent a message: the user, and the token of a send that may be repeated.
#[derive(PartialEq, Eq)]
struct Sender {
    user: u64,
    token: Option<u64>,
}

impl std::fmt::Display for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.user)?;
        self.token.map_or(Ok(()), |token| write!(f, ".{token}"))
    }
}

/// A slot's value is its sender, as `USER` or `USER.TOKEN`, a space and the message's own bytes.
fn split(value: &[u8]) -> Option<(Sender, &[u8])> {
    let space = value.iter().position(|&byte| byte == b' ')?;
    let (user, token) = match value[..space].iter().position(|&byte| byte == b'.') {
        Some(dot) => (&value[..dot], Some(whole_number(&value[dot + 1..space])?)),
        None => (&value[..space], None),
    };
    Some((Sender { user: whole_number(user)?, token }, &value[space + 1..]))
}
