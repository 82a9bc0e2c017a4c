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
        // SAFETY: the C library set environ(7) before main, and nothing writes it after that.
        let mut at = unsafe { environ };
        // SAFETY: `at` is null, or points into environ's list: up to the null pointer that ends it, and not behind it.
        while let Some(&text) = unsafe { at.as_ref() }
            && !text.is_null()
        {
            // SAFETY: what stands in the list before its end are strings that end with a NUL. Nothing frees or changes them.
            let text = unsafe { CStr::from_ptr(text) }.to_bytes();
            pairs.extend(text.iter().position(|&byte| byte == b'=').map(|end| (&text[..end], &text[end + 1..])));
            // SAFETY: this was not the list's end, so that there is a next pointer.
            at = unsafe { at.add(1) };
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
