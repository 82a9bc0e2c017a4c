const KEEPALIVE_BYTES = 60_000; // browsers keep 64 KiB of a page's requests alive when it is left
let keptAlive = 0; // bytes under way now, of all buses

/** Bytes that another request may have, and outlive the page. */
const keepaliveRoom = () => KEEPALIVE_BYTES - keptAlive;

/** An idempotency key of 128 random bits: the bus knows by it all tries of a request. */
function newOnce() {
  const parts = new Uint32Array(4).map(() => Math.random() * 2 ** 32);
  globalThis.crypto?.getRandomValues(parts); // Node 18 has no global crypto
  return Array.from(parts, (part) => part.toString(36)).join("-");
}

/** What leaves in one request: a message, or an array of several. Each try is the same. */
class Batch {
  messages;
  bytes;
  error; // of the latest try
  #session;
  #body;
  #once = newOnce();
  #query;
  #flight; // the try under way

  constructor(session, messages) {
    this.#session = session;
    this.messages = messages;
    const bodies = messages.map(({ body }) => body);
    this.#body = this.#isLone ? bodies[0] : `[${bodies.join(",")}]`;
    this.bytes = utf8(this.#body).length;
  }

  get #isLone() {
    return this.messages.length === 1;
  }

  get isDone() {
    return this.messages.every(({ done }) => done);
  }

  get isUnderWay() {
    return !!this.#flight;
  }

  get isSigned() {
    return !!this.#query;
  }

  /** Makes the query: the sender, the idempotency key and, on a signed bus, the signature. */
  async sign() {
    const { user, credentials } = this.#session;
    const batch = this.#isLone ? "" : "batch=1";
    let query = `?user=${user}&once=${this.#once}${batch && `&${batch}`}`;
    if (credentials?.secret) {
      const { bus, key } = credentials;
      if (!key) {
        const why = "This bus takes only signed messages, and browsers sign only on pages from https or localhost.";
        throw new BusError("insecure_context", why);
      }
      const time = this.#session.now();
      const text = `${bus}\n${user}\n${time}\n${this.#once}\n${batch && `${batch}\n`}${this.#body}`;
      const bytes = new Uint8Array(await crypto.subtle.sign("HMAC", key, utf8(text)));
      const base64 = btoa(String.fromCharCode(...bytes)).replace("=", "");
      query += `&time=${time}&sig=${base64.replaceAll("+", "-").replaceAll("/", "_")}`;
    }
    this.#query = query;
  }

  /** Tries once: a promise of the messages' ids. If a try is under way, this is the same one. */
  try(timeout) {
    return (this.#flight ??= this.#post(timeout).finally(() => (this.#flight = undefined)));
  }

  async #post(timeout) {
    const keepalive = this.bytes <= keepaliveRoom();
    try {
      return await this.#request(timeout, keepalive);
    } catch (error) {
      // The page may have other requests that are kept alive: then browsers refuse ours at once.
      if (!keepalive || error.cause?.name !== "TypeError" || !globalThis.location) throw error;
      return this.#request(timeout, false);
    }
  }

  async #request(timeout, keepalive) {
    if (keepalive) keptAlive += this.bytes;
    try {
      const isValid = (published) => this.#ids(published).every(isId);
      const request = { method: "POST", body: this.#body, keepalive, isValid, timeout };
      const { json } = await this.#session.request(this.#query, request);
      return this.#ids(json);
    } finally {
      if (keepalive) keptAlive -= this.bytes;
    }
  }

  /** The messages' ids in a reply: undefined where it has none. */
  #ids(published) {
    return this.messages.map((_, at) => (this.#isLone ? published?.id : published?.ids?.[at]));
  }
}
