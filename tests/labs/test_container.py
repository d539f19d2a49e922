"""The anchor as PID 1 of a PID namespace, as in a container: no init of the host's reaps for it, and it cannot be replaced.

TEST_UPGRADES is how many upgrades are made (2), TEST_ORPHANS how many orphans are left to it (200); 10 and 1000 are the
figures of docs/how-to/docker.md.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

import gracehooks
from gracehooks import check
from tests.kit import Server, eventually, load, needs, processes, serve

pytestmark = pytest.mark.lab

EXAMPLES = Path(__file__).parents[2] / "examples"
UPGRADES = int(os.environ.get("TEST_UPGRADES", "2"))
ORPHANS = int(os.environ.get("TEST_ORPHANS", "200"))
RUN = [sys.executable, "-m", "gracehooks", "run", "--"]


def namespace() -> list[str]:
    """The command that makes a PID namespace; skips where this user may not."""
    unshare = [needs("unshare"), "--fork", "--pid", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0:
        unshare += ["--user", "--map-root-user"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not make a PID namespace")
    return unshare


class Container:
    """A server in a PID namespace; made by `container`. Signals go to its PID 1."""

    def __init__(self, server: Server) -> None:
        self.server = server
        (self.pid,) = processes.children(server.process.pid)  #: PID 1, as it is seen from outside

    @property
    def master(self) -> int:
        """The serving master, as it is seen from outside."""
        inside = (self.server.dir / "inside.pid").read_text().strip()
        for pid in self.server.processes():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            if f"NSpid:\t{pid}\t{inside}\n" in status:
                return pid
        return 0

    def upgrade(self) -> str:
        server = self.server
        mark = server.mark()
        os.kill(self.pid, signal.SIGUSR2)
        verdict = server.wait_for(("UpgradeCompleted", "UpgradeRolledBack", "UpgradeRefused"), after=mark)
        if verdict["event"] == "UpgradeCompleted":
            line = f": master {verdict['successor']} serves now"
            eventually(lambda: line in server.log(), what=line)
        return str(verdict["event"])

    def zombies(self) -> list[int]:
        """Dead processes that nobody has reaped, among all of the namespace."""
        found, left = [], [self.pid]
        while left:
            pid = left.pop()
            left += processes.children(pid)
            if not processes.alive(pid) and processes.start_time(pid):
                found.append(pid)
        return found


@contextmanager
def container(*command: str, stop: str = "TERM", code: int = 0) -> Iterator[Container]:
    """`command` as PID 1; ended at the end as `docker stop` does, with the exit code that is expected."""
    config = 'pidfile = "inside.pid"  # its pids mean nothing outside\n'
    with serve(config=config, command=[*namespace(), *command], answers=None) as server:
        server.wait_for("ServingStarted")
        found = Container(server)
        yield found
        os.kill(found.pid, getattr(signal, f"SIG{stop}"))
        assert server.wait_gone(server.process.pid) == code
        server.clean = True


def test_upgrades_a_killed_master_and_a_stop() -> None:
    with container(*RUN, sys.executable, "-m", "gunicorn", "-c", "{config}", "{target}") as box:
        server, pid = box.server, box.pid
        with load(server) as traffic:
            for _ in range(UPGRADES):
                traffic.wait(20)
                assert box.upgrade() == "UpgradeCompleted"
            eventually(lambda: processes.children(pid) == [box.master], what="the end of the older generations")
            mark, master = server.mark(), box.master
            os.kill(master, signal.SIGKILL)
            server.wait_for("ServingStarted", after=mark)
            traffic.wait(20)
            assert box.upgrade() == "UpgradeCompleted"
            traffic.wait(20)
        assert not traffic.lost, traffic.table()
        assert box.zombies() == []
        assert processes.children(server.process.pid) == [pid]


def test_orphans_are_reaped_and_term_stops() -> None:
    master = f"""
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
for number in range({ORPHANS}):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.05)
        os._exit(0)
    os.wait()
print("left", flush=True)
while True:
    time.sleep(60)
"""
    root = str(Path(gracehooks.__file__).parent.parent)
    process = subprocess.Popen(
        [*namespace(), *RUN, sys.executable, "-c", master],
        env={**os.environ, "PYTHONPATH": root},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"left\n"
        (anchor,) = processes.children(process.pid)
        eventually(lambda: len(processes.children(anchor)) == 1, what="the last orphan reaped")
        os.kill(anchor, signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("exit 0", 0)])
def test_the_container_ends_with_the_servers_code(command: str, code: int) -> None:
    done = subprocess.run([*namespace(), *RUN, "sh", "-c", command], capture_output=True, timeout=60, check=False)
    assert done.returncode == code


def test_the_examples_start_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No engine is at hand: image and service start the same, nothing in them is a trap, and it runs as PID 1 of a namespace
    until the health check is content; then TERM.
    """
    composed = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]["site"]
    image = (EXAMPLES / "Dockerfile").read_text()
    written = json.loads(image[image.index("CMD ") + 4 :].replace("\\\n", ""))
    assert written == composed["command"]
    monkeypatch.chdir(EXAMPLES)
    for name in ("Dockerfile", "compose.yaml"):
        check.main(["--manifest", name, "--no-boot", "--json"])
        said = json.loads(capsys.readouterr().out)
        assert [each["code"] for one in said["checked"] for each in one["findings"]] == [], name
    for name in ("gunicorn.conf.py", "flask_app.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    held = socket.socket()  # bound and not listening: nobody else gets the port, and gunicorn may bind it
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = str(held.getsockname()[1])
    here = {"gracehooks": f"{sys.executable} -m gracehooks", "gunicorn": f"{sys.executable} -m gunicorn"}
    command = [part for each in written for part in here.get(each, each).split()]
    command = [each.replace("8000", port).replace("/tmp/", f"{tmp_path}/") for each in command]
    process = subprocess.Popen([*namespace(), *command], cwd=tmp_path, stdin=subprocess.DEVNULL)
    try:
        kind, _, *probe = composed["healthcheck"]["test"]
        assert kind == "CMD"
        probe = [sys.executable, *(each.replace("8000", port) for each in probe)]
        eventually(
            lambda: subprocess.run(probe, capture_output=True, timeout=60, check=False).returncode == 0,
            what="a content health check",
        )
        (anchor,) = processes.children(process.pid)
        os.kill(anchor, signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        held.close()
