"""A real systemd as PID 1 of namespaces of its own: no unit of the host's is seen, nothing of the host's is touched.

It has a `/run` and a control group of its own, and sees only the units that the test writes (SYSTEMD_UNIT_PATH replaces
the whole search path, so no vendor unit can clean the host's /tmp). Unix sockets in `/tmp` are reached from outside.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit import Late, eventually, needs

__all__ = ["Systemd", "booted"]

#: Where `.ci/systemd` puts a systemd that is newer than the host's, or the reason why it could not.
FETCHED = Path(__file__).parents[2] / ".venvs" / "systemd"

_INIT = """\
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/systemd
{bind}
export container=lab SYSTEMD_UNIT_PATH={units} SYSTEMD_GENERATOR_PATH={none} SYSTEMD_COLORS=0
{libraries}
export SYSTEMD_LOG_TARGET=console SYSTEMD_LOG_LEVEL=info
exec {systemd} --system --unit=multi-user.target --show-status=no
"""

#: The root directory of another systemd to be booted, whose programs find their libraries by themselves (patchelf(1)).
OTHER = os.environ.get("TEST_SYSTEMD", "")

#: What other units lean on, empty.
_TARGETS = (
    *("sysinit", "basic", "sockets", "shutdown", "umount"),
    *("multi-user", "rescue", "emergency", "network", "local-fs"),
)


class Systemd:
    """A running systemd; made by `booted`. `units` is where its units are written."""

    def __init__(self, pid: int, units: Path, control: list[str]) -> None:
        self.pid = pid
        self.units = units
        self._control = control

    def run(self, *command: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return subprocess.run(
            ["nsenter", "-t", str(self.pid), "-a", *command], capture_output=True, text=True, timeout=timeout
        )

    def ctl(self, *words: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """systemctl, inside."""
        return self.run(*self._control, *words, timeout=timeout)

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


def version(systemd: str | Path, libraries: Path | None = None) -> int:
    """Which systemd this is."""
    environ = {**os.environ, "LD_LIBRARY_PATH": str(libraries)} if libraries else None
    said = subprocess.run([systemd, "--version"], capture_output=True, text=True, env=environ).stdout
    found = re.match(r"systemd (\d+)", said)
    return int(found[1]) if found else 0


def _at_least(wanted: int) -> tuple[str, str, Path | None]:
    """systemd, systemctl and their libraries: the host's, or the one that was fetched."""
    if OTHER:  # systemd 255 and newer start their helpers by absolute paths: see _INIT
        return f"{OTHER}/usr/lib/systemd/systemd", f"{OTHER}/usr/bin/systemctl", None
    host = needs("systemd")
    if version(host) >= wanted:
        return host, needs("systemctl"), None
    root = FETCHED / "root"
    shared = next(root.glob("**/libsystemd-shared-*.so"), None)
    if shared is None:
        try:
            why = (FETCHED / "why-not").read_text()
        except FileNotFoundError:
            why = ".ci/systemd fetches one"
        pytest.skip(f"the host's systemd is {version(host)}, {wanted} is needed: {why}")
    fetched = str(root / "lib/systemd/systemd")
    assert version(fetched, shared.parent) >= wanted
    return fetched, str(root / "bin/systemctl"), shared.parent


def _remove(group: Path) -> bool:
    for directory, _, _ in os.walk(group, topdown=False):
        try:
            os.rmdir(directory)
        except OSError:
            return False
    return True


@contextmanager
def booted(directory: Path, at_least: int = 0) -> Iterator[Systemd]:
    """Boot systemd with its units in `directory`; skips the test where a right is missing, and says which."""
    systemd, systemctl, libraries = _at_least(at_least)
    for each in ("unshare", "nsenter"):
        needs(each)
    if os.geteuid() != 0:
        pytest.skip("a systemd of one's own needs root (CAP_SYS_ADMIN, for namespaces and mounts)")
    root = _cgroup2()
    if root is None:
        pytest.skip("a systemd of one's own needs a cgroup2 that is mounted read-write; /proc/mounts has none")
    probe = subprocess.run(
        ["unshare", "-fpmuinC", "sh", "-c", "mount --make-rprivate / && mount -t proc proc /proc"], capture_output=True
    )
    try:
        group = Path(tempfile.mkdtemp(prefix="gracelab-", dir=root))
    except OSError as error:
        pytest.skip(f"no control group can be made in {root}: {error}")
    if probe.returncode:
        group.rmdir()
        pytest.skip(f"no namespaces with a /proc of their own (unshare -fpmuinC): {probe.stderr.decode().strip()}")
    units, none = directory / "units", directory / "none"
    for each in (units, none):
        each.mkdir()
    for name in _TARGETS:
        (units / f"{name}.target").write_text(f"[Unit]\nDescription={name}\nDefaultDependencies=no\n")
    load = f"export LD_LIBRARY_PATH={libraries}" if libraries else ""
    bind = f"mount --bind {OTHER}/usr/lib/systemd /usr/lib/systemd" if OTHER else ""
    control = ["env", f"LD_LIBRARY_PATH={libraries}", systemctl] if libraries else [systemctl]
    init = directory / "init.sh"
    init.write_text(_INIT.format(units=units, none=none, systemd=systemd, libraries=load, bind=bind))
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
            assert outside.poll() is None, f"systemd does not boot: {(directory / 'boot.log').read_text()}"
            return int((children.read_text().split() or ["0"])[0])

        machine = Systemd(eventually(inner, what="unshare's child"), units, control)

        def up() -> bool:
            assert outside.poll() is None, f"systemd does not boot: {(directory / 'boot.log').read_text()}"
            return machine.ctl("is-system-running").stdout.strip() in ("running", "degraded")

        try:
            eventually(up, what="systemd is up", poll=0.1)
        except Late as late:
            raise Late(f"{late}\n{(directory / 'boot.log').read_text()}") from None
        yield machine
    finally:
        os.killpg(outside.pid, signal.SIGKILL)  # --kill-child: PID 1 and with it everything inside
        outside.wait()
        eventually(lambda: _remove(group), what="the lab's control group is empty", timeout=20)
