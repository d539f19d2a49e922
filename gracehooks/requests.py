"""One request in flight: its slot on the scoreboard, and the mark that says "born in a request".

A worker class calls `begin` when a request was parsed and `end` when its answer was sent. What the application starts
between the two, in the same context, belongs to the request: `current()` tells. This module knows no server.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import NamedTuple

from gracehooks.scoreboard import Page

__all__ = ["Ticket", "begin", "current", "end"]

_current: ContextVar[int | None] = ContextVar("gracehooks_request", default=None)
_numbers = iter(range(1, 1 << 62))


class Ticket(NamedTuple):
    """What `begin` gives and `end` takes: the page, the slot in it, and the mark in the context."""

    page: Page
    slot: int
    mark: Token[int | None] | None


def begin(page: Page, method: str, path: str, *, mark: bool = True) -> Ticket:
    """A request begins: take a slot of `page` and, unless `mark` is False, mark this context.

    `path` may carry a query; it is cut off, since it may hold secrets.
    """
    slot = page.begin(method, path)
    return Ticket(page, slot, _current.set(next(_numbers)) if mark else None)


def end(ticket: Ticket) -> None:
    """The request has ended: give the slot and the mark back; call it once, in the context of `begin`."""
    ticket.page.end(ticket.slot)
    if ticket.mark is not None:
        _current.reset(ticket.mark)


def current() -> int | None:
    """The number of the request that this context belongs to, or None outside of one."""
    return _current.get()


def mark() -> Token[int | None]:
    """Mark this context as a request's, without a slot; for a server that opens the context itself."""
    return _current.set(next(_numbers))


def unmark(token: Token[int | None]) -> None:
    """Undo `mark`, in the same context."""
    _current.reset(token)
