"""Faults at every step of an upgrade: a signal to each kind of process in each state of the machine, under load.

Always: the service answers throughout, ends in exactly one serving generation (or in none, where TERM or INT asked the
serving master for that), in bounded time, and no request is lost but those inside a worker that was killed.
By default a small sample; TEST_FULL=1 runs the whole matrix, TEST_SEED chooses another sample.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.kit import Server, apps, eventually, load, serve
from tests.kit.processes import alive

STATES = ("BOOTING", "PROBATION", "RETIRING")
TARGETS = ("old master", "new master", "old worker", "new worker")
FAULTS = ("KILL", "TERM", "INT", "STOP", "USR2", "HUP")
#: One of each kind that has taught something; the sample adds others.
ALWAYS = [
    ("KILL", "old master", "PROBATION"),
    ("KILL", "new master", "BOOTING"),
    ("KILL", "new master", "RETIRING"),
    ("KILL", "new worker", "PROBATION"),
    ("STOP", "new master", "BOOTING"),
]
MATRIX = [(fault, target, state) for fault in FAULTS for target in TARGETS for state in STATES]
SEED = int(os.environ.get("TEST_SEED", "7"))
CASES = (
    MATRIX
    if os.environ.get("TEST_FULL") == "1"
    else ALWAYS + random.Random(SEED).sample([each for each in MATRIX if each not in ALWAYS], 3)
)

#: A release that boots when the gate is gone, and a request that keeps the old generation from leaving.
APP = (
    "import os, time\nwhile os.path.exists('gate'): time.sleep(0.02)\n"
    + apps.WSGI
    + """
plain = app


def app(environ, start_response):
    if environ["PATH_INFO"] == "/hold":
        (HERE / "held").touch()
        while (HERE / "hold").exists():
            time.sleep(0.02)
        environ["PATH_INFO"] = "/fast"
    return plain(environ, start_response)
"""
)
CONFIG = "gracehooks.configure(ready_timeout=8, probation=2, drain_timeout=8, job_timeout=1, cleanup_timeout=1)\n"


def hold(server: Server) -> Callable[[], object]:
    """A request that is held by an old worker until the file `hold` is gone; gives what became of it."""
    (server.dir / "hold").touch()
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(server.get("/hold").status)
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    eventually((server.dir / "held").exists, what="the request that is held")

    def became() -> object:
        (server.dir / "hold").unlink(missing_ok=True)
        thread.join(60)
        return answers[0]

    return became


def reach(server: Server, state: str) -> dict[str, Any]:
    """Begin an upgrade and bring it to `state`; its UpgradeStarted."""
    if state == "BOOTING":
        (server.dir / "gate").touch()
    server.signal("USR2")
    started = server.wait_for("UpgradeStarted")
    if state == "BOOTING":
        eventually(lambda: len(server.workers(started["successor"])) == 2, what="the successor's workers")
    elif state == "PROBATION":
        server.wait_for("ProbationStarted")
    else:
        server.wait_for("UpgradeCompleted")
    return started


@pytest.mark.parametrize(("fault", "target", "state"), CASES, ids=[", ".join(each) for each in CASES])
def test_a_fault(fault: str, target: str, state: str):
    with serve(app=APP, config=CONFIG) as server:
        old, old_workers = server.pid, server.workers()
        held = hold(server) if state == "RETIRING" else None
        with load(server, clients=4, kinds=("new", "keepalive", "stream")) as traffic:
            traffic.wait(20)
            new = reach(server, state)["successor"]
            pid = {
                "old master": lambda: old,
                "new master": lambda: new,
                "old worker": lambda: next((each for each in old_workers if alive(each)), 0),
                "new worker": lambda: next(iter(server.workers(new)), 0),
            }[target]()
            ended_here = fault in ("TERM", "INT") and target == ("new" if state == "RETIRING" else "old") + " master"
            server.signal(fault, pid)
            if fault == "STOP":
                stand_still(server, pid, 2.0)
            (server.dir / "gate").unlink(missing_ok=True)
            answer = held() if held else 200
            if ended_here:
                server.wait_gone(server.pid)
                eventually(lambda: not server.processes(), what="the end that was asked for")
            else:
                settle(server, old, new)
                traffic.wait(20)
        lost = [each for each in traffic.lost if not (ended_here and each["outcome"] == "refused")]
        forced = (fault == "KILL" and "worker" in target) or fault == "INT"
        # Inside a worker that was forced is at most one request of each client; the hammer forces several workers.
        assert len(lost) <= (8 if fault == "INT" else 4 if forced else 0), traffic.table()
        assert answer == 200 or forced or (target == "old master" and fault == "KILL"), answer


def stand_still(server: Server, pid: int, seconds: float) -> None:
    """Let `pid` stand still, and go on."""
    until = time.monotonic() + seconds
    eventually(lambda: time.monotonic() >= until, seconds + 10)
    if alive(pid):
        server.signal("CONT", pid)


def settle(server: Server, old: int, new: int) -> None:
    """Wait until exactly one generation is left, and it serves."""

    def one() -> bool:
        masters = [pid for pid in (old, new) if alive(pid)]
        if len(masters) != 1:
            masters = [pid for pid in {server.pid} if alive(pid)]  # a second upgrade may have come after it
        if len(masters) != 1 or server.pid != masters[0]:
            return False
        status = server.status()
        mine = set(server.workers())
        return (
            status["master_pid"] == masters[0]
            and status["state"] == "serving"
            and len(mine) == 2
            and set(server.processes()) == {masters[0], *mine}
            and {each["pid"] for each in status["workers"]} == mine
        )

    eventually(one, 60, "exactly one generation")
    assert server.get("/fast").status == 200
