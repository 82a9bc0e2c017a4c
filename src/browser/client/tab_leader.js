/**
 * Elects by a lock one of a browser's tabs, which holds the connection and relays what it receives over a channel:
 * a browser has but six connections to a server by HTTP/1.1.
 */
class TabLeader {
  canShare = !!globalThis.navigator?.locks; // not on plain http, nor in a sandbox
  isLeader = false;
  #name;
  #handlers;
  #channel; // to the other tabs
  #release; // ends our part
  #heardAt; // when the leader said something

  constructor(url, handlers) {
    this.#name = `shortbus ${url}`;
    this.#handlers = handlers;
  }

  /** Whether another tab leads. */
  get isFollower() {
    return !!this.#channel && !this.isLeader;
  }

  /** Whether the leader has not been heard for a while, or cannot receive. */
  get isSilent() {
    return Date.now() - this.#heardAt > STREAM_TIMEOUT;
  }

  /** Follows until it may lead. Returns whether it has begun to. */
  requestLeadership() {
    if (this.#channel || !this.canShare) return false;
    const { signal } = (this.#release = new AbortController());
    this.#heardAt = Date.now();
    this.#channel = new BroadcastChannel(this.#name);
    this.#channel.onmessage = ({ data }) => this.#onRelay(data);
    const lead = () =>
      new Promise((resolve) => {
        if (signal.aborted) return resolve();
        signal.addEventListener("abort", resolve);
        this.isLeader = true;
        this.#handlers.onLead();
      });
    navigator.locks.request(this.#name, { signal }, lead).catch(() => {
      if (signal.aborted) return;
      this.canShare = false;
      this.releaseLeadership();
      this.#handlers.onRefusal();
    });
    return true;
  }

  releaseLeadership() {
    this.#channel?.close();
    this.#release?.abort();
    this.#channel = undefined;
    this.isLeader = false;
  }

  /** Tells the other tabs a page of messages, or the best transport if there is no page. */
  relay(news) {
    this.#channel?.postMessage(news);
  }

  #onRelay(news) {
    const wasSilent = this.isSilent;
    this.#heardAt = news.messages ? Date.now() : -Infinity;
    this.#handlers.onRelay(news, wasSilent);
  }
}
