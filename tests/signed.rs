//! Signed buses: a message there is by the user it names, on the main fronts; and what a signature is, to the byte.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use shortbus::http::signature::Error;
use shortbus::http::signature::{Signed, secret};

use crate::fixtures::daemon::wait_for;
use crate::fixtures::fronts::Front;
use crate::fixtures::http_client::{Reply, decode};
use crate::fixtures::memcached::STEP;
use crate::fixtures::signer::{Signer, base64url_hmac, unix_millis};
use crate::fixtures::site::Site;

on_main_fronts! {
    a_join_gives_a_secret_by_which_its_user_publishes_to_all
    many_first_joins_at_the_same_moment_get_secrets_of_one_key
    each_way_to_fail_has_its_code_and_stores_nothing
    nothing_signed_can_be_changed_and_no_bit_of_the_signature
    a_replay_is_a_repeat
    a_replay_is_no_second_message_at_any_time
    any_user_id_that_javascript_reads_exactly_can_sign
    a_key_has_32_bytes_at_least_and_any_of_them
    a_bus_is_signed_or_open_and_nothing_else
    a_body_at_the_limit_is_signed_like_any_other
    a_store_that_lost_all_forgets_its_key_but_not_the_admins
    a_bus_turns_signed_and_open_again_while_clients_are_on_it
    an_open_bus_is_as_it_was
}

on_the_local_store! {
    a_join_gives_a_secret_by_which_its_user_publishes_to_all
    many_first_joins_at_the_same_moment_get_secrets_of_one_key
    each_way_to_fail_has_its_code_and_stores_nothing
    nothing_signed_can_be_changed_and_no_bit_of_the_signature
    a_replay_is_a_repeat
    a_replay_is_no_second_message_at_any_time
    any_user_id_that_javascript_reads_exactly_can_sign
    a_key_has_32_bytes_at_least_and_any_of_them
    a_bus_is_signed_or_open_and_nothing_else
    a_body_at_the_limit_is_signed_like_any_other
    a_store_that_lost_all_forgets_its_key_but_not_the_admins
    a_bus_turns_signed_and_open_again_while_clients_are_on_it
    an_open_bus_is_as_it_was
}

const SIGNED: (&str, &str) = ("SHORTBUS_AUTH", "signed");
const KEY: (&str, &str) = ("SHORTBUS_KEY", "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=");

#[track_caller]
fn assert_outcome(reply: &Reply, status: u16, code: &str) {
    assert_eq!(reply.outcome(), (status, code.into()), "{reply:?}");
}

/// A user whom no join made, of a bus whose key is known.
fn signer(key: &[u8], user: u64, bus: &str) -> Signer {
    Signer { user, bus: bus.into(), secret: base64url_hmac(key, user.to_string().as_bytes()) }
}

/// Signs and publishes.
fn send(site: &Site, bus: &str, signer: &Signer, once: &str, body: &str) -> Reply {
    site.post(&format!("{bus}?{}", signer.query(unix_millis(), once, body)), body)
}

fn a_join_gives_a_secret_by_which_its_user_publishes_to_all(front: Front) {
    let site = Site::with(front, &[("chat", &[SIGNED, ("SHORTBUS_BUS", "π & a")]), ("keyed", &[SIGNED, KEY])]);
    for (bus, name) in [("chat", "%CF%80%20%26%20a"), ("keyed", "keyed")] {
        let joined = site.get(bus).json();
        let keys = joined.as_object().unwrap().keys().filter(|key| !["wait", "stream", "batch"].contains(&&key[..]));
        assert_eq!(keys.collect::<Vec<_>>(), ["bus", "id", "secret", "user"]);
        let start = joined["id"].as_u64().unwrap();
        let (one, two) = (site.join_signed(bus), site.join_signed(bus));
        assert_eq!((&one.bus[..], one.secret.len()), (name, 43));
        assert!(one.user != two.user && one.secret != two.secret);
        assert_eq!(
            send(&site, bus, &one, "k", "\"a\"").text(),
            format!("{{\"user\":{},\"id\":{}}}", one.user, start + STEP)
        );
        assert_eq!(
            send(&site, bus, &two, "k", "\"b\"").text(),
            format!("{{\"user\":{},\"id\":{}}}", two.user, start + 2 * STEP)
        );
        let heard = |query: &str| site.get(&format!("{bus}?{query}id={start}")).json();
        let (a, b) = (
            json!({"id": start + STEP, "user": one.user, "data": "a"}),
            json!({"id": start + 2 * STEP, "user": two.user, "data": "b"}),
        );
        assert_eq!(heard(""), json!([a, b]));
        assert_eq!(heard("user=7&"), json!([a, b]));
        assert_eq!(heard(&format!("user={}&", one.user)), json!([b]));
        // Nobody can choose whose secret it gets.
        assert_outcome(&site.get(&format!("{bus}?user={}", one.user)), 400, "bad_parameter");
    }
    assert_eq!(site.join_signed("keyed").secret.len(), 43);
    let user = site.join_signed("keyed");
    assert_eq!(user.secret, signer(KEY.1.as_bytes(), user.user, "").secret);
    // The admin's key does not get into the store; the one that the store keeps is random.
    if site.is_local {
        assert_eq!(["keyed", "%CF%80%20%26%20a"].map(|bus| kept_key(&site, bus) != [0; 32]), [false, true]);
        return;
    }
    assert_eq!(
        site.memcached.ask("mg shortbus:keyed:key\r\nmg shortbus:%CF%80%20%26%20a:key s\r\n"),
        "EN\r\nHD s32\r\n"
    );
}

/// What stands in a bus's file where its signing key is, zeros if none was made.
fn kept_key(site: &Site, bus: &str) -> [u8; 32] {
    fs::read(site.store_file(bus)).unwrap().get(2048..2048 + 32).map_or([0; 32], |key| key.try_into().unwrap())
}

fn many_first_joins_at_the_same_moment_get_secrets_of_one_key(front: Front) {
    let site = Site::with(front, &[("chat", &[SIGNED])]);
    for user in site.at_once(8, |_| site.join_signed("chat")) {
        assert_outcome(&send(&site, "chat", &user, "k", "1"), 200, "");
    }
}

/// A query of a publish, how its signature fails, and a part of what the client is told.
type Failure = (String, &'static str, &'static str);

fn missing_or_malformed(u: u64, now: u64, sig: &str) -> Vec<Failure> {
    let mut rows: Vec<Failure> = vec![
        (format!("user={u}"), "missing", "'once'"),
        (format!("user={u}&time={now}&sig={sig}"), "missing", "'once'"),
        (format!("user={u}&once=k"), "missing", "'time'"),
        (format!("user={u}&once=k&sig={sig}"), "missing", "'time'"),
        (format!("user={u}&once=k&time={now}"), "missing", "'sig'"),
        (format!("user={u}&once=k&time={now}&SIG={sig}"), "missing", "'sig'"),
        (format!("user={u}&once=k&time={now}&time={now}&sig={sig}"), "malformed", "'time'"),
        (format!("user={u}&once=k&time={now}&sig={sig}&sig={sig}"), "malformed", "'sig'"),
    ];
    for time in ["", "x", "-1", "%2B1", "1.5", "1e12", "0x1", "%201", "1%00", "18446744073709551616", "\u{661}"] {
        let time = time.replace('\u{661}', "%D9%A1");
        rows.push((format!("user={u}&once=k&time={time}&sig={sig}"), "malformed", "'time'"));
    }
    let (part, hex) = (&sig[..42], "0123456789abcdef".repeat(4));
    for sig in [
        "",
        "A",
        part,
        &format!("{sig}="),
        &format!("{sig}%3D"),
        &format!("{sig}A"),
        &format!("{sig}%20"),
        &format!("%20{sig}"),
        &format!("{sig}{sig}"),
        &format!("%2B{part}"),
        &format!("+{part}"),
        &format!("%2F{part}"),
        &format!("/{part}"),
        &format!(".{part}"),
        &format!("%00{part}"),
        &format!("%FF{part}"),
        &format!("%C3%A9{}", &part[..41]),
        &hex,
    ] {
        rows.push((format!("user={u}&once=k&time={now}&sig={sig}"), "malformed", "'sig'"));
    }
    rows
}

/// What is signed by another key, or too long ago or ahead.
fn wrong_or_untimely(user: &Signer, now: u64) -> Vec<Failure> {
    let u = user.user;
    let another = signer(b"another key of thirty-two bytes!", u, &user.bus);
    let of = |time| user.query(time, "k", "1");
    vec![
        (format!("user={u}&once=k&time={now}&sig={}", "A".repeat(43)), "wrong", "join again"),
        (another.query(now, "k", "1"), "wrong", "join again"),
        // Who has no secret learns nothing of the clock.
        (another.query(0, "k", "1"), "wrong", ""),
        (another.query(u64::MAX, "k", "1"), "wrong", ""),
        (of(0), "too_old", "clock"),
        (of(now - 61_000), "too_old", "clock"),
        // Seconds in the place of milliseconds.
        (of(now / 1_000), "too_old", "clock"),
        (of(now + 90_000), "clock_ahead", "clock"),
        (of(u64::MAX), "clock_ahead", "clock"),
    ]
}

fn each_way_to_fail_has_its_code_and_stores_nothing(front: Front) {
    let site =
        Site::with(front, &[("chat", &[SIGNED]), ("fresh", &[SIGNED]), ("brief", &[SIGNED, ("SHORTBUS_TTL", "5")])]);
    let (user, brief, now) = (site.join_signed("chat"), site.join_signed("brief"), unix_millis());
    let before = site.writes();
    let refused = |bus: &str, query: &str, code: &str, part: &str| {
        let reply = site.post(&format!("{bus}?{query}"), "1");
        assert_outcome(&reply, 403, &format!("signature_{code}"));
        assert!(reply.json()["message"].as_str().is_some_and(|text| text.contains(part)), "{query}: {reply:?}");
        assert_eq!((reply.header("retry-after"), reply.header("cache-control")), (None, Some("no-store")));
    };
    let rows = missing_or_malformed(user.user, now, &user.sig(now, "k", "1"));
    for (query, code, part) in rows.into_iter().chain(wrong_or_untimely(&user, now)) {
        refused("chat", &query, code, part);
    }
    for (time, code) in [(now - 6_000, "too_old"), (now + 30_000, "clock_ahead")] {
        refused("brief", &brief.query(time, "k", "1"), code, "");
    }
    // Nobody has joined: there is no key, and a publish makes none.
    refused("fresh", &user.query(now, "k", "1"), "wrong", "");
    // What is wrong on any bus is wrong here too, before the signature.
    for (query, body, code) in
        [("once=k", "1", "parameter"), ("user=1&once=", "1", "parameter"), ("user=1", "x", "json")]
    {
        let reply = site.post(&format!("chat?{query}"), body);
        assert!(reply.status == 400 && reply.outcome().1.ends_with(code), "{reply:?}");
    }
    assert_eq!(site.writes(), before);
    // Of the clock the bus takes what lies within its TTL; and the name was not taken by any of these.
    for (n, time) in [now, now - 50_000, now + 55_000].into_iter().enumerate() {
        let once = ["k", "past", "future"][n];
        assert_outcome(&site.post(&format!("chat?{}", user.query(time, once, "1")), "1"), 200, "");
    }
    assert_outcome(&site.post(&format!("brief?{}", brief.query(unix_millis() + 4_000, "k", "1")), "1"), 200, "");
}

fn nothing_signed_can_be_changed_and_no_bit_of_the_signature(front: Front) {
    let site = Site::with(front, &[("chat", &[SIGNED, KEY]), ("other", &[SIGNED, KEY])]);
    let (user, other, time, body) = (site.join_signed("chat"), site.join_signed("other"), unix_millis(), "{\"a\": 1}");
    let sig = user.sig(time, "k1", body);
    let query = |user: u64, time: u64, once: &str, sig: &str| format!("user={user}&once={once}&time={time}&sig={sig}");
    let (u, before) = (user.user, site.writes());
    for (bus, query, body) in [
        ("other", query(u, time, "k1", &sig), body),
        ("chat", query(other.user, time, "k1", &sig), body),
        ("chat", query(u ^ 1, time, "k1", &sig), body),
        ("chat", query(u, time + 1, "k1", &sig), body),
        ("chat", query(u, time, "k2", &sig), body),
        ("chat", query(u, time, "K1", &sig), body),
        ("chat", query(u, time, "k", &sig), body),
        ("chat", query(u, time * 10 + 1, "k1", &sig), body),
        ("chat", query(u, time, "k1", &sig), "{\"a\": 2}"),
        ("chat", query(u, time, "k1", &sig), "{\"a\":1}"),
        ("chat", query(u, time, "k1", &sig), "{\"a\": 1} "),
        ("chat", query(u, time, "k1", &sig), "\n{\"a\": 1}"),
        ("chat", query(u, time, "k1", &user.secret), body),
    ] {
        assert_outcome(&site.post(&format!("{bus}?{query}"), body), 403, "signature_wrong");
    }
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    for bit in 0..43 * 6 {
        let mut flipped = sig.clone().into_bytes();
        let digit = alphabet.iter().position(|&char| char == flipped[bit / 6]).unwrap();
        flipped[bit / 6] = alphabet[digit ^ (32 >> (bit % 6))];
        let target = format!("chat?{}", query(u, time, "k1", str::from_utf8(&flipped).unwrap()));
        // 43 characters have two bits more than 32 bytes.
        let code = if bit < 256 { "signature_wrong" } else { "signature_malformed" };
        assert_outcome(&site.post(&target, body), 403, code);
    }
    assert_eq!(site.writes(), before);
    assert_outcome(&site.post(&format!("chat?{}", query(u, time, "k1", &sig)), body), 200, "");
    // A message is no batch, and a batch no message.
    let (plain, batch) = (user.query(time, "k3", "[1,2]"), user.query(time, "k3", "batch=1\n[1,2]"));
    for query in [format!("{plain}&batch=1"), batch.clone(), format!("{batch}&batch=0")] {
        assert_outcome(&site.post(&format!("chat?{query}"), "[1,2]"), 403, "signature_wrong");
    }
    assert_outcome(&site.post(&format!("chat?{batch}"), "batch=1\n[1,2]"), 400, "not_json");
    assert_eq!(site.post(&format!("chat?{batch}&batch=1"), "[1,2]").json()["ids"].as_array().map(Vec::len), Some(2));
    assert_outcome(&site.post(&format!("chat?{plain}"), "[1,2]"), 409, "once_differs");
    // The same in other words.
    let target = format!("chat?sig={sig}&tim%65=0{time}&once=%6B1&user=0{u}");
    assert_outcome(&site.post(&target, body), 200, "");
    assert_eq!(site.get("chat?id=0").json().as_array().unwrap().len(), 3);
}

fn a_replay_is_a_repeat(front: Front) {
    let site = Site::with(front, &[("chat", &[SIGNED, KEY]), ("other", &[SIGNED, KEY])]);
    let (user, other, start) = (site.join_signed("chat"), site.join_signed("chat"), site.join("chat").1);
    let query = user.query(unix_millis(), "k", "1");
    let first = site.post(&format!("chat?{query}"), "1");
    assert_eq!(first.text(), format!("{{\"user\":{},\"id\":{}}}", user.user, start + STEP));
    let mut replays = vec![site.post(&format!("chat?{query}"), "1")];
    replays.extend(site.at_once(8, |_| site.post(&format!("chat?{query}"), "1")));
    // With a time and a signature of its own it is the same send still.
    replays.push(site.post(&format!("chat?{}", user.query(unix_millis() + 1, "k", "1")), "1"));
    for replay in replays {
        assert_eq!((replay.status, replay.body), (200, first.body.clone()));
    }
    assert_outcome(&send(&site, "chat", &user, "k", "2"), 409, "once_differs");
    assert_outcome(&site.post(&format!("other?{query}"), "1"), 403, "signature_wrong");
    let stolen = query.replace(&user.user.to_string(), &other.user.to_string());
    assert_outcome(&site.post(&format!("chat?{stolen}"), "1"), 403, "signature_wrong");
    assert_eq!((site.join("chat").1, site.get("other?id=0").text()), (start + STEP, "[]"));
    assert_outcome(&send(&site, "chat", &other, "k", "1"), 200, "");
    // A first that is many at once.
    let query = user.query(unix_millis(), "k2", "1");
    let replies = site.at_once(8, |_| site.post(&format!("chat?{query}"), "1"));
    let told = format!("{{\"user\":{},\"id\":{}}}", user.user, start + 3 * STEP);
    assert!(replies.iter().any(|reply| reply.text() == told));
    assert!(replies.iter().all(|reply| reply.text() == told || reply.outcome() == (409, "once_undecided".into())));
    assert_eq!(site.join("chat").1, start + 3 * STEP);
}

fn a_replay_is_no_second_message_at_any_time(front: Front) {
    // One front is enough for the longer one, where twice the TTL is longer than what a name is remembered anyway.
    let ttls = if front == Front::Bare { &["1", "4"][..] } else { &["1"] };
    let lists: Vec<_> = ttls.iter().map(|ttl| [SIGNED, KEY, ("SHORTBUS_TTL", *ttl)]).collect();
    let settings: Vec<(&str, &[(&str, &str)])> = ttls.iter().zip(&lists).map(|(ttl, list)| (*ttl, &list[..])).collect();
    let site = Site::with(front, &settings);
    thread::scope(|scope| {
        for ttl in ttls {
            let site = &site;
            scope.spawn(move || {
                let (user, started) = (site.join_signed(ttl), Instant::now());
                // As far ahead of the clock as it may be: good for twice the TTL.
                let time = unix_millis() + ttl.parse::<u64>().unwrap() * 1_000;
                let target = format!("{ttl}?{}", user.query(time, "k", "1"));
                let id = site.post(&target, "1").json()["id"].as_u64().expect("published");
                let mut codes = Vec::new();
                while codes.last().is_none_or(|code| code != "signature_too_old") {
                    let reply = site.post(&target, "1");
                    assert!(reply.status != 200 || reply.json()["id"] == id, "{reply:?}");
                    codes.push(reply.outcome().1);
                    codes.dedup();
                    assert_eq!(site.join(ttl).1, id, "a second message");
                    assert!(started.elapsed() < Duration::from_secs(20), "{codes:?}");
                    thread::sleep(Duration::from_millis(100));
                }
                let steps = ["", "once_expired", "signature_too_old"];
                assert!(codes == steps || codes == [steps[0], steps[2]], "{codes:?}");
            });
        }
    });
}

fn any_user_id_that_javascript_reads_exactly_can_sign(front: Front) {
    let site = Site::with(front, &[("chat", &[SIGNED, KEY])]);
    let (_, start) = site.join("chat");
    let most = (1 << 53) - 1;
    for (n, user) in [0, 1, most - 1, most].into_iter().enumerate() {
        let reply = send(&site, "chat", &signer(KEY.1.as_bytes(), user, "chat"), "k", "1");
        assert_eq!(reply.text(), format!("{{\"user\":{user},\"id\":{}}}", start + (1 + n as u64) * STEP));
    }
    for user in [most + 1, most + 2, u64::MAX] {
        assert_outcome(&send(&site, "chat", &signer(KEY.1.as_bytes(), user, "chat"), "k", "1"), 400, "bad_parameter");
    }
}

fn a_key_has_32_bytes_at_least_and_any_of_them(front: Front) {
    let long = ["abcdefghijklmnopqrstuvwxyz=0123456789 ".repeat(27), "Ω".into()].concat();
    let marked = "ZQXJ-ZQXJ-ZQXJ-ZQXJ-ZQXJ-ZQXJ-ZQXJ";
    let keys = [
        "",
        "Z",
        &marked[..31],
        &marked[..32],
        &long[..33],
        &long[..64],
        &long[..65],
        &long[..1_000],
        &long,
        "= = = = = = = = = = = = = = = = ",
        "\"'\\ # % ; & | < > ( ) [ ] { } ~ * ? !",
        "éèêëàâäôöûüçœæßñ",
    ];
    let lists: Vec<[(&str, &str); 2]> = keys.iter().map(|key| [SIGNED, ("SHORTBUS_KEY", *key)]).collect();
    let names: Vec<String> = (0..keys.len()).map(|n| format!("bus{n}")).collect();
    let settings: Vec<(&str, &[(&str, &str)])> =
        names.iter().zip(&lists).map(|(name, list)| (&name[..], &list[..])).collect();
    let open = [("SHORTBUS_KEY", &marked[..31])];
    let site = Site::with(front, &[&settings[..], &[("open", &open)]].concat());
    for (bus, key) in names.iter().zip(keys) {
        if key.len() >= 32 {
            let user = site.join_signed(bus);
            assert_eq!(user.secret, base64url_hmac(key.as_bytes(), user.user.to_string().as_bytes()), "{key}");
            assert_outcome(&send(&site, bus, &user, "k", "1"), 200, "");
            continue;
        }
        for reply in [site.get(bus), site.get(&format!("{bus}?id=0")), site.post(&format!("{bus}?user=1"), "1")] {
            assert_outcome(&reply, 500, "bad_setting");
            assert!(!reply.text().contains("ZQXJ"));
            let message = reply.json()["message"].as_str().unwrap().to_owned();
            assert!(
                ["SHORTBUS_KEY", "32 bytes", "openssl rand"].iter().all(|part| message.contains(part)),
                "{message}"
            );
        }
        let length = format!("(it is {} bytes long)", key.len());
        wait_for("its length in the log", || site.log().contains(&length));
    }
    // An open bus has no use for it.
    assert_outcome(&site.post("open?user=1", "1"), 500, "bad_setting");
    wait_for("the last error in the log", || site.log().matches("bad_setting").count() == 10);
    assert!(!site.log().contains("ZQXJ"));
}

fn a_bus_is_signed_or_open_and_nothing_else(front: Front) {
    let values = ["", "Signed", "signed ", "open", "true", "1", "none", "signed,open"];
    let lists: Vec<[(&str, &str); 1]> = values.iter().map(|value| [("SHORTBUS_AUTH", *value)]).collect();
    let names: Vec<String> = (0..values.len()).map(|n| format!("bus{n}")).collect();
    let settings: Vec<(&str, &[(&str, &str)])> =
        names.iter().zip(&lists).map(|(name, list)| (&name[..], &list[..])).collect();
    let site = Site::with(front, &settings);
    for bus in &names {
        for reply in [site.get(bus), site.post(&format!("{bus}?user=1"), "1")] {
            assert_outcome(&reply, 500, "bad_setting");
            assert!(reply.json()["message"].as_str().unwrap().starts_with("SHORTBUS_AUTH "), "{reply:?}");
        }
    }
}

fn a_body_at_the_limit_is_signed_like_any_other(front: Front) {
    let site = Site::with(
        front,
        &[
            ("chat", &[SIGNED]),
            ("small", &[SIGNED, ("SHORTBUS_MAX_BYTES", "1")]),
            ("large", &[SIGNED, ("SHORTBUS_MAX_BYTES", "1000000")]),
        ],
    );
    for (bus, limit) in [("chat", 10_240), ("small", 1), ("large", 1_000_000)] {
        let (user, start) = (site.join_signed(bus), site.join(bus).1);
        let body = |bytes: usize| if bytes == 1 { "7".into() } else { format!("\"{}\"", "x".repeat(bytes - 2)) };
        assert_outcome(&send(&site, bus, &user, "k", &body(limit + 1)), 413, "too_large");
        for _ in 0..2 {
            assert_eq!(
                send(&site, bus, &user, "k", &body(limit)).json(),
                json!({"user": user.user, "id": start + STEP})
            );
        }
        assert!(site.get(&format!("{bus}?id={start}")).text().contains(&body(limit)));
        // The last byte is signed too.
        let (query, mut changed) = (user.query(unix_millis(), "k2", body(limit)), body(limit));
        changed.replace_range(limit.saturating_sub(2)..limit, if limit == 1 { "8" } else { "y\"" });
        assert_outcome(&site.post(&format!("{bus}?{query}"), changed), 403, "signature_wrong");
    }
}

fn a_store_that_lost_all_forgets_its_key_but_not_the_admins(front: Front) {
    let mut site = Site::with(front, &[("kept", &[SIGNED, KEY]), ("chat", &[SIGNED])]);
    let (kept, old) = (site.join_signed("kept"), site.join_signed("chat"));
    assert_outcome(&send(&site, "chat", &old, "k", "1"), 200, "");
    let cursor = site.join("chat").1;
    site.lose_all();
    assert_outcome(&send(&site, "kept", &kept, "k", "1"), 200, "");
    // Before anybody joins again, and after.
    assert_outcome(&send(&site, "chat", &old, "k2", "2"), 403, "signature_wrong");
    let new = site.join_signed("chat");
    assert_outcome(&send(&site, "chat", &old, "k2", "2"), 403, "signature_wrong");
    let reply = send(&site, "chat", &new, "k2", "2");
    let heard = site.get(&format!("chat?id={cursor}")).json();
    assert_eq!(heard, json!([{"id": reply.json()["id"], "user": new.user, "data": 2}]));
}

fn a_bus_turns_signed_and_open_again_while_clients_are_on_it(front: Front) {
    let mut site = Site::with(front, &[("chat", &[])]);
    let (_, start) = site.join("chat");
    let one = site.publish("chat", 1, "1");
    assert_outcome(&site.post("chat?user=1&once=k", "2"), 200, "");
    let heard = |site: &Site, after: u64| -> Vec<u64> {
        let reply = site.get(&format!("chat?user=9&id={after}"));
        assert_eq!((reply.status, reply.header("shortbus-missed")), (200, None), "{reply:?}");
        reply.json().as_array().unwrap().iter().map(|message| message["data"].as_u64().unwrap()).collect()
    };
    site.set(&[("chat", &[SIGNED])]);
    assert_eq!((heard(&site, start), heard(&site, one)), (vec![1, 2], vec![2]));
    for query in ["user=1", "user=1&once=k", "user=1&once=new"] {
        assert_outcome(&site.post(&format!("chat?{query}"), "2"), 403, "signature_missing");
    }
    let user = site.join_signed("chat");
    assert_outcome(&send(&site, "chat", &user, "k", "3"), 200, "");
    assert_eq!(heard(&site, one), [2, 3]);
    site.set(&[("chat", &[])]);
    // One that goes on signing is heard as well, and its repeat is a repeat still.
    assert_outcome(&send(&site, "chat", &user, "k", "3"), 200, "");
    assert_outcome(&send(&site, "chat", &user, "k4", "4"), 200, "");
    site.publish("chat", 1, "5");
    assert_eq!(heard(&site, start), [1, 2, 3, 4, 5]);
    assert!(!site.get("chat").text().contains("secret"));
}

fn an_open_bus_is_as_it_was(front: Front) {
    let site = Site::with(front, &[("keyed", &[KEY])]);
    site.copy("chat");
    // A key alone says that somebody meant the bus to be signed.
    assert_outcome(&site.get("keyed"), 500, "bad_setting");
    let reply = site.get("chat");
    let (json, start) = (reply.json(), site.join("chat").1);
    let offer = if front.can_wait() { ",\"wait\":60,\"stream\":true" } else { "" };
    assert_eq!(reply.text(), format!("{{\"user\":{},\"id\":{start},\"batch\":256{offer}}}", json["user"]));
    for (n, query) in ["", "&time=1", "&sig=x", "&once=k&time=1&time=2&sig=&sig="].into_iter().enumerate() {
        let reply = site.post(&format!("chat?user=1{query}"), "1");
        assert_eq!(reply.text(), format!("{{\"user\":1,\"id\":{}}}", start + (1 + n as u64) * STEP));
    }
    if site.is_local {
        assert_eq!(kept_key(&site, "chat"), [0; 32]);
        return;
    }
    assert_eq!(site.memcached.ask("mg shortbus:chat:key\r\n"), "EN\r\n");
}

/// What a signature is made of, and what it is.
struct Vector {
    key: Vec<u8>,
    user: u64,
    /// Percent-encoded.
    bus: &'static str,
    time: u64,
    once: String,
    is_batch: bool,
    body: Vec<u8>,
    secret: &'static str,
    sig: &'static str,
}

impl Vector {
    fn text(&self) -> Vec<u8> {
        let head = format!("{}\n{}\n{}\n{}\n", self.bus, self.user, self.time, self.once);
        [head.as_bytes(), if self.is_batch { b"batch=1\n" } else { b"" }, &self.body].concat()
    }
}

/// Made by Python 3.12: `urlsafe_b64encode(hmac.new(key, text, sha256).digest()).rstrip(b'=')`.
fn vectors() -> Vec<Vector> {
    let plain_key = || b"0123456789abcdef0123456789abcdef".to_vec();
    let longest = ["\"", &"x".repeat(10_238), "\""].concat().into_bytes();
    let longer = b"key with = and spaces, longer than one block of SHA-256: 64 bytes or so".to_vec();
    let rows = [
        // A key of 32 bytes, the least of each.
        (
            plain_key(),
            0,
            "chat",
            0,
            "0".into(),
            b"0".to_vec(),
            "rbGNKnn7l-X1rxOpQvqxBwuOUO5iEpreC2MoREuaUIw",
            "1-P30X7kvREnFnwHV7lna7h8oIP5hYJgADYnFVb-xRQ",
        ),
        (
            plain_key(),
            42,
            "chat",
            1_700_000_000_000,
            "k-1_Z".into(),
            b"{\"move\": \"e4\"}".to_vec(),
            "OxLQQS2xhcmP9Ygl7UyBz7x72rzzOsSL2qrl85_GVEU",
            "ckTSjPPiEi2zxICSlSYHzAffcNMhx0ZV8RdauSIwcE0",
        ),
        // A key as long as SHA-256's block, the bus π, the longest name.
        (
            b"k".repeat(64),
            1,
            "%CF%80",
            1_700_000_000_001,
            "a".repeat(64),
            "\"é 🦀 \\n\"".into(),
            "H7SjC4Bg1HyOTRk_-6afVDhbQ0LNrP_f3w4TIy1cPfA",
            "Ikh7VsWB4JKKMR0dmXGokcTx-An7xZYcFpI-XS5t6pQ",
        ),
        // A longer one, the largest user id, line feeds in the body.
        (
            longer,
            (1 << 53) - 1,
            "a%20b%2Bc%2520d~.-_",
            1_700_000_000_002,
            "-".into(),
            b"[1,\n2]\n".to_vec(),
            "vK0wRdY_MiYLvaqCS4mFgvbJA4df2q4q1rwY6x4whUM",
            "HtAQTkRG8-3zuO9FLNDYvFjnZ43D0M1zEltw5JJyF3U",
        ),
        // Keys that are no text, the largest body.
        (
            (0..32).collect(),
            (1 << 53) - 2,
            "chat",
            1_700_000_000_003,
            "_".into(),
            longest,
            "YFmpelFstrOx8ZQQe8_fSqN66OduM_zbgp9tAXdEtxc",
            "pjLTzWa2ZtceRqPP9zKbu4kD4IupLnY9KWoL7r6Bx5s",
        ),
        (
            (156..=255).rev().collect(),
            7,
            "%E6%97%A5%E6%9C%AC",
            1,
            "0".repeat(36),
            b" null".to_vec(),
            "__X6yLaoOTVTqnOknm6oDkrzUsLVVKuXQQDcOfKntWg",
            "Q9feaoDuE1EzRR14xYNqvGGueLSUSgbDANjeSqS8WTE",
        ),
    ];
    let plain = rows.map(|(key, user, bus, time, once, body, secret, sig)| Vector {
        key,
        user,
        bus,
        time,
        once,
        is_batch: false,
        body,
        secret,
        sig,
    });
    let batch = Vector {
        key: plain_key(),
        user: 43,
        bus: "chat",
        time: 1_700_000_000_004,
        once: "b".into(),
        is_batch: true,
        body: b"[1, \"two\"]".to_vec(),
        secret: "0_zCv5Q5i-kOV7pyrFNG7dI4PqG-KRJOENXf6w-ajeU",
        sig: "qOpyLkyCXEjoKDyxf3gUOWHY4vO7Z1PzpVhzKmF5vQM",
    };
    plain.into_iter().chain([batch]).collect()
}

/// Runs a program of someone else's.
fn run(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new(program);
    let mut child = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect(program);
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}");
    output.stdout
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn openssl_makes_the_same_secrets_and_signatures() {
    for vector in vectors() {
        let base64url = |mac: Vec<u8>| {
            let base64 = String::from_utf8(run("openssl", &["base64", "-A"], &mac)).unwrap();
            base64.replace('+', "-").replace('/', "_").trim_end_matches('=').to_owned()
        };
        let key = format!("hexkey:{}", hex(&vector.key));
        let user = vector.user.to_string();
        let secret = run("openssl", &["dgst", "-sha256", "-mac", "HMAC", "-macopt", &key, "-binary"], user.as_bytes());
        assert_eq!(base64url(secret), vector.secret);
        let sig = run("openssl", &["dgst", "-sha256", "-hmac", vector.secret, "-binary"], &vector.text());
        assert_eq!(base64url(sig), vector.sig);
    }
}

#[test]
fn node_makes_the_same_secrets_and_signatures() {
    let script = "const {createHmac} = require('crypto');
        for (const [key, user, secret, text] of JSON.parse(require('fs').readFileSync(0))) console.log(
            createHmac('sha256', Buffer.from(key, 'hex')).update(user).digest('base64url'),
            createHmac('sha256', secret).update(Buffer.from(text, 'hex')).digest('base64url'))";
    let row = |vector: &Vector| json!([hex(&vector.key), vector.user.to_string(), vector.secret, hex(&vector.text())]);
    let input = serde_json::Value::from_iter(vectors().iter().map(row)).to_string();
    let expected: String = vectors().iter().map(|vector| format!("{} {}\n", vector.secret, vector.sig)).collect();
    assert_eq!(String::from_utf8(run("node", &["-e", script], input.as_bytes())).unwrap(), expected);
}

#[test]
fn shortbus_makes_the_same_secrets_and_knows_the_signatures() {
    for vector in vectors() {
        assert_eq!(secret(&vector.key, vector.user), vector.secret);
        let (time, sig) = (vector.time.to_string(), Some(vector.sig));
        let signed = Signed::read(vector.user, Some(&vector.once), Some(&time), sig, vector.is_batch, &vector.body)
            .ok()
            .unwrap();
        let (key, bus, time) = (&vector.key[..], decode(vector.bus), vector.time);
        let check = |key, now| signed.check(key, &bus, now, 60);
        assert_eq!(check(Some(key), time), Ok(()));
        // To the millisecond.
        assert_eq!((check(Some(key), time + 60_000), check(Some(key), time + 60_001)), (Ok(()), Err(Error::TooOld)));
        if time > 60_001 {
            assert_eq!(
                (check(Some(key), time - 60_000), check(Some(key), time - 60_001)),
                (Ok(()), Err(Error::ClockAhead))
            );
        }
        for wrong in [None, Some(&key[1..]), Some(b"")] {
            assert_eq!(check(wrong, time), Err(Error::Wrong));
        }
    }
}

/// With the key where memcached keeps it, any bytes; and where it is text, as a setting too. The times are long past:
/// to hear so takes the right signature.
#[test]
fn the_executable_knows_the_signatures() {
    for vector in vectors() {
        let name = String::from_utf8(decode(vector.bus)).unwrap();
        let text = String::from_utf8(vector.key.clone()).ok().filter(|text| !text.contains('\0'));
        let (kept, set) = (
            [SIGNED, ("SHORTBUS_BUS", &name)],
            text.as_deref().map(|key| [SIGNED, ("SHORTBUS_BUS", &name), ("SHORTBUS_KEY", key)]),
        );
        let site = Site::with(Front::Bare, &[("kept", &kept), ("set", set.as_ref().map_or(&kept, |list| &list[..]))]);
        let set_key = format!("ms shortbus:{}:key {}\r\n", vector.bus, vector.key.len());
        site.memcached.ask([set_key.as_bytes(), &vector.key, b"\r\n"].concat());
        let batch = u8::from(vector.is_batch);
        let query = |sig: &str| {
            format!("user={}&once={}&time={}&sig={sig}&batch={batch}", vector.user, vector.once, vector.time)
        };
        for bus in ["kept", "set"] {
            let wrong = if vector.sig.starts_with('A') { "B" } else { "A" }.to_owned() + &vector.sig[1..];
            for (sig, code) in [(vector.sig, "signature_too_old"), (&wrong, "signature_wrong")] {
                assert_outcome(&site.post(&format!("{bus}?{}", query(sig)), &vector.body), 403, code);
            }
        }
    }
}

/// Where the environment can hold them.
#[test]
fn a_key_need_not_be_text() {
    let site = Site::start(Front::Bare);
    site.copy("chat");
    for (bytes, good) in [(31, false), (32, true), (1_000, true)] {
        let key: Vec<u8> = (0..bytes).map(|n| 255 - (n % 128) as u8).collect();
        let output = Command::new(site.cgi_bin("chat"))
            .env_clear()
            .envs([SIGNED, ("REQUEST_METHOD", "GET"), ("SHORTBUS_MEMCACHED", &site.memcached.address)])
            .env("SHORTBUS_KEY", OsString::from_vec(key.clone()))
            .output()
            .unwrap();
        let all = [&output.stdout[..], &output.stderr].concat();
        let (head, body) = (str::from_utf8(&all).unwrap()).split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with(if good { "Status: 200" } else { "Status: 500" }), "{all:?}");
        if good {
            let json: serde_json::Value = serde_json::from_str(body).unwrap();
            assert_eq!(json["secret"], base64url_hmac(&key, json["user"].to_string().as_bytes()));
        }
        assert!(!String::from_utf8_lossy(&all).contains('\u{fffd}'), "not a byte of it");
    }
}
