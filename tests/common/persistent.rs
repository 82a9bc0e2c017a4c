//! The executable as a FastCGI server, behind nginx: a process for each file in cgi-bin, on a socket of its own.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Daemon, Folder, Site, decode};

/// A FastCGI process and its socket.
pub struct Worker {
    pub daemon: Daemon,
    pub socket: PathBuf,
}

impl Worker {
    /// Starts `program`, with `variables` for its whole environment, and its listening socket as fd 0.
    pub fn start(program: &Path, socket: PathBuf, folder: &Folder, variables: &[(&str, &str)]) -> Worker {
        let mut command = Command::new(program);
        command.env_clear().envs(variables.iter().copied());
        Worker::run(&mut command, socket, folder)
    }

    /// The same for any command.
    pub fn run(command: &mut Command, socket: PathBuf, folder: &Folder) -> Worker {
        let listener = UnixListener::bind(&socket).unwrap();
        let log = fs::OpenOptions::new().create(true).append(true).open(folder.join("start.log")).unwrap();
        let child = command.process_group(0).stdin(Stdio::from(OwnedFd::from(listener))).stderr(log).spawn().unwrap();
        Worker { daemon: Daemon { name: format!("{command:?}"), child }, socket }
    }
}

/// By the file's name.
pub type Workers = BTreeMap<OsString, Worker>;

impl Site {
    /// Starts what serves `target`, as soon as there is a file of its name.
    pub(super) fn ensure_worker(&self, target: &str) {
        let path = target.split('?').next().unwrap_or_default();
        let name = OsString::from_vec(decode(path.split('/').next().unwrap_or_default()));
        let mut workers = self.workers.lock().unwrap();
        if !workers.contains_key(&name) && self.cgi_bin(&name).is_file() {
            let mut socket = name.clone();
            socket.push(".s");
            let socket = self.folder.join(socket);
            let _ = fs::remove_file(&socket);
            workers.insert(name.clone(), Worker::start(&self.cgi_bin(&name), socket, &self.folder, &[]));
        }
    }

    pub(super) fn start_nginx_fastcgi(&mut self) {
        let root = self.folder.0.display().to_string();
        let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        // The repository's example as it stands, but for where things are.
        let example = include_str!("../../nginx-fastcgi-example.conf")
            .replace("/run/chat.sock", &format!("{root}/chat.s"))
            .replace("client_max_body_size 1m;", "client_max_body_size 0;");
        let (upstream, location) = example.split_once("# In the site's server { }").unwrap();
        let location = location[location.find('\n').unwrap()..].rsplit_once('}').unwrap().0;
        let memcached = ("SHORTBUS_MEMCACHED".to_owned(), self.memcached.address.clone());
        let params = |list: &[(String, String)]| -> String {
            let default = (!list.iter().any(|(name, _)| *name == memcached.0)).then_some(&memcached);
            list.iter()
                .chain(default)
                .map(|(name, value)| format!("fastcgi_param {name} {};\n", quoted(value)))
                .collect()
        };
        let none = ("chat".to_owned(), vec![]);
        let (mut upstreams, mut locations) = (String::new(), String::new());
        let chat = if self.settings.iter().any(|(bus, _)| bus == "chat") { None } else { Some(&none) };
        for (bus, list) in self.settings.iter().chain(chat) {
            upstreams.push_str(&upstream.replace("chat", bus));
            locations.push_str(&format!("{}{}}}\n", location.replace("chat", bus), params(list)));
        }
        // Names that a test comes up with later.
        let any = location
            .replace("cgi-bin/chat(", "cgi-bin/(?<any>[^/]+)(")
            .replace("pass chat;", &format!("pass unix:{root}/$any.s;"));
        locations.push_str(&format!("{any}{}}}\n", params(&[])));
        self.run_nginx(&upstreams, &locations);
    }
}
