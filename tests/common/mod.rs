//! Real servers for a test: each started in a folder of its own, and stopped, waited for and removed on drop.
//!
//! `SHORTBUS_KEEP=1` keeps the folders. After a test the servers' error logs must hold exactly one line for each
//! error that a client was told, and nothing else.

#![allow(dead_code, reason = "each test program uses its part")]

pub mod fronts;
pub mod persistent;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64ct::{Base64UrlUnpadded, Encoding};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use shortbus::limits;

use persistent::Workers;

/// A test of each scenario on each front.
#[allow(unused_macros, reason = "each test program uses its part")]
macro_rules! on_every_front {
    ($($scenario:ident)*) => {
        on_every_front!(@ bare Bare; $($scenario)*);
        on_every_front!(@ apache_cgid ApacheCgid; $($scenario)*);
        on_every_front!(@ apache_cgi ApacheCgi; $($scenario)*);
        on_every_front!(@ apache_fcgid ApacheFcgid; $($scenario)*);
        on_every_front!(@ apache_proxy_fcgi ApacheProxyFcgi; $($scenario)*);
        on_every_front!(@ lighttpd_cgi LighttpdCgi; $($scenario)*);
        on_every_front!(@ lighttpd_fastcgi LighttpdFastcgi; $($scenario)*);
        on_every_front!(@ nginx_fcgiwrap NginxFcgiwrap; $($scenario)*);
        on_every_front!(@ nginx_fastcgi_once NginxFastcgiOnce; $($scenario)*);
        on_every_front!(@ nginx_fastcgi_shared NginxFastcgiShared; $($scenario)*);
        on_every_front!(@ nginx_fastcgi NginxFastcgi; $($scenario)*);
    };
    (@ $module:ident $front:ident; $($scenario:ident)*) => {
        mod $module {
            $(#[test] fn $scenario() { super::$scenario(crate::common::Front::$front); })*
        }
    };
}

/// The same on the fronts of CGI and one of FastCGI, for what depends on no web server.
#[allow(unused_macros, reason = "each test program uses its part")]
macro_rules! on_main_fronts {
    ($($scenario:ident)*) => {
        on_every_front!(@ bare Bare; $($scenario)*);
        on_every_front!(@ apache_cgid ApacheCgid; $($scenario)*);
        on_every_front!(@ apache_cgi ApacheCgi; $($scenario)*);
        on_every_front!(@ nginx_fcgiwrap NginxFcgiwrap; $($scenario)*);
        on_every_front!(@ nginx_fastcgi NginxFastcgi; $($scenario)*);
    };
}

/// Seconds that memcached is told to keep the record of a send, and how many are left when the first's lease is over.
pub const RECORD: u32 = 2 * limits::TTL_DEFAULT + limits::ONCE_SLACK;
pub const LEASE_OVER: u32 = RECORD - limits::ONCE_LEASE;

/// How long a server may take to start, and a log line to arrive.
const PATIENCE: Duration = Duration::from_secs(20);

/// The executable that `make` leaves, the one that people copy.
pub fn executable() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cgi-bin/shortbus");
    assert!(path.exists(), "{} is missing: run make first", path.display());
    path
}

/// A temporary folder that every user may enter.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("shortbus-{}-{count}", std::process::id()));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Folder(path)
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }

    pub fn text(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.join(name)).unwrap_or_default()).into_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if std::env::var_os("SHORTBUS_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// A server process and its children, in a process group of their own.
pub struct Daemon {
    name: String,
    child: Child,
}

impl Daemon {
    /// Starts `command`; `package` is what to install where it is missing.
    pub fn start(command: &mut Command, package: &str) -> Daemon {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.process_group(0).stdin(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|error| panic!("{name}: {error}; install it: apt-get install {package}"));
        Daemon { name, child }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends a signal to the whole group.
    pub fn signal(&self, signal: &str) {
        let group = format!("-{}", self.child.id());
        let _ = Command::new("kill").args(["-s", signal, "--", &group]).stderr(Stdio::null()).status();
        if signal == "STOP" {
            // A thread of it that runs just then goes on for a moment.
            let stat = || fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
            wait_for("it to stop", || stat().rsplit(") ").next().unwrap().starts_with('T'));
        }
    }

    /// Stops it and waits until it has gone.
    pub fn stop(&mut self) {
        self.signal("CONT");
        self.signal("TERM");
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.is_alive() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        self.signal("KILL");
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Waits until `ready` says so, or panics with what it waited for.
pub fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !ready() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

/// A memcached of one's own.
pub struct Memcached {
    folder: Folder,
    daemon: Daemon,
    arguments: Vec<String>,
    /// What SHORTBUS_MEMCACHED has to say: a unix socket's path, or `127.0.0.1:port`.
    pub address: String,
}

impl Memcached {
    /// On a unix socket.
    pub fn start(arguments: &[&str]) -> Memcached {
        let folder = Folder::new();
        let socket = folder.join("memcached.sock");
        let address = socket.to_str().unwrap().to_owned();
        Memcached::with(folder, address.clone(), &[&["-s", &address, "-a", "777"], arguments].concat())
    }

    /// On a port that the kernel picks.
    pub fn start_tcp() -> Memcached {
        let folder = Folder::new();
        let ports = folder.join("ports");
        let mut memcached = Memcached::with(folder, ports.to_str().unwrap().into(), &["-p", "-1", "-l", "127.0.0.1"]);
        let mut port = String::new();
        wait_for("memcached's port", || {
            port = memcached.folder.text("ports");
            port.ends_with('\n')
        });
        let port = port.lines().find_map(|line| line.strip_prefix("TCP INET: ")).unwrap().to_owned();
        memcached.address = format!("127.0.0.1:{port}");
        // From now on the same port, also after a restart.
        memcached.arguments[1] = port;
        memcached
    }

    fn with(folder: Folder, waits_for: String, arguments: &[&str]) -> Memcached {
        let arguments: Vec<String> = arguments.iter().map(|&text| text.into()).collect();
        let daemon = Memcached::spawn(&folder, &arguments);
        let mut memcached = Memcached { folder, daemon, arguments, address: waits_for.clone() };
        wait_for("memcached", || {
            assert!(memcached.daemon.is_alive(), "memcached ended: {}", memcached.folder.text("log"));
            Path::new(&waits_for).exists()
        });
        memcached
    }

    fn spawn(folder: &Folder, arguments: &[String]) -> Daemon {
        let log = fs::File::create(folder.join("log")).unwrap();
        let mut command = Command::new("memcached");
        command.args(arguments).env("MEMCACHED_PORT_FILENAME", folder.join("ports")).stderr(log);
        if is_root() {
            command.args(["-u", "root"]);
        }
        Daemon::start(&mut command, "memcached")
    }

    /// At once: asked to end, it takes up to a second, and it has nothing to save.
    pub fn stop(&mut self) {
        self.daemon.signal("KILL");
        self.daemon.stop();
    }

    pub fn signal(&self, signal: &str) {
        self.daemon.signal(signal);
    }

    /// Stops it where it runs, and starts it anew, empty.
    pub fn restart(&mut self) {
        self.stop();
        let _ = fs::remove_file(&self.address);
        self.daemon = Memcached::spawn(&self.folder, &self.arguments);
        wait_for("memcached again", || self.try_ask(b"version\r\n").is_some());
    }

    /// Sends commands and returns all that comes back until memcached closes.
    pub fn ask(&self, commands: impl AsRef<[u8]>) -> String {
        self.try_ask(commands.as_ref()).unwrap()
    }

    fn try_ask(&self, commands: &[u8]) -> Option<String> {
        let mut socket = connect(&self.address)?;
        socket.write_all(&[commands, b"quit\r\n"].concat()).ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        Some(answer)
    }
}

impl Drop for Memcached {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A connection to `host:port` or to a unix socket's path.
pub trait Stream: Read + Write {
    fn end(&self);
}

impl Stream for TcpStream {
    fn end(&self) {
        let _ = self.shutdown(std::net::Shutdown::Write);
    }
}

impl Stream for UnixStream {
    fn end(&self) {
        let _ = self.shutdown(std::net::Shutdown::Write);
    }
}

fn connect(address: &str) -> Option<Box<dyn Stream>> {
    Some(match address.starts_with('/') {
        true => Box::new(UnixStream::connect(address).ok()?),
        false => {
            let stream = TcpStream::connect(address).ok()?;
            stream.set_nodelay(true).ok()?;
            stream.set_read_timeout(Some(PATIENCE)).ok()?;
            Box::new(stream)
        }
    })
}

/// The ways to a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Front {
    /// The executable alone: environment and stdin.
    Bare,
    ApacheCgid,
    ApacheCgi,
    /// FastCGI, processes started by Apache, each with one request at a time.
    ApacheFcgid,
    /// FastCGI, one process for all buses, by spawn-fcgi; connections are kept.
    ApacheProxyFcgi,
    LighttpdCgi,
    /// FastCGI, a process for each bus, started by lighttpd; a connection for each request.
    LighttpdFastcgi,
    NginxFcgiwrap,
    /// FastCGI, one process for all buses, started as systemd does it; a connection for each request.
    NginxFastcgiOnce,
    /// FastCGI, one process for all buses, by spawn-fcgi; connections are kept.
    NginxFastcgiShared,
    /// The executable as a FastCGI server, persistent.
    NginxFastcgi,
}

/// Settings of a bus, by its name.
pub type Settings<'a> = &'a [(&'a str, &'a [(&'a str, &'a str)])];

/// A web server with a cgi-bin, and a memcached.
pub struct Site {
    pub front: Front,
    pub memcached: Memcached,
    folder: Folder,
    daemons: Vec<Daemon>,
    address: String,
    settings: Vec<(String, Vec<(String, String)>)>,
    pub workers: Mutex<Workers>,
    /// lighttpd, and the files that it knows as buses: it has to be started anew for others.
    lighttpd: Mutex<Option<(Vec<OsString>, Daemon)>>,
    /// Codes of the errors that clients were told.
    told: Mutex<Vec<String>>,
    /// What a server may say besides.
    foreseen: Mutex<Vec<String>>,
    /// Processes are killed: one may have logged what it then told nobody.
    kills: AtomicBool,
    /// What the bare executable wrote to stderr.
    stderr: Mutex<String>,
}

/// A reply, as any front gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| &value[..])
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Status and code of an error, or the status and "".
    pub fn outcome(&self) -> (u16, String) {
        let json: serde_json::Value = serde_json::from_slice(&self.body).unwrap_or_default();
        (self.status, json["error"].as_str().unwrap_or_default().into())
    }

    fn parse(bytes: &[u8]) -> Option<Reply> {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let mut lines = head.split("\r\n");
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.into()))
            .collect();
        let mut reply = Reply { status, headers, body: bytes[end + 4..].to_vec() };
        if reply.header("transfer-encoding") == Some("chunked") {
            reply.body = unchunk(&reply.body)?;
        }
        // What follows is the answer to what followed the request.
        if let Some(length) = reply.header("content-length").filter(|_| !reply.body.is_empty()) {
            let length = length.parse().unwrap();
            assert!(length <= reply.body.len(), "half a reply");
            reply.body.truncate(length);
        }
        Some(reply)
    }
}

fn unchunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|two| two == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).ok()?, 16).ok()?;
        let chunk = rest.get(line + 2..line + 2 + size)?;
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(chunk);
        rest = &rest[line + 2 + size + 2..];
    }
}

impl Site {
    pub fn start(front: Front) -> Site {
        Site::with(front, &[])
    }

    /// A site whose buses of these names exist already, with their settings, set by the server's own means.
    pub fn with(front: Front, settings: Settings) -> Site {
        Site::on(front, Memcached::start(&[]), settings)
    }

    pub fn on(front: Front, memcached: Memcached, settings: Settings) -> Site {
        let folder = Folder::new();
        fs::create_dir(folder.join("cgi-bin")).unwrap();
        let mut site = Site {
            front,
            memcached,
            folder,
            daemons: Vec::new(),
            address: String::new(),
            settings: Vec::new(),
            workers: Mutex::default(),
            lighttpd: Mutex::default(),
            told: Mutex::default(),
            kills: AtomicBool::new(false),
            // nginx, of large bodies and replies; Apache, lighttpd and systemd-socket-activate, that they started.
            foreseen: Mutex::new(
                ["is buffered to a temporary file", ":notice] [pid ", "(server.c.", " on fd 3", " as 3.", "Execing /"]
                    .map(String::from)
                    .to_vec(),
            ),
            stderr: Mutex::default(),
        };
        for (bus, _) in settings {
            site.copy(bus);
        }
        site.set(settings);
        site
    }

    /// Starts the web server, anew where it runs, with these settings.
    pub fn set(&mut self, settings: Settings) {
        let own = |list: &[(&str, &str)]| list.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        self.settings = settings.iter().map(|(bus, list)| ((*bus).into(), own(list))).collect();
        self.daemons.clear();
        drop(self.lighttpd.get_mut().unwrap().take());
        for left in ["pid", "nginx.sock", "fcgiwrap.sock", "shortbus.sock"] {
            let _ = fs::remove_file(self.folder.join(left));
        }
        match self.front {
            Front::Bare => {}
            Front::ApacheCgid => self.start_apache("event", "cgid"),
            Front::ApacheCgi => self.start_apache("prefork", "cgi"),
            Front::ApacheFcgid => self.start_apache_fastcgi(),
            Front::ApacheProxyFcgi => {
                self.start_process();
                self.start_apache_fastcgi();
            }
            Front::LighttpdCgi | Front::LighttpdFastcgi => {
                self.address = self.folder.join("lighttpd.sock").to_str().unwrap().into();
            }
            Front::NginxFcgiwrap => self.start_nginx(),
            Front::NginxFastcgiOnce | Front::NginxFastcgiShared => {
                self.start_process();
                self.start_nginx_shared();
            }
            Front::NginxFastcgi => self.start_nginx_fastcgi(),
        }
    }

    fn start_apache(&mut self, mpm: &str, cgi: &str) {
        let root = self.folder.0.display().to_string();
        let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        let mut settings = format!("SetEnv SHORTBUS_MEMCACHED {}\n", quoted(&self.memcached.address));
        for (bus, list) in &self.settings {
            settings.push_str(&format!("<Location /cgi-bin/{bus}>\n"));
            for (name, value) in list {
                settings.push_str(&format!("SetEnv {name} {}\n", quoted(value)));
            }
            settings.push_str("</Location>\n");
        }
        let socket = if cgi == "cgid" { format!("ScriptSock {root}/cgid.sock\n") } else { String::new() };
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/apache-example.conf");
        let config = format!("{socket}Define SHORTBUS_CGI_BIN {root}/cgi-bin\nInclude {example}\n{settings}");
        self.run_apache(mpm, &[cgi, "alias"], &config);
    }

    fn run_apache(&mut self, mpm: &str, modules: &[&str], rest: &str) {
        let root = self.folder.0.display().to_string();
        let user = if is_root() { "User nobody\nGroup nogroup\n" } else { "" };
        let mpm = format!("mpm_{mpm}");
        let modules: String = ([&mpm[..], "env", "authz_core", "authz_host"].iter().chain(modules))
            .map(|name| format!("LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n"))
            .collect();
        for _ in 0..20 {
            // Apache can't be given a port 0: let the kernel pick one, and try another where somebody took it since.
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let config = format!(
                "{modules}ServerRoot {root}\nServerName localhost\nListen 127.0.0.1:{port}\nPidFile {root}/pid\n\
                 ErrorLog {root}/error.log\nLogLevel warn\nDefaultRuntimeDir {root}\nTimeout 20\n{user}{rest}"
            );
            fs::write(self.folder.join("apache.conf"), config).unwrap();
            let mut command = Command::new("/usr/sbin/apache2");
            command.args(["-D", "FOREGROUND", "-f"]).arg(self.folder.join("apache.conf"));
            command.stderr(fs::File::create(self.folder.join("start.log")).unwrap());
            let mut daemon = Daemon::start(&mut command, "apache2-bin");
            self.address = format!("127.0.0.1:{port}");
            let mut up = false;
            wait_for("Apache", || {
                // The pid file is written after the port is bound; so what answers there is this Apache.
                up = self.folder.join("pid").exists() && connect(&self.address).is_some();
                up || !daemon.is_alive()
            });
            if up {
                self.daemons.push(daemon);
                return;
            }
            let log = self.folder.text("start.log") + &self.folder.text("error.log");
            assert!(log.contains("could not bind"), "Apache ended: {log}");
            fs::remove_file(self.folder.join("error.log")).ok();
        }
        panic!("Apache found no port");
    }

    fn start_nginx(&mut self) {
        let root = self.folder.0.display().to_string();
        let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        // The repository's example as it stands, but for where things are.
        let example = include_str!("../../examples/nginx.conf")
            .replace("/run/fcgiwrap.socket", &format!("{root}/fcgiwrap.sock"))
            .replace("root /usr/lib;", &format!("root {root};"))
            .replace("client_max_body_size 1m;", "client_max_body_size 0;");
        let location = |place: &str, list: &[(String, String)]| {
            let memcached = ("SHORTBUS_MEMCACHED".into(), self.memcached.address.clone());
            let default = if list.iter().any(|(name, _)| *name == memcached.0) { vec![] } else { vec![memcached] };
            let params: String = (list.iter().chain(&default))
                .map(|(name, value)| format!("fastcgi_param {name} {};\n", quoted(value)))
                .collect();
            let (block, _) = example.rsplit_once('}').unwrap();
            format!("{}{params}}}\n", block.replace("location /cgi-bin/ {", &format!("location {place} {{")))
        };
        let mut locations = location("/cgi-bin/", &[]);
        for (bus, list) in &self.settings {
            locations.push_str(&location(&format!("~ ^/cgi-bin/{bus}(/|$)"), list));
        }
        let log = || fs::OpenOptions::new().create(true).append(true).open(self.folder.join("start.log")).unwrap();
        let mut fcgiwrap = Command::new("fcgiwrap");
        fcgiwrap.args(["-c", "8", "-s", &format!("unix:{root}/fcgiwrap.sock")]).stderr(log());
        self.daemons.push(Daemon::start(&mut fcgiwrap, "fcgiwrap"));
        wait_for("fcgiwrap", || self.folder.join("fcgiwrap.sock").exists());
        self.run_nginx("", &locations);
    }

    fn run_nginx(&mut self, upstreams: &str, locations: &str) {
        let root = self.folder.0.display().to_string();
        let user = if is_root() { "user root;\n" } else { "" };
        let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("{name}_temp_path {root}/{name};\n"))
            .concat();
        fs::write(
            self.folder.join("nginx.conf"),
            format!(
                "{user}daemon off;\npid {root}/pid;\nerror_log {root}/error.log warn;\nworker_processes 1;\n\
                 events {{ worker_connections 512; }}\nhttp {{ access_log off; {temp} client_max_body_size 0; {upstreams}\n\
                 server {{ listen unix:{root}/nginx.sock; {locations} }} }}\n"
            ),
        )
        .unwrap();
        let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.join("start.log")).unwrap();
        let mut nginx = Command::new("/usr/sbin/nginx");
        nginx.args(["-e", &format!("{root}/error.log"), "-c", &format!("{root}/nginx.conf")]).stderr(log);
        let mut daemon = Daemon::start(&mut nginx, "nginx-light");
        self.address = format!("{root}/nginx.sock");
        wait_for("nginx", || {
            assert!(
                daemon.is_alive(),
                "nginx ended: {}",
                self.folder.text("start.log") + &self.folder.text("error.log")
            );
            connect(&self.address).is_some()
        });
        self.daemons.push(daemon);
    }

    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Where its cgi-bin's parent is, with Apache: `http://127.0.0.1:port/`.
    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    pub fn cgi_bin(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.folder.join("cgi-bin").join(name.as_ref())
    }

    /// `cp cgi-bin/shortbus .../name`.
    pub fn copy(&self, name: impl AsRef<OsStr>) {
        // By another process: a child that another thread forks just now would hold our file open for writing, and
        // then it can't be run (ETXTBSY).
        assert!(Command::new("cp").arg(executable()).arg(self.cgi_bin(name)).status().unwrap().success());
    }

    pub fn get(&self, target: &str) -> Reply {
        self.request("GET", target, &[], b"")
    }

    pub fn post(&self, target: &str, body: impl AsRef<[u8]>) -> Reply {
        self.request("POST", target, &[], body.as_ref())
    }

    /// Publishes, which has to work: the message's id.
    #[track_caller]
    pub fn publish(&self, bus: &str, user: u64, body: impl AsRef<[u8]>) -> u64 {
        let reply = self.post(&format!("{bus}?user={user}"), body);
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["id"].as_u64().unwrap()
    }

    /// Joins, which has to work: a user and the newest id.
    #[track_caller]
    pub fn join(&self, bus: &str) -> (u64, u64) {
        let reply = self.get(bus);
        assert_eq!(reply.status, 200, "{reply:?}");
        let json = reply.json();
        (json["user"].as_u64().unwrap(), json["id"].as_u64().unwrap())
    }

    /// Joins a signed bus, which has to work.
    #[track_caller]
    pub fn join_signed(&self, bus: &str) -> Signer {
        let reply = self.get(bus);
        assert_eq!(reply.status, 200, "{reply:?}");
        let json = reply.json();
        let text = |name: &str| json[name].as_str().unwrap_or_else(|| panic!("{name}: {json}")).to_owned();
        Signer { user: json["user"].as_u64().unwrap(), bus: text("bus"), secret: text("secret") }
    }

    /// What memcached counts of writes: as long as this stays, nothing was stored.
    pub fn writes(&self) -> String {
        let stats = self.memcached.ask("stats\r\n");
        let counts = ["cmd_set", "cmd_touch", "incr_hits", "total_items", "curr_items"];
        let lines = stats.lines().filter(|line| counts.iter().any(|count| line.contains(&format!("STAT {count} "))));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Does the same many times at the same moment: memcached stops until all are there.
    pub fn at_once<T: Send>(&self, times: usize, act: impl Fn(usize) -> T + Sync) -> Vec<T> {
        self.memcached.signal("STOP");
        thread::scope(|scope| {
            let all: Vec<_> = (0..times).map(|n| (n, &act)).map(|(n, act)| scope.spawn(move || act(n))).collect();
            thread::sleep(Duration::from_millis(100));
            self.memcached.signal("CONT");
            all.into_iter().map(|one| one.join().unwrap()).collect()
        })
    }

    /// One request to `/cgi-bin/` + `target`, with Content-Length where there is a body.
    pub fn request(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut head: Vec<(&str, &str)> = headers.to_vec();
        let length = body.len().to_string();
        if !body.is_empty() || method == "POST" {
            head.push(("Content-Length", &length));
        }
        self.raw(method, target, &head, body)
    }

    /// One request with these headers and these bytes behind them, whatever they say; then the client has no more
    /// to send.
    pub fn raw(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let reply = match self.front {
            Front::Bare => self.run(method, target, headers, body),
            _ => {
                if self.front == Front::NginxFastcgi {
                    self.ensure_worker(target);
                }
                self.send(method, target, headers, body).expect("a reply")
            }
        };
        let (_, code) = reply.outcome();
        if !code.is_empty() {
            self.told.lock().unwrap().push(code);
        }
        reply
    }

    /// Over HTTP; none where the server closes without a reply.
    pub fn send(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Reply> {
        let mut request = format!("{method} /cgi-bin/{target} HTTP/1.1\r\n");
        let given = |name| headers.iter().any(|(given, _)| *given == name);
        let defaults = [("Host", "localhost"), ("Connection", "close")];
        for (name, value) in defaults.iter().filter(|(name, _)| !given(*name)).chain(headers) {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");
        if self.front.is_lighttpd() {
            self.ensure_lighttpd();
        }
        let mut stream = connect(&self.address)?;
        stream.write_all(&[request.as_bytes(), body].concat()).ok();
        if headers.iter().any(|(name, value)| {
            *name == "Content-Length" && value.parse().is_ok_and(|length: usize| length > body.len())
        }) {
            stream.end();
        }
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        Reply::parse(&answer)
    }

    /// As a web server would run it: argv[0] the full path, a query without `=` as arguments.
    fn run(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let (name, info) = match path.find('/') {
            Some(slash) => path.split_at(slash),
            None => (path, ""),
        };
        let name = OsString::from(OsStr::from_bytes(&decode(name)));
        let mut command = Command::new(self.cgi_bin(&name));
        command
            .env_clear()
            .env("GATEWAY_INTERFACE", "CGI/1.1")
            .env("REQUEST_METHOD", method)
            .env("QUERY_STRING", query);
        command.env("HTTP_HOST", "localhost").env("SHORTBUS_MEMCACHED", &self.memcached.address);
        if !info.is_empty() {
            command.env("PATH_INFO", OsStr::from_bytes(&decode(info)));
        }
        if !query.contains('=') && !query.is_empty() {
            command.args(query.split('+').map(|word| OsString::from(OsStr::from_bytes(&decode(word)))));
        }
        for (name, value) in headers {
            let name = name.to_ascii_uppercase().replace('-', "_");
            let plain = ["CONTENT_LENGTH", "CONTENT_TYPE"].contains(&&name[..]);
            command.env(if plain { name } else { format!("HTTP_{name}") }, value);
        }
        for (_, list) in self.settings.iter().filter(|(bus, _)| name == OsStr::new(bus)) {
            command.envs(list.iter().map(|(name, value)| (name, value)));
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let output = thread::scope(|scope| {
            scope.spawn(move || stdin.write_all(body));
            child.wait_with_output().unwrap()
        });
        assert!(output.status.success(), "{output:?}");
        self.stderr.lock().unwrap().push_str(&String::from_utf8_lossy(&output.stderr));
        // Only a file called nph-... starts with a status line of its own.
        assert!(output.stdout.starts_with(b"Status: ") || name.as_bytes().starts_with(b"nph-"), "{output:?}");
        Reply::parse(&output.stdout).expect("a reply")
    }

    /// The error log, all servers' together.
    pub fn log(&self) -> String {
        let logs = ["error.log", "start.log", "process.log"].map(|name| self.folder.text(name));
        logs.concat() + &self.stderr.lock().unwrap()
    }

    /// Takes note of an error whose reply had no body to tell it.
    pub fn expect_error(&self, code: &str) {
        self.told.lock().unwrap().push(code.into());
    }

    /// Lines that hold this are no surprise in the log.
    pub fn foresee(&self, text: &str) {
        self.foreseen.lock().unwrap().push(text.into());
    }

    /// What a server says of a program that was killed, and what that said itself, are no surprise in the log.
    pub fn foresee_kills(&self) {
        self.foresee("End of script output before headers");
        self.foresee("Error writing request body to script");
        self.kills.store(true, Ordering::SeqCst);
    }

    /// The codes that the log tells of, or the first line that is not the bus's.
    fn logged(&self) -> Result<Vec<String>, String> {
        let mut codes = Vec::new();
        for line in self.log().lines().filter(|line| !line.trim().is_empty()) {
            if let Some((_, rest)) = line.split_once("shortbus: ") {
                codes.push(rest.split(": ").nth(1).unwrap_or_default().to_owned());
            } else if !self.foreseen.lock().unwrap().iter().any(|text| line.contains(text)) {
                return Err(line.into());
            }
        }
        codes.sort();
        Ok(codes)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{:?}: error log:\n{}", self.front, self.log());
            return;
        }
        let mut told = std::mem::take(&mut *self.told.lock().unwrap());
        told.sort();
        let deadline = Instant::now() + Duration::from_secs(5);
        let kills = self.kills.load(Ordering::SeqCst);
        while self.logged().map(|codes| if kills { in_both(codes, &told) } else { codes }).as_ref() != Ok(&told) {
            assert!(
                Instant::now() < deadline,
                "{:?}: clients were told {told:?}, but the log has {:?}:\n{}",
                self.front,
                self.logged(),
                self.log()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Those of `codes` that `told` has too, both sorted.
fn in_both(codes: Vec<String>, told: &[String]) -> Vec<String> {
    let mut told = told.iter().peekable();
    codes.into_iter().filter(|code| told.next_if_eq(&code).is_some()).collect()
}

/// A user of a signed bus, as a join gave it.
#[derive(Clone, Debug)]
pub struct Signer {
    pub user: u64,
    pub bus: String,
    pub secret: String,
}

impl Signer {
    pub fn sig(&self, time: u64, once: &str, body: impl AsRef<[u8]>) -> String {
        let head = format!("{}\n{}\n{time}\n{once}\n", self.bus, self.user);
        base64url_hmac(self.secret.as_bytes(), &[head.as_bytes(), body.as_ref()].concat())
    }

    /// The query of a signed publish.
    pub fn query(&self, time: u64, once: &str, body: impl AsRef<[u8]>) -> String {
        format!("user={}&once={once}&time={time}&sig={}", self.user, self.sig(time, once, body))
    }
}

pub fn base64url_hmac(key: &[u8], text: &[u8]) -> String {
    let mac = Hmac::<Sha256>::new_from_slice(key).unwrap().chain_update(text).finalize();
    Base64UrlUnpadded::encode_string(&mac.into_bytes())
}

/// The time as a signature has it.
pub fn unix_millis() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

/// Percent-decodes.
pub fn decode(text: &str) -> Vec<u8> {
    let mut bytes = text.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        let hex = (byte == b'%').then(|| [bytes.next().unwrap(), bytes.next().unwrap()]);
        let value = |hex: [u8; 2]| u8::from_str_radix(std::str::from_utf8(&hex).unwrap(), 16).unwrap();
        out.push(hex.map_or(byte, value));
    }
    out
}

/// Percent-encodes.
pub fn encode(name: &[u8]) -> String {
    name.iter().map(|byte| format!("%{byte:02X}")).collect()
}
