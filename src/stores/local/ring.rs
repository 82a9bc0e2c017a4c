//! A batch, carried out on the file: slots in the ring, and the counter.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::Trouble;
use super::format::{Chunk, ENTRY, Entry, Header, KEY, Layout, read_at, sum, words};
use crate::bus::store::{Op, Reply, StoreError};
use crate::limits;

/// Bytes before a message: checksum, id.
const MESSAGE: usize = 16;

/// Slots of those that have expired which one batch removes, beside as many as it adds.
const REMOVED: u64 = 64;

/// Bytes a batch of several reads takes from a ring at a time, where there are so many.
const READ_AHEAD: u64 = 64 << 10;

/// Bytes of messages that gather before they are written.
const GATHERED: usize = 1 << 20;

/// The file as its header says it is, and what a batch makes of it.
pub struct View<'a> {
    pub file: &'a File,
    pub layout: Layout,
    pub now: u64,
    /// How long ago the batch was asked for.
    late: Duration,
    /// As it stands in the file.
    pub published: Header,
    pub header: Header,
    /// What is to be written: messages, and their index entries.
    messages: Vec<u8>,
    entries: Vec<u8>,
    index: Chunk,
    ring: Chunk,
}

impl<'a> View<'a> {
    pub fn new(file: &'a File, published: Header) -> View<'a> {
        let layout = Layout::of(published.bytes);
        let mut header = published;
        let now = boot_micros();
        if now < published.written {
            // The host was started anew, and its clock: nothing from before lives.
            header.oldest = header.newest + 1;
            (header.message_tail, header.record_tail) = (header.message_head, header.record_head);
            (header.mark, header.mark_expires, header.records_expire) = (header.record_head, 0, 0);
        }
        let (messages, entries, index, ring) = Default::default();
        View { file, layout, now, late: Duration::ZERO, published, header, messages, entries, index, ring }
    }

    /// For a batch that was asked for so long ago.
    pub fn late(self, late: Duration) -> View<'a> {
        View { late, ..self }
    }

    /// Carries out a batch, and makes it visible.
    pub fn run_and_publish(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, Trouble> {
        // All or nothing: the last messages of a batch must not evict its first.
        let size = |op: &Op| if let Op::Add { value, .. } = op { MESSAGE + value.len() } else { 0 };
        let bytes: usize = batch.iter().map(size).sum();
        if bytes as u64 > self.layout.messages.size {
            let cause = format!("{bytes} bytes of messages at once are more than the bus's file holds");
            return Err(StoreError::StoreFull(cause).into());
        }
        let replies = self.run(batch)?;
        self.publish()?;
        Ok(replies)
    }

    /// Carries out a batch; what it writes is not visible yet.
    pub fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, Trouble> {
        let ahead = if batch.len() > 2 { READ_AHEAD } else { 0 };
        let stored = |stored| if stored { Reply::Stored } else { Reply::Taken };
        let one = |op: &Op<'_>| {
            Ok(match *op {
                Op::Last => self.header.counter().map_or(Reply::Missing, Reply::Counter),
                Op::Create(start) => stored(self.create(start)),
                Op::Advance(cas) => match self.header.counter() {
                    None => Reply::Missing,
                    Some(counter) => stored(counter.cas == cas && self.advance(counter.value + 1)?),
                },
                Op::Add { slot, value, ttl } => stored(self.add(slot, value, ttl)?),
                // A batch is all or nothing: the claim itself uses up no slot where it is refused.
                Op::Trial(_) | Op::EndTrial => Reply::Stored,
                Op::Get(id) => self.get(id, ahead)?.map_or(Reply::Missing, Reply::Value),
                Op::Probe(id) => self.live(id, 0)?.map_or(Reply::Missing, |_| Reply::Stored),
                Op::CreateRecord { key, token, ttl } => stored(self.create_record(key.as_bytes(), token, ttl)?),
                Op::AppendRecord(key, id) => stored(self.append_record(key.as_bytes(), id)?),
                Op::Record(key) => {
                    self.record(key.as_bytes())?.map_or(Reply::Missing, |(text, left)| Reply::Record(text, left))
                }
                Op::SigningKey => self.signing_key()?.map_or(Reply::Missing, Reply::Value),
                Op::CreateSigningKey(key) => stored(self.create_signing_key(key)?),
            })
        };
        batch.iter().map(one).collect()
    }

    /// Makes all that the batch wrote visible, by one write of the header.
    fn publish(&mut self) -> Result<(), Trouble> {
        if self.header == self.published {
            return Ok(());
        }
        self.expire()?;
        self.flush()?;
        self.header.written = self.now.max(1);
        self.header.write(self.file)?;
        let (before, after) = (self.published, self.header);
        if before.last.is_none() {
            return Ok(());
        }
        self.layout.messages.release(self.file, before.message_tail, after.message_tail, after.message_head);
        self.layout.index.release(self.file, before.oldest * ENTRY, after.oldest * ENTRY, (after.newest + 1) * ENTRY);
        self.layout.records.release(self.file, before.record_tail, after.record_tail, after.record_head);
        Ok(())
    }

    /// Removes what has expired, and gives all memory back that holds nothing.
    pub fn tidy(&mut self) -> Result<(), Trouble> {
        let mut oldest = 0;
        while oldest != self.header.oldest {
            oldest = self.header.oldest;
            self.expire()?;
        }
        self.header.write(self.file)?;
        self.published = self.header;
        let header = &self.header;
        self.layout.messages.release_unused(self.file, header.message_tail, header.message_head);
        self.layout.index.release_unused(self.file, header.oldest * ENTRY, (header.newest + 1) * ENTRY);
        self.layout.records.release_unused(self.file, header.record_tail, header.record_head);
        Ok(())
    }

    fn create(&mut self, start: u64) -> bool {
        let missing = self.header.last.is_none();
        if missing {
            // While this process waited for the lock, others may have begun the file, published, and lost it again.
            let late = self.late.as_millis() as u64 * 1_000; // microseconds, as ids count
            self.header.begin(start + late / limits::SLOT_MESSAGES);
        }
        missing
    }

    fn advance(&mut self, id: u64) -> Result<bool, Trouble> {
        if id > self.header.newest {
            // A slot that nobody stored: it has expired from the start.
            self.append(id, &[], 0)?;
        }
        self.header.last = Some(id);
        Ok(true)
    }

    fn add(&mut self, id: u64, value: &[u8], ttl: u32) -> Result<bool, Trouble> {
        // Every slot up to the newest is taken for ever. One far behind it is of a counter that this file never had.
        if self.header.last.is_none() || id != self.header.newest + 1 {
            return Ok(false);
        }
        self.append(id, value, self.now + u64::from(ttl) * 1_000_000)?;
        Ok(true)
    }

    /// Appends a message; the oldest make room.
    fn append(&mut self, id: u64, value: &[u8], expires: u64) -> Result<(), Trouble> {
        let size = (MESSAGE + value.len()) as u64;
        self.make_room(self.header.message_head + size)?;
        let at = self.header.message_head;
        let from = self.messages.len();
        self.messages.extend_from_slice(&[0; 8]);
        self.messages.extend_from_slice(&id.to_le_bytes());
        self.messages.extend_from_slice(value);
        let sum = sum(2, &self.messages[from + 8..]);
        self.messages[from..from + 8].copy_from_slice(&sum.to_le_bytes());
        Entry { at, expires, length: value.len() as u32 }.write(id, &mut self.entries);
        if self.header.oldest > self.header.newest {
            (self.header.oldest, self.header.message_tail, self.header.oldest_expires) = (id, at, expires);
        }
        self.header.newest = id;
        self.header.message_head += size;
        if self.messages.len() >= GATHERED {
            self.flush()?;
        }
        Ok(())
    }

    /// Evicts the oldest slots until the ring can reach up to `end`, and the index takes one more.
    fn make_room(&mut self, end: u64) -> Result<(), Trouble> {
        let least = end.saturating_sub(self.layout.messages.size);
        let by_index = (self.header.newest + 2).saturating_sub(self.layout.slots());
        if self.header.message_tail >= least && self.header.oldest >= by_index {
            return Ok(());
        }
        // Positions rise with the ids.
        let (mut low, mut high) = (self.header.oldest.max(by_index), self.header.newest + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.entry(middle, 0)?.at < least {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        self.remove_up_to(low)
    }

    /// Removes a bounded number of the slots that have expired.
    fn expire(&mut self) -> Result<(), Trouble> {
        if self.header.oldest > self.header.newest || self.header.oldest_expires > self.now {
            return Ok(());
        }
        let most = REMOVED + (self.header.newest - self.published.newest);
        let mut oldest = self.header.oldest;
        let end = self.header.newest + 1;
        while oldest < end.min(self.header.oldest + most) && self.entry(oldest, READ_AHEAD)?.expires <= self.now {
            oldest += 1;
        }
        self.remove_up_to(oldest)
    }

    fn remove_up_to(&mut self, oldest: u64) -> Result<(), Trouble> {
        self.header.oldest = oldest;
        (self.header.message_tail, self.header.oldest_expires) = match oldest > self.header.newest {
            true => (self.header.message_head, 0),
            false => self.entry(oldest, 0).map(|entry| (entry.at, entry.expires))?,
        };
        Ok(())
    }

    /// Writes what has gathered, where nothing that the header names is.
    fn flush(&mut self) -> Result<(), Trouble> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let first = self.header.newest + 1 - self.entries.len() as u64 / ENTRY;
        let from = self.header.message_head - self.messages.len() as u64;
        let overwrites = self.header.message_head > self.published.message_tail + self.layout.messages.size
            || self.header.newest >= self.published.oldest + self.layout.slots();
        if overwrites && self.published.oldest <= self.published.newest {
            self.published.oldest = self.header.oldest.min(self.published.newest + 1);
            self.published.message_tail = self.header.message_tail.min(self.published.message_head);
            self.published.oldest_expires = self.header.oldest_expires;
            self.published.write(self.file)?;
        }
        self.layout.messages.write(self.file, from, &self.messages)?;
        self.layout.index.write(self.file, first * ENTRY, &self.entries)?;
        self.messages.clear();
        self.entries.clear();
        (self.index, self.ring) = Default::default();
        Ok(())
    }

    /// The index entry of a slot that is there.
    fn entry(&mut self, id: u64, ahead: u64) -> Result<Entry, Trouble> {
        let first = self.header.newest + 1 - self.entries.len() as u64 / ENTRY;
        if let Some(place) = id.checked_sub(first) {
            let from = (place * ENTRY) as usize;
            return Entry::read(id, &self.entries[from..from + ENTRY as usize]);
        }
        let ahead = ahead.min(64 * ENTRY);
        let bytes = self.index.get(self.file, &self.layout.index, id * ENTRY, ENTRY, ahead, first * ENTRY)?;
        Entry::read(id, bytes)
    }

    fn live(&mut self, id: u64, ahead: u64) -> Result<Option<Entry>, Trouble> {
        if !(self.header.oldest..=self.header.newest).contains(&id) {
            return Ok(None);
        }
        Ok(Some(self.entry(id, ahead)?).filter(|entry| entry.expires > self.now))
    }

    fn get(&mut self, id: u64, ahead: u64) -> Result<Option<Vec<u8>>, Trouble> {
        self.flush()?;
        let Some(entry) = self.live(id, ahead)? else {
            return Ok(None);
        };
        let length = MESSAGE as u64 + u64::from(entry.length);
        if length > self.layout.messages.size || entry.at + length > self.header.message_head {
            return Err(Trouble::Suspect);
        }
        let end = self.header.message_head;
        let bytes = self.ring.get(self.file, &self.layout.messages, entry.at, length, ahead, end)?;
        let words = words(&bytes[..MESSAGE]);
        if words[1] != id || words[0] != sum(2, &bytes[8..]) {
            return Err(Trouble::Suspect);
        }
        Ok(Some(bytes[MESSAGE..].to_vec()))
    }

    fn signing_key(&mut self) -> Result<Option<Vec<u8>>, Trouble> {
        if self.header.key_length == 0 {
            return Ok(None);
        }
        let mut key = vec![0; self.header.key_length as usize];
        read_at(self.file, &mut key, KEY.0)?;
        if sum(3, &key) == self.header.key_sum { Ok(Some(key)) } else { Err(Trouble::Suspect) }
    }

    fn create_signing_key(&mut self, key: &[u8]) -> Result<bool, Trouble> {
        if self.header.key_length > 0 {
            return Ok(false);
        }
        if key.is_empty() || key.len() > KEY.1 {
            return Err(StoreError::StoreFull("a bus key of this size".into()).into());
        }
        self.file.write_all_at(key, KEY.0)?;
        (self.header.key_length, self.header.key_sum) = (key.len() as u64, sum(3, key));
        Ok(true)
    }
}

/// Microseconds by the clock that runs on while the host sleeps, and never steps.
fn boot_micros() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1_000
}
