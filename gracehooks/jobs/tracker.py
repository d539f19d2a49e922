"""Who is still at work in this process: every job is counted when it is accepted and once more when it ends.

What must hold:
- `accepted = succeeded + failed + cancelled + abandoned`, at every moment when no job is in flight, on the page too;
- "is it closed?" and "count one more" are one step under one lock: no job slips in after the end saw none;
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
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from gracehooks import settings as settings_module
from gracehooks.deadline import Deadline
from gracehooks.errors import JobRejected
from gracehooks.scoreboard import Outcome, Page

__all__ = [
    "Abandoned",
    "JobCancelled",
    "Kind",
    "Options",
    "Sweeper",
    "Token",
    "Tracker",
    "Work",
    "adopt",
    "current",
    "forbid_in_this_process",
    "require",
]

#: How long the callbacks `on_abandon` may take, all together, in seconds, after the deadline of the jobs has passed.
ABANDON_BOUND = 0.5

OnAbandon = Callable[["Abandoned"], object]


class JobCancelled(CancelledError):
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

    name: str

    def cancel(self, work: Work) -> None:
        """Tell the work to stop, beyond its token."""

    def where(self, work: Work) -> str:
        """Where it stands, as text."""

    def kill(self, work: Work) -> None:
        """End it by force, where that is possible without ending this process."""


class Sweeper(Protocol):
    """Finds work that nobody began through the tracker: descendants of this process."""

    def adopt(self, tracker: Tracker) -> None:
        """Begin a job for each stray; called whenever the tracker is about to say that it is empty."""

    def kill(self, tracker: Tracker) -> None:
        """Kill every descendant that is not infrastructure."""


class Token:
    """What a job can ask: was I told to stop, and how long have I left?"""

    __slots__ = ("_event", "_shields", "_told", "expires")

    def __init__(self) -> None:
        self._told = False
        self._shields = 0
        self._event: threading.Event | None = None
        self.expires = math.inf

    def is_set(self) -> bool:
        """Whether the job was told to stop; False inside of `shield()`."""
        return self._shields == 0 and (self._told or (self.expires < math.inf and time.monotonic() >= self.expires))

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until told to stop, at most `seconds` (for ever when None); gives `is_set()`."""
        if self.is_set():
            return True
        with _events:
            if self._event is None:
                self._event = threading.Event()
                if self._told and self._shields == 0:
                    self._event.set()
            event = self._event
        left = self.expires - time.monotonic()
        if self._shields == 0 and left < (math.inf if seconds is None else seconds):
            seconds = max(0.0, left)
        event.wait(seconds)
        return self.is_set()

    def raise_if_set(self) -> None:
        """Raise JobCancelled when told to stop; else nothing."""
        if self.is_set():
            raise JobCancelled("the job was told to stop")

    def remaining(self) -> float:
        """Seconds until the job will be abandoned, or told to stop by its own time-out; `math.inf` when neither is set."""
        return max(0.0, self.expires - time.monotonic())

    def tell(self) -> None:
        """Tell the job to stop; inside of `shield()` it learns when it leaves it."""
        with _events:
            self._told = True
            if self._shields == 0 and self._event is not None:
                self._event.set()

    def _shield(self) -> None:
        with _events:
            self._shields += 1
            if self._event is not None:
                self._event.clear()

    def _unshield(self) -> None:
        with _events:
            self._shields -= 1
            if self._shields == 0 and self._told and self._event is not None:
                self._event.set()


_events = threading.Lock()


class Work(Token):
    """One job in flight, which is its own token; made by `Tracker.begin`."""

    __slots__ = ("_kind", "_slot", "cancelled_by_us", "handle", "id", "name", "on_abandon", "started", "tracker")

    def __init__(self, tracker: Tracker, kind: Kind, id: int, name: str, handle: Any) -> None:
        self._told = tracker.told
        self._shields = 0
        self._event = None
        self.expires = tracker.expires
        self.tracker = tracker
        self._kind = kind
        self.id = id
        self.name = name
        self.handle = handle
        self.started = time.monotonic()
        self.on_abandon: OnAbandon | None = None
        self.cancelled_by_us = False
        self._slot = -1

    @property
    def kind(self) -> str:
        """The name of its kind: thread, task, process, greenlet or service."""
        return self._kind.name

    @property
    def age(self) -> float:
        """Seconds since it was accepted."""
        return max(0.0, time.monotonic() - self.started)

    def where(self) -> str:
        """Where it stands now, as text."""
        try:
            return self._kind.where(self)
        except Exception as error:  # noqa: BLE001 - a report must be written whatever a stack looks like
            return f"unknown ({type(error).__name__}: {error})"

    def abandoned(self) -> Abandoned:
        """What a report says of it now."""
        return Abandoned(self.id, self.name, self.kind, self.age, self.where())

    def tell(self) -> None:
        """Tell the job to stop: its token, and what its kind can do; inside of `shield()` when it leaves it."""
        super().tell()
        if self._shields == 0:
            self._deliver()

    def _unshield(self) -> None:
        super()._unshield()
        if self._shields == 0 and self._told:
            self._deliver()

    def _deliver(self) -> None:
        if self.cancelled_by_us:
            return
        self.cancelled_by_us = True
        try:
            self._kind.cancel(self)
        except Exception:
            self.tracker.log.exception(
                "gracehooks: %s %d (%s) could not be told to stop", self.kind, self.id, self.name
            )

    def __repr__(self) -> str:
        return f"<{self.kind} {self.id} {self.name!r}, {self.age:.1f} s>"


#: The job that this context runs in: what is started in it is a job as well.
mark: ContextVar[Work | None] = ContextVar("gracehooks_job", default=None)


class Tracker:
    """The jobs of one process; `page` is None outside of a server, and then `counts` still counts."""

    def __init__(
        self,
        page: Page | None = None,
        settings: settings_module.Settings | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        self.page = page
        self.settings = settings if settings is not None else settings_module.current()
        self.log = log if log is not None else logging.getLogger("gracehooks")
        self.pid = os.getpid()
        self.told = False
        self.expires = math.inf
        self.closed = False
        self.services_stopped = False
        self.sweeper: Sweeper | None = None
        self.token = Token()
        self._ids = itertools.count(1)
        # Re-entrant: a finalizer that the collector runs while the lock is held may end a job.
        self._lock = threading.RLock()
        self._works: dict[int, Work] = {}
        self._service_works: set[int] = set()
        self._wake: Callable[[], object] | None = None
        self._stoppers: list[Callable[[], object]] = []
        self._counts = {"accepted": 0, **{each.name.lower(): 0 for each in Outcome}}

    # -- counting ------------------------------------------------------------------------------------------------
    def begin(self, kind: Kind, name: str, handle: Any = None, options: Options | None = None) -> Work:
        """Accept a job, and count it; raises JobRejected when the tracker is closed (and counts that)."""
        with self._lock:
            if self.closed:
                self._counts["rejected"] += 1
                if self.page is not None:
                    self.page.job_rejected()
                raise JobRejected(
                    f"the {kind.name} {name!r} was not started: this worker is at its end and takes no further job"
                )
            work = Work(self, kind, next(self._ids), name, handle)
            self._works[work.id] = work
            self._counts["accepted"] += 1
            if self.page is not None:
                work._slot = self.page.job_begin(work.id, kind.name, name)
        if options is not None:
            work.on_abandon = options.on_abandon
            if options.timeout is not None:
                work.expires = min(work.expires, work.started + options.timeout)
        return work

    def finish(self, work: Work, outcome: Outcome) -> bool:
        """The job has ended; False when it was counted before (it was abandoned, or ended twice)."""
        with self._lock:
            if self._works.pop(work.id, None) is None:
                return False
            self._counts[outcome.name.lower()] += 1
            if self.page is not None:
                self.page.job_end(work._slot, outcome)
            wake = self._wake if not self._works else None
        if wake is not None:
            wake()
        return True

    def counts(self) -> dict[str, int]:
        """The jobs in numbers: accepted, and one number for each outcome."""
        with self._lock:
            return dict(self._counts)

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

    def end(self, deadline: Deadline, grace: Deadline | float) -> list[Abandoned]:
        """Wait for the jobs: undisturbed for `grace` (seconds from now), then told to stop, until `deadline`.

        Returns those that had not ended then; they are reported to their `on_abandon`, and killed where that is
        possible. Afterwards the tracker is closed. Blocks; under gevent it lets other greenlets run.
        """
        woken = threading.Event()
        ending = Ending(self, deadline, grace, woken.set)
        while (left := ending.step(woken.clear)) is not None:
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
            self.told = True
            self.expires = expires
            works = list(self._works.values())
        self.token.tell()
        for work in works:
            work.expires = min(work.expires, expires)
            work.tell()

    def close_if_empty(self) -> bool:
        """Close when no job is in flight, in one step; gives whether it is closed."""
        with self._lock:
            if not self._works:
                self.closed = True
            return self.closed

    def close(self) -> list[Work]:
        """Close now; gives the jobs in flight, counted as abandoned."""
        with self._lock:
            self.closed = True
            works = list(self._works.values())
        return works


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
            for work in tracker._works.values():
                work.expires = min(work.expires, deadline.at)
            tracker.expires = deadline.at

    def step(self, clear: Callable[[], object]) -> float | None:
        """Do what is due; gives the seconds to wait for a wake-up, or None when the waiting is over."""
        tracker = self.tracker
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
            tracker.tell_all(self.deadline.at)

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
                work._kind.kill(work)
            except Exception:
                self.tracker.log.exception("gracehooks: job %d (%s) could not be killed", work.id, work.name)
        if self.tracker.sweeper is not None:
            self.tracker.sweeper.kill(self.tracker)
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
    global _forbidden
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
    global _current, _making, _events
    _making = threading.Lock()
    _events = threading.Lock()
    _current = None
    mark.set(None)


os.register_at_fork(after_in_child=_after_fork_in_child)


def names(works: Iterable[Work]) -> str:
    """A line for the log that names the jobs, at most ten of them."""
    listed = [f"{work.kind} {work.id} ({work.name}, {work.age:.1f} s)" for work in itertools.islice(works, 11)]
    return ", ".join(listed[:10]) + (" …" if len(listed) > 10 else "")
