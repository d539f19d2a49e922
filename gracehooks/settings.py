"""Every knob, in one frozen dataclass.

`configure()` is called by the configuration file, which gunicorn executes again at each reload: it only records.
`resolve()` joins what was recorded with the environment (`GRACEHOOKS_<NAME>`, which fills what the file does not set)
and checks it. `current()` is what this process goes by. This module knows no server.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gracehooks.errors import ConfigError

__all__ = ["RANGES", "Settings", "adopt", "configure", "current", "forget", "recorded", "resolve", "restore"]

ENVIRONMENT_PREFIX = "GRACEHOOKS_"
#: Environment variables with the prefix that are not settings.
NOT_SETTINGS = frozenset({"GRACEHOOKS_LOG", "GRACEHOOKS_HANDOVER", "GRACEHOOKS_ANCHOR"})
LONGEST = 86_400.0
TRACKS = ("request", "explicit", "off")


@dataclass(frozen=True)
class Settings:
    """What the operator chose; times are seconds.

    `job_grace` of None stands for half of `job_timeout`; `ready_path` and `state_dir` of None for none and the default.
    """

    ready_timeout: float = 60.0
    ready_path: str | None = None
    probation: float = 2.0
    lame_duck: float = 0.0
    drain_timeout: float = 30.0
    job_timeout: float = 30.0
    job_grace: float | None = None
    cleanup_timeout: float = 5.0
    max_generations: int = 3
    state_dir: str | None = None
    on_event: Callable[[Any], object] | None = None
    track: str = "request"

    @property
    def stop_budget(self) -> float:
        """The longest that a stop may last, in seconds: the sum of its phases."""
        return self.lame_duck + self.leave_budget

    @property
    def leave_budget(self) -> float:
        """The longest that one worker may take to leave, in seconds, once it was told to."""
        return self.drain_timeout + self.job_timeout + self.cleanup_timeout

    @property
    def grace(self) -> float:
        """How long jobs run on undisturbed, in seconds, at most `job_timeout`."""
        return self.job_timeout / 2 if self.job_grace is None else min(self.job_grace, self.job_timeout)


#: For each setting: what it takes, as the messages and the reference say it.
RANGES: Mapping[str, str] = {
    "ready_timeout": f"seconds, more than 0 and at most {LONGEST:g}",
    "ready_path": "a path that begins with /",
    "probation": f"seconds, 0 to {LONGEST:g}",
    "lame_duck": f"seconds, 0 to {LONGEST:g}",
    "drain_timeout": f"seconds, 0 to {LONGEST:g}",
    "job_timeout": f"seconds, 0 to {LONGEST:g}",
    "job_grace": "seconds, 0 to job_timeout",
    "cleanup_timeout": f"seconds, 0 to {LONGEST:g}",
    "max_generations": "a whole number, 1 to 100",
    "state_dir": "the path of a directory",
    "on_event": "a callable that takes one event",
    "track": "one of " + ", ".join(f'"{track}"' for track in TRACKS),
}
SECONDS = ("ready_timeout", "probation", "lame_duck", "drain_timeout", "job_timeout", "job_grace", "cleanup_timeout")
NAMES = tuple(field.name for field in fields(Settings))

_recorded: dict[str, Any] = {}
_current: Settings | None = None


def configure(**settings: Any) -> None:
    """Record settings, as the configuration file does; a later call adds to an earlier one.

    Takes the names of `Settings`. Raises ConfigError at once for an unknown name, a wrong type or a value out of range.
    """
    for name, value in settings.items():
        if name not in NAMES:
            raise ConfigError(
                f"gracehooks.configure: there is no setting {name!r}; the settings are {', '.join(NAMES)}"
            )
        _recorded[name] = _checked(name, value, "gracehooks.configure")
    _check_together(replace(Settings(), **_recorded))


def recorded() -> dict[str, Any]:
    """What `configure` has recorded so far (a copy), to be given back to `restore` when a reload fails."""
    return dict(_recorded)


def forget() -> None:
    """Forget what was recorded, before a configuration file is executed again."""
    _recorded.clear()


def restore(earlier: Mapping[str, Any]) -> None:
    """Record `earlier` and nothing else: a reload has failed and the old configuration goes on."""
    _recorded.clear()
    _recorded.update(earlier)


def resolve(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of the configuration file and, where it sets none, of the environment.

    Raises ConfigError that names the setting, the value and the allowed range.
    """
    environ = os.environ if environ is None else environ
    chosen: dict[str, Any] = {}
    for key, text in sorted(environ.items()):
        if not key.startswith(ENVIRONMENT_PREFIX) or key in NOT_SETTINGS:
            continue
        name = key[len(ENVIRONMENT_PREFIX) :].lower()
        if name not in NAMES:
            known = ", ".join(ENVIRONMENT_PREFIX + each.upper() for each in NAMES if each != "on_event")
            raise ConfigError(f"{key}: there is no such setting; the settings are {known}")
        if name == "on_event":
            raise ConfigError(f"{key}: on_event cannot come from the environment; use gracehooks.configure(on_event=…)")
        chosen[name] = _checked(name, _parsed(name, text), key)
    chosen.update(_recorded)
    return _check_together(replace(Settings(), **chosen))


def adopt(settings: Settings) -> None:
    """Go by `settings` from now on in this process."""
    global _current
    _current = settings


def current() -> Settings:
    """What this process goes by: what was adopted, else what resolves now, else the defaults.

    Raises ConfigError when nothing was adopted and the environment is wrong.
    """
    return _current if _current is not None else resolve()


def _parsed(name: str, text: str) -> Any:
    if name in SECONDS:
        try:
            return float(text)
        except ValueError:
            return text
    if name == "max_generations":
        try:
            return int(text)
        except ValueError:
            return text
    return text


def _checked(name: str, value: Any, where: str) -> Any:
    wrong = ConfigError(f"{where}: {name} = {value!r} is not valid; it takes {RANGES[name]}")
    if name in SECONDS:
        if value is None and name == "job_grace":
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LONGEST:
            raise wrong
        if name == "ready_timeout" and value == 0:
            raise wrong
        return float(value)
    if name == "max_generations":
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100:
            raise wrong
        return value
    if name == "track":
        if value not in TRACKS:
            raise wrong
        return value
    if value is None:
        return None
    if name == "on_event":
        if not callable(value):
            raise wrong
        return value
    if name == "state_dir":
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise wrong
        return os.fspath(value)
    if not isinstance(value, str) or not value.startswith("/"):
        raise wrong
    return value


def _check_together(settings: Settings) -> Settings:
    if settings.job_grace is not None and settings.job_grace > settings.job_timeout:
        raise ConfigError(
            f"job_grace = {settings.job_grace!r} is not valid; "
            f"it takes {RANGES['job_grace']} ({settings.job_timeout:g})"
        )
    return settings
