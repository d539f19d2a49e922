"""The bounded stop: TERM, the hammer, the lame duck, a stop during an upgrade, and what is told of what was lost."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.kit import Late, Server, apps, eventually, load, serve, within
from tests.kit.classes import CLASSES, LOOPS
from tests.kit.processes import alive

NOTHING = {"requests": [], "jobs": []}


def last_stop(server: Server) -> dict:
    record = server.history()[-1]
    assert record["kind"] == "stop", record
    return record


#: The catalogue's application; each request leaves a file when it has begun.
APP = (
    apps.WSGI
    + """
plain = app


def app(environ, start_response):
    (HERE / ("begun-" + environ["PATH_INFO"].strip("/") + "-" + environ.get("QUERY_STRING", ""))).touch()
    return plain(environ, start_response)
"""
)


@contextmanager
def asking(server: Server, *paths: str) -> Iterator[dict[str, object]]:
    """A request for each path, being answered when the block begins; what became of it, after the block."""
    answers: dict[str, object] = {}

    def ask(path: str) -> None:
        try:
            answers[path] = server.get(path).status
        except Exception as error:
            answers[path] = error

    threads = [threading.Thread(target=ask, args=(path,), daemon=True) for path in paths]
    for each in threads:
        each.start()
    for path in paths:
        begun = server.dir / ("begun-" + path.strip("/").replace("?", "-"))
        eventually(begun.exists, what=f"the beginning of {path}")
    yield answers
    for each in threads:
        each.join(60)


def test_term_ends_clean_with_counts_and_a_second_term_changes_nothing():
    with serve(app=APP, config="gracehooks.configure(drain_timeout=20)\n") as server:
        for _ in range(5):
            server.get("/fast")
        with asking(server, "/sleep?s=1.5", "/sleep?s=1.6", "/stream?n=10&s=0.1") as answers:
            started = time.monotonic()
            server.signal("TERM")
            server.wait_for("AcceptingEnded")
            server.signal("TERM")
            assert server.stop() == 0
            took = time.monotonic() - started
        assert set(answers.values()) == {200}, answers
        stopped = server.wait_for("Stopped")
        assert stopped["outcome"] == "completed"
        assert stopped["lost"] == NOTHING
        assert stopped["answered"] >= 8
        if took > 4.0:
            raise Late(f"the stop took {took:.2f} s for a request of 1.6 s")
        assert took > 1.0
        assert last_stop(server)["requests_answered"] == stopped["answered"]
        assert server.status()["state"] == "stopped"
        assert not server.pidfile.exists()
        assert [each["event"] for each in server.events()].count("StopStarted") == 1


def test_an_idle_server_stops_at_once():
    with serve() as server, within(0.5):
        assert server.stop() == 0


def test_the_stop_budget_is_kept_and_the_report_names_what_was_lost():
    config = "gracehooks.configure(drain_timeout=1, job_timeout=0.5, cleanup_timeout=0.5)\n"
    with serve(app=APP, config=config) as server:
        with asking(server, "/sleep?s=60&secret=1", "/sleep?s=0.8") as answers, within(2.0 + 1.0):
            server.stop()
        assert answers["/sleep?s=0.8"] == 200
        assert isinstance(answers["/sleep?s=60&secret=1"], Exception)
        record = last_stop(server)
        assert record["outcome"] == "forced"
        assert [(each["method"], each["path"]) for each in record["lost"]["requests"]] == [("GET", "/sleep")]
        assert record["lost"]["requests"][0]["age"] > 0.9
        assert "secret" not in (server.state_dir / "history.jsonl").read_text() + server.log()


def test_int_is_the_hammer_at_any_moment():
    for first in ("INT", "TERM"):
        with serve(app=APP, config="gracehooks.configure(drain_timeout=30)\n") as server:
            with asking(server, "/sleep?s=60", "/sleep?s=61") as answers:
                master = server.pid
                with within(1.0 + 0.5):
                    if first == "TERM":
                        server.signal("TERM", master)
                        server.wait_for("AcceptingEnded")
                    server.signal("INT", master)
                    server.wait_gone(master)
                server.clean = True
            assert all(isinstance(each, Exception) for each in answers.values()), answers
            record = last_stop(server)
            assert record["outcome"] == "forced"
            assert len(record["lost"]["requests"]) == 2, record
            assert all("forced by SIGINT" in each["reason"] for each in record["lost"]["requests"]), record
            assert not server.pidfile.exists()


def test_the_hammer_in_the_probation_tells_what_both_generations_lost():
    paths = [f"/sleep?s={60 + number}" for number in range(4)]
    config = "gracehooks.configure(probation=60, drain_timeout=30)\n"
    # A worker of this class has one request at a time: with two of each generation, four requests are on all of them.
    with serve(app=APP, config=config, worker="gracehooks.SyncWorker") as server:
        server.signal("USR2")
        server.wait_for("ProbationStarted")
        with asking(server, *paths) as answers:
            master = server.pid
            with within(1.5 + 0.5):
                server.signal("INT", master)
                server.wait_gone(master)
            server.clean = True
        assert 200 not in answers.values(), answers  # gunicorn's sync worker answers 500 where it still can
        record = last_stop(server)
        assert [each["path"] for each in record["lost"]["requests"]] == ["/sleep"] * 4, record
        ended = {each["worker"]: each["generation"] for each in server.events() if each["event"] == "WorkerEnded"}
        assert {ended[each["worker"]] for each in record["lost"]["requests"]} == {1, 2}
        assert not server.processes()


def test_lame_duck_serves_on_and_then_stops():
    app = """
        import gracehooks
        from gracehooks import readiness
        def plain(environ, start_response):
            start_response("200 OK", [("Content-Length", "2")])
            return [b"ok"]
        app = readiness(plain, path="/-/ready")
    """
    with serve(app=app, config="gracehooks.configure(lame_duck=4)\n") as server:
        assert server.get("/-/ready").status == 200
        with load(server, kinds=("new",), clients=2) as traffic:
            server.signal("TERM")
            server.wait_for("LameDuckStarted")
            eventually(lambda: server.get("/-/ready").status == 503)
            traffic.wait(20)
            state = server.status()["state"]
        if any(each["event"] == "AcceptingEnded" for each in server.events()):
            raise Late("the lame duck was over before the load")
        assert state == "lame_duck"
        assert not traffic.lost, traffic.table()
        server.wait_gone(server.process.pid)
        assert server.wait_for("Stopped")["lost"] == NOTHING


def test_a_stop_during_an_upgrade_stops_both_generations():
    hang = "import os, time\nif os.path.exists('hang'): time.sleep(600)\n"
    for state in ("BOOTING", "PROBATION"):
        config = "gracehooks.configure(ready_timeout=60, probation=60)\n"
        with serve(app=hang + APP, config=config) as server:
            if state == "BOOTING":
                (server.dir / "hang").touch()
            server.signal("USR2")
            if state == "BOOTING":
                server.wait_for("UpgradeStarted")
                eventually(lambda: len(server.processes()) >= 5, what="the successor's workers")
            else:
                server.wait_for("ProbationStarted")
            with asking(server, "/sleep?s=0.5") as answers, within(2.0):
                assert server.stop() == 0
            assert set(answers.values()) == {200}, answers
            assert not server.processes()
            assert server.wait_for("UpgradeRolledBack")["reason"]
            assert server.wait_for("Stopped", generation=1)["lost"] == NOTHING
            assert not server.pidfile.exists()
            assert not (server.dir / "gunicorn.pid.2").exists()


def test_a_killed_worker_leaves_a_report_of_exactly_its_requests():
    with serve(app=APP, workers=1) as server:
        (worker,) = server.workers()
        server.get("/fast")
        with asking(server, "/sleep?s=40", "/stream?n=900&s=0.1") as answers:
            os.kill(worker, signal.SIGKILL)
        assert all(isinstance(each, Exception) for each in answers.values()), answers
        ended = server.wait_for("WorkerEnded", worker=worker)
        assert "SIGKILL" in ended["reason"]
        assert sorted(each["path"] for each in ended["lost"]["requests"]) == ["/sleep", "/stream"]
        assert ended["answered"] >= 1
        (record,) = eventually(server.history, what="the history of it, before any stop or upgrade")
        assert (record["kind"], record["outcome"]) == ("worker", "forced")
        assert record["reason"] == f"worker {worker}: {ended['reason']}"
        assert record["lost"] == ended["lost"]
        assert server.get("/fast").status == 200
        assert server.stop() == 0
        assert sorted(each["path"] for each in last_stop(server)["lost"]["requests"]) == ["/sleep", "/stream"]


def test_a_stop_serves_the_backlog_though_its_only_worker_has_just_crashed():
    for boots in (True, False):
        with serve("import os, time\nif os.path.exists('slow'): time.sleep(1)\n" + APP, workers=1) as server:
            (worker,) = server.workers()
            os.kill(worker, signal.SIGSTOP)  # what connects now waits in the kernel
            clients = [server.address.connect() for _ in range(20)]
            for each in clients:
                each.sendall(b"GET /fast HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            (server.dir / "slow").touch()
            os.kill(worker, signal.SIGKILL)
            if boots:
                eventually(lambda old=worker: set(server.workers()) - {old}, what="the worker that boots in its place")
            server.signal("TERM")
            answers = [each.recv(12) for each in clients]
            assert answers == [b"HTTP/1.1 200"] * 20
            for each in clients:
                each.close()
            server.wait_gone(server.process.pid)
            # The killed worker may not have booked yet that it had answered the start's own question.
            lost = server.wait_for("Stopped")["lost"]["requests"]
            assert not [each for each in lost if each["path"] != "/"], lost


def test_workers_whose_master_was_killed_leave():
    for worker in ("gracehooks.Worker", "sync"):
        with serve(worker=worker, config="on_starting = gracehooks.on_starting\n", leftovers=True) as server:
            workers = server.workers()
            os.kill(server.pid, signal.SIGKILL)
            eventually(lambda each=workers: not any(map(alive, each)), what=f"the end of the orphaned {worker}")


def test_the_hammer_to_a_master_that_retires_leaves_the_new_one_alone():
    with serve(app=APP, config="gracehooks.configure(drain_timeout=60)\n") as server:
        with asking(server, "/sleep?s=90") as answers:
            old = server.pid
            verdict = server.upgrade()
            assert verdict["event"] == "UpgradeCompleted"
            server.wait_for("MasterPromoted", pid=verdict["successor"])
            server.signal("INT", old)
            server.wait_gone(old)
        assert isinstance(answers["/sleep?s=90"], Exception)
        assert server.pid == verdict["successor"]
        assert server.get("/fast").status == 200
        retired = server.wait_for("GenerationRetired")
        assert [each["path"] for each in retired["lost"]["requests"]] == ["/sleep"]
        assert server.stop() == 0


def test_the_hammer_leaves_no_unix_path_behind():
    with serve(bind="unix") as server:
        path = server.dir / "gunicorn.sock"
        assert path.exists()
        server.signal("INT")
        server.wait_gone(server.process.pid)
        assert not path.exists()


def test_term_to_a_master_that_retires_is_answered_in_the_log():
    with serve(APP) as server:
        old = server.pid
        with asking(server, "/sleep?s=2"):
            assert server.upgrade()["event"] == "UpgradeCompleted"
            server.signal("TERM", old)
            eventually(lambda: "SIGTERM changes nothing: this master is leaving already" in server.log())
        server.wait_gone(old)
        assert server.get("/").status == 200


def test_metrics_reach_statsd_gunicorns_own_among_them():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as statsd:
        statsd.bind(("127.0.0.1", 0))
        statsd.settimeout(0.05)
        heard: set[str] = set()

        def hear() -> set[str]:
            try:
                while True:
                    heard.add(statsd.recv(4096).decode().split(":")[0])
            except TimeoutError:
                return heard

        with serve(config=f"statsd_host = '127.0.0.1:{statsd.getsockname()[1]}'") as server:
            assert server.upgrade()["event"] == "UpgradeCompleted"
            wanted = {"gunicorn.workers", "gracehooks.UpgradeStarted", "gracehooks.UpgradeCompleted"}
            eventually(lambda: wanted <= hear(), what="the metrics of an upgrade")
            assert server.stop() == 0
            eventually(lambda: "gracehooks.Stopped" in hear(), what="the metric of a stop")


_KEEPS_A_FILE = """
NOTES = open(HERE / "notes.txt", "a")
"""
_WSGI_WRITES = """
plain = app


def app(environ, start_response):
    NOTES.write("asked\\n")
    return plain(environ, start_response)
"""
_ASGI_WRITES = """
plain = app


async def app(scope, receive, send):
    if scope["type"] == "http":
        NOTES.write("asked\\n")
    await plain(scope, receive, send)
"""


@pytest.mark.parametrize("worker", CLASSES)
def test_an_idle_server_is_gone_at_once_and_what_its_application_wrote_is_in_the_file(worker):
    asynchronous = worker in LOOPS
    app = (apps.ASGI if asynchronous else apps.WSGI) + _KEEPS_A_FILE
    app += _ASGI_WRITES if asynchronous else _WSGI_WRITES
    with serve(worker=worker, workers=1, app=app) as server:
        server.get("/")
        with within(0.3):
            assert server.stop() == 0
        assert last_stop(server)["lost"] == NOTHING
        assert set((server.dir / "notes.txt").read_text().split()) == {"asked"}
