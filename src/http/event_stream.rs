//! Server-sent events (WHATWG HTML, section 9.2): what an event stream consists of.
//!
//! A message is an event without a name, its data the object that a poll's array has; its id is the cursor, so that a
//! browser that reconnects goes on where it was. JSON's white space may hold line ends, which divide an event's data
//! into lines: a browser joins them with LF, so a CR comes out as LF. In a string they are escaped and stay.
//! `cursor` says where the stream is, past the user's own messages; `missed` that some were missed.

use rand::TryRng;
use rand::rngs::SysRng;
use serde_json::value::RawValue;

use crate::bus::Page;
use crate::limits;

/// What keeps a silent connection from being taken for dead: a comment.
pub const HEARTBEAT: &[u8] = b":\n\n";

/// Appends how a stream begins: when to come back after it broke, at a random moment, so that not all do at once.
pub fn begin(out: &mut Vec<u8>) {
    let random = SysRng.try_next_u32().unwrap_or_default() % limits::RETRY_MILLIS;
    out.extend_from_slice(format!("retry: {}\n\n", limits::RETRY_MILLIS + random).as_bytes());
}

/// Appends a poll's result, and returns the id that the stream is at then: that of its last message, or `at`.
pub fn page(out: &mut Vec<u8>, page: &Page, mut at: u64) -> u64 {
    // Not JSON where another program wrote into the bus's keys: then the page's messages cannot be told apart.
    let objects: Option<Vec<&RawValue>> = serde_json::from_slice(&page.json).ok();
    if page.missed || objects.is_none() {
        out.extend_from_slice(b"event: missed\ndata: 1\n\n");
    }
    for object in objects.unwrap_or_default() {
        let object = object.get();
        // As the bus writes it.
        let id = object.strip_prefix("{\"id\":").and_then(|rest| rest.split(',').next()).unwrap_or_default();
        at = id.parse().unwrap_or(at);
        out.extend_from_slice(format!("id: {id}\n").as_bytes());
        for line in object.replace("\r\n", "\n").split(['\r', '\n']) {
            out.extend_from_slice(b"data: ");
            out.extend_from_slice(line.as_bytes());
            out.push(b'\n');
        }
        out.push(b'\n');
    }
    at
}

/// Appends where the stream is.
pub fn cursor(out: &mut Vec<u8>, id: u64) {
    out.extend_from_slice(format!("event: cursor\nid: {id}\ndata: {id}\n\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_with_line_ends_is_one_event() {
        let json = "[{\"id\":7,\"user\":1,\"data\":{\r\n\"a\":\r[\n\n1]}},{\"id\":9,\"user\":2,\"data\":\"\\n\"}]";
        let mut out = Vec::new();
        let at = page(&mut out, &Page { json: json.into(), last_id: 10, missed: true }, 5);
        let expected = "event: missed\ndata: 1\n\nid: 7\ndata: {\"id\":7,\"user\":1,\"data\":{\ndata: \"a\":\n\
                        data: [\ndata: \ndata: 1]}}\n\nid: 9\ndata: {\"id\":9,\"user\":2,\"data\":\"\\n\"}\n\n";
        assert_eq!((String::from_utf8(out).unwrap(), at), (expected.into(), 9));
        let mut out = Vec::new();
        page(&mut out, &Page { json: b"[{oops]".into(), last_id: 10, missed: false }, 5);
        assert_eq!(out, b"event: missed\ndata: 1\n\n");
    }
}
