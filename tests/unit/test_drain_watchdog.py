"""The exits that nothing can stop, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from gracehooks.drain.watchdog import Sentinel, Stacks, native
from tests.kit import Late, eventually

HOLD_THE_GIL = """
import ctypes
from gracehooks.deadline import Deadline
from gracehooks.drain.watchdog import LastResort
alarm = LastResort()
alarm.arm(Deadline.after(60))
alarm.arm(Deadline.after(0.3))
ctypes.PyDLL(None).usleep(60_000_000)
"""


def test_the_last_resort_beats_a_call_that_holds_the_gil() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HOLD_THE_GIL], capture_output=True, text=True, timeout=50, check=False)
    took = time.monotonic() - began
    assert done.returncode == 1
    assert "most recent call first" in done.stderr
    if took > 10:
        raise Late(f"it took {took:.1f} s")


def test_a_disarmed_one_lets_the_process_live() -> None:
    code = """
from gracehooks.deadline import Deadline
from gracehooks.drain.watchdog import LastResort
import time
alarm = LastResort()
alarm.arm(Deadline.after(0.3))
alarm.disarm()
time.sleep(0.6)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == 0


def test_a_child_of_a_worker_does_not_write_into_its_stacks() -> None:
    """And what the child starts does not inherit a copy of its stderr."""
    stacks = Stacks()
    child = os.fork()
    if child == 0:
        stacks.forget()
        descriptor = stacks.descriptor or 0
        good = os.path.sameopenfile(descriptor, 2) and not os.get_inheritable(descriptor)
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert stacks.size == 0
    stacks.close()
    assert stacks.descriptor is None
    assert stacks.read() == ""


class Watched:
    def __init__(self) -> None:
        self.turns = 0
        self.threads: set[int] = set()

    def look(self) -> bool:
        return False

    def turn(self) -> float:
        self.turns += 1
        self.threads.add(threading.get_ident())
        if self.turns == 2:
            raise ValueError("once")
        return 60.0


def test_the_sentinel_turns_in_a_thread_of_its_own_is_woken_and_survives_an_error() -> None:
    watched, errors = Watched(), []
    sentinel = Sentinel(watched, errors.append)
    sentinel.start()
    eventually(lambda: watched.turns >= 3)
    before = watched.turns
    sentinel.wake()
    eventually(lambda: watched.turns > before)
    assert threading.get_ident() not in watched.threads
    assert not sentinel.is_here()
    assert [str(each) for each in errors] == ["once"]


def test_native_is_the_interpreters_own_under_gevent_too() -> None:
    pytest.importorskip("gevent")
    code = """
import select, time
plain = time.sleep
from gevent import monkey
monkey.patch_all()
from gracehooks.drain.watchdog import native
assert native("time", "sleep") is plain is not time.sleep
assert native("select", "poll") is not getattr(select, "poll", None)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == 0
    assert native("time", "sleep") is time.sleep
