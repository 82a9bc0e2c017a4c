// The client's own logic: taken from a running bus as a user would, and run in Node.

import assert from "node:assert/strict";
import { after, test } from "node:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { startProxy, startSite, until } from "./servers.mjs";

const site = await startSite(() => ({ small: { SHORTBUS_MAX_BYTES: "100" }, short: { SHORTBUS_TTL: "1" } }));
after(() => site.close());

const saved = join(site.folder, "shortbus.mjs");
writeFileSync(saved, await (await fetch(`${site.bus("chat")}/shortbus.mjs`)).text());
const { MessageBus, default: standard } = await import(pathToFileURL(saved));

const numbers = (from, to) => Array.from({ length: to - from }, (_, i) => from + i);

/** A client that the test's end closes, with what it has heard. */
function open(t, url, options = { interval: 20 }) {
  const bus = new MessageBus(url, options);
  t.after(() => bus.close());
  const events = { message: [], error: [], missed: [], open: [], messageerror: [], close: [] };
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

/** Lets the client's timers run so many times faster until the test ends, and lists what they were asked for. */
function hurry(t, factor) {
  const real = globalThis.setTimeout;
  t.after(() => (globalThis.setTimeout = real));
  const asked = [];
  globalThis.setTimeout = (act, milliseconds, ...rest) => {
    // Node's own fetch has timers too.
    if (!new Error().stack.includes("/shortbus.mjs")) return real(act, milliseconds, ...rest);
    asked.push(milliseconds);
    return real(act, milliseconds / factor, ...rest);
  };
  return asked;
}

const GIVE_UP = 30_000; // milliseconds until the client gives a poll up, and the longest pause

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
  assert.throws(() => new MessageBus(url, { interval: -1 }), RangeError);
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
  const sent = [1, 2, 3].map((n) => bus.send(n));
  await until("the first to leave", () => posts(proxy).length);
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
  const bus = await joined(t, url);
  await site.stopMemcached();
  try {
    await until("an error", () => bus.events.error.length);
    const { error } = bus.events.error[0];
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
  const bus = await joined(t, url);
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
  const pauses = () => asked.filter((ms) => ms !== GIVE_UP && ms !== 500);
  proxy.treat = () => undefined; // cut
  await until("errors", () => pauses().length >= 30);
  proxy.treat = (pass) => pass();
  await until("open again", () => bus.events.open.length === 2);
  const list = pauses();
  list.forEach((pause, n) => assert(pause >= 0 && pause <= Math.min(GIVE_UP, 500 * 2 ** n), `${n}: ${pause}`));
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
  const asked = hurry(t, 100);
  const bus = await joined(t, proxy.url);
  await site.publish(url, "after all");
  await until("a message", () => bus.heard().length);
  assert.deepEqual([bus.heard(), bus.events.error.length], [["after all"], 1]);
  said("network", 0)(bus.events.error[0].error);
  assert(asked.includes(GIVE_UP) && proxy.mostPolling === 1);
  await assert.rejects(bus.send("never"), said("network", 0));
});

test("an interval beyond what timers take is no interval of zero", async (t) => {
  const asked = hurry(t, 1);
  await joined(t, site.bus("chat"), { interval: Infinity });
  await until("the pause", () => asked.some((ms) => ms !== GIVE_UP));
  assert(asked.every((ms) => ms < 2 ** 31), `${asked}`);
});
