"""The anchor proper stands alone: what it loads is little, and nothing of a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gracehooks.anchor

MAIN = Path(gracehooks.anchor.__file__).with_name("__main__.py")
LIST = """
import sys
sys.argv[1:] = ["--rehearse", "--", "command"]
path = {main!r}
try:
    exec(compile(open(path).read(), path, "exec"), {{"__name__": "__main__", "__package__": None, "__file__": path}})
except ValueError:
    pass  # there is no state to rehearse with
print(*sys.modules)
"""
OURS = {"gracehooks", "gracehooks.anchor", "gracehooks.processes"}
#: Each of these costs a megabyte or some milliseconds, and would be loaded for a convenience.
TOO_MUCH = {"dataclasses", "inspect", "logging", "typing", "argparse", "subprocess", "threading", "pathlib", "asyncio"}


def test_it_loads_little() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LIST.format(main=str(MAIN))], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    ours = {each for each in loaded if each.split(".")[0] == "gracehooks"}
    assert {each for each in ours if not each.startswith("gracehooks.anchor.")} == OURS
    assert "gracehooks.anchor.mooring" not in ours, "the master's side"
    assert not loaded & TOO_MUCH
    assert not {each for each in loaded if each.split(".")[0] in ("gunicorn", "uvicorn", "gevent")}
