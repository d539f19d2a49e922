"""Work that outlives its request: known, told to stop, waited for, accounted for.

Nothing changes in the application: threads, tasks and child processes that are born in a request are jobs. By name there
are `submit`, `create_task`, `popen`, `run`, `Executor`, `track` and `service`. Outside of a server the same calls work
and the interpreter's exit waits for them, at most `job_timeout`. This package knows no server.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeVar, overload

from gracehooks.errors import JobRejected
from gracehooks.jobs import births, descendants, infrastructure, pools, processes, services, tasks, threads
from gracehooks.jobs import tracker as _tracker
from gracehooks.jobs.processes import popen, run
from gracehooks.jobs.services import service
from gracehooks.jobs.tasks import create_task
from gracehooks.jobs.threads import Executor, Job
from gracehooks.jobs.tracker import Abandoned, JobCancelled, Log, Options, Token, Tracker, Work
from gracehooks.scoreboard import Page
from gracehooks.settings import Settings

__all__ = [
    "Abandoned",
    "Executor",
    "Job",
    "JobCancelled",
    "JobRejected",
    "Token",
    "active",
    "create_task",
    "current",
    "job",
    "popen",
    "run",
    "service",
    "shield",
    "submit",
    "track",
]

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_pool = Executor()


def submit(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Job[T]:
    """Run `fn` in a thread, as a job, with this context's variables; at most 256 at once, the next ones wait.

    Returns a `concurrent.futures.Future` with an `id` and a `name`. An exception stays in it and is logged once. Raises
    JobRejected when this worker is at its end, or in a master that preloads the application.
    """
    return _pool.submit(fn, *args, **kwargs)


def track(thing: T, name: str | None = None) -> T:
    """Count something that exists already, until it ends: a thread, a future, a task, a greenlet, a child process.

    Returns it. What is counted already is not counted twice.
    """
    found = _tracker.require()
    if isinstance(thing, Job) or any(thing is work.handle or thing is work.owner for work in found.active()):
        return thing
    if isinstance(thing, threading.Thread):
        threads.track_thread(thing, name)
    elif asyncio.isfuture(thing):
        tasks.track_task(thing, name)  # type: ignore[arg-type]
    elif isinstance(thing, concurrent.futures.Future):
        threads.track_future(thing, name)
    elif hasattr(thing, "rawlink"):
        from gracehooks.jobs import greenlets

        greenlets.track_greenlet(thing, name)
    elif hasattr(thing, "pid"):
        processes.track_process(thing, name)
    else:
        raise TypeError(f"jobs.track takes a thread, a future, a task, a greenlet or a child process, not {thing!r}")
    return thing


@overload
def job(function: F, /) -> F: ...
@overload
def job(
    *, timeout: float | None = None, on_abandon: Callable[[Abandoned], object] | None = None
) -> Callable[[F], F]: ...
def job(
    function: F | None = None,
    /,
    *,
    timeout: float | None = None,
    on_abandon: Callable[[Abandoned], object] | None = None,
) -> F | Callable[[F], F]:
    """Say of a function how it is treated when it runs as a job; a direct call of it stays a call.

    After `timeout` seconds (more than 0) its token is set, and a task is cancelled. `on_abandon` is called with the
    `Abandoned` when the job had to be given up at the end of the worker; all such calls together have half a second.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout = {timeout!r} is not valid; it takes seconds, more than 0")

    def mark(function: F) -> F:
        options = Options(timeout, on_abandon)
        if inspect.iscoroutinefunction(function):
            tasks.with_options(function, options)
        function.__gracehooks_job__ = options  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


_never = Token()


def current() -> Token:
    """The token of the job that runs here; outside of a job, one that is set when all jobs are told to stop."""
    work = _tracker.mark.get()
    if work is not None:
        return work
    found = _tracker.current()
    return _never if found is None else found.token


class shield:  # noqa: N801 - a context manager that reads like a word
    """A stretch of a job that is not told to stop: `with jobs.shield(): …`, in threads and in tasks.

    The token is not set and a task is not cancelled inside; the job learns of it when it leaves. The deadline stands.
    """

    def __enter__(self) -> None:
        self._work = _tracker.mark.get()
        if self._work is not None:
            self._work.shield(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._work is not None:
            self._work.shield(-1)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


def active() -> list[Work]:
    """The jobs in flight in this process, oldest first; each has `id`, `name`, `kind`, `age` in seconds, `where()`."""
    found = _tracker.current()
    return [] if found is None else found.active()


# -- for the worker classes --------------------------------------------------------------------------------------
def install(
    page: Page,
    settings: Settings,
    log: Log,
    *,
    loop_kind: Literal["thread", "gevent", "asyncio"] = "thread",
    application: str = "",
) -> Tracker:
    """Make this process a worker: a tracker that writes to `page`, and births noticed as `settings.track` says.

    Called once at boot, after the fork (and after gevent's patches), before the application is loaded, which is
    `application`, a module.
    """
    found = Tracker(page, settings, log)
    _tracker.adopt(found)
    if application:
        infrastructure.application.add(application.partition(".")[0])
    if settings.track == "off":
        return found
    descendants.become_subreaper()
    births.patch(count=settings.track == "request")
    found.sweeper = descendants.Descendants()
    if settings.track == "request":
        threads.patch(gevent=loop_kind == "gevent")
        tasks.patch()
        pools.patch()
        if loop_kind == "gevent":
            from gracehooks.jobs import greenlets

            greenlets.patch()
    return found


def start_services() -> None:
    """Start every registered service, once the worker has booted; in the event loop, for those that are coroutines."""
    found = _tracker.require()
    if found.sweeper is not None:
        descendants.note_boot()
    services.start()
