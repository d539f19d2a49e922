"""Child processes that are born in a request: whatever starts them (Popen, fork, multiprocessing, uvloop) is patched.

What must hold: a child is known, as a job or as infrastructure, before anybody looks for strays; one start is counted
once, also where one of these calls another.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gracehooks import requests
from gracehooks.jobs import tracker
from gracehooks.jobs.children import PROCESS, adopted, attach, name_of, stop_watching
from gracehooks.jobs.descendants import a_start, not_jobs, note_children, note_infrastructure
from gracehooks.jobs.imports import when_imported
from gracehooks.jobs.infrastructure import is_infrastructure
from gracehooks.jobs.processes import starting
from gracehooks.jobs.tracker import Tracker, Work
from gracehooks.scoreboard import Outcome

__all__ = ["patch", "unpatch"]

_in_request = requests._current.get
_in_job = tracker.mark.get
#: In the place of a job: a child that is being started and is none.
_UNCOUNTED = object()

_undo: list[Callable[[], object]] = []


def _born(count: bool) -> Tracker | None:
    if not count or (_in_job() is None and _in_request() is None):
        return None
    return tracker.current()


@contextmanager
def _birth(count: bool, name: Callable[[], str]) -> Iterator[Birth]:
    """One start of a child, as a job where it is born in a request; what it calls to start it is not counted again."""
    found = _born(count)
    birth = Birth(found.begin(PROCESS, name()) if found is not None else None)
    with a_start():
        token = starting.set(birth.work or _UNCOUNTED)
        try:
            yield birth
        except BaseException:
            if birth.work is not None:
                birth.work.tracker.finish(birth.work, Outcome.FAILED)
            raise
        finally:
            starting.reset(token)


class Birth:
    """A child that is being started: `work` is its job, None where it is none."""

    def __init__(self, work: Work | None) -> None:
        self.work = work

    def of(self, pid: int, owner: Any, *, leads_group: bool = False) -> None:
        """It has this pid now, and its exit code belongs to `owner`."""
        if self.work is None:
            note_infrastructure(pid)
        else:
            attach(self.work, pid, owner, leads_group=leads_group)


def _patch_popen(count: bool) -> None:
    kind = subprocess.Popen  # gevent's, where it is patched in
    original = kind.__init__

    def __init__(self: Any, *args: Any, **keywords: Any) -> None:  # noqa: N807
        if starting.get() is not None:
            original(self, *args, **keywords)
            return
        with _birth(count, lambda: name_of(args[0] if args else keywords.get("args", "process"))) as birth:
            original(self, *args, **keywords)
            leads = bool(keywords.get("start_new_session")) or keywords.get("process_group") == 0
            birth.of(self.pid, self, leads_group=leads)
            if birth.work is not None:
                caller = sys._getframe(1).f_globals.get("__name__", "")
                birth.work.handle.asyncio = caller.startswith("asyncio")

    kind.__init__ = __init__  # type: ignore[method-assign]
    _undo.append(lambda: setattr(kind, "__init__", original))


def _patch_forks(count: bool) -> None:
    for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp"):
        original = getattr(os, name, None)
        if original is not None:
            setattr(os, name, _counted(original, name, count))
            _undo.append(lambda name=name, original=original: setattr(os, name, original))  # type: ignore[misc]


def _counted(original: Any, name: str, count: bool) -> Any:
    """`os.fork` and its like, with the child known before anybody looks for strays."""

    @functools.wraps(original)
    def start(*args: Any, **keywords: Any) -> Any:
        if starting.get() is not None:  # a Popen's, or multiprocessing's
            return original(*args, **keywords)
        with _birth(count, lambda: name_of(args[:1]) if args else name) as birth:
            result = original(*args, **keywords)
            pid = result[0] if isinstance(result, tuple) else result
            if pid:  # in the parent
                birth.of(pid, None)
        return result

    return start


class _Exit:
    """A multiprocessing process as an owner of an exit code."""

    def __init__(self, process: Any) -> None:
        self._process = process

    @property
    def returncode(self) -> int | None:
        popen = self._process._popen
        return None if popen is None else popen.returncode

    def ask(self) -> int | None:
        """The exit code of one that the fork server started, which is no child of ours; it can be read only once."""
        code: int | None = self._process.exitcode
        return code


def _patch_multiprocessing(module: Any, count: bool) -> None:
    # The three ways to start one (fork, spawn, the fork server) have this in common, and no more.
    kind = module.BaseProcess
    original = kind.start
    if getattr(original, "__gracehooks__", False):
        return

    def start(self: Any) -> None:
        with _birth(count and not is_infrastructure(self._target), lambda: self.name) as birth:
            original(self)
            birth.of(self.pid, _Exit(self))

    start.__gracehooks__ = True  # type: ignore[attr-defined]
    kind.start = start
    _undo.append(lambda: setattr(kind, "start", original))


class _Transport:
    """A uvloop transport as an owner of an exit code."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    @property
    def returncode(self) -> int | None:
        code = self._transport.get_returncode()
        return code if code is None else int(code)


def _patch_uvloop(module: Any, count: bool) -> None:
    # uvloop forks by itself; asyncio's own loops come through Popen.
    for method in ("subprocess_exec", "subprocess_shell"):
        original = getattr(module.Loop, method)
        if getattr(original, "__gracehooks__", False):
            continue

        def patched(original: Any) -> Any:
            async def start(self: Any, protocol_factory: Any, *args: Any, **keywords: Any) -> Any:
                with _birth(count, lambda: name_of(args[0] if len(args) == 1 else args)) as birth:
                    transport, protocol = await original(self, protocol_factory, *args, **keywords)
                    birth.of(transport.get_pid(), _Transport(transport))
                return transport, protocol

            start.__gracehooks__ = True  # type: ignore[attr-defined]
            return start

        setattr(module.Loop, method, patched(original))
        _undo.append(lambda method=method, original=original: setattr(module.Loop, method, original))  # type: ignore[misc]


_counting: bool | None = None


def patch(*, count: bool) -> None:
    """Notice every child of this process from now on; with `count` those born in a request are jobs."""
    global _counting
    if _counting is not None:
        return
    _counting = count
    note_children()
    _patch_popen(count)
    _patch_forks(count)
    when_imported("multiprocessing.process", lambda module: _patch_multiprocessing(module, count))
    when_imported("uvloop", lambda module: _patch_uvloop(module, count))


def unpatch() -> None:
    """Put everything back; for tests."""
    global _counting
    _counting = None
    stop_watching()
    while _undo:
        _undo.pop()()
    not_jobs.clear()
    adopted.clear()
