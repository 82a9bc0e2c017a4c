//! What the outside may send, and what has to hold whatever it is. Each target takes any bytes, and panics where
//! something does not hold. `make test` runs them on the corpus and on mutations of it, cargo-fuzz for as long as you like.

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use base64ct::{Base64UrlUnpadded, Encoding};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use shortbus::bus::store::{Op, Reply, Store, StoreError};
use shortbus::bus::{self, IdempotencyKey, Publish};
use shortbus::config::Config;
use shortbus::fastcgi::codec::{self, Parser};
use shortbus::http::request::{Gateway, body_limit, read_body};
use shortbus::http::{self, Backend, signature};
use shortbus::limits;
use shortbus::stores::block_on;
use shortbus::stores::local::folder::{Folder, file_name};
use shortbus::stores::local::{Local, WholeProcess};
use shortbus::stores::memcached::codec::{Responses, replies, split_response, store_error, unexpected};
use shortbus::variables::Variables;

/// A target: its name, which is that of its folder in the corpus.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: [Target; 6] = [
    ("fastcgi", fastcgi),
    ("local_store", local_store),
    ("memcached", memcached),
    ("query", query),
    ("request", request),
    ("signed", signed),
];

const KEY: &str = "0123456789abcdef0123456789abcdef";
/// What the clock says in all of it, milliseconds: signatures in the corpus are of this moment.
const NOW: u64 = 1_800_000_000_000;
const BODY_MAX: usize = 1_000;

/// A folder in memory for the files of this thread's buses.
struct Memory(PathBuf);

impl Memory {
    fn new() -> Memory {
        let id = format!("shortbus-fuzz-{}-{:?}", std::process::id(), std::thread::current().id());
        let path = PathBuf::from("/dev/shm").join(id.replace(['(', ')'], "-"));
        fs::create_dir_all(&path).unwrap();
        Memory(path)
    }

    fn open(&self, bus: &[u8]) -> Local<WholeProcess> {
        Local::new(Folder::named(&self.0), bus, limits::STORE_BYTES_MIN, WholeProcess)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

thread_local! {
    static MEMORY: Memory = Memory::new();
}

/// A local store at a fixed time.
struct Fixed(Local<WholeProcess>);

impl Store for Fixed {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError> {
        self.0.run(batch).await
    }

    async fn pause(&mut self, _longest: Duration) {}

    fn now(&self) -> Duration {
        self.0.now()
    }

    fn unix_micros(&self) -> u64 {
        NOW * 1_000
    }
}

struct Files;

impl Backend for Files {
    type Store = Fixed;

    fn open(&self, config: &Config) -> Result<Fixed, StoreError> {
        Ok(Fixed(MEMORY.with(|memory| memory.open(&config.bus))))
    }
}

/// The response of a CGI request, of which all that holds for every response is checked: its status and body.
fn respond(pairs: &[(&[u8], &[u8])], body: &[u8]) -> (u16, Vec<u8>) {
    let variables: Variables = pairs.iter().copied().collect();
    let config = Config::read(&variables, &Variables::default(), b"/usr/lib/cgi-bin/fuzz", 0);
    let limit = config.as_ref().map_or(0, |config| body_limit(&variables, config));
    let body = read_body(&variables, body, limit);
    let response = block_on(http::answer(&variables, Gateway::Cgi, config, body, &Files));
    if let Some(line) = &response.log {
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
    let text = response.to_cgi(false, false);
    let end = text.windows(4).position(|four| four == b"\r\n\r\n").expect("the end of the headers");
    let head = std::str::from_utf8(&text[..end]).expect("headers in UTF-8");
    let mut lines = head.split("\r\n");
    let status: u16 = lines.next().unwrap().strip_prefix("Status: ").unwrap()[..3].parse().unwrap();
    assert!([200, 204, 304].contains(&status) || (400..=599).contains(&status), "{head}");
    let headers: Vec<(&str, &str)> = lines.map(|line| line.split_once(": ").expect("a header")).collect();
    for (name, value) in &headers {
        assert!(name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "{name:?}");
        assert!(!value.chars().any(char::is_control), "{value:?}");
    }
    assert_eq!(status >= 400, response.log.is_some(), "a line for each error: {head}");
    let body = text[end + 4..].to_vec();
    let is_json = headers.contains(&("Content-Type", "application/json"));
    if is_json && response.waiting.is_none() {
        assert!(serde_json::from_slice::<&serde_json::value::RawValue>(&body).is_ok());
    }
    if status >= 400 {
        let error: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert!(error["error"].is_string() && error["message"].is_string(), "{error}");
        assert_ne!(status, 500, "{error}: no setting came");
    }
    (status, body)
}

/// A CGI request: lines of `NAME=value`, an empty line, a body. What is published is heard as it was sent.
pub fn request(input: &[u8]) {
    let (head, body) = match input.windows(2).position(|two| two == b"\n\n") {
        Some(end) => (&input[..end], &input[end + 2..]),
        None => (input, &b""[..]),
    };
    let is_setting = |name: &[u8]| name.windows(9).any(|nine| nine == b"SHORTBUS_");
    let pairs: Vec<(&[u8], &[u8])> = (head.split(|&byte| byte == b'\n'))
        .filter_map(|line| line.iter().position(|&byte| byte == b'=').map(|end| (&line[..end], &line[end + 1..])))
        .filter(|(name, _)| !is_setting(name))
        .collect();
    let bus = block_on(bus::join(&mut MEMORY.with(|memory| memory.open(b"fuzz")))).unwrap();
    let (status, reply) = respond(&pairs, body);
    let variables: Variables = pairs.iter().copied().collect();
    if status == 200 && variables.text("REQUEST_METHOD") == b"POST" {
        let page = block_on(bus::poll(&mut MEMORY.with(|memory| memory.open(b"fuzz")), bus, None)).unwrap();
        let reply: serde_json::Value = serde_json::from_slice(&reply).unwrap();
        let heard = page.messages.iter().any(|message| Some(message.id) == reply["id"].as_u64());
        // A repeat was heard before.
        assert!(
            heard || variables.text("QUERY_STRING").windows(5).any(|five| five == b"once=" || five.contains(&b'%')),
            "{reply}"
        );
        for message in &page.messages {
            assert!(body.windows(message.data().len()).any(|part| part == message.data()));
        }
    }
}

/// The query of a poll and of a publish.
pub fn query(input: &[u8]) {
    respond(&[(b"REQUEST_METHOD", b"GET"), (b"QUERY_STRING", input)], b"");
    let publish = [(&b"REQUEST_METHOD"[..], &b"POST"[..]), (b"QUERY_STRING", input), (b"CONTENT_LENGTH", b"3")];
    respond(&publish, b"[7]");
}

/// A publish on a signed bus: a line with its query, then its body. It is published only by who could sign it.
pub fn signed(input: &[u8]) {
    let end = input.iter().position(|&byte| byte == b'\n').unwrap_or(input.len());
    let (query, body) = (&input[..end], input.get(end + 1..).unwrap_or_default());
    let variables: Variables = [
        (&b"REQUEST_METHOD"[..], &b"POST"[..]),
        (b"QUERY_STRING", query),
        (b"SHORTBUS_AUTH", b"signed"),
        (b"SHORTBUS_KEY", KEY.as_bytes()),
    ]
    .into_iter()
    .collect();
    let config = Config::read(&variables, &Variables::default(), b"signed", 0);
    let response = block_on(http::answer(&variables, Gateway::Cgi, config, Ok(body.to_vec()), &Files));
    if !response.to_cgi(false, false).starts_with(b"Status: 200 ") {
        return;
    }
    let parameter = |name: &str| {
        let pairs = url::form_urlencoded::parse(query);
        pairs.filter(|(key, _)| key == name).map(|(_, value)| value.into_owned()).next().expect("a parameter")
    };
    let user = parameter("user").parse().unwrap();
    let mut mac = Hmac::<Sha256>::new_from_slice(signature::secret(KEY.as_bytes(), user).as_bytes()).unwrap();
    mac.update(format!("signed\n{user}\n{}\n{}\n", parameter("time"), parameter("once")).as_bytes());
    if url::form_urlencoded::parse(query).any(|pair| pair == ("batch".into(), "1".into())) {
        mac.update(b"batch=1\n");
    }
    mac.update(body);
    assert_eq!(parameter("sig"), Base64UrlUnpadded::encode_string(&mac.finalize().into_bytes()));
}

/// A memcached that answers these bytes.
struct Answers<'a> {
    left: RefCell<&'a [u8]>,
    asked: u32,
}

impl Store for Answers<'_> {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>, StoreError> {
        self.asked += 1;
        assert!(self.asked < 1_000, "asked without end");
        let mut left = self.left.borrow_mut();
        let mut responses = Responses::new(batch.len());
        while !responses.are_complete() {
            match split_response(&mut left) {
                Ok(Some(parts)) => responses.push(Ok(parts))?,
                Ok(None) => return Err(unexpected("it")),
                Err(error) => responses.push(Err(store_error("it", error)))?,
            }
        }
        replies("it", batch, responses.into_result()?)
    }

    async fn pause(&mut self, _longest: Duration) {}

    fn now(&self) -> Duration {
        Duration::from_millis(10) * self.asked
    }

    fn unix_micros(&self) -> u64 {
        NOW * 1_000
    }
}

/// What memcached, or what is there in its place, answers: each call ends, with a result or an error.
pub fn memcached(input: &[u8]) {
    let [call, size, rest @ ..] = input else { return };
    let mut store = Answers { left: RefCell::new(rest), asked: 0 };
    match call % 5 {
        0 => drop(block_on(bus::join(&mut store))),
        1 => {
            let after = u64::from(*size) << (size % 46);
            if let Ok(page) = block_on(bus::poll(&mut store, after, None)) {
                assert!(page.messages.windows(2).all(|two| two[0].id < two[1].id), "ids rise");
                assert!(page.messages.iter().all(|message| message.id > after && message.id <= page.last_id));
            }
        }
        2 => drop(block_on(bus::signing_key(&mut store, Some(KEY.as_bytes())))),
        number => {
            let messages = vec![&b"1"[..]; usize::from(size % 3) + 1];
            let key = (number == 3).then_some(IdempotencyKey { name: "1:k", token: 7, ttl: 60 });
            let count = messages.len();
            if let Ok(ids) = block_on(bus::publish(&mut store, Publish { user: 1, messages, key }, 60)) {
                assert_eq!(ids.len(), count);
                assert!(ids.is_sorted(), "{ids:?}");
            }
        }
    }
    // However the bytes are split, the responses are the same.
    let all = |size: usize| {
        let (mut input, mut found) = (Vec::new(), Vec::new());
        for piece in rest.chunks(size) {
            input.extend_from_slice(piece);
            let mut left = &input[..];
            loop {
                match split_response(&mut left) {
                    Ok(Some(parts)) => found.push(format!("{parts:?}")),
                    Ok(None) => break,
                    // Where the connection ends.
                    Err(error) => return [&found[..], &[error.to_string()]].concat(),
                }
            }
            input.drain(..input.len() - left.len());
        }
        found
    };
    assert_eq!(all(1), all(usize::from(*size) + 1));
}

/// A file of the local store, damaged: at each four bytes of the input, two of place and two of what is there.
pub fn local_store(input: &[u8]) {
    let bus = b"damaged";
    MEMORY.with(|memory| {
        let path = memory.0.join(file_name(bus));
        let _ = fs::remove_file(&path);
        let mut sent = Vec::new();
        for n in 0..20 {
            let body = format!("\"{n}{}\"", "x".repeat(n * 10)).into_bytes();
            let publish = Publish { user: 1, messages: vec![&body], key: None };
            let id = block_on(bus::publish(&mut memory.open(bus), publish, 60)).unwrap();
            sent.push((id[0], body));
        }
        let mut bytes = fs::read(&path).unwrap();
        for edit in input.chunks_exact(4) {
            // What is used lies at the beginning of each of its parts.
            let at = usize::from(u16::from_be_bytes([edit[0], edit[1]]));
            let at = if at & 1 == 0 { at % 4_096 } else { at * 61 };
            match edit[2] % 3 {
                0 if at < bytes.len() => bytes[at] = edit[3],
                1 if at < bytes.len() => bytes[at] ^= 1 << (edit[3] % 8),
                2 if edit[3] == 7 => bytes.truncate(at),
                _ => {}
            }
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(page) = block_on(bus::poll(&mut memory.open(bus), sent[0].0 - 1, None)) {
            for message in page.messages {
                assert!(sent.contains(&(message.id, message.data().to_vec())), "{} was not sent", message.id);
            }
        }
        // It goes on, or says that it cannot.
        let publish = Publish { user: 2, messages: vec![b"7"], key: None };
        if let Ok(ids) = block_on(bus::publish(&mut memory.open(bus), publish, 60)) {
            let page = block_on(bus::poll(&mut memory.open(bus), ids[0] - 1, None)).unwrap();
            assert_eq!(page.messages.first().map(|message| (message.id, message.data())), Some((ids[0], &b"7"[..])));
        }
        let _ = fs::remove_dir_all(&memory.0);
        fs::create_dir_all(&memory.0).unwrap();
    });
}

/// The first request in bytes that arrive in pieces of this size. Each is answered as soon as it is there.
fn converse(bytes: &[u8], size: usize) -> Option<codec::Request> {
    let (mut parser, mut first, mut out) = (Parser::default(), None, Vec::new());
    for piece in bytes.chunks(size) {
        if parser.feed(piece, &mut out, &|_| BODY_MAX).is_err() || parser.is_closing() {
            break;
        }
        let Some(request) = parser.split_request() else { continue };
        assert!(request.body.len() <= BODY_MAX + 1);
        let names = ["QUERY_STRING", "REQUEST_METHOD", ""];
        let kept: usize =
            names.iter().filter_map(|name| request.parameters.variables().get(name)).map(<[u8]>::len).sum();
        assert!(kept <= limits::PARAMETERS_BYTES);
        codec::reply(&mut out, request.id, b"Status: 200 OK\r\n\r\n", b"");
        parser.answered();
        first = first.or(Some(request));
    }
    first
}

/// Records, some of them cut or nonsense: bytes alone would hardly ever make up a request.
fn records(mut input: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let [kind, form, length, padding, rest @ ..] = input {
        let (content, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        match form {
            0..=200 if kind % 12 == 1 => bytes.extend([1, 1, 0, 1, 0, 8, 0, 0, 0, 1, padding & 1, 0, 0, 0, 0, 0]),
            0..=200 => {
                bytes.extend([1, kind % 12, 0, 1 - kind / 200, 0, content.len() as u8, *padding, 0]);
                bytes.extend(content);
                bytes.resize(bytes.len() + usize::from(*padding), 0);
            }
            _ => bytes.extend(content),
        }
        input = rest;
    }
    bytes
}

/// What a web server, or whoever else reaches the socket, may send: how the bytes are split changes no request. (A later
/// one may have come before the answer to the one before it, and is refused then.)
pub fn fastcgi(input: &[u8]) {
    let [size, rest @ ..] = input else { return };
    for bytes in [rest.to_vec(), records(rest)] {
        if let (Some(one), Some(other)) = (converse(&bytes, 1), converse(&bytes, usize::from(*size) + 1)) {
            assert_eq!(one, other);
        }
    }
}
