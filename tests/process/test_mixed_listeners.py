"""Sockets that systemd passed, and listeners of our own beside them, through upgrades and a stop."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from tests.kit import Server, eventually, serve

#: Plays systemd: binds a unix socket, puts it at descriptor 3, and becomes gunicorn.
ACTIVATOR = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(64)
if listener.fileno() != 3:
    os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "gunicorn", *sys.argv[2:]])
"""


def asked(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(path))
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return client.recv(64).startswith(b"HTTP/1.1 200")


def test_own_listeners_serve_beside_those_of_systemd_and_are_handed_over():
    with serve(
        files={"activate.py": ACTIVATOR},
        command=[sys.executable, "activate.py", "activated.sock", "-c", "{config}", "{target}"],
    ) as server:
        activated = server.dir / "activated.sock"

        def both(server: Server) -> bool:
            return asked(activated) and server.get("/").status == 200

        assert both(server)
        for _ in range(2):
            master = server.pid
            verdict = server.upgrade()
            assert verdict["event"] == "UpgradeCompleted", verdict
            eventually(lambda master=master: server.pid != master)
            assert both(server)
        assert server.stop() == 0
        assert activated.exists()  # systemd's path is systemd's
