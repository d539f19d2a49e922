"""The upgrade as data: states, facts that were seen, actions to take. PURE: no clock, no signal, no log.

What must hold: the old generation serves in every state but RETIRED; only a commit that the successor has confirmed
makes it leave; whatever is uncertain ends in ROLLING_BACK; a successor that dies while the old one leaves brings it
back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["TABLE", "Action", "Fact", "Happened", "State", "step"]


class State(Enum):
    """Where an upgrade is, seen from the old generation."""

    SERVING = "serving"  #: none under way
    BOOTING = "booting"  #: the successor boots; bound: ready_timeout
    PROBATION = "probation"  #: every new worker is ready, both serve; bound: probation
    COMMITTING = "committing"  #: the successor takes over pidfile and control socket; bound: ready_timeout
    RETIRING = "retiring"  #: the old generation drains; bound: the leave budget
    ROLLING_BACK = "rolling_back"  #: the successor is told to go; bound: TERM, then KILL
    RETIRED = "retired"  #: the old generation has left


class Happened(Enum):
    """What was seen of the successor, the clock, the operator, or the old generation's own workers."""

    ALL_READY = "every new worker is ready"
    FAILED = "the successor said that it cannot serve"
    DIED = "the successor is gone"
    TIME_UP = "the bound of the state has passed"
    COMMITTED = "the successor has taken over"
    STOP_ASKED = "the operator asked for a stop"
    WORKERS_GONE = "the old generation's workers have left"
    SUPERSEDED = "the successor has itself been replaced, or stops in good order"


class Action(Enum):
    """What the driver does."""

    BEGIN_PROBATION = "start the probation"
    COMMIT = "tell the successor to take over"
    RETIRE = "tell the old workers to drain"
    ROLL_BACK = "tell the whole successor tree to go"
    FORCE = "kill what is left of the successor tree"
    FORCE_OWN = "kill what is left of the old workers"
    FINISH_ROLLBACK = "serve on, and say why"
    RESUME = "serve again"
    DETACH = "watch the successor no more"
    LEAVE = "the old generation leaves"


@dataclass(frozen=True)
class Fact:
    """Something that happened, with its reason where it has one."""

    happened: Happened
    reason: str = ""


_H, _S, _A = Happened, State, Action
_AWAY = (_S.ROLLING_BACK, (_A.ROLL_BACK,))

#: (state, what happened) → (next state, actions). What is not in the table changes nothing.
TABLE: dict[tuple[State, Happened], tuple[State, tuple[Action, ...]]] = {
    (_S.BOOTING, _H.ALL_READY): (_S.PROBATION, (_A.BEGIN_PROBATION,)),
    (_S.BOOTING, _H.FAILED): _AWAY,
    (_S.BOOTING, _H.DIED): _AWAY,
    (_S.BOOTING, _H.TIME_UP): _AWAY,
    (_S.BOOTING, _H.STOP_ASKED): _AWAY,
    (_S.PROBATION, _H.TIME_UP): (_S.COMMITTING, (_A.COMMIT,)),
    (_S.PROBATION, _H.FAILED): _AWAY,
    (_S.PROBATION, _H.DIED): _AWAY,
    (_S.PROBATION, _H.STOP_ASKED): _AWAY,
    (_S.COMMITTING, _H.COMMITTED): (_S.RETIRING, (_A.RETIRE,)),
    (_S.COMMITTING, _H.FAILED): _AWAY,
    (_S.COMMITTING, _H.DIED): _AWAY,
    (_S.COMMITTING, _H.TIME_UP): _AWAY,
    (_S.COMMITTING, _H.STOP_ASKED): _AWAY,
    (_S.RETIRING, _H.DIED): (_S.SERVING, (_A.RESUME,)),
    (_S.RETIRING, _H.SUPERSEDED): (_S.RETIRING, (_A.DETACH,)),
    (_S.RETIRING, _H.TIME_UP): (_S.RETIRING, (_A.FORCE_OWN,)),
    (_S.RETIRING, _H.WORKERS_GONE): (_S.RETIRED, (_A.LEAVE,)),
    (_S.ROLLING_BACK, _H.TIME_UP): (_S.ROLLING_BACK, (_A.FORCE,)),
    (_S.ROLLING_BACK, _H.DIED): (_S.SERVING, (_A.FINISH_ROLLBACK,)),
}


def step(state: State, fact: Fact) -> tuple[State, tuple[Action, ...]]:
    """What `fact` means in `state`: the next state, and what to do in this order."""
    return TABLE.get((state, fact.happened), (state, ()))
