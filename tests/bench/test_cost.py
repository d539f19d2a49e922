"""What gracehooks costs a server, beside the stock class of gunicorn or uvicorn, by turns in one run; how long an idle stop
takes; and how long an upgrade takes beyond the boot and the probation. `pytest -m bench -s tests/bench` prints the figures.

Throughput is what a user sees, and shares the machine with whatever else runs on it; the CPU time of the worker, per request
that it answered, is far less disturbed. Both are ratios of neighbouring rounds, and of those the median.

Nothing here is an absolute speed: what is asserted is that both answered, and a ratio far below the aim.
"""

from __future__ import annotations

import os
import re
import select
import signal
import statistics
import subprocess
import time
import timeit
from pathlib import Path

import gunicorn
import pytest

from gracehooks.scoreboard import Page
from tests.kit import Server, apps, needs, serve

pytestmark = pytest.mark.bench

ROUNDS = int(os.environ.get("TEST_ROUNDS", "30"))
SECONDS = 0.5
STOCK = {
    "Worker": "gthread",
    "SyncWorker": "sync",
    "GeventWorker": "gevent",
    "ASGIWorker": "asgi",
    "UvicornWorker": "uvicorn_worker.UvicornWorker",
}
CLASSES = [name for name in STOCK if name != "ASGIWorker" or gunicorn.version_info >= (25, 0)]
CONFIG = "accesslog = None\nkeepalive = 60"


def cpu(pid: int) -> float:
    """The CPU time of a process, user and system, in µs."""
    return sum(int(each.read_text().split()[0]) for each in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1000


def drive(server: Server) -> tuple[float, float, float]:
    """Of an application that does nothing: requests a second, µs of CPU time for each, 99th percentile in ms."""
    (worker,) = server.workers()
    before = cpu(worker)
    wrk = ["wrk", "-t1", "-c8", "-d60s", "--latency", f"http://127.0.0.1:{server.port}/"]
    done = subprocess.run(
        ["timeout", "-s", "INT", str(SECONDS), *wrk], capture_output=True, text=True, timeout=60, check=False
    )
    used = cpu(worker) - before
    assert "Non-2xx" not in done.stdout, done.stdout
    number = re.search(r"(\d+) requests in", done.stdout)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    tail = re.search(r"99%\s+([\d.]+)(us|ms|s)", done.stdout)
    assert number is not None, done.stdout
    assert rate is not None, done.stdout
    assert tail is not None, done.stdout
    scale = {"us": 0.001, "ms": 1.0, "s": 1000.0}[tail[2]]
    return float(rate[1]), used / int(number[1]), float(tail[1]) * scale


def unshared(pid: int) -> int:
    """KiB that are the process's alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def spread(values: list[float]) -> str:
    """The median, and the middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


#: Reads the body of its request, empty as it is.
READS = apps.reading()


@pytest.mark.parametrize(
    ("name", "app"),
    [
        *((name, "") for name in CLASSES),
        *((name, READS) for name in CLASSES if name in ("ASGIWorker", "UvicornWorker")),
    ],
    ids=lambda value: value if value in STOCK else "reads" * bool(value),
)
def test_beside_the_stock_class(name: str, app: str) -> None:
    needs("wrk")
    with (
        serve(app, worker=STOCK[name], workers=1, config=CONFIG) as stock,
        serve(app, worker=f"gracehooks.{name}", workers=1, config=CONFIG) as ours,
    ):
        for server in (stock, ours):
            drive(server)
        figures = []
        for number in range(ROUNDS):
            pair = (stock, ours) if number % 2 else (ours, stock)
            found = {server: drive(server) for server in pair}
            figures.append((found[stock], found[ours]))
        rates = [mine[0] / theirs[0] for theirs, mine in figures]
        shares = [theirs[1] / mine[1] for theirs, mine in figures]
        tails = [mine[2] / theirs[2] for theirs, mine in figures]
        stock_us, our_us = (statistics.median(each[side][1] for each in figures) for side in (0, 1))
        more = statistics.median(mine[1] - theirs[1] for theirs, mine in figures)
        memory = [unshared(server.workers()[0]) for server in (stock, ours)]
    print(
        f"\n{name} over {STOCK[name]}{', body read' * bool(app)}, {ROUNDS} pairs of rounds: "
        f"throughput {spread(rates)}; by CPU time a request "
        f"{spread(shares)}, {stock_us:.1f} and {our_us:.1f} µs, {more:+.1f} µs (aim: 0.98)"
        f"\n    99th percentile {statistics.median(tails):.2f}; unshared memory {memory[0]} and {memory[1]} KiB"
    )
    assert statistics.median(shares) > 0.7


def test_the_scoreboard() -> None:
    page = Page()
    paths = ["/a", "/b"]

    def same() -> None:
        page.end(page.begin("GET", "/a"))

    def other() -> None:
        path = paths.pop()
        paths.insert(0, path)
        page.end(page.begin("GET", path))

    once, named = (min(timeit.repeat(each, number=1000, repeat=200)) * 1000 for each in (same, other))
    print(
        f"\nthe scoreboard: {once:.2f} µs a request, {named:.2f} µs where the slot held one of another path; "
        f"{page.size / 1024:.0f} KiB a worker"
    )
    assert once < 20


@pytest.mark.parametrize("name", CLASSES)
def test_an_idle_stop(name: str) -> None:
    workers, masters = [], []
    for _ in range(9):
        with serve(worker=f"gracehooks.{name}", workers=1) as server:
            ends = [os.pidfd_open(pid) for pid in (*server.workers(), server.pid)]
            started = time.monotonic()
            os.kill(server.pid, signal.SIGTERM)
            for end, found in zip(ends, (workers, masters), strict=True):
                select.select([end], [], [], 60)
                found.append(time.monotonic() - started)
                os.close(end)
            assert server.process.wait(60) == 0
    print(
        f"\n{name}, idle, from TERM: worker gone after {spread(workers)} s, master after {spread(masters)} s, "
        f"at most {max(masters):.3f} (aim: 0.3)"
    )
    assert statistics.median(masters) < 0.3 + 2


def test_an_upgrade_takes_little_beyond_the_boot_and_the_probation() -> None:
    with serve() as server:
        beyond = []
        for _ in range(7):
            started = server.upgrade()
            phases = started["phases"]
            begun = next(each for each in server.events() if each.get("id") == started["id"])
            beyond.append(started["at"] - begun["at"] - phases["booting"] - 0.3)
            server.wait_for("GenerationRetired", after=started)
        assert server.stop() == 0
    print(
        f"\nUSR2 to completed, less boot and probation: median {statistics.median(beyond):.3f} s, worst {max(beyond):.3f} s"
    )
