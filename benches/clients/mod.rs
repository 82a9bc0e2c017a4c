//! HTTP and FastCGI clients by the thousand, in one thread: epoll(7), and little else, so that it is the servers that
//! are measured. Every reply is looked at, which generators of load as people know them do not do.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::fixtures::fastcgi_client::STDOUT;

/// Where a client connects to, and what is spoken there.
#[derive(Clone)]
pub enum Place {
    Http(SocketAddr),
    FastCgi(PathBuf),
}

/// Waits for any of many sockets.
pub struct Epoll {
    fd: OwnedFd,
    events: Vec<libc::epoll_event>,
}

impl Epoll {
    pub fn new() -> Epoll {
        // SAFETY: it takes a number alone.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: a new file descriptor, which nobody else has.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Epoll { fd, events: vec![libc::epoll_event { events: 0, u64: 0 }; 1_024] }
    }

    /// From now on tells of this client, by its number, when there is something to read.
    pub fn add(&self, client: &Client, number: usize) {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: number as u64 };
        let (epoll, socket) = (self.fd.as_raw_fd(), client.stream.as_raw_fd());
        // SAFETY: both are open, and the event is only read.
        let result = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, socket, &mut event) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    /// The numbers of those that have something to read; none when the time is over.
    pub fn wait(&mut self, until: Instant) -> Vec<usize> {
        let time = until.saturating_duration_since(Instant::now());
        let time = libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        let (events, length) = (self.events.as_mut_ptr(), self.events.len() as i32);
        // SAFETY: there is room for as many events; no signal mask.
        let count = unsafe { libc::epoll_pwait2(self.fd.as_raw_fd(), events, length, &time, std::ptr::null()) };
        self.events[..count.max(0) as usize].iter().map(|event| event.u64 as usize).collect()
    }
}

/// One connection, with one request at a time.
pub struct Client {
    place: Place,
    stream: TcpStream,
    input: Vec<u8>,
    /// What has come of an event stream.
    pub text: Vec<u8>,
}

/// A reply with status 200.
#[derive(Debug)]
pub struct Reply {
    pub head: String,
    pub body: String,
}

impl Reply {
    /// By its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().filter_map(|line| line.split_once(": ")).find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    /// The server closes the connection.
    pub fn closes(&self) -> bool {
        self.header("connection") == Some("close")
    }
}

fn connect(place: &Place) -> TcpStream {
    match place {
        Place::Http(address) => {
            let stream = TcpStream::connect(address).unwrap();
            stream.set_nodelay(true).unwrap();
            stream
        }
        // To read and write, a connected unix socket is the same.
        Place::FastCgi(path) => TcpStream::from(OwnedFd::from(UnixStream::connect(Path::new(path)).unwrap())),
    }
}

impl Client {
    pub fn connect(place: &Place) -> Client {
        Client { place: place.clone(), stream: connect(place), input: Vec::new(), text: Vec::new() }
    }

    /// For [`Epoll`].
    pub fn connect_nonblocking(place: &Place) -> Client {
        let client = Client::connect(place);
        client.stream.set_nonblocking(true).unwrap();
        client
    }

    /// As [`Client::connect_nonblocking`], again.
    pub fn reconnect(&mut self) {
        *self = Client::connect_nonblocking(&self.place);
    }

    /// All at once: what these clients send fits any socket's buffer.
    pub fn send(&mut self, request: &[u8]) {
        self.stream.write_all(request).unwrap();
    }

    /// Reads once. False where the other side has closed.
    pub fn read(&mut self) -> bool {
        let mut buffer = [0; 16_384];
        match self.stream.read(&mut buffer) {
            Ok(length) => {
                self.input.extend_from_slice(&buffer[..length]);
                length > 0
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => true,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// The reply, once all of it is there.
    pub fn take_reply(&mut self) -> Option<Reply> {
        let head = self.head()?;
        let start = head.len() + 4;
        let reply = Reply { head, body: String::new() };
        let (body, end) = match reply.header("content-length") {
            Some(length) => {
                let end = start + length.parse::<usize>().unwrap();
                (self.input.get(start..end)?.to_vec(), end)
            }
            None => {
                let (mut body, mut at) = (Vec::new(), start);
                loop {
                    let (chunk, next) = chunk(&self.input[at..])?;
                    body.extend_from_slice(chunk);
                    at += next;
                    if chunk.is_empty() {
                        break (body, at);
                    }
                }
            }
        };
        self.input.drain(..end);
        Some(Reply { body: String::from_utf8(body).unwrap(), ..reply })
    }

    /// A reply's head in lower case.
    fn head(&self) -> Option<String> {
        let end = self.input.windows(4).position(|four| four == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&self.input[..end]).to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 200 "), "{}", String::from_utf8_lossy(&self.input));
        Some(head)
    }

    /// Adds to `text` what has come of an event stream.
    pub fn take_text(&mut self) {
        let mut at = 0;
        if let Place::Http(_) = self.place
            && self.input.starts_with(b"HTTP/")
        {
            let Some(head) = self.head() else { return };
            at = head.len() + 4;
        }
        loop {
            let rest = &self.input[at..];
            let part = match (&self.place, rest) {
                (Place::Http(_), _) => chunk(rest),
                (Place::FastCgi(_), [1, kind, _, _, high, low, padding, _, content @ ..]) => {
                    let length = usize::from(u16::from_be_bytes([*high, *low]));
                    let whole = 8 + length + usize::from(*padding);
                    assert_eq!(*kind, STDOUT, "a stream goes on");
                    (rest.len() >= whole).then(|| (&content[..length], whole))
                }
                _ => None,
            };
            let Some((content, next)) = part else { break };
            assert!(!content.is_empty(), "a stream goes on");
            self.text.extend_from_slice(content);
            at += next;
        }
        self.input.drain(..at);
    }

    /// One request and its reply, in peace. Over a new connection where the server closes this one.
    pub fn exchange(&mut self, request: &[u8]) -> Reply {
        self.send(request);
        let reply = loop {
            assert!(self.read(), "closed without a reply");
            if let Some(reply) = self.take_reply() {
                break reply;
            }
        };
        if reply.closes() {
            *self = Client::connect(&self.place);
        }
        reply
    }
}

/// A chunk of a chunked body, and how far it goes.
fn chunk(input: &[u8]) -> Option<(&[u8], usize)> {
    let line = input.windows(2).position(|two| two == b"\r\n")?;
    let size = usize::from_str_radix(std::str::from_utf8(&input[..line]).unwrap(), 16).unwrap();
    let content = input.get(line + 2..line + 2 + size)?;
    let whole = line + 2 + size + 2;
    (input.len() >= whole).then_some((content, whole))
}

/// A GET of `/cgi-bin/` + `target`.
pub fn get(target: &str) -> Vec<u8> {
    format!("GET /cgi-bin/{target} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes()
}

/// A POST of `body` to `/cgi-bin/` + `target`.
pub fn post(target: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST /cgi-bin/{target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// CPU time that a process has used, to the nanosecond.
pub fn cpu(pid: u32) -> Duration {
    let mut clock = 0;
    // SAFETY: writes the one number it is given.
    assert_eq!(unsafe { libc::clock_getcpuclockid(pid as i32, &mut clock) }, 0, "process {pid}");
    clock_time(clock)
}

/// CPU time that this thread has used.
pub fn own_cpu() -> Duration {
    clock_time(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock_time(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the one structure it is given.
    assert_eq!(unsafe { libc::clock_gettime(clock, &mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
