"""The section of examples/supervisord.conf under a real supervisord: RUNNING with one pid, whatever is deployed.

TEST_UPGRADES is how many releases are deployed (2). TEST_UPGRADES=10 is the figure of docs/how-to/supervisord.md.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gracehooks import check
from tests.kit import Server, eventually, load, needs, processes, serve

pytestmark = pytest.mark.lab

EXAMPLE = Path(__file__).parents[2] / "examples" / "supervisord.conf"
UPGRADES = int(os.environ.get("TEST_UPGRADES", "2"))
SUPERVISOR = """\
[unix_http_server]
file=%(here)s/supervisor.sock
[supervisord]
nodaemon=true
logfile=%(here)s/supervisord.log
pidfile=%(here)s/supervisord.pid
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://%(here)s/supervisor.sock
"""
FIRST_RELEASE = (
    "mkdir -p releases/1 && cp app.py gunicorn.conf.py releases/1 && ln -s releases/1 current && "
    "echo 1 > releases/1/version.txt && exec {supervisord} -c supervisord.conf"
)
HOLD = """
import os, time

def app(environ, start_response):
    while environ["PATH_INFO"] == "/hold" and not os.path.exists("../../go"):
        time.sleep(0.05)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""


def section(**changes: str) -> str:
    """The example's section, with this machine's paths."""
    text = EXAMPLE.read_text()
    for old, new in {
        "user=www-data\n": "",
        "/srv/site/venv/bin/gracehooks": f"{sys.executable} -m gracehooks",
        "/srv/site/venv/bin/gunicorn": f"{sys.executable} -m gunicorn",
        "/srv/site/current": "%(here)s/current",
        "/srv/site/run/gunicorn.pid": "%(here)s/gunicorn.pid",
        "site.wsgi": "app:app",
        "stdout_logfile=/var/log/site.log": "stdout_logfile=/dev/fd/1\nstdout_logfile_maxbytes=0",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    for name, value in changes.items():
        text = re.sub(rf"(?m)^{name}=.*\n", "", text) + f"{name}={value}\n"
    return text


class Supervised:
    """A server below supervisord; made by `supervised`."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def ctl(self, *words: str) -> str:
        """supervisorctl; what it says."""
        config = str(self.server.dir / "supervisord.conf")
        done = subprocess.run(
            [needs("supervisorctl"), "-c", config, *words], capture_output=True, text=True, timeout=120, check=False
        )
        return done.stdout + done.stderr

    @property
    def anchor(self) -> int:
        """The pid that supervisord follows; 0 where the program does not run."""
        found = re.search(r"RUNNING +pid (\d+)", self.ctl("status", "site"))
        return int(found[1]) if found else 0

    def point_to(self, number: int) -> None:
        """Let `current` name this release, in one step."""
        (self.server.dir / "next").symlink_to(f"releases/{number}")
        (self.server.dir / "next").replace(self.server.dir / "current")

    def deploy(self, number: int) -> dict[str, Any]:
        """A new release beside the others, the link to it, and `supervisorctl signal USR2`; the verdict."""
        server = self.server
        for name in ("app.py", "gunicorn.conf.py"):
            server.write(f"releases/{number}/{name}", (server.dir / name).read_text())
        server.write(f"releases/{number}/version.txt", f"{number}\n")
        self.point_to(number)
        mark = server.mark()
        assert "signalled" in self.ctl("signal", "USR2", "site")
        verdict = server.wait_for(("UpgradeCompleted", "UpgradeRolledBack", "UpgradeRefused"), after=mark)
        if verdict["event"] == "UpgradeCompleted":
            line = f": master {verdict['successor']} serves now"
            eventually(lambda: line in server.log(), what=line)
        return verdict


@contextmanager
def supervised(app: str = "", config: str = "", **changes: str) -> Iterator[Supervised]:
    """A real supervisord with the example's section, changed so; everything is ready and RUNNING."""
    first = FIRST_RELEASE.format(supervisord=needs("supervisord"))
    files = {"supervisord.conf": SUPERVISOR + section(**changes)}
    with serve(
        app=app, config=config, command=["sh", "-c", first.replace("{", "{{").replace("}", "}}")], files=files
    ) as server:
        found = Supervised(server)
        server.wait_for("ServingStarted")
        eventually(lambda: found.anchor, what="RUNNING")
        yield found
        server.signal("TERM", server.process.pid)
        server.wait_gone(server.process.pid)
        server.clean = True


def test_releases_are_deployed_and_supervisord_sees_one_process() -> None:
    with supervised() as site:
        server, anchor = site.server, site.anchor
        with load(server) as traffic:
            for number in range(2, 2 + UPGRADES):
                traffic.wait(20)
                assert site.deploy(number)["event"] == "UpgradeCompleted"
                assert server.get("/version").text == f"{number}\n", "the link is followed anew"
                assert site.anchor == anchor
            (server.dir / "app.py").write_text("raise RuntimeError('a bad release')")
            assert site.deploy(100)["event"] == "UpgradeRolledBack"
            traffic.wait(20)
            site.point_to(1 + UPGRADES)
            mark, master = server.mark(), server.pid
            os.kill(master, signal.SIGKILL)
            server.wait_for("ServingStarted", after=mark)
            traffic.wait(20)
        assert not traffic.lost, traffic.table()
        assert site.anchor == anchor
        supervisor = processes.children(server.process.pid)
        assert supervisor == [anchor], "never a duplicate"


def test_a_restart_loses_no_request_in_flight() -> None:
    with supervised(stopasgroup="true", killasgroup="true") as site:
        server, anchor = site.server, site.anchor
        assert site.deploy(2)["event"] == "UpgradeCompleted"
        with load(server, kinds=("new", "stream"), path="/sleep?s=0.3", clients=4) as traffic:
            traffic.wait(8)
            mark = server.mark()
            assert "started" in site.ctl("restart", "site")
            server.wait_for("ServingStarted", after=mark)
            traffic.wait(8)
        assert {each["outcome"] for each in traffic.lost} <= {"refused"}, traffic.table()
        assert site.anchor not in (0, anchor)
        assert [each["outcome"] for each in server.history() if each["kind"] == "stop"] == ["completed"]


def test_what_supervisord_kills_leaves_in_order_all_the_same() -> None:
    """`stopwaitsecs` is too short: supervisord kills the anchor with its group. The master was told before, and drains."""
    patient = "gracehooks.configure(drain_timeout=120)"
    with (
        supervised(app=HOLD, config=patient, stopwaitsecs="1", stopasgroup="true", killasgroup="true") as site,
        ThreadPoolExecutor(1) as pool,
    ):
        server = site.server
        assert site.deploy(2)["event"] == "UpgradeCompleted"
        master = server.pid
        held = pool.submit(server.get, "/hold")
        try:
            eventually(lambda: any(each["requests"] for each in server.status()["workers"]), what="the held request")
            assert "stopped" in site.ctl("stop", "site")
            assert site.anchor == 0
            assert processes.alive(master)
        finally:
            server.write("go", "")
        assert held.result().status == 200
        server.wait_gone(master)


def test_the_example_has_no_trap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = EXAMPLE.read_text().replace("user=www-data\n", "").replace("/srv/site/run/", f"{tmp_path}/")
    Path("supervisord.conf").write_text(text)
    Path("gunicorn.conf.py").write_text((EXAMPLE.parent / "gunicorn.conf.py").read_text())
    check.main(["--supervisor", "supervisord.conf", "--no-boot", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert [each["code"] for one in said["checked"] for each in one["findings"]] == []
