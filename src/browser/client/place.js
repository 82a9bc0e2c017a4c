const HELD_CONNECTIONS = 3; // for all buses and tabs: of six to an origin by HTTP/1.1, half are left for all else
const LOCK_TIMEOUT = 1_000; // milliseconds; a browser may keep a lock's request for ever

/** A place of several that all tabs of a browser have together: each of the names is a Web Lock, and one is taken. */
class Place {
  isHeld = false;
  isRefused = !attempt(() => navigator.locks); // not on plain http, nor in a sandbox
  #names;
  #onTurn; // while it waits in line there is a place at last, or the browser refuses it
  #isInLine = false;
  #release; // ends our part

  constructor(names, onTurn) {
    this.#names = names;
    this.#onTurn = onTurn;
  }

  /** Takes a place that is free, or waits in line for the next one. Returns whether it is held. */
  async request() {
    if (this.isRefused || this.#release) return this.isHeld;
    const { signal } = (this.#release = new AbortController());
    this.#isInLine = false;
    await withTimeout(LOCK_TIMEOUT, this.#seek(signal)).catch(() => {});
    this.#isInLine = true;
    return this.isHeld;
  }

  release() {
    this.#release?.abort();
    this.#release = undefined;
    this.isHeld = false;
  }

  async #seek(signal) {
    try {
      for (const name of this.#names) {
        if (!this.isHeld) await this.#take(name, signal);
      }
      if (!this.isHeld) this.#waitInLine(signal);
    } catch {
      this.#refuse(signal);
    }
  }

  /** Takes this place if it is free: a promise of the browser's word on that. */
  #take(name, signal) {
    return new Promise((resolve, reject) => {
      const act = (lock) => {
        const held = lock && this.#hold(signal);
        resolve();
        return held;
      };
      navigator.locks.request(name, { ifAvailable: true }, act).catch(reject);
    });
  }

  #waitInLine(signal) {
    const line = new AbortController();
    signal.addEventListener("abort", () => line.abort());
    const act = () => {
      const held = this.#hold(signal);
      line.abort();
      return held;
    };
    for (const name of this.#names) {
      navigator.locks.request(name, { signal: line.signal }, act).catch(() => {
        if (!line.signal.aborted) this.#refuse(signal);
      });
    }
  }

  /** Holds a place, unless there is one already or none is wanted: a promise of its release. */
  #hold(signal) {
    if (this.isHeld || signal.aborted) return undefined;
    this.isHeld = true;
    if (this.#isInLine) this.#onTurn();
    return new Promise((resolve) => signal.addEventListener("abort", resolve));
  }

  #refuse(signal) {
    if (this.isRefused || signal.aborted) return;
    this.release();
    this.isRefused = true;
    if (this.#isInLine) this.#onTurn();
  }
}

/** A page's one place for a held connection, where the tabs can share none: whose it is, and who waits for it. */
const inPage = (globalThis[Symbol.for("shortbus.place")] ??= { holder: undefined, waiting: new Set() });

/** A place for a connection that is held open: a browser has few of them to a server, and other requests need some. */
class ConnectionPlace {
  #shared;
  #onTurn;

  constructor(origin, onTurn) {
    const names = Array.from({ length: HELD_CONNECTIONS }, (_, n) => `shortbus connection ${n} ${origin}`);
    this.#shared = new Place(names, onTurn);
    this.#onTurn = onTurn;
  }

  get isHeld() {
    return this.#shared.isHeld || inPage.holder === this;
  }

  /** Whether there is a place now. If not, `onTurn` is called when there may be. */
  async request() {
    if (!globalThis.document && !globalThis.WorkerGlobalScope) return true; // no browser
    if (await this.#shared.request()) return true;
    if (!this.#shared.isRefused) return false;
    inPage.holder ??= this;
    if (inPage.holder !== this) inPage.waiting.add(this);
    return inPage.holder === this;
  }

  release() {
    this.#shared.release();
    inPage.waiting.delete(this);
    if (inPage.holder !== this) return;
    const [next] = inPage.waiting;
    inPage.holder = next;
    inPage.waiting.delete(next);
    next?.#onTurn();
  }
}
