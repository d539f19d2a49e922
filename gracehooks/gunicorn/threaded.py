"""`gracehooks.SyncWorker` with threads above 1: served by `gracehooks.Worker`, as gunicorn serves its own sync by gthread.

gunicorn puts its gthread worker in the place of any class whose name ends in SyncWorker where there are threads; it would
never load a line of ours. What must hold: our class is replaced by ours; every other answer is gunicorn's. It relies on
`Config.worker_class` and `Config.worker_class_str` (tests/contract/test_worker_base.py).
"""

from __future__ import annotations

from typing import Any

from gunicorn import util
from gunicorn.config import Config

__all__ = ["install", "takes_over"]

SPELLINGS = ("gracehooks.SyncWorker", "gracehooks.gunicorn.workers.sync.SyncWorker")
THREADED = "gracehooks.Worker"


def takes_over(cfg: Any) -> bool:
    """Whether `gracehooks.SyncWorker` is asked for, with threads."""
    return cfg.settings["worker_class"].get() in SPELLINGS and cfg.threads > 1


def install() -> None:
    """Let gunicorn's configuration answer so; once is enough."""
    stock, name = Config.worker_class, Config.worker_class_str
    if getattr(stock.fget, "__module__", None) == __name__:
        return

    def worker_class(self: Any) -> Any:
        return util.load_class(THREADED) if takes_over(self) else stock.fget(self)

    def worker_class_str(self: Any) -> Any:
        return THREADED if takes_over(self) else name.fget(self)

    Config.worker_class, Config.worker_class_str = property(worker_class), property(worker_class_str)
