"""The callbacks of `gracehooks.on_shutdown`: newest first, after the last request and the last job of the worker.

One that raises is logged and the next one runs; one that hangs is left at the deadline, and those after it are named as
not run. A callback may be a coroutine function: in an ASGI worker it runs in the worker's loop, elsewhere in one of its
own. What a master registers before it forks runs in each worker. Knows no server.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from gracehooks.deadline import Deadline

__all__ = ["Log", "forget", "name_of", "on_shutdown", "registered", "run", "run_async"]

C = TypeVar("C", bound=Callable[[], Any])


class Log(Protocol):
    """What a logger must have; gunicorn's own and `logging.Logger` do."""

    def debug(self, message: str, /, *args: Any) -> None:
        """A line for whoever debugs."""

    def info(self, message: str, /, *args: Any) -> None:
        """A line for the record."""

    def warning(self, message: str, /, *args: Any) -> None:
        """A line to look at."""

    def error(self, message: str, /, *args: Any) -> None:
        """A line to act on."""

    def exception(self, message: str, /, *args: Any) -> None:
        """The same, with the exception being handled."""


_callbacks: list[Callable[[], Any]] = []
_lock = threading.Lock()


def on_shutdown(callback: C) -> C:
    """Have `callback()` called once when the worker leaves, after its last request and its last job; newest first.

    Takes a function without parameters, or a coroutine function; usable as a decorator. All callbacks together have
    `cleanup_timeout` seconds. Not called when the worker is killed.
    """
    if not callable(callback):
        raise TypeError(f"on_shutdown takes a function, not {type(callback).__name__}")
    with _lock:
        _callbacks.append(callback)
    return callback


def registered() -> list[Callable[[], Any]]:
    """The callbacks that have not been called, in the order of their registration."""
    with _lock:
        return list(_callbacks)


def forget() -> None:
    """Forget every callback."""
    with _lock:
        _callbacks.clear()


def _next() -> Callable[[], Any] | None:
    with _lock:
        return _callbacks.pop() if _callbacks else None


def name_of(callback: Callable[..., Any]) -> str:
    """The callback as a reader knows it."""
    return f"{getattr(callback, '__module__', '?')}.{getattr(callback, '__qualname__', repr(callback))}"


def run(deadline: Deadline, log: Log) -> list[str]:
    """Call every callback, in this thread, until `deadline`; gives the names of those that did not end or run."""
    while not deadline.passed:
        callback = _next()
        if callback is None:
            return []
        try:
            result = callback()
            if inspect.isawaitable(result) and not asyncio.run(_bounded(result, deadline)):
                return _left(callback)
        except Exception:
            log.exception("gracehooks: the on_shutdown callback %s failed", name_of(callback))
    return _left(None)


async def run_async(deadline: Deadline, log: Log) -> list[str]:
    """The same in an event loop: coroutine functions are awaited, plain ones block the loop as long as they take."""
    while not deadline.passed:
        callback = _next()
        if callback is None:
            return []
        try:
            result = callback()
            if inspect.isawaitable(result) and not await _bounded(result, deadline):
                return _left(callback)
        except Exception:
            log.exception("gracehooks: the on_shutdown callback %s failed", name_of(callback))
    return _left(None)


async def _bounded(awaitable: Any, deadline: Deadline) -> bool:
    """Await it until `deadline`; False when it had not ended then. What swallows its cancellation is not waited for."""
    task = asyncio.ensure_future(awaitable)
    done, _ = await asyncio.wait({task}, timeout=deadline.left())
    if not done:
        task.cancel()
        await asyncio.sleep(0)  # one turn, so that a `finally` without an await in it runs
        return False
    if not task.cancelled():
        task.result()
    return True


def _left(callback: Callable[[], Any] | None) -> list[str]:
    left = [] if callback is None else [name_of(callback)]
    while (each := _next()) is not None:
        left.append(name_of(each))
    return left
