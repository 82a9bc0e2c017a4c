// The client and the page in real browsers: Chromium by DevTools, Firefox by WebDriver BiDi.

import assert from "node:assert/strict";
import { existsSync, mkdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { after, test } from "node:test";
import puppeteer from "puppeteer-core";
import { setTimeout as sleep } from "node:timers/promises";
import { atEnd, startFastcgiSite, startProxy, startSite, unbatched, until } from "./servers.mjs";

const SIGNED = { SHORTBUS_AUTH: "signed" };
const site = await startSite((site) => {
  const allowed = { SHORTBUS_ALLOW_ORIGIN: site.otherOrigin };
  return { allowed, "signed-*": SIGNED, "signed-allowed": { ...SIGNED, ...allowed } };
});
const live = await startFastcgiSite(); // with event streams and long polls
for (const name of ["allowed", "denied"]) site.bus(name);

function find(...names) {
  const folders = process.env.PATH.split(":");
  const paths = names.flatMap((name) => folders.map((folder) => join(folder, name)));
  const path = paths.find(existsSync);
  assert(path, `no ${names[0]}: make test installs it`);
  return path;
}

const INSECURE = "insecure.test"; // a host that is neither https nor localhost
const quiet = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync"];
const resolve = `host-resolver-rules=MAP ${INSECURE} 127.0.0.1`;
const args = ["no-sandbox", "disable-component-update", resolve, ...quiet].map((name) => `--${name}`);
// By a signal: at the end of the process Puppeteer kills the first of two browsers alone.
const end = new AbortController();
atEnd(() => end.abort());

/** Starts a browser with a new profile. */
function launch(browser, executablePath, args) {
  const userDataDir = join(site.folder, browser);
  mkdirSync(userDataDir);
  const signals = { signal: end.signal, handleSIGHUP: false, handleSIGINT: false, handleSIGTERM: false };
  return puppeteer.launch({ browser, executablePath, args, userDataDir, headless: true, ...signals });
}

const [chromium, firefox] = await Promise.all([
  launch("chrome", find("chromium", "chromium-browser", "google-chrome"), args),
  launch("firefox", find("firefox-esr", "firefox"), []),
]);
const browsers = { Chromium: chromium, Firefox: firefox };
after(() => Promise.all([chromium.close(), firefox.close(), site.close(), live.close()]));

/** Opens a page in a window and a session of its own, and takes care that no policy is violated and nothing throws. */
async function visit(t, browser, url, check) {
  const [page] = await visits(t, browser, url, 1, check);
  return page;
}

/** Opens a page as often in tabs of one session. */
async function visits(t, browser, url, number, check = (problems) => assert.deepEqual(problems, [])) {
  const context = await browser.createBrowserContext();
  const problems = [];
  t.after(async () => {
    await context.close();
    check(problems);
  });
  const pages = [];
  while (pages.length < number) pages.push(await tab(context, url, problems));
  return pages;
}

async function tab(context, url, problems = []) {
  const page = await context.newPage();
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => message.text().startsWith("violation of") && problems.push(message.text()));
  await page.evaluateOnNewDocument(() => {
    window.addEventListener("securitypolicyviolation", ({ effectiveDirective, blockedURI }) => {
      console.log(`violation of ${effectiveDirective}: ${blockedURI}`);
    });
  });
  await page.goto(url);
  return page;
}

/** A page with the client of this bus, by default under a strict policy: its URL. */
function html(bus, script = "", path = "strict", at = site) {
  at.bus(bus);
  at.serve(`${path}/${bus}.js`, script);
  const tags = [`/cgi-bin/${bus}/shortbus.js`, `${bus}.js`].map((url) => `<script src="${url}"></script>`);
  return at.serve(`${path}/${bus}.html`, `<!doctype html><title>${bus}</title>${tags.join("")}<p id="shown"></p>`);
}

/** Starts the client in a page, and lists what it hears. */
async function start(page, ...args) {
  await page.evaluate((...args) => {
    window.bus = new MessageBus(...args);
    window.log = { open: [], message: [], missed: [], rejoin: [], error: [] };
    for (const [type, list] of Object.entries(log)) {
      bus.addEventListener(type, (event) => list.push(type === "error" ? event.error.code : event.data ?? null));
    }
  }, ...args);
  return page;
}

async function joined(page, ...args) {
  await start(page, ...args);
  await until("the join", () => page.evaluate(() => bus.connected));
  return page;
}

const log = (page, type = "message") => page.evaluate((type) => window.log[type], type);
const count = (page, type = "message") => page.evaluate((type) => window.log[type].length, type);
const send = (page, data) => page.evaluate((data) => bus.send(data), data);
const numbers = (from, to) => Array.from({ length: to - from }, (_, i) => from + i);
const NEVER = { interval: 600_000 }; // between polls, so that only what it is woken by makes it poll

for (const [name, browser] of Object.entries(browsers)) {
  test(`${name}: two pages talk, under a strict policy`, async (t) => {
    const url = html(`talk-${name}`);
    const [ann, bob] = await Promise.all([visit(t, browser, url), visit(t, browser, url)]);
    await Promise.all([joined(ann), joined(bob)]);
    const first = await send(ann, { hello: "world 👋", list: [1, null, true] });
    await until("the message", () => count(bob));
    await bob.evaluate(() => bus.postMessage("hello, Ann"));
    await until("the answer", () => count(ann));
    assert.deepEqual(await log(bob), [{ hello: "world 👋", list: [1, null, true] }]);
    assert.deepEqual(await log(ann), ["hello, Ann"]);
    assert(Number.isSafeInteger(first));
    assert.equal(await ann.evaluate(() => bus.url), site.bus(`talk-${name}`));
  });

  test(`${name}: a message full of markup is text`, async (t) => {
    const page = await joined(await visit(t, browser, html(`markup-${name}`)));
    const script = `</script><script>alert(1)</script><img src=x onerror="document.title='run'">`;
    const markup = `${script}&amp;<!--\u2028"'\\ \u202e`;
    await site.publish(site.bus(`markup-${name}`), markup);
    await until("the message", () => count(page));
    assert.deepEqual(await log(page), [markup]);
    const shown = await page.evaluate(() => (document.querySelector("#shown").textContent = log.message[0]));
    assert.equal(shown, markup);
    assert.equal(await page.title(), `markup-${name}`);
  });
}

for (const [name, browser] of Object.entries(browsers)) {
  test(`${name}: on a signed bus two pages talk, one is reloaded, and memcached loses the key`, async (t) => {
    const script = `
      const bus = new MessageBus();
      const log = [];
      for (const type of ["message", "rejoin", "error"]) {
        bus.addEventListener(type, ({ data, user, error }) => {
          if (error?.status !== 503) log.push([type, error?.code ?? data ?? user, user]); // memcached is away a moment
        });
      }`;
    const url = html(`signed-talk-${name}`, script);
    const [ann, bob] = await Promise.all([visit(t, browser, url), visit(t, browser, url)]);
    const user = (page) => page.evaluate(() => bus.user);
    const heard = (page) => page.evaluate(() => log);
    await until("the joins", async () => (await user(ann)) && (await user(bob)));
    await send(ann, "grüß dich 👋");
    await bob.evaluate(() => bus.postMessage("hello, Ann"));
    const before = await user(ann);
    await until("both", async () => (await heard(ann)).length && (await heard(bob)).length);
    assert.deepEqual(await heard(ann), [["message", "hello, Ann", await user(bob)]]);
    await ann.reload();
    await send(ann, "again");
    const after = await user(ann);
    await until("the second", async () => (await heard(bob)).length >= 2);
    await site.restartMemcached();
    await send(ann, "still");
    const last = await user(ann);
    await until("all", async () => (await heard(bob)).length >= 3);
    assert.deepEqual(await heard(bob), [
      ["message", "grüß dich 👋", before],
      ["message", "again", after],
      ["message", "still", last],
    ]);
    assert.deepEqual(await heard(ann), [["rejoin", last, last]]);
    assert.equal(new Set([before, after, last]).size, 3);
  });
}

test("a page that is not secure hears a signed bus, and a send says why it is refused", async (t) => {
  const url = html("signed-plain").replace("127.0.0.1", INSECURE);
  const [ann, bob] = await Promise.all([visit(t, chromium, url), visit(t, chromium, html("signed-plain"))]);
  await Promise.all([joined(ann), joined(bob)]);
  const secure = (page) => page.evaluate(() => isSecureContext);
  assert.deepEqual([await secure(ann), await secure(bob)], [false, true]);
  await send(bob, "hear");
  await until("the message", () => count(ann));
  const refused = await ann.evaluate(() => bus.send("say").catch(({ code, message }) => [code, message]));
  assert.equal(refused[0], "insecure_context");
  assert.match(refused[1], /signed.*https.*localhost/);
  assert.deepEqual([await log(ann), await log(ann, "error")], [["hear"], ["insecure_context"]]);
  // On an open bus it sends all the same.
  const open = html("plain").replace("127.0.0.1", INSECURE);
  const zoe = await joined(await visit(t, chromium, open));
  assert(await send(zoe, "unsigned"));
});

test("README's page in two tabs: the older one prints what the newer one says", async (t) => {
  const readme = readFileSync(new URL("../../README.md", import.meta.url), "utf8");
  const [, lines] = /Save this as [^]*?\n\n((?: {4}.*\n)+)/.exec(readme);
  const bus = site.bus("readme");
  const url = site.serve("readme.html", lines.replaceAll("/cgi-bin/chat/", `${new URL(bus).pathname}/`));
  const older = await visit(t, chromium, url);
  await until("the join", () => older.evaluate(() => bus.connected));
  await tab(older.browserContext(), url);
  await until("the text", async () => (await older.evaluate(() => document.body.innerText)).includes("hello"));
});

test("1,000 messages arrive in order, none missing", async (t) => {
  const url = html("thousand");
  const [ann, bob] = await Promise.all([visit(t, chromium, url), visit(t, chromium, url)]);
  await Promise.all([joined(ann), joined(bob)]);
  await ann.evaluate(() => {
    for (let n = 0; n < 1_000; n++) bus.postMessage(n);
  });
  await until("all", async () => (await count(bob)) >= 1_000);
  assert.deepEqual(await log(bob), numbers(0, 1_000));
  assert.deepEqual([await log(bob, "missed"), await log(ann, "error"), await log(ann)], [[], [], []]);
});

test("memcached is restarted in the middle", async (t) => {
  const url = html("restart");
  const [ann, bob] = await Promise.all([visit(t, chromium, url), visit(t, chromium, url)]);
  await Promise.all([joined(ann), joined(bob)]);
  await send(ann, "before");
  await until("the first", () => count(bob));
  await site.restartMemcached();
  await send(ann, "after");
  await until("the second", async () => (await count(bob)) === 2);
  assert.deepEqual(await log(bob), ["before", "after"]);
  assert.equal(await count(bob, "missed"), 1);
});

test("the web server is stopped and started", async (t) => {
  const url = html("stopped");
  const [ann, bob] = await Promise.all([visit(t, chromium, url), visit(t, chromium, url)]);
  await Promise.all([joined(ann), joined(bob)]);
  await send(ann, "before");
  await until("the first", () => count(bob));
  await site.stopApache();
  await until("errors", async () => (await count(ann, "error")) && (await count(bob, "error")));
  assert.equal((await log(bob, "error"))[0], "network");
  assert.equal(await bob.evaluate(() => bus.connected), false);
  await ann.evaluate(() => ["meanwhile", "in order"].forEach((data) => bus.postMessage(data)));
  await site.startApache();
  await until("both again", async () => (await count(ann, "open")) === 2 && (await count(bob, "open")) === 2);
  await send(ann, "after");
  await until("the rest", async () => (await count(bob)) === 4);
  assert.deepEqual(await log(bob), ["before", "meanwhile", "in order", "after"]);
});

test("a page goes offline, and online again", async (t) => {
  const page = await joined(await visit(t, chromium, html("offline")), { interval: 100 });
  await page.setOfflineMode(true);
  await until("an error", () => count(page, "error"));
  assert.deepEqual([...new Set(await log(page, "error"))], ["network"]);
  await site.publish(site.bus("offline"), "meanwhile");
  await page.setOfflineMode(false);
  await until("the message", () => count(page));
  assert.deepEqual([await log(page), await count(page, "open")], [["meanwhile"], 2]);
});

test("online again, it sends at once", async (t) => {
  const [page, bob] = await Promise.all([visit(t, chromium, html("waiting")), visit(t, chromium, html("waiting"))]);
  await Promise.all([joined(page, NEVER), joined(bob)]);
  await page.setOfflineMode(true);
  await until("offline", () => page.evaluate(() => !navigator.onLine));
  const paused = await page.evaluate(async () => {
    const random = Math.random;
    Math.random = () => 0.99; // the longest pauses
    const { fetch } = window;
    let tries = 0;
    window.fetch = (...given) => fetch(...given).finally(() => tries++);
    bus.postMessage("meanwhile");
    while (tries < 4) await new Promise((resolve) => setTimeout(resolve, 10));
    Math.random = random;
    return performance.now();
  });
  await page.setOfflineMode(false);
  await until("the message", () => count(bob));
  const took = (await page.evaluate(() => performance.now())) - paused;
  assert(took < 3_000, `${took} ms`);
});

test("online again, it polls at once", async (t) => {
  const page = await joined(await visit(t, chromium, html("online")), NEVER);
  await page.setOfflineMode(true);
  await until("offline", () => page.evaluate(() => !navigator.onLine));
  await site.publish(site.bus("online"), "meanwhile");
  await page.setOfflineMode(false);
  await until("the message", () => count(page));
});

/** Visits a page of a proxy's, which starts the client at once. */
async function through(t, bus, treat, at = site, number = 1, browser = chromium) {
  const proxy = await startProxy(at.bus(bus), (pass, request) => {
    const scripts = ["/bus/shortbus.js", "/start.js"].map((url) => `<script src="${url}"></script>`);
    if (request.url === "/") return { headers: { "Content-Type": "text/html" }, body: scripts.join("") };
    const script = { headers: { "Content-Type": "text/javascript" }, body: "const bus = new MessageBus();" };
    return request.url === "/start.js" ? script : treat(pass, request);
  });
  t.after(proxy.close);
  const pages = await visits(t, browser, new URL("/", proxy.url).href, number);
  return [pages[0], proxy, pages];
}

const isJoin = ({ method, url }) => method === "GET" && url === "/bus";
const isPoll = ({ method, url }) => method === "GET" && url.includes("id=");
const isPost = ({ method }) => method === "POST";
const never = new Promise(() => {});

test("loading a page costs one join, however late that is answered", async (t) => {
  let answer;
  const loaded = new Promise((resolve) => (answer = resolve));
  const [page, proxy] = await through(t, "loading", async (pass, request) => {
    if (isJoin(request)) await loaded;
    return pass();
  });
  answer();
  await until("the join", () => page.evaluate(() => bus.connected));
  assert.equal(proxy.requests.filter(isJoin).length, 1);
});

test("online again, it waits for no poll that hangs", async (t) => {
  let polls = 0;
  const [page] = await through(t, "hung", (pass, request) => (isPoll(request) && !polls++ ? never : pass()));
  await until("the poll", () => polls);
  await page.evaluate(() => {
    window.heard = [];
    bus.addEventListener((data) => heard.push(data));
    bus.onerror = ({ error }) => heard.push(error.code);
  });
  await site.publish(site.bus("hung"), "meanwhile");
  // Not by DevTools: to go offline would itself end what hangs.
  await page.evaluate(() => window.dispatchEvent(new Event("online")));
  await until("the message", () => page.evaluate(() => heard.length));
  assert.deepEqual(await page.evaluate(() => heard), ["meanwhile"]);
});

for (const [name, age] of [
  ["outlives", "new"],
  ["signed-outlives", "new"],
  ["outlives", "old"],
  ["signed-outlives", "old"],
]) {
  test(`a message under way outlives its page, and those behind it, on the ${age} bus ${name}`, async (t) => {
    let open;
    const gone = new Promise((resolve) => (open = resolve));
    const treat = async (pass, request) => {
      if (isPoll(request)) return never;
      if (request.method === "POST") await gone;
      return request.isCut() ? undefined : pass();
    };
    const [page, proxy] = await through(t, name, age === "old" ? unbatched(treat) : treat);
    const bus = site.bus(name);
    const { id } = (await site.ask(bus)).json;
    await until("a poll", () => proxy.requests.some(isPoll));
    await page.evaluate(() => bus.postMessage(1));
    await until("the first", () => proxy.requests.some(isPost));
    await page.evaluate(async () => {
      [2, 3, 4].forEach((n) => bus.postMessage(n));
      await new Promise((resolve) => setTimeout(resolve, 100)); // to be signed
    });
    await page.close();
    await until("its poll to be cut", () => !proxy.polling);
    open();
    const messages = async () => (await site.ask(`${bus}?id=${id}`)).json.map(({ data }) => data);
    await until("all", async () => (await messages()).length === 4);
    assert.deepEqual((await messages()).sort(), [1, 2, 3, 4]);
    const bodies = proxy.requests.filter(isPost).map(({ body }) => body);
    const expected = age === "new" ? ["1", "[2,3,4]"] : ["1", "2", "3", "4"];
    assert.deepEqual(bodies.sort(), expected);
  });
}

test("a message in the pause between two tries leaves with its page, once", async (t) => {
  let down = true;
  const refusal = { status: 503, headers: { "Retry-After": "20" }, body: "" };
  const [page, proxy] = await through(t, "signed-pause", (pass, request) =>
    down && isPost(request) ? refusal : pass(),
  );
  const bus = site.bus("signed-pause");
  const { id } = (await site.ask(bus)).json;
  await until("the join", () => page.evaluate(() => bus.connected));
  await page.evaluate(() => {
    const { setTimeout } = window;
    window.asked = [];
    window.setTimeout = (act, milliseconds) => asked.push(milliseconds) && setTimeout(act, milliseconds);
    for (const n of [1, 2]) bus.postMessage(n);
  });
  await until("the pause", () => page.evaluate(() => asked.includes(20_000)));
  down = false;
  await page.goto(site.serve("gone.html", "<!doctype html>"));
  const messages = async () => (await site.ask(`${bus}?id=${id}`)).json;
  await until("both", async () => (await messages()).length === 2);
  // Back out of the browser's cache, or loaded anew, it sends them no second time.
  await page.goBack();
  await until("a join or a poll", () => proxy.requests.at(-1).method === "GET");
  await page.evaluate(() => bus.send(3));
  assert.deepEqual((await messages()).map(({ data }) => data).sort(), [1, 2, 3]);
});

test("for what a page leaves behind the signatures are at hand", async (t) => {
  for (const [treat, batch, requests] of [
    [(treat) => treat, "&batch=1", 2],
    [unbatched, "", 4], // an old bus
  ]) {
    const [page] = await through(t, "signed-hand", treat((pass, request) => (isPost(request) ? never : pass())));
    await until("the join", () => page.evaluate(() => bus.connected));
    const at = await page.evaluate(async () => {
      const urls = [];
      window.fetch = (url) => new Promise(() => urls.push(url));
      const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
      bus.postMessage(1);
      await wait(100);
      for (const n of [2, 3, 4]) bus.postMessage(n);
      await wait(200);
      const before = urls.length;
      window.dispatchEvent(new Event("pagehide"));
      return [before, urls.filter((url) => /&sig=[\w-]{43}$/.test(url))];
    });
    // The latter at once, before anything else could run.
    assert.deepEqual([at[0], at[1].length], [1, requests]);
    assert(at[1].slice(1).every((url) => url.includes(`${batch}&time=`)), `${at[1]}`);
  }
});

for (const [name, browser] of Object.entries(browsers)) {
  test(`${name}: what a page gives while it is left goes in one request, behind what waits`, async (t) => {
    let open;
    const gone = new Promise((resolve) => (open = resolve));
    const treat = async (pass, request) => {
      if (isPost(request)) await gone;
      return pass();
    };
    const bus = `last-${name}`;
    const { id } = (await site.ask(site.bus(bus))).json;
    const [page, proxy] = await through(t, bus, treat, site, 1, browser);
    await until("the join", () => page.evaluate(() => bus.connected));
    await page.evaluate(() => {
      for (const n of [1, 2]) addEventListener("pagehide", () => bus.postMessage(`bye ${n}`));
      bus.postMessage("under way");
    });
    const bodies = () => proxy.requests.filter(isPost).map(({ body }) => body);
    await until("the first", () => bodies()[0]);
    await page.evaluate(() => bus.postMessage("here"));
    await page.goto(new URL("/gone", proxy.url).href);
    await until("both requests", () => bodies()[1]);
    open();
    assert.deepEqual(bodies().map(JSON.parse), ["under way", ["here", "bye 1", "bye 2"]]);
    const messages = async () => (await site.ask(`${site.bus(bus)}?id=${id}`)).json.map(({ data }) => data);
    await until("all", async () => (await messages()).length === 4);
    const last = (await messages()).filter((data) => data !== "under way"); // it may be overtaken
    assert.deepEqual(last, ["here", "bye 1", "bye 2"]);
  });
}

test("what is too much to outlive a page waits, in order, and leaves if the page comes back", async (t) => {
  let open;
  const back = new Promise((resolve) => (open = resolve));
  const [page, proxy] = await through(t, "much", async (pass, request) => {
    if (isPost(request)) await back;
    return pass();
  });
  const { id } = (await site.ask(site.bus("much"))).json;
  await until("the join", () => page.evaluate(() => bus.connected));
  await page.evaluate(() => bus.postMessage(0));
  const bodies = () => proxy.requests.filter(isPost).map(({ body }) => body);
  await until("the first", () => bodies()[0]);
  await page.evaluate(() => {
    for (let n = 1; n < 100; n++) bus.postMessage(n + "x".repeat(998 - String(n).length));
    window.dispatchEvent(new Event("pagehide"));
    window.dispatchEvent(new Event("pageshow"));
  });
  await until("what outlives it", () => bodies()[1]);
  assert.deepEqual(bodies().map((body) => body.length), [1, 59 * 1_001 + 1]);
  open();
  await until("the rest", () => page.evaluate(() => !bus.bufferedAmount));
  const messages = (await site.ask(`${site.bus("much")}?id=${id}`)).json.map(({ data }) => parseInt(data));
  assert.deepEqual(messages.filter((n) => n), numbers(1, 100));
  assert.equal(messages.length, 100);
});

test("left before it is joined and come back, a page is still who it was", async (t) => {
  let answer;
  const back = new Promise((resolve) => (answer = resolve));
  const [page, proxy] = await through(t, "early", async (pass, request) => {
    if (isJoin(request)) await back;
    return pass();
  });
  const { id } = (await site.ask(site.bus("early"))).json;
  await until("the join", () => proxy.requests.some(isJoin));
  await page.evaluate(() => {
    bus.postMessage(1);
    window.dispatchEvent(new Event("pagehide"));
    window.dispatchEvent(new Event("pageshow"));
  });
  await until("the message", () => proxy.requests.some(isPost));
  answer();
  await page.evaluate(() => bus.send(2));
  const messages = (await site.ask(`${site.bus("early")}?id=${id}`)).json;
  const user = await page.evaluate(() => bus.user);
  assert.deepEqual(messages.map(({ user, data }) => [user, data]), [[user, 1], [user, 2]]);
});

test("a hidden page goes on hearing, and polls at once when it is seen again", async (t) => {
  const url = html("hidden");
  const [busy, lazy] = await Promise.all([visit(t, chromium, url), visit(t, chromium, url)]);
  await Promise.all([joined(busy), joined(lazy, NEVER)]);
  for (const page of [busy, lazy]) {
    await page.browserContext().newPage(); // in front of it
    await until("hidden", () => page.evaluate(() => document.hidden));
  }
  await site.publish(site.bus("hidden"), "psst");
  await until("the message", () => count(busy));
  assert.equal(await count(lazy), 0);
  await lazy.bringToFront();
  await until("the message", () => count(lazy));
});

test("two buses in one page, each by the script it came with", async (t) => {
  site.bus("quiz");
  const page = await visit(t, chromium, html("chat"));
  await page.evaluate(async () => {
    const { MessageBus: Module } = await import("/cgi-bin/quiz/shortbus.mjs");
    window.buses = { chat: new MessageBus(), quiz: new Module(), named: new MessageBus("/cgi-bin/quiz") };
    window.heard = { chat: [], quiz: [], named: [] };
    for (const [name, bus] of Object.entries(buses)) bus.onmessage = ({ data }) => heard[name].push(data);
  });
  await until("the joins", () => page.evaluate(() => Object.values(buses).every((bus) => bus.connected)));
  const names = await page.evaluate(() => Object.values(buses).map((bus) => bus.name));
  assert.deepEqual(names, ["chat", "quiz", "quiz"]);
  await site.publish(site.bus("chat"), "to chat");
  await site.publish(site.bus("quiz"), "to quiz");
  await page.evaluate(() => buses.quiz.send("from quiz"));
  const heard = () => page.evaluate(() => heard);
  await until("all", async () => Object.values(await heard()).flat().length >= 4);
  assert.deepEqual(await heard(), { chat: ["to chat"], quiz: ["to quiz"], named: ["to quiz", "from quiz"] });
});

test("a page of an allowed origin uses the bus, headers and all", async (t) => {
  const path = site.serve("allowed.html", `<!doctype html><script src="${site.bus("allowed")}/shortbus.js"></script>`);
  const page = await joined(await visit(t, chromium, path.replace(site.origin, site.otherOrigin)));
  assert.equal(await page.evaluate(() => bus.url), site.bus("allowed"));
  await site.publish(site.bus("allowed"), "across");
  await until("the message", () => count(page));
  // Only Shortbus-Last-Id tells it of what it sent itself.
  const id = await send(page, "back");
  await until("the cursor", () => page.evaluate((id) => bus.lastId >= id, id));
  // Signed too, by the server's clock.
  await page.evaluate((url) => {
    const now = Date.now;
    Date.now = () => now() + 7_200_000;
    window.signed = new MessageBus(url);
  }, site.bus("signed-allowed"));
  assert(await page.evaluate(() => signed.send("across")));
  const module = (url) => import(url).then(({ MessageBus }) => new MessageBus().url);
  assert.equal(await page.evaluate(module, `${site.bus("allowed")}/shortbus.mjs`), site.bus("allowed"));
});

test("a page of another origin can neither hear nor send", async (t) => {
  const bus = site.bus("denied");
  const { id } = (await site.ask(bus)).json;
  const path = site.serve("denied.html", `<!doctype html><script src="${bus}/shortbus.js"></script>`);
  const page = await start(await visit(t, chromium, path.replace(site.origin, site.otherOrigin)), { deadline: 500 });
  await until("errors", async () => (await count(page, "error")) > 1);
  assert.equal(await page.evaluate(() => bus.send("forged").catch((error) => error.code)), "network");
  // It has not even joined; so without it.
  await page.evaluate(() => fetch(`${bus.url}?user=1`, { method: "POST", body: '"forged"', mode: "no-cors" }));
  assert.deepEqual([await log(page, "open"), await log(page)], [[], []]);
  assert.deepEqual((await site.ask(`${bus}?id=${id}`)).json, []);
});

test("what was written for the first shortbus works", async (t) => {
  const script = `
    var bus = new MessageBus(function () {
      bus.addEventListener(function (data) {
        document.getElementById("shown").appendChild(document.createTextNode(data.name + ":" + data.score + " "));
      });
      bus.send({ name: document.title, score: 1 });
    });`;
  const url = html("old", script);
  const bob = await joined(await visit(t, chromium, html("young")), "/cgi-bin/old");
  const ann = await visit(t, chromium, url);
  await until("ready", () => count(bob));
  assert.deepEqual(await log(bob), [{ name: "old", score: 1 }]);
  for (const score of [2, 3]) await send(bob, { name: "bob", score });
  const shown = () => ann.evaluate(() => document.querySelector("#shown").textContent);
  await until("both", async () => (await shown()).includes("3"));
  assert.equal(await shown(), "bob:2 bob:3 ");
});

for (const name of ["left", "signed-left"]) {
  test(`what is sent while a page is being left arrives, on the bus ${name}`, async (t) => {
    const bob = await joined(await visit(t, chromium, html(name)));
    site.serve("gone.html", "<!doctype html>");
    const leave = (page) =>
      page.evaluate(() => {
        for (const n of [1, 2, 3]) bus.postMessage(`left ${n}`);
        location = "/gone.html";
      });
    const ann = await joined(await visit(t, chromium, html(name)));
    await Promise.all([ann.waitForNavigation(), leave(ann)]);
    const eve = await joined(await visit(t, chromium, html(name)));
    await eve.evaluate(() => [1, 2, 3].forEach((n) => bus.postMessage(`closed ${n}`)));
    await eve.close();
    const all = ["left", "closed"].flatMap((how) => [1, 2, 3].map((n) => `${how} ${n}`));
    if (name === "left") {
      // Before it is even joined.
      const hasty = `
        const bus = new MessageBus("/cgi-bin/left");
        for (const n of [1, 2, 3]) bus.postMessage("hasty " + n);
        location = "/gone.html";`;
      const zoe = await visit(t, chromium, html("hasty", hasty));
      await until("its end", () => zoe.url().endsWith("/gone.html"));
      all.push("hasty 1", "hasty 2", "hasty 3");
    }
    await until("all of it", async () => (await count(bob)) >= all.length);
    assert.deepEqual((await log(bob)).sort(), all.sort());
  });
}

for (const [name, browser] of Object.entries(browsers)) {
  for (const [way, at] of [["cgi", site], ["fastcgi", live]]) {
    const bus = `departures-${way}-${name}`;
    test(`${name}: what a page says last arrives last, on the bus ${bus}`, async (t) => {
      const bob = await joined(await visit(t, browser, html(bus, "", "strict", at)));
      at.serve("gone.html", "<!doctype html>");
      const all = [];
      for (const round of numbers(0, 8)) {
        const ann = await joined(await visit(t, browser, html(bus, "", "strict", at)));
        const words = ["here", "still here", "bye"].map((word) => `${word} ${round}`);
        const left = ann.waitForNavigation();
        await ann.evaluate((words) => {
          for (const word of words) addEventListener("pagehide", () => bus.postMessage(word));
          location = "/gone.html";
        }, words);
        await left;
        all.push(...words);
        await until("all of it", async () => (await count(bob)) >= all.length);
      }
      assert.deepEqual(await log(bob), all);
    });
  }
}

test("a page that comes back out of the browser's cache polls at once", async (t) => {
  const page = await joined(await visit(t, chromium, html("back")), NEVER);
  await page.goto(site.serve("gone.html", "<!doctype html>"));
  await site.publish(site.bus("back"), "meanwhile");
  await page.goBack();
  assert(await page.evaluate(() => window.bus), "it was not kept");
  await until("the message", () => count(page));
});

for (const [name, browser] of [...Object.entries(browsers), ["signed-page", chromium]]) {
  test(`${name}: on the page of the bus, two users talk`, async (t) => {
    const bus = site.bus(name);
    const [ann, bob] = await Promise.all([visit(t, browser, `${bus}/`), visit(t, browser, `${bus}/`)]);
    const shown = (page, selector) => page.$eval(selector, (element) => element.textContent);
    const shows = async (page, selector, text) => {
      await page.bringToFront(); // a hidden page shows nothing new
      await until(`${selector} with ${text}`, async () => (await shown(page, selector)).includes(text));
    };
    const write = async (page, text) => {
      const box = await page.$('aria/Message to all others[role="textbox"]');
      await box.type(text);
      return box;
    };
    const press = async (page, name) => (await page.$(`aria/${name}[role="button"]`)).click();
    for (const page of [ann, bob]) {
      assert.equal(await shown(page, "h1"), name);
      await shows(page, "[role=status]", "connected since");
    }

    await ann.bringToFront();
    await (await write(ann, '{"move": "e4"}')).press("Enter");
    await shows(ann, "[role=log]", "you");
    await shows(bob, "[role=log]", '{"move": "e4"}');
    await write(bob, "well played");
    await press(bob, "Send");
    await shows(ann, "[role=log]", "well played");

    const markup = `<img src=x onerror="document.title='run'"><script>document.title='run'</script>`;
    await (await write(ann, markup)).press("Enter");
    const publish = (url, data) => import(`${url}/shortbus.mjs`).then(({ MessageBus }) => new MessageBus().send(data));
    await ann.evaluate(publish, bus, { [markup]: markup });
    for (const page of [ann, bob]) {
      await shows(page, "[role=log]", markup);
      await shows(page, "[role=log]", JSON.stringify(markup).slice(1, -1));
      assert.equal(await page.$("[role=log] :is(img, script)"), null);
      assert.equal(await page.title(), `${name} – shortbus`);
    }

    await ann.bringToFront();
    await (await write(ann, '{"move": ')).press("Enter");
    await shows(ann, "[role=alert]", "This is not JSON");
    await press(ann, "Send as text");
    await shows(bob, "[role=log]", '{"move": ');

    await ann.bringToFront();
    await press(ann, "Open a second user");
    const second = await until("the frame", () => ann.frames().find((frame) => frame.url().endsWith("?beside")));
    await until("its join", async () => (await shown(second, "[role=status]")).includes("connected since"));
    await (await write(second, "from beside")).press("Enter");
    await shows(ann, "[role=log]", "from beside");
  });
}

// Streams, shared by the tabs of a browser.

const ways = (pages) => Promise.all(pages.map((page) => page.evaluate(() => bus.transport)));
const lead = async (pages) => pages[(await ways(pages)).indexOf("stream")];
const others = (pages, leader) => pages.filter((page) => page !== leader);

/** So many tabs with a client each, all of which hear. */
async function tabs(t, browser, bus, number, at = live) {
  const pages = await visits(t, browser, html(bus, "", "strict", at), number);
  await Promise.all(pages.map((page) => joined(page, { interval: 200 })));
  await until("one stream for all", async () => (await ways(pages)).sort().join() === shared(number));
  return pages;
}

const shared = (number) => ["stream", ...Array(number - 1).fill("tab")].join();

/** Publishes numbers, and sees that all of these pages hear all of them, once, in order. */
async function hear(pages, bus, from, to, meanwhile = () => {}, at = live) {
  const sent = (async () => {
    for (const n of numbers(from, to)) {
      const publish = () => at.publish(at.bus(bus), n, `1&once=the-number-${n}`).catch(() => {});
      await until("a publish", publish);
    }
  })();
  await meanwhile();
  await sent;
  await until("all", async () => (await Promise.all(pages.map((page) => count(page)))).every((n) => n >= to));
  for (const page of pages) assert.deepEqual(await log(page), numbers(0, to));
  for (const page of pages) assert.deepEqual(await log(page, "missed"), []);
}

test("Chromium: nine tabs share a stream, hear within a second, and each can send", async (t) => {
  const pages = await tabs(t, chromium, "nine", 9);
  const start = performance.now();
  await live.publish(live.bus("nine"), 0);
  await until("all", async () => (await Promise.all(pages.map((page) => count(page)))).every(Boolean));
  assert(performance.now() - start < 1_000);
  const sent = pages.map((page, n) => send(page, n + 1));
  const ids = await Promise.all(sent);
  const order = ids.map((id, n) => [id, n + 1]).sort(([a], [b]) => a - b).map(([, n]) => n);
  await until("the rest", async () => (await Promise.all(pages.map((page) => count(page)))).every((n) => n >= 9));
  for (const [n, page] of pages.entries()) {
    assert.deepEqual(await log(page), [0, ...order.filter((m) => m !== n + 1)]); // but its own
    assert.deepEqual(await log(page, "error"), []);
  }
});

test("Firefox: two tabs share a stream", async (t) => {
  const pages = await tabs(t, firefox, "two", 2);
  await hear(pages, "two", 0, 20);
  const leader = await lead(pages);
  const [other] = others(pages, leader);
  await leader.close();
  await hear([other], "two", 20, 40);
  await until("its own stream", async () => (await ways([other]))[0] === "stream");
});

test("when the tab with the stream is closed, crashes, freezes or goes, another takes over", async (t) => {
  let pages = await tabs(t, chromium, "lead", 6);
  let next = 0;
  const heard = (pages, meanwhile) => hear(pages, "lead", next, (next += 30), meanwhile);
  const takeOver = async (leader, leave) => {
    const rest = others(pages, leader);
    await heard(rest, () => leave(leader));
    await until("one stream", async () => (await ways(rest)).sort().join() === shared(rest.length));
    return rest;
  };
  pages = await takeOver(await lead(pages), (page) => page.close());
  pages = await takeOver(await lead(pages), async (page) => {
    const devtools = await page.createCDPSession();
    devtools.send("Page.crash").catch(() => {});
    await sleep(100);
  });
  const frozen = await lead(pages);
  const devtools = await frozen.createCDPSession();
  await takeOver(frozen, () => devtools.send("Page.setWebLifecycleState", { state: "frozen" }));
  await devtools.send("Page.setWebLifecycleState", { state: "active" });
  await heard(pages); // with what it slept through
  const gone = await lead(pages);
  await takeOver(gone, () => gone.goto(live.serve("gone.html", "<!doctype html>")));
  await gone.goBack();
  assert(await gone.evaluate(() => window.bus), "it was not kept");
  await heard(pages);
});

test("tabs that share a stream lose nothing while servers are killed and restarted", async (t) => {
  const pages = await tabs(t, chromium, "kills", 4);
  await hear(pages, "kills", 0, 60, async () => {
    await live.stopFastcgi("SIGKILL");
    await sleep(300);
    await live.startFastcgi();
  });
  await hear(pages, "kills", 60, 120, () => live.restartApache());
  await live.restartMemcached();
  await live.publish(live.bus("kills"), "new");
  await until("all", async () => (await Promise.all(pages.map((page) => count(page)))).every((n) => n > 120));
  for (const page of pages) {
    assert.deepEqual([await log(page), await count(page, "missed")], [[...numbers(0, 120), "new"], 1]);
  }
  await until("one stream for all", async () => (await ways(pages)).sort().join() === shared(4));
});

test("by Apache's mod_proxy_fcgi tabs share a stream, and lose nothing while servers are killed", async (t) => {
  const apache = await startFastcgiSite("Apache");
  t.after(() => apache.close());
  const bus = "proxy-fcgi";
  const pages = await tabs(t, chromium, bus, 3, apache);
  const ended = async () => {
    const requests = () => performance.getEntriesByType("resource").length; // but those under way
    return (await Promise.all(pages.map((page) => page.evaluate(requests)))).join();
  };
  let next = 0;
  const heard = (number, meanwhile) => hear(pages, bus, next, (next += number), meanwhile, apache);
  const streams = () =>
    until("a stream by which all hear, and no other way", async () => {
      const before = await ended();
      await heard(10);
      return (await ended()) === before && (await ways(pages)).sort().join() === shared(3);
    });
  await streams();
  await heard(60, async () => {
    await apache.stopFastcgi("SIGKILL");
    await sleep(300);
    await apache.startFastcgi();
  });
  await streams();
  await heard(60, () => apache.restartApache());
  await streams();
  const errors = await Promise.all(pages.map((page) => log(page, "error")));
  assert.deepEqual(errors.flat().filter((code) => !["network", "http"].includes(code)), []);
});

test("a tab to which not everything was relayed finds the rest", async (t) => {
  const pages = await tabs(t, chromium, "late", 2);
  const leader = await lead(pages);
  await hear(pages, "late", 0, 10);
  // As if the leader had relayed some of it before the other one was there.
  await leader.evaluate(() => {
    const { postMessage } = BroadcastChannel.prototype;
    BroadcastChannel.prototype.postMessage = function (news) {
      if (!window.mute && news.messages[0]?.data % 3 !== 1) postMessage.call(this, news);
    };
  });
  await hear(pages, "late", 10, 40);
  // And as if it hung: the others poll.
  const [other] = others(pages, leader);
  await leader.evaluate(() => (window.mute = true));
  await other.evaluate(() => {
    const { now } = Date;
    Date.now = () => now() + 60_000;
    window.dispatchEvent(new Event("online"));
  });
  await hear(pages, "late", 40, 50);
  assert.deepEqual(await ways([leader, other]), ["stream", "poll"]);
  await leader.evaluate(() => (window.mute = false));
  await hear(pages, "late", 50, 60);
  await until("what is relayed", async () => (await ways([other]))[0] === "tab");
});

test("hidden, a page keeps its stream; offline and online again it finds what it missed", async (t) => {
  const [page] = await tabs(t, chromium, "dark", 1);
  await page.browserContext().newPage();
  await until("hidden", () => page.evaluate(() => document.hidden));
  await hear([page], "dark", 0, 10);
  assert.deepEqual(await ways([page]), ["stream"]);
  await page.setOfflineMode(true);
  await until("offline", () => page.evaluate(() => !navigator.onLine));
  await hear([page], "dark", 10, 20, () => sleep(300).then(() => page.setOfflineMode(false)));
  await until("a stream", async () => (await page.evaluate(() => bus.connected && bus.transport)) === "stream");
});

test("where tabs cannot share, a visible page has a connection, and hidden ones poll", async (t) => {
  const url = html("unshared", "", "strict", live).replace("127.0.0.1", INSECURE);
  const pages = await visits(t, chromium, url, 8);
  await Promise.all(pages.map((page) => joined(page, { interval: 100 })));
  const one = [...Array(7).fill("poll"), "stream"].join();
  await until("one stream", async () => (await ways(pages)).sort().join() === one);
  await hear(pages, "unshared", 0, 10);
  await pages[0].bringToFront();
  await until("its stream", async () => (await ways(pages))[0] === "stream");
  await until("no other", async () => (await ways(pages)).sort().join() === one);
  await hear(pages, "unshared", 10, 20);
  for (const page of pages) assert(await send(page, "x"));
});

test("a message that is spoilt on its way is an error in each tab, and the stream goes on", async (t) => {
  const spoil = (piece) => Buffer.from(piece.toString().replace('"spoil"}', "spoil}"));
  const isStream = ({ url }) => url.includes("stream=1");
  const treat = (pass, request) => (isStream(request) ? pass.on(spoil) : pass());
  const [, proxy, pages] = await through(t, "spoilt", treat, live, 2);
  for (const page of pages) {
    await page.evaluate(() => {
      window.log = { message: [], messageerror: [] };
      for (const type of ["message", "messageerror"]) bus.addEventListener(type, ({ data }) => log[type].push(data));
    });
  }
  await until("one stream for all", async () => (await ways(pages)).sort().join() === shared(2));
  const streams = proxy.requests.filter(isStream).length;
  for (const data of [1, "spoil", 2]) await live.publish(live.bus("spoilt"), data);
  await until("all", async () => (await Promise.all(pages.map((page) => count(page)))).every((n) => n >= 2));
  for (const page of pages) {
    assert.deepEqual(await log(page), [1, 2]);
    const [text, ...rest] = await log(page, "messageerror");
    assert.deepEqual([text.replace(/\d+/g, 0), rest], ['{"id":0,"user":0,"data":spoil}', []]);
  }
  assert.equal(proxy.requests.filter(isStream).length, streams);
});

test("tabs behind a proxy without streams share a long poll; where these are cut, each polls", async (t) => {
  let cutting = false;
  const treat = (pass, request) => {
    if (cutting && request.url.includes("wait=")) return { status: 504, body: "" };
    return pass(request.url.replace("&stream=1", ""));
  };
  const [, proxy, pages] = await through(t, "proxied", treat, live, 3);
  for (const page of pages) {
    await page.evaluate(() => {
      window.log = { message: [], missed: [] };
      for (const type of ["message", "missed"]) bus.addEventListener(type, ({ data }) => log[type].push(data));
    });
  }
  const are = (...list) => until(`${list}`, async () => (await ways(pages)).sort().join() === list.join());
  await until("all", async () => (await ways(pages)).every(Boolean));
  await hear(pages, "proxied", 0, 10);
  await are("long-poll", "tab", "tab");
  assert(proxy.requests.filter(({ url }) => url.includes("stream=1")).length <= 2);
  cutting = true;
  await hear(pages, "proxied", 10, 20);
  await are("poll", "poll", "poll");
  await hear(pages, "proxied", 20, 30);
});

test("the page of a bus says how it hears", async (t) => {
  const says = (page, text) => until(text, () => page.$eval("#way", (element, text) => element.textContent === text, text));
  const [ann, bob] = await visits(t, chromium, `${live.bus("shown")}/`, 2);
  await Promise.all([says(ann, "stream"), says(bob, "another tab's stream")]);
  await says(await visit(t, chromium, `${site.bus("shown")}/`), "polls");
});

test("the page of a bus says how much waits to be sent, while something does", async (t) => {
  const page = await visit(t, chromium, `${site.bus("buffered")}/`);
  const shown = () => page.$eval("#waiting", (element) => (element.hidden ? "" : element.textContent.replace(/\s+/g, " ")));
  await until("the join", () => page.$eval("#state", (element) => element.textContent.includes("connected since")));
  assert.equal(await shown(), "");
  await page.setOfflineMode(true);
  await page.type("#draft", "grüß dich");
  await page.keyboard.press("Enter");
  await until("what waits", async () => (await shown()) === "waits to be sent 13 bytes");
  await page.setOfflineMode(false);
  await until("nothing to wait", async () => (await shown()) === "");
  assert.equal(await page.$eval("#entries", (element) => element.childElementCount), 1);
});

test("a policy that is violated would be noticed", async (t) => {
  const url = site.serve("strict/violation.html", "<!doctype html><script>alert(1)</script>");
  const check = (problems) => assert.equal(problems[0], "violation of script-src-elem: inline");
  for (const browser of Object.values(browsers)) await visit(t, browser, url, check);
});
