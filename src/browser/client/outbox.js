const MIN_TIMEOUT = 1_000; // milliseconds that a message and a try get, however short or late the deadline is
const BATCH_BYTES = KEEPALIVE_BYTES / 2; // of a batch: as much can wait behind it, and outlive the page too

const [NONE, RAISED, SETTLED] = [0, 1, 2]; // doubts

/**
 * Sends messages in order, by one request at a time: what is given meanwhile leaves together in the next one. Each
 * message is tried until it is delivered, refused or late.
 */
class Outbox {
  bufferedAmount = 0; // bytes of the messages that are neither delivered nor failed
  lowThreshold = 0;
  #session;
  #deadline;
  #fire;
  #queue = []; // messages that have not been tried
  #batches = []; // that have been; the first is being sent, and others where the page was left
  #isSigning = false;
  #draining; // a promise of the end of all
  #pause = new Pause();
  #failures = 0;
  #error; // of the latest try or join
  #hasRejoined = false; // right before this try
  #doubts = NONE; // whether the web server's own 403 hides that a signed bus no longer knows us
  #leaving = false; // the page is being left: there may be no later
  #holding = false; // it may give more to be sent at this moment

  constructor(session, deadline, fire) {
    this.#session = session;
    this.#deadline = deadline;
    this.#fire = fire;
  }

  get isEmpty() {
    return !this.#queue.length && !this.#batches.length;
  }

  /** Signs a message ahead that may be the last one of a page: when it is left there is no time for that. */
  async prepare(data) {
    const batch = new Batch(this.#session, [{ body: toJson(data) }]);
    await batch.sign();
    return batch;
  }

  /** Takes a message: a promise of its id. `ahead` is it as it was prepared, if it was. */
  add(data, ahead) {
    // We serialize at once: the caller may change the object later.
    const body = toJson(data);
    const bytes = utf8(body).length;
    return new Promise((resolve, reject) => {
      const addedAt = [Date.now(), performance.now()];
      const message = { body, bytes, addedAt, deadline: this.#deadline, resolve, reject, ahead };
      if (ahead) ahead.messages = [message];
      this.#queue.push(message);
      this.bufferedAmount += bytes;
      if (this.#batches.length) this.#signAhead();
      if (!this.#leaving) this.#drain();
      else if (!this.#holding) queueMicrotask(() => this.#leave());
    });
  }

  /** Sends what waits without a pause: a promise of its end. */
  close() {
    this.wake();
    return this.#drain();
  }

  /** Drops what has not left. */
  abort(reason) {
    const dropped = [...this.#queue];
    for (const batch of this.#batches) {
      batch.error = reason;
      // A try under way may arrive. Its reply decides, and no other try follows.
      if (batch.isUnderWay) for (const message of batch.messages) message.deadline = -Infinity;
      else dropped.push(...batch.messages);
    }
    this.#end(dropped, ({ reject }) => reject(reason));
  }

  wake() {
    this.#pause.end();
  }

  onJoin() {
    for (const message of this.#queue) message.ahead = undefined;
    this.#signAhead();
  }

  /** The page may still send something in its own listeners: until it is hidden we hold that back, to leave together. */
  onPageHide(isHiddenNext) {
    this.#leaving = true;
    this.#holding = isHiddenNext;
    if (!this.#holding) this.#leave();
  }

  onHidden() {
    if (this.#holding) this.#leave();
  }

  onPageShow() {
    this.#leaving = false;
    this.#holding = false;
    this.#drain();
  }

  /** Sends all that can outlive the page, without waiting for replies. If it comes back, what failed is tried again. */
  #leave() {
    this.#holding = false;
    for (const batch of this.#batches) this.#sendNow(batch);
    let room = keepaliveRoom();
    while (this.#queue.length) {
      const batch = this.#queue[0].ahead ?? this.#pack(room);
      room -= batch.bytes;
      if (room < 0) break;
      this.#launch(batch);
      this.#sendNow(batch);
    }
    this.#drain();
  }

  #drain() {
    return (this.#draining ??= this.#sendAll());
  }

  async #sendAll() {
    await undefined; // the receiver's join goes first
    while (!this.isEmpty) {
      try {
        await this.#sendNext();
        this.#failures = 0;
        this.#error = undefined;
        this.#hasRejoined = false;
        this.#doubts = NONE;
      } catch (error) {
        await this.#onFailure(error);
      }
      this.#dropLate();
    }
    this.#draining = undefined;
  }

  /** Joins where that is needed, and tries the first batch once. */
  async #sendNext() {
    this.#dropForgotten();
    if (this.isEmpty) return;
    const { messages = this.#queue } = this.#batches[0] ?? {};
    if (!this.#session.credentials) await withTimeout(this.#timeout(messages), this.#session.join());
    if (this.isEmpty) return;
    // Behind a failure one message goes ahead: a batch that is tried for long holds some that are given up meanwhile.
    const batch = this.#batches[0] ?? this.#pack(BATCH_BYTES, this.#error ? 1 : undefined);
    await batch.sign();
    if (this.#batches.includes(batch) || this.#launch(batch)) await this.#try(batch);
  }

  /** Makes a batch of the queue's first messages. */
  #pack(bytes, number) {
    return new Batch(this.#session, this.#group(0, bytes, number));
  }

  /** Messages of the queue from this one on: as many as a batch of so many bytes holds, and at least one. */
  #group(start, bytes, number = this.#session.offer?.batch ?? 1) {
    let room = bytes - 1;
    let end = start;
    while (end < this.#queue.length && end - start < number) {
      room -= this.#queue[end].bytes + 1;
      if (end > start && room < 0) break;
      end++;
    }
    return this.#queue.slice(start, end);
  }

  /** Takes a batch's messages from the queue. Returns whether they were still its first. */
  #launch(batch) {
    if (this.#queue[0] !== batch.messages[0]) return false;
    this.#queue.splice(0, batch.messages.length);
    this.#batches.push(batch);
    this.#signAhead();
    return true;
  }

  async #try(batch) {
    const ids = await batch.try(this.#timeout(batch.messages));
    this.#end(batch.messages, ({ resolve }, at) => resolve(ids[at]));
  }

  /** Tries without waiting for the turn, as the page is left. */
  async #sendNow(batch) {
    this.#session.ensureUser();
    try {
      if (!batch.isSigned) await batch.sign();
      await this.#try(batch);
    } catch (error) {
      batch.error = error;
    }
  }

  /** A signature takes a moment, which a page that is left does not have: what waits is signed ahead. */
  async #signAhead() {
    if (this.#isSigning || !this.#session.credentials?.secret) return;
    this.#isSigning = true;
    for (let group; (group = this.#unsignedGroup()); ) {
      const batch = new Batch(this.#session, group);
      await batch.sign().catch(() => {}); // it fails again when it is sent
      group[0].ahead = batch;
    }
    this.#isSigning = false;
  }

  /** The first messages that would leave together with the page and are not signed so. */
  #unsignedGroup() {
    let room = KEEPALIVE_BYTES;
    for (let start = 0; start < this.#queue.length && room > 0; ) {
      const group = this.#group(start, BATCH_BYTES);
      const { ahead } = group[0];
      if (ahead?.messages.length !== group.length) return group;
      room -= ahead.bytes;
      start += group.length;
    }
  }

  /** Decides what a failure ends, and waits until the rest may be tried again. */
  async #onFailure(error) {
    const isStranger = ["signature_wrong", "signature_missing"].includes(error.code);
    const isMoved = error.code === "redirected";
    this.#hasRejoined = (isStranger && this.#session.isKept) || ((isStranger || isMoved) && !this.#hasRejoined);
    if (this.#hasRejoined) return this.#session.leave(isStranger);
    if (await this.#isForgotten(error)) return this.#session.leave(true);
    const [batch] = this.#batches;
    if (batch?.messages.length > 1 && batch.messages[error.element]) return this.#refuse(batch, error);
    const messages = batch?.messages ?? this.#queue; // none was tried: they wait for the join
    if (batch) batch.error = error;
    this.#error = isTransient(error) ? error : undefined;
    const retryAfter = (error.retryAfter ?? 0) * 1_000;
    const isOver = (remaining) => !isTransient(error) || remaining <= 0 || retryAfter > remaining;
    const over = messages.filter((message) => isOver(this.#remaining(message)));
    this.#fail(over, error);
    const next = messages.find(({ done }) => !done);
    if (!next) {
      this.#failures = 0;
      return;
    }
    const pause = Math.min(this.#remaining(next), backOff(this.#failures++, 500));
    await this.#pause.wait(Math.max(retryAfter, pause));
  }

  /**
   * Whether a signed bus no longer knows us, and something in front of it put its own page in the place of that 403: we
   * may join, and then we are refused again. A firewall or a limit would let us through as whom we are.
   */
  async #isForgotten({ code, status }) {
    if (code !== "http" || status !== 403 || !this.#session.credentials?.secret) return false;
    if (this.#doubts === RAISED) {
      this.#doubts = SETTLED; // as another user we may be refused too
      return true;
    }
    const mayJoin = () => this.#session.askToJoin().then(() => true, () => false);
    if (this.#doubts === NONE && (await mayJoin())) this.#doubts = RAISED;
    return false;
  }

  /** Fails the message that the bus refuses. Nothing of its batch was published: the others go on in another one. */
  #refuse(batch, error) {
    this.#batches.shift();
    const refused = batch.messages[error.element];
    const others = batch.messages.filter((message) => message !== refused && !message.done);
    for (const message of others) message.ahead = undefined;
    this.#queue.unshift(...others);
    this.#fail([refused], error);
  }

  /** After a sleep the bus may have forgotten the earlier tries, and would publish the messages twice. */
  #dropForgotten() {
    const { messages, error } = this.#batches[0] ?? {};
    if (error) this.#fail(messages.filter((message) => this.#remaining(message) <= -MIN_TIMEOUT), error);
  }

  /** Fails what has waited in the queue until its time was over. */
  #dropLate() {
    const isLate = (message) => this.#remaining(message) <= Math.min(0, message.deadline - MIN_TIMEOUT);
    let number = 0; // in the order of their deadlines
    while (number < this.#queue.length && isLate(this.#queue[number])) number++;
    if (!number) return;
    const error = this.#error ?? new BusError("late", "The message waited behind others until its deadline was over.");
    this.#fail(this.#queue.slice(0, number), error);
  }

  #fail(messages, error) {
    const failed = messages.filter(({ done }) => !done);
    if (failed.length) this.#doubts = NONE;
    this.#end(failed, ({ reject }) => reject(error));
    for (const _ of failed) this.#fire(new Event("error"), { error });
  }

  /** Settles messages, and forgets them. */
  #end(messages, settle) {
    const before = this.bufferedAmount;
    messages.forEach((message, at) => {
      if (message.done) return;
      message.done = true;
      this.bufferedAmount -= message.bytes;
      settle(message, at);
    });
    this.#queue = this.#queue.filter(({ done }) => !done);
    this.#batches = this.#batches.filter((batch) => !batch.isDone);
    const isLow = this.bufferedAmount <= this.lowThreshold;
    if (isLow && before > this.lowThreshold) this.#fire(new Event("bufferedamountlow"));
  }

  /** Milliseconds to the deadline, by the clock that went further: one may be set, the other may stop in sleep. */
  #remaining({ addedAt: [date, time], deadline }) {
    return deadline - Math.max(Date.now() - date, performance.now() - time);
  }

  /** Milliseconds for the next try: to the first deadline. */
  #timeout(messages) {
    const remaining = this.#remaining(messages.find(({ done }) => !done) ?? messages[0]);
    return Math.max(MIN_TIMEOUT, Math.min(REQUEST_TIMEOUT, remaining));
  }
}
