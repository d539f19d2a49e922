"""Child processes: `jobs.popen` and `jobs.run`, the children that are born in a request, and their descendants.

What must hold:
- an exit code belongs to whoever started the child: we look at it (`WNOWAIT`) and never take it;
- the end of a child is noticed through its pidfd, by one thread for all of them that starts with the first one;
- `setsid` and a dead parent do not hide a descendant: this process is a subreaper, and we look for strays, some time
  after a child has ended and in the end;
- a child that the application started at import or boot is infrastructure: not counted, not waited for;
- a child that is just being started is nobody's stray.

A zombie that was adopted has no other parent than us, so it is reaped here, but only when nobody else in this process has
asked for it for a while: C code may wait for children that we know nothing of. Where there is no pidfd the thread looks
every 20 ms instead.
"""

from __future__ import annotations

import ctypes
import functools
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from gracehooks import requests
from gracehooks.errors import JobRejected
from gracehooks.jobs import tracker
from gracehooks.jobs.imports import when_imported
from gracehooks.jobs.infrastructure import is_infrastructure
from gracehooks.jobs.threads import start_thread
from gracehooks.jobs.tracker import Tracker, Work
from gracehooks.scoreboard import Outcome

__all__ = [
    "PROCESS",
    "Descendants",
    "become_subreaper",
    "note_boot",
    "patch",
    "popen",
    "run",
    "track_process",
]

_in_request = requests._current.get
_in_job = tracker.mark.get

#: A zombie that nobody in this process has asked for after these seconds was adopted, and is ours to reap.
ADOPTED_AFTER = 5.0
#: After the exit of a child we look for what it has left behind, so many seconds later, and at most so often; a look
#: reads all of `/proc`, so the pause is at least a hundred times as long as the last look took.
LOOK_AFTER, LEISURE = 1.0, 100.0
POLL = 0.02
#: How long what was started at boot may take to leave when its worker does, in seconds; after TERM, and after KILL.
PARTING = 0.2
_SIGNAL_GROUP = 4  # PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9
_HAS_PIDFD = hasattr(os, "pidfd_open")
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_TICKS = os.sysconf("SC_CLK_TCK")
#: While children are started without a pause, one that is younger than this is no stray yet, in seconds.
YOUNG = 2.0


class Owner(Protocol):
    """What knows the exit code of a child once it was waited for: a Popen, or something alike."""

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while nobody has waited for the child."""


class _Child:
    """The handle of a process job."""

    __slots__ = ("adopted", "asyncio", "fd", "leads_group", "owner", "pid", "stop_signal", "unknown_since")

    def __init__(self, pid: int, owner: Any, *, adopted: bool = False) -> None:
        self.pid = pid
        self.owner = owner
        self.adopted = adopted
        self.asyncio = False
        self.leads_group = False
        self.stop_signal: int = signal.SIGTERM
        self.unknown_since = 0.0
        self.fd = -1
        if _HAS_PIDFD:
            try:
                self.fd = os.pidfd_open(pid)
            except OSError:
                pass  # gone and reaped already, or a kernel without: the thread looks by itself

    def send(self, number: int) -> None:
        """Signal the child, and its group where it leads one; one that is gone is left alone."""
        try:
            if self.fd < 0:
                if self.owner is None or self.owner.returncode is None:
                    (os.killpg if self.leads_group else os.kill)(self.pid, number)
            elif not self.leads_group:
                signal.pidfd_send_signal(self.fd, number)
            else:
                try:
                    signal.pidfd_send_signal(self.fd, number, None, _SIGNAL_GROUP)
                except OSError as error:
                    if isinstance(error, ProcessLookupError):
                        raise
                    signal.pidfd_send_signal(self.fd, 0)  # it lives, so the number is still its own
                    os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def status(self) -> int | None:
        """The exit code, negative for a signal, without taking it; None while it runs.

        Raises ChildProcessError when it was taken and its owner does not know it (yet).
        """
        if hasattr(os, "waitid"):
            try:
                if self.fd >= 0:
                    found = os.waitid(os.P_PIDFD, self.fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                else:
                    found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                if self.owner is not None and self.owner.returncode is not None:
                    return int(self.owner.returncode)
                raise
            if found is None:
                return None
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        poll = None if self.asyncio else getattr(self.owner, "poll", None)
        code = getattr(self.owner, "returncode", None) if poll is None else poll()
        return code if code is None else int(code)

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _ProcessKind:
    name = "process"
    work = Work

    def cancel(self, work: Work) -> None:
        if work.handle is not None:
            work.handle.send(work.handle.stop_signal)

    def where(self, work: Work) -> str:
        if work.handle is None:
            return "has not begun"
        pid = work.handle.pid
        seen = _see(pid)
        return f"pid {pid} (state {seen.state})" if seen is not None else f"pid {pid}"

    def kill(self, work: Work) -> None:
        if work.handle is not None:
            work.handle.send(signal.SIGKILL)


PROCESS = _ProcessKind()


# -- the thread that notices exits -------------------------------------------------------------------------------
class _Watcher:
    """One thread that waits for the exits of all children of this process that are jobs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._selector.register(self._reader, selectors.EVENT_READ)
        self._new: list[Work] = []
        self._polled: list[Work] = []
        self._started = self._stopped = False
        self._look_at = 0.0
        self._pause = LOOK_AFTER

    def watch(self, work: Work) -> None:
        """Finish `work` when its process ends."""
        with self._lock:
            self._new.append(work)
            start, self._started = not self._started, True
        if start:
            start_thread(threading.Thread(target=self._turn, name="gracehooks-processes", daemon=True))
        try:
            os.write(self._writer, b"x")
        except BlockingIOError:
            pass  # it is awake

    def stop(self) -> None:
        """End the thread; for tests."""
        self._stopped = True
        os.write(self._writer, b"x")

    def _turn(self) -> None:
        while not self._stopped:
            try:
                self._once()
            except Exception:  # a thread that dies would leave every process job in flight for ever
                found = tracker.current()
                if found is not None:
                    found.log.exception("gracehooks: the watch over child processes stumbled")
                time.sleep(POLL)

    def _once(self) -> None:
        with self._lock:
            new, self._new = self._new, []
        for work in new:
            if work.handle.fd >= 0:
                self._selector.register(work.handle.fd, selectors.EVENT_READ, work)
            else:
                self._polled.append(work)
        now = time.monotonic()
        if self._polled:
            limit: float | None = POLL
        elif self._look_at:
            limit = max(0.0, self._look_at - now)
        else:
            limit = None
        for key, _ in self._selector.select(limit):
            if key.data is None:
                os.read(self._reader, 4096)
            else:
                self._selector.unregister(key.fd)
                self._look(key.data)
        polled, self._polled = self._polled, []
        for work in polled:
            self._look(work)
        if self._look_at and time.monotonic() >= self._look_at:
            self._look_round()

    def _look_round(self) -> None:
        started = time.monotonic()
        found = tracker.current()
        if found is not None and found.sweeper is not None and not found.closed:
            found.sweeper.adopt(found)  # what runs on without its parent shows as a job from now on
        again = reap_adopted()
        now = time.monotonic()
        self._pause = max(LOOK_AFTER, LEISURE * (now - started))
        self._look_at = now + self._pause if again else 0.0

    def _look(self, work: Work) -> None:
        child: _Child = work.handle
        try:
            code = child.status()
        except ChildProcessError:
            # Somebody is between waiting for it and saying what came out.
            now = time.monotonic()
            child.unknown_since = child.unknown_since or now
            if now - child.unknown_since < 1.0:
                self._polled.append(work)
                return
            ask = getattr(child.owner, "ask", None)
            code = ask() if ask is not None else None
            code = 1 if code is None else code
        if code is None:
            self._polled.append(work)
            return
        self._look_at = self._look_at or time.monotonic() + self._pause
        if child.adopted:
            _adopted.discard(child.pid)
        finish = Outcome.SUCCEEDED if code == 0 else Outcome.FAILED
        if code != 0 and work._delivered:
            finish = Outcome.CANCELLED
        child.close()
        child.owner = None  # the last reference reaps a child that nobody waits for
        work.tracker.finish(work, finish)


_watcher: _Watcher | None = None
_making = threading.Lock()


def _watch(work: Work) -> None:
    global _watcher
    with _making:
        if _watcher is None:
            _watcher = _Watcher()
    _watcher.watch(work)


def _after_fork_in_child() -> None:
    # The parent's children are not ours, and its thread does not run here.
    global _watcher, _making
    _watcher = None
    _making = threading.Lock()
    _infrastructure.clear()
    _adopted.clear()
    _zombies.clear()
    _starts.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


# -- the processes of this machine -------------------------------------------------------------------------------
class Seen:
    """A process as `/proc` shows it."""

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


def _see(pid: int) -> Seen | None:
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
    return {pid: seen for pid in pids if (seen := _see(pid)) is not None}


def _children(of: int, seen: Mapping[int, Seen]) -> list[Seen]:
    return [each for each in seen.values() if each.parent == of]


def _tree(of: Iterable[int], seen: Mapping[int, Seen]) -> list[int]:
    """They and their descendants, parents first: a script whose child is killed before it would go on to its next line."""
    found: list[int] = []
    level = set(of)
    while level:
        found += level
        level = {each.pid for each in seen.values() if each.parent in level} - set(found)
    return found


# -- whose child is it? ------------------------------------------------------------------------------------------
#: Children of this process that are no jobs: when each started, in ticks since boot.
_infrastructure: dict[int, int] = {}
#: Strays that the end has found and counted.
_adopted: set[int] = set()
_zombies: dict[int, float] = {}
#: The children that are being started at this moment, and the last one that was.
_starts: set[object] = set()
_last_start: object = None


@contextmanager
def _a_start() -> Iterator[None]:
    """A child is being started: until its pid is known somewhere it must not be taken for a stray."""
    global _last_start
    start = _last_start = object()
    _starts.add(start)
    try:
        yield
    finally:
        _starts.discard(start)


def _note_infrastructure(pid: int) -> None:
    seen = _see(pid)
    if seen is not None:
        _infrastructure[pid] = seen.started
    if len(_infrastructure) > 256:
        for old in [each for each, start in list(_infrastructure.items()) if not _is_same(each, start)]:
            _infrastructure.pop(old, None)


def _is_same(pid: int, start: int) -> bool:
    seen = _see(pid)
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
    known = {pid for pid, start in list(_infrastructure.items()) if _is_same(pid, start)} | _helpers()
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
    strays = [each for each in _children(os.getpid(), seen) if each.pid not in known and each.pid not in _adopted]
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
        for child in _children(os.getpid(), seen):
            if not child.alive or child.pid in known or child.pid in _adopted:
                continue
            if not sure and child.age < YOUNG:
                continue  # somebody is starting children all the time, and this may be one of them
            try:
                work = found.begin(PROCESS, _command(child.pid))
            except JobRejected:
                return
            _adopted.add(child.pid)
            _hold(work, _Child(child.pid, None, adopted=True), watch)
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
            _end_politely(pid for pid in _tree([os.getpid()], scan()) if pid not in spared)


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
    return [pid for pid in pids if (seen := _see(pid)) is not None and seen.alive]


def kill_descendants(*, infrastructure: bool = True) -> None:
    """Kill every descendant of this process; with `infrastructure` False spare what the application had at boot."""
    for _ in range(20):
        seen = scan()
        spared: set[int] = {os.getpid()}
        if not infrastructure:
            roots = [pid for pid, start in _infrastructure.items() if pid in seen and seen[pid].started == start]
            spared.update(_tree([*roots, *_helpers()], seen))
        tree = _tree([os.getpid()], seen)
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


def note_boot() -> None:
    """What runs below this process now was started at boot, and so was no job; an orphan of it is none either."""
    if _has_children():
        seen = scan()
        _infrastructure.update({pid: seen[pid].started for pid in _tree([os.getpid()], seen) if pid != os.getpid()})


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


def name_of(args: Any) -> str:
    """What the log and the report call a process: its program and first argument, no more; the rest may be secret."""
    if isinstance(args, (str, bytes, os.PathLike)):
        args = os.fsdecode(args).split()
    words = [os.fsdecode(word) for word in list(args)[:2]]
    if not words:
        return "process"
    first = os.path.basename(words[0]) or "process"
    return first if len(words) == 1 or "=" in words[1] or "\n" in words[1] else f"{first} {words[1][:60]}"


# -- starting ----------------------------------------------------------------------------------------------------
#: The job that a Popen of ours is made for.
_starting: ContextVar[object] = ContextVar("gracehooks_starting", default=None)
_UNCOUNTED = object()


def _hold(work: Work, child: _Child, watch: bool = True) -> None:
    work.handle = child
    work.tracker.page.job_pid(work.slot, child.pid)
    if work._due or work not in work.tracker:  # told to stop, or given up, while it was being started
        child.send(child.stop_signal if work in work.tracker else signal.SIGKILL)
    if watch:
        _watch(work)


def _attach(work: Work, pid: int, owner: Any, *, stop_signal: int = signal.SIGTERM, leads_group: bool = False) -> None:
    child = _Child(pid, owner)
    child.stop_signal = stop_signal
    child.leads_group = leads_group
    _hold(work, child)


def _popen(args: Any, stop_signal: int, keywords: dict[str, Any]) -> tuple[subprocess.Popen[Any], Work]:
    leads = True
    if keywords.get("start_new_session"):
        pass
    elif "process_group" in keywords:
        leads = keywords["process_group"] == 0
    elif sys.version_info >= (3, 11):
        keywords["process_group"] = 0
    else:
        keywords["start_new_session"] = True
    work = tracker.require().begin(PROCESS, name_of(args))
    with _a_start():
        token = _starting.set(work)
        try:
            process = subprocess.Popen(args, **keywords)
        except BaseException:
            work.tracker.finish(work, Outcome.FAILED)
            raise
        finally:
            _starting.reset(token)
        _attach(work, process.pid, process, stop_signal=stop_signal, leads_group=leads)
    return process, work


def popen(
    args: str | bytes | os.PathLike[str] | Sequence[str | bytes | os.PathLike[str]],
    *,
    stop_signal: int = signal.SIGTERM,
    **keywords: Any,
) -> subprocess.Popen[Any]:
    """Start a child process as a job, in a process group of its own.

    Takes what `subprocess.Popen` takes. When the jobs of this worker are told to stop, the group gets `stop_signal`.
    """
    return _popen(args, stop_signal, keywords)[0]


def run(
    args: str | bytes | os.PathLike[str] | Sequence[str | bytes | os.PathLike[str]],
    *,
    input: str | bytes | None = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    stop_signal: int = signal.SIGTERM,
    **keywords: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a child process as a job and wait for it; as `subprocess.run`, `timeout` in seconds.

    When it is told to stop, the return code is that of the stop signal, -15 for SIGTERM.
    """
    if input is not None:
        if keywords.get("stdin") is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        keywords["stdin"] = subprocess.PIPE
    if capture_output:
        if keywords.get("stdout") is not None or keywords.get("stderr") is not None:
            raise ValueError("stdout and stderr arguments may not be used with capture_output.")
        keywords["stdout"] = keywords["stderr"] = subprocess.PIPE
    process, work = _popen(args, stop_signal, keywords)
    with process:
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            _end(work, process)
            stdout, stderr = process.communicate()
            raise subprocess.TimeoutExpired(process.args, timeout or 0.0, output=stdout, stderr=stderr) from None
        except BaseException:
            _end(work, process)
            raise
    code = process.returncode
    if check and code:
        raise subprocess.CalledProcessError(code, process.args, output=stdout, stderr=stderr)
    return subprocess.CompletedProcess(process.args, code, stdout, stderr)


def _end(work: Work, process: subprocess.Popen[Any]) -> None:
    child = work.handle
    if child is not None and child.fd >= 0:
        child.send(signal.SIGKILL)
    else:
        process.kill()


def track_process(process: Any, name: str | None) -> None:
    """Count a child until it ends: a Popen, an asyncio or a multiprocessing process, or anything with a `pid`."""
    found = tracker.require()
    if getattr(process, "returncode", None) is not None or getattr(process, "exitcode", None) is not None:
        return
    work = found.begin(PROCESS, name or name_of(getattr(process, "args", None) or getattr(process, "name", "process")))
    _attach(work, process.pid, process)
    _infrastructure.pop(process.pid, None)


# -- born in a request -------------------------------------------------------------------------------------------
_undo: list[Callable[[], object]] = []


def _born(count: bool) -> Tracker | None:
    if not count or (_in_job() is None and _in_request() is None):
        return None
    return tracker.current()


def _patch_popen(count: bool) -> None:
    kind = subprocess.Popen  # gevent's, where it is patched in
    original = kind.__init__

    def __init__(self: Any, *args: Any, **keywords: Any) -> None:  # noqa: N807
        if _starting.get() is not None:
            original(self, *args, **keywords)
            return
        found = _born(count)
        work = None
        if found is not None:
            work = found.begin(PROCESS, name_of(args[0] if args else keywords.get("args", "process")))
        with _a_start():
            token = _starting.set(work or _UNCOUNTED)
            try:
                original(self, *args, **keywords)
            except BaseException:
                if work is not None:
                    work.tracker.finish(work, Outcome.FAILED)
                raise
            finally:
                _starting.reset(token)
            if work is None:
                _note_infrastructure(self.pid)
                return
            leads = bool(keywords.get("start_new_session")) or keywords.get("process_group") == 0
            _attach(work, self.pid, self, leads_group=leads)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            work.handle.asyncio = caller.startswith("asyncio")

    kind.__init__ = __init__  # type: ignore[method-assign]
    _undo.append(lambda: setattr(kind, "__init__", original))


def _patch_forks(count: bool) -> None:
    for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp"):
        original = getattr(os, name, None)
        if original is not None:
            setattr(os, name, _counted(original, name, count))
            _undo.append(lambda name=name, original=original: setattr(os, name, original))  # type: ignore[misc]


def _counted(original: Any, name: str, count: bool) -> Any:
    """`os.fork` and its like, with the child known before anybody looks for strays."""

    @functools.wraps(original)
    def start(*args: Any, **keywords: Any) -> Any:
        if _starting.get() is not None:  # a Popen's, or multiprocessing's
            return original(*args, **keywords)
        found = _born(count)
        work = None
        if found is not None:
            work = found.begin(PROCESS, name_of(args[:1]) if args else name)
        with _a_start():
            try:
                result = original(*args, **keywords)
            except BaseException:
                if work is not None:
                    work.tracker.finish(work, Outcome.FAILED)
                raise
            pid = result[0] if isinstance(result, tuple) else result
            if pid:  # in the parent
                if work is None:
                    _note_infrastructure(pid)
                else:
                    _attach(work, pid, None)
        return result

    return start


class _Exit:
    """A multiprocessing process as an owner of an exit code."""

    def __init__(self, process: Any) -> None:
        self._process = process

    @property
    def returncode(self) -> int | None:
        popen = self._process._popen
        return None if popen is None else popen.returncode

    def ask(self) -> int | None:
        """The exit code of one that the fork server started, which is no child of ours; it can be read only once."""
        code: int | None = self._process.exitcode
        return code


def _patch_multiprocessing(module: Any, count: bool) -> None:
    # The three ways to start one (fork, spawn, the fork server) have this in common, and no more.
    kind = module.BaseProcess
    original = kind.start
    if getattr(original, "__gracehooks__", False):
        return

    def start(self: Any) -> None:
        found = _born(count)
        work = None
        if found is not None and not is_infrastructure(self._target):
            work = found.begin(PROCESS, self.name)
        with _a_start():
            token = _starting.set(work or _UNCOUNTED)
            try:
                original(self)
            except BaseException:
                if work is not None:
                    work.tracker.finish(work, Outcome.FAILED)
                raise
            finally:
                _starting.reset(token)
            if work is None:
                _note_infrastructure(self.pid)
            else:
                _attach(work, self.pid, _Exit(self))

    start.__gracehooks__ = True  # type: ignore[attr-defined]
    kind.start = start
    _undo.append(lambda: setattr(kind, "start", original))


class _Transport:
    """A uvloop transport as an owner of an exit code."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    @property
    def returncode(self) -> int | None:
        code = self._transport.get_returncode()
        return code if code is None else int(code)


def _patch_uvloop(module: Any, count: bool) -> None:
    # uvloop forks by itself; asyncio's own loops come through Popen.
    for method in ("subprocess_exec", "subprocess_shell"):
        original = getattr(module.Loop, method)
        if getattr(original, "__gracehooks__", False):
            continue

        def patched(original: Any) -> Any:
            async def start(self: Any, protocol_factory: Any, *args: Any, **keywords: Any) -> Any:
                found = _born(count)
                work = None
                if found is not None:
                    work = found.begin(PROCESS, name_of(args[0] if len(args) == 1 else args))
                with _a_start():
                    try:
                        transport, protocol = await original(self, protocol_factory, *args, **keywords)
                    except BaseException:
                        if work is not None:
                            work.tracker.finish(work, Outcome.FAILED)
                        raise
                    if work is None:
                        _note_infrastructure(transport.get_pid())
                    else:
                        _attach(work, transport.get_pid(), _Transport(transport))
                return transport, protocol

            start.__gracehooks__ = True  # type: ignore[attr-defined]
            return start

        setattr(module.Loop, method, patched(original))
        _undo.append(lambda method=method, original=original: setattr(module.Loop, method, original))  # type: ignore[misc]


_counting: bool | None = None


def patch(*, count: bool) -> None:
    """Notice every child of this process from now on; with `count` those born in a request are jobs."""
    global _counting
    if _counting is not None:
        return
    _counting = count
    for child in _children(os.getpid(), scan()):
        _infrastructure[child.pid] = child.started
    _patch_popen(count)
    _patch_forks(count)
    when_imported("multiprocessing.process", lambda module: _patch_multiprocessing(module, count))
    when_imported("uvloop", lambda module: _patch_uvloop(module, count))


def unpatch() -> None:
    """Put everything back; for tests."""
    global _counting, _watcher
    _counting = None
    if _watcher is not None:
        _watcher.stop()
        _watcher = None
    while _undo:
        _undo.pop()()
    _infrastructure.clear()
    _adopted.clear()
