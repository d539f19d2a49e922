"""Child processes: noticed, told, killed, never robbed of their exit codes; strays are found."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gracehooks import jobs
from gracehooks.errors import JobRejected
from gracehooks.jobs import children as handles
from gracehooks.jobs import descendants
from gracehooks.jobs.children import name_of
from gracehooks.jobs.tracker import Tracker
from tests.kit import eventually
from tests.kit.processes import alive
from tests.unit.jobs_bench import balanced, end, request, worker

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(3600)"
)


@pytest.fixture
def found() -> Iterator[Tracker]:
    with worker() as tracker:
        yield tracker


@pytest.fixture(params=["pidfd", "no pidfd"])
def pidfd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no pidfd":
        monkeypatch.setattr(handles, "_HAS_PIDFD", False)
    return str(request.param)


def python(code: str) -> list[str]:
    return [sys.executable, "-Sc", code]


def test_children_that_are_born_in_a_request_are_jobs_and_keep_their_exit_codes(found: Tracker, pidfd: str) -> None:
    with request():
        children = [subprocess.Popen(["sh", "-c", f"read line; exit {code}"], stdin=subprocess.PIPE) for code in (0, 3)]
        assert [(work.kind, work.name) for work in jobs.active()] == [("process", "sh -c")] * 2
        assert subprocess.run(["true"], check=False).returncode == 0
        with pytest.raises(FileNotFoundError):
            subprocess.Popen(["/no/such/program"])
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    free = subprocess.Popen(["sleep", "3600"])
    try:
        assert end(found) == []
        assert [child.wait() for child in children] == [0, 3]
        assert free.poll() is None, "what was started outside of a request is left alone"
    finally:
        free.kill()
        assert free.wait() == -9
    counts = balanced(found)
    assert (counts["succeeded"], counts["failed"]) == (2, 2)


def test_a_child_that_nobody_waits_for_leaves_no_zombie(found: Tracker) -> None:
    with request():
        pid = subprocess.Popen(["true"]).pid
    eventually(lambda: not Path(f"/proc/{pid}").exists(), what="the child was reaped")
    assert end(found) == []
    assert balanced(found)["succeeded"] == 1


def test_popen_has_a_group_of_its_own_and_gets_its_stop_signal(found: Tracker, pidfd: str) -> None:
    code = (
        "import signal; wanted = {signal.SIGUSR1}; signal.pthread_sigmask(signal.SIG_BLOCK, wanted); "
        "print(1, flush=True); signal.sigtimedwait(wanted, 60)"
    )
    told = jobs.popen(python(code), stop_signal=signal.SIGUSR1, stdout=subprocess.PIPE)
    shell = jobs.popen(["sh", "-c", "sleep 3600; true"])
    assert os.getpgid(told.pid) == told.pid
    assert told.stdout is not None
    told.stdout.readline()
    assert end(found, 60, 0.05) == []
    assert told.wait() == 0
    assert shell.wait() == -15, "the whole group got it"
    told.stdout.close()
    counts = balanced(found)
    assert (counts["succeeded"], counts["cancelled"]) == (1, 1)
    with pytest.raises(JobRejected):
        jobs.popen(["true"])


def test_what_ignores_its_stop_signal_is_reported_and_killed(found: Tracker) -> None:
    with request():
        children = [
            subprocess.Popen(python(STUBBORN), stdout=subprocess.PIPE),
            jobs.popen(python(STUBBORN), stdout=subprocess.PIPE),
        ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
    lost = end(found, 0.1, 0)
    assert [each.kind for each in lost] == ["process", "process"]
    assert [f"pid {child.pid} " in each.where for each, child in zip(lost, children, strict=True)] == [True, True]
    assert [child.wait(60) for child in children] == [-9, -9]
    assert balanced(found)["abandoned"] == 2


def test_a_grandchild_that_has_left_the_group_and_lost_its_parent_is_waited_for(found: Tracker, tmp_path: Path) -> None:
    done = tmp_path / "done"
    with request():
        subprocess.Popen(["sh", "-c", f"setsid sh -c 'sleep 0.4; echo > {done}' & exit 0"]).wait()
    eventually(lambda: len(found) == 0)
    assert end(found) == []
    assert done.exists()
    counts = balanced(found)
    assert (counts["accepted"], counts["succeeded"]) == (2, 2)


def test_a_stray_that_stays_is_told_reported_and_killed(found: Tracker, tmp_path: Path) -> None:
    code = f"import os, time; os.setsid(); open('{tmp_path}/pid', 'w').write(str(os.getpid())); {STUBBORN}"
    with request():
        subprocess.Popen(["sh", "-c", f'{sys.executable} -Sc "{code}" & exit 0'], stdout=subprocess.DEVNULL).wait()
    eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    time.sleep(0.1)  # SIG_IGN comes a moment after the file; too early is a test that tests less, never a failure
    lost = end(found, 0.3, 0)
    assert [each.kind for each in lost] in (["process"], [])
    eventually(lambda: not alive(pid))
    balanced(found)


def test_run_is_subprocess_run(found: Tracker) -> None:
    assert jobs.run(["cat"], input=b"in", capture_output=True).stdout == b"in"
    assert jobs.run("exit 3", shell=True).returncode == 3
    assert jobs.run(["echo", "x"], capture_output=True, text=True).stdout == "x\n"
    with pytest.raises(subprocess.CalledProcessError):
        jobs.run(["false"], check=True)
    with pytest.raises(subprocess.TimeoutExpired):
        jobs.run(["sh", "-c", "sleep 3600; true"], timeout=0.05)
    with pytest.raises(ValueError, match="input"):
        jobs.run(["cat"], input=b"", stdin=subprocess.PIPE)
    assert end(found) == []
    counts = balanced(found)
    # The shell's `sleep` may be found as a stray while it dies.
    assert counts["succeeded"] == 2
    assert counts["failed"] in (3, 4)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_child_of_a_coroutine_is_a_job_and_the_loop_gets_the_exit_code(found: Tracker, loop: str) -> None:
    async def main() -> None:
        with request():
            child = await asyncio.create_subprocess_exec("sh", "-c", "read line; exit 4", stdin=subprocess.PIPE)
            assert [(work.kind, work.name) for work in jobs.active()] == [("process", "sh -c")]
            shell = await asyncio.create_subprocess_shell("exit 0")
        assert child.stdin is not None
        child.stdin.close()
        assert await child.wait() == 4
        assert await shell.wait() == 0
        await asyncio.to_thread(eventually, lambda: len(found) == 0)

    if loop == "uvloop":
        uvloop = pytest.importorskip("uvloop")
        uvloop.run(main())
    else:
        asyncio.run(main())
    assert end(found) == []
    counts = balanced(found)
    assert (counts["accepted"], counts["failed"], counts["succeeded"]) == (2, 1, 1)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("waits", [False, True], ids=["nobody asks", "joined"])
def test_each_way_of_multiprocessing_to_start_a_process_is_a_job(found: Tracker, method: str, waits: bool) -> None:
    context = multiprocessing.get_context(method)
    with request():
        good = context.Process(target=time.sleep, args=(0.1,), name="good")
        bad = context.Process(target=sys.exit, args=(3,), name="bad")
        good.start()
        bad.start()
    assert found.counts()["accepted"] == 2
    if waits:
        good.join()
        bad.join()
    assert end(found) == []
    counts = balanced(found)
    assert (counts["accepted"], counts["succeeded"], counts["failed"]) == (2, 1, 1)
    bad.join()
    good.join()
    assert (good.exitcode, bad.exitcode) == (0, 3)


def test_forks_and_multiprocessing_in_a_request_are_jobs(found: Tracker) -> None:
    context = multiprocessing.get_context("fork")
    reader, writer = os.pipe()
    with request():
        process = context.Process(target=os.read, args=(reader, 1), name="a process")
        process.start()
        pid = os.fork()
        if pid == 0:
            os._exit(7)
    outside = context.Process(target=time.sleep, args=(3600,))
    outside.start()
    assert [work.name for work in jobs.active()][:1] == ["a process"]
    os.write(writer, b"x")
    assert end(found) == []
    process.join()
    assert process.exitcode == 0
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert outside.is_alive()
    outside.kill()
    outside.join()
    os.close(reader)
    os.close(writer)
    counts = balanced(found)
    assert (counts["accepted"], counts["succeeded"], counts["failed"]) == (2, 1, 1)


def test_track_a_child(found: Tracker) -> None:
    child = subprocess.Popen(["cat", "-"], stdin=subprocess.PIPE)
    assert jobs.track(child) is child
    jobs.track(child)
    assert [work.name for work in jobs.active()] == ["cat -"]
    assert [each.pid for each in found.page.jobs()] == [child.pid]
    assert child.stdin is not None
    child.stdin.close()
    assert end(found) == []
    assert child.wait() == 0
    assert balanced(found)["succeeded"] == 1


def test_an_exit_by_force_counts_everything_and_leaves_no_process(found: Tracker) -> None:
    with request():
        children = [jobs.popen(["sleep", "3600"]), subprocess.Popen(["sh", "-c", "setsid sleep 3600 & wait"])]
    children.append(subprocess.Popen(["sleep", "3600"]))
    lost = found.abandon()
    assert [each.name for each in lost] == ["sleep 3600", "sh -c"]
    found.kill()
    assert [child.wait(60) for child in children] == [-9, -9, -9], "a shell does not see its child go before it"
    assert balanced(found)["abandoned"] == 2
    assert found.abandon() == []
    with pytest.raises(JobRejected):
        jobs.submit(int)


def test_a_child_that_ends_while_we_look_is_no_stray(found: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    real = descendants.scan
    child = jobs.popen(["cat"], stdin=subprocess.PIPE)

    def scan() -> dict[int, descendants.Seen]:
        seen = real()
        if child.stdin is not None and not child.stdin.closed:
            assert seen[child.pid].alive
            child.stdin.close()
            eventually(lambda: len(found) == 0, what="the end of the child, after it was seen alive")
        return seen

    monkeypatch.setattr(descendants, "scan", scan)
    descendants.Descendants().adopt(found)
    assert end(found) == []
    assert balanced(found)["accepted"] == 1


def test_zombies_that_were_adopted_are_reaped_and_owned_ones_are_not(
    found: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descendants, "ADOPTED_AFTER", 0.2)
    monkeypatch.setattr(handles, "LOOK_AFTER", 0.05)
    monkeypatch.setattr(handles, "_watcher", None)
    owned = subprocess.Popen(["true"])
    with request():
        subprocess.Popen(["sh", "-c", f"setsid sh -c 'echo $$ > {tmp_path}/pid' & exit 0"]).wait()
    eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    eventually(lambda: not Path(f"/proc/{pid}").exists(), what="the adopted zombie was reaped")
    assert Path(f"/proc/{owned.pid}").exists()
    assert owned.wait() == 0
    end(found)
    balanced(found)


def test_names_hold_no_secrets() -> None:
    assert name_of(["/usr/bin/curl", "-u", "user:secret"]) == "curl -u"
    assert name_of(["env", "TOKEN=secret"]) == "env"
    assert name_of("convert in.png out.png") == "convert in.png"
    assert name_of([]) == "process"
