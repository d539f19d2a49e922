"""Command lines, taken apart: where gunicorn begins in them, what stands before it, and whether a shell stays in front.

Measured: Debian's and Ubuntu's /bin/sh (dash 0.5.12) stays in front of what `sh -c` starts, also of a single command;
bash replaces itself by the last command, unless that is part of a pipeline; `exec` does it in every shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from gracehooks.check.facts import Command

__all__ = ["from_text", "parse", "shell_form"]

SHELLS = ("sh", "dash", "ash", "bash", "zsh", "ksh")
#: Shells that replace themselves by the last simple command of `-c`.
REPLACING = ("bash", "zsh", "ksh")
_PYTHON = re.compile(r"^(python|pypy)[0-9.]*$")


def _name(word: str) -> str:
    return word.rpartition("/")[2]


def from_text(text: str) -> Command:
    """A command line in one text, split as a shell would split words; no shell runs it."""
    try:
        return parse(shlex.split(text), text)
    except ValueError:
        return Command(text)


def shell_form(text: str, shell: str = "/bin/sh") -> Command:
    """A command line that a shell is given, as a Dockerfile's shell form is."""
    return parse([shell, "-c", text], text)


def parse(words: Sequence[str], text: str = "") -> Command:
    """A command line as the list of its words."""
    text = text or shlex.join(words)
    anchored = False
    for at, word in enumerate(words):
        name = _name(word)
        if name in SHELLS:
            script = _script(words[at + 1 :])
            if script is None:
                return Command(text)
            return _inside_shell(name, script, text, anchored)
        if name == "gracehooks" and words[at + 1 : at + 2] == ["run"]:
            anchored = True
        elif name == "gunicorn":
            program = (
                words[at - 2] if at >= 2 and words[at - 1] == "-m" and _PYTHON.match(_name(words[at - 2])) else word
            )
            return Command(text, tuple(words[at + 1 :]), program, anchored)
    return Command(text, anchored=anchored)


def _script(rest: Sequence[str]) -> str | None:
    """What the shell is given by `-c`; None where it runs a file."""
    for at, word in enumerate(rest):
        if not word.startswith("-"):
            return None
        if "c" in word and not word.startswith("--"):
            return rest[at + 1] if len(rest) > at + 1 else None
    return None


def _inside_shell(shell: str, script: str, text: str, anchored: bool) -> Command:
    """The part of the script that starts gunicorn, with the shell where it stays in front of it."""
    parts = re.split(r"(\|\||&&|;|\n|\||&(?!&))", script)
    for at in range(0, len(parts), 2):
        try:
            words = shlex.split(parts[at])
        except ValueError:
            continue
        if not any(_name(word) == "gunicorn" for word in words):
            continue
        while words and re.match(r"^[A-Za-z_]\w*=", words[0]):
            words.pop(0)
        replaced = bool(words) and words[0] == "exec"
        found = parse(words[1:] if replaced else words, text)
        rest = "".join(parts[at + 1 :]).strip(" ;\n\t")
        piped = parts[at + 1 : at + 2] == ["|"]
        stays = (not replaced or piped) and (shell not in REPLACING or bool(rest))
        return Command(text, found.args, found.program, anchored or found.anchored, shell if stays else found.shell)
    return Command(text, anchored=anchored)
