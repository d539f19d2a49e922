"""What a server holds: descriptors, environment, memory; for tests that look whether it grows."""

from __future__ import annotations

import os
from pathlib import Path

from tests.kit.server import Server

__all__ = ["footprint"]


def footprint(server: Server) -> dict[str, list[int]]:
    """Descriptors but for client connections, bytes of environment, KiB of memory: master first, then workers."""
    found: dict[str, list[int]] = {"descriptors": [], "environment": [], "memory": []}
    for pid in [server.pid, *server.workers()]:
        ours = _sockets_of_ours(pid)
        kept = 0
        for each in Path(f"/proc/{pid}/fd").iterdir():
            try:
                link = os.readlink(each)
            except OSError:
                continue  # closed while we looked
            kept += not link.startswith("socket:[") or link[8:-1] in ours
        found["descriptors"].append(kept)
        found["environment"].append(len(Path(f"/proc/{pid}/environ").read_bytes()))
        rollup = Path(f"/proc/{pid}/status").read_text()
        found["memory"].append(int(rollup.split("VmRSS:")[1].split()[0]))
    return found


def _sockets_of_ours(pid: int) -> set[str]:
    """The inodes of unix sockets and of TCP sockets that listen: whatever else is a socket is a client's connection."""
    unix = {line.split()[6] for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]}
    tcp = (line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:])
    return unix | {fields[9] for fields in tcp if fields[3] == "0A"}
