"""The application calls of an event loop's worker: each has its slot on the page for as long as it runs.

This is the request path, so it does little: two stores before the call, one after it, and the mark that says "born in a
request". Everything else that a drain or a report wants to know of a call, its task say, is found when it is asked for,
in the frame of the call.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from gracehooks import requests
from gracehooks.scoreboard import Page, RequestInFlight

__all__ = ["Call", "Calls"]

Scope = dict[str, Any]
Application = Callable[[Scope, Callable[..., Any], Callable[..., Any]], Awaitable[Any]]
#: Called when a call has ended that was told of the drain: with its scope, `receive` and `send`.
Finish = Callable[[Scope, Any, Any], Awaitable[None]]

#: What stands for the method of a WebSocket in reports.
WEBSOCKET = "WS"
#: A chain of coroutines is not followed further than this.
DEEPEST = 200


@dataclass(frozen=True)
class Call:
    """A call that runs: its slot (-1 where the page had none left), what it was called with, and its task.

    `handle` is the task, or the main thread's identifier for the call that runs just now.
    """

    slot: int
    scope: Scope
    receive: Any
    send: Any
    handle: Any

    @property
    def method(self) -> str:
        """As the page names it."""
        return str(self.scope.get("method", WEBSOCKET))

    @property
    def path(self) -> str:
        """Without the query."""
        return str(self.scope["path"])


class Calls:
    """The calls of one worker."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._codes: set[CodeType] = set()
        #: Slots that were given back already: the answer was sent, and the rest of the call counts as a job.
        self.answered: set[int] = set()
        #: What calls receive from that were told `http.disconnect`.
        self.told: set[Any] = set()

    def counted(self, app: Application, finish: Finish) -> Application:
        """`app`, counted on the page."""
        begin, end, answered, told = self._page.begin, self._page.end, self.answered, self.told
        mark = requests._current.set

        async def call(scope: Scope, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                await app(scope, receive, send)
                return
            slot = begin(scope.get("method", WEBSOCKET), scope["path"])
            mark(slot)
            try:
                await app(scope, receive, send)
                if told:
                    await finish(scope, receive, send)
            finally:
                if answered and slot in answered:
                    if slot >= 0:
                        answered.discard(slot)
                else:
                    end(slot)

        self._codes.add(call.__code__)
        return call

    def counted_past_proxy_headers(self, middleware: Any, finish: Finish) -> Application:
        """uvicorn's `ProxyHeadersMiddleware`, counted, and stepped over where no header concerns it.

        It costs more than the counting does, and looks at two headers only (tests/contract/test_uvicorn.py).
        """
        begin, end, answered, told = self._page.begin, self._page.end, self.answered, self.told
        mark = requests._current.set
        app = middleware.app

        async def call(scope: Scope, receive: Any, send: Any) -> Any:
            if scope["type"] == "lifespan":
                return await app(scope, receive, send)
            target = app
            for name, _ in scope["headers"]:
                if name == b"x-forwarded-for" or name == b"x-forwarded-proto":
                    target = middleware
                    break
            slot = begin(scope.get("method", WEBSOCKET), scope["path"])
            mark(slot)
            try:
                result = await target(scope, receive, send)
                if told:
                    await finish(scope, receive, send)
                return result
            finally:
                if answered and slot in answered:
                    if slot >= 0:
                        answered.discard(slot)
                else:
                    end(slot)

        self._codes.add(call.__code__)
        return call

    def leave_as_they_are(self) -> None:
        """The end has come: what was not answered stays on the page, whatever becomes of its coroutine."""
        self.answered.update(self._page.slots(), (-1,))

    # -- for drains and reports --------------------------------------------------------------------------------------
    def running(self, loop: Any) -> Iterator[Call]:
        """Every call that runs in `loop`; from any thread, also while the loop is blocked."""
        for task in asyncio.all_tasks(loop):
            frame = self._frame_of(task)
            if frame is not None:
                yield _call(frame, task)
        # The task that runs at this moment shows its frames on the stack of the loop's thread only.
        main = threading.main_thread().ident or 0
        frame = sys._current_frames().get(main)
        while frame is not None:
            if frame.f_code in self._codes:
                yield _call(frame, main)
                break
            frame = frame.f_back

    def _frame_of(self, task: Any) -> FrameType | None:
        awaited = task.get_coro()
        for _ in range(DEEPEST):
            frame = getattr(awaited, "cr_frame", None)
            if frame is None:
                return None
            if frame.f_code in self._codes:
                return frame
            awaited = getattr(awaited, "cr_await", None)
        return None

    def in_flight(self, loop: Any) -> dict[int, tuple[RequestInFlight, Any]]:
        """The requests in flight with what runs them, by numbers that name each request once."""
        found: dict[int, tuple[RequestInFlight, Any]] = {}
        handles: dict[int, Any] = {}
        now = time.monotonic()
        for call in self.running(loop):
            if call.slot >= 0:
                handles.setdefault(call.slot, call.handle)
            else:
                request = RequestInFlight(call.method, call.path, now)
                found[id(call.scope)] = (request, call.handle)
        for slot, request in self._page.slots().items():
            found[hash((slot, request.started))] = (request, handles.get(slot))
        return found


def _call(frame: FrameType, handle: Any) -> Call:
    names = frame.f_locals
    return Call(names.get("slot", -1), names["scope"], names["receive"], names["send"], handle)
