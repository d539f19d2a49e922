"""`on_shutdown`: newest first, each once, and none of them may hold the end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator

import pytest

import gracehooks
from gracehooks.deadline import Deadline
from gracehooks.drain import cleanup

LOG = logging.getLogger("test")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    cleanup.forget()
    yield
    cleanup.forget()


def run(seconds: float = 5.0, *, loop: bool) -> list[str]:
    deadline = Deadline.after(seconds)
    return asyncio.run(cleanup.run_async(deadline, LOG)) if loop else cleanup.run(deadline, LOG)


either = pytest.mark.parametrize("loop", [False, True], ids=["blocking", "loop"])


@either
def test_newest_first_each_once_plain_and_async(loop: bool) -> None:
    called: list[str] = []

    @gracehooks.on_shutdown
    def first() -> None:
        called.append("first")

    @gracehooks.on_shutdown
    async def second() -> None:
        await asyncio.sleep(0)
        called.append("second")

    gracehooks.on_shutdown(lambda: called.append("third"))
    assert run(loop=loop) == []
    assert called == ["third", "second", "first"]
    assert run(loop=loop) == []
    assert len(called) == 3


@either
def test_one_that_raises_is_logged_and_the_next_one_runs(loop: bool, caplog: pytest.LogCaptureFixture) -> None:
    called: list[str] = []
    cleanup.on_shutdown(lambda: called.append("older"))

    @cleanup.on_shutdown
    async def fails() -> None:
        raise ValueError("no")

    @cleanup.on_shutdown
    def fails_too() -> None:
        raise KeyError("no")

    assert run(loop=loop) == []
    assert called == ["older"]
    assert "fails" in caplog.text
    assert "fails_too" in caplog.text


@either
def test_one_that_swallows_its_cancellation_is_left_at_the_deadline_with_those_after_it(loop: bool) -> None:
    cleanup.on_shutdown(lambda: pytest.fail("after the deadline"))

    @cleanup.on_shutdown
    async def hangs() -> None:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                pass

    left = run(0.1, loop=loop)
    assert len(left) == 2
    assert "hangs" in left[0]
    assert cleanup.registered() == []


@either
def test_no_time_no_callback(loop: bool) -> None:
    cleanup.on_shutdown(lambda: pytest.fail("there was no time"))
    assert len(run(0.0, loop=loop)) == 1


@either
def test_one_that_cancels_itself_has_ended(loop: bool) -> None:
    @cleanup.on_shutdown
    async def cancelled() -> None:
        raise asyncio.CancelledError

    assert run(loop=loop) == []


def test_only_functions() -> None:
    with pytest.raises(TypeError, match="on_shutdown takes a function"):
        cleanup.on_shutdown(3)  # type: ignore[type-var]
