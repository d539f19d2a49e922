"""What a request hands to a pool of multiprocessing: `ProcessPoolExecutor`, `Pool`, and its `ThreadPool`.

The pool is infrastructure, a call in it is a job: it ends when its result is there. An iterator (`imap`) is no job: whoever
asked for it reads it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from gracehooks import requests
from gracehooks.jobs import threads, tracker
from gracehooks.jobs.imports import when_imported
from gracehooks.jobs.threads import FUTURE, name_of, options_of
from gracehooks.jobs.tracker import Work
from gracehooks.scoreboard import Outcome

__all__ = ["patch"]

_in_request = requests._current.get
_in_job = tracker.mark.get


class _ResultKind(threads._FutureKind):
    def cancel(self, work: Work) -> None:
        """multiprocessing has no way to take a call back."""

    def where(self, work: Work) -> str:
        return str(work.handle)


RESULT = _ResultKind()


def _born() -> tracker.Tracker | None:
    return None if _in_job() is None and _in_request() is None else tracker.current()


def _change_executor(module: Any) -> None:
    pool = module.ProcessPoolExecutor
    original = pool.submit
    if getattr(original, "__gracehooks__", False):
        return

    @functools.wraps(original)
    def submit(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        found = _born()
        if found is None:
            return original(self, fn, *args, **kwargs)
        work = found.begin(FUTURE, name_of(fn), None, options_of(fn))
        try:
            future = original(self, fn, *args, **kwargs)
        except BaseException:
            found.finish(work, Outcome.FAILED)
            raise
        work.handle = future
        future.add_done_callback(lambda done: threads._future_done(work, done))
        return future

    submit.__gracehooks__ = True  # type: ignore[attr-defined]
    pool.submit = submit


def _change_pool(module: Any) -> None:
    pool = module.Pool
    if getattr(pool.terminate, "__gracehooks__", False):
        return
    for name in ("apply_async", "_map_async"):  # map, starmap and their like come through the second
        setattr(pool, name, _with_callbacks(getattr(pool, name)))
    stop = pool.terminate

    @functools.wraps(stop)
    def terminate(self: Any) -> None:
        stop(self)
        for work in vars(self).pop("_gracehooks_works", ()):  # their results will never be there
            work.tracker.finish(work, Outcome.CANCELLED)

    terminate.__gracehooks__ = True  # type: ignore[attr-defined]
    pool.terminate = terminate


def _with_callbacks(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def start(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        found = _born()
        if found is None:
            return original(self, func, *args, **kwargs)
        given = signature.bind(self, func, *args, **kwargs)
        work = found.begin(RESULT, name_of(func), None, options_of(func))
        works: set[Work] = vars(self).setdefault("_gracehooks_works", set())
        works.add(work)

        def ended(outcome: Outcome) -> None:
            works.discard(work)
            found.finish(work, outcome)

        def calling(theirs: Callable[[Any], object] | None, outcome: Outcome) -> Callable[[Any], None]:
            def call(value: Any) -> None:
                try:
                    if theirs is not None:
                        theirs(value)
                finally:
                    ended(outcome)

            return call

        for name, outcome in (("callback", Outcome.SUCCEEDED), ("error_callback", Outcome.FAILED)):
            given.arguments[name] = calling(given.arguments.get(name), outcome)
        try:
            work.handle = original(*given.args, **given.kwargs)
        except BaseException:
            ended(Outcome.FAILED)
            raise
        if work.handle.ready():  # a map over nothing calls nobody
            ended(Outcome.SUCCEEDED)
        return work.handle

    return start


def patch() -> None:
    """Notice what a request hands to these pools, from now on in this process."""
    when_imported("concurrent.futures.process", _change_executor)
    when_imported("multiprocessing.pool", _change_pool)
