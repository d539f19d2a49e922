"""Greenlets that are born in a request, noticed through gevent's own spawn callback. Imports gevent when it is patched in.

A thread of a monkey-patched process is a greenlet as well; it is counted as the thread that it was asked for. What a
request hands to gevent's pool of real threads is counted as what it hands to any other pool.
"""

from __future__ import annotations

import contextvars
import threading
from typing import Any

from gevent.threadpool import ThreadPool

from gracehooks import requests
from gracehooks.jobs import stacks, threads, tracker
from gracehooks.jobs.infrastructure import is_infrastructure
from gracehooks.jobs.threads import name_of, options_of, outcome_of
from gracehooks.jobs.tracker import Tracker, Work
from gracehooks.scoreboard import Outcome

__all__ = ["GREENLET", "patch", "track_greenlet"]

_in_request = requests._current.get
_in_job = tracker.mark.get


class _GreenletKind:
    name = "greenlet"
    work = Work

    def cancel(self, work: Work) -> None:
        work.handle.kill(block=False)

    def where(self, work: Work) -> str:
        return stacks.of_frame(work.handle.gr_frame)

    def kill(self, work: Work) -> None:
        """A greenlet that swallows GreenletExit ends with its process."""


class _PoolKind(threads._FutureKind):
    def cancel(self, work: Work) -> None:
        """A call into C that runs in a thread: its token says it all."""


GREENLET = _GreenletKind()
POOL = _PoolKind()
_SOCKET = ("_socket", "socket")


def _spawned(greenlet: Any) -> None:
    if _in_job() is None and _in_request() is None:
        return
    found = tracker.current()
    run = getattr(greenlet, "_run", None)
    owner = getattr(run, "__self__", None)
    if found is None or isinstance(owner, (threading.Thread, ThreadPool)) or is_infrastructure(run):
        return
    _count(greenlet, found, name_of(run) if run is not None else type(greenlet).__qualname__, run)


def _count(greenlet: Any, found: Tracker, name: str, run: Any) -> None:
    import gevent

    work = found.begin(GREENLET, name, greenlet, options_of(run))
    if greenlet.gr_context is None and greenlet is not gevent.getcurrent():
        greenlet.gr_context = contextvars.Context()
        greenlet.gr_context.run(tracker.mark.set, work)

    def ended(done: Any) -> None:
        error = done.exception
        if error is None and not done.successful():
            error = SystemExit(1)
        if error is None and isinstance(done.value, BaseException) and type(done.value).__name__ == "GreenletExit":
            error = done.value  # gevent calls a killed greenlet successful
        work.tracker.finish(work, outcome_of(error))

    greenlet.rawlink(ended)


def track_greenlet(greenlet: Any, name: str | None) -> None:
    """Count a greenlet until it is dead."""
    run = getattr(greenlet, "_run", None)
    _count(greenlet, tracker.require(), name or name_of(run), run)


_spawn: Any = None


def _patched_spawn(pool: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    if _in_job() is None and _in_request() is None:
        return _spawn(pool, func, *args, **kwargs)
    found = tracker.current()
    # gevent looks up names in this pool, and waits for it.
    if found is None or getattr(func, "__module__", None) in _SOCKET or is_infrastructure(func):
        return _spawn(pool, func, *args, **kwargs)
    work = found.begin(POOL, name_of(func), None, options_of(func))
    try:
        work.handle = _spawn(pool, threads._marked, work, func, args, kwargs)
    except BaseException:
        found.finish(work, Outcome.FAILED)
        raise
    work.handle.rawlink(lambda done: found.finish(work, outcome_of(done.exception)))
    return work.handle


def patch() -> None:
    """Notice the greenlets that are born in a request, from now on in this process."""
    global _spawn
    import gevent

    gevent.Greenlet.add_spawn_callback(_spawned)
    if ThreadPool.spawn is not _patched_spawn:
        _spawn, ThreadPool.spawn = ThreadPool.spawn, _patched_spawn


def unpatch() -> None:
    """Take it back; for tests."""
    import gevent

    gevent.Greenlet.remove_spawn_callback(_spawned)
    ThreadPool.spawn = _spawn
