"""Successive upgrades under load lose nothing and leave nothing behind: descriptors, environment, memory.

TEST_UPGRADES and TEST_REQUESTS enlarge it (the promise is 50 upgrades and 100,000 requests).
"""

from __future__ import annotations

import os

import pytest

from tests.kit import Server, eventually, load, serve
from tests.kit.footprint import footprint

UPGRADES = int(os.environ.get("TEST_UPGRADES", "4"))
REQUESTS = int(os.environ.get("TEST_REQUESTS", "1500"))
STOCK = "on_starting = gracehooks.on_starting\n"


def upgrade(server: Server) -> None:
    """One upgrade, until the old generation has left."""
    master = server.pid
    verdict = server.upgrade()
    assert verdict["event"] == "UpgradeCompleted", verdict
    retired = server.wait_for("GenerationRetired", after=verdict["n"])
    assert retired["lost"] == {"requests": [], "jobs": []}
    server.wait_gone(master)
    assert server.pid == verdict["successor"]
    assert set(server.processes()) == {server.pid, *server.workers()}


def test_successive_upgrades_under_mixed_load_lose_nothing_and_grow_nothing():
    share = max(20, REQUESTS // (UPGRADES + 1))
    early: dict[str, list[int]] = {}
    with serve(worker="gracehooks.Worker") as server:
        with load(server, clients=8) as traffic:
            for number in range(1, UPGRADES + 1):
                traffic.wait(share, 300)
                upgrade(server)
                if number == 2:
                    traffic.wait(share, 300)
                    early = eventually(lambda: settled(server))
            traffic.wait(share, 300)
            # A file that is just being written is no leak: the count must come down to what it was.
            late = eventually(
                lambda: no_more_than(early, settled(server)), what="the descriptors of the second upgrade"
            )
        assert not traffic.lost, traffic.table()
        print(f"{traffic.answered} requests, {UPGRADES} upgrades, 0 lost; {early} then {late}")
        assert max(late["environment"]) - max(early["environment"]) <= 8, (early, late)  # a digit more in a number
        for before, after in zip(early["memory"], late["memory"], strict=True):
            assert after <= before * 1.05 + 1024, (early, late)
        assert server.status()["generation"] == UPGRADES + 1
        assert [each["outcome"] for each in server.history()] == ["completed"] * UPGRADES
        assert server.stop() == 0


def no_more_than(early: dict[str, list[int]], late: dict[str, list[int]] | None) -> dict[str, list[int]] | None:
    """`late`, when no process has more descriptors than it had."""
    pairs = zip(early["descriptors"], late["descriptors"] if late else [], strict=False)
    return late if late and all(after <= before for before, after in pairs) else None


def settled(server: Server) -> dict[str, list[int]] | None:
    """The footprint, when two looks see the same descriptors."""
    first, second = footprint(server), footprint(server)
    return second if first["descriptors"] == second["descriptors"] else None


@pytest.mark.parametrize("worker", ["sync", "gthread"])
def test_stock_workers_lose_no_new_connection(worker: str):
    with serve(worker=worker, config=STOCK) as server:
        with load(server, kinds=("new",), clients=4) as traffic:
            for _ in range(max(2, UPGRADES // 5)):
                traffic.wait(100)
                upgrade(server)
            traffic.wait(100)
        assert not traffic.lost, traffic.table()
        assert server.stop() == 0
