"""What `gracehooks check` relies on in gunicorn: how it loads a configuration, and in which order.

`WSGIApplication.load_config`, `do_load_config`, `Config.worker_class`, `get_cmd_args_from_env`, `get_default_config_file`.
"""

from __future__ import annotations

import pytest

from gracehooks.gunicorn.reading import Request, read

APP = "def app(environ, start_response):\n    start_response('200 OK', [])\n    return []\n"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(place):
    (place / "gunicorn.conf.py").write_text("workers = 2\nthreads = 2\ntimeout = 2\nworker_class = 'gthread'\n")
    request = Request(
        ("--workers", "4", "app:app"), str(place), {"GUNICORN_CMD_ARGS": "--workers 3 --threads 3"}, boot=False
    )
    found = read(request, timeout=60)
    assert found.failure == ""
    assert (found.server.workers, found.server.threads, found.server.timeout) == (4, 3, 2)
    assert (found.server.kind, found.server.attached, found.server.app) == ("thread", False, "app:app")
    assert found.server.config == str(place / "gunicorn.conf.py")


def test_a_sync_worker_with_threads_becomes_a_gthread_one(place):
    found = read(Request(("-k", "gracehooks.SyncWorker", "--threads", "2", "app:app"), str(place)), timeout=60)
    assert found.server.worker == "gunicorn.workers.gthread.ThreadWorker"
    assert not found.server.ours


@pytest.mark.parametrize(
    ("config", "failure"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("workers = 'many'", "invalid literal for int"),
        ("worker_class = 'no.such.Worker'", "No module named 'no'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "it ended by signal 9"),
    ],
)
def test_a_configuration_that_cannot_be_loaded_has_a_reason(place, config, failure):
    (place / "gunicorn.conf.py").write_text(config)
    found = read(Request(("app:app",), str(place)), timeout=60)
    assert found.server is None
    assert failure in found.failure


def test_a_configuration_that_hangs_is_given_up(place):
    (place / "gunicorn.conf.py").write_text("import time; time.sleep(3600)")
    found = read(Request(("app:app",), str(place)), timeout=1)
    assert found.failure == "reading the configuration was not over after 1 s"
