"""What gracehooks.gunicorn.reload relies on: reading the configuration again, setting the arbiter up from it, the sockets."""

from __future__ import annotations

import inspect
import os

import pytest
from gunicorn import sock
from gunicorn.app.wsgiapp import WSGIApplication
from gunicorn.arbiter import Arbiter

from gracehooks.gunicorn.reload import CARRIED


@pytest.fixture
def app(tmp_path, monkeypatch):
    (tmp_path / "conf.py").write_text("workers = 2\nraw_env = ['CONTRACT=1']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gunicorn", "-c", str(tmp_path / "conf.py"), "app:app"])
    app = WSGIApplication("%(prog)s [OPTIONS] [APP_MODULE]")
    monkeypatch.delenv("CONTRACT", raising=False)
    yield app
    os.environ.pop("CONTRACT", None)


def test_the_application_reads_its_configuration_again_into_a_new_object(app, tmp_path):
    before = app.cfg
    (tmp_path / "conf.py").write_text("workers = 5\n")
    app.reload()
    assert app.cfg is not before
    assert (before.workers, app.cfg.workers) == (2, 5)


def test_a_broken_configuration_raises_or_exits_and_nothing_else(app, tmp_path):
    before = app.cfg
    (tmp_path / "conf.py").write_text("1 / 0\n")
    with pytest.raises(BaseException) as caught:
        app.reload()
    assert isinstance(caught.value, (Exception, SystemExit))
    app.cfg = before  # and it can be put back
    assert app.cfg.workers == 2


def test_setup_carries_the_configuration_to_the_arbiter(app, tmp_path):
    arbiter = Arbiter(app)
    (tmp_path / "conf.py").write_text("workers = 5\ntimeout = 7\nproc_name = 'mine'\nworker_class = 'gthread'\n")
    app.reload()
    arbiter.setup(app)
    assert (arbiter.num_workers, arbiter.timeout, arbiter.proc_name) == (5, 7, "mine")
    assert arbiter.worker_class.__name__ == "ThreadWorker"
    for name in CARRIED:
        assert hasattr(arbiter, name), name


def test_setup_sets_the_environment_of_the_configuration(app):
    Arbiter(app)
    assert app.cfg.env == {"CONTRACT": "1"}
    assert os.environ["CONTRACT"] == "1"
    assert "CONTRACT" not in app.cfg.env_orig


def test_setup_loads_a_preloaded_application():
    assert "preload_app" in inspect.getsource(Arbiter.setup)


def test_one_socket_can_be_made_for_one_address(app):
    assert list(inspect.signature(sock.BaseSocket.__init__).parameters)[:4] == ["self", "address", "conf", "log"]
    assert sock._sock_type(("127.0.0.1", 0)) is sock.TCPSocket
    assert sock._sock_type(("::1", 0)) is sock.TCP6Socket
    assert sock._sock_type("/a.sock") is sock.UnixSocket


def test_hooks_and_log_of_a_reload(app):
    arbiter = Arbiter(app)
    arbiter.cfg.on_reload(arbiter)
    arbiter.cfg.nworkers_changed(arbiter, 3, 2)
    arbiter.log.reopen_files()
