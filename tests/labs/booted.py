"""A real systemd as PID 1 of namespaces of its own: no unit of the host's is seen, nothing of the host's is touched.

It has a `/run` and a control group of its own, and sees only the units that the test writes (SYSTEMD_UNIT_PATH replaces
the whole search path, so no vendor unit can clean the host's /tmp). Unix sockets in `/tmp` are reached from outside.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit import Late, eventually, needs

__all__ = ["Systemd", "booted"]

_INIT = """\
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/systemd
export container=lab SYSTEMD_UNIT_PATH={units} SYSTEMD_GENERATOR_PATH={none} SYSTEMD_COLORS=0
export SYSTEMD_LOG_TARGET=console SYSTEMD_LOG_LEVEL=info
exec {systemd} --system --unit=multi-user.target --show-status=no
"""

#: What other units lean on, empty.
_TARGETS = (
    *("sysinit", "basic", "sockets", "shutdown", "umount"),
    *("multi-user", "rescue", "emergency", "network", "local-fs"),
)


class Systemd:
    """A running systemd; made by `booted`. `units` is where its units are written."""

    def __init__(self, pid: int, units: Path) -> None:
        self.pid = pid
        self.units = units

    def run(self, *command: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return subprocess.run(
            ["nsenter", "-t", str(self.pid), "-a", *command], capture_output=True, text=True, timeout=timeout
        )

    def ctl(self, *words: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """systemctl, inside."""
        return self.run("systemctl", *words, timeout=timeout)

    def do(self, *words: str) -> None:
        """systemctl, inside; it must succeed."""
        done = self.ctl(*words)
        assert done.returncode == 0, f"systemctl {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a unit."""
        lines = self.ctl("show", unit, "-p", ",".join(names)).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


def _cgroup2() -> Path | None:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(place)
    return None


def _remove(group: Path) -> bool:
    for directory, _, _ in os.walk(group, topdown=False):
        try:
            os.rmdir(directory)
        except OSError:
            return False
    return True


@contextmanager
def booted(directory: Path) -> Iterator[Systemd]:
    """Boot systemd with its units in `directory`; skips the test where the machine does not let us."""
    systemd = needs("systemd")
    for each in ("unshare", "nsenter", "systemctl"):
        needs(each)
    root = _cgroup2()
    if os.geteuid() != 0 or root is None:
        pytest.skip("a systemd of one's own needs root and a writable cgroup2")
    probe = subprocess.run(
        ["unshare", "-fpmuinC", "sh", "-c", "mount --make-rprivate / && mount -t proc proc /proc"], capture_output=True
    )
    group = root / f"gracelab-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    if probe.returncode:
        group.rmdir()
        pytest.skip(f"no namespaces can be made: {probe.stderr.decode()}")
    units, none = directory / "units", directory / "none"
    for each in (units, none):
        each.mkdir()
    for name in _TARGETS:
        (units / f"{name}.target").write_text(f"[Unit]\nDescription={name}\nDefaultDependencies=no\n")
    init = directory / "init.sh"
    init.write_text(_INIT.format(units=units, none=none, systemd=systemd))
    with open(directory / "boot.log", "wb") as log:
        outside = subprocess.Popen(
            ["sh", "-c", f"echo $$ > {group}/cgroup.procs && exec unshare -fpmuinC --kill-child sh {init}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children")

        def inner() -> int:
            if outside.poll() is not None:
                pytest.skip(f"systemd does not boot here: {(directory / 'boot.log').read_text()}")
            return int((children.read_text().split() or ["0"])[0])

        machine = Systemd(eventually(inner, what="unshare's child"), units)

        def up() -> bool:
            if outside.poll() is not None:
                pytest.skip(f"systemd does not boot here: {(directory / 'boot.log').read_text()}")
            return machine.ctl("is-system-running").stdout.strip() in ("running", "degraded")

        try:
            eventually(up, what="systemd is up", poll=0.1)
        except Late as late:
            pytest.skip(f"systemd does not get up here ({late}): {(directory / 'boot.log').read_text()}")
        yield machine
    finally:
        os.killpg(outside.pid, signal.SIGKILL)  # --kill-child: PID 1 and with it everything inside
        outside.wait()
        eventually(lambda: _remove(group), what="the lab's control group is empty", timeout=20)
