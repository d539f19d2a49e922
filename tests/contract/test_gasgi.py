"""What `gracehooks.ASGIWorker` relies on in gunicorn's own asgi worker."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys

import gunicorn
import pytest

if gunicorn.version_info < (25, 2):

    def test_an_older_gunicorn_is_told_of_in_one_line():
        code = "import gracehooks; gracehooks.ASGIWorker"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert "needs gunicorn 25.2 or later" in last
        assert gunicorn.__version__ in last
        assert "UvicornWorker" in last

    pytest.skip("this gunicorn has no asgi worker to rely on", allow_module_level=True)

from gunicorn.asgi.lifespan import LifespanManager
from gunicorn.asgi.protocol import ASGIProtocol
from gunicorn.asgi.websocket import WebSocketProtocol
from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.workers import gasgi

from gracehooks.gunicorn.workers import asgi as ours
from gracehooks.gunicorn.workers.calls import Calls
from gracehooks.gunicorn.workers.loop import ServerLoop
from gracehooks.scoreboard import Page

newest = pytest.mark.skipif(not ours.TASK_PER_REQUEST, reason="gunicorn 27 and later serve a request in a task")
STREAM = [(b"content-type", b"text/event-stream")]


class Transport(asyncio.Transport):
    def __init__(self):
        super().__init__()
        self.written = b""

    def get_extra_info(self, name, default=None):
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def write(self, data):
        self.written += data

    def is_closing(self):
        return False

    def can_write_eof(self):
        return False

    def close(self):
        pass

    def set_write_buffer_limits(self, high=None, low=None):
        pass


class Worker:
    """As much of a worker as a protocol looks at."""

    def __init__(self, application):
        self.cfg = Config()
        self.log = Logger(self.cfg)
        self.alive = True
        self.nr = self.nr_conns = 0
        self.max_requests = sys.maxsize
        self.state = {}
        self.connections = set()
        self.event_loop = asyncio.get_running_loop()
        self.loop = ServerLoop(self.event_loop)
        self.page = Page()
        self.calls = Calls(self.page)
        self.calls.find(ASGIProtocol._handle_http_request.__code__, ours._of_http1)
        self.asgi = application
        if ours.TASK_PER_REQUEST:
            self.protocol_class = ours.counting(self.page, self.loop, self.calls)
        else:
            self.protocol_class = ours.CountingRoundTheCall

    def hand_over_answered(self, protocol):
        """Nothing here outlives its answer for long."""


def waits(protocol):
    """Whether the connection waits for a request."""
    return protocol._awaiting_request if ours.TASK_PER_REQUEST else not protocol.answering


async def until(condition):
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come")


def with_connection(application, scenario, protocol_class=None):
    """Run `scenario(worker, protocol, transport)` on a connection of our protocol."""

    async def run():
        worker = Worker(application)
        protocol = (protocol_class or worker.protocol_class)(worker)
        transport = Transport()
        protocol.connection_made(transport)
        await asyncio.sleep(0)
        await scenario(worker, protocol, transport)
        protocol.connection_lost(None)
        await asyncio.sleep(0)

    asyncio.run(run())


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


GET = b"GET /a?secret HTTP/1.1\r\nHost: test\r\n\r\n"


def test_the_worker_makes_its_loop_first_and_has_what_ours_uses():
    assert "self.loop" in inspect.getsource(gasgi.ASGIWorker._setup_event_loop)
    assert {"_get_ssl_context", "load_wsgi", "init_process"} <= set(vars(gasgi.ASGIWorker))
    assert {"startup", "shutdown"} <= set(vars(LifespanManager))
    assert list(inspect.signature(LifespanManager.__init__).parameters) == ["self", "app", "logger", "state"]


def test_a_reason_of_a_failed_startup_is_kept():
    async def run():
        async def broken(scope, receive, send):
            await receive()
            await send({"type": "lifespan.startup.failed", "message": "no database"})

        manager = LifespanManager(broken, Logger(Config()), {})
        with pytest.raises(Exception, match="no database"):
            await manager.startup()
        assert manager._startup_error == "no database"

    asyncio.run(run())


VERSION = ours.SPEC_VERSION if ours.RECEIVE_WAITS else "2.4"


def test_a_request_is_on_the_page_from_its_head_to_its_answer():
    seen = []

    async def application(scope, receive, send):
        seen.append((worker.page.requests()[0], scope["asgi"]["spec_version"]))
        await app(scope, receive, send)

    worker = None

    async def scenario(found, protocol, transport):
        nonlocal worker
        worker = found
        for number in (1, 2, 3):
            assert waits(protocol)
            assert not ours._is_reading(protocol)
            protocol.data_received(GET[:10])
            assert ours._is_reading(protocol)
            protocol.data_received(GET[10:])
            await until(lambda count=number: worker.page.answered == count and waits(protocol))
            assert worker.page.in_flight == 0
        assert protocol.req_count == 4
        assert [(each.method, each.path, version) for each, version in seen] == [("GET", "/a", VERSION)] * 3
        if not ours.TASK_PER_REQUEST:
            return
        # Two at once: the second is served from what was read with the first.
        protocol.data_received(GET + GET)
        await until(lambda: worker.page.answered == 5)
        assert transport.written.count(b"HTTP/1.1 200 OK") == 5

    with_connection(application, scenario)


def test_the_frame_of_a_request_tells_what_a_drain_wants_to_know():
    gate = None

    async def application(scope, receive, send):
        await receive()
        await gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        gate.clear()
        await gate.wait()
        await send({"type": "http.response.body", "body": b"two"})
        gate.clear()
        await gate.wait()

    async def scenario(worker, protocol, transport):
        nonlocal gate
        gate = asyncio.Event()
        protocol.data_received(GET)

        def call():
            return next(iter(worker.calls.running(worker.event_loop)), None)

        await until(lambda: call() is not None and call().names["body_receiver"]._body_finished)
        found = call()
        answer = ours._Answer(found.names["send"])
        assert (found.method, found.path, found.slot) == ("GET", "/a", protocol.slot)
        assert isinstance(found.handle, asyncio.Task)
        assert not answer.started
        gate.set()
        await until(lambda: answer.started)
        assert answer.is_event_stream
        assert answer.is_chunked
        assert not answer.complete
        gate.set()
        await until(lambda: answer.complete)
        assert call().slot is None  # it was answered, and goes on all the same
        if ours.TASK_PER_REQUEST:
            await until(lambda: protocol._awaiting_request)
            assert worker.page.in_flight == 0
            assert found.handle in protocol._finishing_calls
        else:
            assert found.handle is protocol._task
            assert protocol.answering
        gate.set()
        await until(lambda: call() is None)

    with_connection(application, scenario)


@newest
def test_a_leaving_connection_announces_its_close_and_keeps_one_whose_answer_had_begun():
    gate = None

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await gate.wait()
        await send({"type": "http.response.body", "body": b"two"})

    async def scenario(worker, protocol, transport):
        nonlocal gate
        gate = asyncio.Event()
        closed = []
        worker.farewell = lambda *args: closed.append(args)
        protocol.data_received(GET)
        await until(lambda: b"one" in transport.written)
        leaving = type("Leaving", (ours.Leaving, worker.protocol_class), {})
        protocol.__class__ = leaving
        protocol.straddling = protocol._current_request
        gate.set()
        await until(lambda: protocol._awaiting_request)
        assert b"Connection: close" not in transport.written
        assert not closed
        protocol.data_received(GET)
        await until(lambda: closed)
        assert transport.written.lower().count(b"connection: close\r\n") == 1
        assert protocol.announced

    with_connection(application, scenario)


REQUESTS = (
    GET,
    b"GET /a%20b/%C3%A9?q=%20c&d HTTP/1.1\r\nHost: x\r\nX-Two: 1\r\nX-Two: 2\r\nX-Forwarded-Proto: https\r\n\r\n",
    b"POST /? HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://elsewhere/a?b HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD //a;b HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
)


@newest
def test_the_scopes_that_are_made_here_are_gunicorns_with_another_version():
    found = {}

    async def application(scope, receive, send):
        found.setdefault(protocol_class, []).append(scope)
        await app(scope, receive, send)

    async def scenario(worker, protocol, transport):
        worker.state["began"] = 1
        for number, request in enumerate(REQUESTS, 1):
            protocol.data_received(request)
            await until(lambda count=number: len(found.get(protocol_class, ())) == count and protocol._awaiting_request)

    for protocol_class in (ours.Protocol, None):
        with_connection(application, scenario, protocol_class)
    theirs, mine = found[ours.Protocol], found[None]
    assert {each["asgi"]["spec_version"] for each in theirs} == {"2.4"}
    for each in theirs:
        each["asgi"]["spec_version"] = ours.SPEC_VERSION
    assert mine == theirs
    assert theirs[0].keys() == ours.SCOPE
    assert mine[0]["state"] is not mine[1]["state"]


@newest
def test_a_scope_with_more_in_it_than_we_know_stays_gunicorns(monkeypatch):
    build = ASGIProtocol._build_http_scope
    monkeypatch.setattr(ASGIProtocol, "_build_http_scope", lambda *args: {**build(*args), "extensions": {"new": {}}})
    found = []

    async def application(scope, receive, send):
        found.append((scope["asgi"]["spec_version"], scope["extensions"]))
        await app(scope, receive, send)

    async def scenario(worker, protocol, transport):
        for number in (1, 2):
            protocol.data_received(GET)
            await until(lambda count=number: len(found) == count and protocol._awaiting_request)

    with_connection(application, scenario)
    assert found == [("2.3", {"new": {}})] * 2


@newest
def test_a_connection_is_not_idle_while_a_call_goes_on_after_its_answer():
    gate = None

    async def application(scope, receive, send):
        await app(scope, receive, send)
        if gate is not None:
            await gate.wait()

    async def scenario(worker, protocol, transport):
        nonlocal gate
        protocol.data_received(GET)
        await until(lambda: protocol._awaiting_request and protocol._keepalive_handle is not None)
        gate = asyncio.Event()
        protocol.data_received(GET)
        await until(lambda: protocol._awaiting_request and protocol._finishing_calls)
        protocol._idle_since = 0.0
        protocol._look_if_idle()  # the timer of the first wait comes
        assert not protocol._closed
        assert protocol._keepalive_handle is None
        gate.set()
        await until(lambda: protocol._keepalive_handle is not None)
        protocol._idle_since = 0.0
        protocol._look_if_idle()
        assert protocol._closed

    with_connection(application, scenario)


@newest
def test_the_keep_alive_timer_is_gunicorns_two_methods_and_no_more():
    for name in ("_arm_keepalive_timer", "_cancel_keepalive_timer", "_resume_reading", "_keepalive_timeout"):
        assert name in vars(ASGIProtocol)
    source = inspect.getsource(ASGIProtocol._handle_connection)
    assert source.count("self._cancel_keepalive_timer()") == 1
    assert source.count("self._resume_reading()") == 1
    assert "_keepalive_handle" not in source


@newest
@pytest.mark.parametrize("closes", [False, True], ids=["the connection stays", "the connection ends"])
def test_the_page_learns_of_an_answers_end_in_its_own_step(closes):
    """Where gunicorn goes on with the next request; else it waits for the call, and so does the page."""
    seen = []

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        seen.append(worker_of[0].page.in_flight)

    async def scenario(worker, protocol, transport):
        worker_of.append(worker)
        protocol.data_received(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") if closes else GET)
        await until(lambda: seen and not worker.page.in_flight)
        assert seen == [int(closes)]

    worker_of = []
    with_connection(application, scenario)


def test_an_idle_connection_is_closed_after_keepalive():
    async def scenario(worker, protocol, transport):
        protocol._keepalive = 0.05
        protocol.data_received(GET)
        await until(lambda: b"ok" in transport.written)
        for _ in range(200):
            if protocol._closed:
                break
            await asyncio.sleep(0.02)
        assert protocol._closed

    if ours.TASK_PER_REQUEST:
        with_connection(app, scenario)


def test_a_websocket_has_what_a_restart_needs():
    source = inspect.getsource(WebSocketProtocol)
    for part in ("self.accepted", "self.closed", "self._receive_queue", "async def _send_close"):
        assert part in source
    assert "self._close_event" in source or gunicorn.version_info < (26, 0)


def test_http2_connections_are_drained_by_what_ours_sets():
    pytest.importorskip("h2")
    from gunicorn.http2.async_connection import AsyncHTTP2Connection

    source = inspect.getsource(AsyncHTTP2Connection)
    for part in ("self.h2_conn", "self.writer", "self.streams", "async def close"):
        assert part in source
    if ours.TASK_PER_REQUEST:
        for part in ("self.draining", "self.peer_last_stream_id", "def _write_pending_nowait"):
            assert part in source
        assert "h2_conn.draining" in inspect.getsource(ASGIProtocol._handle_http2_connection)
    else:  # where it stands is seen by asyncio's reader
        assert "self.reader.read(self.READ_BUFFER_SIZE)" in source


def test_a_stream_reader_shows_whether_somebody_waits_for_more():
    async def run():
        reader = asyncio.StreamReader()
        assert reader._waiter is None
        read = asyncio.ensure_future(reader.read(10))
        await asyncio.sleep(0)
        assert reader._waiter is not None
        reader.feed_data(b"more")
        assert reader._waiter is None
        assert await read == b"more"

    asyncio.run(run())


def test_an_answer_that_the_transport_has_not_taken_is_waited_for():
    source = inspect.getsource(ASGIProtocol._handle_http_request)
    assert "flow_control.drain()" in source[source.index("self._send_body(body") :]
    assert "self._flow_control.pause_writing()" in inspect.getsource(ASGIProtocol.pause_writing)
    assert "self._flow_control.resume_writing()" in inspect.getsource(ASGIProtocol.resume_writing)
