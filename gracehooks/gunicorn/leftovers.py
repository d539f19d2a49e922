"""What a worker that was ended by force has left running, and its end.

Three ways lead to it, and none is enough alone: its process group (`setsid` leaves it), the children that its page names,
with their trees (who has lost its parent is in none), and the mark in the environment (a child may be given another one).
All are looked up before anything is killed: the end of a parent hides its children.
"""

from __future__ import annotations

import os
import signal

from gracehooks import processes
from gracehooks.scoreboard import Page

__all__ = ["MARK", "end_leftovers"]

#: The variable in a worker's environment that says whose every descendant is.
MARK = "_GRACEHOOKS_WORKER"
#: So often we look again for what was forked meanwhile.
ROUNDS = 5

_TICKS = os.sysconf("SC_CLK_TCK")


def end_leftovers(pid: int, page: Page, mark: str) -> None:
    """Kill whatever the worker `pid`, which has ended, has left behind."""
    killed: set[int] = set()
    for _ in range(ROUNDS):
        # Parents first: a script whose child is killed before it would go on to its next line.
        found = [*processes.tree_of(*_children(page)), *sorted(processes.marked(MARK, mark), key=processes.started)]
        processes.kill_group(pid)
        for each in found:
            processes.signal_process(each, signal.SIGKILL)
        if killed.issuperset(found):
            return
        killed.update(found)


def _children(page: Page) -> list[int]:
    """The child processes that were jobs of a worker which has ended, and that still run.

    They may have groups of their own, so the end of the worker's group did not reach them. A pid that was given to another
    process meanwhile is left alone: that process would have started after the job.
    """
    found = []
    for job in page.jobs():
        if job.pid > 1 and processes.alive(job.pid):
            # The monotonic clock stands still while the machine sleeps, the start time's does not: then nobody is killed.
            started = processes.started(job.pid) / _TICKS
            if started <= job.started + 1.0:
                found.append(job.pid)
    return found
