"""`gracehooks run`, with real servers and with masters that are small scripts: one pid from the first start to the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import gracehooks
from tests.kit import Server, eventually, load, processes, serve

UPGRADES = int(os.environ.get("TEST_UPGRADES", "2"))
ORPHANS = int(os.environ.get("TEST_ORPHANS", "200"))
RUN = [sys.executable, "-m", "gracehooks", "run", "--"]
GUNICORN = [sys.executable, "-m", "gunicorn", "-c", "{config}", "{target}"]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="child subreapers are Linux's")
pytestmark = LINUX


# -- real servers ------------------------------------------------------------------------------------------------
@contextmanager
def serving(**options: Any) -> Iterator[Server]:
    """A server below an anchor, with all its workers ready."""
    with serve(command=[*RUN, *GUNICORN], **options) as server:
        server.wait_for("ServingStarted")
        yield server


def upgrade(server: Server) -> dict[str, Any]:
    """USR2 to the anchor, and the verdict; when the new master serves, the anchor follows it."""
    mark = server.mark()
    server.signal("USR2", server.process.pid)
    verdict = server.wait_for(("UpgradeCompleted", "UpgradeRolledBack", "UpgradeRefused"), after=mark)
    if verdict["event"] == "UpgradeCompleted":
        line = f": master {verdict['successor']} serves now"
        eventually(lambda: line in server.log(), what=line)
    return verdict


def kill_master(server: Server) -> int:
    """SIGKILL to the master, the only one there is; the pid of the next one, which serves."""
    mark, old = server.mark(), server.pid
    eventually(lambda: processes.children(server.process.pid) == [old], what="the end of the older generations")
    os.kill(old, signal.SIGKILL)
    server.wait_for("ServingStarted", after=mark)
    eventually(lambda: server.pid != old, what="the pidfile of the next master")
    return server.pid


def stop(server: Server, name: str = "TERM") -> int | None:
    """A signal to the anchor, and its exit code."""
    server.signal(name, server.process.pid)
    code = server.wait_gone(server.process.pid)
    server.clean = True
    return code


@pytest.mark.parametrize("bind", ["tcp", "unix"])
def test_upgrades_and_a_killed_master_lose_nothing(bind: str) -> None:
    with serving(bind=bind) as server:
        anchor = server.process.pid
        with load(server) as traffic:
            for number in range(UPGRADES):
                traffic.wait(30)
                assert upgrade(server)["event"] == "UpgradeCompleted"
                assert server.pid != anchor, number
            traffic.wait(30)
            master = kill_master(server)
            assert processes.children(anchor).count(master) == 1
            traffic.wait(30)
            assert upgrade(server)["event"] == "UpgradeCompleted", "also with inherited sockets"
            traffic.wait(30)
        assert not traffic.lost, traffic.table()
        size = int(Path(f"/proc/{anchor}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        assert size < 20e6, f"{size / 1e6:.1f} MB resident"
        assert stop(server) == 0
        if bind == "unix":
            assert not Path(server.address.path).exists()


def test_what_a_killed_master_knew_outlives_it() -> None:
    """Its generation and its TTIN; the history and the pidfile go on."""
    with serving() as server:
        anchor = server.process.pid
        server.signal("TTIN", anchor)
        eventually(lambda: len(server.workers()) == 3, what="one worker more")
        assert upgrade(server)["event"] == "UpgradeCompleted"
        eventually(server.history, what="the record of the upgrade")
        mark, new = server.mark(), kill_master(server)
        begun = server.wait_for("ServingStarted", after=mark)
        assert (begun["generation"], begun["workers"], begun["pid"]) == (3, 3, new)
        assert [each["kind"] for each in server.history()] == ["upgrade"]
        eventually(lambda: server.status()["generation"] == 3, what="the status of the third generation")
        assert len(server.workers()) == 3
        assert upgrade(server)["generation"] == 3, "who says so is the old one"
        eventually(lambda: server.status()["generation"] == 4, what="the status of the fourth generation")
        assert stop(server) == 0


def test_a_failed_upgrade_leaves_the_old_master_in_charge() -> None:
    with serving() as server:
        master = server.pid
        server.write("app.py", "raise RuntimeError('a bad release')")
        assert upgrade(server)["event"] == "UpgradeRolledBack"
        mark = server.mark()
        server.signal("HUP", server.process.pid)
        assert server.wait_for("UpgradeRolledBack", after=mark)["pid"] == master, "HUP still goes to it"
        assert stop(server) == 0


HOLD = """
import os, time

def app(environ, start_response):
    while environ["PATH_INFO"] == "/hold" and not os.path.exists("go"):
        time.sleep(0.05)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""


def test_signals_go_to_the_new_generation_while_the_old_one_drains() -> None:
    patient = "gracehooks.configure(drain_timeout=120)"
    with serving(app=HOLD, config=patient) as server, ThreadPoolExecutor(1) as pool:
        old = server.pid
        held = pool.submit(server.get, "/hold")
        try:
            eventually(lambda: any(each["requests"] for each in server.status()["workers"]), what="the held request")
            assert upgrade(server)["event"] == "UpgradeCompleted"
            new, mark = server.pid, server.mark()
            server.signal("HUP", server.process.pid)
            assert server.wait_for("UpgradeStarted", after=mark)["pid"] == new
            server.wait_for("UpgradeCompleted", after=mark)
            assert processes.alive(old)
        finally:
            server.write("go", "")
        assert held.result().status == 200
        server.wait_gone(old)
        assert stop(server) == 0


def test_a_master_that_is_killed_while_its_successor_boots_is_succeeded_by_it() -> None:
    app = "import time\ntime.sleep(1)\n"
    with serving() as server, load(server) as traffic:
        server.write("app.py", app + (server.dir / "app.py").read_text())
        mark, old = server.mark(), server.pid
        server.signal("USR2", server.process.pid)
        successor = server.wait_for("UpgradeStarted", after=mark)["successor"]
        eventually(lambda: b"GUNICORN_PID" in Path(f"/proc/{successor}/environ").read_bytes(), what="the exec")
        os.kill(old, signal.SIGKILL)
        server.wait_for("MasterPromoted", after=mark, pid=successor)
        traffic.wait(30)
        assert server.pid == successor
        assert upgrade(server)["event"] == "UpgradeCompleted"
        assert "starting the command again" not in server.log()
        traffic.stop()
        assert not traffic.lost, traffic.table()


@pytest.mark.parametrize("generation", [1, 2])
def test_a_killed_anchor_ends_the_server_in_order(generation: int) -> None:
    with serving() as server:
        if generation > 1:
            assert upgrade(server)["event"] == "UpgradeCompleted"
        master = server.pid
        with load(server, kinds=("new",), path="/sleep?s=0.5", clients=2, timeout=30) as traffic:
            traffic.wait(1)
            os.kill(server.process.pid, signal.SIGKILL)
            server.wait_for("StopStarted", pid=master)
            assert server.wait_gone(master) == 0
        server.clean = True
        assert {each["outcome"] for each in traffic.lost} <= {"refused"}, traffic.table()


@pytest.fixture
def own_package(tmp_path: Path) -> Path:
    """A copy of the package, to be changed."""
    shutil.copytree(Path(gracehooks.__file__).parent, tmp_path / "gracehooks")
    return tmp_path


def test_the_anchor_renews_itself_in_place(own_package: Path) -> None:
    say = own_package / "gracehooks" / "anchor" / "say.py"
    with serving(env={"PYTHONPATH": str(own_package)}) as server, load(server) as traffic:
        anchor = server.process.pid
        text = say.read_text()
        say.write_text("this is no Python")
        assert upgrade(server)["event"] == "UpgradeCompleted"
        eventually(lambda: "do not take over (1); staying as I am" in server.log())
        say.write_text(text.replace("gracehooks: anchor:", "gracehooks: renewed:"))
        assert upgrade(server)["event"] == "UpgradeCompleted"
        eventually(lambda: "executing the new ones in place" in server.log())
        kill_master(server)
        assert "gracehooks: renewed: started" in server.log()
        assert upgrade(server)["event"] == "UpgradeCompleted"
        traffic.wait(30)
        traffic.stop()
        assert not traffic.lost, traffic.table()
        assert server.process.pid == anchor
        assert stop(server) == 0


# -- masters that are scripts ------------------------------------------------------------------------------------
MASTER = """
import os, signal, sys, time
from gracehooks.anchor import mooring

def note(text):
    with open("notes", "a") as file:
        file.write(text + "\\n")

def on(*names, then=lambda name: None):
    def handler(number, frame):
        note(signal.Signals(number).name)
        then(signal.Signals(number).name)
    for name in names:
        signal.signal(getattr(signal, "SIG" + name), handler)

def leave(name):
    sys.exit(0)

ALL = ("HUP", "USR1", "USR2", "TTIN", "TTOU", "WINCH")
"""


class Anchored:
    """An anchor above a script; `notes` are what the script wrote down."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, script: str, *, command: list[str] | None = None, **env: str) -> subprocess.Popen[bytes]:
        (self.directory / "master.py").write_text(MASTER + script)
        root = str(Path(gracehooks.__file__).parent.parent)
        with open(self.directory / "log", "ab") as log:
            process = subprocess.Popen(
                [*RUN, *(command or [sys.executable, "master.py"])],
                cwd=self.directory,
                env={**os.environ, "PYTHONPATH": root, processes.MARK: str(self.directory), **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    @property
    def notes(self) -> list[str]:
        try:
            return (self.directory / "notes").read_text().splitlines()
        except FileNotFoundError:
            return []

    def wait_note(self, text: str, count: int = 1) -> None:
        eventually(lambda: self.notes.count(text) >= count, what=f"the note {text}, {count} times: {self.log}")

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()


@pytest.fixture
def anchored(tmp_path: Path) -> Iterator[Anchored]:
    found = Anchored(tmp_path)
    yield found
    for process in found.started:
        process.kill()
        process.wait()
    eventually(lambda: processes.kill(left := processes.of_directory(str(tmp_path))) or not left)


def test_each_signal_is_passed_on_once_also_one_to_the_group(anchored: Anchored) -> None:
    anchor = anchored.run('on(*ALL)\non("TERM", "INT", "QUIT", then=leave)\nnote("up")\nwhile True: time.sleep(60)')
    anchored.wait_note("up")
    names = ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU", "SIGWINCH"]
    for number, name in enumerate(names):
        signum = signal.Signals[name]
        os.killpg(anchor.pid, signum) if number % 2 else os.kill(anchor.pid, signum)
        anchored.wait_note(name)
    os.killpg(anchor.pid, signal.SIGTERM)
    assert anchor.wait(60) == 0
    assert anchored.notes == ["up", *names, "SIGTERM"]


def test_a_signal_waits_until_the_master_can_take_it(anchored: Anchored) -> None:
    anchor = anchored.run('note("up")\ntime.sleep(1)\non(*ALL)\non("TERM", then=leave)\nwhile True: time.sleep(60)')
    anchored.wait_note("up")
    for name in ("USR2", "HUP"):  # the default action of either would end it
        os.kill(anchor.pid, getattr(signal, f"SIG{name}"))
    anchored.wait_note("SIGHUP")
    anchored.wait_note("SIGUSR2")
    anchor.terminate()
    assert anchor.wait(60) == 0
    assert sorted(anchored.notes) == ["SIGHUP", "SIGTERM", "SIGUSR2", "up"], "in the order that the kernel chooses"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["no-such-command"], 127),
        (["/"], 126),
        (["sh", "-c", "exit 0"], 0),
    ],
)
def test_the_exit_code_is_mirrored(anchored: Anchored, command: list[str], code: int) -> None:
    assert anchored.run("", command=command).wait(60) == code


def test_usage(capfd: pytest.CaptureFixture[str]) -> None:
    from gracehooks.anchor import main

    assert main(["--help"]) == 0
    assert main([]) == main(["--"]) == main(["--loud", "gunicorn"]) == 2
    captured = capfd.readouterr()
    assert "usage: gracehooks run" in captured.out
    assert "run takes no option --loud" in captured.err


def test_a_master_that_keeps_dying_is_given_up(anchored: Anchored) -> None:
    script = 'note("up")\nos.kill(os.getpid(), signal.SIGKILL)'
    anchor = anchored.run(script)
    assert anchor.wait(60) == 128 + signal.SIGKILL
    assert anchored.notes == ["up"] * 5
    assert "5 times in a row" in anchored.log
    assert "in 0.5 s" in anchored.log


def test_a_stop_that_lasts_too_long_ends_with_everything_killed(anchored: Anchored) -> None:
    anchor = anchored.run(
        """
child = os.fork()
on("TERM")
if child == 0:
    os.setsid()
    if os.fork(): os._exit(0)
    note("stray")
else:
    mooring.serving(0.1)
    note("up")
while True: time.sleep(60)
"""
    )
    anchored.wait_note("up")
    anchored.wait_note("stray")
    began = time.monotonic()
    anchor.terminate()
    assert anchor.wait(60) == 128 + signal.SIGKILL
    assert 2.5 < time.monotonic() - began < 30
    assert processes.of_directory(str(anchored.directory)) == []


def test_strays_are_told_to_go_when_the_master_has_gone(anchored: Anchored) -> None:
    anchor = anchored.run(
        """
on("TERM", then=leave)
if os.fork() == 0:
    os.setsid()
    note("stray")
else:
    note("up")
while True: time.sleep(60)
"""
    )
    anchored.wait_note("up")
    anchored.wait_note("stray")
    anchor.terminate()
    assert anchor.wait(60) == 0
    assert anchored.notes.count("SIGTERM") == 2


def test_orphans_are_reaped(anchored: Anchored) -> None:
    anchor = anchored.run(
        f"""
on("TERM", then=leave)
for number in range({ORPHANS}):
    if os.fork() == 0:
        if os.fork() == 0: time.sleep(0.05)
        os._exit(0)
    os.wait()
note("done")
while True: time.sleep(60)
"""
    )
    anchored.wait_note("done")
    eventually(lambda: len(processes.children(anchor.pid)) == 1, what="the last orphan reaped")
    anchor.terminate()
    assert anchor.wait(60) == 0


def test_a_directory_that_is_a_symbolic_link_is_entered_anew(anchored: Anchored) -> None:
    for release in ("1", "2"):
        (anchored.directory / release).mkdir()
    current = anchored.directory / "current"
    current.symlink_to("1")
    script = (
        f'open("{anchored.directory}/notes", "a").write(os.path.basename(os.path.realpath(".")) + "\\n")\n'
        "mooring.serving(1.0)\non('TERM', then=leave)\nwhile True: time.sleep(60)"
    )
    (anchored.directory / "master.py").write_text(MASTER + script)
    shell = f"cd {current} && exec {sys.executable} -m gracehooks run {sys.executable} {anchored.directory}/master.py"
    environ = {**os.environ, "PYTHONPATH": str(Path(gracehooks.__file__).parent.parent)}
    environ[processes.MARK] = str(anchored.directory)
    with open(anchored.directory / "log", "ab") as log:
        anchor = subprocess.Popen(["sh", "-c", shell], env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    anchored.started.append(anchor)
    anchored.wait_note("1")
    eventually(lambda: processes.children(anchor.pid))
    current.unlink()
    current.symlink_to("2")
    os.kill(processes.children(anchor.pid)[0], signal.SIGKILL)
    anchored.wait_note("2")


@pytest.mark.parametrize(("command", "code"), [(None, 5), (["no-such-command"], 127)])
def test_it_speaks_json_when_asked(anchored: Anchored, command: list[str] | None, code: int) -> None:
    anchor = anchored.run("sys.exit(5)", command=command, GRACEHOOKS_LOG="json")
    assert anchor.wait(60) == code
    lines = [json.loads(line) for line in anchored.log.splitlines()]
    assert lines[-1]["level"] == "ERROR"
    assert all(line["message"].startswith("gracehooks: anchor: ") and line["at"] > 1e9 for line in lines)
    assert sum(line["pid"] != anchor.pid for line in lines) == (command is not None), (
        "what could not be started says why"
    )
