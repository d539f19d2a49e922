"""The two event loop classes leave without losing: HTTP, streams, WebSockets, jobs after answers, and what is stuck."""

from __future__ import annotations

import base64
import http.client
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.kit import Server, eventually, load, serve, within
from tests.kit.classes import LOOPS

pytest.importorskip("uvicorn_worker")
#: How many WebSockets are open, and the seconds in which they have to go (the promise is 200 in 10).
SOCKETS = int(os.environ.get("TEST_WEBSOCKETS", "20"))
WINDOW = float(os.environ.get("TEST_WINDOW", "2"))
HTTPTOOLS = True
try:
    import httptools  # noqa: F401
    import uvloop  # noqa: F401
    import websockets  # noqa: F401
except ImportError:
    HTTPTOOLS = False  # the oldest supported gunicorn is tested with what uvicorn has without extras

#: h11 on asyncio; the class itself takes httptools and uvloop where they are installed.
H11 = """
import gracehooks

class H11Worker(gracehooks.UvicornWorker):
    CONFIG_KWARGS = {"loop": "asyncio", "http": "h11"}

class OldWebSockets(gracehooks.UvicornWorker):
    CONFIG_KWARGS = {"ws": "websockets"}
"""
EACH = [*LOOPS, "h11_uvicorn.H11Worker"]

APP = """
import asyncio, os, signal, sys, time
from pathlib import Path
import gracehooks

HERE = Path(__file__).parent


def note(text):
    file = os.open(HERE / "notes.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, text.encode() + b"\\n")
    os.close(file)


async def lifespan(receive, send):
    while True:
        message = await receive()
        if message["type"] == "lifespan.shutdown":
            note("lifespan shutdown")
            while os.environ.get("HANG_IN_LIFESPAN"):
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


def start(type="text/plain", status=200, **headers):
    fields = [(b"content-type", type.encode())]
    return {"type": "http.response.start", "status": status, "headers": fields}


def part(data, more=True):
    return {"type": "http.response.body", "body": data, "more_body": more}


async def stream(receive, send, type, polite):
    # As frameworks do it: one task that sends, one that listens for the end.
    listener = asyncio.ensure_future(receive())
    await asyncio.sleep(0)
    await send(start(type))
    number = 0
    while True:
        if listener.done():
            if listener.result()["type"] == "http.disconnect":
                break
            listener = asyncio.ensure_future(receive())
        number += 1
        await send(part(b"data: %d %s\\n\\n" % (number, gracehooks.state().encode())))
        await asyncio.sleep(0.05)
    note("told after %s" % type)
    if polite:
        await send(part(b"data: bye\\n\\n", False))


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    path = scope["path"]
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                return note("websocket %s" % message["code"])
            await send({"type": "websocket.send", "text": str(os.getpid())})
    body = b"ok"
    if path == "/sse":
        return await stream(receive, send, "text/event-stream", True)
    if path == "/sse-cut":
        return await stream(receive, send, "text/event-stream; charset=utf-8", False)
    if path == "/poll":
        while (await receive())["type"] != "http.disconnect":
            pass
        return note("poll told")
    if path == "/parts":
        await send(start())
        for number in range(20):
            await send(part(b"%02d\\n" % number))
            await asyncio.sleep(0.05)
        return await send(part(b"end", False))
    if path == "/upload":
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        body = b"%d" % size
    elif path == "/slow":
        note("slow begins")
        await asyncio.sleep(float(scope["query_string"] or 0.5))
    elif path == "/block":
        note("block begins")
        time.sleep(float(scope["query_string"]))
    elif path == "/stuck":
        note("stuck begins")
        time.sleep(120)
    elif path == "/swallow":
        note("swallow begins")
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
    elif path == "/after":
        await send(start())
        await send(part(b"answered", False))
        await asyncio.sleep(0.7)
        return note("background done")
    await send(start())
    await send(part(body, False))
"""

CONFIG = """
import atexit, os
from pathlib import Path

NOTES = str(Path(__file__).parent / "notes.txt")

def note(text):
    with open(NOTES, "a") as file:
        file.write(text + "\\n")

def post_worker_init(worker):
    atexit.register(note, "atexit")
    gracehooks.on_shutdown(lambda: note("on_shutdown"))

def worker_exit(server, worker):
    note("worker_exit")

def worker_int(worker):
    note("worker_int")

def worker_abort(worker):
    note("worker_abort")
"""


@contextmanager
def serving(worker: str, config: str = "", workers: int = 1, **env: str) -> Iterator[Server]:
    with serve(
        app=APP,
        worker=worker,
        workers=workers,
        config=CONFIG + config,
        files={"h11_uvicorn.py": H11},
        env=env,
    ) as server:
        yield server


def notes(server: Server) -> list[str]:
    try:
        return (server.dir / "notes.txt").read_text().splitlines()
    except FileNotFoundError:
        return []


def noted(server: Server, text: str) -> bool:
    return text in notes(server)


def ask(server: Server, path: str) -> socket.socket:
    """Send a request and do not wait for the answer."""
    connection = server.address.connect()
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    return connection


def read_answer(connection: socket.socket) -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer


def outcome(server: Server) -> dict:
    """The record of the stop."""
    return next(each for each in reversed(server.history()) if each["kind"] == "stop")


# -- nothing is lost ----------------------------------------------------------------------------------------------
def test_nothing_is_lost_when_generations_follow_one_another_with_h11():
    """The five classes themselves: test_rolling.py."""
    with serve(worker="h11_uvicorn.H11Worker", workers=2, files={"h11_uvicorn.py": H11}) as server:
        with load(server, think=0, clients=6) as traffic:
            traffic.wait(100)
            for change in (server.upgrade, server.reload, server.upgrade):
                assert change()["event"] == "UpgradeCompleted"
                traffic.wait(100)
        assert not traffic.lost, traffic.table()
        assert traffic.counts["keepalive"]["ok"], traffic.table()
        assert server.stop() == 0
        assert outcome(server)["outcome"] == "completed"


@pytest.mark.parametrize("worker", EACH)
def test_requests_under_way_end_and_say_that_the_connection_ends(worker):
    with serving(worker) as server:
        slow = ask(server, "/slow?1")
        parts = ask(server, "/parts")
        upload = server.address.connect()
        upload.sendall(b"POST /upload HTTP/1.1\r\nHost: test\r\nContent-Length: 60000\r\n\r\n" + b"x" * 20000)
        fresh = server.address.connect()
        kept = http.client.HTTPConnection("test")
        kept.sock = server.address.connect()
        kept.request("GET", "/")
        assert kept.getresponse().read() == b"ok"
        half = server.address.connect()
        half.sendall(b"GET / HT")
        eventually(lambda: noted(server, "slow begins"), what="the slow request")
        eventually(lambda: parts.recv(1000, socket.MSG_PEEK), what="the first part")

        server.signal("TERM")
        server.wait_for("AcceptingEnded")
        time.sleep(0.1)
        # What was accepted and idle is still answered, and a request that had begun to come is read to its end.
        kept.request("GET", "/")
        answer = kept.getresponse()
        assert (answer.read(), answer.getheader("connection")) == (b"ok", "close")
        half.sendall(b"TP/1.1\r\nHost: test\r\n\r\n")
        fresh.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        for each in (half, fresh):
            answer = read_answer(each)
            assert (answer.read(), answer.getheader("connection")) == (b"ok", "close")
        for _ in range(2):
            upload.sendall(b"x" * 20000)
            time.sleep(0.2)
        answer = read_answer(upload)
        assert (answer.read(), answer.getheader("connection")) == (b"60000", "close")
        answer = read_answer(slow)
        assert (answer.read(), answer.getheader("connection")) == (b"ok", "close")
        assert read_answer(parts).read().endswith(b"19\nend")
        for each in (slow, upload, half, fresh):
            assert each.recv(1) == b""  # closed, and not reset
        assert server.wait_gone(server.process.pid) == 0
        assert outcome(server)["lost"] == {"requests": [], "jobs": []}


@pytest.mark.parametrize("worker", LOOPS)
def test_the_backlog_of_a_busy_worker_is_served_and_silent_connections_linger(worker):
    with serving(worker, "gracehooks.configure(drain_timeout=10)") as server:
        blocking = ask(server, "/block?1.5")
        eventually(lambda: noted(server, "block begins"))
        waiting = [ask(server, f"/?{number}") for number in range(200)]
        silent = [server.address.connect() for _ in range(100)]
        server.signal("TERM")
        server.wait_for("AcceptingEnded")
        for each in (blocking, *waiting):
            assert read_answer(each).read() == b"ok"
        for each in silent[::2]:
            each.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        for each in silent[::2]:
            answer = read_answer(each)
            assert (answer.read(), answer.getheader("connection")) == (b"ok", "close")
        for each in (*waiting, *silent[::2]):
            each.close()
        for each in silent[1::2]:
            assert each.recv(1) == b""
        assert server.wait_gone(server.process.pid) == 0
        assert outcome(server)["lost"] == {"requests": [], "jobs": []}


@pytest.mark.parametrize("worker", EACH)
def test_an_idle_worker_is_gone_at_once_and_runs_every_hook(worker):
    with serving(worker) as server:
        assert server.get("/").text == "ok"
        (pid,) = server.workers()
        took = []
        for _ in range(1):
            server.signal("TERM", pid)
            asked = time.monotonic()
            eventually(lambda: not os.path.exists(f"/proc/{pid}"), poll=0.005)
            took.append(time.monotonic() - asked)
        assert min(took) < 1.5, took
        assert notes(server) == ["lifespan shutdown", "on_shutdown", "worker_exit", "atexit"]
        ended = server.wait_for("WorkerEnded", worker=pid)
        assert ended["lost"] == {"requests": [], "jobs": []}, ended


@pytest.mark.parametrize("worker", LOOPS)
def test_the_hammer_and_the_abort_run_their_hooks(worker):
    with serving(worker, "timeout = 300") as server:
        (pid,) = server.workers()
        waiting = ask(server, "/slow?60")
        eventually(lambda: noted(server, "slow begins"))
        with within(0.5):
            server.signal("QUIT", pid)
            server.wait_for("WorkerEnded", worker=pid)
        ended = server.wait_for("WorkerEnded", worker=pid)
        assert [(each["method"], each["path"]) for each in ended["lost"]["requests"]] == [("GET", "/slow")]
        assert notes(server)[1:] == ["worker_int", "worker_exit", "atexit"]
        waiting.close()

        def other() -> list[int]:
            return [each for each in server.workers() if each != pid]

        (pid,) = eventually(other)
        assert server.get("/").text == "ok"
        stuck = ask(server, "/stuck")
        eventually(lambda: noted(server, "stuck begins"))
        with within(0.5):
            server.signal("ABRT", pid)
            server.wait_for("WorkerEnded", worker=pid)
        assert notes(server)[-3:] == ["worker_abort", "worker_exit", "atexit"]
        stuck.close()


@pytest.mark.parametrize("worker", LOOPS)
def test_workers_of_a_killed_master_drain_and_leave(worker):
    with serving(worker) as server:
        (pid,) = server.workers()
        slow = ask(server, "/slow?1")
        eventually(lambda: noted(server, "slow begins"))
        server.signal("KILL")
        assert read_answer(slow).read() == b"ok"
        eventually(lambda: "atexit" in notes(server), what="the orphan's end")
        eventually(lambda: not os.path.exists(f"/proc/{pid}"))


# -- those who wait for an end ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("worker", EACH)
def test_streams_and_long_polls_learn_of_the_drain_and_end_well(worker):
    with serving(worker, "gracehooks.configure(drain_timeout=2)") as server:
        sse, cut, poll = ask(server, "/sse"), ask(server, "/sse-cut"), ask(server, "/poll")
        eventually(lambda: sse.recv(1000, socket.MSG_PEEK) and cut.recv(1000, socket.MSG_PEEK))
        asked = time.monotonic()
        server.signal("TERM")
        told = read_answer(sse).read()  # an answer that is cut would raise IncompleteRead
        took = time.monotonic() - asked
        assert told.endswith(b"data: bye\n\n")
        assert b" draining\n" in told
        assert 1.2 < took < 6, took
        assert b" draining\n" in read_answer(cut).read()
        answer = read_answer(poll)
        assert (answer.status, answer.getheader("retry-after")) == (503, "1")
        assert server.wait_gone(server.process.pid) == 0
        assert outcome(server)["lost"] == {"requests": [], "jobs": []}
        assert {"told after text/event-stream", "poll told"} <= set(notes(server))


class WebSocket:
    """Just enough of a client: the handshake, and the code of the close frame."""

    def __init__(self, server: Server) -> None:
        self.socket = server.address.connect()
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET /ws HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            data = self.socket.recv(1)
            assert data, head
            head += data
        assert b" 101 " in head, head

    def close_code(self) -> int:
        frame = self.socket.recv(4, socket.MSG_WAITALL)
        assert frame[:1] == b"\x88", frame
        # The answer to it: masked, with the same code.
        self.socket.sendall(b"\x88\x82\0\0\0\0" + frame[2:4])
        return int.from_bytes(frame[2:4], "big")

    def worker(self) -> int:
        """The pid of the worker that has it."""
        self.socket.sendall(b"\x81\x82\0\0\0\0hi")
        frame = self.socket.recv(2, socket.MSG_WAITALL)
        assert frame[:1] == b"\x81", frame
        return int(self.socket.recv(frame[1], socket.MSG_WAITALL))


def closings(sockets: list[WebSocket], closed: Callable[[WebSocket], object] = lambda _: None) -> list[float]:
    """When each of them was closed, all with 1012, in seconds from now; `closed` is called at each."""
    began = time.monotonic()
    waiting = {each.socket: each for each in sockets}
    moments = []
    while waiting:
        readable, _, _ = select.select(list(waiting), [], [], 30)
        assert readable, f"{len(waiting)} are still open"
        for each in readable:
            moments.append(time.monotonic() - began)
            found = waiting.pop(each)
            assert found.close_code() == 1012
            assert each.recv(100) == b""
            each.close()
            closed(found)
    return moments


def assert_spread(moments: list[float]) -> None:
    """Over most of the window, and never many at once."""
    assert moments[-1] - moments[0] > WINDOW / 2, moments
    assert moments[-1] < WINDOW + 2, moments
    tenths = Counter(int(moment / WINDOW * 10) for moment in moments)
    print(
        f"{len(moments)} closed with 1012 from {moments[0]:.2f} s to {moments[-1]:.2f} s, by tenths: {sorted(tenths.items())}"
    )
    assert max(tenths.values()) <= max(6, len(moments) * 0.3), tenths


@pytest.mark.skipif(not HTTPTOOLS, reason="no WebSockets without the extras")
@pytest.mark.parametrize("worker", [*LOOPS, "h11_uvicorn.OldWebSockets"])
def test_websockets_are_closed_one_after_the_other(worker):
    with serving(worker, f"gracehooks.configure(drain_timeout={WINDOW})") as server:
        sockets = [WebSocket(server) for _ in range(SOCKETS)]
        server.signal("TERM")
        assert_spread(closings(sockets))
        assert server.wait_gone(server.process.pid) == 0
        assert notes(server).count("websocket 1012") == SOCKETS
        assert outcome(server)["lost"] == {"requests": [], "jobs": []}


@pytest.mark.skipif(not HTTPTOOLS, reason="no WebSockets without the extras")
@pytest.mark.parametrize("worker", LOOPS)
def test_websockets_that_come_back_land_on_the_new_generation(worker):
    with serving(worker, f"gracehooks.configure(drain_timeout={WINDOW})", workers=2) as server:
        sockets = [WebSocket(server) for _ in range(SOCKETS)]
        old = set(server.workers())
        assert {each.worker() for each in sockets} <= old
        assert server.upgrade()["event"] == "UpgradeCompleted"
        again: list[WebSocket] = []
        assert_spread(closings(sockets, lambda _: again.append(WebSocket(server))))
        assert {each.worker() for each in again} <= set(server.workers()) - old
        retired = server.wait_for("GenerationRetired")
        assert retired["lost"] == {"requests": [], "jobs": []}
        for each in again:
            each.socket.close()


@pytest.mark.parametrize("worker", LOOPS)
def test_what_goes_on_after_its_answer_is_a_job(worker):
    with serving(worker, "gracehooks.configure(drain_timeout=0.3, job_timeout=20)") as server:
        assert read_answer(ask(server, "/after")).read() == b"answered"
        assert server.stop() == 0
        assert "background done" in notes(server)
        assert notes(server).index("background done") < notes(server).index("lifespan shutdown")
        stopped = server.wait_for("Stopped")
        assert stopped["jobs"]["succeeded"] == 1, stopped
        assert not stopped["lost"]["requests"], stopped


# -- what is stuck -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("worker", LOOPS)
@pytest.mark.parametrize(("path", "where"), [("/stuck", "time.sleep(120)"), ("/swallow", "await asyncio.sleep(60)")])
def test_a_stuck_request_is_reported_and_the_worker_is_gone_in_time(worker, path, where):
    with serving(worker, "timeout = 300\ngracehooks.configure(drain_timeout=1, job_timeout=1)") as server:
        connection = ask(server, path)
        eventually(lambda: noted(server, f"{path[1:]} begins"))
        with within(1 + 1, slack=3):
            server.signal("TERM")
            server.wait_gone(server.process.pid)
        (lost,) = outcome(server)["lost"]["requests"]
        assert (lost["method"], lost["path"]) == ("GET", path)
        line = next(number for number, text in enumerate(APP.splitlines(), 1) if where in text and number > 60)
        assert f"app.py:{line} in app" in lost["where"].replace("\n", " "), lost
        assert {"worker_exit", "atexit"} <= set(notes(server))
        connection.close()


@pytest.mark.parametrize("worker", LOOPS)
def test_what_came_to_a_loop_that_is_blocked_is_counted(worker):
    config = "timeout = 300\nkeepalive = 60\ngracehooks.configure(drain_timeout=1, job_timeout=1)"
    with serving(worker, config) as server:
        used, new, half = ask(server, "/"), server.address.connect(), server.address.connect()
        assert read_answer(used).read()
        half.sendall(b"GET /half HTTP/1.1\r\nHost:")
        # Served by the one loop after those before it were accepted.
        assert read_answer(ask(server, "/")).status == 200
        blocking = ask(server, "/stuck")
        eventually(lambda: noted(server, "stuck begins"))
        for connection in (used, new):
            connection.sendall(b"GET /waits HTTP/1.1\r\nHost: test\r\n\r\n")
        server.signal("TERM")
        server.wait_gone(server.process.pid)
        lost = sorted((each["method"], each["path"]) for each in outcome(server)["lost"]["requests"])
        assert lost == [*[("?", "?")] * 3, ("GET", "/stuck")], lost
        for connection in (used, new, half, blocking):
            connection.close()


@pytest.mark.parametrize("worker", LOOPS)
def test_a_lifespan_shutdown_that_hangs_is_left_in_time(worker):
    with serving(worker, "gracehooks.configure(cleanup_timeout=1)", HANG_IN_LIFESPAN="1") as server:
        with within(1, slack=3):
            server.signal("TERM")
            server.wait_gone(server.process.pid)
        assert "lifespan shutdown" in server.log()
        assert {"worker_exit", "atexit"} <= set(notes(server))


# -- ready -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("worker", LOOPS)
@pytest.mark.parametrize(
    ("setting", "application", "reason"),
    [
        ("ready_path='/healthz'", "await send({**start, 'status': 500}); await send(end)", "answered 500 on /healthz"),
        ("ready_path='/healthz'", "raise RuntimeError('no luck')", "raised RuntimeError: no luck on /healthz"),
        ("probation=0.3", "LIFESPAN", "the lifespan startup failed: RuntimeError: no database"),
    ],
)
def test_a_worker_that_cannot_serve_never_does(worker, setting, application, reason):
    lifespan = application == "LIFESPAN"
    broken = f"""
        import traceback
        start = {{"type": "http.response.start", "status": 200, "headers": []}}
        end = {{"type": "http.response.body"}}

        async def app(scope, receive, send):
            if scope["type"] == "lifespan":
                await receive()
                if {lifespan}:
                    try:
                        raise RuntimeError("no database")
                    except RuntimeError:
                        await send({{"type": "lifespan.startup.failed", "message": traceback.format_exc()}})
                    return
                await send({{"type": "lifespan.startup.complete"}})
                await receive()
                return await send({{"type": "lifespan.shutdown.complete"}})
            {"pass" if lifespan else application}
        """
    with serve(worker=worker, workers=1, config=f"gracehooks.configure({setting})" if lifespan else "") as server:
        server.write("app.py", broken)
        server.configure(f"gracehooks.configure({setting})")
        mark = server.mark()
        assert server.upgrade()["event"] == "UpgradeRolledBack"
        verdict = server.wait_for("UpgradeRolledBack", after=mark)
        assert reason in verdict["reason"], verdict
        assert server.get("/").text == "ok"


# -- what it costs ---------------------------------------------------------------------------------------------------
def cpu(pid: int) -> int:
    """Nanoseconds that a process has had so far."""
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0])
