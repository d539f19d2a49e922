"""What outlives a master that was killed: its generation, how many workers it had been told to keep, where its state is.

The anchor keeps it, as the master said it last, and gives it to the one that it starts in its place. What must hold: only a
master started in the place of another reads it; it never reaches a worker or a successor, which is told more.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from gracehooks.anchor.lines import KEPT

__all__ = ["Keepsake", "take_keepsake"]


@dataclass(frozen=True)
class Keepsake:
    """`generation` is the next one's; `workers` is how many there were to be (TTIN, TTOU), `configured` how many the
    configuration said.
    """

    generation: int
    workers: int
    configured: int
    state_dir: str

    def text(self) -> str:
        """As the anchor keeps it."""
        return json.dumps(asdict(self))


def take_keepsake() -> Keepsake | None:
    """Take what the killed master left out of the environment; None where there is nothing, or nothing that is understood."""
    text = os.environ.pop(KEPT, None)
    if text is None:
        return None
    try:
        said = json.loads(text)
        return Keepsake(int(said["generation"]), int(said["workers"]), int(said["configured"]), str(said["state_dir"]))
    except (ValueError, KeyError, TypeError):
        return None
