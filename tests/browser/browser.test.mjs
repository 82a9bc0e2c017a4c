// The client and the page in real browsers: Chromium by DevTools, Firefox by WebDriver BiDi.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { after, test } from "node:test";
import puppeteer from "puppeteer-core";
import { setTimeout as sleep } from "node:timers/promises";
import { atEnd, startFastcgiSite, startNginxProxy, startProxy, startSite, unbatched, until } from "./servers.mjs";

const SIGNED = { SHORTBUS_AUTH: "signed" };
const site = await startSite((site) => {
  const allowed = { SHORTBUS_ALLOW_ORIGIN: site.otherOrigin };
  const anyone = { SHORTBUS_ALLOW_ORIGIN: "*" };
  return { allowed, anyone, "signed-*": SIGNED, "signed-allowed": { ...SIGNED, ...allowed } };
});
const live = await startFastcgiSite(); // with event streams and long polls
for (const name of ["allowed", "anyone", "denied"]) site.bus(name);

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
function launch(browser, executablePath, args, extraPrefsFirefox = {}) {
  const userDataDir = mkdtempSync(join(site.folder, browser));
  const signals = { signal: end.signal, handleSIGHUP: false, handleSIGINT: false, handleSIGTERM: false };
  const options = { args, userDataDir, extraPrefsFirefox, headless: true, ...signals };
  return puppeteer.launch({ browser, executablePath, ...options });
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

for (const [name, browser] of Object.entries(browsers)) {
  test(`${name}: memcached is restarted in the middle`, async (t) => {
    const url = html(`restart-${name}`);
    const [ann, bob] = await Promise.all([visit(t, browser, url), visit(t, browser, url)]);
    await Promise.all([joined(ann), joined(bob)]);
    await send(ann, -1);
    await until("the first", () => count(bob));
    await site.restartMemcached();
    await send(ann, 0);
    await until("the second", async () => (await count(bob)) === 2);
    assert.deepEqual([await log(bob), await count(bob, "missed")], [[-1, 0], 1]);
    // And in the middle of batches.
    await ann.evaluate(() => {
      for (let n = 1; n < 2_000; n++) bus.postMessage(n);
    });
    await until("some", async () => (await count(bob)) > 2);
    await site.restartMemcached();
    await send(ann, 2_000);
    await until("the last", async () => (await log(bob)).at(-1) === 2_000);
    const heard = await log(bob);
    assert.ok(heard.every((n, i) => i === 0 || heard[i - 1] < n), "in order, none twice");
    if (heard.length < 2_002) assert.ok((await count(bob, "missed")) > 1, "what is lost is told");
    assert.ok((await log(ann, "error")).every((code) => code.startsWith("memcached_")), "nothing else went wrong");
  });
}

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

for (const [name, browser] of Object.entries(browsers)) {
  for (const bus of ["kept", "signed-kept"]) {
    test(`${name}: a tab, or a browser, keeps its user over reloads, on the bus ${bus}`, async (t) => {
      const url = html(`${bus}-${name}`);
      const bob = await joined(await visit(t, browser, html(`${bus}-${name}`)));
      const user = (page) => page.evaluate(() => bus.user);
      const speakers = [];
      const users = {};
      for (const identity of ["tab", "browser"]) {
        const [page, other] = await visits(t, browser, url, 2);
        await joined(page, { identity });
        users[identity] = await user(page);
        for (const round of [0, 1, 2]) {
          if (round) await page.reload();
          await start(page, { identity });
          if (round) assert.equal(await user(page), users[identity]); // before it is joined
          await send(page, `${identity} ${round}`);
          speakers.push(users[identity]);
        }
        await joined(other, { identity });
        assert.equal((await user(other)) === users[identity], identity === "browser");
      }
      await until("all", async () => (await count(bob)) >= 6);
      const all = ["tab", "browser"].flatMap((identity) => [0, 1, 2].map((n) => `${identity} ${n}`));
      assert.deepEqual(await log(bob), all);
      const messages = (await site.ask(`${site.bus(`${bus}-${name}`)}?id=0`)).json;
      assert.deepEqual(messages.map(({ user }) => user), speakers);
      assert.notEqual(users.tab, users.browser);
    });
  }

  test(`${name}: a tab that is duplicated is another user, and both keep theirs`, async (t) => {
    const url = html(`duplicate-${name}`);
    const page = await joined(await visit(t, browser, url), { identity: "tab" });
    const user = (page) => page.evaluate(() => bus.user);
    // The browser has to have noted whose tab it is.
    const isHeld = async () => (await navigator.locks.query()).held.some(({ name }) => name.endsWith(`user ${bus.user}`));
    await until("the lock", () => page.evaluate(isHeld));
    const opened = new Promise((resolve) => page.once("popup", resolve));
    await page.evaluate(() => void window.open(location.href));
    const copy = await opened;
    await until("the copy", () => copy.evaluate(() => !!window.MessageBus && !!sessionStorage.length));
    await joined(copy, { identity: "tab" });
    const [first, second] = [await user(page), await user(copy)];
    assert.notEqual(first, second);
    for (const tab of [page, copy, copy, page]) {
      await tab.reload();
      await joined(tab, { identity: "tab" });
      // Two clients of one page are one user.
      await tab.evaluate(() => (window.second = new MessageBus({ identity: "tab" })));
      await until("the second", () => tab.evaluate(() => second.connected));
      assert.equal(await tab.evaluate(() => second.user), tab === page ? first : second);
      assert.equal(await user(tab), tab === page ? first : second);
    }
  });

  test(`${name}: a tab that comes back is who it was, as is what came between`, async (t) => {
    const url = html(`between-${name}`);
    const page = await joined(await visit(t, browser, url), { identity: "tab" });
    const user = () => page.evaluate(() => bus.user);
    const before = await user();
    await page.goto(`${url}?second`);
    await joined(page, { identity: "tab" });
    assert.equal(await user(), before);
    await page.goBack();
    if (!(await page.evaluate(() => !!window.bus))) await joined(page, { identity: "tab" }); // it was not kept
    await page.reload();
    await joined(page, { identity: "tab" });
    assert.equal(await user(), before);
  });
}

test("tabs that are one user hear each other with echo, and only then", async (t) => {
  for (const at of [site, live]) {
    const pages = await visits(t, chromium, html("together", "", "strict", at), 3);
    const options = [{ echo: true }, { echo: true }, {}];
    await joined(pages[0], { identity: "browser", ...options[0] });
    await Promise.all([1, 2].map((n) => joined(pages[n], { identity: "browser", ...options[n] })));
    for (const [n, page] of pages.entries()) await send(page, n);
    await at.publish(at.bus("together"), "end");
    const heard = async (page) => (await log(page)).includes("end");
    await until("the end", async () => (await Promise.all(pages.map(heard))).every(Boolean));
    assert.deepEqual(await Promise.all(pages.map((page) => log(page))), [[0, 1, 2, "end"], [0, 1, 2, "end"], ["end"]]);
  }
});

test("tabs that share a stream see one order with echo, and begin with what lives", async (t) => {
  const url = html("echoes", "", "strict", live);
  for (const n of numbers(0, 5)) await live.publish(live.bus("echoes"), n);
  const pages = await visits(t, chromium, url, 3);
  await Promise.all(pages.map((page) => joined(page, { echo: true, after: 0 })));
  await Promise.all(pages.flatMap((page, n) => numbers(0, 5).map((m) => send(page, `${n} ${m}`))));
  await until("all", async () => (await Promise.all(pages.map((page) => count(page)))).every((n) => n >= 20));
  const [first, ...rest] = await Promise.all(pages.map((page) => log(page)));
  assert.deepEqual([first.slice(0, 5), first.length], [numbers(0, 5), 20]);
  for (const other of rest) assert.deepEqual(other, first);
  for (const page of pages) assert.deepEqual(await log(page, "missed"), []);
});

for (const [name, browser] of Object.entries(browsers)) {
  test(`${name}: in a sandbox, where a storage throws, an identity is as none`, async (t) => {
    site.serve("sandboxed.html", `<!doctype html><script src="${site.bus("anyone")}/shortbus.js"></script>`);
    const frame = '<!doctype html><iframe sandbox="allow-scripts" src="sandboxed.html"></iframe>';
    const page = await visit(t, browser, site.serve("sandbox.html", frame));
    const isSandbox = (frame) => frame.url().endsWith("sandboxed.html");
    const sandbox = await until("the frame", () => page.frames().find(isSandbox));
    await until("its script", () => sandbox.evaluate(() => !!window.MessageBus));
    await joined(sandbox, { identity: "tab" });
    const throws = await sandbox.evaluate(() => {
      try {
        return !sessionStorage;
      } catch {
        return true;
      }
    });
    assert(throws);
    assert(await send(sandbox, "from a sandbox"));
  });
}

/** Whom a page sees, by what they say of themselves. */
const seen = (page) => page.evaluate(() => [...bus.others.values()].sort());

for (const [name, browser] of Object.entries(browsers)) {
  for (const [kind, at] of [
    ["there", site], ["signed-there", site], ["there-live", live], ["signed-there-live", live],
  ]) {
    test(`${name}: who leaves is noticed at once, who reloads is none of them, on the bus ${kind}`, async (t) => {
      const url = html(`${kind}-${name}`, "", "strict", at);
      const [ann, bob, eve] = await Promise.all([1, 2, 3].map(() => visit(t, browser, url)));
      const enter = async (page, name, options) => {
        await start(page, options);
        await page.evaluate((name) => {
          window.told = [];
          bus.onpresence = ({ data = null }) => told.push(data);
          bus.present(name);
        }, name);
      };
      await enter(ann, "Ann");
      await enter(bob, "Bob", { identity: "tab" });
      await enter(eve, "Eve");
      const sees = (page, ...names) => until(`${names}`, async () => `${await seen(page)}` === `${names}`);
      await sees(ann, "Bob", "Eve");
      for (const _ of [1, 2]) {
        await bob.reload();
        await enter(bob, "Bob", { identity: "tab" });
        await sees(bob, "Ann", "Eve");
      }
      const since = performance.now();
      await eve.goto(at.serve("gone.html", "<!doctype html>"));
      await sees(ann, "Bob");
      t.diagnostic(`gone after ${Math.round(performance.now() - since)} ms`);
      // Firefox loses now and then what a page sends while its tab is closed.
      await (name === "Firefox" ? bob.goto(at.serve("gone.html", "<!doctype html>")) : bob.close());
      await sees(ann);
      const told = await ann.evaluate(() => told);
      assert.deepEqual([...told.slice(0, 2).sort(), ...told.slice(2)], ["Bob", "Eve", null, null]);
    });
  }
}

for (const [name, browser] of Object.entries(browsers)) {
  test(`${name}: another request that is kept alive takes nothing from what is sent`, async (t) => {
    const treat = (pass, { body }) => (body.startsWith('"hog') ? never : pass());
    const [page, proxy] = await through(t, `hog-${name}`, treat, site, 1, browser);
    await until("the join", () => page.evaluate(() => bus.connected));
    await page.evaluate(() => {
      const body = `"hog${"x".repeat(63_000)}"`;
      fetch("/bus?user=1", { method: "POST", body, keepalive: true }).catch(() => {});
    });
    await until("the hog", () => proxy.requests.some(({ body }) => body.startsWith('"hog')));
    for (const n of [1, 2, 3]) assert(await page.evaluate((n) => bus.send(n + "x".repeat(3_000)), n));
    const sent = proxy.requests.filter(({ method, body }) => method === "POST" && !body.startsWith('"hog'));
    assert.deepEqual(sent.map(({ body }) => body[1]), ["1", "2", "3"]);
    assert(sent.every(({ headers }) => headers["content-type"] === "application/json"));
  });
}

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

test("a login box stays until the user has answered, and once cancelled does not come back at once", async (t) => {
  const box = { status: 401, headers: { "WWW-Authenticate": 'Basic realm="here"' }, body: "" };
  let isClosed = false;
  const treat = (pass, { url }) => (isClosed && !url.includes(".js") ? box : pass());
  const [page, proxy, [, other]] = await through(t, "login", treat, site, 2);
  await until("the joins", async () => (await page.evaluate(() => bus.connected)) && other.evaluate(() => bus.connected));
  for (const tab of [page, other]) await tab.evaluate(() => bus.close());
  isClosed = true;
  proxy.requests.length = 0;
  await page.evaluate(() => {
    const { setTimeout } = window;
    window.setTimeout = (act, milliseconds) => setTimeout(act, milliseconds / 20);
    window.errors = [];
    window.second = new MessageBus();
    second.onerror = ({ error }) => errors.push(error.status);
  });
  await until("the question whether there is a box", () => proxy.requests.length > 1);
  await sleep(2_000); // forty of the page's seconds
  assert.deepEqual([proxy.requests.length, await page.evaluate(() => errors)], [2, []]);
  await other.authenticate({ username: "not", password: "known" }); // after these it cancels
  await other.evaluate(() => {
    window.errors = [];
    window.second = new MessageBus();
    second.onerror = ({ error }) => errors.push([error.status, error.retryAfter]);
  });
  await until("the error", () => other.evaluate(() => errors.length));
  const before = proxy.requests.length;
  const refused = await other.evaluate(() => second.send(1).catch(({ status, message }) => [status, message]));
  assert.equal(refused[0], 401);
  assert.match(refused[1], /log in/);
  await sleep(1_000);
  assert.equal(proxy.requests.length, before);
});

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
  const asked = [];
  page.on("request", (request) => asked.push([request.method(), request.headers()["content-type"]]));
  await site.publish(site.bus("allowed"), "across");
  await until("the message", () => count(page));
  // Only Shortbus-Last-Id tells it of what it sent itself.
  const id = await send(page, "back");
  await until("the cursor", () => page.evaluate((id) => bus.lastId >= id, id));
  // Without a preflight.
  assert.deepEqual(asked.filter(([method]) => method !== "GET"), [["POST", "text/plain;charset=UTF-8"]]);
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

for (const [name, browser] of Object.entries(browsers)) {
  test(`${name}: a page of another origin can neither hear nor send, and is told which setting lets it`, async (t) => {
    const bus = site.bus("denied");
    const { id } = (await site.ask(bus)).json;
    const path = site.serve("denied.html", `<!doctype html><script src="${bus}/shortbus.js"></script>`);
    // Firefox tells of each refusal as of an error of the page.
    const check = (problems) => assert(problems.every((problem) => problem.includes("Cross-Origin")), `${problems}`);
    const page = await visit(t, browser, path.replace(site.origin, site.otherOrigin), check);
    await start(page, { deadline: 500 });
    await until("errors", async () => (await count(page, "error")) > 1);
    const refused = await page.evaluate(() => bus.send("forged").catch(({ code, message }) => [code, message]));
    assert.equal(refused[0], "network");
    assert.match(refused[1], new RegExp(`add ${site.otherOrigin} to .*SHORTBUS_ALLOW_ORIGIN`));
    // It has not even joined; so without it.
    await page.evaluate(() => fetch(`${bus.url}?user=1`, { method: "POST", body: '"forged"', mode: "no-cors" }));
    assert.deepEqual([await log(page, "open"), await log(page)], [[], []]);
    assert.deepEqual((await site.ask(`${bus}?id=${id}`)).json, []);
  });
}

test("a page is told that its bus is on plain http, or is redirected to another origin", async (t) => {
  const script = await (await fetch(`${site.bus("chat")}/shortbus.js`)).text();
  const failure = (page, url) =>
    page.evaluate((url) => {
      const bus = new MessageBus(url);
      return new Promise((resolve) => (bus.onerror = ({ error }) => resolve(error.message)));
    }, url);
  const secure = await visit(t, chromium, "about:blank");
  await secure.setRequestInterception(true);
  secure.on("request", (request) => {
    const body = `<!doctype html><script>${script}</script>`;
    if (request.url().startsWith("https:")) return request.respond({ contentType: "text/html", body });
    return request.continue();
  });
  await secure.goto("https://secure.test/");
  assert.match(await failure(secure, `http://${INSECURE}/cgi-bin/chat`), /https.*no bus by http.*https address/);
  const elsewhere = { status: 302, headers: { Location: site.bus("denied") } };
  const [moved] = await through(t, "moved", (pass, { url }) => (url.startsWith("/bus/") ? pass() : elsewhere));
  assert.match(await failure(moved), /redirected to another origin/);
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
    await shows(ann, "#problem", "JSON");
    await press(ann, "Send as text");
    await shows(bob, "[role=log]", '{"move": ');

    await ann.bringToFront();
    await press(ann, "Second user");
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
      if (!window.mute && news.messages?.[0]?.data % 3 !== 1) postMessage.call(this, news);
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

test("tabs behind a proxy without streams share a long poll; where these are cut, they share one poll", async (t) => {
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
  await are("poll", "tab", "tab");
  await hear(pages, "proxied", 20, 30);
});

const evaluate = (pages, act, ...args) => Promise.all(pages.map((page) => page.evaluate(act, ...args)));

/** Starts a client for each of these buses in a page, and lists what they hear. */
async function startAll(page, urls) {
  await page.evaluate((urls) => {
    window.buses = urls.map((url) => new MessageBus(url, { interval: 200 }));
    window.heard = urls.map(() => []);
    buses.forEach((bus, n) => (bus.onmessage = ({ data }) => heard[n].push(data)));
  }, urls);
}

/** Sees that all hear, that sends arrive, and that the browser has connections left for another page. */
async function sixConnections(pages, names) {
  const state = async (act) => (await evaluate(pages, act)).flat();
  const transports = () => state(() => buses.map((bus) => bus.transport));
  const expected = names.map((_, n) => (n < names.length - 3 ? "poll" : "stream")).join();
  await until("three streams", async () => (await transports()).sort().join() === expected);
  for (const name of names) await live.publish(live.bus(name), "from outside");
  const heard = () => state(() => heard);
  await until("all", async () => (await heard()).every((list) => list.length));
  const sent = await state(() => Promise.all(buses.map((bus) => bus.send("from here"))));
  assert(sent.every(Number.isSafeInteger));
  assert.deepEqual(await heard(), names.map(() => ["from outside"]));
  const another = await pages[0].browserContext().newPage();
  await another.goto(live.serve("another.html", "<!doctype html><title>another</title>"));
  assert.equal(await another.title(), "another");
  await another.close();
}

for (const [name, browser] of Object.entries(browsers)) {
  test(`${name}: eight buses in one page leave connections for all else`, async (t) => {
    const names = numbers(0, 8).map((n) => `room-${n}-${name}`);
    const page = await visit(t, browser, html(names[0], "", "strict", live));
    await startAll(page, names.map((name) => live.bus(name)));
    await sixConnections([page], names);
    // The place of a bus that is closed is another's.
    await page.evaluate(() => {
      buses.filter((bus) => bus.transport === "stream").slice(1).forEach((bus) => bus.close());
    });
    const streams = () => page.evaluate(() => buses.filter((bus) => bus.transport === "stream").length);
    await until("three streams again", async () => (await streams()) === 3);
  });

  test(`${name}: eight tabs with a bus each leave connections for all else`, async (t) => {
    const names = numbers(0, 8).map((n) => `tab-${n}-${name}`);
    const pages = await visits(t, browser, html(names[0], "", "strict", live), names.length);
    for (const [n, page] of pages.entries()) await startAll(page, [live.bus(names[n])]);
    await sixConnections(pages, names);
  });

  test(`${name}: what a page says while it is left, and what it says when it is back, arrives`, async (t) => {
    const own = `bye-${name}`;
    site.serve("back.html", `<!doctype html><script>setTimeout(() => history.back(), 300);</script>`);
    // By itself: WebDriver loses sight of pages that Firefox has kept.
    const script = `
      const bus = new MessageBus();
      addEventListener("pagehide", () => bus.postMessage("bye"));
      addEventListener("pageshow", async ({ persisted }) => {
        await bus.send(persisted ? "back" : "new");
        sessionStorage.rounds = 1 + Number(sessionStorage.rounds ?? 0);
        setTimeout(() => sessionStorage.rounds < 4 && (location = "/back.html"), 300);
      });`;
    const { id } = (await site.ask(site.bus(own))).json;
    await visit(t, browser, html(own, script));
    const messages = async () => (await site.ask(`${site.bus(own)}?id=${id}`)).json.map(({ data }) => data);
    await until("all", async () => (await messages()).length >= 7);
    const said = (await messages()).join();
    assert.match(said, /^new,bye,back(,bye,(back|new)){2}$/); // Firefox does not keep it each time
  });
}

test("where pages share nothing, a page has one stream, and its other buses poll", async (t) => {
  const names = numbers(0, 3).map((n) => `plain-${n}`);
  const url = html(names[0], "", "strict", live).replace("127.0.0.1", INSECURE);
  const page = await visit(t, chromium, url);
  await startAll(page, names.map((name) => live.bus(name).replace("127.0.0.1", INSECURE)));
  const transports = () => page.evaluate(() => buses.map((bus) => bus.transport).sort().join());
  await until("one stream", async () => (await transports()) === "poll,poll,stream");
  await page.evaluate(() => buses.find((bus) => bus.transport === "stream").close());
  await until("another one", async () => (await page.evaluate(() => buses.some((bus) => bus.transport === "stream"))));
});

test("Firefox: with cookies blocked, which blocks channels, locks and storage, a page hears by a stream", async (t) => {
  const private_ = await launch("firefox", find("firefox-esr", "firefox"), [], { "network.cookie.cookieBehavior": 2 });
  t.after(() => private_.close());
  const page = await joined(await visit(t, private_, html("blocked", "", "strict", live)));
  const throws = await page.evaluate(() => {
    try {
      return !new BroadcastChannel("x");
    } catch {
      return true;
    }
  });
  assert(throws);
  await live.publish(live.bus("blocked"), "all the same");
  await until("the message", () => count(page));
  await until("a stream", async () => (await ways([page]))[0] === "stream");
  assert(await send(page, "too"));
});

test("two clients of a bus in a lone page hear by one stream, and no tab is spoken of", async (t) => {
  const page = await visit(t, chromium, html("lone", "", "strict", live));
  await page.evaluate((url) => {
    const { fetch } = window;
    window.streams = 0;
    window.fetch = (resource, options) => {
      streams += /[?&]stream=/.test(resource.url ?? resource);
      return fetch(resource, options);
    };
    window.seen = new Set();
    setInterval(() => buses.forEach((bus) => seen.add(bus.transport)), 5);
    window.buses = [new MessageBus(url)];
  }, live.bus("lone"));
  // The first one leads.
  await until("its stream", () => page.evaluate(() => buses[0].transport === "stream"));
  await page.evaluate((url) => {
    buses.push(new MessageBus(url));
    window.heard = [];
    buses[1].onmessage = ({ data }) => heard.push(data);
  }, live.bus("lone"));
  await until("both", () => page.evaluate(() => buses[1].transport === "stream"));
  assert.deepEqual(await page.evaluate(() => seen.has("tab")), false);
  assert(await page.evaluate(() => buses[0].send("x")));
  assert.equal(await page.evaluate(() => streams), 1);
  await page.evaluate(() => buses[0].close());
  await until("its own", () => page.evaluate(() => buses[1].connected && streams === 2));
  await live.publish(live.bus("lone"), "y");
  await until("both", () => page.evaluate(() => heard.length === 2));
  assert.deepEqual(await page.evaluate(() => heard), ["x", "y"]);
  assert.equal(await page.evaluate(() => streams), 2);
});

const stops = {
  dialog: () => alert("still"),
  request: () => {
    const request = new XMLHttpRequest();
    request.open("GET", "/still", false);
    request.send();
  },
  debugger: () => {
    debugger;
  },
};
for (const [name, browser] of Object.entries(browsers)) {
  for (const [kind, stop] of Object.entries(stops)) {
    if (kind === "debugger" && name === "Firefox") continue; // WebDriver BiDi has none
    test(`${name}: while a ${kind} keeps the tab that leads, the others hear`, async (t) => {
      let goOn; // what ends that, once it has begun
      const treat = (pass, { url }) => {
        const empty = { headers: { "Content-Type": "text/plain" } };
        if (url === "/still") return new Promise((resolve) => (goOn = () => resolve(empty)));
        return url.includes("stream=1") ? pass.on() : pass();
      };
      const bus = `${kind}-${name}`;
      const [, , pages] = await through(t, bus, treat, live, 2, browser);
      await evaluate(pages, () => {
        window.log = { message: [], missed: [] };
        for (const [type, list] of Object.entries(log)) bus.addEventListener(type, ({ data }) => list.push(data));
      });
      await until("one stream for all", async () => (await ways(pages)).sort().join() === shared(2));
      await hear(pages, bus, 0, 3);
      const leader = await lead(pages);
      const [other] = others(pages, leader);
      await other.bringToFront();
      leader.on("dialog", (dialog) => (goOn = () => dialog.accept()));
      if (kind === "debugger") {
        const devtools = await leader.createCDPSession();
        devtools.on("Debugger.paused", () => (goOn = () => devtools.send("Debugger.resume")));
        await devtools.send("Debugger.enable");
      }
      const stopped = leader.evaluate(stop);
      await until("it to stand still", () => goOn);
      await hear([other], bus, 3, 6);
      await goOn();
      await stopped;
      await hear(pages, bus, 6, 9);
      await until("what is relayed", async () => (await ways([other]))[0] === "tab");
    });
  }
}

for (const [name, browser] of Object.entries(browsers)) {
  test(`${name}: tabs on plain polls share one, and the others ask for nothing`, async (t) => {
    const pages = await visits(t, browser, html(`polls-${name}`), 3);
    await Promise.all(pages.map((page) => joined(page, { interval: 100 })));
    const are = (...list) => until(`${list}`, async () => (await ways(pages)).sort().join() === list.join());
    await are("poll", "tab", "tab");
    await hear(pages, `polls-${name}`, 0, 5, undefined, site);
    await pages[(await ways(pages)).indexOf("tab")].bringToFront();
    const asked = () => performance.getEntriesByType("resource").length;
    await until("one that polls for all", async () => {
      const before = await evaluate(pages, asked);
      const first = await count(pages[0]);
      await hear(pages, `polls-${name}`, first, first + 5, undefined, site);
      const after = await evaluate(pages, asked);
      return after.filter((number, n) => number !== before[n]).length === 1;
    });
    const leader = pages[(await ways(pages)).indexOf("poll")];
    await leader.close();
    const rest = others(pages, leader);
    const first = await count(rest[0]);
    await hear(rest, `polls-${name}`, first, first + 5, undefined, site);
    await until("another one polls", async () => (await ways(rest)).sort().join() === "poll,tab");
  });

  test(`${name}: where a service worker answers from its cache first, two pages hear, as two users`, async (t) => {
    const worker = `
      addEventListener("install", () => skipWaiting());
      addEventListener("activate", (event) => event.waitUntil(clients.claim()));
      addEventListener("fetch", (event) => event.respondWith(answer(event.request)));
      async function answer(request) {
        const cached = await caches.match(request);
        if (cached) return cached;
        const reply = await fetch(request);
        const copy = reply.clone();
        caches.open("v1").then((cache) => cache.put(request, copy)).catch(() => {});
        return reply;
      }`;
    site.serve("worker.js", worker);
    const bus = `worker-${name}`;
    const pages = await visits(t, browser, html(bus, "", "."), 2);
    await evaluate(pages, async () => {
      await navigator.serviceWorker.register("/worker.js");
      await navigator.serviceWorker.ready;
      while (!navigator.serviceWorker.controller) await new Promise((resolve) => setTimeout(resolve, 10));
    });
    for (const page of pages) await joined(page, site.bus(bus));
    const [ann, bob] = await evaluate(pages, () => bus.user);
    assert.notEqual(ann, bob);
    await hear(pages, bus, 0, 3, undefined, site);
    await send(pages[0], "hello");
    await until("the answer", async () => (await count(pages[1])) === 4);
    assert(await pages[0].evaluate(() => caches.match("/cgi-bin/worker.js").then(() => caches.has("v1"))));
  });
}

test("a hidden page polls less often where nothing happens", async (t) => {
  const page = await joined(await visit(t, chromium, html("lazy")));
  await page.evaluate(() => {
    const { setTimeout } = window;
    window.asked = [];
    window.setTimeout = (act, milliseconds) => asked.push(milliseconds) && setTimeout(act, milliseconds / 10);
  });
  const asks = (milliseconds) => page.evaluate((milliseconds) => asked.includes(milliseconds), milliseconds);
  await until("usual polls", () => asks(500));
  await page.browserContext().newPage(); // in front of it
  await until("hidden", () => page.evaluate(() => document.hidden));
  await until("less often", () => asks(5_000));
  await site.publish(site.bus("lazy"), "psst");
  await until("the message", () => count(page));
  await page.bringToFront();
  await page.evaluate(() => (asked.length = 0));
  await until("usual polls", () => asks(500));
});

test("a send that fails while its join is interrupted does not say that there was no reason", async (t) => {
  const [page] = await through(t, "interrupted", (pass, request) => (isJoin(request) ? never : pass()));
  const message = await page.evaluate(() => {
    const impatient = new MessageBus({ deadline: 500 });
    const interrupts = setInterval(() => window.dispatchEvent(new Event("online")), 20);
    return impatient.send(1).catch(({ message }) => clearInterval(interrupts) ?? message);
  });
  assert.equal(message, "The bus cannot be reached: The request was broken off, to be made anew.");
});

// The page of a bus.

const text = (page, selector) => page.$eval(selector, (element) => element.innerText);
const says = (page, selector, part) =>
  until(`${selector} with ${part}`, async () => (await text(page, selector)).includes(part));

/** The page of a bus, connected, in a viewport of this size. */
async function busPage(t, browser, url, width = 1280, height = 800) {
  const page = await visit(t, browser, `${url}/`);
  await page.setViewport({ width, height });
  await says(page, "#state", "connected since");
  return page;
}

/** Opens a second user beside: the frame, connected. */
async function beside(page) {
  await page.click("#second");
  const frame = await until("the frame", () => page.frames().find((frame) => frame.url().endsWith("?beside")));
  await until("its join", () => text(frame, "#state").then((text) => text.includes("connected since"), () => false));
  return frame;
}

async function write(page, text) {
  await page.focus("#draft");
  await page.type("#draft", text);
  const form = await page.$("#form");
  await form.evaluate((form) => form.requestSubmit());
  await says(page, "#entries", text);
}

/** Which of these are not wholly in the viewport. */
const outOfSight = (page, ...selectors) =>
  page.evaluate((selectors) => {
    const isIn = ({ x, y, right, bottom }) => x >= 0 && y >= 0 && right <= innerWidth && bottom <= innerHeight;
    return selectors.filter((selector) => !isIn(document.querySelector(selector).getBoundingClientRect()));
  }, selectors);

const LONG_ID = /\d{10}/;

for (const [name, browser] of Object.entries(browsers)) {
  test(`${name}: the page of a bus gives users short names, alike everywhere, and ids on demand`, async (t) => {
    const bus = site.bus(`names-${name}`);
    const [ann, bob] = [await busPage(t, browser, bus), await busPage(t, browser, bus)];
    await says(bob, "#others", "nobody");
    const mark = await text(ann, "#user");
    assert.match(mark, /^[A-Z][a-z]+ \d\d$/);
    await ann.bringToFront();
    await write(ann, "hello");
    await site.publish(bus, "from curl", 1);
    await bob.bringToFront();
    await says(bob, "#entries", "from curl");
    const names = () => bob.$$eval("#entries .who", (names) => names.map(({ innerText }) => innerText));
    assert.deepEqual(await names(), [mark, "user 1"]);
    await until("both", async () => (await text(bob, "#others")).replace(/\s+/g, " ") === `${mark} user 1`);
    const second = await beside(bob);
    const near = await text(second, "#user");
    await says(bob, "#others", near); // though it has written nothing
    await write(second, "from beside");
    await says(bob, "#entries", near);
    for (const page of [bob, second]) assert.doesNotMatch(await text(page, "body"), LONG_ID);

    await bob.click("#ids");
    const user = await ann.$eval("#me", ({ textContent }) => textContent);
    assert.deepEqual(await names(), [`${mark} ${user}`, "user 1", await text(second, "#user")]);
    for (const page of [bob, second]) assert.match(await text(page, "#entries"), /#\d{10}/);
    assert.equal(await bob.$eval("#ids", (button) => button.ariaPressed), "true");
    await bob.click("#ids");
    for (const page of [bob, second]) assert.doesNotMatch(await text(page, "body"), LONG_ID);
    // To look is to write nothing.
    assert.equal((await site.ask(`${bus}?id=0`)).json.length, 3);
  });

  test(`${name}: the page of a bus fits on small screens, with one user and two`, async (t) => {
    const bus = site.bus(`small-${name}`);
    for (const [width, height] of [[320, 640], [390, 844], [844, 390], [640, 400], [1280, 800]]) {
      const page = await busPage(t, browser, bus, width, height);
      const seen = ["#state", "#user", "#draft", "#send", "#second"];
      assert.deepEqual(await outOfSight(page, ...seen), [], `${width}x${height}`);
      const second = await beside(page);
      await write(page, "one");
      await write(second, "two");
      await until("room for both", async () => (await outOfSight(page, ...seen, "iframe", "#close")).length === 0);
      await page.click("#ids");
      await until("room for ids", async () => (await outOfSight(page, ...seen, "iframe")).length === 0);
      await until("room for both", async () => (await outOfSight(second, "#state", "#draft", "#send")).length === 0);
      assert((await page.$eval("#log", ({ clientHeight }) => clientHeight)) > 60);
      assert((await second.$eval("#log", ({ clientHeight }) => clientHeight)) > 40);
      const scrolled = await page.evaluate(() => {
        window.scrollTo(0, document.body.scrollHeight);
        const { scrollWidth, clientWidth } = document.documentElement;
        return [scrollY > 0, scrollWidth - clientWidth];
      });
      assert.deepEqual(scrolled, [true, 0]);
      assert.deepEqual(await outOfSight(page, "#state", "#user"), [], "at the end of the page");
      // No address is broken.
      const heights = (addresses) => addresses.map((address) => address.getBoundingClientRect().height);
      const lines = (await page.$$eval(".whole", heights)).map((height) => Math.round(height / 17));
      assert.deepEqual([...new Set(lines)], [1]);
      await page.close();
    }
  });

  test(`${name}: the page of a bus says once, and without a code's name, what is no JSON`, async (t) => {
    const page = await busPage(t, browser, site.bus(`json-${name}`));
    for (const draft of ['{"move": ', '{"move": e4}', "[1,]"]) {
      await page.$eval("#draft", (box, draft) => (box.value = draft), draft);
      await page.$eval("#form", (form) => form.requestSubmit());
      const problem = await text(page, "#problem");
      assert.match(problem, /^Not sent: \S.*\.$/);
      assert.equal(problem.match(/JSON/g)?.length, 1, problem);
    }
  });

  test(`${name}: behind a login the page of a bus shows no password, and has curl ask for it`, async (t) => {
    const proxy = await startProxy(site.bus(`secret-${name}`), (pass, { headers }) => {
      const box = { status: 401, headers: { "WWW-Authenticate": 'Basic realm="here"' }, body: "" };
      return headers.authorization ? pass() : box;
    });
    t.after(() => proxy.close());
    const page = await visit(t, browser, "about:blank");
    await page.goto(`${proxy.url.replace("//", "//ann:pa55word@")}/`);
    await says(page, "#state", "connected since");
    await says(page, "#access", "behind a login");
    const commands = await page.$$eval("#more pre", (all) => all.map(({ innerText }) => innerText).join("\n"));
    assert.equal(commands.split(`curl -u NAME -w '\\n' `).length, 4, commands);
    assert(commands.includes(`'${proxy.url}?user=1'`));
    assert.doesNotMatch(await page.$eval("html", ({ outerHTML }) => outerHTML), /pa55word/);
    await says(page, "#who", "let in by the web server");
  });
}

test("the lines on the page of a bus work as they stand", async (t) => {
  const page = await busPage(t, chromium, site.bus("lines"));
  const copied = (name) => page.$eval(`#${name}`, ({ textContent }) => textContent);
  const run = async (name) => JSON.parse(execFileSync("bash", ["-c", `${await copied(name)} -s`]));
  assert(Number.isSafeInteger((await run("join")).id));
  const { user, id } = await run("publish");
  assert.equal(user, 1);
  await says(page, "#entries", "hello");
  assert.deepEqual(await run("poll"), [{ id, user, data: "hello" }]);

  assert.equal((await copied("page")).split("\n").length, 5);
  const url = site.serve("lines.html", await copied("page"));
  const older = await visit(t, chromium, url);
  await until("the join", () => older.evaluate(() => bus.connected));
  await tab(older.browserContext(), url);
  await until("the text", async () => (await older.evaluate(() => document.body.innerText)).includes("hello"));

  await says(page, "#access", "open to all");
  await says(page, "#who", "Everyone who can reach this address can read it, and write to it as any user");
  const titles = await page.$$eval("h2", (titles) => titles.map((title) => title.checkVisibility() && title.innerText));
  assert.deepEqual(titles.filter(Boolean), ["Messages", "In a page", "In a terminal", "This bus", "What next"]);
  const named = [...(await text(page, "main")).matchAll(/docs\/\w+\.md/g)];
  assert(named.length > 3);
  for (const [path] of named) assert(existsSync(new URL(`../../${path}`, import.meta.url)), path);
  const [types] = await page.$$eval("#more a", (links) => links.map(({ href }) => href));
  assert.match(await (await fetch(types)).text(), /class MessageBus/);
});

test("the page of a signed bus shows no command that is refused", async (t) => {
  const page = await busPage(t, chromium, site.bus("signed-lines"));
  await says(page, "#access", "open to all, signed");
  await says(page, "#who", "as a user of their own");
  await says(page, "#signed", "docs/signed.md");
  assert.doesNotMatch(await text(page, "main"), /curl [^\n]*-d/);
  assert.equal(await page.$eval("[data-copy=publish]", (button) => button.checkVisibility()), false);
});

test("the page of a bus says what is wrong by the server's code and sentence, until it is mended", async (t) => {
  const settings = {};
  const own = await startSite(() => ({ well: settings }));
  t.after(() => own.close());
  const page = await busPage(t, chromium, own.bus("well"));
  assert.equal(await page.$eval("#wrong", ({ hidden }) => hidden), true);
  await own.stopMemcached();
  await until("the problem", () => page.$eval("#wrong", ({ hidden }) => !hidden));
  const { error, message } = (await own.ask(own.bus("well"))).json;
  assert.deepEqual([await text(page, "#code"), await text(page, "#sentence")], [error, message]);
  assert.equal(error, "memcached_unreachable");
  await says(page, "#advice", "well --check");
  await says(page, "#state", "not connected since");
  assert.equal(await text(page, "#way"), "–");
  await own.startMemcached();
  await until("its end", () => page.$eval("#wrong", ({ hidden }) => hidden));
  await own.stopApache();
  await says(page, "#code", "network");
  await says(page, "#advice", "web server runs");

  settings.SHORTBUS_TTL = "soon";
  await own.startApache();
  await says(page, "#code", "bad_setting");
  await says(page, "#sentence", "SHORTBUS_TTL cannot be used as it is; it has to be a whole number of seconds");
  // The page needs no setting.
  await page.reload();
  await says(page, "#code", "bad_setting");
});

test("behind a proxy that hands on another Host, the page of a bus says what to set", async (t) => {
  const headers = "proxy_set_header Host bus.internal; proxy_set_header Sec-Fetch-Site '';";
  const proxy = await startNginxProxy(site, `location / { proxy_pass http://127.0.0.1:8080; ${headers} }`);
  t.after(() => proxy.close());
  const page = await busPage(t, chromium, site.bus("proxied").replace(site.origin, proxy.origin));
  await page.type("#draft", "hello");
  await page.keyboard.press("Enter");
  await says(page, "#problem", "a proxy has to hand Host on as it came");
  await says(page, "#problem", "(foreign_origin)");
});

test("the picture of the rate on the page of a bus has a scale", async (t) => {
  const bus = site.bus("rate");
  const page = await busPage(t, chromium, bus);
  assert.equal(await text(page, "#most"), "4 a second");
  assert.equal((await text(page, "#axis")).replace(/\s+/g, " "), "a minute ago now");
  const all = JSON.stringify(numbers(0, 40));
  assert.equal((await site.ask(`${bus}?user=1&batch=1`, { method: "POST", body: all })).status, 200);
  await until("more", async () => (await text(page, "#most")) !== "4 a second");
  const [rate, most, bars] = await page.evaluate(() => {
    return [rate, most, bars].map((element) => element.getAttribute("d") ?? element.textContent);
  });
  assert.match(rate, new RegExp(`40 messages in a minute, up to ${most}`));
  assert.match(bars, /v-20h/); // the highest bar is as high as the picture
});

test("in forced colours the page of a bus keeps dots, own messages and what is pressed", async (t) => {
  const page = await busPage(t, chromium, site.bus("forced"));
  const session = await page.createCDPSession();
  await session.send("Emulation.setEmulatedMedia", { features: [{ name: "forced-colors", value: "active" }] });
  await write(page, "mine");
  await site.publish(site.bus("forced"), "theirs", 7);
  await says(page, "#entries", "theirs");
  await page.click("#ids");
  const look = await page.evaluate(() => {
    const style = (selector, pseudo) => getComputedStyle(document.querySelector(selector), pseudo);
    const [own, other] = ["#entries .own", "#entries li:not(.own)"].map((entry) => style(entry).borderLeftWidth);
    const back = (selector, pseudo) => style(selector, pseudo).backgroundColor;
    const hasDot = back("#entries .who", "::before") !== back("body");
    return { own, other, hasDot, isPressed: back("#ids") !== back("#second") };
  });
  assert.deepEqual(look, { own: "4px", other: "0px", hasDot: true, isPressed: true });
});

test("the page of a bus can be read in both themes, and has a heading and names for all", async (t) => {
  const page = await busPage(t, chromium, site.bus("readable"));
  await write(page, '{"key": "value", "number": 1}');
  await site.publish(site.bus("readable"), "a text");
  await says(page, "#entries", "a text");
  const second = await beside(page);
  await page.click("#ids");
  await page.evaluate(() => {
    for (const element of document.querySelectorAll("[hidden]")) element.hidden = false;
    for (const id of ["problem", "sentence", "code", "advice"]) document.getElementById(id).textContent = "something";
  });
  for (const value of ["light", "dark"]) {
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value }]);
    for (const state of ["good", "bad", ""]) {
      await page.$eval("#state", (element, state) => (element.className = state), state);
      assert.deepEqual(await page.evaluate(faint), [], value);
    }
    assert.deepEqual(await second.evaluate(faint), [], value);
  }
  const headings = ({ children = [], role, name, level }) => [
    ...(role === "heading" && level === 1 ? [name] : []),
    ...children.flatMap(headings),
  ];
  const tree = (frame) => frame.$eval("h1", (heading) => [heading.checkVisibility(), heading.innerText]);
  assert.deepEqual(await tree(page), [true, "readable"]);
  assert.deepEqual(await tree(second), [true, "A second user of readable"]);
  const snapshot = await page.accessibility.snapshot({ interestingOnly: false, includeIframes: true });
  assert.deepEqual(headings(snapshot), ["readable", "A second user of readable"]);
  const nameless = ({ children = [], role, name }) => [
    ...(NAMED.includes(role) && !name ? [role] : []),
    ...children.flatMap(nameless),
  ];
  assert.deepEqual(nameless(snapshot), []);
});

const NAMED = ["button", "link", "textbox", "image", "log", "region", "group", "Iframe"]; // roles

/** The texts of a document whose contrast is below 4.5:1 (WCAG 2.2, 1.4.3). */
function faint() {
  const luminance = (colour) => {
    const part = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const [red, green, blue] = colour.match(/[\d.]+/g).map((value) => part(value / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const isClear = (colour) => colour === "transparent" || /, 0\)$/.test(colour);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility()) continue;
    const { color } = getComputedStyle(element);
    let under = element;
    while (under && isClear(getComputedStyle(under).backgroundColor)) under = under.parentElement;
    const behind = getComputedStyle(under ?? document.documentElement).backgroundColor;
    const [dark, light] = [luminance(color), luminance(behind)].sort((a, b) => a - b);
    if ((light + 0.05) / (dark + 0.05) < 4.5) found.push([node.data.trim(), color, behind]);
  }
  return found;
}

test("the page of a bus says how it hears", async (t) => {
  const hears = (page, way) => until(way, async () => (await text(page, "#way")) === way);
  const [ann, bob] = await visits(t, chromium, `${live.bus("shown")}/`, 2);
  await Promise.all([hears(ann, "stream"), hears(bob, "another page's stream")]);
  await hears(await visit(t, chromium, `${site.bus("shown")}/`), "polls");
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
  await until("the message", () => page.$eval("#entries", (element) => element.childElementCount === 1));
});

test("a policy that is violated would be noticed", async (t) => {
  const url = site.serve("strict/violation.html", "<!doctype html><script>alert(1)</script>");
  const check = (problems) => assert.equal(problems[0], "violation of script-src-elem: inline");
  for (const browser of Object.values(browsers)) await visit(t, browser, url, check);
});
