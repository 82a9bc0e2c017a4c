#!/usr/bin/env python3
"""A client of a bus, with the standard library alone: docs/protocol.md as a program. client.py URL prints each message
that is published; client.py URL MESSAGE... publishes each MESSAGE, a JSON value. As a module it has the class Bus."""
import base64, email.utils, hashlib, hmac, http.client, itertools, json, random, secrets, sys, time
import urllib.error, urllib.request

FAILURES = (OSError, http.client.HTTPException)  # BusError is an OSError
AGAIN = ("once_undecided", "incomplete", "signature_too_old", "signature_clock_ahead")

class BusError(OSError):
    """What the bus refused; `again` says whether the same request may still succeed."""
    def __init__(self, status, text, headers):
        error = json.loads(text) if text.startswith('{"error":') else {"error": "http", "message": text}
        self.code, retry_after = error["error"], headers.get("Retry-After", "")
        self.retry_after = int(retry_after) if retry_after.isdigit() else 0  # it may be a date
        self.again = status in (408, 425, 429) or status >= 500 and self.code != "bad_setting" or self.code in AGAIN
        super().__init__(f"{status} {self.code}: {error['message']}")

def pause(failures, failure):
    """Sleeps, for a random time, so that not all clients come back at once."""
    time.sleep(max(getattr(failure, "retry_after", 0), random.uniform(0, min(30, 0.5 * 2 ** min(failures, 6)))))

def sign(secret, bus, user, millis, once, batch, body):
    text = f"{bus}\n{user}\n{millis}\n{once}\n".encode() + b"batch=1\n" * batch + body
    return base64.urlsafe_b64encode(hmac.new(secret.encode(), text, hashlib.sha256).digest()).decode().rstrip("=")

class Bus:
    """A user of a bus. `last_id` is its cursor; `on_missed` is called when messages were gone before they were read."""
    def __init__(self, url, deadline=30, on_missed=lambda: None):
        self.url, self.deadline, self.on_missed = url, deadline, on_missed
        self.users, self.last_id, self.clock, self.retry = set(), None, 0, 1000
        self.join()

    def join(self):
        self.offer, _ = self._request("")
        self.user = self.offer["user"]
        self.users.add(self.user)
        self.last_id = self.offer["id"] if self.last_id is None else self.last_id

    def publish(self, data, batch=False, once=None):
        """Publishes a message, or with `batch` all elements of an array: the reply, with `id` and `ids`."""
        body, once = json.dumps(data, allow_nan=False).encode(), once or secrets.token_hex(16)
        until, has_rejoined = time.monotonic() + self.deadline, False
        for failures in itertools.count():
            query = f"?user={self.user}&once={once}" + ("&batch=1" if batch else "")
            if "secret" in self.offer:
                now = round((time.time() + self.clock) * 1000)
                query += f"&time={now}&sig=" + sign(self.offer["secret"], self.offer["bus"], self.user, now, once, batch, body)
            try:
                return self._request(query, body)[0]
            except FAILURES as failure:
                if getattr(failure, "code", "") in ("signature_wrong", "signature_missing") and not has_rejoined:
                    has_rejoined = True
                    self.join()
                elif not getattr(failure, "again", True) or time.monotonic() > until:
                    raise
                else:
                    pause(failures, failure)

    def poll(self, wait=0):
        """What is new, at once or after at most so many seconds."""
        messages, headers = self._request(f"?user={self.user}&id={self.last_id}&wait={wait}", timeout=wait + 10)
        self.last_id = int(headers["Shortbus-Last-Id"])
        if headers["Shortbus-Missed"]:
            self.on_missed()
        return [message for message in messages if message["user"] not in self.users]

    def listen(self):
        """All messages from now on, by the best way that the bus offers."""
        failures, wait, has_streams = 0, min(self.offer.get("wait", 0), 25), self.offer.get("stream")
        while True:
            try:
                yield from self._stream() if has_streams else self.poll(wait)
                failures = 0
                time.sleep(self.retry / 1000 if has_streams else 0 if wait else 0.5)
            except FAILURES as failure:
                if not getattr(failure, "again", True):
                    raise
                pause(failures, failure)
                failures += 1

    def _stream(self):
        with self._open(f"?user={self.user}&id={self.last_id}&stream=1", timeout=40) as lines:
            fields = {}
            for line in lines:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if line != b"\n":
                    fields.setdefault(name, []).append(value)
                    continue
                event, fields = fields, {}
                self.last_id = int(event.get("id", [self.last_id])[0])
                self.retry = int(event.get("retry", [self.retry])[0])
                kind, text = event.get("event"), "\n".join(event.get("data", []))
                if kind == ["missed"]:
                    self.on_missed()
                elif kind == ["unavailable"]:
                    raise BusError(503, text, {})
                elif not kind and text and (message := json.loads(text))["user"] not in self.users:
                    yield message

    def _request(self, query, body=None, timeout=10):
        with self._open(query, body, timeout) as reply:
            return json.load(reply), reply.headers

    def _open(self, query, body=None, timeout=10):
        try:
            reply = urllib.request.urlopen(urllib.request.Request(self.url + query, body), timeout=timeout)
        except urllib.error.HTTPError as error:
            reply = error
        if reply.headers["Date"]:
            self.clock = email.utils.parsedate_to_datetime(reply.headers["Date"]).timestamp() + 0.5 - time.time()
        if reply.status != 200:
            raise BusError(reply.status, reply.read().decode(errors="replace"), reply.headers)
        return reply

if __name__ == "__main__":
    me = Bus(sys.argv[1])
    for reply in map(me.publish, map(json.loads, sys.argv[2:])) if sys.argv[2:] else me.listen():
        print(json.dumps(reply), flush=True)
