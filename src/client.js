// The browser client, in one source. In front of it goes a line that says where it was loaded from (HERE), behind it
// one that gives it away: as a classic script (shortbus.js) and as a module (shortbus.mjs).

/** Why something failed: the server's `code` and sentence, or our own; `status` is 0 where no server answered. */
class BusError extends Error {
  name = "BusError";
  status = 0;
  retryAfter = 0;

  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

const GIVE_UP = 30_000; // milliseconds until a poll is given up, and the longest pause after failures
const TRY = 10_000; // milliseconds until a join or one try of a message is given up
const LEAST = 1_000; // milliseconds that a try gets, however late it is
const KEPT_ALIVE = 60_000; // bytes; browsers keep 64 KiB of a page's requests alive when it is left
let keptAlive = 0; // bytes under way now, of all buses
const isId = Number.isSafeInteger;
const utf8 = (text) => new TextEncoder().encode(text);
const randomUser = () => Math.floor(Math.random() * Number.MAX_SAFE_INTEGER);

/** 128 random bits, by which the bus knows all tries of a message for one. */
function newOnce() {
  const parts = new Uint32Array(4).map(() => Math.random() * 2 ** 32);
  globalThis.crypto?.getRandomValues(parts); // Node 18 has none of its own accord
  return Array.from(parts, (part) => part.toString(36)).join("-");
}

/** Exponential back-off with full jitter: a thousand pages must not come back all at the same moment. */
const backOff = (failures, first) => Math.random() * Math.min(GIVE_UP, first * 2 ** failures);

/** Whether a message may still be delivered after this. */
function mayPass({ code, status }) {
  if (["bad_setting", "insecure_context"].includes(code)) return false;
  // The clock has been set by the very reply that complained.
  if (["once_undecided", "signature_too_old", "signature_clock_ahead"].includes(code)) return true;
  return !(status >= 400 && status < 500) || [408, 425, 429].includes(status);
}

/** What a promise gives, if it does so in time. */
function within(milliseconds, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    const error = new BusError("network", "The bus cannot be reached: it does not answer.");
    timer = setTimeout(reject, milliseconds, error);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** A bus, in the shape of BroadcastChannel. README says what each part does. */
class MessageBus extends EventTarget {
  #url;
  #interval;
  #deadline;
  #user;
  #users = new Set(); // and all former ids: what they sent is our own
  #seat; // what the latest join gave: on a signed bus the bus's name and the secret
  #joining; // the join under way
  #lastId;
  #skew = 0; // milliseconds that the server's clock is ahead of ours
  #connected = false;
  #closed = false;
  #failures = 0;
  #poll; // aborts the request that polls
  #wakes = new Set(); // each ends a pause
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
    const { interval = 500, deadline = 30_000, signal } = [options, url].find(isOptions) ?? {};
    for (const [name, value] of Object.entries({ interval, deadline })) {
      if (!(value >= 0)) throw new RangeError(`${name} has to be a number of milliseconds`);
    }
    url = url?.href ?? url; // a URL, or a Location
    if (typeof url !== "string") url = HERE && new URL(".", HERE);
    if (!url) throw new TypeError("MessageBus needs the URL of a bus: this script was not loaded from one");
    const base = globalThis.document?.baseURI ?? globalThis.location?.href;
    this.#url = new URL(url, base).href.replace(/[?#].*/, "").replace(/\/+$/, "");
    this.#interval = interval;
    this.#deadline = deadline;
    if (ready) this.addEventListener("open", () => ready.call(this, this), { once: true });
    for (const type of ["open", "message", "messageerror", "missed", "rejoin", "error", "close"]) this.#handler(type);

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
      for (const message of this.#queue) this.#leave(message);
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

  /** This user's id, which a `rejoin` changes; undefined until the bus is joined. */
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

  /** Sends; where that fails for good there is an `error` event. */
  postMessage(data) {
    if (this.#closed) throw new DOMException("the bus is closed", "InvalidStateError");
    this.#enqueue(data).catch(() => {});
  }

  /** Sends, until the deadline: a promise of the message's id. Messages leave one at a time, in their order. */
  async send(data) {
    if (this.#closed) throw new DOMException("the bus is closed", "InvalidStateError");
    return this.#enqueue(data);
  }

  /** Hears no more. What was given to be sent still leaves. */
  close() {
    if (this.#closed) return;
    this.#closed = true;
    this.#connected = false;
    // What waits needs the join.
    if (!this.#joining || !this.#queue.length) this.#poll?.abort();
    this.#wake();
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
    for (const message of [...this.#queue]) {
      // What is on its way may arrive: this try of it tells, and is the last.
      if (message.flight) Object.assign(message, { error: reason, deadline: -Infinity });
      else this.#settle(message, message.reject, reason);
    }
    this.close();
  }

  /** Joins and polls until it is closed: one request at a time. */
  async #run() {
    while (!this.#closed) {
      let pause = this.#interval;
      this.#hurry = false;
      this.#poll = new AbortController();
      try {
        if (this.#lastId === undefined) await this.#join(this.#poll);
        else if (await this.#hear()) pause = 0;
        this.#failures = 0;
      } catch (error) {
        if (this.#closed) break;
        if (this.#hurry) continue;
        this.#connected = false;
        this.#fire(new Event("error"), { error });
        pause = Math.max(backOff(this.#failures++, Math.max(500, this.#interval)), (error.retryAfter ?? 0) * 1_000);
      }
      this.#poll = undefined;
      if (!this.#closed) await this.#pause(pause);
    }
  }

  async #pause(milliseconds) {
    let wake;
    let timer;
    await new Promise((resolve) => {
      this.#wakes.add((wake = resolve));
      // A timer takes what is longer for nothing.
      timer = setTimeout(resolve, Math.min(milliseconds, 2 ** 31 - 1));
    });
    clearTimeout(timer);
    this.#wakes.delete(wake);
  }

  /** Ends all pauses. */
  #wake() {
    for (const wake of this.#wakes) wake();
  }

  /** Whatever is under way may hang on a connection that has gone. */
  #pollNow() {
    this.#hurry = true;
    this.#poll?.abort();
    this.#wake();
  }

  /** Joins: once, however many wait for it. */
  #join(abort) {
    return (this.#joining ??= this.#sitDown(abort).finally(() => (this.#joining = undefined)));
  }

  async #sitDown(abort) {
    const { json } = await this.#request("", {}, (join) => isId(join?.user) && isId(join?.id), abort, TRY);
    const { user, id, bus, secret } = json;
    const hmac = { name: "HMAC", hash: "SHA-256" };
    const key = secret && (await globalThis.crypto?.subtle?.importKey("raw", utf8(secret), hmac, false, ["sign"]));
    this.#seat = { bus, secret, key };
    const again = this.#lastId !== undefined;
    this.#lastId ??= id;
    // An open bus lets us stay who we are.
    if (secret || this.#user === undefined) this.#become(user);
    for (const message of this.#queue) this.#signAhead(message);
    if (again && this.#user === user && !this.#closed) this.#fire(new Event("rejoin"), { user });
    this.#opened();
  }

  #become(user) {
    this.#user = user;
    this.#users.add(user);
  }

  #opened() {
    if (this.#connected || this.#closed) return;
    this.#connected = true;
    this.#wake(); // what waits for better times
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
      if (this.#users.has(user)) continue; // sent as whom we were before
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
      const given = [Date.now(), performance.now()];
      const message = { body, once: newOnce(), given, deadline: this.#deadline, resolve, reject };
      this.#queue.push(message);
      if (this.#seat) this.#signAhead(message);
      if (this.#leaving) this.#leave(message);
      this.#drain();
    });
  }

  /** Sends what waits, one at a time. */
  async #drain() {
    if (this.#sending) return;
    this.#sending = true;
    await undefined; // the constructor goes first
    while (this.#queue.length) await this.#deliver(this.#queue[0]);
    this.#sending = false;
    if (this.#closed) this.#end.abort();
  }

  /** Tries until the message is delivered, refused, or too late. */
  async #deliver(message) {
    let failures = 0;
    let rejoined = false; // right before this try
    while (!message.done) {
      // After a sleep: the bus may have forgotten the tries before, and take this one for another message.
      if (message.error && this.#left(message) <= -LEAST) return this.#fail(message);
      try {
        if (!this.#seat) await within(this.#limit(message), this.#join());
        await this.#sign(message);
        if (!message.done) this.#settle(message, message.resolve, await this.#publish(message));
      } catch (error) {
        // The bus has lost its key, or is signed from now on.
        const stranger = ["signature_wrong", "signature_missing"].includes(error.code) && !rejoined;
        rejoined = stranger;
        if (stranger) {
          this.#seat = undefined;
          continue;
        }
        message.error = error;
        const left = this.#left(message);
        const later = (error.retryAfter ?? 0) * 1_000;
        if (!mayPass(error) || left <= 0 || later > left) return this.#fail(message);
        await this.#pause(Math.max(later, Math.min(left, backOff(failures++, 500))));
      }
    }
  }

  #fail(message) {
    const { done, reject, error } = message;
    this.#settle(message, reject, error);
    if (!done) this.#fire(new Event("error"), { error });
  }

  #settle(message, settle, value) {
    if (message.done) return;
    message.done = true;
    this.#queue.splice(this.#queue.indexOf(message), 1);
    settle(value);
  }

  /** Milliseconds until the message is too late, by the clock that went further: one may be set, one stop in sleep. */
  #left({ given: [date, time], deadline }) {
    return deadline - Math.max(Date.now() - date, performance.now() - time);
  }

  /** Milliseconds for the next try. */
  #limit(message) {
    return Math.max(LEAST, Math.min(TRY, this.#left(message)));
  }

  /** Sends at once, as the page is left and there may be no later. If there is one, what failed is tried again. */
  async #leave(message) {
    // An open bus takes any id; where ids are signed, nothing can leave before the join.
    if (this.#user === undefined) this.#become(randomUser());
    try {
      if (!message.query) await this.#sign(message);
      this.#settle(message, message.resolve, await this.#publish(message));
    } catch (error) {
      message.error = error;
    }
  }

  /** A signature takes a moment, and there is none when a page is left: have one at hand. */
  #signAhead(message) {
    this.#sign(message).catch(() => {}); // is said when it is sent
  }

  /** Makes the query: who sends, what may come but once and, on a signed bus, the proof. */
  async #sign(message) {
    const { body, once } = message;
    const { bus, secret, key } = this.#seat ?? {};
    const user = this.#user;
    let query = `?user=${user}&once=${once}`;
    if (secret) {
      if (!key) {
        const why = "This bus takes only signed messages, and browsers sign only on pages from https or localhost.";
        throw new BusError("insecure_context", why);
      }
      const time = Math.round(Date.now() + this.#skew);
      const text = `${bus}\n${user}\n${time}\n${once}\n${body}`;
      const bytes = new Uint8Array(await crypto.subtle.sign("HMAC", key, utf8(text)));
      const base64 = btoa(String.fromCharCode(...bytes)).replace("=", "");
      query += `&time=${time}&sig=${base64.replaceAll("+", "-").replaceAll("/", "_")}`;
    }
    message.query = query;
  }

  /** One try; who asks for one while it is under way gets the same. */
  #publish(message) {
    return (message.flight ??= this.#post(message).finally(() => (message.flight = undefined)));
  }

  async #post(message) {
    const { body, query } = message;
    const bytes = utf8(body).length;
    const keepalive = keptAlive + bytes <= KEPT_ALIVE;
    if (keepalive) keptAlive += bytes;
    try {
      const init = { method: "POST", body, keepalive };
      const isRight = (published) => isId(published?.id);
      const { json } = await this.#request(query, init, isRight, new AbortController(), this.#limit(message));
      return json.id;
    } finally {
      if (keepalive) keptAlive -= bytes;
    }
  }

  /** Asks, and returns what the reply holds if it is what a bus would say. */
  async #request(query, init, isRight, abort = new AbortController(), limit = GIVE_UP) {
    const timer = setTimeout(() => abort.abort(), limit);
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
    // Of the whole second that it names, the middle.
    const date = Date.parse(reply.headers.get("Date")) + 500;
    if (date) this.#skew = date - Date.now();
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
