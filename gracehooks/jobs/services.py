"""Services: consumer loops that run beside the requests, one of each in every worker.

What must hold:
- a service is started after the boot, and started again when it crashes, after 0.5 s, then twice as long, at most 30 s;
- its token is set before anything else at an end: it pulls nothing new and finishes what it has;
- until it has returned it counts as a job in flight; what it starts is a job as well.

A plain function runs in a thread (a greenlet under gevent); a coroutine function in the running event loop, and where
there is none in a thread with a loop of its own.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from gracehooks.errors import JobRejected
from gracehooks.jobs import tasks, threads, tracker
from gracehooks.jobs.tracker import AsyncWork, Token, Tracker, Work
from gracehooks.scoreboard import Outcome

__all__ = ["ASYNC_SERVICE", "SERVICE", "Service", "registered", "service", "start"]

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
#: A run that lasted as long as this before it crashed starts the pauses from the first one again.
HEALTHY = 60.0

Function = Callable[[Any], Any]
F = TypeVar("F", bound=Function)


class _ServiceKind:
    name = "service"
    work = Work

    def cancel(self, work: Work) -> None:
        """Its token says it all."""

    def where(self, work: Work) -> str:
        return threads.where_thread(work.handle)

    def kill(self, work: Work) -> None:
        """A thread ends with its process."""


class _AsyncServiceKind(_ServiceKind):
    work = AsyncWork

    def cancel(self, work: Work) -> None:
        if work.handle is not None:
            tasks.cancel_task(work.handle)

    def where(self, work: Work) -> str:
        return tasks.TASK.where(work)


SERVICE = _ServiceKind()
ASYNC_SERVICE = _AsyncServiceKind()


class Service:
    """A registered service."""

    def __init__(self, function: Function, name: str) -> None:
        self.function = function
        self.name = name
        self.is_async = inspect.iscoroutinefunction(function)


_registered: dict[str, Service] = {}


def service(function: F | None = None, *, name: str | None = None) -> Any:
    """Register a consumer loop, `def consume(token)` or `async def consume(token)`, to run in every worker.

    It should return soon after its token is set: `while not token.wait(1): …`, or `await token.wait(1)` in a coroutine.
    """

    def register(function: F) -> F:
        label = name or f"{function.__module__}.{function.__qualname__}"
        _registered[label] = Service(function, name or function.__qualname__)
        return function

    return register if function is None else register(function)


def registered() -> list[Service]:
    """The services of this process."""
    return list(_registered.values())


def start() -> None:
    """Start every registered service; called once in a worker, after its boot."""
    found = tracker.require()
    try:
        asyncio.get_running_loop()
        looping = True
    except RuntimeError:
        looping = False
    for each in registered():
        run = _Run(each, found)
        if each.is_async and looping:
            run.task = tasks.plain_task(run.in_loop())
            continue
        run.thread = threading.Thread(
            target=run.in_own_loop if each.is_async else run.in_thread,
            name=f"gracehooks-service-{each.name}",
            daemon=True,
        )
        threads.start_thread(run.thread)


class _Run:
    """One service at work: it runs, crashes, waits and runs again, until it is told to stop."""

    def __init__(self, service: Service, found: Tracker) -> None:
        self.service = service
        self.tracker = found
        self.thread: threading.Thread | None = None
        self.task: asyncio.Future[None] | None = None
        self.stop = Token()
        self.work: Work | None = None
        self.pause = FIRST_PAUSE
        found.on_stop_services(self.tell)

    def tell(self) -> None:
        """Pull nothing new."""
        self.stop.tell()
        work = self.work
        if work is not None:
            work.tell_token()

    def _begin(self, kind: Any, handle: Any) -> Work | None:
        try:
            work = self.tracker.begin(kind, self.service.name, handle)
        except JobRejected:
            return None
        self.work = work
        if self.stop.is_set():
            work.tell_token()
        tracker.mark.set(work)
        return work

    def _ended(self, work: Work, error: BaseException | None) -> bool:
        """Count it; whether it has to run again."""
        outcome = threads.outcome_of(error)
        lived = work.age
        if outcome is Outcome.FAILED and error is not None:
            threads.log_failure(work, error)
        self.tracker.finish(work, outcome)
        self.work = None
        if outcome is not Outcome.FAILED or self.stop.is_set():
            return False
        self.pause = FIRST_PAUSE if lived >= HEALTHY else self.pause
        self.tracker.log.warning("gracehooks: the service %s starts again in %.1f s", self.service.name, self.pause)
        return True

    def _next_pause(self) -> float:
        pause, self.pause = self.pause, min(self.pause * 2, LONGEST_PAUSE)
        return pause

    def in_thread(self) -> None:
        """Run a plain function."""
        if self.thread is not None:
            threads.note_greenlet(self.thread)
        while not self.stop.is_set():
            work = self._begin(SERVICE, self.thread)
            if work is None:
                return
            error: BaseException | None = None
            try:
                self.service.function(work)
            except BaseException as raised:  # noqa: BLE001 - whatever it was, the service starts again
                error = raised
            if not self._ended(work, error):
                return
            error = None
            self.stop.wait(self._next_pause())

    def in_own_loop(self) -> None:
        """Run a coroutine function where the worker has no event loop."""
        asyncio.run(self.in_loop())

    async def in_loop(self) -> None:
        """Run a coroutine function."""
        function = cast(Callable[[Token], Coroutine[Any, Any, object]], self.service.function)
        while not self.stop.is_set():
            work = self._begin(ASYNC_SERVICE, None)
            if work is None:
                return
            # A task of its own: what is cancelled at the end is the service, not the one who counts it.
            task: asyncio.Future[Any] = tasks.plain_task(function(work))
            work.handle = task
            if work._due:
                tasks.cancel_task(cast("asyncio.Task[Any]", task))
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:  # the loop is being torn down
                task.cancel()
                self.tracker.finish(work, Outcome.CANCELLED)
                raise
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            if not self._ended(work, error):
                return
            ends = time.monotonic() + self._next_pause()
            while not self.stop.is_set() and (left := ends - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 0.05))
