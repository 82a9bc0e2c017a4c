const EVENTS = ["open", "message", "messageerror", "missed", "rejoin", "error", "bufferedamountlow", "close"];

/** The URL of a bus, as far as its name. Without one it is the bus that this script was loaded from. */
function busUrl(given) {
  let url = given?.href ?? given; // a URL, or a Location
  if (typeof url !== "string") url = HERE && new URL(".", HERE);
  if (!url) throw new TypeError("MessageBus needs the URL of a bus: this script was not loaded from one");
  const base = globalThis.document?.baseURI ?? globalThis.location?.href;
  return new URL(url, base).href.replace(/[?#].*/, "").replace(/\/+$/, "");
}

/** A bus, in the shape of BroadcastChannel; shortbus.d.ts tells what each member does. */
class MessageBus extends EventTarget {
  #session;
  #outbox;
  #receiver;
  #callbacks = new Map(); // listeners that get the bare data
  #handlers = {}; // onmessage and its like
  #end = new AbortController(); // of all that we listen to

  constructor(url, options) {
    super();
    const ready = [url, options].find((argument) => typeof argument === "function");
    const isOptions = (argument) => argument && typeof argument === "object" && !argument.href;
    const { interval = 500, idleInterval, deadline = 30_000, signal } = [options, url].find(isOptions) ?? {};
    for (const [name, value] of Object.entries({ interval, idleInterval: idleInterval ?? 0, deadline })) {
      if (!(value >= 0)) throw new RangeError(`${name} has to be a number of milliseconds`);
    }

    const fire = (event, properties) => this.dispatchEvent(Object.assign(event, properties));
    const wake = () => {
      this.#receiver.wake();
      this.#outbox.wake();
    };
    const onJoin = (id) => {
      this.#receiver.onJoin(id);
      this.#outbox.onJoin();
    };
    this.#session = new Session(busUrl(url), fire, wake, onJoin);
    this.#outbox = new Outbox(this.#session, deadline, fire);
    this.#receiver = new Receiver(this.#session, { interval, idleInterval }, fire, wake);
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

  #add(data) {
    if (this.#session.closed) throw new DOMException("the bus is closed", "InvalidStateError");
    const sent = this.#outbox.add(data);
    this.#receiver.onSend();
    return sent;
  }

  close() {
    if (this.#session.closed) return;
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
    this.#receiver.onPageHide();
  }

  /** What was under way belongs to a page that stood still in the browser's cache: Firefox never ends it. */
  #onPageShow(wasCached) {
    if (wasCached) this.#session.abandon();
    this.#outbox.onPageShow();
    this.#receiver.onPageShow();
  }
}
