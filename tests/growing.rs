//! Several web machines and several memcached servers, each machine with a network of its own, as docs/growing.md says.

use std::collections::BTreeSet;

use crate::fixtures::daemon::{Daemon, wait_for};
use crate::fixtures::fastcgi_client::Client;
use crate::fixtures::fastcgi_server::Worker;
use crate::fixtures::host::{Host, OTHER, Request, USER};
use crate::fixtures::http_client::Reply;

/// Three web machines and three memcached servers on one switch.
struct Cluster {
    switch: Host,
    web: Vec<Host>,
    stores: Vec<Store>,
}

struct Store {
    host: Host,
    address: String,
    daemon: Option<Daemon>,
}

impl Store {
    fn new(switch: &Host, number: usize) -> Store {
        let mut store = Store { host: plugged_in(switch, number), address: address(number), daemon: None };
        store.start();
        store
    }

    fn start(&mut self) {
        let mut command = self.host.command(OTHER, "/usr/bin/memcached");
        self.daemon = Some(Daemon::start(command.args(["-l", &self.address, "-p", "11211"]), "memcached"));
        let probe = format!(": > /dev/tcp/{}/11211", self.address);
        wait_for("memcached", || {
            let mut probed = self.host.command(0, "/bin/bash");
            probed.args(["-c", &probe]).stderr(std::process::Stdio::null()).status().unwrap().success()
        });
    }

    /// As a power cut does.
    fn lose(&mut self) {
        self.daemon.take().unwrap().signal("KILL");
    }
}

impl Cluster {
    fn start() -> Cluster {
        let switch = Host::new();
        switch.sh("ip link add switch type bridge && ip link set switch up");
        let web = (1..=3).map(|n| plugged_in(&switch, n)).collect();
        let stores = (11..=13).map(|n| Store::new(&switch, n)).collect();
        Cluster { switch, web, stores }
    }

    /// The list of servers, in another order on each machine.
    fn servers(&self, machine: usize) -> String {
        let mut all: Vec<&str> = self.stores.iter().map(|store| &store.address[..]).collect();
        all.rotate_left(machine);
        all.iter().map(|address| format!("{address}:11211")).collect::<Vec<_>>().join(" ")
    }

    /// One request as CGI.
    fn ask(&self, machine: usize, bus: &str, method: &str, query: &str, body: &str) -> Reply {
        let servers = self.servers(machine);
        let settings = &[("SHORTBUS_BUS", bus), ("SHORTBUS_MEMCACHED", &servers)];
        self.web[machine].ask(USER, &Request { bus: "chat", method, query, body, settings })
    }

    fn publish(&self, machine: usize, bus: &str, body: &str) -> u64 {
        let reply = self.ask(machine, bus, "POST", "user=1", body);
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["id"].as_u64().unwrap()
    }

    /// The server that a bus lives on, as a machine sees it: its place among the stores.
    fn home(&self, machine: usize, bus: &str) -> usize {
        home(&self.web[machine], bus, &self.servers(machine), &self.stores)
    }

    /// A bus on this server.
    fn bus_on(&self, store: usize) -> String {
        let mut names = (0..).map(|n| format!("bus{n}"));
        names.find(|bus| self.home(0, bus) == store).unwrap()
    }

    /// A FastCGI process on a machine.
    fn worker(&self, machine: usize) -> Worker {
        let host = &self.web[machine];
        let mut command = host.command(USER, host.folder.join("chat"));
        command.env_clear().env("SHORTBUS_MEMCACHED", self.servers(machine));
        Worker::run(&mut command, host.folder.join("chat.s"), &host.folder)
    }

    /// A server's cable is pulled, or put in again.
    fn set_cable(&self, store: usize, state: &str) {
        self.switch.sh(&format!("ip link set port{} {state}", 11 + store));
    }
}

fn address(number: usize) -> String {
    format!("10.9.0.{number}")
}

fn home(web: &Host, bus: &str, servers: &str, stores: &[Store]) -> usize {
    let printed = web.check(USER, &[("SHORTBUS_BUS", bus), ("SHORTBUS_MEMCACHED", servers)]);
    let line = printed.lines().find_map(|line| line.strip_prefix("memcached "));
    let server = line.unwrap_or_else(|| panic!("{printed}")).split_whitespace().next().unwrap();
    stores.iter().position(|store| server == format!("{}:11211", store.address)).unwrap()
}

/// A machine of this number, with a cable to the switch.
fn plugged_in(switch: &Host, number: usize) -> Host {
    let host = Host::new();
    let port = format!("port{number}");
    switch.sh(&format!("ip link add {port} type veth peer name eth0 netns {}", host.pid()));
    switch.sh(&format!("ip link set {port} master switch && ip link set {port} up"));
    host.sh(&format!("ip addr add {}/24 dev eth0 && ip link set eth0 up", address(number)));
    host
}

#[test]
fn three_web_machines_share_each_bus_on_one_of_three_memcached() {
    let cluster = Cluster::start();
    let mut homes = BTreeSet::new();
    for n in 0..30 {
        let bus = format!("bus{n}");
        let home = cluster.home(0, &bus);
        assert_eq!([cluster.home(1, &bus), cluster.home(2, &bus)], [home; 2], "{bus}");
        homes.insert(home);
    }
    assert_eq!(homes.len(), 3, "{homes:?}");

    // A message is heard on each machine, and a repeat on another machine is the same message.
    let worker = cluster.worker(2);
    for store in 0..3 {
        let bus = cluster.bus_on(store);
        let mut listener = Client::connect(&worker.socket);
        listener.ask("GET", "user=3&stream=1", &[("SHORTBUS_BUS", &bus)], b"").until("event: cursor");
        let join = cluster.ask(1, &bus, "GET", "", "").json()["id"].clone();
        let [first, second] =
            [0, 1].map(|machine| cluster.ask(machine, &bus, "POST", "user=1&once=k", "\"hello\"").json());
        assert_eq!(first, second);
        let heard = cluster.ask(1, &bus, "GET", &format!("user=2&id={join}"), "").json();
        assert_eq!(heard, serde_json::json!([{"id": first["id"], "user": 1, "data": "hello"}]));
        listener.until("\"data\":\"hello\"");
    }

    // A fourth one takes its share, and moves no other bus.
    let mut cluster = cluster;
    let before: Vec<usize> = (0..30).map(|n| cluster.home(0, &format!("bus{n}"))).collect();
    let fourth = Store::new(&cluster.switch, 14);
    cluster.stores.push(fourth);
    let after: Vec<usize> = (0..30).map(|n| cluster.home(0, &format!("bus{n}"))).collect();
    assert!(before.iter().zip(&after).all(|(before, after)| after == before || *after == 3), "{before:?} {after:?}");
    assert!(after.contains(&3) && after.iter().filter(|&&home| home == 3).count() < 20, "{after:?}");
}

#[test]
fn a_memcached_that_is_lost_stops_its_own_buses_until_it_is_back() {
    let mut cluster = Cluster::start();
    let (lost, other) = (cluster.bus_on(1), cluster.bus_on(2));
    let worker = cluster.worker(2);
    let mut listener = Client::connect(&worker.socket);
    listener.ask("GET", "user=3&stream=1", &[("SHORTBUS_BUS", &lost)], b"").until("event: cursor");
    let last = cluster.publish(0, &lost, "\"before\"");
    listener.until("\"before\"");

    cluster.stores[1].lose();
    for machine in 0..3 {
        for (method, query, body) in [("GET", "", ""), ("POST", "user=1", "1")] {
            let reply = cluster.ask(machine, &lost, method, query, body);
            assert_eq!(reply.outcome(), (503, "memcached_unreachable".into()));
        }
        let id = cluster.publish(machine, &other, "\"goes on\"");
        let heard = cluster.ask((machine + 1) % 3, &other, "GET", &format!("id={}", id - 1), "").json();
        assert_eq!(heard[0]["data"], "goes on");
    }

    cluster.stores[1].start();
    let id = cluster.publish(0, &lost, "\"after\"");
    assert!(id > last);
    // Each machine, by the cursor from before.
    for machine in 0..3 {
        let reply = cluster.ask(machine, &lost, "GET", &format!("user=2&id={last}"), "");
        assert_eq!(reply.json()[0]["data"], "after");
        assert_eq!(reply.header("shortbus-missed"), Some("1"));
    }
    let heard = listener.until("\"after\"");
    assert!(heard.contains("event: missed"), "{heard}");
}

#[test]
fn a_cable_that_is_pulled_and_put_in_again_loses_nothing() {
    let cluster = Cluster::start();
    let bus = cluster.bus_on(0);
    let last = cluster.publish(0, &bus, "\"before\"");
    cluster.set_cable(0, "down");
    let reply = cluster.ask(1, &bus, "POST", "user=1", "\"meanwhile\"");
    let (status, code) = reply.outcome();
    assert!(status == 503 && ["memcached_timeout", "memcached_unreachable"].contains(&&code[..]), "{reply:?}");
    cluster.set_cable(0, "up");
    // The switch and TCP need a moment.
    wait_for("the network", || cluster.ask(1, &bus, "GET", "", "").status == 200);
    let reply = cluster.ask(1, &bus, "GET", &format!("id={}", last - 1), "");
    assert_eq!((reply.json()[0]["data"].as_str(), reply.header("shortbus-missed")), (Some("before"), None));
}
