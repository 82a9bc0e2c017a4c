/// <reference lib="dom" />

/** Why something failed. */
export interface BusError extends Error {
  /** The server's stable code, or `network`, `http`, `not_a_bus`, `late`, `insecure_context`, `signed_bus`. */
  readonly code: string;
  /** The HTTP status; 0 where no server answered. */
  readonly status: number;
  /** Seconds after which the server wants to be asked again, also where it gave a date; 0 where it said none. */
  readonly retryAfter: number;
}

export interface BusMessageEvent<T = any> extends MessageEvent<T> {
  /** The sender. */
  readonly user: number;
}

export interface BusErrorEvent extends Event {
  readonly error: BusError;
}

export interface BusRejoinEvent extends Event {
  /** This client's new id. */
  readonly user: number;
}

export interface BusPresenceEvent extends Event {
  /** Who came, left, or says something else of itself now. */
  readonly user: number;
  /** What it says of itself; undefined if it left. */
  readonly data: any;
}

export interface MessageBusEventMap<T = any> {
  /** Joined, or connected again. */
  open: Event;
  message: BusMessageEvent<T>;
  /** A reply, or one message of a stream, was no JSON; `data` is its text. */
  messageerror: MessageEvent<string>;
  /** Some messages were gone before this client could read them. */
  missed: Event;
  /** The bus had lost its key, or is signed from now on: this client has another id, and its cursor still. */
  rejoin: BusRejoinEvent;
  /** A poll failed, and they go on by themselves; or a send did for good. */
  error: BusErrorEvent;
  /** What waits to be sent has fallen to `bufferedAmountLowThreshold`, or below. */
  bufferedamountlow: Event;
  /** One of `others` came, left, or changed; after the first call of `present`. */
  presence: BusPresenceEvent;
  close: Event;
}

export interface MessageBusOptions {
  /** Milliseconds between two polls; 500 unless given. */
  interval?: number;
  /** Milliseconds between two plain polls where nothing happens; `interval`, but 5,000 in a hidden page, unless given. */
  idleInterval?: number;
  /** Milliseconds for which a send is tried again, 30,000 unless given; no longer than the bus's SHORTBUS_TTL. */
  deadline?: number;
  /**
   * Keeps the user over reloads, of the tab or of the whole browser, in its sessionStorage or localStorage. All tabs with
   * one user are one: they hear each other with `echo` only.
   */
  identity?: "tab" | "browser";
  /** The user, from 0 to 2^53-1; on a signed bus an error. */
  user?: number;
  /** Begins with the messages after this id; 0: with all that live. Unless given, with what comes after the join. */
  after?: number;
  /** Also hears what this user sends itself, in the one order that all see. */
  echo?: boolean;
  /** Of every request, such as `Authorization`. They are read at each request. */
  headers?: HeadersInit;
  /** Closes the bus, and drops what is not on its way: those promises are rejected. */
  signal?: AbortSignal;
}

export class MessageBus<T = any> extends EventTarget implements AsyncIterable<BusMessageEvent<T>> {
  /** Without a URL: the bus that this script was loaded from. */
  constructor(url?: string | URL, options?: MessageBusOptions);
  constructor(options: MessageBusOptions);
  /** Calls `ready` once the bus is joined. */
  constructor(ready: (this: MessageBus<T>, bus: MessageBus<T>) => void, options?: MessageBusOptions);

  /** The last part of the URL. */
  readonly name: string;
  readonly url: string;
  /** This user's id, which a `rejoin` changes; undefined until the bus is joined, unless given or kept. */
  readonly user: number | undefined;
  /** All messages up to this id have been passed; undefined until the bus is joined, unless given as `after`. */
  readonly lastId: number | undefined;
  /** Whether the latest poll was answered. */
  readonly connected: boolean;
  /** How it hears; by `tab`: another tab does, for all of them. Undefined until it hears, and while not connected. */
  readonly transport: "stream" | "long-poll" | "poll" | "tab" | undefined;
  /** Bytes of the messages, as JSON in UTF-8, that were given to be sent and are neither delivered nor failed. */
  readonly bufferedAmount: number;
  /** What each other user says of itself by `present`. */
  readonly others: ReadonlyMap<number, any>;
  /** Bytes; 0 until set. */
  bufferedAmountLowThreshold: number;

  onopen: ((this: this, event: Event) => void) | null;
  onmessage: ((this: this, event: BusMessageEvent<T>) => void) | null;
  onmessageerror: ((this: this, event: MessageEvent<string>) => void) | null;
  onmissed: ((this: this, event: Event) => void) | null;
  onrejoin: ((this: this, event: BusRejoinEvent) => void) | null;
  onerror: ((this: this, event: BusErrorEvent) => void) | null;
  onbufferedamountlow: ((this: this, event: Event) => void) | null;
  onpresence: ((this: this, event: BusPresenceEvent) => void) | null;
  onclose: ((this: this, event: Event) => void) | null;

  /** Sends; where that fails for good there is an `error` event. */
  postMessage(data: T): void;
  /** Sends, trying again until the deadline: a promise of the message's id. */
  send(data: T): Promise<number>;
  /** Says that this user is here, and something of it; without data that it is not, and only sees who is. */
  present(data?: any): void;
  /** Hears no more. What was given to be sent still leaves. */
  close(): void;

  addEventListener<K extends keyof MessageBusEventMap<T>>(
    type: K,
    listener: (this: this, event: MessageBusEventMap<T>[K]) => void,
    options?: boolean | AddEventListenerOptions,
  ): void;
  /** The first shortbus's way: gets the bare data of each message. */
  addEventListener(callback: (data: T) => void): void;
  addEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | AddEventListenerOptions): void;
  removeEventListener<K extends keyof MessageBusEventMap<T>>(
    type: K,
    listener: (this: this, event: MessageBusEventMap<T>[K]) => void,
    options?: boolean | EventListenerOptions,
  ): void;
  removeEventListener(callback: (data: T) => void): void;
  removeEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | EventListenerOptions): void;

  /** The message events from now on, until the bus is closed or the loop is left. */
  [Symbol.asyncIterator](): AsyncIterator<BusMessageEvent<T>>;
}

export default MessageBus;

/** As the classic script gives it away. */
type Class = typeof MessageBus;
declare global {
  var MessageBus: Class;
}
