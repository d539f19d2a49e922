"""`gracehooks.ASGIWorker`: gunicorn's own asgi worker (25 and later) that leaves without losing.

While it serves, gunicorn's own protocol serves; of ours there is one layer round the application, which counts the request
(see `calls`), and a note of the head of each answer. When the worker leaves, the open connections become `Leaving` ones:
their answers carry `Connection: close`, and what closes them is polite.

It relies on `ASGIProtocol` with `_send_response_start`, `_handle_http_request`, `_close_transport`, `_keepalive_timeout`,
`_will_close` (27), `_awaiting_request` (27), `_request_ready`, `_current_request`, `_body_receiver`, `_callback_parser`,
`_websocket`, `_h2_conn`, on `BodyReceiver`, `LifespanManager` and `AsyncHTTP2Connection` (tests/contract/test_gasgi.py).
"""

from __future__ import annotations

import asyncio
import struct
import weakref
from collections.abc import Iterable
from typing import Any

import gunicorn

from gracehooks.errors import ConfigError
from gracehooks.gunicorn.workers.calls import Application
from gracehooks.gunicorn.workers.departure import State
from gracehooks.gunicorn.workers.farewell import CLOSING, unread, unsent
from gracehooks.gunicorn.workers.loop import LoopWorker, PlainSignals, ServerLoop, final_line


class Unsupported(ConfigError, RuntimeError):  # noqa: N818 - says what it is
    """The operator's turn; as a RuntimeError gunicorn prints it in one line."""


try:
    from gunicorn.asgi.protocol import ASGIProtocol
    from gunicorn.workers import gasgi
except ImportError as error:
    raise Unsupported(
        f"gracehooks.ASGIWorker needs gunicorn 25 or later, whose asgi worker it builds on; this is {gunicorn.__version__}. "
        "Upgrade gunicorn, or use gracehooks.UvicornWorker"
    ) from error

__all__ = ["ASGIWorker"]

CLOSE = (b"connection", b"close")
#: How long after the first GOAWAY, which refuses nothing yet, the second one names the last stream, in seconds.
GOAWAY_AFTER = 1.0
SERVICE_RESTART = 1012


class Protocol(ASGIProtocol):
    """gunicorn's protocol, which its worker knows of."""

    #: The head of the last answer, and the request that it belongs to.
    head: Any = None
    head_of: Any = None
    #: Whether a request is being answered; gunicorn 27 knows it better.
    answering = False
    _closed: bool

    def connection_made(self, transport: Any) -> None:
        """One more."""
        self.worker.connections.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """One less."""
        self.worker.connections.discard(self)
        super().connection_lost(exc)

    def _send_response_start(self, status: Any, headers: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.head = headers
        self.head_of = request
        return super()._send_response_start(status, headers, request, *args, **kwargs)

    def _keepalive_timeout(self) -> None:
        if unread(self.transport):
            self._arm_keepalive_timer()  # the next request has just come
        else:
            super()._keepalive_timeout()

    if not hasattr(ASGIProtocol, "_serve_http_request"):

        async def _handle_http_request(self, *args: Any, **kwargs: Any) -> Any:
            self.answering = True
            try:
                return await super()._handle_http_request(*args, **kwargs)
            finally:
                self.answering = False


class Leaving(Protocol):
    """What a connection becomes when its worker leaves."""

    #: The request that was in flight at that moment: its answer may have begun, without a word of the close.
    straddling: Any = None
    #: Whether the last answer said that the connection would be closed.
    announced = False
    #: Whether its last answer was sent and the rest of the call is a job now.
    handed_over = False

    def _send_response_start(self, status: Any, headers: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.announced = True
        self._keepalive = 0  # the loop of gunicorn 27 ends after this answer; of earlier ones, the departure ends it
        return super()._send_response_start(status, [*headers, CLOSE], request, *args, **kwargs)

    def _will_close(self, request: Any, response_requires_close: Any) -> Any:
        # The one in flight is asked twice, before and after its head: the answer must not change in between.
        return True if request is not self.straddling else super()._will_close(request, response_requires_close)

    def _keepalive_timeout(self) -> None:
        """The departure closes idle connections."""

    def _close_transport(self) -> None:
        if self.transport and not self._closed:
            self._closed = True
            self.worker.farewell(self.transport, self)


class ASGIWorker(LoopWorker, PlainSignals, gasgi.ASGIWorker):
    """The `worker_class` of `gracehooks.ASGIWorker`."""

    loop: Any
    asgi: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connections: set[Any] = set()
        self.protocol_class: type[Protocol] = Protocol
        #: Protocols made for connections that were accepted, until somebody has let go of them.
        self.born: weakref.WeakSet[Any] = weakref.WeakSet()
        self._application: Any = None

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
            try:
                await lifespan.startup()
            except Exception as error:  # noqa: BLE001 - as gunicorn has it
                reported = getattr(lifespan, "_startup_reported", type(error).__name__ == "LifespanStartupFailed")
                self.lifespan = None
                if mode == "on" or reported:
                    reason = final_line(str(getattr(lifespan, "_startup_error", None) or error))
                    self.refuse_to_boot(f"the lifespan startup failed: {reason}")
                self.log.debug("ASGI lifespan not supported by app: %s", error)
            else:
                self.add_lifespan_shutdown(lifespan.shutdown)
        self._application = application
        self.asgi = _listening(self.calls.counted(application, self._finish))
        return application, self.state

    async def listen(self) -> None:
        """As gunicorn does, with our protocol."""
        ssl_context = self._get_ssl_context()
        for sock in self.sockets:
            server = await self.event_loop.create_server(
                self._make_protocol, sock=sock.sock, ssl=ssl_context, start_serving=True
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

    # -- leaving -------------------------------------------------------------------------------------------------------
    def begin_leaving(self) -> Connections:
        """Change the open connections, and those that come."""
        self.protocol_class = Leaving
        return Connections(self)

    def stop_listening(self) -> None:
        """Close the listeners."""
        for each in self.servers:
            each.close()

    async def _finish(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """A call has ended that was told of the drain; see that its answer ends as well."""
        receiver: Any = getattr(receive, "__self__", None)
        if receiver not in self.calls.told:
            return
        self.calls.told.discard(receiver)
        protocol = receiver.protocol
        if protocol._closed:
            return
        if protocol.head_of is not receiver.request:
            headers = [(b"content-type", b"text/plain"), (b"content-length", b"0"), (b"retry-after", b"1")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
        elif not _is_complete(send):
            if _is_event_stream(protocol.head):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                self.cut.append((scope["method"], scope["path"]))  # gunicorn closes the connection


def _listening(app: Application) -> Application:
    """gunicorn's `send` over HTTP/1 says nothing when the client has gone, which ASGI 2.4 promises; ASGI 2.3 does not.

    A framework that goes by the version then listens in `receive`, where it learns of the drain as well.
    """

    def call(scope: dict[str, Any], receive: Any, send: Any) -> Any:
        if scope["type"] == "http" and scope["http_version"] != "2":
            scope["asgi"]["spec_version"] = "2.3"
        return app(scope, receive, send)

    return call


def _is_event_stream(headers: Any) -> bool:
    return any(
        _raw(name).lower() == b"content-type" and _raw(value).lower().startswith(b"text/event-stream")
        for name, value in headers
    )


def _is_complete(send: Any) -> bool:
    """Whether the answer that this `send` of gunicorn's sends is complete: only its own variable knows."""
    code = getattr(send, "__code__", None)
    if code is None or "response_complete" not in code.co_freevars:
        return False
    return bool(send.__closure__[code.co_freevars.index("response_complete")].cell_contents)


def _raw(text: bytes | str) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else bytes(text)


# -- the connections of a worker that leaves ---------------------------------------------------------------------------
class Connections:
    """The open connections, and those that still come; see `departure.Side`."""

    def __init__(self, worker: ASGIWorker) -> None:
        self._worker = worker
        self._tasks: set[Any] = set()
        for each in list(worker.connections):
            straddling = each._current_request if self._is_answering(each) else None
            each.__class__ = Leaving
            each.straddling = straddling
        for each in list(worker.connections):
            if getattr(each, "_h2_conn", None) is not None:
                self._later(_go_away(each))

    def _later(self, coroutine: Any) -> None:
        task = self._worker.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- departure.Side ------------------------------------------------------------------------------------------------
    def connections(self) -> Iterable[Any]:
        """Those that we have not closed."""
        return [each for each in self._worker.connections if not each._closed]

    def pending(self) -> int:
        """Those whose TLS handshake is under way, and those whose client has not closed yet."""
        beginning = sum(1 for each in list(self._worker.born) if each.transport is None)
        flushing = sum(1 for each in self._worker.connections if unsent(each.transport))
        return beginning + flushing + len(self._worker.farewells)

    def calls_in_flight(self) -> int:
        """As the page counts them."""
        return self._worker.page.in_flight

    def _is_answering(self, protocol: Any) -> bool:
        waiting = getattr(protocol, "_awaiting_request", None)
        ready = getattr(protocol, "_request_ready", None)
        if ready is None:
            return bool(protocol.answering)
        if waiting is None:
            return bool(protocol.answering or ready.is_set())
        return not waiting or ready.is_set()

    def state(self, connection: Any) -> State:
        """By what the protocol keeps of it."""
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
        if self._is_answering(connection):
            return State.BUSY
        if _is_reading(connection):
            return State.READING
        if connection.req_count <= 1:
            return State.NEW
        return State.DONE if getattr(connection, "announced", False) else State.IDLE

    def transport(self, connection: Any) -> Any:
        """gunicorn keeps it under that name."""
        return connection.transport

    def close(self, connection: Any, patience: float) -> None:
        """Politely; the loop of the connection learns that it is closed."""
        connection._closed = True
        self._worker.farewell(connection.transport, connection, patience)
        if getattr(connection, "_request_ready", None) is not None:
            connection._request_ready.set()

    def restart(self, connection: Any) -> None:
        """A close frame with 1012, and the word to the application; then the connection's own end."""
        if not getattr(connection, "restarting", False):
            connection.restarting = True
            self._later(self._restart(connection))

    async def _restart(self, connection: Any) -> None:
        websocket = connection._websocket
        await websocket._send_close(SERVICE_RESTART)
        websocket.closed = True  # what the application still sends finds a closed WebSocket
        websocket._receive_queue.put_nowait({"type": "websocket.disconnect", "code": SERVICE_RESTART})
        try:
            await asyncio.wait_for(websocket._close_event.wait(), CLOSING)
        except asyncio.TimeoutError:
            pass  # the client has not said goodbye
        connection._close_transport()

    def tell(self) -> None:
        """Streams of server-sent events, long polls, and answers of which nobody knows what they are."""
        for each in list(self._worker.connections):
            receiver = getattr(each, "_body_receiver", None)
            if receiver is None or each._closed or receiver in self._worker.calls.told or not receiver._complete:
                continue
            if not self._is_answering(each) or not receiver._body_finished:
                continue
            if each.head_of is receiver.request and not _is_event_stream(each.head):
                continue  # a download: it may still get to its end
            self._worker.calls.told.add(receiver)
            receiver.signal_disconnect()

    def settle(self) -> None:
        """The calls whose answer is complete."""
        worker = self._worker
        if not worker.page.in_flight:
            return
        for call in list(worker.calls.running(worker.event_loop)):
            protocol = getattr(getattr(call.receive, "__self__", None), "protocol", None)
            if protocol is None or call.slot < 0 or call.slot in worker.calls.answered or not _is_complete(call.send):
                continue
            worker.hand_over(call.slot, call.handle, f"{call.method} {call.path}, after its answer")
            # gunicorn cancels what still runs some seconds after the end of its connection; a job has its own time.
            protocol.handed_over = True
            protocol._task = None

    def unsent(self) -> list[tuple[str, str]]:
        """Answers that their applications have given and that are still in the loop's buffers."""
        found = []
        for each in (*self._worker.connections, *(each.former for each in self._worker.farewells)):
            request = each.head_of
            if request is not None and unsent(each.transport) and not self._is_running(each):
                found.append((request.method, request.path))
        return found

    def _is_running(self, protocol: Any) -> bool:
        return not protocol._closed and self._is_answering(protocol)


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
    last = int(getattr(connection.h2_conn, "highest_inbound_stream_id", 0))
    _send_goaway(connection, last)
    # gunicorn then does what it does after the peer's GOAWAY: the streams end, new ones are refused, the end.
    connection.peer_last_stream_id = last
    connection.draining = True
    while protocol._h2_tasks and not protocol._closed:
        await asyncio.wait(list(protocol._h2_tasks), timeout=1.0)
    if not protocol._closed:
        await connection.close()
        protocol._close_transport()


def _send_goaway(connection: Any, last_stream_id: int) -> None:
    # h2 would close its own state with it: the frame is written past it, between two of its frames.
    payload = struct.pack(">II", last_stream_id, 0)
    frame = len(payload).to_bytes(3, "big") + b"\x07\x00" + struct.pack(">I", 0) + payload
    connection._write_pending_nowait()
    connection.writer.write(frame)
