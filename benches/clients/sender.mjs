// How fast the browser client sends, in Node: a line for each measurement, its name and its numbers.
//     node sender.mjs URL-OF-A-BUS

import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const BURST = 10_000; // messages in a loop, of 100 bytes each
const BURSTS = 5; // and one before them
const MESSAGES = 300;
const INTERVAL = 1_000 / 60; // milliseconds from one message to the next
const ROUND_TRIPS = [0, 40, 100, 200]; // milliseconds
const GREETING = "hello"; // opens the connection

const [url] = process.argv.slice(2);
const folder = mkdtempSync(join(tmpdir(), "shortbus-bench-"));
process.on("exit", () => rmSync(folder, { recursive: true }));
const script = join(folder, "shortbus.mjs");
writeFileSync(script, await (await fetch(`${url}/shortbus.mjs`)).text());
const { MessageBus } = await import(script);

async function joined(url) {
  const bus = new MessageBus(url);
  bus.onerror = ({ error }) => {
    throw error;
  };
  while (!bus.connected) await sleep(10);
  return bus;
}

/** A proxy in front of a web server that makes a round trip so many milliseconds longer: its origin. */
async function startProxy(origin, roundTrip) {
  const { hostname, port } = new URL(origin);
  const pass = (from, to) => {
    from.on("data", (bytes) => setTimeout(() => to.write(bytes), roundTrip / 2));
    from.on("close", () => setTimeout(() => to.end(), roundTrip / 2));
    from.on("error", () => {});
  };
  const server = createServer((socket) => {
    const upstream = connect(port, hostname);
    pass(socket, upstream);
    pass(upstream, socket);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  server.unref();
  return `http://127.0.0.1:${server.address().port}`;
}

const receiver = await joined(url);
while (receiver.transport !== "stream") await sleep(10);

/** Has `give` give messages to this client: a promise of the milliseconds until each was heard, in order. */
async function deliver(sender, number, give) {
  const given = [];
  const taken = [];
  const heard = new Promise((resolve) => {
    receiver.onmessage = ({ data }) => {
      if (data === GREETING) return;
      if (data.n !== taken.length) throw new Error(`message ${data.n} is out of order`);
      taken.push(performance.now() - given[data.n]);
      if (taken.length === number) resolve();
    };
  });
  const post = (n) => {
    given.push(performance.now());
    sender.postMessage({ n, text: "x".repeat(84 - String(n).length) });
  };
  await give(post);
  await heard;
  return taken;
}

const rates = [];
const sender = await joined(url);
for (let burst = 0; burst <= BURSTS; burst++) {
  const start = performance.now();
  await deliver(sender, BURST, async (post) => {
    for (let n = 0; n < BURST; n++) post(n);
    await new Promise((resolve) => (sender.onbufferedamountlow = resolve));
    if (burst) rates.push(BURST / (performance.now() - start) * 1_000);
  });
}
sender.close();
console.log("burst", ...rates);

for (const roundTrip of ROUND_TRIPS) {
  const { origin, pathname } = new URL(url);
  const sender = await joined((await startProxy(origin, roundTrip)) + pathname);
  await sender.send(GREETING);
  const times = await deliver(sender, MESSAGES, async (post) => {
    const start = performance.now();
    for (let n = 0; n < MESSAGES; n++) {
      await sleep(start + n * INTERVAL - performance.now());
      post(n);
    }
  });
  sender.close();
  console.log(roundTrip, ...times);
}
receiver.close();
process.exit();
