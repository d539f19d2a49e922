"""What gracehooks.gunicorn.successor relies on: the environment of a re-exec, the start context, the start directory."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

from gunicorn import config
from gunicorn.arbiter import Arbiter

from tests.contract.test_arbiter import Application


def source(name: str) -> str:
    return inspect.getsource(getattr(Arbiter, name))


def test_gunicorn_pid_makes_a_successor_and_gunicorn_fd_gives_it_the_listeners():
    text = source("start")
    assert "self.master_pid = int(os.environ.get('GUNICORN_PID'))" in text
    assert "os.environ.pop('GUNICORN_FD').split(',')" in text
    assert 'pidname += ".2"' in text


def test_a_unix_socket_is_unlinked_only_by_a_master_without_a_relative():
    assert "self.reexec_pid == self.master_pid == 0" in source("stop")


def test_the_environment_that_gunicorn_was_started_with_is_kept(monkeypatch):
    monkeypatch.setenv("CONTRACT", "1")
    cfg = config.Config()
    monkeypatch.setenv("CONTRACT", "2")
    assert cfg.env_orig["CONTRACT"] == "1"


def test_the_start_context_has_a_directory():
    assert os.path.isdir(Arbiter(Application()).START_CTX["cwd"])


def test_the_default_of_chdir_is_the_start_directory_as_a_symbolic_link(tmp_path):
    (tmp_path / "releases").mkdir()
    (tmp_path / "current").symlink_to("releases")
    code = "import gunicorn.config, os; os.chdir('/'); print(gunicorn.config.Chdir.default)"
    current = tmp_path / "current"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=current,
        env={**os.environ, "PWD": str(current)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(current), found.stderr


def test_the_hook_before_the_exec():
    assert "self.cfg.pre_exec(self)" in source("reexec")


def test_python_knows_how_it_was_started():
    found = subprocess.run(
        [sys.executable, "-c", "import sys; print(sys.orig_argv[1])"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "-c"
