//! The file: where its parts are, and what is written there. All numbers are little-endian.
//!
//! ```text
//! header, signing key | buckets | index ring | ring of idempotency records | ring of slots
//! ```
//! Positions in a ring are virtual: they only rise, and are taken modulo the ring's size. So one comparison with the ring's
//! tail tells whether a part is still there.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rand::TryRng;
use rand::rngs::SysRng;
use rustix::fs::{FallocateFlags, fallocate};

use super::Trouble;
use crate::bus::store::{Counter, StoreError};
use crate::limits;

const MAGIC: u64 = u64::from_le_bytes(*b"shortbus");
/// A later version of the file counts on. All keep the header's size, magic, format and checksum where they are.
const FORMAT: u64 = 1;
/// The format of a file that was set aside.
pub const MOVED: u64 = u64::MAX;
/// Bytes of the header. It is written from a buffer that lies within one page, to one page: so the kernel copies it in
/// one piece, and neither a kill nor a stop comes between.
const HEADER: usize = 256;
const FIELDS: usize = HEADER / 8 - 1;
const PAGE: u64 = 4096;
/// Where the bus key is, and its largest size.
pub const KEY: (u64, usize) = (2048, 1024);

#[repr(align(256))]
struct Block([u8; HEADER]);

/// What is in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub format: u64,
    /// `SHORTBUS_STORE_BYTES` of whoever began the file.
    pub bytes: u64,
    /// Random: a token of another file is none here.
    pub nonce: u64,
    /// The counter starts here or above: the file that was here before had ids up to it.
    pub floor: u64,
    /// The counter.
    pub last: Option<u64>,
    /// Ids of the oldest and newest slot; none where the first is greater.
    pub oldest: u64,
    pub newest: u64,
    /// Where in the ring of messages the next one goes, and the oldest is.
    pub message_head: u64,
    pub message_tail: u64,
    /// When the oldest slot expires.
    pub oldest_expires: u64,
    /// Where in the ring of records the next one goes, and the oldest may be.
    pub record_head: u64,
    pub record_tail: u64,
    /// All records before `mark` have expired at `mark_expires`, all there are at `records_expire`.
    pub mark: u64,
    pub mark_expires: u64,
    pub records_expire: u64,
    /// When it was written. A clock that shows less was restarted with the host.
    pub written: u64,
    pub key_length: u64,
    pub key_sum: u64,
}

/// What stands where the header should be.
pub enum Found {
    Header(Header),
    New,
    Other(Trouble),
}

impl Header {
    pub fn new(bytes: u64, floor: u64) -> Header {
        // Position 0 is the end of a bucket's chain.
        Header {
            format: FORMAT,
            bytes,
            floor,
            nonce: SysRng.try_next_u64().expect("getrandom"),
            oldest: 1,
            record_head: 1,
            record_tail: 1,
            mark: 1,
            ..Header::default()
        }
    }

    pub fn begin(&mut self, last: u64) {
        let last = last.max(self.floor);
        (self.last, self.oldest, self.newest) = (Some(last), last + 1, last);
    }

    /// Reads it; again where another process is just writing it.
    pub fn read(file: &File) -> io::Result<Found> {
        let mut block = Block([0; HEADER]);
        for attempt in 0..TORN {
            let length = read_at(file, &mut block.0, 0)?;
            if length == 0 || block.0 == [0; HEADER] {
                return Ok(Found::New);
            }
            let words = words(&block.0);
            if words[FIELDS] == sum(0, &block.0[..FIELDS * 8]) && words[0] == MAGIC {
                return Ok(Header::from_words(&words));
            }
            // The other was interrupted, then.
            if attempt > TORN / 2 {
                std::thread::yield_now();
            }
        }
        Ok(Found::Other(Trouble::Suspect))
    }

    fn from_words(words: &[u64]) -> Found {
        let [_, format, bytes, nonce, last, oldest, newest, message_head, message_tail, oldest_expires, rest @ ..] =
            words
        else {
            return Found::Other(Trouble::Suspect);
        };
        let [record_head, record_tail, mark, mark_expires, records_expire, written, key_length, key_sum, floor, ..] =
            *rest
        else {
            return Found::Other(Trouble::Suspect);
        };
        match *format {
            FORMAT if Layout::is_sound(*bytes) && key_length <= KEY.1 as u64 => {}
            MOVED => return Found::Other(Trouble::Moved),
            ..FORMAT => return Found::Other(Trouble::Damaged { how: "of an older version", last: None }),
            FORMAT => return Found::Other(Trouble::Suspect),
            _ => {
                // Else two versions would set aside each other's file by turns.
                let cause = "the bus's file is of a newer version than this executable";
                return Found::Other(Trouble::Store(StoreError::StoreBroken(cause.into())));
            }
        }
        Found::Header(Header {
            format: *format,
            bytes: *bytes,
            nonce: *nonce,
            last: last.checked_sub(1),
            oldest: *oldest,
            newest: *newest,
            message_head: *message_head,
            message_tail: *message_tail,
            oldest_expires: *oldest_expires,
            record_head,
            record_tail,
            mark,
            mark_expires,
            records_expire,
            written,
            key_length,
            key_sum,
            floor,
        })
    }

    pub fn write(&self, file: &File) -> io::Result<()> {
        let fields = [
            MAGIC,
            self.format,
            self.bytes,
            self.nonce,
            self.last.map_or(0, |last| last + 1),
            self.oldest,
            self.newest,
            self.message_head,
            self.message_tail,
            self.oldest_expires,
            self.record_head,
            self.record_tail,
            self.mark,
            self.mark_expires,
            self.records_expire,
            self.written,
            self.key_length,
            self.key_sum,
            self.floor,
        ];
        let mut block = Block([0; HEADER]);
        for (to, field) in block.0.chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        let sum = sum(0, &block.0[..FIELDS * 8]);
        block.0[FIELDS * 8..].copy_from_slice(&sum.to_le_bytes());
        file.write_all_at(&block.0, 0)
    }

    pub fn counter(&self) -> Option<Counter> {
        self.last.map(|value| Counter { value, cas: self.nonce.wrapping_add(value) })
    }
}

/// How often a header is read that does not fit its checksum.
const TORN: u32 = 20;

/// A part of the file that is used in turns.
#[derive(Clone, Copy)]
pub struct Ring {
    /// Where in the file.
    pub at: u64,
    /// Bytes.
    pub size: u64,
}

impl Ring {
    /// Calls `each` with the ranges of the file, one after the other, that hold these bytes.
    fn pieces(
        &self,
        from: u64,
        length: usize,
        mut each: impl FnMut(u64, Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let inside = (from + done as u64) % self.size;
            let end = length.min(done + (self.size - inside) as usize);
            each(self.at + inside, done..end)?;
            done = end;
        }
        Ok(())
    }

    pub fn write(&self, file: &File, from: u64, bytes: &[u8]) -> io::Result<()> {
        self.pieces(from, bytes.len(), |at, range| file.write_all_at(&bytes[range], at))
    }

    /// What the file lacks is zeros.
    pub fn read(&self, file: &File, from: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.pieces(from, length, |at, range| read_at(file, &mut bytes[range], at).map(drop))?;
        Ok(bytes)
    }

    /// Gives the memory back of sixteenths of the ring that hold nothing any more, where that is possible.
    pub fn release(&self, file: &File, before: u64, tail: u64, head: u64) {
        let part = self.size / 16;
        for number in before.max(head.saturating_sub(self.size)) / part..tail / part {
            if head <= number * part + self.size {
                punch(file, self.at + number * part % self.size, part);
            }
        }
    }

    /// The same of every page that lies outside of `tail` to `head`.
    pub fn release_unused(&self, file: &File, tail: u64, head: u64) {
        let unused = (tail + self.size).saturating_sub(head) as usize;
        let _ = self.pieces(head, unused, |at, range| {
            let (from, to) = (at.next_multiple_of(PAGE), (at + range.len() as u64) / PAGE * PAGE);
            if from < to {
                punch(file, from, to - from);
            }
            Ok(())
        });
    }
}

/// Frees the memory behind a part of a file; where that cannot be done, it stays in use.
fn punch(file: &File, at: u64, length: u64) {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let _ = fallocate(file, flags, at, length);
}

/// Where things are in a file of a size.
#[derive(Clone, Copy)]
pub struct Layout {
    pub buckets: Ring,
    pub index: Ring,
    pub records: Ring,
    pub messages: Ring,
}

impl Layout {
    fn is_sound(bytes: u64) -> bool {
        (limits::STORE_BYTES_MIN..=limits::STORE_BYTES_MAX).contains(&bytes)
    }

    pub fn of(bytes: u64) -> Layout {
        // Sixteen pages: so that a sixteenth of each ring is whole pages.
        let unit = bytes / 64 / (16 * PAGE) * (16 * PAGE);
        let buckets = Ring { at: PAGE, size: unit };
        let index = Ring { at: PAGE + unit, size: 8 * unit };
        let records = Ring { at: PAGE + 9 * unit, size: 16 * unit };
        let rest = bytes - PAGE - 25 * unit;
        let messages = Ring { at: PAGE + 25 * unit, size: rest / (16 * PAGE) * (16 * PAGE) };
        Layout { buckets, index, records, messages }
    }

    /// Bytes that the file has at least.
    pub fn length(&self, header: &Header) -> u64 {
        match header.message_head {
            0 => 0,
            head => self.messages.at + head.min(self.messages.size),
        }
    }

    /// Most slots.
    pub fn slots(&self) -> u64 {
        self.index.size / ENTRY
    }
}

/// Bytes of an index entry: id, position, expiry, length, checksum.
pub const ENTRY: u64 = 32;

#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub at: u64,
    pub expires: u64,
    pub length: u32,
}

impl Entry {
    pub fn write(&self, id: u64, to: &mut Vec<u8>) {
        let from = to.len();
        for field in [id, self.at, self.expires] {
            to.extend_from_slice(&field.to_le_bytes());
        }
        to.extend_from_slice(&self.length.to_le_bytes());
        let sum = sum(1, &to[from..]) as u32;
        to.extend_from_slice(&sum.to_le_bytes());
    }

    pub fn read(id: u64, bytes: &[u8]) -> Result<Entry, Trouble> {
        let words = words(bytes);
        let sound = words[0] == id && (words[3] >> 32) as u32 == sum(1, &bytes[..28]) as u32;
        sound.then_some(Entry { at: words[1], expires: words[2], length: words[3] as u32 }).ok_or(Trouble::Suspect)
    }
}

/// Part of a ring, read in one go.
#[derive(Default)]
pub struct Chunk {
    from: u64,
    bytes: Vec<u8>,
}

impl Chunk {
    /// So many bytes from there; reads on as far as `ahead`, at most up to `end`.
    pub fn get(&mut self, file: &File, ring: &Ring, from: u64, length: u64, ahead: u64, end: u64) -> io::Result<&[u8]> {
        let held = self.from <= from && from + length <= self.from + self.bytes.len() as u64;
        if !held {
            let more = ahead.max(length).min(end.saturating_sub(from).max(length));
            (self.from, self.bytes) = (from, ring.read(file, from, more as usize)?);
        }
        let start = (from - self.from) as usize;
        Ok(&self.bytes[start..start + length as usize])
    }
}

/// Reads until the buffer or the file ends: how many bytes.
pub fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(length) => done += length,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Little-endian numbers.
pub fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect()
}

/// A checksum against damage, not against forgers: those who can write the file can write anything. Eight bytes at a
/// time by a folded multiplication, the same in every version.
pub fn sum(kind: u64, bytes: &[u8]) -> u64 {
    let fold = |hash: u64, word: u64| {
        let product = u128::from(hash ^ word) * 0x9e37_79b9_7f4a_7c15;
        (product as u64) ^ (product >> 64) as u64
    };
    let (chunks, rest) = bytes.as_chunks::<8>();
    let mut hash = fold(0x2545_f491_4f6c_dd1d ^ bytes.len() as u64, kind);
    for chunk in chunks {
        hash = fold(hash.rotate_left(23), u64::from_le_bytes(*chunk));
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    fold(fold(hash.rotate_left(23), u64::from_le_bytes(last)), !0)
}
