"""The report: where a thread, a task or a greenlet stands, and a text that always fits the page."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time

import pytest

from gracehooks.drain import report
from gracehooks.scoreboard import REPORT_ROOM, RequestInFlight


def test_where_a_thread_stands() -> None:
    begun, stop = threading.Event(), threading.Event()

    def stands_here() -> None:
        begun.set()
        stop.wait(60)

    thread = threading.Thread(target=stands_here)
    thread.start()
    begun.wait(60)
    try:
        text = report.where(thread.ident)
    finally:
        stop.set()
        thread.join()
    assert "stands_here" in text
    assert "_bootstrap" not in text, "how it came there tells nobody anything"
    assert report.where(thread.ident) == ""


def test_a_thread_that_reports_itself_stands_where_it_was_interrupted() -> None:
    first = report.where(threading.get_ident()).partition("\n")[0]
    assert first.endswith(" in test_a_thread_that_reports_itself_stands_where_it_was_interrupted"), first


def test_where_a_task_stands_innermost_first() -> None:
    async def inner() -> None:
        await asyncio.sleep(60)

    async def outer() -> None:
        await inner()

    async def main() -> str:
        task = asyncio.ensure_future(outer())
        await asyncio.sleep(0)
        try:
            return report.where(task)
        finally:
            task.cancel()

    text = asyncio.run(main())
    assert text.index(" in inner") < text.index(" in outer")


def test_where_a_greenlet_stands() -> None:
    gevent = pytest.importorskip("gevent")

    def stands_here() -> None:
        gevent.sleep(60)

    greenlet = gevent.spawn(stands_here)
    gevent.sleep(0)
    try:
        assert "stands_here" in report.where(greenlet)
    finally:
        greenlet.kill()


def test_unknown_is_empty() -> None:
    assert report.where(None) == ""
    assert report.where(object()) == ""
    assert report.where(0) == ""


def test_facts_and_words() -> None:
    request = RequestInFlight("GET", "/slow", time.monotonic() - 2.0)
    facts = report.facts(request, threading.get_ident(), sys._current_frames())
    assert (facts["method"], facts["path"]) == ("GET", "/slow")
    assert 2.0 <= facts["age"] < 60.0
    words = report.in_words({"requests": [facts], "jobs": [{"id": 3, "name": "mail", "age": 1.0, "where": ""}]})
    assert "GET /slow, 2." in words
    assert "test_facts_and_words" in words
    assert "job 3 (mail), 1.0 s" in words


@pytest.mark.parametrize("number", [1, 60, 256, 1000, 8192])
def test_it_fits_the_page_whatever_the_stacks(number: int) -> None:
    each = {"method": "GET", "path": "/" + "x" * 100, "age": 1.0, "where": "f.py:1 in f\n" * 200}
    text = report.as_json([each] * number, [], "drain_timeout")
    found = json.loads(text)
    assert len(found["requests"]) == number
    assert found["reason"] == "drain_timeout"
    assert len(text) < REPORT_ROOM
    assert len(found["requests"][0]["where"]) == (2000 if number <= 60 else 400 if number < 1000 else 0)


def test_what_has_no_slot_is_in_the_report_before_what_has_one() -> None:
    slotted = {"method": "GET", "path": "/" + "x" * 100, "age": 1.0, "where": ""}
    job = {"id": 1, "name": "j" * 80, "kind": "thread", "age": 1.0, "where": ""}
    text = report.as_json([slotted] * 20_000 + [{**slotted, "counted": False}] * 5000, [job] * 5000, "drain_timeout")
    found = json.loads(text)
    assert len(text) < REPORT_ROOM
    assert len(found["jobs"]) == 5000
    assert [each["counted"] for each in found["requests"] if "counted" in each] == [False] * 5000
    assert len(json.loads(report.as_json([], [job] * 60_000, "job_timeout"))["jobs"]) > 5000


def test_where_a_boot_stands_in_short() -> None:
    async def connect() -> None:
        await asyncio.sleep(60)

    async def lifespan() -> None:
        await connect()

    async def look() -> tuple[str, str]:
        task = asyncio.ensure_future(lifespan())
        await asyncio.sleep(0)
        found = report.in_short(0, [task]), report.in_short(0, [asyncio.current_task()])
        task.cancel()
        return found

    waits, _ = asyncio.run(look())
    assert " in sleep < " in waits
    assert " in connect < " in waits
    assert waits.endswith(" in lifespan")
    assert "in test_where_a_boot_stands_in_short" in report.in_short(threading.get_ident())
    assert report.in_short(0) == ""


def test_what_faulthandler_wrote_in_our_words() -> None:
    written = """Fatal Python error: Segmentation fault

Thread 0x00007fca0fefe6c0 (most recent call first):
  File "/srv/app/views.py", line 18 in wait
  File "/usr/lib/python3.11/threading.py", line 982 in run

Thread 0x00007fca0fefe6c1 (most recent call first):
  File "/usr/lib/python3/site-packages/gracehooks/drain/watchdog.py", line 160 in _run

Current thread 0x00007fca12458b80 (most recent call first):
  File "/srv/app/a place/views.py", line 7 in <lambda>
  File "/usr/lib/python3/site-packages/gunicorn/workers/sync.py", line 184 in handle_request

Extension modules: numpy.core._multiarray_umath (total: 1)"""
    assert report.of_faulthandler(written).splitlines() == [
        "Thread 0x00007fca12458b80 (it got the signal), at:",
        "    /srv/app/a place/views.py:7 in <lambda>",
        "Thread 0x00007fca0fefe6c0, at:",
        "    /srv/app/views.py:18 in wait",
    ]
    assert report.of_faulthandler("Fatal Python error: Aborted") == "Fatal Python error: Aborted"
