"""The kit itself: a loss is seen and named, an idle close is none, and nothing is left behind."""

import os
import signal

import pytest

from tests.kit import Late, StartFailed, eventually, load, serve, within
from tests.kit.processes import alive


def test_stock_server_answers_every_kind_of_client_and_stops():
    with serve(worker="gthread", config="threads = 4") as server:
        with load(server) as traffic:
            traffic.wait(60)
        assert not traffic.lost, traffic.table()
        assert all(row["ok"] for row in traffic.counts.values()), traffic.table()
        assert len(traffic.timeline()) >= 60
        workers = server.workers()
        assert len(workers) == 2
        assert server.stop() == 0
        assert not any(map(alive, workers))


def test_killed_workers_are_seen_as_losses():
    with serve(worker="gthread", config="threads = 4", bind="unix") as server:
        with load(server, kinds=("stream",), stream_path="/stream?n=500&s=0.02", clients=2, timeout=20) as traffic:

            def a_loss() -> bool:
                for worker in server.workers():
                    os.kill(worker, signal.SIGKILL)
                return any(each["outcome"] == "cut" for each in traffic.lost)

            eventually(a_loss, poll=0.3)
            os.kill(server.pid, signal.SIGKILL)
        assert {each["outcome"] for each in traffic.lost} <= {"cut", "reset_before_byte", "refused"}, traffic.table()


def test_an_idle_connection_that_the_server_closes_is_no_loss():
    with serve(worker="asgi", config="keepalive = 1") as server:
        with load(server, kinds=("keepalive",), clients=2, think=3) as traffic:
            eventually(lambda: traffic.counts["keepalive"]["closed_idle"] >= 1, what="an idle close")
        assert not traffic.lost, traffic.table()


def test_a_start_that_fails_says_why():
    with (
        pytest.raises(StartFailed, match="no such luck"),
        serve(app="raise RuntimeError('no such luck')", worker="sync"),
    ):
        pass


def test_late_is_no_assertion():
    with pytest.raises(Late), within(-1, slack=0):
        pass
    with pytest.raises(Late):
        eventually(lambda: False, timeout=0.01)
    assert not issubclass(Late, AssertionError)
