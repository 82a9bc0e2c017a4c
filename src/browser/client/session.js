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
    return fetch(this.url + query, { cache: "no-store", ...init });
  }

  /** Sends a request, and returns the JSON and the headers of a valid reply. */
  async request(query, { isValid, timeout, abort = new AbortController(), ...init }) {
    const timer = setTimeout(() => abort.abort(), timeout);
    let reply;
    let text;
    try {
      reply = await this.fetch(query, { signal: abort.signal, ...init });
      text = await reply.text();
    } catch (cause) {
      throw new BusError("network", `The bus cannot be reached: ${cause.message}`);
    } finally {
      clearTimeout(timer);
    }
    return { json: this.parse(reply, text, isValid), headers: reply.headers };
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
      const retryAfter = Number(headers.get("Retry-After")) || 0;
      throw Object.assign(error, { status, retryAfter, element: json?.element });
    }
    if (!isValid(json)) throw new BusError("not_a_bus", "What answered is no bus: its reply is not what a bus says.");
    return json;
  }
}
