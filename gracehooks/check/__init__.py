"""`gracehooks check`: what in this configuration would lose requests or jobs, or break an upgrade, each with its cure.

It reads the gunicorn configuration as gunicorn would and, where they are named, the systemd unit, the supervisord section,
the Kubernetes manifest, compose file or Dockerfile; it boots the application once in a child and says whether it would
become ready. It changes nothing and talks to no server that runs. Imports no server: what must load code runs in a child.
"""

from __future__ import annotations

import argparse
import configparser
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gracehooks.check import report
from gracehooks.check.deployments import Asked, each_deployment
from gracehooks.check.rules import judge

__all__ = ["add_arguments", "main"]

CLEAN, FINDINGS, USAGE = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("app", nargs="?", metavar="APP", help="the application, as gunicorn is given it")
    parser.add_argument(
        "-c", "--config", metavar="CONF", help="gunicorn's configuration file (./gunicorn.conf.py where there is one)"
    )
    parser.add_argument("--unit", metavar="FILE", type=Path, help="a systemd service, with the drop-ins beside it")
    parser.add_argument("--supervisor", metavar="FILE", type=Path, help="a supervisord configuration file")
    parser.add_argument(
        "--manifest", metavar="FILE", type=Path, help="a Kubernetes manifest, a compose file or a Dockerfile"
    )
    parser.add_argument(
        "--program",
        metavar="NAME",
        help="which one: the [program:NAME], the container or the service, where several could be meant",
    )
    parser.add_argument("--no-boot", action="store_true", help="do not boot the application")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        help="how long the reading and the boot may each take, in seconds (30, and ready_timeout)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86_400:
        raise ValueError(text)
    return value


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = argparse.ArgumentParser(
        prog="gracehooks check",
        description="What in a configuration would lose requests or jobs, or break an upgrade; each with its cure.",
        epilog="exit codes:\n  0  clean\n  1  findings\n  2  wrong usage, or a file that cannot be read",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(made)
    return made


def main(arguments: Sequence[str] | argparse.Namespace | None = None) -> int:
    """Run the command; its exit code. Takes the words of the command line, or what a parser made of them."""
    options = arguments if isinstance(arguments, argparse.Namespace) else parser().parse_args(arguments)
    asked = Asked(
        config=options.config,
        app=options.app,
        unit=options.unit,
        supervisor=options.supervisor,
        program=options.program,
        manifest=options.manifest,
        boot=not options.no_boot,
        timeout=options.timeout or 30.0,
        boot_timeout=options.timeout,
    )
    try:
        results = [(facts, judge(facts)) for facts, _ in each_deployment(asked)]
    except (OSError, ValueError, configparser.Error) as error:
        print(f"gracehooks check: {error}", file=sys.stderr)
        return USAGE
    if options.json:
        print(json.dumps(report.as_json(results), indent=2))
    else:
        print(report.as_text(results))
    return FINDINGS if any(not each.advice for _, findings in results for each in findings) else CLEAN
