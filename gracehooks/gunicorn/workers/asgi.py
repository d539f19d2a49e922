"""`gracehooks.ASGIWorker`: gunicorn's own asgi worker (25.2 and later) that leaves without losing.

While it serves, gunicorn's own protocol serves, and the request path pays for two stores: a request begins and ends on the
page where the loop of its connection calls `_cancel_keepalive_timer` and `_resume_reading` anyway; before 27, where a
connection waits for the application's call, it does so round that call. Everything else is found
out when it is asked for, in the frames of gunicorn's coroutines. When the worker leaves, the open connections become
`Leaving` ones: their answers carry `Connection: close`, and what closes them is polite.

It relies on `ASGIProtocol` with `_handle_http_request` and its variables, `_build_http_scope`, `_arm_keepalive_timer`,
`_cancel_keepalive_timer`, `_resume_reading`, `_send_response_start`, `_send_error_response`, `_close_transport`,
`_keepalive_timeout`, `_will_close`, `_awaiting_request`, `_request_ready`, `_current_request`, `_body_receiver`,
`_finishing_calls`, `_callback_parser`, `_websocket`, `_h2_conn`, and on `BodyReceiver`, `LifespanManager`,
`AsyncHTTP2Connection` (tests/contract/test_gasgi.py). Versions before 27 lack some of them. The first, before
25.2, have no `BodyReceiver` and keep neither the request nor the WebSocket of a connection: a drain could not see them.
"""

from __future__ import annotations

import asyncio
import struct
import time
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import gunicorn

from gracehooks import requests
from gracehooks.errors import ConfigError
from gracehooks.gunicorn.workers.calls import WEBSOCKET, Application, Call, Calls
from gracehooks.gunicorn.workers.departure import State
from gracehooks.gunicorn.workers.farewell import CLOSING, limit_buffer, unread, unsent, writes_late
from gracehooks.gunicorn.workers.loop import Connections, LoopWorker, PlainSignals, ServerLoop, final_line, overhear
from gracehooks.scoreboard import Page


class Unsupported(ConfigError, RuntimeError):  # noqa: N818 - says what it is
    """The operator's turn; as a RuntimeError gunicorn prints it in one line."""


try:
    from gunicorn.asgi.protocol import ASGIProtocol, BodyReceiver
    from gunicorn.workers import gasgi
except ImportError as error:
    raise Unsupported(
        f"gracehooks.ASGIWorker needs gunicorn 25.2 or later, whose asgi worker it builds on; this is {gunicorn.__version__}. "
        "Upgrade gunicorn, or use gracehooks.UvicornWorker"
    ) from error

__all__ = ["ASGIWorker"]

CLOSE = (b"connection", b"close")
#: How long after the first GOAWAY, which refuses nothing yet, the second one names the last stream, in seconds.
GOAWAY_AFTER = 1.0
#: How long the last of it may take to be written, in seconds.
GOAWAY_WITHIN = 0.2
#: How often it is looked whether the streams of a connection have ended, in seconds.
STREAMS_PACE = 0.02
SERVICE_RESTART = 1012
COME_AGAIN = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


#: The version of ASGI over HTTP that a scope names, and its keys, as gunicorn makes them.
SPEC_VERSION = "2.3"
SCOPE = {
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "server", "client", "state",
}  # fmt: skip

#: Whether gunicorn is one whose protocol serves each request in a task of its own (27).
TASK_PER_REQUEST = hasattr(ASGIProtocol, "_serve_http_request")
#: Whether the application's `receive` waits for the end of the connection once it has the request; that of 25.2 and 25.3
#: says `http.disconnect` at once.
RECEIVE_WAITS = hasattr(BodyReceiver, "_wait_for_disconnect")


class Protocol(ASGIProtocol):
    """gunicorn's protocol, which its worker knows of."""

    #: The slot on the page of the request that is being answered.
    slot: int | None = None
    #: Whether a request is being answered; gunicorn 27 knows it better.
    answering = False
    #: How many requests are being answered over HTTP/2.
    streams = 0
    #: Whether the last answer said that the connection would be closed.
    announced = False
    #: Whether its last answer was sent and the rest of the call is a job now.
    handed_over = False
    #: The answer that its application was told to end.
    told: _Answer | None = None
    _closed: bool
    _flow_control: Any
    _response_buffer: bytes | None

    def connection_made(self, transport: Any) -> None:
        """One more."""
        self.worker.connections.add(self)
        super().connection_made(transport)
        self._limit_buffer(paused=False)

    def pause_writing(self) -> None:
        """gunicorn's `send` waits then, after each part of an answer: the call does not end before all of it has left."""
        super().pause_writing()
        self._limit_buffer(paused=True)

    def resume_writing(self) -> None:
        """All of it has left."""
        self._limit_buffer(paused=False)
        super().resume_writing()

    def _limit_buffer(self, *, paused: bool) -> None:
        if self._flow_control is not None:  # over HTTP/2 it is a writer's, which sets limits of its own
            limit_buffer(self.transport, paused=paused)

    def connection_lost(self, exc: Exception | None) -> None:
        """One less. What goes on after its answer is no more the client's: gunicorn would cancel it now or in a moment."""
        self.worker.connections.discard(self)
        task = self._task
        if task is not None and not task.done() and self.goes_on():
            self.worker.hand_over_answered(self)
        super().connection_lost(exc)

    def goes_on(self) -> bool:
        """Whether application calls run."""
        return self.answering or (TASK_PER_REQUEST and bool(self._finishing_calls or not self._awaiting_request))

    # -- the slot ------------------------------------------------------------------------------------------------------
    def end(self) -> None:
        """The answer was sent, or never will be."""
        slot = self.slot
        if slot is not None and not self.worker.calls.closed:
            self.slot = None
            self.worker.calls.end(slot)

    def _close_transport(self) -> None:
        self.end()
        super()._close_transport()

    def _keepalive_timeout(self) -> None:
        if unread(self.transport):
            self._arm_keepalive_timer()  # the next request has just come
        else:
            super()._keepalive_timeout()

    async def _handle_websocket(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.end()
        self.slot = self.worker.page.begin(WEBSOCKET, request.path)
        try:
            return await super()._handle_websocket(request, *args, **kwargs)
        finally:
            self.end()

    async def _handle_http2_connection(self, *args: Any, **kwargs: Any) -> Any:
        # The context of the connection is marked as a request's; here it is the requests that are.
        requests._current.set(None)
        self.end()
        return await super()._handle_http2_connection(*args, **kwargs)

    async def _handle_http2_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        mark = requests.mark()
        slot = self.worker.page.begin(request.method, request.path)
        self.streams += 1
        try:
            return await super()._handle_http2_request(request, *args, **kwargs)
        finally:
            self.streams -= 1
            requests.unmark(mark)
            if not self.worker.calls.closed:
                self.worker.calls.end(slot)


class CountingRoundTheCall(Protocol):
    """The protocol that counts HTTP/1 requests where a connection waits for the application's call."""

    async def _handle_http_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.slot = self.worker.page.begin(request.method, request.path)
        self.answering = True
        try:
            keep = await super()._handle_http_request(request, *args, **kwargs)
            # An answer that ended because its application was told to is the last one; gunicorn would wait for more.
            return keep and self.told is None
        finally:
            self.answering = False
            self.end()

    def _build_http_scope(self, request: Any, sockname: Any, peername: Any) -> dict[str, Any]:
        scope: dict[str, Any] = super()._build_http_scope(request, sockname, peername)
        if RECEIVE_WAITS:  # else a framework that listens in `receive` would end every stream at once
            scope["asgi"]["spec_version"] = SPEC_VERSION
        return scope


def counting(page: Page, loop: ServerLoop, calls: Calls) -> type[Protocol]:
    """The protocol that counts HTTP/1 requests on `page` (gunicorn 27); `Leaving` then counts as well.

    Methods that the loop of a connection calls anyway are written anew, with what they did and a store each: a further
    call, or a layer round the application, costs more than the stores do.
    """
    pop, append, entries, name, write, memory = page.parts()
    begin, now = page.begin, time.monotonic
    clock, call_later = loop.time, loop.call_later

    handle = ASGIProtocol._handle_http_request

    class Completion:
        """The future by which the loop of a connection learns that an answer is complete; the page learns it at once.

        Between the two is a step of the event loop: another request that blocks it there would have this one reported.
        """

        __slots__ = ("future", "protocol")

        def __init__(self, protocol: Counting) -> None:
            self.protocol = protocol
            self.future: Any = None

        def done(self) -> Any:
            return self.future.done()

        def set_result(self, keep: bool) -> None:
            # Where gunicorn does not go on with the next request, it waits for the call (`_serve_http_request`).
            protocol = self.protocol
            slot, receiver = protocol.slot, protocol._body_receiver
            if (
                keep
                and slot is not None
                and slot >= 0
                and protocol._keepalive
                and protocol._post_request is None
                and (receiver is None or (receiver._complete and not receiver.buffered))
            ):
                protocol.slot = None
                memory[slot] = 0
                append(slot)
            self.future.set_result(keep)

    class Counting(Protocol):
        _reading_paused: bool
        _body_receiver: Any
        _post_request: Any
        _keepalive: float
        _keepalive_handle: Any
        #: Since when the connection is idle, in the loop's time; means something while it awaits a request.
        _idle_since = 0.0
        #: What gunicorn takes for the future of an answer's end, while the connection lasts.
        _completion: Completion | None = None
        #: What stays the same in the scopes of this connection, once gunicorn's has shown that we know its keys: the client
        #: as gunicorn gives it, and `server`, `client` and `root_path`.
        _known: tuple[Any, Any, Any, Any] | None = None

        def _arm_keepalive_timer(self) -> None:
            # A timer for each request is much; one for each connection looks, when it comes, how long it has been idle.
            self._idle_since = clock()
            if self._keepalive_handle is None and self._keepalive > 0:
                self._keepalive_handle = call_later(self._keepalive, self._look_if_idle)

        def _look_if_idle(self) -> None:
            self._keepalive_handle = None
            if not self._awaiting_request or self._finishing_calls or self._closed:
                return  # the next answer, or the end of the last call, arms it again
            left = self._idle_since + self._keepalive - clock()
            if left > 0:
                self._keepalive_handle = call_later(left, self._look_if_idle)
            else:
                self._keepalive_timeout()

        def _cancel_keepalive_timer(self) -> None:
            # Called once a request was read, before it is served; and when the connection is closed or lost.
            request: Any = self._current_request
            if request is None or self._closed:
                if self._keepalive_handle is not None:
                    self._keepalive_handle.cancel()
                    self._keepalive_handle = None
                return
            path = request.path
            try:
                slot = pop()
            except IndexError:
                self.slot = begin(request.method, path)
                return
            self.slot = slot
            entry = entries[slot]
            if entry[0] != path or entry[1] != request.method:
                name(slot, request.method, path)
            state = entry[2]
            entry[2] = state + 256
            write(memory, slot, state, now())

        def _handle_http_request(self, request: Any, sockname: Any, peername: Any, complete: Any = None) -> Any:
            if complete is not None and not calls.late:
                completion = self._completion
                if completion is None:
                    completion = self._completion = Completion(self)
                completion.future, complete = complete, completion
            return handle(self, request, sockname, peername, complete)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._completion = None  # which refers to this

        def _resume_reading(self) -> None:
            # Called after each answer, before the next request; and by the application's `receive` while reading is paused.
            if self._reading_paused:
                if asyncio.current_task() is self._task:
                    self.end()
                super()._resume_reading()
            elif self.slot is not None:
                self.end()

        def _build_http_scope(self, request: Any, sockname: Any, peername: Any) -> dict[str, Any]:
            # gunicorn's `send` over HTTP/1 is silent when the client has gone, where ASGI 2.4 promises an error. As ASGI
            # 2.3, frameworks listen in `receive`, and learn of a drain there as well. The first scope of a connection is
            # gunicorn's; when it has the keys that we know, the next ones are made here, which is quicker than to mend
            # them.
            known = self._known
            if known is None or known[0] is not peername:
                scope: dict[str, Any] = super()._build_http_scope(request, sockname, peername)
                scope["asgi"]["spec_version"] = SPEC_VERSION
                if scope.keys() == SCOPE:
                    self._known = (peername, scope["server"], scope["client"], scope["root_path"])
                return scope
            version, query = request.version, request.query
            return {
                "type": "http",
                "asgi": {"version": "3.0", "spec_version": SPEC_VERSION},
                "http_version": "1.1" if version == (1, 1) else f"{version[0]}.{version[1]}",
                "method": request.method,
                "scheme": request.scheme,
                "path": request.path,
                "raw_path": request.raw_path or b"",
                "query_string": query.encode("latin-1") if query else b"",
                "root_path": known[3],
                "headers": request.headers_bytes.copy(),
                "server": known[1],
                "client": known[2],
                "state": self.worker.state.copy(),
            }

    return Counting


def _of_http1(names: Mapping[str, Any], handle: Any) -> Call | None:
    protocol, request = names["self"], names["request"]
    if "send" not in names or (protocol.slot is None and not names.get("response_complete")):
        return None
    slot = None if names.get("response_complete") else protocol.slot
    return Call(slot, request.method, request.path, handle, names)


def _of_http2(names: Mapping[str, Any], handle: Any) -> Call | None:
    request = names["request"]
    return Call(names["slot"], request.method, request.path, handle, names) if "slot" in names else None


def _of_websocket(names: Mapping[str, Any], handle: Any) -> Call | None:
    slot, request = names["self"].slot, names["request"]
    return Call(slot, WEBSOCKET, request.path, handle, names) if slot is not None else None


class Leaving(Protocol):
    """What a connection becomes when its worker leaves."""

    #: The request that was in flight at that moment: its answer may have begun, without a word of the close.
    straddling: Any = None
    #: Whether its WebSocket is being closed.
    restarting = False

    def _send_response_start(self, status: Any, headers: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.announced = True
        self._keepalive = 0  # the loop of gunicorn 27 ends after this answer; of earlier ones, the departure ends it
        return super()._send_response_start(status, [*headers, CLOSE], request, *args, **kwargs)

    def _send_error_response(self, status: Any, *args: Any, **kwargs: Any) -> Any:
        self.announced = True
        self._keepalive = 0
        if status == 500 and self.told is not None:  # it went without an answer because it was told to end
            return self._safe_write(COME_AGAIN)
        return super()._send_error_response(status, *args, **kwargs)

    def _will_close(self, request: Any, response_requires_close: Any) -> Any:
        # The one in flight is asked twice, before and after its head: the answer must not change in between.
        return True if request is not self.straddling else super()._will_close(request, response_requires_close)

    def _keepalive_timeout(self) -> None:
        """The departure closes idle connections."""

    def _close_transport(self) -> None:
        self.end()
        if self.transport and not self._closed:
            if self.told is not None:
                self._end_well(self.told)
            self._closed = True
            self.worker.farewell(self.transport, self)

    def _end_well(self, answer: _Answer) -> None:
        """The application has stopped when it was told to: a stream of events may end there, and nothing else."""
        if not answer.started or answer.complete:
            return
        if not answer.is_event_stream:
            request = self._current_request
            self.worker.cut.append((request.method, request.path))
        elif answer.is_chunked:
            head, self._response_buffer = self._response_buffer or b"", None
            self._safe_write(head + b"0\r\n\r\n")


class _Answer:
    """How far an answer is; gunicorn keeps that in variables of its `send`, and nowhere else."""

    def __init__(self, send: Any) -> None:
        self._cells = dict(zip(send.__code__.co_freevars, send.__closure__ or (), strict=True))

    def _get(self, name: str) -> Any:
        try:
            return self._cells[name].cell_contents
        except (KeyError, ValueError):
            return None

    @property
    def started(self) -> bool:
        """Whether its head was sent."""
        return bool(self._get("response_started"))

    @property
    def complete(self) -> bool:
        """Whether all of it was sent."""
        return bool(self._get("response_complete"))

    @property
    def is_chunked(self) -> bool:
        """Whether its end is a chunk."""
        return bool(self._get("use_chunked"))

    @property
    def is_event_stream(self) -> bool:
        """Whether it is a stream of server-sent events, which may end at any event."""
        return any(
            _raw(name).lower() == b"content-type" and _raw(value).lower().startswith(b"text/event-stream")
            for name, value in self._get("response_headers") or ()
        )


def _raw(text: bytes | str) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else bytes(text)


class _Quiet:
    """A log in which an answer that was told to end is not reported as an application's mistake."""

    def __init__(self, log: Any) -> None:
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def error(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Everything but that."""
        if "without completing" not in message:
            self._log.error(message, *args, **kwargs)


class ASGIWorker(LoopWorker, PlainSignals, gasgi.ASGIWorker):
    """The `worker_class` of `gracehooks.ASGIWorker`."""

    loop: Any
    asgi: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connections: set[Any] = set()
        self.protocol_class: type[Protocol] = Protocol
        #: The tasks of calls that are jobs now.
        self._handed_over: weakref.WeakSet[Any] = weakref.WeakSet()

    # -- starting ----------------------------------------------------------------------------------------------------
    def make_loop(self) -> asyncio.AbstractEventLoop:
        """The one that gunicorn has made, as `asgi_loop` asks for; its protocols see it through `ServerLoop`."""
        loop: asyncio.AbstractEventLoop = self.loop
        self.loop = ServerLoop(loop)
        return loop

    async def start_application(self) -> tuple[Application, dict[str, Any]]:
        """gunicorn's own lifespan, and our layer round the application."""
        application = self.asgi
        mode = getattr(self.cfg, "asgi_lifespan", "auto")
        if mode != "off":
            from gunicorn.asgi.lifespan import LifespanManager

            self.lifespan = lifespan = LifespanManager(application, self.log, self.state)
            failed: list[str] = []
            overhear(lifespan, "_send", failed)
            try:
                await lifespan.startup()
            except Exception as error:  # noqa: BLE001 - as gunicorn 27 has it: what the application itself has said counts
                self.lifespan = None
                if mode == "on" or failed:
                    reason = failed[0] if failed else final_line(str(lifespan._startup_error or error))
                    self.refuse_to_boot(f"the lifespan startup failed: {reason}")
                self.log.debug("ASGI lifespan not supported by app: %s", error)
            else:
                self.add_lifespan_shutdown(lifespan.shutdown)
        # Without TLS all of an answer is written at once, since it is one write (see `farewell.UNNOTICED`).
        self.calls.late = self.cfg.is_ssl and writes_late(self.event_loop)
        in_tasks = TASK_PER_REQUEST and self.cfg.protocol != "uwsgi"
        self.protocol_class = counting(self.page, self.loop, self.calls) if in_tasks else CountingRoundTheCall
        self.calls.find(ASGIProtocol._handle_http_request.__code__, _of_http1)
        self.calls.find(Protocol._handle_http2_request.__code__, _of_http2)
        self.calls.find(Protocol._handle_websocket.__code__, _of_websocket)
        return application, self.state

    async def listen(self) -> None:
        """As gunicorn does, with our protocol, and with gunicorn's backlog.

        asyncio listens anew, by itself with room for 100: what a client takes for a connection beyond that would be reset
        when the listener is closed.
        """
        ssl_context = self._get_ssl_context()
        for sock in self.sockets:
            server = await self.event_loop.create_server(
                self._make_protocol, sock=sock.sock, ssl=ssl_context, backlog=self.cfg.backlog, start_serving=True
            )
            self.servers.append(server)
            self.log.info("ASGI server listening on %s", sock)

    def _make_protocol(self) -> Protocol:
        protocol = self.protocol_class(self)
        self.born.add(protocol)
        return protocol

    def answered_so_far(self) -> int:
        """gunicorn's own count."""
        return int(self.nr)

    def connections_made(self) -> list[Any]:
        """gunicorn keeps no list of them."""
        return list(self.connections)

    def state_of(self, connection: Any) -> State:
        """By what the protocol keeps of it."""
        if connection._closed:
            return State.DONE
        websocket = connection._websocket if hasattr(connection, "_websocket") else None
        if websocket is not None:
            return State.WEBSOCKET if websocket.accepted else State.OPENING
        if getattr(connection, "_h2_conn", None) is not None:
            return State.BUSY  # it ends by itself, after its GOAWAY
        if unsent(connection.transport):
            return State.BUSY
        if getattr(connection, "_h2c_buffer", None) is not None:
            return State.READING if connection._h2c_buffer else State.NEW
        if connection.handed_over:
            return State.DONE
        if _is_answering(connection):
            return State.BUSY
        if _is_reading(connection):
            return State.READING
        if connection.req_count <= 1:
            return State.NEW
        return State.DONE if connection.announced else State.IDLE

    def hand_over_answered(self, only: Any = None) -> None:
        """The calls whose answers are complete, of one connection or of all, are jobs from now on; their client may go."""
        for call in list(self.calls.running(self.event_loop)):
            protocol: Any = call.names.get("self")
            if call.slot is not None or call.handle in self._handed_over or only not in (None, protocol):
                continue
            if not isinstance(call.handle, asyncio.Task):
                continue
            self._handed_over.add(call.handle)
            if TASK_PER_REQUEST:
                protocol._finishing_calls.pop(call.handle, None)
            if protocol.answering or (
                TASK_PER_REQUEST
                and call.names["request"] is protocol._current_request
                and not protocol._awaiting_request
            ):
                # gunicorn waits for it before it closes, and would cancel it some seconds after the client has gone.
                protocol.end()
                protocol._task = None
                protocol.handed_over = True
            self.hand_over(call)

    # -- leaving -------------------------------------------------------------------------------------------------------
    def begin_leaving(self) -> OpenConnections:
        """Change the open connections, and those that come."""
        self.protocol_class = type("Leaving", (Leaving, self.protocol_class), {})
        return OpenConnections(self)

    def stop_listening(self) -> None:
        """Close the listeners."""
        for each in self.servers:
            each.close()


# -- the connections of a worker that leaves ---------------------------------------------------------------------------
class OpenConnections(Connections):
    """The open connections, and those that still come; see `departure.Side`."""

    def __init__(self, worker: ASGIWorker) -> None:
        super().__init__(worker)
        for each in {*worker.connections, *worker.born}:  # also those whose TLS handshake is under way
            straddling = each._current_request if each.transport is not None and _is_answering(each) else None
            each.__class__ = worker.protocol_class
            each.straddling = straddling
        for each in list(worker.connections):
            if getattr(each, "_h2_conn", None) is not None:
                self.later(_go_away(each))

    # -- departure.Side ------------------------------------------------------------------------------------------------
    def connections(self) -> Iterable[Any]:
        """Those that we have not closed."""
        return [each for each in self._worker.connections if not each._closed]

    def close(self, connection: Any, patience: float) -> None:
        """Politely; the loop of the connection learns that it is closed."""
        connection._closed = True
        self._worker.farewell(connection.transport, connection, patience)
        if getattr(connection, "_request_ready", None) is not None:
            connection._request_ready.set()

    def restart(self, connection: Any) -> None:
        """A close frame with 1012, and the word to the application; then the connection's own end."""
        if not connection.restarting:
            connection.restarting = True
            self.later(self._restart(connection))

    async def _restart(self, connection: Any) -> None:
        websocket = connection._websocket
        await websocket._send_close(SERVICE_RESTART)
        websocket.closed = True  # what the application still sends finds a closed WebSocket
        websocket._receive_queue.put_nowait({"type": "websocket.disconnect", "code": SERVICE_RESTART})
        try:
            # Before 26 nobody says when the client has said goodbye; its transport closes as politely.
            if hasattr(websocket, "_close_event"):
                await asyncio.wait_for(websocket._close_event.wait(), CLOSING)
        except asyncio.TimeoutError:
            pass  # the client has not said goodbye
        connection._close_transport()

    def tell(self) -> None:
        """Streams of server-sent events, long polls, and answers of which nobody knows what they are."""
        worker = self._worker
        for call in list(worker.calls.running(worker.event_loop)):
            protocol: Any = call.names.get("self")
            receiver: Any = call.names.get("body_receiver")
            if receiver is None or call.slot is None or protocol.told is not None or not receiver._body_finished:
                continue
            answer = _Answer(call.names["send"])
            if answer.started and not answer.is_event_stream:
                continue  # a download: it may still get to its end
            protocol.told = answer
            protocol.log = _Quiet(protocol.log)
            receiver.signal_disconnect()

    def settle(self) -> None:
        """The calls whose answer is complete."""
        if self._worker.page.in_flight:
            self._worker.hand_over_answered()

    def unsent(self) -> list[tuple[str, str]]:
        """Answers that their applications have given and that are in the loop's buffers."""
        found = []
        for each in (*self._worker.connections, *(each.former for each in self._worker.farewells)):
            request = each._current_request
            if request is not None and unsent(each.transport) and not (_is_answering(each) and not each._closed):
                found.append((request.method, request.path))
        return found


def _is_answering(protocol: Any) -> bool:
    """Whether a request is being answered."""
    waiting = getattr(protocol, "_awaiting_request", None)
    ready = getattr(protocol, "_request_ready", None)
    if ready is None:
        return bool(protocol.answering)
    if waiting is None:
        return bool(protocol.answering or ready.is_set())
    return not waiting or ready.is_set()


def _is_reading(protocol: Any) -> bool:
    """Whether a part of a request has arrived."""
    parser = getattr(protocol, "_callback_parser", None)
    buffered = getattr(parser, "_buffer", None)
    if buffered:
        return True
    if parser is not None and getattr(parser, "_state", "request_line") not in (
        "request_line",
        "proxy_protocol",
        "complete",
    ):
        return True
    reader = getattr(protocol, "reader", None)
    return bool(getattr(reader, "_buffer", None))


# -- HTTP/2 ----------------------------------------------------------------------------------------------------------
async def _go_away(protocol: Any) -> None:
    """GOAWAY in two steps (RFC 9113 section 6.8): first without a limit, so that no stream on its way is refused."""
    connection = protocol._h2_conn
    _send_goaway(connection, 2**31 - 1)
    await asyncio.sleep(GOAWAY_AFTER)
    # Before 27 one stream is served after the other, and what has come of the next ones is not read until then: only when
    # the connection waits for more, the last one can be named. (What it has just read is in no buffer, and no stream yet.)
    # The drain's time is the bound.
    while not TASK_PER_REQUEST and not protocol._closed and protocol.reader._waiter is None:
        await asyncio.sleep(STREAMS_PACE)
    last = int(getattr(connection.h2_conn, "highest_inbound_stream_id", 0))
    _send_goaway(connection, last)
    # gunicorn then does what it does after the peer's GOAWAY: the streams end, new ones are refused, the end.
    connection.peer_last_stream_id = last
    connection.draining = True
    connection.close = partial(connection.close, last_stream_id=last)
    while not protocol._closed and _has_streams(protocol):
        await asyncio.sleep(STREAMS_PACE)
    if not protocol._closed:
        try:
            await asyncio.wait_for(connection.close(), GOAWAY_WITHIN)
        except asyncio.TimeoutError:
            pass  # before 27 it waits for what its stream never hears of
        protocol._close_transport()


def _has_streams(protocol: Any) -> bool:
    return bool(protocol.streams or protocol._h2_conn.streams or getattr(protocol, "_h2_tasks", ()))


def _send_goaway(connection: Any, last_stream_id: int) -> None:
    # h2 would close its own state with it: the frame is written past it, between two of its frames.
    payload = struct.pack(">II", last_stream_id, 0)
    frame = len(payload).to_bytes(3, "big") + b"\x07\x00" + struct.pack(">I", 0) + payload
    if hasattr(connection, "_write_pending_nowait"):
        connection._write_pending_nowait()
    else:  # before 27
        connection.writer.write(connection.h2_conn.data_to_send() or b"")
    connection.writer.write(frame)
