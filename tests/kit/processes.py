"""Which processes belong to a test's server, seen in /proc; how they end, and how they are ended.

A process is a server's when its environment or its working directory names the test's directory. The test process is a
child subreaper, so a master that outlives the one before it becomes our child, and its exit code can be read.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "MARK",
    "alive",
    "be_subreaper",
    "children",
    "kill",
    "of_directory",
    "reap",
    "session",
    "start_time",
    "state",
]

MARK = "GRACEKIT_DIRECTORY"
_PR_SET_CHILD_SUBREAPER = 36
_PIDFD_GETFD = 438  # on every architecture
_LIBC = ctypes.CDLL(None, use_errno=True)


def be_subreaper() -> None:
    """Adopt the orphans of our descendants (Linux); elsewhere nothing."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return []


def state(pid: int) -> str:
    """The letter of the process's state as proc(5) has it, "T" for one that stands still; "X" when there is none."""
    stat = _stat(pid)
    return stat[0] if stat else "X"


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    return state(pid) not in "ZX"


def session(pid: int) -> int:
    """The session of the process, also of a zombie; 0 when there is none."""
    stat = _stat(pid)
    return int(stat[3]) if stat else 0


def start_time(pid: int) -> int:
    """When the process started, in ticks: with the pid it names one process for ever; 0 when there is none."""
    stat = _stat(pid)
    return int(stat[19]) if stat else 0


def children(pid: int) -> list[int]:
    """The children of the process, zombies among them."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    except (OSError, ValueError):
        pass
    return found


@contextmanager
def sockets(pid: int) -> Iterator[dict[int, socket.socket]]:
    """Copies of the sockets of the process by its descriptors, for a look (pidfd_getfd(2)); OSError where that cannot be."""
    found: dict[int, socket.socket] = {}
    process = os.pidfd_open(pid)
    try:
        for each in os.listdir(f"/proc/{pid}/fd"):
            try:
                link = os.readlink(f"/proc/{pid}/fd/{each}")
            except FileNotFoundError:
                continue  # closed while we looked
            if not link.startswith("socket:"):
                continue
            copy = _LIBC.syscall(_PIDFD_GETFD, process, int(each), 0)
            if copy >= 0:
                found[int(each)] = socket.socket(fileno=copy)
            elif ctypes.get_errno() != errno.EBADF:
                raise OSError(ctypes.get_errno(), "pidfd_getfd")
        yield found
    finally:
        os.close(process)
        for copied in found.values():
            copied.close()


def of_directory(directory: str) -> list[int]:
    """The running processes whose environment or working directory is of `directory`, this one excepted."""
    mark = f"{MARK}={directory}\0".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        pid = int(entry)
        try:
            with open(f"/proc/{entry}/environ", "rb") as environ:
                ours = mark in environ.read()
            if not ours:
                where = os.readlink(f"/proc/{entry}/cwd").removesuffix(" (deleted)")
                ours = where == directory or where.startswith(directory + "/")
        except OSError:
            continue
        if ours and alive(pid):
            found.append(pid)
    return found


def kill(pids: list[int], signal_number: int = signal.SIGKILL) -> None:
    """Send the signal to each of them that is there; one that is stopped is told to go on as well."""
    for pid in pids:
        try:
            os.kill(pid, signal_number)
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass


def reap(sessions: set[int], codes: dict[int, int]) -> None:
    """Reap our children that ended and are of one of `sessions`; their exit codes go to `codes`."""
    for pid in children(os.getpid()):
        stat = _stat(pid)
        if not stat or stat[0] != "Z" or int(stat[3]) not in sessions:
            continue
        try:
            got, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue
        if got == pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
