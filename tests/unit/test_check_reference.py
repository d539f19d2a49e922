"""The reference of the rules is made from the rules, and every page that a finding names is there, with its place."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

import pytest

from gracehooks.check import reference
from gracehooks.check.rules import RULES

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_is_current():
    page = (ROOT / "docs/reference/check.md").read_text()
    assert page == reference.page(), "run python -m gracehooks.check.reference > docs/reference/check.md"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_rule_says_everything_and_its_page_has_the_place(rule):
    assert all((rule.finds, rule.happens, rule.moment, rule.cure, rule.source))
    assert not rule.happens.endswith(".")
    for text in (rule.happens, rule.moment, rule.cure):
        list(Formatter().parse(text))
    path, _, place = rule.page.partition("#")
    headings = re.findall(r"(?m)^#+ (.+)$", (ROOT / path).read_text())
    places = {re.sub(r"[^\w\- ]", "", each).strip().lower().replace(" ", "-") for each in headings}
    assert not place or place in places


def test_codes_are_unique():
    assert len({rule.code for rule in RULES}) == len(RULES)
