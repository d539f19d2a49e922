"""The whole life of a server in a few seconds; tests/contract/test_oldest.py runs it on the oldest supported gunicorn."""

from __future__ import annotations

import os
from importlib.metadata import version

import pytest

from tests.kit import apps, eventually, load, serve


def test_this_is_the_gunicorn_that_was_asked_for():
    wanted = os.environ.get("TEST_GUNICORN")
    assert wanted in (None, version("gunicorn"))


@pytest.mark.parametrize("worker", ["gracehooks.Worker", "sync"])
def test_upgrade_reload_rollback_and_stop(worker: str):
    kinds = ("new",) if worker == "sync" else ("new", "keepalive", "upload", "stream")
    with serve(worker=worker, config="on_starting = gracehooks.on_starting\n") as server:
        with load(server, kinds=kinds, clients=4) as traffic:
            traffic.wait(20)
            first = server.pid
            verdict = server.upgrade()
            assert verdict["event"] == "UpgradeCompleted", verdict
            server.wait_gone(first)
            assert server.pid == verdict["successor"]
            verdict = server.reload()
            assert verdict["event"] == "UpgradeCompleted", verdict
            server.write("app.py", "raise RuntimeError('no such luck')\n")
            for bad in (server.reload(), server.upgrade()):
                assert bad["event"] == "UpgradeRolledBack", bad
                assert "no such luck" in bad["reason"]
            server.write("app.py", apps.WSGI)
            server.signal("TTIN")
            eventually(lambda: len(server.workers()) == 3)
            second = server.pid
            assert server.upgrade()["event"] == "UpgradeCompleted"
            server.wait_gone(second)
            assert len(server.workers()) == 3
            traffic.wait(20)
        assert not traffic.lost, traffic.table()
        assert server.stop() == 0
        assert server.history()[-1]["kind"] == "stop"


def test_a_sync_worker_with_threads_is_served_by_ours():
    """gunicorn would put its own gthread in the place of any class whose name ends so."""
    with serve(worker="gracehooks.SyncWorker", config="threads = 2\n") as server:
        assert server.upgrade()["event"] == "UpgradeCompleted"
        assert "Using worker: gracehooks.Worker" in server.log()
        assert "threads = 2: gracehooks.Worker serves in the place of SyncWorker" in server.log()


def test_gunicorns_own_threads_go_on_with_the_connections_that_they_have():
    """Those of gunicorn 23 by our patience, later ones by themselves."""
    with serve(worker="gthread", config="on_starting = gracehooks.on_starting\nkeepalive = 60\n") as server:
        with load(server, kinds=("new", "keepalive", "late"), clients=6, think=0) as traffic:
            for _ in range(2):
                traffic.wait(100)
                assert server.upgrade()["event"] == "UpgradeCompleted"
            traffic.wait(50)
        assert not traffic.lost, traffic.table()
        silent = [server.address.connect() for _ in range(3)]  # each may hold a thread, and there are four
        assert server.get("/fast").status == 200
        server.signal("TERM")
        server.wait_for("AcceptingEnded")
        for each in silent:
            each.sendall(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n")
        for each in silent:
            assert each.recv(1000).startswith(b"HTTP/1.1 200 ")
            each.close()
        server.wait_gone(server.process.pid)
        assert server.history()[-1]["outcome"] == "completed"
