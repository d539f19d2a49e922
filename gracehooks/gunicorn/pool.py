"""The workers of one master: forked, told to go, killed when they do not, reaped, replaced, and read when they have ended.

What must hold: every worker that was told to go has a moment at which it is killed; whatever a worker loses is read from
its page and told; no exit code but that of our own children is taken (PID 1 of a container reaps the orphans too). What
the death of a worker means for the generation is not decided here but by the master.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gracehooks import events, processes
from gracehooks.deadline import Deadline
from gracehooks.drain.driver import HAMMER, HAMMER_LAST_RESORT
from gracehooks.drain.report import of_faulthandler
from gracehooks.drain.watchdog import STACKS
from gracehooks.gunicorn.leftovers import end_leftovers
from gracehooks.gunicorn.losses import Losses, OutOfMemory, losses_of
from gracehooks.gunicorn.workers.attached import Attached
from gracehooks.scoreboard import Order, Phase

if TYPE_CHECKING:
    from gracehooks.gunicorn.master import Grace

__all__ = ["MARGIN", "Pool"]

#: A worker that was not ready holds no request: so long it may take to go, in seconds.
BOOTING_LEAVES_WITHIN = 1.0
#: How long the master waits beyond a worker's own bounds, before it kills.
MARGIN = 0.5
#: How long beyond the drain time a worker may take to learn that it was told to leave, before it is killed. Its sentinel
#: looks four times a second: only what holds the GIL, or has stopped the process, keeps that from it.
HEARD = 0.6
#: How long it may take to write its stacks before it is killed, in seconds; two looks that see the same end it sooner.
STACKS_WITHIN = 0.3
#: How long a worker has for its report once gunicorn has timed it out, in seconds: its own bounds for that, and a share.
ABORTS_WITHIN = HAMMER + HAMMER_LAST_RESORT + 0.15
#: The shortest drain time that this is reckoned from, in seconds: a busy machine may keep a worker waiting for its turn.
SHORTEST_DRAIN = 1.0
#: Between one failed boot and the next try, in seconds, and the longest.
BACKOFF, LONGEST_BACKOFF = 0.5, 10.0


class Asked:
    """The stacks of `worker`, asked for just now."""

    def __init__(self, pid: int, worker: Any) -> None:
        self._stacks = worker.stacks
        self._deadline = Deadline.after(STACKS_WITHIN)
        self._size = 0
        processes.signal_process(pid, STACKS)

    @property
    def answered(self) -> bool:
        """Whether they are there, or have not come in time; for each turn of the master's loop."""
        before, self._size = self._size, self._stacks.size
        return self._deadline.passed or (self._size > 0 and self._size == before)


@dataclass
class Departure:
    """A worker that was told to go: by when, and what to say if it does not."""

    deadline: Deadline
    reason: str
    booting: bool = False  #: it was not ready when it was told
    forced: bool = False
    #: By when it must know that it was told, or nothing in it runs any more; endless for a class that does not say so.
    heard: Deadline = field(default_factory=lambda: Deadline(float("inf")))

    def overdue(self, *, ready: bool, leaving: bool) -> bool:
        """Whether the worker must be killed now; `ready` and `leaving` are what its page says."""
        return self.deadline.passed or (ready and not leaving and self.heard.passed)


@dataclass
class Farewell:
    """A history record that waits for the last of some workers, and gathers what they lost."""

    record: dict[str, Any]
    workers: set[int]
    losses: Losses = field(default_factory=Losses)
    since: float = field(default_factory=time.monotonic)


class Pool:
    """The workers of `master`."""

    def __init__(self, master: Grace) -> None:
        self._master = master
        self._arbiter = master.arbiter
        #: A reload brings a new cohort; only one of them serves when it is over.
        self.cohort = 0
        self.leaving: dict[int, Departure] = {}
        self.recycling: dict[int, int] = {}  #: old worker: its replacement
        self.orphans: dict[int, tuple[int, Deadline]] = {}  #: of a killed successor: start time, bound
        self.ended = Losses()
        self._farewells: list[Farewell] = []
        self._told_ready: set[int] = set()
        self._failed_boots = 0
        self._spawn_after = 0.0
        self._out_of_memory = OutOfMemory()

    @property
    def busy(self) -> bool:
        """Whether something is awaited that no signal announces."""
        timed_out = any(worker.aborted for worker in self._arbiter.WORKERS.values())
        return bool(self.leaving or timed_out or self.recycling or self.orphans) or self._held_back

    @property
    def _held_back(self) -> bool:
        return time.monotonic() < self._spawn_after

    def members(self, cohort: int | None = None) -> Iterator[tuple[int, Any]]:
        """The workers that were not told to go, of the serving cohort or of `cohort`."""
        wanted = self.cohort if cohort is None else cohort
        for pid, worker in list(self._arbiter.WORKERS.items()):
            if pid not in self.leaving and getattr(worker, "cohort", 0) == wanted:
                yield pid, worker

    def progress(self) -> dict[str, Any]:
        """How many of the workers that there will be are ready, which they are, and where one of the others stands."""
        mine = [(pid, worker) for pid, worker in self.members() if worker.page.ready]
        return {
            "ready": min(len(mine), self._arbiter.num_workers),
            "workers": self._arbiter.num_workers,
            "pids": [pid for pid, _ in self.members()],
            "serving": [pid for pid, _ in mine],
            "stands": self.stands(),
        }

    def stands(self, cohort: int | None = None) -> str:
        """Where one of the workers stands that take long to boot; empty where none does."""
        return next((at for _, each in self.members(cohort) if not each.page.ready and (at := each.page.stands)), "")

    # -- births --------------------------------------------------------------------------------------------------
    def spawn(self, cohort: int) -> int:
        """Fork a worker of `cohort`; the child never comes back from here."""
        Attached.close_in_worker = self._master.close_in_worker
        pid: int = self._arbiter.spawn_worker()
        self._arbiter.WORKERS[pid].cohort = cohort
        self._arbiter.WORKERS[pid].forked_at = time.monotonic()
        return pid

    def keep(self) -> None:
        """As many workers as are wanted: fork what is missing, let go what is too many."""
        wanted = self._arbiter.num_workers
        mine = sorted(self.members(), key=lambda each: each[1].age)
        extra = len([1 for new in self.recycling.values() if new in self._arbiter.WORKERS])
        if not self._held_back:
            for _ in range(wanted + extra - len(mine)):
                self.spawn(self.cohort)
        replacements = set(self.recycling.values())
        surplus = [pid for pid, _ in mine if pid not in replacements and pid not in self.recycling]
        for pid in surplus[: max(0, len(mine) - extra - wanted)]:
            self.let_go(pid, Order.RETIRE, "one worker too many")

    def recycle(self) -> None:
        """Bring the replacement first, then let the worker go that has reached `max_requests`."""
        for old, new in list(self.recycling.items()):
            replacement = self._arbiter.WORKERS.get(new)
            if replacement is None:
                del self.recycling[old]  # it could not boot: the old one serves on, and the next try waits its time
            elif replacement.page.ready:
                del self.recycling[old]
                events.publish(events.WorkerRecycled(**self._master.identity(), worker=old, replacement=new))
                self.let_go(old, Order.RETIRE, "recycled after max_requests")
        at_once = max(1, self._arbiter.num_workers // 4)
        for pid, worker in list(self.members()):
            if len(self.recycling) >= at_once or self._held_back:
                return
            if worker.page.wants_replacement and pid not in self.recycling:
                self.recycling[pid] = 0
                self.recycling[pid] = self.spawn(self.cohort)

    def welcome(self) -> None:
        """Tell of each worker that has become ready since the last look."""
        for pid, worker in list(self._arbiter.WORKERS.items()):
            if worker.page.ready and pid not in self._told_ready:
                self._told_ready.add(pid)
                self._failed_boots = 0
                ready = sum(each.page.ready for _, each in self.members(getattr(worker, "cohort", 0)))
                events.publish(
                    events.WorkerReady(
                        **self._master.identity(),
                        worker=pid,
                        ready=ready,
                        workers=self._arbiter.num_workers,
                        seconds=round(time.monotonic() - worker.forked_at, 3),
                    )
                )
        self._told_ready &= set(self._arbiter.WORKERS)

    def boot_failed(self, pid: int, failure: str) -> None:
        """Tell of it; the next try waits, longer each time."""
        events.publish(events.WorkerBootFailed(**self._master.identity(), worker=pid, reason=failure))
        self._failed_boots += 1
        self._spawn_after = time.monotonic() + min(BACKOFF * 2 ** (self._failed_boots - 1), LONGEST_BACKOFF)

    def close_in_worker(self) -> None:
        """Run in a worker just after the fork: the files of the others are not its own."""
        for worker in self._arbiter.WORKERS.values():
            worker.stacks.close()

    # -- leaving -------------------------------------------------------------------------------------------------
    def let_go(self, pid: int, order: Order, reason: str) -> None:
        """Tell a worker to drain, once, and note by when it must have left."""
        worker = self._arbiter.WORKERS.get(pid)
        if worker is None or pid in self.leaving:
            if worker is not None and order > worker.page.order:
                worker.page.order = order
            return
        worker.page.order = order
        booting = not worker.page.ready
        bound = BOOTING_LEAVES_WITHIN if booting else self._master.settings.leave_budget + MARGIN
        departure = self.leaving[pid] = Departure(Deadline.after(bound), reason, booting)
        if getattr(worker, "drains", False):
            departure.heard = Deadline.after(max(self._master.settings.drain_timeout, SHORTEST_DRAIN) + HEARD)
        processes.signal_process(pid, signal.SIGTERM)

    def hammer(self, reason: str, deadline: Deadline) -> None:
        """Every worker goes now: its hooks and its report have until `deadline`."""
        for pid in list(self._arbiter.WORKERS):
            departure = self.leaving.setdefault(pid, Departure(deadline, reason))
            departure.deadline, departure.reason = deadline.earlier(departure.deadline), f"forced by {reason}"
            processes.signal_process(pid, signal.SIGQUIT)

    def kill(self, reason: str) -> None:
        """Kill every worker that is left."""
        for pid in list(self._arbiter.WORKERS):
            departure = self.leaving.setdefault(pid, Departure(Deadline.after(0.0), reason))
            departure.reason = reason
            self._kill(pid, departure)

    def kill_late(self, patient: bool = True) -> None:
        """Kill whoever has not left by its moment; not `patient` after the hammer."""
        for pid, departure in list(self.leaving.items()):
            worker = self._arbiter.WORKERS.get(pid)
            if worker is None:
                del self.leaving[pid]
            elif departure.overdue(ready=worker.page.ready, leaving=worker.page.leaving):
                if departure.booting and worker.page.ready and not departure.forced and patient:
                    # It became ready after it was told to go, and may hold requests: it gets the whole bound, once.
                    departure.booting = False
                    departure.deadline = Deadline.after(self._master.settings.leave_budget + MARGIN)
                else:
                    if not departure.deadline.passed:
                        if not self._told_stacks(pid, worker, "SIGTERM"):
                            continue
                        departure.reason += "; nothing in it has run since: a call in C holds it"
                    self._kill(pid, departure)

    def _kill(self, pid: int, departure: Departure) -> None:
        if not departure.forced:
            departure.forced = True
            reason = f"it had not left in time ({departure.reason})"
            events.publish(events.ForcedExit(**self._master.identity(), worker=pid, reason=reason))
        departure.deadline = Deadline.after(1.0)
        processes.signal_process(pid, signal.SIGKILL)

    def timed_out(self, pid: int) -> None:
        """gunicorn has sent SIGABRT to a worker that gave no heartbeat for `timeout`: it has a moment for its report."""
        worker = self._arbiter.WORKERS.get(pid)
        if worker is not None:
            worker.left_alone = Deadline.after(ABORTS_WITHIN)

    def may_kill(self, pid: int) -> bool:
        """Whether SIGKILL is due to a worker that gunicorn has timed out; asks for its stacks before.

        gunicorn would send it at its next turn, and the next turn comes when another worker has ended.
        """
        worker = self._arbiter.WORKERS.get(pid)
        if worker is None or worker.left_alone is None:
            return True
        return worker.left_alone.passed and self._told_stacks(pid, worker, "SIGABRT")

    def _told_stacks(self, pid: int, worker: Any, signal_name: str) -> bool:
        """Whether it has written its stacks, or will not; asks for them, once, since it has not heard the signal."""
        if not STACKS or not (getattr(worker, "drains", False) and worker.page.ready):
            return True
        if worker.asked is None:
            self._arbiter.log.error(
                "gracehooks: worker %s has not heard %s: a call in C holds it, or the process is stopped; SIGKILL follows",
                pid,
                signal_name,
            )
            worker.asked = Asked(pid, worker)
        return bool(worker.asked.answered)

    def see_out(self, pid: int) -> None:
        """A worker of a successor that was killed serves still: it finishes what it has, within the leave budget."""
        bound = Deadline.after(self._master.settings.leave_budget + MARGIN)
        self.orphans[pid] = (processes.started(pid), bound)
        processes.signal_process(pid, signal.SIGTERM)
        processes.signal_process(pid, signal.SIGCONT)

    def look_at_orphans(self, now: bool = False) -> None:
        """Forget those that have left, kill those whose bound has passed, or all of them `now`."""
        for pid, (start, deadline) in list(self.orphans.items()):
            if not processes.alive(pid, start):
                del self.orphans[pid]
            elif now or deadline.passed:
                del self.orphans[pid]
                processes.kill_group(pid)
                processes.signal_process(pid, signal.SIGKILL)

    # -- deaths --------------------------------------------------------------------------------------------------
    def reap(self) -> None:
        """Take the exit codes of our own children, and of nobody else's."""
        for pid, worker in list(self._arbiter.WORKERS.items()):
            status = processes.exit_status(pid)
            if status is not None:
                self._ended(pid, worker, status)
        self._out_of_memory.look(time.monotonic())
        if getattr(self._arbiter, "dirty_arbiter_pid", 0):
            self._arbiter.reap_dirty_arbiter()  # gunicorn 25 and newer: its pool for long work
        if os.getpid() == 1:
            self._reap_orphans()

    def _reap_orphans(self) -> None:
        """PID 1 inherits every orphan of its container (pid_namespaces(7))."""
        arbiter = self._arbiter
        for _ in range(100):
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            ours = {*arbiter.WORKERS, arbiter.reexec_pid, getattr(arbiter, "dirty_arbiter_pid", 0)}
            if found is None or found.si_pid in ours:
                return
            processes.exit_status(found.si_pid)

    def _ended(self, pid: int, worker: Any, status: int) -> None:
        arbiter, page = self._arbiter, worker.page
        arbiter.WORKERS.pop(pid, None)
        departure = self.leaving.pop(pid, None)
        self.recycling.pop(pid, None)
        how = processes.describe_status(status)
        if status or (departure is not None and departure.forced):
            end_leftovers(pid, page, worker.mark)  # what it started must not outlive it unseen
        reason = self._why(worker, departure, status, how)
        found = losses_of(page, pid, reason)
        self.ended.add(found)
        awaited = [farewell for farewell in self._farewells if pid in farewell.workers]
        for farewell in awaited:
            farewell.workers.discard(pid)
            farewell.losses.add(found)
        if not (awaited or self._master.retiring or self._master.stop.recorded):
            self._record_by_itself(pid, reason, found)
        stacks = worker.stacks.read()
        worker.stacks.close()
        if stacks:
            words = of_faulthandler(stacks)
            arbiter.log.error("gracehooks: where worker %s (%s) stood:\n%s", pid, reason, words)
        events.publish(
            events.WorkerEnded(
                **self._master.identity(),
                worker=pid,
                reason=reason,
                answered=found.answered,
                jobs=found.jobs,
                lost=found.lost,
            )
        )
        if reason != "drained":
            arbiter.log.warning("gracehooks: worker %s ended: %s (in phase %s)", pid, reason, page.phase.name.lower())
        worker.tmp.close()
        try:
            arbiter.cfg.child_exit(arbiter, worker)
        except Exception:
            arbiter.log.exception("gracehooks: the child_exit hook failed; the server serves on")
        ready, failure = page.ready, page.failure or f"worker {pid} ended with {how} while booting"
        page.close()
        if departure is None:
            self._master.worker_lost(pid, worker, reason if ready else failure, ready, status)

    def lost_elsewhere(self, pid: int, found: Losses) -> None:
        """The master `pid`, a successor that goes again, has lost this in its probation."""
        self.ended.add(found)
        if not self._master.stop.recorded:
            self._record_by_itself(pid, "its upgrade was rolled back", found, "successor")

    def _record_by_itself(self, pid: int, reason: str, found: Losses, what: str = "worker") -> None:
        """What a worker lost outside of a replacement or a stop goes to the history at once: the next record may be far.

        That of a stop says it once more, with all that this master has lost since it serves.
        """
        if found.lost["requests"] or found.lost["jobs"]:
            record = {
                "id": uuid.uuid4().hex[:12],
                "kind": "worker",
                "outcome": "forced",
                "reason": f"{what} {pid}: {reason}",
                "phases": {},
                "lost": found.lost,
                "jobs": found.jobs,
                "requests_answered": found.answered,
            }
            self._master.record(record)

    def _why(self, worker: Any, departure: Departure | None, status: int, how: str) -> str:
        if departure is not None and departure.forced:
            return f"killed: {departure.reason}"
        if worker.aborted:
            return "WORKER TIMEOUT"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGKILL:
                return self._out_of_memory.reason()
            if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT):
                return f"crashed with {how}"
            return f"killed by {how}"
        if os.WEXITSTATUS(status) == 0:
            return "drained"
        if departure is None or os.WEXITSTATUS(status) != 1:
            return f"ended with {how}"
        if self._master.stop.forced:
            return departure.reason  # the hammer's: no time was over
        if worker.page.report or worker.page.phase <= Phase.REQUESTS:
            return "drain timeout"
        return "job timeout" if worker.page.phase is Phase.JOBS else "cleanup timeout"

    def forget_ended(self) -> None:
        """Count anew: what comes now belongs to another report."""
        self.ended = Losses()

    # -- records that wait for the last of some workers ----------------------------------------------------------
    def record_when_gone(self, record: dict[str, Any], workers: set[int]) -> None:
        """Append `record` to the history once the last of `workers` has ended, with what they lost."""
        self._farewells.append(Farewell(record, workers & set(self._arbiter.WORKERS)))

    def settle(self, now: bool = False) -> None:
        """Append the records whose workers have all ended, or all of them `now`."""
        for each in [each for each in self._farewells if now or not each.workers]:
            self._farewells.remove(each)
            seconds = round(time.monotonic() - each.since, 3)
            losses = each.losses
            self._master.record(
                {
                    **each.record,
                    "phases": {**each.record["phases"], "retiring": seconds},
                    "lost": losses.lost,
                    "jobs": losses.jobs,
                    "requests_answered": losses.answered,
                }
            )
            events.publish(
                events.GenerationRetired(
                    **self._master.identity(),
                    id=each.record["id"],
                    retired=self._master.generation,
                    seconds=seconds,
                    lost=losses.lost,
                )
            )
