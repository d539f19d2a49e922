"""The application calls of an event loop's worker: each has its slot on the page from its first step to its answer.

This is the request path, so it does little: one store before the call and one after it. The mark that says "born in a
request" is in the context of the whole connection (see `LoopWorker`). Everything else that a drain or a report wants to
know of a call, its task say, is found when it is asked for, in a frame of the call.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from gracehooks.scoreboard import Page, RequestInFlight

__all__ = ["WEBSOCKET", "Call", "Calls"]

Scope = dict[str, Any]
Application = Callable[[Scope, Callable[..., Any], Callable[..., Any]], Awaitable[Any]]
#: Called when a call has ended while `Calls.attended` has something in it: with its scope, `receive` and `send`.
Finish = Callable[[Scope, Any, Any], Awaitable[None]]

#: What stands for the method of a WebSocket in reports.
WEBSOCKET = "WS"
#: A chain of coroutines is not followed further than this.
DEEPEST = 200


@dataclass(frozen=True)
class Call:
    """A call that runs.

    `slot` is that of the page, -1 where the page had none left, None when it was given back: the answer was sent. `handle`
    is the task, or the main thread's identifier for the call that runs just now. `names` are the variables of its frame.
    """

    slot: int | None
    method: str
    path: str
    handle: Any
    names: Mapping[str, Any]


#: Reads a call out of the variables of a frame; None when there is nothing to see yet.
Finder = Callable[[Mapping[str, Any], Any], "Call | None"]


class Calls:
    """The calls of one worker."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._finders: dict[CodeType, Finder] = {}
        #: Whether slots are no more given back.
        self.closed = False
        #: Whether an answer leaves the process at the end of a turn of the loop only: a call lasts until the next one then.
        #: To be set before the application is counted.
        self.late = False
        #: Slots that were given back already: the answer was sent, and the rest of the call counts as a job.
        self.answered: set[int] = set()
        #: While there is something in it, the end of each call is looked at: what calls receive from that were told
        #: `http.disconnect`, and whatever else its worker puts there.
        self.attended: set[Any] = set()

    def find(self, code: CodeType, finder: Finder) -> None:
        """Frames of `code` are those of a call, which `finder` reads."""
        self._finders[code] = finder

    # -- the request path ----------------------------------------------------------------------------------------------
    def counted(self, app: Application, finish: Finish) -> Application:
        """`app`, counted on the page."""
        begin, attended = self._page.begin, self.attended
        end = self.end

        async def call(scope: Scope, receive: Any, send: Any) -> Any:
            kind = scope["type"]
            if kind == "http":
                slot = begin(scope["method"], scope["path"])
            elif kind == "websocket":
                slot = begin(WEBSOCKET, scope["path"])
            else:
                return await app(scope, receive, send)
            try:
                result = await app(scope, receive, send)
                if attended:
                    await finish(scope, receive, send)
            except BaseException:
                self._end_soon(slot)
                raise
            end(slot)
            return result

        self.find(call.__code__, _of_layer)
        return call

    def counted_past_proxy_headers(self, middleware: Any, finish: Finish) -> Application:
        """uvicorn's `ProxyHeadersMiddleware`, counted, and stepped over where no header concerns it.

        It costs more than the counting does, and looks at two headers only (tests/contract/test_uvicorn.py).
        """
        pop, append, entries, name, write, memory = self._page.parts()
        begin, answered, attended, now = self._page.begin, self.answered, self.attended, time.monotonic
        late = self.late
        app = middleware.app

        async def call(scope: Scope, receive: Any, send: Any) -> Any:
            kind = scope["type"]
            if kind == "http":
                method, path = scope["method"], scope["path"]
                try:
                    slot = pop()
                except IndexError:
                    slot = begin(method, path)
                else:
                    entry = entries[slot]
                    if entry[0] != path or entry[1] != method:
                        name(slot, method, path)
                    state = entry[2]
                    entry[2] = state + 256
                    write(memory, slot, state, now())
            elif kind == "websocket":
                slot = begin(WEBSOCKET, scope["path"])
            else:
                return await app(scope, receive, send)
            target = app
            for field, _ in scope["headers"]:
                if field == b"x-forwarded-for" or field == b"x-forwarded-proto":
                    target = middleware
                    break
            try:
                result = await target(scope, receive, send)
                if attended:
                    await finish(scope, receive, send)
            except BaseException:
                self._end_soon(slot)
                raise
            if late or answered or slot < 0:
                self.end(slot)
            else:
                memory[slot] = 0
                append(slot)
            return result

        self.find(call.__code__, _of_layer)
        return call

    def end(self, slot: int) -> None:
        """A call has ended, and its answer was written."""
        if self.late:
            self._end_soon(slot)
        else:
            self._end(slot)

    def _end_soon(self, slot: int) -> None:
        """It ends in the next turn: the server answers a failure after this, in the same step of the loop."""
        try:
            asyncio.get_running_loop().call_soon(self._end, slot)
        except RuntimeError:  # the loop is over, and nothing is answered any more
            self._end(slot)

    def _end(self, slot: int) -> None:
        """A call has ended; its slot was perhaps given back before."""
        if slot not in self.answered:
            self._page.end(slot)
        elif slot >= 0:
            self.answered.discard(slot)

    def leave_as_they_are(self) -> None:
        """The end has come: what was not answered stays on the page, whatever becomes of its coroutine."""
        self.closed = True
        self.answered.update(self._page.slots(), (-1,))

    # -- for drains and reports --------------------------------------------------------------------------------------
    def running(self, loop: Any) -> Iterator[Call]:
        """Every call that runs in `loop`; from any thread, also while the loop is blocked."""
        # The task that runs at this moment shows where it stands on the stack of the loop's thread only.
        main = threading.main_thread().ident or 0
        present = sys._current_frames().get(main)
        while present is not None and present.f_code not in self._finders:
            present = present.f_back
        frames: list[tuple[FrameType, Any]] = [(present, main)] if present is not None else []
        for task in asyncio.all_tasks(loop):
            frame = self._frame_of(task)
            if frame is not None and frame is not present:
                frames.append((frame, task))
        for frame, handle in frames:
            found = self._finders[frame.f_code](frame.f_locals, handle)
            if found is not None:
                yield found

    def _frame_of(self, task: Any) -> FrameType | None:
        awaited = task.get_coro()
        for _ in range(DEEPEST):
            frame = getattr(awaited, "cr_frame", None)
            if frame is None:
                return None
            if frame.f_code in self._finders:
                return frame
            awaited = getattr(awaited, "cr_await", None)
        return None

    def in_flight(self, loop: Any) -> dict[int, tuple[RequestInFlight, Any]]:
        """The requests in flight with what runs them, by numbers that name each request once."""
        found: dict[int, tuple[RequestInFlight, Any]] = {}
        handles: dict[int, Any] = {}
        now = time.monotonic()
        for call in self.running(loop):
            if call.slot is None:
                continue
            if call.slot >= 0:
                handles.setdefault(call.slot, call.handle)
            else:
                request = RequestInFlight(call.method, call.path, now)
                found[id(call.handle)] = (request, call.handle)
        for slot, request in self._page.slots().items():
            found[hash((slot, request.started))] = (request, handles.get(slot))
        return found


def _of_layer(names: Mapping[str, Any], handle: Any) -> Call | None:
    if "slot" not in names:
        return None
    scope = names["scope"]
    return Call(names["slot"], str(scope.get("method", WEBSOCKET)), str(scope["path"]), handle, names)
