// A browser's tabs over HTTP/2: one connection to an nginx, with many streams, waits, publishes and a batch on it at the
// same time. Run by tests/servers.rs with the site's socket; ends with 0 if all is well.

import assert from "node:assert/strict";
import { connect as connectTcp } from "node:net";
import { connect, constants } from "node:http2";
import { connect as connectTls } from "node:tls";

const DEADLINE = 60_000; // milliseconds; only what fails takes so long
const STREAMS = 50;
const TLS = { servername: "localhost", ALPNProtocols: ["h2"] };
const session = connect("https://localhost", {
  createConnection: () => connectTls({ ...TLS, socket: connectTcp(process.argv[2]) }),
});
const late = setTimeout(() => assert.fail("a request has no answer"), DEADLINE);

const BUS = "/cgi-bin/chat";
const OWN = { origin: "https://localhost" };

/** Sends a request; the stream's text goes to `heard` as it comes. */
const open = (path, { body, heard = () => {}, ...headers } = {}) => {
  const request = session.request({ ":path": BUS + path, ":method": body ? "POST" : "GET", ...OWN, ...headers });
  const reply = new Promise((resolve, reject) => {
    let [status, text] = [0, ""];
    request.on("response", (head) => (status = head[":status"])).on("error", reject);
    request.setEncoding("utf8").on("data", (part) => heard((text += part)));
    request.on("close", () => resolve({ status, text }));
  });
  request.end(body);
  return { request, reply };
};
const ask = async (path, options) => {
  const { status, text } = await open(path, options).reply;
  return { status, json: JSON.parse(text) };
};

/** Opens an event stream: `until(text)` waits for what it is to tell. */
const listen = async (id) => {
  let [all, look] = ["", () => {}];
  const { request, reply } = open(`?id=${id}&stream=1`, { heard: (text) => ((all = text), look()) });
  const until = (text) =>
    new Promise((done) => {
      look = () => all.includes(text) && done();
      look();
    });
  await until("event: cursor");
  const count = (text) => all.split(text).length - 1;
  return { until, reply, count, close: () => request.close(constants.NGHTTP2_CANCEL) };
};

const { id, ...join } = (await ask("")).json;
assert.deepEqual(Object.keys(join), ["user", "batch", "wait", "stream"]);
const listeners = await Promise.all(Array.from({ length: STREAMS }, () => listen(id)));
const waits = Array.from({ length: STREAMS }, () => ask(`?id=${id}&user=1&wait=50`));

const first = await ask("?user=2", { body: '"first"' });
assert.equal(first.status, 200);
for (const { status, json } of await Promise.all(waits)) {
  assert.deepEqual([status, json.map(({ data }) => data)], [200, ["first"]]);
}
assert.deepEqual((await ask("?user=2&batch=1", { body: '["a", "b"]' })).json.ids.length, 2);
await Promise.all(listeners.map(({ until }) => until('"data":"b"}')));
for (const { count } of listeners) {
  assert.deepEqual(["first", "a", "b"].map((data) => count(`"data":"${data}"}`)), [1, 1, 1]);
}

// Half of the tabs leave; the others, and new requests, notice nothing.
const [left, stay] = [listeners.slice(0, STREAMS / 2), listeners.slice(STREAMS / 2)];
left.forEach(({ close }) => close());
assert.equal((await ask("?user=2", { body: '"last"' })).status, 200);
await Promise.all(stay.map(({ until }) => until('"data":"last"}')));
assert.equal((await ask("?id=x")).json.error, "bad_parameter");
assert.equal((await ask("?user=2", { body: "1", origin: "http://localhost" })).json.error, "foreign_origin");
stay.forEach(({ close }) => close());
await Promise.all(listeners.map(({ reply }) => reply));
session.close();
clearTimeout(late);
