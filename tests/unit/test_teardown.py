"""An interpreter that leaves out its teardown: what was written is there, what was registered has run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAD = "import atexit, gc, os, sys\nfrom gracehooks import teardown\n"


def run(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD + code], cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )


def test_what_a_file_holds_back_is_written_and_the_exit_code_is_kept(tmp_path: Path) -> None:
    done = run(
        "file = open('text', 'w')\nraw = open('raw', 'wb')\n"
        "def callback():\n    file.write('atexit')\n    raw.write(b'atexit')\n"
        "atexit.register(callback)\nteardown.leave_out_at_exit()\nteardown.leave_out_at_exit()\n"
        "atexit.register(callback)\n"
        "class Loud:\n    def __del__(self): print('torn down')\n"
        "loud = Loud(); loud.itself = loud\n"
        "sys.exit(3)\n",
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    assert (tmp_path / "text").read_text() == (tmp_path / "raw").read_text() == "atexit"


def test_a_forked_child_that_exits_hard_flushes_as_well(tmp_path: Path) -> None:
    done = run(
        "if os.fork() == 0:\n    file = open('text', 'w')\n    file.write('child')\n"
        "    teardown.flush_files()\n    os._exit(0)\n"
        "os.wait()\n",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "text").read_text() == "child"


def test_without_a_file_and_with_those_of_logs_alone_nothing_is_looked_for(tmp_path: Path) -> None:
    done = run(
        "import logging, tempfile\nlogging.basicConfig(filename='log')\nnameless = tempfile.TemporaryFile()\n"
        "reading = open('log')\n"
        "assert not teardown._has_files()\nfile = open('file', 'a')\nassert teardown._has_files()\n",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
