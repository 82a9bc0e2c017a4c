//! The sites, their processes, and requests to them.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use shortbus::config::Config;
use shortbus::http::{self, request::Gateway};
use shortbus::limits;
use shortbus::stores::block_on;
use shortbus::variables::Variables;

use super::checker::Log;
use super::faults::{Fault, processes, signal};
use super::slow::Slow;
use super::{DISK, Month, Plan, Random};
use crate::fixtures::daemon::{Folder, PATIENCE, executable, wait_for};
use crate::fixtures::fastcgi_client::{END_REQUEST, STDOUT, request, take_record};
use crate::fixtures::fastcgi_server::Worker;
use crate::fixtures::fronts::Front;
use crate::fixtures::http_client::Reply;
use crate::fixtures::memcached::Memcached;
use crate::fixtures::site::{Site, on_the_local_store};
use crate::fixtures::stepped::SteppedBackend;

pub(super) struct Bus {
    pub(super) name: &'static str,
    pub(super) signed: bool,
    pub(super) settings: &'static [(&'static str, &'static str)],
    pub(super) ttl: u64,
    /// Its first publisher, which never sends anything again.
    pub(super) plain: u64,
    pub(super) log: Mutex<Log>,
    /// The last message is acknowledged.
    pub(super) closed: AtomicBool,
}

/// A FastCGI process that this test starts, again and again.
pub(super) struct Own {
    pub(super) program: PathBuf,
    pub(super) socket: PathBuf,
    pub(super) environment: Vec<(&'static str, String)>,
    pub(super) worker: Option<Worker>,
}

/// How a request gets to a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// By the web server.
    Front,
    /// As CGI, on the store of a site with FastCGI.
    Cgi,
    /// As FastCGI, on the store of a site with CGI.
    Fastcgi,
    /// In this process, where the wall clock is so many milliseconds ahead, or behind.
    Stepped(i64),
}

/// Steps of the wall clock, milliseconds: a few seconds, an hour, a day, a year.
pub(super) const STEPS: [i64; 8] =
    [5_000, -5_000, 3_600_000, -3_600_000, 86_400_000, -86_400_000, 31_536_000_000, -31_536_000_000];

/// A site, what it stands on, and what happens to it.
pub(super) struct Deployment<'a> {
    pub(super) month: &'a Month,
    pub(super) plan: &'static Plan,
    pub(super) site: Site,
    pub(super) memcached: Option<Mutex<Memcached>>,
    /// What leads to memcached.
    pub(super) slow: Option<Slow>,
    pub(super) root: PathBuf,
    pub(super) folder: Folder,
    pub(super) buses: Vec<Bus>,
    pub(super) own: Mutex<Vec<Own>>,
    /// When the store may have lost something: from, to; microseconds of the run.
    pub(super) losses: Mutex<Vec<(u64, u64)>>,
    /// The local store has a disk of its own.
    has_disk: bool,
    /// When that was full, there were too few file descriptors or connections, or memcached was slow.
    pub(super) scarce: Mutex<Vec<(Fault, u64, u64)>>,
    /// Processes that were asked to end.
    pub(super) ended: Mutex<Vec<String>>,
    /// What memcached counts of items that it gave up, and when it did.
    pub(super) evicted: Mutex<(u64, u64)>,
}

impl<'a> Deployment<'a> {
    pub(super) fn start(month: &'a Month, number: usize, plan: &'static Plan) -> Deployment<'a> {
        let settings = plan.settings();
        let memcached = plan.memcached.map(Memcached::start);
        let slow = memcached.as_ref().filter(|_| plan.slows).map(|memcached| Slow::start(&memcached.address));
        let mut site = None;
        match &memcached {
            None => on_the_local_store(|| site = Some(Site::with(plan.front, settings))),
            Some(memcached) => {
                // Of the site's own, so that it can be killed while the site is in use.
                let mut elsewhere = Memcached::absent();
                elsewhere.address = slow.as_ref().map_or_else(|| memcached.address.clone(), Slow::address);
                site = Some(Site::on(plan.front, elsewhere, settings));
            }
        }
        let site = site.unwrap();
        // What servers say of all this is not foreseen line by line.
        site.foresee("");
        site.foresee_kills();
        let bus = |n: usize| Bus {
            name: settings[n].0,
            signed: n > 0,
            settings: settings[n].1,
            ttl: if n == 0 { plan.ttl } else { limits::TTL_DEFAULT.into() },
            plain: (number * settings.len() + n) as u64 * 3,
            log: Mutex::default(),
            closed: AtomicBool::new(false),
        };
        let root = site.cgi_bin("open").parent().unwrap().parent().unwrap().to_owned();
        let deployment = Deployment {
            month,
            plan,
            memcached: memcached.map(Mutex::new),
            slow,
            folder: Folder::new(),
            buses: (0..settings.len()).map(bus).collect(),
            own: Mutex::default(),
            losses: Mutex::default(),
            scarce: Mutex::default(),
            ended: Mutex::default(),
            has_disk: plan.has_disk(),
            evicted: Mutex::default(),
            root,
            site,
        };
        if deployment.has_disk {
            deployment.mount();
        }
        deployment.take_over();
        deployment
    }

    /// Gives the local store a small disk of its own, as nobody else sees it.
    fn mount(&self) {
        let folder = self.root.join("store");
        let owner = fs::metadata(&folder).unwrap();
        let options = format!("size={DISK},uid={},mode={:o}", owner.uid(), owner.mode() & 0o7777);
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder);
        assert!(mount.status().unwrap().success(), "mount");
    }

    /// Starts the FastCGI processes that are not the web server's own.
    fn take_over(&self) {
        let store = self.site.store();
        let mut own = self.own.lock().unwrap();
        if self.plan.front.names_buses() {
            let variable = format!("{}={}", store.0, store.1);
            let is_ours = |path: &Path, exe: &Path| {
                let environ = fs::read(path.join("environ")).unwrap_or_default();
                exe == executable() && environ.split(|&byte| byte == 0).any(|pair| pair == variable.as_bytes())
            };
            // Its socket is there before it is.
            wait_for("the process", || !processes(is_ours).is_empty());
            signal("TERM", &processes(is_ours));
            wait_for("the process to end", || processes(is_ours).is_empty());
            let environment = vec![store.clone()];
            let (program, socket) = (self.site.cgi_bin("open"), self.root.join("shortbus.sock"));
            own.push(Own { program, socket, environment, worker: None });
        }
        if self.beside() == Way::Fastcgi {
            for bus in &self.buses {
                let settings = bus.settings.iter().map(|(name, value)| (*name, value.to_string()));
                let environment = settings.chain([store.clone()]).collect();
                let (program, socket) = (self.site.cgi_bin(bus.name), self.socket(bus));
                own.push(Own { program, socket, environment, worker: None });
            }
        }
        drop(own);
        self.revive();
    }

    /// How else than by the web server one gets to its buses.
    pub(super) fn beside(&self) -> Way {
        if self.plan.front.can_wait() { Way::Cgi } else { Way::Fastcgi }
    }

    fn socket(&self, bus: &Bus) -> PathBuf {
        self.folder.join(format!("{}.s", bus.name))
    }

    /// Starts those processes again that nobody else does.
    pub(super) fn revive(&self) {
        for own in self.own.lock().unwrap().iter_mut() {
            if own.worker.as_mut().is_some_and(|worker| worker.daemon.is_alive()) {
                continue;
            }
            let _ = fs::remove_file(&own.socket);
            let variables: Vec<(&str, &str)> =
                own.environment.iter().map(|(name, value)| (*name, &value[..])).collect();
            own.worker = Some(Worker::start(&own.program, own.socket.clone(), &self.folder, &variables));
            fs::set_permissions(&own.socket, fs::Permissions::from_mode(0o777)).unwrap();
        }
        if self.plan.front == Front::NginxFastcgi {
            self.site.workers.lock().unwrap().retain(|_, worker| worker.daemon.is_alive());
            self.buses.iter().for_each(|bus| self.site.ensure_worker(bus.name));
        }
    }

    /// The site's processes of the bus.
    pub(super) fn processes(&self) -> Vec<String> {
        processes(|_, exe| exe.starts_with(&self.root))
    }

    /// Asks all processes to end, which they do.
    pub(super) fn end(&self) {
        let pids = self.processes();
        signal("TERM", &pids);
        self.ended.lock().unwrap().extend(pids);
        self.wait_for_ended();
    }

    /// Waits for those that were asked to end.
    pub(super) fn wait_for_ended(&self) {
        let ended = self.ended.lock().unwrap();
        wait_for("the processes to end", || !self.processes().iter().any(|pid| ended.contains(pid)));
    }

    /// One request; none where there is no whole reply to it.
    pub(super) fn ask(&self, way: Way, method: &str, bus: &Bus, query: &str, body: &str) -> Option<Reply> {
        let asked = Instant::now();
        let reply = match way {
            Way::Front => {
                let length = body.len().to_string();
                let headers: &[(&str, &str)] = if method == "POST" { &[("Content-Length", &length)] } else { &[] };
                self.site.send(method, &format!("{}?{query}", bus.name), headers, body.as_bytes())
            }
            Way::Cgi => self.run(method, bus, query, body).and_then(|bytes| Reply::parse(&bytes)),
            Way::Stepped(ahead) => self.serve(method, bus, query, body, ahead),
            Way::Fastcgi => exchange(&self.socket(bus), method, query, body).and_then(|bytes| Reply::parse(&bytes)),
        };
        let reply = reply.filter(|reply| reply.status != 200 || serde_json::from_slice::<Value>(&reply.body).is_ok());
        if reply.is_none() {
            self.month.unanswered.fetch_add(1, SeqCst);
            if asked.elapsed() >= PATIENCE {
                self.month
                    .fail(format!("{:?} {}: no answer to {method} {query} by {way:?}", self.plan.front, bus.name));
            }
        }
        reply
    }

    /// The bare executable, as a web server would run it: what it wrote, unless it was killed.
    fn run(&self, method: &str, bus: &Bus, query: &str, body: &str) -> Option<Vec<u8>> {
        let mut command = Command::new(self.site.cgi_bin(bus.name));
        command.env_clear().envs(bus.settings.iter().copied()).envs([self.site.store()]);
        command.env("GATEWAY_INTERFACE", "CGI/1.1").env("HTTP_HOST", "localhost");
        command.env("REQUEST_METHOD", method).env("QUERY_STRING", query);
        command.env("CONTENT_LENGTH", body.len().to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(self.folder.start_log());
        let mut child = command.spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(body.as_bytes());
        let output = child.wait_with_output().unwrap();
        output.status.success().then_some(output.stdout)
    }

    /// The executable's own code in this process, as another clock has it run: what the executable would write.
    fn serve(&self, method: &str, bus: &Bus, query: &str, body: &str, ahead: i64) -> Option<Reply> {
        let (length, store) = (body.len().to_string(), self.site.store());
        let mut pairs = bus.settings.to_vec();
        pairs.extend([(store.0, &store.1[..]), ("GATEWAY_INTERFACE", "CGI/1.1"), ("HTTP_HOST", "localhost")]);
        pairs.extend([("REQUEST_METHOD", method), ("QUERY_STRING", query), ("CONTENT_LENGTH", &length)]);
        let variables: Variables = pairs.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect();
        let config = Config::read(&variables, &Variables::default(), bus.name.as_bytes(), 0);
        let backend = SteppedBackend(ahead * 1_000);
        let body = Ok(body.as_bytes().to_vec());
        let response = block_on(http::answer(&variables, Gateway::Cgi, config, body, &backend));
        self.month.count(Fault::Step, 1);
        Reply::parse(&response.to_cgi(false, false))
    }

    /// One of the ways to a bus. Where the store loses its counter, ids begin anew by the clock, and are to rise.
    pub(super) fn way(&self, random: &mut Random) -> Way {
        match random.below(if self.plan.loses { 3 } else { 4 }) {
            0 | 1 => Way::Front,
            2 => self.beside(),
            _ => Way::Stepped(random.choose(&STEPS)),
        }
    }

    /// Whether a reply that is not the one hoped for is one that these faults may cause.
    pub(super) fn pardon(&self, what: &str, status: u16, code: &str, asked: u64) {
        let now = self.month.now();
        let fits = match (status, code) {
            // The web server's own.
            (500.., "") => true,
            (409, "once_undecided") => true,
            (503, "memcached_unreachable" | "memcached_timeout") => self.memcached.is_some(),
            // Killed in the middle of an answer; cut; or it closed while there was more to read.
            (503, "memcached_broken") => {
                self.plan.loses || [Fault::Slow, Fault::Crowd].iter().any(|&fault| self.lacked(fault, asked, now))
            }
            (503, "memcached_crowded") => self.lacked(Fault::Crowd, asked, now),
            (503, "store_busy") => self.memcached.is_none(),
            (503, "store_full") => self.lacked(Fault::Full, asked, now),
            (503, "store_broken") => self.lacked(Fault::Files, asked, now),
            (503, "busy" | "outcome_unknown") => true,
            (503, "memcached_full") => self.plan.fills,
            _ => false,
        };
        if !fits {
            self.month.fail(format!("{:?}: {what} was answered {status} {code}", self.plan.front));
        }
        if self.plan.fills && ["memcached_full", "outcome_unknown"].contains(&code) {
            // An id may be used up.
            self.losses.lock().unwrap().push((asked, now));
        }
    }

    /// Joins, until that works: the reply, and when it was asked for; none where the run has failed.
    pub(super) fn join(&self, bus: &Bus) -> Option<(Value, u64)> {
        loop {
            let asked = self.month.now();
            match self.ask(Way::Front, "GET", bus, "", "") {
                Some(reply) if reply.status == 200 => return Some((reply.json(), asked)),
                Some(reply) => self.pardon("a join", reply.status, &reply.outcome().1, asked),
                None => {}
            }
            if self.month.is_lost(|| format!("a join of {:?} {}", self.plan.front, bus.name)) {
                return None;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Deployment<'_> {
    fn drop(&mut self) {
        if self.has_disk {
            let _ = Command::new("umount").arg("-l").arg(self.root.join("store")).status();
        }
    }
}

/// One request to a FastCGI process: what it answered, if it did.
pub(super) fn exchange(socket: &Path, method: &str, query: &str, body: &str) -> Option<Vec<u8>> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(&request(method, query, &[("HTTP_HOST", "localhost")], body.as_bytes())).ok()?;
    let (mut received, mut answer, mut buffer) = (vec![], vec![], vec![0; 65_536]);
    loop {
        while let Some((kind, _, content)) = take_record(&mut received) {
            match kind {
                STDOUT => answer.extend(content),
                END_REQUEST => return Some(answer),
                _ => {}
            }
        }
        match stream.read(&mut buffer).ok()? {
            0 => return None,
            length => received.extend_from_slice(&buffer[..length]),
        }
    }
}
