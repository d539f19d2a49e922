"""Changes in modules that are imported later, or were before."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from gracehooks.jobs import imports


def test_a_change_is_made_as_the_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_one").mkdir()
    (tmp_path / "late_one/__init__.py").write_text("VALUE = 1\n")
    (tmp_path / "late_one/part.py").write_text("PART = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    changed: list[Any] = []

    def change(module: Any) -> None:
        changed.append(module.VALUE)
        module.VALUE = 2

    imports.when_imported("late_one", change)
    imports.when_imported("late_one.part", changed.append)
    assert changed == []
    module = importlib.import_module("late_one")
    try:
        assert (module.VALUE, changed) == (2, [1])
        assert type(module.__spec__.loader).__name__ == type(json.__loader__).__name__ == "SourceFileLoader"  # type: ignore[union-attr]
        assert files("late_one").joinpath("part.py").is_file()
        part = importlib.import_module("late_one.part")
        assert changed == [1, part]
        assert importlib.reload(module).VALUE == 1
    finally:
        sys.modules.pop("late_one.part", None)
        del sys.modules["late_one"]


def test_a_module_that_is_there_is_changed_at_once_and_one_that_is_nowhere_stays_so() -> None:
    changed: list[Any] = []
    imports.when_imported("json", changed.append)
    assert changed == [json]
    imports.when_imported("gracehooks_there_is_none", changed.append)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("gracehooks_there_is_none")
