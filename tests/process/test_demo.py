"""The demo loses nothing, says so, and leaves nothing behind; where something is lost it says that."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.kit import processes


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
