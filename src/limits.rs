//! Every limit in one place, each with its unit and its reason.

use std::time::Duration;

/// Largest user id and message id: `Number.MAX_SAFE_INTEGER`, so that JavaScript reads them exactly.
pub const MAX_ID: u64 = (1 << 53) - 1;

/// Seconds a message lives unless `SHORTBUS_TTL` says otherwise.
pub const TTL_DEFAULT: u32 = 60;

/// Largest `SHORTBUS_TTL`, seconds: memcached reads more than 30 days as a date.
pub const TTL_MAX: u32 = 30 * 24 * 60 * 60;

/// Bytes of the largest message body unless `SHORTBUS_MAX_BYTES` says otherwise.
pub const BYTES_DEFAULT: usize = 10_240;

/// Largest `SHORTBUS_MAX_BYTES`: memcached's item limit is 1 MiB by default, and key (at most 250 bytes), user id
/// and item header (about 60) count towards it. A slot that memcached refuses leaves a hole in the ids.
pub const BYTES_MAX: usize = 1_000_000;

/// Bytes of a message beyond which the bus tries, before it claims an id, whether memcached takes it: an id whose slot
/// memcached refuses is used up, and all polls that pass it say that they missed something. A trial sends the message
/// twice, and nobody sets memcached's item limit (`-I`) below this.
pub const TRIAL_BYTES: usize = 4_096;

/// Bytes that a slot takes beside the message, at most, and a trial does not: the sender, and a longer key.
pub const TRIAL_EXTRA: usize = "9007199254740991.9007199254740991 ".len() + "9007199254740991".len();

/// Deepest nesting of a message, arrays and objects. Browsers read any depth, but the JSON readers of other languages
/// stop (serde_json at 128, PHP at 512, Python near 1,000). One deeper message would fail all of their polls for as
/// long as it lives.
pub const DEPTH_MAX: usize = 128;

/// Longest number in a message, characters. Python refuses to read whole numbers of more than 4,300 digits, and one such
/// message would fail all of its polls for as long as it lives.
pub const NUMBER_MAX: usize = 1_000;

/// Most messages in one slot, that is, in one write: those of a batch, or of several publishers at once. Ids have room for
/// so many in each slot: a bus may fill 3,900 slots a second on average and ids still rise when memcached restarts, as
/// the first slot is taken from the time in microseconds.
pub const SLOT_MESSAGES: u64 = 256;

/// Bytes of the largest body with a batch: all of its messages, with what the bus writes around them, fit an item of
/// memcached (see [`BYTES_MAX`]).
pub const BATCH_BYTES: usize = BYTES_MAX;

/// Bytes of a slot in which several publishers go together: so few that a store that takes any message takes them.
pub const SLOT_BYTES: usize = TRIAL_BYTES;

/// Bytes that a message takes in a slot beside its own, at most: user, token, length and what divides them.
pub const SLOT_MESSAGE: usize = 2 * 16 + 7 + ".: ".len();

/// Largest number of a slot.
pub const MAX_SLOT: u64 = MAX_ID / SLOT_MESSAGES;

/// Longest percent-encoded bus name that goes into the keys as it is; a longer one is cut and hashed.
/// `shortbus:` + name + `:` + a 16-digit user id + `:` + [`ONCE_MAX`] must stay within memcached's 250 bytes.
pub const NAME_MAX: usize = 150;

/// Longest `once`, bytes: room for a UUID or a hash in hexadecimal digits.
pub const ONCE_MAX: usize = 64;

/// Seconds, by memcached's clock, for which a repeat takes the first request with its `once` to be at work, and waits.
/// After that the first request cannot be at work, as its [`STORE_DEADLINE`] is over: the repeat publishes itself.
pub const ONCE_LEASE: u32 = 3;

/// Seconds, by memcached's clock, for which the bus remembers a `once` beyond twice the TTL. A publisher may store a
/// message [`STALE`] after it read the record, and memcached may end an item one second early.
pub const ONCE_SLACK: u32 = 3;

/// Seconds for which the bus remembers a `once` where twice the TTL is less: longer than the browser client repeats a
/// message.
pub const ONCE_LEAST: u32 = 60;

/// Least bytes of `SHORTBUS_KEY`: as many as SHA-256 gives (RFC 2104 section 3).
pub const KEY_MIN: usize = 32;

/// Longest time, seconds, by which a signature's `time` may differ from the server's clock, where the TTL is longer.
/// A signature may be valid for twice as long, and memcached has to remember its `once` for that time.
pub const CLOCK_MAX: u32 = TTL_MAX / 2 - ONCE_SLACK;

/// Time for all of a request's exchanges with memcached, connecting included. Together with the start of the process
/// this keeps the promise of an answer within two seconds.
pub const STORE_DEADLINE: Duration = Duration::from_millis(1_500);

/// A publisher that read `last` longer ago than this reads it again before it claims a slot (the two-second rule). By
/// then others may have claimed the slot, read it and seen it expire; the publisher could not acknowledge what it
/// stored there. Where the TTL is shorter, the TTL takes its place.
pub const STALE: Duration = Duration::from_secs(2);

/// Tries to claim a slot before a publish gives up as `busy`. 64 simultaneous publishers need about five.
pub const TRIES: u32 = 64;

/// Bounds of the random pause before try number `n` (from the third): half to one times this, times `n`. With shorter
/// pauses 64 publishers refuse each other (`make bench`).
pub const BACK_OFF: Duration = Duration::from_micros(500);

/// Slots a poll reads in the same write as `last`: enough for most polls to need one round trip.
pub const WINDOW: u64 = 16;

/// Neighbouring slots a probe reads, so that a hole (a refused or evicted slot) is not taken for the end.
pub const PROBE_SLOTS: u64 = 3;

/// Probes of one bisecting round, all in one write: four bits of the answer a round trip.
pub const PROBES: u64 = 16;

/// Largest number of slots fetched in one write.
pub const BATCH: u64 = 256;

/// Most messages in one reply; the rest comes with the next poll.
pub const REPLY_MESSAGES: usize = 1_000;

/// Bytes after which a reply takes no further message; the first is always taken.
pub const REPLY_BYTES: usize = 1 << 20;

/// Bytes that a message takes in a reply beside its data, at most: names, punctuation and two ids of 16 digits.
pub const REPLY_MESSAGE: usize = r#"{"id":,"user":,"data":},"#.len() + 2 * 16;

/// Bytes of slots that a poll reads before it answers with what it has. The slots of the poll's own user count.
pub const SCAN_BYTES: usize = 16 << 20;

/// What a slot counts towards [`SCAN_BYTES`] beside its value: about a command and its reply's header.
pub const SCAN_SLOT: usize = 64;

/// Bytes of a bus's file unless `SHORTBUS_STORE_BYTES` says otherwise: more than most buses publish in a minute.
pub const STORE_BYTES: u64 = 32 << 20;

/// Least `SHORTBUS_STORE_BYTES`: the file then holds two messages of the largest size.
pub const STORE_BYTES_MIN: u64 = 4 << 20;

/// Largest `SHORTBUS_STORE_BYTES`, 64 GiB.
pub const STORE_BYTES_MAX: u64 = 64 << 30;

/// Files of buses that a FastCGI process leaves open for its next request, each with its folder.
pub const OPEN_FILES: usize = 16;

/// Longest pause before a process tries again to lock a bus's file. A batch takes some ten microseconds.
pub const STORE_LOCK_PAUSE: Duration = Duration::from_millis(2);

/// Retry-After of a 503 and of `once_undecided`, seconds.
pub const RETRY_AFTER: u32 = 1;

/// How long a browser may keep a preflight's answer, seconds (Chromium caps it at 7,200).
pub const PREFLIGHT_AGE: u32 = 7_200;

/// FastCGI connections that a process serves at a time, each with at most one request; fewer where the process may open
/// fewer files. Requests on further connections get a 503.
pub const CONNECTIONS: usize = 16_384;

/// Bytes that all connections of a process may take together for bodies on their way and for replies that their web
/// servers have not taken yet. Without it ten thousand readers that do not read could take a page each. Beyond it a
/// request with a body gets a 503, and a reader that does not read is cut off at once.
pub const BUFFERS_BYTES: usize = 64 << 20;

/// Polls that may read messages at a time in a process; the others wait for their turn. Each takes a page or two,
/// [`REPLY_BYTES`]; without it ten thousand clients that come back together would take as many.
pub const READING: usize = 32;

/// Bytes of a FastCGI request's parameters, names and lengths included. nginx and Apache pass on some 40 KB of request
/// headers.
pub const PARAMETERS_BYTES: usize = 64 << 10;

/// Bytes of a FastCGI management record. A web server asks for three known names, 45 bytes.
pub const MANAGEMENT_BYTES: usize = 512;

/// memcached servers beyond which a process closes its idle connections before it opens another.
pub const SERVERS: usize = 64;

/// Connections beyond [`CONNECTIONS`] that a process accepts, each for one 503. Further ones wait in the socket's
/// queue.
pub const CONNECTIONS_REFUSED: usize = 16;

/// Files that a FastCGI process keeps for other purposes than web servers' connections: memcached servers, a name
/// server, the event loop, the standard streams, and those of buses.
pub const FILES_SPARE: usize = 32 + 2 * OPEN_FILES;

/// Pause before accepting again when the system has run out of file descriptors or memory.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a web server may pause in the middle of a request that it sends, or of a reply that it takes: as long as
/// nginx and Apache wait themselves.
pub const PEER_DEADLINE: Duration = Duration::from_secs(60);

/// [`PEER_DEADLINE`] of a connection beyond [`CONNECTIONS`].
pub const REFUSED_DEADLINE: Duration = Duration::from_secs(1);

/// How long a process that got SIGTERM goes on with the replies that it has begun. No reply takes longer than
/// [`STORE_DEADLINE`]; the process does not wait for a web server that reads no reply.
pub const GRACE: Duration = Duration::from_secs(4);

/// Longest time a poll waits, seconds: most servers and proxies end a silent exchange after 60.
pub const WAIT_MAX: u32 = 60;

/// How often a bus's watcher asks memcached while a client waits. A message from another process is under way for half
/// of this on average. Half the interval would take another percent of a core.
pub const WATCH_INTERVAL: Duration = Duration::from_millis(8);

/// How often a CGI process that waits asks memcached.
pub const CGI_WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// Subscribers of a bus that are woken at a time. Ten thousand at once take a tenth of a second to write, for which a
/// publish would wait at each of its steps.
pub const WOKEN: usize = 64;

/// How long a wait or a stream pauses after memcached failed, before it asks again.
pub const WATCH_RETRY: Duration = Duration::from_secs(1);

/// Bytes of the newest messages that a watcher keeps for the clients that wait. It reads the newest message once for
/// all of them, whatever its size.
pub const SHARED_BYTES: usize = 1 << 20;

/// How often an event stream gets a comment, so that no proxy takes it for dead: "every 15 seconds or so" (WHATWG HTML,
/// section 9.2.7).
pub const HEARTBEAT: Duration = Duration::from_secs(15);

/// After its event stream broke, a browser comes back after one to two times this, milliseconds.
pub const RETRY_MILLIS: u32 = 1_000;

/// An event stream ends after one to two times this, and its client comes back at once. A web server that is told to
/// reload waits for its old connections: streams that never ended would keep Apache's slots until none is left.
pub const STREAM_LIFE: Duration = Duration::from_secs(300);

/// How long the reader of an event stream may take to read what the process wrote at a time. Then the process closes
/// the stream. The reader comes back with its cursor, and the process keeps nothing for it meanwhile.
pub const STREAM_STALL: Duration = Duration::from_secs(10);

/// How long a publisher waits for the other publishers of its process. Together with [`STORE_DEADLINE`] this keeps the
/// promise of an answer within two seconds.
pub const PUBLISH_LOCK: Duration = Duration::from_millis(250);
