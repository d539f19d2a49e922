"""Services: started, restarted with growing pauses, told first, waited for."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator

import pytest

from gracehooks import jobs
from gracehooks.deadline import Deadline
from gracehooks.jobs import services
from gracehooks.jobs.tracker import Token, Tracker
from tests.kit import eventually
from tests.unit.jobs_bench import balanced, end, worker


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracker]:
    monkeypatch.setattr(services, "_registered", {})
    with worker() as tracker:
        yield tracker


def test_a_service_is_told_before_the_end_and_finishes_what_it_has(found: Tracker) -> None:
    steps: list[str] = []
    pulled = threading.Event()

    @jobs.service
    def consume(token: Token) -> None:
        assert token is jobs.current()
        pulled.set()
        while not token.wait(60):
            pass
        threading.Thread(target=lambda: (time.sleep(0.1), steps.append("its thread")), name="child").start()
        time.sleep(0.05)
        steps.append("finished")

    jobs.start_services()
    assert pulled.wait(60)
    assert [(work.kind, work.name.rpartition(".")[2]) for work in jobs.active()] == [("service", "consume")]
    assert [each.kind for each in found.page.jobs()] == ["service"]
    found.stop_services()
    assert end(found) == []
    assert steps == ["finished", "its thread"]
    assert balanced(found)["succeeded"] == 2


def test_a_service_that_crashes_is_started_again_after_growing_pauses(
    found: Tracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(services, "FIRST_PAUSE", 0.01)
    starts: list[float] = []

    @jobs.service(name="fragile")
    def consume(token: Token) -> None:
        starts.append(time.monotonic())
        if len(starts) < 4:
            raise ValueError("no such luck")
        token.wait(60)

    with caplog.at_level(logging.WARNING, "test.jobs"):
        jobs.start_services()
        eventually(lambda: len(starts) == 4)
        found.stop_services()
        assert end(found) == []
    pauses = [float(each.getMessage().split()[-2]) for each in caplog.records if "starts again" in each.getMessage()]
    assert pauses == [0.0, 0.0, 0.0]
    assert starts[3] - starts[2] > 0.04
    assert balanced(found) | {"rejected": 0} == {
        "accepted": 4,
        "succeeded": 1,
        "failed": 3,
        "cancelled": 0,
        "abandoned": 0,
        "rejected": 0,
    }


def test_a_service_between_two_runs_does_not_start_again_at_the_end(
    found: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "FIRST_PAUSE", 3600)

    @jobs.service
    def consume(token: Token) -> None:
        raise ValueError

    jobs.start_services()
    eventually(lambda: found.counts()["failed"] == 1)
    started = time.monotonic()
    found.stop_services()
    assert end(found) == []
    assert time.monotonic() - started < 10
    assert balanced(found)["accepted"] == 1


def test_a_service_that_does_not_stop_is_reported(found: Tracker) -> None:
    release = threading.Event()

    @jobs.service
    def deaf(token: Token) -> None:
        release.wait(60)

    jobs.start_services()
    eventually(lambda: len(found) == 1)
    (lost,) = end(found, 0.1, 0)
    release.set()
    assert lost.kind == "service"
    assert "in deaf" in lost.where
    balanced(found)


def test_a_coroutine_runs_in_the_loop_is_told_and_then_cancelled(found: Tracker) -> None:
    steps: list[str] = []

    @jobs.service
    async def polite(token: Token) -> None:
        while not await token.wait(60):
            pass
        steps.append("polite")

    @jobs.service
    async def deaf(token: Token) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            steps.append("deaf")

    async def main() -> None:
        jobs.start_services()
        while len(found) < 2:
            await asyncio.sleep(0)
        found.stop_services()
        while not steps:
            await asyncio.sleep(0.001)
        assert await found.end_async(Deadline.after(60), 0.05) == []

    asyncio.run(main())
    assert steps == ["polite", "deaf"]
    counts = balanced(found)
    assert (counts["succeeded"], counts["cancelled"]) == (1, 1)


def test_a_coroutine_has_a_loop_of_its_own_where_there_is_none(found: Tracker) -> None:
    @jobs.service
    async def consume(token: Token) -> None:
        while not await token.wait(60):
            pass

    jobs.start_services()
    eventually(lambda: len(found) == 1)
    found.stop_services()
    assert end(found) == []
    assert balanced(found)["succeeded"] == 1
