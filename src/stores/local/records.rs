//! Idempotency records: a ring of their own, so that large messages do not push them out.

use super::Trouble;
use super::format::{sum, words};
use super::ring::View;
use crate::bus::store::StoreError;
use crate::limits;

/// What is known of a send that may be repeated, as it stands in its ring.
struct Record {
    at: u64,
    /// The next older one in this bucket.
    next: u64,
    expires: u64,
    token: u64,
    ids: Vec<u64>,
    key: Vec<u8>,
}

/// The chain of the records whose keys have one hash.
struct Bucket {
    /// Where its entry is.
    at: u64,
    /// Where its newest record is.
    newest: u64,
    /// Where its newest published record is.
    back: u64,
}

/// Bytes of a record before its ids and key: checksum, lengths of both, next, expiry, token.
const RECORD: usize = 40;

/// Most ids of a record: those of every try of sixteen requests.
const RECORD_IDS: usize = 16 * limits::TRIES as usize;

/// Records of one bucket that are looked through.
const CHAIN: usize = 1_000;

impl View<'_> {
    pub fn create_record(&mut self, key: &[u8], token: u64, ttl: u32) -> Result<bool, Trouble> {
        let (bucket, found) = self.find(key)?;
        if found.is_some() {
            return Ok(false);
        }
        let expires = self.now + u64::from(ttl) * 1_000_000;
        let record = Record { at: 0, next: bucket.newest, expires, token, ids: vec![], key: key.into() };
        self.write_record(&bucket, &record)?;
        Ok(true)
    }

    pub fn append_record(&mut self, key: &[u8], id: u64) -> Result<bool, Trouble> {
        let (bucket, found) = self.find(key)?;
        let Some(mut record) = found else {
            return Ok(false);
        };
        if record.ids.len() == RECORD_IDS {
            return Err(StoreError::StoreFull("an idempotency record with too many tries".into()).into());
        }
        record.ids.push(id);
        // The version before is left out of the chain, where it is the first.
        if record.at != bucket.newest {
            record.next = bucket.newest;
        }
        self.write_record(&bucket, &record)?;
        Ok(true)
    }

    /// As memcached would have it: the token and the ids, and for how many seconds, begun ones counted, it lives.
    pub fn record(&mut self, key: &[u8]) -> Result<Option<(Vec<u8>, u32)>, Trouble> {
        let now = self.now;
        let text = |record: Record| {
            let ids = record.ids.iter().map(|id| format!(" {id}"));
            let text = std::iter::once(record.token.to_string()).chain(ids).collect::<String>();
            (text.into_bytes(), (record.expires - now).div_ceil(1_000_000) as u32)
        };
        Ok(self.find(key)?.1.map(text))
    }

    /// The key's bucket, and the key's newest record, if it lives.
    fn find(&mut self, key: &[u8]) -> Result<(Bucket, Option<Record>), Trouble> {
        let at = self.bucket(key);
        let heads = words(&self.layout.buckets.read(self.file, at, BUCKET)?);
        // The first may be of a process that was killed before it wrote the header: then nothing, or the record of
        // another bucket, is there.
        let mut next = match self.record_at(heads[0])? {
            Some(record) if self.bucket(&record.key) == at => Some(record),
            _ => self.record_at(heads[1])?,
        };
        let newest = next.as_ref().map_or(0, |record| record.at);
        // What this batch has written is no way back yet.
        let back = if newest < self.published.record_head { newest } else { heads[1] };
        let bucket = Bucket { at, newest, back };
        for _ in 0..CHAIN {
            next = match next {
                Some(record) if record.key == key => {
                    return Ok((bucket, Some(record).filter(|record| record.expires > self.now)));
                }
                Some(record) if record.next < record.at => self.record_at(record.next)?,
                _ => break,
            }
        }
        Ok((bucket, None))
    }

    /// Where in the buckets this key's is.
    fn bucket(&self, key: &[u8]) -> u64 {
        sum(4, key) % (self.layout.buckets.size / BUCKET as u64) * BUCKET as u64
    }

    /// The record at this position, where there is one.
    fn record_at(&mut self, at: u64) -> Result<Option<Record>, Trouble> {
        if at == 0 || !(self.header.record_tail..self.header.record_head).contains(&at) {
            return Ok(None);
        }
        let most = self.header.record_head - at;
        let mut bytes = self.layout.records.read(self.file, at, most.min(256) as usize)?;
        let Some(head) = bytes.get(..RECORD).map(words) else {
            return Ok(None);
        };
        let (ids, key) = (head[1] as u32 as usize, (head[1] >> 32) as usize);
        let length = RECORD + ids.min(RECORD_IDS) * 8 + key;
        if length as u64 > most {
            return Ok(None);
        }
        if length > bytes.len() {
            bytes = self.layout.records.read(self.file, at, length)?;
        }
        if head[0] != sum(5, &bytes[8..length]) {
            return Ok(None);
        }
        let (ids, key) = bytes[RECORD..length].split_at(ids * 8);
        let key = key.to_vec();
        Ok(Some(Record { at, next: head[2], expires: head[3], token: head[4], ids: words(ids), key }))
    }

    fn write_record(&mut self, bucket: &Bucket, record: &Record) -> Result<(), Trouble> {
        let mut bytes = vec![0; 8];
        bytes.extend_from_slice(&(record.ids.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(record.key.len() as u32).to_le_bytes());
        for word in [record.next, record.expires, record.token].iter().chain(&record.ids) {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&record.key);
        let sum = sum(5, &bytes[8..]);
        bytes[..8].copy_from_slice(&sum.to_le_bytes());
        let (at, size) = (self.header.record_head, self.layout.records.size);
        self.header.record_head += bytes.len() as u64;
        self.header.record_tail = self.header.record_tail.max(self.header.record_head.saturating_sub(size));
        self.layout.records.write(self.file, at, &bytes)?;
        self.layout.buckets.write(self.file, bucket.at, &[at.to_le_bytes(), bucket.back.to_le_bytes()].concat())?;
        self.header.records_expire = self.header.records_expire.max(record.expires);
        if self.header.mark_expires <= self.now {
            self.header.record_tail = self.header.record_tail.max(self.header.mark);
            (self.header.mark, self.header.mark_expires) = (self.header.record_head, self.header.records_expire);
        }
        Ok(())
    }
}

/// Bytes of a bucket: the position of its newest record, and of the newest one before that.
const BUCKET: usize = 16;
