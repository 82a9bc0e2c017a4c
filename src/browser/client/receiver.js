const POLL_TIMEOUT = 30_000; // milliseconds until a plain poll is given up
const FULL_PAGE = 100; // messages; behind so many there may be more
const FIRST_BYTE_TIMEOUT = 5_000; // milliseconds; a proxy may hold a stream back
const MIN_STREAM_LIFE = 10_000; // milliseconds; a stream that ends earlier was cut
const UPGRADE_INTERVAL = 300_000; // milliseconds until a better transport is tried again
const MAX_FAILURES = 3; // of a transport while plain polls work; then the next one is used
const [STREAM, LONG_POLL, POLL] = [0, 1, 2]; // transports, the best one first

/** Receives messages by the best transport that works. A change loses nothing: each goes on from the cursor. */
class Receiver {
  lastId; // the cursor: all messages up to this id have been delivered
  transport;
  presence; // where the page wants to know who is there
  #session;
  #interval;
  #echo; // our own messages are delivered too
  #fire;
  #wake;
  #tabs;
  #failures = 0;
  #bestTransport = STREAM; // that works
  #retryBestAt = Infinity;
  #transportFailures = 0;
  #pendingStrikes = 0; // failures of the transport, if a plain poll works
  #heardAt; // when a stream brought something
  #relayed = []; // pages from the leader
  #inSync = false; // the leader's pages begin at our cursor
  #abort; // of the request under way
  #isInterrupted = false; // it is time to poll, whatever is under way
  #pause = new Pause();
  #leaving = false;

  constructor(session, { interval, after, echo }, fire, wake) {
    this.#session = session;
    this.#interval = interval;
    this.lastId = after;
    this.#echo = echo;
    this.#fire = fire;
    this.#wake = wake;
    this.#tabs = new TabLeader(session.url, {
      onLead: () => this.wake(),
      onRelay: (news, wasSilent) => this.#onRelay(news, wasSilent),
      onRefusal: () => this.#pollNow(),
    });
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
    this.#tabs.releaseLeadership();
    if (!isJoinNeeded) this.#abort?.abort();
    this.wake();
  }

  wake() {
    this.#pause.end();
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
    // A hidden page that cannot share a connection gives up its own.
    if (isVisible ? !isLive : !this.#tabs.canShare && this.#session.offer?.wait) this.#pollNow();
  }

  onPageHide() {
    this.#leaving = true;
    this.#tabs.releaseLeadership();
    if (this.#session.offer) this.#pollNow();
  }

  onPageShow() {
    if (!this.#leaving) return;
    this.#leaving = false;
    this.#pollNow();
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
    this.#session.setConnected(false);
    this.#relayTransport();
    this.#fire(new Event("error"), { error });
    const pause = backOff(this.#failures++, Math.max(500, this.#interval));
    return Math.max(pause, (error.retryAfter ?? 0) * 1_000);
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
    const { wait, stream } = this.#session.offer;
    const transport = wait ? Math.max(this.#bestTransport, stream ? STREAM : LONG_POLL) : POLL;
    if (transport === POLL) this.#tabs.releaseLeadership();
    else if (this.#tabs.requestLeadership()) this.#inSync = false;
    if (this.#tabs.isFollower) return this.#follow();
    const waits = transport !== POLL && (this.#tabs.isLeader || !globalThis.document?.hidden);
    if (waits && !this.#failures && !this.#pendingStrikes) return this.#wait(transport, wait);
    const more = await this.#poll();
    this.#addFailures(this.#pendingStrikes, transport);
    this.#pendingStrikes = 0;
    if (!waits) this.transport = "poll";
    return waits || more ? 0 : this.#interval;
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
  async #poll(wait) {
    const wasLeader = this.#tabs.isLeader;
    const query = `?${this.#userFilter()}id=${this.lastId}${wait ? `&wait=${wait}` : ""}`;
    const isValid = (list) => Array.isArray(list) && list.every((message) => isId(message?.id));
    const timeout = wait ? wait * 1_000 + REQUEST_TIMEOUT : POLL_TIMEOUT;
    const { json: messages, headers } = await this.#session.request(query, { isValid, timeout, abort: this.#abort });
    const last = Number(headers.get("Shortbus-Last-Id"));
    this.#deliver({ messages, missed: headers.has("Shortbus-Missed"), last }, wasLeader);
    return messages.length >= FULL_PAGE;
  }

  /** What lives, up to the cursor. */
  async *backlog() {
    const isValid = (list) => Array.isArray(list) && list.every((message) => isId(message?.id));
    const end = this.lastId;
    for (let id = 0; id < end; ) {
      const { json, headers } = await this.#session.request(`?id=${id}`, { isValid, timeout: POLL_TIMEOUT });
      if (!json.length) return;
      yield* json.filter((message) => message.id <= end);
      id = Number(headers.get("Shortbus-Last-Id")) || Infinity;
    }
  }

  /** Receives an event stream to its end, and returns the pause until the next one. */
  async #stream(start) {
    const [wasLeader, abort] = [this.#tabs.isLeader, this.#abort];
    let timer;
    const expect = (milliseconds, strikes) => {
      clearTimeout(timer);
      timer = setTimeout(() => {
        this.#pendingStrikes = strikes;
        abort.abort();
      }, milliseconds);
    };
    const read = pageReader((page) => this.#deliver(page, wasLeader));
    let hasLived = false;
    expect(FIRST_BYTE_TIMEOUT, MAX_FAILURES);
    try {
      const reader = await this.#openStream(abort.signal);
      const decoder = new TextDecoder();
      for (let chunk; !(chunk = await reader.read()).done; ) {
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
      abort.abort();
    }
    return backOff(0, 500);
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
    if (wasLeader) this.#tabs.relay({ from: this.lastId, ...page });
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
    this.presence?.tick();
  }

  #deliverMessage({ id, user, data }) {
    this.lastId = id;
    if (this.presence?.take(user, data)) return;
    if (this.#session.isOwn(user) && !this.#echo) return;
    const { origin } = new URL(this.#session.url);
    this.#fire(new MessageEvent("message", { data, lastEventId: String(id), origin }), { user });
  }

  #relayTransport() {
    if (this.#tabs.isLeader) this.#tabs.relay({ best: this.#bestTransport });
  }

  #onRelay(news, wasSilent) {
    if (news.messages) this.#relayed.push(news);
    else this.#setTransport(news.best);
    // The pauses behind failures go on.
    if (wasSilent || !this.#failures) this.wake();
  }

  /** Delivers what the leader relays. Polls where there is a gap, and while the leader is silent. */
  async #follow() {
    const { isSilent } = this.#tabs;
    if (isSilent || !this.#inSync) {
      this.#relayed = []; // the poll brings it too
      const more = await this.#poll();
      this.#inSync = !more;
      if (isSilent) this.transport = "poll";
      return more || this.#tabs.isLeader || !this.#tabs.isSilent ? 0 : this.#interval;
    }
    this.transport = "tab";
    while (this.#inSync && this.#relayed.length) {
      const page = this.#relayed.shift();
      if (page.missed || page.from > this.lastId) this.#inSync = false;
      else this.#deliver(page);
    }
    return this.#inSync ? STREAM_TIMEOUT : 0;
  }
}
