"""The commands on a real server: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kit import Late, apps, eventually, load, serve
from tests.kit.processes import alive


@pytest.fixture(scope="module")
def running():
    with serve() as found:
        yield found


@pytest.fixture
def server(running):
    """One server for all, whatever its generation is by now; the release that it finds next is a good one."""
    running.write("app.py", apps.WSGI)
    running.write("version.txt", "1")
    eventually(lambda: running.status()["state"] == "serving" and not running.status()["draining"])
    return running


def ask(server, *arguments):
    """A command on the only running instance; its exit code and the object that it prints."""
    done = server.cli(*arguments, "--json")
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def test_upgrade_rollback_reload_and_what_the_history_says(server):
    generation, earlier = server.status()["generation"] + 1, len(server.history())
    with load(server, kinds=("new", "keepalive"), clients=2) as traffic:
        server.write("version.txt", "2")
        code, said = ask(server, "upgrade")
        assert (code, said["outcome"], said["generation"]) == (0, "completed", generation)
        assert said["phases"]["probation"] >= 0.3
        eventually(lambda: server.get("/version").text == "2")  # the old generation may answer until it has left
        server.wait_for("GenerationRetired", id=said["id"])

        server.write("app.py", "raise LookupError('no such luck')")
        code, said = ask(server, "upgrade")
        assert (code, said["outcome"], said["reason"]) == (1, "rolled_back", "LookupError: no such luck")
        code, said = ask(server, "reload")
        assert (code, said["kind"], said["reason"]) == (1, "reload", "LookupError: no such luck")
        assert server.get("/version").text == "2"

        server.write("app.py", apps.WSGI)
        server.write("version.txt", "3")
        code, said = ask(server, "reload", "--drained")
        assert (code, said["outcome"], said["generation"]) == (0, "completed", generation)
        assert said["lost"] == {"requests": [], "jobs": []}
        assert server.get("/version").text == "3"
        traffic.wait(20)
    assert not traffic.lost, traffic.table()
    history = json.loads(server.cli("history", "--json").stdout)[earlier:]
    assert [(each["kind"], each["outcome"]) for each in history] == [
        ("upgrade", "completed"), ("upgrade", "rolled_back"), ("reload", "rolled_back"), ("reload", "completed"),
    ]  # fmt: skip


def test_a_second_upgrade_is_refused_with_a_reason(server):
    server.write("app.py", "import time; time.sleep(1.5)\n" + apps.WSGI)
    mark = server.mark()
    assert server.cli("upgrade", "--no-wait").returncode == 0
    server.wait_for("UpgradeStarted", after=mark)
    code, said = ask(server, "upgrade")
    assert (code, said["outcome"]) == (3, "refused")
    assert "under way" in said["reason"]
    server.wait_for("UpgradeCompleted", after=mark)


def test_no_verdict_in_time_is_4_and_the_upgrade_goes_on(server):
    mark = server.mark()
    code, said = ask(server, "upgrade", "--timeout", "0.1")
    assert code == 4
    assert "0.1 s" in said["reason"]
    server.wait_for("UpgradeCompleted", after=mark)


def test_status_shows_what_is_in_flight(server):
    with load(server, kinds=("new",), clients=1, path="/sleep?s=4&secret=1"):

        def seen():
            done = server.cli("status", "--pidfile", str(server.pidfile))
            return done.stdout if done.returncode == 0 and "GET /sleep" in done.stdout else ""

        text = eventually(seen)
    assert f"master {server.pid}: serving" in text
    assert "secret" not in text


def test_the_old_master_killed_meanwhile_gives_the_new_ones_verdict(server):
    server.write("app.py", "import time; time.sleep(0.7)\n" + apps.WSGI)
    mark, old = server.mark(), server.pid
    command = [server.python, "-m", "gracehooks", "upgrade", "--json"]
    with subprocess.Popen(command, cwd=server.dir, env=server.environment, stdout=subprocess.PIPE, text=True) as asking:
        server.wait_for("UpgradeStarted", after=mark)
        os.kill(old, signal.SIGKILL)
        out, _ = asking.communicate(timeout=60)
    assert (asking.returncode, json.loads(out)["outcome"]) == (0, "completed")
    assert server.pid != old
    assert server.get("/").status == 200


def test_a_person_on_a_terminal_sees_the_progress(server):
    leader, follower = os.openpty()
    command = [server.python, "-m", "gracehooks", "upgrade", "--drained"]
    done = subprocess.run(
        command, cwd=server.dir, env=server.environment, stdout=subprocess.PIPE, stderr=follower, check=False
    )
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 65536):
            shown += part
    except OSError:
        pass  # how a pseudo-terminal says that the other side is closed
    os.close(leader)
    assert done.returncode == 0
    assert b"2 of 2 workers ready" in shown
    assert b"upgrade: probation" in shown
    assert done.stdout.decode().splitlines()[1].endswith("nothing lost")


@pytest.mark.parametrize("lost", [False, True], ids=["nothing lost", "something lost"])
def test_stop_waits_and_tells_what_was_lost(lost):
    config = "gracehooks.configure(drain_timeout=0.5)" if lost else ""
    with serve(config=config, workers=1) as server, ThreadPoolExecutor(1) as pool:
        # The status file shows requests once a second.
        answer = pool.submit(server.get, f"/sleep?s={20 if lost else 3}")
        eventually(lambda: any(each["requests"] for each in server.status()["workers"]), what="a request in flight")
        master = server.pid
        done = server.cli("stop")
        assert not alive(master)
        assert (answer.exception() is None) != lost
        assert done.returncode == (1 if lost else 0), done.stdout + done.stderr
        first = done.stdout.splitlines()[0]
        assert first.endswith("1 lost" if lost else "nothing lost"), done.stdout
        assert ("lost request GET /sleep" in done.stdout) == lost
        assert server.cli("status", "--pidfile", str(server.pidfile)).returncode == 1


def test_python_m_and_the_script_are_the_same():
    script = os.path.join(os.path.dirname(sys.executable), "gracehooks")
    for command in ([sys.executable, "-m", "gracehooks"], [script]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("gracehooks ")


def test_late_is_what_a_time_out_of_the_kit_is(server):
    with pytest.raises(Late):
        server.wait_for("NeverSaid", timeout=0.05)
