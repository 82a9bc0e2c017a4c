// The pages of examples/ in Chromium, as people copy them.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { after, test } from "node:test";
import puppeteer from "puppeteer-core";
import { startFastcgiSite, startNginxProxy, startSite, until } from "./servers.mjs";

const file = (path) => readFileSync(new URL(`../../${path}`, import.meta.url), "utf8");
const site = await startSite(() => ({ quiz: { SHORTBUS_TTL: 10 } }));
const live = await startFastcgiSite();

const folders = process.env.PATH.split(":");
const names = ["chromium", "chromium-browser", "google-chrome"];
const executablePath = names.flatMap((name) => folders.map((folder) => join(folder, name))).find(existsSync);
assert(executablePath, "no chromium: make test installs it");
const chromium = await puppeteer.launch({ executablePath, headless: true, args: ["--no-sandbox", "--disable-quic"] });
after(() => Promise.all([chromium.close(), site.close(), live.close()]));

/** Serves a page of the examples, whose bus has this name: its URL. */
function example(name, bus, at = site) {
  at.bus(bus);
  return at.serve(`${name}.html`, file(`examples/${name}.html`));
}

/** Opens pages of it, each in a browser of its own unless told otherwise; nothing may throw in them. */
function visitor(t, url) {
  const problems = [];
  const contexts = [];
  t.after(async () => {
    await Promise.all(contexts.map((context) => context.close()));
    assert.deepEqual(problems, []);
  });
  return async (hash = "", context) => {
    context ??= contexts[contexts.push(await chromium.createBrowserContext()) - 1];
    const page = await context.newPage();
    page.on("pageerror", (error) => problems.push(String(error)));
    await page.goto(url + hash);
    await until("the join", () => page.evaluate(() => bus.connected));
    return page;
  };
}

const text = (page, selector) => page.$eval(selector, (element) => element.innerText);
const items = (page, selector) => page.$$eval(selector, (elements) => elements.map((element) => element.innerText));

const answers = (page) => items(page, "#answers button");

test("each page says that its bus is missing", async () => {
  const page = await chromium.newPage();
  for (const name of ["quiz", "whiteboard", "lobby", "game", "dashboard"]) {
    const copy = file(`examples/${name}.html`);
    const [, path] = copy.match(/src="(.*)\/shortbus.js"/);
    await page.goto(site.serve(`${name}-alone.html`, copy.replaceAll(path, "/cgi-bin/nowhere")));
    const said = await page.evaluate(() => document.body.innerText);
    assert(said.includes("There is no bus at /cgi-bin/nowhere"), `${name}: ${said}`);
  }
  await page.close();
});

test("quiz: all see the question and the results, who comes late and who comes back too", async (t) => {
  const visit = visitor(t, example("quiz", "quiz"));
  const host = await visit("#host");
  const ann = await visit();
  await host.click("#host button");
  await until("the question", async () => (await answers(ann)).length === 3);
  await ann.click("#answers button:nth-of-type(2)");
  const one = ["six: 0", "eight: 1", "ten: 0"];
  await until("a vote", async () => String(await answers(host)) === String(one));
  const bob = await visit();
  await until("the results", async () => String(await answers(bob)) === String(one));
  await bob.click("#answers button:nth-of-type(3)");
  const two = ["six: 0", "eight: 1", "ten: 1"];
  for (const page of [host, ann, bob]) await until("both", async () => String(await answers(page)) === String(two));
  await ann.reload();
  await until("the results again", async () => String(await answers(ann)) === String(two));
  assert.deepEqual(await items(ann, ".mine"), ["eight: 1"]);
  // One vote a browser, in all its tabs, and the host's are no others.
  const tab = await visit("", ann.browserContext());
  await until("the same vote", async () => String(await items(tab, ".mine")) === "eight: 1");
  const hosts = await visit("", host.browserContext());
  await until("the question in the host's browser", async () => String(await answers(hosts)) === String(two));
  await tab.bringToFront(); // a click waits until the page is seen
  await tab.click("#answers button:nth-of-type(1)");
  const moved = ["six: 1", "eight: 0", "ten: 1"];
  for (const page of [host, ann, bob, tab, hosts]) {
    await until("the vote to move", async () => String(await answers(page)) === String(moved));
  }
  assert.deepEqual([await items(ann, ".mine"), await items(bob, ".mine")], [["six: 1"], ["ten: 1"]]);
  await host.bringToFront();
  await host.click("#host button");
  await until("another round", async () => String(await answers(bob)) === "six: 0,eight: 0,ten: 0");
});

/** A host who has asked, and Ann, who has heard it. */
async function askedQuiz(t) {
  const visit = visitor(t, example("quiz", "quiz"));
  const [host, ann] = [await visit("#host"), await visit()];
  await host.click("#host button");
  for (const page of [host, ann]) await until("the question", async () => (await answers(page)).length === 3);
  return { visit, host, ann };
}

test("quiz: a click counts, and the keyboard stays where it is, while others vote", async (t) => {
  const visit = visitor(t, example("quiz", "quiz"));
  const [host, ann, bob] = [await visit("#host"), await visit(), await visit()];
  await host.click("#host button");
  for (const page of [ann, bob]) await until("the question", async () => (await answers(page)).length === 3);
  const second = await ann.$("#answers button:nth-of-type(2)");
  await second.hover();
  await ann.mouse.down();
  await bob.click("#answers button:nth-of-type(1)");
  await until("the other's vote", async () => (await answers(ann))[0] === "six: 1");
  await ann.mouse.up();
  await until("both", async () => String(await answers(bob)) === "six: 1,eight: 1,ten: 0");
  assert(await ann.evaluate(() => document.activeElement.textContent.startsWith("eight")));
  await ann.keyboard.press("Tab");
  await bob.click("#answers button:nth-of-type(2)");
  await until("the other's new vote", async () => (await answers(ann))[1] === "eight: 2");
  await ann.keyboard.press("Enter");
  await until("the keyboard's vote", async () => String(await answers(bob)) === "six: 0,eight: 1,ten: 1");
});

test("quiz: the question stays while its host is gone, and what the bus refuses is told", async (t) => {
  const { visit, host, ann } = await askedQuiz(t);
  await ann.click("#answers button:nth-of-type(2)");
  const one = "six: 0,eight: 1,ten: 0";
  await until("a vote", async () => String(await answers(host)) === one);
  await host.goto("about:blank");
  const bob = await visit();
  await until("it from another page", async () => String(await answers(bob)) === one);
  const again = await visit("#host", host.browserContext());
  await until("it at the host", async () => String(await answers(again)) === one);
  const asks = (question, ...list) =>
    again.evaluate(
      (question, list) => {
        const form = document.querySelector("#host");
        [form.question.value, form.answers.value] = [question, list.join("\n")];
        form.requestSubmit();
      },
      question,
      list,
    );
  await asks("x".repeat(11_000), "yes", "no");
  await until("the refusal", async () => (await text(again, "#state")).includes("10240"));
  assert.equal(String(await answers(again)), one);
  await asks("Well?", "yes", "no");
  for (const page of [ann, bob, again]) await until("it", async () => String(await answers(page)) === "yes: 0,no: 0");
  await site.publish(site.bus("quiz"), null);
  await ann.click("#answers button");
  await until("a vote", async () => String(await answers(bob)) === "yes: 1,no: 0");
});

test("quiz: a host that was away for longer than messages live gets the votes", async (t) => {
  const { visit, host, ann } = await askedQuiz(t);
  await host.setOfflineMode(true);
  await until("the host to be away", () => host.evaluate(() => !bus.connected));
  await ann.click("#answers button:nth-of-type(2)");
  const one = "six: 0,eight: 1,ten: 0";
  await until("a vote", async () => String(await answers(ann)) === one);
  await until("the vote to be gone", async () => !(await site.ask(`${site.bus("quiz")}?id=0`)).json.length);
  assert.equal(String(await answers(host)), "six: 0,eight: 0,ten: 0");
  await host.setOfflineMode(false);
  for (const page of [host, ann]) await until("it at the host", async () => String(await answers(page)) === one);
});

for (const [kind, at] of [["polls", site], ["streams", live]]) {
  test(`whiteboard: a flood of pointer moves arrives whole, and who comes late sees it, by ${kind}`, async (t) => {
    const visit = visitor(t, example("whiteboard", "board", at));
    const [ann, bob] = [await visit(), await visit()];
    await ann.mouse.move(300, 300);
    await ann.mouse.down();
    await ann.evaluate(async () => {
      for (let n = 1; n <= 20_000; n++) {
        const [clientX, clientY] = [300 + 250 * Math.cos(n / 50), 300 + 200 * Math.sin(n / 70)];
        canvas.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY }));
        if (n % 100 === 0) await new Promise((resolve) => setTimeout(resolve));
      }
    });
    await ann.mouse.up();
    const drawn = (page) => page.evaluate(() => JSON.stringify([...lines.values()]));
    const image = (page) => page.evaluate(() => canvas.toDataURL());
    await until("all to leave", () => ann.evaluate(() => !bus.bufferedAmount && points.length < 4));
    const sent = JSON.parse(await drawn(ann));
    // Two numbers a point, and each piece but the first begins where the one before it ended.
    assert.equal(sent.flatMap((line) => line.points).length, 2 * (20_001 + sent.length - 1));
    assert(sent.length < 2_000, `${sent.length} messages`);
    await until("all", async () => (await drawn(bob)) === (await drawn(ann)));
    const zoe = await visit();
    await until("the copy", async () => (await drawn(zoe)) === (await drawn(ann)));
    const [first, second, third] = await Promise.all([ann, bob, zoe].map(image));
    assert(first === second && second === third && first.length > 10_000);
    await zoe.click("button");
    await until("a clean sheet", async () => (await drawn(ann)) === "[]" && (await drawn(bob)) === "[]");
  });

  test(`lobby: who is there, after a reload too, and who has left, by ${kind}`, async (t) => {
    const visit = visitor(t, example("lobby", "lobby", at));
    const [ann, bob] = [await visit(), await visit()];
    const people = (page) => items(page, "li");
    const rename = (page, name) =>
      page.$eval("input", (input, name) => {
        input.value = name;
        for (const type of ["input", "change"]) input.dispatchEvent(new Event(type));
      }, name);
    await rename(ann, "Ann");
    await rename(bob, "Bob");
    await until("each other", async () => String(await people(ann)) === "Ann (you),Bob");
    await until("each other", async () => String(await people(bob)) === "Bob (you),Ann");
    await ann.reload();
    await until("Ann again", async () => String(await people(bob)) === "Bob (you),Ann");
    await until("both again", async () => String(await people(ann)) === "Ann (you),Bob");
    const zoe = await visit();
    await until("three", async () => (await people(zoe)).slice(1).sort().join() === "Ann,Bob");
    // A page that only falls silent would stay for longer than we wait.
    await bob.goto("about:blank");
    await until("Bob to leave", async () => !String(await people(ann)).includes("Bob"));
  });
}

test("the same person after a reload, in another tab another one", async (t) => {
  const [, line] = /say who keeps it.*\n\n {4}(.*)\n/.exec(file("docs/recipes.md"));
  site.bus("person");
  const script = `${line}\nconst heard = []; bus.onmessage = ({ user }) => heard.push(user);`;
  const tags = `<script src="/cgi-bin/person/shortbus.js"></script><script>${script}</script>`;
  const visit = visitor(t, site.serve("person.html", `<!doctype html>${tags}`));
  const ann = await visit();
  const bob = await visit("", ann.browserContext());
  const say = async () => {
    await ann.evaluate(() => bus.send("hello"));
    return ann.evaluate(() => bus.user);
  };
  const user = await say();
  await ann.reload();
  assert.equal(await say(), user);
  await until("both", async () => (await bob.evaluate(() => heard.length)) === 2);
  assert.deepEqual(await bob.evaluate(() => heard), [user, user]);
  assert.notEqual(await bob.evaluate(() => bus.user), user);
});

test("game: all pages end with one game, whoever was first, and who comes late too", async (t) => {
  const visit = visitor(t, example("game", "game"));
  const [ann, bob] = [await visit(), await visit()];
  const game = (page) => page.evaluate(() => JSON.stringify([bus.bufferedAmount, game, played()]));
  // All know what they sent themselves, so nothing can come that changes the game.
  const same = (turns, ...pages) =>
    until(`${turns} turns`, async () => {
      const games = await Promise.all(pages.map(game));
      const [buffered, , list] = JSON.parse(games[0]);
      return games.every((each) => each === games[0]) && buffered === 0 && list.length === turns;
    });
  const click = (page, cell) => page.evaluate((cell) => document.querySelectorAll("#cells button")[cell].click(), cell);
  await click(ann, 4);
  await same(1, ann, bob);
  // Both take the next turn: one of them has it.
  await Promise.all([click(ann, 0), click(bob, 8)]);
  await same(2, ann, bob);
  const zoe = await visit();
  await same(2, ann, bob, zoe);
  assert.equal((await items(zoe, "#cells button")).filter((mark) => mark.trim()).sort().join(), "O,X");
  await Promise.all([ann.click("#again"), zoe.click("#again")]);
  await same(0, ann, bob, zoe);
  await click(zoe, 2);
  await same(1, ann, bob, zoe);
  // Who came late knows the game for those who come later still.
  for (const page of [ann, bob]) await page.goto("about:blank");
  await same(1, zoe, await visit());
});

test("game: messages lead to the same game in any order", async (t) => {
  const page = await visitor(t, example("game", "game"))();
  const moves = [
    [10, { start: true }],
    [20, { start: true }],
    [21, { follows: 10, cell: 3 }],
    [30, { follows: 20, cell: 4 }],
    [31, { follows: 20, cell: 5 }],
    [40, { follows: 31, cell: 6 }],
    [50, { follows: 30, cell: 7 }],
  ];
  const games = await page.evaluate((given) => {
    const play = () => {
      const shuffled = given.map((move) => [Math.random(), move]).sort(([one], [two]) => one - two);
      game = 0;
      moves.clear();
      learn(shuffled.map(([, [id, message]]) => ({ id, ...message })));
      return String(played().map(({ cell }) => cell));
    };
    return Array.from({ length: 500 }, play);
  }, moves);
  assert.deepEqual([...new Set(games)], ["4,7"]);
  // A message's id is the bus's, whatever it says of itself.
  const id = await site.publish(site.bus("game"), { start: true, id: Number.MAX_SAFE_INTEGER });
  await until("a new game", () => page.evaluate((id) => game === id, id));
});

test("dashboard: behind a proxy, what was published before and what is published now", async (t) => {
  const url = example("dashboard", "dashboard", live);
  const [, lines] = /Behind a proxy[^]*?\n\n((?: {4}.*\n)+)/.exec(file("docs/recipes.md"));
  const proxy = await startNginxProxy(live, lines);
  t.after(proxy.close);
  const bus = proxy.origin + new URL(live.bus("dashboard")).pathname;
  const shell = (line) => {
    const { status, stderr } = spawnSync("sh", ["-ec", line.replaceAll("http://localhost/cgi-bin/dashboard", bus)]);
    assert.equal(status, 0, String(stderr));
  };
  const line = (after) => file("docs/recipes.md").split(after)[1].split("\n    ")[1].split("\n")[0];
  const cron = line("Every minute").replace("* * * * * nobody ", "");
  shell(cron);
  const visit = visitor(t, proxy.origin + new URL(url).pathname);
  const page = await visit();
  await until("what lives", async () => /^load\t[0-9.]+$/.test(await text(page, "table")));
  shell(line("## Publish from a shell, from cron"));
  await until("what is new", async () => (await text(page, "table")) === "load\t0.7");
  await until("a stream", () => page.evaluate(() => bus.transport === "stream"));
  assert.equal(await text(page, "#state"), "live");
  // A page of this site may publish, too.
  await page.evaluate(() => bus.send({ name: "load", value: 1 }));
});
