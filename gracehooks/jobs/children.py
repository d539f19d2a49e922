"""A child process as a job: its handle, and the thread that notices its end.

What must hold:
- an exit code belongs to whoever started the child: we look at it (`WNOWAIT`) and never take it;
- the end of a child is noticed through its pidfd, by one thread for all of them that starts with the first one. Where
  there is no pidfd the thread looks every 20 ms instead.
"""

from __future__ import annotations

import os
import selectors
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from gracehooks.jobs import tracker
from gracehooks.jobs.threads import start_thread
from gracehooks.jobs.tracker import Work
from gracehooks.processes import see
from gracehooks.scoreboard import Outcome

__all__ = ["PROCESS", "Child", "Owner", "adopted", "attach", "hold", "name_of", "stop_watching", "watch_for"]

#: After the exit of a child we look for what it has left behind, so many seconds later, and at most so often; a look
#: reads all of `/proc`, so the pause is at least a hundred times as long as the last look took.
LOOK_AFTER, LEISURE = 1.0, 100.0
POLL = 0.02
_SIGNAL_GROUP = 4  # PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9
_HAS_PIDFD = hasattr(os, "pidfd_open")

#: Strays that were found and are jobs now.
adopted: set[int] = set()
#: Looks for strays, and gives whether to look again; `descendants` does.
look_for_strays: Callable[[], bool] = lambda: False  # noqa: E731 - replaced by who knows


class Owner(Protocol):
    """What knows the exit code of a child once it was waited for: a Popen, or something alike."""

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while nobody has waited for the child."""


class Child:
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
        seen = see(pid)
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
            self._look_for_strays()

    def _look_for_strays(self) -> None:
        started = time.monotonic()
        again = look_for_strays()
        now = time.monotonic()
        self._pause = max(LOOK_AFTER, LEISURE * (now - started))
        self._look_at = now + self._pause if again else 0.0

    def _look(self, work: Work) -> None:
        child: Child = work.handle
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
            adopted.discard(child.pid)
        finish = Outcome.SUCCEEDED if code == 0 else Outcome.FAILED
        if code != 0 and work._delivered:
            finish = Outcome.CANCELLED
        child.close()
        child.owner = None  # the last reference reaps a child that nobody waits for
        work.tracker.finish(work, finish)


_watcher: _Watcher | None = None
_making = threading.Lock()


def watch_for(work: Work) -> None:
    """Finish `work` when its process ends."""
    global _watcher
    with _making:
        if _watcher is None:
            _watcher = _Watcher()
    _watcher.watch(work)


def stop_watching() -> None:
    """End the thread; for tests."""
    global _watcher
    if _watcher is not None:
        _watcher.stop()
        _watcher = None


def _after_fork_in_child() -> None:
    # The parent's children are not ours, and its thread does not run here.
    global _watcher, _making
    _watcher = None
    _making = threading.Lock()
    adopted.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


# -- a child becomes a job ---------------------------------------------------------------------------------------
def hold(work: Work, child: Child, watch: bool = True) -> None:
    work.handle = child
    work.tracker.page.job_pid(work.slot, child.pid)
    if work._due or work not in work.tracker:  # told to stop, or given up, while it was being started
        child.send(child.stop_signal if work in work.tracker else signal.SIGKILL)
    if watch:
        watch_for(work)


def attach(work: Work, pid: int, owner: Any, *, stop_signal: int = signal.SIGTERM, leads_group: bool = False) -> None:
    child = Child(pid, owner)
    child.stop_signal = stop_signal
    child.leads_group = leads_group
    hold(work, child)


def name_of(args: Any) -> str:
    """What the log and the report call a process: its program and first argument, no more; the rest may be secret."""
    if isinstance(args, (str, bytes, os.PathLike)):
        args = os.fsdecode(args).split()
    words = [os.fsdecode(word) for word in list(args)[:2]]
    if not words:
        return "process"
    first = os.path.basename(words[0]) or "process"
    return first if len(words) == 1 or "=" in words[1] or "\n" in words[1] else f"{first} {words[1][:60]}"
