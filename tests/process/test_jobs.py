"""Jobs on real servers, all five classes: stuck ones, the order of the end, services, preloading, a killed worker.

Where a test needs an application, it is one text for both worlds: `start(kind)` begins the work, and the WSGI or the ASGI
layer answers at once.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kit import Server, apps, eventually, serve
from tests.kit.classes import CLASSES, LOOPS

FULL = "TEST_FULL" in os.environ

COMMON = """
import asyncio, functools, os, signal, subprocess, sys, threading, time
from pathlib import Path
import gracehooks
from gracehooks import jobs

HERE = Path(__file__).resolve().parent


def say(line):
    with open(HERE / "said.txt", "a") as file:
        file.write(line + "\\n")


"""


@contextmanager
def server(worker: str, source: str, config: str = "", workers: int = 1, **more: Any) -> Iterator[Server]:
    """A server whose application answers with `answer(kind)` of `source`."""
    app = COMMON + source + apps.answering(worker)
    with serve(app, config, worker=worker, workers=workers, **more) as running:
        yield running


def said(running: Server) -> list[str]:
    try:
        return (running.dir / "said.txt").read_text().splitlines()
    except FileNotFoundError:
        return []


def ended(running: Server) -> dict[str, Any]:
    """The jobs of the workers that have ended, in numbers, once the equation was checked for each."""
    total: dict[str, int] = {}
    for event in running.events():
        if event["event"] == "WorkerEnded":
            jobs = event["jobs"]
            assert jobs["accepted"] == sum(jobs[each] for each in ("succeeded", "failed", "cancelled", "abandoned")), (
                event
            )
            assert len(event["lost"]["jobs"]) == jobs["abandoned"], event
            for name, number in jobs.items():
                total[name] = total.get(name, 0) + number
    return total


STUCK = """
def hang(_):
    time.sleep(3600)


@jobs.job(on_abandon=hang)
def hanging():
    while True:
        time.sleep(3600)


def endless():
    time.sleep(0.05)
    threading.Thread(target=endless, name="endless").start()


def swallow_exit():
    import gevent
    while True:
        try:
            time.sleep(3600)
        except gevent.GreenletExit:
            pass


async def swallow():
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass


DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(3600)"
threading.excepthook = lambda args: None  # the last of the endless ones is refused, and would fill the log


def answer(kind):
    if kind == "jobs":
        return " ".join(sorted(work.kind for work in jobs.active()))
    pipe = None
    if kind == "thread":
        threading.Thread(target=functools.partial(time.sleep, 3600), name="in C").start()
    elif kind == "hanging":
        jobs.submit(hanging)
    elif kind == "endless":
        threading.Thread(target=endless, name="endless").start()
    elif kind == "task":
        asyncio.get_running_loop().create_task(swallow())
    elif kind == "greenlet":
        import gevent
        gevent.spawn(swallow_exit)
    elif kind == "child":
        pipe = subprocess.Popen([sys.executable, "-Sc", DEAF], stdout=subprocess.PIPE)
    elif kind == "group":
        pipe = jobs.popen([sys.executable, "-Sc", DEAF], stdout=subprocess.PIPE)
    elif kind == "grandchild":
        pipe = subprocess.Popen(["sh", "-c", f"setsid {sys.executable} -Sc '{DEAF}' & exit 0"], stdout=subprocess.PIPE)
    if pipe is not None:
        pipe.stdout.readline()
        if kind == "grandchild":
            pipe.wait()
    return kind


"""
BUDGET = "gracehooks.configure(drain_timeout=1, job_timeout=0.8, job_grace=0.2, cleanup_timeout=0.5)"


#: What is stuck, and as what it is reported: the endless ones are given up, or fail as the next one is refused.
KINDS = {
    "thread": "thread",
    "hanging": "thread",
    "endless": None,
    "child": "process",
    "group": "process",
    "grandchild": "process",
    "task": "task",
    "greenlet": "greenlet",
}


@pytest.mark.parametrize("kind", ["all", *KINDS] if FULL else ["all"])
@pytest.mark.parametrize("worker", CLASSES)
def test_whatever_is_stuck_is_reported_and_gone_within_the_budget(worker: str, kind: str) -> None:
    """All of it at once; TEST_FULL=1 does each alone as well."""
    kinds = [
        each
        for each in (KINDS if kind == "all" else [kind])
        if (each != "task" or worker in LOOPS) and (each != "greenlet" or "Gevent" in worker)
    ]
    if not kinds:
        pytest.skip("not on this class")
    with server(worker, STUCK, BUDGET) as running:
        for each in kinds:
            running.get("/" + each)
        started = time.monotonic()
        running.stop()
        took = time.monotonic() - started
        assert took < 2.3 + 1 + 3, "the budget, a second, and three for a busy machine"
        assert running.processes() == []
        lost = [job for event in running.events() if event["event"] == "WorkerEnded" for job in event["lost"]["jobs"]]
        expected = sorted(filter(None, (KINDS[each] for each in kinds)))
        assert sorted(job["kind"] for job in lost if job["name"] != "endless") == expected
        assert ("in C" in {job["name"] for job in lost}) == ("thread" in kinds)
        assert all(job["age"] > 0 and job["where"] and job["id"] for job in lost), lost
        assert ended(running)["abandoned"] == len(lost)
        print(f"\n{worker} {kind}: gone after {took:.2f} s of 2.3 + 1; load {os.getloadavg()[0]:.1f}")


def test_the_hammer_and_the_death_of_a_worker_leave_no_process() -> None:
    with server("gracehooks.Worker", STUCK, BUDGET) as running:
        for kind in ("child", "group", "grandchild", "thread"):
            running.get("/" + kind)
        # The grandchild shows as a job once its parent's end was looked into.
        eventually(lambda: running.get("/jobs").text == "process process process thread")
        mark = running.mark()
        (worker,) = running.workers()
        os.kill(worker, signal.SIGKILL)
        running.wait_for("WorkerEnded", after=mark, worker=worker)
        eventually(lambda: len(running.processes()) == 2, what="the master and the next worker alone")
        assert ended(running)["abandoned"] == 4
        for kind in ("child", "group", "grandchild"):
            running.get("/" + kind)
        pid = running.pid
        running.signal("INT")
        running.wait_gone(pid)
        eventually(lambda: not running.processes())
        assert ended(running)["abandoned"] == 7


CHILD = """
PROGRAM = "from gracehooks import jobs; jobs.submit(print, 'from the child', flush=True)"


def answer(kind):
    if kind == "go":
        done = jobs.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
        return done.stdout + done.stderr
    return kind


"""


def test_a_program_that_a_worker_starts_may_have_jobs_of_its_own() -> None:
    with server("gracehooks.Worker", CHILD) as running:
        assert running.get("/go").text == "from the child\n"


DETACHED = """
STAY = "import time; print(1, flush=True); time.sleep(3600)"
LINES = {
    "its parent has just left": "setsid PY & exit 0",
    "its parent left, its grandparent stays": "(setsid PY &); sleep 3600",
    "its parent stays in the group": "setsid PY & wait",
    "a deep one": "(sh -c '(setsid PY &); exit' &); sleep 3600",
}


def answer(kind):
    words = LINES[list(LINES)[int(kind)]].replace("PY", f'{sys.executable} -Sc "{STAY}"') if kind.isdigit() else ":"
    child = subprocess.Popen(["sh", "-c", words], stdout=subprocess.PIPE)
    child.stdout.readline()
    return kind


"""


@pytest.mark.parametrize("worker", CLASSES if FULL else ["gracehooks.Worker"])
def test_who_left_the_group_does_not_outlive_a_worker_that_is_killed_at_once(worker: str) -> None:
    with server(worker, DETACHED) as running:
        for _ in range(25 if FULL else 1):
            for kind in range(4):
                running.get(f"/{kind}")
            (worker_pid,) = running.workers()
            assert len(running.processes()) >= 6, "all four are there"
            mark = running.mark()
            os.kill(worker_pid, signal.SIGKILL)
            running.wait_for("WorkerEnded", after=mark, worker=worker_pid)
            eventually(lambda: len(running.processes()) == 2, 10, "the master and the next worker alone")
            eventually(lambda: running.get("/").status == 200)


AT_BOOT = """
import multiprocessing.shared_memory
multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,)).start()  # exit would join it
subprocess.Popen(["sleep", "3600"])
subprocess.Popen(["sh", "-c", "setsid sleep 3600 & exit"]).wait()
deaf = "trap '' TERM; echo; while :; do sleep 1; done"
subprocess.Popen(["sh", "-c", deaf], stdout=subprocess.PIPE).stdout.readline()
multiprocessing.shared_memory.SharedMemory("gracehooks" + str(os.getpid()), create=True, size=10)


def answer(kind):
    return " ".join(work.name for work in jobs.active())


"""


def test_what_was_started_at_boot_is_no_job_and_ends_with_its_worker() -> None:
    with server("gracehooks.Worker", AT_BOOT, "gracehooks.configure(job_timeout=60)") as running:
        assert running.get("/").text == ""
        (worker,) = running.workers()
        started = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - started < 25, "nobody waits for them"
        eventually(lambda: not running.processes())
        assert ended(running)["accepted"] == 0
        assert not Path(f"/dev/shm/gracehooks{worker}").exists(), "multiprocessing's own helper has cleaned up"


ORDER = """
open_now = True


@gracehooks.on_shutdown
def close():
    global open_now
    open_now = False
    say("closed")


def work(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)
    say("ended" if open_now else "LATE")


async def work_task(seconds):
    await asyncio.sleep(seconds)
    say("ended" if open_now else "LATE")


def answer(kind):
    for number in range(40):
        seconds = 0.2 + number * 0.002
        if kind == "task":
            jobs.create_task(work_task(seconds))
            asyncio.get_running_loop().create_task(work_task(seconds))
        elif kind == "jobs":
            jobs.submit(work, seconds)
            threading.Thread(target=work, args=(seconds,)).start()
    return str(time.monotonic())


"""


@pytest.mark.parametrize("worker", ["gracehooks.Worker", "gracehooks.GeventWorker", "gracehooks.UvicornWorker"])
def test_callbacks_come_after_the_last_job(worker: str) -> None:
    with server(worker, ORDER) as running:
        running.get("/task" if worker in LOOPS else "/jobs")
        running.stop()
        assert said(running) == ["ended"] * 80 + ["closed"]
        assert ended(running)["succeeded"] == 80


ENDS_OF_WORKERS = """
import random

open_now = True


@gracehooks.on_shutdown
def close():
    global open_now
    open_now = False
    note("closed")


def note(what):
    file = os.open(HERE / "said.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{what} {os.getpid()} {time.monotonic()}\\n".encode())
    os.close(file)


def use():
    note("used" if open_now else "LATE")


def work(seconds):
    time.sleep(seconds)
    use()


async def work_task(seconds):
    await asyncio.sleep(seconds)
    use()


def child(seconds):
    jobs.run(["sleep", str(seconds)])
    use()


def answer(kind):
    starts = [
        lambda: threading.Thread(target=work, args=(random.uniform(0, 0.1),)).start(),
        lambda: jobs.submit(work, random.uniform(0, 0.1)),
        lambda: jobs.submit(lambda: threading.Thread(target=work, args=(random.uniform(0, 0.1),)).start()),
        lambda: jobs.submit(child, random.uniform(0, 0.1)),
        lambda: jobs.submit(lambda: None).add_done_callback(lambda _: use()),
    ]
    if LOOP:
        starts.append(lambda: jobs.create_task(work_task(random.uniform(0, 0.1))))
        starts.append(lambda: asyncio.ensure_future(work_task(random.uniform(0, 0.1))))
    if kind:
        for start in random.choices(starts, k=4):
            start()
    return kind


"""
ENDS = int(os.environ.get("TEST_ENDS", "6"))


@pytest.mark.parametrize("worker", CLASSES)
def test_the_callback_that_closes_what_jobs_use_never_comes_before_the_last_job(worker: str) -> None:
    """TEST_ENDS (6) ends of workers; prints how long after its last job a worker has left."""
    took: list[float] = []
    with server(worker, f"LOOP = {worker in LOOPS}\n" + ENDS_OF_WORKERS, workers=2) as running:
        while len(took) < ENDS:
            eventually(lambda: len(_ready(running)) == 2, what="two workers")
            for _ in range(4):
                running.get("/work")
            mark = running.mark()
            left = _ends({pid: os.pidfd_open(pid) for pid in _ready(running)})
            for pid in left:
                running.wait_for("WorkerEnded", after=mark, worker=pid, reason="drained")
            lines = [line.split() for line in said(running)]
            (running.dir / "said.txt").unlink()
            for pid, moment in left.items():
                mine = [(what, float(at)) for what, owner, at in lines if int(owner) == pid]
                assert [what for what, _ in mine] == ["used"] * (len(mine) - 1) + ["closed"]
                took.append(moment - max([at for _, at in mine[:-1]], default=mine[-1][1]))
        running.stop()
        assert ended(running)["succeeded"] == ended(running)["accepted"]
    took.sort()
    print(
        f"\n{worker}: {len(took)} ends, left after the last job: median {took[len(took) // 2]:.3f} s, "
        f"95 % {took[int(len(took) * 0.95)]:.3f} s, worst {took[-1]:.3f} s; load {os.getloadavg()[0]:.1f}"
    )


def _ends(workers: dict[int, int]) -> dict[int, float]:
    """Send TERM to each worker of pid and pidfd; when each has ended."""
    found: dict[int, float] = {}
    poll = select.poll()
    for pid, descriptor in workers.items():
        poll.register(descriptor, select.POLLIN)
        os.kill(pid, signal.SIGTERM)
    while len(found) < len(workers):
        for descriptor, _ in poll.poll(60_000):
            found[next(pid for pid, each in workers.items() if each == descriptor)] = time.monotonic()
            poll.unregister(descriptor)
            os.close(descriptor)
    return found


SERVICE = """
@jobs.service
def consume(token):
    say("pulling")
    while not token.wait(0.02):
        pass
    time.sleep(0.2)  # what was pulled is finished
    jobs.run(["sh", "-c", f"sleep 0.2; echo child >> {HERE}/said.txt"])
    say("finished")


@jobs.service
async def consume_async(token):
    say("pulling async")
    while not await token.wait(60):
        pass
    await asyncio.sleep(0.1)
    say("finished async")


@gracehooks.on_shutdown
def close():
    say("closed")


def answer(kind):
    return kind


"""


@pytest.mark.parametrize("worker", CLASSES)
def test_services_run_in_every_worker_and_finish_what_they_have(worker: str) -> None:
    with server(worker, SERVICE) as running:
        eventually(lambda: sorted(said(running)) == ["pulling", "pulling async"])
        running.stop()
        assert sorted(said(running)[2:-1]) == ["child", "finished", "finished async"]
        assert said(running)[-1] == "closed"
        jobs = ended(running)
        assert (jobs["accepted"], jobs["succeeded"]) == (3, 3)


OTHER_KINDS = """
import importlib

HELD = []


def slowly(name):
    time.sleep(0.4)
    return name


def answer(kind):
    if kind != "go":
        return kind
    # All of it imported late, in the request.
    multiprocessing = importlib.import_module("multiprocessing")
    process = importlib.import_module("concurrent.futures.process")
    if not GEVENT:  # which stands still in these pools, whoever serves
        executor = process.ProcessPoolExecutor(1)
        pool = multiprocessing.Pool(1)
        HELD.extend([executor, pool])
        executor.submit(slowly, "executor").add_done_callback(lambda done: say(done.result()))
        pool.apply_async(slowly, ("pool",), callback=say)
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,), name="forked").start()
    threading.Timer(0.4, say, ("timer",)).start()
    threading.Timer(3600, say, ("late timer",)).start()
    if LOOP:
        HELD.append(asyncio.get_running_loop().create_task(child()))
    if GEVENT:
        import gevent
        sleep = gevent.monkey.get_original("time", "sleep")
        gevent.get_hub().threadpool.spawn(lambda: [sleep(0.4), say("gevent pool")])
    return kind


async def child():
    process = await asyncio.create_subprocess_exec("sh", "-c", "sleep 0.4; exit 7")
    say(f"child {await process.wait()}")


"""


@pytest.mark.parametrize("worker", CLASSES)
def test_pools_timers_and_forks_are_jobs_like_any_other(worker: str) -> None:
    source = f"LOOP = {worker in LOOPS}\nGEVENT = {'Gevent' in worker}\n" + OTHER_KINDS
    config = "gracehooks.configure(job_timeout=60, job_grace=2)"
    with server(worker, source, config) as running:
        running.get("/go")
        started = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - started < 40, "what waits for ever was told to stop, and did"
        eventually(lambda: not running.processes())
        more = ["gevent pool"] if "Gevent" in worker else ["executor", "pool"]
        more += ["child 7"] * (worker in LOOPS)
        assert sorted(said(running)) == sorted(["timer", *more])
        counts = ended(running)
        assert (counts["cancelled"], counts["abandoned"]) == (2, 0), counts
        assert counts["failed"] == (worker in LOOPS), "the child of the task"
        assert counts["succeeded"] == 1 + len(more), counts


PULLING = """
@jobs.service
def consume(token):
    say("pulled")
    jobs.run(["sh", "-c", f"sleep 0.4; echo done >> {HERE}/said.txt"])
    token.wait()


def answer(kind):
    return kind


"""
#: TERM when the boot is over and the loop has not begun: once, in the first worker.
EARLY = """
import os, signal


def post_worker_init(worker):
    name = "listen" if hasattr(worker, "listen") else "serve"
    stock = getattr(worker, name)

    def told():
        try:
            os.mkdir("told")
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        return stock()

    setattr(worker, name, told)
"""


@pytest.mark.parametrize("worker", CLASSES)
def test_a_worker_that_is_told_to_leave_before_it_serves_begins_no_service(worker: str) -> None:
    with server(worker, PULLING, EARLY) as running:
        running.wait_for("WorkerEnded")
        eventually(lambda: "pulled" in said(running))
        running.stop()
        assert said(running) == ["pulled", "done"], "by the second worker"
        assert ended(running) | {"accepted": 2, "succeeded": 2} == ended(running)


PRELOADED = """
try:
    jobs.submit(say, "in the master")
except jobs.JobRejected as error:
    say(f"refused: {error}")


@jobs.service
def consume(token):
    say("service")
    token.wait()


def answer(kind):
    if kind == "job":
        jobs.submit(say, "in a worker")
    return kind


"""


def test_a_job_that_is_submitted_while_the_master_preloads_is_refused() -> None:
    with server("gracehooks.Worker", PRELOADED, "preload_app = True") as running:
        running.get("/job")
        eventually(lambda: len(said(running)) == 3)
        assert said(running)[0].startswith("refused: a job was submitted in the master")
        assert sorted(said(running)[1:]) == ["in a worker", "service"]
        running.stop()
        assert ended(running)["accepted"] == 2


LEDGER = """
import random, itertools

NUMBERS = itertools.count()


def note(line):
    file = os.open(HERE / "ledger.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (line + "\\n").encode())
    os.close(file)


def work(name, seconds, fails):
    job = f"{os.getpid()} {jobs.current().id}"
    note(f"begun {job}")
    try:
        if seconds > 1 and jobs.current().wait(seconds):
            jobs.current().raise_if_set()
        time.sleep(min(seconds, 1))
        if fails:
            raise RuntimeError("as asked")
    except BaseException as error:
        note(f"{'failed' if isinstance(error, RuntimeError) else 'cancelled'} {job}")
        raise
    note(f"ended {job}")


async def work_task(name, seconds, fails):
    job = f"{os.getpid()} {jobs.current().id}"
    note(f"begun {job}")
    try:
        await asyncio.sleep(seconds)
        if fails:
            raise RuntimeError("as asked")
    except BaseException as error:
        note(f"{'failed' if isinstance(error, RuntimeError) else 'cancelled'} {job}")
        raise
    note(f"ended {job}")


def answer(kind):
    seconds, fails = random.choice([0.0, 0.05, 0.3, 30.0]), random.random() < 0.1
    what = random.choice(["thread", "submit", "nested", "popen", "child", "task", "create_task"])
    if what.endswith("task") and not LOOP:
        what = "thread"
    if what == "thread":
        threading.Thread(target=work, args=("x", seconds, fails)).start()
    elif what == "submit":
        jobs.submit(work, "x", seconds, fails)
    elif what == "nested":
        jobs.submit(lambda: threading.Thread(target=work, args=("x", seconds, fails)).start())
    elif what == "popen":
        jobs.popen(["sleep", str(seconds)])
    elif what == "child":
        subprocess.Popen(["sleep", str(seconds)])
    elif what == "task":
        asyncio.ensure_future(work_task("x", seconds, fails))
    else:
        jobs.create_task(work_task("x", seconds, fails))
    return what


threading.excepthook = lambda args: None
"""


STOPS = int(os.environ.get("TEST_STOPS", "6"))


@pytest.mark.parametrize("worker", CLASSES if STOPS > 6 else ["gracehooks.Worker", "gracehooks.GeventWorker", LOOPS[0]])
def test_the_equation_holds_whatever_ends_a_worker(worker: str) -> None:
    """TEST_STOPS (6) ends of workers each, in a random order that TEST_ORDER (1) seeds; with more, all the classes."""
    chance = random.Random(int(os.environ.get("TEST_ORDER", "1")))
    stops = STOPS
    config = "gracehooks.configure(drain_timeout=2, job_timeout=0.6, job_grace=0.3, cleanup_timeout=0.5, probation=0.1)"
    source = f"LOOP = {worker in LOOPS}\n" + LEDGER
    while stops > 0:
        with server(worker, source, config, workers=2) as running:
            for _ in range(min(stops, 6) - 1):
                _some_requests(running, chance)
                _one_end(running, chance)
            _some_requests(running, chance)
            pid = running.pid
            running.signal(chance.choice(["TERM", "INT"]), pid)
            running.wait_gone(pid)
            eventually(lambda: not running.processes())
            _compare(running)
        stops -= 6


def _some_requests(running: Server, chance: random.Random) -> None:
    for _ in range(chance.randint(5, 15)):
        running.get("/")


def _one_end(running: Server, chance: random.Random) -> None:
    what = chance.choice(["upgrade", "reload", "KILL", "TERM", "INT"])
    if what in ("upgrade", "reload"):
        assert getattr(running, what)()["event"] == "UpgradeCompleted"
        return
    # One that boots would take the signal with the master's handlers, which it has still.
    eventually(lambda: len(_ready(running)) >= 2, what="two workers")
    mark = running.mark()
    worker = chance.choice(_ready(running))
    os.kill(worker, getattr(signal, f"SIG{what}"))
    running.wait_for("WorkerEnded", after=mark, worker=worker)


def _ready(running: Server) -> list[int]:
    """The workers that have told their master so; one may be leaving already."""
    last = {event["worker"]: event["event"] for event in running.events() if "worker" in event}  # pids come again
    return [pid for pid in running.workers() if last.get(pid) == "WorkerReady"]


def _compare(running: Server) -> None:
    """What the workers' ends say against what the jobs themselves wrote down."""
    ended(running)
    ledger: dict[str, set[tuple[int, int]]] = {"begun": set(), "ended": set(), "failed": set(), "cancelled": set()}
    for line in (running.dir / "ledger.txt").read_text().splitlines():
        what, pid, number = line.split()
        ledger[what].add((int(pid), int(number)))
    ends = {event["worker"]: event for event in running.events() if event["event"] == "WorkerEnded"}
    assert {pid for pid, _ in ledger["begun"]} <= set(ends)
    lost = {(pid, job["id"]) for pid, event in ends.items() for job in event["lost"]["jobs"]}
    unfinished = ledger["begun"] - ledger["ended"] - ledger["failed"] - ledger["cancelled"]
    assert unfinished <= lost, "nothing is lost in silence"
    for pid, event in ends.items():
        jobs = event["jobs"]
        mine = {what: sum(1 for each, _ in found if each == pid) for what, found in ledger.items()}
        assert jobs["accepted"] >= mine["begun"]
        # A job that has just written its line may be given up before it is counted.
        for what, count in (("failed", "failed"), ("cancelled", "cancelled"), ("ended", "succeeded")):
            assert mine[what] <= jobs[count] + jobs["abandoned"], (event, mine)
        if event["reason"] == "drained":
            assert not event["lost"]["jobs"]
            assert jobs["abandoned"] == 0


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "target", "worker", "paths"),
    [
        ("jobs_flask", "app", "gracehooks.Worker", ["/orders/5/mail"]),
        ("jobs_django", "application", "gracehooks.SyncWorker", ["/exports"]),
        ("jobs_fastapi", "app", "gracehooks.UvicornWorker", ["/mails", "/pings"]),
    ],
)
def test_the_examples_run(name: str, target: str, worker: str, paths: list[str]) -> None:
    source = (ROOT / f"examples/{name}.py").read_text()
    config = 'gracehooks.configure(ready_path="/healthz")'  # as examples/gunicorn.conf.py has it
    with serve("", config, worker, 1, files={f"{name}.py": source}, target=f"{name}:{target}") as running:
        for path in paths:
            assert running.get(path, method="GET" if path == "/exports" else "POST").status == 202
        assert running.stop() == 0
        assert ended(running)["succeeded"] == len(paths)


BACKGROUND = """
import asyncio, time
from pathlib import Path
from fastapi import BackgroundTasks, FastAPI
from starlette.middleware.base import BaseHTTPMiddleware

app = FastAPI()
HERE = Path(__file__).resolve().parent


class Middle(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        return await call_next(request)


app.add_middleware(Middle)


@app.get("/")
async def index():
    return "ok"


@app.get("/background")
async def background(tasks: BackgroundTasks):
    tasks.add_task(work)
    tasks.add_task(plain)
    return "ok"


async def work():
    try:
        await asyncio.sleep(0.4)
        said("task")
    except BaseException as error:
        said(repr(error))
        raise


def plain():
    time.sleep(0.4)
    said("thread")


def said(line):
    with open(HERE / "said.txt", "a") as file:
        file.write(line + "\\n")
"""


@pytest.mark.parametrize("worker", LOOPS)
@pytest.mark.parametrize("stop", [False, True], ids=["while it serves", "while it stops"])
def test_background_tasks_survive_a_client_that_leaves(worker: str, stop: bool) -> None:
    config = "asgi_disconnect_grace_period = 0"
    with serve(BACKGROUND, config, worker=worker, workers=1) as running:
        assert running.get("/background").status == 200  # and closes
        if not stop:
            eventually(lambda: said(running) == ["task", "thread"])
        started = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - started < 5 + 3, "waited for once, not for each of two budgets"
        assert said(running) == ["task", "thread"]
        counts = ended(running)
        assert counts["abandoned"] == counts["cancelled"] == 0
