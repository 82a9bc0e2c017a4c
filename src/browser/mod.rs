//! What a browser gets behind the bus's name: the client, its types, and the page to try the bus on.

use crate::hash::fnv1a_128;

/// A file of the executable's own.
pub struct File {
    /// PATH_INFO.
    path: &'static str,
    /// Content-Type.
    pub media_type: &'static str,
    /// What it holds.
    pub body: &'static str,
    /// Its entity tag, the hash of what it holds: a new executable is never met by an old client.
    pub tag: u128,
}

const fn file(path: &'static str, media_type: &'static str, body: &'static str) -> File {
    File { path, media_type, body, tag: fnv1a_128(body.as_bytes()) }
}

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// The client as one script without imports: its parts share a scope. The first line says where the script was loaded
/// from (HERE), the last line exports the class. The classic script and the module differ in these two alone.
macro_rules! client {
    ($first:literal, $last:literal) => {
        concat!(
            $first,
            include_str!("client/errors.js"),
            "\n",
            include_str!("client/time.js"),
            "\n",
            include_str!("client/identity.js"),
            "\n",
            include_str!("client/session.js"),
            "\n",
            include_str!("client/batch.js"),
            "\n",
            include_str!("client/json.js"),
            "\n",
            include_str!("client/outbox.js"),
            "\n",
            include_str!("client/event_stream.js"),
            "\n",
            include_str!("client/place.js"),
            "\n",
            include_str!("client/tab_leader.js"),
            "\n",
            include_str!("client/receiver.js"),
            "\n",
            include_str!("client/presence.js"),
            "\n",
            include_str!("client/message_bus.js"),
            $last
        )
    };
}

static FILES: [File; 6] = [
    file("/", "text/html; charset=utf-8", include_str!("page.html")),
    file("/page.css", "text/css; charset=utf-8", include_str!("page.css")),
    file("/page.js", SCRIPT, include_str!("page.js")),
    file(
        "/shortbus.js",
        SCRIPT,
        client!(
            "(() => {\nconst HERE = globalThis.document?.currentScript?.src;\n\n",
            "\nglobalThis.MessageBus = MessageBus;\n})();\n"
        ),
    ),
    file(
        "/shortbus.mjs",
        SCRIPT,
        client!(
            "const HERE = import.meta.url.startsWith(\"http\") ? import.meta.url : undefined;\n\n",
            "\nexport { MessageBus, MessageBus as default };\n"
        ),
    ),
    file("/shortbus.d.ts", "text/plain; charset=utf-8", include_str!("shortbus.d.ts")),
];

/// The file at this path behind the bus's name.
pub fn find(path: &[u8]) -> Option<&'static File> {
    FILES.iter().find(|file| file.path.as_bytes() == path)
}
