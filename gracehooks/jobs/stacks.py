"""Where a thread, a task or a greenlet stands, as one line: innermost call first."""

from __future__ import annotations

from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any

__all__ = ["of_coroutine", "of_frame"]

#: Calls that are shown; the innermost say what it waits for.
DEPTH = 8
#: The frames of those who run jobs say nothing about the job.
_OURS = ("/gracehooks/jobs/", "/threading.py", "/concurrent/futures/")


def of_frame(frame: FrameType | None) -> str:
    """The stack that ends in `frame`."""
    places = []
    while frame is not None:
        places.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    # Runners are cut off at the outer end only: a job may well stand in `threading.Event.wait`.
    while len(places) > 1 and places[-1][0].co_filename.endswith(".py") and _is_ours(places[-1][0]):
        places.pop()
    return _line(places)


def of_coroutine(coroutine: Any) -> str:
    """Where a suspended coroutine stands: the chain of what it awaits, down to the one that waits."""
    places = []
    seen = 0
    while coroutine is not None and seen < 100:
        seen += 1
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        frame = frame or getattr(coroutine, "ag_frame", None)
        if frame is not None:
            places.append((frame.f_code, frame.f_lineno))
        coroutine = (
            getattr(coroutine, "cr_await", None)
            or getattr(coroutine, "gi_yieldfrom", None)
            or getattr(coroutine, "ag_await", None)
        )
    places.reverse()
    return _line(places)


def _is_ours(code: CodeType) -> bool:
    return any(part in code.co_filename for part in _OURS)


def _line(places: Iterable[tuple[CodeType, int]]) -> str:
    listed = [f"{code.co_filename}:{line} in {code.co_name}" for code, line in places]
    return " < ".join(listed[:DEPTH]) + (" < …" if len(listed) > DEPTH else "")
