// The clients of tests/month/browsers.rs, one for each bus, in one process: does what its stdin says, line by line, and
// tells what they hear. They reach their sites by proxies, so that single connections can be cut.

import { webcrypto } from "node:crypto";
import { once } from "node:events";
import { connect, createServer } from "node:net";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

globalThis.crypto ??= webcrypto; // Node 18 has it, but not there

const { fetch } = globalThis;
const { now } = Date;
const clients = []; // of the buses, by number
const connections = []; // of each, those that are open
const numbers = new Map(); // of the buses, by their proxies' hosts
const tell = (...what) => console.log(JSON.stringify(what));

// The client tells of what it gives up; this also of what it tries again.
globalThis.fetch = async (url, init) => {
  const began = performance.now();
  const reply = await fetch(url, init);
  const tellError = (text) => tell(numbers.get(new URL(url).host), "told", reply.status, text, performance.now() - began);
  if (!reply.ok) reply.clone().text().then(tellError, () => {});
  return reply;
};

/** Passes on what comes, until it is to be cut in the middle of something. */
function pass(from, to) {
  from.on("data", (piece) => {
    to.write(from.isCut ? piece.subarray(0, piece.length / 2) : piece);
    if (from.isCut) from.destroy();
  });
  from.on("error", () => {});
  from.on("close", () => to.destroySoon());
}

async function startProxy(number, address) {
  const open = (connections[number] = new Set());
  const [port, host] = address.split(":").reverse();
  const proxy = createServer((client) => {
    const site = host ? connect(port, host) : connect(address);
    pass(client, site);
    pass(site, client);
    open.add({ client, site });
    client.on("close", () => open.forEach((one) => one.client === client && open.delete(one)));
  });
  await once(proxy.listen(0, "127.0.0.1"), "listening");
  return `127.0.0.1:${proxy.address().port}`;
}

/** The client's module, as the bus itself serves it. */
async function load(url) {
  for (;;) {
    try {
      const reply = await globalThis.fetch(`${url}/shortbus.mjs`, { signal: AbortSignal.timeout(5_000) });
      if (reply.ok) return await import(`data:text/javascript;base64,${btoa(await reply.text())}`);
    } catch {} // cut, or held up
    await sleep(100);
  }
}

const acts = {
  async open(number, address, name, options) {
    const host = await startProxy(number, address);
    numbers.set(host, number);
    const url = `http://${host}/cgi-bin/${name}`;
    const { MessageBus } = await load(url);
    const bus = (clients[number] = new MessageBus(url, options));
    bus.onopen = () => tell(number, "open", bus.lastId);
    bus.onmessage = ({ lastEventId, user, data }) => tell(number, "message", { id: Number(lastEventId), user, data });
    bus.onrejoin = () => tell(number, "rejoin");
    bus.onmissed = () => {
      const before = bus.lastId;
      queueMicrotask(() => tell(number, "missed", before, bus.lastId)); // behind all of the page
    };
  },
  send(number, send, text) {
    const sent = clients[number].send(text);
    sent.then((id) => tell(number, "sent", send, id), ({ code, message }) => tell(number, "failed", send, code ?? message));
  },
  /** Cuts one of the open connections: at once, or in the middle of the next request or reply. */
  cut(number, which, how) {
    const all = [...(connections[number] ?? [])];
    const one = all[which % all.length];
    if (!one) return;
    if (how === "now") one.client.resetAndDestroy();
    else one[how].isCut = true;
    tell(number, "cut");
  },
  /** Sets the clock so many milliseconds ahead, or behind. */
  step(ahead) {
    Date.now = () => now.call(Date) + ahead;
  },
};

const input = createInterface({ input: process.stdin });
input.on("close", () => process.exit());
input.on("line", (line) => {
  const [act, ...details] = JSON.parse(line);
  acts[act](...details);
});
