"""Reading a systemd unit file, with its drop-ins (systemd.syntax(7), systemd.unit(5))."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from gracehooks.check import commands
from gracehooks.check.facts import Unit

__all__ = ["INFINITY", "environment", "parse", "read", "span"]

INFINITY = float("inf")

_SECONDS = {
    **dict.fromkeys(("us", "usec", "µs"), 1e-6),
    **dict.fromkeys(("ms", "msec"), 1e-3),
    **dict.fromkeys(("", "s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86_400.0),
    **dict.fromkeys(("w", "week", "weeks"), 604_800.0),
}
_MANAGED = {
    "RuntimeDirectory": "/run",
    "StateDirectory": "/var/lib",
    "CacheDirectory": "/var/cache",
    "LogsDirectory": "/var/log",
}


def span(text: str) -> float | None:
    """A time span in seconds ("90", "5min 20s", "infinity"); None where it is none."""
    text = text.strip().lower()
    if text == "infinity":
        return INFINITY
    parts = re.findall(r"([0-9]*\.?[0-9]+)\s*([a-zµ]*)", text)
    if not parts or re.sub(r"([0-9]*\.?[0-9]+)\s*([a-zµ]*)", "", text).strip():
        return None
    try:
        return sum(float(number) * _SECONDS[unit] for number, unit in parts)
    except KeyError:
        return None


def read(path: Path) -> Unit:
    """The unit in the file and in the drop-ins beside it (`<file>.d/*.conf`)."""
    texts = [path.read_text(errors="replace")]
    texts += [each.read_text(errors="replace") for each in sorted(path.parent.glob(f"{path.name}.d/*.conf"))]
    return parse("\n".join(texts), path.name)


def parse(text: str, name: str = "app.service") -> Unit:
    """The [Service] section of the text."""
    section = ""
    lists: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            section = line.strip("[]")
            continue
        key, equals, value = line.partition("=")
        if section != "Service" or not equals:
            continue
        key, value = key.strip(), _specified(value.strip(), name)
        if value:
            lists.setdefault(key, []).append(value)
        else:
            lists[key] = []  # an empty assignment forgets what stood before it
    values = {key: each[-1] for key, each in lists.items() if each}
    start = values.get("ExecStart", "").lstrip("@-:+!")
    return Unit(name, values, {key: tuple(each) for key, each in lists.items()}, commands.from_text(start))


def _specified(value: str, name: str) -> str:
    stem = name.removesuffix(".service")
    prefix, _, instance = stem.partition("@")
    known = {
        "n": name, "N": stem, "p": prefix, "i": instance, "I": instance, "t": "/run", "S": "/var/lib",
        "C": "/var/cache", "L": "/var/log", "E": "/etc", "T": "/tmp", "V": "/var/tmp", "%": "%",
    }  # fmt: skip
    return re.sub(r"%(.)", lambda found: known.get(found[1], found[0]), value)


def environment(unit: Unit) -> dict[str, str]:
    """Environment= and what can be read of EnvironmentFile=."""
    found: dict[str, str] = {}
    for line in unit.lists.get("Environment", ()):
        found.update(_assignments(line))
    for each in unit.lists.get("EnvironmentFile", ()):
        try:
            text = Path(each.lstrip("-")).read_text(errors="replace")
        except OSError:
            continue
        for line in text.splitlines():
            if line.strip() and line.strip()[0] not in "#;":
                found.update(_assignments(line))
    return found


def _assignments(line: str) -> Mapping[str, str]:
    import shlex

    try:
        words = shlex.split(line)
    except ValueError:
        return {}
    return {key: value for key, equals, value in (word.partition("=") for word in words) if equals}


def managed_directories(unit: Unit) -> tuple[str, ...]:
    """The directories that systemd makes for the unit, writable by its user."""
    found = []
    for key, root in _MANAGED.items():
        for line in unit.lists.get(key, ()):
            found += [os.path.join(root, each.partition(":")[0]) for each in line.split()]
    return tuple(found)
