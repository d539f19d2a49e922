"""Reading a section of a supervisord configuration file (its INI dialect, one program at a time)."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

from gracehooks.check import commands
from gracehooks.check.facts import Program

__all__ = ["NoSuchProgram", "environment", "parse", "read"]


class NoSuchProgram(ValueError):  # noqa: N818 - what happened, not that it is an error
    """The file has no such program, or several and none was named."""


def read(path: Path, name: str | None = None) -> Program:
    """The program `name` of the file; without a name, the only one, or the only one that starts a gunicorn."""
    return parse(path.read_text(errors="replace"), name, str(path.parent))


def parse(text: str, name: str | None = None, here: str = ".") -> Program:
    """The program in the text. Raises NoSuchProgram, and configparser.Error for what is no such file."""
    parser = configparser.RawConfigParser(strict=False, inline_comment_prefixes=(";",), comment_prefixes=("#", ";"))
    parser.read_string(text)
    programs = {
        section.partition(":")[2].strip(): dict(parser.items(section))
        for section in parser.sections()
        if section.startswith("program:")
    }
    found = {each: _program(each, values, here) for each, values in programs.items()}
    if name is not None:
        if name not in found:
            raise NoSuchProgram(f"no [program:{name}]; there is {', '.join(sorted(found)) or 'no program'}")
        return found[name]
    serving = [each for each in found.values() if each.command.args is not None] or list(found.values())
    if len(serving) != 1:
        raise NoSuchProgram(f"name one with --program: {', '.join(sorted(found)) or 'there is no program'}")
    return serving[0]


def _program(name: str, values: dict[str, str], here: str) -> Program:
    known = {"here": here, "program_name": name, "group_name": name, "numprocs": values.get("numprocs", "1")}
    first, second = _expanded(values, {**known, "process_num": "0"}), _expanded(values, {**known, "process_num": "1"})
    numbered = _words(first) - _words(second)
    return Program(name, first, commands.from_text(first.get("command", "")), frozenset(numbered))


def _expanded(values: dict[str, str], known: dict[str, str]) -> dict[str, str]:
    def expand(found: re.Match[str]) -> str:
        value = known.get(found[1])
        if value is None or (found[2] != "s" and not value.isdigit()):
            return found[0]
        return value if found[2] == "s" else f"%{found[2]}" % int(value)

    return {key: re.sub(r"%\((\w+)\)([0-9]*[sd])", expand, " ".join(value.split())) for key, value in values.items()}


def _words(values: dict[str, str]) -> set[str]:
    """The words of the command and of the environment, each value by itself."""
    text = values.get("command", "") + " " + values.get("environment", "")
    return {each for each in re.split(r"[\s,=\"']+", text) if each}


def environment(program: Program) -> dict[str, str]:
    """environment=KEY="value",OTHER="value"."""
    lexer = shlex.shlex(program.values.get("environment", ""), posix=True, punctuation_chars=",")
    lexer.whitespace_split = True
    try:
        words = [each for each in lexer if each.strip(",")]
    except ValueError:
        return {}
    return {key: value for key, equals, value in (word.partition("=") for word in words) if equals}
