//! Where messages live.

pub mod memcached;
