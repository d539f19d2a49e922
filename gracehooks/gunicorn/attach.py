"""How gracehooks gets into a running gunicorn: by the worker class, by `on_starting`, or by both.

gunicorn calls `worker_class.check_config(cfg, log)` in the master just before `when_ready(server)`; a worker class of ours
chains onto that hook, so that the user's own still runs, whichever order the configuration file defines them in.
"""

from __future__ import annotations

import sys
from typing import Any

from gracehooks import teardown
from gracehooks.errors import ConfigError
from gracehooks.gunicorn.arbiter import make_graceful
from gracehooks.gunicorn.master import Grace
from gracehooks.gunicorn.threaded import install, takes_over

__all__ = ["attach", "on_starting"]


def on_starting(server: Any) -> None:
    """gunicorn's `on_starting` hook: gives a stock worker class the verified upgrade, reload and the bounded stop.

    Write `on_starting = gracehooks.on_starting` in the configuration file, or call it from a hook of your own.
    """
    attach(server)


def attach(server: Any) -> Grace:
    """Make the running arbiter graceful, once; a wrong setting ends the start with one clear line."""
    grace = getattr(server, "grace", None)
    if isinstance(grace, Grace):
        return grace
    try:
        grace = Grace(server)
    except ConfigError as error:
        server.log.error("gracehooks: %s", error)
        if server.pidfile is not None:
            server.pidfile.unlink()
        print(f"\nError: {error}\n", file=sys.stderr)
        sys.exit(1)
    install()
    if takes_over(server.cfg):
        server.worker_class = server.cfg.worker_class
        server.log.info(
            "gracehooks: threads = %d: gracehooks.Worker serves in the place of SyncWorker, which has none",
            server.cfg.threads,
        )
    make_graceful(server, grace)
    teardown.leave_out_at_exit()
    grace.begin()
    return grace
