"""Rolling replacements under fast load, each class by each of its ways: an upgrade, a reload, `max_requests`.

Nothing is lost, and nothing is left to chance: the clients ask again without a pause, so a request is on its way at every
moment of every handover. A kept connection may only be closed after an answer that said so: HTTP/1.1 lets a server close an
idle connection at any time (RFC 9112 section 9.5), and a request that was sent just then is lost through nobody's fault;
`closed_idle` counts the closes that a client saw unannounced, and there must be none.

TEST_ROLLS and TEST_REQUESTS enlarge it (the promise is 50 replacements and 100,000 requests for each class and way):

    TEST_ROLLS=50 TEST_REQUESTS=100000 TEST_LONGEST=1200 pytest -s tests/process/test_rolling.py
"""

from __future__ import annotations

import os

import pytest

from tests.kit import Server, load, serve
from tests.kit.classes import CLASSES

ROLLS = int(os.environ.get("TEST_ROLLS", "2"))
REQUESTS = int(os.environ.get("TEST_REQUESTS", "600"))
GUNICORN = pytest.importorskip("gunicorn").version_info
NOTHING = {"requests": [], "jobs": []}


@pytest.mark.parametrize("way", ["upgrade", "reload", "max_requests"])
@pytest.mark.parametrize("worker", CLASSES)
def test_replacements_under_fast_load_lose_nothing(worker: str, way: str):
    share = REQUESTS // (ROLLS + 1)
    recycling = way == "max_requests"
    config = "gracehooks.configure(ready_timeout=60)\n"  # how fast it boots is not what is tested
    if recycling:
        config += f"max_requests = {share}\nmax_requests_jitter = {share // 10}\n"
    kinds = ("new",) if worker == "gracehooks.SyncWorker" else ("keepalive", "keepalive", "keepalive", "new")
    # One worker that is recycled is the hardest case: there is nobody else.
    with serve(config=config, worker=worker, workers=1 if recycling else 2) as server:
        with load(server, kinds=kinds, clients=8, think=0) as traffic:
            for _ in range(ROLLS):
                if recycling:
                    server.wait_for("WorkerRecycled", 600, after=server.mark())
                else:
                    traffic.wait(share, 600)
                    roll(server, way)
            traffic.wait(max(share, REQUESTS - traffic.answered), 600)
        lost = [each for each in server.events() if each.get("lost", NOTHING) != NOTHING]
        print(
            f"{worker}, gunicorn {'.'.join(map(str, GUNICORN))}, {way}: {traffic.answered} requests, {ROLLS} times,"
            f" {len(traffic.lost)} lost, {sum(each['closed_idle'] for each in traffic.counts.values())} closed unannounced,"
            f" longest gap {traffic.longest_gap():.2f} s"
        )
        assert not traffic.lost, traffic.table()
        assert not any(each["closed_idle"] for each in traffic.counts.values()), traffic.table()
        assert not lost, lost
        assert server.stop() == 0


def roll(server: Server, way: str) -> None:
    """One replacement, until the old workers have left."""
    master = server.pid
    verdict = server.upgrade() if way == "upgrade" else server.reload()
    assert verdict["event"] == "UpgradeCompleted", verdict
    server.wait_for("GenerationRetired", after=verdict["n"])
    if way == "upgrade":
        server.wait_gone(master)
