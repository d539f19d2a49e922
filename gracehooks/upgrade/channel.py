"""What the two masters say to each other: one JSON object a line, over a socket pair that only they hold.

The end of the stream is a message too: the other side is gone. No call blocks, but for `flush_within`, which has a bound.
"""

from __future__ import annotations

import json
import select
import socket
from typing import Any

from gracehooks.deadline import Deadline

__all__ = ["Channel"]

#: A report of everything that a generation had in flight may be some megabytes.
LONGEST_MESSAGE = 64 << 20


class Channel:
    """One end of the pair; `sock` becomes non-blocking and belongs to the channel."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.set_inheritable(False)
        self._sock = sock
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self.closed = False  #: the other side is gone, or `close` was called

    def fileno(self) -> int:
        """The descriptor, -1 once closed."""
        return self._sock.fileno()

    def send(self, **message: Any) -> None:
        """Say `message`; what the socket does not take now goes out at the next call."""
        self._outgoing += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Try again to send what is left."""
        while self._outgoing and not self.closed:
            try:
                sent = self._sock.send(self._outgoing, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._outgoing.clear()
                return  # what the other side said before it died is still to be read
            del self._outgoing[:sent]

    def flush_within(self, seconds: float) -> bool:
        """Send what is left, waiting at most so long for room; whether all is sent. For the last word before an end."""
        deadline = Deadline.after(seconds)
        self.flush()
        while self._outgoing and not self.closed and not deadline.passed:
            select.select([], [self._sock], [], deadline.left())
            self.flush()
        return not self._outgoing

    def receive(self) -> list[dict[str, Any]]:
        """What the other side has said since; sets `closed` at the end of the stream."""
        self.flush()
        whole = False
        while not self.closed:
            try:
                data = self._sock.recv(65536)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
                break
            self._incoming += data
            whole = whole or b"\n" in data
            if len(self._incoming) > LONGEST_MESSAGE:
                self.closed = True
        if not whole:
            return []  # a long line is not looked through at each of its pieces
        *lines, self._incoming = self._incoming.split(b"\n")
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # not one of ours: nothing that we could act on
            if isinstance(message, dict):
                messages.append(message)
        return messages

    def close(self) -> None:
        """Close this end."""
        self.closed = True
        self._sock.close()
