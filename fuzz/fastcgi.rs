//! What a web server, or whoever else reaches the socket, may send: `cargo +nightly fuzz run fastcgi`.
//!
//! The parser must not panic, must keep no more than its limits allow, and must find the same first request however the
//! bytes are split. (A later one may have come before the answer to the one before it, and is refused then.)

#![no_main]

use libfuzzer_sys::fuzz_target;
use shortbus::fastcgi::codec::{Parser, Request, reply};
use shortbus::limits;

const BODY_MAX: usize = 1_000;

/// The first request in bytes that arrive in pieces of this size. Each is answered as soon as it is there.
fn converse(bytes: &[u8], size: usize) -> Option<Request> {
    let (mut parser, mut first, mut out) = (Parser::default(), None, Vec::new());
    for piece in bytes.chunks(size) {
        if parser.feed(piece, &mut out, &|_| BODY_MAX).is_err() || parser.is_closing() {
            break;
        }
        let Some(request) = parser.split_request() else { continue };
        assert!(request.body.len() <= BODY_MAX + 1);
        let names = ["QUERY_STRING", "REQUEST_METHOD", ""];
        let kept: usize = names.iter().filter_map(|name| request.parameters.variables().get(name)).map(<[u8]>::len).sum();
        assert!(kept <= limits::PARAMETERS_BYTES);
        reply(&mut out, request.id, b"Status: 200 OK\r\n\r\n", b"");
        parser.answered();
        first = first.or(Some(request));
    }
    first
}

/// Records, some of them cut or nonsense: bytes alone would hardly ever make up a request.
fn bytes(records: &[(u8, bool, Vec<u8>, u8)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, well_formed, content, padding) in records {
        let length = (content.len() as u16).to_be_bytes();
        match well_formed {
            true if kind % 12 == 1 => bytes.extend([1, 1, 0, 1, 0, 8, 0, 0, 0, 1, padding & 1, 0, 0, 0, 0, 0]),
            true => {
                bytes.extend([1, kind % 12, 0, 1 - kind / 200, length[0], length[1], *padding, 0]);
                bytes.extend(&content[..content.len().min(65_535)]);
                bytes.resize(bytes.len() + usize::from(*padding), 0);
            }
            false => bytes.extend(content),
        }
    }
    bytes
}

fuzz_target!(|input: (u8, Vec<(u8, bool, Vec<u8>, u8)>)| {
    let (size, bytes) = (usize::from(input.0) + 1, bytes(&input.1));
    if let (Some(one), Some(other)) = (converse(&bytes, 1), converse(&bytes, size)) {
        assert_eq!(one, other);
    }
});
