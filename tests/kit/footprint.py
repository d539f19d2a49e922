"""What a server holds: descriptors, environment, memory; for tests that look whether it grows."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tests.kit.processes import sockets
from tests.kit.server import Server

__all__ = ["footprint", "footprint_of"]


def footprint(server: Server) -> dict[str, list[int]]:
    """That of the master first, then of each worker."""
    found = [footprint_of(pid) for pid in [server.pid, *server.workers()]]
    return {name: [each[name] for each in found] for name in found[0]}


def footprint_of(pid: int) -> dict[str, int]:
    """Descriptors but for client connections, bytes of environment, KiB of memory; OSError when the process is gone."""
    kept = 0
    with sockets(pid) as connections:  # those of this moment, and no others
        for each in os.listdir(f"/proc/{pid}/fd"):
            try:
                link = os.readlink(f"/proc/{pid}/fd/{each}")
            except FileNotFoundError:
                continue  # closed while we looked
            connection = connections.get(int(each))
            kept += not link.startswith("socket:") if connection is None else not _is_client(connection)
    status = Path(f"/proc/{pid}/status").read_text()
    if "VmRSS:" not in status:
        raise ProcessLookupError(f"{pid} has ended")
    return {
        "descriptors": kept,
        "environment": len(Path(f"/proc/{pid}/environ").read_bytes()),
        "memory": int(status.split("VmRSS:")[1].split()[0]),
    }


def _is_client(connection: socket.socket) -> bool:
    """Whether it is a client's connection, or what was one: neither a unix socket nor one that listens."""
    return connection.family != socket.AF_UNIX and not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
