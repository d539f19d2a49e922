"""The drain of the three WSGI classes: what is on its way is answered, what is stuck is left and named, in time."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.kit import Late, Server, apps, eventually, serve, within
from tests.kit.classes import WSGI_CLASSES

NOTHING = {"requests": [], "jobs": []}
every_class = pytest.mark.parametrize("worker", WSGI_CLASSES)

#: The catalogue's application, and the ways of being stuck; each request leaves a file when it has begun.
APP = (
    apps.WSGI
    + """
import ctypes

import gracehooks

plain = app
real_sleep = time.sleep
if (HERE / "blocks").exists():
    from gevent import monkey

    real_sleep = monkey.get_original("time", "sleep")


def app(environ, start_response):
    path = environ["PATH_INFO"]
    (HERE / ("begun-" + path.strip("/"))).touch()
    if path == "/block":
        real_sleep(60)
    elif path == "/hold":
        time.sleep(0.4)
        ctypes.PyDLL(None).usleep(60_000_000)
    return plain(environ, start_response)


@gracehooks.on_shutdown
def older():
    (HERE / "older").touch()


@gracehooks.on_shutdown
def newer():
    (HERE / "newer").touch()
    if (HERE / "hangs").exists():
        time.sleep(60)


if (HERE / "infrastructure").exists():
    threading.Thread(target=time.sleep, args=(60,), name="infrastructure").start()
"""
)


class Client:
    """One connection, byte by byte."""

    def __init__(self, server: Server) -> None:
        self.sock = server.address.connect()
        self.got = b""

    def ask(self, path: str = "/fast", head: str = "GET {} HTTP/1.1\r\nHost: x\r\n", body: bytes = b"") -> Client:
        self.sock.sendall((head.format(path) + "\r\n").encode() + body)
        return self

    def rest(self) -> bytes:
        """Everything up to the end of the connection; b"" when it came without a byte."""
        while True:
            try:
                part = self.sock.recv(65536)
            except ConnectionResetError:
                return b"RESET " + self.got
            if not part:
                return self.got
            self.got += part

    def answer(self) -> bytes:
        """One answer of the application, which has a body of two bytes."""
        while not self.got.endswith(b"\r\n\r\nok"):
            part = self.sock.recv(65536)
            assert part, self.got
            self.got += part
        got, self.got = self.got, b""
        return got


def ask(server: Server, path: str) -> Callable[[], bytes]:
    """A request that has begun; call it for what became of it."""
    client = Client(server).ask(path)
    begun = server.dir / ("begun-" + path.partition("?")[0].strip("/"))
    eventually(begun.exists, what=f"the beginning of {path}")
    return client.rest


def served(answer: bytes) -> bool:
    return answer.startswith(b"HTTP/1.1 200 ") and b"onnection: close" in answer


def stopped(server: Server) -> dict[str, Any]:
    return server.wait_for("Stopped")


def lost_paths(event: dict[str, Any]) -> list[str]:
    return sorted(each["path"] for each in event["lost"]["requests"])


@every_class
def test_a_final_stop_serves_the_backlog(worker: str) -> None:
    with serve(APP, worker=worker, workers=1) as server:
        (pid,) = server.workers()
        os.kill(pid, signal.SIGSTOP)  # what connects now waits in the kernel
        clients = [Client(server).ask("/fast") for _ in range(200)]
        server.signal("TERM")
        server.wait_for("AcceptingEnded")
        os.kill(pid, signal.SIGCONT)
        answers = [each.rest() for each in clients]
        assert sum(map(served, answers)) == 200, [each for each in answers if not served(each)][:5]
        assert server.stop() == 0
        assert stopped(server)["lost"] == NOTHING
        assert server.wait_for("WorkerEnded", worker=pid)["reason"] == "drained"
        assert {"older", "newer"} <= set(os.listdir(server.dir))


@every_class
def test_a_stop_answers_whatever_is_on_its_way(worker: str) -> None:
    workers = 4 if "Sync" in worker else 1
    with serve(APP, worker=worker, workers=workers) as server:
        kept = Client(server)
        if workers == 1:
            assert b"close" not in kept.ask().answer()
        stream = ask(server, "/stream?n=12&s=0.1")
        upload = Client(server).ask("/upload", "POST {} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n", b"12345")
        eventually((server.dir / "begun-upload").exists)
        silent = [Client(server) for _ in range(100)]
        server.signal("TERM")
        server.wait_for("AcceptingEnded")
        time.sleep(0.3)  # now they are idle while the worker drains: that is the case that is tested
        for each in [*silent[:50], kept]:
            each.ask()
        upload_rest = threading.Timer(0.4, upload.sock.sendall, (b"67890",))
        upload_rest.start()
        answers = [each.rest() for each in silent[:50]]
        assert all(map(served, answers)), [each for each in answers if not served(each)][:5]
        assert served(kept.rest())
        assert served(upload.rest())
        assert upload.got.endswith(b"\r\n\r\n10")
        assert stream().count(b"part ") == 12
        assert [each.rest() for each in silent[50:]] == [b""] * 50
        with within(2.5):  # the linger of the silent ones is 2 s
            server.wait_gone(server.process.pid)
        assert stopped(server)["lost"] == NOTHING


STUCK = "gracehooks.configure(drain_timeout=1, job_timeout=0.3, cleanup_timeout=0.4)\n"


@every_class
def test_what_is_stuck_is_named_and_left_and_a_hanging_callback_too(worker: str) -> None:
    workers = 2 if "Sync" in worker else 1
    with serve(APP, STUCK, worker=worker, workers=workers) as server:
        ask(server, "/sleep?s=60&secret=1")
        other = ask(server, "/stream?n=5&s=0.1")
        server.write("hangs", "")
        with within(1.0 + 0.4 + 1.0, slack=1.5):
            server.stop()
        assert other().count(b"part ") == 5
        assert lost_paths(stopped(server)) == ["/sleep"]
        log = server.log()
        assert "app.py" in log[log.index("GET /sleep") :], "the stack of the lost request"
        assert "in newer" in log, "where the callback stood"
        assert "secret" not in log
        assert (server.dir / "newer").exists()


@every_class
def test_a_call_that_holds_the_gil_does_not_hold_the_exit(worker: str) -> None:
    with serve(APP, STUCK, worker=worker, workers=1) as server:
        ask(server, "/hold")
        with within(1.0 + 1.0, slack=1.5):
            server.stop()
        assert lost_paths(stopped(server)) == ["/hold"]


def test_a_blocked_event_loop_is_left_in_time() -> None:
    with serve(APP, STUCK, worker="gracehooks.GeventWorker", workers=1, files={"blocks": ""}) as server:
        ask(server, "/block")
        with within(1.0 + 1.0, slack=1.5):
            server.stop()
        assert lost_paths(stopped(server)) == ["/block"]
        log = server.log()
        assert "app.py" in log[log.index("GET /block") :]


@every_class
def test_an_idle_stop_is_immediate_even_with_a_thread_that_never_ends(worker: str) -> None:
    with serve(APP, worker=worker, files={"infrastructure": ""}) as server:
        workers = server.workers()
        with within(0.3 + 0.3):
            assert server.stop() == 0
        for each in workers:
            assert server.wait_for("WorkerEnded", worker=each)["reason"] == "drained"
        assert stopped(server)["lost"] == NOTHING


HOOKS = """
def worker_int(worker):
    worker.log.info("HOOK worker_int")


def worker_exit(server, worker):
    worker.log.info("HOOK worker_exit of %s", type(server).__name__)
"""


@every_class
def test_quit_is_the_hammer_with_hooks_and_report(worker: str) -> None:
    path = "/block" if "Gevent" in worker else "/sleep?s=60"
    with serve(APP, HOOKS, worker=worker, workers=1, files={"blocks": ""} if "Gevent" in worker else {}) as server:
        (pid,) = server.workers()
        answer = ask(server, path)
        began = time.monotonic()
        server.signal("QUIT", pid)
        server.wait_gone(pid)
        took = time.monotonic() - began
        if took > 0.5 + 1.0:
            raise Late(f"the hammer took {took:.2f} s")
        ended = server.wait_for("WorkerEnded", worker=pid)
        if "Sync" in worker:  # gunicorn's sync worker interrupts the request, and answers
            assert b" 500 " in answer()
        else:
            assert answer() in (b"", b"RESET ")
        assert lost_paths(ended) == [path.partition("?")[0]]
        assert "HOOK worker_int" in server.log()
        assert "HOOK worker_exit" in server.log()


def test_an_answer_that_the_hammer_cuts_is_named_where_the_request_runs_in_the_main_thread() -> None:
    with serve(APP, worker="gracehooks.SyncWorker", workers=1) as server:
        (pid,) = server.workers()
        rest = ask(server, "/stream?n=900&s=0.1")
        server.signal("QUIT", pid)
        assert b"part 0" in rest()
        assert lost_paths(server.wait_for("WorkerEnded", worker=pid)) == ["/stream"]


def test_a_connection_is_not_closed_with_unread_bytes_in_it() -> None:
    """An answer is not taken back by the bytes of a body that the application did not want."""
    body = b"x" * 200_000
    head = "POST {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 200000\r\n"
    for worker in WSGI_CLASSES:
        with serve(APP, worker=worker, workers=1) as server:
            client = Client(server)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            client.ask("/fast", head, body)
            answer = client.rest()
            assert answer.startswith(b"HTTP/1.1 200 "), (worker, answer)
            assert answer.endswith(b"ok"), (worker, answer)
            client.sock.close()
