"""Threads and pools: `jobs.submit`, `jobs.Executor`, and the threads and futures that are born in a request.

What must hold:
- a thread that is started outside of a request costs two look-ups more and is otherwise untouched;
- threads of pools and of libraries are no jobs (see `infrastructure`); what a request hands to a pool is one, since
  it may outlive the request;
- our own threads are daemons: nothing at the interpreter's exit joins them for ever, the bounded end waits for them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import inspect
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from gracehooks import requests
from gracehooks.jobs import stacks, tracker
from gracehooks.jobs.infrastructure import is_infrastructure, package_whose_own
from gracehooks.jobs.tracker import JobCancelled, Options, Tracker, Work
from gracehooks.scoreboard import Outcome

__all__ = ["FUTURE", "THREAD", "Executor", "Job", "patch", "start_thread", "track_future", "track_thread"]

P = ParamSpec("P")
T = TypeVar("T")

#: As many jobs of `submit` run at once; the next ones wait for their turn.
MOST_THREADS = 256
#: A pool's thread without work ends after these seconds.
IDLE = 30.0

#: The class that has `start`: gevent puts a subclass in the place of `threading.Thread`.
_Thread: Any = next(base for base in threading.Thread.__mro__ if "start" in base.__dict__)
_start: Callable[[threading.Thread], None] = _Thread.start
_PLAIN = {_Thread}
_in_request = requests._current.get
_in_job = tracker.mark.get
_set_mark = tracker.mark.set
_SUCCEEDED = Outcome.SUCCEEDED  # a look into an Enum is slow


class _ThreadKind:
    name = "thread"
    work: type[Work] = Work

    def cancel(self, work: Work) -> None:
        if isinstance(work.handle, Job):
            work.handle.cancel()  # one that has not begun never will
        elif isinstance(work.handle, threading.Timer):
            work.handle.cancel()  # the same

    def where(self, work: Work) -> str:
        handle = work.handle
        if isinstance(handle, Job):
            if handle.thread is None:
                return "has not begun: it waits for a thread"
            return where_thread(handle.thread)
        return where_thread(handle)

    def kill(self, work: Work) -> None:
        """A thread cannot be killed; it ends with its process."""


class _FutureKind(_ThreadKind):
    def cancel(self, work: Work) -> None:
        work.handle.cancel()

    def where(self, work: Work) -> str:
        for innermost in sys._current_frames().values():
            frame = innermost
            while frame is not None:
                if frame.f_code is _marked.__code__ and frame.f_locals.get("work") is work:
                    return stacks.of_frame(innermost)
                frame = frame.f_back  # type: ignore[assignment]
        return str(work.handle)


THREAD = _ThreadKind()
FUTURE = _FutureKind()


def where_thread(thread: threading.Thread) -> str:
    """Where a running thread stands, as one line; also where it is a greenlet."""
    greenlet = getattr(thread, "_gracehooks_greenlet", None)
    if greenlet is not None:
        return stacks.of_frame(greenlet.gr_frame)
    frame = sys._current_frames().get(thread.ident or 0)
    return stacks.of_frame(frame) if frame is not None else "not running"


def note_greenlet(thread: threading.Thread) -> None:
    """Remember which greenlet this thread is, under gevent; called in the thread itself."""
    if _getcurrent is not None:
        thread._gracehooks_greenlet = _getcurrent()  # type: ignore[attr-defined]


def start_thread(thread: threading.Thread) -> None:
    """Start a thread of our own, which is no job, whatever context this is."""
    contextvars.Context().run(_start, thread)


def outcome_of(error: BaseException | None) -> Outcome:
    """How a job ended that raised `error`."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return Outcome.SUCCEEDED
    if isinstance(error, (concurrent.futures.CancelledError, asyncio.CancelledError)):  # JobCancelled is one
        return Outcome.CANCELLED
    if type(error).__name__ == "GreenletExit":  # by its name: gevent may not be installed
        return Outcome.CANCELLED
    return Outcome.FAILED


def log_failure(work: Work, error: BaseException) -> None:
    """Say once in the log that a job failed, with its traceback."""
    work.tracker.log.error(
        "gracehooks: the %s %d (%s) failed after %.1f s", work.kind, work.id, work.name, work.age, exc_info=error
    )


def name_of(function: Any) -> str:
    """What the log and the report call a job that runs `function`."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return str(name)


def options_of(function: Any) -> Options | None:
    """What `@jobs.job` said of `function`."""
    return getattr(function, "__gracehooks_job__", None)


# -- jobs.submit and jobs.Executor -------------------------------------------------------------------------------
class Job(Future[T]):
    """A submitted job: a Future with an `id` and a `name`; `cancel()` of one that runs tells it to stop."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work
        self.thread: threading.Thread | None = None

    @property
    def id(self) -> int:
        """Its number in this process, as in the log and the report."""
        return self.work.id

    @property
    def name(self) -> str:
        """The name of its function."""
        return self.work.name

    def cancel(self) -> bool:
        """Cancel it when it has not begun (True); when it runs, set its token and give False."""
        if super().cancel():
            self.work.tracker.finish(self.work, Outcome.CANCELLED)
            return True
        if not self.done():
            self.work.tell_token()
        return False

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.name!r} {self._state.lower()}>"


Call = tuple[Job[Any], contextvars.Context, Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class _Worker:
    """A thread of a pool: it has a call to make, or it waits on its baton for the next one."""

    __slots__ = ("baton", "call", "thread")

    def __init__(self, call: Call | None) -> None:
        self.call = call
        self.baton = threading.Lock()
        self.baton.acquire()
        self.thread: threading.Thread


#: A forked child has none of the threads; its pools begin again.
_executors: weakref.WeakSet[Executor] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for executor in list(_executors):
        executor._reset()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Executor(concurrent.futures.Executor):
    """A pool whose calls are jobs; `max_workers` (1 or more) of them run at once.

    Its threads are started when they are needed, carry the context variables of the one who submits, and end when
    idle. `submit` raises JobRejected when this worker is at its end, RuntimeError after `shutdown`.
    """

    def __init__(self, max_workers: int = MOST_THREADS, *, thread_name_prefix: str = "gracehooks-job") -> None:
        if max_workers < 1:
            raise ValueError("max_workers must be 1 or more")
        self._most = max_workers
        self._prefix = thread_name_prefix
        self._reset()
        _executors.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._queue: deque[Call] = deque()
        self._workers: set[_Worker] = set()
        self._made = 0
        self._shut = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Job[T]:
        """Run `fn` in a thread, as a job."""
        if self._shut:
            raise RuntimeError("cannot submit a job after shutdown of its executor")
        work = tracker.require().begin(THREAD, name_of(fn), None, options_of(fn))
        job: Job[T] = Job(work)
        work.handle = job
        call: Call = (job, contextvars.copy_context(), fn, args, kwargs)
        with self._lock:
            if self._idle:
                worker = self._idle.pop()
                worker.call = call
                worker.baton.release()
                return job
            if len(self._workers) >= self._most:
                self._queue.append(call)
                return job
            worker = _Worker(call)
            self._workers.add(worker)
            self._made += 1
            number = self._made
        worker.thread = threading.Thread(
            target=self._turn, args=(worker,), name=f"{self._prefix}-{number}", daemon=True
        )
        try:
            start_thread(worker.thread)
        except BaseException:
            # No thread is to be had. Others may do the call; when there is none it must not stay for ever.
            with self._lock:
                self._workers.discard(worker)
                alone = not self._workers
                if not alone:
                    self._queue.append(call)
            if alone:
                work.tracker.finish(work, Outcome.FAILED)
                raise
        return job

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more; with `wait` return when all have ended, with `cancel_futures` drop what has not begun."""
        with self._lock:
            self._shut = True
            dropped = list(self._queue) if cancel_futures else []
            if cancel_futures:
                self._queue.clear()
            workers = list(self._workers)
            for worker in self._idle:
                worker.baton.release()
            self._idle.clear()
        for call in dropped:
            call[0].cancel()
        if wait:
            for worker in workers:
                worker.thread.join()

    def _turn(self, worker: _Worker) -> None:
        note_greenlet(worker.thread)
        while worker.call is not None:
            job, context, function, args, kwargs = worker.call
            worker.call = None
            job.thread = worker.thread
            context.run(_make_call, job, function, args, kwargs)
            job.thread = None
            del job, context, function, args, kwargs
            with self._lock:
                if self._queue:
                    worker.call = self._queue.popleft()
                    continue
                if self._shut:
                    break
                self._idle.append(worker)
            if not worker.baton.acquire(timeout=IDLE):
                with self._lock:
                    if worker in self._idle:
                        self._idle.remove(worker)
                        break
                worker.baton.acquire()  # a call was given just now
        with self._lock:
            self._workers.discard(worker)


def _make_call(job: Job[Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    work = job.work
    if work.tracker.told and not work._told:
        job.cancel()  # all are being told to stop, and this one has not begun
    if not job.set_running_or_notify_cancel():
        return
    tracker.mark.set(work)
    error: BaseException | None = None
    outcome = Outcome.SUCCEEDED
    try:
        try:
            result = function(*args, **kwargs)
            if inspect.iscoroutine(result):
                result.close()
                raise TypeError(f"{work.name} is a coroutine function: use jobs.create_task, not jobs.submit")
        except BaseException as raised:  # noqa: BLE001 - it belongs to the future, as in every executor
            error = raised
            outcome = outcome_of(error)
            if outcome is Outcome.FAILED:
                log_failure(work, error)
            job.set_exception(error)
        else:
            job.set_result(result)
        # After the callbacks of the future: they may be the last that needs what the clean-up closes.
        work.tracker.finish(work, outcome)
    finally:
        error = None  # a cycle through its own traceback
        del job


# -- born in a request -------------------------------------------------------------------------------------------
class ThreadWork(Work):
    """A thread of the application's in flight, which runs as `run_as_job`."""

    _run: Callable[[], None]

    def run_as_job(self) -> None:
        """What its `run` does, in the thread, and the count of how it ended."""
        thread, run = self.handle, self._run
        del self._run  # no cycle, and the thread has its own `run` again
        thread.__dict__.pop("run", None)
        _set_mark(self)
        if _getcurrent is not None:
            note_greenlet(thread)
        try:
            run()
        except BaseException as error:
            # threading.excepthook says it, once.
            self.tracker.finish(self, outcome_of(error))
            if not isinstance(error, JobCancelled):
                raise
        else:
            self.tracker.finish(self, Outcome.CANCELLED if _never_fired(thread, self) else _SUCCEEDED)


class _StartedKind(_ThreadKind):
    work: type[Work] = ThreadWork


STARTED = _StartedKind()


def _patched_start(self: threading.Thread) -> None:
    if _in_job() is None and _in_request() is None:
        return _start(self)
    found = tracker._current
    if found is None or self._started.is_set() or _is_infrastructure(self):  # type: ignore[attr-defined]
        return _start(self)
    return _start_tracked(self, found, self.name)


def _is_infrastructure(thread: Any) -> bool:
    kind = type(thread)
    if is_infrastructure(thread._target) or (kind not in _PLAIN and is_infrastructure(kind)):
        return True
    if not thread.daemon:
        return False
    package = package_whose_own(thread)
    if package is None:
        return False
    if package not in _said:
        _said.add(package)
        found = tracker.require()
        found.log.info(
            "gracehooks: no stop waits for the thread %s: it is a daemon of %s, which started it for itself "
            "(jobs.track(thread) makes such a one a job)",
            thread.name,
            package,
        )
    return True


#: The packages of which the log has spoken.
_said: set[str] = set()


def _never_fired(thread: threading.Thread, work: Work) -> bool:
    return isinstance(thread, threading.Timer) and work.age < thread.interval


def _start_tracked(thread: threading.Thread, found: Tracker, name: str) -> None:
    target = getattr(thread, "_target", None)
    work: Any = found.begin(STARTED, name, thread, options_of(target) if target is not None else None)
    work._run = thread.run
    thread.run = work.run_as_job  # type: ignore[method-assign]
    try:
        _start(thread)
    except BaseException:
        thread.__dict__.pop("run", None)
        found.finish(work, Outcome.FAILED)
        raise


_submit = ThreadPoolExecutor.submit


def _patched_submit(self: ThreadPoolExecutor, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
    if _in_job() is None and _in_request() is None:
        return _submit(self, fn, *args, **kwargs)
    found = tracker.current()
    if found is None:
        return _submit(self, fn, *args, **kwargs)
    work = found.begin(FUTURE, name_of(fn), None, options_of(fn))
    try:
        future = _submit(self, _marked, work, fn, args, kwargs)
    except BaseException:
        found.finish(work, Outcome.FAILED)
        raise
    work.handle = future
    future.add_done_callback(lambda done: _future_done(work, done))
    return future


def _marked(work: Work, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    token = tracker.mark.set(work)
    try:
        return fn(*args, **kwargs)
    finally:
        tracker.mark.reset(token)


def _future_done(work: Work, future: Future[Any]) -> None:
    # Whoever holds the future sees its exception; a log line here would repeat what a view has handled.
    error = concurrent.futures.CancelledError() if future.cancelled() else future.exception()
    work.tracker.finish(work, outcome_of(error))


_getcurrent: Callable[[], Any] | None = None


def patch(*, gevent: bool) -> None:
    """Notice the threads and the futures that are born in a request, from now on in this process."""
    global _getcurrent, _start, _submit
    # As they are now: what instruments threads may have been there first, in a master that preloads.
    if _Thread.start is not _patched_start:
        _start = _Thread.start
    if ThreadPoolExecutor.submit is not _patched_submit:
        _submit = ThreadPoolExecutor.submit
    if gevent:
        import gevent as package

        _getcurrent = package.getcurrent
        _PLAIN.add(threading.Thread)
    _Thread.start = _patched_start
    ThreadPoolExecutor.submit = _patched_submit  # type: ignore[method-assign,assignment]


def unpatch() -> None:
    """Put the original methods back; for tests."""
    global _getcurrent
    _getcurrent = None
    _Thread.start = _start
    ThreadPoolExecutor.submit = _submit  # type: ignore[method-assign]


# -- by hand -----------------------------------------------------------------------------------------------------
def track_thread(thread: threading.Thread, name: str | None) -> None:
    """Count a thread: one that is not started yet, from its start on; a running one until it ends."""
    found = tracker.require()
    if not thread._started.is_set():  # type: ignore[attr-defined]
        label = name or thread.name
        thread.start = functools.partial(_start_once, thread, found, label)  # type: ignore[method-assign]
        return
    if not thread.is_alive():
        return
    work = found.begin(THREAD, name or thread.name, thread)

    def watch() -> None:
        thread.join()
        found.finish(work, Outcome.SUCCEEDED)

    # A thread that runs already tells nobody of its end: another one has to wait for it.
    start_thread(threading.Thread(target=watch, name=f"gracehooks-watch-{thread.name}", daemon=True))


def _start_once(thread: threading.Thread, found: Tracker, name: str) -> None:
    thread.__dict__.pop("start", None)
    _start_tracked(thread, found, name)


def track_future(future: Future[Any], name: str | None) -> None:
    """Count a future until it is done."""
    found = tracker.require()
    work = found.begin(FUTURE, name or "future", future)
    future.add_done_callback(lambda done: _future_done(work, done))
