"""gunicorn says READY=1 by `systemd.sd_notify`, looked up in its module at the call; and nowhere else."""

import inspect

import gunicorn.arbiter
import gunicorn.systemd


def test_the_arbiter_looks_sd_notify_up_in_its_module():
    assert gunicorn.arbiter.systemd is gunicorn.systemd
    assert inspect.getsource(gunicorn.arbiter.Arbiter).count("systemd.sd_notify(") == 1


def test_it_is_silent_once_a_worker_class_is_loaded():
    from gracehooks.gunicorn import hooks

    assert gunicorn.systemd.sd_notify is hooks._say_nothing
    assert list(inspect.signature(hooks._say_nothing).parameters) == ["state", "logger", "unset_environment"]


def test_listen_fds_speaks_of_its_own_process_only(monkeypatch):
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert gunicorn.systemd.listen_fds() == 0
