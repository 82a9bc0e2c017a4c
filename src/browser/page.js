// The page at B/: shows that the bus works, and what to write next. What a message holds may come from anyone: it
// gets into the document as text alone.

import MessageBus from "./shortbus.mjs";

const SHOWN = 500; // entries in the log, the newest
const KEPT = 2000; // entries in the log while the reader has scrolled back; what comes after that waits
const LONG = 500; // characters of a message, beyond which it is folded
const COLOURED = 20_000; // characters of JSON, beyond which it is set in one colour
const BUSY = 5; // messages in five seconds, beyond which a screen reader hears how many, not each

const RECENT = 60_000; // milliseconds for which one who has written counts as here
const CROWD = 5; // others who are named

const WAYS = { stream: "stream", "long-poll": "long polls", poll: "polls", tab: "another page's stream" };
const ANIMALS = (
  "Ant Badger Bat Bear Beaver Bee Bison Camel Cat Crab Crane Crow Deer Dingo Dove Duck Eagle Elk Falcon Finch Fish " +
  "Fox Frog Gecko Goose Hare Hawk Heron Horse Ibis Jay Kite Koala Lark Lion Llama Lynx Marten Mole Moose Moth Newt " +
  "Otter Owl Panda Parrot Pony Puma Quail Rabbit Raven Robin Seal Sheep Snail Stork Swan Tiger Toad Trout Whale Wolf " +
  "Yak Zebra"
).split(" ");

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
$("name").textContent = framed ? `A second user of ${bus.name}` : bus.name;

function fill(places, text) {
  for (const place of document.querySelectorAll(places)) place.textContent = text;
}

// In single quotes for the shell, so there must be none in it.
fill(".url", bus.url.replaceAll("'", "%27"));
fill(".path", new URL(bus.url).pathname.replaceAll("&", "&amp;"));

// What scrolls into view stays clear of the head, which stays in sight.
new ResizeObserver(([{ target }]) => {
  document.documentElement.style.setProperty("--top", `${target.offsetHeight}px`);
}).observe(document.querySelector("header"));

// Users. An id has up to 16 digits: short ones are shown as they are, others as a name that everyone derives from them.

const isShort = (user) => user < 10_000;
const mark = (user) => (isShort(user) ? `user ${user}` : `${ANIMALS[user % 64]} ${10 + (Math.floor(user / 64) % 90)}`);

/** A user's mark: a colour that tells users apart, a name, and the id, for who asks for it. */
function badge(user, name = mark(user)) {
  const badge = make("span", { className: "who", title: `user ${user}` }, name);
  if (!isShort(user) || name !== mark(user)) badge.append(make("span", { className: "id" }, ` ${user}`));
  badge.style.setProperty("--hue", ((user % 997) * 137.5) % 360);
  return badge;
}

const heard = new Map(); // when the others have written, by their user

/**
 * Those who say that they are there, the one in the frame, and those who wrote a short time ago. This page does not
 * announce itself: that would be a message to each program on the bus.
 */
function showOthers() {
  for (const [user, at] of heard) if (Date.now() - at > RECENT) heard.delete(user);
  const near = (framed ? window.parent : window.frames[0])?.document.getElementById("me")?.textContent;
  const all = new Set([...bus.others.keys(), ...(Number(near) ? [Number(near)] : []), ...heard.keys()]);
  const users = [...all].filter((user) => user !== bus.user);
  const more = users.length - CROWD;
  if (users.join() === $("others").dataset.users) return;
  $("others").dataset.users = users.join();
  $("others").replaceChildren(...users.slice(0, CROWD).map((user) => badge(user)));
  if (more > 0) $("others").append(`and ${more.toLocaleString()} more`);
  if (!users.length) $("others").append("nobody heard in the last minute");
}

bus.present();

let idsShown = false;

function showIds() {
  for (const page of [document, window.frames[0]?.document]) page?.documentElement.classList.toggle("ids", idsShown);
  $("ids").setAttribute("aria-pressed", idsShown);
}

$("ids").addEventListener("click", () => {
  idsShown = !idsShown;
  showIds();
});

// The state, in words and colour.

let connected; // undefined until the bus was joined, or could not be
let since;

function setState(now) {
  if (now !== connected) since = new Date();
  connected = now;
  showState();
}

function showState() {
  if (bus.user !== undefined && $("me").textContent !== String(bus.user)) {
    $("me").textContent = bus.user;
    $("user").replaceChildren(badge(bus.user));
  }
  $("last").textContent = bus.lastId ?? "–";
  $("way").textContent = WAYS[bus.transport] ?? "–";
  showBuffered();
  if (connected === undefined) return;
  const text = make("p", {}, connected ? "connected since " : "not connected since ", time(since));
  // What has not changed is not said again.
  if (text.textContent === $("state").textContent) return;
  $("state").className = connected ? "good" : "bad";
  $("state").replaceChildren(...text.childNodes);
}

function showBuffered() {
  $("waiting").hidden = !bus.bufferedAmount;
  $("buffered").textContent = count(bus.bufferedAmount, "byte");
}

/** Shows what is wrong, in the server's own words, and where to look on. */
function showProblem({ code, message }) {
  const check = make("code", { className: "whole" }, `./${bus.name} --check`);
  const advice =
    code === "network"
      ? ["Look whether this device is online, and the web server runs"]
      : ["On the server, the web server's error log says more, and so does the bus's file: ", check];
  if ($("sentence").textContent !== message) {
    $("code").textContent = code;
    $("sentence").textContent = message;
    $("advice").replaceChildren(...advice, ". This page tries again by itself.");
  }
  $("wrong").hidden = false;
}

bus.addEventListener("bufferedamountlow", showBuffered);
bus.addEventListener("open", () => {
  setState(true);
  $("wrong").hidden = true;
  $("sentence").textContent = "";
});
bus.addEventListener("error", ({ error }) => {
  if (bus.connected) return;
  setState(false);
  showProblem(error);
});

// Who may use the bus: whom the web server lets in, with a signature or without one.

async function askToJoin(credentials) {
  const { status, joined } = await fetch(`${bus.url}?stream=0`, { credentials, cache: "no-store" }).then(
    async (reply) => ({ status: reply.status, joined: await reply.json().catch(() => {}) }),
    () => ({}),
  );
  return { status, ...joined };
}

async function showAccess() {
  const [me, stranger] = await Promise.all(["same-origin", "omit"].map(askToJoin));
  if (me.user === undefined || !(stranger.status < 500)) return; // the bus is away
  const isOpen = stranger.user !== undefined;
  const isSigned = me.secret !== undefined;
  $("access").textContent = (isOpen ? "open to all" : "behind a login") + (isSigned ? ", signed" : "");
  const who = isOpen ? "Everyone who can reach this address" : "Who is let in by the web server";
  const whom = isSigned ? "a user of their own" : "any user";
  const others = "pages of other sites only where SHORTBUS_ALLOW_ORIGIN names them";
  $("who").textContent = `${who} can read it, and write to it as ${whom}; ${others}.`;
  $("publish").parentNode.hidden = document.querySelector("[data-copy=publish]").hidden = isSigned;
  $("signed").hidden = !isSigned;
  fill(".login", stranger.status === 401 ? "-u NAME " : "");
}

if (!framed) bus.addEventListener("open", showAccess, { once: true });
bus.addEventListener("rejoin", showAccess);

// The log.

const waiting = []; // for the next frame
let total = 0;
let newest = 0; // the highest id in the log
let following = true; // whether the reader is at the newest end
let frame = 0;
let top = 0; // where the log was scrolled to

bus.addEventListener("message", (event) => {
  heard.set(event.user, Date.now());
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
  const number = make("span", { className: "id" }, `#${id}`);
  element.append(make("p", { className: "meta" }, badge(user, own ? "you" : undefined), " ", time(at), " ", number));
  element.append(contents(data));
  return element;
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
  const scale = Math.max(most, 4);
  const bars = seconds.map((n, i) => n && `M${i} 20h.8v${(-20 * n) / scale}h-.8z`);
  $("bars").setAttribute("d", bars.filter(Boolean).join(""));
  $("most").textContent = `${scale.toLocaleString()} a second`;
  const peak = most ? `, up to ${most.toLocaleString()} a second` : "";
  $("rate").textContent = `${count(sum(0), "message")} in a minute${peak}`;
  const busy = sum(-5) > BUSY;
  $("log").setAttribute("aria-live", busy ? "off" : "polite");
  if (busy && second % 10 === 0) say($("rate").textContent);
  showState();
  showOthers();
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
    complain(`Not sent: ${error.message} (${error.code})`);
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
      // Browsers name JSON in their own words.
      complain(`Not sent: ${error.message.replace("JSON.parse: ", "")}.`, true);
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
  if (open) {
    const frame = make("iframe", { src: "./?beside", title: "A second user" });
    frame.addEventListener("load", showIds);
    $("beside").append(frame);
  }
  $("beside").hidden = !open;
  $("main").classList.toggle("two", open);
  $("second").setAttribute("aria-expanded", open);
  // Both of them fit on the screen, below the state.
  if (open) $("talk").scrollIntoView({ block: "start" });
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
  const title = `${button.dataset.copy}-title`;
  button.setAttribute("aria-describedby", title);
  $(button.dataset.copy).parentNode.setAttribute("aria-labelledby", title);
  button.addEventListener("click", async () => {
    const done = await copy($(button.dataset.copy));
    button.textContent = done ? "Copied" : "Selected";
    say(done ? "Copied" : "Selected, not copied");
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
}
