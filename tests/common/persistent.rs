//! The executable as a FastCGI server, behind nginx: a process for each file in cgi-bin, on a socket of its own.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Daemon, Folder, Memcached, PATIENCE, Reply, Site, decode, executable};

/// A FastCGI process and its socket.
pub struct Worker {
    pub daemon: Daemon,
    pub socket: PathBuf,
}

impl Worker {
    /// Starts `program`, with `variables` for its whole environment, and its listening socket as fd 0.
    pub fn start(program: &Path, socket: PathBuf, folder: &Folder, variables: &[(&str, &str)]) -> Worker {
        let mut command = Command::new(program);
        command.env_clear().envs(variables.iter().copied());
        Worker::run(&mut command, socket, folder)
    }

    /// The same for any command.
    pub fn run(command: &mut Command, socket: PathBuf, folder: &Folder) -> Worker {
        let listener = UnixListener::bind(&socket).unwrap();
        let log = fs::OpenOptions::new().create(true).append(true).open(folder.join("start.log")).unwrap();
        let child = command.process_group(0).stdin(Stdio::from(OwnedFd::from(listener))).stderr(log).spawn().unwrap();
        Worker { daemon: Daemon { name: format!("{command:?}"), child }, socket }
    }
}

/// By the file's name.
pub type Workers = BTreeMap<OsString, Worker>;

impl Site {
    /// Starts what serves `target`, as soon as there is a file of its name.
    pub(super) fn ensure_worker(&self, target: &str) {
        let path = target.split('?').next().unwrap_or_default();
        let name = OsString::from_vec(decode(path.split('/').next().unwrap_or_default()));
        let mut workers = self.workers.lock().unwrap();
        if !workers.contains_key(&name) && self.cgi_bin(&name).is_file() {
            let mut socket = name.clone();
            socket.push(".s");
            let socket = self.folder.join(socket);
            let _ = fs::remove_file(&socket);
            workers.insert(name.clone(), Worker::start(&self.cgi_bin(&name), socket, &self.folder, &[]));
        }
    }

    pub(super) fn start_nginx_fastcgi(&mut self) {
        let root = self.folder.0.display().to_string();
        let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        // The repository's example, but for where things are, that each bus is the process of a file, by its name, and
        // that connections are kept, as it advises.
        let mut block = include_str!("../../examples/nginx-fastcgi.conf").rsplit_once('}').unwrap().0.to_owned();
        for (from, to) in [
            ("client_max_body_size 1m;", "client_max_body_size 0;"),
            ("fastcgi_param SHORTBUS_BUS chat;", ""),
            ("fastcgi_pass unix:/run/shortbus.sock;", "fastcgi_keep_conn on; fastcgi_pass PROCESS;"),
            ("^/cgi-bin/chat(", "^/cgi-bin/NAME("),
        ] {
            assert!(block.contains(from), "{from}");
            block = block.replace(from, to);
        }
        let location = |name: &str, process: &str, list: &[(String, String)]| {
            let memcached = ("SHORTBUS_MEMCACHED".to_owned(), self.memcached.address.clone());
            let default = (!list.iter().any(|(name, _)| *name == memcached.0)).then_some(&memcached);
            let params = list.iter().chain(default);
            let params: String =
                params.map(|(name, value)| format!("fastcgi_param {name} {};\n", quoted(value))).collect();
            format!("{}{params}}}\n", block.replace("NAME", name).replace("PROCESS", process))
        };
        let none = ("chat".to_owned(), vec![]);
        let (mut upstreams, mut locations) = (String::new(), String::new());
        let chat = if self.settings.iter().any(|(bus, _)| bus == "chat") { None } else { Some(&none) };
        for (bus, list) in self.settings.iter().chain(chat) {
            upstreams.push_str(&format!("upstream {bus} {{ server unix:{root}/{bus}.s; keepalive 32; }}\n"));
            locations.push_str(&location(bus, bus, list));
        }
        // Names that a test comes up with later.
        locations.push_str(&location("(?<any>[^/]+)", &format!("unix:{root}/$any.s"), &[]));
        self.run_nginx(&upstreams, &locations);
    }
}

/// A FastCGI process called `chat`, and its memcached, without a web server.
pub struct Bus {
    pub memcached: Memcached,
    pub worker: Worker,
    pub folder: Folder,
}

impl Bus {
    pub fn start() -> Bus {
        Bus::with(&[])
    }

    /// With these variables in its environment.
    pub fn with(variables: &[(&str, &str)]) -> Bus {
        let (folder, memcached) = (Folder::new(), Memcached::start(&[]));
        let program = copy(&folder);
        let all = [&[("SHORTBUS_MEMCACHED", &memcached.address[..])], variables].concat();
        let worker = Worker::start(&program, folder.join("chat.s"), &folder, &all);
        Bus { memcached, worker, folder }
    }

    /// Another process of the same bus.
    pub fn another(&self) -> Worker {
        let variables = [("SHORTBUS_MEMCACHED", &self.memcached.address[..])];
        Worker::start(&self.folder.join("chat"), self.folder.join("another.s"), &self.folder, &variables)
    }

    pub fn connect(&self) -> Client {
        Client::connect(&self.worker.socket)
    }

    /// On a connection of its own.
    pub fn ask(&self, method: &str, query: &str, body: &str) -> Answer {
        self.connect().ask(method, query, &[], body.as_bytes()).answer()
    }

    /// The newest id.
    pub fn join(&self) -> u64 {
        self.ask("GET", "", "").reply.json()["id"].as_u64().unwrap()
    }

    pub fn publish(&self, user: u64, body: &str) -> u64 {
        self.ask("POST", &format!("user={user}"), body).reply.json()["id"].as_u64().unwrap()
    }

    /// How often memcached was asked for a key.
    pub fn gets(&self) -> u64 {
        let stats = self.memcached.ask("stats\r\n");
        stats.lines().find_map(|line| line.strip_prefix("STAT cmd_get ")).unwrap().trim().parse().unwrap()
    }

    /// The process's resident memory, KB.
    pub fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.worker.daemon.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

/// The executable under the name `chat`.
pub fn copy(folder: &Folder) -> PathBuf {
    let program = folder.join("chat");
    assert!(Command::new("cp").arg(executable()).arg(&program).status().unwrap().success());
    program
}

/// A web server's connection.
pub struct Client {
    pub stream: UnixStream,
    received: Vec<u8>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// What came of a request.
#[derive(Debug)]
pub struct Answer {
    pub reply: Reply,
    pub log: String,
}

pub const BEGIN: [u8; 8] = [0, 1, 1, 0, 0, 0, 0, 0];

pub fn record(kind: u8, id: u16, content: &[u8]) -> Vec<u8> {
    let [id_high, id_low] = id.to_be_bytes();
    let [high, low] = (content.len() as u16).to_be_bytes();
    [&[1, kind, id_high, id_low, high, low, 0, 0], content].concat()
}

pub fn parameters(pairs: &[(&str, &str)]) -> Vec<u8> {
    let length = |text: &str| (text.len() as u32 | 1 << 31).to_be_bytes();
    pairs
        .iter()
        .flat_map(|(name, value)| [&length(name)[..], &length(value), name.as_bytes(), value.as_bytes()].concat())
        .collect()
}

/// A whole request, which keeps the connection.
pub fn request(method: &str, query: &str, extra: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let length = body.len().to_string();
    let pairs = [("REQUEST_METHOD", method), ("QUERY_STRING", query), ("CONTENT_LENGTH", &length)];
    let parameters = parameters(&[&pairs, extra].concat());
    let mut bytes = record(1, 1, &BEGIN);
    parameters.chunks(65_535).for_each(|part| bytes.extend(record(4, 1, part)));
    bytes.extend(record(4, 1, b""));
    body.chunks(65_535).for_each(|part| bytes.extend(record(5, 1, part)));
    bytes.extend(record(5, 1, b""));
    bytes
}

impl Client {
    pub fn connect(socket: &Path) -> Client {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client { stream, received: vec![], stdout: vec![], stderr: vec![] }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Client {
        self.stream.write_all(bytes.as_ref()).unwrap();
        self
    }

    pub fn ask(&mut self, method: &str, query: &str, extra: &[(&str, &str)], body: &[u8]) -> &mut Client {
        self.send(request(method, query, extra, body))
    }

    /// The next record: type, id, content; none where the connection is closed.
    pub fn record(&mut self) -> Option<(u8, u16, Vec<u8>)> {
        loop {
            if let [1, kind, id_high, id_low, high, low, padding, _, ..] = self.received[..] {
                let length = usize::from(u16::from_be_bytes([high, low]));
                let end = 8 + length + usize::from(padding);
                if self.received.len() >= end {
                    let content = self.received[8..8 + length].to_vec();
                    self.received.drain(..end);
                    return Some((kind, u16::from_be_bytes([id_high, id_low]), content));
                }
            }
            let mut buffer = [0; 65_536];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(length) => self.received.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                // A read with a time-out is not taken up again behind a signal (signal(7)).
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => panic!("{error}, after {:?}", String::from_utf8_lossy(&self.stdout)),
            }
        }
    }

    /// Reads to the end of the request.
    #[track_caller]
    pub fn answer(&mut self) -> Answer {
        let stdout = self.end();
        let reply = Reply::parse(stdout.as_bytes()).unwrap_or_else(|| panic!("no reply: {stdout:?}"));
        Answer { reply, log: String::from_utf8(std::mem::take(&mut self.stderr)).unwrap() }
    }

    /// Reads a stream until this text has come, and returns all up to it.
    #[track_caller]
    pub fn until(&mut self, text: &str) -> String {
        loop {
            let so_far = String::from_utf8_lossy(&self.stdout).into_owned();
            if let Some(at) = so_far.find(text) {
                self.stdout.drain(..at + text.len());
                return so_far[..at + text.len()].into();
            }
            let (kind, _, content) = self.record().unwrap_or_else(|| panic!("closed after {so_far:?}"));
            assert_eq!(kind, 6, "after {so_far:?}");
            self.stdout.extend(content);
        }
    }

    /// Reads a reply or stream to its clean end: what was left of it.
    #[track_caller]
    pub fn end(&mut self) -> String {
        loop {
            let (kind, id, content) = self.record().expect("the end of the request");
            assert_eq!(id, 1);
            match kind {
                6 => self.stdout.extend(content),
                7 => self.stderr.extend(content),
                3 => break assert_eq!(content, [0; 8]),
                other => panic!("a record of type {other}"),
            }
        }
        String::from_utf8(std::mem::take(&mut self.stdout)).unwrap()
    }

    /// Whether the other side has closed, or does soon.
    pub fn is_closed(&mut self) -> bool {
        self.record().is_none()
    }
}
