"""gunicorn's `timeout`: a worker whose loop stands still is ended, and the report names what it had, and where it stood.

A loop stands still in Python (the signal's handler ends it), or in C with the GIL held (only SIGKILL does). gunicorn looks
at each turn of its loop, and while something is under way ours turns ten times a second.
"""

from __future__ import annotations

import time

import pytest

from tests.kit import Server, eventually, serve, within
from tests.kit.classes import CLASSES, LOOPS
from tests.kit.clients import ask

TIMEOUT = 2
#: gunicorn looks once a second where nothing is under way.
LOOK = 1.0
CONFIG = f"""
timeout = {TIMEOUT}
gracehooks.configure(drain_timeout=10, job_timeout=5)

from pathlib import Path
HERE = Path(__file__).resolve().parent


def worker_abort(worker):
    (HERE / f"aborted-{{worker.pid}}").touch()
"""

COMMON = """
import asyncio, ctypes, os, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
if os.environ["CLASS"] == "gracehooks.GeventWorker":
    from gevent import monkey

    real_sleep = monkey.get_original("time", "sleep")
else:
    real_sleep = time.sleep
MUTEX = ctypes.create_string_buffer(64)


def hold_the_gil():
    library = ctypes.PyDLL(None)
    library.pthread_mutex_lock(MUTEX)
    library.pthread_mutex_lock(MUTEX)  # no signal ends that


def starts(path):
    (HERE / f"begun-{path}-{os.getpid()}").touch()
    if path.startswith("python"):
        real_sleep(60)
    elif path.startswith("gil"):
        hold_the_gil()


"""
WSGI = """
def app(environ, start_response):
    starts(environ["PATH_INFO"].strip("/"))
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""
ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    starts(scope["path"].strip("/"))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""
#: gunicorn's threads leave the loop alone: there only C that holds the GIL stops it.
CASES = [
    (way, worker) for way in ("python", "gil") for worker in CLASSES if (way, worker) != ("python", "gracehooks.Worker")
]


def source(worker: str) -> str:
    return COMMON + (ASGI if worker in LOOPS else WSGI)


def who(server: Server, path: str) -> int:
    (found,) = eventually(lambda: list(server.dir.glob(f"begun-{path}-*")), what=f"the beginning of {path}")
    return int(found.name.rpartition("-")[2])


@pytest.mark.parametrize(("way", "worker"), CASES, ids=lambda each: each.removeprefix("gracehooks."))
def test_two_workers_whose_loops_stand_still(way: str, worker: str) -> None:
    """Both at once: the end of the first wakes the master, and the second has its time for its report nevertheless."""
    env = {"CLASS": worker}
    # Nobody asks before: a thread that has just sent an answer cannot say so while another one holds the GIL.
    with serve(source(worker), CONFIG, worker=worker, workers=2, env=env, answers=None) as server:
        server.wait_for("ServingStarted")
        stuck, victims = {}, {}
        with within(TIMEOUT + 2 * LOOK + 1.0, slack=3):
            for number in range(2):
                path = f"{way}-{number}"
                stuck[path] = ask(server, path + "?secret")
                victims[path] = who(server, path)
            asked = time.monotonic()
            # gunicorn's sync worker answers 500 to what the handler has ended; it was not served all the same.
            assert {each.result(60) for each in stuck.values()} <= {0, 500}
        took = time.monotonic() - asked
        for path, pid in victims.items():
            ended = server.wait_for("WorkerEnded", worker=pid)
            assert ended["reason"] == "WORKER TIMEOUT"
            (lost,) = ended["lost"]["requests"]
            assert (lost["method"], lost["path"]) == ("GET", "/" + path)
            if way == "python":
                assert "in starts" in lost["where"]
                assert (server.dir / f"aborted-{pid}").exists()
            print(way, worker, round(took, 2), lost)
        assert ask(server, "").result(60) == 200
        server.stop()
        assert len(server.wait_for("Stopped")["lost"]["requests"]) == 2
        log = server.log()
        assert log.count("app.py:18 in hold_the_gil\n" if way == "gil" else "app.py:24 in starts\n") == 2
        assert log.count("has not heard SIGABRT") == (2 if way == "gil" else 0)
        assert "secret" not in (server.state_dir / "history.jsonl").read_text()


def assert_quiet(server: Server) -> None:
    """No worker is ended for longer than the time-out."""
    quiet_until = time.monotonic() + TIMEOUT + 2 * LOOK
    while time.monotonic() < quiet_until:
        assert "WORKER TIMEOUT" not in server.log()
        time.sleep(0.1)


@pytest.mark.parametrize("worker", [*CLASSES, "sync"])
def test_a_worker_that_boots_is_not_timed_out(worker: str) -> None:
    """As with gunicorn alone: a boot has no heartbeat; what bounds it in an upgrade is `ready_timeout`."""
    config = f"timeout = {TIMEOUT}\n"
    if worker == "sync":
        config += "on_starting = gracehooks.on_starting\n"
    boots = """
(HERE / "boots").touch()
while not (HERE / "go").exists():
    real_sleep(0.02)
"""
    code = COMMON + boots + (ASGI if worker in LOOPS else WSGI)
    with serve(code, config, worker=worker, workers=1, env={"CLASS": worker}, answers=None) as server:
        eventually((server.dir / "boots").exists, what="the boot")
        assert_quiet(server)
        (server.dir / "go").touch()
        server.wait_for("ServingStarted")
        assert ask(server, "").result(60) == 200


DISK = """
import threading
from gunicorn.workers.workertmp import WorkerTmp

WorkerTmp.notify = lambda _: threading.Event().wait(600)
WorkerTmp.last_update = lambda _: 0.0
"""


@pytest.mark.parametrize("worker", ["gracehooks.Worker", "sync"])
def test_a_disk_that_stands_still_is_no_hung_worker(worker: str) -> None:
    """The heartbeat is in memory: a worker that has nothing to do but to beat is not killed for its file."""
    config = f"timeout = {TIMEOUT}\n" + DISK
    if worker == "sync":
        config += "on_starting = gracehooks.on_starting\n"
    with serve(source(worker), config, worker=worker, workers=2, env={"CLASS": worker}) as server:
        assert_quiet(server)
        assert ask(server, "").result(60) == 200
