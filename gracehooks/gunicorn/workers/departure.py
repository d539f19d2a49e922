"""How the connections of an event loop leave: each by its state, none cut, and nobody waited for in vain.

What must hold:
- a connection without a request is kept for `linger` seconds, since a request may be on its way, and then closed politely
  (see `farewell`); one that has begun to send a request, or has unread bytes in it, is not idle;
- WebSockets are closed one after the other over the window, so that their clients do not all come back at once;
- whoever waits for an end that will not come, a server-sent stream or a long poll, is told `http.disconnect` in the last
  fifth of the bound;
- what is left at the deadline is left to the report.

Knows no server: a `Side` is what it needs of one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum
from typing import Any, Protocol

from gracehooks.deadline import Deadline
from gracehooks.gunicorn.workers.farewell import CLOSING_IDLE, unread

__all__ = ["Side", "State", "depart", "spread"]

#: How often the connections are looked at, in seconds.
PACE = 0.02
#: The share of the bound in which WebSockets are closed, and at which streams are told of the end.
CLOSING_SHARE = 0.9
TOLD_SHARE = 0.8
#: The longest that the WebSockets of one worker are spread over, in seconds for each of them.
SPREAD = 1.0


class State(Enum):
    """What a connection does."""

    NEW = "it has sent nothing yet"
    READING = "a request is arriving"
    BUSY = "a request is being answered, or an answer is being sent"
    IDLE = "it is kept alive for a further request"
    DONE = "its last answer said that it would be closed"
    OPENING = "a WebSocket that is not open yet"
    WEBSOCKET = "a WebSocket"


class Side(Protocol):
    """What a departure needs of a server."""

    def connections(self) -> Iterable[Any]:
        """Those that are open and have not been closed by us."""

    def beginning(self) -> int:
        """How many were accepted and are not known yet: their TLS handshake is under way, or has failed just now."""

    def ending(self) -> int:
        """How many were closed by us and not yet by the client, or have something left to send."""

    def calls_in_flight(self) -> int:
        """How many application calls run, with or without a connection."""

    def state(self, connection: Any) -> State:
        """What it does now."""

    def transport(self, connection: Any) -> Any:
        """Its asyncio transport."""

    def close(self, connection: Any, patience: float) -> None:
        """Close it politely."""

    def restart(self, connection: Any) -> None:
        """Close a WebSocket with 1012, service restart."""

    def tell(self) -> None:
        """Tell `http.disconnect` to those who wait for an end; called again and again, so only once to each."""

    def settle(self) -> None:
        """Give what goes on after its answer over to the jobs."""

    def unsent(self) -> list[tuple[str, str]]:
        """Method and path of the answers that their applications have given and that have not left this process."""


def spread(count: int, window: float, chance: Callable[[], float] = random.random) -> list[float]:
    """The moments, in seconds from now, at which `count` WebSockets are closed: even steps, each with its jitter."""
    window = max(0.0, min(window, count * SPREAD))
    step = window / count if count else 0.0
    return [(number + chance()) * step for number in range(count)]


async def depart(
    side: Side,
    deadline: Deadline,
    bound: float,
    linger: Callable[[bool], float],
    pause: Callable[[float], Awaitable[None]],
) -> None:
    """Let every connection leave, until none is left or `deadline` has passed.

    `bound` is the whole drain time in seconds, `linger(used)` how long an idle connection is kept, `pause` waits.
    """
    began = time.monotonic()
    until = deadline.at - bound * (1 - CLOSING_SHARE)
    tell_at = deadline.at - bound * (1 - TOLD_SHARE)
    idle_since: dict[Any, tuple[State, float]] = {}
    closings: dict[Any, float] = {}

    open_now = [each for each in side.connections() if side.state(each) in (State.WEBSOCKET, State.OPENING)]
    random.shuffle(open_now)
    for socket, moment in zip(open_now, spread(len(open_now), until - began), strict=True):
        closings[socket] = began + moment

    while True:
        now = time.monotonic()
        left = 0
        for each in list(side.connections()):
            state = side.state(each)
            if state in (State.NEW, State.IDLE, State.DONE):
                before = idle_since.get(each)
                if before is None or before[0] is not state:
                    before = idle_since[each] = (state, now)
                kept = 0.0 if state is State.DONE else linger(state is State.IDLE)
                if now - before[1] >= kept:
                    if not unread(side.transport(each)):
                        side.close(each, CLOSING_IDLE)
                        continue
                    idle_since.pop(each)  # its request is here: it is read in this turn of the loop
            else:
                idle_since.pop(each, None)
                if state is State.WEBSOCKET:
                    if each not in closings:
                        closings[each] = now + random.random() * max(0.0, min(SPREAD, until - now))
                    if now >= closings[each]:
                        side.restart(each)
                        continue
            left += 1
        if now >= tell_at:
            side.tell()
        side.settle()
        if now - began < linger(False):
            left += side.beginning()
        if not left and not side.ending() and not side.calls_in_flight():
            return
        if deadline.passed:
            return
        await pause(min(PACE, deadline.left()))
