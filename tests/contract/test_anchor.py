"""What `gracehooks run` relies on in gunicorn: a master takes over sockets by GUNICORN_FD where GUNICORN_PID is nobody's
parent, and promotes itself at once. Run with stock workers and a stock arbiter, and with one that execs from a shell."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.kit import eventually, load, serve

HOOKS = """
from gracehooks.anchor import mooring

def when_ready(server):
    mooring.offer(server.LISTENERS)
    mooring.serving(30)
"""
RUN = [sys.executable, "-m", "gracehooks", "run", "--"]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="child subreapers are Linux's")


@pytest.mark.parametrize("bind", ["tcp", "unix"])
def test_a_stock_master_inherits_sockets_and_promotes_itself(bind: str) -> None:
    shell = f"exec {sys.executable} -m gunicorn -c gunicorn.conf.py app:app"
    with serve(config=HOOKS, worker="gthread", command=[*RUN, "sh", "-c", shell], bind=bind) as server:
        anchor, first = server.process.pid, server.pid
        with load(server, kinds=("new",), clients=2) as traffic:
            traffic.wait(20)
            os.kill(first, signal.SIGKILL)
            eventually(lambda: server.pid != first, what="the pidfile of the next master")
            second = server.pid
            eventually(lambda: "Master has been promoted" in server.log(), what="its promotion")
            traffic.wait(20)
            # gunicorn's own upgrade, by hand, with what was inherited
            server.signal("USR2", anchor)
            eventually(lambda: Path(f"{server.pidfile}.2").exists(), what="the pidfile of the successor")
            third = int(Path(f"{server.pidfile}.2").read_text())
            eventually(lambda: len(server.workers(third)) == 2, what="the successor's workers")
            traffic.wait(20)
            server.signal("TERM", second)
            eventually(lambda: server._pidfile() == third, what="the promotion of the successor")
            traffic.wait(20)
        refused = [each for each in traffic.lost if each["outcome"] == "refused"]
        assert not refused, "stock workers may reset what they had accepted, but the door stays open"
        server.signal("TERM", anchor)
        assert server.wait_gone(anchor) == 0
        server.clean = True
        if bind == "unix":
            assert not Path(server.address.path).exists(), "a promoted master unlinks its socket"


@pytest.mark.parametrize("way", ["fd", "activation"])
def test_a_socket_that_the_anchor_was_started_with_stays_the_configurations(way: str) -> None:
    """`bind = "fd://9"`, or sd_listen_fds(3): every master finds it where the first one did, and the anchor does not hand it
    over besides.
    """
    opener = (
        "import os, re, socket, sys\n"
        "port = int(re.search(r':(\\d+)', open('gunicorn.conf.py').read())[1])\n"
        "listener = socket.create_server(('127.0.0.1', port), reuse_port=True)\n"
        f"os.set_inheritable(os.dup2(listener.fileno(), {9 if way == 'fd' else 3}), True)\n"
    )
    if way == "activation":
        opener += "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n"
    opener += "os.execv(sys.argv[1], sys.argv[1:])\n"
    command = [*RUN, sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "app:app"]
    config = HOOKS + ('bind = "fd://9"\n' if way == "fd" else "")
    with serve(config=config, worker="gthread", command=[sys.executable, "-c", opener, *command]) as server:
        first = server.pid
        os.kill(first, signal.SIGKILL)
        eventually(lambda: server.pid != first, what="the pidfile of the next master")

        def answers() -> bool:
            try:
                return server.get("/").status == 200
            except ConnectionResetError:
                return False  # an orphaned stock worker took it with it; ConnectionRefusedError is no such excuse

        eventually(answers, what="an answer of the next master")
        assert "sockets held" not in server.log()
        server.signal("TERM", server.process.pid)
        assert server.wait_gone(server.process.pid) == 0
        server.clean = True
