from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1]
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


def test_the_examples_of_the_readme_run(tokenizer, tmp_path, monkeypatch, capsys):
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert "rows kept" in capsys.readouterr().out


def test_the_readme_lists_every_module():
    modules = {path.name for path in (PACKAGE / "src" / "rlhf_data").glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if name not in README} == set()


@pytest.mark.parametrize("module", ["labels", "packing", "templates"])
def test_the_examples_of_docstrings_hold(module):
    result = doctest.testmod(importlib.import_module(f"rlhf_data.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
