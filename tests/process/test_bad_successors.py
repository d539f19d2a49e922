"""A release that cannot serve is rolled back under load: nothing lost, nobody left over, and the next good one works."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.kit import Late, Server, apps, eventually, load, serve
from tests.kit.classes import CLASSES, LOOPS
from tests.kit.processes import children

STOCK = "on_starting = gracehooks.on_starting\n"
#: The time of the crash, written by the release that crashes.
CRASH = 'import pathlib, time\npathlib.Path("crashed").write_text(str(time.monotonic()))\n'
#: One worker of all that import the release gets into the block.
ONE_ONLY = """
import os
try:
    os.close(os.open("first", os.O_CREAT | os.O_EXCL))
    FIRST = True
except FileExistsError:
    FIRST = False
"""
#: The first worker crashes in the probation, at a moment when it holds no connection: its loop waits for one.
CRASH_IN_PROBATION = (
    ONE_ONLY
    + """
import pathlib, signal, time
def look(number, frame):
    begun = "ProbationStarted" in pathlib.Path("events.jsonl").read_text()[START:]
    if begun and frame.f_code.co_name == "wait":
        pathlib.Path("crashed").write_text(str(time.monotonic()))
        os._exit(1)
START = pathlib.Path("events.jsonl").stat().st_size
if FIRST:
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
"""
)


@dataclass(frozen=True)
class Bad:
    """A bad release: what is written over the good one, the verdict and the words of its reason."""

    name: str
    reason: str
    app: str = ""  # put before the application's source
    config: str = ""
    outcome: str = "UpgradeRolledBack"
    break_it: Callable[[Server], Callable[[], Any]] | None = None  # returns what mends it
    within: float = 1.0  # seconds from the crash, or from the start where nothing crashes


def hide(path: Path) -> Callable[[], Any]:
    away = path.with_name(path.name + ".away")
    path.rename(away)
    return lambda: away.rename(path)


def check(server: Server, bad: Bad, good_config: str, good_app: str = apps.WSGI) -> float:
    """Upgrade to the bad release, then to a good one; how long the rollback took."""
    master, workers = server.pid, set(server.workers())
    for name in ("crashed", "first"):
        (server.dir / name).unlink(missing_ok=True)
    if bad.app:
        server.write("app.py", bad.app + good_app)
    if bad.config:
        server.configure(good_config + textwrap.dedent(bad.config))
    mend = bad.break_it(server) if bad.break_it else None
    verdict = server.upgrade()
    begun = next((e for e in server.events() if e["event"] == "UpgradeStarted" and e["id"] == verdict["id"]), verdict)
    crashed = server.dir / "crashed"
    since = float(crashed.read_text()) if crashed.exists() else begun["at"]
    took = verdict["at"] - since
    assert verdict["event"] == bad.outcome, (bad.name, verdict)
    assert bad.reason in verdict["reason"], (bad.name, verdict["reason"])
    if took > bad.within + 2.0:
        raise Late(f"{bad.name}: rolled back {took:.2f} s after it failed")
    assert server.pid == master, bad.name
    eventually(
        lambda: set(server.processes()) == {master, *workers}, 10, f"{bad.name}: only the old generation is left"
    )
    assert server.get("/").status == 200
    assert not Path(f"{server.pidfile}.2").exists()
    assert (
        server.history()[-1]["outcome"]
        == {"UpgradeRolledBack": "rolled_back", "UpgradeRefused": "refused"}[bad.outcome]
    )
    if mend:
        mend()
    server.write("app.py", good_app)
    server.configure(good_config)
    return took


def good_upgrade(server: Server) -> None:
    master = server.pid
    verdict = server.upgrade()
    assert verdict["event"] == "UpgradeCompleted", verdict
    server.wait_for("MasterPromoted", generation=verdict["generation"] + 1)
    assert server.pid == verdict["successor"] != master
    server.wait_gone(master)
    assert set(server.processes()) == {server.pid, *server.workers()}


CRASHES = [
    Bad("import error", "no_such_module", app=CRASH + "import no_such_module\n"),
    Bad("exception at boot", "no such luck", app=CRASH + "raise RuntimeError('no such luck')\n"),
    Bad("exit 0 at boot", "code 0", app=CRASH + "import sys; sys.exit(0)\n"),
    Bad("dies at boot", "SIGKILL", app=CRASH + "import os; os.kill(os.getpid(), 9)\n"),
    Bad(
        "post_fork raises", "exit code", config="def post_fork(server, worker):\n    raise RuntimeError('post_fork')\n"
    ),
    Bad("configuration file", "SyntaxError", config="def (:\n", within=3.0),
    Bad("wrong setting", "probation", config="gracehooks.configure(probation=-1)\n", within=3.0),
    Bad("ready_path 500", "answered 500 on /status", config="gracehooks.configure(ready_path='/status')\n", within=3.0),
    Bad(
        "ready_path raises", "raised ValueError", config="gracehooks.configure(ready_path='/stream?n=x')\n", within=3.0
    ),
]


def test_crashing_releases_are_rolled_back_at_once():
    config = ""
    with serve(config=config) as server, load(server, clients=4) as traffic:
        for bad in CRASHES:
            check(server, bad, config)
            good_upgrade(server)
        traffic.wait(20)
    assert not traffic.lost, traffic.table()


def test_hooks_that_raise_and_releases_that_are_gone():
    def on_starting_raises(server: Server) -> Callable[[], Any]:
        server.configure("def on_starting(server):\n    raise RuntimeError('the hook')\n")
        return lambda: None

    config = (
        STOCK
        + "import os\ndef pre_exec(server):\n    if os.path.exists('raise'): raise RuntimeError('pre_exec says no')\n"
    )

    def pre_exec_raises(server: Server) -> Callable[[], Any]:
        (server.dir / "raise").touch()
        return (server.dir / "raise").unlink

    bads = [
        Bad("on_starting raises", "the hook", break_it=on_starting_raises, within=3.0),
        Bad("pre_exec raises", "pre_exec says no", break_it=pre_exec_raises),
    ]
    with serve(worker="sync", config=config) as server, load(server, kinds=("new",), clients=2) as traffic:
        for bad in bads:
            check(server, bad, config)
            good_upgrade(server)
        traffic.wait(20)
    assert not traffic.lost, traffic.table()


def test_hanging_releases_are_rolled_back_in_time():
    config = STOCK + "gracehooks.configure(ready_timeout=5, probation=3)\n"
    hang = "import time; time.sleep(600)\n"
    bads = [
        Bad("hang in import", "hung for 5 s while booting (0 of 2", app=hang, within=10),
        Bad("hang in one worker", "(1 of 2", app=ONE_ONLY + "import time\nif FIRST: time.sleep(600)\n", within=10),
        Bad("ready_path hangs", "hung for 5 s", config="gracehooks.configure(ready_path='/sleep?s=600')\n", within=10),
        Bad("crash in the probation", "in the probation", app=CRASH_IN_PROBATION),
    ]
    if os.environ.get("TEST_FULL") == "1":
        hang_early = "import time; time.sleep(600)\n"
        bads.append(Bad("hang in the configuration", "no worker was ready", config=hang_early, within=10))
    with serve(worker="sync", config=config) as server, load(server, kinds=("new",), clients=2) as traffic:
        for bad in bads:
            check(server, bad, config)
        good_upgrade(server)
        traffic.wait(20)
    assert not traffic.lost, traffic.table()


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that can be deleted: a copy of the interpreter's names, not of its packages."""
    place = tmp_path / "venv"
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (place / "bin" / "gunicorn").write_text("import sys\nfrom gunicorn.app.wsgiapp import run\nsys.exit(run())\n")
    (place / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (place / "lib").symlink_to(Path(sys.prefix) / "lib")
    return place


def test_a_release_directory_or_an_interpreter_that_is_gone_is_refused(environment: Path, tmp_path: Path):
    release = tmp_path / "release"
    release.mkdir()
    (release / "app.py").write_text(apps.WSGI)
    bads = [
        Bad("release deleted", "start directory", outcome="UpgradeRefused", break_it=lambda server: hide(release)),
        Bad(
            "interpreter deleted",
            "interpreter",
            outcome="UpgradeRefused",
            break_it=lambda server: hide(environment / "bin" / "python"),
        ),
        Bad(
            "start script deleted",
            "start script",
            outcome="UpgradeRefused",
            break_it=lambda server: hide(environment / "bin" / "gunicorn"),
        ),
    ]
    python = environment / "bin" / "python"
    start = f"d=$PWD; cd {release} && exec {python} {environment}/bin/gunicorn -c $d/gunicorn.conf.py app:app"
    with serve(worker="sync", config=STOCK, command=["/bin/sh", "-c", start]) as server:
        with load(server, kinds=("new",), clients=2) as traffic:
            for bad in bads:
                check(server, bad, STOCK)
            good_upgrade(server)
            traffic.wait(20)
        assert not traffic.lost, traffic.table()


def test_files_that_cannot_be_written_do_not_stop_the_service():
    """A state directory and a pidfile directory that are gone: the upgrade goes on or refuses, but it serves."""
    config = (
        STOCK
        + "import os\nstate = os.path.join(os.path.dirname(pidfile), 'state')\ngracehooks.configure(state_dir=state)\n"
    )
    with serve(worker="sync", config=config) as server, load(server, kinds=("new",), clients=2) as traffic:
        # A state directory that has become a file: the server says so and goes on.
        eventually(lambda: (server.dir / "state").is_dir())
        shutil.rmtree(server.dir / "state")
        (server.dir / "state").write_text("in the way")
        assert server.upgrade()["event"] == "UpgradeCompleted"
        server.wait_for("GenerationRetired")
        assert "cannot write the state in" in server.log()
        (server.dir / "state").unlink()
        assert server.upgrade()["event"] == "UpgradeCompleted"
        server.wait_for("GenerationRetired", after=server.wait_for("GenerationRetired"))
        assert (server.dir / "state" / "history.jsonl").exists()
        traffic.wait(20)
    assert not traffic.lost, traffic.table()


def test_a_pidfile_that_cannot_be_written_and_a_full_disk_roll_back():
    config = STOCK + "pidfile = 'pids/gunicorn.pid'\n"
    with serve(worker="sync", config=config, files={"pids/.keep": ""}, answers=None) as server:
        server.wait_for("ServingStarted")
        master = server.process.pid
        with load(server, kinds=("new",), clients=2) as traffic:
            mend = hide(server.dir / "pids")
            (server.dir / "pids").write_text("in the way")
            server.signal("USR2", master)
            assert "gunicorn.pid" in server.wait_for("UpgradeRolledBack")["reason"]
            (server.dir / "pids").unlink()
            mend()
            workers = set(server.workers(master))
            full = resource.prlimit(master, resource.RLIMIT_FSIZE)
            resource.prlimit(master, resource.RLIMIT_FSIZE, (0, full[1]))
            server.signal("USR2", master)  # neither its log nor its events can be written now
            eventually(lambda: len(server.processes()) > 3, what="the successor")
            eventually(lambda: set(server.processes()) == {master, *workers}, what="its end")
            eventually(lambda: set(children(master)) == workers, what="its burial: the rollback is over")
            resource.prlimit(master, resource.RLIMIT_FSIZE, full)
            assert int((server.dir / "pids" / "gunicorn.pid").read_text()) == master
            mark = server.mark()
            server.signal("USR2", master)
            assert server.wait_for("UpgradeCompleted", after=mark)["phases"]
            server.wait_gone(master)
            traffic.wait(20)
        assert not traffic.lost, traffic.table()
        successor = int((server.dir / "pids" / "gunicorn.pid").read_text())
        server.signal("TERM", successor)
        server.wait_gone(successor)


LIFESPAN = """
import asyncio


async def connect():
    await asyncio.sleep(600)


async def app(scope, receive, send):
    assert scope["type"] == "lifespan"
    await receive()
    await connect()
"""


@pytest.mark.parametrize("worker", CLASSES)
def test_a_release_that_hangs_says_where(worker: str):
    """In an upgrade and in a reload: the import, and what a lifespan waits for."""
    hangs = [("def settings():\n    import time\n    time.sleep(600)\nsettings()\n", "app.py:3 in settings < ")]
    if worker in LOOPS:
        hangs.append((LIFESPAN, "app.py:6 in connect < "))
    good = apps.ASGI if worker in LOOPS else apps.WSGI
    with serve(good, "gracehooks.configure(ready_timeout=5)\n", worker=worker, workers=2) as server:
        for source, at in hangs:
            server.write("app.py", source)
            for replace in (server.upgrade, server.reload):
                verdict = replace()
                assert verdict["event"] == "UpgradeRolledBack"
                place = verdict["reason"].partition("hung for 5 s while booting (0 of 2 workers were ready), at ")[2]
                assert at in place, verdict
        server.write("app.py", good)
        good_upgrade(server)
        assert server.stop() == 0
