"""From successor to master: what we say to the old master, the word "commit", and what older generations say as they leave.

What must hold: until the old master says "commit", or dies, this master owns nothing (no pidfile, no control socket, no
unix path); then it takes all of it in one turn. A generation that leaves is recorded once, with what it lost, also when
it dies without a word.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

from gunicorn import util

from gracehooks import events, processes
from gracehooks.deadline import Deadline
from gracehooks.gunicorn import pidfile
from gracehooks.gunicorn.pool import MARGIN
from gracehooks.gunicorn.predecessor import Handover, Predecessor

if TYPE_CHECKING:
    from gracehooks.gunicorn.master import Grace

__all__ = ["Takeover"]


class Takeover:
    """What `master` has to do with the generations before it; `handover` is None where there are none."""

    def __init__(self, master: Grace, handover: Handover | None) -> None:
        self._master = master
        self._arbiter = master.arbiter
        self.handover = handover  #: until we are promoted
        self._older: list[Predecessor] = [*handover.draining, handover.old] if handover else []
        self._failure = ""
        #: The record of the upgrade that brought us, until the old master has left.
        self._open: dict[str, Any] | None = None
        #: The id of an upgrade that systemd has not been told of yet, else empty.
        self._unnamed = ""
        #: By when it must be clear who serves after an old master that was killed.
        self._undecided: Deadline | None = None

    @property
    def ahead(self) -> bool:
        """Whether this master serves beside an older one that has not handed over yet."""
        return self.handover is not None

    @property
    def busy(self) -> bool:
        """Whether something is awaited that no signal announces."""
        return self.ahead or self._open is not None

    @property
    def failed(self) -> bool:
        """Whether we have told the old master that we cannot serve; it ends us."""
        return bool(self._failure)

    def alive(self) -> list[Predecessor]:
        """The older generations that still drain."""
        return [each for each in self._older if each.alive]

    def descriptors(self) -> list[int]:
        """What a worker must not keep."""
        return [each.channel.fileno() for each in self._older if each.channel is not None]

    # -- before the promotion --------------------------------------------------------------------------------------
    def tell(self, **message: Any) -> None:
        """Say something to the old master, where there is one, and wake its loop."""
        if self.handover is not None and self.handover.old.channel is not None:
            self.handover.old.channel.send(**message)
            if os.getppid() == self.handover.old.pid:
                processes.signal_process(self.handover.old.pid, signal.SIGCHLD)

    def fail(self, reason: str) -> None:
        """This successor cannot serve: tell the old master, which ends it."""
        if not self._failure:
            self._failure = reason
            self.tell(say="failed", reason=reason)

    def hear(self) -> None:
        """What the older generations say, and whether they live."""
        if self.handover is not None:
            old = self.handover.old
            for message in old.channel.receive() if old.channel else ():
                # A commit that crosses our word that we cannot serve is no more than that: the old master rolls back when
                # it reads it, and serves on.
                if message.get("say") == "commit" and not self._failure and not self._master.stop.under_way:
                    self._promote(self.handover, "commit", message.get("phases", {}))
                    return
            if (old.channel is None or old.channel.closed) and not old.alive:
                self._inherit(self.handover)
            return
        for each in list(self._older):
            for message in each.channel.receive() if each.channel is not None else ():
                if message.get("say") == "drained":
                    self._left(each, message)
                elif message.get("say") == "announced":
                    self._master.speaker.named()
            if each.channel is not None and (each.channel.closed or not each.alive):
                if self._open is not None and self._open["old"] == each.pid:
                    self._master.speaker.left_alone()
                    self._left(each, {})
                each.channel.close()
                each.channel = None
            if not each.alive:
                self._older.remove(each)

    def _inherit(self, handover: Handover) -> None:
        """The old master has died: serve in its place, unless the generation before it serves again.

        That one comes back when the master that replaced it dies while it leaves; it is proven, and we are not. It has seen
        the death as we have: soon it serves, or has left.
        """
        before = [each for each in handover.draining if each.generation == handover.old.generation - 1 and each.alive]
        if self._undecided is None:
            self._undecided = Deadline.after(self._master.settings.leave_budget + MARGIN)
        if not before or self._undecided.passed:
            self._promote(handover, "the old master died", {})
        elif self._master.book.serving_master() == before[0].pid and not self._master.stop.under_way:
            self._master.stop.begin(f"generation {before[0].generation} serves again")

    # -- the promotion ---------------------------------------------------------------------------------------------
    def _promote(self, handover: Handover, reason: str, phases: dict[str, float]) -> None:
        """This master serves now: pidfile, control socket, name."""
        master, arbiter = self._master, self._arbiter
        asked = reason == "commit"
        try:
            pidfile.take(arbiter)
        except OSError as error:
            if asked:
                self.fail(f"cannot write the pidfile {arbiter.cfg.pidfile} ({error})")
                return
            arbiter.log.error("gracehooks: cannot write the pidfile (%s); the server serves on", error)
        self._open = {
            "old": handover.old.pid,
            "id": handover.id,
            "kind": handover.kind,
            "phases": phases,
            "since": time.monotonic(),
        }
        master.driver.last = {
            "id": handover.id,
            "kind": handover.kind,
            "state": "committing" if asked and master.speaker.on else "completed",  # see named
            "reason": "" if asked else reason,
            "started_at": time.time(),
            "phases": phases,
            "workers_ready": master.pool.progress()["ready"],
            "workers": arbiter.num_workers,
        }
        if asked:
            self._unnamed = handover.id if master.speaker.on else ""
            self.tell(say="committed")
        self.handover = None
        self._failure = ""
        arbiter.master_pid = 0
        arbiter.master_name = "Master"
        arbiter.proc_name = arbiter.cfg.proc_name
        os.environ.pop("GUNICORN_PID", None)
        util._setproctitle(f"master [{arbiter.proc_name}]")
        arbiter._start_control_server()
        events.publish(events.MasterPromoted(**master.identity(), reason=reason))
        if master.served:
            master.now_serving()
        else:
            master.take_charge()  # it serves once its workers are ready
        master.status.write(now=True)

    def look_at_name(self) -> None:
        """For those who wait, an upgrade is completed only once systemd follows this master."""
        if self._unnamed and not self._master.speaker.unnamed:
            if self._master.driver.last.get("id") == self._unnamed:
                self._master.driver.last["state"] = "completed"
                self._master.status.write(now=True)
            self._unnamed = ""

    # -- after it --------------------------------------------------------------------------------------------------
    def supersede(self) -> None:
        """We retire ourselves: nobody older need wait for our word, and their reports have nobody else to go to."""
        for each in self._older:
            if each.channel is not None:
                each.channel.send(say="superseded")
        for each in list(self._older):
            self._left(each, {})

    def _left(self, old: Predecessor, message: dict[str, Any]) -> None:
        """Record the upgrade that brought us, once the generation before us has left; `message` is its last word."""
        if self._open is None or self._open["old"] != old.pid:
            return
        upgrade, self._open = self._open, None
        lost = message.get("lost") or {"requests": [], "jobs": []}
        seconds = round(time.monotonic() - upgrade["since"], 3)
        events.publish(
            events.GenerationRetired(
                **self._master.identity(), id=upgrade["id"], retired=old.generation, seconds=seconds, lost=lost
            )
        )
        self._master.record(
            {
                "id": upgrade["id"],
                "kind": upgrade["kind"],
                "outcome": "completed",
                "reason": "" if message else "the old master ended without a report",
                "phases": {**upgrade["phases"], "retiring": seconds},
                "lost": lost,
                "jobs": message.get("jobs", {}),
                "requests_answered": message.get("answered", 0),
            }
        )
