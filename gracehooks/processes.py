"""Looking at processes and ending them: trees, start times, groups. Knows no server and waits for nobody.

Reads `/proc` (proc(5)); where there is none, a tree is only the process itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Mapping

__all__ = [
    "Seen",
    "alive",
    "ancestors",
    "children_of",
    "describe_status",
    "exit_status",
    "kill_group",
    "kill_tree",
    "marked",
    "oom_kills",
    "scan",
    "see",
    "signal_at_parents_end",
    "signal_process",
    "started",
    "tree_of",
]


_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_TICKS = os.sysconf("SC_CLK_TCK")


class Seen:
    """A process as `/proc` shows it; `started` is in clock ticks since boot."""

    __slots__ = ("parent", "pid", "started", "state")

    def __init__(self, pid: int, state: str, parent: int, started: int) -> None:
        self.pid = pid
        self.state = state
        self.parent = parent
        self.started = started

    @property
    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        return self.state not in "ZX"

    @property
    def age(self) -> float:
        """Seconds since it started."""
        return time.clock_gettime(_BOOT_CLOCK) - self.started / _TICKS


def see(pid: int) -> Seen | None:
    """The process now; None where it is gone or cannot be read."""
    try:
        # A scan reads hundreds of them: without a file object it takes three system calls each, not ten.
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fields = os.read(file, 1024).rpartition(b")")[2].split()
        finally:
            os.close(file)
        return Seen(pid, fields[0].decode(), int(fields[1]), int(fields[19]))
    except (OSError, IndexError, ValueError):
        return None


def scan() -> dict[int, Seen]:
    """Every process, by its pid; empty where there is no `/proc`."""
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return {}
    return {pid: seen for pid in pids if (seen := see(pid)) is not None}


def started(pid: int) -> int:
    """When the process started, in clock ticks since boot: with the pid, its identity. 0 where it is unknown."""
    found = see(pid)
    return found.started if found else 0


def alive(pid: int, start: int = 0) -> bool:
    """Whether the process runs (a zombie does not) and, where `start` is given, is still the same one."""
    found = see(pid)
    if found is None:
        if os.path.exists("/proc/self/stat"):
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    return found.alive and (not start or found.started == start)


def alive_since(pid: int, written: float) -> bool:
    """Whether the process runs, and is not a later one of the same pid than a file of that unix time (0: any) named."""
    start = started(pid)
    return alive(pid, start) and not (written and start and _started_at(start) > written + 2.0)


def _started_at(ticks: int) -> float:
    """The unix time of a start time in ticks since boot; 0.0 where it is unknown."""
    try:
        with open("/proc/stat") as file:
            boot = next(int(line.split()[1]) for line in file if line.startswith("btime "))
        return boot + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, StopIteration, ValueError):
        return 0.0


def children_of(pids: set[int], seen: Mapping[int, Seen] | None = None) -> set[int]:
    """The children of any of `pids`, now or as they were `seen`."""
    return {each.pid for each in (scan() if seen is None else seen).values() if each.parent in pids}


def ancestors(pid: int) -> list[int]:
    """The parents of a process, the nearest first, but for PID 1 where that is not the only one."""
    found: list[int] = []
    while (now := see(pid)) is not None and now.parent > 0 and now.parent not in found:
        pid = now.parent
        found.append(pid)
    return found


def tree_of(*pids: int, seen: Mapping[int, Seen] | None = None) -> list[int]:
    """The processes and every descendant, parents first: a script whose child is killed before it would run on."""
    seen = scan() if seen is None else seen
    tree, level = list(pids), set(pids)
    while level:
        level = children_of(level, seen) - set(tree)
        tree.extend(sorted(level))
    return tree


def marked(name: str, value: str) -> list[int]:
    """The running processes that were given `name=value` in their environment, as far as we may read it."""
    mark = f"\0{name}={value}\0".encode()
    found = []
    for each in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if each.isdigit():
            try:
                with open(f"/proc/{each}/environ", "rb") as file:
                    if mark in b"\0" + file.read():  # a zombie's is empty
                        found.append(int(each))
            except OSError:
                continue
    return found


def signal_process(pid: int, sig: int) -> bool:
    """Send `sig`; whether there was a process to take it."""
    try:
        os.kill(pid, sig)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def kill_group(pid: int) -> None:
    """SIGKILL to what is left of the process group that `pid` leads or led; never to our own group."""
    if pid <= 1 or pid == os.getpgrp():
        return
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def kill_tree(pid: int) -> list[int]:
    """SIGKILL to the process and every descendant; who was there."""
    tree = tree_of(pid)
    return [each for each in tree if signal_process(each, signal.SIGKILL)]


def signal_at_parents_end(sig: int) -> None:
    """Have the kernel send `sig` to this process when its parent ends (prctl(2), PR_SET_PDEATHSIG; Linux).

    It fires at the end of the thread that forked, so it is for children of a main thread; a change of user clears it.
    Where the system has none, nothing happens.
    """
    try:
        ctypes.CDLL(None).prctl(1, sig, 0, 0, 0)
    except (OSError, AttributeError):
        pass  # macOS: a worker learns of its parent's end at its next look


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory: of our control group, else of the whole machine.

    -1 where none of the counters can be read. A killed process counts in its own group, whoever ran out of memory: a group
    above it or the machine (memory.events of cgroup v2, memory.oom_control of v1, oom_kill in proc_vmstat(5)).
    """
    for name in _oom_counters():
        try:
            with open(name) as file:
                return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
        except (OSError, StopIteration, ValueError, IndexError):
            continue
    return -1


def _oom_counters() -> list[str]:
    found = []
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2)[1:] for line in file]
    except OSError:
        groups = []
    for controllers, path in groups:
        if not controllers:
            found.append(f"/sys/fs/cgroup{path}/memory.events")
        elif "memory" in controllers.split(","):
            # In a container the path may be the host's, and our group is what is mounted.
            found += [f"/sys/fs/cgroup/memory{each}/memory.oom_control" for each in (path, "")]
    return [*found, "/proc/vmstat"]


def exit_status(pid: int) -> int | None:
    """Take the status of the child `pid` as waitpid(2) gives it; None while it runs, 0 where somebody else has taken it."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return status if found else None


def describe_status(status: int) -> str:
    """A wait status in words: "exit code 1", "SIGKILL"."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return signal.Signals(number).name
        except ValueError:
            return f"signal {number}"
    return f"exit code {os.WEXITSTATUS(status)}"
