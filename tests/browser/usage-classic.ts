// A page with the classic script, beside shortbus.d.ts: the class is a global one. types.test.mjs compiles it, as it does
// usage.mts.

/// <reference path="./shortbus.d.ts" />

const bus = new MessageBus<{ text: string }>();
bus.onmessage = ({ data, user }) => console.log(user.toFixed(), data.text);
bus.postMessage({ text: "hello" });
const other = new globalThis.MessageBus("/cgi-bin/quiz");
other.send(1).then((id) => id.toFixed());
// @ts-expect-error: not such a message
bus.postMessage(1);
// @ts-expect-error: its error has no name of its own among the globals
new BusError();
