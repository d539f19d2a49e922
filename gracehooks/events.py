"""Frozen facts, in the past tense: what happened to a generation, a worker, a request or a job.

`publish` gives a fact to every subscriber; logging is one of them, the user's `on_event` another. A subscriber that
raises is reported and never disturbs the server. Times are seconds. This module knows no server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = [
    "AcceptingEnded",
    "Event",
    "ForcedExit",
    "GenerationRetired",
    "LameDuckStarted",
    "MasterPromoted",
    "ProbationStarted",
    "RetiringStarted",
    "ServingStarted",
    "StopStarted",
    "Stopped",
    "UpgradeCompleted",
    "UpgradeRefused",
    "UpgradeResumed",
    "UpgradeRolledBack",
    "UpgradeStarted",
    "WorkerBootFailed",
    "WorkerEnded",
    "WorkerReady",
    "WorkerRecycled",
    "publish",
    "subscribe",
    "unsubscribe",
]

Lost = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Event:
    """What every event has: the pid of the master that says it, and its generation (1 for the first)."""

    pid: int
    generation: int

    @property
    def name(self) -> str:
        """The event's name, as in the reference."""
        return type(self).__name__

    def facts(self) -> dict[str, Any]:
        """The event as a flat dictionary, its name under "event"."""
        return {"event": self.name, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class ServingStarted(Event):
    """Every worker of the first start, or of a promoted generation, is ready."""

    workers: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class UpgradeStarted(Event):
    """A successor was started: a new master (kind "upgrade") or new workers beside the old (kind "reload")."""

    id: str
    kind: str
    successor: int


@dataclass(frozen=True, kw_only=True)
class WorkerReady(Event):
    """A worker became ready; `ready` of `workers` are."""

    worker: int
    ready: int
    workers: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class WorkerBootFailed(Event):
    """A worker ended before it was ready."""

    worker: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ProbationStarted(Event):
    """Every new worker is ready; old and new serve side by side for `seconds`."""

    id: str
    kind: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class UpgradeCompleted(Event):
    """The new generation serves and the old one begins to leave."""

    id: str
    kind: str
    successor: int
    phases: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class UpgradeRolledBack(Event):
    """The successor could not serve and is gone; the old generation goes on."""

    id: str
    kind: str
    reason: str
    phases: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class UpgradeRefused(Event):
    """An upgrade was asked for and not begun; nothing was changed."""

    id: str
    kind: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class UpgradeResumed(Event):
    """The new generation died while the old one was leaving; the old one serves again."""

    id: str
    kind: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RetiringStarted(Event):
    """The old generation begins to leave; its workers finish what they have."""

    workers: int


@dataclass(frozen=True, kw_only=True)
class GenerationRetired(Event):
    """The old generation has left, and this is what it lost."""

    id: str
    retired: int
    seconds: float
    lost: Lost


@dataclass(frozen=True, kw_only=True)
class MasterPromoted(Event):
    """This master is the serving one now, because of `reason` ("commit" or the death of the old master)."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class StopStarted(Event):
    """A stop has begun because of `reason` (a signal's name); it ends within `budget` seconds."""

    reason: str
    budget: float


@dataclass(frozen=True, kw_only=True)
class LameDuckStarted(Event):
    """Readiness says no and requests are still accepted, for `seconds`."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class AcceptingEnded(Event):
    """No new connection gets in; what is queued at the sockets is still served."""


@dataclass(frozen=True, kw_only=True)
class WorkerRecycled(Event):
    """A worker that reached `max_requests` begins to leave; its replacement is ready."""

    worker: int
    replacement: int


@dataclass(frozen=True, kw_only=True)
class WorkerEnded(Event):
    """A worker has ended, and this is what it lost; `reason` is "drained" or why it was not."""

    worker: int
    reason: str
    answered: int
    jobs: dict[str, int]
    lost: Lost


@dataclass(frozen=True, kw_only=True)
class ForcedExit(Event):
    """A worker did not leave in time and was killed, with its process group."""

    worker: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The server has stopped, and this is what was lost; `outcome` is "completed" or "forced"."""

    id: str
    outcome: str
    seconds: float
    answered: int
    jobs: dict[str, int] = field(default_factory=dict)
    lost: Lost = field(default_factory=lambda: {"requests": [], "jobs": []})


Subscriber = Callable[[Event], object]
_subscribers: list[Subscriber] = []


def subscribe(subscriber: Subscriber) -> None:
    """Give every event to `subscriber` from now on; subscribing twice is subscribing once."""
    if subscriber not in _subscribers:
        _subscribers.append(subscriber)


def unsubscribe(subscriber: Subscriber) -> None:
    """Give it no more events; one that never subscribed is ignored."""
    if subscriber in _subscribers:
        _subscribers.remove(subscriber)


def publish(event: Event) -> None:
    """Give `event` to every subscriber; what one of them raises is logged and goes no further."""
    for subscriber in tuple(_subscribers):
        try:
            subscriber(event)
        except Exception:  # a user's callback must not take the server down
            logging.getLogger("gunicorn.error").exception("gracehooks: a subscriber to events failed on %s", event.name)
