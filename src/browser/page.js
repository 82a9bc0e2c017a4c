// The page at B/: shows that the bus works, and what to write next. What a message holds may come from anyone: it
// gets into the document as text alone.

import MessageBus from "./shortbus.mjs";

const SHOWN = 500; // entries in the log, the newest
const KEPT = 2000; // entries in the log while the reader has scrolled back; what comes after that waits
const LONG = 500; // characters of a message, beyond which it is folded
const COLOURED = 20_000; // characters of JSON, beyond which it is set in one colour
const BUSY = 5; // messages in five seconds, beyond which a screen reader hears how many, not each

const WAYS = { stream: "stream", "long-poll": "long polls", poll: "polls", tab: "another tab's stream" };

const $ = (id) => document.getElementById(id);
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const calendar = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const count = (n, noun) => `${n.toLocaleString()} ${noun}${n === 1 ? "" : "s"}`;

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function time(date) {
  const today = date.toDateString() === new Date().toDateString();
  return make("time", { dateTime: date.toISOString() }, (today ? clock : calendar).format(date));
}

const bus = new MessageBus();
const framed = window.parent !== window; // as the second user

document.documentElement.classList.toggle("framed", framed);
document.title = `${bus.name} – shortbus`;
$("name").textContent = bus.name;
// In single quotes for the shell, so there must be none in it.
for (const place of document.querySelectorAll(".url")) place.textContent = bus.url.replaceAll("'", "%27");

// The state, in words and colour.

let connected; // undefined until the bus was joined, or could not be
let since;
let reason;

function setState(now, why = "") {
  if (now !== connected) since = new Date();
  connected = now;
  reason = why;
  showState();
}

function showState() {
  $("user").textContent = bus.user ?? "–";
  if (bus.user !== undefined) $("user").style.setProperty("--hue", hue(bus.user));
  $("last").textContent = bus.lastId ?? "–";
  $("way").textContent = WAYS[bus.transport] ?? "–";
  showBuffered();
  if (connected === undefined) return;
  const text = make("p", {}, connected ? "connected since " : "not connected since ", time(since));
  if (reason) text.append(`: ${reason}`);
  // What has not changed is not said again.
  if (text.textContent === $("state").textContent) return;
  $("state").className = connected ? "good" : "bad";
  $("state").replaceChildren(...text.childNodes);
}

function showBuffered() {
  $("waiting").hidden = !bus.bufferedAmount;
  $("buffered").textContent = count(bus.bufferedAmount, "byte");
}

bus.addEventListener("bufferedamountlow", showBuffered);
bus.addEventListener("open", () => setState(true));
bus.addEventListener("error", ({ error }) => bus.connected || setState(false, error.message));

// The log.

const waiting = []; // for the next frame
let total = 0;
let newest = 0; // the highest id in the log
let following = true; // whether the reader is at the newest end
let frame = 0;
let top = 0; // where the log was scrolled to

bus.addEventListener("message", (event) => {
  list({ id: Number(event.lastEventId), user: event.user, data: event.data });
});
bus.addEventListener("missed", () => list({ id: newest, missed: true }));

function list(item) {
  item.at = new Date();
  newest = Math.max(newest, item.id);
  if (!item.missed) {
    total++;
    tally();
  }
  waiting.push(item);
  // A hidden page has no frames.
  if (waiting.length > 2 * SHOWN) waiting.splice(0, SHOWN);
  frame ||= requestAnimationFrame(flush);
}

function flush() {
  frame = 0;
  showState();
  const entries = $("entries");
  if (!following && entries.childElementCount >= KEPT) return showCount();
  for (const item of waiting.splice(0).slice(-SHOWN)) {
    // By id: what this user sent may be acknowledged after a later message has come.
    let before = entries.lastElementChild;
    while (before && Number(before.dataset.id) > item.id) before = before.previousElementSibling;
    if (before) before.after(entry(item));
    else entries.prepend(entry(item));
  }
  while (following && entries.childElementCount > SHOWN) entries.firstElementChild.remove();
  $("none").hidden = true;
  showCount();
  follow();
  // Entries get their true heights with the frame (content-visibility).
  requestAnimationFrame(follow);
}

function showCount() {
  const shown = $("entries").querySelectorAll("[data-message]").length;
  $("count").textContent = total.toLocaleString() + (shown < total ? `, ${shown.toLocaleString()} of them here` : "");
}

function entry({ id, user, data, at, own, missed }) {
  const element = make("li", { className: missed ? "missed" : own ? "own" : "" });
  element.dataset.id = id;
  if (missed) {
    element.append(time(at), " Some messages were missed: they had gone before this page came to fetch them.");
    return element;
  }
  element.dataset.message = "";
  const who = make("span", { className: "who" }, own ? "you" : `user ${user}`);
  who.style.setProperty("--hue", hue(user));
  element.append(make("p", { className: "meta" }, time(at), " ", who, " ", make("span", { className: "id" }, `#${id}`)));
  element.append(contents(data));
  return element;
}

/** A colour that tells users apart, beside the id that does so for certain. */
function hue(user) {
  return ((user % 997) * 137.5) % 360;
}

function contents(data) {
  const text = typeof data === "string" && data.trim() !== "";
  const whole = text ? data : JSON.stringify(data);
  const pre = make("pre", { className: text ? "text" : "json", dir: text ? "auto" : "ltr" });
  const fill = () => (text ? pre.append(data) : setJson(pretty(data), pre));
  if (whole.length <= LONG && whole.split("\n", 13).length < 13) {
    fill();
    return pre;
  }
  const [start] = whole.match(/^.{0,120}/su);
  const size = make("span", { className: "size" }, count(whole.length, "character"));
  const details = make("details", {}, make("summary", {}, size, " ", make("bdi", {}, `${start}…`)), pre);
  details.addEventListener("toggle", fill, { once: true });
  // Who opens it wants to read it from its start.
  details.firstChild.addEventListener("click", () => setFollowing(false));
  return details;
}

/** JSON on one line where it fits, else on several. */
function pretty(value, indent = "") {
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const deeper = `${indent}  `;
  const list = Array.isArray(value);
  const parts = list
    ? value.map((item) => pretty(item, deeper))
    : Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${pretty(item, deeper)}`);
  const [open, close] = list ? "[]" : "{}";
  const line = open + parts.join(", ") + close;
  if (indent.length + line.length <= 64 && !line.includes("\n")) return line;
  return `${open}\n${deeper}${parts.join(`,\n${deeper}`)}\n${indent}${close}`;
}

function setJson(json, pre) {
  if (json.length > COLOURED) return pre.append(json);
  for (const [token, string, colon] of json.matchAll(/("(?:[^"\\]|\\.)*")(:?)|[^"]+/g)) {
    if (string) pre.append(make("span", { className: colon ? "key" : "string" }, string), colon);
    else pre.append(token);
  }
}

const atEnd = () => $("log").scrollHeight - $("log").clientHeight - $("log").scrollTop < 8;

function follow() {
  if (following) {
    $("log").scrollTop = $("log").scrollHeight;
    top = $("log").scrollTop;
  } else {
    setFollowing(atEnd());
  }
}

function setFollowing(now) {
  if (now && !following) frame ||= requestAnimationFrame(flush);
  following = now;
  $("log").classList.toggle("following", now);
  $("newest").hidden = now;
}

$("log").addEventListener("scroll", () => {
  // Only the reader scrolls back; that the end has moved away is no wish to stay.
  if (atEnd()) setFollowing(true);
  else if ($("log").scrollTop < top) setFollowing(false);
  top = $("log").scrollTop;
});
const sizes = new ResizeObserver(follow);
sizes.observe($("log"));
sizes.observe($("entries"));

$("newest").addEventListener("click", () => {
  setFollowing(true);
  $("log").focus();
});

// The rate: a bar for each of the last sixty seconds.

const seconds = new Array(60).fill(0);
let second = 0;

function tally(n = 1) {
  const now = Math.floor(performance.now() / 1000);
  for (let gone = Math.min(60, now - second); gone > 0; gone--) {
    seconds.shift();
    seconds.push(0);
  }
  second = now;
  seconds[59] += n;
}

function tick() {
  tally(0);
  const sum = (from) => seconds.slice(from).reduce((a, b) => a + b);
  const most = Math.max(...seconds);
  const bars = seconds.map((n, i) => n && `M${i} 20h.8v${(-20 * n) / Math.max(most, 4)}h-.8z`);
  $("bars").setAttribute("d", bars.filter(Boolean).join(""));
  const peak = most ? `, up to ${most.toLocaleString()} a second` : "";
  $("rate").textContent = `${count(sum(0), "message")} in a minute${peak}`;
  const busy = sum(-5) > BUSY;
  $("log").setAttribute("aria-live", busy ? "off" : "polite");
  if (busy && second % 10 === 0) say($("rate").textContent);
  showState();
}

setInterval(tick, 1000);
tick();

// What is written.

const looksLikeJson = (text) => /^\s*([{["]|[-+.\d][-+.\deE_,]*\s*$)/.test(text);
let sending = false;

async function send(data) {
  if (sending) return;
  sending = true;
  complain("");
  $("draft").readOnly = true;
  const slow = setTimeout(() => ($("send").textContent = "Sending…"), 300);
  try {
    const id = await bus.send(data);
    list({ id: Number(id), user: bus.user, data, own: true });
    $("draft").value = "";
    setFollowing(true);
  } catch (error) {
    complain(`Not sent: ${error.message}`);
  }
  clearTimeout(slow);
  $("send").textContent = "Send";
  $("draft").readOnly = false;
  sending = false;
  $("draft").focus({ preventScroll: true });
}

function complain(text, asText = false) {
  $("problem").textContent = text;
  $("as-text").hidden = !asText;
  $("draft").setAttribute("aria-invalid", text !== "");
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("draft").value;
  if (sending) return;
  if (!text.trim()) {
    complain("There is nothing to send yet.");
    return $("draft").focus();
  }
  let data = text;
  try {
    data = JSON.parse(text);
  } catch (error) {
    if (looksLikeJson(text)) {
      complain(`This is not JSON: ${error.message}`, true);
      return $("draft").focus();
    }
  }
  send(data);
});
$("as-text").addEventListener("click", () => send($("draft").value));
$("draft").addEventListener("input", () => complain(""));
$("draft").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!event.repeat) $("form").requestSubmit();
});

// The second user: this page once more, in a frame.

function beside(open) {
  $("beside").querySelector("iframe")?.remove();
  if (open) $("beside").append(make("iframe", { src: "./?beside", title: "A second user" }));
  $("beside").hidden = !open;
  $("main").classList.toggle("two", open);
  $("second").setAttribute("aria-expanded", open);
  $("second").textContent = open ? "Close second user" : "Open a second user";
  // On a phone both of them fit on the screen.
  if (open) $("talk").scrollIntoView({ block: matchMedia("(min-width: 60rem)").matches ? "nearest" : "start" });
}
$("second").addEventListener("click", () => beside($("beside").hidden));
$("close").addEventListener("click", () => {
  beside(false);
  $("second").focus();
});

// What to copy.

let silence;

/** For a screen reader. */
function say(text) {
  $("said").textContent = text;
  clearTimeout(silence);
  silence = setTimeout(() => ($("said").textContent = ""), 5000);
}

async function copy(code) {
  try {
    // Not there on plain http, but for localhost.
    await navigator.clipboard.writeText(code.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(code);
    return document.execCommand("copy");
  }
}

for (const button of document.querySelectorAll("[data-copy]")) {
  const title = button.previousElementSibling;
  title.id = `${button.dataset.copy}-title`;
  button.setAttribute("aria-describedby", title.id);
  button.addEventListener("click", async () => {
    const done = await copy($(button.dataset.copy));
    button.textContent = done ? "Copied" : "Selected";
    say(done ? "Copied" : "Selected, not copied");
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
}
