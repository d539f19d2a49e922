"""The exit that nothing can stop: two of them, one inside the other.

The *sentinel* is a thread of its own that looks at the clock: when the thread that should have ended a phase has not done
so, because it is stuck itself, the sentinel reports and ends the process in its place. It needs the GIL, and nothing else.
The *last resort* needs not even that: `faulthandler`'s timer is a C thread that prints every stack and calls `_exit(1)`,
also while a C call holds the GIL for ever (a `threading.Timer` would wait for it). There is one such timer a process; from
the moment a worker is told to leave it is ours. It writes a stack in many small pieces, so each worker has a file of its own
for that (`Stacks`), and who reads it logs it whole. Knows no server and no settings.

The sentinel is a native thread under gevent too, and so uses nothing that gevent may have replaced.
"""

from __future__ import annotations

import _thread
import faulthandler
import io
import os
import select
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

from gracehooks.deadline import Deadline

__all__ = ["STACKS", "LastResort", "Sentinel", "Stacks", "native"]

#: The signal at which a worker prints every stack, also while a C call holds the GIL: for the master, before it kills one
#: that never learned that it should leave. A real-time signal, which nobody sends by chance; 0 where there are none.
STACKS = signal.SIGRTMIN + 11 if hasattr(signal, "SIGRTMIN") else 0

#: How often the sentinel looks around while nothing has been said to it, in seconds: a main thread that is stuck in C does
#: not run the signal's handler, so the order on the page and the parent's pid are looked at as well.
PACE = 0.25


def native(module: str, name: str) -> Any:
    """A function as the interpreter has it, also where gevent has replaced it."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module, name)
    return getattr(sys.modules.get(module) or __import__(module), name)


class Stacks:
    """A file without a name, made before the fork: `faulthandler` writes in the worker, the master reads after its end."""

    #: The most that is read, in bytes: faulthandler writes up to 100 frames of each of up to 100 threads, the oldest last.
    ROOM = 2 << 20

    def __init__(self) -> None:
        try:
            if hasattr(os, "memfd_create"):
                descriptor = os.memfd_create("gracehooks-stacks")
            else:
                with tempfile.TemporaryFile(buffering=0) as file:
                    descriptor = os.dup(file.fileno())
            self._file: io.FileIO | None = io.FileIO(descriptor, "r+")
        except OSError:
            self._file = None  # no descriptors or no room: the worker prints to its log

    @property
    def descriptor(self) -> int | None:
        """What `faulthandler` writes to; None where there is no such file."""
        return None if self._file is None or self._file.closed else self._file.fileno()

    @property
    def size(self) -> int:
        """How many bytes are written so far."""
        return 0 if self.descriptor is None else os.fstat(self.descriptor).st_size

    def read(self) -> str:
        """What is written so far."""
        descriptor = self.descriptor
        return "" if descriptor is None else os.pread(descriptor, self.ROOM, 0).decode(errors="replace").strip()

    def forget(self) -> None:
        """In a child that a worker has forked: what `faulthandler` writes there is not the worker's, and goes to stderr."""
        if self.descriptor is not None:
            try:
                os.dup2(2, self.descriptor, inheritable=False)
            except OSError:
                pass  # there is no stderr

    def close(self) -> None:
        """Once it is read; and in the other workers, which inherit it."""
        if self._file is not None:
            self._file.close()


class LastResort:
    """`faulthandler`'s timer: the process ends at a moment, whatever it does."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._deadline: Deadline | None = None

    def print_to(self, descriptor: int) -> None:
        """Print there from now on."""
        self._descriptor = descriptor
        if self._deadline is not None:
            self.arm(self._deadline)

    def arm(self, deadline: Deadline) -> None:
        """End the process at `deadline`, and print every stack; arming again moves the moment."""
        self._deadline = deadline
        try:
            faulthandler.dump_traceback_later(max(deadline.left(), 0.05), exit=True, file=self._descriptor)
        except (OSError, ValueError, RuntimeError):
            pass  # the descriptor is closed or the memory has run out; the master's SIGKILL is behind us

    def tell_stacks(self) -> None:
        """From now on print every stack at STACKS, and at a crash in C where nobody has asked `faulthandler` for it."""
        if STACKS:
            faulthandler.register(STACKS, file=self._descriptor)
        if not faulthandler.is_enabled():
            faulthandler.enable(file=self._descriptor)

    def disarm(self) -> None:
        """Let the process live."""
        self._deadline = None
        faulthandler.cancel_dump_traceback_later()


class Watched(Protocol):
    """What the sentinel watches."""

    def look(self) -> bool:
        """Look around; called at each turn."""

    def turn(self) -> float:
        """Do what is due; gives the seconds until the next turn."""


class Sentinel:
    """A native thread that gives `watched` a turn every PACE seconds, or sooner when it asks for it or is woken."""

    def __init__(self, watched: Watched, on_error: Callable[[BaseException], object]) -> None:
        self._watched = watched
        self._on_error = on_error
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        self._poll = native("select", "poll")()
        self._poll.register(self._reader, select.POLLIN)
        self.identifier = 0

    def start(self) -> None:
        """Start it, once, in the worker process: threads do not cross a fork."""
        self.identifier = native("_thread", "start_new_thread")(self._run, ())

    def wake(self) -> None:
        """Give it a turn now; safe in a signal handler."""
        try:
            os.write(self._writer, b"!")
        except OSError:
            pass  # full: it will wake anyway

    def is_here(self) -> bool:
        """Whether this is the sentinel's thread."""
        return bool(native("_thread", "get_ident")() == self.identifier)

    def _run(self) -> None:
        self.identifier = native("_thread", "get_ident")()
        pause = PACE
        while True:
            if self._poll.poll(max(0.0, pause) * 1000):
                try:
                    os.read(self._reader, 1024)
                except BlockingIOError:
                    pass
            try:
                self._watched.look()
                pause = min(PACE, self._watched.turn())
            except Exception as error:  # noqa: BLE001 - whatever happens, somebody must look at the clock
                self._on_error(error)
                pause = PACE


def allocate_lock() -> _thread.LockType:
    """A native lock, also under gevent: the sentinel and the hub's thread share it."""
    lock: _thread.LockType = native("_thread", "allocate_lock")()
    return lock
