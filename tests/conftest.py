"""What every test has: signals as a shell gives them, a bound in time, and the servers' logs when it fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.kit import server as kit_server
from tests.kit.waiting import Late

#: No test may take longer, in seconds; a hang becomes Late, with its traceback.
LONGEST = float(os.environ.get("TEST_LONGEST", "300"))

# A shell starts background commands with SIGINT ignored, and servers inherit that: INT would do nothing in them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Whoever ends the tests with TERM must not leave servers behind: it unwinds like INT, through every teardown.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def _too_long(*_: Any) -> None:
    raise Late(f"the test took longer than {LONGEST:g} s")


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pytest_runtest_setup() -> None:
    kit_server.recent[:] = [each for each in kit_server.recent if each._kept_log is None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for number, server in enumerate(kit_server.recent, 1):
            lines = server.log().splitlines()[-300:]
            report.sections.append((f"log of server {number} ({server.dir})", "\n".join(lines)))
            events = [f"{each['at']:.3f} {each}" for each in server.events()[-60:]]
            report.sections.append((f"events of server {number}", "\n".join(events)))
    return report
