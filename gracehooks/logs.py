"""One subscriber to events: the lines that an operator reads. `GRACEHOOKS_LOG=json` makes each a JSON object.

The set is small and documented (docs/reference/events.md); every line begins with "gracehooks: " and carries generation
and pid. What else is said (what the budget is, where something is stuck) is a JSON object as well (`Wrapped`). Counters go
to statsd where gunicorn's own instrumentation is on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

from gracehooks import events

__all__ = ["LINES", "Logbook", "Wrapped", "wants_json"]

#: For each event: the level, and the line as a format over its facts.
LINES: dict[str, tuple[int, str]] = {
    "ServingStarted": (logging.INFO, "serving with {workers} workers, ready after {seconds:.2f} s"),
    "UpgradeStarted": (logging.INFO, "{kind} {id} started (pid {successor})"),
    "WorkerReady": (logging.DEBUG, "worker {worker} is ready after {seconds:.2f} s ({ready} of {workers})"),
    "WorkerBootFailed": (logging.ERROR, "worker {worker} did not become ready: {reason}"),
    "ProbationStarted": (logging.INFO, "{kind} {id}: every new worker is ready; old and new serve for {seconds:g} s"),
    "UpgradeCompleted": (logging.INFO, "{kind} {id} completed: the new generation serves (phases {phases})"),
    "UpgradeRolledBack": (
        logging.ERROR,
        "{kind} {id} rolled back: {reason}; the running generation serves on. Mend the release and try again",
    ),
    "UpgradeRefused": (logging.WARNING, "{kind} {id} refused: {reason}"),
    "UpgradeResumed": (logging.ERROR, "{kind} {id}: {reason}; this generation serves again"),
    "RetiringStarted": (logging.INFO, "retiring: {workers} workers finish what they have"),
    "GenerationRetired": (logging.INFO, "generation {retired} has left after {seconds:.2f} s, lost {lost}"),
    "MasterPromoted": (logging.INFO, "this master serves now ({reason})"),
    "StopStarted": (logging.INFO, "stopping ({reason}), within {budget:g} s"),
    "LameDuckStarted": (logging.INFO, "lame duck for {seconds:g} s: readiness answers 503, requests are served"),
    "AcceptingEnded": (logging.INFO, "no new connections; those that wait are served"),
    "WorkerRecycled": (logging.INFO, "worker {worker} reached max_requests; {replacement} is ready in its place"),
    "WorkerEnded": (logging.DEBUG, "worker {worker} ended ({reason}), answered {answered}, jobs {jobs}, lost {lost}"),
    "ForcedExit": (logging.ERROR, "worker {worker} was killed: {reason}"),
    "Stopped": (
        logging.INFO,
        "stopped after {seconds:.2f} s ({outcome}), answered {answered}, jobs {jobs}, lost {lost}",
    ),
}


def wants_json() -> bool:
    """Whether the operator asked for JSON lines (`GRACEHOOKS_LOG=json`)."""
    return os.environ.get("GRACEHOOKS_LOG", "").lower() == "json"


def lost_in_words(lost: events.Lost) -> str:
    """ "nothing", or what was lost, each with its age and its reason."""
    found = [
        f"{each.get('method', '?')} {each.get('path', '?')} ({each.get('age', 0):.1f} s, {each.get('reason', '')})"
        for each in lost.get("requests", ())
    ] + [
        f"job {each.get('id', '?')} {each.get('name', '')} ({each.get('age', 0):.1f} s, {each.get('reason', '')})"
        for each in lost.get("jobs", ())
    ]
    if not found:
        return "nothing"
    shown = "; ".join(found[:20])
    return shown + (f"; and {len(found) - 20} more" if len(found) > 20 else "")


class Wrapped(logging.Filter):
    """Makes a JSON object, on one line, of each line of gracehooks' that is not one yet: also of a stack of many lines."""

    def __init__(self, generation: int) -> None:
        super().__init__()
        self._generation = generation

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets every record pass."""
        text = record.getMessage()
        if text.startswith("gracehooks: "):
            facts = {
                "message": text,
                "level": record.levelname.lower(),
                "pid": os.getpid(),
                "generation": self._generation,
            }
            if record.exc_info:
                facts["exception"] = logging.Formatter().formatException(record.exc_info)
                record.exc_info = record.exc_text = None
            record.msg, record.args = "%s", (json.dumps(facts),)
        return True


class Logbook:
    """Logs each event on `log` (a gunicorn logger or a `logging.Logger`)."""

    def __init__(self, log: Any) -> None:
        self._log = log

    def __call__(self, event: events.Event) -> None:
        level, line = LINES.get(event.name, (logging.INFO, event.name))
        facts = event.facts()
        lost = facts.get("lost")
        if lost and (lost.get("requests") or lost.get("jobs")):
            level = logging.ERROR
        if wants_json():
            self._say(level, json.dumps({"message": f"gracehooks: {event.name}", **facts}, default=str))
        else:
            words = {**facts, "lost": lost_in_words(lost)} if lost is not None else facts
            self._say(level, f"gracehooks: {line.format(**words)} [generation {event.generation}, pid {event.pid}]")
        self._count(event)

    def _say(self, level: int, text: str) -> None:
        method: Callable[..., object] = {
            logging.DEBUG: self._log.debug,
            logging.INFO: self._log.info,
            logging.WARNING: self._log.warning,
        }.get(level, self._log.error)
        method("%s", text)

    def _count(self, event: events.Event) -> None:
        increment = getattr(self._log, "increment", None)  # gunicorn's logger where statsd is on
        if increment is None:
            return
        increment(f"gracehooks.{event.name}", 1)
        if isinstance(event, events.WorkerEnded):  # a stop and a retired generation only sum these up
            for what, lost in event.lost.items():
                if lost:
                    increment(f"gracehooks.lost_{what}", len(lost))
