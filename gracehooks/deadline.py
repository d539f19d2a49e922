"""One monotonic deadline, made once and carried down; nothing below it invents a new time-out.

Times are `time.monotonic()`: on Linux one clock for every process, so a deadline may cross a fork.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

__all__ = ["Deadline"]


@dataclass(frozen=True, order=True)
class Deadline:
    """A moment on the monotonic clock.

    `at` is in seconds of `time.monotonic()`.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The moment `seconds` (0 or more) from now."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds until then; 0 when it has passed, never negative."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the moment is over."""
        return time.monotonic() >= self.at

    def earlier(self, other: Deadline) -> Deadline:
        """The earlier of the two."""
        return min(self, other)

    def plus(self, seconds: float) -> Deadline:
        """The moment `seconds` after this one."""
        return Deadline(self.at + seconds)
