"""Putting `attach` before the user's `when_ready`, whichever order the configuration file defines things in.

It is imported before the arbiter starts, with the worker class or with `on_starting`; so here gunicorn's own `READY=1`, sent
before any worker has booted, is silenced too (tests/contract/test_sd_notify.py).
"""

from __future__ import annotations

from typing import Any

from gunicorn import systemd

__all__ = ["chain"]


def _say_nothing(state: str, logger: Any, unset_environment: bool = False) -> None:
    """In the place of gunicorn's `sd_notify`: `gracehooks.systemd` says it, when it is true."""


systemd.sd_notify = _say_nothing


def chain(cfg: Any) -> None:
    """Chain `attach` before the user's `when_ready`; called by a worker class's `check_config`, in the master."""
    theirs = cfg.when_ready
    if getattr(theirs, "gracehooks", False):
        return

    def when_ready(server: Any) -> None:
        from gracehooks.gunicorn.attach import attach  # the master's part: a worker class needs none of it

        attach(server)
        theirs(server)

    when_ready.gracehooks = True  # type: ignore[attr-defined]
    cfg.set("when_ready", when_ready)
