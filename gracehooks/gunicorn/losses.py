"""What a worker has lost, read from its page after its end."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gracehooks import processes
from gracehooks.scoreboard import Page

__all__ = ["Losses", "OutOfMemory", "losses_of", "never_accepted"]


class OutOfMemory:
    """Which of the SIGKILLs that workers end by are the kernel's: it counts those that it sends for want of memory.

    The count says how many, not whom. So each is put down to one worker, and one that nobody ended by within RECENT seconds
    was for another process: a job's, or a neighbour's.
    """

    RECENT = 5.0

    def __init__(self, count: Callable[[], int] = processes.oom_kills) -> None:
        self._count = count
        self._explained = self._soon_explained = count()
        self._looked = float("-inf")

    def look(self, now: float) -> None:
        """Forget what nobody ended by; cheap, for each turn of a loop. `now` is monotonic seconds."""
        if now - self._looked >= self.RECENT:
            self._looked = now
            self._explained, self._soon_explained = max(self._explained, self._soon_explained), self._count()

    def reason(self) -> str:
        """Why a worker has ended by a SIGKILL that the master did not send."""
        count = self._count()
        if count < 0:
            return "killed by SIGKILL (by hand, or out of memory)"
        if count <= self._explained:
            return "killed by SIGKILL"
        self._explained += 1
        return "killed by the kernel: out of memory"


@dataclass
class Losses:
    """What was lost and what was done, of one worker or of several."""

    lost: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"requests": [], "jobs": []})
    jobs: dict[str, int] = field(default_factory=dict)
    answered: int = 0

    def add(self, other: Losses) -> None:
        """Add another's."""
        for what in ("requests", "jobs"):
            self.lost[what].extend(other.lost[what])
        for name, count in other.jobs.items():
            self.jobs[name] = self.jobs.get(name, 0) + count
        self.answered += other.answered


def losses_of(page: Page, pid: int, reason: str) -> Losses:
    """The losses of the worker `pid`: its own report where it could write one (it has stacks), else its slots.

    A job that was in flight at the end counts as abandoned, so that the sum holds after a SIGKILL too.
    """
    told: dict[str, Any] = {}
    if page.report:
        try:
            told = json.loads(page.report)
        except ValueError:
            told = {}
    common = {"worker": pid, "reason": reason}
    stacks: dict[tuple[str, str], deque[str]] = {}
    for each in told.get("requests", ()):
        if each.get("where"):
            stacks.setdefault((each.get("method"), each.get("path")), deque()).append(each["where"])
    requests: list[dict[str, Any]] = []
    for slot in page.requests():
        entry: dict[str, Any] = {"method": slot.method, "path": slot.path, "age": round(slot.age, 3), **common}
        mine = stacks.get((slot.method, slot.path))
        if mine:
            entry["where"] = mine.popleft()
        requests.append(entry)
    unnamed = page.in_flight - len(requests)
    requests += [
        {"method": each.get("method", "?"), "path": each.get("path", "?"), "age": each.get("age", 0.0), **common}
        for each in told.get("requests", ())
        if not each.get("counted", True)
    ]
    requests += [{"method": "?", "path": "?", "age": 0.0, **common} for _ in range(max(0, unnamed))]
    jobs = [{**each, **common, "reason": each.get("reason", reason)} for each in told.get("jobs", ())]
    known = {each.get("id") for each in jobs}
    jobs += [
        {"id": each.id, "name": each.name, "kind": each.kind, "age": round(each.age, 3), **common}
        for each in page.jobs()
        if each.id not in known
    ]
    counts = page.counts()
    # What is in flight, and one whose worker was killed between the two stores that end a job.
    counts["abandoned"] = counts["accepted"] - counts["succeeded"] - counts["failed"] - counts["cancelled"]
    # Those that had no slot, and those that were given up by a worker which was killed before it could report them.
    unnamed = counts["abandoned"] - len(jobs)
    jobs += [{"id": 0, "name": "?", "kind": "?", "age": 0.0, **common} for _ in range(max(0, unnamed))]
    return Losses({"requests": requests, "jobs": jobs}, counts, page.answered)


def never_accepted(count: int) -> Losses:
    """The requests that waited at a listener to the end of a stop, since every worker that was left was stuck."""
    entry = {"method": "?", "path": "?", "age": 0.0, "worker": 0, "reason": "no worker was left to accept it"}
    return Losses({"requests": [dict(entry) for _ in range(count)], "jobs": []})
