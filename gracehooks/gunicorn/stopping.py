"""The bounded stop of a master: TERM with its lame duck, INT and QUIT as the hammer, and the last sweep after the loop.

What must hold: a stop ends within its budget, whatever hangs; no turn blocks, so that the hammer is heard at any moment;
the door of a listener that nobody serves after us is shut before its backlog is served to the end; nothing of ours stays
behind, neither a process nor the path of a socket.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gracehooks import events, processes
from gracehooks.anchor import mooring
from gracehooks.deadline import Deadline
from gracehooks.gunicorn import listeners
from gracehooks.gunicorn.losses import never_accepted
from gracehooks.gunicorn.pool import MARGIN
from gracehooks.scoreboard import Order, Phase

if TYPE_CHECKING:
    from gracehooks.gunicorn.master import Grace

__all__ = ["Stopping"]

#: After INT or QUIT: so long a worker may take for its hooks and its report, in seconds.
HAMMER_WITHIN = 1.0


@dataclass
class _Stop:
    """A stop under way."""

    reason: str
    final: bool
    id: str
    since: float
    deadline: Deadline
    lame_duck: Deadline | None = None
    draining: bool = False
    forced: bool = False
    order: Order = Order.RETIRE
    backlog: Deadline = field(default_factory=lambda: Deadline.after(0.0))  #: until when somebody must serve it
    reinforced: bool = False  #: whether a worker was forked for it


class Stopping:
    """The stop of `master`."""

    def __init__(self, master: Grace) -> None:
        self._master = master
        self._arbiter = master.arbiter
        self._stop: _Stop | None = None
        self._sweeping = False

    @property
    def under_way(self) -> bool:
        """Whether a stop has begun."""
        return self._stop is not None

    @property
    def recorded(self) -> bool:
        """Whether a stop is under way whose record will say what is lost."""
        return self._stop is not None and self._stop.final

    @property
    def lame_duck(self) -> bool:
        """Whether the readiness answers 503 while requests are still accepted."""
        return self._stop is not None and self._stop.lame_duck is not None

    @property
    def forced(self) -> bool:
        """Whether the operator took the hammer."""
        return self._stop is not None and self._stop.forced

    # -- how it begins ---------------------------------------------------------------------------------------------
    def begin(self, reason: str) -> None:
        """Begin a bounded stop; a second TERM, or one to a retiring master, changes nothing."""
        master = self._master
        if self._stop is not None or master.retiring:
            self._arbiter.log.info(
                "gracehooks: %s changes nothing: this master is leaving already, within its bound (INT forces it)",
                reason,
            )
            return
        lame_duck = master.settings.lame_duck if master.final else 0.0
        stop = self._open(reason, master.settings.leave_budget + lame_duck, MARGIN)
        if master.is_successor:
            master.takeover.fail(f"stopped by {reason} before it was committed")
        if lame_duck:
            stop.lame_duck = Deadline.after(lame_duck)
            for worker in self._arbiter.WORKERS.values():
                worker.page.order = max(worker.page.order, Order.LAME_DUCK)
            events.publish(events.LameDuckStarted(**master.identity(), seconds=lame_duck))
        self.go_on()

    def hammer(self, reason: str) -> None:
        """Force now, with the report: each worker gets a moment for its hooks, then it is killed."""
        master = self._master
        # The successor of an upgrade that is not committed goes with us (one that was committed serves, and stays): its
        # workers may hold requests too, so it gets a moment more to force them, and to say what they lost.
        successor = master.successor if master.driver.under_way else None
        within = HAMMER_WITHIN if successor is None else HAMMER_WITHIN + MARGIN
        stop = self._stop or self._open(reason, within)
        if not stop.draining:
            self._end_accepting(stop)
        stop.forced, stop.draining, stop.lame_duck = True, True, None
        if successor is not None:
            successor.hammer()
        stop.deadline = stop.deadline.earlier(Deadline.after(within))
        if stop.final:
            for each in master.takeover.alive():
                processes.signal_process(each.pid, signal.SIGINT)
        master.pool.hammer(reason, stop.deadline)

    def _open(self, reason: str, budget: float, margin: float = 0.0) -> _Stop:
        master = self._master
        deadline = Deadline.after(budget + margin)
        self._stop = _Stop(reason, master.final, uuid.uuid4().hex[:12], time.monotonic(), deadline)
        events.publish(events.StopStarted(**master.identity(), reason=reason, budget=budget))
        master.driver.stop_asked()
        return self._stop

    # -- how it goes on --------------------------------------------------------------------------------------------
    def go_on(self) -> None:
        """One turn: the lame duck's end, the drain, the force at the deadline, the end."""
        stop, master = self._stop, self._master
        if stop is None or master.finished:
            return
        if stop.lame_duck is not None:
            if not stop.lame_duck.passed:
                return
            stop.lame_duck = None
        if not stop.draining:
            stop.draining = True
            if self._end_accepting(stop):
                stop.order = Order.STOP
                stop.backlog = Deadline.after(master.settings.drain_timeout)
                events.publish(events.AcceptingEnded(**master.identity()))
        self._let_go(stop)
        if stop.deadline.passed and self._arbiter.WORKERS:
            master.pool.kill("the stop budget" if not stop.forced else f"forced by {stop.reason}")
        older = master.takeover.alive() if stop.final else []
        others = master.driver.under_way or older or master.pool.orphans
        if self._arbiter.WORKERS or (others and not stop.deadline.passed):
            return
        if master.retiring:
            master.driver.workers_gone()  # the successor serves: it is told what was lost, and records it
            return
        master.pool.look_at_orphans(now=True)
        for each in older:
            processes.kill_tree(each.pid)
        if master.driver.under_way and master.successor is not None:
            master.successor.roll_back(True)
        master.takeover.hear()
        if stop.final:
            waited = listeners.turn_away(each for each in self._arbiter.LISTENERS if self._is_ours(each))
            master.pool.ended.add(never_accepted(waited))
        self._tell(stop)
        master.leave()

    def _let_go(self, stop: _Stop) -> None:
        """Tell every worker to drain; but the backlog of a final stop needs one that serves it.

        The others may have crashed just now, or be on their way out for another reason and leave it alone: then one that
        boots goes on booting, and where there is none it is forked.
        """
        unserved = not stop.forced and self._nobody_serves_the_backlog(stop)
        booting = 0
        for pid, worker in list(self._arbiter.WORKERS.items()):
            booting += not worker.page.ready
            if worker.page.ready or not unserved:
                self._master.pool.let_go(pid, stop.order, f"stopped by {stop.reason}")
        if unserved and not booting and not stop.reinforced:
            stop.reinforced = True
            self._master.pool.spawn(self._master.pool.cohort)

    def _nobody_serves_the_backlog(self, stop: _Stop) -> bool:
        if stop.backlog.passed or not listeners.waits(each for each in self._arbiter.LISTENERS if self._is_ours(each)):
            return False
        pages = [worker.page for worker in self._arbiter.WORKERS.values()]
        return not any(
            page.phase in (Phase.SERVING, Phase.LAME_DUCK)
            or (page.phase is Phase.ACCEPTING_ENDS and page.order is Order.STOP)
            for page in pages
        )

    def _end_accepting(self, stop: _Stop) -> bool:
        """Shut the door of the listeners that nobody serves after us; whether there are any.

        systemd keeps its sockets, and what waits there, for the next start; what is ours is served to the end.
        """
        ours = [each for each in self._arbiter.LISTENERS if stop.final and self._is_ours(each)]
        if ours:
            listeners.end_accepting(ours, unlink=not self._arbiter.cfg.reuse_port)
        return bool(ours)

    def _is_ours(self, listener: Any) -> bool:
        return not self._arbiter.systemd or listeners.name_of(listener) in (self._master.own or ())

    def _tell(self, stop: _Stop) -> None:
        master, ended = self._master, self._master.pool.ended
        outcome = "forced" if stop.forced or ended.lost["requests"] or ended.lost["jobs"] else "completed"
        seconds = round(time.monotonic() - stop.since, 3)
        events.publish(
            events.Stopped(
                **master.identity(),
                id=stop.id,
                outcome=outcome,
                seconds=seconds,
                answered=ended.answered,
                jobs=ended.jobs,
                lost=ended.lost,
            )
        )
        if master.is_successor:
            master.takeover.tell(say="lost", lost=ended.lost, jobs=ended.jobs, answered=ended.answered)
        if stop.final:
            master.record(
                {
                    "id": stop.id,
                    "kind": "stop",
                    "outcome": outcome,
                    "reason": stop.reason,
                    "phases": {"stopping": seconds},
                    "lost": ended.lost,
                    "jobs": ended.jobs,
                    "requests_answered": ended.answered,
                }
            )

    # -- after the loop --------------------------------------------------------------------------------------------
    def sweep(self, graceful: bool) -> None:
        """The loop has ended, in order or by an error: nothing of ours may stay behind.

        Bounded: workers that are left get a TERM and one more leave budget where the loop ended by an error (a boot that
        failed), and are killed then.
        """
        if self._sweeping:
            return
        self._sweeping = True
        master, arbiter, final = self._master, self._arbiter, self._master.final
        if arbiter.WORKERS:
            for pid in list(arbiter.WORKERS):
                master.pool.let_go(pid, Order.STOP if final else Order.RETIRE, "the master ends")
            self._reap_for(master.settings.leave_budget if graceful else HAMMER_WITHIN)
            master.pool.kill("the master ends")
            self._reap_for(1.0)
        self._end_dirty_arbiter()
        if final and not master.finished and not mooring.anchored():  # an anchor starts the next master with them
            self._turn_away_at_a_halt()
        for each in arbiter.LISTENERS:
            each.close()
        arbiter.LISTENERS = []
        if final:
            master.status.write(now=True, state="stopped")
            master.book.unregister(os.getpid())

    def _turn_away_at_a_halt(self) -> None:
        """Nobody has served for a while, and nobody will: what waits meanwhile is lost, and not in silence."""
        ours = [each for each in self._arbiter.LISTENERS if self._is_ours(each)]
        listeners.end_accepting(ours, unlink=not self._arbiter.cfg.reuse_port)
        waited = listeners.turn_away(ours)
        if waited:
            self._master.pool.ended.add(never_accepted(waited))
            now = Deadline.after(0.0)
            self._tell(self._stop or _Stop("an error ended the master", True, uuid.uuid4().hex[:12], now.at, now))

    def _reap_for(self, seconds: float) -> None:
        until = Deadline.after(seconds)
        while self._arbiter.WORKERS and not until.passed:
            self._master.reap()
            self._master.pool.kill_late(patient=not self.forced)
            time.sleep(0.02)

    def _end_dirty_arbiter(self) -> None:
        """gunicorn's pool for long work goes after the workers, which may have been waiting for it; bounded."""
        arbiter = self._arbiter
        if not getattr(arbiter, "dirty_arbiter_pid", 0):
            return
        arbiter.kill_dirty_arbiter(signal.SIGQUIT if self.forced else signal.SIGTERM)
        until = Deadline.after(HAMMER_WITHIN if self.forced else self._master.settings.cleanup_timeout)
        while arbiter.dirty_arbiter_pid and not until.passed:
            arbiter.reap_dirty_arbiter()
            time.sleep(0.02)
        if arbiter.dirty_arbiter_pid:
            arbiter.log.error("gracehooks: the dirty arbiter had not left in time and was killed")
            processes.kill_tree(arbiter.dirty_arbiter_pid)
            arbiter.reap_dirty_arbiter()
