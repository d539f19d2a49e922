"""Jobs and a real Redis: the counter that must be exact, and the runner that must not leave a message half done.

The full figures: TEST_COUNTER=1000 TEST_COUNTER_DELAY=5 TEST_STOCK=1 TEST_PLAIN=1 TEST_FULL=1 TEST_REPEATS=10 TEST_SLEEP=3
pytest tests/labs/test_jobs.py -s
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import Late, Server, apps, eventually, needs, serve
from tests.kit import processes as seen
from tests.kit.classes import CLASSES, LOOPS

redis = pytest.importorskip("redis")
pytestmark = pytest.mark.lab

COUNTER = int(os.environ.get("TEST_COUNTER", "40"))
DELAY = float(os.environ.get("TEST_COUNTER_DELAY", "0.5"))
RATE = 25.0
#: B: how often, how long a message takes, and whether every way meets every class.
REPEATS = int(os.environ.get("TEST_REPEATS", "1"))
SLEEP = os.environ.get("TEST_SLEEP", "0.4")
FULL = "TEST_FULL" in os.environ


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A Redis of our own."""
    program = needs("redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    directory = tmp_path_factory.mktemp("redis")
    process = subprocess.Popen(
        [program, "--port", str(number), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        client = redis.Redis(port=number)

        def answers() -> bool:
            assert process.poll() is None, "redis-server has ended"
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

        eventually(answers)
        yield number
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(port: int) -> Iterator[redis.Redis]:
    client = redis.Redis(port=port, decode_responses=True)
    client.flushall()
    yield client
    client.close()


# -- A. the counter ----------------------------------------------------------------------------------------------
WSGI = """
import itertools, os, threading, time
import redis
from gracehooks import jobs

POOL = redis.ConnectionPool(port=int(os.environ["REDIS_PORT"]))
DELAY = float(os.environ["DELAY"])
NUMBERS = itertools.count()


def count():
    time.sleep(DELAY)
    redis.Redis(connection_pool=POOL).incr("counter")


def app(environ, start_response):
    if environ["PATH_INFO"] == "/count":
        if os.environ.get("PLAIN") or next(NUMBERS) % 2:
            threading.Thread(target=count).start()
        else:
            jobs.submit(count)
    start_response("202 Accepted", [("Content-Length", "0")])
    return [b""]
"""
ASGI = """
import asyncio, itertools, os
import redis.asyncio
from gracehooks import jobs

DELAY = float(os.environ["DELAY"])
NUMBERS = itertools.count()
CLIENT = None


async def count():
    await asyncio.sleep(DELAY)
    await CLIENT.incr("counter")


async def app(scope, receive, send):
    global CLIENT
    if scope["type"] == "lifespan":
        await receive()
        CLIENT = redis.asyncio.Redis(port=int(os.environ["REDIS_PORT"]))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await CLIENT.aclose()
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["path"] == "/count":
        if os.environ.get("PLAIN") or next(NUMBERS) % 2:
            asyncio.create_task(count())
        else:
            jobs.create_task(count())
    await send({"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
"""
CONFIG = f"gracehooks.configure(job_timeout={DELAY + 30}, probation=0.3, ready_timeout=60)"


class Asker:
    """Asks for `/count` 25 times a second, at least COUNTER times and until it is told to stop."""

    def __init__(self, server: Server) -> None:
        self.asked = 0
        self.failed: list[str] = []
        self._server = server
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Asker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()

    def _ask(self) -> None:
        due = time.monotonic()
        while self.asked < COUNTER or not self._enough.is_set():
            try:
                assert self._server.get("/count").status == 202
                self.asked += 1
            except (OSError, AssertionError) as error:
                self.failed.append(repr(error))
            due = max(due + 1 / RATE, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))


@pytest.mark.parametrize(
    "plain", [False, True] if "TEST_PLAIN" in os.environ else [False], ids=lambda plain: "P" * plain
)
@pytest.mark.parametrize("worker", CLASSES)
def test_every_request_counts_once_through_two_upgrades_and_a_reload(
    worker: str, plain: bool, port: int, client: redis.Redis
) -> None:
    """Threads or tasks as they are and through the API by turns; with TEST_PLAIN also without the API."""
    env = {"REDIS_PORT": str(port), "DELAY": str(DELAY), **({"PLAIN": "1"} if plain else {})}
    with serve(ASGI if worker in LOOPS else WSGI, CONFIG, worker=worker, env=env) as server:
        with Asker(server) as asker:
            for change in (server.upgrade, server.reload, server.upgrade):
                asked = asker.asked
                eventually(lambda asked=asked: asker.asked >= asked + COUNTER / 8, what="some more requests")
                assert change()["event"] == "UpgradeCompleted"
        assert not asker.failed
        server.stop()
        assert client.get("counter") == str(asker.asked)
        ends = [event for event in server.events() if event["event"] == "WorkerEnded"]
        assert {event["reason"] for event in ends} == {"drained"}
        assert sum(event["jobs"]["succeeded"] for event in ends) == asker.asked
        assert sum(event["jobs"]["accepted"] for event in ends) == asker.asked
        print(f"\n{worker} {'plain' * plain}: {asker.asked} requests, counter {client.get('counter')}")


@pytest.mark.skipif("TEST_STOCK" not in os.environ, reason="a comparison: set TEST_STOCK=1")
@pytest.mark.parametrize("worker", ["gthread", "sync", "gevent", "asgi", "uvicorn_worker.UvicornWorker"])
def test_the_stock_classes_beside_it(worker: str, port: int, client: redis.Redis) -> None:
    app = ASGI if worker in ("asgi", "uvicorn_worker.UvicornWorker") else WSGI
    env = {"REDIS_PORT": str(port), "DELAY": str(DELAY), "PLAIN": "1"}
    config = "from gunicorn.arbiter import Arbiter\non_starting = lambda server: None"
    with serve(app, config, worker=worker, workers=2, env=env, leftovers=True) as server:
        with Asker(server) as asker:
            # Stock gunicorn: two reloads, since its upgrade leaves the old master to be stopped by hand.
            for _ in range(3):
                asked = asker.asked
                eventually(lambda asked=asked: asker.asked >= asked + COUNTER / 8)
                server.signal("HUP")
        pid = server.pid
        server.signal("TERM", pid)
        try:
            server.wait_gone(pid, 60)
        except Late:
            pass
        print(f"\n{worker}: {asker.asked} requests, {len(asker.failed)} failed, counter {client.get('counter')}")


# -- B. the runner -----------------------------------------------------------------------------------------------
RUNNER = """
import os
from pathlib import Path
import redis
from gracehooks import jobs

HERE = Path(__file__).resolve().parent
SCRIPT = str(HERE / "work.sh")


@jobs.service
def consume(token):
    client = redis.Redis(port=int(os.environ["REDIS_PORT"]), decode_responses=True)
    while not token.is_set():
        message = client.blpop("messages", timeout=0.1)
        if message:
            jobs.popen(["sh", SCRIPT, message[1], os.environ["DONE"]])
            if len(jobs.active()) > 4:
                token.wait(0.05)


def answer(path):
    return "ok"


"""
WORK = f"""
echo "$1 begun" >> "$2"
sleep {SLEEP}
echo "$1 done" >> "$2"
"""
PATIENT = f"gracehooks.configure(job_timeout={4 * float(SLEEP) + 5}, ready_timeout=60)"
SUPERVISORD = """
[supervisord]
nodaemon = true
logfile = %(here)s/supervisord.log
pidfile = %(here)s/supervisord.pid

[unix_http_server]
file = %(here)s/supervisor.sock

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl = unix://%(here)s/supervisor.sock

[program:app]
command = %(ENV_PYTHON)s -m gracehooks run -- gunicorn -c gunicorn.conf.py app:app
directory = %(here)s
stopasgroup = true
stopwaitsecs = 60
startsecs = 0
redirect_stderr = true
stdout_logfile = %(here)s/server.log
"""


class Messages:
    """Puts numbered messages into the list until told to stop."""

    def __init__(self, client: redis.Redis) -> None:
        self.sent = 0
        self._client = client
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> Messages:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()

    def _send(self) -> None:
        while not self._enough.wait(0.03):
            self._client.rpush("messages", str(self.sent))
            self.sent += 1


def compare(done: Path, messages: Messages, client: redis.Redis) -> None:
    """Every message that was taken is done, exactly once; those that were not are in the list still."""
    lines = done.read_text().split("\n")[:-1]
    begun = sorted(int(line.split()[0]) for line in lines if line.endswith("begun"))
    ended = sorted(int(line.split()[0]) for line in lines if line.endswith("done"))
    waiting = [int(each) for each in client.lrange("messages", 0, -1)]
    assert begun == ended
    assert sorted(ended + waiting) == list(range(messages.sent))
    print(f"\n{messages.sent} messages: {len(ended)} done, {len(waiting)} waiting")


WAYS = ["TERM", "TERM to the group", "TERM twice to the group", "USR2", "HUP"]


@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize(
    ("how", "worker"),
    list(itertools.product(WAYS, CLASSES)) if FULL else list(zip(WAYS, itertools.cycle(CLASSES))),
)
def test_no_message_stays_half_done(
    how: str, worker: str, repeat: int, port: int, client: redis.Redis, tmp_path: Path
) -> None:
    done = tmp_path / "done.txt"
    env = {"REDIS_PORT": str(port), "DONE": str(done)}
    app = RUNNER + apps.answering(worker)
    with serve(app, PATIENT, worker=worker, env=env, files={"work.sh": WORK}) as server:
        with Messages(client) as messages:
            eventually(lambda: done.exists() and done.read_text().count("done") > 5)
            pid = server.pid
            if how in ("USR2", "HUP"):
                assert (server.upgrade() if how == "USR2" else server.reload())["event"] == "UpgradeCompleted"
                lines = done.read_text().count("done")
                eventually(lambda: done.read_text().count("done") > lines + 5)
            elif how == "TERM":
                os.kill(pid, signal.SIGTERM)
            else:
                os.killpg(os.getpgid(pid), signal.SIGTERM)
                if "twice" in how:
                    time.sleep(0.05)
                    os.killpg(os.getpgid(pid), signal.SIGTERM)
            if how in ("USR2", "HUP"):
                server.stop()
            else:
                server.wait_gone(pid)
        eventually(lambda: not server.processes())
        compare(done, messages, client)
        for event in server.events():
            if event["event"] == "WorkerEnded":
                assert event["jobs"]["accepted"] == event["jobs"]["succeeded"], event


def test_the_example_of_a_consumer_finishes_what_it_has_taken(port: int, client: redis.Redis, tmp_path: Path) -> None:
    done = tmp_path / "done.txt"
    source = (Path(__file__).resolve().parents[2] / "examples/jobs_consumer.py").read_text()
    script = f"sh -c 'sleep 0.3; echo $0 >> {done}'"
    env = {"REDIS_URL": f"redis://localhost:{port}", "SCRIPT": script}
    client.rpush("messages", *map(str, range(20)))
    with serve(files={"jobs_consumer.py": source}, target="jobs_consumer:app", env=env) as server:
        eventually(lambda: done.exists() and len(done.read_text().split()) >= 2)
        server.stop()
    taken = sorted(map(int, done.read_text().split()))
    assert taken == list(range(20 - client.llen("messages")))


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_supervisorctl_restart_with_stopasgroup(repeat: int, port: int, client: redis.Redis, tmp_path: Path) -> None:
    pytest.importorskip("supervisor")
    done = tmp_path / "done.txt"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"REDIS_PORT": str(port), "DONE": str(done), "PATH": path, "PYTHON": sys.executable}
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", "supervisord.conf"]
    files = {"work.sh": WORK, "supervisord.conf": SUPERVISORD}
    with serve(
        RUNNER + apps.answering("gracehooks.Worker"), PATIENT, env=env, files=files, command=command, answers=None
    ) as server:

        def control(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "supervisor.supervisorctl", "-c", "supervisord.conf", *words],
                cwd=server.dir,
                env=server.environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )

        with Messages(client) as messages:
            eventually(lambda: done.exists() and done.read_text().count("done") > 5)
            restarted = control("restart", "app")
            assert restarted.stdout.split("\n")[:2] == ["app: stopped", "app: started"], restarted
            lines = done.read_text().count("done")
            eventually(lambda: done.read_text().count("done") > lines + 5)
        assert "stopped" in control("stop", "app").stdout
        control("shutdown")
        eventually(lambda: not [pid for pid in server.processes() if seen.alive(pid)])
        compare(done, messages, client)
