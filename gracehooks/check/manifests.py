"""Reading what describes containers: Kubernetes manifests, compose files, Dockerfiles. Needs PyYAML for the first two."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gracehooks.check import commands
from gracehooks.check.facts import Command, Image, Service, Workload

__all__ = ["NotRead", "Parts", "environment", "parse", "read"]

Parts = list["Workload | Service | Image"]
_TEMPLATED = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet")


class NotRead(ValueError):  # noqa: N818 - what happened, not that it is an error
    """The file is none of the three, or PyYAML is missing; the message says what to do."""


def read(path: Path, name: str | None = None) -> Parts:
    """What the file describes that may run the server; `name` picks a container or a service."""
    text = path.read_text(errors="replace")
    if re.search(r"(?im)^\s*FROM\s+\S+", text) and path.suffix not in (".yaml", ".yml", ".json"):
        return [dockerfile(text)]
    return parse(text, name)


def parse(text: str, name: str | None = None) -> Parts:
    """The workloads of a manifest or the services of a compose file."""
    try:
        import yaml
    except ImportError as error:
        raise NotRead("PyYAML is needed to read it: pip install 'gracehooks[check]'") from error
    try:
        documents = [each for each in yaml.safe_load_all(text) if isinstance(each, Mapping)]
    except yaml.YAMLError as error:
        raise NotRead(
            f"it is no YAML ({str(error).splitlines()[0]}); render a template first (helm template, kustomize build)"
        ) from error
    found: Parts = []
    for document in documents:
        if isinstance(document.get("services"), Mapping) and "kind" not in document:
            found += _services(document["services"], name)
        found += _workloads(document, name)
    if not found:
        raise NotRead("no container in it starts gunicorn; name the container or the service with --program")
    return found


# -- Kubernetes ----------------------------------------------------------------------------------------------------
def _workloads(document: Mapping[str, Any], name: str | None) -> list[Workload]:
    kind = str(document.get("kind", ""))
    if kind == "List":
        return [found for each in document.get("items") or [] for found in _workloads(each, name)]
    spec = document.get("spec") or {}
    pod = spec if kind == "Pod" else (spec.get("template") or {}).get("spec") if kind in _TEMPLATED else None
    if not isinstance(pod, Mapping):
        return []
    containers = [each for each in pod.get("containers") or [] if isinstance(each, Mapping)]
    title = str((document.get("metadata") or {}).get("name", ""))
    every = [Workload(kind, title, document, pod, each, _container_command(each)) for each in containers]
    return _chosen(every, name, [str(each.container.get("name", "")) for each in every])


def _container_command(container: Mapping[str, Any]) -> Command:
    words = [str(each) for key in ("command", "args") for each in container.get(key) or []]
    return commands.parse(words) if words else Command("")


def _chosen(every: list[Any], name: str | None, names: list[str]) -> list[Any]:
    """Those that are named; else those that start gunicorn; else the only one that there is."""
    if name is not None:
        return [each for each, own in zip(every, names, strict=True) if own == name]
    serving = [each for each in every if each.command is not None and each.command.args is not None]
    if serving:
        return serving
    silent = [each for each in every if each.command is None or not each.command.text]
    return silent if len(every) == 1 else []


# -- compose -------------------------------------------------------------------------------------------------------
def _services(services: Mapping[str, Any], name: str | None) -> list[Service]:
    every = [
        Service(str(each), values, _service_command(values))
        for each, values in services.items()
        if isinstance(values, Mapping)
    ]
    return _chosen(every, name, [each.name for each in every])


def _service_command(values: Mapping[str, Any]) -> Command | None:
    words: list[str] = []
    for key in ("entrypoint", "command"):
        value = values.get(key)
        if isinstance(value, str):
            words += shlex.split(value)  # compose splits a string; no shell runs it
        elif isinstance(value, list):
            words += [str(each) for each in value]
    return commands.parse(words) if words else None


# -- Dockerfile ----------------------------------------------------------------------------------------------------
def dockerfile(text: str) -> Image:
    """ENTRYPOINT, CMD and STOPSIGNAL of the last stage."""
    entry: Command | list[str] | None = None
    command: Command | list[str] | None = None
    signal = "SIGTERM"
    for word, rest in _instructions(text):
        if word == "FROM":
            entry, command, signal = None, None, "SIGTERM"
        elif word == "ENTRYPOINT":
            entry = _form(rest)
        elif word == "CMD":
            command = _form(rest)
        elif word == "STOPSIGNAL":
            signal = rest.strip().upper()
    if isinstance(entry, Command):
        return Image(entry, signal)  # the shell form of ENTRYPOINT ignores CMD
    if isinstance(command, Command):
        return Image(commands.parse([*(entry or []), "/bin/sh", "-c", command.text], command.text), signal)
    words = [*(entry or []), *(command or [])]
    return Image(commands.parse(words) if words else None, signal)


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    for line in re.sub(r"\\\s*\n", " ", re.sub(r"(?m)^\s*#.*\n?", "", text)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word:
            yield word.upper(), rest.strip()


def _form(rest: str) -> Command | list[str]:
    try:
        words = json.loads(rest)
    except ValueError:
        words = None
    return [str(each) for each in words] if isinstance(words, list) else commands.shell_form(rest)


def environment(part: Workload | Service | Image) -> dict[str, str]:
    """The variables that are written out; those that come from elsewhere are not known."""
    if isinstance(part, Workload):
        return {
            str(each["name"]): str(each["value"])
            for each in part.container.get("env") or []
            if isinstance(each, Mapping) and "value" in each and "name" in each
        }
    if isinstance(part, Service):
        given = part.values.get("environment") or {}
        if isinstance(given, list):
            given = dict(str(each).partition("=")[::2] for each in given if "=" in str(each))
        return {str(key): str(value) for key, value in given.items() if value is not None}
    return {}
