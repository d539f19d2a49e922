"""The process-test kit: a real server, real load, waits on events, and a teardown that leaves nothing behind.

    with serve(config="workers = 3") as server, load(server) as traffic:
        traffic.wait(100)
        assert server.upgrade()["event"] == "UpgradeCompleted"
        traffic.wait(100)
    assert not traffic.lost, traffic.table()

Every time-out of the kit raises `Late`, never an assertion about losses: a slow machine may be late, and a test that was
late may be run again; a test that lost a request may not.
"""

from tests.kit import apps
from tests.kit.parts import needs
from tests.kit.server import Server, StartFailed, serve
from tests.kit.traffic import LOST, Outcome, Traffic, load
from tests.kit.waiting import Late, eventually, within

__all__ = [
    "LOST",
    "Late",
    "Outcome",
    "Server",
    "StartFailed",
    "Traffic",
    "apps",
    "eventually",
    "load",
    "needs",
    "serve",
    "within",
]
