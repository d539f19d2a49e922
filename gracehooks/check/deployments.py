"""From the files that are named to facts: one `Facts` for each deployment. This is the part that acts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gracehooks.check import host, manifests, programs, units
from gracehooks.check.facts import Command, Facts, Image, Service, Workload
from gracehooks.gunicorn.reading import Reading, Request, read

__all__ = ["Asked", "each_deployment"]


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    config: str | None = None
    app: str | None = None
    unit: Path | None = None
    supervisor: Path | None = None
    program: str | None = None
    manifest: Path | None = None
    boot: bool = True
    timeout: float = 30.0
    boot_timeout: float | None = None


@dataclass(frozen=True)
class _Deployment:
    """One of the files, read: what it is, and how it would start the server."""

    file: str = ""
    parts: Mapping[str, Any] | None = None
    command: Command | None = None
    directory: str = ""
    environ: Mapping[str, str] | None = None
    user: str | None = None
    #: Whether its paths are those of this host.
    here: bool = True
    probes: tuple[str, ...] = ()


def each_deployment(asked: Asked) -> Iterator[tuple[Facts, Reading]]:
    """The facts of each deployment that is named; of the bare configuration where none is.

    Raises OSError, ValueError and what `manifests` and `programs` raise for files that are not what they should be.
    """
    for each in list(_described(asked)) or [_Deployment()]:
        request = _request(asked, each)
        found = read(request, timeout=asked.timeout, boot_timeout=asked.boot_timeout)
        seen = None
        if each.here and (not each.directory or os.path.isdir(each.directory)):
            places = [each.directory, each.command.program if each.command is not None else ""]
            seen = host.look(found.server, found.settings, each.user, places)
        yield (
            Facts(
                found.server,
                found.settings,
                found.failure,
                found.boot,
                seen,
                file=each.file,
                environ=each.environ or {},
                **(each.parts or {}),
            ),
            found,
        )


def _described(asked: Asked) -> Iterator[_Deployment]:
    if asked.unit is not None:
        unit = units.read(asked.unit)
        dynamic = unit.get("DynamicUser").lower() in ("yes", "true", "on", "1")
        yield _Deployment(
            asked.unit.name,
            {"unit": unit},
            unit.command,
            unit.get("WorkingDirectory", "/").lstrip("-"),
            units.environment(unit),
            unit.get("User", "root") if not dynamic else "dynamic-user-of-the-unit",
        )
    if asked.supervisor is not None:
        program = programs.read(asked.supervisor, asked.program)
        yield _Deployment(
            f"{asked.supervisor.name} [program:{program.name}]",
            {"program": program},
            program.command,
            program.values.get("directory", ""),
            programs.environment(program),
            program.values.get("user"),
        )
    if asked.manifest is not None:
        for part in manifests.read(asked.manifest, asked.program):
            yield _contained(asked.manifest.name, part)


def _contained(file: str, part: Workload | Service | Image) -> _Deployment:
    environ = manifests.environment(part)
    if isinstance(part, Workload):
        paths = [each for each in map(part.path, ("readiness", "liveness")) if each is not None]
        return _Deployment(
            f"{file} {part.kind} {part.name}",
            {"workload": part},
            part.command,
            environ=environ,
            here=False,
            probes=tuple(dict.fromkeys(paths)),
        )
    if isinstance(part, Service):
        return _Deployment(f"{file} {part.name}", {"service": part}, part.command, environ=environ, here=False)
    return _Deployment(file, {"image": part}, part.command, environ=environ, here=False)


def _request(asked: Asked, deployment: _Deployment) -> Request:
    """gunicorn's arguments: those of the deployment, and those of the command line in their stead where they are given."""
    args = list(deployment.command.args or ()) if deployment.command is not None else []
    if asked.config is not None:
        args += ["-c", asked.config]
    if asked.app is not None:
        args = [*_without_app(args), asked.app]
    directory = deployment.directory
    if not directory or not os.path.isdir(directory) or (asked.config is not None and not os.path.isabs(asked.config)):
        directory = os.getcwd()  # of another machine, or the operator says by the file where things are
    return Request(
        tuple(args), directory, deployment.environ, deployment.user, boot=asked.boot, probes=deployment.probes
    )


def _without_app(args: list[str]) -> list[str]:
    """The arguments without a last word that is no option and no option's value: the application."""
    if args and not args[-1].startswith("-") and (len(args) == 1 or not args[-2].startswith("-") or "=" in args[-2]):
        return args[:-1]
    return args
