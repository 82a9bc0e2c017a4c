//! The examples that are no configurations: what people start from, on real servers.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;

use serde_json::json;

use crate::fixtures::daemon::{Daemon, wait_for};
use crate::fixtures::fronts::Front;
use crate::fixtures::site::Site;

const SIGNED: (&str, &str) = ("SHORTBUS_AUTH", "signed");
const CLIENT: &str = include_str!("../examples/client.py");

/// A Python program that has examples/client.py in it and the bus's URL as `url`.
struct Python(Child);

impl Python {
    fn start(site: &Site, program: &str) -> Python {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
        let head = format!("import sys; sys.path.insert(0, {examples:?}); url = '{}cgi-bin/chat'", site.url());
        let mut command = Command::new("python3");
        // -I and -S: nothing but the standard library. -B: no compiled file beside the example.
        command.args(["-I", "-S", "-B", "-c", &format!("{head}\nfrom client import *\n{program}")]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Python(command.spawn().unwrap_or_else(|error| panic!("python3: {error}; make test installs it")))
    }

    /// Waits until it prints something.
    fn until_it_prints(&mut self) {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty());
    }

    /// Lets it go on where it waits for `input()`.
    fn go_on(&mut self) {
        self.0.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    #[track_caller]
    fn succeed(self) {
        let output = self.0.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Ann and Bob make each call.
const CALLS: &str = r#"
import threading
missed = []
ann, bob = Bus(url), Bus(url, on_missed=lambda: missed.append(1))
assert ann.user != bob.user and bob.poll() == []

first = ann.publish({"move": "e4"})["id"]
assert bob.poll() == [{"id": first, "user": ann.user, "data": {"move": "e4"}}]
assert bob.last_id == first and bob.poll() == [] and ann.poll() == [] and ann.last_id == first

ids = ann.publish([1, "two", None], batch=True)["ids"]
assert [(each["id"], each["data"]) for each in bob.poll()] == list(zip(ids, [1, "two", None]))

def refused(*message, **options):
    try:
        ann.publish(*message, **options)
    except BusError as error:
        assert not error.again and bob.poll() == []
        return error.code

assert refused([1, "x" * 20_000], batch=True) == "too_large"
try:
    ann.publish(float("inf"))
except ValueError as error:
    assert "JSON" in str(error)
else:
    assert False, "JSON has no Infinity"
assert ann.publish("k", once="k") == ann.publish("k", once="k")
assert [each["data"] for each in bob.poll()] == ["k"]
assert refused("another", once="k") == "once_differs"

if "wait" in bob.offer:
    started = time.monotonic()
    assert bob.poll(wait=1) == [] and time.monotonic() - started > 0.9
    thread = threading.Thread(target=ann.publish, args=["soon"])
    thread.start()
    assert [each["data"] for each in bob.poll(wait=20)] == ["soon"]
    thread.join()

def say(number):
    if number == 1 and "secret" not in ann.offer:
        ann._request(f"?user={ann.user}", b'{"lines":\r\n [1,\n2]}')
    elif number == 1:
        ann.publish({"lines": [1, 2]})
    elif number == 2:
        ann.publish([3, 4], batch=True)

for offer in ["stream", "wait", None]:
    ann.publish("first")
    heard = []
    for message in bob.listen():
        heard.append(message["data"])
        if len(heard) == 4:
            break
        say(len(heard))
    assert heard == ["first", {"lines": [1, 2]}, 3, 4], (offer, heard)
    bob.offer.pop(offer, None)

assert not missed
for stream in [True, False]:
    bob.last_id, bob.offer["stream"] = 0, stream and "wait" in ann.offer
    assert next(bob.listen())["id"] == first
    assert len(missed) == 1
    missed.clear()
"#;

#[test]
fn the_python_client_makes_each_call() {
    for front in [Front::ApacheCgid, Front::ApacheProxyFcgi] {
        for settings in [&[][..], &[SIGNED]] {
            let site = Site::with(front, &[("chat", settings)]);
            // What it is refused, once each.
            site.expect_error("too_large");
            site.expect_error("once_differs");
            Python::start(&site, CALLS).succeed();
        }
    }
}

#[test]
fn the_python_client_sends_again_what_has_no_answer_and_it_is_published_once() {
    for settings in [&[][..], &[SIGNED]] {
        let site = Site::with(Front::ApacheCgid, &[("chat", settings)]);
        site.foresee_kills();
        let mut program =
            Python::start(&site, "bus = Bus(url); print('joined', flush=True); input(); bus.publish('hello')");
        program.until_it_prints();
        let id = site.join("chat").1;
        site.memcached.signal("STOP");
        program.go_on();
        wait_for("a failure", || site.log().contains("shortbus: chat: "));
        site.memcached.signal("CONT");
        program.succeed();
        let heard = site.get(&format!("chat?id={id}")).json();
        assert_eq!(heard.as_array().unwrap().len(), 1, "{heard}");
        assert_eq!(heard[0]["data"], "hello");
    }
}

#[test]
fn the_python_client_joins_again_where_a_signed_bus_has_lost_its_key() {
    let mut site = Site::with(Front::ApacheCgid, &[("chat", &[SIGNED])]);
    let mut program = Python::start(
        &site,
        "bus = Bus(url); user = bus.user; print('joined', flush=True); input(); bus.publish('hello')\n\
         assert bus.user != user and bus.users == {user, bus.user}",
    );
    program.until_it_prints();
    site.lose_all();
    site.expect_error("signature_wrong");
    program.go_on();
    program.succeed();
    assert_eq!(site.get("chat?id=0").json()[0]["data"], "hello");
}

#[test]
fn the_python_client_is_a_program_too_and_short() {
    assert!(CLIENT.lines().count() < 120, "{} lines", CLIENT.lines().count());
    let site = Site::start(Front::ApacheProxyFcgi);
    let program = |arguments: &[&str]| {
        let mut command = Command::new("python3");
        command.args(["-B", "examples/client.py", &format!("{}cgi-bin/chat", site.url())]).args(arguments);
        command.current_dir(env!("CARGO_MANIFEST_DIR")).stdout(Stdio::piped()).spawn().unwrap()
    };
    let mut listener = program(&[]);
    let mut lines = BufReader::new(listener.stdout.take().unwrap()).lines();
    let (sender, heard) = mpsc::channel();
    thread::spawn(move || sender.send(lines.next().unwrap().unwrap()));
    let mut line = String::new();
    wait_for("a message", || {
        // The listener may not have joined yet: then it hears the next one.
        assert!(program(&["{\"move\": \"e4\"}"]).wait().unwrap().success());
        line = heard.try_recv().unwrap_or_default();
        !line.is_empty()
    });
    listener.kill().unwrap();
    listener.wait().unwrap();
    let message: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(message["data"], json!({"move": "e4"}));
}

/// The indented lines of docs/recipes.md behind a line with this text, for this site.
fn recipe(site: &Site, after: &str) -> String {
    let (_, rest) = include_str!("../docs/recipes.md").split_once(after).expect(after);
    let lines = rest.lines().skip(1).skip_while(|line| !line.starts_with("    "));
    let lines: String =
        lines.take_while(|line| line.starts_with("    ")).map(|line| format!("{}\n", &line[4..])).collect();
    lines.replace("http://localhost/", &site.url())
}

/// Runs a program in examples/, with this on its stdin.
fn run(program: &str, arguments: &[&str], input: &str) -> String {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples"));
    command.env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{program}: {error}; make test installs it"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn shell_cron_and_php_publish_as_written() {
    let site = Site::start(Front::ApacheCgid);
    site.copy("dashboard");
    let (_, id) = site.join("dashboard");
    run("sh", &["-e"], &recipe(&site, "## Publish from a shell, from cron"));
    let cron = recipe(&site, "Every minute, in");
    run("sh", &["-e"], cron.strip_prefix("* * * * * nobody ").unwrap());
    run("sh", &["-e"], &recipe(&site, "To send again what had no"));
    run("php", &[], &format!("<?php\n{}", recipe(&site, "has the function:")));
    let printed = run(
        "php",
        &["publish.php", &format!("{}cgi-bin/dashboard", site.url()), "{\"name\": \"a\", \"value\": []}"],
        "",
    );
    let heard = site.get(&format!("dashboard?id={id}")).json();
    let told: Vec<_> = heard.as_array().unwrap().iter().map(|each| each["data"].clone()).collect();
    let load = told[1]["value"].as_f64().expect("a load");
    assert_eq!(
        told,
        [
            json!({"name": "load", "value": 0.7}),
            json!({"name": "load", "value": load}),
            json!({"name": "jobs", "value": 12}),
            json!({"name": "orders", "value": 17}),
            json!({"name": "a", "value": []}),
        ]
    );
    assert_eq!(printed, format!("{}\n", heard[4]["id"]));
}

#[test]
fn php_sends_again_what_had_no_answer_and_says_why_it_gives_up() {
    let site = Site::start(Front::ApacheCgid);
    site.copy("chat");
    site.foresee_kills();
    let (_, id) = site.join("chat");
    site.memcached.signal("STOP");
    let url = format!("{}cgi-bin/chat", site.url());
    thread::scope(|scope| {
        let sender = scope.spawn(|| run("php", &["publish.php", &url, "\"hello\""], ""));
        wait_for("a failure", || site.log().contains("shortbus: chat: "));
        site.memcached.signal("CONT");
        sender.join().unwrap();
    });
    let heard = site.get(&format!("chat?id={id}")).json();
    assert_eq!((heard.as_array().unwrap().len(), &heard[0]["data"]), (1, &json!("hello")));
    let refused =
        Command::new("php").args(["examples/publish.php", &url]).arg(format!("\"{}\"", "x".repeat(20_000))).output();
    let refused = refused.unwrap();
    let said = [refused.stdout, refused.stderr].concat();
    assert!(!refused.status.success() && String::from_utf8_lossy(&said).contains("SHORTBUS_MAX_BYTES"));
}

/// Runs a line of PHP that has the function and the bus's URL: what it prints, and whether it came to its end.
fn php(site: &Site, bus: &str, line: &str) -> (String, bool) {
    let code = format!("require 'examples/publish.php'; $bus = '{}cgi-bin/{bus}'; {line}", site.url());
    let output = Command::new("php").args(["-r", &code]).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    (String::from_utf8([output.stdout, output.stderr].concat()).unwrap(), output.status.success())
}

#[test]
fn php_gives_up_what_cannot_succeed() {
    let site = Site::with(Front::ApacheCgid, &[("unset", &[("SHORTBUS_TTL", "soon")])]);
    site.copy("chat");
    let (said, is_good) = php(&site, "unset", "publish($bus, 1);");
    assert!(!is_good && said.contains("SHORTBUS_TTL cannot be used"), "{said}");
    site.expect_error("bad_setting");
    let (said, is_good) = php(&site, "chat", r#"publish($bus, "\xff");"#);
    assert!(!is_good && said.contains("JsonException"), "{said}");
    assert_eq!(site.get("chat?id=0").text(), "[]");
    // Nobody is there.
    let (said, is_good) = php(&site, "chat", "publish('http://127.0.0.1:1/chat', 1, 2);");
    assert!(!is_good && said.contains("cannot be reached: status 0"), "{said}");
}

#[test]
fn php_comes_back_to_a_server_that_limits_it_when_it_may() {
    let site = Site::edited(Front::ApacheCgid, &[], |config, root| {
        let modules = ["rewrite", "headers"]
            .map(|name| format!("LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n"));
        let limit = format!("RewriteCond {root}/limited -f\nRewriteRule ^/cgi-bin/ - [R=429,L]\n");
        let retry_after = "Header always set Retry-After 3 \"expr=%{REQUEST_STATUS} == 429\"\n";
        let log = format!("CustomLog {root}/access.log \"%>s %{{msec}}t\"\n");
        format!("{}{config}\nRewriteEngine on\n{limit}{retry_after}{log}", modules.concat())
    });
    site.copy("chat");
    let id = site.join("chat").1;
    let limited = site.cgi_bin("../limited");
    fs::write(&limited, "").unwrap();
    let requests = || -> Vec<(u16, u64)> {
        let log = fs::read_to_string(site.cgi_bin("../access.log")).unwrap_or_default();
        let parts = log.lines().filter_map(|line| line.split_once(' '));
        parts.filter_map(|(status, millis)| Some((status.parse().ok()?, millis.parse().ok()?))).skip(1).collect()
    };
    thread::scope(|scope| {
        let sender = scope.spawn(|| php(&site, "chat", "echo publish($bus, 'hello');"));
        wait_for("a refusal", || requests().iter().any(|(status, _)| *status == 429));
        fs::remove_file(&limited).unwrap();
        let (said, is_good) = sender.join().unwrap();
        assert!(is_good && said.parse::<u64>().is_ok_and(|told| told > id), "{said}");
    });
    let requests = requests();
    assert!(requests.len() > 1 && requests.windows(2).all(|two| two[1].1 - two[0].1 >= 3_000), "{requests:?}");
}

#[test]
fn python_publishes_and_listens_as_written() {
    let site = Site::start(Front::ApacheProxyFcgi);
    let program = recipe(&site, "needs nothing but the standard library").replace("/dashboard", "/chat");
    let mut child = Command::new("python3");
    child.args(["-u", "-B", "-c", &program]).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples"));
    let mut child = child.stdout(Stdio::piped()).spawn().unwrap();
    wait_for("its message", || site.get("chat?id=0").text().contains("temperature"));
    site.publish("chat", 7, "[1, \"two\"]");
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(line, "7 [1, 'two']\n");
}

#[test]
fn a_shell_hears_all_in_order() {
    for front in [Front::ApacheCgid, Front::ApacheProxyFcgi] {
        let site = Site::start(front);
        site.copy("chat");
        let mut command = Command::new("examples/listen.sh");
        command.arg(format!("{}cgi-bin/chat", site.url())).current_dir(env!("CARGO_MANIFEST_DIR"));
        let mut listener = Daemon::start(command.stdout(Stdio::piped()), "curl");
        let lines = BufReader::new(listener.stdout()).lines();
        let (sender, heard) = mpsc::channel();
        thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let mut all = Vec::new();
        let mut sent = 0;
        wait_for("a hundred messages", || {
            sent += 1;
            site.publish("chat", 1, sent.to_string());
            for line in heard.try_iter() {
                let page: Vec<serde_json::Value> = serde_json::from_str(&line).unwrap();
                all.extend(page.iter().map(|each| each["data"].as_u64().unwrap()));
            }
            all.len() >= 100
        });
        let first = all[0];
        assert_eq!(all, (first..first + all.len() as u64).collect::<Vec<_>>(), "{front:?}");
    }
}
