"""What gracehooks costs a server: throughput, latency and memory of `Worker` beside gunicorn's gthread, in turns in one run; and
how long an upgrade takes beyond the boot and the probation. `pytest -m bench tests/bench/test_cost.py -s` prints the figures.

Nothing here is an absolute speed: what is asserted is that both answered, and a ratio far below the aim.
"""

from __future__ import annotations

import re
import statistics
import subprocess
from pathlib import Path

import pytest

from tests.kit import Server, needs, serve

pytestmark = pytest.mark.bench

ROUNDS = 7
SECONDS = 3


def drive(server: Server) -> tuple[float, float]:
    """Requests a second and the 99th percentile in ms, of an application that does nothing, over kept connections."""
    said = subprocess.run(
        ["wrk", "-t1", "-c8", f"-d{SECONDS}s", "--latency", f"http://127.0.0.1:{server.port}/"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "Non-2xx" not in said, said
    found = re.search(r"99%\s+([\d.]+)(us|ms|s)", said)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    assert found is not None, said
    assert rate is not None, said
    return float(rate[1]), float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


def unshared(pid: int) -> int:
    """KiB that are the process's alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def test_worker_beside_gthread():
    needs("wrk")
    config = "accesslog = None\nkeepalive = 60"
    with serve(worker="gthread", config=config) as stock, serve(config=config) as ours:
        figures = [(drive(stock), drive(ours)) for _ in range(ROUNDS)]
        rates = [mine[0] / theirs[0] for theirs, mine in figures]
        tails = [mine[1] / theirs[1] for theirs, mine in figures]
        memory = [statistics.mean(map(unshared, server.workers())) for server in (stock, ours)]
    print(
        f"\nthroughput, Worker over gthread: median {statistics.median(rates):.3f}, {min(rates):.3f} to {max(rates):.3f}"
        f"\n99th percentile, Worker over gthread: median {statistics.median(tails):.2f}"
        f"\nunshared memory of a worker: gthread {memory[0]:.0f} KiB, Worker {memory[1]:.0f} KiB"
    )
    assert statistics.median(rates) > 0.7


def test_an_upgrade_takes_little_beyond_the_boot_and_the_probation():
    with serve() as server:
        beyond = []
        for _ in range(ROUNDS):
            started = server.upgrade()
            phases = started["phases"]
            begun = next(each for each in server.events() if each.get("id") == started["id"])
            beyond.append(started["at"] - begun["at"] - phases["booting"] - 0.3)
            server.wait_for("GenerationRetired", after=started)
        assert server.stop() == 0
    print(
        f"\nUSR2 to completed, less boot and probation: median {statistics.median(beyond):.3f} s, worst {max(beyond):.3f} s"
    )
