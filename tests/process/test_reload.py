"""The verified reload: HUP boots the new beside the old, and what cannot serve touches nothing."""

from __future__ import annotations

import os
import time

import pytest

from tests.kit import Late, Server, apps, eventually, load, serve, within
from tests.kit.classes import CLASSES, LOOPS

MINE = "gracehooks.configure(ready_timeout=4)\n"


def completed(server: Server) -> dict:
    """A reload that completes, until the old workers have left."""
    master, before = server.pid, set(server.workers())
    verdict = server.reload()
    assert verdict["event"] == "UpgradeCompleted", verdict
    assert verdict["kind"] == "reload"
    server.wait_for("GenerationRetired", after=verdict["n"])
    assert server.pid == master
    eventually(lambda: len(server.workers()) == 2)
    assert not before & set(server.workers())
    return verdict


def rolled_back(server: Server, reason: str, bound: float) -> None:
    """A reload that is rolled back; workers and listeners are as they were."""
    master, before = server.pid, set(server.workers())
    started = time.monotonic()
    verdict = server.reload()
    took = time.monotonic() - started
    assert verdict["event"] == "UpgradeRolledBack", verdict
    assert reason in verdict["reason"], verdict
    if took > bound + 2.0:
        raise Late(f"rolled back after {took:.2f} s: {reason}")
    eventually(lambda: set(server.processes()) == {master, *before}, 10, "only the old workers are left")
    assert server.pid == master
    assert server.get("/version").status == 200
    assert server.history()[-1]["outcome"] == "rolled_back"


def test_good_and_bad_reloads_under_load_lose_nothing():
    with serve(config=MINE, files={"version.txt": "1"}) as server, load(server, clients=4) as traffic:
        assert server.get("/version").text == "1"
        server.write("version.txt", "2")
        completed(server)
        assert server.get("/version").text == "2"
        # The application raises, exits, hangs; one of its workers only.
        server.write("app.py", "raise RuntimeError('no such luck')\n")
        rolled_back(server, "RuntimeError: no such luck", 1.0)
        server.write("app.py", "import sys; sys.exit(0)\n")
        rolled_back(server, "code 0", 1.0)
        server.write("app.py", "import time; time.sleep(600)\n")
        rolled_back(server, "hung for 4 s while booting (0 of 2", 7.5)
        server.write("app.py", apps.WSGI)
        # The configuration file raises, exits, hangs, says something wrong.
        for config, reason, bound in (
            ("raise ValueError('in the file')\n", "in the file", 1.5),
            ("import sys; sys.exit(3)\n", "configuration cannot be read", 1.5),
            ("def (:\n", "SyntaxError", 1.5),
            ("workers = 'many'\n", "many", 1.5),
            ("gracehooks.configure(probation=-1)\n", "probation", 1.5),
            ("worker_class = 'no.such.Worker'\n", "No module named 'no'", 1.5),
            *([("import time; time.sleep(600)\n", "hung for 4 s", 7.5)] if os.environ.get("TEST_FULL") == "1" else []),
            ("gracehooks.configure(ready_path='/status')\n", "answered 500 on /status", 1.5),
        ):
            server.configure(MINE + config)
            rolled_back(server, reason, bound)
        # Nothing of all that has stayed.
        server.configure(MINE)
        completed(server)
        server.configure(MINE + "workers = 3\n")
        assert server.reload()["event"] == "UpgradeCompleted"
        eventually(lambda: len(server.workers()) == 3)
        server.configure(MINE)
        assert server.reload()["event"] == "UpgradeCompleted"
        eventually(lambda: len(server.workers()) == 2)
        assert server.upgrade()["event"] == "UpgradeCompleted"
        traffic.wait(30)
    assert not traffic.lost, traffic.table()


def test_stock_workers_reload_too():
    with serve(worker="sync", config="on_starting = gracehooks.on_starting\n") as server:
        with load(server, kinds=("new",), clients=2) as traffic:
            completed(server)
            server.write("app.py", "raise RuntimeError('no such luck')\n")
            rolled_back(server, "no such luck", 1.0)
            server.write("app.py", apps.WSGI)
            completed(server)
            traffic.wait(20)
        assert not traffic.lost, traffic.table()


def test_a_changed_bind_opens_the_new_and_keeps_the_old_that_stay(tmp_path):
    extra = tmp_path / "extra.sock"
    with serve() as server, load(server, clients=4) as traffic:
        server.configure(f"bind = [bind, 'unix:{extra}']\n")
        completed(server)
        assert extra.exists()
        assert ask_unix(str(extra)) == b"HTTP/1.1 200 OK"
        # A bind that is taken by somebody else is rolled back, and leaves the listeners as they were.
        server.configure(f"bind = [bind, 'unix:{extra}', 'unix:/proc/no/such.sock']\n")
        verdict = server.reload()
        assert verdict["event"] == "UpgradeRolledBack", verdict
        assert ask_unix(str(extra)) == b"HTTP/1.1 200 OK"
        server.configure("")
        completed(server)
        traffic.wait(20)
    assert not traffic.lost, traffic.table()


def ask_unix(path: str) -> bytes:
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(path)
        connection.sendall(b"GET /fast HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return connection.recv(65536).split(b"\r\n")[0]


@pytest.mark.parametrize("where", ["app", "configuration"])
def test_term_during_a_reload_is_obeyed_at_once(where: str):
    with serve(config="gracehooks.configure(ready_timeout=60)\n") as server:
        before = len(server.processes())
        if where == "app":
            server.write("app.py", "import time; time.sleep(600)\n")
        else:
            server.configure("import time; time.sleep(600)\n")
        server.signal("HUP")
        server.wait_for("UpgradeStarted")
        eventually(lambda: len(server.processes()) > before, what="the child or the new workers")
        with within(1.0):
            assert server.stop() == 0
        assert not server.processes()
        assert server.wait_for("Stopped")["lost"] == {"requests": [], "jobs": []}


def test_a_preloaded_application_is_reloaded_by_a_new_master():
    with serve(config="preload_app = True\n", files={"version.txt": "1"}) as server:
        with load(server, clients=4) as traffic:
            master = server.pid
            server.write("version.txt", "2")
            verdict = server.reload()
            assert (verdict["event"], verdict["kind"]) == ("UpgradeCompleted", "reload"), verdict
            server.wait_gone(master)
            assert server.get("/version").text == "2"
            server.write("app.py", "raise RuntimeError('no such luck')\n")
            verdict = server.reload()
            assert verdict["event"] == "UpgradeRolledBack"
            assert "no such luck" in verdict["reason"]
            traffic.wait(20)
        assert not traffic.lost, traffic.table()


def test_a_worker_that_dies_during_a_reload_is_replaced_by_one_of_the_old():
    with serve(config="gracehooks.configure(ready_timeout=60)\n", files={"version.txt": "1"}) as server:
        first = server.workers()[0]
        server.write(
            "app.py", "import time\nwhile not __import__('os').path.exists('go'): time.sleep(0.05)\n" + apps.WSGI
        )
        server.signal("HUP")
        started = server.wait_for("UpgradeStarted")
        eventually(lambda: len(server.workers()) == 4, what="the new workers")
        os.kill(first, 9)
        server.wait_for("WorkerEnded", worker=first)
        (server.dir / "go").touch()
        assert server.wait_for("UpgradeCompleted", id=started["id"])
        server.wait_for("GenerationRetired", id=started["id"])
        eventually(lambda: len(server.workers()) == 2)
        assert server.get("/fast").status == 200


@pytest.mark.parametrize("begun", [True, False], ids=["while it hangs", "before it has begun"])
def test_a_configuration_that_hangs_does_not_outlive_a_master_that_is_killed(begun: bool):
    """The kernel tells a child of its parent's end only once it has asked for that; the end may come before."""
    slow = """
import os, time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def hold():
    while (HERE / "hold").exists() and not (HERE / "go").exists():
        time.sleep(0.01)


os.register_at_fork(after_in_child=hold)
"""
    with serve(config=slow) as server:
        conf = server.dir / "gunicorn.conf.py"
        conf.write_text(conf.read_text() + "\n(HERE / 'hangs').touch()\ntime.sleep(3600)\n")
        if not begun:
            (server.dir / "hold").touch()
        server.signal("HUP")
        probe = server.wait_for("UpgradeStarted")["successor"]
        if begun:
            eventually((server.dir / "hangs").exists, what="the configuration's hang")
        master = server.pid
        server.signal("KILL")
        server.wait_gone(master)
        (server.dir / "go").touch()
        server.wait_gone(probe)
        assert (server.dir / "hangs").exists() is begun


@pytest.mark.parametrize("worker", CLASSES if os.environ.get("TEST_FULL") == "1" else LOOPS[:1])
def test_what_cannot_serve_touches_nothing_on_any_class(worker: str):
    """Broken code, broken configuration, an import that hangs, a `ready_path` that fails; then TERM while one hangs."""
    mine = "gracehooks.configure(ready_timeout=5)\n"
    good = apps.ASGI if worker in LOOPS else apps.WSGI
    kinds = ("new",) if "Sync" in worker else ("new", "keepalive")
    with serve(config=mine, worker=worker) as server:
        with load(server, kinds=kinds, clients=3) as traffic:
            traffic.wait(20)
            for app, config, reason, bound in (
                ("raise RuntimeError('no such luck')\n", "", "RuntimeError: no such luck", 3.0),
                (good, "raise ValueError('in the file')\n", "in the file", 1.5),
                ("import time; time.sleep(600)\n", "", "hung for 5 s while booting (0 of 2", 6.5),
                (good, "gracehooks.configure(ready_path='/status')\n", "answered 500 on /status", 3.0),
            ):
                server.write("app.py", app)
                server.configure(mine + config)
                rolled_back(server, reason, bound)
            server.configure("gracehooks.configure(ready_timeout=60)\n")
            server.write("app.py", "import time; time.sleep(600)\n")
            before = len(server.processes())
            mark = server.mark()
            server.signal("HUP")
            server.wait_for("UpgradeStarted", after=mark)
            eventually(lambda: len(server.processes()) > before, what="the new workers")
            traffic.wait(20)
            assert not traffic.lost, traffic.table()
            # A client that keeps its connection has a moment for one more request, so it is not bound to half a second.
            with within(1.0 if "Sync" in worker else 2.5):
                assert server.stop() == 0
            assert not server.processes()
        assert {each["outcome"] for each in traffic.lost} <= {"refused"}, traffic.table()
        assert server.wait_for("Stopped")["lost"] == {"requests": [], "jobs": []}
