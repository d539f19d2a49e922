"""What jobs cost: each measurement in a process of its own, the best of many short rounds of CPU time, plain and tracked in
turns. `pytest -m bench -s tests/bench/test_jobs.py` prints the figures.

Two things are told of each: what the one who starts the job pays, which is what a request waits for; and what the whole
process pays until the job has ended and was counted. The aims are those of the first, on a quiet machine; for a task, whose
end is in the same thread, of both. What is asserted is the aim with slack for a machine that is not quiet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.bench

COMMON = """
import asyncio, json, logging, resource, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from gracehooks import jobs, requests
from gracehooks.deadline import Deadline
from gracehooks.jobs import tasks, threads, tracker
from gracehooks.scoreboard import Outcome, Page
from gracehooks.settings import Settings

ROUNDS = 150


def nothing():
    pass


async def nothing_async():
    pass


def best(turns):
    # Each turn gives (what its caller paid, what the process paid), in ns, and how many there were.
    found = {}
    for _ in range(ROUNDS):
        for name, turn in turns.items():
            figures = turn()
            paid = [each / figures[-1] / 1000 for each in figures[:-1]]
            found[name] = [min(pair) for pair in zip(paid, found.get(name, paid))]
    print(json.dumps(found))


caller, whole = time.thread_time_ns, time.process_time_ns
page = Page()


def in_request(turn):
    def there():
        ticket = requests.begin(page, "GET", "/")
        try:
            return turn()
        finally:
            requests.end(ticket)
    return there
"""

SUBMIT = """
def turn(pool, number=100):
    def submit():
        before, started = whole(), caller()
        futures = [pool.submit(nothing) for _ in range(number)]
        paid = caller() - started
        for future in futures:
            future.result()
        return paid, whole() - before, number
    return submit

jobs.install(page, Settings(track="explicit"), logging.getLogger("bench"))
best({"plain": turn(ThreadPoolExecutor(4)), "ours": turn(jobs.Executor(4))})
"""
THREADS = """
def turn(start, number=50):
    def threads_of_a_turn():
        paid, before = 0, whole()
        for _ in range(number):
            thread = threading.Thread(target=nothing)
            started = caller()
            start(thread)
            paid += caller() - started
            thread.join()
        return paid, whole() - before, number
    return threads_of_a_turn

found = jobs.install(page, Settings(), logging.getLogger("bench"))
plain = threads._start
tracked = threading.Thread.start

def code_alone(number=100):
    # Our lines without the start itself, whose waiting for the new thread and for the GIL hides them.
    threads._start = nothing_to_start
    all_of_them = [threading.Thread(target=nothing) for _ in range(number)]
    started = caller()
    for thread in all_of_them:
        tracked(thread)
    paid = caller() - started
    threads._start = plain
    for work in found.active():
        found.finish(work, Outcome.SUCCEEDED)
    return paid, number

def nothing_to_start(thread):
    pass

best({
    "plain": turn(plain), "outside": turn(tracked), "inside": in_request(turn(tracked)),
    "code": in_request(code_alone), "code outside": code_alone,
})
"""
TASKS = """
kind = sys.argv[1]
loop = asyncio.new_event_loop() if kind == "asyncio" else __import__("uvloop").new_event_loop()
jobs.install(page, Settings(), logging.getLogger("bench"))
owner = next(each for each in type(loop).__mro__ if each in tasks._originals)
plain, tracked = tasks._originals[owner], owner.create_task

def turn(method, create, number=100):
    async def tasks_of_a_turn():
        owner.create_task = method
        started = caller()
        for _ in range(number):
            create(nothing_async())
        paid = caller() - started
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        whole = caller() - started
        owner.create_task = tracked
        return paid, whole, number
    return lambda: loop.run_until_complete(tasks_of_a_turn())

best({
    "plain": turn(plain, asyncio.create_task), "outside": turn(tracked, asyncio.create_task),
    "inside": in_request(turn(tracked, asyncio.create_task)), "ours": turn(tracked, jobs.create_task),
})
"""
MANY = """
def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

async def main(number):
    found = jobs.install(page, Settings(), logging.getLogger("bench"))
    before = memory()
    async def job():
        await asyncio.sleep(3600)
    for _ in range(number):
        jobs.create_task(job())
    await asyncio.sleep(0)
    used = memory() - before
    assert found.page.jobs_in_flight == number
    started, wall = time.process_time(), time.monotonic()
    lost = await found.end_async(Deadline.after(60), 0)
    took, waited = time.process_time() - started, time.monotonic() - wall
    counts = found.counts()
    assert counts["cancelled"] == number and not lost, counts
    print(json.dumps({"job": [used / number, took / number * 1e6, waited]}))

asyncio.run(main(int(sys.argv[1])))
"""


def measured(script: str, *args: str) -> dict[str, list[float]]:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + script, *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def test_submit() -> None:
    found = measured(SUBMIT)
    (pool, pool_whole), (ours, ours_whole) = found["plain"], found["ours"]
    print(
        f"\nsubmit: ThreadPoolExecutor {pool:.2f} µs, jobs.Executor {ours:.2f}, {ours - pool:+.2f} (aim: 5); "
        f"to the result, all threads: {pool_whole:.2f} and {ours_whole:.2f}, {ours_whole - pool_whole:+.2f}"
    )
    assert ours < pool + 5 + 5


def test_thread_start() -> None:
    found = measured(THREADS)
    (plain, plain_whole), (outside, outside_whole), (inside, inside_whole) = (
        found[name] for name in ("plain", "outside", "inside")
    )
    (code,), (code_outside,) = found["code"], found["code outside"]
    print(
        f"\nThread.start in a request: our own lines {code:.2f} µs, outside of one {code_outside:.2f} (aim: 2); start as a "
        f"whole, the caller's CPU time: {plain:.1f}, outside of a request {outside:.1f}, in one {inside:.1f}, "
        f"{inside - plain:+.1f}; to the end of the thread, all threads: {plain_whole:.1f}, {outside_whole:.1f}, "
        f"{inside_whole:.1f}, {inside_whole - plain_whole:+.1f}"
    )
    assert code < 2 + 3
    assert outside < plain * 1.3
    assert inside < plain * 1.3 + 5


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_create_task(loop: str) -> None:
    found = measured(TASKS, loop)
    (plain, plain_whole), (outside, outside_whole), (ours, ours_whole), (inside, inside_whole) = (
        found[name] for name in ("plain", "outside", "ours", "inside")
    )
    print(
        f"\ncreate_task on {loop}: {plain:.2f} µs, with gracehooks outside of a request {outside:.2f}, jobs.create_task "
        f"{ours:.2f}, {ours - plain:+.2f}, asyncio.create_task in a request {inside:.2f}, {inside - plain:+.2f}; to its end: "
        f"{plain_whole:.2f}, {outside_whole:.2f}, {ours_whole:.2f}, {ours_whole - plain_whole:+.2f}, {inside_whole:.2f}, "
        f"{inside_whole - plain_whole:+.2f} (aim: 2)"
    )
    assert outside < plain + 1
    assert ours_whole < plain_whole + 2 + 4
    assert inside_whole < plain_whole + 2 + 4


def test_ten_thousand_jobs_in_flight() -> None:
    found = [(number, *measured(MANY, str(number))["job"]) for number in (1000, 3000, 10000)]
    print()
    for number, size, took, waited in found:
        print(
            f"{number} tasks in flight: {size:.0f} bytes each; {took:.1f} µs each to be told, to end and to be counted; "
            f"{waited:.3f} s in all"
        )
    (_, few_bytes, few_time, _), *_, (_, many_bytes, many_time, _) = found
    assert many_bytes < few_bytes * 2 + 1000, "memory grows linearly"
    assert many_time < few_time * 3 + 20, "the end grows linearly"
