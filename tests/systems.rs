//! The one executable on other systems: in a chroot of their root file systems, by a web server of theirs, on the local store
//! and on a memcached of theirs.
//!
//! `TEST_SYSTEMS` names a folder of roots. Debian's, and one of busybox and musl without GNU's C library, are made there if
//! they are missing, by debootstrap and apt-get. Others are taken as they are, such as Alpine's, unpacked: their busybox
//! may be no web server, then the second one's is.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::fixtures::daemon::{Daemon, wait_for};
use crate::fixtures::fastcgi_client::Client;
use crate::fixtures::fastcgi_server::Worker;
use crate::fixtures::host::{Host, USER};

const DEBIAN: &str = "debootstrap --variant=minbase --include=busybox,memcached $0 $0.new";
const MUSL: &str = "mkdir -p $0.deb $0.new/dev $0.new/tmp; cd $0.deb; apt-get -qq download busybox-static musl
    for file in *.deb; do dpkg-deb -x $file ../$0.new; done; cd ..; rm -r $0.deb";
const MADE: [(&str, &str); 4] = [("bullseye", DEBIAN), ("bookworm", DEBIAN), ("trixie", DEBIAN), ("musl", MUSL)];

/// A host with a root of its own: nothing of it can be changed but what is mounted in it.
struct System {
    host: Host,
    /// As the host sees it.
    root: PathBuf,
    busybox: &'static str,
    has_memcached: bool,
}

impl System {
    fn new(root: &Path) -> System {
        let host = Host::new();
        let own = host.folder.join("root");
        let (root, r) = (root.canonicalize().unwrap(), own.display());
        let has = |path: &str| root.join(&path[1..]).exists();
        let lines = format!(
            "mkdir {r}; mount --bind {} {r}; mount -o remount,bind,ro {r}
             mount -t tmpfs -o mode=755 tmpfs {r}/dev; mkdir -m 1777 {r}/dev/shm; mount -t tmpfs tmpfs {r}/tmp
             mkdir {r}/tmp/cgi-bin; cp {}/chat {r}/tmp/cgi-bin; cp {r}/tmp/cgi-bin/chat {r}/tmp/cgi-bin/quiz
             cp {}/musl/bin/busybox {r}/tmp",
            root.display(),
            host.folder.path().display(),
            root.parent().unwrap().display()
        );
        host.sh(&lines);
        let (own_busybox, has_memcached) = (["/bin/busybox", "/usr/bin/busybox"], has("/usr/bin/memcached"));
        let mut system = System { host, root: own, busybox: "/tmp/busybox", has_memcached };
        let serves = |path: &&str| {
            let applets = system.command(path).arg("--list").output().unwrap().stdout;
            String::from_utf8(applets).unwrap().lines().any(|applet| applet == "httpd")
        };
        if let Some(path) = own_busybox.into_iter().filter(|path| has(path)).find(serves) {
            system.busybox = path;
        }
        system
    }

    /// A program of the system.
    fn command(&self, program: &str) -> Command {
        let mut command = self.host.command(0, "/usr/sbin/chroot");
        command.arg(format!("--userspec={USER}:{USER}")).arg(&self.root).arg(program).env_clear();
        command
    }

    /// What it prints, and whether it ends well.
    fn run(&self, arguments: &[&str], settings: &[(&str, &str)]) -> (String, bool) {
        let output = self.command("/tmp/cgi-bin/quiz").args(arguments).envs(settings.iter().copied()).output().unwrap();
        (String::from_utf8([output.stdout, output.stderr].concat()).unwrap(), output.status.success())
    }

    /// Joins, publishes, repeats, publishes a batch, and hears it all, by a web server with these settings.
    fn talk(&self, bus: &str, port: &str, settings: &[(&str, &str)]) {
        let listen = format!("127.0.0.1:{port}");
        let mut command = self.command(self.busybox);
        command.args(["httpd", "-f", "-p", &listen, "-h", "/tmp"]).envs(settings.iter().copied());
        let _server = Daemon::start(&mut command, "busybox");
        let curl = |query: &str, body: &[&str]| {
            let mut command = self.host.command(USER, "/usr/bin/curl");
            command.args(["-sS", "--max-time", "10", &format!("http://{listen}/cgi-bin/{bus}?{query}")]).args(body);
            command.output().unwrap()
        };
        let ask = |query: &str, body: &[&str]| -> Value {
            let output = curl(query, body);
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{query}: {output:?}"))
        };
        wait_for("busybox", || curl("", &[]).status.success());
        let start = ask("", &[])["id"].as_u64().unwrap();
        let hello = ask("user=1&once=k", &["-d", "\"hello\""]);
        assert_eq!(ask("user=1&once=k", &["-d", "\"hello\""]), hello);
        let batch = ask("user=1&batch=1", &["-d", "[1,2]"]);
        let message = |id: &Value, data: Value| json!({"id": id, "user": 1, "data": data});
        let ids = &batch["ids"];
        let all =
            json!([message(&hello["id"], json!("hello")), message(&ids[0], json!(1)), message(&ids[1], json!(2))]);
        assert_eq!(ask(&format!("user=2&id={start}"), &[]), all);
        assert_eq!(ask(&format!("user=1&id={start}"), &[]), json!([]));
    }

    /// As a process that stays, with a stream.
    fn stream(&self) {
        let worker = Worker::run(&mut self.command("/tmp/cgi-bin/chat"), self.host.folder.join("s"), &self.host.folder);
        let mut stream = Client::connect(&worker.socket);
        stream.ask("GET", "stream=1&id=1", &[], b"").until("event: cursor");
        let publish = Client::connect(&worker.socket).ask("POST", "user=1", &[], b"\"to the stream\"").answer().reply;
        assert_eq!(publish.status, 200, "{publish:?}");
        stream.until("\"to the stream\"");
    }

    /// Returns what is worth telling.
    fn memcached(&self) -> String {
        if !self.has_memcached {
            return "no memcached".into();
        }
        let output = self.command("/usr/bin/memcached").arg("-V").output().unwrap();
        let version = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        let mut command = self.command("/usr/bin/memcached");
        let _memcached = Daemon::start(command.args(["-l", "127.0.0.1", "-p", "11211"]), "memcached");
        let settings = [("SHORTBUS_MEMCACHED", "127.0.0.1:11211")];
        let check = || self.run(&["--check"], &settings);
        wait_for("memcached", || !check().0.contains("refused"));
        let (told, is_well) = check();
        let patch: u32 = version.rsplit('.').next().unwrap().parse().unwrap();
        assert_eq!(version.starts_with("memcached 1.6.") && patch >= 10, is_well, "{version}: {told}");
        if is_well {
            self.talk("quiz", "8081", &settings);
            return version;
        }
        assert!(told.contains("1.6.10"), "{told}");
        format!("{version} is refused as too old")
    }
}

fn name_of(root: std::fs::DirEntry) -> String {
    root.file_name().into_string().unwrap()
}

#[test]
#[ignore = "makes root file systems by debootstrap in the folder TEST_SYSTEMS, or takes those that are there"]
fn the_executable_works_on_other_systems() {
    let folder = PathBuf::from(std::env::var("TEST_SYSTEMS").expect("TEST_SYSTEMS"));
    std::fs::create_dir_all(&folder).unwrap();
    for (name, script) in MADE.iter().filter(|(name, _)| !folder.join(name).exists()) {
        let script = format!("set -eu; rm -rf $0.new; {script}; mv $0.new $0");
        let made = Command::new("sh").args(["-c", &script, name]).current_dir(&folder).output().unwrap();
        assert!(made.status.success(), "{name}: {made:?}");
    }
    let mut names: Vec<String> = std::fs::read_dir(&folder).unwrap().map(|root| name_of(root.unwrap())).collect();
    names.sort();
    for name in names {
        let system = System::new(&folder.join(&name));
        let version = system.run(&["--version"], &[]);
        assert_eq!(version, (format!("shortbus {}\n", env!("CARGO_PKG_VERSION")), true), "{name}");
        let (told, is_well) = system.run(&["--check"], &[]);
        assert!(is_well && told.ends_with("\nok\n"), "{name}: {told}");
        system.talk("chat", "8080", &[]);
        system.stream();
        println!("{name}, {}: {}", system.busybox, system.memcached());
    }
}
