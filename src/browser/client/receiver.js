const POLL_TIMEOUT = 30_000; // milliseconds until a plain poll is given up
const FULL_PAGE = 100; // messages; behind so many there may be more
const FULL_TEXT = 10_000; // characters of a reply; behind so many there may be more, too large to fit in
const HIDDEN_INTERVAL = 5_000; // milliseconds between plain polls of a hidden page where nothing happens
const ASKED_FOR = 10_000; // milliseconds for which another tab's wish holds: to hear as often as it would poll itself
const LONGEST_RETRY_AFTER = 60_000; // milliseconds; messages live for a minute
const FIRST_BYTE_TIMEOUT = 5_000; // milliseconds; a proxy may hold a stream back
const TRIAL_INTERVAL = 1_000; // milliseconds between polls while a stream shows nothing
const MIN_STREAM_LIFE = 10_000; // milliseconds; a stream that ends earlier was cut
const UPGRADE_INTERVAL = 300_000; // milliseconds until a better transport is tried again
const MAX_FAILURES = 3; // of a transport while plain polls work; then the next one is used
const [STREAM, LONG_POLL, POLL] = [0, 1, 2]; // transports, the best one first
const PAGE = globalThis.performance?.timeOrigin; // tells a client in this page from one in another tab
const isPage = (list) => Array.isArray(list) && list.every((message) => isId(message?.id));
const isHidden = () => !!globalThis.document?.hidden;

/** Receives messages by the best transport that works. A change loses nothing: each goes on from the cursor. */
class Receiver {
  lastId; // the cursor: all messages up to this id have been delivered
  transport; // undefined until we hear, and while we do not
  presence; // where the page wants to know who is there
  #session;
  #interval;
  #idleInterval;
  #echo; // our own messages are delivered too
  #fire;
  #wake;
  #tabs;
  #place; // for a request that waits
  #failures = 0;
  #bestTransport = STREAM; // that works
  #retryBestAt = Infinity;
  #transportFailures = 0;
  #pendingStrikes = 0; // failures of the transport, if a plain poll works
  #heardAt; // when a stream brought something
  #polledAt; // when a poll was answered
  #quiet = 0; // replies in a row that brought nothing
  #relayed = []; // pages from the leader
  #inSync = false; // the leader's pages begin at our cursor
  #relayedBy; // how we hear from the leader
  #asked = { at: -Infinity, pace: Infinity }; // how often another tab wants to hear, and when it said so
  #abort; // of the request under way
  #isInterrupted = false; // it is time to poll, whatever is under way
  #pause = new Pause();
  #leaving = false;

  constructor(session, { interval, idleInterval, after, echo }, fire, wake) {
    this.#session = session;
    this.#interval = interval;
    this.#idleInterval = idleInterval;
    this.lastId = after;
    this.#echo = echo;
    this.#fire = fire;
    this.#wake = wake;
    this.#tabs = new TabLeader(session.url, {
      onLead: () => this.wake(),
      onAsk: (pace) => this.#onAsk(pace),
      onRelay: (word, wasSilent) => this.#onRelay(word, wasSilent),
      onRefusal: () => this.#pollNow(),
    });
    this.#place = new ConnectionPlace(new URL(session.url).origin, () => this.wake());
  }

  /** Joins and receives until the session is closed: one request at a time. */
  async run() {
    while (!this.#session.closed) {
      let pause;
      this.#isInterrupted = false;
      this.#abort = new AbortController();
      try {
        pause = await this.#joinOrReceive();
        this.#failures = 0;
      } catch (error) {
        if (this.#session.closed) break;
        if (this.#isInterrupted) continue;
        pause = this.#onFailure(error);
      }
      this.#abort = undefined;
      if (pause && !this.#session.closed) await this.#pause.wait(pause);
    }
  }

  /** Ends; a join goes on if it is needed. */
  close(isJoinNeeded) {
    this.#standBack();
    this.transport = undefined;
    if (!isJoinNeeded) this.#abort?.abort();
    this.wake();
  }

  wake() {
    this.#pause.end();
  }

  /** What we send may be answered soon: plain polls are as quick again as they were. */
  onSend() {
    if (!this.#quiet || this.#failures) return;
    this.#quiet = 0;
    if (this.#tabs.isFollower) this.#tabs.ask(this.#pace(), 0);
    else if (this.transport === "poll") this.wake();
  }

  onJoin(id) {
    this.lastId ??= id;
    this.#setTransport(STREAM);
  }

  onOnline() {
    this.#setTransport(STREAM);
    this.#pollNow();
  }

  onVisibilityChange(isVisible) {
    const isLive = this.transport === "stream" && !this.#failures && Date.now() - this.#heardAt < 1.5 * HEARTBEAT;
    if (isVisible) this.#quiet = 0;
    // A hidden page that cannot share a connection gives up its own.
    if (isVisible ? !isLive : !this.#tabs.canShare && this.#session.offer?.wait) this.#pollNow();
  }

  onPageHide() {
    this.#leaving = true;
    this.#standBack();
    if (this.#session.offer) this.#pollNow();
  }

  onPageShow() {
    if (!this.#leaving) return;
    this.#leaving = false;
    this.#pollNow();
  }

  /** Leaves to other tabs, and to other clients of this page, what we may have had of the browser's connections. */
  #standBack() {
    this.#tabs.releaseLeadership();
    this.#place.release();
  }

  /** Polls at once: what is under way may hang on a connection that has gone. */
  #pollNow() {
    this.#isInterrupted = true;
    this.#inSync = false;
    this.#pendingStrikes = 0;
    this.#abort?.abort();
    this.#wake();
  }

  /** Counts a failure, and returns the pause behind it. */
  #onFailure(error) {
    this.#pendingStrikes = 0;
    this.#inSync = false;
    this.transport = undefined;
    this.#session.setConnected(false);
    this.#relayTransport();
    this.#fire(new Event("error"), { error });
    const pause = backOff(this.#failures++, Math.max(500, this.#interval));
    return Math.max(pause, Math.min(LONGEST_RETRY_AFTER, (error.retryAfter ?? 0) * 1_000));
  }

  /** Makes one step, and returns the pause until the next one. */
  async #joinOrReceive() {
    if (this.#session.offer) return this.#leaving ? Infinity : this.#receive();
    const isBehind = this.lastId !== undefined;
    await this.#session.join(this.#abort);
    return this.#session.offer.wait || isBehind ? 0 : this.#interval;
  }

  async #receive() {
    if (Date.now() > this.#retryBestAt) this.#setTransport(STREAM);
    if (await this.#orInterrupted(this.#tabs.requestLeadership())) this.#inSync = false;
    if (this.#tabs.isFollower) {
      this.#place.release();
      return this.#follow();
    }
    const { wait, stream } = this.#session.offer;
    const transport = wait ? Math.max(this.#bestTransport, stream ? STREAM : LONG_POLL) : POLL;
    const waits = await this.#orInterrupted(this.#mayWait(transport));
    if (waits && !this.#failures && !this.#pendingStrikes) return this.#wait(transport, wait);
    const more = await this.#poll();
    this.#addFailures(this.#pendingStrikes, transport);
    this.#pendingStrikes = 0;
    if (!waits) this.transport = "poll";
    return waits || more || this.#place.isHeld ? 0 : this.#pace();
  }

  /** Whether we may hold a connection open. */
  async #mayWait(transport) {
    if (transport !== POLL && (this.#tabs.isLeader || !isHidden())) return this.#place.request();
    this.#place.release();
    return false;
  }

  /** Passes a promise on, unless it is time for something else by then. */
  async #orInterrupted(promise) {
    const { signal } = this.#abort;
    const result = await promise;
    if (signal.aborted) throw signal.reason;
    return result;
  }

  /** Milliseconds between two plain polls: more where nothing happens, if nobody looks or we are told so. */
  #pace() {
    const most = this.#idleInterval ?? (isHidden() ? HIDDEN_INTERVAL : 0);
    const own = Math.max(this.#interval, Math.min(most, 100 * 1.5 ** this.#quiet));
    return Math.min(own, Date.now() - this.#asked.at < ASKED_FOR ? this.#asked.pace : Infinity);
  }

  /** Receives by a request that waits for messages. */
  async #wait(transport, wait) {
    const [start, before] = [Date.now(), this.lastId];
    try {
      if (transport === STREAM) return await this.#stream(start);
      this.transport = "long-poll";
      await this.#poll(wait);
    } catch (error) {
      // What the bus itself says is an error. If the transport is to blame for the rest, a plain poll works.
      if (this.#session.closed || this.#isInterrupted || (error.status && error.code !== "http")) throw error;
      this.#pendingStrikes ||= 1;
      return 0;
    }
    const hasWaited = this.lastId !== before || Date.now() - start > wait * 500;
    if (hasWaited) this.#transportFailures = 0;
    else this.#addFailures(1, transport);
    return hasWaited ? 0 : this.#interval;
  }

  #addFailures(number, transport) {
    this.#transportFailures += number;
    if (this.#transportFailures < MAX_FAILURES) return;
    this.#setTransport(transport + 1);
    this.#relayTransport();
  }

  #setTransport(best) {
    this.#bestTransport = best;
    this.#retryBestAt = best ? Date.now() + UPGRADE_INTERVAL : Infinity;
    this.#transportFailures = 0;
  }

  /** Leaves our own messages out, but not for a leader: other tabs want them. */
  #userFilter() {
    return this.#tabs.isLeader || this.#echo || this.presence ? "" : `user=${this.#session.user}&`;
  }

  /** Polls once, and returns whether there may be more at once. */
  async #poll(wait, abort = this.#abort) {
    const wasLeader = this.#tabs.isLeader;
    const query = `?${this.#userFilter()}id=${this.lastId}${wait ? `&wait=${wait}` : ""}`;
    const timeout = wait ? wait * 1_000 + REQUEST_TIMEOUT : POLL_TIMEOUT;
    const { json: messages, headers, length } = await this.#session.request(query, { isValid: isPage, timeout, abort });
    const last = Number(headers.get("Shortbus-Last-Id"));
    this.#polledAt = Date.now();
    this.#deliver({ messages, missed: headers.has("Shortbus-Missed"), last }, wasLeader);
    return messages.length >= FULL_PAGE || length >= FULL_TEXT;
  }

  /** What lives, up to the cursor. */
  async *backlog() {
    const end = this.lastId;
    for (let id = 0; id < end; ) {
      const { json, headers } = await this.#session.request(`?id=${id}`, { isValid: isPage, timeout: POLL_TIMEOUT });
      if (!json.length) return;
      yield* json.filter((message) => message.id <= end);
      id = Number(headers.get("Shortbus-Last-Id")) || Infinity;
    }
  }

  /** Receives an event stream to its end, and returns the pause until the next one. */
  async #stream(start) {
    const [wasLeader, abort, after] = [this.#tabs.isLeader, this.#abort, this.lastId];
    const trial = new AbortController(); // until the stream shows something
    let timer;
    const expect = (milliseconds, strikes) => {
      clearTimeout(timer);
      timer = setTimeout(() => {
        this.#pendingStrikes = strikes;
        abort.abort();
      }, milliseconds);
    };
    let hasPolled = false; // beside the stream, which repeats what that brought
    const read = pageReader((page) => {
      // Ids may have begun anew: what was heard cannot be told from what was not.
      if (page.missed && hasPolled) throw new Error("overtaken");
      this.#deliver(page, wasLeader);
    });
    let hasLived = false;
    expect(FIRST_BYTE_TIMEOUT, MAX_FAILURES);
    this.#pollBeside(trial);
    try {
      const reader = await orAborted(abort.signal, this.#openStream(abort.signal));
      const decoder = new TextDecoder();
      for (let chunk; !(chunk = await orAborted(abort.signal, reader.read())).done; ) {
        if (!trial.signal.aborted) hasPolled = this.lastId !== after;
        trial.abort();
        expect(STREAM_TIMEOUT, 1);
        this.#heardAt = Date.now();
        this.transport = "stream";
        hasLived ||= this.#heardAt - start > MIN_STREAM_LIFE;
        if (hasLived) this.#transportFailures = 0;
        read(decoder.decode(chunk.value, { stream: true }));
      }
      if (!hasLived) throw new Error("cut");
    } catch (error) {
      if (!hasLived || this.#isInterrupted) throw error;
    } finally {
      clearTimeout(timer);
      trial.abort();
      abort.abort();
    }
    return backOff(0, 500);
  }

  /** Polls while a stream shows nothing: a proxy may hold it back, and that is no reason to hear late. */
  async #pollBeside(trial) {
    const pause = new Pause();
    trial.signal.addEventListener("abort", () => pause.end());
    for (;;) {
      await pause.wait(TRIAL_INTERVAL);
      if (trial.signal.aborted) return;
      try {
        await this.#poll(0, trial);
        this.transport = "poll";
      } catch {} // the stream tells what is wrong
    }
  }

  async #openStream(signal) {
    const reply = await this.#session.fetch(`?${this.#userFilter()}id=${this.lastId}&stream=1`, { signal });
    if (!reply.ok) this.#session.parse(reply, await reply.text());
    if (!reply.headers.get("Content-Type")?.startsWith("text/event-stream")) {
      this.#pendingStrikes = MAX_FAILURES;
      throw new Error("no stream");
    }
    return reply.body.getReader();
  }

  /** Delivers a page. A leader relays it too, even if it is empty: it shows that the leader lives. */
  #deliver(page, wasLeader) {
    if (this.#session.closed) return;
    const before = this.lastId;
    if (wasLeader) this.#relay({ from: before, ...page });
    this.#session.setConnected(true);
    const { messages, missed, last } = page;
    // Who begins with what lives has missed nothing.
    if (missed && this.lastId) this.#fire(new Event("missed"));
    // A lost counter may give lower ids than before. Without a loss, a lower id is an old reply from some cache.
    const passed = missed ? -1 : this.lastId;
    for (const message of messages) {
      const { id, text } = message;
      if (text !== undefined) this.#fire(new MessageEvent("messageerror", { data: text }));
      else if (id > passed) this.#deliverMessage(message);
      if (this.#session.closed) return;
    }
    if (last > 0 && last > (missed ? 0 : this.lastId)) this.lastId = last;
    this.#quiet = this.lastId === before ? this.#quiet + 1 : 0;
    this.presence?.tick();
  }

  #deliverMessage({ id, user, data }) {
    this.lastId = id;
    if (this.presence?.take(user, data)) return;
    if (this.#session.isOwn(user) && !this.#echo) return;
    const { origin } = new URL(this.#session.url);
    this.#fire(new MessageEvent("message", { data, lastEventId: String(id), origin }), { user });
  }

  #relay(word) {
    if (this.#tabs.isLeader) this.#tabs.relay({ ...word, transport: this.transport, page: PAGE });
  }

  /** Has the other tabs hear by themselves until there is something from us again. */
  #relayTransport() {
    this.#relay({ best: this.#bestTransport, isDeaf: true });
  }

  /** Answers another tab: without a word from us it goes on by itself. Our timers may be slow, as we may be hidden. */
  #onAsk(pace) {
    const now = Date.now();
    if (pace <= this.#asked.pace || now - this.#asked.at >= ASKED_FOR) this.#asked = { at: now, pace };
    if (!this.transport || this.#failures) return; // we do not hear ourselves
    if (this.transport !== "poll" || now - this.#polledAt < this.#pace()) this.#relay({});
    else this.wake(); // what we poll is the answer
  }

  #onRelay(word, wasSilent) {
    if (word.messages) this.#relayed.push(word);
    if (word.best !== undefined) this.#setTransport(word.best);
    this.#relayedBy = word.page === PAGE ? word.transport : "tab";
    // The pauses behind failures go on.
    if (wasSilent || !this.#failures) this.wake();
  }

  /** Delivers what the leader relays. Polls where there is a gap, and while the leader is silent. */
  async #follow() {
    const patience = isHidden() ? HEARTBEAT : ASK_INTERVAL;
    this.#tabs.ask(this.#pace(), patience);
    const { isSilent } = this.#tabs;
    if (isSilent || !this.#inSync) {
      this.#relayed = []; // the poll brings it too
      const more = await this.#poll();
      this.#inSync = !more;
      if (isSilent) this.transport = "poll";
      return more || this.#tabs.isLeader || !this.#tabs.isSilent ? 0 : this.#pace();
    }
    while (this.#inSync && this.#relayed.length) {
      const page = this.#relayed.shift();
      if (page.missed || page.from > this.lastId) this.#inSync = false;
      else this.#deliver(page);
    }
    this.transport = this.#relayedBy;
    return this.#inSync ? patience : 0;
  }
}
