"""The scoreboard: what the worker wrote, the master reads, also when the worker was killed between two stores."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from gracehooks.scoreboard import REPORT_ROOM, Order, Outcome, Page, Phase


@pytest.fixture
def page():
    made = Page(requests=4, jobs=3)
    yield made
    made.close()


def in_child(work):
    """Run `work` in a forked child that then kills itself, as the kernel would."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_fresh_page(page):
    assert page.phase is Phase.BOOTING
    assert page.order is Order.NONE
    assert not page.ready
    assert not page.wants_replacement
    assert page.failure == page.report == ""
    assert page.requests() == page.jobs() == []
    assert (page.begun, page.answered, page.in_flight, page.jobs_in_flight) == (0, 0, 0, 0)


def test_what_a_killed_worker_wrote_is_there(page):
    def work():
        page.phase = Phase.SERVING
        page.wants_replacement = True
        page.failure = "ValueError: nein, ü"
        page.report = '{"requests": []}'
        page.end(page.begin("GET", "/done"))
        page.begin("POST", "/pay?card=4711")
        page.job_end(page.job_begin(1, "thread", "first"), Outcome.SUCCEEDED)
        page.job_begin(2, "process", "ffmpeg")
        page.job_rejected()

    in_child(work)
    assert page.ready
    assert page.phase is Phase.SERVING
    assert page.phase_since > 0
    assert page.wants_replacement
    assert page.failure == "ValueError: nein, ü"
    assert page.report == '{"requests": []}'
    assert (page.begun, page.answered, page.in_flight) == (2, 1, 1)
    (request,) = page.requests()
    assert (request.method, request.path) == ("POST", "/pay")
    assert 0 <= request.age < 60
    (job,) = page.jobs()
    assert (job.id, job.kind, job.name) == (2, "process", "ffmpeg")
    assert page.counts() == {
        "accepted": 2, "succeeded": 1, "failed": 0, "cancelled": 0, "abandoned": 0, "rejected": 1,
    }  # fmt: skip


def test_the_master_writes_an_order_and_the_worker_reads_it(page):
    page.order = Order.STOP

    def work():
        page.phase = Phase.ENDED if page.order is Order.STOP else Phase.BOOTING

    in_child(work)
    assert page.phase is Phase.ENDED


def test_when_the_slots_run_out_the_numbers_stay_exact(page):
    slots = [page.begin("GET", f"/{number}") for number in range(6)]
    assert slots.count(-1) == 2
    assert page.in_flight == 6
    assert [each.path for each in page.requests()] == ["/0", "/1", "/2", "/3"]
    for slot in slots:
        page.end(slot)
    assert (page.begun, page.answered, page.in_flight) == (6, 6, 0)
    jobs = [page.job_begin(number, "task", f"job {number}") for number in range(5)]
    assert jobs.count(-1) == 2
    assert page.jobs_in_flight == 5
    for slot in jobs:
        page.job_end(slot, Outcome.CANCELLED)
    assert page.jobs_in_flight == 0
    assert page.count(Outcome.CANCELLED) == 5


def test_there_are_more_slots_up_to_a_bound_and_a_killed_worker_has_named_them():
    page = Page(requests=4, jobs=3, most_requests=10, most_jobs=7)

    def work():
        slots = [page.begin("GET", f"/{number}") for number in range(13)]
        assert slots.count(-1) == 3
        assert page.job_begin(0, "task", "job 0") > 0
        jobs = [page.job_begin(number, "task", f"job {number}") for number in range(1, 9)]
        assert jobs.count(-1) == 2
        page.end(slots[7])
        page.end(page.begin("GET", "/again"))
        page.job_end(jobs[5], Outcome.SUCCEEDED)

    in_child(work)
    assert sorted(each.path for each in page.requests()) == sorted(f"/{number}" for number in range(10) if number != 7)
    assert (page.begun, page.answered, page.in_flight) == (14, 2, 12)
    assert sorted(each.id for each in page.jobs()) == [0, 1, 2, 3, 4, 5]
    assert (page.jobs_accepted, page.jobs_in_flight) == (9, 8)
    page.close()


def test_threads_that_need_more_slots_at_once_lose_none():
    page = Page(requests=1, jobs=1, most_requests=4000, most_jobs=4000)
    begun = threading.Barrier(8)

    def work(first):
        begun.wait()
        for number in range(first, first + 400):
            assert page.begin("GET", f"/{number}") > 0
            assert page.job_begin(number, "thread", "j") > 0

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [1000 * first + number for first in range(8) for number in range(400)]
    assert sorted(int(each.path[1:]) for each in page.requests()) == expected
    assert sorted(each.id for each in page.jobs()) == expected
    page.close()


def test_the_oldest_are_listed_where_not_all_are(page):
    slots = [page.begin("GET", f"/{number}") for number in range(4)]
    jobs = [page.job_begin(number, "task", f"job {number}") for number in range(3)]
    page.end(slots[0])
    page.job_end(jobs[0], Outcome.SUCCEEDED)
    page.begin("GET", "/new")  # in the first slot again
    page.job_begin(9, "task", "new")
    assert [each.path for each in page.requests(2)] == ["/1", "/2"]
    assert [each.path for each in page.requests()] == ["/1", "/2", "/3", "/new"]
    assert [each.id for each in page.jobs(2)] == [1, 2]
    assert [each.id for each in page.jobs(3)] == [1, 2, 9]


def test_a_slot_is_named_anew(page):
    for number in range(20):
        slot = page.begin("GET" if number % 2 else "DELETE", f"/{number % 3}?{number}")
        (request,) = page.requests()
        assert (request.method, request.path) == ("GET" if number % 2 else "DELETE", f"/{number % 3}")
        page.end(slot)


@pytest.mark.parametrize("path", ["/" + "x" * 5000, "/" + "ü" * 60, "/\udcff", "", "?a=1"])
def test_any_path_can_be_read_back(page, path):
    page.begin("PROPPATCHING", path)
    (request,) = page.requests()
    assert len(request.path) <= 102
    assert "?a" not in request.path
    assert request.method == "PROPPATC"


def test_a_long_failure_is_cut_and_a_long_report_is_left_out(page):
    page.failure = "x" * 5000
    assert page.failure == "x" * 1024
    page.report = "{}"
    page.report = "x" * (REPORT_ROOM + 1)
    assert page.report == "{}"


def test_threads_lose_no_count():
    page = Page(requests=4, jobs=4)

    def work():
        for number in range(300):
            page.end(page.begin("GET", "/"))
            page.job_end(page.job_begin(number, "thread", "j"), Outcome.SUCCEEDED)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (page.begun, page.answered, page.in_flight) == (2400, 2400, 0)
    assert page.count(Outcome.SUCCEEDED) == page.jobs_accepted == 2400
    assert page.requests() == page.jobs() == []
    page.close()


def test_the_parts_do_what_begin_and_end_do(page):
    from time import monotonic

    pop, append, entries, name, write, memory = page.parts()
    for path in ("/a", "/b?x", "/b?x"):
        slot = pop()
        entry = entries[slot]
        if entry[:2] != [path, "GET"]:
            name(slot, "GET", path)
        state = entry[2]
        entry[2] = state + 256
        write(memory, slot, state, monotonic())
        (request,) = page.requests()
        assert (request.method, request.path) == ("GET", path[:2])
        assert request.age < 60
        memory[slot] = 0
        append(slot)
    page.end(page.begin("GET", "/c"))
    assert (page.begun, page.answered, page.in_flight) == (4, 4, 0)
