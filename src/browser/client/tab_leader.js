const ASK_INTERVAL = 1_000; // milliseconds of silence after which a visible page asks its leader for a word
const ANSWER_TIMEOUT = 2_000; // milliseconds that the leader has for it; a dialog or a debugger may stop a tab

/**
 * Elects one of a browser's tabs, which receives for all of them and relays what it receives over a channel: a browser
 * has but six connections to a server by HTTP/1.1.
 */
class TabLeader {
  canShare = !!attempt(() => navigator.locks); // not on plain http, nor in a sandbox
  #name;
  #handlers;
  #place;
  #channel; // to the other tabs
  #heardAt; // when the leader said something
  #askedAt; // when it was asked for a word that has not come
  #isDeaf = false; // the leader cannot receive

  constructor(url, handlers) {
    this.#name = `shortbus leader ${url}`;
    this.#handlers = handlers;
    this.#place = new Place([this.#name], () => this.#onTurn());
  }

  get isLeader() {
    return this.#place.isHeld;
  }

  /** Whether another tab leads. */
  get isFollower() {
    return !!this.#channel && !this.isLeader;
  }

  /** Whether the leader does not answer, or cannot receive. */
  get isSilent() {
    return this.#isDeaf || Date.now() - this.#askedAt >= ANSWER_TIMEOUT;
  }

  /** Follows until it may lead. Returns whether it has begun to do either. */
  async requestLeadership() {
    if (this.#channel || !this.canShare) return false;
    this.#heardAt = -Infinity;
    this.#askedAt = undefined;
    this.#isDeaf = false;
    this.#channel = attempt(() => new BroadcastChannel(this.#name));
    this.canShare = !!this.#channel;
    if (!this.canShare) return false;
    this.#channel.onmessage = ({ data }) => this.#onWord(data);
    await this.#place.request();
    if (this.#place.isRefused) this.#giveUp();
    return true;
  }

  releaseLeadership() {
    this.#channel?.close();
    this.#channel = undefined;
    this.#place.release();
  }

  /** Tells the other tabs a page of messages, or what else they should know. */
  relay(word) {
    this.#channel?.postMessage(word);
  }

  /** Asks the leader for a word if there was none for so long; it learns how often we want to hear. */
  ask(pace, silence) {
    if (Date.now() - this.#heardAt < silence) return;
    this.#askedAt ??= Date.now();
    this.#channel?.postMessage({ ask: pace });
  }

  #onTurn() {
    if (this.isLeader) return this.#handlers.onLead();
    this.#giveUp();
    this.#handlers.onRefusal();
  }

  #giveUp() {
    this.canShare = false;
    this.releaseLeadership();
  }

  #onWord(word) {
    if (this.isLeader) {
      // Under an open dialog Firefox calls this, but lets no promise go on: a tab that receives nothing must not answer.
      if (word.ask !== undefined) queueMicrotask(() => this.#handlers.onAsk(word.ask));
      return;
    }
    if (word.ask !== undefined) return; // another follower
    const wasSilent = this.isSilent;
    this.#heardAt = Date.now();
    this.#askedAt = undefined;
    this.#isDeaf = !!word.isDeaf;
    this.#handlers.onRelay(word, wasSilent);
  }
}
