"""What the master of one generation does, a turn at a time: verify itself, upgrade, reload, retire, stop.

What must hold: no turn blocks; every wait is a state that `tick` looks at, with its bound beside it; a generation that was
ready once never ends because a later worker cannot boot. The parts: `pool` (the workers), `takeover` (the generations
before us), `driver` with `successor` or `reloading` (the one after us), `stop`, `status`, `speaker` (systemd).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from gunicorn.errors import HaltServer

from gracehooks import events, processes, settings
from gracehooks.anchor import mooring
from gracehooks.gunicorn import listeners, pidfile
from gracehooks.gunicorn.keepsake import Keepsake, take_keepsake
from gracehooks.gunicorn.pool import Pool
from gracehooks.gunicorn.predecessor import take_handover
from gracehooks.gunicorn.reload import CohortHost
from gracehooks.gunicorn.status import Status
from gracehooks.gunicorn.stopping import Stopping
from gracehooks.gunicorn.successor import ReexecHost
from gracehooks.gunicorn.takeover import Takeover
from gracehooks.gunicorn.workers.attached import attached
from gracehooks.logs import Logbook, Wrapped, wants_json
from gracehooks.scoreboard import Order
from gracehooks.systemd.driver import Speaker
from gracehooks.upgrade.driver import Driver
from gracehooks.upgrade.history import Book, default_state_dir

__all__ = ["Grace"]

#: How long the loop may sleep, in seconds: while something is under way, and otherwise.
BUSY, IDLE = 0.05, 1.0


class Grace:
    """The state of one master; `arbiter` is gunicorn's. Raises ConfigError for a wrong setting."""

    def __init__(self, arbiter: Any) -> None:
        self.arbiter = arbiter
        self.settings = settings.resolve()
        settings.adopt(self.settings)
        handover, kept = take_handover(), take_keepsake()
        self._before = handover or kept
        self.generation = self._before.generation if self._before else 1
        self.speaker = Speaker(
            os.environ,
            successor=handover is not None,
            anchored="GRACEHOOKS_ANCHOR" in os.environ,
            boot=self.settings.ready_timeout,
        )
        directory = self.settings.state_dir or (self._before.state_dir if self._before else None)
        if directory is None:
            directory = str(default_state_dir(arbiter.cfg.pidfile, os.getpid()))
        self.book = Book(Path(directory).absolute(), lambda text: arbiter.log.error("gracehooks: %s", text))
        self.driver = Driver(self.identity, self.record)
        self.successor: ReexecHost | None = None
        self.reloading: CohortHost | None = None
        self.pool = Pool(self)
        self.takeover = Takeover(self, handover)
        self.stop = Stopping(self)
        self.status = Status(self)
        #: The names of the listeners that we opened beside those of systemd; None before we looked.
        self.own: list[str] | None = None
        self.served = False  #: whether all workers were ready once
        self.retiring = False
        self.finished = False  #: nothing is left to do: the loop ends
        self._born = time.monotonic()
        self._said: dict[str, Any] = {}
        self._kept: Keepsake | None = None

    @property
    def is_successor(self) -> bool:
        """Whether this master serves beside an older one that has not handed over yet."""
        return self.takeover.ahead

    @property
    def final(self) -> bool:
        """Whether nobody serves after us: no other generation, and no one who keeps the sockets."""
        return not self.is_successor and not self.retiring

    def identity(self) -> dict[str, int]:
        """What every event carries."""
        return {"pid": os.getpid(), "generation": self.generation}

    def record(self, record: dict[str, Any]) -> None:
        """Append to the history."""
        lost = record.get("lost") or {"requests": [], "jobs": []}
        self.book.append({**record, "lost": lost, "at": round(time.time(), 3), "generation": self.generation})

    # -- the beginning -------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """The arbiter is graceful now: say what was chosen, and put the worker class in place."""
        arbiter, log = self.arbiter, self.arbiter.log
        if wants_json() and hasattr(log, "error_log"):
            log.error_log.addFilter(Wrapped(self.generation))
        events.subscribe(Logbook(log))
        if self.speaker.on:
            events.subscribe(self.speaker.hear)
        if self.settings.on_event is not None:
            events.subscribe(self.settings.on_event)
        arbiter.worker_class = attached(arbiter.worker_class)
        self.apply_budget()
        handover = self.takeover.handover
        if self._before and self._before.workers != self._before.configured:
            arbiter.num_workers = self._before.workers  # TTIN and TTOU outlive the upgrade, and a killed master
        if handover:
            arbiter.systemd = arbiter.systemd or handover.systemd
            self.own = handover.own
            self.takeover.tell(say="hello", **self.pool.progress())
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
            or self.stop.under_way
            or self.retiring
            or self.pool.busy
            or self.takeover.busy
            or not self.served
        )
        return BUSY if busy else min(IDLE, self.speaker.pace)

    def tick(self) -> None:
        """One turn: look at everything that may have happened, and act."""
        if not self.finished:
            self._turn()
        self._speak()
        if self.finished and not self.speaker.holds:  # systemd has heard what it was told last; bounded by the speaker
            raise StopIteration

    def _turn(self) -> None:
        if self.own is None:
            self.own = listeners.add_own(self.arbiter) if self.arbiter.systemd else []
            mooring.offer(self.arbiter.LISTENERS)  # a master that is killed while it boots is started with them too
        self.reap()
        if mooring.adrift() and self.final:
            self.stop.begin("the anchor is gone")
        self.takeover.hear()
        self._look_at_readiness()
        self.driver.tick()
        self.pool.kill_late(patient=not self.stop.forced)
        self.pool.look_at_orphans()
        staying = not self.stop.under_way and not self.retiring
        if staying and not self.driver.under_way and not self.is_successor:
            self.pool.recycle()
        if staying and not self.takeover.failed:
            self.pool.keep()
        self.stop.go_on()
        if self.retiring and not self.arbiter.WORKERS and not self.speaker.holds:
            self.driver.workers_gone()
        self.pool.settle(now=self.finished)
        if self._kept is not None:
            self._keep()
        self.status.write()
        self.status.measure()

    def reap(self) -> None:
        """Take the exit codes of our own children, and of nobody else's."""
        self.pool.reap()
        if self.successor is not None and self.successor.pid and self.arbiter.reexec_pid == self.successor.pid:
            status = processes.exit_status(self.successor.pid)
            if status is not None:
                self.arbiter.reexec_pid = 0
                self.successor.ended(status)

    def _speak(self) -> None:
        """Let systemd know; the next master hears it once systemd follows it."""
        held = self.speaker.holds
        self.speaker.tick(self.status.situation)
        self.takeover.look_at_name()
        if held and not self.speaker.holds and self.retiring and self.successor is not None:
            self.successor.announced()

    # -- the workers ---------------------------------------------------------------------------------------------
    def close_in_worker(self) -> None:
        """Run in a worker just after the fork: the channels are the master's alone, and so is the word of its parent."""
        os.environ.pop("GUNICORN_PID", None)  # gunicorn's master needs it until it is promoted, no application does
        self.pool.close_in_worker()
        fds = self.takeover.descriptors()
        if self.successor is not None:
            fds += self.successor.descriptors()
        for fd in fds:
            if fd >= 0:
                try:
                    os.close(fd)
                except OSError:
                    pass

    def worker_lost(self, pid: int, worker: Any, reason: str, was_ready: bool, status: int) -> None:
        """A worker has ended that nobody told to go: what that means for this generation, or for the next."""
        if self.stop.under_way or self.retiring:
            return
        verdict = f"worker {pid} ended in the probation: {reason}" if was_ready else reason
        if self.reloading is not None and worker.cohort == self.reloading.cohort:
            self.reloading.worker_ended(pid, verdict)
            return
        if not was_ready:
            self.pool.boot_failed(pid, reason)
        if self.is_successor:
            self.takeover.fail(verdict)
            return
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        # Where a worker serves, the server goes on with it; the others are tried again.
        serves = self.served or any(each.page.ready for each in self.arbiter.WORKERS.values())
        if not was_ready and not serves and code in (self.arbiter.WORKER_BOOT_ERROR, self.arbiter.APP_LOAD_ERROR):
            raise HaltServer(reason, code)

    def _look_at_readiness(self) -> None:
        self.pool.welcome()
        if self.stop.under_way or self.retiring:
            return
        progress = self.pool.progress()
        if self.is_successor and progress != self._said:
            self._said = progress
            self.takeover.tell(say="progress", **progress)
        if not self.served and 0 < progress["workers"] == progress["ready"]:
            self.served = True
            if self.is_successor:
                self.takeover.tell(say="ready", **progress)
            else:
                self.now_serving()

    def now_serving(self) -> None:
        """This master serves, and nobody before it: let everyone know."""
        seconds = round(time.monotonic() - self._born, 3)
        events.publish(events.ServingStarted(**self.identity(), workers=self.arbiter.num_workers, seconds=seconds))
        self.take_charge()

    def take_charge(self) -> None:
        """Commands and the anchor find this master from now on."""
        self.book.register(os.getpid())
        self.moor()

    def moor(self) -> None:
        """Give the listeners to the anchor, where there is one, and say that this master serves."""
        mooring.offer(self.arbiter.LISTENERS)
        mooring.serving(self.settings.stop_budget)
        self._keep()

    def _keep(self) -> None:
        """Leave with the anchor what the next master must know if this one is killed."""
        arbiter = self.arbiter
        kept = Keepsake(self.generation + 1, arbiter.num_workers, arbiter.cfg.workers, str(self.book.directory))
        if kept != self._kept:
            self._kept = kept
            mooring.keep(kept.text())

    # -- upgrade and reload --------------------------------------------------------------------------------------
    def upgrade(self, kind: str = "upgrade") -> None:
        """Begin to replace this master, or refuse with a reason."""
        host = ReexecHost(self.arbiter, kind)
        if self.driver.begin(host, self.settings, self._refusal()):
            self.successor = host
        self.status.write(now=True)

    def reload(self) -> None:
        """Begin a verified reload. With a preloaded application it is an upgrade: the old code lives in this master."""
        if self.arbiter.cfg.preload_app:
            self.upgrade("reload")
            return
        host = CohortHost(self)
        if self.driver.begin(host, self.settings, self._refusal()):
            self.reloading = host
        self.status.write(now=True)

    def _refusal(self) -> str:
        if self.is_successor:
            return "this master is itself still being verified"
        if self.stop.under_way:
            return "the server is stopping"
        if self.speaker.unnamed:
            return "systemd has not been told of this master yet; try again in a second"
        draining, most = len(self.takeover.alive()), self.settings.max_generations
        if draining >= most:
            return (
                f"{draining} older generations are still draining (max_generations = {most}); wait until one has left"
            )
        return ""

    def retire(self) -> None:
        """The successor serves: every worker drains, and what waits at the listeners is left to it."""
        self.retiring = True
        self.pool.forget_ended()
        self.takeover.supersede()
        workers = list(self.arbiter.WORKERS)
        events.publish(events.RetiringStarted(**self.identity(), workers=len(workers)))
        self.book.unregister(os.getpid())
        for pid in workers:
            self.pool.let_go(pid, Order.RETIRE, "retired by an upgrade")

    def leave(self) -> None:
        """Nothing is left to do: the loop ends at the end of this turn."""
        self.finished = True

    def serve_again(self) -> None:
        """The successor is gone: this master serves, with pidfile and control socket."""
        self.successor = None
        self.retiring = False
        arbiter = self.arbiter
        if arbiter.cfg.pidfile is not None:
            try:
                if not pidfile.is_ours(arbiter):
                    pidfile.take(arbiter)
            except OSError as error:
                arbiter.log.error("gracehooks: cannot write the pidfile (%s); the server serves on", error)
            pidfile.second(arbiter)
        arbiter._start_control_server()
        self.take_charge()
