const LONG_POLL_SECONDS = 25; // many a proxy cuts a request after 30
const LOGIN_TIMEOUT = 300_000; // milliseconds that a user gets to fill in a login box
const LOGIN_PAUSE = 300; // seconds until the next box, where that one was cancelled
const isId = (id) => Number.isSafeInteger(id) && id >= 0;
const utf8 = (text) => new TextEncoder().encode(text);

/** Joins the bus, and makes all requests to it. Knows who we are, whether the bus answers, and its clock. */
class Session {
  url;
  user; // undefined until the bus is joined, unless it is given or kept
  offer; // by the latest join: whether there are streams, for how many seconds a poll may wait, messages of a batch
  credentials; // by the latest join: on a signed bus its name and the secret
  isKept = false; // the user is not the latest join's
  connected = false; // the latest poll was answered
  closed = false;
  #target; // the URL that requests go to: where a redirect led the latest join
  #headers;
  #isGiven; // the user is
  #identity;
  #secret; // ours, on a signed bus
  #refused = new Set(); // secrets that the bus no longer knows
  #users = new Set(); // this one and all former ones
  #joining; // the join under way
  #loginCancelled; // the error, and until when no other login box is to come
  #clockOffset = 0; // milliseconds that the server's clock is ahead of ours
  #underWay = new Set(); // what ends each request under way
  #fire;
  #wake;
  #onJoin;

  constructor(url, { user, identity, headers }, fire, wake, onJoin) {
    this.url = this.#target = url;
    this.#isGiven = user !== undefined;
    this.#identity = new Identity(url, identity);
    const kept = this.#identity.kept;
    this.#secret = kept?.secret;
    this.#headers = headers;
    this.#fire = fire;
    this.#wake = wake;
    this.#onJoin = onJoin;
    if (this.#isGiven || kept) this.#setUser(user ?? kept.user);
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

  /** Whether the page's next life will be this user too. */
  get isConstant() {
    return this.#isGiven || !!this.#identity.kind;
  }

  /** Joins. All who wait for a join share one. */
  join(abort) {
    return (this.#joining ??= this.#requestJoin(abort).finally(() => (this.#joining = undefined)));
  }

  async #requestJoin(abort) {
    const [joined] = await Promise.all([this.askToJoin(abort), this.#claim()]);
    const { id, bus, wait, stream, batch } = joined;
    if (joined.secret && this.#isGiven) {
      throw new BusError("signed_bus", "This bus is signed and gives out the users: it takes none by the option 'user'.");
    }
    const chosen = this.#choose(joined);
    const [user, secret] = [chosen.user, joined.secret && chosen.secret];
    const hmac = { name: "HMAC", hash: "SHA-256" };
    const key = secret && (await globalThis.crypto?.subtle?.importKey("raw", utf8(secret), hmac, false, ["sign"]));
    const isRejoin = this.offer && this.user !== user;
    this.offer = { wait: Math.min(wait, LONG_POLL_SECONDS) || 0, stream, batch: isId(batch) ? batch : 1 };
    this.credentials = { bus, secret, key };
    this.isKept = chosen !== joined;
    this.#secret = secret;
    this.#setUser(user);
    this.#identity.kept = { user, secret };
    this.#identity.claim(user);
    this.#onJoin(id);
    if (isRejoin && !this.closed) this.#fire(new Event("rejoin"), { user });
    this.setConnected(true);
  }

  /** Asks for a join, and takes what it gives for nothing yet. */
  async askToJoin(abort) {
    const isValid = (joined) => isId(joined?.user) && isId(joined?.id);
    const ask = async (query) => (await this.request(query, { isValid, timeout: REQUEST_TIMEOUT, abort })).json;
    this.#target = this.url;
    try {
      return await ask("");
    } catch (error) {
      // Some redirects add a slash, behind which the bus has its page: a query tells that we mean the bus.
      const { redirectedTo } = error;
      const isSlash = redirectedTo && new URL(redirectedTo).pathname === `${new URL(this.url).pathname}/`;
      if (!isSlash) throw error;
      this.#target = redirectedTo;
      return ask("?stream=0");
    }
  }

  /** Forgets who we are, if another tab is that. */
  async #claim() {
    const { user } = this;
    if (user === undefined || this.offer || (await this.#identity.claim(user))) return;
    this.#users.delete(user);
    this.user = this.#secret = undefined;
    this.#identity.forget();
  }

  /** Decides who we are: who we were, if the bus lets us. A signed bus lets none without a secret of its own. */
  #choose(joined) {
    const { kept } = this.#identity; // another tab may have joined before us
    const { secret } = joined;
    const mine = { user: this.user, secret: this.#secret };
    const isKnown = ({ user, secret: own }) => user !== undefined && (!secret || (own && !this.#refused.has(own)));
    return [mine, kept ?? {}].find(isKnown) ?? joined;
  }

  /** Makes the next try of a message join again: as another user, where the bus has lost its key or is signed now. */
  leave(isStranger) {
    if (isStranger) this.#refused.add(this.#secret);
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

  fetch(query, { method, ...init }) {
    const headers = new Headers(this.#headers);
    // Across origins that type would cost a preflight.
    const isSameOrigin = !globalThis.origin || new URL(this.#target).origin === globalThis.origin;
    if (method === "POST" && isSameOrigin) headers.set("Content-Type", "application/json");
    const url = this.#target + (method ? query : this.#fresh(query));
    return fetch(url, { cache: "no-store", method, headers, ...init });
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
    if (this.#loginCancelled?.until > Date.now()) throw this.#loginCancelled.error;
    const { signal } = abort;
    let isLate = false;
    const end = () => {
      isLate = true;
      abort.abort(new Error("it does not answer"));
    };
    let timer = setTimeout(async () => {
      // A login box keeps a request waiting; if we ended it, its box would go with it.
      const isLoginShown = !init.method && (await this.#wantsLogin());
      if (!isLoginShown) end();
      else if (timer) timer = setTimeout(end, LOGIN_TIMEOUT);
    }, timeout);
    this.#underWay.add(abort);
    let reply;
    let text;
    try {
      reply = await orAborted(signal, this.fetch(query, { signal, ...init }));
      text = await orAborted(signal, reply.text());
    } catch (cause) {
      const isKnown = isLate || abort.signal.aborted || this.offer;
      let why = isLate ? "It does not answer." : (!isKnown && (await explainNetwork(this.#target))) || cause.message;
      // By ourselves; browsers say "without reason".
      if (cause.name === "AbortError") why = "The request was broken off, to be made anew.";
      throw new BusError("network", `The bus cannot be reached: ${why}`, cause);
    } finally {
      clearTimeout(timer);
      timer = undefined;
      this.#underWay.delete(abort);
    }
    return { json: this.parse(reply, text, isValid), headers: reply.headers, length: text.length };
  }

  /** The seconds that a Retry-After header asks for (RFC 9110 section 10.2.3): a number, or a date of the server's. */
  #retryAfter(text) {
    const seconds = /^\d+$/.test(text) ? Number(text) : Math.ceil((Date.parse(text) - this.now()) / 1_000);
    return Math.max(0, seconds || 0);
  }

  /** Whether the web server asks this page's user for a password: without any it refuses a request at once. */
  async #wantsLogin() {
    if (!globalThis.document) return false;
    const init = { cache: "no-store", credentials: "omit" };
    return withTimeout(3_000, fetch(this.#target, init)).then(({ status }) => status === 401, () => false);
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
      if (reply.ok && !reply.redirected) this.#fire(new MessageEvent("messageerror", { data: text }));
    }
    const { status, headers } = reply;
    if (!reply.ok) {
      const [code, message] = isBusError(json) ? [json.error, json.message] : ["http", explainStatus(status)];
      const error = new BusError(code, message);
      const hasAsked = status === 401 && globalThis.document && headers.has("WWW-Authenticate");
      const retryAfter = hasAsked ? LOGIN_PAUSE : this.#retryAfter(headers.get("Retry-After"));
      if (hasAsked) this.#loginCancelled = { error, until: Date.now() + LOGIN_PAUSE * 1_000 };
      throw Object.assign(error, { status, retryAfter, element: json?.element });
    }
    const isRight = isValid(json);
    // From now on we go there at once: a redirect makes a GET of a POST.
    const [redirectedTo] = reply.redirected ? reply.url.split(/[?#]/) : [];
    if (isRight && redirectedTo) this.#target = redirectedTo;
    if (!isRight) throw Object.assign(new BusError("not_a_bus", explainReply(reply, text)), { redirectedTo });
    return json;
  }
}
