"""The verified reload: new workers of the new configuration beside the old ones, in the same master.

What must hold: until every new worker is ready, nothing of the running configuration is touched that cannot be put back,
and a configuration file that raises, exits or hangs cannot take the master with it: a child reads it first.
It relies on `app.reload`, `Arbiter.setup` and `cfg.env_orig` (tests/contract/test_reload.py).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gunicorn import sock, util

from gracehooks import processes, settings
from gracehooks.gunicorn import pidfile
from gracehooks.gunicorn.successor import last_words
from gracehooks.gunicorn.workers.attached import attached
from gracehooks.scoreboard import Order
from gracehooks.upgrade.machine import Fact, Happened

if TYPE_CHECKING:
    from gracehooks.gunicorn.master import Grace

__all__ = ["CohortHost"]

#: What a reload changes on the arbiter, and puts back when it fails.
CARRIED = ("cfg", "worker_class", "address", "timeout", "proc_name", "LISTENERS")


class CohortHost:
    """The host of a reload."""

    kind = "reload"

    def __init__(self, grace: Grace) -> None:
        self._grace = grace
        self._arbiter = grace.arbiter
        self.cohort = grace.pool.cohort + 1
        self._probe = 0
        self._pipe = -1
        self._said = b""
        self._facts: list[Fact] = []
        self._old: dict[str, Any] = {}
        self._new: dict[str, Any] = {}
        self._workers: set[int] = set()
        self._told_ready = False
        self._rolling_back = False

    def preflight(self) -> None:
        """A reload has none: the child that reads the configuration is its preflight."""

    def launch(self, id: str) -> int:
        """Start the child that reads the configuration; its pid."""
        del id
        read_end, write_end = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._read_in_child(write_end, parent)
        os.close(write_end)
        os.set_blocking(read_end, False)
        self._probe, self._pipe = pid, read_end
        return pid

    def _read_in_child(self, pipe: int, parent: int) -> None:
        code = 1
        try:
            for each in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD):
                signal.signal(each, signal.SIG_DFL)
            os.dup2(pipe, 2)
            processes.signal_at_parents_end(signal.SIGKILL)  # a file that hangs must not outlive a killed master
            if os.getppid() != parent:
                return  # it was killed before that
            settings.forget()
            self._arbiter.app.reload()
            settings.resolve()
            self._arbiter.app.cfg.worker_class  # noqa: B018 - it is imported here, and may not be importable
            code = 0
        except SystemExit:
            pass
        except BaseException as error:  # noqa: BLE001 - the child of a fork never returns
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)

    def numbers(self) -> tuple[int, int]:
        """How many new workers are ready, and how many there will be."""
        workers = [worker for _, worker in self._grace.pool.members(self.cohort)]
        return sum(worker.page.ready for worker in workers), len(self._workers)

    def stands(self) -> str:
        """Where one of the new workers stands that are not ready."""
        return self._grace.pool.stands(self.cohort)

    def facts(self) -> Iterator[Fact]:
        """What became of the child, then of the new workers."""
        if self._probe:
            self._look_at_probe()
        elif self._workers and not self._told_ready and not self._rolling_back:
            ready, workers = self.numbers()
            if ready == workers:
                self._told_ready = True
                yield Fact(Happened.ALL_READY)
        if self._rolling_back and not self._probe and not self._workers & set(self._arbiter.WORKERS):
            self._facts.append(Fact(Happened.DIED))
        facts, self._facts = self._facts, []
        yield from facts

    def _look_at_probe(self) -> None:
        try:
            while data := os.read(self._pipe, 65536):
                self._said = (self._said + data)[-8192:]
        except OSError:
            pass
        try:
            pid, status = os.waitpid(self._probe, os.WNOHANG)
        except ChildProcessError:
            pid, status = self._probe, 0
        if not pid:
            return
        try:
            while data := os.read(self._pipe, 65536):
                self._said = (self._said + data)[-8192:]
        except OSError:
            pass
        os.close(self._pipe)
        self._probe, self._pipe = 0, -1
        if self._rolling_back:
            return
        if status != 0:
            words = last_words(self._said) or processes.describe_status(status)
            self._fail(f"the configuration cannot be read: {words}")
            return
        self._boot()

    def _fail(self, reason: str) -> None:
        self._facts.append(Fact(Happened.FAILED, reason))

    def _boot(self) -> None:
        """Read the configuration here too, now that it is known to be readable, and fork the new workers."""
        arbiter = self._arbiter
        self._old = {name: getattr(arbiter, name) for name in CARRIED}
        self._old_workers = arbiter.num_workers
        self._old_settings, self._old_recorded = self._grace.settings, settings.recorded()
        self._old_env = {key: os.environ.get(key) for key in arbiter.cfg.env}
        self._old_app_cfg = arbiter.app.cfg
        try:
            for key in arbiter.cfg.env:
                if key in arbiter.cfg.env_orig:
                    os.environ[key] = arbiter.cfg.env_orig[key]
                else:
                    os.environ.pop(key, None)
            settings.forget()
            arbiter.app.reload()
            chosen = settings.resolve()
            arbiter.setup(arbiter.app)
            arbiter.worker_class = attached(arbiter.worker_class)
            self._grace.settings = chosen
            settings.adopt(chosen)
            self._grace.apply_budget()
            if arbiter.cfg.address != self._old["address"]:
                self._open_listeners()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, the old goes on
            self._restore()
            self._fail(f"the configuration cannot be used: {type(error).__name__}: {error}")
            return
        self._new_workers = arbiter.num_workers
        self._new = {name: getattr(arbiter, name) for name in CARRIED}
        for _ in range(arbiter.num_workers):
            self._workers.add(self._grace.pool.spawn(self.cohort))
        # Until the commit the old configuration is in charge: a worker of it that dies is replaced by one of it.
        self._switch(self._old, self._old_workers)

    def _open_listeners(self) -> None:
        arbiter = self._arbiter
        old = {str(each.getsockname()): each for each in self._old["LISTENERS"]}
        found = []
        for address in arbiter.cfg.address:
            same = next((each for each in old.values() if each.cfg_addr == address), None)
            if same is None and isinstance(address, tuple):
                same = next(
                    (each for each in old.values() if tuple(each.getsockname()[:2]) == tuple(address[:2])), None
                )
            found.append(same if same is not None else sock._sock_type(address)(address, arbiter.cfg, arbiter.log))
        arbiter.LISTENERS = found

    def _switch(self, carried: dict[str, Any], workers: int) -> None:
        for name, value in carried.items():
            setattr(self._arbiter, name, value)
        self._arbiter.app.cfg = carried["cfg"]
        self._arbiter._num_workers = workers

    def worker_ended(self, pid: int, reason: str) -> None:
        """A new worker has ended before the commit."""
        del pid
        if not self._rolling_back:
            self._fail(reason)

    def commit(self) -> None:
        """The new configuration is in charge."""
        grace, arbiter = self._grace, self._arbiter
        old_listeners = self._old["LISTENERS"]
        self._leavers = {pid for pid, _ in grace.pool.members()}
        self._switch(self._new, self._new_workers)
        arbiter.cfg.nworkers_changed(arbiter, self._new_workers, self._old_workers)
        grace.pool.cohort = self.cohort
        grace.reloading = None
        for each in old_listeners:
            if each not in arbiter.LISTENERS:
                each.close()
        try:
            arbiter.log.reopen_files()
            arbiter.cfg.on_reload(arbiter)
        except Exception:
            arbiter.log.exception("gracehooks: the on_reload hook failed; the new configuration serves")
        if hasattr(arbiter, "_stats"):
            arbiter._stats["reloads"] += 1
        self._move_pidfile()
        grace.moor()
        util._setproctitle(f"master [{arbiter.proc_name}]")
        self._facts.append(Fact(Happened.COMMITTED))

    def _move_pidfile(self) -> None:
        arbiter = self._arbiter
        before = arbiter.pidfile
        if (before.fname if before is not None else None) == arbiter.cfg.pidfile:
            return
        try:
            arbiter.pidfile = None
            pidfile.take(arbiter)
            if before is not None:
                before.unlink()
        except OSError as error:
            arbiter.pidfile = before
            arbiter.log.error("gracehooks: cannot write the new pidfile (%s); the old one stays", error)

    def retire(self) -> None:
        """The old workers drain; the reload itself is over, and the next one may begin."""
        grace = self._grace
        last = dict(grace.driver.last)
        for pid in self._leavers:
            grace.pool.let_go(pid, Order.RETIRE, "replaced by a reload")
        record = {
            "id": last["id"],
            "kind": "reload",
            "outcome": "completed",
            "reason": "",
            "phases": dict(last["phases"]),
        }
        grace.pool.record_when_gone(record, self._leavers)
        self._facts.append(Fact(Happened.WORKERS_GONE))

    def roll_back(self, force: bool) -> None:
        """The new workers go; the old configuration is as it was."""
        if not self._rolling_back:
            self._rolling_back = True
            self._restore()
        if self._probe:
            processes.signal_process(self._probe, signal.SIGKILL)
        for pid in list(self._workers & set(self._arbiter.WORKERS)):
            if force:
                processes.signal_process(pid, signal.SIGKILL)
            else:
                self._grace.pool.let_go(pid, Order.RETIRE, "the reload was rolled back")

    def _restore(self) -> None:
        if not self._old:
            return
        arbiter, grace = self._arbiter, self._grace
        for each in self._new.get("LISTENERS", ()):
            if each not in self._old["LISTENERS"]:
                each.close()
        self._switch(self._old, self._old_workers)
        arbiter.app.cfg = self._old_app_cfg
        settings.restore(self._old_recorded)
        settings.adopt(self._old_settings)
        grace.settings = self._old_settings
        for key, value in self._old_env.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        try:
            arbiter.log.setup(self._old["cfg"])
        except Exception:
            arbiter.log.exception("gracehooks: the log configuration could not be put back")
        self._old = {}

    def clear_away(self) -> None:
        """Nothing: the new workers are this master's own, and have left when the rollback ends."""

    def force_own(self) -> None:
        """Never asked: the old workers have their own bounds."""

    def resume(self) -> None:
        """The old configuration goes on."""
        self._grace.reloading = None

    def detach(self) -> None:
        """Never asked."""

    def leave(self) -> None:
        """The master stays: it is ready for the next reload."""
        self._grace.driver.idle()
