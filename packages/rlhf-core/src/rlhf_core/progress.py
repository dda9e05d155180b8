"""What a run shows while it goes on: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = ("loss", "accuracy", "reward_margin", "learning_rate", "grad_norm", "tokens_per_second")


class Display:
    """Shows the steps of a run on the first rank, and nothing on the others.

    Args:
        total: steps of the run.
        done: those made before a restart.
        active: whether this rank shows anything.
        unit: what is counted, a key of every row.
        shown: the metrics to show.
    """

    def __init__(
        self, total: int, done: int, active: bool = True, unit: str = "step", shown: tuple[str, ...] = SHOWN
    ) -> None:
        self._active, self._unit, self._shown = active, unit, shown
        self._total = total
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if active and self._console.is_terminal:
            columns = (
                TextColumn(unit),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("train", total=total, completed=done, text="")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def row(self, row: dict[str, Any]) -> None:
        """Show a logged row."""
        if not self._active:
            return
        held_out = sorted((name for name in row if name.startswith("eval_")), key=lambda name: name != "eval_loss")
        evaluation = {name: row[name] for name in held_out}
        text = "  ".join(
            f"{name} {value:.4g}" for name, value in (evaluation or row).items() if evaluation or name in self._shown
        )
        if self._bar and not evaluation:
            self._bar.update(self._task, text=text)
        else:
            self.note(f"{self._unit} {row[self._unit]}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._active:
            return
        if self._bar:
            self._console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
