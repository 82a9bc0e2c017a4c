//! Polling: every live message after a cursor.

use super::store::{Counter, Op, Reply, Store, StoreError};
use super::{Error, slot};
use crate::limits;

/// One message, as it was published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its id.
    pub id: u64,
    /// Its sender.
    pub user: u64,
    /// Its bytes, behind those of its sender where it was alone in its slot: these are not moved.
    bytes: Vec<u8>,
    start: usize,
}

impl Message {
    /// The JSON value, the very bytes that were sent.
    pub fn data(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// The messages in a slot's value; none where no shortbus wrote it.
    pub fn from_slot(slot: u64, value: Vec<u8>) -> Option<Vec<Message>> {
        let parts = slot::split(&value)?;
        if let [(sender, range)] = &parts[..] {
            return Some(vec![Message {
                id: slot::last_id(slot),
                user: sender.user,
                start: range.start,
                bytes: value,
            }]);
        }
        let message = |(id, (sender, range)): (u64, (slot::Sender, std::ops::Range<usize>))| Message {
            id,
            user: sender.user,
            bytes: value[range].to_vec(),
            start: 0,
        };
        Some(slot::ids(slot, parts.len()).zip(parts).map(message).collect())
    }
}

/// A poll's result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// The messages, ids ascending.
    pub messages: Vec<Message>,
    /// The cursor to use next: all up to here was delivered, left out as the user's own, or gone.
    pub last_id: u64,
    /// Something after the old cursor is gone: expired, evicted or lost with a restart.
    pub missed: bool,
}

impl Page {
    /// Whether it tells a client nothing: no message, and not that some were missed.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty() && !self.missed
    }
}

/// Every live message after the cursor `after`, but those of `except`, in the order of their ids. One round trip where
/// nothing is new, or no more slots than [`Store::ahead`]; it costs what it returns, however far behind `after` is.
///
/// # Errors
/// [`Error::Store`].
pub async fn poll(store: &mut impl Store, after: u64, except: Option<u64>) -> Result<Page, Error> {
    let first = slot::after(after).max(1);
    // `last` before the slots: a slot read earlier than `last` could be published in between, and skipped for ever.
    let mut batch = vec![Op::Last];
    batch.extend((first..first + store.ahead()).map(Op::Get));
    let mut replies = store.run(&batch).await?.into_iter();
    let page = Page { last_id: after, ..Page::default() };
    let mut reader = Reader { page, next: first, except, bytes: 0, live: (0, 0), scanned: 0, full: false };
    let Some(Reply::Counter(Counter { value: last, .. })) = replies.next() else {
        return Ok(reader.page);
    };
    let mut live = false;
    if slot::last_id(last) < after {
        // The counter was lost and came back lower.
        reader.page.missed = true;
        reader.next = 1;
    } else {
        live = store.ahead() == 0 || reader.append(replies, last);
    }
    if reader.wants_more(last) {
        store.take_room().await;
    }
    while reader.wants_more(last) {
        if !live {
            // A gap, as wide as it may be: on to where it ends.
            reader.next = oldest_live(store, reader.next - 1, last).await?;
            reader.page.last_id = slot::last_id(reader.next - 1);
            live = true;
            continue;
        }
        let slots: Vec<Op> = (reader.next..=last.min(reader.next + reader.batch() - 1)).map(Op::Get).collect();
        let replies = store.run(&slots).await?;
        live = reader.append(replies.into_iter(), last);
    }
    Ok(reader.page)
}

/// The smallest slot from which slots may live, at most `last + 1`, given that none lives at `dead`.
///
/// Slots expire in the order of their numbers, so the live ones are a suffix: gallop back from `last`, then bisect.
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
    /// The slot to read next.
    next: u64,
    except: Option<u64>,
    /// Bytes of the page's messages in a reply, at most.
    bytes: usize,
    /// Slots that lived, and their bytes.
    live: (usize, usize),
    /// Bytes looked through.
    scanned: usize,
    /// A limit was reached.
    full: bool,
}

impl Reader {
    /// Appends the slots from `next` on, up to `last` or a limit; whether any of them lives.
    fn append(&mut self, replies: impl Iterator<Item = Reply>, last: u64) -> bool {
        let mut any = false;
        for reply in replies {
            if !self.wants_more(last) {
                break;
            }
            self.scanned += limits::SCAN_SLOT;
            let messages = match reply {
                Reply::Value(value) => {
                    self.scanned += value.len();
                    self.live = (self.live.0 + 1, self.live.1 + value.len());
                    Message::from_slot(self.next, value)
                }
                _ => None,
            };
            any |= messages.is_some();
            // What no shortbus wrote counts as gone: it must not fail everyone's polls for a minute.
            self.page.missed |= messages.is_none();
            if !self.push(messages.unwrap_or_default()) {
                self.full = true;
                break;
            }
            self.page.last_id = slot::last_id(self.next);
            self.next += 1;
            self.full = self.scanned >= limits::SCAN_BYTES;
        }
        any
    }

    /// Appends one slot's messages, but those that the cursor has passed and the user's own; or none, where all of them
    /// together have to wait for the next reply.
    fn push(&mut self, messages: Vec<Message>) -> bool {
        let is_new = |message: &Message| message.id > self.page.last_id && self.except != Some(message.user);
        let messages: Vec<Message> = messages.into_iter().filter(is_new).collect();
        let bytes: usize = messages.iter().map(|message| limits::REPLY_MESSAGE + message.data().len()).sum();
        let count = self.page.messages.len();
        let fits = self.bytes + bytes <= limits::REPLY_BYTES && count + messages.len() <= limits::REPLY_MESSAGES;
        if !fits && count > 0 && !messages.is_empty() {
            return false;
        }
        self.bytes += bytes;
        self.page.messages.extend(messages);
        true
    }

    fn wants_more(&self, last: u64) -> bool {
        self.next <= last && !self.full && self.page.messages.len() < limits::REPLY_MESSAGES
    }

    /// How many slots to fetch next: as many as fit the reply, were they like those so far.
    fn batch(&self) -> u64 {
        let room = limits::REPLY_BYTES.saturating_sub(self.bytes);
        match self.live {
            (0, _) => limits::WINDOW,
            (slots, bytes) => ((room / (bytes / slots + 1)) as u64).clamp(limits::WINDOW, limits::BATCH),
        }
    }
}
