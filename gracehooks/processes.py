"""Looking at processes and ending them: trees, start times, groups. Knows no server and waits for nobody.

Reads `/proc` (proc(5)); where there is none, a tree is only the process itself.
"""

from __future__ import annotations

import ctypes
import os
import signal

__all__ = [
    "alive",
    "ancestors",
    "children_of",
    "describe_status",
    "exit_status",
    "kill_group",
    "kill_tree",
    "marked",
    "oom_kills",
    "signal_at_parents_end",
    "signal_process",
    "started",
    "tree_of",
]


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state, parent, start time in ticks) of a process, or None where it is gone or cannot be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[1]), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def started(pid: int) -> int:
    """When the process started, in clock ticks since boot: with the pid, its identity. 0 where it is unknown."""
    found = _stat(pid)
    return found[2] if found else 0


def alive(pid: int, start: int = 0) -> bool:
    """Whether the process runs (a zombie does not) and, where `start` is given, is still the same one."""
    found = _stat(pid)
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
    return found[0] not in "ZX" and (not start or found[2] == start)


def children_of(pids: set[int]) -> set[int]:
    """The children of any of `pids`."""
    found = set()
    try:
        names = os.listdir("/proc")
    except OSError:
        return set()
    for name in names:
        if name.isdigit():
            stat = _stat(int(name))
            if stat is not None and stat[1] in pids:
                found.add(int(name))
    return found


def ancestors(pid: int) -> list[int]:
    """The parents of a process, the nearest first, but for PID 1 where that is not the only one."""
    found: list[int] = []
    while (stat := _stat(pid)) is not None and stat[1] > 0 and stat[1] not in found:
        pid = stat[1]
        found.append(pid)
    return found


def tree_of(*pids: int) -> list[int]:
    """The processes and every descendant, parents first."""
    tree, level = list(pids), set(pids)
    while level:
        level = children_of(level) - set(tree)
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
