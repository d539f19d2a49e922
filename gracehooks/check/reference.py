"""The reference of `gracehooks check`, made from the rules: `python -m gracehooks.check.reference > docs/reference/check.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from string import Formatter

from gracehooks.check import parser
from gracehooks.check.rules import GROUPS, RULES, Rule

__all__ = ["page"]

_FIELD = r"\{\w+\}"
_ADDITIONS = ("hint", "private")
TITLES = {
    "server": "The configuration and the application",
    "systemd": "systemd",
    "supervisord": "supervisord",
    "kubernetes": "Kubernetes",
    "container": "Docker: compose files and Dockerfiles",
}
INTRODUCTION = """\
# gracehooks check

What in a configuration would lose requests or jobs, or break an upgrade; each trap with what happens, at which moment, and
its cure. It changes nothing and talks to no server that runs.

```sh
gracehooks check                                          # ./gunicorn.conf.py
gracehooks check -c gunicorn.conf.py app:app
gracehooks check --unit /etc/systemd/system/app.service
gracehooks check --supervisor /etc/supervisor/conf.d/app.conf --program app
gracehooks check --manifest deployment.yaml               # or a compose file, or a Dockerfile
```

The gunicorn configuration is read as gunicorn would read it: in the deployment's directory, with its variables and the
arguments of its command line, and with `GUNICORN_CMD_ARGS`. A configuration file is code, so that happens in a child
process with a process group of its own, which is killed afterwards. Then the application is booted once in that child,
within `ready_timeout` (or `--timeout`): imported, its ASGI lifespan started, `ready_path` asked, and the paths of the
probes of a manifest, once as a worker that serves and once as a lame duck. No worker is made: services do not start. Where
it hangs, the finding says in which line. `--no-boot` leaves that out.

Run it with the deployment's own interpreter, so that it imports what the server will import. Reading a manifest or a
compose file needs PyYAML: `pip install 'gracehooks[check]'`.

**Exit codes**: 0 clean, 1 findings, 2 wrong usage or a file that cannot be read. Advice (what could be better, and loses
nothing by itself) does not count as a finding.

**`--json`**: one object `{"clean": bool, "checked": [{"file", "config", "app", "worker_class", "gunicorn", "stop_budget",
"boot": {"ready", "reason", "seconds"} | null, "findings": [...], "advice": [...]}]}`; each finding and each advice has
`code, where, says, happens, when, cure, page`.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Options", "", "| option | meaning |", "| --- | --- |", *_options(), ""]
    parts += ["## The rules", "", "| code | looks for |", "| --- | --- |"]
    parts += [f"| [{each.code}](#{each.code}) | {each.finds}{' (advice)' if each.advice else ''} |" for each in RULES]
    for group in GROUPS:
        parts += ["", f"## {TITLES[group]}"]
        for each in RULES:
            if each.group == group:
                parts += ["", *_section(each)]
    return "\n".join(parts) + "\n"


def _options() -> Iterator[str]:
    # argparse words its help differently in each Python; the actions are the same
    for each in parser()._actions:
        names = ", ".join(f"`{name}{' ' + str(each.metavar) if each.metavar else ''}`" for name in each.option_strings)
        yield f"| {names or f'`{each.metavar}`'} | {each.help} |"


def _section(rule: Rule) -> list[str]:
    lines = [f"### {rule.code}", "", f"Looks for {rule.finds}.", ""]
    for name, text in (("What happens", rule.happens), ("When", rule.moment), ("Cure", rule.cure)):
        lines.append(f"- **{name}**: {'as the value has it' if re.fullmatch(_FIELD, text) else _plain(text)}")
    lines += [f"- **Where that is from**: {rule.source}"]
    if not rule.page.startswith("docs/reference/check.md"):
        target = rule.page.removeprefix("docs/")
        lines += [f"- **More**: [{target}](../{target})"]
    return lines


def _plain(text: str) -> str:
    """The text with its fields as words in brackets, those that are only additions left out."""
    return "".join(
        before + (f"‹{name}›" if name and name not in _ADDITIONS else "")
        for before, name, *_ in Formatter().parse(text)
    )


if __name__ == "__main__":
    print(page(), end="")
