/** Why something failed. The code and the sentence are the server's or ours; `status` is 0 if no server answered. */
class BusError extends Error {
  name = "BusError";
  status = 0;
  retryAfter = 0;

  constructor(code, message, cause) {
    super(message, { cause });
    this.code = code;
  }
}

const FINAL = ["bad_setting", "insecure_context", "signed_bus"];
// The very reply that complained has set the clock; or it asks for the same again.
const PASSING = ["once_undecided", "signature_too_old", "signature_clock_ahead", "incomplete"];

/** Whether the same message may still be delivered after this: only the bus itself refuses a message for good. */
function isTransient({ code, status }) {
  if (FINAL.includes(code)) return false;
  if (code === "http" || PASSING.includes(code)) return true;
  return !(status >= 400 && status < 500) || [408, 425, 429].includes(status);
}

/** Whether a reply's JSON is an error of a bus: gateways have errors in JSON too. */
const isBusError = (json) => /^[a-z]+(_[a-z]+)*$/.test(json?.error ?? "") && typeof json.message === "string";

/** What to do about an error that is not the bus's, but the web server's, a proxy's, a firewall's. */
function explainStatus(status) {
  const explanations = {
    401: "It wants a login: open the bus's URL in a tab of its own and log in, or give the option 'headers'.",
    403: "Its access rules, a firewall or a limit may forbid it; its error log tells.",
    404: "There is no bus at this URL; look at the name, and at where the web server looks for it.",
    405: "There is no bus at this URL: files can only be read.",
    413: "It takes no request as long as this one; in nginx client_max_body_size is the limit.",
    429: "It limits how many requests there may be.",
    500: "Its error log says why; if it cannot start the bus, look at the file's owner and mode.",
  };
  const what = `The web server, or something in front of it, answered ${status} in the bus's place.`;
  const why = explanations[status] ?? (status < 500 ? "" : "The bus, or what starts it, may be down.");
  return `${what} ${why}`.trim();
}

/** What to do about a reply that says all is well, but is not a bus's. */
function explainReply({ redirected, url, headers }, text) {
  if (text.startsWith("\x7fELF")) {
    return "The web server hands the bus's file out, and does not run it: CGI has to be enabled for its folder.";
  }
  const isPage = headers.get("Content-Type")?.startsWith("text/html");
  const what = isPage ? "What answered is no bus, but a web page, such as a login's or a proxy's." : "";
  const where = redirected ? ` The request was redirected to ${url}.` : "";
  return `${what || "What answered is no bus: its reply is not what a bus says."}${where}`;
}

/** What to do where a browser cannot reach a bus, and does not say why. Nothing where we cannot tell either. */
async function explainNetwork(url) {
  const { location, origin } = globalThis;
  if (!location?.protocol.startsWith("http")) return undefined; // no page
  const bus = new URL(url);
  const isLocal = /^(localhost|127\..*|\[::1\])$/.test(bus.hostname);
  if (location.protocol === "https:" && bus.protocol === "http:" && !isLocal) {
    return "This page came by https, and browsers let such a page use no bus by http: give the bus's https address.";
  }
  const probe = (init) => withTimeout(3_000, fetch(url, { cache: "no-store", credentials: "omit", ...init }));
  try {
    if (bus.origin !== origin) {
      await probe({ mode: "no-cors" });
      const name = origin === "null" ? "*" : origin; // in a sandbox
      const what = `${bus.origin} answers, but lets no page of ${origin} read that`;
      return `${what}: add ${name} to the bus's SHORTBUS_ALLOW_ORIGIN.`;
    }
    const { type } = await probe({ redirect: "manual" });
    if (type !== "opaqueredirect") return undefined;
    return "It is redirected to another origin, where this page may not follow: give the address that this leads to.";
  } catch {
    return undefined; // it is down
  }
}
