//! FastCGI 1.0, the responder's side, without any input or output of its own.
//!
//! [`Parser`] is fed with bytes as they arrive, in pieces of any size; it keeps what belongs to the one request of its
//! connection, bounded, and nothing else. The functions append whole records to a buffer, so that a reply is one write.
//! The specification: <https://fastcgi-archives.github.io/FastCGI_Specification.html>.

use crate::limits;
use crate::variables::{Variables, whole_number};

const VERSION: u8 = 1;
const HEADER: usize = 8;

// Types of records (section 8).
const BEGIN_REQUEST: u8 = 1;
const ABORT_REQUEST: u8 = 2;
const END_REQUEST: u8 = 3;
const PARAMS: u8 = 4;
const STDIN: u8 = 5;
const STDOUT: u8 = 6;
const STDERR: u8 = 7;
const GET_VALUES: u8 = 9;
const GET_VALUES_RESULT: u8 = 10;
const UNKNOWN_TYPE: u8 = 11;

const RESPONDER: u16 = 1;
const KEEP_CONN: u8 = 1;

// Protocol statuses of END_REQUEST.
const REQUEST_COMPLETE: u8 = 0;
const CANT_MPX_CONN: u8 = 1;
const UNKNOWN_ROLE: u8 = 3;

/// Most bytes of content in a record we send: the largest multiple of 8, so that only the last one is padded.
const CONTENT_MAX: usize = 65_528;

/// The other side does not speak FastCGI: its connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(
    /// What is wrong, for the operator.
    pub &'static str,
);

/// A whole request.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Its number on the connection; every record of the reply carries it.
    pub id: u16,
    /// Whether the connection stays open for the next one.
    pub keep: bool,
    /// What CGI has in the environment.
    pub parameters: Parameters,
    /// The body, cut one byte after what its limit allows: enough to see that it is too long.
    pub body: Vec<u8>,
}

/// A request's parameters, as they came: names and values of any bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    pairs: Vec<u8>,
    /// They were more than [`limits::PARAMETERS_BYTES`], and none was kept.
    pub too_many: bool,
}

impl Parameters {
    /// The names and values.
    pub fn variables(&self) -> Variables<'_> {
        Pairs(&self.pairs).filter_map(Result::ok).collect()
    }

    fn append(&mut self, bytes: &[u8]) {
        self.too_many |= self.pairs.len() + bytes.len() > limits::PARAMETERS_BYTES;
        if self.too_many {
            self.pairs = Vec::new();
        } else {
            self.pairs.extend_from_slice(bytes);
        }
    }
}

/// Names and values (section 3.4).
struct Pairs<'a>(&'a [u8]);

impl<'a> Pairs<'a> {
    /// One byte up to 127, else four with the highest bit set.
    fn length(&mut self) -> Option<usize> {
        let (length, rest) = match self.0 {
            [short @ ..=0x7f, rest @ ..] => ((*short).into(), rest),
            [a, b, c, d, rest @ ..] => (u32::from_be_bytes([a & 0x7f, *b, *c, *d]) as usize, rest),
            _ => return None,
        };
        self.0 = rest;
        Some(length)
    }

    fn pair(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        let (name, value) = (self.length()?, self.length()?);
        let (name, rest) = self.0.split_at_checked(name)?;
        let (value, rest) = rest.split_at_checked(value)?;
        self.0 = rest;
        Some((name, value))
    }
}

impl<'a> Iterator for Pairs<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let pair = self.pair().ok_or(Malformed("a name or value is longer than its record"));
        if pair.is_err() {
            self.0 = &[];
        }
        Some(pair)
    }
}

/// Where the connection's one request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// There is none.
    #[default]
    Idle,
    Parameters,
    Body,
    /// Complete, and from here on the caller's.
    Complete,
}

/// The records of one connection. It holds one request at a time, which every web server in use keeps to.
#[derive(Debug, Default)]
pub struct Parser {
    /// The record's header as far as it has come.
    header: [u8; HEADER],
    have: usize,
    /// Bytes of the record's content and padding that are still to come.
    content: usize,
    padding: usize,
    /// Content of a record that is handled as a whole: a begin, or names of values.
    whole: Vec<u8>,
    phase: Phase,
    /// Number of the request, also while it is the caller's.
    id: u16,
    request: Request,
    /// Bytes of the body that are kept.
    body_max: usize,
    /// Bytes of the body that have come, and those that CONTENT_LENGTH tells of.
    body_read: u64,
    body_length: Option<u64>,
    aborted: bool,
    closing: bool,
}

impl Parser {
    /// Takes the bytes that arrived, all of them. What is to be answered at once is appended to `out`; `body_limit`
    /// is asked for the size of the largest body once the parameters are complete.
    ///
    /// # Errors
    /// [`Malformed`], after which the connection is good for nothing.
    pub fn feed(
        &mut self,
        mut bytes: &[u8],
        out: &mut Vec<u8>,
        body_limit: &dyn Fn(&Parameters) -> usize,
    ) -> Result<(), Malformed> {
        while !bytes.is_empty() {
            if self.have < HEADER {
                let head = split_front(&mut bytes, HEADER - self.have);
                self.header[self.have..self.have + head.len()].copy_from_slice(head);
                self.have += head.len();
                if self.have < HEADER {
                    break;
                }
                self.begin_record()?;
            }
            let content = split_front(&mut bytes, self.content);
            self.content -= content.len();
            self.append_content(content);
            self.padding -= split_front(&mut bytes, self.padding).len();
            if self.content + self.padding == 0 {
                self.have = 0;
                self.end_record(out, body_limit)?;
            }
        }
        Ok(())
    }

    /// The request, once, when it is complete; [`Parser::answered`] has to follow.
    pub fn split_request(&mut self) -> Option<Request> {
        let ready = self.phase == Phase::Complete && self.request.id != 0;
        ready.then(|| std::mem::take(&mut self.request))
    }

    /// The reply has been sent; another request may come.
    pub fn answered(&mut self) {
        self.phase = Phase::Idle;
        self.aborted = false;
    }

    /// Whether a request has begun to arrive, or is being answered.
    pub fn is_busy(&self) -> bool {
        self.phase != Phase::Idle || self.have > 0
    }

    /// Whether nobody wants the reply any more: the web server's client has left.
    pub fn is_aborted(&self) -> bool {
        self.aborted
    }

    /// Whether the connection is to be closed as soon as all is written.
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    fn kind(&self) -> u8 {
        self.header[1]
    }

    fn record_id(&self) -> u16 {
        u16::from_be_bytes([self.header[2], self.header[3]])
    }

    /// Whether the record belongs to the request that is arriving or being answered. What belongs to none is passed
    /// over: it was refused, or has ended.
    fn is_current(&self) -> bool {
        self.phase != Phase::Idle && self.record_id() == self.id
    }

    fn begin_record(&mut self) -> Result<(), Malformed> {
        let [version, kind, _, _, high, low, padding, _] = self.header;
        self.content = u16::from_be_bytes([high, low]).into();
        self.padding = padding.into();
        let wrong = match kind {
            _ if version != VERSION => "not FastCGI version 1",
            BEGIN_REQUEST if self.content != 8 => "the length of a begin",
            BEGIN_REQUEST if self.record_id() == 0 || self.is_current() => "the number of a request",
            GET_VALUES if self.record_id() == 0 && self.content > limits::MANAGEMENT_BYTES => "a long question",
            PARAMS if self.is_current() && self.phase != Phase::Parameters => "parameters behind their end",
            STDIN if self.is_current() && self.phase == Phase::Parameters => "a body before the parameters' end",
            _ => return Ok(()),
        };
        Err(Malformed(wrong))
    }

    fn append_content(&mut self, content: &[u8]) {
        match (self.kind(), self.record_id()) {
            (BEGIN_REQUEST, _) | (GET_VALUES, 0) => self.whole.extend_from_slice(content),
            (PARAMS, _) if self.is_current() => self.request.parameters.append(content),
            (STDIN, _) if self.is_current() && self.phase == Phase::Body => {
                let room = self.body_max - self.request.body.len();
                self.request.body.extend_from_slice(&content[..content.len().min(room)]);
                self.body_read += content.len() as u64;
            }
            _ => {}
        }
    }

    fn end_record(&mut self, out: &mut Vec<u8>, body_limit: &dyn Fn(&Parameters) -> usize) -> Result<(), Malformed> {
        let whole = std::mem::take(&mut self.whole);
        let empty = self.header[4..6] == [0, 0];
        match (self.kind(), self.record_id()) {
            (BEGIN_REQUEST, id) => self.begin_request(id, &whole, out),
            (GET_VALUES, 0) => answer_values(&whole, out)?,
            (kind, 0) => record(out, UNKNOWN_TYPE, 0, &[kind, 0, 0, 0, 0, 0, 0, 0]),
            _ if !self.is_current() => {}
            (PARAMS, _) if empty => {
                let parameters = &self.request.parameters;
                Pairs(&parameters.pairs).try_for_each(|pair| pair.map(drop))?;
                self.body_max = body_limit(parameters).saturating_add(1);
                self.body_length = whole_number(parameters.variables().text("CONTENT_LENGTH"));
                self.body_read = 0;
                self.phase = Phase::Body;
            }
            // mod_fcgid ends the body before it begins where HTTP/2 told no length (it has spooled it by then).
            (STDIN, _) if empty && self.phase == Phase::Body && self.body_read == 0 && self.body_length > Some(0) => {}
            (STDIN, _) if empty => self.phase = Phase::Complete,
            (ABORT_REQUEST, _) if self.phase == Phase::Complete => self.aborted = true,
            (ABORT_REQUEST, id) => {
                end_request(out, id, REQUEST_COMPLETE);
                self.closing |= !self.request.keep;
                self.request = Request::default();
                self.phase = Phase::Idle;
            }
            _ => {}
        }
        Ok(())
    }

    fn begin_request(&mut self, id: u16, begin: &[u8], out: &mut Vec<u8>) {
        let role = u16::from_be_bytes([begin[0], begin[1]]);
        let keep = begin[2] & KEEP_CONN != 0;
        if self.phase != Phase::Idle {
            end_request(out, id, CANT_MPX_CONN);
        } else if role != RESPONDER {
            end_request(out, id, UNKNOWN_ROLE);
            self.closing |= !keep;
        } else {
            self.phase = Phase::Parameters;
            self.id = id;
            self.request = Request { id, keep, ..Request::default() };
        }
    }
}

/// Splits at most so many bytes off the front.
fn split_front<'a>(bytes: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (front, rest) = bytes.split_at(bytes.len().min(most));
    *bytes = rest;
    front
}

/// Appends the answer to a question for values (section 4.1): those that we know among the ones asked for.
fn answer_values(names: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    let connections = limits::CONNECTIONS.to_string();
    let mut values = Vec::new();
    for pair in Pairs(names) {
        let (name, _) = pair?;
        let value = match name {
            b"FCGI_MAX_CONNS" | b"FCGI_MAX_REQS" => &connections[..],
            b"FCGI_MPXS_CONNS" => "0",
            _ => continue,
        };
        values.extend_from_slice(&[name.len() as u8, value.len() as u8]);
        values.extend_from_slice(name);
        values.extend_from_slice(value.as_bytes());
    }
    record(out, GET_VALUES_RESULT, 0, &values);
    Ok(())
}

/// Appends a whole reply: what CGI would have written to stdout and stderr, and the end of the request.
pub fn reply(out: &mut Vec<u8>, id: u16, stdout: &[u8], stderr: &[u8]) {
    if !stderr.is_empty() {
        records(out, STDERR, id, stderr);
        record(out, STDERR, id, b"");
    }
    output(out, id, stdout);
    end(out, id);
}

/// Appends a part of the output.
pub fn output(out: &mut Vec<u8>, id: u16, stdout: &[u8]) {
    records(out, STDOUT, id, stdout);
}

/// Appends the end of the output and of the request.
pub fn end(out: &mut Vec<u8>, id: u16) {
    record(out, STDOUT, id, b"");
    end_request(out, id, REQUEST_COMPLETE);
}

fn end_request(out: &mut Vec<u8>, id: u16, protocol_status: u8) {
    record(out, END_REQUEST, id, &[0, 0, 0, 0, protocol_status, 0, 0, 0]);
}

fn records(out: &mut Vec<u8>, kind: u8, id: u16, content: &[u8]) {
    for part in content.chunks(CONTENT_MAX) {
        record(out, kind, id, part);
    }
}

/// Appends one record, padded to a multiple of 8 as section 3.3 recommends.
fn record(out: &mut Vec<u8>, kind: u8, id: u16, content: &[u8]) {
    let [id_high, id_low] = id.to_be_bytes();
    let [high, low] = (content.len() as u16).to_be_bytes();
    let padding = content.len().wrapping_neg() % 8;
    out.extend_from_slice(&[VERSION, kind, id_high, id_low, high, low, padding as u8, 0]);
    out.extend_from_slice(content);
    out.extend_from_slice(&[0; 8][..padding]);
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: &[u8] = &[0, 1, 1, 0, 0, 0, 0, 0];
    const BEGIN_CLOSE: &[u8] = &[0, 1, 0, 0, 0, 0, 0, 0];

    /// A record as a web server sends it: padding of any length and content.
    fn sent(kind: u8, id: u16, content: &[u8], padding: u8) -> Vec<u8> {
        let [high, low] = (content.len() as u16).to_be_bytes();
        let mut bytes = vec![1, kind, (id >> 8) as u8, id as u8, high, low, padding, 0xff];
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len() + usize::from(padding), 0xff);
        bytes
    }

    fn pair(name: &[u8], value: &[u8]) -> Vec<u8> {
        let length = |bytes: &[u8]| match bytes.len() {
            short @ ..=127 => vec![short as u8],
            long => (long as u32 | 1 << 31).to_be_bytes().to_vec(),
        };
        [length(name), length(value), name.to_vec(), value.to_vec()].concat()
    }

    fn request(id: u16, parameters: &[u8], body: &[u8]) -> Vec<u8> {
        let mut bytes = sent(BEGIN_REQUEST, id, BEGIN, 0);
        parameters.chunks(65_535).for_each(|part| bytes.extend(sent(PARAMS, id, part, 3)));
        bytes.extend(sent(PARAMS, id, b"", 0));
        body.chunks(65_535).for_each(|part| bytes.extend(sent(STDIN, id, part, 255)));
        bytes.extend(sent(STDIN, id, b"", 7));
        bytes
    }

    const LIMIT: usize = 100_000;

    /// Feeds pieces of this size: the request, if one came of it, and what was answered.
    fn feed(bytes: &[u8], piece: usize) -> Result<(Option<Request>, Vec<u8>, Parser), Malformed> {
        let (mut parser, mut out) = (Parser::default(), Vec::new());
        for piece in bytes.chunks(piece) {
            parser.feed(piece, &mut out, &|_| LIMIT)?;
        }
        Ok((parser.split_request(), out, parser))
    }

    #[test]
    fn a_request_is_the_same_in_pieces_of_any_size() {
        let parameters = [pair(b"QUERY_STRING", b"id=1"), pair(b"EMPTY", b""), pair(b"BYTES", b"\0\xff=")].concat();
        let bytes = request(258, &parameters, b"[1]");
        for piece in 1..=bytes.len() {
            let (request, out, _) = feed(&bytes, piece).unwrap();
            let request = request.unwrap();
            assert_eq!((request.id, request.keep, &request.body[..]), (258, true, &b"[1]"[..]));
            assert_eq!(request.parameters.variables().get("QUERY_STRING"), Some(&b"id=1"[..]));
            assert_eq!(request.parameters.variables().get("EMPTY"), Some(&b""[..]));
            assert_eq!(request.parameters.variables().get("BYTES"), Some(&b"\0\xff="[..]));
            assert_eq!(request.parameters.variables().get("QUERY"), None);
            assert_eq!(out, b"");
        }
    }

    #[test]
    fn names_and_values_have_lengths_of_one_byte_and_of_four() {
        for name in [1, 127, 128, 129, 255, 256] {
            for value in [0, 127, 128, 65_000] {
                let (name, value) = (vec![b'N'; name], vec![b'v'; value]);
                let parameters = [pair(b"A", b"1"), pair(&name, &value), pair(b"Z", b"2")].concat();
                let (request, ..) = feed(&request(1, &parameters, b""), 1_000).unwrap();
                let parameters = request.unwrap().parameters;
                let name = String::from_utf8(name).unwrap();
                assert_eq!(parameters.variables().get(&name), Some(&value[..]));
                assert_eq!(
                    (parameters.variables().get("A"), parameters.variables().get("Z")),
                    (Some(&b"1"[..]), Some(&b"2"[..]))
                );
            }
        }
        // Four bytes for a short length is no mistake; and the last of several counts.
        let long = [&[0x80, 0, 0, 1, 1][..], b"A2", &pair(b"A", b"3")].concat();
        assert_eq!(
            feed(&request(1, &long, b""), 9).unwrap().0.unwrap().parameters.variables().get("A"),
            Some(&b"3"[..])
        );
    }

    #[test]
    fn bodies_and_parameters_are_bounded() {
        for (length, kept) in
            [(65_534, 65_534), (65_535, 65_535), (65_536, 65_536), (LIMIT, LIMIT), (LIMIT + 9, LIMIT + 1)]
        {
            let (request, ..) = feed(&request(1, b"", &vec![b'x'; length]), 4_096).unwrap();
            assert_eq!(request.unwrap().body.len(), kept);
        }
        for (value, too_many) in [(limits::PARAMETERS_BYTES - 6, false), (limits::PARAMETERS_BYTES - 5, true)] {
            let (request, ..) = feed(&request(1, &pair(b"A", &vec![b'x'; value]), b"1"), 4_096).unwrap();
            let request = request.unwrap();
            assert_eq!((request.parameters.too_many, request.body.len()), (too_many, 1));
            assert_eq!(request.parameters.variables().get("A").is_none(), too_many);
        }
    }

    #[test]
    fn what_is_malformed_is_refused() {
        let begin = sent(BEGIN_REQUEST, 1, BEGIN, 0);
        let parameters = sent(PARAMS, 1, b"", 0);
        let cases: [(&str, Vec<u8>); 10] = [
            ("another version", vec![2, 1, 0, 1, 0, 8, 0, 0]),
            ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
            ("a short begin", sent(BEGIN_REQUEST, 1, &BEGIN[..7], 0)),
            ("a begin without a number", sent(BEGIN_REQUEST, 0, BEGIN, 0)),
            ("a begin twice", [&begin[..], &begin].concat()),
            ("a body first", [begin.clone(), sent(STDIN, 1, b"1", 0)].concat()),
            ("parameters later", [&begin[..], &parameters, &sent(PARAMS, 1, b"\x01\x00A", 0)].concat()),
            ("a value beyond the end", [&begin[..], &sent(PARAMS, 1, b"\x01\x02A1", 0), &parameters].concat()),
            ("half a length", [&begin[..], &sent(PARAMS, 1, b"\xff\xff", 0), &parameters].concat()),
            ("a long question", sent(GET_VALUES, 0, &vec![0; limits::MANAGEMENT_BYTES + 1], 0)),
        ];
        for (name, bytes) in cases {
            for piece in [1, 7, bytes.len()] {
                assert!(feed(&bytes, piece).is_err(), "{name}");
            }
        }
    }

    #[test]
    fn management_records_are_answered() {
        let names = [pair(b"FCGI_MPXS_CONNS", b""), pair(b"OTHER", b""), pair(b"FCGI_MAX_REQS", b"")].concat();
        let (_, out, _) = feed(&sent(GET_VALUES, 0, &names, 1), 5).unwrap();
        let values =
            [pair(b"FCGI_MPXS_CONNS", b"0"), pair(b"FCGI_MAX_REQS", limits::CONNECTIONS.to_string().as_bytes())];
        let mut expected = Vec::new();
        record(&mut expected, GET_VALUES_RESULT, 0, &values.concat());
        assert_eq!(out, expected);
        let (_, out, parser) = feed(&sent(99, 0, b"whatever", 1), 5).unwrap();
        assert_eq!(out, [1, 11, 0, 0, 0, 8, 0, 0, 99, 0, 0, 0, 0, 0, 0, 0]);
        assert!(!parser.is_busy() && !parser.is_closing());
    }

    #[test]
    fn only_one_responder_at_a_time() {
        let ended = |id: u8, status: u8| vec![1, END_REQUEST, 0, id, 0, 8, 0, 0, 0, 0, 0, 0, status, 0, 0, 0];
        // A second request on the connection is refused, with all its records, and the first goes on.
        let parts = [sent(BEGIN_REQUEST, 1, BEGIN, 0), request(2, &pair(b"A", b"2"), b"2"), sent(PARAMS, 1, b"", 0)];
        let (request_1, out, _) = feed(&[parts.concat(), sent(STDIN, 1, b"", 0)].concat(), 3).unwrap();
        assert_eq!((request_1.unwrap().id, out), (1, ended(2, CANT_MPX_CONN)));
        // Another role is refused; the next request is served.
        let authorizer = [0, 2, 1, 0, 0, 0, 0, 0];
        let (next, out, parser) =
            feed(&[sent(BEGIN_REQUEST, 1, &authorizer, 0), request(1, b"", b"")].concat(), 3).unwrap();
        assert_eq!((next.unwrap().id, out, parser.is_closing()), (1, ended(1, UNKNOWN_ROLE), false));
        let (_, _, parser) = feed(&sent(BEGIN_REQUEST, 1, &[0, 3, 0, 0, 0, 0, 0, 0], 0), 3).unwrap();
        assert!(parser.is_closing());
    }

    #[test]
    fn an_aborted_request_is_over() {
        for (begin, closing) in [(BEGIN, false), (BEGIN_CLOSE, true)] {
            let parts = [sent(BEGIN_REQUEST, 5, begin, 0), sent(PARAMS, 5, b"", 0), sent(ABORT_REQUEST, 5, b"", 0)];
            let (request, out, parser) = feed(&parts.concat(), 8).unwrap();
            assert_eq!((request, &out[..4]), (None, &[1, END_REQUEST, 0, 5][..]));
            assert_eq!((parser.is_busy(), parser.is_closing()), (false, closing));
        }
        // While it is answered, the caller is told; what belongs to no request is passed over.
        let (_, mut out, mut parser) = feed(&request(5, b"", b""), 8).unwrap();
        parser.feed(&sent(ABORT_REQUEST, 4, b"", 0), &mut out, &|_| LIMIT).unwrap();
        assert!(!parser.is_aborted());
        parser.feed(&sent(ABORT_REQUEST, 5, b"", 0), &mut out, &|_| LIMIT).unwrap();
        assert!(parser.is_aborted() && out.is_empty());
        parser.answered();
        assert!(!parser.is_aborted() && !parser.is_busy());
    }

    #[test]
    fn a_reply_is_whole_records() {
        let mut out = Vec::new();
        reply(&mut out, 1, b"Status: 200 OK\r\n\r\n", b"");
        assert_eq!(&out[..26], [&[1, STDOUT, 0, 1, 0, 18, 6, 0][..], b"Status: 200 OK\r\n\r\n"].concat());
        assert_eq!(&out[26..32], [0; 6]);
        assert_eq!(&out[32..], [1, STDOUT, 0, 1, 0, 0, 0, 0, 1, END_REQUEST, 0, 1, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        out.clear();
        reply(&mut out, 258, &[b'x'; 65_536], b"why");
        assert_eq!(&out[..24], b"\x01\x07\x01\x02\x00\x03\x05\x00why\0\0\0\0\0\x01\x07\x01\x02\0\0\0\0");
        assert_eq!(out[24..32], [1, STDOUT, 1, 2, 0xff, 0xf8, 0, 0]);
        assert_eq!(out[32 + CONTENT_MAX..][..8], [1, STDOUT, 1, 2, 0, 8, 0, 0]);
        assert_eq!(out.len(), 24 + 8 + CONTENT_MAX + 8 + 8 + 8 + 16);
    }

    #[test]
    fn whatever_arrives_is_refused_or_passed_over_and_never_kept_beyond_the_bounds() {
        // splitmix64, so that each run is the same.
        let mut seed = 1_u64;
        let mut random = |bound: usize| {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (z ^ (z >> 29)) as usize % bound
        };
        let (mut requests, mut refused) = (0, 0);
        for _ in 0..20_000 {
            // Records that make sense one by one, in any order; then a few bytes are turned.
            let mut bytes = request(1, &pair(b"A", b"1"), b"[1]");
            for _ in 0..random(8) {
                let content: Vec<u8> = (0..[0, 0, 8, 20][random(4)]).map(|_| random(256) as u8).collect();
                bytes.extend(sent(random(13) as u8, random(3) as u16, &content, random(9) as u8));
            }
            for _ in 0..random(4) {
                let at = random(bytes.len());
                bytes[at] = random(256) as u8;
            }
            let (mut parser, mut out) = (Parser::default(), Vec::new());
            for piece in bytes.chunks(1 + random(bytes.len())) {
                if parser.feed(piece, &mut out, &|_| 2).is_err() {
                    refused += 1;
                    break;
                }
                if let Some(request) = parser.split_request() {
                    requests += 1;
                    assert!(request.body.len() <= 3 && request.parameters.pairs.len() <= bytes.len());
                    parser.answered();
                }
                assert!(parser.whole.len() <= limits::MANAGEMENT_BYTES && out.len() <= 2 * bytes.len() + 64);
            }
        }
        assert!(requests > 10_000 && refused > 1_000, "{requests} requests, {refused} refused");
    }
}
