"""The traps. Each rule is a pure function from facts to what it saw; its texts stand beside it, for people and the docs.

A rule speaks only of what the facts show: where something is not known, it is silent. Every claim was read in the host's
source or manual, or tried; `source` says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from gracehooks.check.facts import Facts, Finding

__all__ = ["RULES", "Rule", "Seen", "judge", "rule"]

REFERENCE = "docs/reference/check.md"
GROUPS = ("server", "systemd", "supervisord", "kubernetes", "container")


@dataclass(frozen=True)
class Seen:
    """What a rule saw: the setting, what it says, and the values for the rule's texts."""

    where: str
    says: str
    values: dict[str, object] = field(default_factory=dict)


def seen(where: str, says: str, **values: object) -> Seen:
    """A sighting; `values` fill the braces of the rule's texts."""
    return Seen(where, says, values)


Look = Callable[[Facts], Iterable[Seen]]


@dataclass(frozen=True)
class Rule:
    """One trap: what it looks for, what happens, at which moment, the cure; and how to see it in the facts."""

    code: str
    group: str
    finds: str
    happens: str
    moment: str
    cure: str
    source: str
    page: str
    advice: bool
    look: Look

    def judge(self, facts: Facts) -> Iterator[Finding]:
        """The findings of this rule."""
        for each in self.look(facts):
            values = {"budget": f"{facts.budget:g}", "recommended": facts.recommended, **each.values}
            yield Finding(
                self.code,
                each.where,
                each.says,
                self.happens.format(**values),
                self.moment.format(**values),
                self.cure.format(**values),
                self.page,
                self.advice,
            )


RULES: list[Rule] = []


def rule(
    code: str,
    *,
    finds: str,
    happens: str,
    moment: str,
    cure: str,
    source: str,
    page: str = "",
    advice: bool = False,
) -> Callable[[Look], Look]:
    """Register a rule; `page` is the page of the docs, by default the rule's own place in the reference."""
    group = next((each for each in GROUPS if code.startswith(each + "-")), "server")

    def register(look: Look) -> Look:
        RULES.append(
            Rule(code, group, finds, happens, moment, cure, source, page or f"{REFERENCE}#{code}", advice, look)
        )
        return look

    return register


def judge(facts: Facts) -> list[Finding]:
    """Every finding, in the order of the rules."""
    return [finding for each in RULES for finding in each.judge(facts)]


from gracehooks.check.rules import container, kubernetes, server, supervisord, systemd  # noqa: E402, F401 - they register

RULES.sort(key=lambda each: GROUPS.index(each.group))
