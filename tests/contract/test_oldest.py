"""The contracts and one whole life on the oldest supported gunicorn, beside the installed one.

Only gunicorn itself is installed, into a directory that goes before all others: the rest of the environment is this one's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

OLDEST = "23.0.0"
ROOT = Path(__file__).resolve().parents[2]


def installed() -> Path:
    """The directory that holds the oldest gunicorn; installed once, in one step that others see whole or not at all."""
    place = ROOT / ".venvs" / f"gunicorn-{OLDEST}"
    if (place / "gunicorn" / "arbiter.py").exists():
        return place
    place.parent.mkdir(exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=place.parent))
    options = ["--no-deps", "--quiet", "--target", str(fresh / "site"), f"gunicorn=={OLDEST}"]
    commands = [[sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options]]
    if shutil.which("uv"):
        commands.append(["uv", "pip", "install", "--python", sys.executable, *options])
    said = ""
    try:
        for command in commands * 3:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
            said = done.stdout + done.stderr
            if done.returncode == 0:
                break
        else:
            if os.environ.get("CI") == "true":
                pytest.fail(f"gunicorn {OLDEST} cannot be installed: {said}")
            pytest.skip(f"gunicorn {OLDEST} cannot be installed: {said}")
        try:
            (fresh / "site").rename(place)
        except OSError:
            assert (place / "gunicorn" / "arbiter.py").exists()  # somebody else was faster
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return place


@pytest.mark.skipif(version("gunicorn") == OLDEST, reason="this is the oldest")
def test_contracts_and_a_whole_life_on_the_oldest_gunicorn():
    paths = [str(installed()), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = subprocess.run(
        [
            *[sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="],
            *["tests/contract", "tests/process/test_oldest_smoke.py"],
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TEST_GUNICORN": OLDEST},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert found.returncode == 0, found.stdout[-20000:] + found.stderr[-2000:]
