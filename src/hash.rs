//! FNV-1a, 128 bits (draft-eastlake-fnv): short, the same in every version, and known when compiling. What is hashed is
//! the server's own, so nobody hunts for collisions.

/// The hash of these bytes.
pub const fn fnv1a_128(bytes: &[u8]) -> u128 {
    let mut hash = 0x6c62272e07bb014262b821756295c58d_u128;
    let mut at = 0;
    while at < bytes.len() {
        hash = (hash ^ bytes[at] as u128).wrapping_mul(0x0000000001000000000000000000013b);
        at += 1;
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_fnv1a_128() {
        // Test vectors of draft-eastlake-fnv.
        assert_eq!(fnv1a_128(b"a"), 0xd228cb696f1a8caf78912b704e4a8964);
        assert_eq!(fnv1a_128(b"foobar"), 0x343e1662793c64bf6f0d3597ba446f18);
    }
}
