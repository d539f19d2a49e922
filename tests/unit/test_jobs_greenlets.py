"""Greenlets: in a process of its own, since gevent's patches cannot be taken back."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
from gevent import monkey; monkey.patch_all()
import gevent, gevent.pool, logging, subprocess, sys, threading, time
from gracehooks import jobs, requests
from gracehooks.deadline import Deadline
from gracehooks.scoreboard import Page
from gracehooks.settings import Settings
from gracehooks.jobs import tracker

logging.basicConfig(level=logging.WARNING)
page = Page()
found = jobs.install(page, Settings(), logging.getLogger("test.jobs"), loop_kind="gevent")
seen = []

go = threading.Event()

def sleep(seconds):
    go.wait(60)
    time.sleep(seconds)

def nested():
    go.wait(60)
    gevent.sleep(0.05)

def work():
    seen.append(jobs.current())
    gevent.spawn(nested)
    go.wait(60)

def fails():
    raise ValueError("said by gevent")

def stubborn():
    while not release:
        try:
            gevent.sleep(0.05)
        except gevent.GreenletExit:
            pass

def native_sleep(seconds):
    monkey.get_original("time", "sleep")(seconds)
    return "slept"

release = []

def fallen(*what):  # let all go, or the exit waits for its threads
    go.set()
    release.append(1)
    sys.__excepthook__(*what)

sys.excepthook = fallen
free = gevent.spawn(sleep, 3600)
ticket = requests.begin(page, "GET", "/")
greenlet = gevent.spawn(work)
gevent.pool.Pool(2).spawn(fails)
gevent.spawn_later(0.02, work)
thread = threading.Thread(target=sleep, args=(0.1,), name="a thread")
thread.start()
killed = gevent.spawn(sleep, 3600)
submitted = jobs.submit(sleep, 0.05)
child = subprocess.Popen(["sh", "-c", "exit 3"])
stuck = gevent.spawn(stubborn)
pool = gevent.get_hub().threadpool
in_pool = pool.spawn(native_sleep, 0.05)
assert [work.name for work in jobs.active()][-1] == "native_sleep"
assert pool.apply(native_sleep, (0.01,)) == "slept"
import socket
socket.getaddrinfo("localhost", 80)  # gevent asks its pool, and that is no job
requests.end(ticket)
assert {("greenlet", "work"), ("thread", "a thread"), ("greenlet", "sleep"), ("thread", "sleep")} <= {
    (work.kind, work.name) for work in jobs.active()}, jobs.active()
assert thread.ident and "thread" in [w.kind for w in jobs.active()]
tracked = jobs.track(gevent.spawn(sleep, 0.05), "by hand")
beats = []
ticker = gevent.spawn(lambda: [(beats.append(1), gevent.sleep(0.02)) for _ in range(1000)])
gevent.sleep(0.03)
assert in_pool.get() == "slept"
with gevent.Timeout(10):  # who asks for a result that is there goes on before gevent has told the others
    while "native_sleep" in [work.name for work in jobs.active()]:
        gevent.sleep(0.001)
assert all("in sleep" in work.where() for work in jobs.active() if work.kind == "thread"), [
    work.where() for work in jobs.active()]
go.set()
lost = found.end(Deadline.after(1.5), 0.5)
release.append(1)
assert [(a.kind, a.name) for a in lost] == [("greenlet", "stubborn")], lost
assert "in stubborn" in lost[0].where, lost
assert len(beats) > 5, "others ran meanwhile"
assert greenlet.dead and killed.dead and not free.dead
assert seen[0].kind == "greenlet"
assert child.wait() == 3
counts = found.counts()
assert counts == {"accepted": 13, "succeeded": 9, "failed": 2, "cancelled": 1, "abandoned": 1, "rejected": 0}, counts
print("fine")
sys.exit(0)
"""


def test_greenlets_threads_and_children_under_gevent() -> None:
    pytest.importorskip("gevent")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["fine"], done.stderr
