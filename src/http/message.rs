//! What may be a message: one JSON value (RFC 8259), kept as the very bytes that were sent.

use serde_json::value::RawValue;

use crate::http::error::Error;
use crate::limits;

/// Checks a body and returns the value in it, without the white space around it.
///
/// Anything that the grammar allows is a message, also what no number or string type can hold (`1e400`, lone
/// surrogates, duplicate names): browsers read it, and the bus does not interpret it.
///
/// # Errors
/// [`Error::NotUtf8`], [`Error::NotJson`], [`Error::TooDeep`].
pub fn check(body: &[u8]) -> Result<&[u8], Error> {
    let text = std::str::from_utf8(body).map_err(|error| Error::NotUtf8 { at: error.valid_up_to() })?;
    let value: &RawValue = serde_json::from_str(text).map_err(|error| Error::NotJson(error.to_string()))?;
    let value = value.get().as_bytes();
    if depth(value) > limits::DEPTH_MAX {
        return Err(Error::TooDeep);
    }
    Ok(value)
}

/// How deep arrays and objects nest in a valid JSON value.
fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
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
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_brackets_outside_strings_only() {
        for (json, levels) in
            [("0", 0), ("[]", 1), (r#"[{"a":[]},[]]"#, 3), (r#""[[[""#, 0), (r#"["\"[[[",{"[\\":"\\\"{"}]"#, 2)]
        {
            assert_eq!(depth(json.as_bytes()), levels, "{json}");
        }
    }
}
