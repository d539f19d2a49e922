"""Who is still at work in this process: every job is counted when it is accepted and once more when it ends.

What must hold:
- `accepted = succeeded + failed + cancelled + abandoned`, at every moment when no job is in flight, on the page too;
- no job slips in after the end saw none: every job has a slot of the page, or holds the lock while it is counted; the end
  takes all slots and the lock before it closes; whoever has a slot looks once more when its job is there to be seen;
- the end waits on a wake-up, not on a clock: it returns when the last job has ended, or when its deadline has passed;
- a job that is found too late to be waited for is reported, never dropped.

The tracker knows no thread, no task and no process: a `Kind` says how its jobs are told to stop, where they stand and
how they are killed. It knows no server and no drain either; the drain calls `stop_services` and then `end`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import threading
from _thread import RLock
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any, NoReturn, Protocol

from gracehooks import settings as settings_module
from gracehooks.deadline import Deadline
from gracehooks.errors import JobRejected
from gracehooks.scoreboard import Outcome, Page

__all__ = [
    "Abandoned",
    "AsyncWork",
    "JobCancelled",
    "Kind",
    "Log",
    "Options",
    "Sweeper",
    "Token",
    "Tracker",
    "Work",
    "adopt",
    "current",
    "forbid_in_this_process",
    "mark",
    "names",
    "require",
]

#: How long the callbacks `on_abandon` may take, all together, in seconds, after the deadline of the jobs has passed.
ABANDON_BOUND = 0.5

OnAbandon = Callable[["Abandoned"], object]


class Log(Protocol):
    """A logger: logging's or gunicorn's."""

    def info(self, msg: str, *args: Any) -> None: ...
    def warning(self, msg: str, *args: Any) -> None: ...
    def error(self, msg: str, *args: Any, exc_info: BaseException | None = None) -> None: ...
    def exception(self, msg: str, *args: Any) -> None: ...


class JobCancelled(CancelledError):  # noqa: N818 - it is no error, and reads like the two CancelledErrors
    """The job's turn: it was told to stop and `raise_if_set` was asked; let it through, it counts as cancelled."""


@dataclass(frozen=True)
class Abandoned:
    """A job that had not ended at its deadline: what it was, its age in seconds, and where it stood."""

    id: int
    name: str
    kind: str
    age: float
    where: str

    def facts(self) -> dict[str, Any]:
        """The same as a dictionary, for a report."""
        return asdict(self)


@dataclass(frozen=True)
class Options:
    """What `@jobs.job` says of a function: seconds after which it is told to stop, and whom to tell of its loss."""

    timeout: float | None = None
    on_abandon: OnAbandon | None = None


class Kind(Protocol):
    """How one kind of work is told to stop, found and killed; none of it may block."""

    @property
    def name(self) -> str:
        """thread, task, process, greenlet or service."""

    @property
    def work(self) -> type[Work]:
        """What its jobs are made of: `Work`, or `AsyncWork` where the job lives in an event loop."""

    def cancel(self, work: Work) -> None:
        """Tell the work to stop, beyond its token."""

    def where(self, work: Work) -> str:
        """Where it stands, as text."""

    def kill(self, work: Work) -> None:
        """End it by force, where that is possible without ending this process."""


class Sweeper(Protocol):
    """Finds work that nobody began through the tracker: descendants of this process."""

    def adopt(self, tracker: Tracker, *, watch: bool = True) -> None:
        """Begin a job for each stray, and finish it when it ends unless `watch` is False.

        Called whenever the tracker is about to say that it is empty.
        """

    def kill(self, *, infrastructure: bool) -> None:
        """Kill every descendant; those that the application had at boot only with `infrastructure`."""

    def before_atexit(self) -> None:
        """End the children that a callback at exit would wait for."""

    def part(self) -> None:
        """End every descendant that is left, with a word before: this process ends now."""


class _Flag(Protocol):
    def set(self) -> None: ...
    def clear(self) -> None: ...


_flags = RLock()


class Token:
    """What a job can ask: was I told to stop, and how long have I left?

    `expires` is when the job is given up, in monotonic seconds.
    """

    # Defaults live in the class: most jobs never set one of them, and making a job is on the hot path.
    _told = False
    _shields = 0
    _flag: _Flag | None = None
    expires = math.inf
    timeout_at = math.inf

    def is_set(self) -> bool:
        """Whether the job was told to stop; False inside of `shield()`."""
        if self._shields:
            return False
        return self._told or (self.timeout_at < math.inf and monotonic() >= self.timeout_at)

    def wait(self, seconds: float | None = None) -> Any:
        """Wait until told to stop, at most `seconds` (for ever when None); gives `is_set()`.

        In an asyncio task and in an async service it is a coroutine: `await token.wait(1)`.
        """
        if self.is_set():
            return True
        event = self._raise_flag(threading.Event)
        event.wait(self._limit(seconds))
        return self.is_set()

    def raise_if_set(self) -> None:
        """Raise JobCancelled when told to stop; else nothing."""
        if self.is_set():
            raise JobCancelled("the job was told to stop")

    def remaining(self) -> float:
        """Seconds until the job is given up or its own time-out falls; `math.inf` where neither is set."""
        return max(0.0, min(self.expires, self.timeout_at) - monotonic())

    def tell(self) -> None:
        """Tell the job to stop; inside of `shield()` it learns when it leaves it."""
        with _flags:
            self._told = True
            if self._shields == 0 and self._flag is not None:
                self._flag.set()

    def shield(self, step: int) -> None:
        """Enter (1) or leave (-1) a stretch in which the job is not told to stop."""
        with _flags:
            self._shields += step
            if self._flag is not None:
                if self._shields:
                    self._flag.clear()
                elif self._told:
                    self._flag.set()

    def _raise_flag(self, make: Callable[[], Any]) -> Any:
        with _flags:
            if self._flag is None:
                self._flag = make()
                if self._told and self._shields == 0:
                    self._flag.set()
            return self._flag

    def _limit(self, seconds: float | None) -> float | None:
        if self._shields or self.timeout_at == math.inf:
            return seconds
        left = max(0.0, self.timeout_at - monotonic())
        return left if seconds is None else min(left, seconds)


class Work(Token):
    """One job in flight, which is its own token; made by `Tracker.begin`, which sets what has no default."""

    tracker: Tracker
    kind_of: Kind
    id: int
    name: str
    handle: Any
    started: float
    on_abandon: OnAbandon | None = None
    slot = -1
    _due = False
    _delivered = False

    @property
    def kind(self) -> str:
        """The name of its kind: thread, task, process, greenlet or service."""
        return self.kind_of.name

    @property
    def age(self) -> float:
        """Seconds since it was accepted."""
        return max(0.0, monotonic() - self.started)

    @property
    def owner(self) -> Any:
        """What the application holds of it, where that is not the handle itself: the Popen of a process."""
        return getattr(self.handle, "owner", None)

    def where(self) -> str:
        """Where it stands now, as text."""
        try:
            return self.kind_of.where(self)
        except Exception as error:  # noqa: BLE001 - a report must be written whatever a stack looks like
            return f"unknown ({type(error).__name__}: {error})"

    def abandoned(self) -> Abandoned:
        """What a report says of it now."""
        return Abandoned(self.id, self.name, self.kind, self.age, self.where())

    def tell(self) -> None:
        """Tell the job to stop: its token, and what its kind can do; inside of `shield()` when it leaves it."""
        self._due = True
        super().tell()
        self._deliver()

    def tell_token(self) -> None:
        """Set its token and do no more: a service pulls nothing new, and finishes what it has."""
        super().tell()

    def shield(self, step: int) -> None:
        """Enter (1) or leave (-1) a stretch in which the job is not told to stop."""
        super().shield(step)
        if self._due:
            self._deliver()

    def _deliver(self) -> None:
        if self._delivered or self._shields:
            return
        self._delivered = True
        try:
            self.kind_of.cancel(self)
        except Exception:
            self.tracker.log.exception(
                "gracehooks: the %s %d (%s) could not be told to stop", self.kind, self.id, self.name
            )

    def __repr__(self) -> str:
        return f"<{self.kind} {self.id} {self.name!r}, {self.age:.1f} s>"


class AsyncWork(Work):
    """A job that lives in an event loop: its `wait` is a coroutine."""

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait until told to stop, at most `seconds` (for ever when None); gives `is_set()`."""
        if self.is_set():
            return True
        loop = asyncio.get_running_loop()
        flag: _LoopFlag = self._raise_flag(lambda: _LoopFlag(loop))
        told = loop.create_future()
        limit = self._limit(seconds)
        timer = None if limit is None else loop.call_later(limit, _resolve, told)
        flag.waiting.add(told)
        try:
            await told
        finally:
            flag.waiting.discard(told)
            if timer is not None:
                timer.cancel()
        return self.is_set()


class _LoopFlag:
    """Wakes those who wait for a token in one event loop; other threads may raise it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.waiting: set[asyncio.Future[None]] = set()

    def set(self) -> None:
        _call_soon(self.loop, self._wake)

    def clear(self) -> None:
        pass  # whoever waits looks at the token again

    def _wake(self) -> None:
        for told in self.waiting:
            _resolve(told)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


_new = object.__new__

#: The job that this context runs in: what is started in it is a job as well.
mark: ContextVar[Work | None] = ContextVar("gracehooks_job", default=None)


class Tracker:
    """The jobs of one process; outside of a server it has a page of its own, which nobody else reads."""

    def __init__(
        self,
        page: Page | None = None,
        settings: settings_module.Settings | None = None,
        log: Log | None = None,
    ) -> None:
        self.page = page if page is not None else Page(requests=1, jobs=64)
        self.settings = settings if settings is not None else settings_module.current()
        self.log: Log = log if log is not None else logging.getLogger("gracehooks")
        self.pid = os.getpid()
        #: With `track = "off"` jobs run, but nobody counts them or waits for them.
        self.counting = self.settings.track != "off"
        self.told = False
        self.expires = math.inf
        self.ending = False
        self.closed = False
        self.services_stopped = False
        self.sweeper: Sweeper | None = None
        self.token = Token()
        self._ids = itertools.count(1)
        # Re-entrant: a finalizer that the collector runs while the lock is held may end a job. And a native one, also
        # under gevent, whose threads outside of the hub end jobs too; nothing switches greenlets while it is held.
        self._lock = RLock()
        # Every job in flight. A store and a pop are one step, and so is a copy, which is how it is read.
        self._works: dict[int, Work] = {}
        self._take_slot = self.page.take_job_slot
        self._publish = self.page.publish_job
        self._end_on_page = self.page.job_end
        self._wake: Callable[[], object] | None = None
        self._stoppers: list[Callable[[], object]] = []

    # -- counting ------------------------------------------------------------------------------------------------
    def begin(self, kind: Kind, name: str, handle: Any = None, options: Options | None = None) -> Work:
        """Accept a job, and count it; raises JobRejected when the tracker is closed (and counts that)."""
        work = _new(kind.work)
        work.tracker = self
        work.kind_of = kind
        work.id = id = next(self._ids)
        work.name = name
        work.handle = handle
        work.started = started = monotonic()
        if self.counting:
            try:
                work.slot = slot = self._take_slot()
            except IndexError:
                self._count_without_a_slot(work)
            else:
                self._publish(slot, id, kind.name, name, started)
                self._works[id] = work
                if self.ending:
                    self._begun_late(work)
        elif self.closed:
            self._reject(work)
        if options is not None:
            work.on_abandon = options.on_abandon
            if options.timeout is not None:
                work.timeout_at = started + options.timeout
        return work

    def _count_without_a_slot(self, work: Work) -> None:
        with self._lock:
            if self.closed:
                self._reject(work)
            work.slot = self.page.job_begin(work.id, work.kind, work.name)
            self._works[work.id] = work
            self._told_late(work)

    def _begun_late(self, work: Work) -> None:
        with self._lock:
            if self.closed:
                # Whoever takes it out of the dictionary first decides: when the end did, it was accepted and abandoned.
                if self._works.pop(work.id, None) is not None:
                    self.page.withdraw_job(work.slot)
                self._reject(work)
            self._told_late(work)

    def _told_late(self, work: Work) -> None:
        if self.ending:
            if self.told:
                work._told = True
            work.expires = self.expires

    def _reject(self, work: Work) -> NoReturn:
        self.page.job_rejected()
        raise JobRejected(
            f"the {work.kind} {work.name!r} was not started: this worker is at its end and takes no further job"
        )

    def finish(self, work: Work, outcome: Outcome) -> bool:
        """The job has ended; False when it was counted before (it was abandoned, or ended twice)."""
        slot = work.slot
        if slot >= 0:
            if self._works.pop(work.id, None) is None:
                return False
            self._end_on_page(slot, outcome)
        else:
            with self._lock:
                if self._works.pop(work.id, None) is None:
                    return False
                self._end_on_page(slot, outcome)
        # Its slot is free, and only then this is asked: whoever ends sets `_wake` and then looks at the slots.
        wake = self._wake
        if wake is not None and not self._works:
            wake()
        return True

    def counts(self) -> dict[str, int]:
        """The jobs in numbers: accepted, and one number for each outcome."""
        return self.page.counts()

    def active(self) -> list[Work]:
        """The jobs in flight, oldest first."""
        with self._lock:
            return list(self._works.values())

    def __len__(self) -> int:
        return len(self._works)

    def __iter__(self) -> Iterator[Work]:
        return iter(self.active())

    def __contains__(self, work: object) -> bool:
        return isinstance(work, Work) and self._works.get(work.id) is work

    # -- the end -------------------------------------------------------------------------------------------------
    def on_stop_services(self, stopper: Callable[[], object]) -> None:
        """Have `stopper` called when services must stop pulling; at once when that was said already."""
        with self._lock:
            if not self.services_stopped:
                self._stoppers.append(stopper)
                return
        stopper()

    def stop_services(self) -> None:
        """Tell the services to pull nothing new; the first step of every end, and harmless when repeated."""
        with self._lock:
            self.services_stopped = True
            stoppers, self._stoppers = self._stoppers, []
        for stopper in stoppers:
            try:
                stopper()
            except Exception:
                self.log.exception("gracehooks: a service could not be told to stop")

    def end(
        self, deadline: Deadline, grace: Deadline | float, tick: Callable[[], object] | None = None
    ) -> list[Abandoned]:
        """Wait for the jobs: undisturbed for `grace` (seconds from now), then told to stop, until `deadline`.

        Returns those that had not ended then; they are reported to their `on_abandon`, and killed where that is
        possible. Afterwards the tracker is closed. Blocks; under gevent it lets other greenlets run. `tick` is called
        at least once a second meanwhile, for a heartbeat.
        """
        woken = threading.Event()
        ending = Ending(self, deadline, grace, woken.set)
        while (left := ending.step(woken.clear)) is not None:
            if tick is not None:
                tick()
                left = min(left, 1.0)
            woken.wait(left)
        if ending.callbacks():
            ending.done.wait(ABANDON_BOUND)
        return ending.finish()

    async def end_async(self, deadline: Deadline, grace: Deadline | float) -> list[Abandoned]:
        """The same as `end`, for an event loop that goes on turning meanwhile."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        ending = Ending(self, deadline, grace, lambda: _call_soon(loop, woken.set))
        while (left := ending.step(woken.clear)) is not None:
            await _wait(loop, woken, left)
        if ending.callbacks():
            woken.clear()
            if not ending.done.is_set():
                await _wait(loop, woken, ABANDON_BOUND)
        return ending.finish()

    def tell_all(self, expires: float = math.inf) -> None:
        """Tell every job to stop, also those that begin from now on; `expires` is when they are given up."""
        with self._lock:
            self.expires = expires
            self.ending = self.told = True
            works = list(self._works.values())
        self.token.tell()
        for work in works:
            work.expires = expires
            work.tell()

    def close_if_empty(self) -> bool:
        """Close when no job is in flight, in one step; gives whether it is closed."""
        with self._lock:
            if not self.closed and not self._works and self.page.take_every_job_slot():
                self.ending = self.closed = True
            return self.closed

    def close(self) -> list[Work]:
        """Close now; gives the jobs in flight, counted as abandoned."""
        with self._lock:
            self.ending = self.closed = True
            return list(self._works.values())

    def abandon(self) -> list[Abandoned]:
        """Give up every job now, without a word to it: for an exit by force, from any thread.

        Closes the tracker and counts what is in flight as abandoned; gives it, at once: under gevent nothing switches
        between the first count and the return, so whoever waits in `end` finds the report written. `kill` is next.
        """
        if not self.counting:
            self.closed = True
            return []
        if self.sweeper is not None and not self.closed:
            self.sweeper.adopt(self, watch=False)
        lost = []
        for work in self.close():
            abandoned = work.abandoned()
            if self.finish(work, Outcome.ABANDONED):
                lost.append(abandoned)
        return lost

    def kill(self) -> None:
        """Kill every child process, and what was started at boot too."""
        if self.counting and self.sweeper is not None:
            self.sweeper.kill(infrastructure=True)


class Ending:
    """The steps of an end, without the waiting, which is the caller's: blocking or in an event loop."""

    def __init__(
        self, tracker: Tracker, deadline: Deadline, grace: Deadline | float, wake: Callable[[], object]
    ) -> None:
        self.tracker = tracker
        self.deadline = deadline
        self.grace = (grace if isinstance(grace, Deadline) else Deadline.after(grace)).earlier(deadline)
        self.wake = wake
        self.done = threading.Event()
        self.lost: list[tuple[Work, Abandoned]] = []
        self._swept = False
        tracker.stop_services()
        with tracker._lock:
            tracker._wake = wake
            tracker.expires = deadline.at
            tracker.ending = True
            for work in list(tracker._works.values()):
                work.expires = deadline.at

    def step(self, clear: Callable[[], object]) -> float | None:
        """Do what is due; gives the seconds to wait for a wake-up, or None when the waiting is over."""
        tracker = self.tracker
        if not tracker.counting:
            tracker.tell_all(self.deadline.at)
            tracker.close()
            return None
        while True:
            clear()
            if not self._swept or not len(tracker):
                self._sweep()
                self._swept = True
            if tracker.close_if_empty():
                return None
            if self.deadline.passed:
                self._sweep()
                self._give_up()
                return None
            if tracker.told:
                return self.deadline.left()
            if not self.grace.passed:
                return self.grace.left()
            self._sweep()
            self._say_who_is_told()
            tracker.tell_all(self.deadline.at)

    def _say_who_is_told(self) -> None:
        works = self.tracker.active()
        if works:
            self.tracker.log.warning(
                "gracehooks: job_grace is over, %d jobs are told to stop; what never ends is no job: start it at import "
                "or make it a service (%s)",
                len(works),
                names(works),
            )

    def _sweep(self) -> None:
        if self.tracker.sweeper is not None and not self.tracker.closed:
            self.tracker.sweeper.adopt(self.tracker)

    def _give_up(self) -> None:
        if not self.tracker.told:
            self.tracker.tell_all(self.deadline.at)
        for work in self.tracker.close():
            abandoned = work.abandoned()
            if self.tracker.finish(work, Outcome.ABANDONED):
                self.lost.append((work, abandoned))

    def callbacks(self) -> bool:
        """Start `on_abandon` of the jobs that were lost, aside, since it may hang; False when there is none."""
        todo = [(work.on_abandon, abandoned) for work, abandoned in self.lost if work.on_abandon is not None]
        if not todo:
            return False

        def call() -> None:
            for on_abandon, abandoned in todo:
                try:
                    on_abandon(abandoned)
                except Exception:
                    self.tracker.log.exception(
                        "gracehooks: on_abandon of job %d (%s) failed", abandoned.id, abandoned.name
                    )
            self.done.set()
            self.wake()

        threading.Thread(target=call, name="gracehooks-on-abandon", daemon=True).start()
        return True

    def finish(self) -> list[Abandoned]:
        """Kill what was lost; gives the list."""
        self.tracker._wake = None
        for work, _ in self.lost:
            try:
                work.kind_of.kill(work)
            except Exception:
                self.tracker.log.exception("gracehooks: job %d (%s) could not be killed", work.id, work.name)
        if self.lost and self.tracker.sweeper is not None:
            self.tracker.sweeper.kill(infrastructure=False)
        return [abandoned for _, abandoned in self.lost]


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        pass  # the loop is closed: nobody waits any more


async def _wait(loop: asyncio.AbstractEventLoop, event: asyncio.Event, seconds: float) -> None:
    timer = loop.call_later(seconds, event.set)
    try:
        await event.wait()
    finally:
        timer.cancel()


# -- the tracker of this process ---------------------------------------------------------------------------------
_current: Tracker | None = None
_forbidden: str | None = None
_making = threading.Lock()


def current() -> Tracker | None:
    """The tracker of this process, or None where no job was ever submitted and no worker was booted."""
    return _current


def adopt(tracker: Tracker | None) -> None:
    """Make `tracker` this process's; lifts what `forbid_in_this_process` said."""
    global _current, _forbidden
    _current = tracker
    _forbidden = None


def forbid_in_this_process(reason: str) -> None:
    """Refuse every job from now on with `reason`: a master forks, and what runs in it would be lost or doubled."""
    global _current, _forbidden
    _current = None
    _forbidden = reason


def require() -> Tracker:
    """The tracker of this process; the first call outside of a server makes one that waits at exit.

    Raises JobRejected where jobs are forbidden.
    """
    global _current
    if _forbidden is not None:
        raise JobRejected(_forbidden)
    if _current is None:
        with _making:
            if _current is None:
                tracker = Tracker()
                _at_exit(lambda: _end_at_exit(tracker))
                _current = tracker
    return _current


def _at_exit(call: Callable[[], object]) -> None:
    # Before non-daemon threads are joined and while threads can still be started; atexit comes after both.
    try:
        threading._register_atexit(call)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        import atexit

        atexit.register(call)


def _end_at_exit(tracker: Tracker) -> None:
    if tracker.pid != os.getpid() or tracker.closed:
        return
    settings = tracker.settings
    for lost in tracker.end(Deadline.after(settings.job_timeout), settings.grace):
        tracker.log.error(
            "gracehooks: %s %d (%s) was abandoned after %.1f s, at: %s",
            lost.kind,
            lost.id,
            lost.name,
            lost.age,
            lost.where,
        )


def _after_fork_in_child() -> None:
    # The parent's jobs are the parent's: their threads do not exist here, and their locks may be held for ever.
    global _current, _making, _flags
    if _current is not None:
        # The page is shared with the parent: a copy of its jobs that ends here must not be counted again.
        _current.counting = False
        _current._works = {}
        _current._lock = RLock()
        _current._wake = None
    _making = threading.Lock()
    _flags = RLock()
    _current = None
    mark.set(None)


os.register_at_fork(after_in_child=_after_fork_in_child)


def names(works: Iterable[Work]) -> str:
    """A line for the log that names the jobs, at most ten of them."""
    listed = [f"{work.kind} {work.id} ({work.name}, {work.age:.1f} s)" for work in itertools.islice(works, 11)]
    return ", ".join(listed[:10]) + (" …" if len(listed) > 10 else "")
