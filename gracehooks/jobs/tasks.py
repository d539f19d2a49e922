"""Asyncio tasks: `jobs.create_task`, and the tasks that are born in a request.

What must hold:
- a task that is created outside of a request (the server's own) costs two look-ups more and is otherwise untouched;
- a tracked task is held by a strong reference until it is done; asyncio keeps a weak one;
- the exception of a task that nobody awaits is still said by asyncio: looking at a task must not silence it.

`create_task` of the loop's class is replaced, not the task factory: a factory is the application's to set, and every
way to a task (`asyncio.create_task`, `ensure_future`, `TaskGroup`, anyio) leads through the loop's method.
"""

from __future__ import annotations

import asyncio
from asyncio.base_events import BaseEventLoop
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

from gracehooks import requests
from gracehooks.errors import JobRejected
from gracehooks.jobs import stacks, tracker
from gracehooks.jobs.imports import when_imported
from gracehooks.jobs.infrastructure import is_server_task
from gracehooks.jobs.threads import log_failure
from gracehooks.jobs.tracker import AsyncWork, Options, Tracker, Work
from gracehooks.scoreboard import Outcome

__all__ = ["TASK", "create_task", "patch", "track_task", "with_options"]

T = TypeVar("T")

_in_request = requests._current.get
_in_job = tracker.mark.get
_set_mark = tracker.mark.set
_reset_mark = tracker.mark.reset
_NO_CONTEXT = Context()

_SUCCEEDED, _CANCELLED = Outcome.SUCCEEDED, Outcome.CANCELLED  # a look into an Enum is slow

#: What `@jobs.job` said of coroutine functions, by the identity of their code.
_options: dict[int, Options] = {}


def cancel_task(task: asyncio.Task[Any]) -> None:
    """Cancel a task from any thread."""
    loop = task.get_loop()
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is loop:
        task.cancel()
    elif not loop.is_closed():
        loop.call_soon_threadsafe(task.cancel)


def with_options(function: Any, options: Options) -> None:
    """Remember what `@jobs.job` says of a coroutine function: a coroutine knows its code, not its function."""
    _options[id(function.__code__)] = options


def plain_task(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task of our own, which is no job, whatever context this is."""
    loop = asyncio.get_running_loop()
    return _original(type(loop))(loop, coroutine)  # type: ignore[no-any-return]


class TaskWork(AsyncWork):
    """A task in flight; the loop calls `ended` when it is done."""

    def ended(self, task: asyncio.Task[Any]) -> None:
        """Count how a task ended that is somebody else's."""
        # `exception()` would mark it as retrieved, and asyncio would no more say that nobody looked at it.
        if task._exception is not None:
            self.tracker.finish(self, Outcome.FAILED)
        else:
            self.tracker.finish(self, _CANCELLED if task.cancelled() else _SUCCEEDED)

    def ended_ours(self, task: asyncio.Task[Any]) -> None:
        """Count how a task of `create_task` ended; its exception is logged, once."""
        if task._exception is not None:
            error = task.exception()
            assert error is not None
            log_failure(self, error)
            self.tracker.finish(self, Outcome.FAILED)
        else:
            self.tracker.finish(self, _CANCELLED if task.cancelled() else _SUCCEEDED)


class _TaskKind:
    def __init__(self) -> None:
        # Of the instance: to find an attribute of a class is slower, and each job asks for both.
        self.name = "task"
        self.work: type[Work] = TaskWork

    def cancel(self, work: Work) -> None:
        if work.handle is not None:
            cancel_task(work.handle)

    def where(self, work: Work) -> str:
        coroutine = work.handle.get_coro() if hasattr(work.handle, "get_coro") else None
        return stacks.of_coroutine(coroutine) or str(work.handle)

    def kill(self, work: Work) -> None:
        """A task that swallows its cancellation ends with its process."""


TASK = _TaskKind()


def _create(
    make: Callable[..., asyncio.Task[T]],
    loop: Any,
    found: Tracker,
    coroutine: Coroutine[Any, Any, T],
    name: str,
    keywords: dict[str, Any] | None,
    ours: bool,
) -> asyncio.Task[T]:
    options = _options.get(id(getattr(coroutine, "cr_code", None))) if _options else None
    try:
        work = found.begin(TASK, name, None, options)
    except JobRejected:
        coroutine.close()
        raise
    # The task copies this context; one that is given is the caller's, and stays as it is.
    token = _set_mark(work)
    try:
        task = make(loop, coroutine, **keywords) if keywords else make(loop, coroutine)
    except BaseException:
        found.finish(work, Outcome.FAILED)
        raise
    finally:
        _reset_mark(token)
    work.handle = task
    if work._due:  # told to stop by another thread meanwhile
        cancel_task(task)
    if options is not None and options.timeout is not None:
        timer = loop.call_later(options.timeout, work.tell)
        task.add_done_callback(lambda _: timer.cancel())
    task.add_done_callback(work.ended_ours if ours else work.ended, context=_NO_CONTEXT)  # type: ignore[attr-defined]
    return task


def create_task(coroutine: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
    """Run `coroutine` as a task and as a job, in the running loop.

    Raises JobRejected, and closes the coroutine, when this worker is at its end.
    """
    loop = asyncio.get_running_loop()
    found = tracker._current
    if found is None:
        try:
            found = tracker.require()
        except JobRejected:
            coroutine.close()
            raise
    make = _originals.get(type(loop)) or _original(type(loop))
    if name is None:
        return _create(make, loop, found, coroutine, _name_of(coroutine), None, True)
    return _create(make, loop, found, coroutine, str(name), {"name": name}, True)


def track_task(task: asyncio.Task[Any], name: str | None) -> None:
    """Count a task until it is done."""
    found = tracker.require()
    label = name or (_name_of(task.get_coro()) if hasattr(task, "get_coro") else "future")
    work = found.begin(TASK, label, task)
    assert isinstance(work, TaskWork)
    task.add_done_callback(work.ended)


def _name_of(coroutine: Any) -> str:
    try:
        return coroutine.__qualname__  # type: ignore[no-any-return]
    except AttributeError:
        return type(coroutine).__qualname__


# -- born in a request -------------------------------------------------------------------------------------------
_originals: dict[type, Callable[..., Any]] = {}


def _original(loop: type[Any]) -> Callable[..., Any]:
    for base in loop.__mro__:
        if base in _originals:
            return _originals[base]
        if "create_task" in base.__dict__:
            return base.__dict__["create_task"]  # type: ignore[no-any-return]
    return loop.create_task  # type: ignore[no-any-return]


def _wrap(loop: Any) -> None:
    if loop in _originals:
        return
    make = loop.create_task
    _originals[loop] = make

    def create_task(self: Any, coro: Coroutine[Any, Any, T], **keywords: Any) -> asyncio.Task[T]:
        context = keywords.get("context") if keywords else None
        if context is not None:
            born = context.get(tracker.mark) is not None or context.get(requests._current) is not None
        else:
            born = _in_job() is not None or _in_request() is not None
        if not born:
            return make(self, coro, **keywords)  # type: ignore[no-any-return]
        found = tracker._current
        if found is None or is_server_task(coro):
            return make(self, coro, **keywords)  # type: ignore[no-any-return]
        name = keywords.get("name") if keywords else None
        return _create(make, self, found, coro, _name_of(coro) if name is None else str(name), keywords, False)

    loop.create_task = create_task


def patch() -> None:
    """Notice the tasks that are born in a request, from now on in this process."""
    _wrap(BaseEventLoop)
    when_imported("uvloop", lambda module: _wrap(module.Loop))


def unpatch() -> None:
    """Put the original methods back; for tests."""
    for loop, make in _originals.items():
        loop.create_task = make  # type: ignore[attr-defined]
    _originals.clear()
