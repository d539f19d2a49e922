"""What every worker class has under gracehooks, the stock ones too.

A page on the scoreboard and a file for its last stacks, made in the master before the fork; a process group of its own, so
that a signal to the supervisor's group reaches the master alone; the reason of a boot that failed, where the master can
read it; and the word "ready", said once the worker really serves. It relies on gunicorn's `Worker.__init__`,
`init_process`, `load_wsgi`, `init_signals`, `notify` and `tmp` (tests/contract/test_worker_base.py).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

from gunicorn.workers.base import Worker as StockWorker

from gracehooks import processes, settings
from gracehooks.drain.watchdog import Stacks
from gracehooks.gunicorn.hooks import chain
from gracehooks.gunicorn.leftovers import MARK
from gracehooks.gunicorn.workers import ready
from gracehooks.gunicorn.workers.patience import Patient, needs_patience
from gracehooks.scoreboard import Order, Page, Phase

__all__ = ["Attached", "attached", "is_asgi"]

#: How many requests and jobs of one worker can have a name on its page; the page takes what it uses of its 6 MiB.
MOST_REQUESTS, MOST_JOBS = 8192, 16384


def is_asgi(worker_class: type) -> bool:
    """Whether the class serves ASGI applications: gunicorn's own, or one of uvicorn's."""
    return any(
        base.__module__.startswith(("gunicorn.workers.gasgi", "uvicorn_worker", "uvicorn.workers"))
        for base in worker_class.__mro__
    )


class Heartbeat:
    """gunicorn's `WorkerTmp` with the heartbeat on the page: a file's times have to wait for a disk that stands still."""

    def __init__(self, file: Any, page: Page) -> None:
        self._file = file
        self._page = page

    def notify(self) -> None:
        """Beat; in the worker."""
        self._page.heartbeat = time.monotonic()

    def last_update(self) -> float:
        """The last beat in monotonic seconds; in the master. A worker that boots has none yet, and is not late.

        A new file's time, gunicorn's, is of another clock and in the future.
        """
        return self._page.heartbeat or time.monotonic()

    def fileno(self) -> int:
        """That of gunicorn's file, which nothing is written to."""
        return int(self._file.fileno())

    def close(self) -> None:
        """Close gunicorn's file."""
        self._file.close()


class Attached:
    """A mixin, to be put before a gunicorn worker class."""

    #: Whether the first `notify` after the boot says that the worker is ready; a class that knows better sets it False
    #: and calls `became_ready` itself.
    ready_at_first_notify = True
    #: Closes what is the master's alone; set by the master's `Grace` when it attaches.
    close_in_worker: ClassVar[Callable[[], None] | None] = None
    #: Whether the class drains in phases; ours do, a stock class does what gunicorn does.
    drains = False
    #: The master's: until when a worker that was timed out is left alone, and what was asked of it when it had not heard.
    left_alone: Any = None
    asked: Any = None

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """gunicorn calls it in the master just before `when_ready`: from here gracehooks attaches itself."""
        stock = getattr(super(), "check_config", None)
        if stock is not None:
            stock(cfg, log)
        chain(cfg)

    def __init__(self, age: int, ppid: int, sockets: list[Any], app: Any, timeout: float, cfg: Any, log: Any) -> None:
        super().__init__(age, ppid, sockets, app, timeout, cfg, log)  # type: ignore[call-arg]
        self.page = Page(most_requests=MOST_REQUESTS, most_jobs=MOST_JOBS)
        self.tmp: Any = Heartbeat(self.tmp, self.page)
        self.stacks = Stacks()
        self.mark = f"{os.getpid()}.{time.monotonic_ns()}"
        self.settings = settings.current()

    def init_process(self) -> None:
        """Boot and run; an exception before the worker was ready leaves its reason on the page."""
        lead_own_group()
        os.environ[MARK] = self.mark
        if Attached.close_in_worker is not None:
            Attached.close_in_worker()
        try:
            super().init_process()  # type: ignore[misc]
        except BaseException as error:
            if not self.page.ready and not self.page.failure:
                self.page.failure = reason_of(error)
            raise

    def load_wsgi(self) -> None:
        """Load the application and, where `ready_path` is set, ask it once before the worker counts as ready."""
        super().load_wsgi()  # type: ignore[misc]
        path = self.settings.ready_path
        if path is None or is_asgi(type(self)):
            return
        failure = ready.ask_wsgi(self.wsgi, path)  # type: ignore[attr-defined]
        if failure:
            self.refuse_to_boot(failure)

    def refuse_to_boot(self, failure: str) -> None:
        """End the boot: the reason goes to the page and to the log, the exit code is gunicorn's own for it."""
        self.page.failure = failure
        self.log.error("gracehooks: %s", failure)  # type: ignore[attr-defined]
        sys.exit(3)

    def init_signals(self) -> None:
        """gunicorn's own handlers; USR2 and HUP are the master's, and their default action would kill a worker."""
        super().init_signals()  # type: ignore[misc]
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # A master that is killed tells nobody; a stock sync worker would notice after half its timeout.
        processes.signal_at_parents_end(signal.SIGTERM)
        if os.getppid() != self.ppid:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)

    def notify(self) -> None:
        """The heartbeat; the first one after the boot says that the worker is ready."""
        super().notify()  # type: ignore[misc]
        if self.ready_at_first_notify and not self.page.ready and self.booted:  # type: ignore[attr-defined]
            self.became_ready()

    def became_ready(self) -> None:
        """Say that the worker serves; a worker that was told to leave while it booted begins to leave now.

        A signal that arrives between the fork and `init_signals` runs the master's handler in this copy and is lost;
        the order on the page is not.
        """
        if self.page.ready:
            return
        self.page.phase = Phase.SERVING
        self.wake_master()
        if self.page.order >= Order.RETIRE:
            os.kill(os.getpid(), signal.SIGTERM)

    def wake_master(self) -> None:
        """Wake the master's loop: gunicorn takes a SIGCHLD with nothing to reap as a turn of its loop."""
        if os.getppid() == self.ppid:  # type: ignore[attr-defined]
            try:
                os.kill(self.ppid, signal.SIGCHLD)  # type: ignore[attr-defined]
            except ProcessLookupError:
                pass


def attached(worker_class: type) -> type:
    """`worker_class` with `Attached` in front; a class that has it already comes back as it is."""
    if issubclass(worker_class, Attached) or not issubclass(worker_class, StockWorker):
        return worker_class
    bases = (Attached, Patient, worker_class) if needs_patience(worker_class) else (Attached, worker_class)
    return type(worker_class.__name__, bases, {"__module__": worker_class.__module__})


def lead_own_group() -> None:
    """Lead a process group of its own, unless standard input is a terminal: a debugger must be able to read it."""
    try:
        if not os.isatty(0):
            os.setpgid(0, 0)
    except OSError:
        pass  # a session leader is the leader of its group already


def reason_of(error: BaseException) -> str:
    """The line that a person needs to see."""
    if isinstance(error, SystemExit):
        return f"exited with code {error.code if error.code is not None else 0} while booting"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1]}" if text else type(error).__name__
