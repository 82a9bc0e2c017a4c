//! What single web servers do to a bus, and what the example configurations do about it.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::fixtures::daemon::{executable, wait_for};
use crate::fixtures::fronts::Front;
use crate::fixtures::http_client::{Stream, exchange};
use crate::fixtures::site::{Settings, Site};

const NGINX: &str = include_str!("../examples/nginx-fastcgi.conf");
const APACHE: &str = include_str!("../apache-example.conf");
const APACHE_FASTCGI: &str = include_str!("../examples/apache-fastcgi.conf");
const CGI: [Front; 6] =
    [Front::ApacheCgid, Front::ApacheCgi, Front::BusyboxCgi, Front::LighttpdCgi, Front::NginxFcgiwrap, Front::UwsgiCgi];
const STREAMS: Settings = &[("chat", &[("SHORTBUS_WAIT", "20")])];

/// An open event stream.
struct Listener {
    stream: Box<dyn Stream>,
    heard: String,
}

impl Listener {
    /// Listens to what comes from now on.
    fn new(site: &Site, bus: &str) -> Listener {
        let (_, id) = site.join(bus);
        Listener::on(site.open("GET", &format!("{bus}?id={id}&stream=1"), &[], b"").expect("a connection"))
    }

    /// On a connection on which a stream was asked for.
    fn on(stream: Box<dyn Stream>) -> Listener {
        let mut listener = Listener { stream, heard: String::new() };
        listener.until("event: cursor");
        listener
    }

    /// Reads until this has come.
    #[track_caller]
    fn until(&mut self, text: &str) {
        while !self.heard.contains(text) {
            let mut buffer = [0; 4096];
            let length = self.stream.read(&mut buffer).unwrap_or_else(|error| panic!("{error} after {}", self.heard));
            assert!(length > 0, "ended after {}", self.heard);
            self.heard.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    }
}

#[test]
fn streams_by_cgi_tell_each_event_as_it_comes() {
    for front in CGI {
        let site = Site::with(front, STREAMS);
        assert_eq!(site.get("chat").json()["stream"], true, "{front:?}");
        let mut listener = Listener::new(&site, "chat");
        // What is held back until the stream's end is not there before the next is published.
        for text in ["first", "second", "third"] {
            site.publish("chat", 1, format!("\"{text}\""));
            listener.until(text);
        }
    }
}

#[test]
fn a_site_s_own_locations_take_nothing_from_a_bus_under_nginx() {
    let own = "location ~* \\.(js|css|png)$ { expires 30d; }\nlocation ~ \\.mjs { return 410; }\n";
    for (front, first) in
        [Front::NginxFcgiwrap, Front::NginxFastcgiShared].into_iter().flat_map(|front| [(front, true), (front, false)])
    {
        let site = Site::edited(front, &[], move |config, root| {
            let start = config.find("listen unix:").and_then(|at| Some(at + config[at..].find(';')? + 1)).unwrap();
            let (head, rest) = config.split_at(start);
            let (ours, tail) = rest.rsplit_once("} }").unwrap();
            let ours = match front {
                // Its block is the example's.
                Front::NginxFcgiwrap => ours.to_owned(),
                _ => NGINX.replace("/run/shortbus.sock", &format!("{root}/shortbus.sock")),
            };
            let (before, behind) = if first { (own, "") } else { ("", own) };
            format!("{head}\n{before}{ours}\n{behind} }} }}{tail}")
        });
        site.copy("chat");
        for (path, kind) in [
            ("chat", "application/json"),
            ("chat/", "text/html; charset=utf-8"),
            ("chat/shortbus.js", "text/javascript; charset=utf-8"),
            ("chat/shortbus.mjs", "text/javascript; charset=utf-8"),
        ] {
            let reply = site.get(path);
            assert_eq!((reply.status, reply.header("content-type")), (200, Some(kind)), "{front:?} {first} {path}");
            assert_eq!(reply.header("expires"), None);
        }
        // Another name that begins like it is no bus.
        assert_eq!(
            site.get("chatter").outcome(),
            if front == Front::NginxFcgiwrap { (403, "".into()) } else { (404, "".into()) }
        );
        site.foresee("Cannot get script name");
    }
}

#[test]
fn a_site_s_own_error_pages_replace_none_of_a_bus() {
    for front in [
        Front::NginxFcgiwrap,
        Front::NginxFastcgiShared,
        Front::ApacheProxyFcgi,
        Front::LighttpdCgi,
        Front::LighttpdFastcgi,
    ] {
        let mut site = Site::edited(front, &[], move |config, root| {
            let page = Path::new(root).join("error.html");
            fs::write(&page, "<h1>Sorry</h1>").unwrap();
            if front.is_nginx() {
                let codes = "error_page 400 404 405 500 502 503 504 /error.html;";
                let pages = format!("fastcgi_intercept_errors on; {codes} location = /error.html {{ root {root}; }}");
                config.replacen("server { ", &format!("server {{ {pages} "), 1)
            } else if front.is_lighttpd() {
                let pages =
                    format!("server.error-intercept = \"enable\"\nserver.errorfile-prefix = \"{root}/error-\"\n");
                for status in ["400", "404", "405", "503"] {
                    fs::copy(&page, format!("{root}/error-{status}.html")).unwrap();
                }
                pages + &config
            } else {
                let load = "LoadModule alias_module /usr/lib/apache2/modules/mod_alias.so";
                let pages: String =
                    ["400", "404", "405", "503"].map(|status| format!("ErrorDocument {status} /error.html\n")).concat();
                format!("{load}\nAlias /error.html {}\n{pages}{config}\nProxyErrorOverride On\n", page.display())
            }
        });
        site.copy("chat");
        site.join("chat");
        let outcome = |reply: crate::fixtures::http_client::Reply| reply.outcome();
        assert_eq!(outcome(site.get("chat?user=x")), (400, "bad_parameter".into()), "{front:?}");
        assert_eq!(outcome(site.get("chat/nothing")), (404, "unknown_path".into()), "{front:?}");
        assert_eq!(outcome(site.request("PUT", "chat", &[], b"")), (405, "bad_method".into()), "{front:?}");
        site.memcached.stop();
        let reply = site.get("chat");
        assert_eq!(reply.outcome(), (503, "memcached_unreachable".into()), "{front:?}");
        assert!(reply.header("retry-after").is_some(), "{front:?}");
    }
}

#[test]
fn an_nginx_behind_another_passes_each_event_on_as_it_comes() {
    for front in [Front::NginxFcgiwrap, Front::NginxFastcgiShared] {
        let site = Site::edited(front, STREAMS, |config, root| {
            let config = config.replace("/nginx.sock;", "/inner.sock;");
            let pass = format!("proxy_pass http://unix:{root}/inner.sock; proxy_set_header Host $http_host;");
            let outer = format!("server {{ listen unix:{root}/nginx.sock; location / {{ {pass} }} }}\nserver {{");
            config.replacen("server { listen", &format!("{outer} listen"), 1)
        });
        let mut listener = Listener::new(&site, "chat");
        for text in ["first", "second"] {
            site.publish("chat", 1, format!("\"{text}\""));
            listener.until(text);
        }
    }
}

#[test]
fn caddy_passes_each_event_on_as_it_comes() {
    let site = Site::start(Front::CaddyFastcgi);
    let mut listener = Listener::new(&site, "chat");
    for text in ["first", "second"] {
        site.publish("chat", 1, format!("\"{text}\""));
        listener.until(text);
    }
}

/// Forty pages behind one address poll twice a second, with a stream open each where they have one, and publish.
fn assert_a_class_is_let_in(site: &Site) {
    let (_, id) = site.join("chat");
    let ends = Instant::now() + Duration::from_secs(4);
    thread::scope(|scope| {
        for page in 1..=40 {
            scope.spawn(move || {
                let _stream = site.front.can_wait().then(|| Listener::new(site, "chat"));
                assert_eq!(site.get("chat/shortbus.js").status, 200);
                site.publish("chat", page, "1");
                while Instant::now() < ends {
                    let next = Instant::now() + Duration::from_millis(500);
                    assert_eq!(site.get(&format!("chat?user={page}&id={id}")).status, 200);
                    thread::sleep(next.saturating_duration_since(Instant::now()));
                }
            });
        }
    });
}

/// Asks in bursts until one is refused: the statuses.
fn flood(burst: impl Fn() -> String) -> String {
    let mut all = String::new();
    wait_for("a refusal", || {
        all += &burst();
        all.contains("HTTP/1.1 429 ")
    });
    all
}

#[test]
fn nginx_s_limits_let_a_class_in_and_refuse_a_flood() {
    for front in [Front::NginxFcgiwrap, Front::NginxFastcgiShared] {
        let site = Site::edited(front, &[], |config, _| {
            let (mut zones, mut rest) = (String::new(), String::new());
            for line in config.lines() {
                let limit = line
                    .trim_start()
                    .strip_prefix('#')
                    .filter(|line| line.starts_with("limit_") && line.ends_with(';'));
                match limit {
                    Some(zone) if zone.contains("_zone ") => zones += zone,
                    Some(limit) => rest += &format!("{limit}\n"),
                    None => rest += &format!("{line}\n"),
                }
            }
            assert!(zones.contains("limit_req_zone"), "{config}");
            let rest = rest.replace("worker_connections 512", "worker_connections 4096");
            format!("worker_rlimit_nofile 4096;\n{}", rest.replacen("http {", &format!("http {{ {zones}"), 1))
        });
        site.foresee("limiting ");
        site.copy("chat");
        assert_a_class_is_let_in(&site);
        assert!(!site.log().contains("limiting "), "{front:?}: {}", site.log());
        flood(|| {
            let all: Vec<_> = (0..500).filter_map(|_| site.open("GET", "chat", &[], b"")).collect();
            all.into_iter()
                .map(|mut reply| {
                    let mut text = String::new();
                    let _ = reply.read_to_string(&mut text);
                    text
                })
                .collect()
        });
        wait_for("room", || site.get("chat").status == 200);
    }
}

#[test]
fn mod_evasive_s_limits_let_a_class_in_and_refuse_a_flood() {
    let site = Site::edited(Front::ApacheCgid, &[], |config, root| {
        let (_, limits) = APACHE.split_once("#<IfModule evasive20_module>").unwrap();
        let limits = limits.replace("\n#", "\n");
        // One process, so that all count together.
        let load =
            "LoadModule evasive20_module /usr/lib/apache2/modules/mod_evasive20.so\nStartServers 1\nServerLimit 1";
        let load = format!(
            "{load}\nThreadsPerChild 64\nMaxRequestWorkers 64\nMinSpareThreads 1\nMaxKeepAliveRequests 0\nDOSLogDir {root}"
        );
        format!("{config}{load}\n<IfModule evasive20_module>{limits}")
    });
    site.foresee("denied by server configuration");
    site.copy("chat");
    assert_a_class_is_let_in(&site);
    assert!(!site.log().contains("denied by server configuration"), "{}", site.log());
    // What costs no process: a flood has to be quick.
    let refused = flood(|| {
        let many = "GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(500);
        let more = format!("{many}GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let mut stream = site.open("GET", "../nothing", &[("Connection", "keep-alive")], more.as_bytes()).unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    });
    assert!(!refused.contains("HTTP/1.1 403"), "{refused}");
    wait_for("room", || site.get("chat").status == 200);
}

#[test]
fn two_buses_by_mod_proxy_fcgi_share_one_process_without_a_warning() {
    let site = Site::edited(Front::ApacheProxyFcgi, &[], |config, _| {
        let block = |config: &str| {
            let (head, rest) = config.split_once("    <LocationMatch ").unwrap();
            let (block, tail) = rest.split_once("</LocationMatch>\n").unwrap();
            [head.to_owned(), format!("    <LocationMatch {block}</LocationMatch>\n"), tail.to_owned()]
        };
        let [_, chat, _] = block(APACHE_FASTCGI);
        let [head, _, tail] = block(&config);
        format!("{head}{chat}{}{tail}", chat.replace("cgi-bin/chat", "cgi-bin/quiz").replace("BUS chat", "BUS quiz"))
    });
    for bus in ["chat", "quiz"] {
        let mut listener = Listener::new(&site, bus);
        site.publish(bus, 1, format!("\"on {bus}\""));
        listener.until(&format!("on {bus}"));
    }
    assert_ne!(site.get("quiz?id=0").text(), site.get("chat?id=0").text());
    // What Apache says at its start would stand in the log: the site's end looks.
}

#[test]
fn mod_fcgid_runs_a_bus_with_a_space_in_its_name_by_a_line_of_its_own() {
    let site = Site::edited(Front::ApacheFcgid, &[], |config, root| {
        // Apache looks for it at its start.
        Command::new("cp").arg(executable()).arg(format!("{root}/cgi-bin/a b")).status().unwrap();
        let (head, rest) = config.split_once("        #<Directory").unwrap();
        let (lines, tail) = rest.split_once("#</Directory>\n").unwrap();
        format!("{head}<Directory{}</Directory>\n{tail}", lines.replace("\n        #", "\n"))
    });
    site.copy("a");
    site.publish("a%20b", 1, "\"hello\"");
    assert_eq!(site.get("a%20b?id=0").json()[0]["data"], "hello");
    assert_eq!(site.get("a%20b/shortbus.js").status, 200);
    assert_eq!(site.get("a?id=0").text(), "[]");
}

#[test]
fn a_reload_of_lighttpd_waits_for_no_stream() {
    for front in [Front::LighttpdCgi, Front::LighttpdFastcgi] {
        let site = Site::with(front, STREAMS);
        let mut listener = Listener::new(&site, "chat");
        let started = Instant::now();
        Command::new("kill").args(["-s", "USR1", &site.server_pid().to_string()]).status().unwrap();
        let mut rest = Vec::new();
        let _ = listener.stream.read_to_end(&mut rest);
        drop(listener);
        wait_for("lighttpd", || site.send("GET", "chat", &[], b"").is_some_and(|reply| reply.status == 200));
        // By default it is away for 8 s, and more.
        assert!(started.elapsed() < Duration::from_secs(7), "{front:?}: {:?}", started.elapsed());
        site.foresee("child");
    }
}

/// Runs a client in Node, which trusts the site's certificate.
fn run_node(script: &str, site: &Site, argument: &str) {
    let mut node = Command::new("node");
    node.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(script)).arg(argument);
    let output = node.env("NODE_EXTRA_CA_CERTS", site.certificate()).output();
    let output = output.unwrap_or_else(|error| panic!("node: {error}; make test installs it"));
    // It warns where there is no certificate.
    assert!(output.status.success(), "{:?}: {output:?}", site.front);
}

#[test]
fn by_http_2_nginx_serves_many_streams_and_all_else_on_one_connection() {
    let site = Site::start(Front::NginxHttp2);
    run_node("http2_streams.mjs", &site, &site.address);
    for code in ["bad_parameter", "foreign_origin"] {
        site.expect_error(code);
    }
    // And to a client that knows nothing of HTTP/2 but what curl does.
    let mut listener = Listener::new(&site, "chat");
    for text in ["one", "two"] {
        site.publish("chat", 1, format!("\"{text}\""));
        listener.until(text);
    }
}

#[test]
fn by_http_2_apache_offers_neither_waits_nor_streams_and_no_request_stops_another() {
    for front in [Front::ApacheCgid, Front::ApacheProxyFcgi, Front::ApacheHttp2] {
        let site = Site::edited(front, STREAMS, move |config, root| {
            fs::create_dir_all(format!("{root}/htdocs")).unwrap();
            fs::write(format!("{root}/htdocs/static.txt"), "static").unwrap();
            let load = "LoadModule http2_module /usr/lib/apache2/modules/mod_http2.so\nProtocols h2c http/1.1";
            let load = if front.is_http2() { "" } else { load };
            format!("{config}\n{load}\nDocumentRoot {root}/htdocs\n")
        });
        site.copy("chat");
        run_node("http2.mjs", &site, &site.url());
        if front.is_http2() {
            continue;
        }
        // The same server, by HTTP/1.1.
        assert_eq!(site.get("chat").json()["stream"], true, "{front:?}");
        let mut listener = Listener::new(&site, "chat");
        site.publish("chat", 1, "\"hello\"");
        listener.until("hello");
    }
}

#[test]
fn a_script_sets_what_a_clean_environment_leaves_out() {
    let page = include_str!("../docs/servers.md");
    let (_, script) = page.split_once("    #!/bin/sh\n").unwrap();
    let script = format!("#!/bin/sh\n{}\n", script.lines().next().unwrap().trim());
    assert!(script.contains("SHORTBUS_BUS=chat ") && script.contains("/usr/local/bin/shortbus"), "{script}");
    let script = script.replace("/usr/local/bin/shortbus", executable().to_str().unwrap());
    let site = Site::start(Front::ApacheCgid);
    site.copy("chat");
    let script = script.replace("SHORTBUS_TTL=300", "SHORTBUS_MAX_BYTES=4");
    fs::write(site.cgi_bin("other"), script).unwrap();
    fs::set_permissions(site.cgi_bin("other"), fs::Permissions::from_mode(0o755)).unwrap();
    // The name and the setting are the script's; a query stays out of the command line.
    site.publish("other", 1, "1");
    assert_eq!(site.get("chat?id=0").json()[0]["data"], 1);
    assert_eq!(site.post("other?user=1", "12345").outcome(), (413, "too_large".into()));
    assert_eq!(site.get("other?--version").json()["id"], site.join("chat").1);
}

#[test]
fn what_shows_whether_a_server_protects_from_foreign_pages_works_as_written() {
    let page = include_str!("../docs/servers.md");
    let (_, lines) = page.split_once("The answer has to be 403 each time:\n\n").unwrap();
    let lines: Vec<&str> = lines.lines().take_while(|line| line.starts_with("    curl ")).collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    let site = Site::start(Front::ApacheCgid);
    site.copy("chat");
    let script = format!("B={}cgi-bin/chat\n{}", site.url(), lines.join("\n"));
    let output = Command::new("sh").args(["-ec", &script.replace("curl", "curl -sS")]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "403\n403\n403\n", "{output:?}");
    (0..3).for_each(|_| site.expect_error("foreign_origin"));
    assert_eq!(site.get("chat?id=0").text(), "[]");
}

/// Apache unpacks the body, and leaves the length and the header as they were.
#[test]
fn a_body_that_apache_unpacks_is_refused_and_not_cut() {
    for front in [Front::ApacheCgid, Front::ApacheCgi] {
        let site = Site::edited(front, &[], |config, _| {
            let module = |name: &str| format!("LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n");
            format!("{}{}{config}\nSetInputFilter DEFLATE\n", module("filter"), module("deflate"))
        });
        site.copy("chat");
        let (_, start) = site.join("chat");
        let packed = Command::new("sh").args(["-c", "head -c 5000 /dev/zero | tr '\\0' 7 | gzip -c"]).output().unwrap();
        assert!(packed.status.success() && packed.stdout.starts_with(b"\x1f\x8b"));
        let reply = site.request("POST", "chat?user=1", &[("Content-Encoding", "gzip")], &packed.stdout);
        assert_eq!(reply.outcome(), (415, "content_encoding".into()), "{front:?} {reply:?}");
        assert_eq!(site.get(&format!("chat?id={start}")).text(), "[]");
    }
}

/// What Apache makes of a setting of the page that was asked for, when it shows another in its place.
#[test]
fn a_bus_that_an_error_page_leads_to_does_not_lose_its_settings_silently() {
    let site = Site::edited(Front::ApacheCgid, &[], |config, _| {
        let old = "<Location /old>\nSetEnv SHORTBUS_AUTH signed\nErrorDocument 404 /cgi-bin/chat\n</Location>\n";
        format!("{config}\n{old}")
    });
    site.copy("chat");
    let reply = exchange(&site.address, "GET", "/old/chat", &[], b"").unwrap();
    assert_eq!(reply.outcome(), (500, "bad_setting".into()), "{reply:?}");
    assert!(reply.json()["message"].as_str().unwrap().starts_with("REDIRECT_SHORTBUS_AUTH "), "{reply:?}");
    site.expect_error("bad_setting");
    assert!(site.get("chat").json().get("secret").is_none());
}
