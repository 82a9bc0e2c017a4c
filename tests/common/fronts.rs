//! The executable as FastCGI under Apache, lighttpd and nginx, and as CGI under lighttpd, each by its example
//! configuration as it stands, but for where things are.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use super::{Daemon, Front, Site, connect, executable, wait_for};

impl Front {
    pub fn is_nginx(self) -> bool {
        use Front::*;
        [NginxFcgiwrap, NginxFastcgi, NginxFastcgiOnce, NginxFastcgiShared].contains(&self)
    }

    pub fn is_lighttpd(self) -> bool {
        [Front::LighttpdCgi, Front::LighttpdFastcgi].contains(&self)
    }

    /// Whether a bus is what the web server's configuration says, and not a file: one process serves all.
    pub fn names_buses(self) -> bool {
        [Front::ApacheProxyFcgi, Front::NginxFastcgiOnce, Front::NginxFastcgiShared].contains(&self)
    }

    /// Whether polls may wait there and messages be streamed.
    pub fn holds(self) -> bool {
        self.names_buses() || [Front::LighttpdFastcgi, Front::NginxFastcgi].contains(&self)
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Replaces what has to be there.
#[track_caller]
fn swap(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from} is not in the example");
    text.replace(from, to)
}

impl Site {
    /// The FastCGI process that serves all buses, with its settings in its environment.
    pub(super) fn start_process(&mut self) {
        let socket = self.folder.join("shortbus.sock");
        let memcached = format!("SHORTBUS_MEMCACHED={}", self.memcached.address);
        let log = fs::File::create(self.folder.join("process.log")).unwrap();
        let (mut command, package) = match self.front {
            // As systemd does it: the socket is fd 3.
            Front::NginxFastcgiOnce => {
                let mut command = Command::new("systemd-socket-activate");
                command.args(["-E", &memcached, "-l"]).arg(&socket);
                (command, "systemd")
            }
            _ => {
                let mut command = Command::new("spawn-fcgi");
                command.args(["-n", "-M", "0777", "-s"]).arg(&socket).args(["--", "/usr/bin/env", &memcached]);
                (command, "spawn-fcgi")
            }
        };
        self.daemons.push(Daemon::start(command.arg(executable()).stderr(log), package));
        wait_for("the process's socket", || socket.exists());
    }

    pub(super) fn start_apache_fastcgi(&mut self) {
        let root = self.folder.0.display().to_string();
        let example = include_str!("../../examples/apache-fastcgi.conf");
        let mut settings = String::new();
        let (modules, example) = match self.front {
            // One block for all buses: here everyone may make some.
            Front::ApacheProxyFcgi => {
                let all = swap(example, "^/cgi-bin/chat", "^/cgi-bin/(?<shortbus_bus>[^/]+)");
                let named = r#"SetEnvIfExpr "%{REQUEST_URI} =~ m!^/cgi-bin/([^/]+)!" SHORTBUS_BUS=$1"#;
                (["proxy", "proxy_fcgi", "setenvif"], swap(&all, "SetEnv SHORTBUS_BUS chat", named))
            }
            _ => {
                settings.push_str(&format!("FcgidIPCDir {root}/fcgid\nFcgidProcessTableFile {root}/fcgid.shm\n"));
                settings.push_str(&format!("SetEnv SHORTBUS_MEMCACHED {}\n", quoted(&self.memcached.address)));
                let unbounded = swap(example, "FcgidMaxRequestLen 1048576", "FcgidMaxRequestLen 1000000000");
                (["fcgid", "alias", "setenvif"], unbounded)
            }
        };
        for (bus, list) in &self.settings {
            settings.push_str(&format!("<Location /cgi-bin/{bus}>\n"));
            for (name, value) in list {
                settings.push_str(&format!("SetEnv {name} {}\n", quoted(value)));
            }
            settings.push_str("</Location>\n");
        }
        let places = format!("Define SHORTBUS_CGI_BIN {root}/cgi-bin\nDefine SHORTBUS_SOCKET {root}/shortbus.sock\n");
        self.run_apache("event", &modules, &format!("{places}{example}\n{settings}"));
    }

    pub(super) fn start_nginx_shared(&mut self) {
        let root = self.folder.0.display().to_string();
        let start = "location ~ ^/cgi-bin/chat(?<shortbus_path>/.*)?$ {";
        let named = "fastcgi_param SHORTBUS_BUS chat;";
        let example = include_str!("../../examples/nginx-fastcgi.conf");
        let example = swap(example, "client_max_body_size 1m;", "client_max_body_size 0;");
        let socket = format!("unix:{root}/shortbus.sock;");
        let (upstream, pass) = match self.front {
            Front::NginxFastcgiShared => (
                format!("upstream shortbus {{ server {socket} keepalive 16; }}"),
                "fastcgi_pass shortbus; fastcgi_keep_conn on;".to_owned(),
            ),
            _ => (String::new(), format!("fastcgi_pass {socket}")),
        };
        let example = swap(&example, "fastcgi_pass unix:/run/shortbus.sock;", &pass);
        let (block, _) = example.rsplit_once('}').unwrap();
        let location = |name: &str, place: &str, list: &[(String, String)]| {
            let params: String =
                list.iter().map(|(name, value)| format!("fastcgi_param {name} {};\n", quoted(value))).collect();
            let named_here = match list.iter().any(|(name, _)| name == "SHORTBUS_BUS") {
                true => String::new(),
                false => format!("fastcgi_param SHORTBUS_BUS {name};"),
            };
            format!("{}{params}}}\n", swap(&swap(block, start, &format!("location {place} {{")), named, &named_here))
        };
        let mut locations = String::new();
        for (bus, list) in &self.settings {
            locations.push_str(&location(bus, &format!("~ ^/cgi-bin/{bus}(?<shortbus_path>/.*)?$"), list));
        }
        // One block for all other buses: here everyone may make some.
        let any = "~ ^/cgi-bin/(?<shortbus_bus>[^/]+)(?<shortbus_path>/.*)?$";
        locations.push_str(&location("$shortbus_bus", any, &[]));
        self.run_nginx(&upstream, &locations);
    }

    /// Starts lighttpd, anew where there are files that it does not know yet.
    pub(super) fn ensure_lighttpd(&self) {
        let mut names: Vec<OsString> =
            fs::read_dir(self.folder.join("cgi-bin")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let mut lighttpd = self.lighttpd.lock().unwrap();
        if lighttpd.as_ref().is_some_and(|(known, _)| self.front == Front::LighttpdCgi || *known == names) {
            return;
        }
        drop(lighttpd.take());
        let _ = fs::create_dir(self.folder.join("htdocs"));
        fs::write(self.folder.join("lighttpd.conf"), self.lighttpd_config(&names)).unwrap();
        let _ = fs::remove_file(&self.address);
        let mut command = Command::new("lighttpd");
        command.arg("-D").arg("-f").arg(self.folder.join("lighttpd.conf"));
        let log = fs::File::options().create(true).append(true).open(self.folder.join("start.log")).unwrap();
        let mut daemon = Daemon::start(command.stderr(log), "lighttpd");
        wait_for("lighttpd", || {
            let log = || self.folder.text("start.log") + &self.folder.text("error.log");
            assert!(daemon.is_alive(), "lighttpd ended: {}", log());
            connect(&self.address).is_some()
        });
        *lighttpd = Some((names, daemon));
    }

    /// Bytes, as names of buses need not be text.
    fn lighttpd_config(&self, names: &[OsString]) -> Vec<u8> {
        let root = self.folder.0.display().to_string();
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\\\""));
        let example = include_str!("../../examples/lighttpd.conf");
        let (_, block) = example.split_once("$HTTP[\"url\"] =~ \"^/cgi-bin/chat(/|$)\" {\n").unwrap();
        let (block, rest) = block.split_once("\n}\n").unwrap();
        let block = swap(block, "server.max-request-size = 1024", "");
        let (_, cgi) = rest.split_once("every file in the folder a bus:\n#\n").unwrap();
        let mut config = format!(
            "server.document-root = \"{root}/htdocs\"\nserver.bind = \"{root}/lighttpd.sock\"\n\
             server.errorlog = \"{root}/error.log\"\nserver.upload-dirs = ( \"{root}\" )\n\
             server.modules = ( \"mod_setenv\", \"mod_fastcgi\" )\n\
             # Else it answers 400 itself to what is no text, to control characters, and to a GET with a body.\n\
             server.http-parseopts = ( \"url-invalid-utf8-reject\" => \"disable\",\n\
             \"url-ctrls-reject\" => \"disable\", \"method-get-body\" => \"enable\" )\n\
             setenv.add-environment = ( \"SHORTBUS_MEMCACHED\" => {} )\n",
            quoted(&self.memcached.address)
        )
        .into_bytes();
        if self.front == Front::LighttpdCgi {
            let cgi = cgi.lines().map(|line| format!("{}\n", line.trim_start_matches("#   "))).collect::<String>();
            config.extend(swap(&cgi, "/usr/lib/cgi-bin/", &format!("{root}/cgi-bin/")).into_bytes());
        }
        for (n, name) in names.iter().enumerate() {
            let list = self.settings.iter().find(|(bus, _)| name == OsStr::new(bus)).map_or(&[][..], |(_, list)| list);
            let memcached = ("SHORTBUS_MEMCACHED".to_owned(), self.memcached.address.clone());
            let default = if list.iter().any(|(name, _)| *name == memcached.0) { vec![] } else { vec![memcached] };
            let settings: Vec<String> = (list.iter().chain(&default))
                .map(|(name, value)| format!("{} => {}", quoted(name), quoted(value)))
                .collect();
            let escape = |each: &dyn Fn(u8) -> Vec<u8>| -> Vec<u8> {
                name.as_bytes().iter().flat_map(|&byte| each(byte)).collect()
            };
            let pattern = escape(&|byte| match byte {
                b'"' => b"[\\\"]".to_vec(),
                byte if byte.is_ascii_punctuation() => vec![b'[', byte, b']'],
                byte => vec![byte],
            });
            let literal = escape(&|byte| if byte == b'"' { b"\\\"".to_vec() } else { vec![byte] });
            let with = |text: &str, name: &[u8]| {
                let (before, behind) = text.split_once("NAME").unwrap();
                [before.as_bytes(), name, behind.as_bytes()].concat()
            };
            config.extend(with("$HTTP[\"url\"] =~ \"^/cgi-bin/NAME(/|$)\" {\n", &pattern));
            for line in block.lines().filter(|_| self.front == Front::LighttpdFastcgi) {
                config.extend(match line {
                    line if line.contains("\"/cgi-bin/chat\"") => with(&line.replace("/chat\"", "/NAME\""), &literal),
                    line if line.contains("bin-path") => {
                        with(&format!("\"bin-path\" => \"{root}/cgi-bin/NAME\","), &literal)
                    }
                    line if line.contains("\"socket\"") => format!("\"socket\" => \"{root}/{n}.sock\",").into(),
                    line => line.as_bytes().to_vec(),
                });
                config.push(b'\n');
            }
            config.extend(format!("setenv.add-environment = ( {} )\n}}\n", settings.join(", ")).into_bytes());
        }
        config
    }
}
