const ANNOUNCE_INTERVAL = 20_000; // milliseconds; messages live for a minute, in which who comes finds all
const AGEING_INTERVAL = 5_000; // milliseconds
const SILENT_AGE = 9; // such intervals without a word, after which a user counts as gone
const GONE = { shortbus: "gone" };
const RETURN_TIMEOUT = 3_000; // milliseconds that a page gets for a reload, after which it is the same user

/**
 * Knows who is on the bus. Each announces itself again and again, by messages on the bus, and says when it leaves; who
 * says nothing any more has left too.
 */
class Presence {
  others = new Map(); // what each of them says of itself, by its user
  #session;
  #outbox;
  #receiver;
  #fire;
  #data; // what we say of ourselves; undefined while we only watch
  #ages = new Map(); // intervals since each of the others was heard
  #returns = new Map(); // timers of those that may come back
  #goodbye; // our last message, signed, on a signed bus
  #announcedAt; // undefined while nobody knows of us
  #isLeaving = false;
  #isBehind = true; // what was announced before us is to be read
  #heard; // users that were heard while that is read
  #timer;

  constructor(session, outbox, receiver, fire) {
    this.#session = session;
    this.#outbox = outbox;
    this.#receiver = receiver;
    this.#fire = fire;
    this.#age();
  }

  present(data) {
    const isOver = data === undefined;
    this.#data = isOver ? undefined : JSON.parse(toJson(data)); // the caller may change the object later
    if (isOver) this.#sayGoodbye(GONE);
    else this.#announce();
    this.tick();
  }

  /** Does what is due. This is called with each sign of life of the bus: a hidden page's timers are slow. */
  tick() {
    if (!this.#session.connected || this.#isLeaving) return;
    if (!(Date.now() - this.#announcedAt < ANNOUNCE_INTERVAL)) this.#announce();
    if (this.#isBehind) this.#catchUp();
  }

  /** Takes a message, if it is about presence. Returns whether it is. */
  take(user, message) {
    const { shortbus: word, data, back } = message ?? {};
    if (word !== "here" && word !== "gone") return false;
    this.#heard?.add(user);
    clearTimeout(this.#returns.get(user));
    if (!this.#session.isOwn(user)) {
      if (word === "here") this.#add(user, data);
      else if (back) this.#returns.set(user, setTimeout(() => this.#remove(user), RETURN_TIMEOUT));
      else this.#remove(user);
    } else if (word === "gone") {
      this.#announce(); // it was another tab of ours, or this one before its reload
    }
    return true;
  }

  onMissed() {
    this.#isBehind = true;
  }

  onRejoin() {
    this.#announcedAt = undefined;
  }

  onPageHide() {
    this.#sayGoodbye(this.#lastMessage, this.#goodbye);
    this.#isLeaving = true;
  }

  onPageShow() {
    if (!this.#isLeaving) return;
    this.#isLeaving = false;
    this.#isBehind = true;
    this.tick();
  }

  close() {
    if (!this.#isLeaving) this.#sayGoodbye(GONE);
    this.#isLeaving = true;
    clearTimeout(this.#timer);
    for (const timer of this.#returns.values()) clearTimeout(timer);
  }

  #announce() {
    if (this.#data === undefined || !this.#session.connected || this.#isLeaving) return;
    this.#announcedAt = Date.now();
    this.#post({ shortbus: "here", data: this.#data });
    if (this.#session.credentials?.secret) this.#prepareGoodbye();
  }

  /** What we say when the page is left: after a reload we may be back as the same user. */
  get #lastMessage() {
    return this.#session.isConstant ? { ...GONE, back: true } : GONE;
  }

  async #prepareGoodbye() {
    this.#goodbye = await this.#outbox.prepare(this.#lastMessage).catch(() => {}); // the announcement tells why
  }

  #sayGoodbye(message, prepared) {
    if (this.#announcedAt === undefined) return;
    this.#announcedAt = this.#goodbye = undefined;
    this.#post(message, prepared);
  }

  #post(message, prepared) {
    this.#outbox.add(message, prepared).catch(() => {}); // that is an error event
  }

  #add(user, data) {
    const isNews = !this.others.has(user) || JSON.stringify(this.others.get(user)) !== JSON.stringify(data);
    this.#ages.set(user, 0);
    this.others.set(user, data);
    if (isNews) this.#fire(new Event("presence"), { user, data });
  }

  #remove(user) {
    this.#ages.delete(user);
    if (this.others.delete(user)) this.#fire(new Event("presence"), { user, data: undefined });
  }

  /** Counts only while we hear the bus, and while our timers run: after a sleep the others have not gone. */
  #age() {
    this.#timer = setTimeout(() => this.#age(), AGEING_INTERVAL);
    this.tick();
    if (!this.#session.connected || this.#isLeaving) return;
    for (const [user, age] of this.#ages) {
      if (age >= SILENT_AGE) this.#remove(user);
      else this.#ages.set(user, age + 1);
    }
  }

  /** Reads what lives: who is here was announced in it. What comes meanwhile is newer. */
  async #catchUp() {
    this.#isBehind = false;
    this.#heard = new Set();
    const here = new Map();
    try {
      for await (const { user, data } of this.#receiver.backlog()) {
        if (data?.shortbus === "here") here.set(user, data.data);
        else if (data?.shortbus === "gone") here.delete(user);
      }
    } catch {
      this.#isBehind = true; // until the bus answers
      return;
    }
    const heard = this.#heard;
    this.#heard = undefined;
    const isOld = (user) => !heard.has(user) && !this.#session.isOwn(user);
    for (const [user, data] of here) if (isOld(user)) this.#add(user, data);
    for (const user of [...this.others.keys()]) if (isOld(user) && !here.has(user)) this.#remove(user);
  }
}
