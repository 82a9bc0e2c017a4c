// What the bus serves to pages, taken from a running bus: the scripts as they parse, and the types against the class.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, test } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";
import { createContext, runInContext } from "node:vm";
import ts from "typescript";
import { startSite } from "./servers.mjs";

const site = await startSite();
after(() => site.close());

async function served(name) {
  const reply = await fetch(`${site.bus("chat")}/${name}`);
  assert.equal(reply.status, 200, name);
  return reply.text();
}

const [classic, module, types] = await Promise.all(["shortbus.js", "shortbus.mjs", "shortbus.d.ts"].map(served));

const ITERATOR = "[Symbol.asyncIterator]";

/** The names of the class's members, as the types have them. */
function members() {
  const source = ts.createSourceFile("shortbus.d.ts", types, ts.ScriptTarget.Latest);
  const isClass = (node) => ts.isClassDeclaration(node) && node.name.text === "MessageBus";
  const { members } = source.statements.find(isClass);
  const named = members.filter((member) => !ts.isConstructorDeclaration(member));
  return new Set(named.map((member) => member.name.getText(source)));
}

const named = members();

/** A folder with a page that uses the types under this name. */
function folder(page, name) {
  const path = join(site.folder, `types-${page}`);
  mkdirSync(path);
  writeFileSync(join(path, name), types);
  copyFileSync(fileURLToPath(new URL(page, import.meta.url)), join(path, page));
  return path;
}

/** Compiles a page as strictly as can be: what the compiler finds. */
function compile(folder, page) {
  const options = {
    strict: true,
    exactOptionalPropertyTypes: true,
    noUncheckedIndexedAccess: true,
    noEmit: true,
    types: [],
    lib: ["lib.es2022.d.ts", "lib.dom.d.ts"],
    target: ts.ScriptTarget.ES2022,
    module: ts.ModuleKind.NodeNext,
  };
  const program = ts.createProgram([join(folder, page)], options);
  const host = { getCurrentDirectory: () => folder, getCanonicalFileName: (name) => name, getNewLine: () => "\n" };
  return ts.formatDiagnostics(ts.getPreEmitDiagnostics(program), host);
}

for (const [page, name] of [
  ["usage.mts", "shortbus.d.mts"],
  ["usage-classic.ts", "shortbus.d.ts"],
]) {
  test(`the types let ${page} do what the client can, and nothing else`, () => {
    assert.equal(compile(folder(page, name), page), "");
  });
}

test("the page that uses the types uses each member", () => {
  const source = readFileSync(new URL("usage.mts", import.meta.url), "utf8");
  for (const name of named) assert(source.includes(name === ITERATOR ? "for await" : `bus.${name}`), name);
});

test("the types name each public member that the class has, and no other", async () => {
  writeFileSync(join(site.folder, "shortbus.mjs"), module);
  const { MessageBus } = await import(pathToFileURL(join(site.folder, "shortbus.mjs")));
  const bus = new MessageBus(site.bus("chat"));
  const own = [...Reflect.ownKeys(MessageBus.prototype), ...Object.getOwnPropertyNames(bus)];
  const had = own.map((key) => (key === Symbol.asyncIterator ? ITERATOR : key)).filter((key) => key !== "constructor");
  assert.deepEqual(Object.keys(bus), []); // nothing that a loop over its properties meets
  assert.deepEqual(Object.keys(MessageBus), []);
  bus.close();
  assert.deepEqual([...named].sort(), [...had].sort());
});

test("each script is one file that parses, and imports nothing", () => {
  for (const script of [classic, module]) assert.deepEqual(ts.preProcessFile(script, true, true).importedFiles, []);
  const file = join(site.folder, "parsed.mjs");
  writeFileSync(file, module);
  execFileSync(process.execPath, ["--check", file]);
  // Alone in its world, the classic script gives it the class and nothing more.
  const world = createContext({ EventTarget, Error });
  runInContext(classic, world);
  assert.deepEqual(Object.keys(world), ["EventTarget", "Error", "MessageBus"]);
  assert.equal(typeof world.MessageBus, "function");
});
