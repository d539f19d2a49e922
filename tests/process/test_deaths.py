"""A worker that dies at once leaves a report of exactly what it had in flight: SIGKILL, a crash in C, out of memory.

Out of memory is tested on one class, TEST_FULL=1 does it on all: a real control group with a bound, and the kernel's kill.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from concurrent.futures import Future
from contextlib import ExitStack

import gunicorn
import pytest

from tests.kit import Server, apps, eventually, serve
from tests.kit.cgroups import little_memory
from tests.kit.classes import CLASSES, LOOPS
from tests.kit.clients import ask

MEGABYTE = 1 << 20

COMMON = """
import asyncio, ctypes, logging, os, threading, time
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Slow(logging.Handler):
    def emit(self, record):
        if record.exc_info:
            (HERE / f"begun-telling-{os.getpid()}").touch()
            while not (HERE / "go").exists():
                time.sleep(0.02)


def starts(path):
    (HERE / f"begun-{path}-{os.getpid()}").touch()
    if path == "job":
        threading.Thread(target=time.sleep, args=(600,), name="the job").start()
    elif path == "raise":
        for name in ("gunicorn.error", "uvicorn.error"):
            logging.getLogger(name).addHandler(Slow())
        raise RuntimeError("a mistake")
    elif path == "crash":
        ctypes.string_at(0)
    elif path == "crash-of-a-child":
        child = os.fork()
        if not child:
            ctypes.string_at(0)
        assert os.waitpid(child, 0)[1] != 0
    elif path == "eat":
        eaten = []
        while True:
            eaten.append(bytearray(os.urandom(1 << 20)))


"""
WSGI = """
def app(environ, start_response):
    path = environ["PATH_INFO"].strip("/")
    starts(path)
    while path.startswith("wait") and not (HERE / "go").exists():
        time.sleep(0.02)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""
ASGI = (
    apps.LIFESPAN
    + """
LARGE = b"x" * (32 << 20)


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    path = scope["path"].strip("/")
    starts(path)
    while path.startswith("wait") and not (HERE / "go").exists():
        await asyncio.sleep(0.02)
    body = LARGE if path == "large" else b"ok"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""
)


def source(worker: str) -> str:
    return COMMON + (ASGI if worker in LOOPS else WSGI)


class Victim:
    """The worker that will die, with requests and a job that are known, and the others."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.flying: dict[int, dict[str, Future[int]]] = {pid: {} for pid in server.workers()}
        self.jobs: dict[int, int] = dict.fromkeys(self.flying, 0)
        assert ask(server, "job").result(60) == 200
        self.jobs[self._who("job")] += 1
        # A worker that takes one request at a time has one, and the next goes to another worker.
        for number in range(len(self.flying) if "Sync" in self._class() else 3):
            answer = ask(server, f"wait-{number}")
            self.flying[self._who(f"wait-{number}")][f"/wait-{number}"] = answer

    def _class(self) -> str:
        return (self.server.dir / "gunicorn.conf.py").read_text()

    def _who(self, path: str) -> int:
        (found,) = eventually(lambda: list(self.server.dir.glob(f"begun-{path}-*")), what=f"the beginning of {path}")
        return int(found.name.rpartition("-")[2])

    def check(self, pid: int, reason: str, *more: str) -> None:
        """`pid` has died: exactly its requests and jobs are lost, for `reason`; the others are answered in the end."""
        server = self.server
        ended = server.wait_for("WorkerEnded", worker=pid)
        assert reason in ended["reason"], ended
        lost = ended["lost"]
        assert sorted(each["path"] for each in lost["requests"]) == sorted([*self.flying[pid], *more]), (
            ended,
            self.flying,
        )
        assert {(each["method"], each["reason"]) for each in lost["requests"]} <= {("GET", ended["reason"])}
        assert all(each["age"] >= 0 for each in lost["requests"])
        assert [each["name"] for each in lost["jobs"]] == ["the job"] * self.jobs[pid]
        assert [answer.result(60) for answer in self.flying[pid].values()] == [0] * len(self.flying[pid])
        (server.dir / "go").touch()
        others = [each for other, answers in self.flying.items() if other != pid for each in answers.values()]
        assert [each.result(60) for each in others] == [200] * len(others)
        assert ask(server, "").result(60) == 200
        with_jobs = {other for other, count in self.jobs.items() if count}
        code = server.stop()
        stopped = server.wait_for("Stopped")
        assert sorted(each["path"] for each in stopped["lost"]["requests"]) == sorted([*self.flying[pid], *more])
        assert (stopped["outcome"] == "completed") is (not lost["requests"] and not with_jobs), stopped
        assert server.history()[-1]["lost"] == stopped["lost"]
        assert code == 0


CONFIG = "gracehooks.configure(drain_timeout=20, job_timeout=0.2, job_grace=0.1)\ntimeout = 300\n"


@pytest.mark.parametrize("worker", CLASSES)
@pytest.mark.parametrize("death", ["SIGKILL", "SIGSEGV"])
def test_a_worker_that_dies_leaves_a_report_of_exactly_what_it_had(worker: str, death: str) -> None:
    with serve(source(worker), CONFIG, worker=worker, workers=2) as server:
        victim = Victim(server)
        pid = max(victim.flying, key=lambda each: len(victim.flying[each]))
        if death == "SIGKILL":
            os.kill(pid, signal.SIGKILL)
            victim.check(pid, "killed by SIGKILL")
        elif "Sync" in worker:  # its only thread waits: somebody else has to make it crash
            os.kill(pid, signal.SIGSEGV)
            victim.check(pid, "crashed with SIGSEGV")
        else:
            ask(server, "crash")
            pid = victim._who("crash")
            victim.check(pid, "crashed with SIGSEGV", "/crash")
            said = f"where worker {pid} (crashed with SIGSEGV) stood:\n"
            title, innermost, outer = server.log().partition(said)[2].splitlines()[:3]
            assert title.endswith("(it got the signal), at:")
            assert "ctypes/__init__.py" in innermost
            assert "in starts" in outer


def test_the_crash_of_a_child_is_not_the_workers() -> None:
    with serve(source("gracehooks.Worker"), CONFIG, worker="gracehooks.Worker", workers=1) as server:
        (pid,) = server.workers()
        assert ask(server, "crash-of-a-child").result(60) == 200
        assert "Fatal Python error: Segmentation fault" in server.log()
        os.kill(pid, signal.SIGKILL)
        server.wait_for("WorkerEnded", worker=pid)
        server.stop()
        assert "where worker" not in server.log()


@pytest.mark.parametrize("worker", CLASSES)
def test_a_request_whose_mistake_is_being_logged_has_no_answer_yet(worker: str) -> None:
    """The server answers 500 after that: a worker that dies before has lost the request."""
    with serve(source(worker), CONFIG, worker=worker, workers=2) as server:
        answer = ask(server, "raise")
        (told,) = eventually(lambda: list(server.dir.glob("begun-telling-*")), what="the beginning of the log's line")
        pid = int(told.name.rpartition("-")[2])
        os.kill(pid, signal.SIGKILL)
        lost = server.wait_for("WorkerEnded", worker=pid)["lost"]
        assert answer.result(60) == 0
        assert [each["path"] for each in lost["requests"]] == ["/raise"]
        (server.dir / "go").touch()
        assert ask(server, "raise").result(60) == 500
        assert server.stop() == 0
        assert [each["path"] for each in server.wait_for("Stopped")["lost"]["requests"]] == ["/raise"]


@pytest.mark.parametrize("worker", LOOPS)
@pytest.mark.parametrize(
    "reads", [False, True], ids=["a client that reads nothing", "a client that reads it in the end"]
)
def test_an_answer_that_the_kernel_has_not_taken_is_in_flight(worker: str, reads: bool) -> None:
    """An event loop keeps it in the process, and the application has long gone on."""
    with serve(source(worker), CONFIG, worker=worker, workers=1) as server:
        (pid,) = server.workers()
        with server.address.connect() as client:
            client.sendall(b"GET /large HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            assert client.recv(1, socket.MSG_PEEK) == b"H"
            assert ask(server, "").result(60) == 200  # meanwhile the loop has turned
            size = 0
            while reads and (part := client.recv(1 << 20)):
                size += len(part)
            assert size == 0 or size > 32 << 20
            assert ask(server, "").result(60) == 200
            os.kill(pid, signal.SIGKILL)
            lost = server.wait_for("WorkerEnded", worker=pid)["lost"]
            # What was answered in this very moment may be in the report as well.
            assert [each["path"] for each in lost["requests"] if each["path"] != "/"] == ["/large"] * (not reads)


@pytest.mark.parametrize("worker", LOOPS)
def test_more_requests_than_a_page_begins_with_are_named_too(worker: str) -> None:
    """Event loops have many at once: WebSockets, streams, long polls."""
    number = 400
    with serve(source(worker), CONFIG, worker=worker, workers=1) as server, ExitStack() as clients:
        (pid,) = server.workers()
        for each in range(number):
            client = clients.enter_context(server.address.connect())
            client.sendall(f"GET /wait-{each}?secret HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        eventually(lambda: len(list(server.dir.glob("begun-wait-*"))) == number, what="the requests")
        eventually(
            lambda: f"{number} requests" in server.cli("status", "--pidfile", str(server.pidfile)).stdout,
            what="the number in the status",
        )
        os.kill(pid, signal.SIGKILL)
        lost = server.wait_for("WorkerEnded", worker=pid)["lost"]["requests"]
        assert sorted(each["path"] for each in lost if each["path"] != "/") == sorted(
            f"/wait-{each}" for each in range(number)
        )
        assert len(server.history()[-1]["lost"]["requests"]) == len(lost)


TURN = """
open("begun.txt", "a").write(f"{scope['path']} {asyncio.get_running_loop().__module__}\\n")
while scope["path"] == "/gather" and not os.path.exists("all-sent"):
    time.sleep(0.01)
if scope["path"] == "/dies":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("worker", LOOPS)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_what_was_answered_in_the_turn_of_the_loop_in_which_its_worker_dies(worker: str, tls: bool) -> None:
    """It has left the process, where the loop would have had it written at the turn's end; or it is in the report."""
    with serve(apps.reading(TURN), CONFIG, worker=worker, workers=1, tls=tls) as server:
        (pid,) = server.workers()
        paths = ["/gather", *(f"/{number}" for number in range(10)), "/dies"]
        clients = {path: server.address.connect() for path in paths}
        assert server.get("/").status == 200  # and they are accepted
        for path, client in clients.items():
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            if path == "/gather":
                eventually(lambda: "/gather" in (server.dir / "begun.txt").read_text(), what="its beginning")
        (server.dir / "all-sent").touch()
        lost = {each["path"] for each in server.wait_for("WorkerEnded", worker=pid)["lost"]["requests"]}
        unanswered = set()
        for path, client in clients.items():
            with client:
                try:
                    answered = client.recv(1000).startswith(b"HTTP/1.1 200 ")
                except ConnectionResetError:
                    answered = False
            if not answered:
                unanswered.add(path)
        begun, loops = zip(*(line.split() for line in (server.dir / "begun.txt").read_text().splitlines()), strict=True)
        assert len(begun) > 3
        assert set(loops) == {"uvloop"}
        assert unanswered & set(begun) == lost & unanswered, (unanswered, lost, begun)
        # Before gunicorn 27 the connection waits for the call, and the page learns of the answer a step later.
        assert lost <= unanswered or gunicorn.version_info < (27,)


@pytest.mark.parametrize("worker", CLASSES if os.environ.get("TEST_FULL") == "1" else ["gracehooks.Worker"])
def test_a_worker_that_eats_all_memory_is_told_of_as_out_of_memory(worker: str) -> None:
    workers = 3 if "Sync" in worker else 2
    with little_memory(300 * MEGABYTE) as group:
        start = (
            f"echo $$ > {group}/cgroup.procs && exec {shlex.quote(sys.executable)} -m gunicorn -c {{config}} {{target}}"
        )
        with serve(source(worker), CONFIG, worker=worker, workers=workers, command=["sh", "-c", start]) as server:
            victim = Victim(server)
            if "Sync" in worker:
                (server.dir / "go").touch()
                for answers in victim.flying.values():
                    assert [each.result(60) for each in answers.values()] == [200] * len(answers)
                    answers.clear()
            ask(server, "eat")
            victim.check(victim._who("eat"), "killed by the kernel: out of memory", "/eat")
