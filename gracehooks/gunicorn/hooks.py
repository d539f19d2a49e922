"""Putting `attach` before the user's `when_ready`, whichever order the configuration file defines things in."""

from __future__ import annotations

from typing import Any

__all__ = ["chain"]


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
