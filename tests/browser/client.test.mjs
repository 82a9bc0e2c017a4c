// The client's own logic: taken from a running bus as a user would, and run in Node.

import assert from "node:assert/strict";
import { createHmac, webcrypto } from "node:crypto";
import { after, test } from "node:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { setTimeout as sleep } from "node:timers/promises";
import { startFastcgiSite, startProxy, startSite, unbatched, until } from "./servers.mjs";

globalThis.crypto ??= webcrypto; // Node 18 has it, but not there

const SIGNED = { SHORTBUS_AUTH: "signed" };
const KEY = { SHORTBUS_KEY: "0123456789abcdef0123456789abcdef" };
let switched = {}; // the settings of the bus of this name
const site = await startSite(() => ({
  small: { SHORTBUS_MAX_BYTES: "100" },
  large: { SHORTBUS_MAX_BYTES: "100000" },
  huge: { SHORTBUS_MAX_BYTES: "1000000" },
  short: { SHORTBUS_TTL: "1" },
  signed: SIGNED,
  keyed: { ...SIGNED, ...KEY },
  switched,
}));
after(() => site.close());

const live = await startFastcgiSite(); // with event streams and long polls
after(() => live.close());

const saved = join(site.folder, "shortbus.mjs");
writeFileSync(saved, await (await fetch(`${site.bus("chat")}/shortbus.mjs`)).text());
const { MessageBus, default: standard } = await import(pathToFileURL(saved));

const numbers = (from, to) => Array.from({ length: to - from }, (_, i) => from + i);

/** A client that the test's end closes, with what it has heard. */
function open(t, url, options = { interval: 20 }) {
  const bus = new MessageBus(url, options);
  t.after(() => bus.close());
  const events = { message: [], error: [], missed: [], open: [], messageerror: [], rejoin: [], close: [] };
  Object.assign(events, { bufferedamountlow: [], presence: [] });
  for (const [type, list] of Object.entries(events)) bus.addEventListener(type, (event) => list.push(event));
  return Object.assign(bus, { events, heard: () => events.message.map((event) => event.data) });
}

async function joined(t, url, options) {
  const bus = open(t, url, options);
  await until("the join", () => bus.connected);
  return bus;
}

async function proxied(t, url, treat) {
  const proxy = await startProxy(url, treat);
  t.after(proxy.close);
  return proxy;
}

/** Sets the client's clock so many milliseconds ahead, as often as it is called, until the test ends. */
function steps(t) {
  const now = Date.now;
  t.after(() => (Date.now = now));
  return (ahead) => (Date.now = () => now.call(Date) + ahead);
}

/** Sends one after another, with a pause before each: a promise of their ids. Timers that are late may change places. */
async function sendSlowly(bus, values, pause) {
  const sent = [];
  for (const value of values) {
    await sleep(pause);
    sent.push(bus.send(value));
  }
  return Promise.all(sent);
}

const posts = (proxy) => proxy.requests.filter(({ method }) => method === "POST");
const isJoin = ({ method, url }) => method === "GET" && !url.includes("?");
const isPoll = ({ method, url }) => method === "GET" && url.includes("?");
const said = (code, status) => (error) => {
  assert.deepEqual([error.name, error.code, error.status], ["BusError", code, status], error.stack);
  assert(error instanceof Error && error.message.length > 10);
  return true;
};

/** A door that requests wait at until it is opened. */
function door() {
  let open;
  const opened = new Promise((resolve) => (open = resolve));
  return { opened, open };
}

const realTimeout = globalThis.setTimeout;

/**
 * Lets the client's timers run so many times faster until the test ends, and lists what they were asked for. A request
 * still gets two seconds: the machine may be busy.
 */
function hurry(t, factor) {
  t.after(() => (globalThis.setTimeout = realTimeout));
  const asked = [];
  globalThis.setTimeout = (act, milliseconds, ...rest) => {
    // Node's own fetch has timers too.
    if (!new Error().stack.includes("/shortbus.mjs")) return realTimeout(act, milliseconds, ...rest);
    asked.push(milliseconds);
    const least = [POLL_TIMEOUT, REQUEST_TIMEOUT].includes(milliseconds) ? 2_000 : 0;
    return realTimeout(act, Math.max(milliseconds / factor, least), ...rest);
  };
  return asked;
}

const NEVER = { interval: 600_000 }; // between plain polls
const POLL_TIMEOUT = 30_000; // milliseconds until the client gives up a poll
const REQUEST_TIMEOUT = 10_000; // milliseconds until it gives up a join, or one try of a message
const MAX_PAUSE = 30_000; // milliseconds, the longest pause after failures

test("a bus is joined, and says who and where it is", async (t) => {
  assert.equal(standard, MessageBus);
  const url = site.bus("café");
  const bus = open(t, `${url}/?x#y`);
  assert.deepEqual([bus.url, bus.name, bus.connected], [url, "café", false]);
  assert.deepEqual([bus.user, bus.lastId], [undefined, undefined]);
  await until("open", () => bus.events.open.length);
  assert(bus.connected && Number.isSafeInteger(bus.user) && Number.isSafeInteger(bus.lastId));
  assert.equal(bus.lastId, (await site.ask(url)).json.id);
  assert.equal(open(t, new URL(url)).url, url);
  assert.throws(() => new MessageBus(), TypeError); // loaded from a file, not from a bus
  for (const option of ["interval", "idleInterval", "deadline"]) {
    for (const value of [-1, NaN, "soon"]) assert.throws(() => new MessageBus(url, { [option]: value }), RangeError);
  }
  for (const option of ["user", "after"]) {
    for (const value of [-1, 0.5, "7", 2 ** 53]) {
      assert.throws(() => new MessageBus(url, { [option]: value }), RangeError);
    }
  }
  assert.throws(() => new MessageBus(url, { identity: "session" }), RangeError);
  assert.throws(() => new MessageBus(url, { identity: "tab", user: 7 }), TypeError);
  assert.throws(() => new MessageBus(url, { headers: { "no header": "" } }), TypeError);
});

test("two clients talk, each with an id for what it sends, and no echo", async (t) => {
  const url = site.bus("talk");
  const [ann, bob] = await Promise.all([joined(t, url), joined(t, url)]);
  assert.notEqual(ann.user, bob.user);
  const data = { text: "grüß dich 👋 </script><b>", list: [1, null, true, { deep: [] }], __proto__: null };
  const first = await ann.send(data);
  await until("the message", () => bob.events.message.length);
  const second = await bob.send("and you");
  await until("the answer", () => ann.events.message.length);
  assert(second > first);
  const [event] = bob.events.message;
  assert.deepEqual(event.data, JSON.parse(JSON.stringify(data)));
  assert.deepEqual([event.type, event.user, event.lastEventId], ["message", ann.user, String(first)]);
  assert.equal(event.origin, site.origin);
  await until("both cursors behind the answer", () => [ann, bob].every((bus) => bus.lastId >= second));
  assert.deepEqual(ann.heard(), ["and you"]);
  assert.equal(bob.heard().length, 1);
});

// As CVE-2019-10744 and its like do it: who publishes must not reach the prototypes of all objects.
test("keys of prototypes are keys like any other, in messages, presence and errors", async (t) => {
  const url = site.bus("prototypes");
  const [ann, bob] = await Promise.all([joined(t, url), joined(t, url)]);
  const json = '{"__proto__":{"hit":1},"constructor":{"prototype":{"hit":1}}}';
  bob.present();
  ann.present(JSON.parse(json));
  await until("the presence", () => bob.others.has(ann.user));
  assert.equal(JSON.stringify(bob.others.get(ann.user)), json);
  await ann.send(JSON.parse(json));
  await until("the message", () => bob.events.message.length);
  assert.equal(JSON.stringify(bob.heard()[0]), json);
  const hostile = `{"error":"no","message":"No.",${json.slice(1)}`;
  const reply = { status: 400, headers: { "Content-Type": "application/json" }, body: hostile };
  const proxy = await proxied(t, url, (pass, { method }) => (method === "POST" ? reply : pass()));
  await assert.rejects((await joined(t, proxy.url)).send(1), { code: "no" });
  assert.equal({}.hit, undefined);
});

test("what is sent before the join is answered arrives in order", async (t) => {
  const url = site.bus("early");
  const bob = await joined(t, url);
  const join = door();
  const proxy = await proxied(t, url, (pass, request) => (isJoin(request) ? join.opened.then(pass) : pass()));
  const ann = open(t, proxy.url);
  const ids = Promise.all(numbers(0, 100).map((n) => ann.send(n)));
  ann.postMessage(100);
  await until("the join", () => proxy.requests.length);
  join.open();
  assert((await ids).every((id, at, all) => at === 0 || id > all[at - 1]));
  await until("all", () => bob.heard().length > 100);
  assert.deepEqual(bob.heard(), numbers(0, 101));
});

test("a message is what the data was when it was given", async (t) => {
  const url = site.bus("frozen");
  const bob = await joined(t, url);
  const ann = open(t, url);
  const data = { n: 1 };
  ann.postMessage(data);
  data.n = 2;
  await until("the message", () => bob.heard().length);
  assert.deepEqual(bob.heard(), [{ n: 1 }]);
});

test("handlers, listeners, and callbacks that get the bare data", async (t) => {
  const url = site.bus("listeners");
  const bus = open(t, url);
  const log = [];
  const note = (name) => (given) => log.push([name, given?.data ?? given]);
  assert.equal(bus.onmessage, null);
  bus.onmessage = "no function";
  assert.equal(bus.onmessage, null);
  bus.onmessage = function (event) {
    assert.equal(this, bus);
    note("on")(event);
  };
  const callback = note("bare");
  bus.addEventListener(callback);
  bus.addEventListener(callback);
  const object = { handleEvent: note("object") };
  bus.addEventListener("message", object);
  bus.addEventListener("message", note("once"), { once: true });
  await until("the join", () => bus.connected);
  await site.publish(url, "a");
  await until("a", () => bus.heard().length === 1);
  bus.removeEventListener(callback);
  bus.removeEventListener("message", object);
  bus.onmessage = null;
  await site.publish(url, "b");
  await until("b", () => bus.heard().length === 2);
  bus.addEventListener(callback);
  await site.publish(url, "c");
  await until("c", () => bus.heard().length === 3);
  assert.deepEqual(log.sort(), [["bare", "a"], ["bare", "c"], ["object", "a"], ["on", "a"], ["once", "a"]]);
});

test("ready is called once, with the bus", async (t) => {
  const url = site.bus("ready");
  const calls = [];
  const bus = open(t, url, function (given) {
    calls.push([this, given]);
  });
  await until("ready", () => calls.length);
  assert(calls[0][0] === bus && calls[0][1] === bus && bus.connected);
  await site.stopApache();
  await until("an error", () => bus.events.error.length);
  await site.startApache();
  await until("open again", () => bus.events.open.length === 2);
  assert.equal(calls.length, 1);
});

test("for await hears until the loop is left, or the bus closed", async (t) => {
  const url = site.bus("loop");
  const bus = await joined(t, url);
  const heard = [];
  const loop = (async () => {
    for await (const { data, user } of bus) {
      heard.push([user, data]);
      if (data === "leave") break;
    }
  })();
  for (const data of ["a", "b", "leave"]) await site.publish(url, data, 7);
  await loop;
  await site.publish(url, "not in the loop");
  await until("all", () => bus.heard().length === 4);
  assert.deepEqual(heard, [[7, "a"], [7, "b"], [7, "leave"]]);

  const late = [];
  const second = (async () => {
    for await (const { data } of bus) {
      late.push(data);
      // What was heard before the end is still given.
      if (data === 1) await until("the end", () => bus.events.close.length);
    }
  })();
  for (const data of [1, 2]) await site.publish(url, data);
  await until("both", () => bus.heard().length === 6);
  bus.close();
  await second;
  assert.deepEqual(late, [1, 2]);
  for await (const event of bus) assert.fail(`closed, and gives ${event}`);
});

test("whoever asks for several messages at once gets them in order, or the end", async (t) => {
  const url = site.bus("next");
  const bus = await joined(t, url);
  const iterator = bus[Symbol.asyncIterator]();
  const asked = [1, 2, 3, 4].map(() => iterator.next());
  for (const data of ["a", "b"]) await site.publish(url, data);
  assert.deepEqual([(await asked[0]).value.data, (await asked[1]).value.data], ["a", "b"]);
  await iterator.return();
  for (const rest of asked.slice(2)) assert.deepEqual(await rest, { done: true, value: undefined });
});

test("a signal that is aborted already leaves no request", async (t) => {
  const proxy = await proxied(t, site.bus("chat"));
  const bus = open(t, proxy.url, { signal: AbortSignal.abort() });
  const sent = bus.send("never");
  await assert.rejects(sent, { name: "AbortError" });
  await until("close", () => bus.events.close.length);
  // Another client's join comes after all that this one could have asked.
  await joined(t, proxy.url);
  assert.deepEqual(proxy.requests.slice(0, 2).filter(isJoin).length, 1);
  assert.equal(posts(proxy).length, 0);
});

test("a signal closes the bus and rejects what has not left yet", async (t) => {
  const send = door();
  const proxy = await proxied(t, site.bus("abort"), (pass, { method }) =>
    method === "POST" ? send.opened.then(pass) : pass(),
  );
  const abort = new AbortController();
  const bus = await joined(t, proxy.url, { interval: 20, signal: abort.signal });
  const sent = [bus.send(1)];
  await until("the first to leave", () => posts(proxy).length);
  sent.push(...[2, 3].map((n) => bus.send(n)));
  abort.abort(new Error("enough"));
  for (const rest of sent.slice(1)) await assert.rejects(rest, /enough/);
  assert.deepEqual([bus.events.close.length, bus.connected], [1, false]);
  send.open();
  assert(await sent[0]);
  assert.equal(posts(proxy).length, 1);
});

test("what was given before close still leaves, in order; then there is silence", async (t) => {
  const url = site.bus("close");
  const bob = await joined(t, url);
  const ann = await joined(t, url);
  ann.events.message.length = 0;
  for (const n of numbers(0, 20)) ann.postMessage(n);
  ann.close();
  ann.close();
  // Not even joined.
  const hasty = open(t, url);
  const ids = numbers(20, 40).map((n) => hasty.send(n));
  hasty.close();
  await Promise.all(ids);
  await until("all", () => bob.heard().length === 40);
  const sorted = bob.heard().sort((a, b) => a - b);
  assert.deepEqual(sorted, numbers(0, 40));
  for (const half of [(n) => n < 20, (n) => n >= 20]) {
    assert.deepEqual(bob.heard().filter(half), sorted.filter(half)); // each in its order
  }
  assert.deepEqual([ann.events.close.length, ann.heard()], [1, []]);
  await assert.rejects(ann.send(1), { name: "InvalidStateError" });
  assert.throws(() => ann.postMessage(1), { name: "InvalidStateError" });
});

test("a bus closed by its listener says nothing more", async (t) => {
  const url = site.bus("enough");
  const hold = door();
  const proxy = await proxied(t, url, (pass, request) => (isPoll(request) ? hold.opened.then(pass) : pass()));
  const bus = await joined(t, proxy.url);
  bus.onmessage = () => bus.close();
  await until("a poll", () => proxy.requests.some(isPoll));
  for (const n of [1, 2, 3]) await site.publish(url, n);
  hold.open();
  await until("close", () => bus.events.close.length);
  assert.deepEqual([bus.heard(), bus.events.error], [[1], []]);
});

test("a user that is given is this user from the start, but not on a signed bus", async (t) => {
  const url = site.bus("given");
  const bob = await joined(t, url);
  const ann = open(t, url, { interval: 20, user: 7 });
  assert.equal(ann.user, 7);
  await ann.send("as seven");
  await until("the message", () => bob.heard().length);
  assert.deepEqual([bob.events.message[0].user, ann.user], [7, 7]);
  const refused = open(t, site.bus("signed"), { interval: 20, user: 7 });
  await assert.rejects(refused.send("as seven"), said("signed_bus", 0));
  assert.match(refused.events.error[0].error.message, /signed.*'user'/);
  assert.equal(refused.events.open.length, 0);
});

test("without a storage an identity is as none", async (t) => {
  const bus = await joined(t, site.bus("unkept"), { interval: 20, identity: "tab" });
  assert(await bus.send("as anyone"));
});

test("a client begins with what lives, or behind an id", async (t) => {
  for (const at of [site, live]) {
    const url = at.bus("latecomer");
    const ids = [];
    for (const n of numbers(0, 150)) ids.push(await at.publish(url, n));
    const all = open(t, url, { after: 0, interval: 20 });
    const rest = open(t, url, { after: ids[99], interval: 20 });
    assert.deepEqual([all.lastId, rest.lastId], [0, ids[99]]);
    const none = await joined(t, url, { interval: 20 });
    await until("what lives", () => all.heard().length >= 150 && rest.heard().length >= 50);
    ids.push(await at.publish(url, 150));
    await until("the last", () => none.heard().length && all.heard().length > 150 && rest.heard().length > 50);
    assert.deepEqual([all.heard(), rest.heard(), none.heard()], [numbers(0, 151), numbers(100, 151), [150]]);
    assert.deepEqual([all.events.missed, rest.events.missed, all.lastId], [[], [], ids[150]]);
  }
});

test("whoever begins with what lives does so without a pause, and is told of a later loss", async (t) => {
  const url = site.bus("loss");
  await site.publish(url, 1);
  const bus = open(t, url, { ...NEVER, after: 0 });
  await until("the message", () => bus.heard().length);
  await site.restartMemcached();
  await site.publish(url, 2);
  const before = open(t, url, { interval: 20, after: bus.lastId });
  await until("the rest", () => before.heard().length);
  assert.deepEqual([before.heard(), before.events.missed.length], [[2], 1]);
});

test("with echo two clients that write at once see one order, their own messages in it", async (t) => {
  for (const at of [site, live]) {
    const url = at.bus("order");
    const options = { interval: 20, echo: true };
    const [ann, bob] = await Promise.all([joined(t, url, options), joined(t, url, options)]);
    const sent = numbers(0, 20).flatMap((n) => [ann.send(`a${n}`), bob.send(`b${n}`)]);
    const given = await Promise.all(sent);
    await until("all", () => ann.heard().length >= 40 && bob.heard().length >= 40);
    assert.deepEqual(ann.heard(), bob.heard());
    const told = (bus) => bus.events.message.map(({ user, lastEventId }) => [user, Number(lastEventId)]);
    const expected = given.map((id, n) => [n % 2 ? bob.user : ann.user, id]).sort(([, a], [, b]) => a - b);
    assert.deepEqual([told(ann), told(bob)], [expected, expected]);
  }
});

test("what JSON would ruin without a word is refused, and says what to send", async (t) => {
  const proxy = await proxied(t, site.bus("nojson"));
  const bus = await joined(t, proxy.url);
  const { buffer } = new Uint8Array(2);
  const ruined = {
    Map: new Map([[1, 2]]), Set: new Set([1]), ArrayBuffer: buffer, DataView: new DataView(buffer), BigInt: 1n,
    Uint8Array: new Uint8Array(2), Float64Array: new Float64Array(0), Blob: new Blob(["x"]), RegExp: /x/,
    Error: new Error("x"), Promise: Promise.resolve(), function: () => 1, symbol: Symbol("s"), undefined: undefined,
  };
  for (const [type, value] of Object.entries(ruined)) {
    const refused = (error) => {
      assert.equal(error.name, "DataCloneError");
      assert.match(error.message, new RegExp(`^JSON has no ${type}\\b.*: send .{4,}`));
      return true;
    };
    await assert.rejects(bus.send(value), refused);
    // What is left out of an object, as JSON has it, is no surprise.
    if (["function", "symbol", "undefined"].includes(type)) continue;
    for (const data of [[value], { deep: [{ value }] }]) assert.throws(() => bus.postMessage(data), refused);
  }
  await assert.rejects(bus.send({ toJSON() {} }), { name: "DataCloneError", message: /^JSON has .* toJSON\(\).*: send / });
  class Move {
    #hidden = 1;
    from = "e2";
    to = "e4";
  }
  const fine = {
    date: new Date(0), nan: NaN, infinite: -Infinity, list: [undefined, () => 1], none: undefined, move: new Move(),
    boxed: [new Number(1), new String("x"), new Boolean(false)], bare: Object.create(null),
    url: new URL("http://a.test/"), empty: [{}, []], own: { toJSON: () => "mine" },
  };
  const bob = await joined(t, site.bus("nojson"));
  await bus.send(fine);
  await until("the message", () => bob.heard().length);
  assert.deepEqual(bob.heard(), [JSON.parse(JSON.stringify(fine))]);
  assert.deepEqual([bob.heard()[0].date, bob.heard()[0].nan], ["1970-01-01T00:00:00.000Z", null]);
  assert.equal(posts(proxy).length, 1);
});

test("what is no JSON is refused, and nothing is sent", async (t) => {
  const proxy = await proxied(t, site.bus("nojson"));
  const bus = await joined(t, proxy.url);
  const cycle = {};
  cycle.cycle = cycle;
  for (const data of [undefined, () => 1, Symbol("s"), 1n, cycle]) {
    await assert.rejects(bus.send(data));
    assert.throws(() => bus.postMessage(data));
  }
  await bus.send(null);
  assert.equal(posts(proxy).length, 1);
  assert.deepEqual(bus.events.error, []);
});

test("a message too large is refused with the server's reason, and later ones go", async (t) => {
  const url = site.bus("small");
  const bob = await joined(t, url);
  const ann = open(t, url);
  const handled = [];
  ann.onerror = ({ error }) => handled.push(error.code);
  const sent = ["a", "x".repeat(200), "b"].map((data) => ann.send(data));
  await assert.rejects(sent[1], said("too_large", 413));
  assert((await sent[0]) < (await sent[2]));
  ann.postMessage("y".repeat(200));
  ann.postMessage("c");
  await until("the rest", () => bob.heard().length === 3);
  assert.deepEqual(bob.heard(), ["a", "b", "c"]);
  assert.deepEqual(handled, ["too_large", "too_large"]);
  assert.match(ann.events.error[0].error.message, /100 bytes/);
  assert(ann.connected);
});

test("with memcached away it says the server's reason, and goes on when it is back", async (t) => {
  const url = site.bus("memcached");
  const bus = await joined(t, url, { interval: 20, deadline: 0 });
  await site.stopMemcached();
  try {
    // A poll that was under way is told that memcached broke off.
    const unreachable = ({ error }) => error.code === "memcached_unreachable";
    const { error } = await until("an error", () => bus.events.error.find(unreachable));
    said("memcached_unreachable", 503)(error);
    assert(error.retryAfter >= 1 && !bus.connected);
    await assert.rejects(bus.send("lost"), said("memcached_unreachable", 503));
  } finally {
    await site.startMemcached();
  }
  await until("open again", () => bus.events.open.length === 2);
  await site.publish(url, "back");
  await until("a message", () => bus.heard().length);
  assert.deepEqual(bus.heard(), ["back"]);
});

test("with the web server away it backs off, and talks when it is back", async (t) => {
  const url = site.bus("server");
  const bus = await joined(t, url, { interval: 20, deadline: 500 });
  await site.stopApache();
  try {
    await until("errors", () => bus.events.error.length >= 2);
    said("network", 0)(bus.events.error[0].error);
    assert(!bus.connected);
    await assert.rejects(bus.send("lost"), said("network", 0));
  } finally {
    await site.startApache();
  }
  await until("open again", () => bus.connected);
  const id = await bus.send("mine");
  await site.publish(url, "yours");
  await until("a message", () => bus.heard().length);
  assert(bus.connected && bus.lastId > id);
  assert.deepEqual(bus.heard(), ["yours"]);
});

test("failures lengthen the pauses, at random, up to half a minute, one poll at a time", async (t) => {
  const proxy = await proxied(t, site.bus("backoff"));
  const bus = await joined(t, proxy.url, { interval: 500 });
  const asked = hurry(t, 200);
  const pauses = () => asked.filter((ms) => ms !== POLL_TIMEOUT && ms !== 500);
  proxy.treat = () => undefined; // cut
  await until("errors", () => pauses().length >= 30);
  proxy.treat = (pass) => pass();
  await until("open again", () => bus.events.open.length === 2);
  const list = pauses();
  list.forEach((pause, n) => assert(pause >= 0 && pause <= Math.min(MAX_PAUSE, 500 * 2 ** n), `${n}: ${pause}`));
  const mean = (part) => part.reduce((a, b) => a + b) / part.length;
  assert(mean(list.slice(10)) > 2 * mean(list.slice(0, 4)), `no growth: ${list}`);
  assert.equal(new Set(list).size, list.length, "no jitter");
  // One success, and it starts anew.
  asked.length = 0;
  await until("usual pauses", () => asked.filter((ms) => ms === 500).length > 1);
  proxy.treat = () => undefined;
  await until("a failure", () => pauses().length);
  assert(pauses()[0] <= 500);
  assert.equal(proxy.mostPolling, 1);
});

test("Retry-After is honoured", async (t) => {
  let refused = 0;
  const proxy = await proxied(t, site.bus("later"), (pass, request) => {
    if (!isPoll(request) || refused++) return pass();
    const body = '{"error":"busy","message":"Too many publish at this moment."}';
    return { status: 503, headers: { "Retry-After": "2" }, body };
  });
  const bus = await joined(t, proxy.url);
  await until("open again", () => bus.events.open.length === 2);
  said("busy", 503)(bus.events.error[0].error);
  assert.equal(bus.events.error[0].error.retryAfter, 2);
  const [poll, next] = proxy.requests.filter(isPoll);
  assert(next.at - poll.at > 1_900, `came back after ${next.at - poll.at} ms`);
});

test("a page waits for a minute at most, whatever Retry-After says, and understands a date", async (t) => {
  const date = (ahead) => new Date(Date.now() + ahead).toUTCString();
  const answers = [["3600", 3_600], [date(86_400_000), 86_400], ["-5", 0], ["soon", 0], [date(-9_000), 0]];
  const asked = hurry(t, 100);
  for (const [after, seconds] of answers) {
    let refused = 0;
    const proxy = await proxied(t, site.bus("hour"), (pass, request) =>
      isPoll(request) && !refused++ ? refusal(503, "busy", { "Retry-After": after, Date: date(0) }) : pass(),
    );
    asked.length = 0;
    const bus = await joined(t, proxy.url);
    await until("open again", () => bus.events.open.length === 2);
    const [{ error }] = bus.events.error;
    assert(Math.abs(error.retryAfter - seconds) < 5, `${after}: ${error.retryAfter}`);
    assert.equal(asked.includes(60_000), seconds > 60, `${after}: ${asked}`);
    assert(asked.every((ms) => ms <= 60_000), `${after}: ${asked}`);
    bus.close();
  }
});

test("replies that are no bus's are reported, and it recovers", async (t) => {
  const url = site.bus("garbage");
  const replies = [
    { body: "<html>Log in to the hotel's network" },
    { headers: { "Content-Type": "application/json" }, body: "[{" },
    { status: 502, body: "<h1>Bad Gateway</h1>" },
    { status: 500, body: "" },
  ];
  const given = [];
  const proxy = await proxied(t, url, (pass, request) => {
    if (!isPoll(request) || !replies.length) return pass();
    given.push(replies[0]);
    return replies.shift();
  });
  hurry(t, 20);
  const bus = await joined(t, proxy.url);
  await site.publish(url, "through");
  await until("a message", () => bus.heard().length);
  assert.deepEqual(bus.heard(), ["through"]);
  const codes = bus.events.error.map(({ error }) => [error.code, error.status]);
  assert.deepEqual(codes, [["not_a_bus", 0], ["not_a_bus", 0], ["http", 502], ["http", 500]]);
  assert.deepEqual(bus.events.messageerror.map(({ data }) => data), given.slice(0, 2).map(({ body }) => body));
});

test("JSON that is no bus's does not pass for one", async (t) => {
  const url = site.bus("foreign");
  const join = ["{}", "null", "[]", '{"user":"x","id":null}'];
  const poll = ["{}", "null", '[{"n":1}]', '{"error":"x"}', "1"];
  const proxy = await proxied(t, url, (pass, request) => {
    const body = isJoin(request) ? join.shift() : isPoll(request) ? poll.shift() : undefined;
    return body ? { headers: { "Content-Type": "application/json" }, body } : pass();
  });
  hurry(t, 20);
  const bus = open(t, proxy.url);
  const users = [];
  bus.addEventListener("open", () => users.push(bus.user, bus.lastId));
  await until("the polls", () => proxy.requests.filter(isPoll).length > 6);
  assert(users.every(Number.isSafeInteger), `open with user and id ${users}`);
  await site.publish(url, "through");
  await until("a message", () => bus.heard().includes("through"));
  assert.deepEqual(bus.heard(), ["through"]);
  const codes = bus.events.error.map(({ error }) => error.code);
  assert.deepEqual(codes, Array(9).fill("not_a_bus"));
});

test("messages gone before they could be read are missed, and the rest is heard", async (t) => {
  const url = site.bus("short");
  const sleep = door();
  const proxy = await proxied(t, url, (pass, request) => (isPoll(request) ? sleep.opened.then(pass) : pass()));
  const bus = await joined(t, proxy.url);
  const order = [];
  for (const type of ["missed", "message"]) bus.addEventListener(type, () => order.push(type));
  const before = bus.lastId;
  for (const n of [1, 2]) await site.publish(url, n);
  await until("them to expire", async () => !(await site.ask(`${url}?id=${before}`)).json.length);
  await site.publish(url, 3);
  sleep.open();
  await until("a message", () => bus.heard().length);
  assert.deepEqual([bus.heard(), order], [[3], ["missed", "message"]]);
});

test("1,100 messages behind, all are heard in order", async (t) => {
  const url = site.bus("behind");
  const sleep = door();
  const proxy = await proxied(t, url, (pass, request) => (isPoll(request) ? sleep.opened.then(pass) : pass()));
  const bus = await joined(t, proxy.url);
  const ids = [];
  for (const start of numbers(0, 110)) {
    ids.push(...(await Promise.all(numbers(0, 10).map((n) => site.publish(url, start * 10 + n)))));
  }
  sleep.open();
  await until("all", () => bus.heard().length >= 1_100);
  const heard = bus.events.message.map((event) => Number(event.lastEventId));
  assert.deepEqual(heard, ids.sort((a, b) => a - b));
  assert.deepEqual(bus.heard().sort((a, b) => a - b), numbers(0, 1_100));
  assert.deepEqual(bus.events.missed, []);
});

test("behind a reply that had room for no more, the rest is polled at once", async (t) => {
  const url = site.bus("huge");
  const asleep = door();
  const proxy = await proxied(t, url, (pass, request) => (isPoll(request) ? asleep.opened.then(pass) : pass()));
  const bus = await joined(t, proxy.url, { interval: 20 });
  await until("a poll", () => proxy.requests.some(isPoll));
  // So large that a reply holds one of them; and a small one with a large one behind it.
  const all = [600_000, 900_000, 70_000, 990_000].map((length, n) => String(n).repeat(length));
  for (const data of all) await site.publish(url, data);
  // It would sleep for long, if it slept.
  const asked = hurry(t, 1);
  asleep.open();
  await until("all", () => bus.heard().length === all.length);
  assert.deepEqual(bus.heard().map(({ length }) => length), all.map(({ length }) => length));
  assert.equal(asked.slice(0, asked.lastIndexOf(POLL_TIMEOUT)).filter((ms) => ms === 20).length, 0, `${asked}`);
});

test("plain polls are slower where nothing happens, if told so, and quick again when something does", async (t) => {
  const url = site.bus("quiet");
  const asked = hurry(t, 20);
  const bus = await joined(t, url, { interval: 200, idleInterval: 4_000 });
  await until("the slowest", () => asked.includes(4_000));
  const steps = numbers(0, 11).map((n) => Math.max(200, Math.min(4_000, 100 * 1.5 ** n)));
  const list = asked.filter((ms) => steps.includes(ms)); // Apache may have ended a connection meanwhile
  assert(list[0] === 200 && list.every((ms, n) => n === 0 || ms >= list[n - 1]), `${list}`);
  assert(list.length > 8, `${list}`);
  for (const happen of [() => site.publish(url, 1), () => bus.send(2)]) {
    asked.length = 0;
    await until("the slowest", () => asked.includes(4_000));
    asked.length = 0;
    await happen();
    await until("quick polls", () => asked.includes(200));
  }
  assert.deepEqual(bus.heard(), [1]);
  // Not told so, a page that is seen polls as often as ever.
  const other = await joined(t, url, { interval: 300 });
  asked.length = 0;
  await until("many polls", () => asked.filter((ms) => ms === 300).length > 20);
  assert(other.connected);
});

test("a proxy that cuts, delays and repeats replies makes no message come twice", async (t) => {
  const url = site.bus("twice");
  let polls = 0;
  let kept;
  const proxy = await proxied(t, url, async (pass, request) => {
    if (!isPoll(request)) return pass();
    const reply = await pass();
    const kind = polls++ % 4;
    if (kind === 0) return undefined; // got, but lost on the way
    if (kind === 1) await new Promise((resolve) => setTimeout(resolve, 100));
    if (kind === 3 && kept) return kept; // an old one, from a cache that ignores no-store
    if (reply.body !== "[]") kept = reply;
    return reply;
  });
  hurry(t, 20);
  const bus = await joined(t, proxy.url);
  for (const n of numbers(0, 60)) {
    await site.publish(url, n);
    await until("its turn", () => n % 10 || bus.heard().length >= n - 5);
  }
  await until("all", () => bus.heard().includes(59));
  const more = polls + 8;
  await until("more polls", () => polls > more);
  assert.deepEqual(bus.heard(), numbers(0, 60));
  assert.equal(proxy.mostPolling, 1);
});

test("a poll that hangs is given up and repeated; a send that hangs is given up", async (t) => {
  const url = site.bus("hung");
  let polls = 0;
  const never = door().opened;
  const proxy = await proxied(t, url, (pass, request) =>
    request.method === "POST" || (isPoll(request) && !polls++) ? never : pass(),
  );
  // Not so much that a request under load would be given up.
  const asked = hurry(t, 10);
  const bus = await joined(t, proxy.url, { interval: 20, deadline: 1_000 });
  await site.publish(url, "after all");
  await until("a message", () => bus.heard().length);
  assert.deepEqual([bus.heard(), bus.events.error.length], [["after all"], 1]);
  said("network", 0)(bus.events.error[0].error);
  assert(asked.includes(POLL_TIMEOUT) && proxy.mostPolling === 1);
  await assert.rejects(bus.send("never"), said("network", 0));
});

test("an interval beyond what timers take is no interval of zero", async (t) => {
  const asked = hurry(t, 1);
  await joined(t, site.bus("chat"), { interval: Infinity });
  await until("the pause", () => asked.some((ms) => ms > POLL_TIMEOUT));
  assert(asked.every((ms) => ms < 2 ** 31), `${asked}`);
});

// Sends that are tried again.

const once = ({ url }) => new URL(url, "http://proxy").searchParams.get("once");
const json = { "Content-Type": "application/json" };
const refusal = (status, code, headers) => ({
  status,
  headers: { ...json, ...headers },
  body: JSON.stringify({ error: code, message: `This is ${code}.` }),
});

/** A proxy that has `treat` decide about what is sent, and a client behind it. */
async function sender(t, url, treat, options = { interval: 20 }) {
  const proxy = await proxied(t, url, (pass, request) => (request.method === "POST" ? treat(pass, request) : pass()));
  return [await joined(t, proxy.url, options), proxy];
}

for (const name of ["lost", "signed"]) {
  test(`a message whose acknowledgements are lost is one message, on the bus ${name}`, async (t) => {
    const url = site.bus(name);
    const bob = await joined(t, url);
    const [ann, proxy] = await sender(t, url, async (pass) => {
      const reply = await pass();
      return posts(proxy).length % 3 ? undefined : reply;
    });
    const sent = [ann.send("a")];
    await until("the first to leave", () => posts(proxy).length);
    sent.push(ann.send("b"));
    const ids = await Promise.all(sent);
    await until("both", () => bob.heard().length >= 2);
    assert.deepEqual(bob.events.message.map(({ lastEventId }) => Number(lastEventId)), ids);
    assert.deepEqual([bob.heard(), ann.events.error], [["a", "b"], []]);
    const names = posts(proxy).map(once);
    assert(names.every((name) => /^[\w-]{16,64}$/.test(name)), `${names}`);
    const [a, b] = [names[0], names[3]];
    assert.notEqual(a, b);
    assert.deepEqual(names, [a, a, a, b, b, b]);
  });

  test(`requests that a proxy repeats make no second message, on the bus ${name}`, async (t) => {
    const url = site.bus(name);
    const bob = await joined(t, url);
    const [ann] = await sender(t, url, async (pass) => (await Promise.all([pass(), pass(), pass()]))[1]);
    const ids = await Promise.all(numbers(0, 10).map((n) => ann.send(n)));
    await ann.send("end");
    await until("the end", () => bob.heard().includes("end"));
    assert.deepEqual(bob.heard(), [...numbers(0, 10), "end"]);
    assert.deepEqual(bob.events.message.slice(0, 10).map(({ lastEventId }) => Number(lastEventId)), ids);
  });
}

for (const name of ["away", "keyed"]) {
  for (const [what, stop, start] of [
    ["memcached", () => site.stopMemcached(), () => site.startMemcached()],
    ["the web server", () => site.stopApache(), () => site.startApache()],
  ]) {
    test(`with ${what} away for three seconds all is sent, in order, once, on the bus ${name}`, async (t) => {
      const url = site.bus(name);
      const [ann, bob] = [await joined(t, url), await joined(t, url)];
      const user = ann.user;
      await ann.send("before");
      await until("the first", () => bob.heard().length);
      await stop();
      let sent;
      try {
        sent = numbers(0, 20).map((n) => ann.send(n));
        await sleep(3_000);
      } finally {
        await start();
      }
      const ids = await Promise.all(sent);
      assert.deepEqual(ids, [...ids].sort((a, b) => a - b));
      await until("all", () => bob.heard().length > 20);
      assert.deepEqual(bob.heard(), ["before", ...numbers(0, 20)]);
      assert.deepEqual([ann.user, ann.heard(), ann.events.rejoin.length], [user, [], 0]);
    });
  }
}

test("after its deadline a message is given up, with the last reason, and the next has its turn", async (t) => {
  const url = site.bus("deadline");
  const bob = await joined(t, url);
  let tries = 0;
  const treat = (pass, { body }) => {
    if (body !== '"late"') return pass();
    return tries++ ? refusal(500, "last") : refusal(502, "first");
  };
  const step = steps(t);
  const [ann, proxy] = await sender(t, url, treat, { interval: 20, deadline: 30_000 });
  const late = assert.rejects(ann.send("late"), said("last", 500));
  await until("some tries", () => tries > 1);
  step(20_000);
  const before = tries;
  await until("another try", () => tries > before);
  const next = ann.send("next");
  assert.equal(ann.events.error.length, 0);
  step(31_000);
  await late;
  await next;
  await until("the message", () => bob.heard().length);
  assert.deepEqual(bob.heard(), ["next"]);
  assert.deepEqual(ann.events.error.map(({ error }) => error.code), ["last"]);
  assert.equal(posts(proxy).length, tries + 1);
});

test("a message whose time is over before its turn has come is given up untried", async (t) => {
  const step = steps(t);
  const gate = door();
  const [bus, proxy] = await sender(t, site.bus("waited"), async (pass) => {
    if (posts(proxy).length === 1) await gate.opened;
    else step(3_600_000);
    return pass();
  });
  const first = bus.send("first");
  await until("it to leave", () => posts(proxy).length);
  const rest = Promise.allSettled(numbers(0, 300).map((n) => bus.send(n)));
  gate.open();
  assert(await first);
  const results = await rest;
  for (const { value } of results.slice(0, 256)) assert(value);
  for (const { reason } of results.slice(256)) said("late", 0)(reason);
  assert.deepEqual([results.length, posts(proxy).length, bus.bufferedAmount], [300, 2, 0]);
  step(0);
  // Where the bus is what fails, its reason is told.
  const busy = (pass, { method }) => (method === "POST" ? refusal(503, "busy") : pass());
  const old = await proxied(t, site.bus("waited"), unbatched(busy));
  const ann = await joined(t, old.url, { interval: 20, deadline: 1_200 });
  const failing = ["tried", "not tried"].map((data) => ann.send(data));
  await Promise.all(failing.map((sent) => assert.rejects(sent, said("busy", 503))));
  assert(posts(old).every(({ body }) => body === '"tried"'));
});

test("what slept through its deadline is not sent a second time", async (t) => {
  const url = site.bus("slept");
  const step = steps(t);
  const asked = hurry(t, 1);
  const [ann, proxy] = await sender(t, url, async (pass) => {
    await pass(); // published, and nobody knows
    return refusal(503, "outcome_unknown", { "Retry-After": 1 });
  });
  const { lastId } = ann;
  const sent = ann.send("once");
  await until("the pause", () => asked.includes(1_000));
  step(3_600_000);
  await assert.rejects(sent, said("outcome_unknown", 503));
  assert.equal(posts(proxy).length, 1);
  assert.equal((await site.ask(`${url}?id=${lastId}`)).json.length, 1);
});

test("what waits for a join that never comes is given up after its deadline", async (t) => {
  for (const [treat, code, status] of [
    [() => undefined, "network", 0],
    [() => door().opened, "network", 0],
    [() => refusal(503, "busy"), "busy", 503],
  ]) {
    const proxy = await proxied(t, site.bus("unjoined"), treat);
    const bus = open(t, proxy.url, { interval: 20, deadline: 3_000 });
    const start = performance.now();
    await assert.rejects(bus.send("late"), said(code, status));
    assert(performance.now() - start < REQUEST_TIMEOUT);
    proxy.treat = (pass) => pass();
    bus.close();
  }
  const proxy = await proxied(t, site.bus("unjoined"), () => refusal(404, "unknown_path"));
  await assert.rejects(open(t, proxy.url).send("astray"), said("unknown_path", 404));
});

test("what may pass is tried again", async (t) => {
  // Not so much that a request under load would be given up.
  hurry(t, 20);
  t.mock.method(Math, "random", () => 0.2);
  const refusals = [];
  const [bus, proxy] = await sender(t, site.bus("statuses"), (pass) =>
    refusals.length ? refusals.shift() : pass(),
  );
  const passing = [
    [408, "http"], [425, "http"], [429, "http"], [500, "http"], [502, "http"], [503, "outcome_unknown"], [504, "http"],
    [409, "once_undecided"], [403, "signature_too_old"], [403, "signature_clock_ahead"],
  ];
  for (const [status, code] of passing) refusals.push(refusal(status, code));
  refusals.push(undefined, { body: "<html>Log in" }, { body: "{}" });
  assert(await bus.send("after all"));
  assert.equal(new Set(posts(proxy).map(once)).size, 1);
  assert.deepEqual([bus.events.error, refusals], [[], []]);
});

test("what does not pass is refused at once", async (t) => {
  let reply;
  const [bus, proxy] = await sender(t, site.bus("final"), () => reply);
  const final = [
    [400, "not_json"], [403, "foreign_origin"], [403, "signature_malformed"], [404, "unknown_path"],
    [409, "once_differs"], [409, "once_expired"], [413, "too_large"], [500, "bad_setting"],
  ];
  for (const [status, code] of final) {
    proxy.requests.length = 0;
    reply = refusal(status, code);
    await assert.rejects(bus.send("no"), said(code, status));
    assert.equal(posts(proxy).length, 1, code);
  }
  assert.deepEqual(bus.events.error.map(({ error }) => error.code), final.map(([, code]) => code));
});

test("failures lengthen a send's pauses at random, one try at a time", async (t) => {
  const [bus, proxy] = await sender(t, site.bus("tries"), () => refusal(503, "busy"), { interval: 700, deadline: 1e6 });
  const asked = hurry(t, 100);
  const sent = bus.send("x");
  const pauses = () => asked.filter((ms) => ![POLL_TIMEOUT, REQUEST_TIMEOUT, 700].includes(ms));
  await until("tries", () => pauses().length > 20);
  pauses().forEach((ms, n) => assert(ms >= 0 && ms <= Math.min(MAX_PAUSE, 500 * 2 ** n), `${n}: ${ms}`));
  assert(Math.max(...pauses()) > 4_000, `no growth: ${pauses()}`);
  assert(posts(proxy).length <= pauses().length + 1);
  proxy.treat = (pass) => pass();
  await sent;
});

test("Retry-After is honoured by a send, and one beyond the deadline ends it", async (t) => {
  let after = 2;
  const [bus, proxy] = await sender(t, site.bus("patience"), (pass) =>
    posts(proxy).length === 1 ? refusal(503, "busy", { "Retry-After": after }) : pass(),
  );
  assert(await bus.send("x"));
  const [first, second] = posts(proxy);
  assert(second.at - first.at > 1_900, `came back after ${second.at - first.at} ms`);
  proxy.requests.length = 0;
  after = 60;
  await assert.rejects(bus.send("y"), said("busy", 503));
  assert.equal(posts(proxy).length, 1);
});

test("a try that hangs is given up after ten seconds, and made again", async (t) => {
  let hung = 0;
  const [bus] = await sender(t, site.bus("hanging"), (pass) => (hung++ ? pass() : door().opened));
  const asked = hurry(t, 50);
  assert(await bus.send("x"));
  assert(asked.includes(REQUEST_TIMEOUT));
});

test("connected again, a send waits no longer", async (t) => {
  const asked = hurry(t, 1);
  let down = false;
  const proxy = await proxied(t, site.bus("again"), (pass, { method }) => {
    if (!down) return pass();
    return method === "POST" ? refusal(503, "busy", { "Retry-After": 9 }) : undefined;
  });
  const bus = await joined(t, proxy.url);
  down = true;
  await until("an error", () => bus.events.error.length);
  const sent = bus.send("x");
  await until("the pause", () => asked.includes(9_000));
  down = false;
  await until("open again", () => bus.events.open.length === 2);
  const start = performance.now();
  await sent;
  assert(performance.now() - start < 1_000);
});

test("what was given before close is tried until it is delivered", async (t) => {
  const url = site.bus("closing");
  const bob = await joined(t, url);
  const [ann, proxy] = await sender(t, url, (pass) => (posts(proxy).length < 4 ? undefined : pass()));
  const sent = ["a", "b"].map((data) => ann.send(data));
  ann.close();
  await Promise.all(sent);
  await until("both", () => bob.heard().length === 2);
  assert.deepEqual([bob.heard(), ann.events.error], [["a", "b"], []]);
});

test("closed before it is joined, a client joins for what it has to send", async (t) => {
  // Time to close it in the pause behind the join that fails.
  t.mock.method(Math, "random", () => 0.9);
  for (const name of ["hasty", "signed"]) {
    const url = site.bus(name);
    const bob = await joined(t, url);
    const proxy = await proxied(t, url, (pass, request) => (proxy.requests.length === 1 ? undefined : pass()));
    const ann = open(t, proxy.url);
    const sent = ["a", "b"].map((data) => ann.send(data));
    await until("a join that fails", () => proxy.requests.length);
    ann.close();
    const ids = await Promise.all(sent);
    await until("both", () => bob.heard().length === 2);
    const heard = bob.events.message.map(({ lastEventId }) => Number(lastEventId));
    assert.deepEqual([bob.heard(), heard], [["a", "b"], ids]);
    assert.deepEqual([proxy.requests.filter(isPoll), ann.events.open, ann.heard()], [[], [], []]);
  }
});

test("closed while it is joined, a client takes this join for what it has to send", async (t) => {
  const join = door();
  const treat = (pass, request) => (isJoin(request) ? join.opened.then(pass) : pass());
  const proxy = await proxied(t, site.bus("hasty"), treat);
  const [busy, idle] = [open(t, proxy.url, { deadline: 0 }), open(t, proxy.url)];
  const sent = busy.send("a");
  await until("the joins", () => proxy.requests.length === 2);
  busy.close();
  idle.close();
  await until("the idle one's end", () => proxy.requests.filter((request) => request.isCut()).length === 1);
  join.open();
  assert(await sent);
  assert.deepEqual(proxy.requests.map(({ method }) => method), ["GET", "GET", "POST"]);
});

test("a signal ends a send's pause, a join, and what would be tried again", async (t) => {
  const asked = hurry(t, 1);
  let hold;
  const pausing = () => asked.includes(7_000);
  for (const [treat, isAt, reason] of [
    [() => refusal(503, "busy", { "Retry-After": 7 }), pausing, "enough"],
    [() => hold.opened.then(() => refusal(503, "busy")), (proxy) => posts(proxy).length, "This is busy."],
    [() => hold.opened.then(() => refusal(403, "signature_wrong")), (proxy) => posts(proxy).length, "enough"],
    [undefined, (proxy) => proxy.requests.length, "enough"], // not even joined
  ]) {
    hold = door();
    const abort = new AbortController();
    const proxy = await proxied(t, site.bus("dropped"), (pass, { method }) =>
      method === "POST" ? treat() : treat ? pass() : door().opened,
    );
    const bus = open(t, proxy.url, { interval: 20, signal: abort.signal });
    const first = bus.send("a");
    await until("its turn", () => isAt(proxy));
    const sent = Promise.allSettled([first, bus.send("b")]);
    const start = performance.now();
    abort.abort(new Error("enough"));
    hold.open();
    assert.deepEqual((await sent).map(({ reason }) => reason.message), [reason, "enough"]);
    assert(performance.now() - start < 500);
    const left = proxy.requests.length;
    await sleep(1_000);
    assert.deepEqual([proxy.requests.length, bus.events.close.length], [left, 1]);
  }
});

const page = (status, headers) => ({ status, headers: { "Content-Type": "text/html", ...headers }, body: "<h1>No." });

test("what the bus does not say itself is tried again: other programs' refusals", async (t) => {
  hurry(t, 20);
  t.mock.method(Math, "random", () => 0.2);
  const refusals = [403, 403, 404, 405, 409, 413, 414, 418].map((status) => page(status));
  const gateway = (body) => ({ status: 403, headers: json, body: JSON.stringify(body) });
  refusals.push(gateway({ message: "Forbidden" }), gateway({ status: 403, error: "Forbidden", message: "No." }));
  refusals.push({ status: 400, body: '{"error":' }, gateway(null), gateway({ error: "denied" }));
  const [bus, proxy] = await sender(t, site.bus("strangers"), (pass) => refusals.shift() ?? pass());
  assert(await bus.send("after all"));
  assert.deepEqual([bus.events.error, new Set(posts(proxy).map(once)).size, posts(proxy).length], [[], 1, 14]);
});

test("under mod_evasive, which refuses with a 403 whoever is quick, every message arrives, in order", async (t) => {
  const evasive = await startSite(() => ({}), (site) => `
    LoadModule evasive20_module /usr/lib/apache2/modules/mod_evasive20.so
    StartServers 1
    ServerLimit 1
    DOSPageCount 3
    DOSPageInterval 1
    DOSBlockingPeriod 1
    DOSLogDir ${site.folder}`);
  t.after(() => evasive.close());
  const url = evasive.bus("chat");
  const first = (await evasive.ask(url)).json.id;
  const statuses = [];
  const [bus] = await sender(t, url, async (pass) => {
    const reply = await pass();
    statuses.push(reply.status);
    return reply;
  });
  await sendSlowly(bus, numbers(0, 40), 25);
  bus.close(); // and its polls
  assert(statuses.includes(403), "none was refused");
  const heard = await until("room", () => evasive.ask(`${url}?id=${first}`).then(({ json }) => json, () => null));
  assert.deepEqual(heard.map(({ data }) => data), numbers(0, 40));
});

test("a signed bus whose 403 the web server replaces is joined anew when it lost its key", async (t) => {
  const pages = await startFastcgiSite("nginx", () => "fastcgi_intercept_errors on; error_page 403 409 /error.html;");
  t.after(() => pages.close());
  pages.serve("error.html", "<h1>No.");
  const bus = await joined(t, pages.bus("signed-chat"));
  await bus.send("before");
  await pages.restartMemcached();
  assert(await bus.send("after"));
  assert.equal(bus.events.rejoin.length, 1);
});

test("a refusal that does not pass is told after the deadline, with what to do about it", async (t) => {
  for (const [status, sentence] of [
    [401, /log in.*'headers'/], [403, /answered 403 .*access rules.*error log/], [404, /no bus at this URL/],
    [405, /no bus at this URL/], [413, /client_max_body_size/], [500, /error log.*mode/], [502, /may be down/],
  ]) {
    const [bus] = await sender(t, site.bus("strangers"), () => page(status), { interval: 20, deadline: 1_000 });
    const refused = await bus.send("x").then(assert.fail, (error) => error);
    said("http", status)(refused);
    assert.match(refused.message, sentence);
  }
});

test("what answers in a bus's place is named", async (t) => {
  for (const [reply, sentence] of [
    [page(200), /web page, such as a login's/],
    [{ body: "\x7fELF\x02\x01" }, /CGI has to be enabled/],
    [{ headers: json, body: '{"hello":"world"}' }, /not what a bus says/],
    [page(404), /no bus at this URL/],
  ]) {
    const proxy = await proxied(t, site.bus("named"), () => reply);
    const bus = open(t, proxy.url);
    await until("an error", () => bus.events.error.length);
    assert.match(bus.events.error[0].error.message, sentence);
  }
});

test("a redirect of the bus is followed once, by the join, and then by no request", async (t) => {
  for (const name of ["redirected", "signed"]) {
    const url = site.bus(name);
    const bob = await joined(t, url);
    const proxy = await proxied(t, url, (pass, { url }) => {
      if (url.startsWith("/moved")) return pass(url.replace("/moved", "/bus"));
      return { status: 301, headers: { Location: url.replace("/bus", "/moved") } };
    });
    const ann = await joined(t, proxy.url);
    assert(await ann.send("straight"));
    await bob.send("and back");
    await until("the messages", () => bob.heard().length && ann.heard().length);
    assert.equal(ann.url, proxy.url);
    assert.deepEqual(proxy.requests.filter(({ url }) => url.startsWith("/bus")).map(({ method }) => method), ["GET"]);
  }
});

test("a redirect that adds a slash, or comes later, is no end", async (t) => {
  const url = site.bus("redirected");
  const bob = await joined(t, url);
  const slash = (pass, { url }) => {
    if (url.startsWith("/bus/")) return pass();
    return { status: 301, headers: { Location: url.replace("/bus", "/bus/") } };
  };
  const proxy = await proxied(t, url, slash);
  const ann = await joined(t, proxy.url);
  assert(await ann.send(1));
  const later = await proxied(t, url);
  const eve = await joined(t, later.url);
  const { user } = eve;
  later.treat = slash;
  assert(await eve.send(2));
  await until("both", () => bob.heard().length === 2);
  assert.deepEqual([bob.heard(), eve.user, eve.events.rejoin], [[1, 2], user, []]);
  assert.deepEqual([ann.events.error, ann.events.messageerror, eve.events.error], [[], [], []]);
});

test("headers that are given go with every request, a password in the URL with none", async (t) => {
  const url = live.bus("headers");
  const proxy = await proxied(t, url, (pass, request) => (isStream(request) ? pass.on() : pass()));
  const headers = new Headers({ Authorization: "Basic YTpi" });
  const bus = await hearing(t, "stream", proxy.url.replace("http://", "http://a:b@"), { headers });
  assert.equal(bus.url, proxy.url);
  await bus.send(1);
  headers.set("Authorization", "Basic Yzpk");
  await bus.send(2);
  const sent = proxy.requests.map(({ method, headers }) => [method, headers.authorization, headers["content-type"]]);
  const type = "application/json";
  assert.deepEqual(sent.sort(), [
    ["GET", "Basic YTpi", undefined], ["GET", "Basic YTpi", undefined],
    ["POST", "Basic YTpi", type], ["POST", "Basic Yzpk", type],
  ]);
});

test("without crypto, as in Node 18, a name is random all the same", async (t) => {
  const real = Object.getOwnPropertyDescriptor(globalThis, "crypto");
  Object.defineProperty(globalThis, "crypto", { value: undefined, configurable: true });
  t.after(() => Object.defineProperty(globalThis, "crypto", real));
  const [bus, proxy] = await sender(t, site.bus("plain"), (pass) => pass());
  for (const data of ["a", "b"]) await bus.send(data);
  const names = posts(proxy).map(once);
  assert(names.every((name) => /^[\w-]{16,64}$/.test(name)) && names[0] !== names[1], `${names}`);
});

// Several messages at once.

const isBatch = ({ url }) => url.includes("&batch=1");
const elements = (request) => (isBatch(request) ? JSON.parse(request.body) : [JSON.parse(request.body)]);

/** Sends a message that stays under way until the door is opened: what is given meanwhile waits. */
async function busy(t, url, treat = (pass) => pass(), options = undefined) {
  const first = door();
  const held = (pass, request) => (posts(proxy).length > 1 ? treat(pass, request) : first.opened.then(pass));
  const [bus, proxy] = await sender(t, url, held, options);
  const sent = bus.send("first");
  await until("the first to leave", () => posts(proxy).length);
  return { bus, proxy, sent, open: first.open, later: () => posts(proxy).slice(1) };
}

for (const name of ["several", "signed"]) {
  test(`what is given while a message is under way leaves together, in order, on the bus ${name}`, async (t) => {
    const url = site.bus(name);
    const bob = await joined(t, url);
    const { bus, proxy, sent, open, later } = await busy(t, url);
    const rest = numbers(0, 600).map((n) => bus.send(n));
    await sleep(50);
    assert.equal(posts(proxy).length, 1); // one request at a time
    open();
    const ids = await Promise.all([sent, ...rest]);
    assert(ids.every((id, at) => at === 0 || id > ids[at - 1]));
    await until("all", () => bob.heard().length > 600);
    assert.deepEqual(bob.heard(), ["first", ...numbers(0, 600)]);
    assert.deepEqual(bob.events.message.map(({ lastEventId }) => Number(lastEventId)), ids);
    assert.deepEqual(later().map((request) => [isBatch(request), elements(request).length]), [
      [true, 256], [true, 256], [true, 88],
    ]);
    assert(!isBatch(posts(proxy)[0]) && new Set(posts(proxy).map(once)).size === 4);
    assert(await bus.send("alone"));
    assert.equal(posts(proxy).at(-1).body, '"alone"');
    assert(!isBatch(posts(proxy).at(-1)));
  });
}

test("a request has 30,000 bytes, or one message", async (t) => {
  const url = site.bus("large");
  const bob = await joined(t, url);
  const { bus, sent, open, later } = await busy(t, url);
  const all = [9_000, 9_000, 9_000, 9_000, 90_000, 10, 29_985, 20].map((length) => "x".repeat(length));
  const rest = all.map((data) => bus.send(data));
  open();
  await Promise.all([sent, ...rest]);
  await until("all", () => bob.heard().length > all.length);
  assert.deepEqual(bob.heard(), ["first", ...all]);
  const lengths = later().map((request) => elements(request).map(({ length }) => length));
  assert.deepEqual(lengths, [[9_000, 9_000, 9_000], [9_000], [90_000], [10], [29_985], [20]]);
});

test("a batch whose acknowledgements are lost is repeated as it was, and arrives once", async (t) => {
  for (const name of ["several", "signed"]) {
    const url = site.bus(name);
    const bob = await joined(t, url);
    const { bus, sent, open, later } = await busy(t, url, async (pass) => {
      const reply = await pass();
      return later().length < 4 ? undefined : reply;
    });
    const rest = numbers(0, 20).map((n) => bus.send(n));
    open();
    await until("a repeat", () => later().length > 1);
    rest.push(bus.send("behind"));
    const ids = await Promise.all([sent, ...rest]);
    await until("all", () => bob.heard().length > 21);
    assert.deepEqual(bob.heard(), ["first", ...numbers(0, 20), "behind"]);
    assert.deepEqual(bob.events.message.map(({ lastEventId }) => Number(lastEventId)), ids);
    const tries = later().map((request) => [once(request), request.body]);
    assert.deepEqual(tries.slice(0, 4), Array(4).fill([tries[0][0], JSON.stringify(numbers(0, 20))]));
    assert.deepEqual([tries.length, tries[4][1], bus.events.error], [5, '"behind"', []]);
  }
});

test("of a batch the messages that the bus refuses fail alone, each with its reason", async (t) => {
  const url = site.bus("small");
  const bob = await joined(t, url);
  const { bus, sent, open, later } = await busy(t, url);
  const deep = JSON.parse("[".repeat(200) + "]".repeat(200)); // too deep, and too long
  const all = ["a", "x".repeat(200), "b", "y".repeat(200), deep, "c"];
  const rest = Promise.allSettled(all.map((data) => bus.send(data)));
  open();
  await sent;
  const told = (await rest).map(({ value, reason }) => (value ? "sent" : reason.code));
  assert.deepEqual(told, ["sent", "too_large", "sent", "too_large", "too_large", "sent"]);
  await until("the rest", () => bob.heard().length > 3);
  assert.deepEqual(bob.heard(), ["first", "a", "b", "c"]);
  assert.deepEqual(later().map((request) => elements(request).length), [6, 5, 4, 3]);
  assert.equal(new Set(later().map(once)).size, 4);
  for (const { error } of bus.events.error) {
    said("too_large", 413)(error);
    assert.match(error.message, /^The message is longer than the 100 bytes/);
  }
  assert.deepEqual([bus.events.error.length, bus.bufferedAmount], [3, 0]);
});

test("of a batch that is tried for long each message is given up at its own deadline", async (t) => {
  let down = true;
  const treat = (pass) => (down ? refusal(503, "busy") : pass());
  const { bus, sent, open, later } = await busy(t, site.bus("own"), treat, { interval: 20, deadline: 30_000 });
  const step = steps(t);
  const early = assert.rejects(bus.send("early"), said("busy", 503));
  step(20_000);
  const late = bus.send("late");
  open();
  await sent;
  await until("some tries", () => later().length > 1);
  assert.equal(bus.events.error.length, 0);
  step(31_000);
  await early;
  down = false;
  assert(await late);
  // It stayed as it was: an earlier try may have been the one that arrived.
  assert.deepEqual(new Set(later().map(({ body }) => body)), new Set(['["early","late"]']));
  assert.deepEqual([new Set(later().map(once)).size, bus.events.error.length], [1, 1]);
});

test("while the bus fails, one message goes ahead of the others", async (t) => {
  let down = true;
  const treat = (pass) => (down ? refusal(503, "busy") : pass());
  const { bus, sent, open, later } = await busy(t, site.bus("ahead"), treat, { interval: 20, deadline: 30_000 });
  const step = steps(t);
  const given = ["a", "b"].map((data) => assert.rejects(bus.send(data), said("busy", 503)));
  open();
  await until("a try", () => later().length);
  step(20_000);
  const rest = Promise.all(numbers(0, 5).map((n) => bus.send(n)));
  assert.equal(bus.events.error.length, 0);
  step(31_000);
  await Promise.all([sent, ...given]);
  down = false;
  await rest;
  const bodies = later().map(({ body }) => body).filter((body, at, all) => body !== all[at - 1]);
  assert.deepEqual(bodies, ['["a","b"]', "0", "[1,2,3,4]"]);
});

test("an old bus gets one message at a time, in order", async (t) => {
  for (const name of ["several", "signed"]) {
    const url = site.bus(name);
    const bob = await joined(t, url);
    const proxy = await proxied(t, url, unbatched());
    const ann = open(t, proxy.url);
    const ids = await Promise.all(numbers(0, 20).map((n) => ann.send(n)));
    await until("all", () => bob.heard().length >= 20);
    assert.deepEqual(bob.heard(), numbers(0, 20));
    assert.deepEqual(bob.events.message.map(({ lastEventId }) => Number(lastEventId)), ids);
    assert.deepEqual(posts(proxy).map(({ body }) => Number(body)), numbers(0, 20));
    assert(!posts(proxy).some(isBatch));
  }
});

test("what waits is told in bytes, and when it has become little", async (t) => {
  const { bus, sent, open } = await busy(t, site.bus("small"));
  const handled = [];
  bus.onbufferedamountlow = () => handled.push(bus.bufferedAmount);
  assert.deepEqual([bus.bufferedAmount, bus.bufferedAmountLowThreshold], [7, 0]);
  for (const bytes of [-1, NaN, "many"]) {
    assert.throws(() => (bus.bufferedAmountLowThreshold = bytes), RangeError);
  }
  bus.bufferedAmountLowThreshold = 20;
  const rest = ["grüß 👋", { n: [1] }].map((data) => bus.send(data)); // 13 and 9 bytes
  const refused = assert.rejects(bus.send("x".repeat(198)), said("too_large", 413));
  assert.deepEqual([bus.bufferedAmount, handled], [7 + 13 + 9 + 200, []]);
  open();
  await sent;
  assert.equal(bus.bufferedAmount, 222);
  await refused;
  assert.deepEqual([bus.bufferedAmount, handled], [22, []]);
  await Promise.all(rest);
  // Once: from above the threshold to below it.
  assert.deepEqual([bus.bufferedAmount, handled, bus.events.bufferedamountlow.length], [0, [0], 1]);
  await bus.send("short");
  assert.equal(handled.length, 1);
  bus.bufferedAmountLowThreshold = 0;
  await bus.send("short");
  assert.deepEqual(handled, [0, 0]);
});

test("10,000 messages in a loop arrive in order, and a sender that heeds what waits never has much", async (t) => {
  const url = live.bus("loop");
  const bob = await hearing(t, "stream", url, NEVER);
  const treat = (pass, request) => (isStream(request) ? pass.on() : pass());
  const proxy = await proxied(t, url, treat);
  const ann = await joined(t, proxy.url);
  for (const n of numbers(0, 10_000)) ann.postMessage({ n, text: "x".repeat(80) });
  assert(ann.bufferedAmount > 900_000);
  await until("nothing to wait", () => !ann.bufferedAmount);
  await until("all", () => bob.heard().length >= 10_000);
  assert.deepEqual(bob.heard().map(({ n }) => n), numbers(0, 10_000));
  for (const { body } of posts(proxy)) assert(body.length <= 30_000);
  assert(posts(proxy).length <= 45, `${posts(proxy).length} requests`);
  assert.equal(ann.events.bufferedamountlow.length, 1);
  ann.bufferedAmountLowThreshold = 1_000;
  let most = 0;
  for (const n of numbers(10_000, 12_000)) {
    ann.postMessage({ n });
    most = Math.max(most, ann.bufferedAmount);
    if (ann.bufferedAmount > 5_000) await new Promise((resolve) => (ann.onbufferedamountlow = resolve));
  }
  await until("the rest", () => bob.heard().length >= 12_000);
  assert.deepEqual(bob.heard().map(({ n }) => n), numbers(0, 12_000));
  assert(most < 5_100, `${most} bytes`);
  assert.deepEqual([ann.events.error, bob.events.missed], [[], []]);
});

// Signed buses.

/** Node's word on the signature of what was sent, with the secret that a join gave. */
function sign({ bus, secret }, user, time, once, body) {
  return createHmac("sha256", secret).update(`${bus}\n${user}\n${time}\n${once}\n${body}`).digest("base64url");
}

/** Gives a client another clock, until the test ends. */
function setClock(t, ahead) {
  const real = Date.now;
  t.after(() => (Date.now = real));
  Date.now = () => real.call(Date) + ahead;
}

test("on a signed bus two clients talk, and each message is signed as Node would", async (t) => {
  const url = site.bus("signed");
  let credentials;
  const proxy = await proxied(t, url, async (pass, request) => {
    const reply = await pass();
    if (isJoin(request)) credentials = JSON.parse(reply.body);
    return reply;
  });
  const [ann, bob] = [open(t, proxy.url), await joined(t, url)];
  const all = ["", "grüß dich 👋\n", { lone: "\ud800", list: [1, null] }, "x".repeat(9_000), ...numbers(0, 20)];
  const sent = all.map((data) => ann.send(data)); // not joined yet
  const ids = await Promise.all(sent);
  await bob.send("and you");
  await until("all", () => bob.heard().length === all.length && ann.heard().length);
  assert.deepEqual([bob.heard(), ann.heard()], [all, ["and you"]]);
  const heard = bob.events.message.map(({ user, lastEventId }) => [user, Number(lastEventId)]);
  assert.deepEqual(heard, ids.map((id) => [ann.user, id]));
  assert.equal(proxy.requests.filter(isJoin).length, 1);
  assert.equal(ann.user, credentials.user);
  for (const { url, body } of posts(proxy)) {
    const { user, time, once, batch, sig } = Object.fromEntries(new URL(url, "http://proxy").searchParams);
    assert(user === String(credentials.user) && Math.abs(time - Date.now()) < 10_000);
    assert.equal(sig, sign(credentials, user, time, once, batch ? `batch=1\n${body}` : body));
  }
});

for (const hours of [-3, 3]) {
  test(`a client whose clock is ${hours} hours off signs by the server's`, async (t) => {
    setClock(t, hours * 3_600_000);
    const [bus, proxy] = await sender(t, site.bus("signed"), (pass) => pass());
    assert(await bus.send("in time"));
    assert.equal(posts(proxy).length, 1);
  });

  test(`a client whose clock is ${hours} hours off learns of it by a refusal`, async (t) => {
    setClock(t, hours * 3_600_000);
    const proxy = await proxied(t, site.bus("signed"), async (pass, { method }) => {
      const reply = await pass();
      if (method === "GET") delete reply.headers.date;
      return reply;
    });
    const bus = await joined(t, proxy.url);
    assert(await bus.send("in time"));
    assert.deepEqual([posts(proxy).length, bus.events.error], [2, []]);
  });
}

test("when memcached has lost the key, clients join again, say so, and send what was not delivered", async (t) => {
  const url = site.bus("signed");
  const [ann, bob] = await Promise.all([joined(t, url), joined(t, url)]);
  const former = ann.user;
  await ann.send("before");
  await until("the first", () => bob.heard().length);
  const handled = [];
  ann.onrejoin = ({ user }) => handled.push(user);
  await site.restartMemcached();
  const cursor = ann.lastId;
  const ids = await Promise.all(numbers(0, 10).map((n) => ann.send(n)));
  await until("the rest", () => bob.heard().length > 10);
  assert.deepEqual(bob.heard(), ["before", ...numbers(0, 10)]);
  assert.deepEqual(handled, [ann.user]);
  assert.deepEqual(ann.events.rejoin.map(({ user }) => user), [ann.user]);
  assert(ann.user !== former && ids[0] > cursor && ann.lastId >= cursor);
  assert.deepEqual(new Set(bob.events.message.slice(1).map(({ user }) => user)), new Set([ann.user]));
  await bob.send("me too");
  await until("the answer", () => ann.heard().length);
  assert.deepEqual([ann.heard(), bob.events.rejoin.length, bob.events.missed.length], [["me too"], 1, 1]);
  assert.deepEqual([...ann.events.error, ...bob.events.error].filter(({ error }) => error.status !== 503), []);
});

test("a bus becomes signed, and open again, with clients on it", async (t) => {
  const url = site.bus("switched");
  let hold = door();
  const proxy = await proxied(t, url, async (pass, request) => {
    if (isPoll(request)) await hold.opened;
    return request.isCut() ? undefined : pass();
  });
  const [ann, bob] = [await joined(t, proxy.url), await joined(t, url)];
  t.after(() => (switched = {}));
  const users = [ann.user];
  await ann.send("open");
  switched = SIGNED;
  await site.restartApache();
  await Promise.all(["signed", "too"].map((data) => ann.send(data)));
  users.push(ann.user);
  await bob.send("so am I");
  hold.open();
  // What it sent itself it does not hear, though it was somebody else.
  await until("the answer", () => ann.heard().length);
  assert.deepEqual(ann.heard(), ["so am I"]);
  assert.deepEqual([ann.events.rejoin.length, bob.events.rejoin.length], [1, 1]);
  switched = {};
  await site.restartApache();
  await ann.send("open again");
  await until("all", () => bob.heard().length === 4);
  assert.deepEqual(bob.heard(), ["open", "signed", "too", "open again"]);
  users.push(ann.user);
  assert.deepEqual(bob.events.message.map(({ user }) => user), [users[0], users[1], users[1], users[1]]);
  assert.deepEqual([users[0] === users[1], users[1] === users[2], ann.events.rejoin.length], [false, true, 1]);
});

test("a signed bus whose 403 is hidden by an error page is joined anew when it lost its key", async (t) => {
  const url = site.bus("signed");
  const [ann, proxy] = await sender(t, url, async (pass) => {
    const reply = await pass();
    return reply?.status === 403 ? page(403) : reply;
  });
  const former = ann.user;
  await ann.send("before");
  await site.restartMemcached();
  assert(await ann.send("after"));
  assert.deepEqual([ann.events.rejoin.length, ann.user === former], [1, false]);
  assert.equal(posts(proxy).length, 4); // two refusals, with a join in between
});

test("on a signed bus a limit's 403 makes nobody another user", async (t) => {
  let left = 0;
  const proxy = await proxied(t, site.bus("signed"), (pass) => (left && left-- ? page(403) : pass()));
  const bus = await joined(t, proxy.url, NEVER);
  const { user } = bus;
  left = 5; // sends and joins
  assert(await bus.send("x"));
  assert.deepEqual([bus.user, bus.events.rejoin, bus.events.error], [user, [], []]);
  // Nor does a firewall more than once, which never lets this message through.
  proxy.treat = (pass, request) => (request.body.includes("DROP TABLE") ? page(403) : pass());
  const impatient = await joined(t, proxy.url, { ...NEVER, deadline: 5_000 });
  hurry(t, 20);
  await assert.rejects(impatient.send("DROP TABLE"), said("http", 403));
  assert.equal(impatient.events.rejoin.length, 1);
});

test("a signature that is wrong for a new secret too is an error", async (t) => {
  for (const [code, tamper] of [
    ["signature_wrong", (url) => url.replace(/sig=./, (start) => (start === "sig=A" ? "sig=B" : "sig=A"))],
    ["signature_missing", (url) => url.replace(/&sig=.*/, "")],
  ]) {
    let wrong = true;
    const [bus, proxy] = await sender(t, site.bus("keyed"), (pass, { url }) => pass(wrong ? tamper(url) : url));
    await assert.rejects(bus.send("x"), said(code, 403));
    assert.deepEqual([posts(proxy).length, proxy.requests.filter(isJoin).length], [2, 2]);
    assert.deepEqual([bus.events.rejoin.length, bus.events.error.length], [1, 1]);
    wrong = false;
    assert(await bus.send("y"));
    assert.equal(new Set(posts(proxy).map(once)).size, 2); // by message
  }
});

test("where signing is not to be had, a send says why, and the rest is heard", async (t) => {
  Object.defineProperty(globalThis.crypto, "subtle", { value: undefined, configurable: true });
  const url = site.bus("signed");
  const [bus, proxy] = await sender(t, url, (pass) => pass());
  const early = open(t, url);
  await assert.rejects(early.send("x"), said("insecure_context", 0));
  await assert.rejects(bus.send("x"), said("insecure_context", 0));
  assert.match(bus.events.error[0].error.message, /signed.*https.*localhost/);
  assert.equal(posts(proxy).length, 0);
  delete globalThis.crypto.subtle;
  const bob = await joined(t, url);
  await bob.send("heard");
  await until("the message", () => bus.heard().length);
  assert.deepEqual([bus.heard(), bus.connected], [["heard"], true]);
});

// Streams and long polls.

const isStream = ({ url }) => url.includes("stream=1");
const isLong = ({ url }) => url.includes("wait=");
const ids = (bus) => bus.events.message.map(({ lastEventId }) => Number(lastEventId));

/** A client that hears by this way, in case through a proxy. */
async function hearing(t, way, url, options) {
  const bus = open(t, url, options);
  await until(`${way} in use`, () => bus.transport === way);
  return bus;
}

/** Gives the client these replies to its streams, each a list of pieces; the last one, or all, stay open. */
function stubStreams(t, replies, stay = false) {
  const real = globalThis.fetch;
  t.after(() => (globalThis.fetch = real));
  const asked = [];
  globalThis.fetch = async (url, init) => {
    if (!String(url).startsWith("http://stub.test/")) return real(url, init);
    asked.push(url);
    if (url.endsWith("/bus")) return Response.json({ user: 1, id: 5, wait: 60, stream: true });
    if (!isStream({ url })) return Response.json([], { headers: { "Shortbus-Last-Id": "0" } });
    const pieces = replies.shift();
    const body = new ReadableStream({
      start(controller) {
        init.signal.addEventListener("abort", () => controller.error(new Error("aborted")));
        for (const piece of pieces ?? []) controller.enqueue(piece);
        if (replies.length && !stay) controller.close();
      },
    });
    return new Response(body, { headers: { "Content-Type": "text/event-stream; charset=utf-8" } });
  };
  return asked;
}

test("over plain CGI it polls", async (t) => {
  const bus = open(t, site.bus("chat"));
  assert.equal(bus.transport, undefined);
  await until("a poll", () => bus.transport);
  assert.equal(bus.transport, "poll");
});

test("an event stream is read as the standard has it, wherever it is cut", async (t) => {
  const message = (id, data) => `{"id":${id},"user":2,"data":${JSON.stringify(data)}}`;
  const text = [
    "\uFEFF: a comment\r\nretry: 1000\r\n\r\n",
    `id: 6\ndata: ${message(6, "grüß 👋\u2028")}\n\n`,
    `id:7\rdata:{"id":7,"user":2,\rdata: "data":\rdata\rdata:[1]}\r\r`,
    `event: other\r\ndata: ${message(8, "no")}\r\nid: 8\r\n\r\n`,
    `data-x: 1\nid: 9\u0000\nevent\nid: 9\r\ndata: ${message(9, "last")}\r\n\r\n`,
    `id: 10\n\nevent: missed\ndata: 1\n\nid: 3\ndata: ${message(3, "lower")}\n\n`,
    `id: 11\ndata: ${message(11, "cut")}\n`,
  ].join("");
  const bytes = new TextEncoder().encode(text);
  const cuts = numbers(0, bytes.length + 1).map((at) => [bytes.slice(0, at), bytes.slice(at)]);
  cuts.push(Array.from(bytes, (byte) => Uint8Array.of(byte)), [bytes]);
  const replies = cuts.map((pieces) => pieces.filter(({ length }) => length));
  stubStreams(t, replies, true);
  const buses = cuts.map(() => open(t, "http://stub.test/bus"));
  await until("all", () => buses.every((bus) => bus.heard().length >= 4));
  for (const bus of buses) {
    assert.deepEqual(bus.heard(), ["grüß 👋\u2028", [1], "last", "lower"]);
    assert.deepEqual([ids(bus), bus.lastId, bus.events.missed.length], [[6, 7, 9, 3], 3, 1]);
  }
});

test("what a stream says twice, or has cut, is heard once", async (t) => {
  const encode = (text) => new TextEncoder().encode(text);
  const event = (id) => `id: ${id}\ndata: {"id":${id},"user":2,"data":${id}}\n\n`;
  const asked = stubStreams(t, [
    [encode(event(6) + event(7).slice(0, -1))],
    [encode(event(6) + event(7) + "event: cursor\nid: 9\ndata: 9\n\n"), encode("id: 10\ndata: {no")],
    [encode(event(8) + event(10))],
  ]);
  const bus = open(t, "http://stub.test/bus");
  await until("all", () => bus.heard().length > 2);
  assert.deepEqual(bus.heard(), [6, 7, 10]);
  const cursors = asked.filter((url) => isStream({ url })).map((url) => Number(/id=(\d+)/.exec(url)[1]));
  assert.deepEqual([cursors, bus.events.error], [[5, 6, 9], []]);
});

test("what is no message spoils itself alone, not its stream", async (t) => {
  const encode = (text) => new TextEncoder().encode(text);
  const event = (id, data = `{"id":${id},"user":2,"data":${id}}`) => `id: ${id}\ndata: ${data}\n\n`;
  const spoilt = ["{no", "null", '{"id":"9"}', "<html>\n<body>"];
  const events = [event(6), ...spoilt.slice(0, 3).map((text, n) => event(7 + n, text)), event(10)];
  const last = "data: <html>\ndata: <body>\n\n"; // without an id of its own
  const asked = stubStreams(t, [[encode(events.join("")), encode(last + event(12)), encode(event(13, spoilt[0]))]], true);
  const bus = open(t, "http://stub.test/bus");
  const order = [];
  for (const type of ["message", "messageerror"]) bus.addEventListener(type, ({ data }) => order.push(data));
  await until("all", () => bus.lastId === 13);
  assert.deepEqual(order, [6, ...spoilt.slice(0, 3), 10, spoilt[3], 12, spoilt[0]]);
  assert.deepEqual([bus.events.error, asked.filter((url) => isStream({ url })).length], [[], 1]);
});

for (const name of ["talk", "signed-talk"]) {
  test(`by a stream two clients talk at once, on the bus ${name}`, async (t) => {
    const url = live.bus(name);
    const [ann, bob] = await Promise.all([hearing(t, "stream", url, NEVER), hearing(t, "stream", url, NEVER)]);
    const start = performance.now();
    const sent = await Promise.all(numbers(0, 100).map((n) => ann.send(n)));
    await until("all", () => bob.heard().length >= 100);
    assert.deepEqual([bob.heard(), ids(bob), ann.heard()], [numbers(0, 100), sent, []]);
    await bob.send("and you");
    await until("the answer", () => ann.heard().length);
    assert(performance.now() - start < 3_000);
    await live.restartMemcached();
    await ann.send("still");
    await until("the rest", () => bob.heard().length > 100);
    assert.deepEqual([bob.heard().at(-1), bob.events.missed.length], ["still", 1]);
    assert.equal(ann.events.rejoin.length, name === "talk" ? 0 : 1);
    await bob.send("me too");
    await until("the answer", () => ann.heard().length > 1);
    assert.deepEqual(ann.heard(), ["and you", "me too"]);
  });
}

for (const [what, restart] of [
  ["the process killed", async () => (await live.stopFastcgi("SIGKILL"), sleep(300), live.startFastcgi())],
  ["the process stopped", async () => (await live.stopFastcgi(), sleep(300), live.startFastcgi())],
  ["nginx restarted", () => live.restartApache()],
]) {
  for (const way of ["stream", "long-poll"]) {
    test(`with ${what} twice under a ${way} nothing is lost, twice, or out of order`, async (t) => {
      const url = live.bus(`restarts-${way}`);
      const proxy = await proxied(t, url, (pass, request) => {
        if (way === "long-poll" && isJoin(request)) return pass().then((reply) => without(reply, ',"stream":true'));
        return isStream(request) ? pass.on() : pass();
      });
      const bob = await hearing(t, way, proxy.url);
      const ann = await joined(t, url);
      const all = [];
      for (const round of [0, 1]) {
        const sent = sendSlowly(ann, numbers(round * 30, round * 30 + 30), 20);
        await sleep(200);
        await restart();
        all.push(...(await sent));
        await until("it to be as before", () => bob.connected && bob.transport === way);
      }
      await until("all", () => bob.heard().length >= 60);
      assert.deepEqual([bob.heard(), ids(bob), bob.events.missed], [numbers(0, 60), all, []]);
    });
  }
}

const without = (reply, text) => reply && { ...reply, body: reply.body.replace(text, "") };

test("with memcached away streams and sends wait, and nothing is lost", async (t) => {
  const url = live.bus("away");
  const [ann, bob] = await Promise.all([hearing(t, "stream", url), hearing(t, "stream", url)]);
  await live.stopMemcached();
  let sent;
  try {
    sent = numbers(0, 10).map((n) => ann.send(n));
    await sleep(1_000);
    assert.deepEqual([bob.connected, bob.events.error], [true, []]); // the stream stands
  } finally {
    await live.startMemcached();
  }
  await Promise.all(sent);
  await until("all", () => bob.heard().length >= 10);
  assert.deepEqual(bob.heard(), numbers(0, 10));
});

test("a proxy that holds streams back gets long polls, one that cuts these gets plain polls", async (t) => {
  const url = live.bus("down");
  let cutting = false;
  let gone = 0;
  const proxy = await proxied(t, url, (pass, request) => {
    if (isStream(request)) return pass(); // not before it ends
    return cutting && isLong(request) ? { status: 504, body: `${gone++}` } : pass();
  });
  hurry(t, 20);
  const bus = await hearing(t, "long-poll", proxy.url);
  const start = performance.now();
  await live.publish(url, 1);
  await until("the message", () => bus.heard().length);
  assert(performance.now() - start < 200);
  cutting = true;
  await live.publish(url, 2);
  await until("plain polls", () => bus.transport === "poll");
  await live.publish(url, 3);
  await until("the rest", () => bus.heard().length === 3);
  assert.deepEqual([bus.heard(), bus.events.error, gone], [[1, 2, 3], [], 3]);
  assert.equal(proxy.requests.filter(isStream).length, 1);
  // After some minutes it tries again.
  cutting = false;
  proxy.treat = (pass, request) => (isStream(request) ? pass.on() : pass());
  setClock(t, 6 * 60_000);
  await until("a stream", () => bus.transport === "stream");
  await live.publish(url, 4);
  await until("the last", () => bus.heard().length === 4);
});

test("where streams are cut soon, again and again, it polls and loses nothing", async (t) => {
  const url = live.bus("cut");
  let bytes = 0;
  const proxy = await proxied(t, url, (pass, request) => {
    if (!isStream(request)) return pass();
    bytes += 37;
    let left = bytes;
    return pass.on((piece, response) => {
      response.write(piece.subarray(0, left));
      left -= piece.length;
      if (left < 0) response.destroy();
    });
  });
  const bus = await joined(t, proxy.url);
  let n = 0;
  while (bus.transport !== "long-poll") {
    await live.publish(url, n++);
    await sleep(20);
    assert(n < 500);
  }
  await live.publish(url, n++);
  await until("all", () => bus.heard().length >= n);
  assert.deepEqual([bus.heard(), bus.events.error, bus.events.missed], [numbers(0, n), [], []]);
  assert.equal(proxy.requests.filter(isStream).length, 3);
});

test("a stream that is cut after a while is one that works", async (t) => {
  const url = live.bus("while");
  const streams = [];
  const proxy = await proxied(t, url, (pass, request) => {
    if (!isStream(request)) return pass();
    let pieces = 0;
    return pass.on((piece, response) => {
      if (!pieces++) streams.push(response);
      return piece;
    });
  });
  const bus = await hearing(t, "stream", proxy.url);
  for (const n of numbers(1, 6)) {
    setClock(t, 20_000);
    await live.publish(url, n);
    await until("the message", () => bus.heard().length === n);
    streams.at(-1).destroy();
    await live.publish(url, -n);
    await until("another stream", () => streams.length > n);
    await until("the rest", () => bus.events.message.length > n);
    assert.equal(bus.events.message.pop().data, -n);
  }
  assert.deepEqual([bus.heard(), bus.transport, bus.events.error], [numbers(1, 6), "stream", []]);
  assert.equal(proxy.requests.filter(isPoll).length, streams.length);
});

test("a stream that has fallen silent is taken up again where it was", async (t) => {
  const url = live.bus("silent");
  const proxy = await proxied(t, url, (pass, request) => {
    const first = proxy.requests.filter(isStream).length === 1;
    let pieces = 0;
    return isStream(request) ? pass.on((piece) => (first && pieces++ > 2 ? "" : piece)) : pass();
  });
  const bus = await hearing(t, "stream", proxy.url);
  hurry(t, 100);
  for (const n of numbers(0, 20)) await live.publish(url, n);
  await until("all", () => bus.heard().length >= 20);
  const streams = () => proxy.requests.filter(isStream).length;
  await until("the second stream", () => streams() > 1);
  assert.deepEqual([bus.heard(), bus.events.error, streams()], [numbers(0, 20), [], 2]);
});

test("a stream that the bus refuses is an error, what is no stream is left for polls", async (t) => {
  const url = live.bus("refused");
  let refused = 0;
  const proxy = await proxied(t, url, (pass, request) => {
    if (!isStream(request) || refused++ > 1) return isStream(request) ? pass.on() : pass();
    return refused === 1 ? refusal(503, "memcached_unreachable", { "Retry-After": 1 }) : pass.on();
  });
  const bus = await hearing(t, "stream", proxy.url);
  assert.deepEqual(bus.events.error.map(({ error }) => [error.code, error.retryAfter]), [["memcached_unreachable", 1]]);
  assert.equal(bus.events.open.length, 2);
  const html = { headers: { "Content-Type": "text/html" }, body: "data: {}\n\n" };
  const other = await proxied(t, url, (pass, request) => (isStream(request) ? html : pass()));
  const second = await hearing(t, "long-poll", other.url);
  assert.deepEqual([second.events.error, other.requests.filter(isStream).length], [[], 1]);
});

test("while a proxy holds a stream back, what is published meanwhile is heard", async (t) => {
  const url = live.bus("trial");
  const proxy = await proxied(t, url); // passes a stream on when it ends, which it does not
  const bus = await joined(t, proxy.url, NEVER);
  await until("a stream", () => proxy.requests.some(isStream));
  const trial = proxy.requests.find(isStream);
  for (const n of [1, 2]) await live.publish(url, n);
  await until("both", () => bus.heard().length === 2);
  assert(!trial.isCut(), "heard after the trial");
  assert.equal(bus.transport, "poll");
  await until("long polls", () => bus.transport === "long-poll");
  await live.publish(url, 3);
  await until("the last", () => bus.heard().length === 3);
  assert.deepEqual([bus.heard(), bus.events.error, bus.events.missed], [[1, 2, 3], [], []]);
});

test("a stream that comes late repeats nothing that was polled meanwhile, also where ids begin anew", async (t) => {
  for (const [name, restart] of [["late-stream", () => {}], ["late-restart", () => live.restartMemcached()]]) {
    const url = live.bus(name);
    const late = door();
    const proxy = await proxied(t, url, (pass, request) => {
      if (!isStream(request)) return pass();
      return pass.on(async (piece) => (await late.opened, piece));
    });
    const bus = await joined(t, proxy.url);
    await until("a stream", () => proxy.requests.some(isStream));
    await restart();
    for (const n of [1, 2]) await live.publish(url, n);
    await until("both", () => bus.heard().length === 2);
    late.open();
    await until("a stream", () => bus.transport === "stream");
    await live.publish(url, 3);
    await until("the last", () => bus.heard().length >= 3);
    // A poll may have come while memcached was away.
    const errors = bus.events.error.filter(({ error }) => !error.code.startsWith("memcached_"));
    assert.deepEqual([bus.heard(), errors], [[1, 2, 3], []]);
  }
});

test("while it is not connected, it does not say how it hears", async (t) => {
  for (const [at, way] of [[site, "poll"], [live, "stream"]]) {
    const treat = (pass, request) => (isStream(request) ? pass.on() : pass());
    const proxy = await proxied(t, at.bus("lost"), treat);
    const bus = await hearing(t, way, proxy.url);
    const said = [];
    for (const type of ["error", "open"]) bus.addEventListener(type, () => said.push([bus.connected, bus.transport]));
    proxy.treat = () => undefined;
    proxy.cut();
    await until("an error", () => bus.events.error.length);
    assert.deepEqual(said[0], [false, undefined]);
    proxy.treat = treat;
    await until("it to be as before", () => bus.connected && bus.transport === way);
    bus.close();
    assert.equal(bus.transport, undefined);
  }
});

test("a fetch that never settles, whatever it is told, holds nothing up", async (t) => {
  const real = globalThis.fetch;
  t.after(() => (globalThis.fetch = real));
  const never = () => new Promise(() => {});
  const silent = async () =>
    new Response(new ReadableStream({ pull: never }), { headers: { "Content-Type": "text/event-stream" } });
  const is = (kind) => (method, query) => method === "GET" && kind.test(query);
  hurry(t, 10); // not so much that a request under load would be given up
  for (const [what, at, matches, stuck] of [
    ["a join", site, is(/^$/), never],
    ["a poll", site, is(/id=/), never],
    ["a send", site, (method) => method === "POST", never],
    ["a body", site, is(/id=/), async () => Object.assign(new Response("[]"), { text: never })],
    ["a stream", live, is(/stream=1/), never],
    ["what a stream brings", live, is(/stream=1/), silent],
    ["a long poll", live, is(/wait=/), never],
  ]) {
    const url = at.bus("stuck");
    let left = 1;
    globalThis.fetch = (target, init) => {
      const [bus, query = ""] = String(target).split("?");
      if (bus !== url) return real(target, init);
      // Else there would be no long poll.
      if (what === "a long poll" && /stream=1/.test(query)) return Promise.reject(new Error("no stream"));
      return left && matches(init.method ?? "GET", query) && left-- ? stuck() : real(target, init);
    };
    const bus = open(t, url, { interval: 20, deadline: 60_000 });
    const sent = bus.send(what);
    await until(`${what} to be stuck`, () => !left);
    await until("the join", () => bus.connected);
    await at.publish(url, what);
    await until(`a message behind ${what}`, () => bus.heard().length);
    assert(await sent);
    assert.deepEqual(bus.heard(), [what]);
    bus.close();
  }
});

test("without the browser's channels, locks and the rest, or where these throw, it hears and sends", async (t) => {
  const fail = () => {
    throw new DOMException("The operation is insecure.", "SecurityError");
  };
  const throwing = Object.defineProperties({}, { locks: { get: fail }, serviceWorker: { get: fail } });
  const locks = (request) => ({ locks: { request } });
  const never = () => new Promise(() => {});
  class Throwing {
    constructor() {
      fail();
    }
  }
  const real = Object.getOwnPropertyDescriptors(globalThis);
  const set = (name, value) => Object.defineProperty(globalThis, name, { configurable: true, ...value });
  t.after(() => {
    for (const name of ["navigator", "BroadcastChannel", "localStorage", "sessionStorage"]) {
      delete globalThis[name];
      if (real[name]) Object.defineProperty(globalThis, name, real[name]);
    }
  });
  const refuse = () => Promise.reject(new DOMException("The request was denied.", "SecurityError"));
  for (const [navigator, channel] of [
    [undefined, undefined],
    [throwing, Throwing],
    [locks(refuse), BroadcastChannel],
    [locks(fail), Throwing],
    [locks(never), BroadcastChannel],
    [locks((name, options, act) => Promise.resolve(act({ name }))), Throwing],
  ]) {
    set("navigator", { value: navigator });
    set("BroadcastChannel", { value: channel });
    for (const name of ["localStorage", "sessionStorage"]) set(name, { get: fail });
    const url = live.bus("without");
    const [ann, bob] = [await joined(t, url), await joined(t, url)];
    const id = await ann.send("all the same");
    await until("the message", () => bob.heard().length);
    assert.deepEqual([bob.heard(), ids(bob), ann.events.error, bob.events.error], [["all the same"], [id], [], []]);
    if (navigator !== undefined) await until("streams", () => [ann, bob].every((bus) => bus.transport));
    ann.close();
    bob.close();
  }
});

test("a long poll that is answered at once makes no storm", async (t) => {
  const proxy = await proxied(t, live.bus("storm"), (pass, { url }) => pass(url.replace(/&(wait|stream)=.*/, "")));
  const bus = await hearing(t, "poll", proxy.url);
  const { length } = proxy.requests;
  await sleep(500);
  assert(length < 12 && proxy.requests.length < length + 30, `${length}, ${proxy.requests.length}`);
  await live.publish(live.bus("storm"), 1);
  await until("the message", () => bus.heard().length);
});

test("a closed client's stream ends at once", async (t) => {
  const proxy = await proxied(t, live.bus("end"), (pass, request) => (isStream(request) ? pass.on() : pass()));
  const bus = await hearing(t, "stream", proxy.url);
  bus.onmessage = () => bus.close();
  await Promise.all([1, 2].map((n) => live.publish(live.bus("end"), n)));
  await until("its end", () => !proxy.polling);
  await sleep(100);
  assert.deepEqual([bus.heard().length, bus.events.error, proxy.requests.length], [1, [], 2]);
});

// Who is there.

/** Whom a client sees, and what they say of themselves. */
const seen = (bus) => Object.fromEntries(bus.others);

for (const [way, at] of [["polls", site], ["a stream", live]]) {
  test(`by ${way} those who are there see each other, latecomers too, and see who leaves`, async (t) => {
    const url = at.bus("presence");
    const [ann, bob] = [open(t, url), open(t, url)];
    assert.equal(ann.others.size, 0);
    ann.present({ name: "Ann" });
    bob.present({ name: "Bob" });
    await until("both", () => ann.others.size && bob.others.size);
    assert.deepEqual(seen(ann), { [bob.user]: { name: "Bob" } });
    for (const n of numbers(0, 150)) await at.publish(url, n);
    const zoe = await joined(t, url);
    zoe.present(null);
    await until("the latecomer", () => zoe.others.size === 2 && ann.others.has(zoe.user) && bob.others.has(zoe.user));
    assert.deepEqual(seen(zoe), { [ann.user]: { name: "Ann" }, [bob.user]: { name: "Bob" } });
    assert.equal(ann.others.get(zoe.user), null);
    bob.present({ name: "Bob", hand: "up" });
    await until("the change", () => ann.others.get(bob.user).hand && zoe.others.get(bob.user).hand);
    bob.close();
    await until("the end", () => ann.others.size === 1 && zoe.others.size === 1);
    zoe.present();
    await until("the end", () => !ann.others.size);
    const told = ann.events.presence.map(({ user, data }) => [user, data]);
    assert.deepEqual(told, [
      [bob.user, { name: "Bob" }], [zoe.user, null], [bob.user, { name: "Bob", hand: "up" }],
      [bob.user, undefined], [zoe.user, undefined],
    ]);
    assert.deepEqual(seen(zoe), { [ann.user]: { name: "Ann" } }); // it only watches
    await until("all", () => ann.heard().length === 150);
    assert.deepEqual([ann.heard(), ann.events.error, zoe.heard()], [numbers(0, 150), [], []]);
    assert.throws(() => ann.present(new Map()), { name: "DataCloneError" });
    assert.throws(() => bob.present(1), { name: "InvalidStateError" });
  });
}

test("who is there says so every twenty seconds, and nothing where the page does not ask for it", async (t) => {
  const proxy = await proxied(t, site.bus("again-and-again"));
  const quiet = await proxied(t, site.bus("again-and-again"));
  const [ann, bob] = [await joined(t, proxy.url), await joined(t, quiet.url)];
  ann.present(1);
  await until("the first", () => posts(proxy).length === 1);
  const polls = proxy.requests.length + 5;
  await until("more polls", () => proxy.requests.length > polls);
  assert.equal(posts(proxy).length, 1);
  setClock(t, 20_000);
  await until("the second", () => posts(proxy).length === 2);
  await until("both", () => bob.heard().length === 2);
  assert.deepEqual(bob.heard(), Array(2).fill({ shortbus: "here", data: 1 }));
  assert.deepEqual([posts(quiet), bob.others.size, bob.events.presence], [[], 0, []]);
});

test("who falls silent is gone after a while; not while the bus itself does not answer", async (t) => {
  const url = site.bus("silence");
  const [far, near] = [await proxied(t, url), await proxied(t, url)];
  const ann = open(t, far.url);
  ann.present("Ann");
  await until("its word", () => posts(far).length);
  const asked = hurry(t, 50);
  const bob = open(t, near.url);
  bob.present();
  await until("Ann", () => bob.others.size);
  const ages = () => asked.filter((ms) => ms === 5_000).length;
  near.treat = far.treat = () => undefined;
  await until("an error", () => !bob.connected);
  const before = ages();
  await until("a minute", () => ages() > before + 25);
  assert.equal(bob.others.size, 1);
  near.treat = (pass) => pass();
  await until("Ann's end", () => !bob.others.size);
  assert.deepEqual(bob.events.presence.map(({ data }) => data), ["Ann", undefined]);
  // Back again, both are there.
  far.treat = (pass) => pass();
  setClock(t, 20_000);
  await until("Ann", () => bob.others.size);
});
