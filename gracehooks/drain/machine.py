"""The phases in which a worker leaves, as a table that one could draw; the reference's picture is drawn from it.

What must hold:
- the phases pass in one order, none is skipped, and a fact that comes late or twice changes nothing;
- each phase ends when its work has ended or when its deadline has passed, whichever comes first;
- what had not ended at a deadline is reported, and the next phase begins all the same: a request that is stuck costs no
  job its time, and a job that is stuck costs no callback its turn.

Pure: it reads no clock, sends no signal and writes no log. It knows no server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from gracehooks.deadline import Deadline
from gracehooks.scoreboard import Phase
from gracehooks.settings import Settings

__all__ = ["STAGES", "TRANSITIONS", "Action", "Deadlines", "Fact", "Stage", "Step", "linger", "step"]

#: The longest that a connection which has not sent a request yet is kept for one on its way, in seconds; also an idle
#: kept-alive connection on a final stop, where its client will have to find another server anyway.
LINGER = 2.0
#: The same for a kept-alive connection that has been used, while others serve: its client may just be sending.
LINGER_USED = 10.0


class Fact(Enum):
    """What can happen to a worker on its way out."""

    TOLD_LAME_DUCK = "told lame duck"
    TOLD_TO_LEAVE = "told to leave"
    ACCEPTING_ENDED = "accepting ended"
    REQUESTS_ENDED = "requests ended"
    JOBS_ENDED = "jobs ended"
    CLEANUP_ENDED = "cleanup ended"
    DEADLINE_PASSED = "deadline passed"
    HAMMERED = "hammered"


class Action(Enum):
    """What the driver does when a step says so."""

    STOP_SERVICES = "services stop pulling"
    STOP_ACCEPTING = "accept what waits, where nobody else will; then close the listeners"
    END_REQUESTS = "answer with Connection: close; linger on silent connections"
    REPORT_REQUESTS = "report the requests in flight"
    END_JOBS = "grace, cancel, wait, report, kill"
    REPORT_JOBS = "report the jobs in flight"
    CLEAN_UP = "on_shutdown callbacks, newest first"
    REPORT_CLEANUP = "report the callback that hangs"
    EXIT = "worker_exit, atexit, flush, exit"


@dataclass(frozen=True)
class Stage:
    """One phase: what is done in it, and the setting that bounds it ("" where the master does)."""

    phase: Phase
    does: str
    bound: str


@dataclass(frozen=True)
class Step:
    """Where a fact leads, and what to do on the way, in this order."""

    phase: Phase
    actions: tuple[Action, ...] = ()


STAGES: tuple[Stage, ...] = (
    Stage(Phase.BOOTING, "the application is loaded", "ready_timeout"),
    Stage(Phase.SERVING, "requests are answered", ""),
    Stage(Phase.LAME_DUCK, "requests are answered, readiness says no", "lame_duck"),
    Stage(Phase.ACCEPTING_ENDS, "connections that wait are accepted, where nobody else will", "drain_timeout"),
    Stage(Phase.REQUESTS, "requests in flight run to their end", "drain_timeout"),
    Stage(Phase.JOBS, "background jobs run to their end", "job_timeout"),
    Stage(Phase.CLEANUP, "on_shutdown callbacks and lifespan shutdown", "cleanup_timeout"),
    Stage(Phase.ENDED, "the process exits", "cleanup_timeout"),
)

_ACCEPTING = Step(Phase.ACCEPTING_ENDS, (Action.STOP_SERVICES, Action.STOP_ACCEPTING))
_JOBS = Step(Phase.JOBS, (Action.END_JOBS,))
_CLEANUP = Step(Phase.CLEANUP, (Action.CLEAN_UP,))
_ENDED = Step(Phase.ENDED, (Action.EXIT,))

TRANSITIONS: Mapping[tuple[Phase, Fact], Step] = {
    (Phase.BOOTING, Fact.TOLD_TO_LEAVE): _ENDED,
    (Phase.SERVING, Fact.TOLD_LAME_DUCK): Step(Phase.LAME_DUCK),
    (Phase.SERVING, Fact.TOLD_TO_LEAVE): _ACCEPTING,
    (Phase.LAME_DUCK, Fact.TOLD_TO_LEAVE): _ACCEPTING,
    (Phase.ACCEPTING_ENDS, Fact.ACCEPTING_ENDED): Step(Phase.REQUESTS, (Action.END_REQUESTS,)),
    (Phase.ACCEPTING_ENDS, Fact.REQUESTS_ENDED): _JOBS,
    (Phase.ACCEPTING_ENDS, Fact.DEADLINE_PASSED): Step(Phase.JOBS, (Action.REPORT_REQUESTS, Action.END_JOBS)),
    (Phase.REQUESTS, Fact.REQUESTS_ENDED): _JOBS,
    (Phase.REQUESTS, Fact.DEADLINE_PASSED): Step(Phase.JOBS, (Action.REPORT_REQUESTS, Action.END_JOBS)),
    (Phase.JOBS, Fact.JOBS_ENDED): _CLEANUP,
    (Phase.JOBS, Fact.DEADLINE_PASSED): Step(Phase.CLEANUP, (Action.REPORT_JOBS, Action.CLEAN_UP)),
    (Phase.CLEANUP, Fact.CLEANUP_ENDED): _ENDED,
    (Phase.CLEANUP, Fact.DEADLINE_PASSED): Step(Phase.ENDED, (Action.REPORT_CLEANUP, Action.EXIT)),
    **{
        (phase, Fact.HAMMERED): Step(Phase.ENDED, (Action.REPORT_REQUESTS, Action.REPORT_JOBS, Action.EXIT))
        for phase in Phase
        if phase is not Phase.ENDED
    },
}


def step(phase: Phase, fact: Fact) -> Step:
    """Where `fact` leads from `phase`; a fact that does not belong there leads nowhere and asks for nothing."""
    return TRANSITIONS.get((phase, fact), Step(phase))


@dataclass(frozen=True)
class Deadlines:
    """The deadline of each phase of one worker that was told to leave at the moment `told`.

    A phase begins its own time when it begins, and still the sum never passes the sum of the settings from `told` on: time
    that a forced step took is taken from the next phase, since the master kills at that sum.
    """

    settings: Settings
    told: Deadline

    def of(self, phase: Phase, entered: Deadline) -> Deadline:
        """When `phase`, entered at the moment `entered`, must be over."""
        settings = self.settings
        if phase <= Phase.REQUESTS:
            return self.told.plus(settings.drain_timeout)
        if phase is Phase.JOBS:
            return entered.plus(settings.job_timeout).earlier(
                self.told.plus(settings.drain_timeout + settings.job_timeout)
            )
        return entered.plus(settings.cleanup_timeout).earlier(self.told.plus(settings.leave_budget))


def linger(settings: Settings, *, used: bool, final: bool) -> float:
    """How long an idle connection is kept for a request already on its way, in seconds, once accepting has ended.

    `used` says that it has carried a request before, `final` that nobody else holds the listener.
    """
    longest = LINGER_USED if used and not final else LINGER
    return min(longest, settings.drain_timeout / 2)
