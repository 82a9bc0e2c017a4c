const PLAIN = ["Object", "Array", "String", "Number", "Boolean", "Arguments", "Module"]; // what JSON has, or unpacks
const INSTEAD = {
  Map: "[...map], or Object.fromEntries(map)",
  Set: "[...set]",
  BigInt: "a text: String(number)",
  ArrayBuffer: "[...new Uint8Array(buffer)], or base64",
  Blob: "await blob.text(), or base64",
  File: "await file.text(), or base64",
  Error: "its message",
};

/** A message as JSON. What JSON would ruin without a word is an error: of a Map it makes {}. */
function toJson(data) {
  const json = JSON.stringify(data, (_, value) => {
    if (typeof value !== "bigint" && (typeof value !== "object" || value === null)) return value;
    if (Array.isArray(value)) return value;
    const type = Object.prototype.toString.call(value).slice("[object ".length, -1);
    const isBytes = ArrayBuffer.isView(value);
    // An object with properties of its own is as good as a plain one, whatever its class.
    if (PLAIN.includes(type) || (Object.keys(value).length && !isBytes)) return value;
    const instead = INSTEAD[type] ?? (isBytes ? "[...bytes], or base64" : "a plain object with what it is to tell");
    throw new DOMException(`JSON has no ${type}, and ruins it: send ${instead}.`, "DataCloneError");
  });
  if (json === undefined) {
    const what = typeof data === "object" ? "nothing for what toJSON() returned" : `no ${typeof data}`;
    throw new DOMException(`JSON has ${what}: send null, or what JSON can express.`, "DataCloneError");
  }
  return json;
}
