"""Starting the command: fork, then exec or a hard exit, nothing else.

What must hold: the child has a process group of its own, so that a signal to the anchor's group reaches the anchor alone
(not when standard input is a terminal: a debugger must be able to read it); it gets a TERM when the anchor dies; it
starts with default signal actions; and, after a death, it gets the held sockets in gunicorn's own way, GUNICORN_FD beside
a GUNICORN_PID that is nobody's parent, so that the new master promotes itself at once (tests/contract/test_anchor.py).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping, Sequence

from gracehooks.anchor import kernel
from gracehooks.anchor.say import say

__all__ = ["directory_to_start_in", "launch"]


def directory_to_start_in() -> str:
    """The working directory, kept as the symbolic link that the shell came by: the next start is in what it names then."""
    here = os.getcwd()
    came_by = os.environ.get("PWD", "")
    try:
        if os.path.isabs(came_by) and os.path.samefile(came_by, here):
            return came_by
    except OSError:
        pass  # a PWD that is stale
    return here


def launch(
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    directory: str,
    signals: Iterable[int],
    mask: Iterable[int],
    sockets: Sequence[int] = (),
    instead_of: int = 0,
) -> int:
    """Start `command`; its pid. `signals` are those that the anchor handles and `mask` those that stay blocked.

    `sockets` are the descriptors of listening sockets for a master that starts `instead_of` another. Raises OSError where
    the fork fails; a command that cannot be executed ends with 127 (not found) or 126, as in a shell.
    """
    anchor = os.getpid()
    signals, mask = tuple(signals), tuple(mask)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        pid = os.fork()
        if pid == 0:
            _become(command, dict(environ), directory, signals, mask, sockets, instead_of, anchor)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _become(
    command: Sequence[str],
    environ: dict[str, str],
    directory: str,
    signals: Iterable[int],
    mask: Iterable[int],
    sockets: Sequence[int],
    instead_of: int,
    anchor: int,
) -> None:
    """Run in the child: never returns."""
    code = 126
    try:
        signal.set_wakeup_fd(-1)
        for each in (*signals, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(each, signal.SIG_DFL)
        if not os.isatty(0):
            os.setpgid(0, 0)
        if anchor != 1:
            kernel.signal_at_parents_end(signal.SIGTERM)
            if os.getppid() != anchor:
                os._exit(128 + signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if environ.get("LISTEN_PID") == str(anchor):  # sd_listen_fds(3): the sockets at 3, 4, … are still open
            environ["LISTEN_PID"] = str(os.getpid())
        elif sockets:
            for fd in sockets:
                os.set_inheritable(fd, True)
            environ["GUNICORN_FD"] = ",".join(map(str, sockets))
            environ["GUNICORN_PID"] = str(instead_of)
        os.chdir(directory)
        os.execvpe(command[0], list(command), environ)
    except FileNotFoundError as error:
        code = 127
        _complain(command, error)
    except BaseException as error:  # noqa: BLE001 - nothing may get back into the anchor's code
        _complain(command, error)
    finally:
        os._exit(code)


def _complain(command: Sequence[str], error: BaseException) -> None:
    say(f"cannot start {command[0]}: {error}", "ERROR")
