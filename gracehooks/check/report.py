"""What `gracehooks check` prints: short and grouped for people, one object for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from gracehooks.check.facts import Facts, Finding

__all__ = ["as_json", "as_text"]

Result = tuple[Facts, list[Finding]]


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """The object of `--json`."""
    return {
        "clean": not any(not each.advice for _, findings in results for each in findings),
        "checked": [_checked(facts, findings) for facts, findings in results],
    }


def _checked(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    server, boot = facts.server, facts.boot
    return {
        "file": facts.file or None,
        "config": server.config if server is not None else None,
        "app": server.app if server is not None else None,
        "worker_class": server.worker_class if server is not None else None,
        "gunicorn": server.version if server is not None else None,
        "stop_budget": facts.budget if server is not None else None,
        "boot": None if boot is None else {"ready": not boot.failure, "reason": boot.failure, "seconds": boot.seconds},
        "findings": [_as_object(each) for each in findings if not each.advice],
        "advice": [_as_object(each) for each in findings if each.advice],
    }


def _as_object(finding: Finding) -> dict[str, str]:
    return {
        "code": finding.code,
        "where": finding.where,
        "says": finding.says,
        "happens": finding.happens,
        "when": finding.moment,
        "cure": finding.cure,
        "page": finding.page,
    }


def as_text(results: Sequence[Result], width: int = 100) -> str:
    """Lines for a person: what was looked at, what was found, what to do."""
    lines: list[str] = []
    total = sum(not each.advice for _, findings in results for each in findings)
    told: set[tuple[str, str, str]] = set()
    for facts, findings in results:
        lines += [*([""] if lines else []), _title(facts), f"  {_boot(facts)}"]
        new = [each for each in findings if (each.code, each.where, each.says) not in told]
        told |= {(each.code, each.where, each.says) for each in findings}
        for each in sorted(new, key=lambda finding: finding.advice):
            lines += ["", *_finding(each, width)]
    lines += [
        "",
        f"{total} finding{'s' if total != 1 else ''}" if total else "clean: nothing here loses a request or a job",
    ]
    return "\n".join(lines)


def _title(facts: Facts) -> str:
    server = facts.server
    parts = [facts.file] if facts.file else []
    if server is not None:
        parts += [
            part for part in (server.config, server.app, server.worker_class, f"gunicorn {server.version}") if part
        ]
    return " · ".join(parts or ["configuration"])


def _boot(facts: Facts) -> str:
    boot = facts.boot
    budget = f"a stop lasts at most {facts.budget:g} s" if facts.server is not None else "not read"
    if facts.host is None and (facts.unit is not None or facts.program is not None):
        budget += "; its directory is not on this host, so no path was looked at"
    if boot is None:
        return f"{budget}; not booted"
    if boot.failure:
        return f"{budget}; it would NOT become ready"
    return f"{budget}; it would become ready (in {boot.seconds:.1f} s here)"


def _finding(finding: Finding, width: int) -> list[str]:
    lines = [f"  {'advice' if finding.advice else 'TRAP  '}  {finding.code}   {finding.where}: {finding.says}"]
    for name, text in (
        ("happens", finding.happens),
        ("when", finding.moment),
        ("cure", finding.cure),
        ("page", finding.page),
    ):
        lines += textwrap.wrap(
            text,
            width,
            initial_indent=f"    {name:<8}",
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines
