const MIN_TIMEOUT = 1_000; // milliseconds that a try gets, however late the message is
const KEEPALIVE_BYTES = 60_000; // browsers keep 64 KiB of a page's requests alive when it is left
let keptAlive = 0; // bytes under way now, of all buses

/** An idempotency key of 128 random bits: the bus knows by it all tries of a message. */
function newOnce() {
  const parts = new Uint32Array(4).map(() => Math.random() * 2 ** 32);
  globalThis.crypto?.getRandomValues(parts); // Node 18 has no global crypto
  return Array.from(parts, (part) => part.toString(36)).join("-");
}

/** Sends messages one at a time, in order. Each is tried until it is delivered, refused or late. */
class Outbox {
  #session;
  #deadline;
  #fire;
  #queue = []; // the first is being sent
  #draining; // a promise of the queue's end
  #pause = new Pause();
  #leaving = false; // the page is being left: there may be no later

  constructor(session, deadline, fire) {
    this.#session = session;
    this.#deadline = deadline;
    this.#fire = fire;
  }

  get isEmpty() {
    return !this.#queue.length;
  }

  /** Takes a message: a promise of its id. */
  add(data) {
    // We serialize at once: the caller may change the object later.
    const body = JSON.stringify(data);
    if (body === undefined) throw new DOMException("only what JSON can express can be sent", "DataCloneError");
    return new Promise((resolve, reject) => {
      const addedAt = [Date.now(), performance.now()];
      const message = { body, once: newOnce(), addedAt, deadline: this.#deadline, resolve, reject };
      this.#queue.push(message);
      if (this.#session.credentials) this.#signAhead(message);
      if (this.#leaving) this.#sendNow(message);
      this.#drain();
    });
  }

  /** Sends what waits without a pause: a promise of its end. */
  close() {
    this.wake();
    return this.#drain();
  }

  /** Drops what has not left. */
  abort(reason) {
    for (const message of [...this.#queue]) {
      // A try under way may arrive. Its reply decides, and no other try follows.
      if (message.flight) Object.assign(message, { error: reason, deadline: -Infinity });
      else this.#settle(message, message.reject, reason);
    }
  }

  wake() {
    this.#pause.end();
  }

  /** A signature takes a moment, which a page that is left does not have: each is made ahead. */
  onJoin() {
    for (const message of this.#queue) this.#signAhead(message);
  }

  onPageHide() {
    this.#leaving = true;
    for (const message of this.#queue) this.#sendNow(message);
  }

  onPageShow() {
    this.#leaving = false;
  }

  #drain() {
    return (this.#draining ??= this.#sendAll());
  }

  async #sendAll() {
    await undefined; // the receiver's join goes first
    while (this.#queue.length) await this.#send(this.#queue[0]);
    this.#draining = undefined;
  }

  async #send(message) {
    let failures = 0;
    let rejoined = false; // right before this try
    while (!message.done) {
      // After a sleep the bus may have forgotten the earlier tries, and would publish the message twice.
      if (message.error && this.#remaining(message) <= -MIN_TIMEOUT) return this.#fail(message);
      try {
        if (!this.#session.credentials) await withTimeout(this.#timeout(message), this.#session.join());
        await this.#sign(message);
        if (!message.done) this.#settle(message, message.resolve, await this.#try(message));
      } catch (error) {
        const isStranger = ["signature_wrong", "signature_missing"].includes(error.code);
        rejoined = isStranger && !rejoined;
        if (rejoined) {
          this.#session.dropCredentials();
          continue;
        }
        message.error = error;
        const remaining = this.#remaining(message);
        const retryAfter = (error.retryAfter ?? 0) * 1_000;
        if (!isTransient(error) || remaining <= 0 || retryAfter > remaining) return this.#fail(message);
        await this.#pause.wait(Math.max(retryAfter, Math.min(remaining, backOff(failures++, 500))));
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

  /** Milliseconds to the deadline, by the clock that went further: one may be set, the other may stop in sleep. */
  #remaining({ addedAt: [date, time], deadline }) {
    return deadline - Math.max(Date.now() - date, performance.now() - time);
  }

  /** Milliseconds for the next try. */
  #timeout(message) {
    return Math.max(MIN_TIMEOUT, Math.min(REQUEST_TIMEOUT, this.#remaining(message)));
  }

  /** Sends without waiting for its turn, as the page is left. If the page comes back, what failed is tried again. */
  async #sendNow(message) {
    this.#session.ensureUser();
    try {
      if (!message.query) await this.#sign(message);
      this.#settle(message, message.resolve, await this.#try(message));
    } catch (error) {
      message.error = error;
    }
  }

  #signAhead(message) {
    this.#sign(message).catch(() => {}); // it fails again when the message is sent
  }

  /** Makes the query: the sender, the idempotency key and, on a signed bus, the signature. */
  async #sign(message) {
    const { body, once } = message;
    const { user, credentials } = this.#session;
    let query = `?user=${user}&once=${once}`;
    if (credentials?.secret) {
      const { bus, key } = credentials;
      if (!key) {
        const why = "This bus takes only signed messages, and browsers sign only on pages from https or localhost.";
        throw new BusError("insecure_context", why);
      }
      const time = this.#session.now();
      const text = `${bus}\n${user}\n${time}\n${once}\n${body}`;
      const bytes = new Uint8Array(await crypto.subtle.sign("HMAC", key, utf8(text)));
      const base64 = btoa(String.fromCharCode(...bytes)).replace("=", "");
      query += `&time=${time}&sig=${base64.replaceAll("+", "-").replaceAll("/", "_")}`;
    }
    message.query = query;
  }

  /** Tries once. If a try is under way, this is the same one. */
  #try(message) {
    return (message.flight ??= this.#post(message).finally(() => (message.flight = undefined)));
  }

  async #post(message) {
    const { body, query } = message;
    const bytes = utf8(body).length;
    const keepalive = keptAlive + bytes <= KEEPALIVE_BYTES;
    if (keepalive) keptAlive += bytes;
    try {
      const isValid = (published) => isId(published?.id);
      const request = { method: "POST", body, keepalive, isValid, timeout: this.#timeout(message) };
      const { json } = await this.#session.request(query, request);
      return json.id;
    } finally {
      if (keepalive) keptAlive -= bytes;
    }
  }
}
