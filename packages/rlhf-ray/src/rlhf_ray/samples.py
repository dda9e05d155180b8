"""Samples of a run, written out to be read: what earns a reward shows in texts before it shows in figures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config import PPOConfig
from rlhf_ray.prompts import Prompts
from rlhf_ray.rollout import Experience, Rollout

NAME = "samples.jsonl"

COLUMNS = ("step", "prompt", "response", "reward", "length", "truncated", "version")
"""Of a tracker's table; the parts of the reward come behind them."""

Row = dict[str, Any]


class SampleLog:
    """`samples.jsonl` in the record of a run: a line for each sample.

    Args:
        folder: of the record, `save_path/run`; it is there.
        config: the run's options: `--logged_samples` of each logged rollout are written.
        prompts: what the samples answer.
        resume_at: size of the file at the checkpoint that is continued; samples after it never happened.
    """

    def __init__(self, folder: Path, config: PPOConfig, prompts: Prompts, resume_at: int | None) -> None:
        self.count, self.prompts = config.logging.logged_samples, prompts
        self._file = (folder / NAME).open("ab")
        self._file.truncate(min(resume_at or 0, self._file.tell()))
        self._file.seek(0, os.SEEK_END)

    def write(self, step: int, experience: Experience, parts: Mapping[str, NDArray[Any]] | None = None) -> list[Row]:
        """Write some samples of a rollout, evenly spread from the lowest reward to the highest.

        Args:
            step: optimizer steps of the run.
            experience: the rollout.
            parts: what its rewards are made of, `[N]` by name.

        Returns:
            What was written, for `table`.
        """
        places = spread(experience.scores, self.count)
        if not len(places):
            return []
        chosen = experience.select(places)
        rows = sample_rows(
            step, chosen, chosen.scores, self.prompts, {name: values[places] for name, values in (parts or {}).items()}
        )
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()
        return rows

    def position(self) -> int:
        """Size of the file now, safely on disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def spread(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Places of at most `count` samples whose scores are evenly spread over all, the lowest first; one is the highest."""
    order = np.argsort(scores, kind="stable")
    if count >= len(order):
        return order
    return order[np.linspace(len(order) - 1, 0, count).round().astype(np.int64)][::-1]


def sample_rows(
    step: int,
    rollout: Rollout,
    scores: NDArray[np.float32],
    prompts: Prompts,
    parts: Mapping[str, NDArray[Any]],
) -> list[Row]:
    """A line for each sample.

    Args:
        step: optimizer steps of the run.
        rollout: the samples.
        scores: `[N]`, their rewards.
        prompts: what they answer.
        parts: what the rewards are made of, `[N]` by name; NaN becomes null.
    """
    rows = []
    for place, (number, response) in enumerate(zip(rollout.prompts.tolist(), prompts.responses(rollout), strict=True)):
        label = prompts.label(number)
        row = {
            "step": step,
            "prompt": prompts.text(number),
            "response": response,
            "reward": float(scores[place]),
            "parts": {name: number_of(values[place]) for name, values in parts.items()},
            "length": int(rollout.response_lengths[place]),
            "truncated": bool(rollout.truncated[place]),
            "version": int(rollout.versions[place]),
        }
        rows.append(row if label is None else row | {"label": label})
    return rows


def number_of(value: Any) -> float | None:
    """A number as JSON holds it."""
    return float(value) if np.isfinite(value) else None


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """The same samples as columns and rows, for a tracker's table such as `wandb.Table(columns, data)`."""
    parts = list(rows[0]["parts"]) if rows else []
    data = [[*(row[name] for name in COLUMNS), *(row["parts"][name] for name in parts)] for row in rows]
    return [*COLUMNS, *parts], data
