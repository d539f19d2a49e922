"""The demo loses nothing, says so, and leaves nothing behind; where something is lost it says that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.kit import eventually, processes


def demo(tmp_path, *arguments):
    marked = {**os.environ, processes.MARK: str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "gracehooks", "demo", *arguments],
        cwd=tmp_path,
        env=marked,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert not processes.of_directory(str(tmp_path)), "the demo left processes behind"
    assert os.listdir(tmp_path) == []
    return done


def test_the_demo_loses_nothing(tmp_path):
    done = demo(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("Nothing was lost.\n")
    for line in ("release 3, broken  rolled back", "a_package_that_nobody_installed", "3 of 3 jobs done"):
        assert line in done.stdout


def test_a_server_without_us_fails_the_demo(tmp_path):
    done = demo(tmp_path, "--worker-class", "gthread", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 1
    assert said["nothing_lost"] is False
    assert [step["good"] for step in said["steps"]] == [False] * 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_ended_leaves_nothing_behind(tmp_path, number):
    marked = {**os.environ, processes.MARK: str(tmp_path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "gracehooks", "demo"], cwd=tmp_path, env=marked, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        assert started.stdout.readline().startswith("gunicorn ")  # it serves
        started.send_signal(number)
        assert started.wait(60) == 128 + number
    eventually(lambda: not processes.of_directory(str(tmp_path)), 10, "nothing of the demo is left")
    assert os.listdir(tmp_path) == []
