"""`jobs.popen` and `jobs.run`, and `jobs.track` of a process: child processes that are jobs by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from gracehooks.jobs import tracker
from gracehooks.jobs.children import PROCESS, attach, name_of
from gracehooks.jobs.descendants import a_start, not_jobs
from gracehooks.jobs.tracker import Work
from gracehooks.scoreboard import Outcome

__all__ = ["popen", "run", "starting", "track_process"]

#: The job that a Popen of ours is made for.
starting: ContextVar[object] = ContextVar("gracehooks_starting", default=None)


def _popen(args: Any, stop_signal: int, keywords: dict[str, Any]) -> tuple[subprocess.Popen[Any], Work]:
    leads = True
    if keywords.get("start_new_session"):
        pass
    elif "process_group" in keywords:
        leads = keywords["process_group"] == 0
    elif sys.version_info >= (3, 11):
        keywords["process_group"] = 0
    else:
        keywords["start_new_session"] = True
    work = tracker.require().begin(PROCESS, name_of(args))
    with a_start():
        token = starting.set(work)
        try:
            process = subprocess.Popen(args, **keywords)
        except BaseException:
            work.tracker.finish(work, Outcome.FAILED)
            raise
        finally:
            starting.reset(token)
        attach(work, process.pid, process, stop_signal=stop_signal, leads_group=leads)
    return process, work


def popen(
    args: str | bytes | os.PathLike[str] | Sequence[str | bytes | os.PathLike[str]],
    *,
    stop_signal: int = signal.SIGTERM,
    **keywords: Any,
) -> subprocess.Popen[Any]:
    """Start a child process as a job, in a process group of its own.

    Takes what `subprocess.Popen` takes. When the jobs of this worker are told to stop, the group gets `stop_signal`.
    """
    return _popen(args, stop_signal, keywords)[0]


def run(
    args: str | bytes | os.PathLike[str] | Sequence[str | bytes | os.PathLike[str]],
    *,
    input: str | bytes | None = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    stop_signal: int = signal.SIGTERM,
    **keywords: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a child process as a job and wait for it; as `subprocess.run`, `timeout` in seconds.

    When it is told to stop, the return code is that of the stop signal, -15 for SIGTERM.
    """
    if input is not None:
        if keywords.get("stdin") is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        keywords["stdin"] = subprocess.PIPE
    if capture_output:
        if keywords.get("stdout") is not None or keywords.get("stderr") is not None:
            raise ValueError("stdout and stderr arguments may not be used with capture_output.")
        keywords["stdout"] = keywords["stderr"] = subprocess.PIPE
    process, work = _popen(args, stop_signal, keywords)
    with process:
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            _end(work, process)
            stdout, stderr = process.communicate()
            raise subprocess.TimeoutExpired(process.args, timeout or 0.0, output=stdout, stderr=stderr) from None
        except BaseException:
            _end(work, process)
            raise
    code = process.returncode
    if check and code:
        raise subprocess.CalledProcessError(code, process.args, output=stdout, stderr=stderr)
    return subprocess.CompletedProcess(process.args, code, stdout, stderr)


def _end(work: Work, process: subprocess.Popen[Any]) -> None:
    child = work.handle
    if child is not None and child.fd >= 0:
        child.send(signal.SIGKILL)
    else:
        process.kill()


def track_process(process: Any, name: str | None) -> None:
    """Count a child until it ends: a Popen, an asyncio or a multiprocessing process, or anything with a `pid`."""
    found = tracker.require()
    if getattr(process, "returncode", None) is not None or getattr(process, "exitcode", None) is not None:
        return
    work = found.begin(PROCESS, name or name_of(getattr(process, "args", None) or getattr(process, "name", "process")))
    attach(work, process.pid, process)
    not_jobs.pop(process.pid, None)
