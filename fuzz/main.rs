//! One of the targets, for cargo-fuzz: `cargo +nightly fuzz run memcached`.

#![no_main]

use libfuzzer_sys::fuzz_target;

mod targets;

fuzz_target!(|input: &[u8]| {
    let found = targets::TARGETS.iter().find(|(name, _)| *name == env!("CARGO_BIN_NAME"));
    found.expect("a target").1(input);
});
