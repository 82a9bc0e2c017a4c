/** Reads server-sent events (WHATWG HTML, section 9.2.6) from text that comes in pieces, cut anywhere. */
function eventReader(dispatch) {
  let rest = "";
  let returned = false; // the last piece ended with CR: an LF belongs to it
  let [type, data, id] = ["", [], ""];
  return (text) => {
    if (!text) return;
    if (returned && text[0] === "\n") text = text.slice(1);
    returned = text.endsWith("\r");
    const lines = (rest + text).split(/\r\n|\r|\n/);
    rest = lines.pop();
    for (const line of lines) {
      const [, field, value] = /^([^:]*):? ?(.*)/s.exec(line);
      if (field === "event") type = value;
      else if (field === "data") data.push(value);
      else if (field === "id" && !value.includes("\0")) id = value;
      if (line) continue;
      if (data.length) dispatch(type || "message", data.join("\n"), id);
      [type, data] = ["", []];
    }
  };
}

/** Reads a message. What is none spoils itself alone: its text is kept. */
function readMessage(text, id) {
  try {
    const message = JSON.parse(text);
    if (isId(message?.id)) return message;
  } catch {} // not JSON
  return { id, text };
}

/** Reads pages from the text of a bus's stream: what each piece brings, even if that is nothing. */
function pageReader(deliver) {
  let page = { messages: [] };
  const flush = () => {
    // What was missed belongs to what comes next.
    if (page.missed && !page.last) return;
    deliver(page);
    page = { messages: [] };
  };
  const read = eventReader((type, data, id) => {
    if (type === "missed") {
      flush();
      page.missed = true;
    } else if (type === "message" || type === "cursor") {
      page.last = Number(id);
      if (type === "message") page.messages.push(readMessage(data, page.last));
    }
  });
  return (text) => {
    read(text);
    flush();
  };
}
