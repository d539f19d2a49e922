"""Tasks: those that are born in a request, `create_task`, and what the loop's own tasks are spared."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import sys
import types
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from gracehooks import jobs
from gracehooks.deadline import Deadline
from gracehooks.errors import JobRejected
from gracehooks.jobs.tracker import Abandoned, Tracker
from tests.unit.jobs_bench import balanced, request, worker

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def found() -> Iterator[Tracker]:
    with worker() as tracker:
        yield tracker


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    if request.param == "asyncio":
        return asyncio.run
    uvloop = pytest.importorskip("uvloop")

    return uvloop.run  # type: ignore[no-any-return]


async def end(found: Tracker, budget: float = 60.0, grace: float = 30.0) -> list[Abandoned]:
    return await found.end_async(Deadline.after(budget), grace)


def test_tasks_that_are_born_in_a_request_are_jobs_and_so_are_their_children(found: Tracker, run: Run) -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def inner() -> None:
            await go.wait()

        async def outer() -> object:
            asyncio.ensure_future(inner())  # noqa: RUF006 - that is the point
            await go.wait()
            return jobs.current()

        free = asyncio.create_task(go.wait())
        with request():
            task = asyncio.get_running_loop().create_task(outer(), name="of a request")
            asyncio.get_running_loop().create_task(inner())
        await asyncio.sleep(0)
        assert [(work.kind, work.name) for work in jobs.active()] == [
            ("task", "of a request"),
            ("task", inner.__qualname__),
            ("task", inner.__qualname__),
        ]
        work = jobs.active()[0]
        asyncio.get_running_loop().call_later(0.05, go.set)
        assert await end(found) == []
        assert await task is work
        await free

    run(main())
    assert balanced(found)["succeeded"] == 3


def test_a_task_group_and_gather_in_a_request_are_counted_and_over_with_it(found: Tracker, run: Run) -> None:
    async def one(number: int) -> int:
        await asyncio.sleep(0)
        return number

    async def main() -> None:
        with request():
            assert await asyncio.gather(*(one(number) for number in range(3))) == [0, 1, 2]
            if sys.version_info >= (3, 11):
                async with asyncio.TaskGroup() as group:
                    group.create_task(one(3))
            else:
                await asyncio.create_task(one(3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(found) == 0
        assert await end(found) == []

    run(main())
    assert balanced(found)["succeeded"] == 4


def test_a_task_is_held_until_it_is_done_and_told_to_stop_in_the_end(found: Tracker, run: Run) -> None:
    async def forgotten() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        with request():
            asyncio.create_task(forgotten())  # noqa: RUF006 - that is the point
        await asyncio.sleep(0)
        gc.collect()
        assert await end(found, 60, 0.02) == []

    run(main())
    assert balanced(found)["cancelled"] == 1


def test_a_task_that_swallows_its_cancellation_is_reported_with_the_place(found: Tracker, run: Run) -> None:
    async def deep() -> None:
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                if release:
                    raise

    async def stubborn() -> None:
        await deep()

    release: list[int] = []

    async def main() -> list[Abandoned]:
        with request():
            task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        lost = await end(found, 0.2, 0)
        release.append(1)
        task.cancel()
        return lost

    (lost,) = run(main())
    assert lost.kind == "task"
    assert "in deep" in lost.where
    assert "in stubborn" in lost.where
    assert lost.where.index("in deep") < lost.where.index("in stubborn")
    assert balanced(found)["abandoned"] == 1


def test_nobody_looks_at_a_failed_task_so_asyncio_says_it(found: Tracker, run: Run) -> None:
    async def fails() -> None:
        raise ValueError("unseen")

    async def main() -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        with request():
            task = asyncio.create_task(fails())
        await asyncio.wait([task])
        del task
        await asyncio.sleep(0)
        assert await end(found) == []
        gc.collect()
        return said

    said = run(main())
    assert [str(each["exception"]) for each in said] == ["unseen"]
    assert balanced(found)["failed"] == 1


def test_create_task_is_a_job_anywhere_and_logs_its_exception_once(
    found: Tracker, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails() -> None:
        raise ValueError("no such luck")

    async def fine() -> object:
        return jobs.current()

    async def main() -> None:
        task = jobs.create_task(fine(), name="by name")
        assert isinstance(task, asyncio.Task)
        assert task.get_name() == "by name"
        (work,) = jobs.active()
        assert await task is work
        assert work.name == "by name"
        with request():
            failing = jobs.create_task(fails())
        assert len(found) <= 2, "counted once, not by name and by birth"
        await asyncio.wait([failing])
        assert await end(found) == []

    with caplog.at_level(logging.ERROR, "test.jobs"):
        run(main())
        gc.collect()
    assert len([each for each in caplog.records if "no such luck" in str(each.exc_info)]) == 1
    counts = balanced(found)
    assert (counts["succeeded"], counts["failed"]) == (1, 1)


def test_after_the_end_the_coroutine_is_closed(found: Tracker, run: Run) -> None:
    async def never() -> None: ...

    async def main() -> None:
        assert await end(found) == []
        for create in (jobs.create_task, asyncio.create_task):
            coroutine = never()
            with request(), pytest.raises(JobRejected):
                create(coroutine)
            assert coroutine.cr_frame is None
        await asyncio.create_task(never())

    run(main())
    assert balanced(found)["rejected"] == 2


def test_a_token_in_a_task_is_awaited(found: Tracker, run: Run) -> None:
    async def polite() -> str:
        token = jobs.current()
        assert not await token.wait(0.01)
        return "told" if await token.wait(60) else "late"

    @jobs.job(timeout=0.05)
    async def impatient() -> None:
        assert jobs.current().remaining() <= 0.05
        await asyncio.sleep(3600)

    async def main() -> None:
        late = jobs.create_task(impatient())
        await asyncio.wait([late])
        assert late.cancelled()
        task = jobs.create_task(polite())
        await asyncio.sleep(0.05)
        found.active()[0].tell_token()
        assert await task == "told"
        assert await end(found) == []

    run(main())
    counts = balanced(found)
    assert (counts["succeeded"], counts["cancelled"]) == (1, 1)


def test_a_shield_holds_the_cancellation_back(found: Tracker, run: Run) -> None:
    steps: list[str] = []

    async def work() -> None:
        async with jobs.shield():
            await asyncio.sleep(0.1)
            steps.append("finished")
        await asyncio.sleep(3600)

    async def main() -> None:
        jobs.create_task(work())
        await asyncio.sleep(0)
        assert await end(found, 60, 0) == []

    run(main())
    assert steps == ["finished"]
    assert balanced(found)["cancelled"] == 1


def test_a_context_that_is_given_decides_and_is_left_as_it_is(found: Tracker) -> None:
    async def work() -> None: ...

    async def main() -> None:
        if sys.version_info < (3, 11):
            return
        with request():
            born = contextvars.copy_context()
            await asyncio.create_task(work(), context=contextvars.Context())
        assert not len(found)
        size = len(born)
        await asyncio.create_task(work(), context=born)
        assert len(born) == size
        await asyncio.sleep(0)
        assert found.counts()["accepted"] == 1

    asyncio.run(main())
    found.end(Deadline.after(0), 0)
    balanced(found)


def test_the_task_of_a_server_and_of_a_client_library_is_no_job(found: Tracker) -> None:
    library = types.ModuleType("aiokafka.client")
    exec("async def heartbeat(): ...", library.__dict__)

    async def main() -> None:
        with request():
            await asyncio.create_task(library.heartbeat())
        assert await end(found) == []

    asyncio.run(main())
    assert balanced(found)["accepted"] == 0


def test_a_task_of_another_loop_is_told_from_the_thread_that_ends(found: Tracker) -> None:
    import threading

    ready = threading.Event()

    async def main() -> None:
        with request():
            task = asyncio.create_task(asyncio.sleep(3600))
        ready.set()
        await asyncio.wait([task])

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(60)
    assert found.end(Deadline.after(60), 0) == []
    thread.join()
    assert balanced(found)["cancelled"] == 1


def test_track_a_task(found: Tracker, run: Run) -> None:
    async def main() -> None:
        task = jobs.track(asyncio.create_task(asyncio.sleep(0.02)), "by hand")
        jobs.track(task)
        future = asyncio.get_running_loop().create_future()
        jobs.track(future, "a future")
        assert [work.name for work in jobs.active()] == ["by hand", "a future"]
        future.set_result(1)
        assert await end(found) == []

    run(main())
    assert balanced(found)["succeeded"] == 2
