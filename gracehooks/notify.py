"""What a service says to its manager: sd_notify(3) datagrams, and the barrier after them.

What must hold: nothing here raises and nothing here waits. A datagram that the manager's full queue does not take is kept,
in order, and sent by a later `flush`; one that cannot be sent at all is given up. Knows no server and no systemd library.
"""

from __future__ import annotations

import array
import os
import select
import socket
from collections import deque

__all__ = ["Barrier", "Notifier"]

#: So many datagrams are kept for a manager that takes none; older ones are given up.
KEPT = 64


class Barrier:
    """The end of a pipe whose other end the manager closes once it has processed all that was sent before."""

    def __init__(self, read_end: int) -> None:
        self._fd = read_end

    @property
    def passed(self) -> bool:
        """Whether everything that was sent before the barrier has been processed."""
        if self._fd < 0:
            return True
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(0):
            return False
        self.close()
        return True

    def close(self) -> None:
        """Wait no more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Notifier:
    """Speaks to `address`, the value of NOTIFY_SOCKET: a path, or "@name" for an abstract socket."""

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._kept: deque[tuple[bytes, int]] = deque()

    def send(self, text: str) -> None:
        """Send lines of NAME=value as one datagram, now or as soon as the manager takes it."""
        self._keep(text.encode("utf-8", "replace"), -1)
        self.flush()

    def barrier(self) -> Barrier:
        """Send the barrier (`BARRIER=1`, systemd 246; what is older closes the descriptor just as well)."""
        try:
            read_end, write_end = os.pipe()
        except OSError:
            return Barrier(-1)
        self._keep(b"BARRIER=1", write_end)
        self.flush()
        return Barrier(read_end)

    def _keep(self, data: bytes, fd: int) -> None:
        self._kept.append((data, fd))
        while len(self._kept) > KEPT:
            self._drop()

    def _drop(self) -> None:
        _, fd = self._kept.popleft()
        if fd >= 0:
            os.close(fd)

    def flush(self) -> bool:
        """Send what is kept, without waiting; whether nothing is left."""
        if not self._kept:
            return True
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        except OSError:
            return False
        with connection:
            connection.setblocking(False)
            while self._kept:
                data, fd = self._kept[0]
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
                try:
                    connection.sendmsg([data], rights, 0, self._address)
                except (BlockingIOError, InterruptedError):
                    return False
                except (OSError, ValueError):
                    pass  # nobody listens, or the address is of a kind that we do not speak: given up
                self._drop()
        return True
