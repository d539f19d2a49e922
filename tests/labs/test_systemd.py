"""The units of examples/systemd under a real systemd: upgrades, broken ones, stops, a killed master, the socket's door.

TEST_UPGRADES is how many upgrades are made (4); each fourth is broken. TEST_UPGRADES=20 is the figure of docs/how-to/systemd.md.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kit import Traffic, apps, eventually, load
from tests.kit.server import Address
from tests.labs.booted import Systemd, booted

pytestmark = pytest.mark.lab

EXAMPLES = Path(__file__).parents[2] / "examples" / "systemd"
UPGRADES = int(os.environ.get("TEST_UPGRADES", "4"))
GUNICORN = (Path(sys.executable).parent / "gunicorn").as_posix()
GRACEHOOKS = (Path(sys.executable).parent / "gracehooks").as_posix()
BROKEN = "raise RuntimeError('this release is broken')\n"
STOP_TIMEOUT = 40


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Systemd]:
    with booted(tmp_path_factory.mktemp("systemd")) as machine:
        yield machine


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Systemd]:
    """One that knows Type=notify-reload."""
    with booted(tmp_path_factory.mktemp("newer"), at_least=253) as machine:
        yield machine


class Site:
    """The example's service, in a directory of its own; with a `reload_signal` it is Type=notify-reload."""

    def __init__(
        self, machine: Systemd, directory: Path, *, sockets: bool, reload_signal: str = "", anchored: bool = False
    ) -> None:
        self.machine, self.dir = machine, directory
        self.path = directory / "site.sock"
        self.address = Address("unix", path=str(self.path))
        self.write("app.py", apps.WSGI)
        config = (EXAMPLES / "gunicorn.conf.py").read_text()
        config += "gracehooks.configure(probation=0.2, drain_timeout=10, job_timeout=10, cleanup_timeout=2)\n"
        self.write("gunicorn.conf.py", config + ("" if sockets else f"bind = 'unix:{self.path}'\n"))
        unit = (EXAMPLES / "gunicorn.service").read_text()
        for old, new in {
            "User=www-data\nGroup=www-data\n": "",
            "/srv/site/current": str(directory),
            "/srv/site/venv/bin/gunicorn": GUNICORN,
            "/srv/site/venv/bin/gracehooks": GRACEHOOKS,
            "site.wsgi": "app:app",
            "TimeoutStopSec=105": f"TimeoutStopSec={STOP_TIMEOUT}",
            "WatchdogSec=30": f"WatchdogSec=10\nStandardOutput=append:{directory}/log\nStandardError=inherit",
        }.items():
            assert old in unit, old
            unit = unit.replace(old, new)
        if reload_signal:
            unit = unit.replace("Type=notify", f"Type=notify-reload\nReloadSignal={reload_signal}")
            unit = "".join(line for line in unit.splitlines(keepends=True) if not line.startswith("ExecReload="))
        if anchored:
            unit = unit.replace(f"ExecStart={GUNICORN}", f"ExecStart={GRACEHOOKS} run -- {GUNICORN}")
            unit = unit.replace("--pidfile /run/gunicorn/gunicorn.pid", "--pid $MAINPID")
            unit = "".join(line for line in unit.splitlines(keepends=True) if not line.startswith("ExecStop="))
        if not sockets:
            unit = unit.replace("Requires=gunicorn.socket\n", "").replace("After=gunicorn.socket ", "After=")
        (machine.units / "gunicorn.service").write_text(unit)
        text = (EXAMPLES / "gunicorn.socket").read_text()
        text = text.replace("/run/gunicorn.sock", str(self.path))
        text = text.replace("SocketUser=www-data\nSocketGroup=www-data\n", "")
        (machine.units / "gunicorn.socket").write_text(text)
        machine.do("daemon-reload")

    def write(self, name: str, text: str) -> None:
        (self.dir / name).write_text(text)

    def log(self) -> str:
        try:
            return (self.dir / "log").read_text()
        except FileNotFoundError:
            return ""

    def show(self, *names: str) -> dict[str, str]:
        return self.machine.show("gunicorn.service", *names)

    @property
    def main(self) -> int:
        return int(self.show("MainPID")["MainPID"])

    @property
    def status(self) -> dict[str, Any]:
        return json.loads(self.machine.run("cat", "/run/gunicorn/gunicorn.gracehooks/status.json").stdout)

    def get(self, path: str) -> bytes:
        with self.address.connect() as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            answer = b""
            while data := connection.recv(65536):
                answer += data
        assert answer.startswith(b"HTTP/1.0 200"), answer
        return answer.partition(b"\r\n\r\n")[2]

    def text_becomes(self, pattern: str) -> None:
        eventually(
            lambda: re.search(pattern, self.show("StatusText")["StatusText"]), what=f"a status text like {pattern}"
        )


@pytest.fixture
def site(machine: Systemd, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with cleared(Site(machine, tmp_path, sockets=request.param == "sockets")) as site:
        yield site


@contextmanager
def cleared(site: Site) -> Iterator[Site]:
    """Leave nothing of it in the machine."""
    machine = site.machine
    try:
        yield site
    finally:
        machine.ctl("stop", "gunicorn.socket")
        machine.ctl("kill", "-s", "KILL", "gunicorn.service")
        machine.ctl("stop", "gunicorn.service")
        machine.ctl("reset-failed")
        print(site.log()[-20000:])


def told(what: str, traffic: Traffic) -> None:
    """The figures, for `pytest -s`."""
    print(f"\n{what}: {len(traffic.lost)} lost of {traffic.answered + len(traffic.lost)}")


@pytest.mark.parametrize("site", ["bind"], indirect=True)
def test_upgrades_keep_the_unit_active_and_its_main_pid_right(site: Site) -> None:
    machine = site.machine
    machine.do("start", "gunicorn.service")
    # "started" means that the workers serve
    assert site.get("/fast") == b"ok"
    assert site.status["state"] == "serving"
    first = site.show("InvocationID", "MainPID", "ActiveState", "StatusText")
    assert first["ActiveState"] == "active"
    generation = 1
    with load(site.address, ("new", "keepalive"), clients=3, think=0.03) as traffic:
        for number in range(1, UPGRADES + 1):
            before, broken, by_reload = site.main, number % 4 == 3, number % 2 == 1
            site.write("app.py", BROKEN if broken else apps.WSGI)
            if by_reload:
                done = machine.ctl("reload", "gunicorn.service")
            else:
                done = machine.run(GRACEHOOKS, "upgrade", "--pid", str(before))
            said = f"{number}: {done.returncode} {done.stdout}{done.stderr}"
            now = site.show("InvocationID", "MainPID", "ActiveState", "StatusText", "NRestarts")
            assert now["InvocationID"] == first["InvocationID"], said
            assert now["NRestarts"] == "0", said
            assert now["ActiveState"] in ("active", "reloading"), said
            assert int(now["MainPID"]) == site.status["master_pid"], said
            if broken:
                assert done.returncode == 1, said
                assert int(now["MainPID"]) == before, said
                site.text_becomes(f"Generation {generation} serves.*rolled back: RuntimeError: this release is broken")
            else:
                generation += 1
                assert done.returncode == 0, said
                assert int(now["MainPID"]) != before, said
                site.text_becomes(f"^Generation {generation} serves with 2 workers")
        # a broken one by the command, too: the same exit code
        site.write("app.py", BROKEN)
        assert machine.run(GRACEHOOKS, "upgrade", "--pidfile", "/run/gunicorn/gunicorn.pid").returncode == 1
        site.write("app.py", apps.WSGI)
        assert machine.ctl("is-active", "gunicorn.service").returncode == 0
        traffic.wait(20)
    assert not traffic.lost, traffic.table()
    told(f"{UPGRADES} upgrades, by systemctl reload and gracehooks upgrade in turns, each fourth broken", traffic)
    # the stop waits for a job, and ends within its time
    site.get("/job?s=2")
    began = time.monotonic()
    machine.do("stop", "gunicorn.service")
    took = time.monotonic() - began
    assert took < STOP_TIMEOUT, took
    assert list(site.dir.glob("job-*.done")), "the stop did not wait for the job"
    ended = site.show("ActiveState", "Result")
    assert ended["ActiveState"] == "inactive"
    assert ended["Result"] == "success"
    assert "(completed)" in next(line for line in site.log().splitlines()[::-1] if "gracehooks: stopped after" in line)
    assert "was killed" not in site.log()


@pytest.mark.parametrize("site", ["sockets"], indirect=True)
def test_the_socket_stays_open_whatever_becomes_of_the_service(site: Site) -> None:
    machine = site.machine
    machine.do("start", "gunicorn.socket")
    assert site.show("ActiveState")["ActiveState"] == "inactive"
    assert site.get("/fast") == b"ok"  # it waited for the start, and was answered
    first = site.main
    with load(site.address, ("new",), clients=3, think=0.03) as traffic:
        machine.do("reload", "gunicorn.service")
        machine.do("reload", "gunicorn.service")
        upgraded = site.main
        assert first != upgraded == site.status["master_pid"]
        traffic.wait(10)
        lost_before = len(traffic.lost)
        assert machine.run("kill", "-KILL", str(upgraded)).returncode == 0
        eventually(
            lambda: site.main not in (0, upgraded) and site.show("ActiveState")["ActiveState"] == "active",
            what="the restart after the kill",
        )
        traffic.wait(20)
    assert lost_before == 0, traffic.table()
    # what the killed workers held is lost; not one connection was refused
    assert not [each for each in traffic.lost if each["outcome"] == "refused"], traffic.table()
    assert len(traffic.lost) <= 3 * 2, traffic.table()
    told("a SIGKILL to the master, socket activation", traffic)
    # `systemctl kill` is a TERM to every process at once, and Restart=always brings the unit back
    before = site.main
    with load(site.address, ("new",), clients=3, think=0.03, path="/sleep?s=0.2") as traffic:
        traffic.wait(10)
        machine.do("kill", "gunicorn.service")
        eventually(
            lambda: site.main not in (0, before) and site.show("ActiveState")["ActiveState"] == "active",
            what="the restart after systemctl kill",
        )
        traffic.wait(10)
    assert not traffic.lost, traffic.table()
    told("systemctl kill, socket activation", traffic)
    # a stop leaves what waits to the next start
    machine.do("stop", "gunicorn.service")
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.settimeout(60)
        waiting.connect(str(site.path))
        waiting.sendall(b"GET /fast HTTP/1.0\r\n\r\n")
        assert waiting.recv(65536).startswith(b"HTTP/1.0 200")


@pytest.mark.parametrize("site", ["bind"], indirect=True)
def test_a_master_that_hangs_is_replaced_by_the_watchdog(site: Site) -> None:
    machine = site.machine
    unit = machine.units / "gunicorn.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=10", "WatchdogSec=3"))
    machine.do("daemon-reload")
    machine.do("start", "gunicorn.service")
    assert machine.run(GRACEHOOKS, "upgrade", "--pid", str(site.main)).returncode == 0
    upgraded = site.main
    time_is_up = time.monotonic() + 4.5
    eventually(lambda: time.monotonic() > time_is_up, what="longer than the watchdog waits")
    assert (site.main, site.show("NRestarts")["NRestarts"]) == (upgraded, "0"), "the new master feeds the watchdog"
    machine.run("kill", f"-{signal.SIGSTOP.value}", str(upgraded))
    eventually(lambda: site.show("NRestarts")["NRestarts"] == "1", what="the watchdog's restart")
    eventually(lambda: site.show("ActiveState")["ActiveState"] == "active", what="the new start")
    assert site.get("/fast") == b"ok"


@pytest.mark.parametrize("site", ["bind"], indirect=True)
def test_an_old_master_that_serves_again_is_followed_again(site: Site) -> None:
    machine = site.machine
    machine.do("start", "gunicorn.service")
    first = site.main
    with site.address.connect() as slow:  # holds the old generation back
        slow.sendall(b"POST /upload HTTP/1.0\r\nContent-Length: 2\r\n\r\n1")
        eventually(lambda: any(each["requests"] for each in site.status["workers"]), what="the request in flight")
        assert machine.run(GRACEHOOKS, "upgrade", "--pid", str(first)).returncode == 0
        second = site.main
        assert second != first
        assert machine.run("kill", "-KILL", str(second)).returncode == 0
        eventually(lambda: site.main == first, what="systemd follows the old master again")
        slow.sendall(b"2")
        assert slow.recv(65536).startswith(b"HTTP/1.0 200")
    assert site.get("/fast") == b"ok"
    assert site.show("NRestarts", "ActiveState") == {"NRestarts": "0", "ActiveState": "active"}
    site.text_becomes("^Generation 1 serves.*taken back: ended with SIGKILL while it served")
    machine.do("stop", "gunicorn.service")
    assert site.show("Result")["Result"] == "success"


def test_with_the_anchor_the_main_process_stays(machine: Systemd, tmp_path: Path) -> None:
    """Also without ExecStop=: the anchor is systemd's own child, and it is waited for. Its pid names the server."""
    with cleared(Site(machine, tmp_path, sockets=False, anchored=True)) as site:
        machine.do("start", "gunicorn.service")
        anchor = site.main
        with load(site.address, ("new", "keepalive"), clients=3, think=0.03) as traffic:
            masters = [site.status["master_pid"]]
            for _ in range(2):
                machine.do("reload", "gunicorn.service")
                masters.append(site.status["master_pid"])
                assert site.main == anchor
            assert len({anchor, *masters}) == 4
            site.write("app.py", BROKEN)
            assert machine.ctl("reload", "gunicorn.service").returncode == 1
            site.write("app.py", apps.WSGI)
            machine.run("kill", "-KILL", str(site.status["master_pid"]))
            site.text_becomes("^Generation 4 serves with 2 workers")
            assert site.show("MainPID", "NRestarts", "ActiveState") == {
                "MainPID": str(anchor),
                "NRestarts": "0",
                "ActiveState": "active",
            }
            traffic.wait(20)
        assert not [each for each in traffic.lost if each["outcome"] == "refused"], traffic.table()
        site.get("/job?s=1")
        machine.do("stop", "gunicorn.service")
        assert list(site.dir.glob("job-*.done")), "the stop did not wait for the job"
        assert site.show("Result")["Result"] == "success"


def settled(status: dict[str, Any]) -> int:
    """The master's pid, when the verdict is there."""
    return int(status["master_pid"]) if status["upgrade"]["state"] in ("completed", "rolled_back") else 0


@pytest.mark.parametrize("kind", ["upgrade", "reload"])
def test_notify_reload_waits_for_the_verdict(newer: Systemd, tmp_path: Path, kind: str) -> None:
    """Type=notify-reload sends the signal itself, and its job ends with READY=1 after RELOADING=1 and MONOTONIC_USEC=."""
    site = Site(newer, tmp_path, sockets=True, reload_signal="SIGUSR2" if kind == "upgrade" else "SIGHUP")
    with cleared(site):
        newer.do("start", "gunicorn.socket", "gunicorn.service")
        first = site.show("InvocationID")
        serves, verdicts = 1, [""]
        with load(site.address, ("new", "keepalive"), clients=3, think=0.03) as traffic:
            for number in range(1, UPGRADES + 1):
                before, broken = site.main, number % 4 == 3
                site.write("app.py", BROKEN if broken else apps.WSGI)
                newer.do("reload", "gunicorn.service")
                # The new master is followed with READY=1, and writes its status file a moment later.
                verdict = site.status["upgrade"]
                assert verdict["id"] not in verdicts, "systemctl came back before anything had begun"
                assert verdict["state"] in (("rolled_back",) if broken else ("committing", "completed")), number
                assert verdict["kind"] == kind
                verdicts.append(verdict["id"])
                now = site.show("InvocationID", "MainPID", "ActiveState", "StatusText", "NRestarts", "ReloadResult")
                assert now["InvocationID"] == first["InvocationID"]
                assert (now["ActiveState"], now["NRestarts"], now["ReloadResult"]) == ("active", "0", "success"), number
                assert int(now["MainPID"]) == eventually(lambda: settled(site.status), what="the new master's status")
                assert (int(now["MainPID"]) != before) == (kind == "upgrade" and not broken)
                serves += not broken
                if broken:
                    site.text_becomes("serves.*rolled back: RuntimeError: this release is broken")
                else:
                    site.text_becomes(rf"^Generation {serves if kind == 'upgrade' else 1} serves with 2 workers")
            # and one that systemd did not ask for
            before = site.main
            assert newer.run(GRACEHOOKS, "upgrade", "--pidfile", "/run/gunicorn/gunicorn.pid").returncode == 0
            assert site.main not in (0, before)
            eventually(lambda: site.show("ActiveState", "SubState") == {"ActiveState": "active", "SubState": "running"})
            traffic.wait(20)
        assert not traffic.lost, traffic.table()
        told(f"{UPGRADES} times systemctl reload of Type=notify-reload ({kind}), each fourth broken", traffic)
        newer.do("stop", "gunicorn.service")
        assert site.show("Result")["Result"] == "success"
