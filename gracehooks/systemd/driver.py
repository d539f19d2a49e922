"""Says to systemd what `machine` decides, a turn at a time; where there is no NOTIFY_SOCKET, nothing at all.

What must hold: nothing raises, nothing waits; the old master names the new one and stays until systemd has heard it
(the barrier), for at most BARRIER_WITHIN; the watchdog is fed by the loop's turns and by nothing else, by the old master
until the new one is followed and by the new one from then on. Knows no server: the host calls `hear`, `tick`, `named`.

The variables are taken out of the environment, so that workers and what they start cannot speak in the master's name, and
handed to the successor by `environment`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, MutableMapping
from dataclasses import replace

from gracehooks import events
from gracehooks.deadline import Deadline
from gracehooks.notify import Barrier, Notifier
from gracehooks.systemd import machine
from gracehooks.systemd.machine import Happened, Say, Situation, State

__all__ = ["Speaker"]

#: The old master waits so long for systemd to hear which one it shall follow, in seconds.
BARRIER_WITHIN = 5.0
#: A promoted master that was not named by then names itself.
NAMED_WITHIN = 10.0
#: Each time-out is extended by so much, so often, in seconds.
EXTENSION, EXTEND_EVERY = 20.0, 5.0
#: A status line that changes is sent so often, in seconds.
STATUS_EVERY = 0.5
#: Longer lines are cut: one datagram must hold it.
LONGEST_STATUS = 900

_NAMES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Speaker:
    """The voice of one master; `successor` says that an older one is still followed.

    `boot` is how long, in seconds, a first start may stretch TimeoutStartSec. With `anchored`, the main process is the
    anchor, and no other is ever named.
    """

    def __init__(
        self,
        environ: MutableMapping[str, str],
        *,
        successor: bool = False,
        anchored: bool = False,
        boot: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pid = os.getpid()
        self._taken = {name: environ.pop(name) for name in _NAMES if name in environ}
        address = self._taken.get("NOTIFY_SOCKET", "")
        self._notifier = Notifier(address) if address.startswith(("/", "@")) else None
        self._anchored = anchored
        self._clock = clock
        self._watchdog = self._watchdog_seconds()
        self.state = State.SUCCESSOR if successor else State.BOOTING
        self._born = clock()
        self._boot = boot
        self._successor = 0
        self._promoted_at: float | None = None
        self._barrier: Barrier | None = None
        self._barrier_bound = Deadline(0.0)
        self._lines: dict[str, str] = {}
        self._pinged: float | None = None
        self._extended: float | None = None
        self._said_status = ""
        self._status_at = 0.0
        self._note = ""
        self._stop: tuple[str, float] = ("", 0.0)

    def _watchdog_seconds(self) -> float:
        try:
            usec = int(self._taken.get("WATCHDOG_USEC", "0"))
            pid = int(self._taken.get("WATCHDOG_PID", "0"))
        except ValueError:
            return 0.0
        return usec / 1e6 if usec > 0 and (pid in (0, self._pid) or self._anchored) else 0.0

    @property
    def on(self) -> bool:
        """Whether there is a manager to speak to."""
        return self._notifier is not None

    def environment(self) -> dict[str, str]:
        """What a successor must find in its environment; WATCHDOG_PID is added by `adopt` once its pid is known."""
        found = {"NOTIFY_SOCKET": self._taken["NOTIFY_SOCKET"]} if self._notifier is not None else {}
        if self._watchdog:
            found["WATCHDOG_USEC"] = self._taken["WATCHDOG_USEC"]
        return found

    @staticmethod
    def adopt(environ: MutableMapping[str, str]) -> None:
        """Called in the successor, before its exec: the watchdog is its own from now on."""
        environ.pop("WATCHDOG_PID", None)
        if "WATCHDOG_USEC" in environ:
            environ["WATCHDOG_PID"] = str(os.getpid())

    # -- what happens --------------------------------------------------------------------------------------------
    def hear(self, event: events.Event) -> None:
        """A subscriber to events."""
        if self._notifier is None or os.getpid() != self._pid:
            return
        if isinstance(event, events.ServingStarted):
            self._take(Happened.ALL_READY)
        elif isinstance(event, events.MasterPromoted):
            self._promoted_at = self._clock()
            if event.reason != "commit":
                self._take(Happened.ORPHANED)
        elif isinstance(event, events.UpgradeStarted):
            self._successor, self._note = event.successor, ""
            self._take(Happened.BEGUN)
        elif isinstance(event, events.UpgradeCompleted):
            self._take(Happened.COMPLETED)
        elif isinstance(event, events.UpgradeRolledBack):
            self._note = f"the last {event.kind} was rolled back: {event.reason}"
            self._take(Happened.ROLLED_BACK)
        elif isinstance(event, events.UpgradeRefused):
            if self.state is State.SERVING:
                self._note = f"the last {event.kind} was refused: {event.reason}"
            self._take(Happened.REFUSED)
        elif isinstance(event, events.RetiringStarted):
            self._take(Happened.RETIRING)
        elif isinstance(event, events.UpgradeResumed):
            self._note = f"the last {event.kind} was taken back: {event.reason}"
            self._take(Happened.RESUMED)
        elif isinstance(event, events.StopStarted):
            self._stop = (event.reason, event.budget)
            self._take(Happened.STOP)
        elif isinstance(event, events.Stopped) and self.state is State.STOPPING:
            lost = sum(len(each) for each in event.lost.values())
            self._lines["STATUS"] = f"Stopped after {event.seconds:.1f} s, " + (
                f"lost {lost} requests or jobs (see the log)" if lost else "nothing was lost"
            )
            self._said_status, self._status_at = self._lines["STATUS"], float("inf")
            self._flush()
        elif isinstance(event, events.WorkerBootFailed) and self.state is State.BOOTING:
            self._note = f"worker {event.worker} did not become ready: {event.reason}"
            self._lines["STATUS"] = self._one_line(f"Starting; {self._note}")
            self._flush()

    def named(self) -> None:
        """The old master says that systemd follows us now."""
        self._take(Happened.NAMED)

    def left_alone(self) -> None:
        """The old master is gone; if it has not named us, we name ourselves."""
        if self._promoted_at is not None:
            self._take(Happened.ORPHANED)

    @property
    def unnamed(self) -> bool:
        """Whether this master serves and systemd may still follow the old one."""
        return self._notifier is not None and self.state is State.SUCCESSOR

    @property
    def holds(self) -> bool:
        """Whether this master must stay for systemd to hear what it said."""
        return self._barrier is not None

    def _take(self, happened: Happened) -> None:
        if self._notifier is None:
            return
        self.state, words = machine.step(self.state, happened)
        for word in words:
            self._say(word)

    def _say(self, word: Say) -> None:
        assert self._notifier is not None
        if word is Say.READY:
            self._lines["READY"] = "1"
        elif word is Say.RELOADING:
            self._flush()  # it must not meet another READY=1 in one datagram
            self._lines.update(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))
            self._lines["EXTEND_TIMEOUT_USEC"] = str(int(EXTENSION * 1e6))
            self._extended = self._clock()
            self._flush()
        elif word is Say.STOPPING:
            self._lines["STOPPING"] = "1"
        elif word in (Say.FOLLOW_SUCCESSOR, Say.FOLLOW_ME):
            if not self._anchored:
                self._lines["MAINPID"] = str(self._successor if word is Say.FOLLOW_SUCCESSOR else self._pid)
            if self._watchdog:
                self._lines["WATCHDOG"] = "1"
            if word is Say.FOLLOW_ME:
                self._drop_barrier()
                self._pinged = None
        elif word is Say.BARRIER:
            self._flush()
            self._barrier = self._notifier.barrier()
            self._barrier_bound = Deadline(self._clock() + BARRIER_WITHIN)

    def _drop_barrier(self) -> None:
        if self._barrier is not None:
            self._barrier.close()
            self._barrier = None

    # -- a turn of the loop --------------------------------------------------------------------------------------
    @property
    def pace(self) -> float:
        """How long the loop may sleep, for the watchdog's sake."""
        return self._watchdog / 4 if self._watchdog else 3600.0

    def tick(self, situation: Callable[[], Situation]) -> None:
        """Send what is due; `situation` is asked for where a status line may be."""
        if self._notifier is None:
            return
        now = self._clock()
        self._notifier.flush()
        if self._barrier is not None and (self._barrier.passed or now >= self._barrier_bound.at):
            self._drop_barrier()
        if self.state is State.SUCCESSOR and self._promoted_at is not None and now >= self._promoted_at + NAMED_WITHIN:
            self._take(Happened.ORPHANED)
        if self._watchdog and machine.pings(self.state, self._barrier is None) and self._ping_due(now):
            self._lines["WATCHDOG"] = "1"
        if "WATCHDOG" in self._lines:
            self._pinged = now
        if machine.speaks(self.state):
            if machine.extends(self.state, self._born + self._boot - now):
                if self._extended is None or now - self._extended >= EXTEND_EVERY:
                    self._lines["EXTEND_TIMEOUT_USEC"] = str(int(EXTENSION * 1e6))
                    self._extended = now
            else:
                self._extended = None
            if self._status_at != float("inf") and (self._lines or now - self._status_at >= STATUS_EVERY):
                self._status_at = now
                line = self._one_line(machine.status(self.state, self._noted(situation())))
                if line != self._said_status:
                    self._said_status = line
                    self._lines["STATUS"] = line
        self._flush()

    def _ping_due(self, now: float) -> bool:
        # A little before the half, which is what sd_watchdog_enabled(3) asks for: turns of the loop are not exact.
        return self._pinged is None or now - self._pinged >= self._watchdog * 0.45

    def _noted(self, situation: Situation) -> Situation:
        reason, budget = self._stop
        return replace(situation, note=self._note, reason=reason, left=budget)

    @staticmethod
    def _one_line(text: str) -> str:
        return " ".join(text.split())[:LONGEST_STATUS]

    def _flush(self) -> None:
        if self._lines and self._notifier is not None:
            lines, self._lines = self._lines, {}
            self._notifier.send("\n".join(f"{name}={value}" for name, value in lines.items()))
