"""Threads and pools: what is born in a request is a job, what is not is left alone; `submit` and `Executor`."""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
import importlib
import logging
import multiprocessing.pool
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gracehooks import jobs
from gracehooks.errors import JobRejected
from gracehooks.jobs import infrastructure, threads
from gracehooks.jobs.tracker import Abandoned, Tracker
from tests.kit import eventually
from tests.unit.jobs_bench import balanced, end, request, worker

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.fixture
def found() -> Iterator[Tracker]:
    with worker() as tracker:
        yield tracker


# -- born in a request -------------------------------------------------------------------------------------------
def test_a_thread_that_is_born_in_a_request_is_a_job_and_so_are_its_children(found: Tracker) -> None:
    go, seen = threading.Event(), []

    def inner() -> None:
        seen.append(jobs.current())
        go.wait(60)

    def outer() -> None:
        seen.append(jobs.current())
        threading.Thread(target=inner, name="inner").start()
        go.wait(60)

    with request():
        threading.Thread(target=outer, name="outer").start()
    threading.Thread(target=go.wait, name="of nobody", daemon=True).start()
    eventually(lambda: len(seen) == 2)
    assert [(work.kind, work.name) for work in jobs.active()] == [("thread", "outer"), ("thread", "inner")]
    assert seen == jobs.active()
    assert [each.name for each in found.page.jobs()] == ["outer", "inner"]
    go.set()
    assert end(found) == []
    assert balanced(found)["succeeded"] == 2


def test_a_thread_that_raises_has_failed_and_is_heard_of_once(found: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    monkeypatch.setattr(threading, "excepthook", lambda each: heard.append(each.exc_type))

    def cancelled() -> None:
        assert jobs.current().wait(60)
        jobs.current().raise_if_set()

    with request():
        for target in (lambda: 1 / 0, cancelled, lambda: exec("raise SystemExit")):
            threading.Thread(target=target).start()
    assert end(found, 60, 0.05) == []
    counts = balanced(found)
    assert (counts["failed"], counts["cancelled"], counts["succeeded"]) == (1, 1, 1)
    eventually(lambda: ZeroDivisionError in heard)
    assert jobs.JobCancelled not in heard


def test_a_subclass_with_a_run_of_its_own_is_a_job_too(found: Tracker) -> None:
    class Mine(threading.Thread):
        ran = False

        def run(self) -> None:
            self.ran = True

    with request():
        mine = Mine()
        mine.start()
        with pytest.raises(RuntimeError):
            mine.start()
        timer = threading.Timer(0.01, int)
        timer.start()
    mine.join()
    timer.join()
    assert mine.ran
    assert "run" not in mine.__dict__
    assert end(found) == []
    assert balanced(found)["succeeded"] == 2


def test_infrastructure_that_is_started_in_a_request_is_no_job(found: Tracker) -> None:
    def monitor() -> None:
        pass

    monitor.__module__ = "sentry_sdk.worker"
    with request():
        threading.Thread(target=monitor).start()
        contextvars.Context().run(threading.Thread(target=int).start)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(int, "7").result() == 7
    assert end(found) == []
    assert balanced(found)["accepted"] == 1, "what was handed to the pool"


LIBRARY = """
import functools, threading

go = threading.Event()


class Reporter:
    def _loop(self, *args):
        go.wait(60)

    def start(self, daemon=True, args=()):
        threading.Thread(target=self._loop, name="reporter", daemon=daemon, args=args).start()


class Poller(threading.Thread):
    def __init__(self, callback=None):
        super().__init__(name="poller", daemon=True)
        self.callback = callback

    def run(self):
        go.wait(60)


def send(*args):
    go.wait(60)


def background(function):
    @functools.wraps(function)
    def wrapper(*args):
        go.wait(60)
        function(*args)

    def start(*args):
        threading.Thread(target=wrapper, args=args, name="background", daemon=True).start()

    return start


def poll(callback=None):
    Poller(callback).start()
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An installed package that nobody has listed."""
    place = tmp_path / "lib/site-packages"
    (place / "acme_metrics").mkdir(parents=True)
    (place / "acme_metrics/__init__.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(place))
    module = importlib.import_module("acme_metrics")
    monkeypatch.setattr(threads, "_said", set())
    yield module
    module.go.set()
    del sys.modules["acme_metrics"]


def test_a_daemon_that_a_library_starts_for_itself_is_no_job(
    found: Tracker, library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with request():
        library.Reporter().start()
        library.Reporter().start()
        library.poll()
    assert jobs.active() == []
    assert [record.message.partition(":")[2].partition("(")[0] for record in caplog.records] == [
        " no stop waits for the thread reporter: it is a daemon of acme_metrics, which started it for itself "
    ]


@pytest.mark.parametrize(
    "start",
    [
        lambda library: library.Reporter().start(daemon=False),
        lambda library: library.Reporter().start(args=(lambda: None,)),
        lambda library: library.Reporter().start(args=(Abandoning(),)),
        lambda library: library.background(lambda: None)(),
        lambda library: library.poll(lambda: None),
        lambda library: threading.Thread(target=library.send, daemon=True).start(),
        lambda library: threading.Thread(target=functools.partial(library.send, 1), daemon=True).start(),
        lambda library: (infrastructure.application.add("acme_metrics"), library.poll()),
    ],
    ids=[
        *["no daemon", "a function of ours", "an object of ours", "wraps", "holds a function of ours"],
        *["started by us", "partial", "the application's package"],
    ],
)
def test_a_librarys_thread_that_may_be_work_of_ours_is_a_job(
    found: Tracker, library: Any, start: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infrastructure, "application", set())
    with request():
        start(library)
    assert len(jobs.active()) == 1
    library.go.set()
    assert end(found) == []


class Abandoning:
    """An object of the application's."""


def test_what_instruments_threads_before_us_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Sentry and others do, in a master that preloads."""
    seen = []
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def instrumented(self: threading.Thread) -> None:
        seen.append(self.name)
        start(self)

    def instrumented_submit(self: ThreadPoolExecutor, *args: Any) -> Any:
        seen.append("submit")
        return submit(self, *args)

    monkeypatch.setattr(threads._Thread, "start", instrumented)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", instrumented_submit)
    with worker() as found, request():
        threading.Thread(target=int, name="ours").start()
        with ThreadPoolExecutor(1, thread_name_prefix="pool") as pool:
            pool.submit(int)
        assert end(found) == []
        assert balanced(found)["succeeded"] == 2
    assert seen == ["ours", "submit", "pool_0"]


def test_a_timer_that_has_not_fired_when_it_is_told_never_does(
    found: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    fired = []
    with request():
        threading.Timer(600, fired.append, ("late",)).start()
        threading.Timer(0.01, fired.append, ("soon",)).start()
    eventually(lambda: len(jobs.active()) == 1)
    assert end(found, grace=0.05) == []
    assert fired == ["soon"]
    assert balanced(found) | {"succeeded": 1, "cancelled": 1} == balanced(found)
    assert "1 jobs are told to stop" in caplog.text


def test_what_a_request_hands_to_a_pool_is_a_job(found: Tracker) -> None:
    go, names = threading.Event(), []

    def work() -> None:
        names.append(jobs.current())
        go.wait(60)
        threading.Thread(target=int, name="nested").start()

    with ThreadPoolExecutor(1) as pool:
        with request():
            future = pool.submit(work)
            failing = pool.submit(lambda: 1 / 0)
        free = pool.submit(int)
        eventually(lambda: names)
        assert names == jobs.active()[:1]
        go.set()
        with pytest.raises(ZeroDivisionError):
            failing.result()
        assert future.result() is None
        assert free.result() == 0
        eventually(lambda: len(found) == 0)
    assert end(found) == []
    counts = balanced(found)
    assert (counts["succeeded"], counts["failed"]) == (2, 1)


def test_what_a_request_hands_to_a_pool_of_processes_is_a_job_and_the_pool_is_not(found: Tracker) -> None:
    with ProcessPoolExecutor(1) as pool:
        with request():
            future = pool.submit(int, "3")
        assert future.result() == 3
        eventually(lambda: len(found) == 0)
        assert end(found) == [], "the pool's own process is not waited for"
        assert pool.submit(int, "4").result() == 4, "nor killed"
    assert balanced(found)["accepted"] == 1


def _fails(number: int) -> int:
    return 1 // number


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_what_a_request_hands_to_a_pool_of_multiprocessing_is_a_job(found: Tracker, kind: str) -> None:
    heard: list[object] = []
    with multiprocessing.Pool(1) if kind == "processes" else multiprocessing.pool.ThreadPool(1) as pool:
        with request():
            slow = pool.apply_async(time.sleep, (0.2,))
            mapped = pool.map_async(_fails, [1, 2], 1, heard.append)
            failing = pool.map_async(_fails, [1, 0, 1], chunksize=1, error_callback=heard.append)
            nothing = pool.map_async(_fails, [])
            assert pool.apply(_fails, (1,)) == 1
        assert nothing.get() == []
        assert slow.ready()
        with pytest.raises(ZeroDivisionError):
            failing.get()
        assert mapped.get() == [1, 0]
        assert end(found) == [], "the pool's own processes and threads are not waited for"
        assert pool.apply(_fails, (1,)) == 1, "nor killed"
    assert heard[0] == [1, 0]
    assert isinstance(heard[1], ZeroDivisionError)
    counts = balanced(found)
    assert (counts["accepted"], counts["succeeded"], counts["failed"]) == (5, 4, 1)


def test_a_pool_that_is_terminated_takes_its_jobs_along(found: Tracker) -> None:
    with multiprocessing.Pool(1) as pool:
        with request():
            pool.apply_async(time.sleep, (3600,))
        assert [work.kind for work in jobs.active()] == ["thread"]
    assert end(found) == []
    assert balanced(found)["cancelled"] == 1


def test_after_the_end_a_request_cannot_start_a_thread_unseen(found: Tracker) -> None:
    end(found)
    with request():
        with pytest.raises(JobRejected):
            threading.Thread(target=int).start()
        with ThreadPoolExecutor(1) as pool, pytest.raises(JobRejected):
            pool.submit(int)
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert balanced(found)["rejected"] == 2


def test_with_track_explicit_only_what_is_named_is_a_job() -> None:
    with worker(track="explicit") as found:
        with request():
            thread = threading.Thread(target=time.sleep, args=(0.05,))
            thread.start()
            jobs.submit(int)
        assert end(found) == []
        assert balanced(found)["accepted"] == 1
        thread.join()


# -- submit ------------------------------------------------------------------------------------------------------
def test_submit_gives_a_future_with_an_id_and_carries_the_context(found: Tracker) -> None:
    VARIABLE.set("carried")
    job = jobs.submit(VARIABLE.get)
    assert isinstance(job, concurrent.futures.Future)
    assert job.result(60) == "carried"
    assert (job.id, job.name) == (1, "get") or job.name.endswith("get")
    assert list(concurrent.futures.as_completed([job], 60)) == [job]
    assert end(found) == []
    assert balanced(found)["succeeded"] == 1


def test_an_exception_stays_in_the_future_and_is_logged_once(found: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    async def coroutine() -> None: ...

    def fails() -> None:
        raise ValueError("no such luck")

    with caplog.at_level(logging.ERROR, "test.jobs"):
        with pytest.raises(ValueError, match="no such luck"):
            jobs.submit(fails).result(60)
        with pytest.raises(TypeError, match=r"use jobs\.create_task"):
            jobs.submit(coroutine).result(60)
        assert end(found) == []
    lines = [record.getMessage() for record in caplog.records if "no such luck" in str(record.exc_info)]
    assert len(lines) == 1
    assert "fails) failed" in lines[0]
    assert balanced(found)["failed"] == 2


def test_cancel_of_a_waiting_job_and_of_a_running_one(found: Tracker) -> None:
    begun = threading.Event()

    def work() -> str:
        begun.set()
        assert jobs.current().wait(60)
        return "told"

    with jobs.Executor(1) as pool:
        running = pool.submit(work)
        waiting = pool.submit(int)
        assert begun.wait(60)
        assert "wait" in jobs.active()[1].where()
        assert "test_jobs_threads.py" in jobs.active()[0].where()
        assert waiting.cancel()
        assert not running.cancel()
        assert running.result(60) == "told"
    assert end(found) == []
    counts = balanced(found)
    assert (counts["succeeded"], counts["cancelled"]) == (1, 1)


def test_at_the_end_waiting_jobs_are_cancelled_and_running_ones_told(found: Tracker) -> None:
    with jobs.Executor(2) as pool:
        running = [pool.submit(lambda: jobs.current().wait(60)) for _ in range(2)]
        waiting = [pool.submit(int) for _ in range(20)]
        assert end(found, 60, 0.05) == []
        assert all(job.result(60) for job in running)
        assert all(job.cancelled() for job in waiting)
    counts = balanced(found)
    assert (counts["succeeded"], counts["cancelled"]) == (2, 20)
    with pytest.raises(RuntimeError):
        pool.submit(int)


def test_an_executor_is_a_real_one(found: Tracker) -> None:
    with jobs.Executor(3) as pool:
        assert list(pool.map(abs, range(-200, 0))) == list(range(200, 0, -1))
        assert len({thread.name for thread in threading.enumerate() if "gracehooks-job" in thread.name}) <= 3 + 256
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(int)
    with pytest.raises(ValueError, match="1 or more"):
        jobs.Executor(0)
    assert end(found) == []
    assert balanced(found)["succeeded"] == 200


def test_an_idle_thread_ends_and_a_new_one_takes_over(found: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "IDLE", 0.001)
    with jobs.Executor(2) as pool:
        for number in range(50):
            assert pool.submit(int, number).result(60) == number
            time.sleep(0.0005 * (number % 4))
    assert end(found) == []
    assert balanced(found)["succeeded"] == 50


def test_an_abandoned_job_tells_where_it_stood(found: Tracker) -> None:
    heard: list[Abandoned] = []
    begun: list[int] = []
    release = threading.Event()

    @jobs.job(on_abandon=heard.append)
    def stubborn() -> None:
        begun.append(1)
        release.wait(60)

    with request():
        jobs.submit(stubborn)
        threading.Thread(target=stubborn, name="a thread").start()
    eventually(lambda: len(begun) == 2 and all("threading.py" in work.where() for work in jobs.active()))
    lost = end(found, 0.1, 0)
    release.set()
    assert [each.kind for each in lost] == ["thread", "thread"]
    assert heard == lost
    assert all("in stubborn" in each.where and "threading.py" in each.where for each in lost), lost
    assert "a thread" in lost[1].name
    assert balanced(found)["abandoned"] == 2


def test_a_time_out_of_a_job_is_its_own(found: Tracker) -> None:
    @jobs.job(timeout=0.05)
    def patient() -> None:
        assert jobs.current().wait(60)
        jobs.current().raise_if_set()

    with pytest.raises(jobs.JobCancelled):
        jobs.submit(patient).result(60)
    with pytest.raises(ValueError, match="more than 0"):
        jobs.job(timeout=0)
    assert end(found) == []
    assert balanced(found)["cancelled"] == 1


# -- by hand -----------------------------------------------------------------------------------------------------
def test_track_counts_threads_and_futures_until_they_end(found: Tracker) -> None:
    go = threading.Event()
    running = threading.Thread(target=go.wait, args=(60,))
    running.start()
    later = threading.Thread(target=go.wait, args=(60,))
    future: concurrent.futures.Future[int] = concurrent.futures.Future()
    for thing in (running, later, future):
        assert jobs.track(thing, "by hand") is thing
    assert len(found) == 2
    later.start()
    jobs.track(future)
    assert [work.name for work in jobs.active()] == ["by hand"] * 3
    threading.Timer(0.05, lambda: (go.set(), future.set_result(1))).start()
    assert end(found) == []
    assert balanced(found)["succeeded"] == 3
    with pytest.raises(TypeError, match=r"jobs\.track takes"):
        jobs.track(5)
