// A page that uses all of the module's types, beside shortbus.mjs and shortbus.d.mts. types.test.mjs compiles it: each
// line behind @ts-expect-error has to be refused, and every other line has to pass.

import standard, { MessageBus } from "./shortbus.mjs";
import type {
  BusError,
  BusErrorEvent,
  BusMessageEvent,
  BusPresenceEvent,
  BusRejoinEvent,
  MessageBusEventMap,
  MessageBusOptions,
} from "./shortbus.mjs";

interface Move {
  from: string;
  to: string;
}

/** Compiles if both types are the same, and `any` is the same as `any` alone. */
type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false;
const same = <A, B>(_: Same<A, B>) => {};

same<typeof standard, typeof MessageBus>(true);
// @ts-expect-error: `same` tells types apart
same<number, any>(true);

// The constructor.

const options: MessageBusOptions = { interval: 500, deadline: 30_000, signal: new AbortController().signal };
const bus = new MessageBus<Move>("/cgi-bin/chess", options);
new MessageBus();
new MessageBus({});
new MessageBus(options);
new MessageBus(new URL("https://example.com/cgi-bin/chat"));
new MessageBus({ identity: "tab", after: 0, echo: true, headers: { Authorization: "Basic YTpi" } });
new MessageBus({ user: 7, headers: new Headers() });
new MessageBus(function (given) {
  same<typeof given, MessageBus<any>>(true);
  same<typeof this, MessageBus<any>>(true);
});
new MessageBus<Move>((given) => given.postMessage({ from: "e2", to: "e4" }), { interval: 100 });
// @ts-expect-error: no number is a URL
new MessageBus(1);
// @ts-expect-error: no such option
new MessageBus("/cgi-bin/chat", { timeout: 1 });
// @ts-expect-error: milliseconds are a number
new MessageBus({ interval: "500" });
// @ts-expect-error: no such place
new MessageBus({ identity: "server" });
// @ts-expect-error: a user is a number
new MessageBus({ user: "7" });
// @ts-expect-error: its signal is what aborts, not the controller
new MessageBus({ signal: new AbortController() });
// @ts-expect-error: it is a class
MessageBus();

// What it knows.

same<typeof bus.name, string>(true);
same<typeof bus.url, string>(true);
same<typeof bus.user, number | undefined>(true);
same<typeof bus.lastId, number | undefined>(true);
same<typeof bus.connected, boolean>(true);
same<typeof bus.transport, "stream" | "long-poll" | "poll" | "tab" | undefined>(true);
same<typeof bus.bufferedAmount, number>(true);
same<typeof bus.others, ReadonlyMap<number, any>>(true);
same<typeof bus.bufferedAmountLowThreshold, number>(true);
bus.bufferedAmountLowThreshold = 10_000;
// @ts-expect-error: undefined until the bus is joined
bus.user.toFixed();
// @ts-expect-error: no such transport
bus.transport === "websocket";
// @ts-expect-error: read-only
bus.name = "chat";
// @ts-expect-error: read-only
bus.url = "/cgi-bin/chat";
// @ts-expect-error: read-only
bus.user = 1;
// @ts-expect-error: read-only
bus.lastId = 1;
// @ts-expect-error: read-only
bus.connected = true;
// @ts-expect-error: read-only
bus.transport = "poll";
// @ts-expect-error: read-only
bus.bufferedAmount = 0;
// @ts-expect-error: read-only
bus.others.clear();
// @ts-expect-error: bytes are a number
bus.bufferedAmountLowThreshold = "10 KB";

// What it does.

same<ReturnType<typeof bus.postMessage>, void>(true);
bus.postMessage({ from: "e2", to: "e4" });
const id: number = await bus.send({ from: "e7", to: "e5" });
same<typeof id, number>(true);
bus.present({ name: "Ann" });
same<ReturnType<typeof bus.present>, void>(true);
bus.present();
same<ReturnType<typeof bus.close>, void>(true);
// @ts-expect-error: not a move
bus.postMessage("e4");
// @ts-expect-error: half a move
bus.send({ from: "e2" });
// @ts-expect-error: a message has data
bus.postMessage();
// @ts-expect-error: close says no more
bus.close("now");
// @ts-expect-error: no such method
bus.open();

// What it tells: by properties, ...

bus.onopen = (event) => same<typeof event, Event>(true);
bus.onmessage = function (event) {
  same<typeof event, BusMessageEvent<Move>>(true);
  this.postMessage({ from: event.data.to, to: event.data.from });
};
bus.onmessageerror = (event) => same<typeof event, MessageEvent<string>>(true);
bus.onmissed = (event) => same<typeof event, Event>(true);
bus.onrejoin = (event) => same<typeof event, BusRejoinEvent>(true);
bus.onerror = (event) => same<typeof event, BusErrorEvent>(true);
bus.onbufferedamountlow = (event) => same<typeof event, Event>(true);
bus.onpresence = (event) => same<typeof event, BusPresenceEvent>(true);
bus.onclose = (event) => same<typeof event, Event>(true);
bus.onopen = bus.onmessage = bus.onmessageerror = bus.onmissed = bus.onrejoin = bus.onerror = bus.onclose = null;
bus.onbufferedamountlow = bus.onpresence = null;
// @ts-expect-error: a listener is a function
bus.onmessage = "no function";
// @ts-expect-error: the event is no move
bus.onmessage = (event: Move) => event.from;
// @ts-expect-error: no such event
bus.onjoin = () => {};

// ... by listeners, ...

bus.addEventListener("message", ({ data, user, lastEventId }) => {
  same<typeof data, Move>(true);
  same<typeof user, number>(true);
  same<typeof lastEventId, string>(true);
});
bus.addEventListener("rejoin", ({ user }) => same<typeof user, number>(true), { once: true, passive: true });
bus.addEventListener("error", ({ error }) => {
  same<typeof error, BusError>(true);
  same<typeof error.code, string>(true);
  same<typeof error.message, string>(true);
  same<typeof error.status, number>(true);
  same<typeof error.retryAfter, number>(true);
  // @ts-expect-error: read-only
  error.code = "busy";
});
bus.addEventListener("bufferedamountlow", (event) => same<typeof event, Event>(true));
bus.addEventListener("messageerror", ({ data }) => same<typeof data, string>(true), true);
bus.addEventListener("custom", { handleEvent: (event) => same<typeof event, Event>(true) });
bus.addEventListener("open", null);
const listener = (event: BusMessageEvent<Move>) => event.data.from;
bus.addEventListener("message", listener);
bus.removeEventListener("message", listener);
bus.removeEventListener("message", listener, { capture: true });
bus.removeEventListener("custom", null);
// @ts-expect-error: an `open` event has no data
bus.addEventListener("open", ({ data }) => data);
// @ts-expect-error: no such property of a message
bus.addEventListener("message", ({ sender }) => sender);

// ... by callbacks that get the bare data, ...

const callback = (data: Move) => data.from;
bus.addEventListener(callback);
bus.removeEventListener(callback);
// @ts-expect-error: the data is a move
bus.addEventListener((data: number) => data);
// @ts-expect-error: such a callback has no options
bus.addEventListener(callback, { once: true });

// ... and by a loop.

for await (const event of bus) same<typeof event, BusMessageEvent<Move>>(true);
const target: EventTarget = bus;
target.dispatchEvent(new Event("custom"));

bus.addEventListener("presence", ({ user, data }) => {
  same<typeof user, number>(true);
  same<typeof data, any>(true);
});

type Known = "open" | "message" | "messageerror" | "missed" | "rejoin" | "error";
type EventName = Known | "bufferedamountlow" | "presence" | "close";
same<keyof MessageBusEventMap, EventName>(true);
same<MessageBusEventMap<Move>["message"], BusMessageEvent<Move>>(true);
type OptionName =
  | "interval"
  | "idleInterval"
  | "deadline"
  | "signal"
  | "identity"
  | "user"
  | "after"
  | "echo"
  | "headers";
same<keyof MessageBusOptions, OptionName>(true);
