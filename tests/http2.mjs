// A client that speaks HTTP/2 alone, on one connection to an Apache: every request is answered, whatever became of the
// streams before it. Run by tests/servers.rs; ends with 0 if all is well.

import assert from "node:assert/strict";
import { connect, constants } from "node:http2";

const DEADLINE = 60_000; // milliseconds; only what fails takes so long
const session = connect(process.argv[2]);
const late = setTimeout(() => assert.fail("a request has no answer"), DEADLINE);

/** Sends a GET, and a cancellation as soon as the reply has begun if that is wished. */
const get = (path, { cancel = false, ...headers } = {}) =>
  new Promise((resolve, reject) => {
    const request = session.request({ ":path": path, ...headers });
    const reply = { body: "" };
    request.on("response", (head) => {
      Object.assign(reply, { status: head[":status"], type: head["content-type"] });
      if (cancel) request.close(constants.NGHTTP2_CANCEL);
    });
    request.setEncoding("utf8").on("data", (text) => (reply.body += text));
    request.on("error", reject).on("close", () => resolve(reply));
  });

const BUS = "/cgi-bin/chat";
const EVENTS = { accept: "text/event-stream" };

const { id, ...join } = JSON.parse((await get(BUS)).body);
assert.deepEqual(Object.keys(join), ["user", "batch"], "neither waits nor streams are offered");

const answered = async () => {
  const replies = await Promise.all([get(BUS), get(`${BUS}?id=${id}&wait=50`), get("/static.txt")]);
  assert.deepEqual(replies.map((reply) => reply.status), [200, 200, 200]);
  assert.deepEqual(replies.slice(1).map((reply) => reply.body), ["[]", "static"]);
};

await answered();
for (let n = 0; n < 4; n++) {
  await get(`${BUS}?id=${id}`, { ...EVENTS, cancel: true });
  await answered();
}
// Streams that the client would keep open: each ends by itself, and says when to come back.
const live = Array.from({ length: 8 }, () => get(`${BUS}?id=${id}`, EVENTS));
await answered();
for (const { status, type, body } of await Promise.all(live)) {
  assert.deepEqual([status, type], [200, "text/event-stream"]);
  assert.match(body, /^retry: \d+$/m);
}
await answered();
session.close();
clearTimeout(late);
