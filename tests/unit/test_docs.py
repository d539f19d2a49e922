"""The documentation is true: generated parts are current, examples compile, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from gracehooks import settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language):
    return [
        pytest.param(found[2], id=f"{page.relative_to(ROOT)}:{page.read_text()[: found.start()].count(chr(10)) + 1}")
        for page in PAGES
        for found in BLOCK.finditer(page.read_text())
        if found[1] == language
    ]


def test_generated_parts_are_current():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for page in generate.pages():
        assert page.read_text() == generate.current(page.read_text()), f"run python docs/generate.py for {page}"


@pytest.mark.parametrize("code", blocks("python"))
def test_python_compiles_and_configurations_are_valid(code):
    compiled = compile(code, "<docs>", "exec")
    if "gracehooks.configure(" in code:
        before = settings.recorded()
        try:
            exec(compiled, {"__name__": "configuration"})
        finally:
            settings.restore(before)


@pytest.mark.parametrize("code", [*blocks("bash"), *blocks("sh")])
def test_shell_parses(code):
    done = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_yaml_and_json_parse():
    for block in blocks("yaml"):
        assert list(yaml.safe_load_all(block.values[0])), block.id
    for block in blocks("json"):
        assert json.loads(block.values[0]), block.id


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    for page in ROOT.glob("docs/*/*.md"):
        assert str(page.relative_to(ROOT / "docs")) in index, f"docs/README.md does not list {page.name}"


def test_readme_is_short_and_its_commands_are_what_ci_runs():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    (tests,) = [line for line in readme.splitlines() if ".venv/bin/pytest" in line]
    assert tests in (ROOT / ".ci/run").read_text()
    assert any(line.endswith(".venv/bin/gracehooks demo") for line in readme.splitlines())


def test_ci_script_is_executable_and_parses():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o100
    assert subprocess.run([shutil.which("bash"), "-n", script], check=False).returncode == 0
