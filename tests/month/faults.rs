//! What is done to a site, at random.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::MutexGuard;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

use super::sites::Deployment;
use super::slow::crowd;
use super::{FLUSH, Random, Stops};
use crate::fixtures::daemon::{PATIENCE, wait_for};
use crate::fixtures::memcached::Memcached;
use crate::fixtures::site::Hold;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// SIGKILL to processes of the bus.
    Kill,
    /// SIGTERM.
    End,
    /// SIGSTOP, and SIGCONT after three seconds at most.
    Stop,
    /// The store takes no write for a while.
    Hold,
    /// The web server reads its configuration anew.
    Reload,
    /// memcached is killed, and another one started at once.
    Restart,
    Flush,
    /// memcached is killed, and another one started after a while.
    Away,
    /// Others fill memcached.
    Fill,
    /// The local store's disk is full for a while.
    Full,
    /// What leads to memcached delays, stalls or cuts.
    Slow,
    /// memcached has no connection left.
    Crowd,
    /// File descriptors run out.
    Files,
    /// The web server restarts, with all its connections: Apache as a whole, nginx's worker.
    Crash,
    /// The wall clock is set, of a process that answers one request or of a browser.
    Step,
    /// A client leaves in the middle of a request or a stream, or a browser's connection is cut.
    Cut,
}

/// Processes that go on when this is dropped.
pub(super) struct Stopped(Vec<String>);

impl Drop for Stopped {
    fn drop(&mut self) {
        signal("CONT", &self.0);
    }
}

/// A memcached that goes on when this is dropped.
pub(super) struct Silent<'a>(MutexGuard<'a, Memcached>);

impl Drop for Silent<'_> {
    fn drop(&mut self) {
        self.0.signal("CONT");
    }
}

pub(super) fn signal(name: &str, pids: &[String]) {
    if !pids.is_empty() {
        let _ = Command::new("kill").args(["-s", name]).args(pids).stderr(Stdio::null()).status();
    }
}

/// The processes whose executable is one of these, by pid.
pub(super) fn processes(is_one: impl Fn(&Path, &Path) -> bool) -> Vec<String> {
    let pids = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let pids = pids.filter(|path| fs::read_link(path.join("exe")).is_ok_and(|exe| is_one(path, &exe)));
    pids.map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
}

impl Deployment<'_> {
    /// Some of them, at most so many. With a store that is held they are between a request and its reply.
    fn some(&self, random: &mut Random, most: u64) -> Vec<String> {
        let mut all = self.processes();
        let count = random.below(most) as usize + 1;
        while all.len() > count {
            all.remove(random.below(all.len() as u64) as usize);
        }
        all
    }

    fn hold(&self) -> (Option<Hold<'_>>, Option<Silent<'_>>) {
        let silent = self.memcached.as_ref().map(|memcached| {
            let memcached = memcached.lock().unwrap();
            memcached.signal("STOP");
            Silent(memcached)
        });
        (silent.is_none().then(|| self.site.hold()), silent)
    }

    /// Does what makes the store lose something, until so long after it.
    fn lose(&self, after: u64, act: impl FnOnce(&mut Memcached)) {
        let start = self.month.now();
        self.losses.lock().unwrap().push((start, u64::MAX));
        act(&mut self.memcached.as_ref().unwrap().lock().unwrap());
        let mut losses = self.losses.lock().unwrap();
        losses.iter_mut().find(|(from, to)| (*from, *to) == (start, u64::MAX)).unwrap().1 = self.month.now() + after;
    }

    /// Whether the store may have lost something between these moments.
    pub(super) fn lost(&self, from: u64, to: u64) -> bool {
        self.losses.lock().unwrap().iter().any(|&(start, end)| start <= to && from <= end)
    }

    /// Whether something was scarce at some moment between these.
    pub(super) fn lacked(&self, what: Fault, from: u64, to: u64) -> bool {
        self.scarce.lock().unwrap().iter().any(|&(fault, start, end)| fault == what && start <= to && from <= end)
    }

    /// Takes note of what memcached has given up since the last look.
    pub(super) fn look(&self) {
        let Some(memcached) = &self.memcached else { return };
        let stats = memcached.lock().unwrap().ask("stats\r\n");
        let now = self.month.now();
        let names = ["evictions", "slab_reassign_evictions_nomem", "slab_reassign_inline_reclaim"];
        let names = names.iter().chain(&["slab_reassign_busy_deletes"]);
        let count = |name: &&str| {
            stats.lines().find_map(|line| line.strip_prefix(&format!("STAT {name} "))?.trim().parse::<u64>().ok())
        };
        let sum = names.filter_map(count).sum();
        let (before, at) = std::mem::replace(&mut *self.evicted.lock().unwrap(), (sum, now));
        if sum != before {
            self.losses.lock().unwrap().push((at, now));
        }
    }

    /// Does one thing after the other to this site, until the month is over.
    pub(super) fn torment(&self, mut random: Random) {
        let _stops = Stops(self.month);
        let faults = self.plan.faults();
        while !self.month.over.load(SeqCst) && !self.month.failed.load(SeqCst) {
            thread::sleep(random.millis(50, 800));
            self.look();
            let fault = random.choose(&faults);
            let times = self.inflict(fault, &mut random);
            self.month.count(fault, times);
        }
        self.look();
        // They answer what they have begun before they end.
        self.wait_for_ended();
        self.revive();
    }

    /// Does it: how often, or to how many.
    fn inflict(&self, fault: Fault, random: &mut Random) -> usize {
        let begun = self.month.now();
        let mut times = 1;
        let is_scarcity = [Fault::Slow, Fault::Crowd, Fault::Full, Fault::Files].contains(&fault);
        if is_scarcity {
            self.scarce.lock().unwrap().push((fault, begun, u64::MAX));
        }
        match fault {
            Fault::Kill | Fault::End => {
                let hold = random.percent(50).then(|| self.hold());
                thread::sleep(random.millis(0, 30));
                let pids = self.some(random, 3);
                signal(if fault == Fault::Kill { "KILL" } else { "TERM" }, &pids);
                if fault == Fault::End {
                    self.ended.lock().unwrap().extend(pids.iter().cloned());
                }
                drop(hold);
                thread::sleep(random.millis(0, 300));
                self.revive();
                times = pids.len();
            }
            Fault::Stop => {
                let hold = random.percent(50).then(|| self.hold());
                thread::sleep(random.millis(0, 30));
                let stopped = Stopped(self.some(random, 3));
                signal("STOP", &stopped.0);
                drop(hold);
                thread::sleep(random.millis(1, 3_000));
                times = stopped.0.len();
            }
            Fault::Hold => {
                let _hold = self.hold();
                thread::sleep(random.millis(1, 2_500));
            }
            Fault::Reload => {
                let name = if self.plan.front.is_nginx() { "HUP" } else { "USR1" };
                signal(name, &[self.site.server_pid().to_string()]);
            }
            Fault::Restart => self.lose(0, Memcached::restart),
            Fault::Flush => self.lose(FLUSH, |memcached| drop(memcached.ask("flush_all\r\n"))),
            Fault::Away => {
                let pause = random.millis(1, 2_000);
                self.lose(0, |memcached| {
                    memcached.stop();
                    thread::sleep(pause);
                    memcached.restart();
                });
            }
            Fault::Fill => self.lose(0, |memcached| {
                let item = |n: u64| {
                    let size = [50, 200, 700, 3_000, 12_000][n as usize % 5];
                    format!("set fill{n} 0 1 {size} noreply\r\n{}\r\n", "y".repeat(size))
                };
                memcached.ask((0..4_000).map(item).collect::<String>());
            }),
            Fault::Slow => {
                let (slow, lasts) = (self.slow.as_ref().unwrap(), random.millis(1, 2_500));
                match random.below(3) {
                    0 => slow.cut(1 + random.below(5), lasts),
                    1 => slow.delay(random.millis(1, 300), lasts),
                    _ => slow.delay(PATIENCE, lasts),
                };
            }
            Fault::Crowd => {
                let address = self.memcached.as_ref().unwrap().lock().unwrap().address.clone();
                let taken = crowd(Path::new(&address));
                thread::sleep(random.millis(1, 1_500));
                drop(taken);
                // It takes them back one by one.
                let memcached = || self.memcached.as_ref().unwrap().lock().unwrap();
                let answers = || memcached().try_ask(b"stats\r\n").is_some_and(|stats| stats.contains("STAT pid"));
                wait_for("a connection", answers);
            }
            Fault::Full => {
                let path = self.root.join("store/theirs");
                let mut file = fs::File::create(&path).unwrap();
                let end = Instant::now() + random.millis(1, 2_500);
                while Instant::now() < end {
                    // What the bus gives back, too.
                    while [65_536, 1].iter().any(|&size| file.write(&vec![1; size]).is_ok()) {}
                    thread::sleep(Duration::from_millis(5));
                }
                // Another thread's child, just forked, may have it open still.
                file.set_len(0).unwrap();
                fs::remove_file(path).unwrap();
            }
            Fault::Files => {
                let pids = self.some(random, 3);
                let prlimit = |pid: &String, what: &str| {
                    let mut prlimit = Command::new("prlimit");
                    prlimit.args(["--raw", "--noheadings", "--output=SOFT", "--pid", pid, what]);
                    prlimit.output().ok().filter(|output| output.status.success()).map(|output| output.stdout)
                };
                let files = |pid: &String| fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count) as u64;
                let least = random.below(4);
                let limits: Vec<_> = pids.iter().map(|pid| prlimit(pid, "--nofile")).collect();
                let limit = |pid: &&String| prlimit(pid, &format!("--nofile={}:", files(pid) + least)).is_some();
                times = pids.iter().filter(limit).count();
                thread::sleep(random.millis(1, 2_000));
                for (pid, soft) in pids.iter().zip(limits) {
                    let soft = soft.map(|soft| String::from_utf8(soft).unwrap()).unwrap_or_default();
                    prlimit(pid, &format!("--nofile={}:", soft.trim()));
                }
            }
            Fault::Crash => {
                let server = self.site.server_pid().to_string();
                if self.plan.front.is_apache() {
                    signal("HUP", &[server]);
                } else {
                    let workers = fs::read_to_string(format!("/proc/{server}/task/{server}/children")).unwrap();
                    signal("KILL", &workers.split_whitespace().map(String::from).collect::<Vec<_>>());
                }
            }
            Fault::Step | Fault::Cut => unreachable!("by the clients"),
        }
        if is_scarcity {
            self.scarce.lock().unwrap().last_mut().unwrap().2 = self.month.now();
        }
        let line = format!("{begun} to {} us: {fault:?} {times}\n", self.month.now());
        let file = fs::File::options().create(true).append(true).open(self.root.join("faults.log"));
        file.unwrap().write_all(line.as_bytes()).unwrap();
        times
    }
}
