//! A request's variables, their names and values (RFC 3875 section 4.1), and whole numbers in them.

use std::ffi::{CStr, c_char};

/// Names and values of any bytes, as the web server gave them.
#[derive(Clone, Debug, Default)]
pub struct Variables<'a>(Vec<(&'a [u8], &'a [u8])>);

impl Variables<'static> {
    /// This process's environment. It is read where it lies: nothing in this program changes it.
    pub fn environment() -> Variables<'static> {
        unsafe extern "C" {
            static environ: *const *const c_char;
        }
        let mut pairs = Vec::with_capacity(64);
        // SAFETY: environ(7) is a list of strings that ends with a null pointer, or is one.
        unsafe {
            let mut at = environ;
            while !at.is_null() && !(*at).is_null() {
                let text = CStr::from_ptr(*at).to_bytes();
                pairs.extend(text.iter().position(|&byte| byte == b'=').map(|end| (&text[..end], &text[end + 1..])));
                at = at.add(1);
            }
        }
        Variables(pairs)
    }
}

impl<'a> Variables<'a> {
    /// The value of this name; the last one, where it comes several times.
    pub fn get(&self, name: &str) -> Option<&'a [u8]> {
        self.0.iter().rev().find(|(key, _)| *key == name.as_bytes()).map(|(_, value)| *value)
    }

    /// The value of this name, nothing where there is none.
    pub fn text(&self, name: &str) -> &'a [u8] {
        self.get(name).unwrap_or_default()
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &'a [u8]> {
        self.0.iter().map(|(name, _)| *name)
    }
}

impl<'a> FromIterator<(&'a [u8], &'a [u8])> for Variables<'a> {
    fn from_iter<T: IntoIterator<Item = (&'a [u8], &'a [u8])>>(pairs: T) -> Variables<'a> {
        Variables(pairs.into_iter().collect())
    }
}

/// Digits and nothing else, at most 2^64-1: no sign, no space, no fraction.
pub fn whole_number(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    digits.then(|| std::str::from_utf8(text).ok()?.parse().ok()).flatten()
}
