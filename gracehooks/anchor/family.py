"""Looking at the anchor's descendants, in /proc (proc(5)). Where there is none, what cannot be seen is not there."""

from __future__ import annotations

import os

from gracehooks import processes
from gracehooks.anchor.machine import Master

__all__ = ["children", "descends", "handles", "masters", "user"]


def children(pid: int | None = None) -> list[int]:
    """The children of a process (of this one, unless given), zombies among them."""
    pid = os.getpid() if pid is None else pid
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return [int(each) for each in file.read().split()]
    except OSError:
        return sorted(processes.children_of({pid}))


def parent(pid: int) -> int:
    """The parent's pid; 0 where it is unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def descends(pid: int) -> bool:
    """Whether the process is this one or descends from it."""
    me = os.getpid()
    for _ in range(64):
        if pid == me:
            return True
        if pid <= 1:
            return False
        pid = parent(pid)
    return False


def user(pid: int) -> int:
    """The user that the process runs as; -1 where that cannot be seen."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return -1


def handles(pid: int, signal: int) -> bool:
    """Whether the process has a handler for the signal or ignores it; before that, the default action would end it.

    True also where that cannot be seen.
    """
    seen = False
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith((b"SigIgn:", b"SigCgt:")):
                    seen = True
                    if int(line.split()[1], 16) & 1 << (signal - 1):
                        return True
    except (OSError, ValueError, IndexError):
        return True
    return not seen


def masters(moored: dict[int, int], known: set[int]) -> tuple[Master, ...]:
    """Every master that is alive: those that are moored (pid and start time), those that are `known`, and our children
    that were started as the successor of another: gunicorn tells a successor by GUNICORN_PID, and a worker, which is
    forked without exec, shows the environment of its master.
    """
    found = {pid: Master(pid, True, _successor_of(pid), processes.started(pid)) for pid in moored}
    for pid in children():
        other = _successor_of(pid)
        if pid not in found and other and processes.alive(pid):
            found[pid] = Master(pid, False, other, processes.started(pid))
    for pid in known:
        if pid > 0 and pid not in found and processes.alive(pid):
            found[pid] = Master(pid, False, _successor_of(pid), processes.started(pid))
    return tuple(found.values())


def _successor_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            for each in file.read().split(b"\0"):
                if each.startswith(b"GUNICORN_PID="):
                    return int(each[13:])
    except (OSError, ValueError):
        pass
    return 0
