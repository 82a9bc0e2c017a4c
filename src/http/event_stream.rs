//! Server-sent events (WHATWG HTML, section 9.2): what an event stream consists of.
//!
//! A message is an event without a name, its data the object that a poll's array has; its id is the cursor, so that a
//! browser that reconnects goes on where it was. JSON's white space may hold line ends, which divide an event's data
//! into lines: a browser joins them with LF, so a CR comes out as LF. In a string they are escaped and stay.
//! `cursor` says where the stream is, past the user's own messages; `missed` that some were missed; `unavailable` why there
//! is no stream at the moment.

use rand::TryRng;
use rand::rngs::SysRng;

use super::message;
use crate::bus::Page;
use crate::limits;

/// What keeps a silent connection from being taken for dead: a comment.
pub const HEARTBEAT: &[u8] = b":\n\n";

/// Appends a stream's first text: how it begins, what is there, where it is.
pub fn opening(out: &mut Vec<u8>, opening: &Page) {
    begin(out);
    page(out, opening, 0);
    cursor(out, opening.last_id);
}

/// Appends how a stream begins: when to come back after it broke, at a random moment, so that not all do at once.
pub fn begin(out: &mut Vec<u8>) {
    let random = SysRng.try_next_u32().unwrap_or_default() % limits::RETRY_MILLIS;
    out.extend_from_slice(format!("retry: {}\n\n", limits::RETRY_MILLIS + random).as_bytes());
}

/// Appends a poll's result, and returns the id that the stream is at then: that of its last message, or `at`.
pub fn page(out: &mut Vec<u8>, page: &Page, at: u64) -> u64 {
    if page.missed {
        out.extend_from_slice(b"event: missed\ndata: 1\n\n");
    }
    for each in &page.messages {
        let mut object = Vec::with_capacity(limits::REPLY_MESSAGE + each.data().len());
        message::object(&mut object, each);
        out.extend_from_slice(format!("id: {}", each.id).as_bytes());
        out.extend_from_slice(b"\ndata: ");
        let mut rest = &object[..];
        while let Some(end) = rest.iter().position(|byte| b"\r\n".contains(byte)) {
            out.extend_from_slice(&rest[..end]);
            out.extend_from_slice(b"\ndata: ");
            let line_end = if rest[end..].starts_with(b"\r\n") { 2 } else { 1 };
            rest = &rest[end + line_end..];
        }
        out.extend_from_slice(rest);
        out.extend_from_slice(b"\n\n");
    }
    page.messages.last().map_or(at, |last| last.id)
}

/// Appends why there is no stream at the moment: an error as other requests get it.
pub fn unavailable(out: &mut Vec<u8>, error: &[u8]) {
    out.extend_from_slice(b"event: unavailable\ndata: ");
    out.extend_from_slice(error);
    out.extend_from_slice(b"\n\n");
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
        let slots = [(7, "1 {\r\n\"a\":\r[\n\n1]}"), (9, "2 \"\\n\"")];
        let messages = slots.map(|(slot, value)| crate::bus::Message::from_slot(slot, value.into()).unwrap());
        let mut out = Vec::new();
        let at = page(&mut out, &Page { messages: messages.concat(), last_id: 2560, missed: true }, 5);
        let expected = "event: missed\ndata: 1\n\nid: 2047\ndata: {\"id\":2047,\"user\":1,\"data\":{\ndata: \"a\":\n\
                        data: [\ndata: \ndata: 1]}}\n\nid: 2559\ndata: {\"id\":2559,\"user\":2,\"data\":\"\\n\"}\n\n";
        assert_eq!((String::from_utf8(out).unwrap(), at), (expected.into(), 2559));
    }
}
