"""`gracehooks run`: one small process with a stable pid above the gunicorn master, for supervisord and containers.

It starts the command, passes signals on to the master that serves, adopts each new master, starts it again with the same
sockets after a death, and ends with its code. `main` looks at the arguments and executes the anchor proper in a Python of
its own, isolated from site-packages: no `sitecustomize`, no thread, and nothing of what the command line has loaded stays.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["USAGE", "main"]

USAGE = """\
usage: gracehooks run [--] COMMAND [ARGUMENT ...]

Start COMMAND, which ends in a gunicorn master, and stay above it under one pid: for supervisord and containers.
HUP, USR1, USR2, TTIN, TTOU and WINCH are passed on to the master that serves; TERM, INT and QUIT stop it, within the
stop budget. A master that dies is started again with its sockets. The exit code is the master's (128 + n for signal n).

example: gracehooks run -- gunicorn -c gunicorn.conf.py app:app
"""


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` names, after an optional `--`; returns only where that cannot begin (2), or for help."""
    command = list(argv)
    if command[:1] == ["--"]:
        command = command[1:]
    elif command[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if not command or command[0].startswith("-"):
        what = f"run takes no option {command[0]}" if command else "run needs a command"
        print(f"gracehooks: {what}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    from gracehooks.anchor import driver, renewal

    sys.stdout.flush()
    sys.stderr.flush()
    if not sys.executable:
        return driver.main(["--", *command])
    signal.pthread_sigmask(signal.SIG_BLOCK, driver.HANDLED)  # until the anchor stands: PID 1 would lose them
    os.execv(sys.executable, renewal.arguments(command))
    raise AssertionError("exec does not return")
