//! Servers beside those of the scenarios: what a bus needs of them, and what they cannot do, as docs/servers.md tells it.

use std::fs;
use std::net::TcpListener;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::fixtures::daemon::{Daemon, Folder, executable, wait_for};
use crate::fixtures::http_client::{Reply, connect, exchange, send};
use crate::servers::Listener;

/// A server with a bus called `chat`, in a folder of its own, where the bus lives too.
struct Server {
    folder: Folder,
    /// They end with it.
    _daemons: Vec<Daemon>,
    address: String,
}

impl Server {
    fn ask(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let length = body.len().to_string();
        let mut all = headers.to_vec();
        if !body.is_empty() {
            all.push(("Content-Length", &length));
        }
        let path = format!("/cgi-bin/chat{target}");
        exchange(&self.address, method, &path, &all, body.as_bytes()).expect("a reply")
    }

    fn log(&self) -> String {
        self.folder.text("start.log")
    }
}

/// BusyBox takes no unix socket, and no port 0: the kernel picks one, and another if somebody takes that before.
fn busybox() -> Server {
    let folder = Folder::new();
    fs::create_dir(folder.join("cgi-bin")).unwrap();
    fs::create_dir(folder.join("store")).unwrap();
    assert!(Command::new("cp").arg(executable()).arg(folder.join("cgi-bin/chat")).status().unwrap().success());
    for _ in 0..20 {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let mut command = Command::new("busybox");
        command.args(["httpd", "-f", "-p", &address, "-h"]).arg(folder.path()).stderr(folder.start_log());
        command.env("SHORTBUS_STORE", folder.join("store")).env("SHORTBUS_WAIT", "20");
        let mut daemon = Daemon::start(&mut command, "busybox");
        let mut is_up = false;
        wait_for("busybox httpd", || {
            is_up = connect(&address).is_some();
            is_up || !daemon.is_alive()
        });
        if is_up && daemon.is_alive() {
            return Server { folder, _daemons: vec![daemon], address };
        }
    }
    panic!("busybox httpd found no port");
}

/// By the line in docs/servers.md, but for where things are.
fn uwsgi() -> Server {
    let folder = Folder::new();
    for name in ["cgi-bin", "store"] {
        fs::create_dir(folder.join(name)).unwrap();
    }
    assert!(Command::new("cp").arg(executable()).arg(folder.join("cgi-bin/chat")).status().unwrap().success());
    let (_, line) = include_str!("../docs/servers.md").split_once("`uwsgi-core ").unwrap();
    let line = line.split('`').next().unwrap();
    let address = folder.join("uwsgi.sock").display().to_string();
    assert!(line.contains(" :8080 ") && line.contains("=/usr/lib/cgi-bin ") && line.ends_with("--cgi-timeout 30"));
    let line = line.replace(":8080", &address).replace("/usr/lib", folder.path().to_str().unwrap());
    // So that what it cannot do ends sooner; a stream is not silent for so long here.
    let line = line.replace("--cgi-timeout 30", "--cgi-timeout 5");
    let mut command = Command::new("uwsgi-core");
    command.args(line.split(' ')).stderr(folder.start_log()).stdout(Stdio::null());
    command.env("SHORTBUS_STORE", folder.join("store")).env("SHORTBUS_WAIT", "20");
    let mut daemon = Daemon::start(&mut command, "uwsgi-core");
    wait_for("uWSGI", || {
        assert!(daemon.is_alive(), "{}", folder.text("start.log"));
        connect(&address).is_some()
    });
    Server { folder, _daemons: vec![daemon], address }
}

/// The client, asked for by a browser that has it.
fn status_of_known_client(server: &Server) -> u16 {
    let client = server.ask("GET", "/shortbus.js", &[], "");
    server.ask("GET", "/shortbus.js", &[("If-None-Match", client.header("etag").unwrap())], "").status
}

/// What every server has to let through.
fn a_bus_is_served(server: &Server) -> u64 {
    let start = server.ask("GET", "", &[], "").json()["id"].as_u64().unwrap();
    let reply = server.ask("POST", "?user=1&once=a", &[], "{\"a\": [1, \"\u{e9}\"]}");
    let id = reply.json()["id"].as_u64().unwrap();
    assert_eq!(server.ask("POST", "?user=1&once=a", &[], "{\"a\": [1, \"\u{e9}\"]}").text(), reply.text());
    let poll = server.ask("GET", &format!("?user=2&id={start}"), &[], "");
    assert_eq!(poll.text(), format!("[{{\"id\":{id},\"user\":1,\"data\":{{\"a\": [1, \"\u{e9}\"]}}}}]"));
    assert_eq!(poll.header("shortbus-last-id"), Some(&id.to_string()[..]));
    assert_eq!(poll.header("content-type"), Some("application/json"));
    assert_eq!(server.ask("GET", &format!("?user=1&id={start}"), &[], "").text(), "[]");
    let batch = server.ask("POST", "?user=3&batch=1", &[], "[1, \"two\"]").json();
    assert_eq!(batch["ids"].as_array().unwrap().len(), 2);
    let long = format!("\"{}\"", "x".repeat(10_000));
    assert_eq!(server.ask("POST", "?user=1", &[("Content-Type", "application/json")], &long).status, 200);
    // Errors, each with its status and reason.
    for (method, target, headers, body, status, code) in [
        ("POST", "?user=1", &[][..], "nonsense", 400, "not_json"),
        ("POST", "?user=1", &[], &format!("\"{}\"", "x".repeat(20_000)), 413, "too_large"),
        ("PUT", "", &[], "1", 405, "bad_method"),
        ("GET", "/nothing", &[], "", 404, "unknown_path"),
        ("GET", "?id=-1", &[], "", 400, "bad_parameter"),
        ("POST", "?user=1", &[("Origin", "http://elsewhere.example")], "1", 403, "foreign_origin"),
        ("POST", "?user=1", &[("Sec-Fetch-Site", "cross-site")], "1", 403, "foreign_origin"),
    ] {
        let reply = server.ask(method, target, headers, body);
        assert_eq!(reply.outcome(), (status, code.into()), "{method} {target}: {reply:?}");
    }
    assert_eq!(server.ask("POST", "?user=1", &[("Origin", "http://localhost")], "1").status, 200);
    assert_eq!(server.ask("OPTIONS", "", &[], "").status, 204);
    let client = server.ask("GET", "/shortbus.js", &[], "");
    assert_eq!(client.header("content-type"), Some("text/javascript; charset=utf-8"));
    start
}

fn events_come_at_once(server: &Server, start: u64) {
    assert_eq!(server.ask("GET", "", &[], "").json()["stream"], json!(true));
    let path = format!("/cgi-bin/chat?id={start}&stream=1");
    let mut listener = Listener::on(send(&server.address, "GET", &path, &[], b"").expect("a connection"));
    for text in ["first", "second"] {
        server.ask("POST", "?user=1", &[], &format!("\"{text}\""));
        listener.until(text);
    }
}

#[test]
fn busybox_httpd_serves_a_bus_but_not_its_page() {
    let server = busybox();
    let start = a_bus_is_served(&server);
    events_come_at_once(&server, start);
    assert!(server.log().contains("shortbus: chat: not_json"), "{}", server.log());
    // What it cannot do.
    assert_eq!(server.ask("GET", "/", &[], "").status, 404);
    assert_eq!(status_of_known_client(&server), 200);
    let chunked = server.ask("POST", "?user=1", &[("Transfer-Encoding", "chunked")], "3\r\n\"x\"\r\n0\r\n\r\n");
    assert_eq!(chunked.outcome(), (400, "not_json".into()));
}

#[test]
fn uwsgi_serves_a_bus_but_not_its_page() {
    let server = uwsgi();
    let start = a_bus_is_served(&server);
    events_come_at_once(&server, start);
    assert!(server.log().contains("shortbus: chat: not_json"), "{}", server.log());
    assert_eq!(status_of_known_client(&server), 304);
    let foreign = server.ask("POST", "?user=1", &[("Referer", "http://elsewhere.example/")], "1");
    assert_eq!(foreign.outcome(), (403, "foreign_origin".into()));
    // What it cannot do: the page's path comes without its slash, and no body without a length comes to an end.
    assert!(server.ask("GET", "/", &[], "").json()["user"].is_u64());
    let chunked = [("Transfer-Encoding", "chunked"), ("Connection", "close")];
    assert_eq!(exchange(&server.address, "POST", "/cgi-bin/chat?user=1", &chunked, b"3\r\n\"x\"\r\n0\r\n\r\n"), None);
    assert_eq!(server.ask("GET", "", &[], "").status, 200);
}
