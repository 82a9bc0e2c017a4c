//! Each fuzz target on its corpus, and on mutations of it; `TEST_FUZZ` says how many, by default some seconds' worth.

use std::fs;
use std::path::Path;

#[path = "../fuzz/targets.rs"]
mod targets;

/// xorshift64* (Vigna 2016): the same seed, the same inputs.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound.max(1)
    }
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no corpus of {name}");
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// An input of the corpus with some bytes set, taken out, doubled, or taken from another.
fn mutate(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    const TELLING: &[u8] = b"\0\x01\x7f\x80\xff\r\n \"%&+-/0189:=AZ[]az{}";
    let mut input = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(4) {
        let (at, length) = (random.below(input.len() + 1), random.below(8) + 1);
        let end = (at + length).min(input.len());
        match random.below(6) {
            0 if at < input.len() => input[at] = random.below(256) as u8,
            1 if at < input.len() => input[at] ^= 1 << random.below(8),
            2 => drop(input.drain(at..end)),
            3 => input.insert(at, TELLING[random.below(TELLING.len())]),
            4 => {
                let part = input[at..end].repeat(random.below(40) + 1);
                drop(input.splice(at..at, part));
            }
            _ => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
    input
}

/// Runs a target on its corpus and on so many mutations.
fn run(name: &str, inputs: usize) {
    let &(_, target) = targets::TARGETS.iter().find(|(other, _)| *other == name).unwrap();
    let inputs = std::env::var("TEST_FUZZ").map_or(inputs, |text| text.parse().unwrap());
    let seed = std::env::var("TEST_SEED").map_or(1, |text| text.parse().unwrap());
    let corpus = corpus(name);
    corpus.iter().for_each(|input| target(input));
    for seed in seed..seed + inputs as u64 {
        let input = mutate(&corpus, &mut Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1));
        let ended = std::panic::catch_unwind(|| target(&input));
        assert!(ended.is_ok(), "{name}: TEST_SEED={seed} shows it again: {}", input.escape_ascii());
    }
}

#[test]
fn fastcgi_records_of_any_kind_make_the_same_requests_however_they_are_split() {
    run("fastcgi", 50_000);
}

#[test]
fn a_damaged_file_of_the_local_store_gives_no_message_that_was_not_sent() {
    run("local_store", 100);
}

#[test]
fn whatever_memcached_answers_each_call_ends() {
    run("memcached", 100_000);
}

#[test]
fn any_query_gets_a_whole_response() {
    run("query", 10_000);
}

#[test]
fn any_request_gets_a_whole_response_and_what_is_published_is_heard_as_it_was() {
    run("request", 10_000);
}

#[test]
fn nothing_is_published_on_a_signed_bus_without_a_signature() {
    run("signed", 10_000);
}
