"""Verified upgrades, bounded drains and accounted jobs for gunicorn and uvicorn.

This module is the whole promise: every public name is here. Importing it imports no server; worker classes and the
`jobs` package are loaded when they are first asked for.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from gracehooks.errors import ConfigError, GracehooksError, JobRejected
from gracehooks.settings import configure as _configure

if TYPE_CHECKING:
    from gracehooks import jobs
    from gracehooks.drain.cleanup import on_shutdown
    from gracehooks.gunicorn.attach import on_starting
    from gracehooks.gunicorn.workers.asgi import ASGIWorker
    from gracehooks.gunicorn.workers.gevent import GeventWorker
    from gracehooks.gunicorn.workers.sync import SyncWorker
    from gracehooks.gunicorn.workers.thread import Worker
    from gracehooks.gunicorn.workers.uvicorn import UvicornWorker
    from gracehooks.readiness import readiness, state

__version__ = "0.1.0"

__all__ = [
    "ASGIWorker",
    "ConfigError",
    "GeventWorker",
    "GracehooksError",
    "JobRejected",
    "SyncWorker",
    "UvicornWorker",
    "Worker",
    "__version__",
    "configure",
    "jobs",
    "on_shutdown",
    "on_starting",
    "readiness",
    "state",
]

_WHERE = {
    "Worker": "gracehooks.gunicorn.workers.thread",
    "SyncWorker": "gracehooks.gunicorn.workers.sync",
    "GeventWorker": "gracehooks.gunicorn.workers.gevent",
    "ASGIWorker": "gracehooks.gunicorn.workers.asgi",
    "UvicornWorker": "gracehooks.gunicorn.workers.uvicorn",
    "on_starting": "gracehooks.gunicorn.attach",
    "on_shutdown": "gracehooks.drain.cleanup",
    "readiness": "gracehooks.readiness",
    "state": "gracehooks.readiness",
}


def configure(**settings: Any) -> None:
    """Record settings, as the configuration file does; a later call adds to an earlier one.

    Takes the names of the settings reference. Raises ConfigError at once for an unknown name, a wrong type or a value out
    of range.
    """
    _configure(**settings)
    if "gunicorn.config" in sys.modules:  # it is its configuration file that calls
        importlib.import_module("gracehooks.gunicorn.threaded").install()


def __getattr__(name: str) -> Any:
    if name == "jobs":
        return importlib.import_module("gracehooks.jobs")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'gracehooks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
