"""What `gracehooks run` costs: processor time at the start, and memory. `pytest -m bench -s tests/bench/test_anchor.py` shows it.

Processor time, not the clock's: a busy machine does not change it much.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import serve

pytestmark = pytest.mark.bench

ROUNDS = 20


def processor_time(*command: str) -> float:
    """The median of what the command and its children take, in ms."""
    found = []
    for _ in range(ROUNDS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(found) * 1000


def memory(pid: int) -> tuple[int, int]:
    """Resident and unshared, in KiB."""
    sizes = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {name: int(text.split()[0]) for name, text in sizes.items()}
    return kib["Rss"], kib["Private_Clean"] + kib["Private_Dirty"]


def test_the_anchor_is_small():
    script = (Path(sys.executable).parent / "gracehooks").as_posix()
    bare, whole = processor_time(sys.executable, "-c", "pass"), processor_time(script, "run", "--", "true")
    run = [
        sys.executable,
        "-m",
        "gracehooks",
        "run",
        "--",
        sys.executable,
        "-m",
        "gunicorn",
        "-c",
        "{config}",
        "{target}",
    ]
    with serve(command=run) as server:
        server.wait_for("ServingStarted")
        anchor, master = memory(server.process.pid), memory(server.pid)
    print(f"\nstart: {whole:.0f} ms of processor time; a Python that does nothing: {bare:.0f} ms")
    print(
        f"memory, resident and unshared: anchor {anchor[0]} and {anchor[1]} KiB, master {master[0]} and {master[1]} KiB"
    )
    assert anchor[1] < master[1]
