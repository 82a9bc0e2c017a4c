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

use std::time::Duration;

use crate::error::Error;
use crate::limits;
use crate::store::{Counter, Op, Reply, Store, StoreError};

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

/// The id of the newest message, for a client that wants what comes after it. One round trip, two on a new bus.
///
/// Creates the counter where there is none, so that the first poll can tell "nothing was missed".
pub async fn join(store: &mut impl Store) -> Result<u64, Error> {
    Ok(read_last(store).await?.value)
}

/// Publishes `data`, a checked JSON value, as `user`, for `ttl` seconds: its id once it is stored and visible to
/// every poll. Two round trips unless others publish at the same moment.
///
/// # Errors
/// [`Error::Busy`]: nothing was published. [`Error::Store`]: nothing was published.
/// [`Error::OutcomeUnknown`]: it may have been.
pub async fn publish(store: &mut impl Store, user: u64, data: &[u8], ttl: u32) -> Result<u64, Error> {
    let value = [user.to_string().as_bytes(), b" ", data].concat();
    let stale = limits::STALE.min(Duration::from_secs(ttl.into()));
    // memcached's clock ticks once a second: an item lives up to one second less than it was given.
    let ttl = (ttl + 1).min(limits::TTL_MAX);
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
                let last = read_last(store).await?;
                if store.now() - read_at >= stale {
                    continue;
                }
                last
            }
        };
        let id = last.value + 1;
        let sent_at = store.now();
        // Add before advance: `last` must never name a slot that is not there. Whoever finds the slot taken
        // advances for its owner, who may have died.
        let claim = [Op::Last, Op::Add { id, value: &value, ttl }, Op::Advance(last.cas), Op::Last, Op::Last];
        let replies = store.run(&claim).await.map_err(|error| match error {
            StoreError::Full(_) | StoreError::Late(_) => Error::Store(error),
            _ => Error::OutcomeUnknown(error.to_string()),
        })?;
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

/// Every live message after `after`, but those of `except`, in the order of their ids. One round trip where at most
/// [`limits::WINDOW`] messages are new; it costs what it returns, however far behind `after` is.
pub async fn poll(store: &mut impl Store, after: u64, except: Option<u64>) -> Result<Page, Error> {
    // `last` before the slots: a slot read earlier than `last` could be published in between, and skipped for ever.
    let mut batch = vec![Op::Last];
    batch.extend((1..=limits::WINDOW).map(|n| Op::Get(after + n)));
    let mut replies = store.run(&batch).await?.into_iter();
    let page = Page { json: vec![b'['], last_id: after, missed: false };
    let mut reader = Reader { page, except, count: 0, scanned: 0, full: false };
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
        live = reader.take(replies, last);
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

/// Reads `last`, creating it first where there is none.
async fn read_last(store: &mut impl Store) -> Result<Counter, StoreError> {
    for _ in 0..limits::TRIES {
        let replies = store.run(&[Op::Last, Op::Last]).await?;
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
                Reply::Value(value) if let Some((user, data)) = split(value) => {
                    any = true;
                    self.message(id, user, data);
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
        let size = self.page.json.len() / self.count.max(1) + 1;
        ((room / size) as u64).clamp(limits::WINDOW, limits::BATCH)
    }
}

/// A slot's value is the user's id, a space and the message's own bytes.
fn split(value: &[u8]) -> Option<(u64, &[u8])> {
    let space = value.iter().position(|&byte| byte == b' ')?;
    let user = std::str::from_utf8(&value[..space]).ok()?.parse().ok()?;
    Some((user, &value[space + 1..]))
}
