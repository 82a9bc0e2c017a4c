const STORAGES = { tab: "sessionStorage", browser: "localStorage" };
const CLAIM_TIMEOUT = 1_000; // milliseconds; the page before a reload may still hold the lock
const claims = new Map(); // promises of whether this page got a lock, by its name
const held = new Map(); // what ends a lock that it got, by the same

/** Where a user is kept over reloads: in the tab's storage or the browser's. Nowhere if there is none. */
class Identity {
  kind;
  #key;

  constructor(url, kind) {
    this.kind = kind;
    const isFramed = globalThis.parent !== globalThis;
    // A page and what it has in frames share a storage, but are different users.
    this.#key = `shortbus ${url}${isFramed && kind === "tab" ? ` in ${globalThis.location?.href}` : ""}`;
  }

  /** What is kept: the user and, of a signed bus, the secret. Undefined where there is nothing. */
  get kept() {
    const kept = attempt(() => JSON.parse(this.#storage.getItem(this.#key)));
    return isId(kept?.user) ? kept : undefined;
  }

  set kept({ user, secret }) {
    attempt(() => this.#storage.setItem(this.#key, JSON.stringify({ user, secret })));
  }

  forget() {
    attempt(() => this.#storage.removeItem(this.#key));
  }

  /** A browser may have no storage, or throw when it is asked for it: in a frame, with cookies blocked. */
  get #storage() {
    return globalThis[STORAGES[this.kind]];
  }

  /** Whether no other tab is this user. A tab that is duplicated begins with a copy of the first one's storage. */
  async claim(user) {
    if (this.kind !== "tab" || !attempt(() => navigator.locks)) return true;
    const name = `${this.#key} user ${user}`;
    if (!claims.size) {
      // In the browser's cache a page would keep the tab's next page from being this user.
      globalThis.addEventListener("pagehide", () => held.forEach((release) => release()));
      globalThis.addEventListener("pageshow", ({ persisted }) => persisted && [...held.keys()].forEach(requestClaim));
    }
    if (!claims.has(name)) claims.set(name, requestClaim(name));
    return claims.get(name);
  }
}

/** Takes a lock that is held until the page is left. Returns whether it was free soon; true where locks are refused. */
function requestClaim(name) {
  return new Promise((resolve) => {
    const late = new AbortController();
    const timer = setTimeout(() => late.abort(), CLAIM_TIMEOUT);
    late.signal.addEventListener("abort", () => resolve(false));
    const hold = () => {
      clearTimeout(timer);
      resolve(true);
      return new Promise((release) => held.set(name, release));
    };
    attempt(() => navigator.locks.request(name, { signal: late.signal }, hold))?.catch(() => resolve(true));
  });
}
