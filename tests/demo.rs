//! `make demo`, as a newcomer meets it: what it prints is pasted, and works.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};

/// A running `make demo` in a process group of its own, as a shell starts one.
struct Demo {
    child: Child,
    /// Kept open: what it prints at its end must go somewhere.
    _stdout: BufReader<ChildStdout>,
    address: String,
    printed: String,
    /// The lines to paste.
    lines: String,
}

impl Demo {
    fn start() -> Demo {
        Demo::run(Command::new("make").arg("demo"))
    }

    /// Where no memcached is installed: a namespace hides it.
    fn start_without_memcached() -> Demo {
        let script = "mount --bind /dev/null \"$(command -v memcached)\" && exec make demo";
        Demo::run(Command::new("unshare").args(["--mount", "--", "sh", "-c", script]))
    }

    fn run(command: &mut Command) -> Demo {
        let mut child = command
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env_remove("MAKEFLAGS")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut printed, mut lines) = (String::new(), String::new());
        let mut address = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        for line in stdout.by_ref().lines().map(Result::unwrap) {
            printed.push_str(&format!("{line}\n"));
            if let Some(bus) = line.trim_start().strip_prefix("BUS=http://") {
                address = bus.split('/').next().unwrap().into();
            }
            if line.starts_with("    ") {
                lines.push_str(&format!("{}\n", line.trim_start()));
            }
            // The last that it prints before it waits.
            if line.ends_with("hears the answer alone.") {
                break;
            }
        }
        Demo { child, _stdout: stdout, address, printed, lines }
    }

    fn folder(&self) -> Option<PathBuf> {
        let listen = format!("Listen {}\n", self.address);
        let folders = fs::read_dir("/tmp").unwrap().flatten().map(|entry| entry.path());
        folders
            .filter(|path| path.to_string_lossy().contains("shortbus-demo."))
            .find(|path| fs::read_to_string(path.join("apache.conf")).is_ok_and(|config| config.contains(&listen)))
    }

    fn interrupt(&self) {
        let group = format!("-{}", self.child.id());
        assert!(Command::new("kill").args(["-s", "INT", "--", &group]).status().unwrap().success());
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.interrupt();
            let _ = self.child.wait();
        }
    }
}

#[test]
fn two_demos_at_once_each_let_two_users_talk_and_leave_nothing_behind() {
    let demos = [Demo::start(), Demo::start_without_memcached()];
    assert_ne!(demos[0].address, demos[1].address);
    assert!(demos[0].printed.contains("The bus lives in a memcached of its own.\n"), "{}", demos[0].printed);
    assert!(demos[1].printed.contains("The bus lives in the file /tmp/"), "{}", demos[1].printed);
    for demo in &demos {
        assert!(demo.printed.contains(&format!("Open http://{}/cgi-bin/chat/ in a browser", demo.address)));
        let page =
            Command::new("curl").args(["-sS", &format!("http://{}/cgi-bin/chat/", demo.address)]).output().unwrap();
        assert!(String::from_utf8_lossy(&page.stdout).contains("</html>"));
        let pasted = Command::new("sh").args(["-c", &demo.lines]).output().unwrap();
        let printed = String::from_utf8(pasted.stdout).unwrap();
        let replies: Vec<serde_json::Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let [question, heard, answer, heard_back] = &replies[..] else { panic!("{}: {printed}", demo.lines) };
        assert_eq!(heard, &serde_json::json!([{"id": question["id"], "user": 1, "data": "Is anyone here?"}]));
        assert_eq!(
            heard_back,
            &serde_json::json!([{"id": answer["id"], "user": 2, "data": {"text": "I am", "tea": true}}])
        );
    }
    for mut demo in demos {
        let folder = demo.folder().expect("a folder while it runs");
        demo.interrupt();
        let status = demo.child.wait().unwrap();
        assert!(status.success() || status.signal() == Some(2), "Ctrl-C is how to end it: {status}");
        assert!(!folder.exists());
        assert!(TcpStream::connect(&demo.address).is_err());
    }
}
