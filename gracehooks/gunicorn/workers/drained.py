"""What our own worker classes have in common: the drain of `gracehooks.drain`, hung into gunicorn's worker.

A class serves with gunicorn's own loop, unchanged. When it is time to leave, `notify` raises `Leaving` at the top of that
loop; `run` catches it there and the class's `drain_requests` takes over what the loop has left: the listeners, the
connections, the pool. Then come the jobs and the callbacks, and then gunicorn's own exit with its hooks.

It relies on gunicorn's `Worker.run`, `notify`, `handle_exit`, `handle_quit`, `handle_abort`, `alive`, `max_requests`,
`tmp`, `PIPE`, and on `spawn_worker` being the caller of `init_process` (tests/contract/test_worker_base.py).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, Literal

from gunicorn.http.message import Message

from gracehooks import jobs
from gracehooks.drain import report
from gracehooks.drain.driver import Drain
from gracehooks.gunicorn.workers.attached import Attached
from gracehooks.jobs import tracker
from gracehooks.readiness import watch

__all__ = ["Drained", "Leaving"]


#: The shortest time between two heartbeats of the loop, in seconds.
BEAT = 0.25


class Leaving(BaseException):  # no error, and no `except Exception` may swallow it
    """The worker's turn: leave gunicorn's loop, the drain begins."""


class Drained(Attached):
    """A mixin, to be put before a gunicorn worker class; the class adds `drain_requests`."""

    drains = True
    #: Whether the sentinel may run the ends of jobs and the callbacks when the main thread is stuck; not in event loops.
    takes_over = True
    #: Whether `notify` raises `Leaving` when it is time; a class with a loop of its own asks `drain.look()` itself.
    leaves_at_notify = True
    #: What runs the requests. A class with "asyncio" calls `jobs.start_services()` itself, in its loop, after the boot.
    loop_kind: Literal["thread", "gevent", "asyncio"] = "thread"

    # gunicorn's own attributes, which have no types.
    cfg: Any
    log: Any
    app: Any
    ppid: int
    pid: Any
    nr: int
    tmp: Any
    booted: bool
    sockets: list[Any]
    max_requests: int
    PIPE: Any

    #: gunicorn's hook for the signal that ends the worker now, where its own thread may be stuck before it runs it.
    hook_before_exit: Any = None
    _next_beat = 0.0
    _alive = True
    _serving = False
    _recycle_at = sys.maxsize
    _server: Any = None
    drain: Drain

    # -- the life of the process -----------------------------------------------------------------------------------
    @classmethod
    def setup(cls) -> None:
        """gunicorn calls it in the master as soon as it knows the class, before it may preload the application."""
        stock = getattr(super(), "setup", None)
        if stock is not None:
            stock()
        if tracker.current() is None:
            tracker.forbid_in_this_process(
                "a job was submitted in the master, while the application was preloaded; it would be lost in the fork. "
                "Submit it in a request, or make it a service (@jobs.service), which every worker runs"
            )

    def load_wsgi(self) -> None:
        """Load the application, with the jobs at hand."""
        application = str(getattr(self.app, "app_uri", None) or "").partition(":")[0]
        jobs.install(self.page, self.settings, self.log, loop_kind=self.loop_kind, application=application)
        super().load_wsgi()

    def init_process(self) -> None:
        """Boot and run, under the eyes of the sentinel; the exit code says whether something was lost."""
        self._server = _caller()
        self._recycle_at, self.max_requests = self.max_requests, sys.maxsize
        self.drain = Drain(
            self.page,
            self.settings,
            self.log,
            self,
            parent=self.ppid,
            takes_over=self.takes_over,
            stacks=self.stacks.descriptor,
            descriptor=_descriptor(self.log),
        )
        watch(self.page)
        self._watch_the_exit()
        os.register_at_fork(after_in_child=self._forget_signals)
        os.register_at_fork(after_in_child=self.stacks.forget)
        self.drain.watch()
        super().init_process()
        if self.drain.exit_code:
            sys.exit(self.drain.exit_code)

    def run(self) -> None:
        """Serve as gunicorn does, until told to leave; then the phases."""
        hold_settings(self.cfg)
        self._serving = True
        self.drain.accepting_begins()
        try:
            self.serve()
        except Leaving:
            pass
        self._serving = False
        self._leave_if_hammered()
        if not self.drain.leaving:
            self.drain.told("the loop ended")
        self.drain.accepting_ends()
        self._alive = False
        try:
            self.drain_requests()
        except Exception:
            self.log.exception("gracehooks: the drain failed; its next phase begins")
        self.drain.finish()

    def became_ready(self) -> None:
        """The services begin once the worker serves: one that is told to leave before must not have begun anything."""
        super().became_ready()
        if self.loop_kind != "asyncio":
            jobs.start_services()

    def serve(self) -> None:
        """gunicorn's own loop."""
        super().run()  # type: ignore[misc]

    def drain_requests(self) -> None:
        """ACCEPTING_ENDS and REQUESTS: end them before `drain.deadline`, or return when it has passed."""
        raise NotImplementedError

    def notify(self) -> None:
        """The heartbeat, and the moment at which the worker leaves gunicorn's loop.

        gunicorn's loops call it at each turn; four beats a second are enough. The sentinel looks at the order and at the
        parent as often, so here it is one look at a flag.
        """
        if self.drain.leaving:
            self._leave_if_hammered()
            if self._serving and self.leaves_at_notify and self.at_loop():
                raise Leaving
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + BEAT
            super().notify()

    def _leave_if_hammered(self) -> None:
        # The exit that the handler raised inside of a request was swallowed: gunicorn's sync worker answers 500 then.
        if self.drain.hammered:
            self.drain.settle()
            sys.exit(self.drain.exit_code)

    def at_loop(self) -> bool:
        """Whether this call comes from gunicorn's loop; an application may call `notify` too."""
        return threading.get_ident() == threading.main_thread().ident

    @property
    def alive(self) -> bool:
        """gunicorn's own flag. What clears it while the worker serves (a hook, the reloader) begins the drain instead."""
        return self._alive

    @alive.setter
    def alive(self, alive: bool) -> None:
        if alive or not self._serving:
            self._alive = alive
        else:
            self.drain.told("the worker was asked to stop")

    def is_parent_alive(self) -> bool:
        """gunicorn's loops end when the parent has changed; the sentinel sees that, and ours drains."""
        return True

    # -- signals -----------------------------------------------------------------------------------------------------
    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: record it. A worker that still boots has nothing to lose and leaves at once."""
        del frame
        self.drain.told(signal.Signals(sig).name)
        if not self.booted:
            sys.exit(0)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGQUIT, SIGINT: the hammer. The report, gunicorn's `worker_int` hook, the exit; within half a second."""
        del frame
        self.take_hammer(signal.Signals(sig).name, self.cfg.worker_int)

    def handle_abort(self, sig: int, frame: Any) -> None:
        """SIGABRT, which gunicorn's master sends at a time-out: the same, with its `worker_abort` hook and code 1."""
        del sig, frame
        self.drain.exit_code = 1
        self.take_hammer("WORKER TIMEOUT", self.cfg.worker_abort)

    def take_hammer(self, reason: str, hook: Any) -> None:
        """Inside of the signal's handler: end the worker, with gunicorn's hook for that signal."""
        self._end_now(reason, hook)

    def _brace(self, reason: str, hook: Any) -> None:
        """What the handler of a class does whose own loop has to end the worker: that loop may be stuck."""
        self.drain.brace(reason)
        self.hook_before_exit = hook

    def _forget_signals(self) -> None:
        """In a child that the application has forked, which is no worker: TERM ends it, and no hammer reaches our page."""
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT):
            if getattr(signal.getsignal(each), "__self__", None) is self:
                signal.signal(each, signal.default_int_handler if each is signal.SIGINT else signal.SIG_DFL)

    def _end_now(self, reason: str, hook: Any) -> None:
        self._serving = self._alive = False
        code = self.drain.hammer(reason)
        hook(self)
        sys.exit(code)

    def close_listeners(self, listeners: Iterable[Any]) -> None:
        """Accepting ends; the second time nothing happens."""
        if self.sockets:
            for each in listeners:
                each.close()
            self.sockets = []
            self.drain.accepting_ended()

    # -- what the drain needs of its host (drain.driver.Host) ----------------------------------------------------------
    def beat(self) -> None:
        """The heartbeat alone, from any thread."""
        self.tmp.notify()

    def wake(self) -> None:
        """Wake the loop: it looks at gunicorn's own pipe."""
        if self.PIPE:
            try:
                os.write(self.PIPE[1], b"!")
            except OSError:
                pass  # full: it will wake anyway

    def has_left(self) -> bool:
        """Whether gunicorn's own loop is over: what the worker does now is its last."""
        return not self.alive

    def unread(self) -> int:
        """How many connections have begun to send a request that was not read to its end; a class that knows says it."""
        return 0

    def stands(self) -> str:
        """Where the boot stands: the main thread, which imports the application."""
        return report.in_short(threading.main_thread().ident or 0)

    def last_words(self) -> None:
        """What `spawn_worker` does last, in the place of a main thread that is stuck."""
        if self.hook_before_exit is not None:
            self.hook_before_exit(self)
        self.log.info("Worker exiting (pid: %s)", self.pid)
        try:
            self.cfg.worker_exit(self._server, self)
        except Exception:
            self.log.exception("Exception during worker exit")

    def _watch_the_exit(self) -> None:
        theirs = self.cfg.worker_exit

        def worker_exit(server: Any, worker: Any) -> None:
            try:
                theirs(server, worker)
            except Exception:
                self.log.exception("Exception during worker exit")  # in gunicorn's words
            self.drain.leave()

        self.cfg.set("worker_exit", worker_exit)

    # -- requests ------------------------------------------------------------------------------------------------------
    def ask_for_replacement(self) -> None:
        """`max_requests` is reached: the master brings a replacement, and until it is ready this worker serves on."""
        if not self.page.wants_replacement:
            self.page.wants_replacement = True
            self.log.info("gracehooks: max_requests reached, asking for a replacement")
            self.wake_master()


def hold_settings(cfg: Any) -> None:
    """Make each setting an attribute of its own, for this process, which has booted.

    gunicorn looks every setting up in two calls, some twenty times a request; that is more than all that we do there.
    What is set later is held anew.
    """
    stock = cfg.set

    def set_and_hold(name: str, value: Any) -> None:
        stock(name, value)
        if name in held:
            vars(cfg)[name] = cfg.settings[name].get()

    held = {name for name in cfg.settings if not hasattr(type(cfg), name) and name not in vars(cfg)}
    vars(cfg).update({name: cfg.settings[name].get() for name in held}, set=set_and_hold)


def announce(drain: Drain) -> None:
    """Have the answers of this process say `Connection: close` once the worker leaves.

    gunicorn asks `Message.should_close` when it writes an answer's head, and again when the answer is sent: a worker that
    is told to leave in between must not close a connection whose answer said that it stays. So what was said once stands.
    """
    stock = Message.should_close

    def should_close(message: Any) -> bool:
        said = getattr(message, "_said", None)
        if said is None:
            said = message._said = drain.leaving or stock(message)
        return said or message.must_close

    Message.should_close = should_close


def _caller() -> Any:
    """The arbiter, which is the `self` of `spawn_worker`: gunicorn gives it to `worker_exit` and to nobody else."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "spawn_worker":
        frame = frame.f_back  # type: ignore[assignment]
    return frame.f_locals.get("self") if frame is not None else None


def _descriptor(log: Any) -> int:
    """Where the error log goes, for what must be written without Python."""
    for handler in getattr(getattr(log, "error_log", None), "handlers", ()):
        if isinstance(handler, logging.StreamHandler):
            try:
                return int(handler.stream.fileno())
            except (AttributeError, OSError, ValueError):
                continue
    return 2
