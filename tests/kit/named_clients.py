"""Clients whose every request has a name of its own, in a process of their own (standard library only).

The name is the request's path, `/<kind>/<client>-<number>`, so what a server says of a request can be matched with what its
client saw. Run as a script: one JSON object on standard input says what to do; a further line `{"stuck": "<mode>"}` sends
one request that is never answered by itself; the end of standard input is the end. Each request becomes one JSON line in
the file `book`: see `Record`. What the outcomes mean is said in gracehooks/demo/clients.py, whose connection is used; a
WebSocket is `ok` when it ended with a close frame, whoever sent it first.
"""

from __future__ import annotations

import base64
import json
import os
import random
import select
import sys
import threading
import time
from typing import Any

sys.path.insert(0, os.environ["GRACEKIT_CLIENTS"])  # the directory of gracehooks/demo/clients.py
import clients
from clients import Bad, Connection

OUTCOMES = clients.OUTCOMES
OK, REFUSED, RESET, CUT, WRONG, IDLE, TIMEOUT = range(7)
#: After a refusal, so that a server that is down is not a busy loop, in seconds.
RETRY = 0.05


class Record:
    """One request: when it began, when its last byte was sent (0: not all), when it ended, and how.

    `pid` is the worker that answered, or the one that answered before on the same connection; 0 where nobody knows.
    """

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind
        self.begun = time.monotonic()
        self.sent = 0.0
        self.pid = 0
        self.port = 0  # our end of the connection
        self.first = True  # of its connection


class Book:
    """The records, a line each."""

    def __init__(self, path: str) -> None:
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._file = open(path, "w")  # noqa: SIM115 - open for as long as the process

    def note(self, record: Record, outcome: int, detail: str = "") -> None:
        line = json.dumps({**vars(record), "ended": time.monotonic(), "outcome": OUTCOMES[outcome], "detail": detail})
        with self._lock:
            self._file.write(line + "\n")

    def flush(self) -> None:
        with self._lock:
            self._file.flush()


class Client(threading.Thread):
    """One closed loop of one kind."""

    def __init__(self, book: Book, plan: dict[str, Any], kind: str, number: int, mode: str = "") -> None:
        super().__init__(daemon=True)
        self.book, self.plan, self.kind, self.number, self.mode = book, plan, kind, number, mode
        self.random = random.Random(f"{plan['seed']}/{kind}/{number}")
        self.kept: Connection | None = None
        self.kept_pid = 0
        self.count = 0

    def run(self) -> None:
        while not self.book.ended.is_set():
            if self.kept is not None and self.kept.was_closed():
                self.drop()
            self.count += 1
            record = Record(f"/{self.kind}/{self.number}-{self.count}", self.kind)
            try:
                self.once(record)
                self.book.note(record, OK)
            except Bad as bad:
                self.drop()
                if bad.outcome != IDLE:
                    self.book.note(record, bad.outcome, bad.detail)
                if bad.outcome == REFUSED:
                    self.book.ended.wait(RETRY)
            except Exception as error:
                self.drop()
                self.book.note(record, WRONG, repr(error))
            if self.kind == "stuck":
                return
            self.book.ended.wait(self.random.uniform(0, 2 * self.plan["think"]))
        self.drop()

    def drop(self) -> None:
        if self.kept is not None:
            self.kept.close()
            self.kept, self.kept_pid = None, 0

    def once(self, record: Record) -> None:
        """One request, to the end of its answer; raises Bad."""
        connection = self.kept
        timeout = 600.0 if self.kind == "stuck" else self.plan["timeout"]
        if connection is None:
            self.kept = connection = Connection(self.plan["address"], timeout)
        else:
            record.first, record.pid = False, self.kept_pid
        record.begun = time.monotonic()
        record.port = connection.socket.getsockname()[1]
        connection.until = record.begun + timeout
        if self.kind == "ws":
            self.websocket(connection, record)
            return self.drop()
        self.send(connection, record)
        status, keeps, body = connection.read_answer()
        if status != 200:
            raise Bad(WRONG, f"{status} {body[:200]!r}")
        name, _, pid = body.decode().rpartition("\n")[2].partition(" ")
        if name != record.name:
            raise Bad(WRONG, f"{body[-200:]!r}")
        record.pid = self.kept_pid = int(pid)
        if self.kind != "keepalive" or not keeps:
            self.drop()
        return None

    def send(self, connection: Connection, record: Record) -> None:
        kind, chance = self.kind, self.random.uniform
        pause = chance(0, self.plan["pause"])
        if kind == "late":  # connected, and only later a request
            self.book.ended.wait(pause)
            if connection.was_closed():
                raise Bad(IDLE, "closed before a request was sent")
            record.begun = time.monotonic()
        query = {
            "sleep": f"?s={pause:.3f}",
            "stream": f"?s={pause / 5:.3f}",
            "job": f"?s={2 * pause:.3f}",
            "stuck": f"?mode={self.mode}",
        }.get(kind, "")
        close = "" if kind == "keepalive" else "Connection: close\r\n"
        body = b"x" * 40_000 if kind == "upload" else b""
        method = "POST" if kind in ("upload", "job") else "GET"
        head = (
            f"{method} {record.name}{query} HTTP/1.1\r\nHost: localhost\r\n{close}Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        if kind == "half":
            connection.send(head[:20])
            time.sleep(pause)
            head = head[20:]
        connection.send(head)
        for part in range(4 if body else 0):
            if connection.broken:
                break
            time.sleep(pause / 4)
            connection.send(body[part * 10_000 : (part + 1) * 10_000])
        record.sent = 0.0 if connection.broken else time.monotonic()

    # -- a WebSocket -------------------------------------------------------------------------------------------------
    def websocket(self, connection: Connection, record: Record) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        connection.send(
            f"GET {record.name} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        record.sent = time.monotonic()
        status = int(connection.line().split(b" ", 2)[1])
        while connection.line():
            pass
        if status != 101:
            raise Bad(WRONG, str(status))
        leaves = time.monotonic() + self.random.uniform(0, 10 * self.plan["pause"])
        while True:
            over = time.monotonic() >= leaves or self.book.ended.is_set()
            connection.send(frame(8, b"\x03\xe8") if over else frame(1, b"hello"))
            code, payload = read_frame(connection)
            while over and code != 8:
                code, payload = read_frame(connection)
            if code == 8:
                number = int.from_bytes(payload[:2], "big")
                if not over:
                    connection.send(frame(8, payload))
                if number not in (1000, 1012):
                    raise Bad(WRONG, f"close code {number}")
                return
            record.pid = int(payload)
            self.book.ended.wait(self.plan["pause"] / 2)


def frame(code: int, payload: bytes) -> bytes:
    """A masked frame, whose mask is zero."""
    return bytes([0x80 | code, 0x80 | len(payload)]) + b"\0\0\0\0" + payload


def read_frame(connection: Connection) -> tuple[int, bytes]:
    """A frame of a server: its opcode and payload."""
    first, size = connection.exactly(2)
    return first & 15, connection.exactly(size)


def main() -> None:
    """Read the plan, run the clients, end when standard input does."""
    plan = json.loads(sys.stdin.readline())
    book = Book(plan["book"])
    running = [Client(book, plan, kind, number) for number, kind in enumerate(plan["kinds"])]
    for each in running:
        each.start()
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], 0.05)
        book.flush()
        if not readable:
            continue
        line = sys.stdin.readline()
        if not line:
            break
        stuck = Client(book, plan, "stuck", 1000 + len(running), json.loads(line)["stuck"])
        running.append(stuck)
        stuck.start()
    book.ended.set()
    until = time.monotonic() + plan["timeout"] + 5
    for each in running:
        each.join(max(0.0, until - time.monotonic()))
    book.flush()
    os._exit(0 if not any(each.is_alive() for each in running) else 1)


if __name__ == "__main__":
    main()
