//! The rooms of `src/` import each other in the directions that the house allows, and in no other. A room is a file or
//! folder right below `src/`; an import is a path into this crate, in a `use` or anywhere else in the code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Names of modules: from one, to another. `main` is the executable's; the library's root has the empty name.
type Import = (String, String);

/// A sentence, the modules that have to exist for it to say anything, and whether an import breaks it.
struct Rule {
    says: &'static str,
    of: &'static [&'static str],
    is_broken: fn(&str, &str) -> bool,
}

const FRONTS: [&str; 3] = ["cgi", "cli", "fastcgi"];

const RULES: [Rule; 7] = [
    Rule {
        says: "the bus imports nothing but limits and variables",
        of: &["bus", "limits", "variables"],
        is_broken: |from, to| within(from, "bus") && !within_any(to, &["bus", "limits", "variables"]),
    },
    Rule {
        says: "http imports no store and no front",
        of: &["http", "stores", "cgi", "cli", "fastcgi"],
        is_broken: |from, to| within(from, "http") && (within(to, "stores") || within_any(to, &FRONTS)),
    },
    Rule {
        says: "main alone imports a front",
        of: &["main", "cgi", "cli", "fastcgi"],
        is_broken: |from, to| FRONTS.iter().any(|front| within(to, front) && !within(from, front)) && from != "main",
    },
    Rule {
        says: "stores import of the bus what it asks of a store and its name, and nothing above that",
        of: &["stores", "bus::store", "bus::name", "limits", "variables", "config", "hash"],
        is_broken: |from, to| {
            let allowed = ["stores", "bus::store", "bus::name", "limits", "variables", "config", "hash"];
            within(from, "stores") && !within_any(to, &allowed)
        },
    },
    Rule {
        says: "signatures import nothing of the routes",
        of: &["http", "http::signature"],
        is_broken: |from, to| from == "http::signature" && to == "http",
    },
    Rule {
        says: "memcached's codec imports no driver",
        of: &["stores::memcached::codec", "stores::memcached::blocking", "stores::memcached::pipelined"],
        is_broken: |from, to| {
            let drivers = ["stores::memcached::blocking", "stores::memcached::pipelined"];
            from == "stores::memcached::codec" && within_any(to, &drivers)
        },
    },
    Rule {
        says: "a FastCGI connection knows no hub",
        of: &["fastcgi::connection", "fastcgi::hub"],
        is_broken: |from, to| from == "fastcgi::connection" && within(to, "fastcgi::hub"),
    },
];

/// Whether this is the module, or one below it.
fn within(module: &str, parent: &str) -> bool {
    module.strip_prefix(parent).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn within_any(module: &str, parents: &[&str]) -> bool {
    parents.iter().any(|parent| within(module, parent))
}

/// What is wrong with these imports, and with rules that name modules which do not exist: a line each.
fn violations(modules: &BTreeSet<String>, imports: &BTreeSet<Import>) -> Vec<String> {
    let mut found = Vec::new();
    for rule in &RULES {
        let absent = rule.of.iter().filter(|module| !modules.contains(**module));
        found.extend(absent.map(|module| format!("{}: there is no {module}", rule.says)));
        let broken = imports.iter().filter(|(from, to)| (rule.is_broken)(from, to));
        found.extend(broken.map(|(from, to)| format!("{}: {from} imports {to}", rule.says)));
    }
    found
}

/// The code's words: names, `::` and single signs, without comments, texts, numbers' dots and lifetimes.
fn tokens(source: &str) -> Vec<String> {
    let chars: Vec<char> = source.chars().collect();
    let is_word = |char: &char| char.is_alphanumeric() || *char == '_';
    let starts = |at: usize, text: &str| text.chars().enumerate().all(|(n, char)| chars.get(at + n) == Some(&char));
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        if chars[at].is_whitespace() {
            at += 1;
        } else if starts(at, "//") {
            at += chars[at..].iter().take_while(|char| **char != '\n').count();
        } else if starts(at, "/*") {
            at = behind_block_comment(&starts, at);
        } else if chars[at] == '"' {
            at = behind_text(&chars, at);
        } else if chars[at] == '\'' {
            at = behind_quote(&chars, at);
        } else if starts(at, "::") {
            tokens.push("::".into());
            at += 2;
        } else if is_word(&chars[at]) {
            let word: String = chars[at..].iter().take_while(|char| is_word(char)).collect();
            at += word.chars().count();
            match behind_raw_text(&chars, &word, at) {
                Some(end) => at = end,
                None => tokens.push(word),
            }
        } else {
            tokens.push(chars[at].into());
            at += 1;
        }
    }
    tokens
}

/// Block comments nest.
fn behind_block_comment(starts: &dyn Fn(usize, &str) -> bool, mut at: usize) -> usize {
    let mut depth = 0;
    loop {
        if starts(at, "/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if starts(at, "*/") {
            (depth, at) = (depth - 1, at + 2);
        } else {
            at += 1;
        }
        if depth == 0 {
            return at;
        }
    }
}

fn behind_text(chars: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// A character in quotes, or the quote of a lifetime and its name.
fn behind_quote(chars: &[char], start: usize) -> usize {
    if chars[start + 1] == '\\' {
        return start + 3 + chars[start + 3..].iter().take_while(|char| **char != '\'').count() + 1;
    }
    if chars.get(start + 2) == Some(&'\'') {
        return start + 3;
    }
    start + 1 + chars[start + 1..].iter().take_while(|char| char.is_alphanumeric() || **char == '_').count()
}

/// The end of a raw text such as `r#"..."#`, of which the first word was read.
fn behind_raw_text(chars: &[char], word: &str, at: usize) -> Option<usize> {
    if !["r", "br", "cr"].contains(&word) {
        return None;
    }
    let hashes = chars[at..].iter().take_while(|char| **char == '#').count();
    if chars.get(at + hashes) != Some(&'"') {
        return None;
    }
    let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let text = &chars[at + hashes + 1..];
    let length = text.windows(end.len()).position(|window| window == end).expect("the end of a raw text");
    Some(at + hashes + 1 + length + end.len())
}

/// Leaves out what `#[cfg(test)]` stands before: up to its semicolon, or its block.
fn without_tests(tokens: &[String]) -> Vec<String> {
    let mark = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !tokens[at..].iter().map(String::as_str).take(mark.len()).eq(mark) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        let mut depth = 0;
        loop {
            match tokens[at].as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                _ => {}
            }
            at += 1;
            if depth == 0 && [";", "}"].contains(&tokens[at - 1].as_str()) {
                break;
            }
        }
    }
    kept
}

/// A path: its names, and the name that it has from there on.
type Leaf = (Vec<String>, String);

/// Reads a path, or several in braces, that begins behind `prefix`; returns where it ends.
fn read_paths(tokens: &[String], mut at: usize, mut prefix: Vec<String>, leaves: &mut Vec<Leaf>) -> usize {
    let token = |at: usize| tokens.get(at).map_or("", String::as_str);
    loop {
        match token(at) {
            "{" => {
                at += 1;
                while token(at) != "}" {
                    at = read_paths(tokens, at, prefix.clone(), leaves);
                    at += usize::from(token(at) == ",");
                }
                return at + 1;
            }
            "self" => {}
            "super" => drop(prefix.pop()),
            name if name.starts_with(|char: char| char.is_alphabetic() || char == '_') => prefix.push(name.into()),
            // All names there, or a type's parameters.
            _ => {
                leaves.push((prefix, String::new()));
                return at + usize::from(token(at) == "*");
            }
        }
        at += 1;
        if token(at) != "::" {
            break;
        }
        at += 1;
    }
    let mut name = prefix.last().cloned().unwrap_or_default();
    if token(at) == "as" {
        name = token(at + 1).into();
        at += 2;
    }
    leaves.push((prefix, name));
    at
}

/// All paths into this crate that the code of a module names.
fn paths(module: &str, tokens: &[String]) -> Vec<Vec<String>> {
    let own: Vec<String> = match module {
        "" | "main" => vec![],
        _ => module.split("::").map(String::from).collect(),
    };
    let mut known = BTreeMap::from([("crate".to_owned(), vec![]), ("shortbus".to_owned(), vec![])]);
    known.insert("self".into(), own.clone());
    known.insert("super".into(), own[..own.len().saturating_sub(1)].to_vec());
    for three in tokens.windows(3).filter(|three| three[0] == "mod") {
        assert_ne!(three[2], "{", "{module}: the module {} has no file of its own", three[1]);
        known.insert(three[1].clone(), [&own[..], &three[1..2]].concat());
    }
    // What a `use` has named stands for its path in what follows: it takes a second look to know all names.
    let mut found = Vec::new();
    for _ in 0..2 {
        found.clear();
        let mut at = 0;
        while at < tokens.len() {
            let starts = at == 0 || tokens[at - 1] != "::";
            match known.get(&tokens[at]).filter(|_| starts && tokens.get(at + 1).is_some_and(|next| next == "::")) {
                Some(prefix) => at = read_paths(tokens, at + 2, prefix.clone(), &mut found),
                None => at += 1,
            }
        }
        known
            .extend(found.iter().filter(|(_, name)| !name.is_empty()).map(|(path, name)| (name.clone(), path.clone())));
    }
    found.into_iter().map(|(path, _)| path).collect()
}

/// The modules that a module imports, itself apart.
fn imports(modules: &BTreeSet<String>, from: &str, source: &str) -> BTreeSet<Import> {
    let is_module = |path: &[String]| Some(path.join("::")).filter(|name| modules.contains(name));
    paths(from, &without_tests(&tokens(source)))
        .iter()
        .filter_map(|path| (1..=path.len()).rev().find_map(|length| is_module(&path[..length])))
        .filter(|to| to != from)
        .map(|to| (from.to_owned(), to))
        .collect()
}

/// The modules below a folder, each with its source.
fn read(folder: &Path, parent: &str, modules: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let name = if parent.is_empty() { stem.to_owned() } else { format!("{parent}::{stem}") };
        if path.is_dir() {
            read(&path, &name, modules);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = match stem {
                "mod" => parent.to_owned(),
                "lib" if parent.is_empty() => String::new(),
                _ => name,
            };
            modules.insert(name, fs::read_to_string(&path).unwrap());
        }
    }
}

/// The rooms, and who imports whom.
struct House {
    rooms: BTreeSet<String>,
    arrows: BTreeSet<(String, String)>,
}

impl House {
    fn new(modules: &BTreeSet<String>, imports: &BTreeSet<Import>) -> House {
        let room = |module: &str| module.split("::").next().unwrap_or_default().to_owned();
        let rooms = modules.iter().map(|module| room(module)).filter(|room| !room.is_empty()).collect();
        let arrows = imports.iter().map(|(from, to)| (room(from), room(to)));
        House { rooms, arrows: arrows.filter(|(from, to)| from != to && !from.is_empty()).collect() }
    }

    /// All rooms that can be reached from this one by arrows.
    fn reached<'a>(&'a self, from: &str) -> BTreeSet<&'a str> {
        let next = |room: &str| -> Vec<&'a str> {
            self.arrows.iter().filter(|(from, _)| from == room).map(|(_, to)| &to[..]).collect()
        };
        let (mut reached, mut open) = (BTreeSet::new(), next(from));
        while let Some(room) = open.pop() {
            if reached.insert(room) {
                open.extend(next(room));
            }
        }
        reached
    }

    /// Rooms that reach each other.
    fn circles(&self) -> BTreeSet<BTreeSet<&str>> {
        let circle = |room: &str| self.reached(room).into_iter().filter(|to| self.reached(to).contains(room)).collect();
        self.rooms.iter().map(|room| circle(room)).filter(|circle: &BTreeSet<&str>| !circle.is_empty()).collect()
    }

    /// How many rooms a room stands on; those of a circle stand side by side.
    fn floor(&self, room: &str) -> usize {
        let below = self.reached(room).into_iter().filter(|to| !self.reached(to).contains(room));
        below.map(|to| self.floor(to) + 1).max().unwrap_or(0)
    }

    fn floors(&self) -> usize {
        self.rooms.iter().map(|room| self.floor(room) + 1).max().unwrap_or(0)
    }
}

impl std::fmt::Display for House {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let (rooms, arrows, circles) = (self.rooms.len(), self.arrows.len(), self.circles().len());
        write!(f, "{rooms} rooms, {arrows} arrows, {} floors, {circles} circles", self.floors())
    }
}

/// A house to try the rules on.
fn sample() -> BTreeSet<String> {
    let named = RULES.iter().flat_map(|rule| rule.of);
    named.copied().chain(["", "bus::poll", "http::error", "stores::memcached", "browser"]).map(String::from).collect()
}

/// The rules that a module with this source would break.
fn broken(from: &str, source: &str) -> Vec<&'static str> {
    let imports = imports(&sample(), from, source);
    let is_broken = |rule: &&Rule| imports.iter().any(|(from, to)| (rule.is_broken)(from, to));
    RULES.iter().filter(is_broken).map(|rule| rule.says).collect()
}

#[test]
fn each_rule_is_seen_to_be_broken_and_to_be_kept() {
    let [bus, http, fronts, stores, signature, codec, connection] = RULES.each_ref().map(|rule| rule.says);
    for (module, source, says) in [
        ("bus", "use crate::config::whole_number;", bus),
        ("bus::poll", "use crate::{limits, http::error::Error};", bus),
        ("http", "use crate::stores::memcached;", http),
        ("http::error", "fn f() -> crate::stores::memcached::Error { g() }", http),
        ("browser", "use super::cgi;", fronts),
        ("stores", "use crate::bus;", stores),
        ("stores::memcached", "use crate::bus::{store::Op, Page};", stores),
        ("http::signature", "use super::value;", signature),
        ("http::signature", "use crate::http::{self, error::Error};", signature),
        ("stores::memcached::codec", "use super::pipelined::Pool;", codec),
        ("stores::memcached::codec", "use crate::stores::memcached::blocking::*;", codec),
        ("fastcgi::connection", "use super::hub;", connection),
        ("fastcgi::connection", "use crate::fastcgi; fn f() { fastcgi::hub::g() }", connection),
    ] {
        assert_eq!(broken(module, source), [says], "{module}: {source}");
    }
    assert_eq!(broken("http", "use crate::cli;"), [http, fronts]);
    for (module, source) in [
        ("bus", "use crate::bus::store; use crate::{limits, variables}; use serde_json::http::error;"),
        ("http", "use crate::bus::{self, store::Store}; use crate::http::signature;"),
        ("main", "use shortbus::{cgi, cli, fastcgi};"),
        ("fastcgi", "mod hub; use hub::Hubs; use self::connection::Connection;"),
        ("stores", "use crate::bus::{name::Place, store::{Op, Reply}}; use crate::hash;"),
        ("http::signature", "use crate::http::error::Signature;"),
        ("stores::memcached::codec", "use crate::bus::store::Op;"),
        ("fastcgi::connection", "use crate::fastcgi::codec::Parser;"),
    ] {
        assert_eq!(broken(module, source), <[&str; 0]>::default(), "{module}: {source}");
    }
}

#[test]
fn a_rule_about_a_module_that_is_not_there_is_broken() {
    let mut modules = sample();
    assert_eq!(violations(&modules, &BTreeSet::new()), <[&str; 0]>::default());
    modules.remove("bus::name");
    assert_eq!(violations(&modules, &BTreeSet::new()).len(), 1);
}

#[test]
fn paths_are_read_wherever_the_code_has_them_and_nowhere_else() {
    let read = |source: &str| -> Vec<String> {
        imports(&sample(), "bus::poll", source).into_iter().map(|(_, to)| to).collect()
    };
    let all = "use crate::{self, bus::{self as heart, store::{Op, Reply}}, limits::*, config as settings};";
    assert_eq!(read(all), ["bus", "bus::store", "config", "limits"]);
    assert_eq!(
        read("fn f(a: &'a str) -> super::Page<'a> { super::super::http::error::g::<crate::hash::T>() }").len(),
        3
    );
    assert_eq!(read("use crate::http as web; fn f() { web::signature::g(b'\\'', '\"') }"), ["http", "http::signature"]);
    for nothing in [
        "// use crate::cgi;\n/// [`crate::cgi`]\n/* a /* crate::cgi */ crate::cgi */",
        "const A: &str = \"\\\" crate::cgi\"; const B: &str = r#\"\" crate::cgi\"#;",
        "#[cfg(test)]\nmod tests { use super::*; fn f() { crate::cgi::g() } }",
        "#[cfg(test)] use crate::cgi; pub(crate) fn f() { memcache::cgi::crate_() }",
        "use std::cgi; use self::bus;",
    ] {
        assert_eq!(read(nothing), <[&str; 0]>::default(), "{nothing}");
    }
    let mixed = "const A: char = '\\u{22}'; #[cfg(test)] mod tests { fn f() { {} } } use crate::hash;";
    assert_eq!(read(mixed), ["hash"]);
}

#[test]
fn rooms_arrows_floors_and_circles_are_counted() {
    let modules = ["", "main", "a", "a::one", "a::two", "b", "c", "d"].map(String::from).into();
    let arrows = |pairs: &[(&str, &str)]| pairs.iter().map(|(from, to)| ((*from).into(), (*to).into())).collect();
    let straight = arrows(&[("main", "a"), ("a::one", "b"), ("a::two", "b"), ("a::one", "a::two"), ("b", "c")]);
    assert_eq!(House::new(&modules, &straight).to_string(), "5 rooms, 3 arrows, 4 floors, 0 circles");
    let round = arrows(&[("main", "a"), ("a::one", "b"), ("b", "a::two"), ("b", "c"), ("c", "d")]);
    let house = House::new(&modules, &round);
    assert_eq!(house.to_string(), "5 rooms, 5 arrows, 4 floors, 1 circles");
    assert_eq!(house.circles(), BTreeSet::from([BTreeSet::from(["a", "b"])]));
}

#[test]
fn the_house_keeps_its_rules() {
    let mut sources = BTreeMap::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut sources);
    let modules: BTreeSet<String> = sources.keys().cloned().collect();
    let imports = sources.iter().flat_map(|(module, source)| imports(&modules, module, source)).collect();
    let house = House::new(&modules, &imports);
    println!("{house}");
    let circles = house.circles().into_iter().map(|circle| format!("no circle: {circle:?}"));
    let wrong: Vec<String> = violations(&modules, &imports).into_iter().chain(circles).collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
