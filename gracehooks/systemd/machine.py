"""What is said to systemd, as data: states, facts that were seen, what to say. PURE: no clock, no socket, no log.

What must hold: at each moment systemd follows one master, and it is the one that serves; "ready" is said when the workers
are, not when the master is; a reload that was begun is always ended by "ready", also by a failure; a master that retires
and a successor that nobody follows yet never say "stopping" (from systemd 259 on, that word is final).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["TABLE", "Happened", "Say", "Situation", "State", "extends", "pings", "speaks", "status", "step"]


class State(Enum):
    """What this master is to systemd."""

    BOOTING = "booting"  #: the first master; its workers are not ready yet
    SUCCESSOR = "successor"  #: systemd follows an older master: not a word
    SERVING = "serving"  #: systemd follows this one
    RELOADING = "reloading"  #: an upgrade or a reload is under way
    SUCCEEDED = "succeeded"  #: the next master was named; the barrier is what is left
    STOPPING = "stopping"  #: the service ends


class Happened(Enum):
    """What was seen."""

    ALL_READY = "every worker is ready"
    NAMED = "the old master has told systemd to follow us"
    ORPHANED = "we serve, and the old master ended or hung without naming us"
    BEGUN = "an upgrade or a reload has begun"
    COMPLETED = "it is completed"
    ROLLED_BACK = "it failed, and the old generation serves on"
    REFUSED = "it was not begun"
    RETIRING = "this generation retires: another master serves"
    RESUMED = "that other master died; this one serves again"
    STOP = "the service is told to end"


class Say(Enum):
    """What is told to systemd."""

    READY = "READY=1"
    RELOADING = "RELOADING=1, MONOTONIC_USEC=, in one datagram"
    STOPPING = "STOPPING=1"
    FOLLOW_SUCCESSOR = "MAINPID= of the successor"
    FOLLOW_ME = "MAINPID= of this master"
    BARRIER = "BARRIER=1"


_S, _H = State, Happened
_STOP = (_S.STOPPING, (Say.STOPPING,))

#: (state, what happened) → (next state, what to say in this order). What is not in the table changes nothing.
TABLE: dict[tuple[State, Happened], tuple[State, tuple[Say, ...]]] = {
    (_S.BOOTING, _H.ALL_READY): (_S.SERVING, (Say.READY,)),
    (_S.BOOTING, _H.COMPLETED): (_S.SERVING, (Say.READY,)),
    (_S.BOOTING, _H.STOP): _STOP,
    (_S.SUCCESSOR, _H.NAMED): (_S.SERVING, ()),
    (_S.SUCCESSOR, _H.ORPHANED): (_S.SERVING, (Say.FOLLOW_ME, Say.READY)),
    (_S.SERVING, _H.BEGUN): (_S.RELOADING, (Say.RELOADING,)),
    # Type=notify-reload waits for both words after its signal, also where nothing was begun.
    (_S.SERVING, _H.REFUSED): (_S.SERVING, (Say.RELOADING, Say.READY)),
    (_S.SERVING, _H.RETIRING): (_S.SUCCEEDED, (Say.FOLLOW_SUCCESSOR, Say.BARRIER)),
    (_S.SERVING, _H.STOP): _STOP,
    (_S.RELOADING, _H.COMPLETED): (_S.SERVING, (Say.READY,)),
    (_S.RELOADING, _H.ROLLED_BACK): (_S.SERVING, (Say.READY,)),
    (_S.RELOADING, _H.REFUSED): (_S.RELOADING, (Say.RELOADING,)),
    (_S.RELOADING, _H.STOP): _STOP,
    (_S.SUCCEEDED, _H.RESUMED): (_S.SERVING, (Say.FOLLOW_ME, Say.READY)),
}


def step(state: State, happened: Happened) -> tuple[State, tuple[Say, ...]]:
    """What `happened` means in `state`: the next state, and what to say."""
    return TABLE.get((state, happened), (state, ()))


def speaks(state: State) -> bool:
    """Whether systemd listens to this master: it drops, with a warning, what others than its main process say."""
    return state not in (State.SUCCESSOR, State.SUCCEEDED)


def pings(state: State, barrier_passed: bool) -> bool:
    """Whether this master feeds the watchdog: until its successor is followed, and never before it is followed."""
    return speaks(state) or (state is State.SUCCEEDED and not barrier_passed)


def extends(state: State, boot_left: float) -> bool:
    """Whether the time-out of the state that systemd is in is to be extended.

    A boot is, for as long as it may take (`boot_left` seconds); upgrades and stops are bounded by their own deadlines.
    """
    return state in (State.RELOADING, State.STOPPING) or (state is State.BOOTING and boot_left > 0)


@dataclass(frozen=True)
class Situation:
    """What a status line is made of."""

    generation: int = 1
    workers: int = 0  #: workers there shall be
    ready: int = 0  #: of them ready
    new_ready: int = 0  #: of a successor, or of a reload
    new_workers: int = 0
    draining: int = 0  #: older generations that still finish what they have
    leaving: int = 0  #: workers that finish what they have, of this generation
    requests: int = 0
    jobs: int = 0
    kind: str = "upgrade"
    phase: str = ""  #: of the upgrade
    note: str = ""  #: what went wrong last
    reason: str = ""  #: of the stop
    left: float = 0.0  #: seconds that the stop may still take


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def status(state: State, now: Situation) -> str:
    """The line that `systemctl status` shows."""
    if state is State.STOPPING:
        line = f"Stopping ({now.reason}): " if now.reason else "Stopping: "
        if not now.leaving:
            return line + "every worker has left"
        return (
            f"{line}{_plural(now.leaving, 'worker')} with {_plural(now.requests, 'request')} and "
            f"{_plural(now.jobs, 'job')}; at most {now.left:.0f} s from the start"
        )
    if state is State.BOOTING:
        line = f"Starting: {now.ready} of {_plural(now.workers, 'worker')} ready"
    else:
        line = f"Generation {now.generation} serves with {_plural(now.ready, 'worker')}"
    if state is State.RELOADING:
        line += f"; {now.kind}: "
        if now.phase == "rolling_back":
            line += "rolling back"
        elif now.phase in ("probation", "committing"):
            line += "every new worker is ready, in probation" if now.phase == "probation" else "taking over"
        elif now.new_workers:
            line += f"{now.new_ready} of {_plural(now.new_workers, 'new worker')} ready"
        else:
            line += "starting the new generation" if now.kind == "upgrade" else "reading the new configuration"
    elif now.draining:
        line += f"; {_plural(now.draining, 'older generation')} {'drains' if now.draining == 1 else 'drain'}"
    if now.note and state is not State.RELOADING:
        line += f"; {now.note}"
    return line
