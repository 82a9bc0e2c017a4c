const REQUEST_TIMEOUT = 10_000; // milliseconds that the server gets for a join or for one try of a message
const MAX_PAUSE = 30_000; // milliseconds, the longest pause after failures
const HEARTBEAT = 15_000; // milliseconds after which the server writes a comment to a stream without news
const STREAM_TIMEOUT = 2.5 * HEARTBEAT; // milliseconds of silence after which a stream counts as dead

/** Exponential back-off with full jitter: a thousand pages must not return at the same moment. */
const backOff = (failures, first) => Math.random() * Math.min(MAX_PAUSE, first * 2 ** failures);

/** What this gives; undefined where a browser has no such thing, or throws: in a sandbox, with cookies blocked. */
function attempt(get) {
  try {
    return get();
  } catch {
    return undefined;
  }
}

/** Passes a promise on, or rejects once the signal is aborted: a browser's fetch may never settle, not even then. */
function orAborted(signal, promise) {
  return new Promise((resolve, reject) => {
    const stop = () => reject(signal.reason);
    signal.addEventListener("abort", stop);
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", stop));
    if (signal.aborted) stop();
  });
}

/** Passes a promise on, or rejects if it takes too long. */
function withTimeout(milliseconds, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    const error = new BusError("network", "The bus cannot be reached: it does not answer.");
    timer = setTimeout(reject, milliseconds, error);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** A pause that can be ended early. */
class Pause {
  end() {}

  wait(milliseconds) {
    return new Promise((resolve) => {
      // A timer fires at once if it is set to more.
      const timer = setTimeout(resolve, Math.min(milliseconds, 2 ** 31 - 1));
      this.end = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
