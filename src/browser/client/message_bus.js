const EVENTS = [
  "open", "message", "messageerror", "missed", "rejoin", "error", "bufferedamountlow", "presence", "close",
];

/** The URL of a bus, as far as its name. Without one it is the bus that this script was loaded from. */
function busUrl(given) {
  let url = given?.href ?? given; // a URL, or a Location
  if (typeof url !== "string") url = HERE && new URL(".", HERE);
  if (!url) throw new TypeError("MessageBus needs the URL of a bus: this script was not loaded from one");
  const base = globalThis.document?.baseURI ?? globalThis.location?.href;
  // fetch takes no URL with a password, and shows it to nobody.
  const { href } = Object.assign(new URL(url, base), { username: "", password: "", search: "", hash: "" });
  return href.replace(/\/+$/, "");
}

/** Throws where an option cannot be meant. */
function checkOptions({ interval = 0, idleInterval = 0, deadline = 0, user, after, identity, headers }) {
  for (const [name, value] of Object.entries({ interval, idleInterval, deadline })) {
    if (!(value >= 0)) throw new RangeError(`${name} has to be a number of milliseconds`);
  }
  for (const [name, value] of Object.entries({ user, after })) {
    if (value !== undefined && !isId(value)) throw new RangeError(`${name} has to be a whole number from 0 to 2^53-1`);
  }
  if (identity !== undefined && !STORAGES[identity]) throw new RangeError('identity has to be "tab" or "browser"');
  if (identity && user !== undefined) throw new TypeError("take one of the options identity and user, not both");
  new Headers(headers); // throws where there can be none like these
}

/** A bus, in the shape of BroadcastChannel; shortbus.d.ts tells what each member does. */
class MessageBus extends EventTarget {
  #session;
  #outbox;
  #receiver;
  #presence; // once the page has asked for it
  #fire;
  #callbacks = new Map(); // listeners that get the bare data
  #handlers = {}; // onmessage and its like
  #end = new AbortController(); // of all that we listen to

  constructor(url, options) {
    super();
    const ready = [url, options].find((argument) => typeof argument === "function");
    const isOptions = (argument) => argument && typeof argument === "object" && !argument.href;
    const given = [options, url].find(isOptions) ?? {};
    checkOptions(given);
    const { interval = 500, deadline = 30_000, signal } = given;

    const fire = (event, properties) => this.dispatchEvent(Object.assign(event, properties));
    this.#fire = fire;
    const wake = () => {
      this.#receiver.wake();
      this.#outbox.wake();
    };
    const onJoin = (id) => {
      this.#receiver.onJoin(id);
      this.#outbox.onJoin();
    };
    this.#session = new Session(busUrl(url), given, fire, wake, onJoin);
    this.#outbox = new Outbox(this.#session, deadline, fire);
    this.#receiver = new Receiver(this.#session, { ...given, interval }, fire, wake);
    if (ready) this.addEventListener("open", () => ready.call(this, this), { once: true });
    for (const type of EVENTS) this.#addHandler(type);
    this.#listen(signal);
    // The caller gets to listen first.
    queueMicrotask(() => (signal?.aborted ? this.#abort(signal.reason) : this.#receiver.run()));
  }

  get name() {
    const name = this.url.slice(this.url.lastIndexOf("/") + 1);
    try {
      return decodeURIComponent(name);
    } catch {
      return name; // not UTF-8
    }
  }

  get url() {
    return this.#session.url;
  }

  get user() {
    return this.#session.user;
  }

  get lastId() {
    return this.#receiver.lastId;
  }

  get connected() {
    return this.#session.connected;
  }

  get transport() {
    return this.#receiver.transport;
  }

  get bufferedAmount() {
    return this.#outbox.bufferedAmount;
  }

  get bufferedAmountLowThreshold() {
    return this.#outbox.lowThreshold;
  }

  set bufferedAmountLowThreshold(bytes) {
    if (!(bytes >= 0)) throw new RangeError("bufferedAmountLowThreshold has to be a number of bytes");
    this.#outbox.lowThreshold = bytes;
  }

  postMessage(data) {
    this.#add(data).catch(() => {});
  }

  async send(data) {
    return this.#add(data);
  }

  present(data) {
    if (this.#session.closed) throw new DOMException("the bus is closed", "InvalidStateError");
    if (!this.#presence) {
      this.#presence = new Presence(this.#session, this.#outbox, this.#receiver, this.#fire);
      this.#receiver.presence = this.#presence;
      super.addEventListener("open", () => this.#presence.tick());
      super.addEventListener("missed", () => this.#presence.onMissed());
      super.addEventListener("rejoin", () => this.#presence.onRejoin());
    }
    this.#presence.present(data);
  }

  get others() {
    return this.#presence?.others ?? new Map();
  }

  #add(data) {
    if (this.#session.closed) throw new DOMException("the bus is closed", "InvalidStateError");
    const sent = this.#outbox.add(data);
    this.#receiver.onSend();
    return sent;
  }

  close() {
    if (this.#session.closed) return;
    this.#presence?.close();
    this.#session.close();
    this.#receiver.close(this.#session.isJoining && !this.#outbox.isEmpty);
    this.#outbox.close().then(() => this.#end.abort());
    this.dispatchEvent(new Event("close"));
  }

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

  [Symbol.asyncIterator]() {
    const events = [];
    const waiting = [];
    const end = new AbortController();
    let ended = this.#session.closed;
    const settle = () => {
      while (waiting.length && (events.length || ended)) {
        waiting.shift()({ done: !events.length, value: events.shift() });
      }
    };
    const onEvent = (event) => {
      if (event.type === "close") ended = true;
      else events.push(event);
      settle();
    };
    for (const type of ["message", "close"]) super.addEventListener(type, onEvent, { signal: end.signal });
    const next = (resolve) => {
      waiting.push(resolve);
      settle();
    };
    return {
      next: () => new Promise(next),
      return: async () => {
        end.abort();
        ended = true;
        events.length = 0;
        settle();
        return { done: true, value: undefined };
      },
    };
  }

  /** `onmessage` and its like: a property that holds one listener. */
  #addHandler(type) {
    super.addEventListener(type, (event) => this.#handlers[type]?.call(this, event));
    Object.defineProperty(this, `on${type}`, {
      get: () => this.#handlers[type] ?? null,
      set: (listener) => (this.#handlers[type] = typeof listener === "function" ? listener : null),
    });
  }

  #abort(reason) {
    this.#outbox.abort(reason);
    this.close();
  }

  /** Timers sleep with the machine, and nearly so in hidden pages: each of these events may be the end of a sleep. */
  #listen(signal) {
    const listen = (target, type, act) => target?.addEventListener?.(type, act, { signal: this.#end.signal });
    const { document } = globalThis;
    listen(globalThis, "online", () => this.#receiver.onOnline());
    listen(document, "visibilitychange", () => this.#onVisibilityChange(!document.hidden));
    // A page stands still in the browser's cache as a frozen one does.
    listen(globalThis, "pagehide", (event) => this.#onPageHide(event.isTrusted && !document.hidden));
    listen(document, "freeze", () => this.#onPageHide(false));
    listen(globalThis, "pageshow", ({ persisted }) => this.#onPageShow(persisted));
    listen(document, "resume", () => this.#onPageShow());
    listen(signal, "abort", () => this.#abort(signal.reason));
  }

  #onVisibilityChange(isVisible) {
    if (!isVisible) this.#outbox.onHidden();
    this.#receiver.onVisibilityChange(isVisible);
  }

  /** Browsers tell a visible page that it is left first, and then that it is hidden. */
  #onPageHide(isHiddenNext) {
    this.#outbox.onPageHide(isHiddenNext);
    this.#presence?.onPageHide();
    this.#receiver.onPageHide();
  }

  /** What was under way belongs to a page that stood still in the browser's cache: Firefox never ends it. */
  #onPageShow(wasCached) {
    if (wasCached) this.#session.abandon();
    this.#outbox.onPageShow();
    this.#receiver.onPageShow();
    this.#presence?.onPageShow();
  }
}
