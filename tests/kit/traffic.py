"""Load on a server while a test does something to it, and what became of every request.

The clients run in one separate process (gracehooks/demo/clients.py), so that they neither slow the test down nor are slowed
down by it. `traffic.lost` is what a test asserts on; waiting is by numbers of answers, never by time.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gracehooks.demo import clients as clients_script
from tests.kit.server import Address, Server
from tests.kit.waiting import eventually

__all__ = ["LOST", "Outcome", "Traffic", "load"]

OUTCOMES = clients_script.OUTCOMES
#: The outcomes that are losses; `closed_idle` is none: no request was on its way.
LOST = ("refused", "reset_before_byte", "cut", "wrong_status", "timeout")
_RECORD = clients_script.RECORD


@dataclass(frozen=True)
class Outcome:
    """One request: when it began and ended (monotonic), its kind, and what became of it."""

    begun: float
    ended: float
    kind: str
    outcome: str


class Traffic:
    """Load that runs; made by `load`."""

    def __init__(self, process: subprocess.Popen[bytes], kinds: Sequence[str], timeline: str) -> None:
        self.kinds = tuple(kinds)
        self.lost: list[dict[str, Any]] = []  #: every loss: kind, outcome, begun, at, detail
        self._process = process
        self._timeline_file = timeline
        self._counts = [[0] * len(OUTCOMES) for _ in kinds]
        self._last = False
        self._reader = threading.Thread(target=self._read, name="traffic", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            news = json.loads(line)
            self.lost += news["lost"]
            self._counts = news["counts"]
            self._last = news["last"]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """For each kind of client, how many requests had which outcome."""
        return {kind: dict(zip(OUTCOMES, row, strict=True)) for kind, row in zip(self.kinds, self._counts, strict=True)}

    @property
    def answered(self) -> int:
        """How many requests got their whole answer."""
        return sum(row[0] for row in self._counts)

    def wait(self, more: int, timeout: float = 60.0) -> None:
        """Wait until `more` further requests were answered."""
        start = self.answered

        def enough() -> bool:
            if self._process.poll() is not None:
                raise AssertionError(f"the clients ended with {self._process.returncode}")
            return self.answered >= start + more

        eventually(enough, timeout, f"{more} more answers (lost so far: {len(self.lost)})")

    def stop(self) -> None:
        """Let each client finish its request, and collect what happened."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reader.join()
        if not self._last:
            raise AssertionError(f"the clients ended with {self._process.returncode} before they had told everything")

    def timeline(self) -> list[Outcome]:
        """Every request, in the order of their ends; after `stop`, or after the block."""
        return [
            Outcome(begun, ended, self.kinds[kind], OUTCOMES[outcome])
            for begun, ended, kind, outcome in _RECORD.iter_unpack(self._records)
        ]

    _records = b""

    def longest_gap(self) -> float:
        """The longest time in which no request at all was answered, in seconds; after the block."""
        ends = [each.ended for each in self.timeline() if each.outcome == "ok"]
        return max((later - earlier for earlier, later in itertools.pairwise(ends)), default=0.0)

    def table(self) -> str:
        """The outcomes as a small table, and the first losses."""
        rows = [f"{'':>10} " + " ".join(f"{name:>17}" for name in OUTCOMES)]
        rows += [f"{kind:>10} " + " ".join(f"{n:>17}" for n in row.values()) for kind, row in self.counts.items()]
        return "\n".join(["", *rows, *(str(each) for each in self.lost[:20])])


@contextmanager
def load(
    server: Server | Address,
    kinds: Sequence[str] = ("new", "keepalive", "upload", "stream"),
    clients: int = 4,
    path: str | Sequence[str] = "/fast",
    *,
    think: float = 0.01,
    timeout: float = 60.0,
    stream_path: str = "/stream?n=5&s=0.02",
    upload_path: str = "/upload",
    upload_bytes: int = 65536,
    upload_seconds: float = 0.1,
    late: float = 0.2,
) -> Iterator[Traffic]:
    """Closed-loop load from `clients` clients, shared out among `kinds`, until the block ends.

    Kinds: "new" (a connection a request), "keepalive" (one connection for as long as it lasts), "upload" (a body sent
    slowly), "stream" (an answer that comes slowly), "late" (a connection that waits up to `late` s before its request).
    `think` is the mean pause of a client between two requests, in seconds; 0 is as fast as it goes. `path` is what "new",
    "keepalive" and "late" ask for; of several, one at random.
    """
    address = server if isinstance(server, Address) else server.address
    handle, timeline = tempfile.mkstemp(prefix="gracekit-timeline-")
    os.close(handle)
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", clients_script.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    plan = {
        "address": asdict(address),
        "kinds": list(kinds),
        "clients": clients,
        "paths": [path] if isinstance(path, str) else list(path),
        "think": think,
        "timeout": timeout,
        "stream_path": stream_path,
        "upload_path": upload_path,
        "upload_bytes": upload_bytes,
        "upload_parts": 4,
        "upload_seconds": upload_seconds,
        "late": late,
        "timeline": timeline,
    }
    process.stdin.write(json.dumps(plan).encode() + b"\n")
    process.stdin.flush()
    traffic = Traffic(process, kinds, timeline)
    try:
        yield traffic
    finally:
        try:
            traffic.stop()
        finally:
            traffic._records = Path(timeline).read_bytes()
            os.unlink(timeline)
