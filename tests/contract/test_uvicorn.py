"""What `gracehooks.UvicornWorker` relies on in uvicorn and uvicorn-worker."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import re
import socket
import sys

import pytest

pytest.importorskip("uvicorn_worker")
import uvicorn_worker
from uvicorn.config import Config
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.server import Server, ServerState

from gracehooks.gunicorn.workers import uvicorn as ours
from gracehooks.gunicorn.workers.calls import Calls
from gracehooks.gunicorn.workers.farewell import UNNOTICED, UNNOTICED_LATE, limit_buffer, writes_late
from gracehooks.scoreboard import Page

PROTOCOLS = ["h11"]
try:
    import httptools  # noqa: F401

    PROTOCOLS.append("httptools")
except ImportError:
    pass


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Transport(asyncio.Transport):
    def __init__(self):
        super().__init__()
        self.written = b""
        self.closed = False
        self.limit = -1

    def set_write_buffer_limits(self, high=None, low=None):
        self.limit = high

    def get_extra_info(self, name, default=None):
        return default

    def write(self, data):
        self.written += data

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass

    def set_protocol(self, protocol):
        self.protocol = protocol


def module_of(http):
    return importlib.import_module(f"uvicorn.protocols.http.{http}_impl")


class Listening:
    """What our protocols ask of their worker."""

    def __init__(self):
        self.event_loop = asyncio.get_running_loop()
        self.born = set()
        self.calls = Calls(Page(requests=2, jobs=2))


def with_protocol(http, scenario, application=app, *, ours_too=False):
    """Run `scenario(protocol, transport, state)` on a protocol of uvicorn's, or ours, that has a connection."""

    async def run():
        config = Config(application, http=http, log_config=None, ws="none")
        config.load()
        if ours_too:
            worker = Listening()
            config.http_protocol_class = ours._noted(config.http_protocol_class, worker)
            config.http_protocol_class.calls = worker.calls
        state = ServerState()
        protocol = config.http_protocol_class(config=config, server_state=state, app_state={})
        transport = Transport()
        protocol.connection_made(transport)
        await scenario(protocol, transport, state)
        if protocol.timeout_keep_alive_task is not None:
            protocol.timeout_keep_alive_task.cancel()

    asyncio.run(run())


async def answered(transport, text=b"ok"):
    for _ in range(50):
        await asyncio.sleep(0)
        if transport.written.endswith(text):
            return
    raise AssertionError(transport.written)


def test_the_worker_class_is_the_one_that_ours_builds_on():
    assert {"_serve", "run", "init_signals", "callback_notify"} <= set(vars(uvicorn_worker.UvicornWorker))
    assert "self.config = Config(" in inspect.getsource(uvicorn_worker.UvicornWorker.__init__)


def test_the_server_starts_from_sockets_and_tells_its_own_ticks():
    assert "sockets" in inspect.signature(Server.startup).parameters
    assert list(inspect.signature(Server.on_tick).parameters) == ["self", "counter"]
    assert list(inspect.signature(Server.handle_exit).parameters) == ["self", "sig", "frame"]
    source = inspect.getsource(Server.startup)
    for part in ("await self.lifespan.startup()", "self.lifespan.should_exit", "self.lifespan.state"):
        assert part in source
    assert "config.http_protocol_class(" in source  # looked up for each connection: we replace it when we leave
    assert {"total_requests", "connections", "tasks", "default_headers"} <= set(vars(ServerState()))


def test_a_tick_refreshes_the_headers_of_the_answers():
    async def run():
        config = Config(app, log_config=None)
        config.load()
        server = Server(config)
        await server.on_tick(0)
        names = [name for name, _ in server.server_state.default_headers]
        assert names == [b"date", b"server"]

    asyncio.run(run())


@pytest.mark.parametrize("name", ["on", "auto", "off"])
def test_every_lifespan_has_a_state_and_says_whether_it_failed(name):
    async def run():
        config = Config(app, lifespan=name, log_config=None)
        config.load()
        lifespan = config.lifespan_class(config)
        assert lifespan.should_exit is False
        assert lifespan.state == {}
        assert {"startup", "shutdown"} <= {each for each, _ in inspect.getmembers(lifespan)}
        assert hasattr(lifespan, "send") == (name != "off")

    asyncio.run(run())


def test_the_proxy_headers_middleware_is_the_outermost_layer_and_looks_at_two_headers():
    async def run():
        config = Config(app, log_config=None)
        config.load()
        assert type(config.loaded_app) is ProxyHeadersMiddleware
        seen = []

        async def inner(scope, receive, send):
            seen.append(scope)

        middleware = ProxyHeadersMiddleware(inner, "*")
        assert middleware.app is inner
        others = [b"x-forwarded-host", b"x-forwarded-port", b"x-real-ip", b"forwarded", b"via", b"host"]
        for headers in ([], [(name, b"for=10.0.0.1;proto=https") for name in others]):
            scope = {"type": "http", "scheme": "http", "client": ("127.0.0.1", 1), "headers": headers}
            await middleware(dict(scope), None, None)
            assert seen.pop() == scope
        for name, value in ((b"x-forwarded-for", b"10.0.0.1"), (b"x-forwarded-proto", b"https")):
            scope = {"type": "http", "scheme": "http", "client": ("127.0.0.1", 1), "headers": [(name, value)]}
            await middleware(dict(scope), None, None)
            assert seen.pop() != scope

    asyncio.run(run())


@pytest.mark.parametrize("http", PROTOCOLS)
def test_the_only_timer_of_a_protocol_is_the_keep_alives(http):
    source = inspect.getsource(module_of(http))
    assert source.count("loop.call_later(") == 1
    assert "timeout_keep_alive_handler" in source
    assert "self.loop.create_task(" in source


@pytest.mark.parametrize("http", PROTOCOLS)
def test_an_answer_ends_a_cycle_and_a_default_header_ends_the_connection(http):
    async def scenario(protocol, transport, state):
        assert protocol.cycle is None
        assert not ours._is_reading(protocol)
        protocol.data_received(b"GET / HTTP/1.1\r\n")
        assert ours._is_reading(protocol)
        protocol.data_received(b"Host: test\r\n\r\n")
        cycle = protocol.cycle
        assert not ours._is_reading(protocol)
        assert not cycle.response_complete
        assert not cycle.response_started
        assert not cycle.disconnected
        assert not cycle.more_body
        assert cycle.transport is transport
        assert cycle.message_event._value is cycle.message_event.is_set() is True
        await answered(transport)
        assert cycle.response_started
        assert cycle.response_complete
        assert not transport.closed
        assert state.total_requests == 1
        # The headers are taken from the state when a request comes, so that they say it to every one that still comes.
        state.default_headers = [*state.default_headers, ours.CLOSE]
        transport.written = b""
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        assert ours.CLOSE in protocol.cycle.default_headers
        await answered(transport)
        assert transport.written.lower().count(b"connection: close\r\n") == 1
        assert transport.closed

    with_protocol(http, scenario)


@pytest.mark.parametrize("http", PROTOCOLS)
def test_the_application_gets_bound_methods_of_the_cycle_of_its_module(http):
    seen = []

    async def application(scope, receive, send):
        seen.append((receive.__self__, send.__self__))
        await app(scope, receive, send)

    async def scenario(protocol, transport, state):
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        await answered(transport)
        assert seen == [(protocol.cycle, protocol.cycle)]
        assert type(protocol.cycle) is module_of(http).RequestResponseCycle

    with_protocol(http, scenario, application)


@pytest.mark.parametrize("listens", [True, False], ids=["listens", "listens-later"])
@pytest.mark.parametrize("http", PROTOCOLS)
def test_a_cycle_that_is_told_hears_the_end_and_sends_all_the_same(http, listens, monkeypatch):
    monkeypatch.setattr(module_of(http), "RequestResponseCycle", module_of(http).RequestResponseCycle)
    heard = []

    async def application(scope, receive, send):
        heard.append(await receive())
        waiting = asyncio.ensure_future(receive()) if listens else told.wait()
        await asyncio.sleep(0)
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        heard.append(await waiting)
        heard.append(await receive())
        await send({"type": "http.response.body", "body": b"bye"})

    async def scenario(protocol, transport, state):
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        await answered(transport, b"\r\n\r\n")
        cycle = protocol.cycle
        assert ours._is_event_stream(cycle)
        assert protocol.transport is cycle.transport is transport
        cycle.tell()
        told.set()
        await answered(transport, b"bye\r\n0\r\n\r\n")
        ends = [each["type"] for each in heard if each is not True]
        assert ends == ["http.request", *["http.disconnect"] * (1 + listens)]

    told = asyncio.Event()
    with_protocol(http, scenario, application, ours_too=True)


@pytest.mark.parametrize("http", PROTOCOLS)
def test_a_body_that_still_comes_is_delivered_before_the_end_is_told(http, monkeypatch):
    monkeypatch.setattr(module_of(http), "RequestResponseCycle", module_of(http).RequestResponseCycle)
    heard = []

    async def application(scope, receive, send):
        await asyncio.sleep(0)
        while True:
            message = await receive()
            heard.append((message["type"], message.get("body")))
            if message["type"] == "http.disconnect":
                break
        await app(scope, receive, send)

    async def scenario(protocol, transport, state):
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\nbody")
        protocol.cycle.tell()
        await answered(transport)
        assert heard == [("http.request", b"body"), ("http.disconnect", None)]

    with_protocol(http, scenario, application, ours_too=True)


@pytest.mark.parametrize("http", PROTOCOLS)
def test_the_head_that_is_noted_is_that_of_the_answer_to_this_request(http, monkeypatch):
    monkeypatch.setattr(module_of(http), "RequestResponseCycle", module_of(http).RequestResponseCycle)

    heads = []

    async def application(scope, receive, send):
        if scope["path"] == "/reads":
            message = await receive()
            while message["more_body"]:
                message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        heads.append(receive.__self__.head)
        if scope["path"] == "/late":
            await receive()
            heads.append(receive.__self__.head)
        await send({"type": "http.response.body", "body": b"ok"})

    async def scenario(protocol, transport, state):
        head = b"POST /%s HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n"
        protocol.data_received(head % b"reads" + b"Expect: 100-continue\r\n\r\n")
        await answered(transport, b"100 Continue\r\n\r\n" if http == "httptools" else b"\r\n\r\n")
        protocol.data_received(b"body")
        await answered(transport)
        assert heads.pop().startswith(b"HTTP/1.1 200 OK\r\n")
        for path, expected in ((b"ignores", [None]), (b"late", [None, None])):
            transport.written = b""
            protocol.data_received(head % path + b"\r\nbody")
            await answered(transport)
            assert heads == expected
            heads.clear()

    with_protocol(http, scenario, application, ours_too=True)


def test_what_is_written_leaves_the_process_at_once_or_the_loop_is_known_to_write_late():
    uvloop = pytest.importorskip("uvloop")
    for make in (asyncio.new_event_loop, uvloop.new_event_loop):
        loop = make()

        async def run(loop=loop):
            ours_, theirs = socket.socketpair()
            with theirs:
                for each in (ours_, theirs):
                    each.setblocking(False)
                transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours_)
                limit_buffer(transport, paused=False, unnoticed=UNNOTICED_LATE)
                transport.write(b"head")
                transport.write(b"body")
                assert (transport.get_write_buffer_size() > 0) is writes_late(loop)
                await asyncio.sleep(0)
                assert theirs.recv(100) == b"headbody"
                limit_buffer(transport, paused=False)
                transport.write(b"more")
                assert theirs.recv(100) == b"more"
                transport.close()

        loop.run_until_complete(run())
        loop.close()


@pytest.mark.parametrize("http", PROTOCOLS)
def test_a_call_lasts_until_its_answer_has_left_the_process(http):
    async def scenario(protocol, transport, state):
        assert transport.limit == UNNOTICED
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        (task,) = state.tasks
        await asyncio.wait([task])
        (slow, noted) = (protocol.flow, protocol.calls.attended)
        protocol.pause_writing()
        assert (slow in noted, transport.limit) == (True, 0)
        waits = asyncio.ensure_future(slow.drain())
        await asyncio.sleep(0)
        assert not waits.done()
        protocol.resume_writing()
        await waits
        assert (slow in noted, transport.limit) == (False, UNNOTICED)
        protocol.pause_writing()
        waits = asyncio.ensure_future(slow.drain())
        protocol.connection_lost(None)
        await waits
        assert slow not in noted

    with_protocol(http, scenario, ours_too=True)


@pytest.mark.parametrize("http", PROTOCOLS)
def test_a_cycle_writes_the_head_of_its_answer_at_once_and_asks_little_else_of_its_transport(http):
    stock = module_of(http).RequestResponseCycle
    source = "".join(inspect.getsource(each) for each in stock.__mro__ if "uvicorn" in each.__module__)
    assert set(re.findall(r"\btransport\.(\w+)", source)) == {
        name for name in vars(ours._Overheard) if not name.startswith("_") and name not in ours._Overheard.__slots__
    }


def test_websocket_protocols_close_with_1012_and_say_whether_they_are_open():
    found = 0
    for name in ("websockets", "websockets_sansio", "wsproto"):
        try:
            module = importlib.import_module(f"uvicorn.protocols.websockets.{name}_impl")
        except ImportError:
            continue
        (protocol,) = (
            each
            for each in vars(module).values()
            if inspect.isclass(each) and each.__module__ == module.__name__ and "shutdown" in vars(each)
        )
        found += 1
        assert "1012" in inspect.getsource(protocol.shutdown)
        assert "self.transport.close()" in inspect.getsource(protocol.shutdown)
        source = inspect.getsource(protocol.__init__)
        assert "handshake_completed_event" in source or "self.handshake_complete =" in source
        assert not hasattr(protocol, "cycle")
        assert "default_headers" in source
    if "websockets" in sys.modules:
        assert found


def test_a_call_that_is_dropped_when_no_loop_runs_any_more_ends_in_silence():
    page = Page(requests=2, jobs=2)

    async def never(scope, receive, send):
        await asyncio.Event().wait()

    call = Calls(page).counted(never, None)({"type": "http", "method": "GET", "path": "/"}, None, None)
    loop = asyncio.new_event_loop()
    task = loop.create_task(call)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert page.in_flight == 1
    call.close()
    assert page.in_flight == 0
    task._log_destroy_pending = False
