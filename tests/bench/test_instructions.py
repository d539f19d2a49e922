"""What gracehooks costs a server in instructions a request: counted by valgrind, so nearly the same on a busy machine.

They are those of user mode: what the kernel does for a request, a third of its time, is not in them. Two runs of each class,
of few requests and of many, and the difference by the difference: what the start and the end take falls out.

`pytest -m bench -s tests/bench/test_instructions.py` prints them; it needs valgrind.
"""

from __future__ import annotations

import http.client
import re
import sys

import pytest

from tests.bench.test_cost import CLASSES, CONFIG, READS, STOCK
from tests.kit import Server, needs, serve

pytestmark = pytest.mark.bench

FEW, MANY = 500, 3500
VALGRIND = "valgrind --tool=cachegrind --cache-sim=no --trace-children=yes --cachegrind-out-file={directory}/cost.%p"
#: Under valgrind everything takes twenty times as long.
PATIENCE = "timeout = 600\ngracehooks.configure(ready_timeout=300, drain_timeout=60)\n"


def ask(server: Server, number: int) -> None:
    """So many requests over one connection; where the server keeps none, over so many."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    for _ in range(number):
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"ok")
    connection.close()


def instructions(worker: str, app: str, number: int) -> int:
    """Of a worker's whole life, with so many requests in it."""
    command = [*VALGRIND.split(), sys.executable, "-m", "gunicorn", "-c", "{config}", "{target}"]
    config = f"{CONFIG}\n{PATIENCE}"
    with serve(app, config, worker, workers=1, command=command, env={"PYTHONHASHSEED": "0"}) as server:
        (pid,) = server.workers()
        ask(server, number)
        server.stop(300)
        found = re.search(r"^summary: (\d+)", (server.dir / f"cost.{pid}").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(
    ("name", "app"),
    [
        *((name, "") for name in CLASSES),
        *((name, READS) for name in CLASSES if name in ("ASGIWorker", "UvicornWorker")),
    ],
    ids=lambda value: value if value in STOCK else "reads" * bool(value),
)
def test_instructions_a_request(name: str, app: str) -> None:
    needs("valgrind")
    each = {}
    for worker in (STOCK[name], f"gracehooks.{name}"):
        few, many = (instructions(worker, app, number) for number in (FEW, MANY))
        each[worker] = (many - few) / (MANY - FEW)
    stock, ours = each.values()
    print(
        f"\n{name} over {STOCK[name]}{', body read' * bool(app)}: instructions a request {stock:,.0f} and {ours:,.0f}, "
        f"{ours - stock:+,.0f}; {stock / ours:.3f}"
    )
    assert stock / ours > 0.95
