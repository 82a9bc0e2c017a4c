//! A request's variables by their names (RFC 3875 section 4.1), and whole numbers in them.

use std::os::unix::ffi::OsStringExt;

/// A variable's value by its name, as the web server gave it.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<Vec<u8>>;

/// A variable of this process's environment, whatever its bytes.
pub fn environment(name: &str) -> Option<Vec<u8>> {
    std::env::var_os(name).map(OsStringExt::into_vec)
}

/// Digits and nothing else, at most 2^64-1: no sign, no space, no fraction.
pub fn whole_number(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    digits.then(|| std::str::from_utf8(text).ok()?.parse().ok()).flatten()
}
