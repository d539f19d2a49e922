"""What descends from this process: what is nobody's job (infrastructure), and what is a job without a parent (a stray).

What must hold:
- `setsid` and a dead parent do not hide a descendant: this process is a subreaper, and we look for strays, some time
  after a child has ended and in the end;
- a child that the application started at import or boot is infrastructure: not counted, not waited for;
- a child that is just being started is nobody's stray.

A zombie that was adopted has no other parent than us, so it is reaped here, but only when nobody else in this process has
asked for it for a while: C code may wait for children that we know nothing of.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from gracehooks.errors import JobRejected
from gracehooks.jobs import children, tracker
from gracehooks.jobs.children import PROCESS, Child, adopted, hold, name_of
from gracehooks.jobs.tracker import Tracker
from gracehooks.processes import Seen, scan, see, tree_of

__all__ = [
    "Descendants",
    "a_start",
    "become_subreaper",
    "kill_descendants",
    "not_jobs",
    "note_boot",
    "note_children",
    "note_infrastructure",
    "reap_adopted",
]

#: A zombie that nobody in this process has asked for after these seconds was adopted, and is ours to reap.
ADOPTED_AFTER = 5.0
#: How long what was started at boot may take to leave when its worker does, in seconds; after TERM, and after KILL.
PARTING = 0.2
#: While children are started without a pause, one that is younger than this is no stray yet, in seconds.
YOUNG = 2.0

#: Children of this process that are no jobs: when each started, in ticks since boot.
not_jobs: dict[int, int] = {}
_zombies: dict[int, float] = {}
#: The children that are being started at this moment, and the last one that was.
_starts: set[object] = set()
_last_start: object = None


@contextmanager
def a_start() -> Iterator[None]:
    """A child is being started: until its pid is known somewhere it must not be taken for a stray."""
    global _last_start
    start = _last_start = object()
    _starts.add(start)
    try:
        yield
    finally:
        _starts.discard(start)


def note_infrastructure(pid: int) -> None:
    seen = see(pid)
    if seen is not None:
        not_jobs[pid] = seen.started
    if len(not_jobs) > 256:
        for old in [each for each, start in list(not_jobs.items()) if not _is_same(each, start)]:
            not_jobs.pop(old, None)


def _is_same(pid: int, start: int) -> bool:
    seen = see(pid)
    return seen is not None and seen.started == start


def _helpers() -> set[int]:
    """The pids of multiprocessing's own helpers."""
    found = set()
    for name, holder, field in (
        ("multiprocessing.resource_tracker", "_resource_tracker", "_pid"),
        ("multiprocessing.forkserver", "_forkserver", "_forkserver_pid"),
    ):
        pid = getattr(getattr(sys.modules.get(name), holder, None), field, None)
        if pid is not None:
            found.add(pid)
    return found


def _known() -> set[int]:
    """Children that have an owner in this process, as far as one can know."""
    known = {pid for pid, start in list(not_jobs.items()) if _is_same(pid, start)} | _helpers()
    found = tracker.current()
    if found is not None:
        known.update(work.handle.pid for work in found.active() if work.kind_of is PROCESS and work.handle is not None)
    for process in list(getattr(sys.modules.get("multiprocessing.process"), "_children", ())):
        if process.pid is not None:
            known.add(process.pid)
    # Popen objects that were dropped while their child ran.
    known.update(each.pid for each in list(getattr(subprocess, "_active", None) or ()))
    return known


def reap_adopted() -> bool:
    """Reap zombies that were adopted from descendants; whether any child is left that may become one."""
    seen, known = _scan_with_known()
    strays = [each for each in _own(seen) if each.pid not in known and each.pid not in adopted]
    now = time.monotonic()
    left = False
    for stray in strays:
        if stray.alive:
            left = True
        elif now - _zombies.setdefault(stray.pid, now) >= ADOPTED_AFTER * 0.9:
            _zombies.pop(stray.pid, None)
            try:
                os.waitid(os.P_PID, stray.pid, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                pass
        else:
            left = True
    for gone in set(_zombies) - {each.pid for each in strays}:
        _zombies.pop(gone, None)
    return left


def _look_at_children(patience: int) -> tuple[dict[int, Seen], set[int], bool]:
    """Every process, the known children, and whether no child was being started meanwhile."""
    for _ in range(patience):
        last = _last_start
        if not _starts:
            seen, known = _scan_with_known()
            if _last_start is last and not _starts:
                return seen, known, True
        time.sleep(0.001)
    return *_scan_with_known(), False


def _scan_with_known() -> tuple[dict[int, Seen], set[int]]:
    """Every process, and the children that were known before or after: one that ends meanwhile is in the scan still."""
    before = _known()
    seen = scan()
    return seen, before | _known()


class Descendants:
    """The sweeper: strays become jobs, so the end waits for them, tells them to stop, and reports them."""

    def adopt(self, found: Tracker, *, watch: bool = True) -> None:
        """Begin a job for each child that nobody knows, and with `watch` finish it when it ends."""
        seen, known, sure = _look_at_children(patience=200 if watch else 1)
        for child in _own(seen):
            if not child.alive or child.pid in known or child.pid in adopted:
                continue
            if not sure and child.age < YOUNG:
                continue  # somebody is starting children all the time, and this may be one of them
            try:
                work = found.begin(PROCESS, _command(child.pid))
            except JobRejected:
                return
            adopted.add(child.pid)
            hold(work, Child(child.pid, None, adopted=True), watch)
            if found.told:
                work.tell()

    def kill(self, *, infrastructure: bool) -> None:
        """Kill what is left of the trees of jobs and strays; with `infrastructure` every descendant."""
        kill_descendants(infrastructure=infrastructure)

    def before_atexit(self) -> None:
        """End those that multiprocessing would wait for at exit, for ever: what is no daemon and was started at boot."""
        children = list(getattr(sys.modules.get("multiprocessing.process"), "_children", ()))
        _end_politely([each.pid for each in children if not each.daemon and each.pid is not None])

    def part(self) -> None:
        """End what the application had beside its jobs; this process ends now.

        multiprocessing's helpers are left: they see the end of this process, clean up behind it, and leave.
        """
        if _has_children():
            spared = {os.getpid(), *_helpers()}
            _end_politely(pid for pid in tree_of(os.getpid(), seen=scan()) if pid not in spared)


def _end_politely(pids: Iterable[int]) -> None:
    """TERM, a moment, KILL."""
    left = list(pids)
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = _still(left)
        for pid in left:
            _kill(pid, number)
        until = time.monotonic() + PARTING
        while left and time.monotonic() < until:
            time.sleep(0.005)
            left = _still(left)


def _still(pids: list[int]) -> list[int]:
    return [pid for pid in pids if (seen := see(pid)) is not None and seen.alive]


def kill_descendants(*, infrastructure: bool = True) -> None:
    """Kill every descendant of this process; with `infrastructure` False spare what the application had at boot."""
    for _ in range(20):
        seen = scan()
        spared: set[int] = {os.getpid()}
        if not infrastructure:
            roots = [pid for pid, start in not_jobs.items() if pid in seen and seen[pid].started == start]
            spared.update(tree_of(*roots, *_helpers(), seen=seen))
        tree = tree_of(os.getpid(), seen=seen)
        doomed = [pid for pid in tree if pid not in spared and pid in seen and seen[pid].alive]
        if not doomed:
            return
        for pid in doomed:  # again and again: one of them may have forked meanwhile
            _kill(pid)
        time.sleep(0.002)


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    except (AttributeError, OSError):
        pass
    return True


def note_children() -> None:
    """The children of this process as it is now are infrastructure."""
    not_jobs.update({child.pid: child.started for child in _own(scan())})


def note_boot() -> None:
    """What runs below this process now was started at boot, and so was no job; an orphan of it is none either."""
    if _has_children():
        seen = scan()
        not_jobs.update({pid: seen[pid].started for pid in tree_of(os.getpid(), seen=seen) if pid != os.getpid()})


def become_subreaper() -> None:
    """Have orphaned descendants become our children, where the system can (Linux)."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    except (OSError, AttributeError):
        pass


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode("utf-8", "replace").split("\0")
    except OSError:
        words = []
    return name_of([word for word in words if word] or "process")


def _own(seen: dict[int, Seen]) -> list[Seen]:
    return [each for each in seen.values() if each.parent == os.getpid()]


def _look_for_strays() -> bool:
    found = tracker.current()
    if found is not None and found.sweeper is not None and not found.closed:
        found.sweeper.adopt(found)  # what runs on without its parent shows as a job from now on
    return reap_adopted()


children.look_for_strays = _look_for_strays


def _after_fork_in_child() -> None:
    # The parent's children are not ours.
    not_jobs.clear()
    _zombies.clear()
    _starts.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
