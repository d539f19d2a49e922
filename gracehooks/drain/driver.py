"""Runs the phases of `machine` in one worker: from "told to leave" to the exit.

What must hold:
- a signal handler records and wakes, and no more (`told`, `hammer`'s first half): the loop does the rest;
- one deadline a phase, made when the phase begins; when it has passed, what is left is reported, with the place where it
  stood, and the next phase begins;
- whoever ends a phase first ends it alone: the worker's own thread in time, or the sentinel when that thread is stuck;
- the heartbeat goes on until the process ends.

How a worker class uses it, in this order:

    drain = Drain(page, settings, log, host, parent=ppid)   in the worker process, after the fork
    drain.watch()                    starts the sentinel
    slot = drain.begin(method, path, handle) … drain.end(slot)   round each request, from parsed to answered
    drain.told("SIGTERM")            in the signal handler
    drain.look()                     at each heartbeat; True when it is time to leave (also for an order, or an orphan)
    drain.accepting_ends()           stop accepting; when `drain.final`, serve what waits at the listener first
    drain.accepting_ended()          the listeners are closed; now `drain.deadline` bounds the requests
    drain.finish()                   blocking, or `await drain.finish_async()`: JOBS, CLEANUP, ENDED
    sys.exit(drain.exit_code)        through the server's own exit hooks; `drain.leave()` after the last of them

It knows no server: a `Host` is what it needs of one.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, Protocol

from gracehooks import requests
from gracehooks.deadline import Deadline
from gracehooks.drain import cleanup, machine, report
from gracehooks.drain.cleanup import Log
from gracehooks.drain.machine import Action, Fact
from gracehooks.drain.watchdog import LastResort, Sentinel, allocate_lock, native
from gracehooks.jobs import tracker as jobs
from gracehooks.scoreboard import Order, Page, Phase, RequestInFlight
from gracehooks.settings import Settings
from gracehooks.teardown import flush_files

__all__ = ["Drain", "Host"]

#: By how much a phase may be late before the sentinel ends it in place of the worker's own thread, in seconds.
LATE = {Phase.JOBS: 0.2 + jobs.ABANDON_BOUND, Phase.CLEANUP: 0.1, Phase.ENDED: 0.1}
LATE_REQUESTS = 0.1
#: How long after a phase's deadline the last resort strikes, in seconds; after the whole budget the master would.
LAST_RESORT = {Phase.JOBS: 0.4 + jobs.ABANDON_BOUND, Phase.CLEANUP: 0.45, Phase.ENDED: 0.45}
LAST_RESORT_REQUESTS = 0.7
#: How long a worker that was told to leave while it booted may take, in seconds; nothing can be lost yet.
BOOTING = 0.3
#: How long a hammered worker may take, in seconds.
HAMMER = 0.3
#: How long after that the last resort strikes, in seconds.
HAMMER_LAST_RESORT = 0.18
#: How long the worker's own thread has for it before the sentinel does it, in seconds.
HAMMER_LATE = 0.15
#: How long the interpreter's exit may wait for threads that nobody tracks, in seconds.
THREADS_AT_EXIT = 0.3
#: How often the sentinel beats in the worker's place while it drains, in seconds.
BEAT = 0.5
#: How long a boot may take before the page says where it stands, in seconds.
LONG_BOOT = 0.5
#: What a worker that is past its last hook does not listen to any more.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT)
#: Kinds of jobs that run on while the event loop is blocked.
OUTSIDE_THE_LOOP = ("thread", "process")
#: What a report says of a request that had begun to arrive and was never read.
UNREAD = {"method": "?", "path": "?", "age": 0.0, "where": "", "counted": False}


class Host(Protocol):
    """What a drain needs of its worker; each may be called from any thread."""

    def beat(self) -> None:
        """Tell the master that the worker is alive."""

    def wake(self) -> None:
        """Wake the worker's loop."""

    def unread(self) -> int:
        """How many connections have begun to send a request that nobody has read to its end."""

    def stands(self) -> str:
        """Where the boot stands, in a few words."""

    def last_words(self) -> None:
        """Run what the server runs last (gunicorn's `worker_exit` hook), when the worker's own thread is stuck."""


class Drain:
    """The end of one worker process; `parent` is its master's pid.

    `takes_over` says that the sentinel may run jobs' ends and callbacks itself when the worker's thread is stuck; False
    where an event loop owns them. `stacks` is where the last resort prints, for the master; without it, and when the master
    is gone, it prints to `descriptor`.
    """

    def __init__(
        self,
        page: Page,
        settings: Settings,
        log: Log,
        host: Host,
        *,
        parent: int,
        takes_over: bool = True,
        stacks: int | None = None,
        descriptor: int = 2,
    ) -> None:
        self.page = page
        self.settings = settings
        self.log = log
        self.host = host
        self.parent = parent
        #: Whether the worker was told to leave; one look at an attribute, for the request path.
        self.leaving = False
        self.reason = ""
        self.exit_code = 0
        self._deadlines = machine.Deadlines(settings, Deadline(float("inf")))
        #: When the present phase must be over; endless while the worker serves.
        self.deadline = Deadline(float("inf"))
        self._takes_over = takes_over
        self._lock = allocate_lock()
        self._taken = False
        #: Whether connections are accepted: from then on the sentinel does not end it at the bound of a boot.
        self._accepts = False
        #: Whether the master is gone.
        self.orphan = False
        #: A worker that counts its requests itself, and not with `begin` and `end`, says here which are in flight.
        self.account: Callable[[], Mapping[int, tuple[RequestInFlight, object]]] | None = None
        #: Whether the worker was told to leave at once.
        self.hammered = False
        self._unread = 0
        self._handles: dict[int, object] = {}
        #: The slots of requests whose application has failed and which the server has not answered, by what runs them.
        self.failed: dict[object, int] = {}
        self._mark = requests._current.set
        #: The requests that a report has named, and where each of them stood then.
        self._said: dict[int, str] = {}
        self._said_jobs: set[int] = set()
        self._abandoned: list[dict[str, Any]] = []
        self._callbacks_left: list[str] = []
        self._exiting_at: float | None = None
        self._exit_begun = False
        self._braced: Deadline | None = None
        self._main = native("_thread", "get_ident")()
        #: What runs the phases: the main thread, or the greenlet or task in it that does.
        self.runner: object = self._main
        self._beaten_at = 0.0
        self._long_boot = Deadline(float("inf"))
        self._descriptor = descriptor
        self._last_resort = LastResort(descriptor if stacks is None else stacks)
        self._sentinel: Sentinel | None = None

    # -- requests ------------------------------------------------------------------------------------------------
    def begin(self, method: str, path: str, handle: object) -> int:
        """A request was parsed, and this context is its own now; gives the slot that `end` takes.

        `handle` is what runs it: a thread's identifier, a greenlet or a task.
        """
        slot = self.page.begin(method, path)
        self._handles[slot] = handle  # a handle outlives its request; nobody looks at the one of a free slot
        self._mark(slot)
        return slot

    def end(self, slot: int) -> None:
        """Its answer was sent; in the context of `begin`."""
        self._mark(None)
        self.page.end(slot)

    def fail(self, slot: int, handle: object) -> None:
        """The application has failed, and the server has yet to say so: the request ends with `end_failed`."""
        self._mark(None)
        self.end_failed(handle)
        self.failed[handle] = slot

    def end_failed(self, handle: object) -> None:
        """What `handle` runs has nothing more to answer."""
        slot = self.failed.pop(handle, None)
        if slot is not None:
            self.page.end(slot)

    @property
    def in_flight(self) -> int:
        """How many requests have begun and not ended."""
        return self.page.in_flight if self.account is None else len(self.account())

    def running(self) -> dict[int, tuple[RequestInFlight, object]]:
        """The requests in flight, each under a number of its own, with what runs it; without those that have no slot."""
        if self.account is not None:
            return dict(self.account())
        return {
            hash((slot, request.started)): (request, self._handles.get(slot))
            for slot, request in self.page.slots().items()
        }

    # -- told ----------------------------------------------------------------------------------------------------
    def watch(self) -> None:
        """Start the sentinel; in the worker process, once."""
        if self._sentinel is None:
            self._last_resort.tell_stacks()
            self._long_boot = Deadline.after(LONG_BOOT)
            self._sentinel = Sentinel(self, self._sentinel_failed)
            self._sentinel.start()

    def told(self, reason: str) -> None:
        """Record that the worker must leave, because of `reason`; the drain time runs from now. For signal handlers."""
        if self.leaving:
            return
        self._deadlines = machine.Deadlines(self.settings, Deadline.after(0))
        self.deadline = self._deadlines.of(Phase.REQUESTS, self._deadlines.told)
        self.reason = reason
        self.leaving = True
        self._last_resort.arm(self.deadline.plus(LAST_RESORT_REQUESTS))
        self.page.leaving = True
        if self._sentinel is not None:
            self._sentinel.wake()
        self.host.wake()

    @property
    def final(self) -> bool:
        """Whether nobody else will serve what waits at the listener: a final stop, or the master is gone."""
        return self.orphan or self.page.order is Order.STOP

    def accepting_begins(self) -> None:
        """To be called before the first connection is accepted: the short bound of a boot is over.

        Where the sentinel is ending the process at that bound, the calling thread parks here, and nothing is accepted.
        """
        with self._lock:
            self._accepts = True
            parked = self._taken
        if parked:
            _park()

    def look(self) -> bool:
        """Look at the order on the page and at the parent; gives `leaving`. Cheap, for each heartbeat."""
        if os.getppid() != self.parent and not self.orphan:
            self.orphan = True
            self._last_resort.print_to(self._descriptor)
            self.told("the master is gone")
        elif not self.leaving:
            order = self.page.order
            if order >= Order.RETIRE:
                self.told(f"order {order.name}")
            elif order is Order.LAME_DUCK and self.page.phase is Phase.SERVING:
                self._fact(Fact.TOLD_LAME_DUCK)
        return self.leaving

    def linger(self, *, used: bool) -> float:
        """How long an idle connection is kept once the worker leaves, in seconds; `used` if it has carried a request."""
        return machine.linger(self.settings, used=used, final=self.final)

    # -- the phases ----------------------------------------------------------------------------------------------
    def accepting_ends(self) -> Deadline:
        """ACCEPTING_ENDS begins: services stop pulling. Gives the deadline of the requests."""
        for action in self._fact(Fact.TOLD_TO_LEAVE):
            if action is Action.STOP_SERVICES:
                tracker = jobs.current()
                if tracker is not None:
                    tracker.stop_services()
        return self.deadline

    def accepting_ended(self) -> Deadline:
        """REQUESTS begins: no further connection will be accepted. Gives the deadline of the requests."""
        self._fact(Fact.ACCEPTING_ENDED)
        return self.deadline

    def finish(self) -> int:
        """JOBS, CLEANUP and ENDED, blocking; gives the exit code: 0 when nothing was lost, else 1."""
        self._requests_over()
        tracker = jobs.current()
        if tracker is not None:
            self._jobs_over(tracker.end(self.deadline, self.settings.grace))
        else:
            self._jobs_over([])
        self._cleanup_over(cleanup.run(self.deadline, self.log))
        return self.exit_code

    async def finish_async(self) -> int:
        """The same in an event loop, which goes on turning."""
        self._requests_over()
        tracker = jobs.current()
        if tracker is not None:
            self._jobs_over(await tracker.end_async(self.deadline, self.settings.grace))
        else:
            self._jobs_over([])
        self._cleanup_over(await cleanup.run_async(self.deadline, self.log))
        return self.exit_code

    def leave(self) -> None:
        """The server's last hook has run: join the threads that nobody tracks, within a bound, and end the process.

        Returns only where the phases are not over (the boot has failed): that exit is the server's. Ours leaves out the
        interpreter's teardown of its modules, as multiprocessing's children do: it takes longer than all the rest of an
        empty drain, can hang in what is left of a hub, and a signal in it kills a worker that has lost nothing.
        """
        if self.page.phase is not Phase.ENDED or self._is_sentinel():  # the sentinel's `last_words` run the hook too
            return
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # it is leaving
        self._exiting_at = time.monotonic()
        if self._sentinel is not None:
            self._sentinel.wake()
        if not self.hammered:
            threading._shutdown()  # type: ignore[attr-defined]
        self._exit(self.exit_code, [flush_files])

    def brace(self, reason: str) -> None:
        """Record that the worker must leave at once; `hammer` follows, from its loop or else from the sentinel.

        For the signal handlers of event loops, where `hammer` itself might have to wait for a lock.
        """
        self._last_resort.arm(Deadline.after(HAMMER + HAMMER_LAST_RESORT))
        self.reason = self.reason or reason
        self.leaving = True
        if self._braced is None:
            self._braced = Deadline.after(HAMMER_LATE)
        if self._sentinel is not None:
            self._sentinel.wake()

    def hammer(self, reason: str) -> int:
        """Leave at once: the report, and then at most HAMMER seconds for the exit hooks. Gives the exit code."""
        end = Deadline.after(HAMMER) if self._braced is None else self._braced.plus(HAMMER - HAMMER_LATE)
        self._last_resort.arm(end.plus(HAMMER_LAST_RESORT))
        self.hammered = self.leaving = True
        self.reason = self.reason or reason
        self._abandon_jobs()
        self._account(reason)
        if self.page.phase is not Phase.ENDED:
            self._fact(Fact.HAMMERED)
        self._kill_jobs()
        self.deadline = self.deadline.earlier(end)
        self._last_resort.arm(end.plus(HAMMER_LAST_RESORT))
        if self._sentinel is not None:
            self._sentinel.wake()
        return self.exit_code

    # -- steps ---------------------------------------------------------------------------------------------------
    def _fact(self, fact: Fact) -> tuple[Action, ...]:
        """Step on `fact`; the thread that comes second parks here, since the other one is ending the process."""
        with self._lock:
            parked = self._taken and not self._is_sentinel()
            if not parked:
                step = machine.step(self.page.phase, fact)
                if step.phase is not self.page.phase:
                    self.page.phase = step.phase
                    if step.phase > Phase.LAME_DUCK:
                        self.deadline = self._deadlines.of(step.phase, Deadline.after(0))
                        self._last_resort.arm(self.deadline.plus(LAST_RESORT.get(step.phase, LAST_RESORT_REQUESTS)))
                return step.actions
        return _park()

    def _is_sentinel(self) -> bool:
        return self._sentinel is not None and self._sentinel.is_here()

    def _requests_over(self) -> None:
        self._unread = self.host.unread() if self.deadline.passed else 0
        actions = self._fact(Fact.DEADLINE_PASSED if self.in_flight or self._unread else Fact.REQUESTS_ENDED)
        if Action.REPORT_REQUESTS in actions:
            self._account("drain_timeout")

    def _jobs_over(self, abandoned: list[jobs.Abandoned]) -> None:
        self._abandoned.extend(each.facts() for each in abandoned)
        self._fact(Fact.DEADLINE_PASSED if abandoned else Fact.JOBS_ENDED)
        if abandoned:  # also of a worker that was told to leave while it booted
            self._account("job_timeout")

    def _cleanup_over(self, left: list[str]) -> None:
        self._callbacks_left = left
        actions = self._fact(Fact.DEADLINE_PASSED if left else Fact.CLEANUP_ENDED)
        if Action.REPORT_CLEANUP in actions:
            self.log.error("gracehooks: cleanup_timeout: on_shutdown callbacks that did not end: %s", ", ".join(left))
        self.settle()

    def _account(self, reason: str) -> None:
        """Write the report, and log what it says: each request and job once."""
        requests_lost, jobs_lost = self._write(reason)
        fresh = {
            "requests": [each for number, each in requests_lost.items() if number not in self._said],
            "jobs": [each for each in jobs_lost if each["id"] not in self._said_jobs],
        }
        self._said.update({number: each.get("where", "") for number, each in requests_lost.items()})
        self._said_jobs.update(each["id"] for each in jobs_lost)
        if fresh["requests"] or fresh["jobs"]:
            self.exit_code = 1
            self.log.error(
                "gracehooks: %s: %d requests and %d jobs have not ended:\n%s",
                reason,
                len(fresh["requests"]),
                len(fresh["jobs"]),
                report.in_words(fresh),
            )

    def _write(self, reason: str) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
        frames = sys._current_frames()
        found = {
            number: report.facts(request, handle, frames, self._main)
            for number, (request, handle) in self.running().items()
        }
        for number, each in found.items():  # where it stood when its time was over, not what came of its end
            each["where"] = self._said.get(number) or each["where"]
        # Requests that nobody has read, and those for which the page had no room, have no name; they are losses all the
        # same.
        nameless = max(0, self.in_flight - len(found))
        for number in range(1, self._unread + nameless + 1):
            found[-number] = UNREAD if number <= self._unread else {**UNREAD, "counted": True}
        self.page.report = report.as_json(found.values(), self._abandoned, reason) if found or self._abandoned else ""
        return found, self._abandoned

    def settle(self) -> None:
        """What is lost after all, now that the end is near: a request that was late and was answered is not."""
        requests_lost, jobs_lost = self._write(self.reason)
        self.exit_code = 1 if requests_lost or jobs_lost or self._callbacks_left else 0
        if not self.exit_code:
            self.log.debug("gracehooks: drained, nothing lost")

    def _abandon_jobs(self) -> None:
        tracker = jobs.current()
        if tracker is not None:
            self._abandoned.extend(each.facts() for each in tracker.abandon())

    def _kill_jobs(self) -> None:
        tracker = jobs.current()
        if tracker is not None:
            tracker.kill()

    # -- the sentinel's turn ---------------------------------------------------------------------------------------
    def turn(self) -> float:
        """The sentinel's turn: beat, and end what the worker's own thread should have ended; seconds until the next."""
        if not self.leaving:
            if self.page.phase is Phase.BOOTING and self._long_boot.passed:
                self.page.stands = self.host.stands()
            return BEAT
        now = time.monotonic()
        phase = self.page.phase
        if self._braced is not None and not self.hammered:
            if self._braced.passed:
                with self._lock:
                    self._taken = True
                self.hammer(self.reason)
                self.host.last_words()
                self._exit(1)
            return self._braced.left()
        if phase is Phase.BOOTING and not self._accepts:
            late = self._deadlines.told.plus(BOOTING)
            if not late.passed:
                return late.left()
            with self._lock:
                ended = self._taken = not self._accepts
            if ended:
                self._exit(0)  # nothing was accepted, so nothing is lost; the import it waits for may never end
        if now - self._beaten_at >= BEAT:
            self._beaten_at = now
            self.host.beat()
        if phase is Phase.ENDED and self._exiting_at is not None:
            self._turn_at_exit(now)
        due = self.deadline.plus(0.02 if self.hammered else LATE.get(phase, LATE_REQUESTS))
        if due.passed and not self._taken:
            self._take_over(phase)
        pause = min(due.left(), BEAT)
        return min(pause, 0.02) if self._exiting_at is not None else max(pause, 0.02)

    def _turn_at_exit(self, now: float) -> None:
        """The interpreter joins every non-daemon thread before it exits; one that is busy would hold it for ever."""
        assert self._exiting_at is not None
        if self._exit_begun or now - self._exiting_at < THREADS_AT_EXIT:
            return
        held = [
            each for each in _threads() if not each.daemon and each.is_alive() and each is not threading.main_thread()
        ]
        if not held:
            return
        frames = sys._current_frames()
        of_requests = {handle for _, handle in self.running().values() if isinstance(handle, int)}
        others = [
            f"{each.name}, at:\n    " + report.where(each.ident or 0, frames).replace("\n", "\n    ")
            for each in held
            if each.ident not in of_requests
        ]
        if others:
            self.log.warning("gracehooks: threads still run at exit and are left:\n%s", "\n".join(others))
        self._exit(self.exit_code)

    def _take_over(self, phase: Phase) -> None:
        with self._lock:
            if self.page.phase is not phase:
                return
            self._taken = True
        self.exit_code = 1
        if not any(handle == self.runner for _, handle in self.running().values()):  # else the report says it
            stuck = report.where(self.runner, None, self._main).replace("\n", "\n    ")
            self.log.error("gracehooks: the worker is stuck in phase %s, at:\n    %s", phase.name.lower(), stuck)
        if phase <= Phase.REQUESTS:
            if phase < Phase.ACCEPTING_ENDS:
                self.accepting_ends()
            self._finish_in_its_place()
        elif phase is Phase.JOBS:
            self._abandon_jobs()
            self._kill_jobs()
            self._account("job_timeout")
            self._fact(Fact.DEADLINE_PASSED)
            self._clean_up_in_its_place()
        elif phase is Phase.CLEANUP:
            self._cleanup_over(["the one where it stands", *map(cleanup.name_of, cleanup.registered()[::-1])])
        elif self.hammered:
            self.settle()
        if phase is not Phase.ENDED or self._exiting_at is None:
            self.host.last_words()
        self._exit(1)

    def _finish_in_its_place(self) -> None:
        if self._takes_over:
            self.finish()
            return
        # The event loop is blocked: its tasks cannot end any more. Threads and processes can.
        self._requests_over()
        tracker = jobs.current()
        if tracker is not None:
            grace = Deadline.after(self.settings.grace).earlier(self.deadline)
            told = False
            while not self.deadline.passed and any(work.kind in OUTSIDE_THE_LOOP for work in tracker.active()):
                if grace.passed and not told:
                    told = True
                    tracker.tell_all(self.deadline.at)
                self.host.beat()
                native("time", "sleep")(0.05)
            self._abandon_jobs()
            self._kill_jobs()
        if self._abandoned:
            self._account("job_timeout")
        self._fact(Fact.DEADLINE_PASSED if self._abandoned else Fact.JOBS_ENDED)
        self._clean_up_in_its_place()

    def _clean_up_in_its_place(self) -> None:
        if self._takes_over:
            self._cleanup_over(cleanup.run(self.deadline, self.log))
        else:  # they may need the loop, which is blocked
            self._cleanup_over([cleanup.name_of(each) for each in cleanup.registered()[::-1]])

    def _exit(self, code: int, flushes: Iterable[Callable[[], object]] = ()) -> None:
        """The exit, with what a soft one would still have done: atexit, logging, the buffers; and no child is left.

        `flushes` are what may be waited for: a thread that is stuck in a write holds its file.
        """
        begun, self._exit_begun = self._exit_begun, True
        try:
            if not begun:  # else one of them hangs in the other thread
                tracker = jobs.current()
                sweeper = tracker.sweeper if tracker is not None else None
                if sweeper is not None:
                    sweeper.before_atexit()
                atexit._run_exitfuncs()
                if sweeper is not None:
                    sweeper.part()
        except BaseException:  # noqa: BLE001 - a callback of theirs; nothing may keep this process
            pass
        finally:
            for flush in (logging.shutdown, *_flushes(), *flushes):
                try:
                    flush()
                except Exception:  # noqa: BLE001
                    pass
            os._exit(code)

    def _sentinel_failed(self, error: BaseException) -> None:
        self.log.error("gracehooks: the sentinel failed: %r", error)


def _park() -> NoReturn:
    """Wait for the end of the process, which another thread brings about, or else the last resort."""
    while True:
        native("time", "sleep")(3600)


def _flushes() -> list[Callable[[], object]]:
    return [stream.flush for stream in (sys.stdout, sys.stderr) if stream is not None]


def _threads() -> list[threading.Thread]:
    # Without the lock of `threading.enumerate`: under gevent it belongs to the hub's thread.
    return list(getattr(threading, "_active", {}).values())
