"""Every way of being stuck on every worker class: gone in time, the report names exactly that, the others were answered.

By default each way once and each class at least once; TEST_FULL=1 runs the whole matrix, TEST_SEED another choice.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.kit import Server, apps, eventually, serve, within
from tests.kit.classes import CLASSES, LOOPS, WSGI_CLASSES
from tests.kit.clients import ask

TURNING = ["gracehooks.GeventWorker", *LOOPS]

DRAIN, JOBS, CLEANUP = 2.0, 0.8, 0.5
BOUNDS = f"gracehooks.configure(drain_timeout={DRAIN}, job_timeout={JOBS}, job_grace=0.2, cleanup_timeout={CLEANUP})\n"
#: How long each of the other requests takes, and how many there are: one worker can answer them all, one after the other.
OTHER, OTHERS = 0.15, 4
#: How long the interpreter's exit may wait for threads, in seconds (THREADS_AT_EXIT of drain/driver.py).
AT_EXIT = 0.3


@dataclass(frozen=True)
class Way:
    """A way of being stuck: what the report must name, and by when the worker must have left, in seconds from TERM on."""

    name: str
    classes: list[str]
    within: float
    request: str = ""
    job: str = ""
    #: What the log must say of where it stood, or of what did not end.
    says: str = ""


WAYS = [
    Way("request", WSGI_CLASSES, DRAIN, request="GET /stuck", says="app.py"),
    # Nobody knows its name: the worker has not read its head to the end.
    Way("arriving", CLASSES, DRAIN, request="? ?", says="1 requests and 0 jobs have not ended"),
    # What a request runs in an executor is a job of its own, and stands in a thread.
    Way("executor", LOOPS, DRAIN + JOBS, request="GET /stuck", job="endless", says="in endless"),
    Way("thread", CLASSES, OTHERS * OTHER + JOBS, job="endless thread", says="endless thread"),
    Way("gil", CLASSES, DRAIN, request="GET /stuck", says="in hold_the_gil"),
    Way("gil late", CLASSES, DRAIN, request="GET /stuck", says="app.py"),
    Way("exit", CLASSES, OTHERS * OTHER + AT_EXIT),
    Way("atexit", CLASSES, OTHERS * OTHER + CLEANUP, says="in hang_at_exit"),
    Way("callback", CLASSES, OTHERS * OTHER + CLEANUP, says="in hang_in_callback"),
    Way("callback gil", CLASSES, OTHERS * OTHER + CLEANUP, says="in hold_in_callback"),
    Way("loop", TURNING, DRAIN, request="GET /stuck", says="app.py"),
    Way("task", TURNING, OTHERS * OTHER + JOBS, job="deaf_task", says="deaf_task"),
    Way("request swallows", LOOPS, DRAIN, request="GET /stuck", says="app.py"),
    Way("lifespan", LOOPS, OTHERS * OTHER + CLEANUP, says="lifespan shutdown"),
]
MATRIX = [(way, worker) for way in WAYS for worker in way.classes]


def sample(seed: int) -> list[tuple[Way, str]]:
    """Each way once, the classes in turn."""
    turns = itertools.count(seed)
    return [(way, way.classes[next(turns) % len(way.classes)]) for way in WAYS]


CASES = MATRIX if os.environ.get("TEST_FULL") == "1" else sample(int(os.environ.get("TEST_SEED", "0")))

APP = """
import asyncio, atexit, concurrent.futures, os, threading, time
from pathlib import Path

import gracehooks
from gracehooks import jobs

HERE = Path(__file__).resolve().parent
WAY = os.environ["WAY"]
CLASS = os.environ["CLASS"]
real_sleep = time.sleep
if "Gevent" in CLASS:
    import gevent
    from gevent import monkey

    real_sleep = monkey.get_original("time", "sleep")


def endless():
    time.sleep(60)


def begun(what):
    (HERE / f"begun-{what}").touch()


async def deaf():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass


def deaf_task():
    while True:
        try:
            gevent.sleep(60)
        except gevent.GreenletExit:
            pass


def hang_at_exit():
    real_sleep(60)


if WAY == "exit":
    threading.Thread(target=time.sleep, args=(60,), name="of the application").start()
    POOL = concurrent.futures.ThreadPoolExecutor(1)
    POOL.submit(time.sleep, 60)
elif WAY == "atexit":
    atexit.register(hang_at_exit)
elif WAY == "callback":
    @gracehooks.on_shutdown
    def hang_in_callback():
        time.sleep(60)
elif WAY == "callback gil":
    @gracehooks.on_shutdown
    def hold_in_callback():
        hold_the_gil()


def starts():
    '''What the stuck request starts; None when the request itself is to be stuck.'''
    if WAY == "thread":
        return threading.Thread(target=time.sleep, args=(60,), name="endless thread").start
    if WAY == "task" and "Gevent" in CLASS:
        return lambda: gevent.spawn(deaf_task)
    if WAY == "task":
        return lambda: jobs.create_task(deaf(), name="deaf_task")
    if WAY in ("request", "executor", "loop", "gil", "gil late", "request swallows"):
        return None
    return lambda: None
"""

WSGI = """

def app(environ, start_response):
    path = environ["PATH_INFO"].strip("/")
    start = starts()
    if path == "other":
        begun(path)
        time.sleep(%(other)s)
    elif path == "stuck" and start is not None:
        start()
        begun(path)
    elif path == "stuck":
        begun(path)
        if WAY == "gil late":
            time.sleep(0.5)
        if WAY.startswith("gil"):
            hold_the_gil()
        elif WAY == "loop":
            real_sleep(60)
        else:
            time.sleep(60)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""

ASGI = """

async def lifespan(receive, send):
    while True:
        message = await receive()
        stops = message["type"] == "lifespan.shutdown"
        if stops and WAY == "lifespan":
            await deaf()
        await send({"type": message["type"] + ".complete"})
        if stops:
            return


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    path = scope["path"].strip("/")
    start = starts()
    if path == "other":
        begun(path)
        await asyncio.sleep(%(other)s)
    elif path == "stuck" and start is not None:
        start()
        begun(path)
    elif path == "stuck":
        begun(path)
        if WAY == "gil late":
            await asyncio.sleep(0.5)
        if WAY.startswith("gil"):
            hold_the_gil()
        elif WAY == "loop":
            time.sleep(60)
        elif WAY == "request swallows":
            await deaf()
        else:
            await asyncio.get_running_loop().run_in_executor(None, endless)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""


def begun(server: Server, what: str) -> None:
    eventually((server.dir / f"begun-{what}").exists, what=f"the beginning of {what}")


@contextmanager
def serving(way: Way, worker: str, config: str, workers: int = 2) -> Iterator[Server]:
    """A server that nobody has asked for anything yet.

    Where one thread takes the GIL for good, another that has just sent an answer cannot say so any more, and its request
    is in the report too: an answer that was perhaps not sent is never taken for one that was.
    """
    source = apps.HOLD_THE_GIL + APP + (ASGI if worker in LOOPS else WSGI) % {"other": OTHER}
    env = {"WAY": way.name, "CLASS": worker}
    with serve(source, config, worker=worker, workers=workers, env=env, answers=None) as server:
        server.wait_for("ServingStarted")
        yield server


@pytest.mark.parametrize(
    ("way", "worker"), CASES, ids=[f"{way.name}, {worker.removeprefix('gracehooks.')}" for way, worker in CASES]
)
def test_stuck(way: Way, worker: str) -> None:
    config = BOUNDS + "timeout = 300\n"
    with serving(way, worker, config) as server:
        if way.name == "arriving":
            half = server.address.connect()
            half.sendall(b"GET /half?secret HTTP/1.1\r\nHo")
        else:
            stuck = ask(server, "stuck?secret")
            begun(server, "stuck")
        if not way.request:
            assert stuck.result(60) == 200
        others = [ask(server, "other?secret") for _ in range(OTHERS)]
        begun(server, "other")
        with within(DRAIN + JOBS + CLEANUP + 1.0, slack=1.5):
            asked = time.monotonic()
            server.stop()
        assert [each.result(60) for each in others] == [200] * OTHERS

        stopped = server.wait_for("Stopped")
        lost = stopped["lost"]
        assert [f"{each['method']} {each['path']}" for each in lost["requests"]] == [way.request] * bool(way.request)
        assert [each["name"] for each in lost["jobs"]] == [way.job] * bool(way.job)
        assert server.history()[-1]["lost"] == lost
        if way.name == "arriving":
            half.close()
        elif way.request:
            assert stuck.result(60) in (0, 500)  # uvicorn answers what is cancelled in the end
        ended = [each for each in server.events() if each["event"] == "WorkerEnded"]
        assert len(ended) == 2
        print(way.name, worker, [(round(each["at"] - asked, 2), each["reason"]) for each in ended])
        took = max(each["at"] for each in ended) - asked
        if took > way.within + 1.0 + 1.5:
            raise AssertionError(f"gone after {took:.2f} s, the bound is {way.within + 1.0:g} s and 1.5 s of slack")
        assert way.says in server.log()
        assert "secret" not in server.log() + (server.state_dir / "history.jsonl").read_text()


@pytest.mark.parametrize("worker", CLASSES if os.environ.get("TEST_FULL") == "1" else ["gracehooks.SyncWorker"])
def test_what_waits_for_a_worker_that_is_stuck_is_counted(worker: str) -> None:
    """With one worker, nobody else accepts: what is in the kernel's queue is lost as well, and nobody knows its names."""
    (way,) = (each for each in WAYS if each.name == "gil")
    with serving(way, worker, BOUNDS, workers=1) as server:
        stuck = ask(server, "stuck")
        begun(server, "stuck")
        waiting = [ask(server, "other") for _ in range(20)]
        silent = [server.address.connect() for _ in range(5)]
        with within(DRAIN + 1.0, slack=1.5):
            server.stop()
        assert [each.result(60) for each in (stuck, *waiting)] == [0] * 21
        lost = server.wait_for("Stopped")["lost"]["requests"]
        assert [each["path"] for each in lost] == ["/stuck"] + ["?"] * 20
        assert lost[-1]["reason"] == "no worker was left to accept it"
        for each in silent:
            each.close()


HAMMERED = [(way, worker) for way, worker in MATRIX if way.request and way.name not in ("arriving", "gil late")]


@pytest.mark.parametrize(
    ("way", "worker"),
    HAMMERED if os.environ.get("TEST_FULL") == "1" else [each for each in HAMMERED if each[0].name == "gil"][:1],
    ids=lambda each: getattr(each, "name", each),
)
def test_the_hammer_ends_what_is_stuck(way: Way, worker: str) -> None:
    config = "gracehooks.configure(drain_timeout=60, job_timeout=60)\n"
    with serving(way, worker, config) as server:
        stuck = ask(server, "stuck?secret")
        begun(server, "stuck")
        with within(1.0 + 1.0, slack=1.5):
            server.signal("INT")
            server.wait_gone(server.process.pid)
        stopped = server.wait_for("Stopped")
        assert [f"{each['method']} {each['path']}" for each in stopped["lost"]["requests"]] == [way.request]
        assert [each["name"] for each in stopped["lost"]["jobs"]] == [way.job] * bool(way.job)
        assert stopped["outcome"] == "forced"
        assert stuck.result(60) in (0, 500)
