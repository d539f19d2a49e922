"""Random signals and faults against random load, and afterwards sent = answered + reported lost, exactly and by name.

Every request has a name of its own (its path), the application writes down which ones it has begun, and the clients which
ones they got answered. What must hold, for every class:

- a request that an application call has begun and whose client got no whole answer is in a loss report: in the event of
  its worker's end, or in the log where the master was killed too and nobody was left to hear the worker;
- what is in a report was sent, is there once, and was not answered. One case is beyond every server: a worker that is killed
  between the last byte of an answer and the store that says so leaves a report of a request that was answered (an event
  loop that another request blocks just then stands between the two until it is killed). It is allowed where the worker
  was ended by force at that moment, and nowhere else; `late_reports` counts it;
- a request that is in neither was never read by any process of the server, and something was ended by force just then: by
  SIGKILL, a crash, a time-out or the hammer. Connections that a worker has accepted, and requests whose head it has not
  read to its end, are known to the kernel alone: they die with the process, no page has them, and no application has seen
  them. Their client gets a reset or an end of file before any byte, after which RFC 9110 section 9.2.2 lets it try again;
- a connection is refused only while there is no server: from a stop to the next start;
- a job that has begun is done or reported;
- the server settles after each act, and ends with the descriptors and the memory it began with.

TEST_WALK_SECONDS makes the walk longer (the promise is 1800), TEST_SEED takes another one; a failure prints the seed and
the story.
"""

from __future__ import annotations

import os

import pytest

from tests.kit import Late, named_apps, serve
from tests.kit.walk import CONFIG, Walk, named_load

SECONDS = float(os.environ.get("TEST_WALK_SECONDS", "6"))
SEED = int(os.environ.get("TEST_SEED", "1"))
GUNICORN = pytest.importorskip("gunicorn").version_info
HTTP = ["keepalive", "keepalive", "keepalive", "new", "new", "sleep", "stream", "upload", "late", "half", "job"]
KINDS = {
    "gracehooks.Worker": HTTP,
    "gracehooks.SyncWorker": ["new", "new", "new", "sleep", "stream", "upload", "job"],
    "gracehooks.GeventWorker": HTTP,
    "gracehooks.ASGIWorker": [*HTTP, "ws", "ws"],
    "gracehooks.UvicornWorker": [*HTTP, "ws", "ws"],
}


@pytest.mark.parametrize("worker", list(KINDS))
def test_a_random_walk_accounts_for_every_request(worker: str):
    if worker == "gracehooks.ASGIWorker" and GUNICORN < (25, 2):
        pytest.skip("no asgi worker")
    kinds = KINDS[worker]
    try:
        import websockets  # noqa: F401
    except ImportError:
        if "Uvicorn" in worker:  # the oldest supported gunicorn is tested without uvicorn's extras
            kinds = HTTP
    seed = SEED
    app = named_apps.ASGI if "ASGI" in worker or "Uvicorn" in worker else named_apps.WSGI
    preload = seed % 3 == 0
    config = CONFIG + f"preload_app = {preload}\n"
    with serve(app, config, worker) as server, named_load(server, kinds, f"{worker}/{seed}") as traffic:
        walk = Walk(server, traffic, seed, preload)
        try:
            walk.go(SECONDS)
        except BaseException as error:
            error.args = (
                f"{error}\nTEST_SEED={seed} TEST_WALK_SECONDS={SECONDS:g}, {worker}:\n" + "\n".join(walk.story),
            )
            raise
        traffic.stop()
        account = walk.account()
        print(f"{worker}, gunicorn {GUNICORN}, seed {seed}: {account}; {walk.footprints[0]} then {walk.footprints[-1]}")
        problems = account.problems + grown(*walk.footprints)
        assert not problems, "\n".join(
            [f"TEST_SEED={seed} TEST_WALK_SECONDS={SECONDS:g}, {worker}: {account}", *problems, *walk.story]
        )
        assert account.sent == account.answered + account.reported + account.unread + account.refused
        if walk.late:
            raise Late("; ".join(walk.late))


def grown(before: dict[str, list[int]], after: dict[str, list[int]]) -> list[str]:
    """What the server holds more of than it did: each process at most what any of its kind had."""
    found = []
    for what, room in (("descriptors", 0.0), ("memory", 0.15)):
        for who, earlier, later in (
            ("master", before[what][:1], after[what][:1]),
            ("workers", before[what][1:], after[what][1:]),
        ):
            allowed = max(earlier) * (1 + room) + (2048 if what == "memory" else 0)
            if max(later) > allowed:
                found.append(f"the {what} of the {who} grew from {earlier} to {later}")
    return found
