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
const HEARTBEAT = 15_000; // milliseconds after which a stream with no news says so
const SILENCE = 2.5 * HEARTBEAT; // milliseconds, after which a stream is taken for dead
const BUFFERED = 5_000; // milliseconds until a stream is given up of which nothing came
const SOON = 10_000; // milliseconds; a stream that ends before was cut
const HOLD = 25; // seconds for which a poll is held: many a proxy cuts what takes 30
const [STREAM, LONG, PLAIN] = [0, 1, 2]; // ways to hear
const STRIKES = 3; // failures of a way, while plain polls work, until the next way is taken
const AGAIN = 300_000; // milliseconds until the best way is tried again
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

/** Reads server-sent events (WHATWG HTML, section 9.2.6) from text that comes in pieces, cut anywhere. */
function eventReader(dispatch) {
  let rest = "";
  let returned = false; // the last piece ended with CR: an LF belongs to it
  let [type, data, id] = ["", [], ""];
  return (text) => {
    if (!text) return;
    if (returned && text[0] === "\n") text = text.slice(1);
    returned = text.endsWith("\r");
    const lines = (rest + text).split(/\r\n|\r|\n/);
    rest = lines.pop();
    for (const line of lines) {
      const [, field, value] = /^([^:]*):? ?(.*)/s.exec(line);
      if (field === "event") type = value;
      else if (field === "data") data.push(value);
      else if (field === "id" && !value.includes("\0")) id = value;
      if (line) continue;
      if (data.length) dispatch(type || "message", data.join("\n"), id);
      [type, data] = ["", []];
    }
  };
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
  #offer = {}; // by the latest join: whether there are streams, seconds that a poll may wait
  #transport;
  #best = STREAM; // the best way that works
  #again = Infinity; // when better ones are tried again
  #strikes = 0;
  #doubt = 0; // strikes, if a plain poll works
  #alone = !globalThis.navigator?.locks; // no connection can be shared by tabs
  #channel; // of those that share one
  #resignation; // ends our part
  #leads = false; // we have the connection
  #told = []; // what the one that has it said
  #current = false; // nothing came but what was told
  #heardAt; // when that one said something, or our own stream
  #poll; // aborts the request that polls
  #nudge; // ends its pause
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
    listen(globalThis, "online", () => {
      this.#allow(STREAM);
      this.#pollNow();
    });
    listen(globalThis.document, "visibilitychange", () => this.#seen(!document.hidden));
    // In the browser's cache a page stands still, as a frozen one does.
    listen(globalThis, "pagehide", () => this.#goAway());
    listen(globalThis.document, "freeze", () => this.#goAway());
    listen(globalThis, "pageshow", () => this.#comeBack());
    listen(globalThis.document, "resume", () => this.#comeBack());
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

  /** The way by which it hears: "stream", "long-poll", "poll", or "tab": by another tab, which has the connection. */
  get transport() {
    return this.#transport;
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
    this.#resign();
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

  /** Joins and hears until it is closed: one request at a time. */
  async #run() {
    while (!this.#closed) {
      let pause = this.#interval;
      this.#hurry = false;
      this.#poll = new AbortController();
      try {
        if (this.#lastId === undefined) {
          await this.#join(this.#poll);
          if (this.#offer.wait) pause = 0;
        } else {
          pause = this.#leaving ? Infinity : await this.#hear();
        }
        this.#failures = 0;
      } catch (error) {
        if (this.#closed) break;
        if (this.#hurry) continue;
        this.#doubt = 0;
        this.#current = this.#connected = false;
        this.#tell(this.#leads, { best: this.#best });
        this.#fire(new Event("error"), { error });
        pause = Math.max(backOff(this.#failures++, Math.max(500, this.#interval)), (error.retryAfter ?? 0) * 1_000);
      }
      this.#poll = undefined;
      if (pause && !this.#closed) await this.#pause(pause, (wake) => (this.#nudge = wake));
    }
  }

  async #pause(milliseconds, given) {
    let wake;
    let timer;
    await new Promise((resolve) => {
      this.#wakes.add((wake = resolve));
      given?.(wake);
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
    this.#current = false;
    this.#doubt = 0;
    this.#poll?.abort();
    this.#wake();
  }

  #seen(visible) {
    const lives = this.#transport === "stream" && !this.#failures && Date.now() - this.#heardAt < 1.5 * HEARTBEAT;
    // A hidden page that cannot share a connection gives its own up.
    if (visible ? !lives : this.#alone && this.#offer.wait) this.#pollNow();
  }

  #goAway() {
    this.#leaving = true;
    for (const message of this.#queue) this.#leave(message);
    this.#resign();
    if (this.#lastId !== undefined) this.#pollNow();
  }

  #comeBack() {
    if (!this.#leaving) return;
    this.#leaving = false;
    this.#pollNow();
  }

  /** Joins: once, however many wait for it. */
  #join(abort) {
    return (this.#joining ??= this.#sitDown(abort).finally(() => (this.#joining = undefined)));
  }

  async #sitDown(abort) {
    const { json } = await this.#request("", {}, (join) => isId(join?.user) && isId(join?.id), abort, TRY);
    const { user, id, bus, secret, wait, stream } = json;
    this.#offer = { wait: Math.min(wait, HOLD) || 0, stream };
    this.#allow(STREAM);
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

  /** Hears what is new: the pause until it is to hear again. */
  async #hear() {
    if (Date.now() > this.#again) this.#allow(STREAM);
    const { wait, stream } = this.#offer;
    const way = wait ? Math.max(this.#best, stream ? STREAM : LONG) : PLAIN;
    if (way === PLAIN) this.#resign();
    else if (!this.#alone) this.#stand();
    if (this.#channel && !this.#leads) return this.#follow();
    const holds = way !== PLAIN && (this.#leads || !globalThis.document?.hidden);
    if (!holds || this.#failures || this.#doubt) {
      const more = await this.#ask();
      this.#strike(this.#doubt, way);
      this.#doubt = 0;
      if (!holds) this.#transport = "poll";
      return holds || more ? 0 : this.#interval;
    }
    const [start, before] = [Date.now(), this.#lastId];
    try {
      if (way === STREAM) return await this.#stream(start);
      this.#transport = "long-poll";
      await this.#ask(wait);
    } catch (error) {
      // What the bus itself says is an error. Whether the rest is the way's fault, a plain poll tells.
      if (this.#closed || this.#hurry || (error.status && error.code !== "http")) throw error;
      this.#doubt ||= 1;
      return 0;
    }
    const held = this.#lastId !== before || Date.now() - start > wait * 500;
    if (held) this.#strikes = 0;
    else this.#strike(1, way);
    return held ? 0 : this.#interval;
  }

  #strike(strikes, way) {
    this.#strikes += strikes;
    if (this.#strikes < STRIKES) return;
    this.#allow(way + 1);
    this.#tell(this.#leads, { best: this.#best });
  }

  #allow(best) {
    this.#best = best;
    this.#again = best ? Date.now() + AGAIN : Infinity;
    this.#strikes = 0;
  }

  /** Whose messages are left out: nobody's, where others want to hear ours. */
  #who() {
    return this.#leads ? "" : `user=${this.#user}&`;
  }

  /** Polls once; whether there may be more at once. */
  async #ask(wait) {
    const leads = this.#leads;
    const query = `?${this.#who()}id=${this.#lastId}${wait ? `&wait=${wait}` : ""}`;
    const isPage = (list) => Array.isArray(list) && list.every((message) => isId(message?.id));
    const limit = wait ? wait * 1_000 + TRY : GIVE_UP;
    const { json: messages, headers } = await this.#request(query, {}, isPage, this.#poll, limit);
    const last = Number(headers.get("Shortbus-Last-Id"));
    this.#take({ messages, missed: headers.has("Shortbus-Missed"), last }, leads);
    return messages.length >= 100;
  }

  /** Hears an event stream to its end: the pause until the next one. */
  async #stream(start) {
    const [leads, abort] = [this.#leads, this.#poll];
    let timer;
    const expect = (milliseconds, strikes) => {
      clearTimeout(timer);
      timer = setTimeout(() => {
        this.#doubt = strikes;
        abort.abort();
      }, milliseconds);
    };
    let page = { messages: [] };
    const take = () => {
      // What was missed belongs to what comes next.
      if (page.missed && !page.last) return;
      this.#take(page, leads);
      page = { messages: [] };
    };
    const read = eventReader((type, data, id) => {
      if (type === "missed") {
        take();
        page.missed = true;
      } else if (type === "message" || type === "cursor") {
        page.last = Number(id);
        if (type === "message") page.messages.push(JSON.parse(data));
      }
    });
    let lived = false;
    expect(BUFFERED, STRIKES);
    try {
      const init = { cache: "no-store", signal: abort.signal };
      const reply = await fetch(`${this.#url}?${this.#who()}id=${this.#lastId}&stream=1`, init);
      if (!reply.ok) this.#read(reply, await reply.text());
      if (!reply.headers.get("Content-Type")?.startsWith("text/event-stream")) {
        this.#doubt = STRIKES;
        throw new Error("no stream");
      }
      const [reader, decoder] = [reply.body.getReader(), new TextDecoder()];
      for (let chunk; !(chunk = await reader.read()).done; ) {
        expect(SILENCE, 1);
        this.#heardAt = Date.now();
        this.#transport = "stream";
        if ((lived ||= this.#heardAt - start > SOON)) this.#strikes = 0;
        read(decoder.decode(chunk.value, { stream: true }));
        take();
      }
      if (!lived) throw new Error("cut");
    } catch (error) {
      if (!lived || this.#hurry) throw error;
    } finally {
      clearTimeout(timer);
      abort.abort();
    }
    return backOff(0, 500);
  }

  /** Delivers what is new; who leads tells the others, also that there was nothing. */
  #take(page, leads) {
    if (this.#closed) return;
    this.#tell(leads, { from: this.#lastId, ...page });
    this.#opened();
    // Where the counter was lost, ids may be lower than before; else a lower one is an old reply from some cache.
    const { messages, missed, last } = page;
    if (missed) this.#fire(new Event("missed"));
    const passed = missed ? -1 : this.#lastId;
    const origin = new URL(this.#url).origin;
    for (const { id, user, data } of messages) {
      if (id <= passed) continue;
      this.#lastId = id;
      if (this.#users.has(user)) continue; // sent as whom we were before
      this.#fire(new MessageEvent("message", { data, lastEventId: String(id), origin }), { user });
      if (this.#closed) return;
    }
    if (last > 0 && last > (missed ? 0 : this.#lastId)) this.#lastId = last;
  }

  // Browsers have six connections to a server, for all tabs. So one of them, by a lock, has the one that waits, and tells
  // the others what it hears. Each has its own cursor, and polls if that is not where the news begins.

  #tell(leads, news) {
    if (leads) this.#channel?.postMessage(news);
  }

  /** Stands for the lead. */
  #stand() {
    if (this.#channel) return;
    const name = `shortbus ${this.#url}`;
    const { signal } = (this.#resignation = new AbortController());
    this.#current = false;
    this.#heardAt = Date.now();
    this.#channel = new BroadcastChannel(name);
    this.#channel.onmessage = ({ data }) => this.#hearSay(data);
    const lead = () =>
      new Promise((resolve) => {
        if (signal.aborted) return resolve();
        signal.addEventListener("abort", resolve);
        this.#leads = true;
        this.#nudge?.();
      });
    navigator.locks.request(name, { signal }, lead).catch(() => {
      if (signal.aborted) return;
      this.#alone = true; // in a sandbox
      this.#resign();
      this.#pollNow();
    });
  }

  #resign() {
    this.#channel?.close();
    this.#resignation?.abort();
    this.#channel = undefined;
    this.#leads = false;
  }

  #isSilent() {
    return Date.now() - this.#heardAt > SILENCE;
  }

  /** The one that leads has heard something, or cannot. */
  #hearSay(news) {
    const wasSilent = this.#isSilent();
    this.#heardAt = news.messages ? Date.now() : -Infinity;
    if (news.messages) this.#told.push(news);
    else this.#allow(news.best);
    // Polls that fail have their pauses.
    if (wasSilent || !this.#failures) this.#nudge?.();
  }

  /** Takes what was told; polls where there is a gap, and while nothing is told. */
  async #follow() {
    const silent = this.#isSilent();
    if (silent || !this.#current) {
      this.#told = []; // the poll says it too
      const more = await this.#ask();
      this.#current = !more;
      if (silent) this.#transport = "poll";
      return more || this.#leads || !this.#isSilent() ? 0 : this.#interval;
    }
    this.#transport = "tab";
    while (this.#current && this.#told.length) {
      const news = this.#told.shift();
      if (news.missed || news.from > this.#lastId) this.#current = false;
      else this.#take(news);
    }
    return this.#current ? SILENCE : 0;
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
    return { json: this.#read(reply, text, isRight), headers: reply.headers };
  }

  /** What a reply holds. */
  #read(reply, text, isRight) {
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
    return json;
  }
}
