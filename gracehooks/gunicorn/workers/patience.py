"""gunicorn 23's own gthread worker, where it must stay: it goes on with the connections that it has, for a moment.

Told to leave, it would close its poller at once, and with it every connection that waits there for a request or has just
sent one; and each connection whose answer, of the moment before, has not said that it would be closed. Later gunicorns go
on with them. Nothing else of it changes: answers say `Connection: close` meanwhile.

It relies on `alive`, `nr_conns`, `poller`, `accept`, on `finish_request`, and on `run`, whose loop looks at `alive` in its
own thread (tests/contract/test_gthread.py).
"""

from __future__ import annotations

import threading
import time
from typing import Any

from gracehooks.drain.machine import LINGER
from gracehooks.gunicorn.workers.sockets import readable
from gracehooks.scoreboard import Order

__all__ = ["Patient", "needs_patience"]


def needs_patience(worker_class: type) -> bool:
    """Whether the class is that of gunicorn 23."""
    threads = any(each.__module__ == "gunicorn.workers.gthread" for each in worker_class.__mro__)
    return threads and not hasattr(worker_class, "wait_for_and_dispatch_events")  # 24 and newer go on by themselves


class Patient:
    """A mixin, to be put before that class."""

    page: Any
    poller: Any
    sockets: list[Any]
    nr_conns: int
    _alive = True
    _until = 0.0
    _loop = 0
    _listens = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: The threads whose answers are sent, and which decide what becomes of the connection.
        self._finishing: set[int] = set()
        super().__init__(*args, **kwargs)

    @property
    def alive(self) -> bool:
        """For the loop and for what was answered, whether it goes on; else whether the worker still serves."""
        if self._alive:
            return True
        thread = threading.get_ident()
        goes_on = thread == self._loop or thread in self._finishing
        return goes_on and self.nr_conns > 0 and time.monotonic() < self._until

    @alive.setter
    def alive(self, alive: bool) -> None:
        if self._alive and not alive:
            self._until = time.monotonic() + LINGER
        self._alive = alive

    def run(self) -> None:
        """gunicorn's own loop."""
        self._loop = threading.get_ident()
        super().run()  # type: ignore[misc]

    def finish_request(self, future: Any) -> None:
        """gunicorn's own; a client that was not told of the close may be sending its next request (RFC 9112 section 9.6)."""
        thread = threading.get_ident()
        self._finishing.add(thread)
        try:
            super().finish_request(future)  # type: ignore[misc]
        finally:
            self._finishing.discard(thread)

    def notify(self) -> None:
        """The heartbeat; at the first one of the end, no connection is taken any more but those that are ours alone."""
        super().notify()  # type: ignore[misc]
        if self._alive or not self._listens or threading.get_ident() != self._loop:
            return
        self._listens = False
        for listener in self.sockets:
            self.poller.unregister(listener)
            while self.page.order is Order.STOP and readable(listener):
                self.accept(listener.getsockname(), listener)  # type: ignore[attr-defined]
