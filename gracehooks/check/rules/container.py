"""Traps in a compose file and a Dockerfile (docs.docker.com: compose file reference, Dockerfile reference)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gracehooks.check.facts import Command, Facts
from gracehooks.check.rules import Seen, rule, seen
from gracehooks.check.units import span


def _command(facts: Facts) -> Command | None:
    part = facts.service or facts.image
    return part.command if part is not None else None


@rule(
    "container-stop-grace",
    finds="a compose service whose `stop_grace_period` is shorter than the stop budget",
    happens="the container is killed: requests and jobs in flight are lost, and nothing is reported",
    moment="{limit:g} s after `docker compose stop`, `down` or `up` began to replace it; the stop may last {budget} s",
    cure="stop_grace_period: {recommended}s",
    source="docs.docker.com, compose file, stop_grace_period: 10 seconds by default",
    page="docs/how-to/timeouts.md#docker",
)
def stop_grace(facts: Facts) -> Iterator[Seen]:
    if facts.service is None or facts.settings is None:
        return
    given = facts.service.values.get("stop_grace_period")
    limit = span(str(given)) if given is not None else 10.0
    if limit is not None and limit < facts.needed:
        yield seen("stop_grace_period", str(given) if given is not None else "10s (Docker's default)", limit=limit)


@rule(
    "container-stop-signal",
    finds="a `STOPSIGNAL` or `stop_signal` that is gracehooks' hammer",
    happens="the server drops every request and job in flight and reports them as lost",
    moment="at `docker stop`",
    cure="remove it; the default, SIGTERM, is the graceful stop",
    source="docs.docker.com, STOPSIGNAL; gunicorn's signals",
)
def stop_signal(facts: Facts) -> Iterator[Seen]:
    given = ""
    if facts.image is not None:
        given = facts.image.stop_signal
    elif facts.service is not None:
        given = str(facts.service.values.get("stop_signal") or "").upper()
    if given.removeprefix("SIG") in ("INT", "QUIT", "KILL", "2", "3", "9"):
        yield seen("STOPSIGNAL" if facts.image is not None else "stop_signal", given)


@rule(
    "container-shell",
    finds="a command through a shell that stays in front of the server, as the shell form of CMD is",
    happens="the shell is PID 1, and the kernel gives PID 1 no signal that it has no handler for: TERM is lost, the server "
    "never learns that it should stop, and all is killed",
    moment="when the time of `docker stop` is over",
    cure='the exec form: CMD ["gracehooks", "run", "--", "gunicorn", …], or `exec` before the command',
    source="pid_namespaces(7); measured: dash 0.5.12 stays in front of its last command, bash does only in a pipeline",
)
def shell(facts: Facts) -> Iterator[Seen]:
    command = _command(facts)
    if command is not None and command.shell and not (facts.service and facts.service.values.get("init")):
        yield seen("command" if facts.service is not None else "CMD", command.text)


@rule(
    "container-no-anchor",
    finds="a gunicorn that is PID 1 of its container, without `gracehooks run`",
    happens="a container ends with its PID 1, so the old master cannot leave: gracehooks refuses the upgrade",
    moment="at the first upgrade inside the container; where you replace containers instead, as Kubernetes does, never",
    cure='CMD ["gracehooks", "run", "--", "gunicorn", …]',
    source="pid_namespaces(7); gracehooks/gunicorn/successor.py, preflight()",
    advice=True,
)
def no_anchor(facts: Facts) -> Iterator[Seen]:
    command = _command(facts)
    if command is None or command.args is None or command.anchored or command.shell:
        return
    if not (facts.service and facts.service.values.get("init")):
        yield seen("command" if facts.service is not None else "CMD", command.text)


@rule(
    "container-bind-loopback",
    finds="a compose service that publishes ports of a server on the loopback address only",
    happens="a published port leads to the container's own address, where nobody listens",
    moment="at the first request",
    cure='bind = "0.0.0.0:8000"',
    source="gunicorn's settings, bind: 127.0.0.1:8000 by default",
)
def bind_loopback(facts: Facts) -> Iterator[Seen]:
    service, server = facts.service, facts.server
    if service is None or server is None or not service.values.get("ports"):
        return
    if server.bind and all(re.match(r"(127\.|localhost|\[::1\])", each) for each in server.bind):
        yield seen("bind", ", ".join(server.bind))
