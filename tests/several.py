"""Runs several command lines of `rlhf` in one rank, one after another: to start two ranks takes longer than their few steps.

Usage: torchrun … several.py COMMANDS.json, a list of lists of arguments.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def run_all(commands: list[list[str]]) -> None:
    """Run them, up to the first that fails."""
    from rlhf_cli.main import main
    from rlhf_core.strategy import Strategy

    Strategy.close = lambda self: None  # type: ignore[method-assign]  # the next command meets the same ranks
    for command in commands:
        sys.argv[1:] = command
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise


if __name__ == "__main__":
    run_all(json.loads(Path(sys.argv[1]).read_text()))
