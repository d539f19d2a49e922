"""What was lost, and where it stood: the worker's own account, as JSON on its page, which the master reads afterwards.

A request is known by what runs it: a thread (by its identifier), a greenlet or an asyncio task. Nothing here waits, and
nothing here takes a lock, since it runs while something is stuck. No query strings, no headers, no bodies. Knows no server.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from gracehooks.scoreboard import REPORT_ROOM, RequestInFlight

__all__ = ["as_json", "facts", "in_short", "in_words", "of_faulthandler", "where", "where_is_thread"]

#: The innermost frames that a report shows of one stack.
FRAMES = 12
#: The longest that one stack may be in a report, in characters, when the page has room for all.
LONGEST = 2000
#: How long a report may be with stacks, and without, in bytes; the page has some more room.
ROOM_FOR_STACKS, ROOM = 256 * 1024, REPORT_ROOM - 4096
_SERVERS = tuple(
    part.replace("/", os.sep)
    for part in (
        "/threading.py",
        "/concurrent/futures/thread.py",
        "/asyncio/",
        "-packages/gunicorn/",  # site-packages, and Debian's dist-packages
        "-packages/uvicorn",
        "-packages/gevent/",
        "/gracehooks/gunicorn/",
        "/gracehooks/jobs/",
        "/bin/gunicorn",
        "<frozen runpy>",
        "gevent/_",
    )
)
#: The same packages, where they are installed elsewhere.
_SERVER_PACKAGES = ("gunicorn", "uvicorn", "uvicorn_worker", "gevent")
#: What looks at a stack from its top, where a signal handler writes the report of the very thread that it interrupted.
_ONLOOKERS = tuple(part.replace("/", os.sep) for part in ("/gracehooks/drain/", "/gracehooks/gunicorn/"))
#: A frame as `faulthandler` writes it.
_FRAME = re.compile(r'(?m)^  File "(.*)", line (\d+) in (.*)$')
_LIBRARY = os.sep + "site-packages" + os.sep


def facts(request: RequestInFlight, handle: object, frames: Mapping[int, FrameType], main: int = 0) -> dict[str, Any]:
    """A request in flight as a report says it; `handle` is what runs it, `main` the thread of the event loop.

    One that the page does not count says so (`counted`): whoever reads page and report adds the two up.
    """
    return {
        "method": request.method,
        "path": request.path,
        "age": round(request.age, 3),
        "where": where(handle, frames, main),
        **({} if request.counted else {"counted": False}),
    }


def where(handle: object, frames: Mapping[int, FrameType] | None = None, main: int = 0) -> str:
    """Where a thread (its identifier), a greenlet or a task stands: one line a frame, innermost first; "" if unknown.

    A greenlet that runs at this moment stands where the thread `main` does.
    """
    if isinstance(handle, int):
        return where_is_thread(handle, frames)
    get_stack = getattr(handle, "get_stack", None)
    if get_stack is not None:
        return _of_task(handle)
    frame = getattr(handle, "gr_frame", None)
    if frame is not None:
        return _lines(_frames_of(frame))
    if handle is not None and hasattr(handle, "gr_frame"):
        return where_is_thread(main, frames)
    return ""


def where_is_thread(identifier: int, frames: Mapping[int, FrameType] | None = None) -> str:
    """Where the thread stands, one line a frame, innermost first; "" when there is no such thread."""
    frame = (sys._current_frames() if frames is None else frames).get(identifier)
    return "" if frame is None else _lines(_frames_of(frame))


def _frames_of(frame: FrameType | None) -> list[tuple[str, int, str]]:
    found: list[tuple[str, int, str]] = []
    while frame is not None and len(found) < 10 * FRAMES:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found


def in_short(thread: int, others: Iterable[Any] = ()) -> str:
    """Where the first of `others`, tasks or greenlets, stands that is in an application's code, else the thread.

    Three frames on one line, innermost first; "" where none is.
    """
    for found in (*map(_frames_of_other, others), _frames_of(sys._current_frames().get(thread))):
        frames = [each for each in _of_application(found) if not each[0].startswith("<frozen ")]
        if frames and not frames[0][0].endswith(os.sep + "selectors.py"):  # a loop that waits for the tasks
            return " < ".join(_in_lines(frames[:3]).splitlines())
    return ""


def _frames_of_other(each: Any) -> list[tuple[str, int, str]]:
    return _frames_of_task(each) if hasattr(each, "get_coro") else _frames_of(getattr(each, "gr_frame", None))


def _of_task(task: Any) -> str:
    return _lines(_frames_of_task(task))


def _frames_of_task(task: Any) -> list[tuple[str, int, str]]:
    """The coroutines of a task, innermost first: each frame awaits the one before it."""
    found: list[tuple[str, int, str]] = []
    awaited = task.get_coro()
    while awaited is not None and len(found) < 10 * FRAMES:
        frame = (
            getattr(awaited, "cr_frame", None)
            or getattr(awaited, "gi_frame", None)
            or getattr(awaited, "ag_frame", None)
        )
        if frame is None:
            break
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        awaited = (
            getattr(awaited, "cr_await", None)
            or getattr(awaited, "gi_yieldfrom", None)
            or getattr(awaited, "ag_await", None)
        )
    return found[::-1]


def _lines(found: list[tuple[str, int, str]]) -> str:
    return _in_lines(_of_application(found) or found)


def _of_application(found: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    # How the thread came to the application is the same for every request, and tells nobody anything.
    frames = list(found)
    directories = _directories()
    while frames and (any(part in frames[-1][0] for part in _SERVERS) or frames[-1][0].startswith(directories)):
        frames.pop()
    while frames and any(part in frames[0][0] for part in _ONLOOKERS):
        frames.pop(0)
    return frames


def _directories() -> tuple[str, ...]:
    files = (getattr(sys.modules.get(name), "__file__", None) for name in _SERVER_PACKAGES)
    return tuple(os.path.dirname(file) + os.sep for file in files if file)


def _in_lines(frames: list[tuple[str, int, str]]) -> str:
    return "\n".join(f"{_short(file)}:{line} in {name}" for file, line, name in frames[:FRAMES])[:LONGEST]


def of_faulthandler(text: str) -> str:
    """What `faulthandler` wrote of all threads, in our words; without those that stand in a server's code, or in ours.

    First comes the thread that got the signal, which is the one that crashed, if one did. faulthandler writes `Thread 0x…
    (most recent call first):` or `Current thread …`, and `  File "…", line N in name` for each frame. What cannot be read
    comes back as it is.
    """
    found = []
    for block in re.split(r"(?m)^(?=Thread |Current thread )", text):
        frames = _of_application([(file, int(line), name) for file, line, name in _FRAME.findall(block)])
        if frames:
            words = block.removeprefix("Current ").split()
            current = block.startswith("Current")
            title = f"Thread {words[1]}{' (it got the signal)' if current else ''}, at:\n    "
            found.append((not current, title + _in_lines(frames).replace("\n", "\n    ")))
    return "\n".join(each for _, each in sorted(found, key=lambda each: each[0])) or text


def _short(file: str) -> str:
    return file.rpartition(_LIBRARY)[2] if _LIBRARY in file else file


def as_json(requests: Iterable[Mapping[str, Any]], jobs: Iterable[Mapping[str, Any]], reason: str) -> str:
    """The report as the page takes it: where all does not fit, stacks are shortened, and then left out.

    And then half of the requests that the page counts, which are named by their slots as well, and so on; what is left is
    in no other place, and of that too many are cut.
    """
    requests, jobs = list(requests), list(jobs)
    for room, most in ((LONGEST, ROOM_FOR_STACKS), (400, ROOM_FOR_STACKS), (0, ROOM)):
        text = _as_json(_cut(requests, room), _cut(jobs, room), reason)
        if len(text) <= most:
            return text
    slotted = [each for each in requests if each.get("counted", True)]
    others = [each for each in requests if not each.get("counted", True)]
    while len(text) > ROOM and (slotted or others or jobs):
        if slotted:
            slotted = slotted[: len(slotted) // 2]
        else:
            others, jobs = others[: len(others) // 2], jobs[: len(jobs) // 2]
        text = _as_json(_cut(others + slotted, 0), _cut(jobs, 0), reason)
    return text


def _as_json(requests: list[dict[str, Any]], jobs: list[dict[str, Any]], reason: str) -> str:
    return json.dumps({"reason": reason, "requests": requests, "jobs": jobs}, default=str)


def _cut(entries: Iterable[Mapping[str, Any]], room: int) -> list[dict[str, Any]]:
    return [{**each, "where": str(each.get("where") or "")[:room]} for each in entries]


def in_words(lost: Mapping[str, Any]) -> str:
    """One line a request or job, for the log."""
    lines = [f"{each['method']} {each['path']}, {each['age']:.1f} s{_at(each)}" for each in lost["requests"]]
    lines += [f"job {each['id']} ({each['name']}), {each['age']:.1f} s{_at(each)}" for each in lost["jobs"]]
    return "\n".join(lines)


def _at(each: Mapping[str, Any]) -> str:
    stack = str(each.get("where") or "")
    return ", at:\n    " + stack.replace("\n", "\n    ") if stack else ""
