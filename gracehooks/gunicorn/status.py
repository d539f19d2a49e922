"""What the status file, systemd's status line and statsd are told of a master: read, never decided, here.

What must hold: the file is written when something has changed and not otherwise; what changes all the time (requests and
jobs in flight) is written at most once a second.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from gracehooks import processes
from gracehooks.systemd.machine import Situation

if TYPE_CHECKING:
    from gracehooks.gunicorn.master import Grace

__all__ = ["Status"]

#: Between two writes where only requests and jobs have changed, in seconds.
AT_MOST_EVERY = 1.0
#: How many of a worker's requests and jobs it lists, the oldest ones; the file is written at each change.
LISTED = 256


class Status:
    """Tells of `master`."""

    def __init__(self, master: Grace) -> None:
        self._master = master
        self._arbiter = master.arbiter
        self._written: tuple[Any, Any] | None = None
        self._failed = False
        self._at = 0.0

    def state(self) -> str:
        """The state in the status file."""
        master = self._master
        if master.stop.under_way:
            return "lame_duck" if master.stop.lame_duck else "stopping"
        if master.retiring:
            return "retiring"
        return "serving" if master.served else "booting"

    def write(self, now: bool = False, state: str | None = None) -> None:
        """Write the status file where something has changed, or `now`; only the master that serves has one."""
        master = self._master
        if master.is_successor or master.retiring:
            return
        state = state or self.state()
        pages = [(pid, worker.page) for pid, worker in self._arbiter.WORKERS.items()]
        draining = [(each.generation, each.pid) for each in master.takeover.alive()]
        phases = {pid: page.phase for pid, page in pages}
        coarse = (state, phases, draining, repr(master.driver.last))
        moment = time.monotonic()
        # A disk that is full is asked again, but not at each turn either.
        patient = self._failed or (self._written is not None and coarse == self._written[0])
        if not now and patient and moment - self._at < AT_MOST_EVERY:
            return
        workers = [
            (pid, page.requests(LISTED), page.in_flight, page.jobs(LISTED), page.jobs_in_flight) for pid, page in pages
        ]
        if not now and self._written == (coarse, workers) and not self._failed:
            return
        self._written, self._at = (coarse, workers), moment
        masters = {os.getpid(), *(pid for _, pid in draining)}  # each of them is a child of the one before it
        self._failed = not master.book.write_status(
            {
                "generation": master.generation,
                "master_pid": os.getpid(),
                "state": state,
                "stop_budget": master.settings.stop_budget,
                "draining": [
                    {
                        "generation": generation,
                        "master_pid": pid,
                        "workers": len(processes.children_of({pid}) - masters),
                    }
                    for generation, pid in draining
                ],
                "workers": [
                    {
                        "pid": pid,
                        "phase": phases[pid].name.lower(),
                        "requests": [
                            {"method": each.method, "path": each.path, "age": round(each.age, 3)} for each in requests
                        ],
                        "jobs": [
                            {"id": each.id, "name": each.name, "kind": each.kind, "age": round(each.age, 3)}
                            for each in jobs
                        ],
                        "requests_in_flight": requests_in_flight,
                        "jobs_in_flight": jobs_in_flight,
                    }
                    for pid, requests, requests_in_flight, jobs, jobs_in_flight in workers
                ],
                "upgrade": master.driver.last or None,
                "at": round(time.time(), 3),
            }
        )

    def situation(self) -> Situation:
        """What systemd's status line is made of."""
        master, last = self._master, self._master.driver.last
        pages = [worker.page for worker in self._arbiter.WORKERS.values()]
        return Situation(
            generation=master.generation,
            workers=self._arbiter.num_workers,
            ready=sum(worker.page.ready for _, worker in master.pool.members()),
            new_ready=last.get("workers_ready", 0),
            new_workers=last.get("workers", 0),
            draining=len(master.takeover.alive()),
            leaving=len(pages),
            requests=sum(page.in_flight for page in pages),
            jobs=sum(page.jobs_in_flight for page in pages),
            kind=last.get("kind", "upgrade"),
            phase=last.get("state", ""),
        )

    def measure(self) -> None:
        """gunicorn's own gauges, which its `manage_workers` would send: here, since ours took its place."""
        arbiter, number = self._arbiter, len(self._arbiter.WORKERS)
        if arbiter._last_logged_active_worker_count != number:
            arbiter._last_logged_active_worker_count = number
            extra = {"metric": "gunicorn.workers", "value": number, "mtype": "gauge"}
            arbiter.log.debug(f"{number} workers", extra=extra)
        if getattr(arbiter.cfg, "enable_backlog_metric", False):  # gunicorn 24 and newer
            waiting = sum(each.get_backlog() or 0 for each in arbiter.LISTENERS)
            if waiting >= 0:
                extra = {"metric": "gunicorn.backlog", "value": waiting, "mtype": "histogram"}
                arbiter.log.debug(f"socket backlog: {waiting}", extra=extra)
