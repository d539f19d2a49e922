"""Looking at connections and closing them, for the worker classes that do it themselves; and TLS without waiting.

It relies on gunicorn's `sock.ssl_wrap_socket` being looked up in its module (tests/contract/test_tls.py).
"""

from __future__ import annotations

import errno
import fcntl
import socket
import ssl
import sys
import termios
import time
from typing import Any

from gunicorn import sock as stock

from gracehooks.drain.watchdog import native

__all__ = [
    "AGAIN",
    "EMPTY",
    "NO_ROOM",
    "Named",
    "close_in_steps",
    "ended",
    "readable",
    "shake",
    "unread",
    "unread_body",
    "wrap_once",
]

#: What `accept` may fail with although there may be another connection.
AGAIN = (errno.ECONNABORTED, errno.EINTR)
#: What it fails with when there is none.
EMPTY = (errno.EAGAIN, errno.EWOULDBLOCK)
#: What it fails with while this process, or the machine, has no room for another connection.
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


_POLLIN = 1
_NONE = bytes(4)


class Named:
    """What a connection needs of its listener: the name. It is asked for when the listener may be closed already."""

    def __init__(self, listener: Any) -> None:
        self._name = listener.getsockname()

    def getsockname(self) -> Any:
        """The address that the listener was bound to."""
        return self._name


def readable(sock: Any) -> bool:
    """Whether something can be read without waiting: bytes, or the end. Does not let other greenlets run."""
    if getattr(sock, "pending", None) is not None and sock.pending():
        return True
    poll = native("select", "poll")()
    try:
        poll.register(sock.fileno(), _POLLIN)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return False


def unread(sock: Any) -> int:
    """How many bytes are here that nobody has read."""
    try:
        return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.FIONREAD, _NONE), sys.byteorder)
    except (OSError, ValueError):
        return 0


def wrap_once() -> None:
    """Have gunicorn, in this process, leave a connection as it is that speaks TLS already."""
    wrap = stock.ssl_wrap_socket
    if not hasattr(wrap, "gracehooks"):

        def ssl_wrap_socket(sock: Any, conf: Any) -> Any:
            return sock if isinstance(sock, ssl.SSLSocket) else wrap(sock, conf)

        ssl_wrap_socket.gracehooks = True  # type: ignore[attr-defined]
        stock.ssl_wrap_socket = ssl_wrap_socket


def shake(sock: ssl.SSLSocket) -> bool:
    """Take the handshake as far as what has arrived allows, without waiting; whether it is over. Raises OSError."""
    sock.setblocking(False)
    try:
        sock.do_handshake()
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return False
    return True


def ended(sock: Any) -> bool:
    """Read away what the client still sends, without waiting; whether it has closed, or is broken."""
    try:
        for _ in range(64):
            if not sock.recv(65536):
                return True
    except (BlockingIOError, ssl.SSLWantReadError):
        pass
    except OSError:
        return True
    return False


def close_in_steps(sock: Any, seconds: float) -> None:
    """Close our side, wait until the client has closed its own or `seconds` have passed, close the rest.

    Bytes that are unread when a socket is closed make the kernel take back the answer (RFC 9112 section 9.6).
    """
    try:
        sock.shutdown(socket.SHUT_WR)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            sock.settimeout(left)
            if not sock.recv(65536):
                break
    except OSError:
        pass
    finally:
        sock.close()


def unread_body(request: Any) -> bool:
    """Whether the application has left a part of the request's body unread, as far as gunicorn's reader tells."""
    reader = getattr(getattr(request, "body", None), "reader", None)
    left = getattr(reader, "length", None)
    if left is not None:
        return bool(left)
    return not getattr(reader, "finished", getattr(reader, "parser", None) is None)
