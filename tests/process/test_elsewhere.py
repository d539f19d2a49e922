"""Where there is no Linux: it imports, runs and upgrades without what only Linux has, feature by feature.

No such machine is at hand: tests/kit/elsewhere takes the features away from every process of the server. What stays
untried is what another kernel does differently.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import load, serve
from tests.kit.classes import CLASSES

ROOT = Path(__file__).parents[2]
PLACES = [str(ROOT / "tests/kit/elsewhere"), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
ENVIRON = {"PYTHONPATH": os.pathsep.join(PLACES)}
IMPORT_ALL = """
import importlib, importlib.util, os, pkgutil, select, signal, socket, gracehooks
assert not os.path.exists("/proc/self"), "the features are still there"
assert not any(hasattr(*each) for each in [(os, "pidfd_open"), (os, "waitid"), (select, "epoll"), (signal, "pidfd_send_signal")])
without = {"gracehooks.gunicorn.workers.asgi"} if importlib.util.find_spec("gunicorn.asgi") is None else set()
for each in pkgutil.walk_packages(gracehooks.__path__, "gracehooks."):
    if not each.name.endswith("__main__") and each.name not in without:
        importlib.import_module(each.name)
"""


def elsewhere(*words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **ENVIRON, "WITH": "gevent"}
    return subprocess.run(
        [sys.executable, *words], env=environ, capture_output=True, text=True, timeout=120, check=False
    )


def test_every_module_is_imported() -> None:
    done = elsewhere("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "worker", CLASSES if os.environ.get("TEST_FULL") else ["gracehooks.Worker", "gracehooks.UvicornWorker"]
)
def test_it_upgrades_rolls_back_reloads_and_stops(worker: str) -> None:
    kinds = ("new",) if worker == "gracehooks.SyncWorker" else ("new", "keepalive", "upload")
    with serve(worker=worker, env={**ENVIRON, "WITH": worker.lower()}) as server:
        with load(server, kinds=kinds, clients=3) as traffic:
            traffic.wait(20)
            assert server.upgrade()["event"] == "UpgradeCompleted"
            assert "Traceback" not in server.log()
            sound = (server.dir / "app.py").read_text()
            server.write("app.py", "raise RuntimeError('no such luck')\n")
            assert server.upgrade()["event"] == "UpgradeRolledBack"
            server.write("app.py", sound)
            assert server.reload()["event"] == "UpgradeCompleted"
            before = server.pid
            done = elsewhere("-m", "gracehooks", "upgrade", "--pidfile", str(server.pidfile))
            assert done.returncode == 0, done.stdout + done.stderr
            assert server.pid != before
            traffic.wait(20)
        assert not traffic.lost, traffic.table()
        assert server.stop() == 0
        assert server.history()[-1]["outcome"] == "completed"


def test_a_job_is_waited_for() -> None:
    with serve(env=ENVIRON) as server:
        assert server.get("/job?s=2").status == 200
        assert server.stop() == 0
        assert list(server.dir.glob("job-*.done")), "the stop did not wait for the job"
