"""A disk that is full at the moment of a deploy: nothing is lost, the command says why, and the history catches up."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit import eventually, load, serve


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount a file system: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> None:
    """Not a byte is left."""
    with open(disk / "fill", "wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 512):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_full_disk_is_told_and_costs_nothing(tmp_path: Path):
    with small_disk(tmp_path / "disk") as disk:
        state = disk / "state"
        with serve(config=f"gracehooks.configure(state_dir={str(state)!r})") as server, load(server) as traffic:
            fill(disk)
            for command in ("upgrade", "reload"):
                refused = server.cli(command, "--state-dir", str(state))
                assert refused.returncode == 3, refused
                assert f"{command} refused: {state} cannot be written (No space left on device)" in refused.stdout
            by_signal = server.upgrade()
            assert by_signal["event"] == "UpgradeCompleted", by_signal
            assert "cannot write the state" in server.log()
            (disk / "fill").unlink()
            eventually(
                lambda: json.loads((state / "status.json").read_text())["generation"] == 2, what="the status catches up"
            )
            history = state / "history.jsonl"
            eventually(
                lambda: history.exists() and by_signal["id"] in history.read_text(), what="the history catches up"
            )
            mended = server.cli("upgrade", "--state-dir", str(state))
            assert mended.returncode == 0, mended
        assert not traffic.lost, traffic.lost
