// The browser client, in one source. In front of it goes a line that says where it was loaded from (HERE), behind it one
// that gives it away: as a classic script (shortbus.js) and as a module (shortbus.mjs).

/** Why something failed: the server's `code` and sentence, or `network`; `status` is 0 where no server answered. */
class BusError extends Error {
  name = "BusError";
  status = 0;
  retryAfter = 0;

  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

const GIVE_UP = 30_000; // milliseconds until a request is given up, and the longest pause after failures
const KEPT_ALIVE = 60_000; // bytes; browsers keep 64 KiB of a page's requests alive when it is left
let keptAlive = 0; // bytes under way now, of all buses
const isId = Number.isSafeInteger;
const randomUser = () => Math.floor(Math.random() * Number.MAX_SAFE_INTEGER);

/** A bus, in the shape of BroadcastChannel. README says what each part does. */
class MessageBus extends EventTarget {
  #url;
  #interval;
  #user;
  #lastId;
  #connected = false;
  #closed = false;
  #failures = 0;
  #poll; // aborts the request that polls
  #wake; // ends the pause between two polls
  #hurry = false; // whether it is time to poll, whatever is under way
  #queue = []; // what is still to be sent, in order
  #sending = false;
  #leaving = false; // the page is being left: there is no later
  #callbacks = new Map();
  #handlers = {};
  #end = new AbortController(); // of everything that it listens to

  constructor(url, options) {
    super();
    const ready = [url, options].find((argument) => typeof argument === "function");
    const isOptions = (argument) => argument && typeof argument === "object" && !argument.href;
    const { interval = 500, signal } = [options, url].find(isOptions) ?? {};
    if (!(interval >= 0)) throw new RangeError("interval has to be a number of milliseconds");
    url = url?.href ?? url; // a URL, or a Location
    if (typeof url !== "string") url = HERE && new URL(".", HERE);
    if (!url) throw new TypeError("MessageBus needs the URL of a bus: this script was not loaded from one");
    const base = globalThis.document?.baseURI ?? globalThis.location?.href;
    this.#url = new URL(url, base).href.replace(/[?#].*/, "").replace(/\/+$/, "");
    this.#interval = interval;
    if (ready) this.addEventListener("open", () => ready.call(this, this), { once: true });
    for (const type of ["open", "message", "messageerror", "missed", "error", "close"]) this.#handler(type);

    // Timers sleep with the machine, and nearly so in hidden pages: at the end of such a sleep, poll at once.
    const listen = (target, type, act) => target?.addEventListener?.(type, act, { signal: this.#end.signal });
    listen(globalThis, "online", () => this.#pollNow());
    listen(globalThis, "pageshow", ({ persisted }) => {
      this.#leaving = false;
      if (persisted) this.#pollNow();
    });
    listen(globalThis.document, "visibilitychange", () => document.hidden || this.#pollNow());
    listen(globalThis, "pagehide", () => {
      this.#leaving = true;
      this.#user ??= randomUser();
      this.#drain();
    });
    listen(signal, "abort", () => this.#abort(signal.reason));
    // The caller gets to listen first.
    queueMicrotask(() => (signal?.aborted ? this.#abort(signal.reason) : this.#run()));
  }

  /** The bus's name: the last part of its URL. */
  get name() {
    const name = this.#url.slice(this.#url.lastIndexOf("/") + 1);
    try {
      return decodeURIComponent(name);
    } catch {
      return name; // not UTF-8
    }
  }

  get url() {
    return this.#url;
  }

  /** This user's id; undefined until the bus is joined. */
  get user() {
    return this.#user;
  }

  /** The cursor: all messages up to this id have been passed; undefined until the bus is joined. */
  get lastId() {
    return this.#lastId;
  }

  /** Whether the latest poll was answered. */
  get connected() {
    return this.#connected;
  }

  /** Sends; where that fails there is an `error` event. */
  postMessage(data) {
    if (this.#closed) throw new DOMException("the bus is closed", "InvalidStateError");
    this.#enqueue(data).catch(() => {});
  }

  /** Sends: a promise of the message's id. Messages leave one at a time, in the order they were given. */
  async send(data) {
    if (this.#closed) throw new DOMException("the bus is closed", "InvalidStateError");
    return this.#enqueue(data);
  }

  /** Hears no more. What was given to be sent still leaves. */
  close() {
    if (this.#closed) return;
    this.#closed = true;
    this.#connected = false;
    this.#poll?.abort();
    this.#wake?.();
    // Not joined yet, what waits to be sent goes under an id of our own.
    this.#user ??= randomUser();
    this.#drain();
    this.#fire(new Event("close"));
  }

  /** As EventTarget has it; a function alone gets the bare data of each message. */
  addEventListener(type, listener, options) {
    if (typeof type !== "function") return super.addEventListener(type, listener, options);
    if (!this.#callbacks.has(type)) this.#callbacks.set(type, (event) => type(event.data));
    super.addEventListener("message", this.#callbacks.get(type));
  }

  removeEventListener(type, listener, options) {
    if (typeof type !== "function") return super.removeEventListener(type, listener, options);
    super.removeEventListener("message", this.#callbacks.get(type));
    this.#callbacks.delete(type);
  }

  /** The message events from now on, until the bus is closed or the loop is left. */
  [Symbol.asyncIterator]() {
    const heard = [];
    const waiting = [];
    const end = new AbortController();
    let ended = this.#closed;
    const settle = () => {
      while (waiting.length && (heard.length || ended)) waiting.shift()({ done: !heard.length, value: heard.shift() });
    };
    const hear = (event) => {
      if (event.type === "close") ended = true;
      else heard.push(event);
      settle();
    };
    for (const type of ["message", "close"]) super.addEventListener(type, hear, { signal: end.signal });
    return {
      next: () => new Promise((resolve) => settle(waiting.push(resolve))),
      return: async () => {
        end.abort();
        ended = true;
        settle((heard.length = 0));
        return { done: true, value: undefined };
      },
    };
  }

  /** `onmessage` and its like: a property that holds one listener. */
  #handler(type) {
    super.addEventListener(type, (event) => this.#handlers[type]?.call(this, event));
    Object.defineProperty(this, `on${type}`, {
      get: () => this.#handlers[type] ?? null,
      set: (listener) => (this.#handlers[type] = typeof listener === "function" ? listener : null),
    });
  }

  #fire(event, properties) {
    this.dispatchEvent(Object.assign(event, properties));
  }

  #abort(reason) {
    for (const { reject } of this.#queue.splice(0)) reject(reason);
    this.close();
  }

  /** Joins and polls until it is closed: one request at a time. */
  async #run() {
    while (!this.#closed) {
      let pause = this.#interval;
      this.#hurry = false;
      this.#poll = new AbortController();
      try {
        if (this.#lastId === undefined) await this.#join();
        else if (await this.#hear()) pause = 0;
        this.#failures = 0;
      } catch (error) {
        if (this.#closed) break;
        if (this.#hurry) continue;
        this.#connected = false;
        this.#fire(new Event("error"), { error });
        // Exponential back-off with full jitter: a thousand pages must not come back all at the same moment.
        const longest = Math.min(GIVE_UP, Math.max(500, this.#interval) * 2 ** this.#failures++);
        pause = Math.max(Math.random() * longest, (error.retryAfter ?? 0) * 1_000);
      }
      this.#poll = undefined;
      if (!this.#closed) await this.#pause(pause);
    }
  }

  async #pause(milliseconds) {
    let timer;
    await new Promise((resolve) => {
      this.#wake = resolve;
      // A timer takes what is longer for nothing.
      timer = setTimeout(resolve, Math.min(milliseconds, 2 ** 31 - 1));
    });
    clearTimeout(timer);
    this.#wake = undefined;
  }

  /** Whatever is under way may hang on a connection that has gone. */
  #pollNow() {
    this.#hurry = true;
    this.#poll?.abort();
    this.#wake?.();
  }

  async #join() {
    const { json } = await this.#request("", {}, (join) => isId(join?.user) && isId(join?.id), this.#poll);
    this.#user ??= json.user;
    this.#lastId = json.id;
    this.#opened();
    this.#drain();
  }

  #opened() {
    if (this.#connected || this.#closed) return;
    this.#connected = true;
    this.#fire(new Event("open"));
  }

  /** Polls once; whether there may be more at once. */
  async #hear() {
    const query = `?user=${this.#user}&id=${this.#lastId}`;
    const isPage = (list) => Array.isArray(list) && list.every((message) => isId(message?.id));
    const { json: messages, headers } = await this.#request(query, {}, isPage, this.#poll);
    if (this.#closed) return false;
    this.#opened();
    // Where the counter was lost, ids may be lower than before; else a lower one is an old reply from some cache.
    const missed = headers.has("Shortbus-Missed");
    if (missed) this.#fire(new Event("missed"));
    const passed = missed ? -1 : this.#lastId;
    const origin = new URL(this.#url).origin;
    for (const { id, user, data } of messages) {
      if (id <= passed) continue;
      this.#lastId = id;
      this.#fire(new MessageEvent("message", { data, lastEventId: String(id), origin }), { user });
      if (this.#closed) return false;
    }
    const last = Number(headers.get("Shortbus-Last-Id"));
    if (last > 0 && last > (missed ? 0 : this.#lastId)) this.#lastId = last;
    return messages.length >= 100;
  }

  #enqueue(data) {
    // Now: what the caller does with the object later is none of the message.
    const body = JSON.stringify(data);
    if (body === undefined) throw new DOMException("only what JSON can express can be sent", "DataCloneError");
    return new Promise((resolve, reject) => {
      this.#queue.push({ body, resolve, reject });
      this.#drain();
    });
  }

  /** Sends what waits: one at a time, or all at once if the page is being left. */
  async #drain() {
    if (this.#leaving) for (const message of this.#queue.splice(0)) this.#post(message);
    if (this.#sending || this.#user === undefined) return;
    this.#sending = true;
    while (this.#queue.length) await this.#post(this.#queue.shift());
    this.#sending = false;
    if (this.#closed) this.#end.abort();
  }

  async #post({ body, resolve, reject }) {
    const bytes = new TextEncoder().encode(body).length;
    const keepalive = keptAlive + bytes <= KEPT_ALIVE;
    if (keepalive) keptAlive += bytes;
    try {
      const init = { method: "POST", body, keepalive };
      const { json } = await this.#request(`?user=${this.#user}`, init, (published) => isId(published?.id));
      resolve(json.id);
    } catch (error) {
      reject(error);
      this.#fire(new Event("error"), { error });
    }
    if (keepalive) keptAlive -= bytes;
  }

  /** Asks, and returns what the reply holds if it is what a bus would say. */
  async #request(query, init, isRight, abort = new AbortController()) {
    const timer = setTimeout(() => abort.abort(), GIVE_UP);
    let reply;
    let text;
    try {
      reply = await fetch(this.#url + query, { cache: "no-store", signal: abort.signal, ...init });
      text = await reply.text();
    } catch (cause) {
      throw new BusError("network", `The bus cannot be reached: ${cause.message}`);
    } finally {
      clearTimeout(timer);
    }
    let json;
    try {
      json = JSON.parse(text);
    } catch {
      if (reply.ok) this.#fire(new MessageEvent("messageerror", { data: text }));
    }
    const { status, headers } = reply;
    if (!reply.ok) {
      const error = new BusError(json?.error ?? "http", json?.message ?? `The web server answered ${status}.`);
      throw Object.assign(error, { status, retryAfter: Number(headers.get("Retry-After")) || 0 });
    }
    if (!isRight(json)) throw new BusError("not_a_bus", "What answered is no bus: its reply is not what a bus says.");
    return { json, headers };
  }
}
