"""What a server holds: descriptors, environment, memory; for tests that look whether it grows."""

from __future__ import annotations

import os
from pathlib import Path

from tests.kit.server import Server

__all__ = ["footprint", "footprint_of"]


def footprint(server: Server) -> dict[str, list[int]]:
    """That of the master first, then of each worker."""
    found = [footprint_of(pid) for pid in [server.pid, *server.workers()]]
    return {name: [each[name] for each in found] for name in found[0]}


def footprint_of(pid: int) -> dict[str, int]:
    """Descriptors but for client connections, bytes of environment, KiB of memory; OSError when the process is gone."""
    ours = _sockets_of_ours(pid)
    kept = 0
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            link = os.readlink(each)
        except OSError:
            continue  # closed while we looked
        kept += not link.startswith("socket:[") or link[8:-1] in ours
    status = Path(f"/proc/{pid}/status").read_text()
    if "VmRSS:" not in status:
        raise ProcessLookupError(f"{pid} has ended")
    return {
        "descriptors": kept,
        "environment": len(Path(f"/proc/{pid}/environ").read_bytes()),
        "memory": int(status.split("VmRSS:")[1].split()[0]),
    }


def _sockets_of_ours(pid: int) -> set[str]:
    """The inodes of unix sockets and of TCP sockets that listen: whatever else is a socket is a client's connection."""
    unix = {line.split()[6] for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]}
    tcp = (line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:])
    return unix | {fields[9] for fields in tcp if fields[3] == "0A"}
