"""What the anchor asks of the kernel and Python does not offer: prctl(2). Where there is none, the answer is no."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

__all__ = ["be_subreaper", "load", "signal_at_parents_end"]

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

_prctl: Callable[..., int] | None = None


def load() -> None:
    """Find prctl; to be called before any fork, since a child must not look for it."""
    global _prctl
    _prctl = getattr(ctypes.CDLL(None), "prctl", None)


def be_subreaper(name: bytes = b"gracehooks") -> bool:
    """Become the parent of every orphaned descendant (kept by exec), and `name` the process; whether the kernel can."""
    if _prctl is None:
        return False
    _prctl(_PR_SET_NAME, name, 0, 0, 0)
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def signal_at_parents_end(signal: int) -> None:
    """Get `signal` when the thread that forked this process ends (kept by exec, not by fork)."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0)
