"""One deadline, carried down."""

from __future__ import annotations

import time

from gracehooks.deadline import Deadline


def test_left_counts_down_and_is_never_negative(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    deadline = Deadline.after(5)
    assert deadline.left() == 5
    assert not deadline.passed
    now[0] = 104.0
    assert deadline.left() == 1
    now[0] = 105.0
    assert deadline.passed
    now[0] = 200.0
    assert deadline.left() == 0


def test_the_earlier_of_two_and_one_that_follows():
    first, second = Deadline(10.0), Deadline(20.0)
    assert first.earlier(second) == second.earlier(first) == first
    assert first.plus(10.0) == second
    assert first < second
