"""The examples and the tutorial, run as they are written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.kit import eventually, serve

ROOT = Path(__file__).resolve().parents[2]
GUNICORN = [sys.executable, "-m", "gunicorn", "-b", "{address}", "-p", "gunicorn.pid"]


@pytest.mark.parametrize(
    ("name", "target", "worker", "method", "job"),
    [
        ("flask_app", "app", "gracehooks.Worker", "POST", "/reports"),
        ("django_app", "application", "gracehooks.Worker", "GET", "/mails"),
        ("fastapi_app", "app", "gracehooks.UvicornWorker", "POST", "/mails"),
    ],
)
def test_example_serves_upgrades_and_waits_for_its_jobs(name, target, worker, method, job):
    files = {each.name: each.read_text() for each in (ROOT / "examples").glob("*.py") if each.stem == name}
    files["example.conf.py"] = (ROOT / "examples/gunicorn.conf.py").read_text()
    command = [*GUNICORN, "-c", "example.conf.py", "-k", worker, f"{name}:{target}"]
    with serve(files=files, command=command, env={"GRACEHOOKS_PROBATION": "0.3"}) as server:
        assert "hello from" in server.get("/").text
        done = server.cli("upgrade", "--pidfile", str(server.pidfile))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "hello from" in server.get("/").text
        assert server.get(job, method=method).status == 202
        done = server.cli("stop", "--pidfile", str(server.pidfile))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 job: 1 succeeded" in done.stdout


def test_the_tutorial_runs():
    text = (ROOT / "docs/tutorial/first-handover.md").read_text()
    app, config = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    command = [*GUNICORN, "-c", "tutorial.conf.py", "app:app"]
    with serve(app, files={"tutorial.conf.py": config}, command=command) as server:
        target = ("--pidfile", str(server.pidfile))
        server.write("app.py", app.replace('"one"', '"two"'))
        done = server.cli("upgrade")
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.match(
            r"upgrade completed: generation 2 serves \(booting \d+\.\d+ s, probation 2\.\d+ s\)", done.stdout
        )
        eventually(lambda: not server.status()["draining"])  # until then both may answer
        assert server.get("/").text.startswith("release two")
        server.write("app.py", "import nothing_of_that_name")
        done = server.cli("upgrade", *target)
        assert done.returncode == 1, done.stdout + done.stderr
        assert done.stdout.strip() in text
        assert server.get("/").text.startswith("release two")
        assert server.cli("status", *target).returncode == 0
        done = server.cli("stop", *target)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.match(r"stopped after \d+\.\d+ s, nothing lost", done.stdout)
        eventually(lambda: not server.processes())
