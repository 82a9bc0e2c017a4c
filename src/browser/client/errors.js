/** Why something failed. The code and the sentence are the server's or ours; `status` is 0 if no server answered. */
class BusError extends Error {
  name = "BusError";
  status = 0;
  retryAfter = 0;

  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/** Whether the same message may still be delivered after this. */
function isTransient({ code, status }) {
  if (["bad_setting", "insecure_context"].includes(code)) return false;
  // The very reply that complained has set the clock; or it asks for the same again.
  if (["once_undecided", "signature_too_old", "signature_clock_ahead", "incomplete"].includes(code)) return true;
  return !(status >= 400 && status < 500) || [408, 425, 429].includes(status);
}
