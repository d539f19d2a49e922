"""Waiting on conditions, with a bound; past the bound it is `Late`, which says nothing about what is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["Late", "eventually", "within"]

T = TypeVar("T")


class Late(Exception):  # noqa: N818 - CI reruns by this very name
    """Something took longer than its bound; the machine may be slow, so the test may be tried again."""


def eventually(condition: Callable[[], T], timeout: float = 60.0, what: str = "", poll: float = 0.02) -> T:
    """The first true value that `condition` gives, asked each `poll` seconds; Late after `timeout` seconds."""
    until = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= until:
            name = what or getattr(condition, "__name__", "the condition")
            raise Late(f"{name}: not within {timeout:g} s; last value {value!r}")
        time.sleep(poll)


@contextmanager
def within(seconds: float, slack: float = 2.0) -> Iterator[None]:
    """The block must end within `seconds`, plus `slack` for a busy machine; Late when it does not."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    if took > seconds + slack:
        raise Late(f"took {took:.2f} s; the bound is {seconds:g} s and {slack:g} s of slack")
