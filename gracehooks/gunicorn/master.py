"""What the master of one generation does, a turn at a time: keep the workers, upgrade, reload, retire, stop.

What must hold: no turn blocks; every worker that was told to go has a moment at which it is killed; whatever a worker
loses is read from its page and told; a generation that was ready once never ends because a later worker cannot boot.
Every wait is a state that `tick` looks at, with its bound beside it.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gunicorn import util
from gunicorn.errors import HaltServer
from gunicorn.pidfile import Pidfile

from gracehooks import events, processes, settings
from gracehooks.anchor import mooring
from gracehooks.deadline import Deadline
from gracehooks.gunicorn import listeners
from gracehooks.gunicorn.losses import Losses, left_behind, losses_of
from gracehooks.gunicorn.predecessor import Predecessor, take_handover
from gracehooks.gunicorn.reload import CohortHost
from gracehooks.gunicorn.successor import ReexecHost
from gracehooks.gunicorn.workers.attached import Attached, attached
from gracehooks.logs import Logbook
from gracehooks.scoreboard import Order
from gracehooks.systemd.driver import Speaker
from gracehooks.systemd.machine import Situation
from gracehooks.upgrade.driver import Driver
from gracehooks.upgrade.history import Book, default_state_dir

__all__ = ["Grace"]

#: How long the loop may sleep, in seconds: while something is under way, and otherwise.
BUSY, IDLE = 0.05, 1.0
#: A worker that was not ready holds no request: so long it may take to go.
BOOTING_LEAVES_WITHIN = 1.0
#: After INT or QUIT: so long a worker may take for its hooks and its report.
HAMMER_WITHIN = 1.0
#: How long the master waits beyond a worker's own bounds, before it kills.
MARGIN = 0.5
#: Between one failed boot and the next try, in seconds, and the longest.
BACKOFF, LONGEST_BACKOFF = 0.5, 10.0


@dataclass
class Departure:
    """A worker that was told to go: by when, and what to say if it does not."""

    deadline: Deadline
    reason: str
    booting: bool = False  #: it was not ready when it was told
    forced: bool = False


@dataclass
class Stop:
    """A stop under way."""

    id: str
    reason: str
    final: bool
    since: float
    deadline: Deadline
    lame_duck: Deadline | None = None
    draining: bool = False
    forced: bool = False


@dataclass
class Pending:
    """A history record that waits for the last of some workers."""

    record: dict[str, Any]
    workers: set[int]
    losses: Losses = field(default_factory=Losses)
    since: float = field(default_factory=time.monotonic)


class Grace:
    """The state of one master; `arbiter` is gunicorn's. Raises ConfigError for a wrong setting."""

    def __init__(self, arbiter: Any) -> None:
        self.arbiter = arbiter
        self.settings = settings.resolve()
        settings.adopt(self.settings)
        self.handover = take_handover()
        self.generation = self.handover.generation if self.handover else 1
        self.speaker = Speaker(
            os.environ,
            successor=self.handover is not None,
            anchored="GRACEHOOKS_ANCHOR" in os.environ,
            boot=self.settings.ready_timeout,
        )
        self.predecessors: list[Predecessor] = []
        if self.handover:
            self.predecessors = [*self.handover.draining, self.handover.old]
        directory = self.settings.state_dir or (self.handover.state_dir if self.handover else None)
        if directory is None:
            directory = str(default_state_dir(arbiter.cfg.pidfile, os.getpid()))
        self.book = Book(Path(directory).absolute(), lambda text: arbiter.log.error("gracehooks: %s", text))
        self.driver = Driver(self.identity, self.record)
        self.successor: ReexecHost | None = None
        self.reloading: CohortHost | None = None
        self.cohort = 0
        self.leaving: dict[int, Departure] = {}
        self.recycling: dict[int, int] = {}
        self.orphans: dict[int, tuple[int, Deadline]] = {}
        self.stopping: Stop | None = None
        #: The names of the listeners that we opened beside those of systemd; None before we looked.
        self.own: list[str] | None = None
        self.retiring = False
        self.ended = Losses()
        self.pending: list[Pending] = []
        self.takeover: dict[str, Any] | None = None
        self._born = time.monotonic()
        self._oom_kills = processes.oom_kills()
        self._told_ready: set[int] = set()
        self._ever_ready = False
        self._said: tuple[Any, ...] = ()
        self._failed_boots = 0
        self._spawn_after = 0.0
        self._status_at = 0.0
        self._status_key: Any = None
        self._finished = False
        self._failure = ""
        self._unnamed = ""
        self._sweeping = False

    # -- the beginning -------------------------------------------------------------------------------------------
    @property
    def is_successor(self) -> bool:
        """Whether this master serves beside an older one that has not handed over yet."""
        return self.handover is not None

    def identity(self) -> dict[str, int]:
        """What every event carries."""
        return {"pid": os.getpid(), "generation": self.generation}

    def begin(self) -> None:
        """The arbiter is graceful now: say what was chosen, and put the worker class in place."""
        arbiter, log = self.arbiter, self.arbiter.log
        events.subscribe(Logbook(log))
        if self.speaker.on:
            events.subscribe(self.speaker.hear)
        if self.settings.on_event is not None:
            events.subscribe(self.settings.on_event)
        arbiter.worker_class = attached(arbiter.worker_class)
        self.apply_budget()
        if self.handover:
            if self.handover.workers != self.handover.configured:
                arbiter.num_workers = self.handover.workers  # TTIN and TTOU outlive the upgrade
            arbiter.systemd = arbiter.systemd or self.handover.systemd
            self.own = self.handover.own
            self.tell(say="hello", **self._progress())
        if not getattr(arbiter.worker_class, "drains", False):
            log.info(
                "gracehooks: %s is not one of gracehooks' worker classes: jobs, the report of requests in flight and the "
                "linger are absent; upgrade, reload and the bounded stop work",
                arbiter.cfg.worker_class_str,
            )

    def apply_budget(self) -> None:
        """Say how long a stop may last, and raise gunicorn's own limit to it where it is lower."""
        cfg, log, budget = self.arbiter.cfg, self.arbiter.log, self.settings.stop_budget
        log.info(
            "gracehooks: a stop lasts at most %g s; give it TimeoutStopSec=%d, terminationGracePeriodSeconds: %d or "
            "stopwaitsecs=%d",
            budget,
            *[int(budget + 5)] * 3,
        )
        if cfg.graceful_timeout < self.settings.leave_budget:
            raised = int(-(-self.settings.leave_budget // 1))
            log.info("gracehooks: graceful_timeout is raised from %s s to %s s", cfg.graceful_timeout, raised)
            cfg.set("graceful_timeout", raised)

    # -- a turn of the loop --------------------------------------------------------------------------------------
    def pace(self) -> float:
        """How long the loop may sleep."""
        busy = (
            self.driver.under_way
            or self.stopping
            or self.retiring
            or self.leaving
            or self.recycling
            or self.orphans
            or self.is_successor
            or not self._ever_ready
            or self._spawn_after > time.monotonic()
            or (self.takeover is not None)
        )
        return BUSY if busy else min(IDLE, self.speaker.pace)

    def tick(self) -> None:
        """One turn: look at everything that may have happened, and act."""
        if self._finished:
            self._end_of_loop()
            return
        if self.own is None:
            self.own = listeners.add_own(self.arbiter) if self.arbiter.systemd else []
            mooring.offer(self.arbiter.LISTENERS)  # a master that is killed while it boots is started with them too
        self.reap()
        if mooring.adrift() and self.final:
            self.begin_stop("the anchor is gone")
        self._hear_predecessors()
        self._look_at_readiness()
        self.driver.tick()
        self._force_the_late()
        self._see_out_orphans()
        self._recycle()
        self._keep_workers()
        self._go_on_stopping()
        if self.retiring and not self.arbiter.WORKERS and not self.speaker.holds:
            self.driver.workers_gone()
        self._settle_pending()
        self.write_status()
        self._measure()
        self._speak()
        if self._finished:
            self._end_of_loop()

    def _end_of_loop(self) -> None:
        """Leave the loop, once systemd has heard what it was told last; bounded by the speaker."""
        self._speak()
        if not self.speaker.holds:
            raise StopIteration

    def _speak(self) -> None:
        """Let systemd know; the next master hears it once systemd follows it."""
        held = self.speaker.holds
        self.speaker.tick(self._situation)
        if self._unnamed and not self.speaker.unnamed:
            if self.driver.last.get("id") == self._unnamed:
                self.driver.last["state"] = "completed"  # for those who wait: systemd follows this master now
                self.write_status(now=True)
            self._unnamed = ""
        if held and not self.speaker.holds and self.retiring and self.successor is not None:
            self.successor.announced()

    def _situation(self) -> Situation:
        last = self.driver.last
        pages = [worker.page for worker in self.arbiter.WORKERS.values()]
        return Situation(
            generation=self.generation,
            workers=self.arbiter.num_workers,
            ready=sum(worker.page.ready for _, worker in self.workers()),
            new_ready=last.get("workers_ready", 0),
            new_workers=last.get("workers", 0),
            draining=len(self.predecessors_alive()),
            leaving=len(pages),
            requests=sum(page.in_flight for page in pages),
            jobs=sum(page.jobs_in_flight for page in pages),
            kind=last.get("kind", "upgrade"),
            phase=last.get("state", ""),
        )

    def _measure(self) -> None:
        """gunicorn's own gauges, which its `manage_workers` would send: here, since ours took its place."""
        arbiter, number = self.arbiter, len(self.arbiter.WORKERS)
        if arbiter._last_logged_active_worker_count != number:
            arbiter._last_logged_active_worker_count = number
            extra = {"metric": "gunicorn.workers", "value": number, "mtype": "gauge"}
            arbiter.log.debug(f"{number} workers", extra=extra)
        if getattr(arbiter.cfg, "enable_backlog_metric", False):  # gunicorn 24 and newer
            waiting = sum(each.get_backlog() or 0 for each in arbiter.LISTENERS)
            if waiting >= 0:
                extra = {"metric": "gunicorn.backlog", "value": waiting, "mtype": "histogram"}
                arbiter.log.debug(f"socket backlog: {waiting}", extra=extra)

    # -- workers -------------------------------------------------------------------------------------------------
    def workers(self, cohort: int | None = None) -> Iterator[tuple[int, Any]]:
        """The workers that were not told to go, of the serving cohort or of `cohort`."""
        wanted = self.cohort if cohort is None else cohort
        for pid, worker in list(self.arbiter.WORKERS.items()):
            if pid not in self.leaving and getattr(worker, "cohort", 0) == wanted:
                yield pid, worker

    def spawn(self, cohort: int) -> int:
        """Fork a worker of `cohort`; the child never comes back from here."""
        Attached.close_in_worker = self._close_in_worker
        pid: int = self.arbiter.spawn_worker()
        self.arbiter.WORKERS[pid].cohort = cohort
        self.arbiter.WORKERS[pid].born = time.monotonic()
        return pid

    def _close_in_worker(self) -> None:
        """Run in a worker just after the fork: the channels are the master's alone, and so is the word of its parent."""
        os.environ.pop("GUNICORN_PID", None)  # gunicorn's master needs it until it is promoted, no application does
        fds: list[int] = []
        if self.successor is not None:
            fds += self.successor.descriptors()
        fds += [each.channel.fileno() for each in self.predecessors if each.channel is not None]
        for fd in fds:
            if fd >= 0:
                try:
                    os.close(fd)
                except OSError:
                    pass

    def let_go(self, pid: int, order: Order, reason: str) -> None:
        """Tell a worker to drain, once, and note by when it must have left."""
        worker = self.arbiter.WORKERS.get(pid)
        if worker is None or pid in self.leaving:
            if worker is not None and order > worker.page.order:
                worker.page.order = order
            return
        worker.page.order = order
        booting = not worker.page.ready
        bound = BOOTING_LEAVES_WITHIN if booting else self.settings.leave_budget + MARGIN
        self.leaving[pid] = Departure(Deadline.after(bound), reason, booting)
        processes.signal_process(pid, signal.SIGTERM)

    def _force_the_late(self) -> None:
        for pid, departure in list(self.leaving.items()):
            worker = self.arbiter.WORKERS.get(pid)
            if worker is None:
                del self.leaving[pid]
            elif departure.deadline.passed:
                if departure.booting and worker.page.ready and not departure.forced and not self.stopping_forced:
                    # It became ready after it was told to go, and may hold requests: it gets the whole bound, once.
                    departure.booting = False
                    departure.deadline = Deadline.after(self.settings.leave_budget + MARGIN)
                else:
                    self._kill(pid, departure)

    @property
    def stopping_forced(self) -> bool:
        """Whether the operator took the hammer."""
        return self.stopping is not None and self.stopping.forced

    def _kill(self, pid: int, departure: Departure) -> None:
        if not departure.forced:
            departure.forced = True
            events.publish(
                events.ForcedExit(**self.identity(), worker=pid, reason=f"it had not left in time ({departure.reason})")
            )
        departure.deadline = Deadline.after(1.0)
        processes.signal_process(pid, signal.SIGKILL)

    def force_workers(self, reason: str) -> None:
        """Kill every worker that is left."""
        for pid in list(self.arbiter.WORKERS):
            departure = self.leaving.setdefault(pid, Departure(Deadline.after(0.0), reason))
            departure.reason = reason
            self._kill(pid, departure)

    def see_out(self, pid: int) -> None:
        """A worker of a successor that was killed serves still: it finishes what it has, within the leave budget."""
        self.orphans[pid] = (processes.started(pid), Deadline.after(self.settings.leave_budget + MARGIN))
        processes.signal_process(pid, signal.SIGTERM)
        processes.signal_process(pid, signal.SIGCONT)

    def _see_out_orphans(self, now: bool = False) -> None:
        for pid, (start, deadline) in list(self.orphans.items()):
            if not processes.alive(pid, start):
                del self.orphans[pid]
            elif now or deadline.passed:
                del self.orphans[pid]
                processes.kill_group(pid)
                processes.signal_process(pid, signal.SIGKILL)

    def reap(self) -> None:
        """Take the exit codes of our own children, and of nobody else's."""
        for pid, worker in list(self.arbiter.WORKERS.items()):
            status = self._wait(pid)
            if status is not None:
                self._worker_ended(pid, worker, status)
        if self.successor is not None and self.successor.pid and self.arbiter.reexec_pid == self.successor.pid:
            status = self._wait(self.successor.pid)
            if status is not None:
                self.arbiter.reexec_pid = 0
                self.successor.ended(status)
        if getattr(self.arbiter, "dirty_arbiter_pid", 0):
            self.arbiter.reap_dirty_arbiter()  # gunicorn 25 and newer: its pool for long work
        if os.getpid() == 1:
            self._reap_orphans()

    def _wait(self, pid: int) -> int | None:
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return 0  # somebody else has taken its exit code
        return status if found else None

    def _reap_orphans(self) -> None:
        """PID 1 inherits every orphan of its container (pid_namespaces(7))."""
        for _ in range(100):
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None or found.si_pid in self.arbiter.WORKERS or found.si_pid == self.arbiter.reexec_pid:
                return
            if found.si_pid == getattr(self.arbiter, "dirty_arbiter_pid", 0):
                return
            self._wait(found.si_pid)

    def _worker_ended(self, pid: int, worker: Any, status: int) -> None:
        arbiter, page = self.arbiter, worker.page
        arbiter.WORKERS.pop(pid, None)
        departure = self.leaving.pop(pid, None)
        self.recycling.pop(pid, None)
        how = processes.describe_status(status)
        if status or (departure is not None and departure.forced):
            processes.kill_group(pid)  # what it started must not outlive it unseen
            for child in left_behind(page):
                processes.kill_tree(child)
        reason = self._why(worker, departure, status, how)
        found = losses_of(page, pid, reason)
        self.ended.add(found)
        for pending in self.pending:
            if pid in pending.workers:
                pending.workers.discard(pid)
                pending.losses.add(found)
        events.publish(
            events.WorkerEnded(
                **self.identity(), worker=pid, reason=reason, answered=found.answered, jobs=found.jobs, lost=found.lost
            )
        )
        if reason != "drained":
            arbiter.log.warning("gracehooks: worker %s ended: %s (in phase %s)", pid, reason, page.phase.name.lower())
        worker.tmp.close()
        try:
            arbiter.cfg.child_exit(arbiter, worker)
        except Exception:
            arbiter.log.exception("gracehooks: the child_exit hook failed; the server serves on")
        was_ready = page.ready
        failure = page.failure or f"worker {pid} ended with {how} while booting"
        cohort = getattr(worker, "cohort", 0)
        page.close()
        if departure is not None or self.stopping or self.retiring:
            return
        if self.reloading is not None and cohort == self.reloading.cohort:
            self.reloading.worker_ended(
                pid, failure if not was_ready else f"worker {pid} ended in the probation: {reason}"
            )
            return
        if was_ready:
            if self.is_successor:
                self._fail(f"worker {pid} ended in the probation: {reason}")
            return
        self._boot_failed(pid, failure, status)

    def _why(self, worker: Any, departure: Departure | None, status: int, how: str) -> str:
        if departure is not None and departure.forced:
            return f"killed: {departure.reason}"
        if worker.aborted:
            return "WORKER TIMEOUT"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGKILL:
                before, self._oom_kills = self._oom_kills, processes.oom_kills()
                if 0 <= before < self._oom_kills:
                    return "killed by the kernel: out of memory"
                return "killed by SIGKILL (by hand, or out of memory)" if before < 0 else "killed by SIGKILL"
            if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT):
                return f"crashed with {how}"
            return f"killed by {how}"
        if os.WEXITSTATUS(status) == 0:
            return "drained"
        return "drain timeout" if departure is not None and worker.page.report else f"ended with {how}"

    def _boot_failed(self, pid: int, failure: str, status: int) -> None:
        events.publish(events.WorkerBootFailed(**self.identity(), worker=pid, reason=failure))
        self._failed_boots += 1
        self._spawn_after = time.monotonic() + min(BACKOFF * 2 ** (self._failed_boots - 1), LONGEST_BACKOFF)
        if self.is_successor:
            self._fail(failure)
            return
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        # Where a worker serves, the server goes on with it; the others are tried again.
        serves = self._ever_ready or any(each.page.ready for each in self.arbiter.WORKERS.values())
        if not serves and code in (self.arbiter.WORKER_BOOT_ERROR, self.arbiter.APP_LOAD_ERROR):
            raise HaltServer(failure, code)

    def _fail(self, reason: str) -> None:
        """This successor cannot serve: tell the old master, which ends it."""
        if not self._failure:
            self._failure = reason
            self.tell(say="failed", reason=reason)

    def _keep_workers(self) -> None:
        if self.stopping or self.retiring or self._failure:
            return
        wanted = self.arbiter.num_workers
        mine = sorted(self.workers(), key=lambda each: each[1].age)
        extra = len([1 for new in self.recycling.values() if new in self.arbiter.WORKERS])
        if len(mine) < wanted + extra and time.monotonic() >= self._spawn_after:
            if self.reloading is None:
                for _ in range(wanted + extra - len(mine)):
                    self.spawn(self.cohort)
            else:
                self.reloading.spawn_old(wanted - len(mine))
        replacements = set(self.recycling.values())
        surplus = [pid for pid, _ in mine if pid not in replacements and pid not in self.recycling]
        for pid in surplus[: max(0, len(mine) - extra - wanted)]:
            self.let_go(pid, Order.RETIRE, "one worker too many")

    def _recycle(self) -> None:
        """Bring the replacement first, then let the worker go that has reached `max_requests`."""
        if self.stopping or self.retiring or self.driver.under_way or self.is_successor:
            return
        for old, new in list(self.recycling.items()):
            replacement = self.arbiter.WORKERS.get(new)
            if replacement is None:
                del self.recycling[old]  # it could not boot: the old one serves on, and the next try waits its time
            elif replacement.page.ready:
                del self.recycling[old]
                events.publish(events.WorkerRecycled(**self.identity(), worker=old, replacement=new))
                self.let_go(old, Order.RETIRE, "recycled after max_requests")
        at_once = max(1, self.arbiter.num_workers // 4)
        for pid, worker in list(self.workers()):
            if len(self.recycling) >= at_once or time.monotonic() < self._spawn_after:
                return
            if worker.page.wants_replacement and pid not in self.recycling:
                self.recycling[pid] = 0
                self.recycling[pid] = self.spawn(self.cohort)

    # -- readiness -----------------------------------------------------------------------------------------------
    def _progress(self) -> dict[str, Any]:
        mine = [(pid, worker) for pid, worker in self.workers() if worker.page.ready]
        return {
            "ready": min(len(mine), self.arbiter.num_workers),
            "workers": self.arbiter.num_workers,
            "pids": [pid for pid, _ in self.workers()],
            "serving": [pid for pid, _ in mine],
        }

    def _look_at_readiness(self) -> None:
        for pid, worker in list(self.arbiter.WORKERS.items()):
            if worker.page.ready and pid not in self._told_ready:
                self._told_ready.add(pid)
                self._failed_boots = 0
                cohort = getattr(worker, "cohort", 0)
                ready = sum(each.page.ready for _, each in self.workers(cohort))
                events.publish(
                    events.WorkerReady(
                        **self.identity(),
                        worker=pid,
                        ready=ready,
                        workers=self.arbiter.num_workers,
                        seconds=round(time.monotonic() - getattr(worker, "born", self._born), 3),
                    )
                )
        self._told_ready &= set(self.arbiter.WORKERS)
        if self.stopping or self.retiring:
            return
        progress = self._progress()
        all_ready = 0 < progress["workers"] == progress["ready"]
        if self.is_successor:
            said = (progress["ready"], progress["workers"], tuple(progress["pids"]), tuple(progress["serving"]))
            if said != self._said:
                self._said = said
                self.tell(say="progress", **progress)
        if all_ready and not self._ever_ready:
            self._ever_ready = True
            if self.is_successor:
                self.tell(say="ready", **progress)
            else:
                self._now_serving()

    def _now_serving(self) -> None:
        seconds = round(time.monotonic() - self._born, 3)
        events.publish(events.ServingStarted(**self.identity(), workers=self.arbiter.num_workers, seconds=seconds))
        self.book.register(os.getpid())
        self.moor()

    def moor(self) -> None:
        """Give the listeners to the anchor, where there is one, and say that this master serves."""
        mooring.offer(self.arbiter.LISTENERS)
        mooring.serving(self.settings.stop_budget)

    # -- the older generation ------------------------------------------------------------------------------------
    def tell(self, **message: Any) -> None:
        """Say something to the old master, where there is one, and wake its loop."""
        if self.handover is not None and self.handover.old.channel is not None:
            self.handover.old.channel.send(**message)
            if os.getppid() == self.handover.old.pid:
                processes.signal_process(self.handover.old.pid, signal.SIGCHLD)

    def predecessors_alive(self) -> list[Predecessor]:
        """The older generations that still drain."""
        return [each for each in self.predecessors if each.alive]

    def _hear_predecessors(self) -> None:
        if self.handover is not None:
            old = self.handover.old
            for message in old.channel.receive() if old.channel else ():
                if message.get("say") == "commit":
                    self._promote("commit", message.get("phases", {}))
                    return
            if (old.channel is None or old.channel.closed) and not old.alive:
                self._promote("the old master died", {})
            return
        for each in list(self.predecessors):
            messages = each.channel.receive() if each.channel is not None else []
            for message in messages:
                if message.get("say") == "drained":
                    self._old_generation_left(each, message)
                elif message.get("say") == "announced":
                    self.speaker.named()
            if not each.alive or (each.channel is not None and each.channel.closed):
                if each.channel is not None:
                    if self.takeover is not None and self.takeover.get("old") == each.pid:
                        self.speaker.left_alone()
                        self._old_generation_left(each, {})
                    each.channel.close()
                    each.channel = None
                if not each.alive:
                    self.predecessors.remove(each)

    def _promote(self, reason: str, phases: dict[str, float]) -> None:
        """This master serves now: pidfile, control socket, name."""
        assert self.handover is not None
        handover, arbiter = self.handover, self.arbiter
        try:
            self._take_pidfile()
        except OSError as error:
            if reason == "commit":
                self._fail(f"cannot write the pidfile {arbiter.cfg.pidfile} ({error})")
                return
            arbiter.log.error("gracehooks: cannot write the pidfile (%s); the server serves on", error)
        self.takeover = {
            "old": handover.old.pid,
            "id": handover.id,
            "kind": handover.kind,
            "phases": phases,
            "since": time.monotonic(),
        }
        self.driver.last = {
            "id": handover.id,
            "kind": handover.kind,
            "state": "committing" if reason == "commit" and self.speaker.on else "completed",  # see _speak
            "reason": "" if reason == "commit" else reason,
            "started_at": time.time(),
            "phases": phases,
            "workers_ready": self._progress()["ready"],
            "workers": arbiter.num_workers,
        }
        if reason == "commit":
            self._unnamed = handover.id if self.speaker.on else ""
            self.tell(say="committed")
        self.handover = None
        self._failure = ""
        arbiter.master_pid = 0
        arbiter.master_name = "Master"
        arbiter.proc_name = arbiter.cfg.proc_name
        os.environ.pop("GUNICORN_PID", None)
        util._setproctitle(f"master [{arbiter.proc_name}]")
        arbiter._start_control_server()
        events.publish(events.MasterPromoted(**self.identity(), reason=reason))
        self._now_serving()
        self.write_status(now=True)

    def _take_pidfile(self) -> None:
        """Write our pid over the old master's in one step: the file is never absent and never half written."""
        arbiter = self.arbiter
        mine = arbiter.pidfile
        path = arbiter.cfg.pidfile
        if path is None:
            return
        directory = os.path.dirname(path) or "."
        fd, name = tempfile.mkstemp(dir=directory, prefix=".pid-")
        try:
            with os.fdopen(fd, "w") as file:
                file.write(f"{os.getpid()}\n")
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        if mine is not None and mine.fname != path:
            mine.unlink()
        arbiter.pidfile = Pidfile(path)
        arbiter.pidfile.pid = os.getpid()

    def _old_generation_left(self, old: Predecessor, message: dict[str, Any]) -> None:
        takeover = self.takeover
        if takeover is None or takeover["old"] != old.pid:
            return
        self.takeover = None
        lost = message.get("lost") or {"requests": [], "jobs": []}
        seconds = round(time.monotonic() - takeover["since"], 3)
        events.publish(
            events.GenerationRetired(
                **self.identity(), id=takeover["id"], retired=old.generation, seconds=seconds, lost=lost
            )
        )
        self.record(
            {
                "id": takeover["id"],
                "kind": takeover["kind"],
                "outcome": "completed",
                "reason": "" if message else "the old master ended without a report",
                "phases": {**takeover["phases"], "retiring": seconds},
                "lost": lost,
                "jobs": message.get("jobs", {}),
                "requests_answered": message.get("answered", 0),
            }
        )

    # -- upgrade and reload --------------------------------------------------------------------------------------
    def upgrade(self, kind: str = "upgrade") -> None:
        """Begin to replace this master, or refuse with a reason."""
        host = ReexecHost(self.arbiter, kind)
        if self.driver.begin(host, self.settings, self._refusal()):
            self.successor = host
        self.write_status(now=True)

    def _refusal(self) -> str:
        if self.is_successor:
            return "this master is itself still being verified"
        if self.stopping:
            return "the server is stopping"
        if self.speaker.unnamed:
            return "systemd has not been told of this master yet; try again in a second"
        draining = len(self.predecessors_alive())
        if draining >= self.settings.max_generations:
            return (
                f"{draining} older generations are still draining (max_generations = {self.settings.max_generations}); "
                "wait until one has left"
            )
        return ""

    def reload(self) -> None:
        """Begin a verified reload. With a preloaded application it is an upgrade: the old code lives in this master."""
        if self.arbiter.cfg.preload_app:
            self.upgrade("reload")
            return
        host = CohortHost(self)
        if self.driver.begin(host, self.settings, self._refusal()):
            self.reloading = host
        self.write_status(now=True)

    def retire(self) -> None:
        """The successor serves: every worker drains, and what waits at the listeners is left to it."""
        self.retiring = True
        self.ended = Losses()
        for each in self.predecessors:
            if each.channel is not None:
                each.channel.send(say="superseded")
        if self.takeover is not None:  # our own predecessor still drains: its report has nobody else to go to
            for each in list(self.predecessors):
                if each.pid == self.takeover["old"]:
                    self._old_generation_left(each, {})
                    break
        workers = list(self.arbiter.WORKERS)
        events.publish(events.RetiringStarted(**self.identity(), workers=len(workers)))
        self.book.unregister(os.getpid())
        for pid in workers:
            self.let_go(pid, Order.RETIRE, "retired by an upgrade")

    def losses(self) -> dict[str, Any]:
        """What this generation says when it leaves."""
        return {"lost": self.ended.lost, "jobs": self.ended.jobs, "answered": self.ended.answered}

    def leave(self) -> None:
        """Nothing is left to do: the loop ends at the end of this turn."""
        self._finished = True

    def serve_again(self) -> None:
        """The successor is gone: this master serves, with pidfile and control socket."""
        self.successor = None
        self.retiring = False
        arbiter = self.arbiter
        if arbiter.cfg.pidfile is not None:
            try:
                if not self._pidfile_is_ours():
                    self._take_pidfile()
            except OSError as error:
                arbiter.log.error("gracehooks: cannot write the pidfile (%s); the server serves on", error)
            self._unlink_second_pidfile()
        self.moor()
        if getattr(arbiter, "_control_server", None) is None:
            arbiter._start_control_server()
        self.book.register(os.getpid())

    def _pidfile_is_ours(self) -> bool:
        try:
            return Path(self.arbiter.cfg.pidfile).read_text().strip() == str(os.getpid())
        except OSError:
            return False

    def _unlink_second_pidfile(self) -> None:
        path = Path(f"{self.arbiter.cfg.pidfile}.2")
        try:
            if not processes.alive(int(path.read_text())):
                path.unlink()
        except (OSError, ValueError):
            pass

    def stop_control_server(self) -> None:
        """Free the control socket's path."""
        self.arbiter._stop_control_server()

    # -- the stop ------------------------------------------------------------------------------------------------
    @property
    def final(self) -> bool:
        """Whether nobody serves after us: no other generation, and no one who keeps the sockets."""
        return not self.is_successor and not self.retiring

    def begin_stop(self, reason: str) -> None:
        """Begin a bounded stop; a second TERM, or one to a retiring master, changes nothing."""
        if self.stopping is not None or self.retiring:
            self.arbiter.log.info(
                "gracehooks: %s changes nothing: this master is leaving already, within its bound (INT forces it)",
                reason,
            )
            return
        self.driver.stop_asked()
        lame_duck = self.settings.lame_duck if self.final else 0.0
        budget = self.settings.leave_budget + lame_duck
        self.stopping = Stop(
            uuid.uuid4().hex[:12], reason, self.final, time.monotonic(), Deadline.after(budget + MARGIN)
        )
        if self.is_successor:
            self.tell(say="failed", reason=f"stopped by {reason} before it was committed")
        events.publish(events.StopStarted(**self.identity(), reason=reason, budget=budget))
        if lame_duck:
            self.stopping.lame_duck = Deadline.after(lame_duck)
            for worker in self.arbiter.WORKERS.values():
                worker.page.order = max(worker.page.order, Order.LAME_DUCK)
            events.publish(events.LameDuckStarted(**self.identity(), seconds=lame_duck))
        self._go_on_stopping()

    def hammer(self, reason: str) -> None:
        """Force now, with the report: each worker gets a moment for its hooks, then it is killed."""
        if self.stopping is None:
            budget = HAMMER_WITHIN
            self.stopping = Stop(uuid.uuid4().hex[:12], reason, self.final, time.monotonic(), Deadline.after(budget))
            events.publish(events.StopStarted(**self.identity(), reason=reason, budget=budget))
            self.driver.stop_asked()
        stop = self.stopping
        if not stop.draining:
            self._end_accepting(stop)
        stop.forced, stop.draining, stop.lame_duck = True, True, None
        stop.deadline = stop.deadline.earlier(Deadline.after(HAMMER_WITHIN))
        if self.successor is not None and self.driver.under_way:  # one that was committed serves, and stays
            self.successor.roll_back(True)
        if stop.final:
            for each in self.predecessors_alive():
                processes.signal_process(each.pid, signal.SIGINT)
        for pid in list(self.arbiter.WORKERS):
            departure = self.leaving.setdefault(pid, Departure(stop.deadline, reason))
            departure.deadline, departure.reason = stop.deadline.earlier(departure.deadline), f"forced by {reason}"
            processes.signal_process(pid, signal.SIGQUIT)

    def _go_on_stopping(self) -> None:
        stop = self.stopping
        if stop is None:
            return
        if stop.lame_duck is not None:
            if not stop.lame_duck.passed:
                return
            stop.lame_duck = None
        if not stop.draining:
            stop.draining = True
            order = Order.RETIRE
            if self._end_accepting(stop):
                order = Order.STOP
                events.publish(events.AcceptingEnded(**self.identity()))
            for pid in list(self.arbiter.WORKERS):
                self.let_go(pid, order, f"stopped by {stop.reason}")
        if stop.deadline.passed and self.arbiter.WORKERS:
            self.force_workers("the stop budget" if not stop.forced else f"forced by {stop.reason}")
        older = self.predecessors_alive() if stop.final else []
        others = self.driver.under_way or older or self.orphans
        if self.arbiter.WORKERS or (others and not stop.deadline.passed):
            return
        if self.retiring:
            self.driver.workers_gone()  # the successor serves: it is told what was lost, and records it
            return
        self._see_out_orphans(now=True)
        for each in older:
            processes.kill_tree(each.pid)
        if self.driver.under_way and self.successor is not None:
            self.successor.roll_back(True)
        self._stopped(stop)

    def _end_accepting(self, stop: Stop) -> bool:
        """Shut the door of the listeners that nobody serves after us; whether there are any.

        systemd keeps its sockets, and what waits there, for the next start; what is ours is served to the end.
        """
        ours = [each for each in self.arbiter.LISTENERS if stop.final and self._is_ours(each)]
        if ours:
            listeners.end_accepting(ours, unlink=not self.arbiter.cfg.reuse_port)
        return bool(ours)

    def _stopped(self, stop: Stop) -> None:
        self.stopping = stop
        self._hear_predecessors()
        lost = self.ended.lost
        anything = bool(lost["requests"] or lost["jobs"])
        outcome = "forced" if stop.forced or anything else "completed"
        seconds = round(time.monotonic() - stop.since, 3)
        events.publish(
            events.Stopped(
                **self.identity(),
                id=stop.id,
                outcome=outcome,
                seconds=seconds,
                answered=self.ended.answered,
                jobs=self.ended.jobs,
                lost=lost,
            )
        )
        if stop.final:
            self.record(
                {
                    "id": stop.id,
                    "kind": "stop",
                    "outcome": outcome,
                    "reason": stop.reason,
                    "phases": {"stopping": seconds},
                    "lost": lost,
                    "jobs": self.ended.jobs,
                    "requests_answered": self.ended.answered,
                }
            )
        self._finished = True

    def _is_ours(self, listener: Any) -> bool:
        return not self.arbiter.systemd or listeners.name_of(listener) in (self.own or ())

    def sweep(self, graceful: bool) -> None:
        """The loop has ended, in order or by an error: nothing of ours may stay behind.

        Bounded: workers that are left get a TERM and one more leave budget where the loop ended by an error (a boot that
        failed), and are killed then.
        """
        if self._sweeping:
            return
        self._sweeping = True
        final = self.final
        if self.arbiter.WORKERS:
            for pid in list(self.arbiter.WORKERS):
                self.let_go(pid, Order.STOP if final else Order.RETIRE, "the master ends")
            until = Deadline.after(self.settings.leave_budget if graceful else HAMMER_WITHIN)
            while self.arbiter.WORKERS and not until.passed:
                self.reap()
                self._force_the_late()
                time.sleep(0.02)
            self.force_workers("the master ends")
            until = Deadline.after(1.0)
            while self.arbiter.WORKERS and not until.passed:
                self.reap()
                time.sleep(0.02)
        self._end_dirty_arbiter()
        if final and not self._finished:
            listeners.unlink_paths(each for each in self.arbiter.LISTENERS if self._is_ours(each))
        for each in self.arbiter.LISTENERS:
            each.close()
        self.arbiter.LISTENERS = []
        if final:
            self.write_status(now=True, state="stopped")
            self.book.unregister(os.getpid())

    def _end_dirty_arbiter(self) -> None:
        """gunicorn's pool for long work goes after the workers, which may have been waiting for it; bounded."""
        arbiter = self.arbiter
        if not getattr(arbiter, "dirty_arbiter_pid", 0):
            return
        arbiter.kill_dirty_arbiter(signal.SIGTERM if not self.stopping_forced else signal.SIGQUIT)
        until = Deadline.after(HAMMER_WITHIN if self.stopping_forced else self.settings.cleanup_timeout)
        while arbiter.dirty_arbiter_pid and not until.passed:
            arbiter.reap_dirty_arbiter()
            time.sleep(0.02)
        if arbiter.dirty_arbiter_pid:
            arbiter.log.error("gracehooks: the dirty arbiter had not left in time and was killed")
            processes.kill_tree(arbiter.dirty_arbiter_pid)
            arbiter.reap_dirty_arbiter()

    # -- files ---------------------------------------------------------------------------------------------------
    def record(self, record: dict[str, Any]) -> None:
        """Append to the history."""
        lost = record.get("lost") or {"requests": [], "jobs": []}
        self.book.append({**record, "lost": lost, "at": round(time.time(), 3), "generation": self.generation})

    def add_pending(self, record: dict[str, Any], workers: set[int]) -> None:
        """Append `record` once the last of `workers` has ended, with what they lost."""
        self.pending.append(Pending(record, workers))

    def _settle_pending(self) -> None:
        for each in list(self.pending):
            if not each.workers or self._finished:
                self.pending.remove(each)
                seconds = round(time.monotonic() - each.since, 3)
                losses = each.losses
                self.record(
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
                        **self.identity(),
                        id=each.record["id"],
                        retired=self.generation,
                        seconds=seconds,
                        lost=losses.lost,
                    )
                )

    def state(self) -> str:
        """The state in the status file."""
        if self.stopping:
            return "lame_duck" if self.stopping.lame_duck is not None else "stopping"
        if self.retiring:
            return "retiring"
        return "serving" if self._ever_ready else "booting"

    def write_status(self, now: bool = False, state: str | None = None) -> None:
        """Write the status file where something has changed; requests in flight at most once a second."""
        if self.is_successor or self.retiring:
            return
        workers = []
        for pid, worker in self.arbiter.WORKERS.items():
            page = worker.page
            workers.append((pid, page.phase, tuple(page.requests()), tuple(page.jobs())))
        draining = [(each.generation, each.pid) for each in self.predecessors_alive()]
        coarse = (
            state or self.state(),
            tuple((pid, phase) for pid, phase, _, _ in workers),
            tuple(draining),
            repr(self.driver.last),
        )
        key = (coarse, tuple(workers))
        moment = time.monotonic()
        changed = self._status_key is None or coarse != self._status_key[0]
        if not now and (key == self._status_key or (not changed and moment - self._status_at < 1.0)):
            return
        self._status_key, self._status_at = key, moment
        self.book.write_status(
            {
                "generation": self.generation,
                "master_pid": os.getpid(),
                "state": state or self.state(),
                "stop_budget": self.settings.stop_budget,
                "draining": [
                    {
                        "generation": generation,
                        "master_pid": pid,
                        "workers": len(processes.children_of({pid})),
                    }
                    for generation, pid in draining
                ],
                "workers": [
                    {
                        "pid": pid,
                        "phase": phase.name.lower(),
                        "requests": [
                            {"method": each.method, "path": each.path, "age": round(each.age, 3)} for each in requests
                        ],
                        "jobs": [
                            {"id": each.id, "name": each.name, "kind": each.kind, "age": round(each.age, 3)}
                            for each in jobs
                        ],
                    }
                    for pid, phase, requests, jobs in workers
                ],
                "upgrade": self.driver.last or None,
                "at": round(time.time(), 3),
            }
        )
