"""The lab of the field: nginx in front, every request sleeping 0 to 1000 ms at random, ab through nginx, upgrades meanwhile.

With upgrades: not one answer but 200, and nothing of a failed upstream in nginx's log. With a plain stop and start, the
losses that people know. `TEST_REQUESTS=10000 TEST_UPGRADES=10` makes it the size of a load test; `-s` shows the figures.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kit import Late, Server, eventually, needs, serve
from tests.kit.server import hold_port

pytestmark = pytest.mark.lab

REQUESTS = int(os.environ.get("TEST_REQUESTS", "800"))
CLIENTS = 100
UPGRADES = int(os.environ.get("TEST_UPGRADES", "3"))
PATH = "/sleep?max=1"

NGINX = """
daemon off;
pid {dir}/nginx.pid;
error_log {dir}/nginx-error.log warn;
worker_processes 1;
{user}
events {{ worker_connections 2048; }}
http {{
  access_log {dir}/nginx-access.log;
  client_body_temp_path {dir}/nginx-body;
  proxy_temp_path {dir}/nginx-proxy;
  fastcgi_temp_path {dir}/nginx-fastcgi;
  uwsgi_temp_path {dir}/nginx-uwsgi;
  scgi_temp_path {dir}/nginx-scgi;
  proxy_read_timeout 60s;
  upstream application {{
    server {upstream} max_fails=0;
    {keepalive}
  }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass http://application;
      proxy_http_version 1.1;
      {header}
      proxy_next_upstream off;  # nginx must not mend what we lose
    }}
  }}
}}
"""


@dataclass
class Nginx:
    """A running nginx."""

    port: int
    directory: Path

    def complaints(self) -> list[str]:
        """What its error log says of the upstream."""
        text = (self.directory / "nginx-error.log").read_text()
        return [line for line in text.splitlines() if "upstream" in line or "connect() failed" in line]


@contextmanager
def nginx_before(server: Server, *, keepalive: bool) -> Iterator[Nginx]:
    """nginx in front of the server, with kept connections to it or one for each request."""
    program, directory = needs("nginx"), server.dir
    held = hold_port(socket.AF_INET, "127.0.0.1")
    port = held.getsockname()[1]
    (directory / "nginx.conf").write_text(
        NGINX.format(
            dir=directory,
            port=port,
            user="user root;" if os.geteuid() == 0 else "",
            upstream=server.address,
            keepalive="keepalive 64;" if keepalive else "",
            header='proxy_set_header Connection "";' if keepalive else "",
        )
    )
    process = subprocess.Popen(
        [program, "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", str(directory / "nginx-error.log")],
        env=server.environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:

        def listens() -> bool:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            try:
                socket.create_connection(("127.0.0.1", port), 5).close()
            except OSError:
                return False
            return True

        eventually(listens, what="nginx")
        yield Nginx(port, directory)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        held.close()


@dataclass
class Bench:
    """What ab says at its end."""

    text: str

    def number(self, name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+)", self.text, re.MULTILINE)
        return int(found[1]) if found else 0

    @property
    def lost(self) -> int:
        # A 502 counts twice in ab, as of another length and as no 2xx.
        return max(self.number("Failed requests"), self.number("Non-2xx responses")) + self.number("Write errors")

    @property
    def complete(self) -> int:
        return self.number("Complete requests")

    @property
    def rate(self) -> str:
        found = re.search(r"^Requests per second:\s+([\d.]+)", self.text, re.MULTILINE)
        return f"{found[1]} a second" if found else "no rate"


@contextmanager
def ab(port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """ab, running; `conclude` reads what it says."""
    command = [needs("ab"), "-q", "-r", "-s", "120", "-n", str(REQUESTS), "-c", str(CLIENTS), *options]
    with subprocess.Popen(
        [*command, f"http://127.0.0.1:{port}{PATH}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def conclude(process: subprocess.Popen[str]) -> Bench:
    """Wait for the end of ab."""
    try:
        return Bench(process.communicate(timeout=120 + REQUESTS / 20)[0])
    except subprocess.TimeoutExpired:
        raise Late("ab does not end") from None


def answered(nginx: Nginx) -> int:
    """How many requests nginx has answered so far."""
    return (nginx.directory / "nginx-access.log").read_bytes().count(b"\n")


@pytest.mark.parametrize("keepalive", [True, False], ids=["keep-alive upstream", "a connection a request"])
def test_upgrades_behind_nginx_lose_nothing(keepalive):
    with (
        serve(config="threads = 30", workers=2) as server,
        nginx_before(server, keepalive=keepalive) as nginx,
        ab(nginx.port) as bench,
    ):
        under_load = 0
        for number in range(1, UPGRADES + 1):
            eventually(
                lambda number=number: answered(nginx) >= number * REQUESTS // (3 * UPGRADES + 1),
                what="answers through nginx",
            )
            assert server.upgrade()["event"] == "UpgradeCompleted"
            under_load += bench.poll() is None
        if not under_load:  # on a slow machine the last ones may come after the load
            raise Late("the load was over before the first upgrade was")
        found = conclude(bench)
        print(f"\n{found.complete} requests, {found.lost} lost, {under_load} upgrades under load, {found.rate}")
        assert found.complete == REQUESTS, found.text
        assert found.lost == 0, found.text
        assert nginx.complaints() == []
        statuses = {
            line.split('"')[2].split()[0] for line in (server.dir / "nginx-access.log").read_text().splitlines()
        }
        assert statuses == {"200"}


def test_a_plain_stop_and_start_behind_nginx_loses():
    with (
        serve(worker="gthread", config="threads = 30", workers=2) as server,
        nginx_before(server, keepalive=True) as nginx,
        ab(nginx.port) as bench,
    ):
        eventually(lambda: answered(nginx) >= REQUESTS // 10, what="answers through nginx")
        server.stop()
        server.start_again()
        found = conclude(bench)
        print(f"\n{found.complete} requests, {found.lost} lost by one stop and start, {found.rate}")
        assert found.lost > 0, found.text
        assert nginx.complaints()
