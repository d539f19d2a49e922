"""The anchor's own lines: on standard error, in gunicorn's format, or as JSON (`GRACEHOOKS_LOG=json`)."""

from __future__ import annotations

import os
import time

__all__ = ["say"]


def say(text: str, level: str = "INFO") -> None:
    """Write one line; a standard error that is gone or full is no reason to do anything else."""
    try:
        if os.environ.get("GRACEHOOKS_LOG", "").lower() == "json":
            import json  # only who wants it pays for it

            facts = {"message": f"gracehooks: anchor: {text}", "level": level, "pid": os.getpid(), "at": time.time()}
            line = json.dumps(facts)
        else:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S %z")
            line = f"[{stamp}] [{os.getpid()}] [{level}] gracehooks: anchor: {text}"
        os.write(2, line.encode("utf-8", "replace") + b"\n")
    except OSError:
        pass
