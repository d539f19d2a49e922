"""A control group with little memory, of whichever version this machine has."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit import processes
from tests.kit.waiting import eventually

__all__ = ["little_memory"]


def _places() -> Iterator[tuple[Path, str]]:
    """Where a group with a bound on its memory might be made, and the file that sets it."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    for _, place, kind, options, *_ in mounts:
        if kind == "cgroup2":
            yield Path(place), "memory.max"
        elif kind == "cgroup" and "memory" in options.split(","):
            path = next((path for names, path in own.items() if "memory" in names.split(",")), "/")
            yield Path(place + path), "memory.limit_in_bytes"
            yield Path(place), "memory.limit_in_bytes"


@contextmanager
def little_memory(size: int) -> Iterator[Path]:
    """A group of `size` bytes; whoever writes a pid to its `cgroup.procs` puts it there. Skips where none can be made."""
    for place, limit in _places():
        group = place / f"gracekit-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(size))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        break
    else:
        pytest.skip("no control group with a bound on its memory can be made here")
    try:
        yield group
    finally:

        def removed() -> bool:
            processes.kill([int(each) for each in (group / "cgroup.procs").read_text().split()], signal.SIGKILL)
            try:
                group.rmdir()
            except OSError:
                return False
            return True

        eventually(removed, what="the control group is empty")
