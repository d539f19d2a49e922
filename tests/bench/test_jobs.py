"""What jobs cost: each measurement in a process of its own, the best of several rounds of CPU time, plain and tracked in turns.

`pytest -m bench tests/bench/test_jobs.py -s` prints the figures. The aims are those of the design on a quiet machine; what is
asserted is the aim with slack for one that is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.bench

COMMON = """
import asyncio, gc, json, logging, resource, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from gracehooks import jobs, requests
from gracehooks.deadline import Deadline
from gracehooks.scoreboard import Page
from gracehooks.settings import Settings

NUMBER, ROUNDS = 1000, 15


def nothing():
    pass


async def nothing_async():
    pass


def best(*turns):
    found = [float("inf")] * len(turns)
    for _ in range(ROUNDS):
        for number, turn in enumerate(turns):
            started = time.process_time()
            turn()
            found[number] = min(found[number], (time.process_time() - started) / NUMBER * 1e6)
    return found
"""

SUBMIT = """
def turn(pool):
    def submit():
        for future in [pool.submit(nothing) for _ in range(NUMBER)]:
            future.result()
    return submit

jobs.install(Page(), Settings(track="explicit"), logging.getLogger("bench"))
print(json.dumps(best(turn(ThreadPoolExecutor(4)), turn(jobs.Executor(4)))))
"""
THREADS = """
def start():
    for _ in range(NUMBER):
        thread = threading.Thread(target=nothing)
        thread.start()
        thread.join()

def in_request():
    ticket = requests.begin(page, "GET", "/")
    start()
    requests.end(ticket)

page = Page()
ROUNDS = 7
(plain,) = best(start)
jobs.install(page, Settings(), logging.getLogger("bench"))
print(json.dumps([plain, *best(start, in_request)]))
"""
TASKS = """
async def turn(create):
    for _ in range(NUMBER // 100):
        tasks = [create(nothing_async()) for _ in range(100)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)

async def in_request(create):
    ticket = requests.begin(page, "GET", "/")
    await turn(create)
    requests.end(ticket)

page = Page()
loop = asyncio.new_event_loop()
def run(coroutine_function, create):
    def once():
        loop.run_until_complete(coroutine_function(create()))
    return once
asyncio.set_event_loop(loop)
plain_one = lambda: asyncio.create_task
(plain,) = best(run(turn, plain_one))
jobs.install(page, Settings(), logging.getLogger("bench"))
print(json.dumps([plain, *best(run(turn, plain_one), run(turn, lambda: jobs.create_task), run(in_request, plain_one))]))
"""
MANY = """
def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

async def main(number):
    found = jobs.install(Page(), Settings(), logging.getLogger("bench"))
    before = memory()
    async def job():
        await asyncio.sleep(3600)
    for _ in range(number):
        jobs.create_task(job())
    await asyncio.sleep(0)
    used = memory() - before
    started = time.process_time()
    lost = await found.end_async(Deadline.after(60), 0)
    took = time.process_time() - started
    counts = found.counts()
    assert counts["cancelled"] + counts["succeeded"] == number and not lost, counts
    print(json.dumps([used / number, took / number * 1e6]))

asyncio.run(main(int(sys.argv[1])))
"""


def measured(script: str, *args: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + script, *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(isinstance(each, float) for each in found)
    return list(found)


def test_submit() -> None:
    pool, ours = measured(SUBMIT)
    print(f"\nsubmit and result: ThreadPoolExecutor {pool:.1f} µs, jobs.Executor {ours:.1f} µs (aim: at most 5 more)")
    assert ours < pool + 5 + 5


def test_thread_start() -> None:
    plain, outside, inside = measured(THREADS)
    print(
        f"\nThread.start and join: {plain:.1f} µs, outside of a request {outside:.1f}, in one {inside:.1f} (aim: 2 more)"
    )
    assert outside < plain * 1.3
    assert inside < plain * 1.3 + 5


def test_create_task() -> None:
    plain, outside, ours, inside = measured(TASKS)
    print(
        f"\na task, from create to done: asyncio {plain:.2f} µs, with gracehooks outside of a request {outside:.2f}, "
        f"jobs.create_task {ours:.2f} (aim: 2 more), asyncio.create_task in a request {inside:.2f}"
    )
    assert outside < plain + 1
    assert ours < plain + 2 + 6
    assert inside < plain + 2 + 6


def test_ten_thousand_jobs_in_flight() -> None:
    few_bytes, few_time = measured(MANY, "1000")
    many_bytes, many_time = measured(MANY, "10000")
    print(
        f"\n1,000 jobs in flight: {few_bytes:.0f} bytes and {few_time:.1f} µs each to end; "
        f"10,000: {many_bytes:.0f} bytes and {many_time:.1f} µs"
    )
    assert many_bytes < few_bytes * 2 + 1000, "memory grows linearly"
    assert many_time < few_time * 3 + 20, "the end grows linearly"
