"""What the unit tests of jobs share: a worker's jobs in this process, taken out again afterwards."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gracehooks import jobs, requests
from gracehooks.deadline import Deadline
from gracehooks.jobs import births, tasks, threads, tracker
from gracehooks.scoreboard import Page
from gracehooks.settings import Settings

__all__ = ["balanced", "end", "request", "worker"]

LOG = logging.getLogger("test.jobs")


@contextmanager
def worker(**settings: Any) -> Iterator[tracker.Tracker]:
    """This process as a worker."""
    before = tracker.current()
    found = jobs.install(Page(), Settings(**settings), LOG)
    try:
        yield found
    finally:
        if not found.closed:
            found.end(Deadline.after(0), 0)
        threads.unpatch()
        tasks.unpatch()
        births.unpatch()
        tracker.adopt(before)


@contextmanager
def request(page: Page | None = None) -> Iterator[None]:
    """A request is being handled here."""
    ticket = requests.begin(page or Page(1, 1), "GET", "/")
    try:
        yield
    finally:
        requests.end(ticket)


def end(found: tracker.Tracker, budget: float = 30.0, grace: float = 20.0) -> list[tracker.Abandoned]:
    """The end of the jobs."""
    return found.end(Deadline.after(budget), grace)


def balanced(found: tracker.Tracker) -> dict[str, int]:
    """The counts, once the equation was checked."""
    counts = found.counts()
    ended = counts["succeeded"] + counts["failed"] + counts["cancelled"] + counts["abandoned"]
    assert counts["accepted"] == ended, counts
    assert not len(found)
    assert found.page.jobs_in_flight == 0
    return counts
