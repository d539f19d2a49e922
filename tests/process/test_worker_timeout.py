"""gunicorn's `timeout`: a worker whose loop stands still is ended, and the report names what it had, and where it stood.

A loop stands still in Python (the signal's handler ends it), or in C with the GIL held (only SIGKILL does). gunicorn looks
at each turn of its loop, and while something is under way ours turns ten times a second.
"""

from __future__ import annotations

import time

import pytest

from tests.kit import Server, apps, eventually, serve, within
from tests.kit.classes import CLASSES
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

COMMON = (
    apps.HOLD_THE_GIL
    + """
import asyncio, os, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
if os.environ["CLASS"] == "gracehooks.GeventWorker":
    from gevent import monkey

    real_sleep = monkey.get_original("time", "sleep")
else:
    real_sleep = time.sleep


def answer(path):
    (HERE / f"begun-{path}-{os.getpid()}").touch()
    if path.startswith("python"):
        real_sleep(60)
    elif path.startswith("gil"):
        hold_the_gil()
    return "ok"


"""
)
#: Where the two of them stand, in the application's source.
PLACES = {"python": ("real_sleep(60)", "answer"), "gil": ("library.pthread_mutex_lock(MUTEX)  # no", "hold_the_gil")}
#: gunicorn's threads leave the loop alone: there only C that holds the GIL stops it.
CASES = [
    (way, worker) for way in ("python", "gil") for worker in CLASSES if (way, worker) != ("python", "gracehooks.Worker")
]


def source(worker: str) -> str:
    return COMMON + apps.answering(worker)


def place(way: str) -> str:
    """As a stack says it."""
    text, name = PLACES[way]
    (line,) = (number for number, each in enumerate(COMMON.splitlines(), 1) if text in each)
    return f"app.py:{line} in {name}"


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
                assert place(way) in lost["where"]
                assert (server.dir / f"aborted-{pid}").exists()
            print(way, worker, round(took, 2), lost)
        assert ask(server, "").result(60) == 200
        server.stop()
        assert len(server.wait_for("Stopped")["lost"]["requests"]) == 2
        log = server.log()
        assert log.count(place(way) + "\n") == 2
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
    code = COMMON + boots + apps.answering(worker)
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
