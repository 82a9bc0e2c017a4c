//! What a bus does, the same on all fronts, each with a memcached of its own. And most of it on the local store, on one
//! front of each kind.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixtures::daemon::wait_for;
use crate::fixtures::fronts::Front;
use crate::fixtures::http_client::{Reply, encode};
use crate::fixtures::memcached::{LEASE_OVER, Memcached, RECORD, STEP};
use crate::fixtures::site::Site;

on_every_front! {
    three_users_who_each_send_two_messages_hear_the_other_two
    a_value_comes_back_byte_for_byte
    a_client_that_knows_only_the_array_gets_every_message
    the_cursor_passes_the_users_own_messages
    two_buses_side_by_side_hear_nothing_of_each_other
    any_file_name_is_a_bus_of_its_own
    a_copy_a_hard_link_and_a_symlink_are_three_buses
    a_name_that_starts_with_nph_works_too
    replies_carry_the_contracts_headers
    head_is_get_without_the_body
    a_foreign_page_can_neither_publish_nor_ask_to
    a_page_of_this_site_publishes
    an_allowed_origin_may_use_the_bus
    any_origin_may_use_a_bus_open_to_all
    settings_take_effect
    a_setting_that_cannot_be_used_is_named
    a_reply_is_limited_and_the_rest_comes_next
    a_cursor_far_behind_gets_what_lives
    messages_expire_and_a_poll_says_that_some_were_missed
    a_lost_counter_comes_back_higher
    a_counter_that_came_back_lower_is_followed
    a_store_that_lost_all_is_a_bus_again_for_old_cursors
    bodies_get_the_documented_answer
    parameters_get_the_documented_answer
    a_query_too_long_for_a_web_server_harms_nobody
    methods_and_paths_get_the_documented_answer
    the_client_and_the_page_come_with_the_bus
    nothing_reaches_the_command_line
    no_header_becomes_a_setting
    memcached_over_tcp_works_as_over_a_unix_socket
    each_bus_lives_on_one_of_several_memcacheds
    a_send_made_again_is_one_message_with_one_answer
    a_send_s_name_is_1_to_64_plain_characters
    a_send_made_many_times_at_the_same_moment_is_one_message
    a_send_whose_first_request_died_is_one_message_all_the_same
    a_send_can_be_made_again_after_the_lease_and_not_after_the_ttl
    a_packed_body_is_refused
    a_setting_under_another_name_is_refused
    a_slash_behind_the_name_is_the_bus_where_only_it_can_be_meant
    an_event_source_comes_back_and_begins_where_it_should
    a_named_origin_may_send_the_headers_it_asks_for
    a_batch_is_published_whole_and_in_order
    a_batch_that_cannot_be_published_names_the_element
}

// But for those that look into memcached.
on_the_local_store! {
    three_users_who_each_send_two_messages_hear_the_other_two
    a_value_comes_back_byte_for_byte
    a_client_that_knows_only_the_array_gets_every_message
    the_cursor_passes_the_users_own_messages
    two_buses_side_by_side_hear_nothing_of_each_other
    any_file_name_is_a_bus_of_its_own
    a_copy_a_hard_link_and_a_symlink_are_three_buses
    a_name_that_starts_with_nph_works_too
    replies_carry_the_contracts_headers
    head_is_get_without_the_body
    a_foreign_page_can_neither_publish_nor_ask_to
    a_page_of_this_site_publishes
    an_allowed_origin_may_use_the_bus
    any_origin_may_use_a_bus_open_to_all
    settings_take_effect
    a_setting_that_cannot_be_used_is_named
    a_cursor_far_behind_gets_what_lives
    messages_expire_and_a_poll_says_that_some_were_missed
    a_store_that_lost_all_is_a_bus_again_for_old_cursors
    bodies_get_the_documented_answer
    parameters_get_the_documented_answer
    a_query_too_long_for_a_web_server_harms_nobody
    methods_and_paths_get_the_documented_answer
    the_client_and_the_page_come_with_the_bus
    nothing_reaches_the_command_line
    no_header_becomes_a_setting
    a_send_made_again_is_one_message_with_one_answer
    a_send_s_name_is_1_to_64_plain_characters
    a_send_made_many_times_at_the_same_moment_is_one_message
    a_packed_body_is_refused
    a_setting_under_another_name_is_refused
    a_slash_behind_the_name_is_the_bus_where_only_it_can_be_meant
    an_event_source_comes_back_and_begins_where_it_should
    a_named_origin_may_send_the_headers_it_asks_for
}

#[track_caller]
fn polled(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.status, 200, "{reply:?}");
    serde_json::from_slice(&reply.body).unwrap()
}

#[track_caller]
fn cursor(reply: &Reply) -> u64 {
    reply.header("shortbus-last-id").expect("Shortbus-Last-Id").parse().unwrap()
}

fn missed(reply: &Reply) -> bool {
    reply.header("shortbus-missed").is_some_and(|value| value == "1")
}

#[track_caller]
fn assert_outcome(reply: &Reply, status: u16, code: &str) {
    assert_eq!(reply.outcome(), (status, code.into()), "{reply:?}");
    if !code.is_empty() {
        assert_eq!(reply.header("content-type"), Some("application/json"), "{reply:?}");
        assert!(reply.json()["message"].as_str().is_some_and(|text| text.ends_with('.')), "{reply:?}");
    }
}

/// The repeat has to come back later.
#[track_caller]
fn assert_undecided(reply: &Reply) {
    assert_outcome(reply, 409, "once_undecided");
    assert_eq!(reply.header("retry-after"), Some("1"));
}

fn three_users_who_each_send_two_messages_hear_the_other_two(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let users: Vec<(u64, u64)> = (0..3).map(|_| site.join("chat")).collect();
    let mut sent = Vec::new();
    for round in 0..2 {
        for (user, _) in &users {
            let data = json!({"from": user, "round": round});
            let id = site.publish("chat", *user, data.to_string());
            sent.push(json!({"id": id, "user": user, "data": data}));
        }
    }
    for (user, id) in &users {
        let heard = polled(&site.get(&format!("chat?user={user}&id={id}")));
        let others: Vec<&Value> = sent.iter().filter(|message| message["user"] != *user).collect();
        assert_eq!(heard.iter().collect::<Vec<_>>(), others);
    }
    let all = polled(&site.get(&format!("chat?id={}", users[0].1)));
    assert_eq!(all, sent);
}

fn a_value_comes_back_byte_for_byte(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let (user, start) = site.join("chat");
    let values = [
        "1.0",
        "12345678901234567890",
        "0",
        "false",
        "true",
        "null",
        "\"\"",
        "[]",
        "{}",
        r#"{"a":1,"a":2}"#,
        "1e400",
        "-0",
        r#""\ud800""#,
        r#""\u0000 / \/ é 🦀 </script>""#,
        "{ \"a\" :\n[ 1 ,\t2 ] }",
    ];
    for value in values {
        site.publish("chat", user, value);
    }
    site.publish("chat", user, " \r\n\t7 \n");
    let reply = site.get(&format!("chat?id={start}"));
    let expected: Vec<String> = (values.iter().chain(&["7"]).zip((start + STEP..).step_by(STEP as usize)))
        .map(|(value, id)| format!("{{\"id\":{id},\"user\":{user},\"data\":{value}}}"))
        .collect();
    assert_eq!(reply.text(), format!("[{}]", expected.join(",")));
}

fn a_client_that_knows_only_the_array_gets_every_message(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let (me, mut id) = site.join("chat");
    let (other, _) = site.join("chat");
    let mut heard = Vec::new();
    for n in 0..40 {
        site.publish("chat", if n % 3 == 0 { other } else { me }, n.to_string());
        if n % 5 == 4 {
            for message in polled(&site.get(&format!("chat?user={me}&id={id}"))) {
                id = message["id"].as_u64().unwrap();
                heard.push(message["data"].as_u64().unwrap());
            }
        }
    }
    assert_eq!(heard, (0..40).filter(|n| n % 3 == 0).collect::<Vec<_>>());
}

fn the_cursor_passes_the_users_own_messages(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let (user, start) = site.join("chat");
    let own = (0..20).map(|n| site.publish("chat", user, n.to_string())).last().unwrap();
    let reply = site.get(&format!("chat?user={user}&id={start}"));
    assert_eq!(reply.text(), "[]");
    assert_eq!(cursor(&reply), own);
    let other = site.publish("chat", user ^ 1, "\"hello\"");
    let reply = site.get(&format!("chat?user={user}&id={own}"));
    assert_eq!((polled(&reply).len(), cursor(&reply), missed(&reply)), (1, other, false));
    let reply = site.get(&format!("chat?user={user}&id={other}"));
    assert_eq!((reply.text(), cursor(&reply), missed(&reply)), ("[]", other, false));
}

fn two_buses_side_by_side_hear_nothing_of_each_other(front: Front) {
    let site = Site::start(front);
    for bus in ["red", "blue"] {
        site.copy(bus);
        site.publish(bus, 1, format!("\"{bus}\""));
    }
    for bus in ["red", "blue"] {
        let heard = polled(&site.get(&format!("{bus}?id=0")));
        assert_eq!(heard.iter().map(|message| &message["data"]).collect::<Vec<_>>(), [bus]);
    }
}

/// Names of files that are text.
const NAMES: [&str; 15] = [
    "a b",
    "a.b",
    "a%20b",
    "a+b",
    "A b",
    "chat",
    "Chat",
    "CHAT",
    "last",
    "π",
    "日本 語",
    "a:last",
    "*",
    "-h",
    "'\"$(x)",
];

/// Names of files, as strange as this front can have them.
fn names_on(front: Front) -> Vec<Vec<u8>> {
    let longest = [vec![b'x'; 255], [vec![b'x'; 254], vec![b'y']].concat(), vec![0xc3; 255]];
    let bytes = [b"\xff\xfe".to_vec(), b"\xff".to_vec()].into_iter().chain(longest);
    let all = NAMES.iter().map(|name| name.as_bytes().to_vec()).chain(bytes);
    let is_possible = |name: &Vec<u8>| match front {
        // A bus's socket is called after it, and a socket's path is short.
        Front::NginxFastcgi => name.len() < 60,
        // mod_fcgid starts a command line, with spaces and quotes, from a path of at most 255 bytes.
        Front::ApacheFcgid => name.len() < 200 && !name.iter().any(|byte| b" '\"\\".contains(byte)),
        // So does lighttpd; its conditions know only UTF-8, and take two that differ in case for the same.
        Front::LighttpdFastcgi => {
            std::str::from_utf8(name).is_ok() && !name.iter().any(|&byte| byte == b' ' || byte.is_ascii_uppercase())
        }
        _ => true,
    };
    all.filter(is_possible).collect()
}

fn any_file_name_is_a_bus_of_its_own(front: Front) {
    let site = Site::start(front);
    let names = names_on(front);
    for name in &names {
        site.copy(std::ffi::OsStr::from_bytes(name));
        site.publish(&encode(name), 1, format!("\"{}\"", encode(name)));
    }
    for name in &names {
        let heard = polled(&site.get(&format!("{}?id=0", encode(name))));
        assert_eq!(heard.iter().map(|message| &message["data"]).collect::<Vec<_>>(), [&encode(name)]);
    }
    // No file has a name of 300 bytes: the server's own answer, and the bus goes on.
    if ![Front::Bare, Front::NginxFastcgi].contains(&front) && !front.names_buses() {
        let reply = site.get(&"x".repeat(300));
        assert!([403, 404].contains(&reply.status), "{reply:?}");
        assert_eq!(site.get("chat").status, 200);
        site.foresee(&"x".repeat(300));
        site.foresee("Cannot get script name");
    }
}

fn a_copy_a_hard_link_and_a_symlink_are_three_buses(front: Front) {
    let site = Site::start(front);
    site.copy("copy");
    fs::hard_link(site.cgi_bin("copy"), site.cgi_bin("hard")).unwrap();
    std::os::unix::fs::symlink("copy", site.cgi_bin("soft")).unwrap();
    for bus in ["copy", "hard", "soft"] {
        site.publish(bus, 1, format!("\"{bus}\""));
    }
    for bus in ["copy", "hard", "soft"] {
        let messages = if front.tells_links() || bus == "hard" { 1 } else { 2 };
        assert_eq!(polled(&site.get(&format!("{bus}?id=0"))).len(), messages, "{bus}");
    }
}

fn a_name_that_starts_with_nph_works_too(front: Front) {
    let site = Site::start(front);
    site.copy("nph-chat");
    if front == Front::UwsgiCgi {
        // It takes no status line.
        assert_eq!(site.send("GET", "nph-chat", &[], b""), None);
        return;
    }
    let (user, start) = site.join("nph-chat");
    site.publish("nph-chat", user, "\"hello\"");
    let reply = site.get(&format!("nph-chat?id={start}"));
    assert_eq!((polled(&reply).len(), reply.header("content-type")), (1, Some("application/json")));
    assert_outcome(&site.get("nph-chat?id=x"), 400, "bad_parameter");
    let head = site.request("HEAD", "nph-chat", &[], b"");
    assert_eq!((head.status, head.text()), (200, ""));
}

fn replies_carry_the_contracts_headers(front: Front) {
    let site = Site::with(front, &[("gone", &[("SHORTBUS_MEMCACHED", "/nowhere")])]);
    site.copy("chat");
    let join = site.get("chat");
    let json = join.json();
    let names = json.as_object().unwrap().keys().collect::<Vec<_>>();
    match front.can_wait() {
        true => assert_eq!(names, ["batch", "id", "stream", "user", "wait"]),
        false => assert_eq!(names, ["batch", "id", "user"]),
    }
    for name in ["batch", "id", "user"] {
        assert!(json[name].as_u64().is_some_and(|number| number < 1 << 53), "{json}");
    }
    assert_ne!(site.join("chat").0, site.join("chat").0);
    let id = site.join("chat").1;
    let post = site.post("chat?user=9007199254740991", "1");
    assert_eq!(post.text(), format!("{{\"user\":9007199254740991,\"id\":{}}}", id + STEP));
    let poll = site.get(&format!("chat?id={id}"));
    let (refused, gone) = (site.get("chat?id="), site.get("gone"));
    let method = site.request("DELETE", "chat", &[], b"");
    for (reply, status) in [(&join, 200), (&poll, 200), (&post, 200), (&refused, 400), (&method, 405), (&gone, 503)] {
        assert_eq!(reply.status, status, "{reply:?}");
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(reply.header("content-type"), Some("application/json"));
        assert_eq!(reply.header("access-control-allow-origin"), None);
        assert_eq!(reply.header("shortbus-last-id").is_some(), reply == &poll);
        assert_eq!(reply.header("shortbus-missed"), None);
        assert_eq!(reply.header("allow"), (status == 405).then_some("GET, HEAD, POST, OPTIONS"));
        assert_eq!(reply.header("retry-after"), (status == 503).then_some("1"));
    }
}

fn head_is_get_without_the_body(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let id = site.publish("chat", 1, "\"hello\"");
    for (target, status) in [("chat".into(), 200), (format!("chat?id={}", id - 1), 200), ("chat?id=x".into(), 400)] {
        let get = site.get(&target);
        let head = site.request("HEAD", &target, &[], b"");
        assert_eq!((head.status, head.text()), (status, ""));
        for name in ["content-type", "cache-control", "x-content-type-options", "shortbus-last-id"] {
            assert_eq!(head.header(name), get.header(name), "{name}");
        }
    }
    site.expect_error("bad_parameter");
}

/// Origins of other sites, and what is none.
const FOREIGN: [&str; 10] = [
    "http://evil.example",
    "https://evil.example",
    "null",
    "",
    "http://localhost.evil.example",
    "http://localhost:81",
    "localhost",
    "http://localhost@evil.example",
    "file://",
    "https://friend.example.evil.example",
];

fn a_foreign_page_can_neither_publish_nor_ask_to(front: Front) {
    let site =
        Site::with(front, &[("friends", &[("SHORTBUS_ALLOW_ORIGIN", "https://friend.example http://b.example:8080")])]);
    site.copy("chat");
    let start = site.join("chat").1;
    for bus in ["chat", "friends"] {
        for origin in FOREIGN {
            // lighttpd hands on no header without a value.
            if origin.is_empty() && front.is_lighttpd() {
                continue;
            }
            for method in ["POST", "OPTIONS"] {
                let reply = site.request(method, &format!("{bus}?user=1"), &[("Origin", origin)], b"1");
                assert_outcome(&reply, 403, "foreign_origin");
                assert_eq!(reply.header("access-control-allow-origin"), None);
            }
            // It may ask, but its browser does not let it read.
            let reply = site.request("GET", bus, &[("Origin", origin)], b"");
            assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, None));
        }
    }
    // What the browser says decides, also where the name is right: over plain http it is easily forged. Servers may hand on
    // no Origin; where they tell the scheme it has to be the right one.
    let (own, other) = front.schemes();
    let [own_origin, other_origin] = [own, other].map(|scheme| format!("{scheme}://localhost"));
    let foreign: [&[(&str, &str)]; 8] = [
        &[("Origin", "http://evil.example"), ("Sec-Fetch-Site", "cross-site")],
        &[("Origin", &own_origin), ("Sec-Fetch-Site", "cross-site")],
        &[("Origin", &own_origin), ("Sec-Fetch-Site", "same-site")],
        &[("Sec-Fetch-Site", "cross-site")],
        &[("Referer", "http://evil.example/localhost")],
        &[("Referer", "http://localhost.evil.example")],
        &[("Origin", &own_origin), ("X-Forwarded-Proto", other)],
        &[("Origin", &other_origin)],
    ];
    for headers in foreign {
        if !front.tells_scheme() && headers == [("Origin", &*other_origin)] {
            assert_eq!(site.request("OPTIONS", "chat", headers, b"").status, 204);
            continue;
        }
        if !front.trusts_proxies() && headers.contains(&("X-Forwarded-Proto", other)) {
            continue;
        }
        let reply = site.request("POST", "chat?user=1", headers, b"1");
        assert_outcome(&reply, 403, "foreign_origin");
        let sentence = reply.json()["message"].as_str().unwrap().to_owned();
        let whose = match headers[0] {
            ("Sec-Fetch-Site", _) => "another site",
            (_, page) => page,
        };
        assert!(sentence.starts_with(&format!("Pages of {whose} may not use this bus")), "{sentence}");
    }
    let by_referer = [("Referer", "https://friend.example/page")];
    assert_outcome(&site.request("POST", "chat?user=1", &by_referer, b"1"), 403, "foreign_origin");
    assert_outcome(&site.request("POST", "friends?user=1", &by_referer, b"1"), 200, "");
    let port_lost = [("Origin", "http://localhost:8080"), ("Host", "localhost")];
    let reply = site.request("POST", "chat?user=1", &port_lost, b"1");
    let sentence = reply.json()["message"].as_str().unwrap().to_owned();
    assert!(sentence.contains("http://localhost:8080") && sentence.contains("as localhost."), "{sentence}");
    assert_eq!(site.get(&format!("chat?id={start}")).text(), "[]");
}

fn a_page_of_this_site_publishes(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    // curl has no Origin; a page of this host has this one, also behind a proxy that speaks https or rewrites Host.
    let (own, other) = front.schemes();
    let [of_own, of_other] = [own, other].map(|scheme| move |rest: &str| format!("{scheme}://{rest}"));
    let own: [&[(&str, &str)]; 10] = [
        &[],
        &[("Origin", &of_own("localhost"))],
        &[("Origin", &of_other("localhost")), ("X-Forwarded-Proto", other)],
        &[("Origin", &of_own("Example.org:8080")), ("Host", "example.org:8080")],
        &[("Origin", "https://example.org"), ("Host", "example.org:443"), ("X-Forwarded-Proto", "https")],
        &[("Origin", "https://public.example"), ("Host", "backend:8080"), ("Sec-Fetch-Site", "same-origin")],
        &[("Origin", "null"), ("Sec-Fetch-Site", "same-origin")],
        &[("Referer", &of_own("localhost/a/page?of=it"))],
        &[("Referer", "")],
        &[("Referer", "http://evil.example/"), ("Sec-Fetch-Site", "none")],
    ];
    for headers in own {
        let is_believed = front.trusts_proxies() || headers.iter().all(|(name, _)| *name != "X-Forwarded-Proto");
        let status = if is_believed { 200 } else { 403 };
        assert_eq!(site.request("POST", "chat?user=1", headers, b"1").status, status, "{headers:?}");
    }
}

fn an_allowed_origin_may_use_the_bus(front: Front) {
    let site =
        Site::with(front, &[("friends", &[("SHORTBUS_ALLOW_ORIGIN", "https://friend.example http://b.example:8080")])]);
    for origin in ["https://friend.example", "http://b.example:8080"] {
        let ask = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "POST"),
            ("Access-Control-Request-Headers", "content-type"),
        ];
        let preflight = site.request("OPTIONS", "friends", &ask, b"");
        assert_eq!((preflight.status, preflight.text()), (204, ""));
        assert_eq!(preflight.header("access-control-allow-methods"), Some("GET, HEAD, POST, OPTIONS"));
        assert_eq!(preflight.header("access-control-allow-headers"), Some("content-type"));
        let post =
            site.request("POST", "friends?user=1", &[("Origin", origin), ("Content-Type", "application/json")], b"1");
        let poll = site.request("GET", "friends?id=0", &[("Origin", origin)], b"");
        let refused = site.request("GET", "friends?id=x", &[("Origin", origin)], b"");
        for (reply, status) in [(&preflight, 204), (&post, 200), (&poll, 200), (&refused, 400)] {
            assert_eq!(
                (reply.status, reply.header("access-control-allow-origin")),
                (status, Some(origin)),
                "{reply:?}"
            );
            let vary = if status == 204 { "Origin, Access-Control-Request-Headers" } else { "Origin" };
            // Apache writes the list anew.
            assert_eq!(reply.header("vary").map(|list| list.replace(',', ", ").replace("  ", " ")), Some(vary.into()));
        }
        assert_eq!(
            poll.header("access-control-expose-headers"),
            Some("Shortbus-Last-Id, Shortbus-Missed, Retry-After, Date")
        );
    }
}

fn any_origin_may_use_a_bus_open_to_all(front: Front) {
    let site = Site::with(front, &[("open", &[("SHORTBUS_ALLOW_ORIGIN", "*")])]);
    for origin in ["https://anyone.example", "null"] {
        for (method, status) in [("OPTIONS", 204), ("POST", 200), ("GET", 200)] {
            let reply = site.request(method, "open?user=1&id=0", &[("Origin", origin)], b"1");
            assert_eq!((reply.status, reply.header("access-control-allow-origin")), (status, Some("*")), "{reply:?}");
        }
    }
}

fn settings_take_effect(front: Front) {
    let site = Site::with(
        front,
        &[
            ("brief", &[("SHORTBUS_TTL", "1")]),
            ("small", &[("SHORTBUS_MAX_BYTES", "4")]),
            ("large", &[("SHORTBUS_MAX_BYTES", "1000000")]),
            ("one", &[("SHORTBUS_BUS", "the same name/ä")]),
            ("two", &[("SHORTBUS_BUS", "the same name/ä")]),
        ],
    );
    assert_eq!(site.publish("one", 1, "1"), site.join("two").1);
    assert_eq!(polled(&site.get("two?id=0")).len(), 1);
    site.publish("small", 1, "1234");
    assert_outcome(&site.post("small?user=1", "12345"), 413, "too_large");
    let large = format!("\"{}\"", "x".repeat(999_998));
    let id = site.publish("large", 1, &large);
    let reply = site.get(&format!("large?id={}", id - 1));
    assert!(reply.text().contains(&large));
    assert_outcome(&site.post("large?user=1", format!("{large} ")), 413, "too_large");
    let id = site.publish("brief", 1, "1");
    let reply = site.get(&format!("brief?id={}", id - 1));
    assert_eq!((polled(&reply).len(), missed(&reply)), (1, false));
    thread::sleep(Duration::from_millis(2_100));
    let reply = site.get(&format!("brief?id={}", id - 1));
    assert_eq!((reply.text(), cursor(&reply), missed(&reply)), ("[]", id, true));
}

/// Settings with values that they may not have.
const WRONG_SETTINGS: [(&str, &[&str]); 7] = [
    ("SHORTBUS_TTL", &["", "0", "-1", "1.5", "60s", " 60", "+60", "2592001", "18446744073709551616", "abc"]),
    ("SHORTBUS_MAX_BYTES", &["", "0", "-1", "10k", "1000001", "9999999999999999999999"]),
    (
        "SHORTBUS_MEMCACHED",
        &[
            "",
            " ",
            "localhost",
            "127.0.0.1:",
            ":11211",
            "127.0.0.1:0",
            "127.0.0.1:65536",
            "a:b",
            "127.0.0.1:11211 x",
            "http://127.0.0.1:11211",
            "me:pw@127.0.0.1:11211",
            "::1:11211",
            "[::1:11211",
        ],
    ),
    ("SHORTBUS_STORE", &["", "store", "./store", "~/store", "memory:"]),
    ("SHORTBUS_STORE_BYTES", &["", "0", "-1", "32M", "4194303", "68719476737", "99999999999999999999"]),
    ("SHORTBUS_BUS", &[""]),
    (
        "SHORTBUS_ALLOW_ORIGIN",
        &[
            "",
            "example.org",
            "https://example.org/",
            "https://Example.org",
            "https://",
            "https://a.example, https://b.example",
            "**",
        ],
    ),
];

fn a_setting_that_cannot_be_used_is_named(front: Front) {
    let cases: Vec<(String, [(&str, &str); 1])> = (WRONG_SETTINGS.iter())
        .flat_map(|(name, values)| values.iter().map(move |value| (*name, *value)))
        .enumerate()
        .map(|(n, case)| (format!("bus{n}"), [case]))
        .collect();
    let settings: Vec<(&str, &[(&str, &str)])> = cases.iter().map(|(bus, case)| (&bus[..], &case[..])).collect();
    let site = Site::with(front, &settings);
    for (bus, [(name, value)]) in &cases {
        for reply in [site.get(bus), site.post(&format!("{bus}?user=1"), "1")] {
            assert_outcome(&reply, 500, "bad_setting");
            let message = reply.json()["message"].as_str().unwrap().to_owned();
            assert!(message.contains(name) && message.contains("has to be "), "{message}");
            // The value is for the operator alone.
            assert!(value.len() < 3 || !message.contains(&format!("'{value}'")), "{message}");
            let known = if *name == "SHORTBUS_BUS" { "-" } else { bus };
            let is_told = |line: &str| {
                line.contains(&format!("shortbus: {known}: bad_setting: "))
                    && line.contains(&format!("(it is '{value}')"))
            };
            wait_for("the bus and the value in the log", || !front.has_log() || site.log().lines().any(is_told));
        }
        // Files need no setting. The page says what is wrong.
        let page = site.get(&format!("{bus}{}", front.page()));
        assert_eq!((page.status, page.text()), (200, shortbus::browser::find(b"/").unwrap().body));
        assert!(page.header("content-security-policy").is_some(), "{page:?}");
        for (method, target) in [("PUT", format!("{bus}/page.js")), ("GET", format!("{bus}/nothing"))] {
            assert_outcome(&site.request(method, &target, &[], b""), 500, "bad_setting");
        }
    }
    site.copy("chat");
    site.publish("chat", 1, "1");
}

fn a_reply_is_limited_and_the_rest_comes_next(front: Front) {
    let site = Site::start(front);
    for (bus, count, size, most) in [("many", 1_100, 1, 1_000), ("big", 130, 10_000, 104)] {
        site.copy(bus);
        let (_, start) = site.join(bus);
        let body = format!("\"{}\"", "x".repeat(size));
        // Publishing over HTTP would take minutes: the slots as a publish leaves them, straight to memcached.
        let mut commands = String::new();
        for slot in start / STEP + 1..=start / STEP + count {
            commands.push_str(&format!("ms shortbus:{bus}:{slot} {} T60 q\r\n1 {body}\r\n", body.len() + 2));
        }
        site.memcached.ask(format!("{commands}ma shortbus:{bus}:newest D{count}\r\n"));
        let mut heard = 0;
        let mut at = start;
        for expected in [most, count - most, 0] {
            let reply = site.get(&format!("{bus}?id={at}"));
            let ids: Vec<u64> = polled(&reply).iter().map(|message| message["id"].as_u64().unwrap()).collect();
            assert_eq!(ids, (1..=expected).map(|n| at + n * STEP).collect::<Vec<_>>());
            assert!(reply.body.len() <= 1 << 20 && !missed(&reply));
            at = cursor(&reply);
            heard += expected;
        }
        assert_eq!((heard, at), (count, start + count * STEP));
    }
}

fn a_cursor_far_behind_gets_what_lives(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let reply = site.get("chat?id=0");
    assert_eq!((reply.text(), cursor(&reply), missed(&reply)), ("[]", 0, false));
    let (_, start) = site.join("chat");
    let reply = site.get("chat?id=0");
    assert_eq!((reply.text(), cursor(&reply)), ("[]", start));
    for n in 0..50 {
        site.publish("chat", 1, n.to_string());
    }
    for from in [0, 1, start - 1_000, start - 16, start - 1, start] {
        let reply = site.get(&format!("chat?id={from}"));
        let heard: Vec<u64> = polled(&reply).iter().map(|message| message["data"].as_u64().unwrap()).collect();
        assert_eq!(heard, (0..50).collect::<Vec<_>>(), "from {from}");
        assert_eq!((cursor(&reply), missed(&reply)), (start + 50 * STEP, from != start));
    }
}

fn messages_expire_and_a_poll_says_that_some_were_missed(front: Front) {
    let site = Site::with(front, &[("brief", &[("SHORTBUS_TTL", "1")])]);
    let (_, start) = site.join("brief");
    for n in 0..20 {
        site.publish("brief", 1, n.to_string());
    }
    thread::sleep(Duration::from_millis(2_100));
    let id = site.publish("brief", 1, "\"new\"");
    let reply = site.get(&format!("brief?id={start}"));
    assert_eq!(polled(&reply), [json!({"id": id, "user": 1, "data": "new"})]);
    assert_eq!((cursor(&reply), missed(&reply)), (id, true));
    let reply = site.get(&format!("brief?id={}", id - 1));
    assert_eq!((polled(&reply).len(), missed(&reply)), (1, false));
}

fn a_lost_counter_comes_back_higher(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let old = site.publish("chat", 1, "\"before\"");
    assert!(site.memcached.ask("md shortbus:chat:newest\r\n").starts_with("HD"));
    let reply = site.get(&format!("chat?id={old}"));
    assert_eq!((reply.text(), cursor(&reply)), ("[]", old));
    let new = site.publish("chat", 1, "\"after\"");
    assert!(new > old);
    let reply = site.get(&format!("chat?id={old}"));
    assert_eq!((polled(&reply).len(), cursor(&reply), missed(&reply)), (1, new, true));
    // One who was further behind still gets what lives on both sides of the gap, but no more than once.
    let both = site.get(&format!("chat?id={}", old - 1));
    assert_eq!(polled(&both).iter().map(|message| &message["data"]).collect::<Vec<_>>(), ["before", "after"]);
}

fn a_counter_that_came_back_lower_is_followed(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let old = site.publish("chat", 1, "\"before\"");
    site.memcached.ask("md shortbus:chat:newest\r\nms shortbus:chat:newest 7\r\n1000000\r\n");
    let new = site.publish("chat", 1, "\"after\"");
    assert_eq!(new / STEP, 1_000_001);
    let reply = site.get(&format!("chat?id={old}"));
    assert_eq!(polled(&reply), [json!({"id": new, "user": 1, "data": "after"})]);
    assert_eq!((cursor(&reply), missed(&reply)), (new, true));
}

fn a_store_that_lost_all_is_a_bus_again_for_old_cursors(front: Front) {
    let mut site = Site::start(front);
    site.copy("chat");
    let old = site.publish("chat", 1, "\"before\"");
    site.lose_all();
    let reply = site.get(&format!("chat?id={old}"));
    assert_eq!((reply.text(), cursor(&reply)), ("[]", old));
    let new = site.publish("chat", 1, "\"after\"");
    let reply = site.get(&format!("chat?user=2&id={old}"));
    assert_eq!(polled(&reply), [json!({"id": new, "user": 1, "data": "after"})]);
    assert_eq!((cursor(&reply), missed(&reply)), (new, true));
}

/// A message of so many bytes.
fn text_of(size: usize) -> Vec<u8> {
    format!("\"{}\"", "x".repeat(size - 2)).into_bytes()
}

/// Bodies, each on a bus, with its status and its error's code.
fn bodies() -> Vec<(&'static str, Vec<u8>, u16, &'static str)> {
    let nested = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
    vec![
        ("chat", b"".to_vec(), 400, "not_json"),
        ("chat", b" \n".to_vec(), 400, "not_json"),
        ("chat", b"hello".to_vec(), 400, "not_json"),
        ("chat", b"{'a':1}".to_vec(), 400, "not_json"),
        ("chat", b"{\"a\":1".to_vec(), 400, "not_json"),
        ("chat", b"[1,]".to_vec(), 400, "not_json"),
        ("chat", b"01".to_vec(), 400, "not_json"),
        ("chat", b"NaN".to_vec(), 400, "not_json"),
        ("chat", b"1 2".to_vec(), 400, "not_json"),
        ("chat", b"{}x".to_vec(), 400, "not_json"),
        ("chat", b"\"a\nb\"".to_vec(), 400, "not_json"),
        ("chat", b"\xef\xbb\xbf1".to_vec(), 400, "not_json"),
        ("chat", b"\"\xff\"".to_vec(), 400, "not_utf8"),
        ("chat", b"\"\xed\xa0\x80\"".to_vec(), 400, "not_utf8"),
        ("chat", br#""\ud800""#.to_vec(), 200, ""),
        ("chat", b"\"\0\"".to_vec(), 400, "not_json"),
        ("chat", b"1\0".to_vec(), 400, "not_json"),
        ("chat", b"\0".to_vec(), 400, "not_json"),
        ("chat", b"1e400".to_vec(), 200, ""),
        ("chat", "9".repeat(1_000).into(), 200, ""),
        ("chat", "9".repeat(1_001).into(), 400, "number_too_long"),
        ("chat", format!("[\"{0}\",-{0}.5e{1}]", "1".repeat(500), "2".repeat(498)).into(), 400, "number_too_long"),
        ("chat", nested(128).into(), 200, ""),
        ("chat", nested(129).into(), 400, "too_deep"),
        ("chat", nested(100_000).into(), 413, "too_large"),
        ("deep", nested(100_000).into(), 400, "too_deep"),
        ("chat", text_of(10_240), 200, ""),
        ("chat", text_of(10_241), 413, "too_large"),
        ("chat", text_of(100_000_000), 413, "too_large"),
    ]
}

/// Whatever the length says that the executable is given: how many messages come of it.
fn lengths_get_the_documented_answer(site: &Site) -> u64 {
    for (length, status, code) in [
        ("", 411, "length_required"),
        ("x", 400, "bad_length"),
        ("-2", 400, "bad_length"),
        // Caddy's word for an unknown one.
        ("-1", 411, "length_required"),
        ("1e3", 400, "bad_length"),
        ("99", 400, "incomplete"),
        ("99999999999999999999", 400, "bad_length"),
    ] {
        assert_outcome(&site.raw("POST", "chat?user=1", &[("Content-Length", length)], b"12"), status, code);
    }
    // Without a length the body ends where the input does, as a chunked one does under Apache.
    assert_outcome(&site.raw("POST", "chat?user=1", &[], b"[12]"), 200, "");
    // A number may be a part of one.
    assert_outcome(&site.raw("POST", "chat?user=1", &[], b"12"), 411, "length_required");
    assert_outcome(&site.raw("POST", "chat?user=1", &[], b" -1e3 "), 411, "length_required");
    assert_outcome(&site.raw("POST", "chat?user=1", &[], &text_of(10_241)), 413, "too_large");
    1
}

/// A body that ends early, and some that come in chunks: how many messages come of it.
fn unknown_lengths_get_the_documented_answer(site: &Site) -> u64 {
    // A body that stops short: server and bus between them publish nothing, and go on.
    let _ = site.send("POST", "chat?user=1", &[("Content-Length", "99")], b"12");
    if !site.front.takes_chunks() {
        site.expect_error("incomplete");
    }
    site.foresee("Error reading request entity data");
    site.foresee("unexpected EOF");
    site.foresee("prefetch request body failed");
    site.foresee("(reading input brigade)");
    site.foresee("can't get data from http client");
    let chunked = [("Transfer-Encoding", "chunked")];
    if !site.front.takes_chunks() {
        assert_outcome(&site.raw("POST", "chat?user=1", &chunked, b"4\r\n[42]\r\n0\r\n\r\n"), 400, "not_json");
        return 0;
    }
    assert_outcome(&site.raw("POST", "chat?user=1", &chunked, b"1\r\n[\r\n3\r\n42]\r\n0\r\n\r\n"), 200, "");
    let number = site.raw("POST", "chat?user=1", &chunked, b"1\r\n4\r\n1\r\n2\r\n0\r\n\r\n");
    // Servers that gather the body tell its length.
    let published = u64::from(number.status == 200);
    assert_outcome(
        &number,
        if published == 1 { 200 } else { 411 },
        if published == 1 { "" } else { "length_required" },
    );
    let tells = ![Front::ApacheCgid, Front::ApacheCgi, Front::CaddyFastcgi].contains(&site.front);
    // Over HTTP/2 Apache does where the whole body is there before it looks.
    assert!(published == u64::from(tells) || site.front == Front::ApacheHttp2, "{:?}", site.front);
    let large = [b"2801\r\n", &text_of(10_241)[..], b"\r\n0\r\n\r\n"].concat();
    assert_outcome(&site.raw("POST", "chat?user=1", &chunked, &large), 413, "too_large");
    assert_outcome(&site.raw("POST", "chat?user=1", &chunked, b"0\r\n\r\n"), 400, "not_json");
    1 + published
}

fn bodies_get_the_documented_answer(front: Front) {
    let site = Site::with(front, &[("deep", &[("SHORTBUS_MAX_BYTES", "1000000")])]);
    site.copy("chat");
    let start = site.join("chat").1;
    let mut good = 0;
    for (bus, body, status, code) in bodies() {
        let shown = String::from_utf8_lossy(&body[..body.len().min(20)]).into_owned();
        let reply = site.post(&format!("{bus}?user=1"), &body);
        assert_eq!(reply.outcome(), (status, code.into()), "{shown:?}");
        assert_outcome(&reply, status, code);
        good += u64::from(status == 200);
    }
    let longer = [("Content-Length", "2"), ("Connection", "keep-alive")];
    if front.is_http2() {
        // There a request that is longer than it says is malformed (RFC 9113, section 8.1.1).
        let reply = site.send("POST", "chat?user=1", &longer, b"12345");
        assert!(reply.as_ref().is_none_or(|reply| reply.status == 400), "{reply:?}");
    } else {
        // What lies behind is not the body's.
        assert_outcome(&site.raw("POST", "chat?user=1", &longer, b"12345"), 200, "");
        good += 1;
    }
    good += match front {
        Front::Bare => lengths_get_the_documented_answer(&site),
        _ => unknown_lengths_get_the_documented_answer(&site),
    };
    let reply = site.get(&format!("chat?id={start}"));
    assert_eq!(reply.text().matches("{\"id\":").count() as u64, good);
}

/// What is no number that JavaScript reads exactly.
const NO_NUMBERS: [&str; 22] = [
    "",
    "-1",
    "+1",
    "1.0",
    "1e3",
    "0x1",
    " 1",
    "1 ",
    "9007199254740992",
    "18446744073709551616",
    "abc",
    "null",
    "%",
    "%zz",
    "%31%",
    "%ff",
    "%C3%28",
    "%00",
    "1%00",
    "1,2",
    "NaN",
    "\u{665}",
];

fn parameters_get_the_documented_answer(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    for value in NO_NUMBERS.map(|value| value.replace(' ', "%20").replace('\u{665}', "%D9%A5")) {
        assert_outcome(&site.get(&format!("chat?id={value}")), 400, "bad_parameter");
        assert_outcome(&site.get(&format!("chat?user={value}&id=0")), 400, "bad_parameter");
        assert_outcome(&site.post(&format!("chat?user={value}"), "1"), 400, "bad_parameter");
    }
    let wrong = ["stream=7", "stream=", "wait=abc", "wait=-1", "wait=1&wait=1", "stream=1&stream=1"];
    for query in wrong.map(|query| format!("id=1&{query}")) {
        assert_outcome(&site.get(&format!("chat?{query}")), 400, "bad_parameter");
    }
    for query in ["user=1", "user=1&id=1&id=1", "user=1&user=1&id=1", "id=1&i%64=2"] {
        assert_outcome(&site.get(&format!("chat?{query}")), 400, "bad_parameter");
    }
    for query in ["", "?", "?id=1", "?user=1&user=2", "?USER=1"] {
        assert_outcome(&site.post(&format!("chat{query}"), "1"), 400, "bad_parameter");
    }
    for query in ["id=9007199254740991", "user=0&id=0", "%69d=%30", "&&id=0&", "id=0&other=%ff&x", "user=00007&id=0001"]
    {
        assert_outcome(&site.get(&format!("chat?{query}")), 200, "");
    }
    // What the bus does not know is left alone, such as a page's way around caches.
    assert!(site.get("chat?_=1700000000").json()["user"].is_u64());
}

fn a_query_too_long_for_a_web_server_harms_nobody(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let long = "9".repeat(65_000);
    for target in [format!("chat?id={long}"), format!("chat?id=0&x={long}")] {
        match front {
            Front::Bare => assert_eq!(site.get(&target).status, if target.contains('x') { 200 } else { 400 }),
            // The servers' own limit is shorter.
            _ if front.is_lighttpd() => {
                assert_eq!(site.send("GET", &target, &[], b"").unwrap().status, 431);
                site.foresee("oversized request-header");
            }
            Front::CaddyFastcgi => assert_eq!(site.send("GET", &target, &[], b"").unwrap().status, 431),
            Front::BusyboxCgi => assert_eq!(site.send("GET", &target, &[], b"").unwrap().status, 400),
            // It ends the connection.
            Front::NginxHttp2 | Front::UwsgiCgi => assert_eq!(site.send("GET", &target, &[], b""), None),
            _ => assert_eq!(site.send("GET", &target, &[], b"").unwrap().status, 414),
        }
    }
    assert_eq!(site.get("chat").status, 200);
}

fn methods_and_paths_get_the_documented_answer(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    for method in ["PUT", "DELETE", "PATCH", "PROPFIND", "get", "FOO"] {
        let reply = site.request(method, "chat?user=1&id=0", &[], b"1");
        // nginx knows no method in lower case, lighttpd none that is not in a standard.
        if method == "get" && front.is_nginx() || ["get", "FOO"].contains(&method) && front.is_lighttpd() {
            assert_eq!(reply.status, if front.is_nginx() { 400 } else { 501 });
            continue;
        }
        // Caddy makes a POST of it, BusyBox a GET.
        if method == "get" && [Front::CaddyFastcgi, Front::BusyboxCgi].contains(&front) {
            assert!(reply.json()["id"].is_u64() == (front == Front::CaddyFastcgi) && reply.status == 200, "{reply:?}");
            continue;
        }
        assert_outcome(&reply, 405, "bad_method");
        assert_eq!(reply.header("allow"), Some("GET, HEAD, POST, OPTIONS"));
    }
    let options = site.request("OPTIONS", "chat", &[], b"");
    assert_eq!((options.status, options.header("allow")), (204, Some("GET, HEAD, POST, OPTIONS")));
    for path in ["/nothing", "/%2e%2e%2fetc", "/a/b/c", "/%ff", "/last", "/chat"] {
        // Apache itself refuses encoded slashes.
        if path.contains("%2f") && front != Front::Bare {
            continue;
        }
        // lighttpd's conditions know only UTF-8.
        if path == "/%ff" && front == Front::LighttpdFastcgi {
            assert_eq!(site.get(&format!("chat{path}")).status, 404);
            continue;
        }
        assert_outcome(&site.get(&format!("chat{path}")), 404, "unknown_path");
        assert_outcome(&site.post(&format!("chat{path}?user=1"), "1"), 404, "unknown_path");
    }
    assert_eq!(site.get("chat").status, 200);
}

fn the_client_and_the_page_come_with_the_bus(front: Front) {
    // They need no store.
    let site = Site::with(
        front,
        &[("chat", &[("SHORTBUS_MEMCACHED", "/nowhere"), ("SHORTBUS_ALLOW_ORIGIN", "https://a.example")])],
    );
    let files = [
        (front.page(), "text/html; charset=utf-8", "<!doctype html>"),
        ("/page.css", "text/css; charset=utf-8", "{"),
        ("/page.js", "text/javascript; charset=utf-8", "import "),
        ("/shortbus.js", "text/javascript; charset=utf-8", "globalThis.MessageBus = MessageBus"),
        ("/shortbus.mjs", "text/javascript; charset=utf-8", "export { MessageBus"),
        ("/shortbus.d.ts", "text/plain; charset=utf-8", "export class MessageBus"),
    ];
    let mut tags = std::collections::HashSet::new();
    for (path, media_type, part) in files {
        let target = format!("chat{path}");
        let reply = site.get(&target);
        assert_eq!((reply.status, reply.header("content-type")), (200, Some(media_type)), "{path}");
        assert!(reply.text().to_lowercase().contains(&part.to_lowercase()), "{path}");
        assert_eq!(reply.header("cache-control"), Some("no-cache"));
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
        let policy = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'";
        assert_eq!(reply.header("content-security-policy"), Some(policy));
        let tag = reply.header("etag").unwrap().to_owned();
        assert!(tags.insert(tag.clone()), "{path}: a tag of its own");
        for known in [&tag[..], &format!("W/{tag}"), &format!("\"other\", {tag}")] {
            let again = site.request("GET", &target, &[("If-None-Match", known)], b"");
            if !front.hands_on_tags() {
                assert_eq!((again.status, &again.body), (200, &reply.body));
                continue;
            }
            assert_eq!((again.status, again.text(), again.header("etag")), (304, "", Some(&tag[..])), "{path} {known}");
        }
        let other = site.request("GET", &target, &[("If-None-Match", "\"other\"")], b"");
        assert_eq!((other.status, &other.body), (200, &reply.body));
        let head = site.request("HEAD", &target, &[], b"");
        assert_eq!((head.status, head.text(), head.header("etag")), (200, "", Some(&tag[..])));
        let cors = site.request("GET", &target, &[("Origin", "https://a.example")], b"");
        assert_eq!(cors.header("access-control-allow-origin"), Some("https://a.example"));
        // To the slash one can publish.
        if path == "/index.html" {
            continue;
        }
        let (method, allowed) = if path == "/" { ("PUT", "GET, HEAD, POST, OPTIONS") } else { ("POST", "GET, HEAD") };
        let post = site.request(method, &format!("{target}?user=1"), &[], b"1");
        assert_outcome(&post, 405, "bad_method");
        assert_eq!(post.header("allow"), Some(allowed));
        assert!(post.json()["message"] == format!("Use one of {allowed}."), "{post:?}");
    }
    let page = site.get(&format!("chat{}", front.page())).body;
    assert_eq!(site.get("chat/index.html").body, page);
    for path in ["/page", "/shortbus", "/shortbus.js/", "//", "/SHORTBUS.JS"] {
        // Apache makes one slash of two.
        if path == "//" && front != Front::Bare || path.ends_with('/') && front == Front::BusyboxCgi {
            continue;
        }
        assert_outcome(&site.get(&format!("chat{path}")), 404, "unknown_path");
    }
}

fn nothing_reaches_the_command_line(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    for query in
        ["--help", "-h", "-s", "--check", "--version", "--check+--help", "-d+allow_url_include%3d1", "%2d%2dhelp"]
    {
        let reply = site.get(&format!("chat?{query}"));
        assert_eq!(reply.status, 200, "{query}");
        assert!(reply.json()["user"].is_u64(), "{query}: {reply:?}");
    }
}

fn no_header_becomes_a_setting(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let id = site.publish("chat", 1, "1");
    let headers = [
        ("Proxy", "http://evil.example:1"),
        ("Shortbus-Bus", "other"),
        ("Shortbus-Memcached", "/nowhere"),
        ("SHORTBUS_TTL", "x"),
        ("Shortbus-Allow-Origin", "*"),
        ("Gateway-Interface", ""),
        ("Path-Info", "/x"),
    ];
    let reply = site.request("GET", &format!("chat?id={}", id - 1), &headers, b"");
    assert_eq!((polled(&reply).len(), cursor(&reply)), (1, id));
}

fn memcached_over_tcp_works_as_over_a_unix_socket(front: Front) {
    let site = Site::on(front, Memcached::start_tcp(), &[]);
    site.copy("chat");
    let id = site.publish("chat", 1, "\"hello\"");
    assert_eq!(polled(&site.get(&format!("chat?id={}", id - 1))).len(), 1);
    let (_, port) = site.memcached.address.rsplit_once(':').unwrap();
    assert!(site.memcached.ask("stats\r\n").contains("STAT curr_items 2\r\n"), "on port {port}");
}

fn each_bus_lives_on_one_of_several_memcacheds(front: Front) {
    let pool: Vec<Memcached> = (0..3).map(|_| Memcached::start(&[])).collect();
    let list = |order: [usize; 3]| order.map(|n| pool[n].address.clone()).join(" ");
    let (one, other) = (list([0, 1, 2]), list([2, 0, 1]));
    let buses: Vec<String> = (0..12).map(|n| format!("bus{n}")).collect();
    let name = [("SHORTBUS_MEMCACHED", &one[..])];
    let settings: Vec<(&str, &[(&str, &str)])> = buses.iter().map(|bus| (&bus[..], &name[..])).collect();
    let twisted = [("SHORTBUS_MEMCACHED", &other[..]), ("SHORTBUS_BUS", "bus0")];
    let site = Site::with(front, &[&settings[..], &[("twisted", &twisted)]].concat());
    for bus in &buses {
        let id = site.publish(bus, 1, "1");
        assert_eq!(polled(&site.get(&format!("{bus}?id={}", id - 1))).len(), 1);
        // All of a bus is in one place.
        let places: Vec<bool> = (pool.iter())
            .map(|memcached| {
                let found = memcached.ask(format!("mg shortbus:{bus}:newest\r\nmg shortbus:{bus}:{}\r\n", id / STEP));
                assert!(["HD\r\nHD\r\n", "EN\r\nEN\r\n"].contains(&&found[..]), "{found}");
                found.starts_with("HD")
            })
            .collect();
        assert_eq!(places.iter().filter(|&&here| here).count(), 1, "{bus}: {places:?}");
    }
    // The order of the list does not matter, and the buses spread.
    assert_eq!(polled(&site.get("twisted?id=0")).len(), 1);
    let busy = pool.iter().filter(|memcached| !memcached.ask("stats\r\n").contains("STAT curr_items 0\r\n")).count();
    assert!(busy > 1);
}

fn a_send_made_again_is_one_message_with_one_answer(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    site.copy("other");
    let (_, start) = site.join("chat");
    let first = site.post("chat?user=1&once=k", "\"a\"");
    assert_eq!(first.text(), format!("{{\"user\":1,\"id\":{}}}", start + STEP));
    // Also with another message in between, in other words for the same, and with white space that is not the value's.
    site.publish("chat", 2, "0");
    for target in ["chat?user=1&once=k", "chat?once=%6b&user=01&time=x&sig=x", "chat?user=1&on%63e=k"] {
        for body in ["\"a\"", " \"a\"\n"] {
            let again = site.post(target, body);
            assert_eq!((again.status, again.body), (200, first.body.clone()), "{target}");
        }
    }
    for body in ["\"b\"", "\"a \"", "[\"a\"]", "\"\\u0061\""] {
        let differs = site.post("chat?user=1&once=k", body);
        assert_outcome(&differs, 409, "once_differs");
        assert_eq!(differs.header("retry-after"), None);
    }
    // Another user's, another name, another bus, or none: another message.
    let others = ["chat?user=2&once=k", "chat?user=1&once=K", "chat?user=11&once=k", "chat?user=1", "chat?user=1"];
    let ids: Vec<u64> = others.iter().map(|target| site.post(target, "\"a\"").json()["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, (3..8).map(|n| start + n * STEP).collect::<Vec<_>>());
    assert_eq!(site.post("other?user=1&once=k", "\"b\"").status, 200);
    let heard = polled(&site.get(&format!("chat?id={start}")));
    assert_eq!(heard[0], json!({"id": start + STEP, "user": 1, "data": "a"}));
    assert_eq!(heard.len(), 7);
}

fn a_send_s_name_is_1_to_64_plain_characters(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let (_, start) = site.join("chat");
    let (longest, all) = ("k".repeat(64), "ABCXYZ-abcxyz_0189");
    for once in ["k", "0", "-", "_", "last", "key", all, &longest, "%61%2D"] {
        let target = format!("chat?user=1&once={once}");
        let first = site.post(&target, "1");
        assert_outcome(&first, 200, "");
        assert_eq!(site.post(&target, "1").body, first.body, "{once}");
    }
    // The longest of all keys, where a name may be that long.
    let short = [Front::NginxFastcgi, Front::ApacheFcgid].contains(&front);
    let name = "é".repeat(if short { 20 } else { 127 });
    site.copy(&name);
    let target = format!("{}?user=9007199254740991&once={longest}", encode(name.as_bytes()));
    assert_eq!(site.post(&target, "1").text(), site.post(&target, "1").text());
    let (before, longer) = (site.writes(), "k".repeat(65));
    for once in
        ["", "%20", "a+b", "a%20b", "a.b", "a:b", "a/b", "~", "%00", "%0a", "%0d%0a", "%ff", "é", "%C3%A9", &longer]
    {
        let reply = site.post(&format!("chat?user=1&once={}", once.replace('é', "%E9")), "1");
        assert_outcome(&reply, 400, "bad_parameter");
        let message = reply.json()["message"].as_str().unwrap().to_owned();
        assert!(message.contains("'once'") && message.contains("1 to 64 characters"), "{message}");
    }
    for query in ["user=1&once=k&once=k", "user=1&once=k&onc%65=j", "once=k"] {
        assert_outcome(&site.post(&format!("chat?{query}"), "1"), 400, "bad_parameter");
    }
    assert_eq!(site.writes(), before);
    assert_eq!(polled(&site.get(&format!("chat?id={start}"))).len(), 9);
}

fn a_send_made_many_times_at_the_same_moment_is_one_message(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let (_, start) = site.join("chat");
    // With one body, and with two; and when the lease of a first that died is over.
    for (round, (bodies, died)) in
        [(1, false), (1, false), (2, false), (2, false), (1, true), (1, true)].into_iter().enumerate()
    {
        if died && site.is_local {
            continue; // What the dead one leaves is written to memcached here.
        }
        let target = format!("chat?user=1&once=k{round}");
        if died {
            site.memcached.ask(format!("ms shortbus:chat:1:k{round} 1 T{LEASE_OVER}\r\n7\r\n"));
        }
        let replies = site.at_once(8, |n| site.post(&target, ["\"a\"", "\"b\""][n % bodies]));
        let id = start + (1 + round as u64) * STEP;
        let heard = polled(&site.get(&format!("chat?id={}", id - 1)));
        assert_eq!(heard.len(), 1, "{heard:?}");
        let told = format!("{{\"user\":1,\"id\":{id}}}");
        for (n, reply) in replies.iter().enumerate() {
            match reply.outcome() {
                (200, _) => assert_eq!(reply.text(), told),
                (409, code) if code == "once_differs" => assert_eq!(bodies, 2),
                _ => assert_undecided(reply),
            }
            assert!(reply.status == 409 || heard[0]["data"] == ["a", "b"][n % bodies], "{reply:?}");
        }
        assert!(replies.iter().any(|reply| reply.status == 200), "{replies:?}");
        let body = heard[0]["data"].to_string();
        assert_eq!(site.post(&target, body).text(), told);
    }
}

fn a_send_whose_first_request_died_is_one_message_all_the_same(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let (_, start) = site.join("chat");
    // How far the first came, with ids counted from the newest: those in its record, whose message is in the next
    // slot, whether `last` knows. And the id that the repeat gets, at once or when the lease is over.
    for (once, noted, slot, advanced, at_once, id) in [
        ("claimed", &[][..], None, false, false, 1),
        ("noted", &[1], None, false, false, 1),
        ("stored", &[1], Some("1.7"), false, false, 1),
        ("answered", &[1], Some("1.7"), true, true, 1),
        ("outrun", &[1], Some("2"), true, false, 2),
        ("outrun-and-noted", &[1, 2], Some("2.7"), true, false, 2),
        ("outrun-unadvanced", &[1], Some("1.8"), false, false, 2),
    ] {
        let (_, last) = site.join("chat");
        let record = format!("7{}", noted.iter().map(|n| format!(" {}", last / STEP + n)).collect::<String>());
        let key = format!("shortbus:chat:1:{once}");
        site.memcached.ask(format!("ms {key} {} T{RECORD}\r\n{record}\r\n", record.len()));
        if let Some(sender) = slot {
            let value = format!("{sender} \"{once}\"");
            site.memcached.ask(format!("ms shortbus:chat:{} {} T61\r\n{value}\r\n", last / STEP + 1, value.len()));
        }
        if advanced {
            site.memcached.ask("ma shortbus:chat:newest\r\n");
        }
        let again = || site.post(&format!("chat?user=1&once={once}"), format!("\"{once}\""));
        if !at_once {
            assert_undecided(&again());
            site.memcached.ask(format!("mg {key} T{LEASE_OVER}\r\n"));
        }
        for _ in 0..2 {
            assert_eq!(again().text(), format!("{{\"user\":1,\"id\":{}}}", last + id * STEP), "{once}");
        }
        let heard = polled(&site.get(&format!("chat?id={last}")));
        let own = heard.iter().filter(|message| message["user"] == 1 && message["data"] == once).count();
        // One more is that of a record that was before this one.
        assert_eq!(own, if slot == Some("1.8") { 2 } else { 1 }, "{once}: {heard:?}");
    }
    assert!(!missed(&site.get(&format!("chat?id={start}"))));
}

fn a_send_can_be_made_again_after_the_lease_and_not_after_the_ttl(front: Front) {
    let site = Site::with(front, &[("brief", &[("SHORTBUS_TTL", "1")])]);
    site.copy("chat");
    let (_, start) = site.join("chat");
    // What a first request leaves that dies at once.
    site.memcached.ask(format!("ms shortbus:chat:1:k 1 T{RECORD}\r\n7\r\n"));
    let started = Instant::now();
    // What each repeat is told where it is something new, and after how many seconds.
    let mut told: [Vec<(String, f64)>; 2] = [Vec::new(), Vec::new()];
    while told.iter().any(|told| told.len() < 2) {
        for (bus, told) in ["chat", "brief"].into_iter().zip(&mut told) {
            let text = site.post(&format!("{bus}?user=1&once=k"), "1").text().to_owned();
            if told.last().is_none_or(|(last, _)| *last != text) {
                told.push((text, started.elapsed().as_secs_f64()));
            }
        }
        assert!(started.elapsed() < Duration::from_secs(10), "{told:?}");
        thread::sleep(Duration::from_millis(200));
    }
    let [died, brief] = told;
    let published = |id: u64| format!("{{\"user\":1,\"id\":{id}}}");
    assert!(died[0].0.contains("once_undecided") && died[1].0 == published(start + STEP), "{died:?}");
    assert!((1.5..4.5).contains(&died[1].1), "{died:?}");
    assert!(brief[0].0.contains("\"id\":") && brief[1].0.contains("once_expired"), "{brief:?}");
    assert!((0.9..3.5).contains(&brief[1].1), "{brief:?}");
}

/// As Debian's fastcgi_params for nginx have it.
#[test]
fn a_host_without_its_port_is_completed_by_server_port() {
    let site = Site::with(Front::Bare, &[("chat", &[("SERVER_PORT", "8080")])]);
    for (origin, status) in [("http://localhost:8080", 200), ("http://localhost", 200), ("http://localhost:81", 403)] {
        assert_eq!(site.request("POST", "chat?user=1", &[("Origin", origin)], b"1").status, status, "{origin}");
    }
}

/// RFC 3875, section 4.2: a server need not end a program's input, and uWSGI does not.
#[test]
fn nothing_is_read_beyond_what_the_request_has() {
    let site = Site::start(Front::Bare);
    site.copy("chat");
    let gzip = ("HTTP_CONTENT_ENCODING", "gzip");
    for (method, variables, status) in [
        ("POST", &[("CONTENT_LENGTH", "4")][..], "200"),
        ("POST", &[("CONTENT_LENGTH", "4"), gzip], "415"),
        ("POST", &[("CONTENT_LENGTH", "4"), gzip, ("SERVER_SOFTWARE", "uWSGI")], "415"),
        ("POST", &[("CONTENT_LENGTH", "3")], "400"),
        ("POST", &[("CONTENT_LENGTH", "x")], "400"),
        ("POST", &[], "400"),
        ("DELETE", &[], "405"),
        ("DELETE", &[("CONTENT_LENGTH", "4")], "405"),
        ("GET", &[], "200"),
        ("OPTIONS", &[], "204"),
    ] {
        let mut command = Command::new(site.cgi_bin("chat"));
        command.envs(variables.iter().copied()).env("REQUEST_METHOD", method).env("SERVER_PROTOCOL", "HTTP/1.1");
        let (store, value) = site.store();
        command.env("QUERY_STRING", if method == "POST" { "user=1" } else { "" }).env(store, value);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let _ended_already = stdin.write_all(b"[12]");
        wait_for("an answer while the input stays open", || child.try_wait().unwrap().is_some());
        let said = std::io::read_to_string(child.stdout.unwrap()).unwrap();
        assert!(said.starts_with(&format!("Status: {status} ")), "{method} {variables:?}: {said}");
    }
}

/// Bytes that are no text, only where a file name can hold them.
#[test]
fn a_settings_value_need_not_be_text() {
    let site = Site::start(Front::Bare);
    site.copy("chat");
    for (name, status) in [("SHORTBUS_TTL", "500"), ("SHORTBUS_MEMCACHED", "500"), ("SHORTBUS_BUS", "503")] {
        let output = Command::new(site.cgi_bin("chat"))
            .env("REQUEST_METHOD", "GET")
            .env("SHORTBUS_MEMCACHED", "/nowhere")
            .env(name, std::ffi::OsString::from_vec(b"\xff\xfe".to_vec()))
            .output()
            .unwrap();
        assert!(output.status.success());
        assert!(output.stdout.starts_with(format!("Status: {status}").as_bytes()), "{name}: {output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
    }
}

#[test]
fn nothing_of_a_request_breaks_out_of_a_header_or_a_log_line() {
    let site = Site::start(Front::Bare);
    site.copy("chat");
    let hostile = "https://a.example\r\nX-Evil: 1\n\n\x1b[2J\x07\u{9b}\u{2028}\u{202e}<script>";
    let plain = |char: char| char.is_ascii_graphic() || char == ' ';
    let variables = "PATH_INFO QUERY_STRING REQUEST_METHOD CONTENT_LENGTH HTTP_ORIGIN HTTP_IF_NONE_MATCH HTTP_ACCEPT \
                     HTTP_REFERER HTTP_SEC_FETCH_SITE HTTP_CONTENT_ENCODING HTTP_LAST_EVENT_ID HTTP_X_FORWARDED_PROTO";
    for name in variables.split(' ') {
        for origins in ["*", "https://b.example"] {
            let mut command = Command::new(site.cgi_bin("chat"));
            command.env("REQUEST_METHOD", "POST").env("QUERY_STRING", "user=x").env("SHORTBUS_MEMCACHED", "/nowhere");
            let output = command.env("SHORTBUS_ALLOW_ORIGIN", origins).env(name, hostile).output().unwrap();
            let (reply, log) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
            let (headers, body) = reply.split_once("\r\n\r\n").unwrap();
            for evil in ["evil", "a.example", "\x1b", "script"] {
                assert!(!headers.to_lowercase().contains(evil), "{name}: {headers}");
            }
            assert!(serde_json::from_str::<Value>(body).unwrap()["error"].is_string(), "{name}: {body}");
            let line = log.strip_suffix('\n').unwrap();
            assert!(line.starts_with("shortbus: chat: ") && line.chars().all(plain), "{name}: {line:?}");
        }
    }
}

fn a_packed_body_is_refused(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let start = site.join("chat").1;
    for encoding in ["gzip", "deflate", "br", "GZIP", "gzip, identity"] {
        let reply = site.request("POST", "chat?user=1", &[("Content-Encoding", encoding)], b"12345");
        assert_outcome(&reply, 415, "content_encoding");
        assert_eq!(reply.header("accept-encoding"), Some("identity"));
    }
    assert_eq!(site.request("POST", "chat?user=1", &[("Content-Encoding", "Identity")], b"1").status, 200);
    assert_eq!(site.request("GET", "chat", &[("Content-Encoding", "gzip")], b"").status, 200);
    assert_eq!(polled(&site.get(&format!("chat?id={start}"))).len(), 1);
}

/// A bus that its owner believes to be signed must not be open because of a name that nobody looks at.
fn a_setting_under_another_name_is_refused(front: Front) {
    type Bus<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);
    let buses: [Bus; 5] = [
        ("typo", &[("SHORTBUS_AUTHS", "signed")], "SHORTBUS_AUTHS is no setting"),
        ("redirect", &[("REDIRECT_SHORTBUS_AUTH", "signed")], "what an internal redirect"),
        ("twice", &[("REDIRECT_REDIRECT_SHORTBUS_TTL", "9")], "SHORTBUS_TTL, which is missing"),
        ("key", &[("SHORTBUS_KEY", "0123456789abcdef0123456789abcdef")], "SHORTBUS_AUTH is not"),
        ("both", &[("REDIRECT_SHORTBUS_TTL", "9"), ("SHORTBUS_TTL", "9")], ""),
    ];
    let site = Site::with(front, &buses.map(|(name, settings, _)| (name, settings)));
    for (name, _, sentence) in buses.iter().filter(|(.., sentence)| !sentence.is_empty()) {
        for reply in [site.get(name), site.post(&format!("{name}?user=1"), "1")] {
            assert_outcome(&reply, 500, "bad_setting");
            let message = reply.json()["message"].as_str().unwrap().to_owned();
            assert!(message.contains(sentence), "{message}");
            assert!(!message.contains("0123456789abcdef") && !site.log().contains("0123456789abcdef"), "{message}");
        }
    }
    assert_eq!(site.get("both").status, 200);
}

fn a_slash_behind_the_name_is_the_bus_where_only_it_can_be_meant(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    if front == Front::BusyboxCgi {
        for target in ["chat/", "chat/?id=0"] {
            assert_eq!(site.send("GET", target, &[], b"").unwrap().status, 404, "BusyBox's own answer");
        }
        return;
    }
    let id = site.post("chat/?user=1", "\"hello\"").json()["id"].as_u64().unwrap();
    assert_eq!(polled(&site.get(&format!("chat/?user=2&id={}", id - 1))).len(), 1);
    assert_eq!(site.request("OPTIONS", "chat/", &[], b"").status, 204);
    for page in ["chat/", "chat/?utm_source=poster"] {
        assert_eq!(site.get(page).header("content-type"), Some("text/html; charset=utf-8"), "{page}");
    }
    // What a POST is after a redirect that makes a GET of it.
    for target in ["chat?user=1&once=a", "chat/?user=1&once=a&time=1&sig=b", "chat?user=1&batch=1"] {
        assert_outcome(&site.get(target), 400, "redirected");
    }
}

/// WHATWG HTML, section 9.2; of polls without waits on the CGI fronts, where the client comes back for the rest.
fn an_event_source_comes_back_and_begins_where_it_should(front: Front) {
    let site =
        Site::with(front, &[("chat", &[("SHORTBUS_WAIT", "0")]), ("gone", &[("SHORTBUS_MEMCACHED", "/nowhere")])]);
    let first = site.publish("chat", 1, "\"first\"");
    let second = site.publish("chat", 1, "\"second\"");
    let accept = ("Accept", "text/event-stream");
    let heard = |target: &str, headers: &[(&str, &str)]| {
        let reply = site.request("GET", target, headers, b"");
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("text/event-stream")), "{reply:?}");
        assert_eq!(reply.header("cache-control"), Some("no-store, no-transform"));
        assert!(reply.text().starts_with("retry: "), "{reply:?}");
        reply.text().lines().filter_map(|line| line.strip_prefix("id: ")?.parse().ok()).collect::<Vec<u64>>()
    };
    assert_eq!(heard("chat", &[accept]), [second], "without an id: what comes from now on");
    assert_eq!(heard(&format!("chat?id={}", first - 1), &[accept]), [first, second, second]);
    assert_eq!(heard("chat?id=0", &[accept, ("Last-Event-ID", &first.to_string())]), [second, second]);
    assert_eq!(heard(&format!("chat?id=0&lastEventId={first}"), &[accept]), [second, second]);
    assert_eq!(heard(&format!("chat?id={first}&stream=1"), &[]), [second, second]);
    assert_eq!(
        heard(&format!("chat?id={first}"), &[("Accept", "text/html, Text/Event-Stream;q=0.5")]),
        [second, second]
    );
    for refused in ["text/event-stream;q=0", "text/event-stream; q=0.000", "text/event-streams", "*/*"] {
        let reply = site.request("GET", &format!("chat?id={first}"), &[("Accept", refused)], b"");
        assert_eq!(polled(&reply).len(), 1, "{refused}");
    }
    let head = site.request("HEAD", &format!("chat?id={first}&stream=1"), &[], b"");
    assert_eq!((head.header("content-type"), head.text()), (Some("text/event-stream"), ""));
    // Any other status ends an EventSource for good.
    let gone = site.request("GET", "gone?id=1", &[accept], b"");
    assert_eq!((gone.status, gone.header("content-type")), (200, Some("text/event-stream")));
    assert!(
        gone.text().starts_with("retry: ")
            && gone.text().contains(&format!("event: unavailable\ndata: {{\"error\":\"{}\"", site.no_store())),
        "{gone:?}"
    );
    site.expect_error(site.no_store());
    assert_outcome(&site.get("gone?id=1&stream=1"), 503, site.no_store());
    assert_outcome(&site.request("GET", "chat?id=x", &[accept], b""), 400, "bad_parameter");
}

fn a_named_origin_may_send_the_headers_it_asks_for(front: Front) {
    let site = Site::with(
        front,
        &[
            ("named", &[("SHORTBUS_ALLOW_ORIGIN", "https://friend.example *")]),
            ("any", &[("SHORTBUS_ALLOW_ORIGIN", "*")]),
        ],
    );
    let preflight = |bus: &str, origin: &str, headers: &str| {
        let reply =
            site.request("OPTIONS", bus, &[("Origin", origin), ("Access-Control-Request-Headers", headers)], b"");
        assert_eq!(reply.status, 204, "{reply:?}");
        let header = |name: &str| reply.header(name).unwrap_or_default().to_owned();
        (header("access-control-allow-headers"), header("access-control-allow-credentials"))
    };
    let friend = "https://friend.example";
    let traced = "baggage,last-event-id,traceparent";
    assert_eq!(preflight("named", friend, traced), (traced.into(), "true".into()));
    assert_eq!(preflight("named", friend, "a: b"), ("Content-Type, Last-Event-ID".into(), "true".into()));
    assert_eq!(
        preflight("named", "https://other.example", traced),
        ("Content-Type, Last-Event-ID, *".into(), "".into())
    );
    assert_eq!(preflight("any", friend, traced), ("Content-Type, Last-Event-ID, *".into(), "".into()));
    let reply = site.request("GET", "named", &[("Origin", friend)], b"");
    assert_eq!(reply.header("access-control-allow-origin"), Some(friend));
    assert_eq!(reply.header("access-control-allow-credentials"), Some("true"));
}

fn a_batch_is_published_whole_and_in_order(front: Front) {
    let site = Site::with(front, &[("large", &[("SHORTBUS_MAX_BYTES", "1000000")])]);
    site.copy("chat");
    assert_eq!(site.get("chat").json()["batch"], 256);
    let (_, start) = site.join("chat");
    let values = ["1", "\"a\"", "{ \"b\" : [2] }", "null", "1e400", "\"\\ud800\""];
    let body = format!(" [ {} ] ", values.join(" ,\n"));
    let reply = site.post("chat?user=7&batch=1&once=k", &body);
    let json = reply.json();
    let ids: Vec<u64> = serde_json::from_value(json["ids"].clone()).unwrap();
    assert_eq!((reply.status, &json["user"], ids.last()), (200, &json!(7), json["id"].as_u64().as_ref()), "{reply:?}");
    assert!(ids.len() == values.len() && ids.is_sorted() && ids[0] > start, "{ids:?}");
    // A repeat is told the same, also as one of many at the same moment; another body is another message.
    assert_eq!(site.post("chat?user=7&batch=1&once=k", &body).text(), reply.text());
    assert_outcome(&site.post("chat?user=7&batch=1&once=k", "[1]"), 409, "once_differs");
    assert_outcome(&site.post("chat?user=7&once=k", "1"), 409, "once_differs");
    let array = |first: usize| {
        let rows = ids.iter().zip(values).skip(first);
        let rows: Vec<String> =
            rows.map(|(id, value)| format!("{{\"id\":{id},\"user\":7,\"data\":{value}}}")).collect();
        format!("[{}]", rows.join(","))
    };
    for (first, after) in [start].iter().chain(&ids).enumerate() {
        let reply = site.get(&format!("chat?id={after}"));
        assert_eq!((reply.text(), cursor(&reply), missed(&reply)), (&array(first)[..], ids[5], false));
    }
    assert_eq!(site.get(&format!("chat?user=7&id={start}")).text(), "[]");
    // What follows a cursor inside a slot that has gone was missed; after the slot nothing was.
    assert!(site.memcached.ask(format!("md shortbus:chat:{}\r\n", ids[0] / STEP)).starts_with("HD"));
    assert!(missed(&site.get(&format!("chat?id={}", ids[4]))));
    assert!(!missed(&site.get(&format!("chat?id={}", ids[5]))));
    // The largest: 256 messages, a megabyte.
    let many = format!("[{}]", vec!["7"; 256].join(","));
    assert_eq!(site.post("chat?user=1&batch=1", &many).json()["ids"].as_array().unwrap().len(), 256);
    let large = format!("[\"{}\",\"{}\"]", "x".repeat(499_000), "y".repeat(500_990));
    assert_eq!(large.len(), 999_997);
    let ids = site.post("large?user=1&batch=1", &large).json()["ids"].clone();
    let heard = polled(&site.get(&format!("large?id={}", ids[0].as_u64().unwrap() - 1)));
    assert_eq!(heard.len(), 2);
}

fn a_batch_that_cannot_be_published_names_the_element(front: Front) {
    let site = Site::start(front);
    site.copy("chat");
    let (_, start) = site.join("chat");
    let text = |bytes: usize| String::from_utf8(text_of(bytes)).unwrap();
    let deep = "[".repeat(129) + &"]".repeat(129);
    for (body, status, code, element) in [
        (format!("[1,{}]", text(10_241)), 413, "too_large", Some(1)),
        (format!("[{deep},1]"), 400, "too_deep", Some(0)),
        (format!("[1,2,{}]", "9".repeat(1_001)), 400, "number_too_long", Some(2)),
        ("[]".into(), 400, "bad_batch", None),
        ("{\"a\":1}".into(), 400, "bad_batch", None),
        ("7".into(), 400, "bad_batch", None),
        (format!("[{}]", vec!["1"; 257].join(",")), 400, "bad_batch", None),
        ("[1,]".into(), 400, "not_json", None),
        (format!("[{}]", vec![text(10_240); 98].join(",")), 413, "too_large", None),
    ] {
        let reply = site.post("chat?user=1&batch=1", body);
        assert_outcome(&reply, status, code);
        assert_eq!(reply.json().get("element").and_then(Value::as_u64), element, "{reply:?}");
        // An element's sentence is that of a message.
        let sentence = reply.json()["message"].as_str().unwrap().to_owned();
        assert_eq!(sentence.starts_with("The batch is longer than 1000000 bytes"), status == 413 && element.is_none());
        assert_eq!(sentence.contains("message ") && !sentence.contains("batch"), element.is_some(), "{sentence}");
    }
    // Without it a message is no longer than one may be.
    assert_outcome(&site.post("chat?user=1&batch=0", text(10_241)), 413, "too_large");
    assert_outcome(&site.post("chat?user=1&batch=2", "[1]"), 400, "bad_parameter");
    assert_eq!(site.get(&format!("chat?id={start}")).text(), "[]");
    // Without it an array is a message.
    assert_eq!(site.post("chat?user=1&batch=0", "[1,2]").status, 200);
    assert_eq!(polled(&site.get(&format!("chat?id={start}")))[0]["data"], json!([1, 2]));
}
