//! What may be a message: one JSON value (RFC 8259), kept as the very bytes that were sent; and how it is handed out.

use std::io::Write;

use serde_json::value::RawValue;

use crate::bus::{Message, Page};
use crate::limits;

/// Why a body is not a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// It is not UTF-8.
    NotUtf8 {
        /// Offset of the first byte that is wrong.
        at: usize,
    },
    /// It is not one JSON value.
    NotJson {
        /// Why, as the parser says.
        why: String,
        /// It looks like text that has no quotes.
        is_text: bool,
    },
    /// It begins with a byte order mark, which JSON has not (RFC 8259 section 8.1).
    ByteOrderMark,
    /// It nests deeper than [`limits::DEPTH_MAX`].
    TooDeep,
    /// A number in it is longer than [`limits::NUMBER_MAX`].
    LongNumber,
    /// A batch is no array, or has too many elements or none.
    NotBatch,
    /// A batch is longer than [`limits::BATCH_BYTES`].
    LongBatch,
    /// An element of a batch has more bytes than a message may.
    TooLarge {
        /// `SHORTBUS_MAX_BYTES`.
        limit: usize,
    },
    /// What is wrong with an element of a batch, counted from 0.
    Element(usize, Box<Error>),
}

/// Checks a body that is an array, and returns the values in it, each a message of at most `limit` bytes.
///
/// # Errors
/// [`Error::NotBatch`] and those of [`check`]; [`Error::Element`] with what is wrong with one of them.
pub fn check_batch<'a>(body: &'a [u8], limit: usize) -> Result<Vec<&'a [u8]>, Error> {
    let array = checked(body)?;
    let elements: Vec<&'a RawValue> = serde_json::from_slice(array).map_err(|_| Error::NotBatch)?;
    if elements.is_empty() || elements.len() as u64 > limits::SLOT_MESSAGES {
        return Err(Error::NotBatch);
    }
    let check = |(index, element): (usize, &'a RawValue)| {
        let element = element.get().as_bytes();
        let bound = if element.len() > limit { Err(Error::TooLarge { limit }) } else { bounded(element) };
        bound.map(|()| element).map_err(|wrong| Error::Element(index, Box::new(wrong)))
    };
    elements.into_iter().enumerate().map(check).collect()
}

/// Checks a body and returns the value in it, without the white space around it.
///
/// Anything that the grammar allows is a message, also what no number or string type can hold (`1e400`, lone
/// surrogates, duplicate names): browsers read it, and the bus does not interpret it.
///
/// # Errors
/// Each of [`Error`].
pub fn check(body: &[u8]) -> Result<&[u8], Error> {
    let value = checked(body)?;
    bounded(value).map(|()| value)
}

/// The JSON value in a body.
fn checked(body: &[u8]) -> Result<&[u8], Error> {
    let text = std::str::from_utf8(body).map_err(|error| Error::NotUtf8 { at: error.valid_up_to() })?;
    if text.starts_with('\u{feff}') {
        return Err(Error::ByteOrderMark);
    }
    let value: &RawValue = serde_json::from_str(text).map_err(|error| Error::NotJson {
        why: error.to_string(),
        is_text: text.trim_start().starts_with(char::is_alphabetic),
    })?;
    Ok(value.get().as_bytes())
}

/// Holds a value to what all readers can take.
fn bounded(value: &[u8]) -> Result<(), Error> {
    let (depth, number) = measure(value);
    if depth > limits::DEPTH_MAX {
        return Err(Error::TooDeep);
    }
    if number > limits::NUMBER_MAX {
        return Err(Error::LongNumber);
    }
    Ok(())
}

/// Whether a checked value is a number: the only one whose beginning may be a value too.
pub fn is_number(value: &[u8]) -> bool {
    value.first().is_some_and(|byte| b"-0123456789".contains(byte))
}

/// The page without what another program wrote into the bus's slots: what is not JSON would spoil the messages around
/// it. It counts as missed.
pub fn readable(mut page: Page) -> Page {
    let before = page.messages.len();
    page.messages.retain(|message| serde_json::from_slice::<&RawValue>(message.data()).is_ok());
    page.missed |= page.messages.len() < before;
    page
}

/// Appends a message as clients get it.
pub fn object(out: &mut Vec<u8>, message: &Message) {
    let _infallible = write!(out, "{{\"id\":{},\"user\":{},\"data\":", message.id, message.user);
    out.extend_from_slice(message.data());
    out.push(b'}');
}

/// A poll's result as JSON.
pub fn array(page: &Page) -> Vec<u8> {
    let bytes = page.messages.iter().map(|message| limits::REPLY_MESSAGE + message.data().len()).sum::<usize>();
    let mut out = Vec::with_capacity(2 + bytes);
    out.push(b'[');
    for message in &page.messages {
        if out.len() > 1 {
            out.push(b',');
        }
        object(&mut out, message);
    }
    out.push(b']');
    out
}

/// How deep arrays and objects nest in a valid JSON value, and how long its longest number is.
fn measure(json: &[u8]) -> (usize, usize) {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut number, mut longest) = (0, 0);
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth -= 1,
            // On to the string's end; what follows a backslash does not end it.
            b'"' => {
                while bytes.next().is_some_and(|&byte| byte != b'"' && (byte != b'\\' || bytes.next().is_some())) {}
            }
            _ => {}
        }
        deepest = deepest.max(depth);
        number = if b"+-.0123456789Ee".contains(byte) { number + 1 } else { 0 };
        longest = longest.max(number);
    }
    (deepest, longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_brackets_outside_strings_only() {
        for (json, levels) in
            [("0", 0), ("[]", 1), (r#"[{"a":[]},[]]"#, 3), (r#""[[[""#, 0), (r#"["\"[[[",{"[\\":"\\\"{"}]"#, 2)]
        {
            assert_eq!(measure(json.as_bytes()).0, levels, "{json}");
        }
    }

    #[test]
    fn what_is_not_json_spoils_itself_alone() {
        let slots = [(1, "5 [1]"), (2, "5 {oops"), (3, "5 "), (4, "6.77 \"b\"")];
        let messages = slots.map(|(slot, value)| Message::from_slot(slot, value.as_bytes().to_vec()).unwrap());
        let page = readable(Page { messages: messages.concat(), last_id: 4, missed: false });
        assert!(page.missed && page.last_id == 4);
        let json = r#"[{"id":511,"user":5,"data":[1]},{"id":1279,"user":6,"data":"b"}]"#;
        assert_eq!(String::from_utf8(array(&page)).unwrap(), json);
    }
}
