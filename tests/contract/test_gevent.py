"""What `gracehooks.GeventWorker` relies on in gunicorn's gevent worker."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("gevent")


def test_the_heartbeat_is_the_base_classes_without_the_exit_when_the_master_is_gone():
    from gunicorn.workers import ggevent

    from gracehooks.gunicorn.workers.gevent import GeventWorker, Stock

    stock = inspect.getsource(ggevent.GeventWorker.notify)
    assert "super().notify()" in stock
    assert "sys.exit(0)" in stock  # what the master's death would do in the middle of requests
    order = GeventWorker.__mro__
    assert order.index(Stock) + 1 == order.index(ggevent.GeventWorker)
    beats: list[str] = []
    Stock.notify(SimpleNamespace(tmp=SimpleNamespace(notify=lambda: beats.append("beat")), ppid=-1))
    assert beats == ["beat"]
