"""The tracker: counting, the end, tokens; histories without threads where that is possible."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
import time

import pytest

from gracehooks import jobs
from gracehooks.deadline import Deadline
from gracehooks.errors import JobRejected
from gracehooks.jobs import tracker
from gracehooks.jobs.tracker import Abandoned, JobCancelled, Options, Tracker, Work
from gracehooks.scoreboard import Outcome, Page
from gracehooks.settings import Settings
from tests.kit.waiting import eventually
from tests.unit.jobs_bench import balanced, end, request, worker


class Fake:
    """A kind whose jobs do what the test says."""

    name = "fake"
    work = Work

    def __init__(self) -> None:
        self.said: list[str] = []

    def cancel(self, work: Work) -> None:
        self.said.append(f"cancel {work.name}")

    def where(self, work: Work) -> str:
        return "nowhere"

    def kill(self, work: Work) -> None:
        self.said.append(f"kill {work.name}")


@pytest.fixture
def kind() -> Fake:
    return Fake()


@pytest.fixture
def found() -> Tracker:
    return Tracker(Page(), Settings())


def test_each_job_is_counted_twice_and_no_more(found: Tracker, kind: Fake) -> None:
    works = [found.begin(kind, str(number)) for number in range(4)]
    assert found.page.counts()["accepted"] == found.page.jobs_in_flight == len(found) == 4
    assert [each.name for each in found.page.jobs()] == ["0", "1", "2", "3"]
    for work, outcome in zip(works, (Outcome.SUCCEEDED, Outcome.FAILED, Outcome.CANCELLED), strict=False):
        assert found.finish(work, outcome)
        assert not found.finish(work, Outcome.FAILED)
    assert [each.id for each in found.active()] == [works[3].id]
    lost = end(found, 0, 0)
    assert [(each.id, each.name, each.kind, each.where) for each in lost] == [(works[3].id, "3", "fake", "nowhere")]
    assert not found.finish(works[3], Outcome.SUCCEEDED), "what was abandoned stays abandoned"
    counts = balanced(found)
    assert counts == {"accepted": 4, "succeeded": 1, "failed": 1, "cancelled": 1, "abandoned": 1, "rejected": 0}
    assert kind.said == ["cancel 3", "kill 3"]


def test_after_the_end_a_job_is_rejected_and_counted_as_such(found: Tracker, kind: Fake) -> None:
    assert end(found) == []
    with pytest.raises(JobRejected, match=r"'late' was not started: this worker is at its end"):
        found.begin(kind, "late")
    assert balanced(found)["rejected"] == 1
    assert end(found) == []


def test_the_end_returns_when_the_last_job_has_ended(found: Tracker, kind: Fake) -> None:
    works = [found.begin(kind, "a"), found.begin(kind, "b")]
    ended = []

    def finish() -> None:
        ended.append(found.begin(kind, "born during the end"))
        for work in works + ended:
            found.finish(work, Outcome.SUCCEEDED)
        ended.append(time.monotonic())

    timer = threading.Timer(0.2, finish)
    timer.start()
    assert end(found) == []
    assert time.monotonic() - ended[-1] < 0.5
    assert kind.said == []
    assert balanced(found)["succeeded"] == 3


def test_grace_then_told_then_given_up(found: Tracker, kind: Fake) -> None:
    told = []
    work = found.begin(kind, "stubborn")
    kind.cancel = lambda each: told.append((time.monotonic(), each.is_set(), each.remaining()))  # type: ignore[method-assign]
    started = time.monotonic()
    lost = found.end(Deadline.after(0.5), 0.2)
    assert [each.name for each in lost] == ["stubborn"]
    assert 0.2 <= told[0][0] - started < 0.5
    assert told[0][1]
    assert 0 < told[0][2] <= 0.3
    assert 0.5 <= time.monotonic() - started < 5
    assert work.remaining() == 0


def test_no_job_slips_in_between_closed_and_count(found: Tracker, kind: Fake) -> None:
    accepted, rejected = [], []
    go = threading.Barrier(5)

    def submit() -> None:
        go.wait()
        while True:
            try:
                work = found.begin(kind, "x")
            except JobRejected:
                rejected.append(1)
                return
            accepted.append(1)
            found.finish(work, Outcome.SUCCEEDED)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    go.wait()
    assert end(found) == []
    assert not len(found)
    for thread in threads:
        thread.join()
    counts = balanced(found)
    assert counts["accepted"] == len(accepted)
    assert counts["rejected"] == len(rejected) == 4


@pytest.mark.parametrize("slots", [1, 3, 64])
@pytest.mark.parametrize("forced", [False, True], ids=["when empty", "by force"])
def test_whatever_a_race_for_the_last_moment_brings_each_job_is_counted_once(
    kind: Fake, slots: int, forced: bool
) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(15):
            found = Tracker(Page(1, slots), Settings())
            accepted, ended, abandoned = [], [], []
            go = threading.Event()

            def work(found: Tracker = found, accepted: list = accepted, ended: list = ended, go: object = go) -> None:
                go.wait()
                try:
                    for _ in range(200):
                        job = found.begin(kind, "j")
                        accepted.append(job.id)
                        if found.finish(job, Outcome.SUCCEEDED):
                            ended.append(job.id)
                except JobRejected:
                    return

            threads = [threading.Thread(target=work) for _ in range(4)]
            for each in threads:
                each.start()
            go.set()
            if forced:
                abandoned = [job.id for job in found.close() if found.finish(job, Outcome.ABANDONED)]
            else:
                eventually(found.close_if_empty, poll=0.0)
                counts = found.counts()
                assert counts["accepted"] == counts["succeeded"], "it was closed, so it was empty"
            for each in threads:
                each.join()
            counts = balanced(found)
            assert counts["succeeded"] == len(ended) == len(set(ended))
            assert counts["abandoned"] == len(abandoned)
            assert set(accepted) <= {*ended, *abandoned}
            with pytest.raises(JobRejected):
                found.begin(kind, "late")
            assert found.page.jobs() == []
    finally:
        sys.setswitchinterval(interval)


def test_on_abandon_is_called_and_cannot_hold_the_end(found: Tracker, kind: Fake) -> None:
    heard: list[Abandoned] = []
    release = threading.Event()

    def broken(_: Abandoned) -> None:
        raise ValueError("broken")

    for callback in (broken, heard.append, lambda _: release.wait()):
        found.begin(kind, "x", None, Options(on_abandon=callback))
    started = time.monotonic()
    lost = end(found, 0.05, 0)
    assert time.monotonic() - started < tracker.ABANDON_BOUND + 2
    release.set()
    assert heard == [lost[1]]
    assert balanced(found)["abandoned"] == 3


def test_the_end_in_an_event_loop_lets_it_turn(found: Tracker, kind: Fake) -> None:
    async def main() -> list[Abandoned]:
        loop = asyncio.get_running_loop()
        works = [found.begin(kind, name) for name in ("from the loop", "from a thread", "never")]
        loop.call_later(0.05, found.finish, works[0], Outcome.SUCCEEDED)
        threading.Timer(0.1, found.finish, (works[1], Outcome.FAILED)).start()
        return await found.end_async(Deadline.after(0.4), 0.3)

    assert [each.name for each in asyncio.run(main())] == ["never"]
    assert balanced(found)["abandoned"] == 1


def test_the_end_in_an_event_loop_returns_at_once_when_all_is_done(found: Tracker, kind: Fake) -> None:
    async def main() -> float:
        work = found.begin(kind, "x")
        asyncio.get_running_loop().call_later(0.05, found.finish, work, Outcome.SUCCEEDED)
        started = time.monotonic()
        assert await found.end_async(Deadline.after(60), 30) == []
        return time.monotonic() - started

    assert asyncio.run(main()) < 5
    assert kind.said == []


def test_nothing_that_jobs_use_is_closed_before_the_last_one_has_ended() -> None:
    """TEST_RUNS (50) ends, each with jobs of two kinds that start each other."""
    chance = random.Random(1)
    late: list[str] = []
    pauses: list[float] = []
    for _ in range(int(os.environ.get("TEST_RUNS", "50"))):
        with worker() as found:
            connection = ["open"]
            ends: list[float] = []

            def work(seconds: float, more: int, connection: list[str] = connection, ends: list[float] = ends) -> None:
                time.sleep(seconds)
                if more:
                    jobs.submit(work, seconds, more - 1)
                if not connection:
                    late.append("closed")
                ends.append(time.monotonic())

            for _ in range(chance.randint(1, 6)):
                jobs.submit(work, chance.random() / 200, chance.randint(0, 2))
            with request():
                threading.Thread(target=work, args=(chance.random() / 200, 1)).start()
            assert end(found) == []
            connection.clear()
            pauses.append(time.monotonic() - max(ends))
            balanced(found)
    assert late == []
    assert sorted(pauses)[len(pauses) // 2] < 0.1
    print(
        f"from the last job to the end: median {sorted(pauses)[len(pauses) // 2] * 1000:.1f} ms, worst {max(pauses) * 1000:.1f}"
    )


def test_services_are_told_once_and_those_that_come_late_at_once(found: Tracker) -> None:
    said: list[str] = []
    found.on_stop_services(lambda: said.append("first"))
    found.on_stop_services(lambda: 1 / 0)
    found.on_stop_services(lambda: said.append("third"))
    found.stop_services()
    found.stop_services()
    found.on_stop_services(lambda: said.append("late"))
    assert said == ["first", "third", "late"]


def test_with_track_off_nothing_is_counted_and_nobody_waits(kind: Fake) -> None:
    found = Tracker(Page(), Settings(track="off"))
    work = found.begin(kind, "x")
    started = time.monotonic()
    assert end(found) == []
    assert time.monotonic() - started < 5
    assert not found.finish(work, Outcome.SUCCEEDED)
    assert set(found.counts().values()) == {0}


# -- tokens ------------------------------------------------------------------------------------------------------
def test_a_token_is_waited_for_and_raises(found: Tracker, kind: Fake) -> None:
    work = found.begin(kind, "x")
    assert work.remaining() == float("inf")
    work.raise_if_set()
    assert not work.wait(0)
    threading.Timer(0.05, work.tell).start()
    assert work.wait(60)
    assert work.wait()
    with pytest.raises(JobCancelled):
        work.raise_if_set()


def test_a_job_has_its_own_time_out(found: Tracker, kind: Fake) -> None:
    work = found.begin(kind, "x", None, Options(timeout=0.05))
    assert 0 < work.remaining() <= 0.05
    assert work.wait(60)
    assert work.is_set()


def test_a_shield_holds_the_word_back_until_it_is_left(found: Tracker, kind: Fake) -> None:
    work = found.begin(kind, "x")
    mark = tracker.mark.set(work)
    try:
        with jobs.shield():
            assert not work.wait(0)
            with jobs.shield():
                work.tell()
            assert not work.is_set()
            assert not work.wait(0.01)
            assert kind.said == []
        assert work.is_set()
        assert work.wait(0)
        assert kind.said == ["cancel x"]
    finally:
        tracker.mark.reset(mark)


def test_outside_of_a_job_the_token_is_that_of_all_jobs() -> None:
    before = tracker.current()
    try:
        tracker.adopt(None)
        assert not jobs.current().is_set()
        with jobs.shield():
            pass
        found = Tracker(Page(), Settings())
        tracker.adopt(found)
        assert not jobs.current().is_set()
        found.tell_all()
        assert jobs.current().is_set()
    finally:
        tracker.adopt(before)


# -- the tracker of the process ----------------------------------------------------------------------------------
def test_a_master_refuses_jobs_and_a_worker_takes_them_again() -> None:
    before = tracker.current()
    try:
        tracker.adopt(None)
        tracker.forbid_in_this_process("not in the master")
        for submit in (lambda: jobs.submit(print), lambda: jobs.popen(["true"]), lambda: jobs.run(["true"])):
            with pytest.raises(JobRejected, match="not in the master"):
                submit()
        tracker.adopt(Tracker(Page(), Settings()))
        assert jobs.submit(int, "5").result(60) == 5
    finally:
        tracker.adopt(before)


def test_a_forked_copy_of_a_job_is_not_counted_again(found: Tracker, kind: Fake) -> None:
    before = tracker.current()
    tracker.adopt(found)
    try:
        work = found.begin(kind, "x")
        pid = os.fork()
        if pid == 0:
            os._exit(0 if not found.finish(work, Outcome.FAILED) and tracker.current() is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        found.finish(work, Outcome.SUCCEEDED)
        counts = balanced(found)
        assert (counts["succeeded"], counts["failed"]) == (1, 0)
    finally:
        tracker.adopt(before)


def script(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def test_a_plain_script_waits_for_its_jobs_at_exit() -> None:
    done = script(
        "import time, sys\n"
        "from gracehooks import jobs\n"
        "def inner(): time.sleep(0.1); print('inner')\n"
        "def work(): time.sleep(0.2); jobs.submit(inner); print('outer', flush=True)\n"
        "jobs.submit(work)\n"
        "jobs.popen([sys.executable, '-Sc', 'import time; time.sleep(0.4); print(\"child\", flush=True)'])\n"
        "print('main', flush=True)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["main", "outer", "inner", "child"]
    assert done.stderr == ""


def test_a_plain_script_does_not_wait_for_ever() -> None:
    started = time.monotonic()
    done = script(
        "import time\nfrom gracehooks import jobs\njobs.submit(time.sleep, 3600)\njobs.popen(['sleep', '3600'])\n",
        GRACEHOOKS_JOB_TIMEOUT="0.3",
    )
    assert time.monotonic() - started < 30
    assert "gracehooks: thread 1 (sleep) was abandoned" in done.stderr
    assert "gracehooks: process 2 (sleep 3600)" not in done.stderr, "it ended when it was told to stop"
