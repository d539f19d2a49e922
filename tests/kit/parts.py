"""Real parts that a test needs: missing ones skip the test on a desk and fail it on CI."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["needs"]

_PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/lib/systemd", "/lib/systemd"])


def needs(part: str) -> str:
    """The path of the program `part`; where it is missing the test is skipped, and fails where CI=true."""
    found = shutil.which(part, path=_PLACES)
    if found is not None:
        return found
    if os.environ.get("CI") == "true":
        pytest.fail(f"{part} is missing, and on CI nothing may be")
    pytest.skip(f"{part} is not installed")
