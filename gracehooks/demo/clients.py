"""Closed-loop HTTP clients over raw sockets, in a process of their own (standard library only).

The demo and the project's own tests run it as a script: one JSON object on standard input says what to do, one JSON line
each 50 ms on standard output says what happened, and the end of standard input is the end: each client finishes the
request that it has begun.
What counts, for each request:

- before sending on a kept connection the client looks whether the server has closed it; if so, that is `closed_idle`: no
  request was on its way, nothing is lost, the client connects again;
- once the first byte is on its way, anything but a whole answer is a loss, also where HTTP/1.1 would let a client try
  again: `reset_before_byte` (closed or reset before any byte of an answer), `cut` (in the middle of one), `timeout`,
  `wrong_status` (not 200, or not what was asked for);
- `refused`: no connection at all.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import ssl
import struct
import sys
import threading
import time
from typing import Any

OUTCOMES = ("ok", "refused", "reset_before_byte", "cut", "wrong_status", "closed_idle", "timeout")
OK, REFUSED, RESET, CUT, WRONG, IDLE, TIMEOUT = range(7)
RECORD = struct.Struct("=ddBB")  # begun, ended (monotonic), kind, outcome
#: A client that takes whoever answers: what is tested is not who that is.
TLS = ssl.create_default_context()
TLS.check_hostname = False
TLS.verify_mode = ssl.CERT_NONE
SOONEST_RETRY = 0.01  # after a refusal, so that a dead server is not a busy loop


class Bad(Exception):  # noqa: N818 - an outcome, not an error of this program
    """A request that had no whole answer: its outcome, and what was seen."""

    def __init__(self, outcome: int, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.detail = detail


class Connection:
    """One connection and the bytes read from it and not used yet."""

    def __init__(self, address: dict[str, Any], timeout: float) -> None:
        family = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX}[address["family"]]
        self.socket = socket.socket(family)
        self.rest = b""
        self.answer_begun = False
        self.broken: OSError | None = None
        self.until = time.monotonic() + timeout
        try:
            self.socket.settimeout(timeout)
            self.socket.connect(address["path"] if family == socket.AF_UNIX else (address["host"], address["port"]))
            if family != socket.AF_UNIX:
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.get("tls"):
                self.socket = TLS.wrap_socket(self.socket)
        except TimeoutError:
            self.close()
            raise Bad(TIMEOUT, "no connection in time") from None
        except OSError as error:
            self.close()
            raise Bad(REFUSED, repr(error)) from None

    def close(self) -> None:
        """Close it."""
        self.socket.close()

    def was_closed(self) -> bool:
        """Whether the server closed it while it was idle, as a client that looks can see."""
        readable, _, _ = select.select([self.socket], [], [], 0)
        if not readable:
            return False
        try:
            if not isinstance(self.socket, ssl.SSLSocket):
                return self.socket.recv(1, socket.MSG_PEEK) == b""
            self.socket.settimeout(0)
            return self.socket.recv(1) == b""  # the server has nothing to say unasked
        except ssl.SSLWantReadError:
            return False  # session tickets, which come after the handshake
        except OSError:
            return True
        finally:
            self.socket.settimeout(max(0.001, self.until - time.monotonic()))

    def send(self, data: bytes) -> None:
        """Send all of it; where the server closes meanwhile, its answer is still looked for."""
        try:
            self.socket.sendall(data)
        except TimeoutError:
            raise Bad(TIMEOUT, "while sending") from None
        except OSError as error:
            self.broken = error  # an answer may have been sent all the same: read it first

    def more(self) -> None:
        """Read what comes next."""
        self.socket.settimeout(max(0.001, self.until - time.monotonic()))
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            raise Bad(TIMEOUT, "while waiting for the answer") from None
        except OSError as error:
            raise Bad(CUT if self.answer_begun else RESET, repr(error)) from None
        if not data:
            if self.answer_begun:
                raise Bad(CUT, "end of file in the middle of the answer")
            raise Bad(RESET, f"end of file before the answer{f' ({self.broken!r})' if self.broken else ''}")
        self.answer_begun = True
        self.rest += data

    def line(self) -> bytes:
        """The next line, without its end."""
        while b"\r\n" not in self.rest:
            self.more()
        line, _, self.rest = self.rest.partition(b"\r\n")
        return line

    def exactly(self, size: int) -> bytes:
        """The next `size` bytes."""
        while len(self.rest) < size:
            self.more()
        data, self.rest = self.rest[:size], self.rest[size:]
        return data

    def read_answer(self) -> tuple[int, bool, bytes]:
        """The status, whether the connection stays, the body."""
        self.answer_begun = False
        while True:
            status = int(self.line().split(b" ", 2)[1])
            headers = {}
            while line := self.line():
                name, _, value = line.partition(b":")
                headers[name.strip().lower()] = value.strip()
            if status >= 200:
                break
        keeps = headers.get(b"connection", b"").lower() != b"close"
        if b"chunked" in headers.get(b"transfer-encoding", b"").lower():
            body = b""
            while size := int(self.line().split(b";")[0], 16):
                body += self.exactly(size)
                self.exactly(2)
            while self.line():
                pass
        elif b"content-length" in headers:
            body = self.exactly(int(headers[b"content-length"]))
        else:
            keeps, body = False, b""
            try:
                while True:
                    self.more()
            except Bad as bad:
                if "end of file" not in bad.detail:
                    raise
            body, self.rest = self.rest, b""
        return status, keeps, body


class Client(threading.Thread):
    """One closed loop: ask, wait for the answer, think, ask again."""

    def __init__(self, book: Book, plan: dict[str, Any], kind: str, number: int) -> None:
        super().__init__(daemon=True)
        self.book = book
        self.plan = plan
        self.kind = kind
        self.code = plan["kinds"].index(kind)
        self.random = random.Random(number)
        self.kept: Connection | None = None

    def run(self) -> None:
        """Until the book is closed."""
        plan = self.plan
        if plan["think"]:
            time.sleep(self.random.uniform(0, plan["think"]))
        while not self.book.ended.is_set():
            begun = time.monotonic()
            try:
                if self.kept is not None and self.kept.was_closed():
                    self.drop()
                    self.book.note(self.code, IDLE, begun, "")
                self.once()
                self.book.note(self.code, OK, begun, "")
            except Bad as bad:
                self.drop()
                self.book.note(self.code, bad.outcome, begun, bad.detail)
                if bad.outcome == REFUSED:
                    time.sleep(SOONEST_RETRY)
            except Exception as error:  # noqa: BLE001 - an answer that is no HTTP is a wrong one
                self.drop()
                self.book.note(self.code, WRONG, begun, repr(error))
            if plan["think"]:
                self.book.ended.wait(self.random.uniform(0, 2 * plan["think"]))
        self.drop()

    def drop(self) -> None:
        """Close the connection, if there is one."""
        if self.kept is not None:
            self.kept.close()
            self.kept = None

    def once(self) -> None:
        """One request, to the end of its answer; raises Bad."""
        plan, kind = self.plan, self.kind
        timeout = plan["timeout"]
        connection = self.kept
        if connection is None:
            connection = Connection(plan["address"], timeout)
        self.kept = connection
        connection.until = time.monotonic() + timeout
        if kind == "late":  # connected, and only later a request
            time.sleep(self.random.uniform(0, plan["late"]))
            if connection.was_closed():
                raise Bad(IDLE, "closed before a request was sent")
        close = "" if kind == "keepalive" else "Connection: close\r\n"
        if kind == "upload":
            part = b"x" * (plan["upload_bytes"] // plan["upload_parts"])
            whole = len(part) * plan["upload_parts"]
            connection.send(
                f"POST {plan['upload_path']} HTTP/1.1\r\nHost: localhost\r\n{close}Content-Length: {whole}\r\n\r\n".encode()
            )
            for _ in range(plan["upload_parts"]):
                if connection.broken:
                    break
                time.sleep(plan["upload_seconds"] / plan["upload_parts"])
                connection.send(part)
            wanted = str(whole).encode() if plan["upload_path"] == "/upload" else None
        else:
            paths = plan["stream_path"] if kind == "stream" else self.random.choice(plan["paths"])
            connection.send(f"GET {paths} HTTP/1.1\r\nHost: localhost\r\n{close}\r\n".encode())
            wanted = None
        status, keeps, body = connection.read_answer()
        if status != 200:
            raise Bad(WRONG, f"{status} {body[:200]!r}")
        if wanted is not None and body != wanted:
            raise Bad(WRONG, f"{body[:200]!r} instead of {wanted!r}")
        if kind != "keepalive" or not keeps:
            self.drop()


class Book:
    """What happened, in numbers; each line out tells what is new."""

    def __init__(self, kinds: list[str], timeline: str) -> None:
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.counts = [[0] * len(OUTCOMES) for _ in kinds]
        self.kinds = kinds
        self.notable: list[dict[str, Any]] = []
        self.timeline = open(timeline, "wb")  # noqa: SIM115 - open for as long as the process

    def note(self, code: int, outcome: int, begun: float, detail: str) -> None:
        """One request has ended so."""
        now = time.monotonic()
        with self.lock:
            self.counts[code][outcome] += 1
            self.timeline.write(RECORD.pack(begun, now, code, outcome))
            if outcome not in (OK, IDLE):
                self.notable.append(
                    {
                        "kind": self.kinds[code],
                        "outcome": OUTCOMES[outcome],
                        "begun": begun,
                        "at": now,
                        "detail": detail,
                    }
                )

    def say(self, last: bool = False) -> None:
        """One line with all numbers, and the losses since the line before."""
        with self.lock:
            notable, self.notable = self.notable[:2000], self.notable[2000:]
            if last:
                self.timeline.flush()
            text = json.dumps({"counts": self.counts, "lost": notable, "last": last})
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def main() -> None:
    """Read the plan, run the clients, end when standard input does."""
    plan = json.loads(sys.stdin.readline())
    book = Book(plan["kinds"], plan["timeline"])
    clients = [
        Client(book, plan, plan["kinds"][number % len(plan["kinds"])], number) for number in range(plan["clients"])
    ]
    for client in clients:
        client.start()
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], 0.05)
        if readable:
            break
        book.say()
    book.ended.set()
    until = time.monotonic() + plan["timeout"] + 5
    for client in clients:
        client.join(max(0.0, until - time.monotonic()))
    while book.notable:
        book.say()
    book.say(last=True)
    os._exit(0)


if __name__ == "__main__":
    main()
