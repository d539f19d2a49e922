"""Settings: each wrong one is named with its value and what it takes; the file goes before the environment."""

from __future__ import annotations

import dataclasses

import pytest

from gracehooks import ConfigError, configure, settings
from gracehooks.settings import RANGES, SECONDS, Settings, resolve


@pytest.fixture(autouse=True)
def _fresh():
    before = settings.recorded()
    settings.forget()
    yield
    settings.restore(before)


def test_defaults_are_the_documented_ones():
    assert resolve({}) == Settings(
        ready_timeout=60, ready_path=None, probation=2, lame_duck=0, drain_timeout=30, job_timeout=30, job_grace=None,
        cleanup_timeout=5, max_generations=3, state_dir=None, on_event=None, track="request",
    )  # fmt: skip
    assert resolve({}).stop_budget == 65
    assert resolve({}).grace == 15
    assert set(RANGES) == {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in SECONDS for value in (-1, "5", True, float("nan"), float("inf"), 86_401)]
    + [
        ("ready_timeout", 0),
        ("drain_timeout", None),
        ("ready_path", "healthz"),
        ("ready_path", 7),
        ("max_generations", 0),
        ("max_generations", 1.5),
        ("max_generations", True),
        ("state_dir", ""),
        ("state_dir", 3),
        ("on_event", "print"),
        ("track", "all"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_takes(name, value):
    with pytest.raises(ConfigError) as caught:
        configure(**{name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
    assert RANGES[name] in str(caught.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'drain_time'.*drain_timeout"):
        configure(drain_time=3)


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("GRACEHOOKS_DRAIN_TIMEOUT", "1.5", "drain_timeout", 1.5),
        ("GRACEHOOKS_MAX_GENERATIONS", "7", "max_generations", 7),
        ("GRACEHOOKS_READY_PATH", "/up", "ready_path", "/up"),
        ("GRACEHOOKS_STATE_DIR", "/run/x", "state_dir", "/run/x"),
        ("GRACEHOOKS_TRACK", "off", "track", "off"),
    ],
)
def test_the_environment_sets_what_the_file_does_not(variable, text, name, value):
    assert getattr(resolve({variable: text}), name) == value
    configure(**{name: value if name in ("track", "ready_path", "state_dir") else 9})
    other = {"track": "explicit", "ready_path": "/other", "state_dir": "/other"}.get(name, text)
    assert getattr(resolve({variable: other}), name) == (value if name in ("track", "ready_path", "state_dir") else 9)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("GRACEHOOKS_DRAIN_TIMEOUT", "soon"),
        ("GRACEHOOKS_DRAIN_TIMEOUT", ""),
        ("GRACEHOOKS_MAX_GENERATIONS", "2.5"),
        ("GRACEHOOKS_DRAIN_TIME", "3"),
        ("GRACEHOOKS_ON_EVENT", "print"),
    ],
)
def test_a_wrong_variable_is_named(variable, text):
    with pytest.raises(ConfigError, match=variable):
        resolve({variable: text})


def test_variables_of_others_are_left_alone():
    assert resolve({"GRACEHOOKS_LOG": "json", "GUNICORN_FD": "3", "DRAIN_TIMEOUT": "x"}) == Settings()


def test_later_calls_add_and_a_failed_one_changes_nothing():
    configure(drain_timeout=1)
    configure(job_timeout=2)
    with pytest.raises(ConfigError):
        configure(job_timeout=-2)
    assert resolve({}).drain_timeout == 1
    assert resolve({}).job_timeout == 2


def test_grace_fits_into_the_job_timeout():
    configure(job_timeout=10)
    assert resolve({}).grace == 5
    configure(job_grace=10)
    assert resolve({}).grace == 10
    with pytest.raises(ConfigError, match="job_grace"):
        configure(job_grace=11)


def test_a_reload_forgets_and_a_failed_reload_restores():
    configure(drain_timeout=1)
    before = settings.recorded()
    settings.forget()
    assert resolve({}).drain_timeout == 30
    settings.restore(before)
    assert resolve({}).drain_timeout == 1
