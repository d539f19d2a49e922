"""What gracehooks.gunicorn.workers.attached relies on in gunicorn's Worker."""

from __future__ import annotations

import importlib.util
import inspect
import signal

import pytest
from gunicorn import util
from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker
from gunicorn.workers.workertmp import WorkerTmp

import gracehooks
from gracehooks.gunicorn import threaded
from gracehooks.gunicorn.workers.attached import Attached, attached
from gracehooks.scoreboard import Phase


@pytest.mark.parametrize("spelling", threaded.SPELLINGS)
def test_a_sync_worker_with_threads_is_replaced_by_gthread_and_ours_by_ours(monkeypatch, spelling):
    fresh = importlib.util.module_from_spec(importlib.util.find_spec("gunicorn.config"))
    fresh.__spec__.loader.exec_module(fresh)  # the loaded one may have been changed by another test
    Config = fresh.Config  # noqa: N806
    monkeypatch.setattr(threaded, "Config", Config)
    assert isinstance(Config.worker_class, property)
    assert isinstance(Config.worker_class_str, property)
    config = Config()
    config.set("worker_class", spelling)
    config.set("threads", 2)
    assert config.worker_class_str == "gthread"
    assert config.worker_class.__module__ == "gunicorn.workers.gthread"
    for _ in range(2):
        threaded.install()
    assert config.worker_class_str == "gracehooks.Worker"
    assert config.worker_class is gracehooks.Worker
    config.set("threads", 1)
    assert config.worker_class is gracehooks.SyncWorker
    config.set("worker_class", "sync")
    config.set("threads", 2)
    assert config.worker_class_str == "gthread"


def source(name: str) -> str:
    return inspect.getsource(getattr(Worker, name))


def test_a_worker_is_constructed_with_these():
    names = list(inspect.signature(Worker.__init__).parameters)
    assert names == ["self", "age", "ppid", "sockets", "app", "timeout", "cfg", "log"]


def test_init_process_sets_signals_loads_the_application_and_runs():
    text = source("init_process")
    order = [
        text.index(each) for each in ("self.init_signals()", "self.load_wsgi()", "self.booted = True", "self.run()")
    ]
    assert order == sorted(order)


def test_load_wsgi_leaves_the_application_in_wsgi():
    assert "self.wsgi = self.app.wsgi()" in source("load_wsgi")


def test_init_signals_can_be_extended_and_handles_what_we_name():
    for name in ("handle_exit", "handle_quit", "handle_abort", "handle_usr1"):
        assert callable(getattr(Worker, name))
    assert signal.SIGTERM in Worker.SIGNALS


def test_a_worker_has_these_from_the_beginning():
    text = source("__init__")
    for name in ("booted", "aborted", "alive", "ppid", "age", "tmp"):
        assert f"self.{name} =" in text, name


def test_notify_is_the_heartbeat():
    assert "self.tmp.notify()" in source("notify")
    assert {name for name in vars(WorkerTmp) if not name.startswith("_")} == {
        "notify",
        "last_update",
        "fileno",
        "close",
    }
    assert "worker.tmp.last_update()" in inspect.getsource(Arbiter.murder_workers)


@pytest.mark.parametrize("name", ["sync", "gthread", "gevent", "asgi"])
def test_stock_classes_notify_after_they_have_booted(name: str):
    try:
        worker_class = util.load_class(name, default="sync", section="gunicorn.workers")
    except (ImportError, RuntimeError):
        pytest.skip(f"this gunicorn, or this machine, has no {name}")
    assert "self.notify()" in inspect.getsource(inspect.getmodule(worker_class)) or "notify" in dir(worker_class)


def test_a_stock_class_becomes_an_attached_one_once():
    worker_class = util.load_class("sync")
    mine = attached(worker_class)
    assert issubclass(mine, Attached)
    assert issubclass(mine, worker_class)
    assert attached(mine) is mine
    assert attached(object) is object


def test_the_first_notify_after_the_boot_is_readiness(monkeypatch):
    class Stock(Worker):
        def __init__(self, *args):
            self.ppid, self.booted, self.tmp = 0, False, None

        def notify(self):
            pass

    class Mine(Attached, Stock):
        pass

    worker = Mine(1, 0, [], None, 30, None, None)
    worker.notify()
    assert worker.page.phase is Phase.BOOTING
    worker.booted = True
    worker.notify()
    assert worker.page.phase is Phase.SERVING
    assert worker.page.ready
    worker.page.close()
