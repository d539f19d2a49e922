"""The contracts and one whole life on the oldest supported gunicorn, beside the installed one; and what differs on others.

Only that package is installed, into a directory that goes before all others: the rest of the environment is this one's.
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
#: The last whose asgi worker and HTTP/2 serve a request where the connection waits for it.
BEFORE_TASKS = "26.2.0"
ROOT = Path(__file__).resolve().parents[2]


#: The last that writes at the end of a turn of the loop.
LATE_WRITER = "0.22.1"


def installed(package: str, number: str) -> Path:
    """The directory that holds that package; installed once, in one step that others see whole or not at all."""
    place = ROOT / ".venvs" / f"{package}-{number}"
    if (place / package / "__init__.py").exists():
        return place
    place.parent.mkdir(exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=place.parent))
    options = ["--no-deps", "--quiet", "--target", str(fresh / "site"), f"{package}=={number}"]
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
                pytest.fail(f"{package} {number} cannot be installed: {said}")
            pytest.skip(f"{package} {number} cannot be installed: {said}")
        try:
            (fresh / "site").rename(place)
        except OSError:
            assert (place / package / "__init__.py").exists()  # somebody else was faster
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return place


def run_on(package: str, number: str, *tests: str) -> None:
    """Run these tests with that version of the package."""
    if version(package) == number:
        pytest.skip("it is the installed one")
    paths = [str(installed(package, number)), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = subprocess.run(
        [*[sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="], *tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), f"TEST_{package.upper()}": number},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert found.returncode == 0, found.stdout[-20000:] + found.stderr[-2000:]


def test_contracts_and_a_whole_life_on_the_oldest_gunicorn():
    skipped = ["--deselect", "tests/contract/test_oldest.py"]
    run_on("gunicorn", OLDEST, "tests/contract", "tests/process/test_oldest_smoke.py", *skipped)


def test_event_loops_and_http2_on_a_gunicorn_without_a_task_for_each_request():
    names = "gasgi or http2 or (ASGIWorker and (streams or after_its or websockets or under_way))"
    run_on(
        "gunicorn",
        BEFORE_TASKS,
        "tests/contract",
        "tests/process/test_drain_asgi.py",
        "tests/process/test_tls.py",
        "-k",
        names,
    )


def test_answers_on_a_uvloop_that_writes_at_the_end_of_its_turn():
    tests = ["tests/contract/test_uvicorn.py", "tests/process/test_deaths.py"]
    run_on("uvloop", LATE_WRITER, *tests, "-k", "uvicorn or answered_in_the_turn or has_not_taken")
