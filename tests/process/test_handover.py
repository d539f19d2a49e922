"""What a new generation takes over, and how the command line may look: each works, or is refused before a fork."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kit import Late, Server, apps, eventually, load, serve
from tests.kit.processes import alive, children


def good_upgrade(server: Server) -> int:
    """An upgrade that completes, until the old master has left; the new master's pid."""
    master = server.pid
    verdict = server.upgrade()
    assert verdict["event"] == "UpgradeCompleted", verdict
    server.wait_for("GenerationRetired", after=verdict["n"])
    server.wait_gone(master)
    assert server.pid == verdict["successor"] != master
    return server.pid


@contextmanager
def watched(path: Path) -> Iterator[list[str]]:
    """Every way in which the pidfile was wrong meanwhile: absent, empty, or naming a process that does not run."""
    wrong: list[str] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.0002):
            try:
                pid = int(path.read_text())
            except (OSError, ValueError) as error:
                wrong.append(repr(error))
            else:
                # A master that has handed over may end between our two looks.
                if not alive(pid) and path.read_text() == f"{pid}\n":
                    wrong.append(f"{pid} does not run")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield wrong
    finally:
        ended.set()
        thread.join()


def test_pidfile_control_socket_generation_and_worker_count_are_handed_over():
    app = apps.WSGI.replace('path == "/pid"', 'path == "/environ"').replace(
        "str(os.getpid())",
        "' '.join(each for each in os.environ if each.lstrip('_').startswith(('GUNICORN_', 'GRACEHOOKS_')))",
    )
    with serve(app=app) as server:
        control = server.dir / "gunicorn.ctl"
        has_control = eventually(
            lambda: control.exists() or "gunicorn 23" in server.log() or "gunicorn 24" in server.log()
        )
        assert has_control
        server.signal("TTIN")
        eventually(lambda: len(server.workers()) == 3)
        with watched(server.pidfile) as wrong, load(server, clients=4) as traffic:
            for generation in (2, 3):
                good_upgrade(server)
                assert len(server.workers()) == 3
                eventually(lambda g=generation: server.status()["generation"] == g)
            # A rollback must not touch it either.
            server.write("app.py", "raise RuntimeError('no')")
            assert server.upgrade()["event"] == "UpgradeRolledBack"
            server.write("app.py", app)
            traffic.wait(20)
        assert not wrong, wrong[:5]
        assert not traffic.lost, traffic.table()
        # Nothing of the handover leaks into the application: there is the worker's own mark, and no more.
        assert server.get("/environ").text == "_GRACEHOOKS_WORKER"
        if control.exists():
            with socket.socket(socket.AF_UNIX) as connection:
                eventually(lambda: connection.connect_ex(str(control)) in (0, 106), what="the control socket answers")
        assert not Path(f"{server.pidfile}.2").exists()
        # TTOU below what the file says, too.
        for number in (2, 1):
            server.signal("TTOU")
            eventually(lambda n=number: len(server.workers()) == n)
        good_upgrade(server)
        assert len(server.workers()) == 1
        assert server.stop() == 0
        assert not control.exists()


def test_a_unix_socket_is_never_unlinked_on_the_way():
    with serve(bind="unix") as server:
        path = Path(server.address.path)
        inode = path.stat().st_ino
        missing: list[float] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.0002):
                if not path.exists():
                    missing.append(time.monotonic())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        with load(server, clients=4) as traffic:
            good_upgrade(server)
            server.write("app.py", "raise RuntimeError('no')")
            assert server.upgrade()["event"] == "UpgradeRolledBack"
            server.write("app.py", apps.WSGI)
            assert server.reload()["event"] == "UpgradeCompleted"
            good_upgrade(server)
            traffic.wait(20)
        ended.set()
        thread.join()
        assert not missing
        assert path.stat().st_ino == inode
        assert not traffic.lost, traffic.table()
        assert server.stop() == 0
        assert not path.exists()


def test_several_binds_with_ipv6_under_python_m_gunicorn():
    with serve(module=True, bind="tcp6", config="bind = [bind, 'unix:second.sock', '127.0.0.1:0']\n") as server:
        with load(server, clients=4) as traffic:
            good_upgrade(server)
            good_upgrade(server)
            traffic.wait(20)
        assert not traffic.lost, traffic.table()
        port = int(re.findall(r"http://127\.0\.0\.1:(\d+)", server.log())[-1])
        for family, address in (
            (socket.AF_INET, ("127.0.0.1", port)),
            (socket.AF_UNIX, str(server.dir / "second.sock")),
        ):
            with socket.socket(family) as connection:
                connection.settimeout(30)
                connection.connect(address)
                connection.sendall(b"GET /fast HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert server.stop() == 0
        assert not (server.dir / "second.sock").exists()


def test_a_symlinked_working_directory_is_resolved_anew(tmp_path: Path):
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        (tmp_path / number / "app.py").write_text(apps.WSGI)
        (tmp_path / number / "version.txt").write_text(number)
    current = tmp_path / "current"
    current.symlink_to("1")
    start = f"d=$PWD; cd {current} && exec gunicorn -c $d/gunicorn.conf.py app:app"
    with serve(command=["/bin/sh", "-c", with_path(start)]) as server, load(server, clients=2) as traffic:
        assert server.get("/version").text == "1"
        (tmp_path / "next").symlink_to("2")
        (tmp_path / "next").rename(current)
        good_upgrade(server)
        assert server.get("/version").text == "2"
        traffic.wait(20)
    assert not traffic.lost, traffic.table()


def with_path(command: str) -> str:
    import sys

    return f'PATH="{Path(sys.executable).parent}:$PATH"; export PATH; ' + command


def test_chdir_and_relative_names(tmp_path: Path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "app.py").write_text(apps.WSGI)
    (tmp_path / "app" / "version.txt").write_text("1")
    with serve(args=["--chdir", str(tmp_path / "app")]) as server:
        assert server.get("/version").text == "1"
        (tmp_path / "app" / "version.txt").write_text("2")
        good_upgrade(server)
        assert server.get("/version").text == "2"
        good_upgrade(server)


def test_a_configuration_that_is_a_module():
    command = ["/bin/sh", "-c", with_path("cp gunicorn.conf.py my_conf.py; exec gunicorn -c python:my_conf app:app")]
    with serve(command=command) as server:
        good_upgrade(server)
        (server.dir / "my_conf.py").write_text("raise RuntimeError('my luck')")
        assert "my luck" in server.upgrade()["reason"]


def test_reuse_port_is_refused_with_the_cure():
    with serve(config="reuse_port = True\n") as server:
        before = set(server.processes())
        verdict = server.upgrade()
        assert verdict["event"] == "UpgradeRefused"
        assert "remove --reuse-port" in verdict["reason"]
        assert set(server.processes()) == before
        assert server.get("/fast").status == 200
        assert server.history()[-1]["outcome"] == "refused"


def test_a_daemon():
    with serve(args=["--daemon", "--error-logfile", "server.log"]) as server, load(server, clients=2) as traffic:
        first = server.pid
        second = good_upgrade(server)
        good_upgrade(server)
        assert not alive(first)
        assert not alive(second)
        traffic.wait(20)
        last = server.pid
    assert not alive(last)
    assert not traffic.lost, traffic.table()


def test_a_second_upgrade_and_one_of_a_successor_are_refused():
    with serve(config="gracehooks.configure(probation=1.5)\n") as server:
        mark = server.mark()
        server.signal("USR2")
        started = server.wait_for("UpgradeStarted")
        server.wait_for("ProbationStarted")
        server.signal("USR2")
        assert "under way" in server.wait_for("UpgradeRefused", after=mark)["reason"]
        server.signal("USR2", started["successor"])
        refused = server.wait_for("UpgradeRefused", after=mark, pid=started["successor"])
        assert "verified" in refused["reason"]
        server.signal("HUP")
        server.wait_for("UpgradeRefused", kind="reload")
        assert server.wait_for("UpgradeCompleted", after=mark)["id"] == started["id"]


def test_several_old_generations_may_drain_up_to_the_limit():
    config = "gracehooks.configure(max_generations=2, drain_timeout=60)\n"
    app = apps.WSGI.replace(
        'if path == "/sleep"',
        """if path == "/wait":
        (HERE / ("begun-" + query["n"])).touch()
        while not (HERE / "go").exists():
            time.sleep(0.02)
    elif path == "/sleep\"""",
    )
    with serve(app=app, config=config) as server:
        answers: list[int] = []
        threads = []
        for number in range(2):
            each = threading.Thread(
                target=lambda n=number: answers.append(server.get(f"/wait?n={n}").status), daemon=True
            )
            each.start()
            threads.append(each)
            eventually((server.dir / f"begun-{number}").exists)
            verdict = server.upgrade()
            assert verdict["event"] == "UpgradeCompleted", verdict
            server.wait_for("MasterPromoted", pid=verdict["successor"])
        verdict = server.upgrade()
        assert verdict["event"] == "UpgradeRefused", verdict
        assert "2 older generations" in verdict["reason"]
        draining = server.status()["draining"]
        assert len(draining) == 2
        assert all(1 <= each["workers"] <= 2 for each in draining), "a successor is a child, and no worker"
        (server.dir / "go").touch()
        for each in threads:
            each.join(60)
        assert answers == [200, 200]
        eventually(lambda: not server.status()["draining"])
        good_upgrade(server)

        def lost() -> list[dict]:
            return [each["lost"] for each in server.history() if each["outcome"] == "completed"]

        eventually(lambda: len(lost()) == 3, what="the record of the last one, once the generation before it has left")
        assert lost() == [{"requests": [], "jobs": []}] * 3


def test_a_failure_that_crosses_the_commit_rolls_back_and_the_old_generation_serves_on():
    with serve() as server:
        old = server.pid
        server.signal("USR2")
        successor = server.wait_for("UpgradeStarted")["successor"]
        server.wait_for("ProbationStarted")
        os.kill(successor, signal.SIGSTOP)  # it cannot say yet that its worker has died
        os.kill(children(successor)[0], signal.SIGKILL)
        eventually(lambda: server.status()["upgrade"]["state"] == "committing", what="the commit was sent")
        os.kill(successor, signal.SIGCONT)
        verdict = server.wait_for("UpgradeRolledBack")
        assert "ended in the probation: killed by SIGKILL" in verdict["reason"], verdict
        eventually(lambda: set(server.processes()) == {old, *server.workers()}, what="the old generation alone")
        assert server.pid == old
        assert server.get("/").status == 200
        assert server.status()["state"] == "serving"
        good_upgrade(server)


def test_what_waits_for_a_generation_that_cannot_serve_is_counted():
    """The old master is killed while a broken release boots: nobody serves, and the new one ends by its error."""
    broken = "import time\nwhile not (HERE / 'go').exists(): time.sleep(0.02)\nraise RuntimeError('broken')\n"
    with serve(config="gracehooks.configure(ready_timeout=60)\n") as server:
        app = (server.dir / "app.py").read_text()
        server.write("app.py", app + broken)
        server.signal("USR2")
        successor = server.wait_for("UpgradeStarted")["successor"]
        eventually(lambda: len(children(successor)) >= 2, what="the successor's workers")
        old = server.workers()
        server.signal("KILL")
        assert server.wait_for("MasterPromoted")["pid"] == successor
        eventually(lambda: not any(alive(pid) for pid in old), what="the end of the old workers")
        waiting = [server.address.connect() for _ in range(3)]
        for each in waiting[:2]:
            each.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        (server.dir / "go").touch()
        server.wait_gone(successor)
        record = server.history()[-1]
        assert (record["kind"], record["outcome"], record["reason"]) == ("stop", "forced", "an error ended the master")
        assert [each["path"] for each in record["lost"]["requests"]] == ["?", "?"], record
        for each in waiting:
            each.close()


def test_the_users_hooks_still_run():
    hooks = """
        def on_starting(server): server.log.info("their on_starting")
        def when_ready(server): server.log.info("their when_ready")
        def child_exit(server, worker): server.log.info("their child_exit")
        def on_exit(server): server.log.info("their on_exit")
        def on_reload(server): server.log.info("their on_reload")
        worker_class = "gracehooks.Worker"
    """
    with serve(config=hooks) as server:
        assert server.reload()["event"] == "UpgradeCompleted"
        good_upgrade(server)
        assert server.stop() == 0
        log = server.log()
        for each, times in (("on_starting", 2), ("when_ready", 2), ("child_exit", 6), ("on_exit", 2), ("on_reload", 1)):
            assert log.count(f"their {each}") == times, each


def open_in(server: Server, pid: int) -> list[str]:
    """What the process has open, without a file of its state that it writes just now."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(each))
        except FileNotFoundError:
            continue  # closed since
    return sorted(each for each in found if not each.startswith(str(server.state_dir)))


def test_a_successor_whose_old_master_is_killed_while_it_boots_serves_when_it_is_ready_and_once():
    with serve(workers=1, leftovers=True) as server:
        old = server.pid
        descriptors = open_in(server, old)
        server.signal("USR2")
        new = server.wait_for("UpgradeStarted")["successor"]
        server.signal("KILL", old)
        promoted = server.wait_for("MasterPromoted", pid=new)
        assert promoted["reason"] == "the old master died"
        serving = server.wait_for("ServingStarted", pid=new)
        assert server.wait_for("WorkerReady", pid=new)["n"] < serving["n"]
        eventually(lambda: set(server.processes()) == {new, *server.workers(new)}, what="the end of the old workers")
        assert server.get("/fast").status == 200
        # One control socket, not one from the promotion and one from gunicorn's start.
        try:
            eventually(lambda: len(open_in(server, new)) == len(descriptors), what="the same descriptors")
        except Late:
            print(f"before: {descriptors}\nnow: {open_in(server, new)}")
            raise
        assert [each["event"] for each in server.events() if each["pid"] == new].count("ServingStarted") == 1


def test_every_line_of_ours_is_json_when_asked():
    config = "gracehooks.configure(job_timeout=0)"
    with serve(config=config, env={"GRACEHOOKS_LOG": "json"}) as server:
        good_upgrade(server)
        server.write("app.py", "raise RuntimeError('no such luck')\n")
        assert server.upgrade()["event"] == "UpgradeRolledBack"
        assert server.get("/job?s=30").status == 200
        server.stop()
        lines = [line.partition("] [")[2].partition("] [")[2].partition("] ")[2] for line in server.log().splitlines()]
    ours = [json.loads(line) for line in lines if "gracehooks: " in line]
    assert all(each["message"].startswith("gracehooks: ") and each["pid"] and each["generation"] for each in ours)
    said = {each.get("event") for each in ours}
    assert {"UpgradeStarted", "UpgradeCompleted", "UpgradeRolledBack", "StopStarted", "Stopped", None} <= said
    assert "gracehooks: " not in "".join(line for line in server.log().splitlines() if '"message"' not in line)


def test_one_generation_serves_when_the_middle_one_of_three_is_killed():
    """The first comes back, since it has not left yet; the third, which is not proven, does not serve beside it."""
    app = "import os, time\nwhile os.path.exists('gate'): time.sleep(0.02)\n" + apps.WSGI
    with serve(app, workers=1, config="gracehooks.configure(drain_timeout=20)\n", leftovers=True) as server:
        first = server.pid
        slow = threading.Thread(target=server.get, args=("/sleep?s=6",), daemon=True)
        slow.start()
        eventually(lambda: server.status()["workers"][0]["requests"], what="the request that holds the first")
        second = server.upgrade()["successor"]
        server.wait_for("MasterPromoted", pid=second)
        (server.dir / "gate").touch()
        server.signal("USR2", second)
        third = server.wait_for("UpgradeStarted", pid=second)["successor"]
        server.signal("KILL", second)
        server.wait_for("UpgradeResumed", pid=first)
        eventually((server.dir / "gunicorn.pid.2").exists, what="the pidfile of the third")
        server.signal("USR2", first)
        refused = server.wait_for("UpgradeRefused", pid=first)
        assert f"names master {third}, which is still there" in refused["reason"]
        (server.dir / "gate").unlink()
        eventually(lambda: not alive(third), what="the end of the third")
        assert len([each for each in server.events() if each["event"] == "Stopped" and each["pid"] == third]) == 1
        eventually(lambda: set(server.processes()) == {first, *server.workers(first)}, what="the first, and no other")
        assert server.pid == first
        assert server.get("/fast").status == 200
        assert not [each for each in server.events() if each["event"] == "MasterPromoted" and each["pid"] == third]
        slow.join(60)
        # What a third that was killed leaves behind keeps nobody from the next upgrade, also when its pid has come again.
        second = server.dir / "gunicorn.pid.2"
        second.write_text(f"{os.getpid()}\n")
        os.utime(second, (1e9, 1e9))
        assert server.upgrade()["event"] == "UpgradeCompleted"
        assert not second.exists()
