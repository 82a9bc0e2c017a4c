//! A bus's name, and the place where it lives.

/// Where a bus lives. Two requests are about one bus if their places are equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The store's address, as it was configured.
    pub server: String,
    /// The bus's name, any bytes.
    pub bus: Vec<u8>,
}

/// A bus's name, percent-encoded (RFC 3986 section 2.1) but for unreserved characters.
pub fn encode(bus: &[u8]) -> String {
    let mut name = String::with_capacity(bus.len());
    for &byte in bus {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => name.push(byte.into()),
            _ => name.push_str(&format!("%{byte:02X}")),
        }
    }
    name
}
