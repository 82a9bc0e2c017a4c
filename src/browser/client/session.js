const LONG_POLL_SECONDS = 25; // many a proxy cuts a request after 30
const isId = Number.isSafeInteger;
const utf8 = (text) => new TextEncoder().encode(text);

/** Joins the bus, and makes all requests to it. Knows who we are, whether the bus answers, and its clock. */
class Session {
  url;
  user; // undefined until the bus is joined
  offer; // by the latest join: whether there are streams, for how many seconds a poll may wait, messages of a batch
  credentials; // by the latest join: on a signed bus its name and the secret
  connected = false; // the latest poll was answered
  closed = false;
  #users = new Set(); // this one and all former ones
  #joining; // the join under way
  #clockOffset = 0; // milliseconds that the server's clock is ahead of ours
  #underWay = new Set(); // what ends each request under way
  #fire;
  #wake;
  #onJoin;

  constructor(url, fire, wake, onJoin) {
    this.url = url;
    this.#fire = fire;
    this.#wake = wake;
    this.#onJoin = onJoin;
  }

  close() {
    this.closed = true;
    this.connected = false;
  }

  setConnected(connected) {
    if (this.connected === connected || this.closed) return;
    this.connected = connected;
    if (!connected) return;
    this.#wake();
    this.#fire(new Event("open"));
  }

  get isJoining() {
    return !!this.#joining;
  }

  /** Joins. All who wait for a join share one. */
  join(abort) {
    return (this.#joining ??= this.#requestJoin(abort).finally(() => (this.#joining = undefined)));
  }

  async #requestJoin(abort) {
    const isValid = (join) => isId(join?.user) && isId(join?.id);
    const { json } = await this.request("", { isValid, timeout: REQUEST_TIMEOUT, abort });
    const { user, id, bus, secret, wait, stream, batch } = json;
    const hmac = { name: "HMAC", hash: "SHA-256" };
    const key = secret && (await globalThis.crypto?.subtle?.importKey("raw", utf8(secret), hmac, false, ["sign"]));
    const again = this.offer;
    this.offer = { wait: Math.min(wait, LONG_POLL_SECONDS) || 0, stream, batch: isId(batch) ? batch : 1 };
    this.credentials = { bus, secret, key };
    // An open bus lets us stay who we are.
    if (secret || this.user === undefined) this.#setUser(user);
    this.#onJoin(id);
    if (again && this.user === user && !this.closed) this.#fire(new Event("rejoin"), { user });
    this.setConnected(true);
  }

  /** Makes the next try of a message join again: the bus has lost its key, or is signed from now on. */
  dropCredentials() {
    this.credentials = undefined;
  }

  /** Makes a user up where there has been no join: an open bus takes any id. */
  ensureUser() {
    if (this.user === undefined) this.#setUser(Math.floor(Math.random() * Number.MAX_SAFE_INTEGER));
  }

  #setUser(user) {
    this.user = user;
    this.#users.add(user);
  }

  /** Whether we are this user, or were. */
  isOwn(user) {
    return this.#users.has(user);
  }

  /** The time by the server's clock. */
  now() {
    return Math.round(Date.now() + this.#clockOffset);
  }

  fetch(query, init) {
    return fetch(this.url + (init.method ? query : this.#fresh(query)), { cache: "no-store", ...init });
  }

  /** A service worker may answer from its own cache what it has seen before: under one, each request is another. */
  #fresh(query) {
    // A worker is not told of the service worker that it has.
    const isServed = attempt(() => navigator.serviceWorker?.controller) || globalThis.WorkerGlobalScope;
    return isServed ? `${query}${query ? "&" : "?"}fresh=${Math.random().toString(36).slice(2)}` : query;
  }

  /** Ends all requests under way: they belong to a page that stood still, and may never settle. */
  abandon() {
    for (const abort of this.#underWay) abort.abort(new Error("the page stood still"));
  }

  /** Sends a request, and returns the JSON and the headers of a valid reply. */
  async request(query, { isValid, timeout, abort = new AbortController(), ...init }) {
    const { signal } = abort;
    const timer = setTimeout(() => abort.abort(new Error("it does not answer")), timeout);
    this.#underWay.add(abort);
    let reply;
    let text;
    try {
      reply = await orAborted(signal, this.fetch(query, { signal, ...init }));
      text = await orAborted(signal, reply.text());
    } catch (cause) {
      throw new BusError("network", `The bus cannot be reached: ${cause.message}`);
    } finally {
      clearTimeout(timer);
      this.#underWay.delete(abort);
    }
    return { json: this.parse(reply, text, isValid), headers: reply.headers, length: text.length };
  }

  /** The seconds that a Retry-After header asks for (RFC 9110 section 10.2.3): a number, or a date of the server's. */
  #retryAfter(text) {
    const seconds = /^\d+$/.test(text) ? Number(text) : Math.ceil((Date.parse(text) - this.now()) / 1_000);
    return Math.max(0, seconds || 0);
  }

  /** Returns a valid reply's JSON; any other reply is an error. */
  parse(reply, text, isValid) {
    // The header names a whole second: we take its middle.
    const date = Date.parse(reply.headers.get("Date")) + 500;
    if (date) this.#clockOffset = date - Date.now();
    let json;
    try {
      json = JSON.parse(text);
    } catch {
      if (reply.ok) this.#fire(new MessageEvent("messageerror", { data: text }));
    }
    const { status, headers } = reply;
    if (!reply.ok) {
      const error = new BusError(json?.error ?? "http", json?.message ?? `The web server answered ${status}.`);
      const retryAfter = this.#retryAfter(headers.get("Retry-After"));
      throw Object.assign(error, { status, retryAfter, element: json?.element });
    }
    if (!isValid(json)) throw new BusError("not_a_bus", "What answered is no bus: its reply is not what a bus says.");
    return json;
  }
}
