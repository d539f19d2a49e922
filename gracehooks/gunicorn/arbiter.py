"""gunicorn's arbiter with our manners: every override in one place, each a line or two that hands over to `Grace`.

The running arbiter is made an instance of a class built over its own, so that a user's arbiter keeps its methods. It
relies on `handle_<name>`, `manage_workers` (the tick), `reap_workers`, `stop`, `reload`, `reexec`,
`maybe_promote_master`, `wait_for_signals` or `sleep`, `kill_worker` from `murder_workers`, and `_start_control_server`
(tests/contract/test_arbiter.py).
"""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gracehooks.gunicorn.master import Grace

__all__ = ["GracefulArbiter", "make_graceful"]


class GracefulArbiter:
    """A mixin, put before the class of the running arbiter."""

    grace: Grace

    # -- signals -------------------------------------------------------------------------------------------------
    def handle_usr2(self) -> None:
        """Upgrade."""
        self.grace.upgrade()

    def handle_hup(self) -> None:
        """Verified reload."""
        self.grace.reload()

    def handle_term(self) -> None:
        """Bounded stop."""
        self.grace.stop.begin("SIGTERM")

    def handle_int(self) -> None:
        """The hammer."""
        self.grace.stop.hammer("SIGINT")

    def handle_quit(self) -> None:
        """The hammer."""
        self.grace.stop.hammer("SIGQUIT")

    def handle_chld(self, *_: Any) -> None:
        """Only a wake-up: whoever ended is reaped in the tick. gunicorn 23 calls this inside the signal handler."""
        if _:
            self.wakeup()  # type: ignore[attr-defined]

    handle_cld = handle_chld

    # -- the loop ------------------------------------------------------------------------------------------------
    def wait_for_signals(self, timeout: float = 1.0) -> Any:
        """Look more often while something is under way."""
        return super().wait_for_signals(min(timeout, self.grace.pace()))  # type: ignore[misc]

    def sleep(self) -> None:
        """The same for gunicorn 23 and 24, whose loop waits on a pipe."""
        pipe = self.PIPE[0]  # type: ignore[attr-defined]
        try:
            if select.select([pipe], [], [], self.grace.pace())[0]:
                while os.read(pipe, 1):
                    pass
        except (BlockingIOError, InterruptedError):
            pass

    def manage_workers(self) -> None:
        """Our tick: gunicorn calls it at each turn of its loop."""
        self.grace.tick()

    def reap_workers(self) -> None:
        """Reap our own children only; an exit code that a hook waits for is the hook's."""
        self.grace.reap()

    def kill_worker(self, pid: int, sig: int) -> None:
        """A worker that `timeout` ends: SIGABRT, then time for its report and for its stacks, and only then SIGKILL."""
        if sig != signal.SIGKILL or self.grace.pool.may_kill(pid):
            super().kill_worker(pid, sig)  # type: ignore[misc]
        if sig == signal.SIGABRT:
            self.grace.pool.timed_out(pid)

    def maybe_promote_master(self) -> None:
        """A successor is promoted by a word on the channel, not by a look at its parent."""
        if not self.grace.is_successor:
            super().maybe_promote_master()  # type: ignore[misc]

    def stop(self, graceful: bool = True) -> None:
        """The last sweep, when the loop has ended."""
        self.grace.stop.sweep(graceful)

    def _start_control_server(self) -> None:
        """A successor has no control socket before it is promoted: the path is the old master's.

        gunicorn starts it after the first turn, in which a successor may have been promoted already: there is one only.
        """
        start = getattr(super(), "_start_control_server", None)  # gunicorn 25 and newer
        if start is not None and not self.grace.is_successor and getattr(self, "_control_server", None) is None:
            start()

    def _stop_control_server(self) -> None:
        """Only what was started can be stopped."""
        stop = getattr(super(), "_stop_control_server", None)
        if stop is not None:
            stop()


def make_graceful(arbiter: Any, grace: Grace) -> None:
    """Turn the running `arbiter` into a graceful one."""
    stock = type(arbiter)
    arbiter.grace = grace
    arbiter.__class__ = type(stock.__name__, (GracefulArbiter, stock), {"__module__": stock.__module__})
    set_up = signal.getsignal(signal.SIGCHLD) not in (signal.SIG_DFL, signal.SIG_IGN, None)
    if set_up and not hasattr(stock, "wait_for_signals"):
        # gunicorn 23 has bound the handler as it was when the signals were set up.
        signal.signal(signal.SIGCHLD, arbiter.handle_chld)
