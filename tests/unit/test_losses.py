"""What a worker lost, read from its page after its end, with its own report where it could write one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from gracehooks.gunicorn.losses import Losses, OutOfMemory, losses_of
from gracehooks.scoreboard import Outcome, Page


@pytest.fixture
def page() -> Iterator[Page]:
    page = Page(requests=2, jobs=2)
    yield page
    page.close()


def test_a_worker_that_drained_lost_nothing(page: Page):
    page.end(page.begin("GET", "/"))
    page.job_end(page.job_begin(1, "thread", "mail"), Outcome.SUCCEEDED)
    found = losses_of(page, 7, "drained")
    assert found.lost == {"requests": [], "jobs": []}
    assert found.answered == 1
    assert found.jobs["accepted"] == found.jobs["succeeded"] == 1


def test_requests_and_jobs_in_flight_are_lost_by_name(page: Page):
    page.begin("GET", "/slow")
    page.job_begin(3, "thread", "mail")
    found = losses_of(page, 7, "killed by SIGKILL")
    (request,), (job,) = found.lost["requests"], found.lost["jobs"]
    assert (request["method"], request["path"], request["worker"], request["reason"]) == (
        "GET",
        "/slow",
        7,
        "killed by SIGKILL",
    )
    assert (job["id"], job["kind"], job["name"]) == (3, "thread", "mail")
    assert found.jobs["abandoned"] == 1
    assert found.jobs["accepted"] == sum(found.jobs[each] for each in ("succeeded", "failed", "cancelled", "abandoned"))


def test_what_had_no_slot_is_counted_without_a_name(page: Page):
    for number in range(5):
        page.begin("GET", f"/{number}")
        page.job_begin(number, "task", "t")
    found = losses_of(page, 7, "killed")
    assert len(found.lost["requests"]) == len(found.lost["jobs"]) == 5
    assert sum(each["path"] == "?" for each in found.lost["requests"]) == 3
    assert found.jobs["abandoned"] == 5


def test_requests_of_one_name_have_each_its_own_stack(page: Page):
    for _ in range(2):
        page.begin("GET", "/slow")
    told = [{"method": "GET", "path": "/slow", "age": 1.0, "where": f"view.py:{line}"} for line in (7, 9)]
    page.report = json.dumps({"requests": told, "jobs": []})
    assert [each["where"] for each in losses_of(page, 7, "drain timeout").lost["requests"]] == [
        "view.py:7",
        "view.py:9",
    ]


def test_a_job_whose_worker_was_killed_between_the_two_stores_of_its_end_counts_as_abandoned(page: Page):
    slot = page.job_begin(3, "thread", "mail")
    page._words[slot] += 1  # its slot is free, and how it ended was not written any more
    found = losses_of(page, 7, "killed by SIGKILL")
    assert found.jobs["accepted"] == found.jobs["abandoned"] == len(found.lost["jobs"]) == 1


def test_the_workers_own_report_adds_where_each_request_stood(page: Page):
    page.begin("GET", "/slow")
    report = {"requests": [{"method": "GET", "path": "/slow", "age": 0.0, "where": "view.py:7"}], "jobs": []}
    page.report = json.dumps(report)
    (request,) = losses_of(page, 7, "drain timeout").lost["requests"]
    assert request["where"] == "view.py:7"


def test_a_report_that_is_cut_off_does_not_hide_the_slots(page: Page):
    page.begin("GET", "/slow")
    page.report = '{"requests": [{"meth'
    assert len(losses_of(page, 7, "drain timeout").lost["requests"]) == 1


def test_a_job_of_the_report_is_not_counted_twice(page: Page):
    page.job_begin(3, "thread", "mail")
    page.report = json.dumps({"requests": [], "jobs": [{"id": 3, "name": "mail", "where": "job.py:1", "age": 1.0}]})
    (job,) = losses_of(page, 7, "job timeout").lost["jobs"]
    assert job["where"] == "job.py:1"


def test_losses_add_up():
    total = Losses()
    total.add(Losses({"requests": [{"path": "/a"}], "jobs": []}, {"accepted": 1}, 2))
    total.add(Losses({"requests": [], "jobs": [{"id": 1}]}, {"accepted": 2}, 3))
    assert total.lost == {"requests": [{"path": "/a"}], "jobs": [{"id": 1}]}
    assert (total.jobs, total.answered) == ({"accepted": 3}, 5)


def test_each_kill_for_want_of_memory_is_put_down_to_one_worker():
    kills = 3
    memory = OutOfMemory(lambda: kills)
    assert memory.reason() == "killed by SIGKILL"
    kills += 2
    assert memory.reason() == memory.reason() == "killed by the kernel: out of memory"
    assert memory.reason() == "killed by SIGKILL"


def test_a_kill_for_want_of_memory_that_no_worker_ended_by_is_forgotten():
    kills = 0
    memory = OutOfMemory(lambda: kills)
    memory.look(100.0)
    kills = 1  # a child of a job
    for now in (101.0, 105.0, 106.0):
        memory.look(now)
    kills += 1
    assert memory.reason() == "killed by the kernel: out of memory"  # which of the two it was cannot be known yet
    for now in (110.0, 115.0):
        memory.look(now)
    assert memory.reason() == "killed by SIGKILL"


def test_where_kills_cannot_be_counted_nothing_is_promised():
    assert "by hand, or out of memory" in OutOfMemory(lambda: -1).reason()


def test_what_was_given_up_and_not_reported_is_counted_without_a_name(page: Page):
    page.job_end(page.job_begin(1, "thread", "mail"), Outcome.ABANDONED)
    page.job_begin(2, "thread", "other")
    found = losses_of(page, 7, "killed")
    assert [(each["id"], each["name"]) for each in found.lost["jobs"]] == [(2, "other"), (0, "?")]
    assert found.jobs["abandoned"] == 2
