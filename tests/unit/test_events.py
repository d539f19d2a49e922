"""Events: frozen facts, given to every subscriber; one that raises disturbs nobody."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest

from gracehooks import events, logs
from gracehooks.events import Event, ServingStarted, Stopped, UpgradeRolledBack, publish, subscribe, unsubscribe

KINDS = [
    each
    for each in vars(events).values()
    if isinstance(each, type) and issubclass(each, Event) and each is not Event and each.__module__ == events.__name__
]
SAMPLE = {
    "str": "text",
    "int": 3,
    "float": 0.25,
    "dict[str, float]": {"booting": 0.2},
    "dict[str, int]": {"accepted": 1},
}


def sample(kind):
    values = {
        field.name: {"requests": [{"method": "GET", "path": "/a", "age": 1.0, "reason": "killed"}], "jobs": []}
        if field.type == "Lost"
        else SAMPLE[field.type]
        for field in dataclasses.fields(kind)
    }
    return kind(**values)


@pytest.fixture
def heard():
    found = []
    subscribe(found.append)
    yield found
    unsubscribe(found.append)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_event_is_frozen_public_documented_and_has_a_line(kind):
    event = sample(kind)
    assert kind.__name__ in events.__all__
    assert kind.__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.pid = 7
    assert event.facts()["event"] == event.name == kind.__name__
    json.dumps(event.facts())
    assert kind.__name__ in logs.LINES


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("form", ["text", "json"])
def test_each_event_can_be_logged(kind, form, caplog, monkeypatch):
    monkeypatch.setenv("GRACEHOOKS_LOG", form)
    with caplog.at_level(logging.DEBUG):
        logs.Logbook(logging.getLogger("test"))(sample(kind))
    (record,) = caplog.records
    line = record.getMessage()
    if form == "json":
        assert json.loads(line)["event"] == kind.__name__
    else:
        assert line.startswith("gracehooks: ")
        assert "generation 3" in line
        assert "{" not in line or "'" in line  # a dictionary may be shown, an unfilled place may not


def test_every_subscriber_hears_and_one_that_raises_is_reported(heard, caplog):
    def raises(event):
        raise RuntimeError("no")

    subscribe(raises)
    subscribe(heard.append)  # once more is once
    try:
        event = ServingStarted(pid=1, generation=1, workers=2, seconds=0.1)
        with caplog.at_level(logging.ERROR):
            publish(event)
    finally:
        unsubscribe(raises)
    publish(event)
    assert heard == [event, event]
    assert len([each for each in caplog.records if "subscriber" in each.getMessage()]) == 1


def test_losses_are_errors_and_told_by_name(caplog):
    lost = {"requests": [{"method": "GET", "path": "/pay", "age": 3.0, "reason": "drain timeout"}], "jobs": []}
    with caplog.at_level(logging.DEBUG):
        logs.Logbook(logging.getLogger("test"))(
            Stopped(pid=1, generation=1, id="x", outcome="forced", seconds=1.0, answered=2, lost=lost)
        )
        logs.Logbook(logging.getLogger("test"))(
            UpgradeRolledBack(pid=1, generation=1, id="x", kind="upgrade", reason="no module", phases={})
        )
    assert [each.levelno for each in caplog.records] == [logging.ERROR, logging.ERROR]
    assert "GET /pay (3.0 s, drain timeout)" in caplog.text
    assert "no module" in caplog.text


def test_what_is_said_beside_the_events_is_json_too():
    records: list[logging.LogRecord] = []
    log = logging.Logger("test")
    log.addFilter(logs.Wrapped(7))
    handler = logging.Handler()
    handler.emit = records.append
    log.addHandler(handler)
    log.warning("gracehooks: stuck at:\n    %s", "a.py, line 3")
    try:
        raise RuntimeError("100%")
    except RuntimeError:
        log.exception("gracehooks: the hook failed")
    log.info("Booting worker with pid: %s", 3)
    first, second = (json.loads(each.getMessage()) for each in records[:2])
    assert first["message"] == "gracehooks: stuck at:\n    a.py, line 3"
    assert (first["level"], first["generation"], first["pid"] > 1) == ("warning", 7, True)
    assert second["exception"].endswith("RuntimeError: 100%")
    assert records[1].exc_info is None
    assert all("\n" not in each.getMessage() for each in records)
    assert records[2].getMessage() == "Booting worker with pid: 3"
