"""The end of an interpreter, without the teardown of its modules: that takes longer than all the rest of an idle stop.

What must hold: what the application wrote to a file that it left open is in the file afterwards, as a teardown, which
closes every file, would have it. Callbacks of atexit and the flush of the logs are not left out. Knows no server.
"""

from __future__ import annotations

import _io
import atexit
import fcntl
import gc
import io
import logging
import os
import stat
from typing import Any

__all__ = ["flush_files", "leave_out_at_exit"]

#: Where the kernel lists the descriptors of a process; also where there is no /proc.
DESCRIPTORS = "/dev/fd"


def flush_files() -> None:
    """Flush the files that this process has open, those of text first, which write into others.

    They are looked for among all objects, which touches every page that is still shared with the parent of a fork; so it
    is done only where a file is open for writing that is no log's.
    """
    if not _has_files():
        return
    files: list[Any] = [each for each in gc.get_objects() if issubclass(type(each), _io._IOBase)]
    for each in sorted(files, key=lambda each: not issubclass(type(each), io.TextIOBase)):
        try:
            each.flush()
        except Exception:  # noqa: BLE001 - closed, or its other end is
            continue


def _has_files() -> bool:
    try:
        descriptors = set(map(int, os.listdir(DESCRIPTORS)))
    except (OSError, ValueError):
        return True
    return any(map(_may_be_a_buffers, descriptors - {0, 1, 2} - _of_logs()))


def _of_logs() -> set[int]:
    found = set()
    for reference in list(logging._handlerList):  # type: ignore[attr-defined]
        try:
            found.add(reference().stream.fileno())
        except (AttributeError, OSError, ValueError):
            continue
    return found


def _may_be_a_buffers(descriptor: int) -> bool:
    try:
        status = os.fstat(descriptor)
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return False  # it was that of the directory
    return stat.S_ISREG(status.st_mode) and status.st_nlink > 0 and mode != os.O_RDONLY


def leave_out_at_exit() -> None:
    """From now on, this process and what it forks end without the teardown.

    Not by a hard exit, which could not know the exit code: the collector is told that nothing is garbage, so that what is
    in a cycle, which every module with a function is, stays as it is.
    """
    atexit.unregister(_leave_out)
    atexit.register(_leave_out)


def _leave_out() -> None:
    flush_files()
    gc.disable()
    gc.freeze()
