"""What the two event loop classes have in common: boot, serve, leave, in one coroutine of the worker's own loop.

What must hold:
- the signal handlers are plain ones, not the loop's: they must run while the loop is blocked;
- a worker counts as ready when its lifespan startup has ended and `ready_path` was answered; only then it listens;
- told to leave, it wakes at once, and the phases of the drain follow one another, each within its deadline;
- the lifespan shutdown is one of the shutdown callbacks: it comes after the last request and the last job;
- what swallows its cancellation at the very end is not waited for.

A class says how it starts, what its connections do and how it listens no more; see `LoopWorker`'s abstract methods. It
relies on gunicorn's `Worker` as `Drained` does.
"""

from __future__ import annotations

import asyncio
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from gracehooks import jobs, requests
from gracehooks.drain import cleanup, report
from gracehooks.gunicorn.workers import ready
from gracehooks.gunicorn.workers.calls import Application, Call, Calls
from gracehooks.gunicorn.workers.departure import Side, State, depart
from gracehooks.gunicorn.workers.drained import Drained
from gracehooks.gunicorn.workers.farewell import CLOSING, Farewell, unread, unsent
from gracehooks.jobs import tasks
from gracehooks.scoreboard import RequestInFlight

__all__ = ["Connections", "LoopWorker", "PlainSignals", "ServerLoop", "final_line", "overhear"]

#: The heartbeat while the worker serves, in seconds.
PACE = 1.0
#: How often it looks whether `max_requests` is reached, where there is such a limit, in seconds.
PACE_RECYCLING = 0.1
#: How long cancelled tasks may take to end at the very end, in seconds.
TASKS_AT_EXIT = 0.3


class PlainSignals:
    """A mixin, to be put before a stock class whose `init_signals` gives the signals to the event loop."""

    def init_signals(self) -> None:
        """gunicorn's own handlers of its base class, as plain signal handlers."""
        for each in self.SIGNALS:  # type: ignore[attr-defined]
            signal.signal(each, signal.SIG_DFL)
        for name in ("QUIT", "INT"):
            signal.signal(getattr(signal, f"SIG{name}"), self.handle_quit)  # type: ignore[attr-defined]
        signal.signal(signal.SIGTERM, self.handle_exit)  # type: ignore[attr-defined]
        signal.signal(signal.SIGABRT, self.handle_abort)  # type: ignore[attr-defined]
        signal.signal(signal.SIGUSR1, self.handle_usr1)  # type: ignore[attr-defined]
        signal.signal(signal.SIGWINCH, self.handle_winch)  # type: ignore[attr-defined]
        for each in (signal.SIGTERM, signal.SIGUSR1):
            signal.siginterrupt(each, False)


class ServerLoop:
    """The loop as the server's own protocols see it: the tasks that they create are no jobs, and are not looked at."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.create_task = tasks._original(type(loop)).__get__(loop, type(loop))
        self.create_future = loop.create_future
        self.call_later: Callable[..., Any] = loop.call_later
        self.call_soon = loop.call_soon
        self.time = loop.time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


class LoopWorker(Drained):
    """A mixin, to be put before a stock class that serves in an event loop."""

    takes_over = False
    leaves_at_notify = False
    ready_at_first_notify = False
    loop_kind = "asyncio"

    #: gunicorn's own flag, a plain one again: its protocols look at it several times for each request.
    alive = True
    event_loop: asyncio.AbstractEventLoop
    _woken: asyncio.Event | None = None
    _ending: tuple[str, Any] | None = None
    _side: Side | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = Calls(self.page)
        #: Answers that ended early: their application stopped when it was told of the drain.
        self.cut: list[tuple[str, str]] = []
        #: Connections that we have closed and the client has not.
        self.farewells: set[Farewell] = set()
        #: Protocols made for connections that were accepted, until somebody has let go of them.
        self.born: weakref.WeakSet[Any] = weakref.WeakSet()

    # -- what a class says of itself ---------------------------------------------------------------------------------
    def make_loop(self) -> asyncio.AbstractEventLoop:
        """The loop to run in."""
        raise NotImplementedError

    async def start_application(self) -> tuple[Application, dict[str, Any]]:
        """Run the lifespan startup, once; gives the application and the state of its lifespan.

        A failed startup is for `refuse_to_boot`.
        """
        raise NotImplementedError

    async def listen(self) -> None:
        """Begin to accept connections."""
        raise NotImplementedError

    async def tick(self) -> None:
        """What the server does now and then."""

    def answered_so_far(self) -> int:
        """How many requests count towards `max_requests`."""
        raise NotImplementedError

    def keepalive(self) -> float:
        """How long an idle connection is kept while the worker serves, in seconds."""
        return float(self.cfg.keepalive)

    def connections_made(self) -> list[Any]:
        """The protocols of the connections that were made and are not lost; from any thread."""
        raise NotImplementedError

    def state_of(self, connection: Any) -> State:
        """What a connection does; from any thread."""
        raise NotImplementedError

    def begin_leaving(self) -> Side:
        """From now on answers say `Connection: close`; gives the connections' side."""
        raise NotImplementedError

    def stop_listening(self) -> None:
        """Close the listeners of this process."""
        raise NotImplementedError

    # -- the life of the worker ----------------------------------------------------------------------------------------
    def run(self) -> None:
        """Boot, serve, leave; returns when the worker may exit."""
        loop = self.event_loop = self.make_loop()
        self._woken = asyncio.Event()
        self.drain.account = self._account
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._live())
        finally:
            self._serving = False
            self._end_loop(loop)

    async def _live(self) -> None:
        application, state = await self.start_application()
        if self.settings.ready_path is not None:
            failure = await ready.ask_asgi(application, self.settings.ready_path, state)
            if failure:
                self.refuse_to_boot(failure)
        # Every connection, and so every task of a request, inherits the context in which its listener was opened.
        mark = requests.mark()
        self.drain.accepting_begins()
        await self.listen()
        requests.unmark(mark)
        self._serving = True
        self.notify()
        self.became_ready()
        if not self.drain.look():
            jobs.start_services()
        pace = PACE if self._recycle_at == sys.maxsize else PACE_RECYCLING
        beaten = time.monotonic()
        while not self.drain.look():
            await self._pause(pace)
            if self.answered_so_far() >= self._recycle_at:
                self.ask_for_replacement()
            now = time.monotonic()
            if now - beaten >= PACE:
                beaten = now
                if not self.alive:
                    self.alive = True
                    self.drain.told("the worker was asked to stop")
                self.notify()
                await self.tick()
        self._serving = False
        await self._leave()

    async def _leave(self) -> None:
        drain = self.drain
        if self._ending is not None:
            self._end_now(*self._ending)
        drain.accepting_ends()
        side = self._side = self.begin_leaving()
        if drain.final:
            await self._accept_what_waits()
        await self._stop_accepting()
        deadline = drain.accepting_ended()
        try:
            await depart(side, deadline, self.settings.drain_timeout, self._linger, self._pause)
        except Exception:
            self.log.exception("gracehooks: the departure of the connections failed; the next phase begins")
        await drain.finish_async()

    async def _accept_what_waits(self) -> None:
        """Nobody else will accept: let the loop do it until no connection waits at any listener."""
        poll = select.poll()
        for each in self.sockets:
            try:
                poll.register(each.fileno(), select.POLLIN)
            except (OSError, ValueError):
                continue
        while not self.drain.deadline.passed and any(event & select.POLLIN for _, event in poll.poll(0)):
            await asyncio.sleep(0)

    def _linger(self, used: bool) -> float:
        # No client counts on more than the time for which connections are kept anyway.
        longest = self.drain.linger(used=used)
        return min(longest, self.keepalive()) if used else longest

    async def _stop_accepting(self) -> None:
        # asyncio makes the transport of an accepted connection a turn later, and drops the connection when the listener
        # has been closed meanwhile: first look no more, then wait some turns, then close.
        for each in self.sockets:
            self.event_loop.remove_reader(each.fileno())
        for _ in range(5):
            await asyncio.sleep(0)
        self.stop_listening()

    async def _pause(self, seconds: float) -> None:
        """Wait, at most until somebody wakes the loop."""
        woken = self._woken
        assert woken is not None
        timer = self.event_loop.call_later(seconds, woken.set)
        try:
            await woken.wait()
        finally:
            timer.cancel()
        woken.clear()
        if self._ending is not None:
            self._end_now(*self._ending)

    def wake(self) -> None:
        """Wake the loop; from a signal handler or any thread."""
        woken = self._woken
        if woken is not None:
            try:
                self.event_loop.call_soon_threadsafe(woken.set)
            except RuntimeError:
                pass  # it is closed: nobody waits any more

    def unread(self) -> int:
        """How many connections have begun to send a request that was not read to its end.

        Where the loop is blocked, what has arrived since is in the sockets.
        """
        return sum(1 for each in self.connections_made() if self._sends(each))

    def _sends(self, connection: Any) -> bool:
        if connection.transport is None or connection.transport.is_closing():
            return False
        state = self.state_of(connection)
        return state is State.READING or (state in (State.NEW, State.IDLE) and unread(connection.transport) > 0)

    def _account(self) -> dict[int, tuple[RequestInFlight, object]]:
        """The requests in flight and the answers that were cut; looked up when a report asks, not kept on the way."""
        found: dict[int, tuple[RequestInFlight, object]] = {**self.calls.in_flight(self.event_loop)}
        now = time.monotonic()
        for number, (method, path) in enumerate(
            (*self.cut, *(self._side.unsent() if self._side is not None else ())), 1
        ):
            found[-(1 << 62) - number] = (RequestInFlight(method, path, now, counted=False), None)
        return found

    def stands(self) -> str:
        """Where the boot stands: the lifespan's task, else the thread that imports."""
        loop = getattr(self, "event_loop", None)
        return report.in_short(threading.main_thread().ident or 0, asyncio.all_tasks(loop) if loop is not None else ())

    # -- signals -----------------------------------------------------------------------------------------------------
    def take_hammer(self, reason: str, hook: Any) -> None:
        """An exit raised here would end in whatever callback runs just now: the loop's own coroutine does it."""
        self._brace(reason, hook)
        self._ending = (reason, hook)
        self.wake()

    @property
    def should_exit(self) -> bool:
        """Whether the worker is leaving; libraries for server-sent events look for this name at the SIGTERM handler."""
        return self.drain.leaving

    # -- the end of the loop -------------------------------------------------------------------------------------------
    def _end_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel what still runs and close the loop; bounded, whatever a task does."""
        self.calls.leave_as_they_are()
        try:
            if not self.drain.hammered:
                loop.run_until_complete(_end_tasks(loop))
        except (Exception, asyncio.CancelledError):
            self.log.exception("gracehooks: the tasks of the worker could not be ended")
        finally:
            asyncio.set_event_loop(None)
            if not loop.is_running():
                loop.close()

    def add_lifespan_shutdown(self, shutdown: Callable[[], Awaitable[None]]) -> None:
        """Have the lifespan shutdown run among the shutdown callbacks, when its turn comes."""

        async def lifespan_shutdown() -> None:
            await shutdown()

        lifespan_shutdown.__qualname__ = "lifespan shutdown"
        cleanup.on_shutdown(lifespan_shutdown)

    # -- connections -----------------------------------------------------------------------------------------------
    def farewell(self, transport: Any, protocol: Any, patience: float = CLOSING) -> None:
        """Close a connection politely."""
        farewell = Farewell(transport, protocol, self.event_loop, patience, self.farewells.discard)
        self.farewells.add(farewell)
        if not transport.can_write_eof() or transport.is_closing():
            self.farewells.discard(farewell)
        farewell.begin()

    def hand_over(self, call: Call) -> None:
        """A call goes on after its answer was sent: from now on it is a job."""
        tasks.track_task(call.handle, f"{call.method} {call.path}, after its answer")


class Connections:
    """What the two classes' `departure.Side` have in common."""

    def __init__(self, worker: LoopWorker) -> None:
        self._worker: Any = worker
        self._tasks: set[Any] = set()

    def later(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Let it run; the worker does not leave before its end."""
        task = self._worker.event_loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def beginning(self) -> int:
        """Those whose TLS handshake is under way."""
        return sum(1 for each in list(self._worker.born) if each.transport is None)

    def ending(self) -> int:
        """Those whose client has not closed yet, and those that send."""
        sending = sum(1 for each in self._worker.connections_made() if unsent(each.transport))
        return len(self._worker.farewells) + len(self._tasks) + sending

    def calls_in_flight(self) -> int:
        """As the page counts them."""
        return int(self._worker.page.in_flight)

    def state(self, connection: Any) -> State:
        """The worker knows."""
        state: State = self._worker.state_of(connection)
        return state

    def transport(self, connection: Any) -> Any:
        """gunicorn and uvicorn keep it under that name."""
        return connection.transport


async def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    others = asyncio.all_tasks(loop) - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        done, _ = await asyncio.wait(others, timeout=TASKS_AT_EXIT)
        for task in done:
            if not task.cancelled():
                task.exception()  # it was said where it belongs, or it is the cancellation's own
    try:
        await asyncio.wait_for(loop.shutdown_asyncgens(), TASKS_AT_EXIT)
    except asyncio.TimeoutError:
        pass


def overhear(lifespan: Any, name: str, failed: list[str]) -> None:
    """Note in `failed` why the application says that its startup failed; `name` is the lifespan's method that it sends by."""
    send = getattr(lifespan, name)

    async def overheard(message: Any) -> None:
        if message["type"] == "lifespan.startup.failed":
            failed.append(final_line(message.get("message") or "the application gave no reason"))
        await send(message)

    setattr(lifespan, name, overheard)


def final_line(text: str) -> str:
    """The last line of a message that has something in it: of a traceback, the exception."""
    lines = [each.strip() for each in text.strip().splitlines() if each.strip()]
    return lines[-1] if lines else text
