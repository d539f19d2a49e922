"""What gracehooks.gunicorn.arbiter and the master rely on in gunicorn's Arbiter: one obvious test for each."""

from __future__ import annotations

import inspect
import queue
import signal
import types
from pathlib import Path

import pytest
from gunicorn import sock, util
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.glogging import Logger
from gunicorn.pidfile import Pidfile

from gracehooks.gunicorn.arbiter import GracefulArbiter, make_graceful


class Application(BaseApplication):
    def load_config(self):
        pass

    def load(self):
        return lambda environ, start_response: []


@pytest.fixture
def arbiter():
    return Arbiter(Application())


class FakeGrace:
    """Records what the arbiter hands over."""

    is_successor = False

    def __init__(self):
        self.calls = []
        self.stop = Part(self.calls)

    def pace(self):
        return 0.01

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args))


class Part:
    """The same for a part of it."""

    def __init__(self, calls):
        self.calls = calls

    def __getattr__(self, name):
        return lambda *args: self.calls.append((f"stop.{name}", *args))


def source(name: str) -> str:
    return inspect.getsource(getattr(Arbiter, name))


@pytest.mark.parametrize("name", ["usr2", "hup", "term", "int", "quit", "chld", "ttin", "ttou", "usr1", "winch"])
def test_handlers_are_looked_up_by_name_at_the_signal(name: str):
    assert callable(getattr(Arbiter, f"handle_{name}"))
    assert 'getattr(self, "handle_%s" % signame, None)' in source("run")


def test_the_running_arbiter_can_be_given_our_class(arbiter):
    grace = FakeGrace()
    make_graceful(arbiter, grace)
    assert isinstance(arbiter, GracefulArbiter)
    assert isinstance(arbiter, Arbiter)
    assert type(arbiter).__name__ == "Arbiter"
    arbiter.handle_usr2()
    arbiter.handle_hup()
    arbiter.handle_term()
    arbiter.handle_int()
    arbiter.handle_quit()
    arbiter.manage_workers()
    arbiter.reap_workers()
    arbiter.stop()
    assert [each[0] for each in grace.calls] == [
        *("upgrade", "reload", "stop.begin", "stop.hammer", "stop.hammer", "tick", "reap", "stop.sweep"),
    ]


def test_the_loop_ticks_by_manage_workers_and_ends_by_stop_iteration():
    assert "self.manage_workers()" in source("run")
    assert "except (StopIteration, KeyboardInterrupt)" in source("run")
    assert "self.stop()" in source("halt")
    assert "HaltServer" in source("run")
    assert HaltServer("why", 3).exit_status == 3


def test_the_loop_waits_where_we_can_shorten_it(arbiter):
    make_graceful(arbiter, FakeGrace())
    if hasattr(Arbiter, "wait_for_signals"):
        assert "self.wait_for_signals(" in source("run")
        assert isinstance(arbiter.SIG_QUEUE, queue.SimpleQueue)
        assert arbiter.wait_for_signals(timeout=1.0) == []
    else:
        assert "self.sleep()" in source("run")
        import os

        arbiter.PIPE = os.pipe()
        for each in arbiter.PIPE:
            util.set_non_blocking(each)
        arbiter.wakeup()
        arbiter.sleep()  # reads the byte, and returns at once
        arbiter.sleep()
        for each in arbiter.PIPE:
            os.close(each)


def test_a_sigchld_only_wakes_the_loop(arbiter):
    """gunicorn 23 and 24 call `handle_chld(sig, frame)` inside the handler, newer ones call it without arguments."""
    grace = FakeGrace()
    make_graceful(arbiter, grace)
    arbiter.wakeup = lambda: grace.calls.append(("wakeup",))
    parameters = len(inspect.signature(Arbiter.handle_chld).parameters) - 1
    arbiter.handle_chld(*[None] * parameters)
    assert grace.calls in ([], [("wakeup",)])


def test_workers_and_their_numbers(arbiter):
    assert isinstance(Arbiter.WORKERS, dict)
    arbiter.num_workers = 3
    assert arbiter.num_workers == arbiter._num_workers == 3
    assert (Arbiter.WORKER_BOOT_ERROR, Arbiter.APP_LOAD_ERROR) == (3, 4)
    for name in ("timeout", "proc_name", "address", "worker_class", "cfg", "app", "log"):
        assert hasattr(arbiter, name), name
    for name in ("reexec_pid", "master_pid", "worker_age"):
        assert getattr(arbiter, name) == 0, name
    assert arbiter.systemd is False
    assert arbiter.pidfile is None
    assert arbiter.master_name == "Master"


def test_spawn_worker_constructs_in_the_master_and_registers_the_pid():
    text = source("spawn_worker")
    assert text.index("self.worker_class(") < text.index("os.fork()") < text.index("worker.init_process()")
    assert "self.WORKERS[pid] = worker" in text
    assert "return pid" in text
    assert "worker.tmp.close()" in inspect.getsource(Arbiter)


def test_murder_workers_says_that_it_aborted_a_worker():
    text = source("murder_workers")
    assert "worker.aborted = True" in text
    assert text.index("self.kill_worker(pid, signal.SIGABRT)") < text.index("self.kill_worker(pid, signal.SIGKILL)")


def test_promotion_is_one_method_that_knows_only_its_parent():
    assert "os.getppid()" in source("maybe_promote_master")
    assert "self.maybe_promote_master()" in source("run")


def test_the_control_server_has_a_beginning_and_an_end():
    if hasattr(Arbiter, "_start_control_server"):
        assert "self._start_control_server()" in source("run")
        assert "self._stop_control_server()" in source("halt")
        assert "_control_server" in source("_stop_control_server")


def test_on_starting_runs_after_the_pidfile_and_before_the_signals():
    text = source("start")
    assert text.index("self.pidfile.create") < text.index("on_starting") < text.index("init_signals")


def test_check_config_runs_in_the_master_just_before_when_ready():
    text = source("start")
    assert text.index("create_sockets") < text.index("self.worker_class.check_config(self.cfg, self.log)")
    assert text.index("check_config") < text.index("when_ready")


def test_hooks_can_be_set_and_called(arbiter):
    seen = []
    arbiter.cfg.set("when_ready", lambda server: seen.append(server))
    arbiter.cfg.when_ready(arbiter)
    assert seen == [arbiter]


def test_a_pidfile_knows_its_name_and_is_unlinked_only_by_its_owner(tmp_path: Path):
    path = tmp_path / "pid"
    path.write_text("1\n")
    mine = Pidfile(str(path))
    mine.pid = 4711
    assert mine.fname == str(path)
    mine.unlink()
    assert path.exists()  # it names somebody else
    path.write_text("4711\n")
    mine.unlink()
    assert not path.exists()


def test_listeners_can_be_closed_and_named(tmp_path: Path, arbiter):
    arbiter.cfg.set("bind", f"unix:{tmp_path}/a.sock")
    (address,) = arbiter.cfg.address
    listener = sock._sock_type(address)(address, arbiter.cfg, arbiter.log)
    try:
        assert listener.cfg_addr == address
        assert listener.getsockname() == str(tmp_path / "a.sock")
        assert listener.family.name == "AF_UNIX"
        assert listener.fileno() > 0
    finally:
        listener.close()


def test_the_process_title_can_be_set():
    assert isinstance(util._setproctitle, types.FunctionType)


def test_signals_that_concern_us_are_the_arbiters():
    assert {signal.SIGHUP, signal.SIGQUIT, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2} <= set(Arbiter.SIGNALS)


def test_gauges_are_sent_by_the_tick_that_ours_replaces():
    assert "_last_logged_active_worker_count" in source("manage_workers")
    assert '"gunicorn.workers"' in source("manage_workers")


def test_the_logger_of_statsd_increments():
    from gunicorn.instrument.statsd import Statsd

    assert list(inspect.signature(Statsd.increment).parameters)[:3] == ["self", "name", "value"]
    assert not hasattr(Logger, "increment")
