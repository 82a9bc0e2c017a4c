//! A month in an hour: several sites at once, with publishers and readers of every kind, while what they stand on is
//! killed, stopped, held, emptied, filled and reloaded, their clocks are set and their connections cut, at random. At the
//! end each log is read: nothing acknowledged was lost untold, nothing came twice or in another order, nothing was told
//! as missed that was there, and nothing was published that was refused.
//!
//! `TEST_MONTH=<seconds> TEST_SEED=<n> cargo test month -- --nocapture`; a short one where that is not set. A run that
//! fails keeps its folders, each with what was done to its site in `faults.log`. The seed chooses the faults and the
//! messages; at which moment they meet is the machine's choice. The executable is static, and reads the clock without a
//! system call: no preloaded library sets its clock. So the code of the executable runs in this process by another
//! clock, beside the site's own processes and on the same store; users and browsers have theirs set.

mod browsers;
mod checker;
mod faults;
mod messages;
mod publishers;
mod readers;
mod sites;
mod slow;

use std::collections::BTreeMap;
use std::io::Error;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::fixtures::daemon::{is_root, keep_folders};
use crate::fixtures::fronts::Front;
use crate::fixtures::signer::unix_millis;
use crate::fixtures::site::Settings;
use browsers::Browsers;
use checker::Tally;
use faults::Fault;
use sites::Deployment;

/// How long the short form lasts, seconds.
const SHORT: u64 = 20;
/// How long everything may take to be well again behind the last fault: when the test gives up.
const RECOVERY: Duration = Duration::from_secs(120);
/// For how long a message lives on buses whose readers are away for longer now and then, seconds.
const BRIEF: u64 = 8;
/// For how long a request may still be at work after its client has given it up: stopped for three seconds, say.
const STRAGGLES: u64 = 15_000_000;
/// memcached goes by whole seconds: what comes right behind a flush_all may count as before it.
const FLUSH: u64 = 2_000_000;
/// How large a disk the local stores of a site have, bytes.
const DISK: u64 = 16 << 20;
/// The user, and first part of the text, of each bus's last message.
const CLOSER: u64 = 0xfff;

/// What a site stands on, and what is done to it.
struct Plan {
    front: Front,
    /// memcached's arguments; none where the buses are on the local store.
    memcached: Option<&'static [&'static str]>,
    /// Its memcached is restarted, flushed and away for a while.
    loses: bool,
    /// It is filled, too, and evicts.
    fills: bool,
    /// Its memcached is behind a proxy that is slow, and has no connection left, now and then.
    slows: bool,
    /// Seconds that a message of its open bus lives.
    ttl: u64,
}

#[rustfmt::skip]
const PLANS: [Plan; 6] = [
    Plan { front: Front::ApacheCgid, memcached: Some(&[]), loses: false, fills: false, slows: false, ttl: BRIEF },
    Plan { front: Front::ApacheProxyFcgi, memcached: None, loses: false, fills: false, slows: false, ttl: 60 },
    Plan { front: Front::NginxFastcgi, memcached: Some(&[]), loses: true, fills: false, slows: false, ttl: 60 },
    Plan { front: Front::NginxFcgiwrap, memcached: None, loses: false, fills: false, slows: false, ttl: BRIEF },
    Plan { front: Front::LighttpdFastcgi, memcached: Some(&["-m", "4"]), loses: true, fills: true, slows: false, ttl: 60 },
    Plan { front: Front::NginxFastcgiShared, memcached: Some(&["-c", "256"]), loses: false, fills: false, slows: true, ttl: 60 },
];

const SIGNED: &[(&str, &str)] = &[("SHORTBUS_AUTH", "signed")];
const BRIEFLY: &[(&str, &str)] = &[("SHORTBUS_TTL", "8")];
/// As CGI a poll waits, and a stream lasts, for so long only where a setting says so.
const SIGNED_WAIT: &[(&str, &str)] = &[("SHORTBUS_AUTH", "signed"), ("SHORTBUS_WAIT", "4")];
const BRIEFLY_WAIT: &[(&str, &str)] = &[("SHORTBUS_TTL", "8"), ("SHORTBUS_WAIT", "4")];

impl Plan {
    fn settings(&self) -> Settings<'static> {
        match (self.front, self.ttl) {
            (Front::ApacheCgid, _) => &[("open", BRIEFLY_WAIT), ("signed", SIGNED_WAIT)],
            (_, BRIEF) => &[("open", BRIEFLY), ("signed", SIGNED)],
            _ => &[("open", &[]), ("signed", SIGNED)],
        }
    }

    /// Polls may wait, and messages be streamed.
    fn waits(&self) -> bool {
        self.front.can_wait() || self.front == Front::ApacheCgid
    }

    /// Its buses have a disk of their own, which takes root to be there.
    fn has_disk(&self) -> bool {
        self.memcached.is_none() && is_root()
    }

    fn faults(&self) -> Vec<Fault> {
        use Fault::*;
        let mut faults = vec![Kill, Kill, Kill, End, Stop, Stop, Hold, Hold, Reload];
        faults.extend([Files, Crash].iter().filter(|fault| **fault != Crash || !self.front.is_lighttpd()));
        faults.extend([Slow, Slow, Crowd].iter().filter(|_| self.slows));
        faults.extend([Full].iter().filter(|_| self.has_disk()));
        faults.extend([Restart, Flush, Away].iter().filter(|_| self.loses));
        faults.extend([Fill, Fill].iter().filter(|_| self.fills));
        faults
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn percent(&mut self, share: u64) -> bool {
        self.below(100) < share
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }

    fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// What all share.
struct Month {
    seed: u64,
    began: Instant,
    /// No further fault begins.
    over: AtomicBool,
    /// When the last fault had ended, microseconds of the run.
    calm: AtomicU64,
    failed: AtomicBool,
    violations: Mutex<Vec<String>>,
    faults: Mutex<BTreeMap<Fault, usize>>,
    repeated: AtomicUsize,
    unanswered: AtomicUsize,
}

impl Month {
    /// Microseconds since the run began.
    fn now(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    fn fail(&self, what: String) {
        self.violations.lock().unwrap().push(format!("{:.3} s: {what}", self.now() as f64 / 1e6));
        self.failed.store(true, SeqCst);
    }

    fn count(&self, fault: Fault, times: usize) {
        *self.faults.lock().unwrap().entry(fault).or_default() += times;
    }

    fn is_calm(&self) -> bool {
        self.calm.load(SeqCst) != u64::MAX
    }

    /// Whether there is no use in going on: something is wrong, or `what` does not come about.
    fn is_lost(&self, what: impl Fn() -> String) -> bool {
        let calm = self.calm.load(SeqCst);
        if calm != u64::MAX && self.now() > calm + RECOVERY.as_micros() as u64 {
            self.fail(format!("{RECOVERY:?} after the last fault, and not yet: {}", what()));
        }
        self.failed.load(SeqCst)
    }
}

/// Ends the run where a thread panics, and keeps the folders.
struct Stops<'a>(&'a Month);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            keep_folders();
            self.0.failed.store(true, SeqCst);
        }
    }
}

fn run(month: &Month, sites: &[Deployment], duration: Duration) {
    let (browsers, told) = Browsers::start(month, sites);
    let browsers = &browsers;
    thread::scope(|scope| {
        let _stops = Stops(month);
        let (mut tormentors, mut publishers) = (vec![], vec![]);
        let mut number = 0;
        for (n, site) in sites.iter().enumerate() {
            for bus in &site.buses {
                for kind in site.kinds(bus) {
                    number += 1;
                    let listener = site.listener(bus, kind, number);
                    scope.spawn(move || listener.work());
                }
                publishers.extend((bus.plain..bus.plain + 3).map(|number| {
                    let publisher = site.publisher(bus, number);
                    scope.spawn(move || publisher.work())
                }));
            }
            tormentors.push(scope.spawn(move || site.torment(Random(month.seed << 20 | n as u64))));
        }
        publishers.push(scope.spawn(move || {
            browsers.work(Random(month.seed << 20 | 0x30000));
            Some(())
        }));
        scope.spawn(move || browsers.listen(told));
        scope.spawn(move || browsers.watch());
        let end = Instant::now() + duration;
        while Instant::now() < end && !month.failed.load(SeqCst) {
            thread::sleep(Duration::from_millis(50));
        }
        month.over.store(true, SeqCst);
        tormentors.into_iter().for_each(|tormentor| tormentor.join().unwrap());
        month.calm.store(month.now(), SeqCst);
        for publisher in publishers {
            publisher.join().unwrap();
        }
        for site in sites {
            for bus in &site.buses {
                site.close(bus);
            }
        }
    });
    let recovered = browsers.closed.load(SeqCst).saturating_sub(month.calm.load(SeqCst));
    println!(
        "browsers: {} sends given up; all hear {} ms after the last fault",
        browsers.failed.load(SeqCst),
        recovered / 1_000
    );
}

/// From now on nobody else sees what this thread, and what it starts, mounts; it goes with them.
fn see_mounts_alone() {
    // SAFETY: it takes no pointer, and changes what this thread sees alone.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0, "{}", Error::last_os_error());
    assert!(Command::new("mount").args(["--make-rprivate", "/"]).status().unwrap().success());
}

#[test]
fn nothing_is_lost_in_a_month() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let seed = number("TEST_SEED").unwrap_or_else(|| unix_millis() % 1_000_000);
    let month = Month {
        seed,
        began: Instant::now(),
        over: AtomicBool::new(false),
        calm: AtomicU64::new(u64::MAX),
        failed: AtomicBool::new(false),
        violations: Mutex::default(),
        faults: Mutex::default(),
        repeated: AtomicUsize::new(0),
        unanswered: AtomicUsize::new(0),
    };
    println!("TEST_SEED={seed}");
    if is_root() {
        see_mounts_alone();
    }
    let sites: Vec<Deployment> =
        PLANS.iter().enumerate().map(|(number, plan)| Deployment::start(&month, number, plan)).collect();
    run(&month, &sites, Duration::from_secs(number("TEST_MONTH").unwrap_or(SHORT)));

    let mut tally = Tally::default();
    for site in &sites {
        site.look();
        site.buses.iter().for_each(|bus| site.check(bus, &mut tally));
        let log = site.site.log() + &site.folder.text("start.log");
        log.lines().filter(|line| line.contains("panicked")).for_each(|line| month.fail(line.into()));
    }
    println!("{} s, {} sites, faults: {:?}", month.now() / 1_000_000, sites.len(), month.faults.lock().unwrap());
    println!(
        "{} messages acknowledged; {} heard by {} readers; {} sends repeated, {} requests without an answer",
        tally.acknowledged,
        tally.heard,
        tally.readers,
        month.repeated.load(SeqCst),
        month.unanswered.load(SeqCst),
    );
    println!("told that some were missed: {:?}, in all {} messages", tally.missed, tally.passed);
    println!("refused for certain, and not published: {:?}", tally.refused);
    let violations = month.violations.lock().unwrap();
    println!("violations: {}", violations.len());
    let first = violations.first().cloned();
    if first.is_some() {
        keep_folders();
        // The disk goes with this process.
        let keep = |site: &Deployment| {
            Command::new("cp").arg("-a").args(["store", "store.kept"].map(|name| site.root.join(name))).status()
        };
        sites.iter().for_each(|site| drop(keep(site)));
        sites.iter().for_each(|site| println!("kept: {} {}", site.root.display(), site.folder.path().display()));
        violations.iter().take(30).for_each(|violation| println!("{violation}"));
    } else {
        sites.iter().for_each(Deployment::end);
    }
    drop(sites);
    assert_eq!(first, None, "TEST_SEED={seed}");
}
