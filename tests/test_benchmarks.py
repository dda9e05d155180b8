"""Benchmarks that need no quiet machine: that they still run, on little. Speed is theirs to measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("ppo_scale.py", "--engines 3 --ranks 2 --samples 64 --rollouts 2", "3 engines, 2 ranks, 64 responses"),
        ("inference.py", "memory --rows 700", "700 responses to 700 prompts"),
    ],
)
def test_it_runs(script: str, options: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, HERE / script, *options.split()], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and "MB" in done.stdout
