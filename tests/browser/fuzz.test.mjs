// The client's reader of event streams, on text of any kind, cut anywhere. `TEST_FUZZ` says on how many.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

const SOURCE = new URL("../../src/browser/client/event_stream.js", import.meta.url);
const load = new Function("isId", `${readFileSync(SOURCE, "utf8")}; return { eventReader, pageReader };`);
const { eventReader, pageReader } = load((id) => Number.isSafeInteger(id) && id >= 0);

/** mulberry32: the same seed, the same texts. */
const random = (seed) => (bound) => {
  seed = (seed + 0x6d2b79f5) | 0;
  let t = Math.imul(seed ^ (seed >>> 15), seed | 1);
  t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
  return ((t ^ (t >>> 14)) >>> 0) % bound;
};

const PARTS = [
  "data", "event", "id", "retry", ":", " ", "\n", "\r", "\r\n", "\n\n", "\0", "missed", "cursor", "message", "7", "-1",
  '{"id":9,"user":1,"data":null}', "{", "1e999", "é\u2028", "\ufeff", "__proto__", "unavailable", ": heartbeat\n\n",
  'id: 9\ndata: {"id":9,"user":1,"data":"x"}\n\n', "event: missed\ndata:\n\n", "id: 12\nevent: cursor\ndata:\n\n",
];

/** What a text says, read at once and by the letter of the standard (WHATWG HTML, section 9.2.6). */
function specified(text) {
  const events = [];
  let [data, type, last] = ["", "", ""];
  const lines = text.split(/\r\n|\n|\r/);
  lines.pop(); // it has no end yet
  for (const line of lines) {
    if (line === "") {
      if (data !== "") events.push([type || "message", data.slice(0, -1), last]);
      [data, type] = ["", ""];
    } else if (!line.startsWith(":")) {
      const colon = line.indexOf(":");
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "event") type = value;
      if (field === "data") data += `${value}\n`;
      if (field === "id" && !value.includes("\0")) last = value;
    }
  }
  return events;
}

test("events are those of the standard, however a stream is cut", () => {
  const inputs = Number(process.env.TEST_FUZZ ?? 20_000);
  let found = 0;
  for (let seed = Number(process.env.TEST_SEED ?? 1), end = seed + inputs; seed < end; seed++) {
    const below = random(seed);
    const parts = Array.from({ length: below(30) }, () => PARTS[below(PARTS.length)]);
    const text = `${parts.join("")}\n\nid: 5\nevent: cursor\ndata: \n\n`; // with which a page is whole
    const [events, pages] = [[], []];
    const readers = [eventReader((...event) => events.push(event)), pageReader((page) => pages.push(page))];
    for (let at = 0; at < text.length; ) {
      const piece = text.slice(at, (at += 1 + below(8)));
      readers.forEach((read) => read(piece));
    }
    const expected = specified(text);
    assert.deepEqual(events, expected, `TEST_SEED=${seed}`);
    const messages = expected.filter(([type]) => type === "message").length;
    assert.equal(pages.flatMap((page) => page.messages).length, messages, `TEST_SEED=${seed}`);
    found += messages;
  }
  assert(found > inputs / 10, `${found} messages`);
});
