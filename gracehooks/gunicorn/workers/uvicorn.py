"""`gracehooks.UvicornWorker`: uvicorn under gunicorn, with h11 or httptools, asyncio or uvloop, that leaves without losing.

While it serves, uvicorn's own protocols serve; of ours there is one layer round the application, which counts the request
(see `calls`), and in `receive` the place where a drain can be told. When the worker leaves, the protocols of the open
connections are changed in three points: their answers carry `Connection: close`, their `close` is polite, and their
keep-alive timers are ours.

It relies on uvicorn's `Config.load`, `loaded_app`, `http_protocol_class`, `ws_protocol_class`, `Server.startup`,
`server_state`, `servers`, the protocols' `cycle`, `pipeline`, `transport`, `timeout_keep_alive`, and on
`RequestResponseCycle` with `receive`, `default_headers`, `response_started`, `response_complete`, `more_body`,
`message_event`, which is set while there is something to receive (tests/contract/test_uvicorn.py).
"""

from __future__ import annotations

import asyncio
import copy
import signal
import sys
import weakref
from collections.abc import Iterable
from typing import Any

from gracehooks.errors import ConfigError
from gracehooks.gunicorn.workers.calls import Application, Call, Calls
from gracehooks.gunicorn.workers.departure import State
from gracehooks.gunicorn.workers.farewell import (
    CLOSING,
    UNNOTICED,
    UNNOTICED_LATE,
    PoliteTransport,
    limit_buffer,
    unsent,
    writes_late,
)
from gracehooks.gunicorn.workers.loop import Connections, LoopWorker, PlainSignals, ServerLoop, overhear

try:
    import uvicorn_worker
    from uvicorn.server import Server
except ImportError as error:
    raise ConfigError(
        f"gracehooks.UvicornWorker needs uvicorn and uvicorn-worker ({error}); install gracehooks[uvicorn]"
    ) from error

__all__ = ["UvicornWorker"]

CLOSE = (b"connection", b"close")
SERVICE_RESTART = 1012
#: The drain closes idle connections itself: uvicorn's timer must not, while a request may be on its way.
NEVER = 1e6
DISCONNECT = {"type": "http.disconnect"}


class UvicornWorker(LoopWorker, PlainSignals, uvicorn_worker.UvicornWorker):
    """The `worker_class` of `gracehooks.UvicornWorker`.

    `CONFIG_KWARGS` of a subclass chooses protocols and loop, as with uvicorn's own worker class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The heartbeat and the limit of requests are ours.
        self.config.callback_notify = None
        self.config.limit_max_requests = None
        self.server: Any = None

    # -- starting ----------------------------------------------------------------------------------------------------
    def make_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that the configuration asks for; uvicorn before 0.36 has set a policy instead."""
        factory_of = getattr(self.config, "get_loop_factory", None)
        factory = factory_of() if factory_of is not None else None
        loop: asyncio.AbstractEventLoop = (factory or asyncio.new_event_loop)()
        return loop

    async def start_application(self) -> tuple[Application, dict[str, Any]]:
        """uvicorn's own lifespan, and our layer round the application."""
        config = self.config
        self.calls.late = writes_late(self.event_loop)
        config.app = self.wsgi
        if not config.loaded:
            config.load()
        server = self.server = Server(config=config)
        lifespan = config.lifespan_class(config)
        failed: list[str] = []
        if hasattr(lifespan, "send"):
            overhear(lifespan, "send", failed)
        await lifespan.startup()
        if lifespan.should_exit:
            self.refuse_to_boot(f"the lifespan startup failed: {failed[0] if failed else 'see the log above'}")
        server.lifespan = _Started(lifespan)
        self.add_lifespan_shutdown(lifespan.shutdown)
        application = config.loaded_app
        if type(application).__name__ == "ProxyHeadersMiddleware" and hasattr(application, "app"):
            config.loaded_app = self.calls.counted_past_proxy_headers(application, self._finish)
        else:
            config.loaded_app = self.calls.counted(application, self._finish)
        return application, lifespan.state

    async def listen(self) -> None:
        """uvicorn's own listeners, whose protocols are noted as they are made."""
        config = self.config
        config.http_protocol_class = _noted(config.http_protocol_class, self)
        await self.tick()
        await self.server.startup(sockets=[each.sock for each in self.sockets])

    async def tick(self) -> None:
        """uvicorn's headers, the date among them."""
        await self.server.on_tick(0)

    def answered_so_far(self) -> int:
        """uvicorn's own count."""
        return int(self.server.server_state.total_requests)

    def keepalive(self) -> float:
        """A subclass may have chosen its own."""
        return float(self.config.timeout_keep_alive)

    def connections_made(self) -> list[Any]:
        """uvicorn's own list."""
        return list(self.server.server_state.connections) if self.server is not None else []

    def state_of(self, connection: Any) -> State:
        """By what the protocol keeps of it."""
        if not hasattr(connection, "cycle"):
            return State.WEBSOCKET if _is_open(connection) else State.OPENING
        cycle = connection.cycle
        if cycle is not None and not cycle.response_complete:
            return State.BUSY
        if unsent(connection.transport) or getattr(connection, "pipeline", None):
            return State.BUSY
        if _is_reading(connection):
            return State.READING
        return State.NEW if cycle is None else State.IDLE

    # -- leaving -------------------------------------------------------------------------------------------------------
    def begin_leaving(self) -> OpenConnections:
        """Change the open connections, and those that come."""
        # What other libraries have put in the place of this method (sse-starlette does) must learn of the end.
        self.server.handle_exit(signal.SIGTERM, None)
        return OpenConnections(self)

    def stop_listening(self) -> None:
        """Close the listeners."""
        for each in self.server.servers:
            each.close()

    async def _finish(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """A call has ended that was told of the drain, or whose client reads slowly; see that its answer ends as well."""
        cycle: Any = getattr(receive, "__self__", None)
        attended = self.calls.attended
        if cycle in attended:
            attended.discard(cycle)
            await self._end_well(cycle, scope, send)
        flow: Any = getattr(cycle, "flow", None)
        if flow in attended:
            await flow.drain()

    async def _end_well(self, cycle: Any, scope: dict[str, Any], send: Any) -> None:
        if cycle.response_complete or cycle.disconnected:
            return
        if not cycle.response_started:
            headers = [(b"content-type", b"text/plain"), (b"content-length", b"0"), (b"retry-after", b"1")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
        elif _is_event_stream(cycle):
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            # The client must see that something is missing.
            self.cut.append((scope["method"], scope["path"]))
            cycle.disconnected = True
            cycle.transport.close()


# -- the protocol while it serves --------------------------------------------------------------------------------------
def _noted(stock: Any, worker: UvicornWorker) -> Any:
    """uvicorn's protocol class, whose objects are noted; what we know better of uvicorn's own two is in `_known`."""
    born = worker.born
    if stock.__module__.endswith((".h11_impl", ".httptools_impl")):
        _listen_for_the_end(sys.modules[stock.__module__])
        stock = _known(stock, worker.event_loop, worker.calls)

    class Protocol(stock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            born.add(self)

    Protocol.__name__ = stock.__name__
    return Protocol


def _known(stock: Any, loop: asyncio.AbstractEventLoop, calls: Calls) -> Any:
    """uvicorn's protocol class, whose tasks and timers cost less, and whose answers can be overheard.

    While a client reads slowly its `flow` is `attended`: a call has not ended before its answer has left this process.
    """
    attended, unnoticed = calls.attended, UNNOTICED_LATE if calls.late else UNNOTICED

    class Protocol(stock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # They have one timer, the keep-alive's.
            self.idle = self.loop = _ConnectionLoop(loop, self.timeout_keep_alive_handler)

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.flow.overheard = _Overheard(transport)
            limit_buffer(transport, paused=False, unnoticed=unnoticed)

        def pause_writing(self) -> None:
            super().pause_writing()
            attended.add(self.flow)
            limit_buffer(self.transport, paused=True)

        def resume_writing(self) -> None:
            attended.discard(self.flow)
            limit_buffer(self.transport, paused=False, unnoticed=unnoticed)
            super().resume_writing()

        def handle_websocket_upgrade(self, *args: Any) -> None:
            self.transport.set_write_buffer_limits()
            super().handle_websocket_upgrade(*args)

        def connection_lost(self, exc: Exception | None) -> None:
            attended.discard(self.flow)
            super().connection_lost(exc)
            self.flow.overheard.cycle = None  # which would refer to itself
            self.idle.close()

    Protocol.__name__ = stock.__name__
    return Protocol


class _ConnectionLoop(ServerLoop):
    """The loop as one connection sees it, which sets and cancels its keep-alive timer for each request.

    A timer of the loop for each of them is much; this is one for each connection that looks, when it comes, whether the
    connection has been idle for so long.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, idle: Any) -> None:
        super().__init__(loop)
        self._idle = idle
        self._later = loop.call_later
        self._due: float | None = None
        self._handle: Any = None
        self.call_later = self._call_later

    def _call_later(self, delay: float, callback: Any) -> Any:
        del callback  # the keep-alive's own
        self._due = self.time() + delay
        if self._handle is None:
            self._handle = self._later(delay, self._look)
        return self

    def cancel(self) -> None:
        """A request has come."""
        self._due = None

    def _look(self) -> None:
        self._handle = None
        if self._due is None:
            return
        left = self._due - self.time()
        if left > 0:
            self._handle = self._later(left, self._look)
        else:
            self._due = None
            self._idle()

    def close(self) -> None:
        """The connection has ended."""
        self._due = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


# -- told of the end -------------------------------------------------------------------------------------------------
class _Overheard:
    """What a cycle takes for its transport until its next write, which is the head of its answer: that is noted.

    One for each connection; the protocol itself, and all the cycles that nobody listens to, have the transport as it is.
    """

    __slots__ = ("cycle", "transport")

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.cycle: Any = None

    # What a cycle asks of a transport, by name: on a class with `__getattr__` each look at an attribute is slow.
    def write(self, data: bytes) -> None:
        """Note it, and get out of the way."""
        transport, cycle = self.transport, self.cycle
        if cycle is not None:  # it is when the connection was lost
            self.cycle = None
            cycle.head = data
            cycle.transport = transport
        transport.write(data)

    def is_closing(self) -> bool:
        """The transport's own."""
        return bool(self.transport.is_closing())

    def close(self) -> None:
        """The transport's own."""
        self.transport.close()


def _listen_for_the_end(module: Any) -> None:
    """Have the cycles of that module of uvicorn's tell `http.disconnect` when the drain says so."""
    stock: Any = module.RequestResponseCycle
    if hasattr(stock, "told"):
        return

    receive = stock.receive

    class RequestResponseCycle(stock):
        """uvicorn's own, which can be told of the drain and goes on sending all the same."""

        told = False
        #: The head of the answer, if it was noted; h11 and httptools write it at once.
        head: bytes | None = None
        flow: Any
        message_event: Any
        more_body: bool
        waiting_for_100_continue: bool

        def receive(self) -> Any:
            if self.more_body or self.waiting_for_100_continue or not self.message_event._value:
                return self._wait()
            # All of the body is here, and uvicorn's own gives it without waiting. This is the request path: a coroutine
            # round it would be dear, and so would be `is_set()`.
            self._note_head()
            return receive(self)

        async def _wait(self) -> Any:
            has_all = _has_all(self)
            if self.told and has_all:
                return DISCONNECT
            message = await receive(self)
            if message["type"] == "http.request":
                if self.told and has_all and not message["body"]:
                    return DISCONNECT
                if not (has_all or message["more_body"]):
                    self._note_head()
            return message

        def _note_head(self) -> None:
            # The application may listen for its client's end from now on, and its answer may be a long one: of what type?
            if not self.response_started:
                self.transport = overheard = self.flow.overheard
                overheard.cycle = self

        def tell(self) -> None:
            """Whoever has had the whole body hears `http.disconnect` when it listens, also if it does already."""
            self.told = True
            event = self.message_event
            if not event.is_set():
                self.message_event = asyncio.Event()
                event.set()

    module.RequestResponseCycle = RequestResponseCycle


def _has_all(cycle: Any) -> bool:
    """Whether the application has had the whole body; while the request is in flight."""
    return not (cycle.more_body or cycle.message_event.is_set())


def _is_event_stream(cycle: Any) -> bool:
    """Whether the answer is a stream of server-sent events, which may end at any event."""
    if cycle.head:
        return b"text/event-stream" in cycle.head.lower()
    return any(name == b"accept" and b"text/event-stream" in value for name, value in cycle.scope["headers"])


class _Started:
    """The lifespan as uvicorn's `startup` sees it: it has run already."""

    should_exit = False

    def __init__(self, lifespan: Any) -> None:
        self.state = lifespan.state

    async def startup(self) -> None:
        """Done before."""

    async def shutdown(self) -> None:
        """Done later."""


# -- the connections of a worker that leaves ---------------------------------------------------------------------------
class OpenConnections(Connections):
    """The open connections, and those that still come; see `departure.Side`."""

    def __init__(self, worker: UvicornWorker) -> None:
        super().__init__(worker)
        self._server_state = server_state = worker.server.server_state
        self._restarted: weakref.WeakSet[Any] = weakref.WeakSet()
        config = worker.config
        # WebSockets must not say `Connection: close` in their handshake.
        self._plain_state = copy.copy(server_state)
        self._ws_protocol_class = config.ws_protocol_class
        server_state.default_headers = [*server_state.default_headers, CLOSE]
        for each in list(server_state.connections):
            self._change(each)
        for each in list(worker.born):
            if each.transport is None:
                self._change_when_made(each)  # its TLS handshake is under way
        make = config.http_protocol_class
        config.http_protocol_class = lambda **kwargs: self._change_when_made(make(**kwargs))

    def _change_when_made(self, protocol: Any) -> Any:
        connection_made = protocol.connection_made

        def made(transport: Any) -> None:
            connection_made(transport)
            self._change(protocol)

        protocol.connection_made = made
        return protocol

    def _change(self, protocol: Any) -> None:
        transport = protocol.transport
        if transport is None or isinstance(transport, PoliteTransport):
            return
        polite = protocol.transport = PoliteTransport(transport, protocol, self._worker.farewell)
        if not hasattr(protocol, "cycle"):
            return  # a WebSocket
        overheard = getattr(protocol.flow, "overheard", None)
        if overheard is not None:
            overheard.transport = polite
        protocol.timeout_keep_alive = NEVER
        if self._ws_protocol_class is not None:
            protocol.ws_protocol_class = self._make_websocket
        cycle = protocol.cycle
        if cycle is None or cycle.response_complete:
            timer = protocol.timeout_keep_alive_task
            if timer is not None:
                timer.cancel()
                protocol.timeout_keep_alive_task = None
            return
        waiting = [each for each, _ in getattr(protocol, "pipeline", ())]
        for each in (cycle, *waiting):
            if not isinstance(each.transport, _Overheard):
                each.transport = polite
        # Of several requests that have arrived, the answer to the last one closes the connection.
        last = waiting[0] if waiting else cycle
        if not last.response_started and not _has_next(protocol):
            last.default_headers = [*last.default_headers, CLOSE]

    def _make_websocket(self, **kwargs: Any) -> Any:
        kwargs["server_state"] = self._plain_state
        return self._ws_protocol_class(**kwargs)

    # -- departure.Side ------------------------------------------------------------------------------------------------
    def connections(self) -> Iterable[Any]:
        """Those that we have not closed."""
        for each in self._server_state.connections:
            transport = each.transport
            if isinstance(transport, PoliteTransport) and not transport.is_closing():
                yield each

    def close(self, connection: Any, patience: float) -> None:
        """Through the polite transport."""
        connection.transport.close(patience)

    def restart(self, connection: Any) -> None:
        """uvicorn's own way to close a WebSocket at the end: with 1012."""
        if not hasattr(connection, "ws_server"):
            connection.shutdown()
            connection.transport.close(CLOSING)
        elif connection not in self._restarted:
            self._restarted.add(connection)
            self.later(self._restart(connection))

    async def _restart(self, connection: Any) -> None:
        # With the older implementation of websockets that way cancels what the application waits for; this tells it.
        connection.ws_server.closing = True
        try:
            await asyncio.wait_for(connection.close(SERVICE_RESTART), CLOSING)
        except Exception:  # noqa: BLE001 - the client has not said goodbye, or has gone
            connection.shutdown()
            connection.transport.close(CLOSING)

    def tell(self) -> None:
        """Streams of server-sent events, long polls, and answers of which nobody knows what they are."""
        for each in list(self._server_state.connections):
            cycle = getattr(each, "cycle", None)
            if cycle is None or cycle.response_complete or cycle.more_body or getattr(cycle, "told", True):
                continue
            if cycle.head and not _is_event_stream(cycle):
                continue  # a download: it may still get to its end
            self._worker.calls.attended.add(cycle)
            cycle.tell()

    def settle(self) -> None:
        """The calls whose answer is complete."""
        worker = self._worker
        if not worker.page.in_flight:
            return
        for call in list(worker.calls.running(worker.event_loop)):
            slot, cycle = call.slot, _cycle_of(call)
            if slot is None or slot < 0 or slot in worker.calls.answered or not isinstance(call.handle, asyncio.Task):
                continue
            if getattr(cycle, "response_complete", False) and not unsent(cycle.transport):
                worker.calls.answered.add(slot)
                worker.page.end(slot)
                worker.hand_over(call)

    def unsent(self) -> list[tuple[str, str]]:
        """Answers that their applications have given and that are still in the loop's buffers, and not in flight."""
        found, calls = [], self._worker.calls
        counted = {
            _cycle_of(call) for call in calls.running(self._worker.event_loop) if call.slot not in calls.answered
        }
        for each in (*self._server_state.connections, *(each.former for each in self._worker.farewells)):
            cycle = getattr(each, "cycle", None)
            if cycle is not None and cycle not in counted and cycle.response_complete and unsent(each.transport):
                found.append((cycle.scope["method"], cycle.scope["path"]))
        return found


def _cycle_of(call: Call) -> Any:
    """uvicorn's own object for it."""
    return getattr(call.names["receive"], "__self__", None)


def _has_next(protocol: Any) -> bool:
    """Whether a further request has arrived behind the one that is being answered."""
    conn = getattr(protocol, "conn", None)
    return conn is not None and _is_done(conn) and bool(conn.trailing_data[0])


def _is_done(conn: Any) -> bool:
    return str(conn.their_state) == "DONE"


def _is_reading(protocol: Any) -> bool:
    """Whether a part of a request has arrived."""
    conn = getattr(protocol, "conn", None)
    if conn is not None:
        return bool(conn.trailing_data[0])
    scope, cycle = protocol.scope, protocol.cycle
    return scope is not None and (cycle is None or cycle.scope is not scope)


def _is_open(websocket: Any) -> bool:
    completed = getattr(websocket, "handshake_completed_event", None)
    return bool(completed.is_set() if completed is not None else websocket.handshake_complete)
