"""How an event loop's connection is closed so that nothing is lost by it.

What must hold:
- a connection with bytes in it that nobody has read yet is not idle: it is left open, and the request is served;
- our side is closed first; what the client still sends is read and dropped until it has closed its own, or until its
  time is over. To close at once would make the kernel answer those bytes with a reset, which may take back an answer
  that the client has not read yet (RFC 9112 section 9.6);
- whatever was written before is sent first, however slowly the client reads.

It relies on asyncio's transports only; uvloop's and those of TLS are used in the same way.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from gracehooks.gunicorn.workers import sockets

__all__ = [
    "UNNOTICED",
    "UNNOTICED_LATE",
    "Farewell",
    "PoliteTransport",
    "limit_buffer",
    "unread",
    "unsent",
    "writes_late",
]

#: How long a client may take to close a connection that we have closed after an answer, in seconds.
CLOSING = 2.0
#: The same for one that was idle: nothing that was sent can be taken back any more.
CLOSING_IDLE = 0.2
#: How many bytes of an answer that the kernel does not take may go unnoticed. uvloop before 0.23 keeps as many until the end
#: of the turn of the loop, in which another request may block it; with 0 asyncio's TLS would pause after every write.
UNNOTICED = 1
#: The same where each call lasts until the next turn.
UNNOTICED_LATE = 8192


def unread(transport: Any) -> int:
    """How many bytes the kernel holds for us and nobody has read."""
    sock = transport.get_extra_info("socket")
    return sockets.unread(sock) if sock is not None else 0


def unsent(transport: Any) -> int:
    """How many bytes of what was written the loop has not given to the kernel."""
    try:
        return int(transport.get_write_buffer_size())
    except (AttributeError, OSError, RuntimeError):
        return 0


def writes_late(loop: Any) -> bool:
    """Whether what is written leaves the process at the end of a turn of the loop only, as on uvloop before 0.23."""
    module = sys.modules.get(type(loop).__module__.partition(".")[0])
    if getattr(module, "__name__", "") != "uvloop":
        return False
    return tuple(int(part) for part in re.findall(r"\d+", str(getattr(module, "__version__", "")))[:2]) < (0, 23)


def limit_buffer(transport: Any, *, paused: bool, unnoticed: int = UNNOTICED) -> None:
    """Have the transport call `pause_writing` where its client reads slowly, and `resume_writing` when all was taken.

    To be called when the connection is made, and by those two, with whether writing is paused: what is in the process's own
    memory dies with it, so until then an answer has not been sent. `unnoticed` is in bytes, from 1.
    """
    try:
        transport.set_write_buffer_limits(high=0 if paused else unnoticed)
    except (AttributeError, RuntimeError):
        pass  # it is gone, or closed (uvloop says so)


class Farewell(asyncio.Protocol):
    """Takes a connection over from `former`, closes our side, and waits for the client's; `ended` is called at last."""

    def __init__(
        self, transport: Any, former: Any, loop: Any, patience: float, ended: Callable[[Farewell], object]
    ) -> None:
        self.transport = transport
        self.former = former
        self._loop = loop
        self._patience = patience
        self._ended = ended
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Close our side. Over TLS there is no half of a connection: it is closed as a whole."""
        transport = self.transport
        if transport.is_closing() or not transport.can_write_eof():
            transport.close()
            return
        transport.set_protocol(self)
        try:
            transport.resume_reading()
        except RuntimeError:
            pass  # it was not paused
        try:
            transport.write_eof()
        except (OSError, RuntimeError):
            transport.close()
            return
        self._timer = self._loop.call_later(self._patience, self._over)

    def _over(self) -> None:
        if unsent(self.transport):
            self._timer = self._loop.call_later(self._patience, self._over)
        else:
            self.transport.close()

    # -- asyncio.Protocol ------------------------------------------------------------------------------------------
    def data_received(self, data: bytes) -> None:
        """What the client sent after our close was announced."""

    def eof_received(self) -> None:
        """The client has closed its side; asyncio closes the rest."""

    def pause_writing(self) -> None:
        """For whoever still waits for room."""
        self.former.pause_writing()

    def resume_writing(self) -> None:
        """For whoever still waits for room."""
        self.former.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, which the server's own protocol learns as well."""
        if self._timer is not None:
            self._timer.cancel()
        self._ended(self)
        self.former.connection_lost(exc)


class PoliteTransport:
    """A transport whose `close` is a `Farewell`; everything else is the transport's own."""

    def __init__(self, transport: Any, protocol: Any, farewell: Callable[[Any, Any, float], object]) -> None:
        self._transport = transport
        self._protocol = protocol
        self._farewell = farewell
        self._closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write, unless it was closed."""
        if not self._closing:
            self._transport.write(data)

    def writelines(self, data: Iterable[bytes]) -> None:
        """Write, unless it was closed."""
        if not self._closing:
            self._transport.writelines(data)

    def set_protocol(self, protocol: Any) -> None:
        """The protocol changes, for a WebSocket."""
        self._protocol = protocol
        self._transport.set_protocol(protocol)

    def is_closing(self) -> bool:
        """Whether it was closed by either side."""
        return self._closing or bool(self._transport.is_closing())

    def close(self, patience: float = CLOSING) -> None:
        """Close our side now, and the rest when the client has closed its own."""
        if not self._closing:
            self._closing = True
            self._farewell(self._transport, self._protocol, patience)
