"""What scored rows say of the responses: figures of a whole file, and rewards brought to mean 0 and deviation 1."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_data.errors import InputError

Row = dict[str, Any]

QUANTILES = {"5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95}


@dataclass(frozen=True)
class ScoreSummary:
    """What a finished job wrote. Counts are of all rows, times of the run that finished it.

    Attributes:
        rows: rows of the data, those that were dropped among them.
        scored: rows that have a reward.
        dropped: for every reason why rows have none, how many there are, and where the first one is.
        mean: of the rewards, as they were written (normalised with `--normalize_reward`); None without any.
        std: their standard deviation (of the sample).
        min: the lowest.
        max: the highest.
        quantiles: of the rewards, by name.
        prompts: different prompts.
        mean_best: mean over prompts of the highest reward.
        mean_length: of a response in tokens, the token that ends it included; None where a function scored, which sees none.
        truncated: responses that were cut at `--max_len`.
        finish_reasons: how many responses ended how, of rows that say so.
        calibration: mean and deviation that rewards were normalised with, if they were.
        processed: what `--post_processor` made of the rows, see `rlhf_infer.processors.process`; None without.
        seconds: that this run scored for, start-up apart.
        rows_per_second: of this run.
        tokens_per_second: of this run, prompts and responses; 0 where a function scored.
    """

    rows: int
    scored: int
    dropped: dict[str, tuple[int, str]]
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    quantiles: dict[str, float]
    prompts: int
    mean_best: float | None
    mean_length: float | None
    truncated: int
    finish_reasons: dict[str, int]
    calibration: dict[str, float] | None
    processed: dict[str, Any] | None
    seconds: float
    rows_per_second: float
    tokens_per_second: float

    def format(self) -> str:
        """For people."""
        lines = [f"{self.scored:,} of {self.rows:,} responses scored, to {self.prompts:,} prompts"]
        lines += [f"dropped {count:,}: {reason} (first: {first})" for reason, (count, first) in self.dropped.items()]
        if self.mean is not None:
            spread = "" if self.std is None else f", deviation {self.std:.4g}"
            shown = {"lowest": self.min, **self.quantiles, "highest": self.max}
            lines.append(f"reward: mean {self.mean:.4g}{spread}, mean of the best to each prompt {self.mean_best:.4g}")
            lines.append("        " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
        if self.calibration:
            lines.append("normalised with mean {mean:.4g} and deviation {std:.4g}".format_map(self.calibration))
        if self.mean_length is not None:
            lines.append(f"responses: {self.mean_length:,.1f} tokens on average, {self.truncated:,} cut at --max_len")
        if self.finish_reasons:
            lines.append("ended: " + ", ".join(f"{name} {count:,}" for name, count in self.finish_reasons.items()))
        if self.processed:
            lines.append(f"--post_processor {self.processed['post_processor']}: {self.processed['kept']:,} rows")
            lines += [f"  {count:,} not: {reason}" for reason, count in self.processed["filtered"].items()]
        if self.seconds:
            pace = f", {self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""
            lines.append(f"scored in {self.seconds:,.1f} s: {self.rows_per_second:,.1f} rows/s{pace}")
        return "\n".join(lines)


def normalised(row: Row, calibration: dict[str, float]) -> Row:
    """A scored row with its reward brought to mean 0 and deviation 1, and its own one as `raw_reward`."""
    if row["reward"] is None:
        return row
    changed: Row = {}
    for name, value in row.items():
        if name == "reward":
            changed |= {"reward": (value - calibration["mean"]) / calibration["std"], "raw_reward": value}
        else:
            changed[name] = value
    return changed


def calibration_of(rows: Iterable[Row]) -> dict[str, float]:
    """Mean and standard deviation of the rewards of scored rows.

    Raises:
        InputError: there are not enough of them, or all are equal.
    """
    rewards = np.fromiter((row["reward"] for row in rows if row["reward"] is not None), np.float64)
    if len(rewards) < 2:
        raise InputError(f"--calibrate: a deviation needs two rewards at least, and there are {len(rewards)}")
    std = float(rewards.std(ddof=1))
    if not std > 0:
        raise InputError(
            f"--calibrate: all {len(rewards):,} rewards are {rewards[0]:g}, so they have no deviation to divide by; leave "
            "--normalize_reward out"
        )
    return {"mean": float(rewards.mean()), "std": std}


def figures_of(rows: Iterable[Row]) -> dict[str, Any]:
    """What scored rows say of the responses, as `ScoreSummary` names it. Memory is two numbers per row."""
    count = truncated = tokens = 0
    ends = Counter[str]()
    rewards, prompts = array("d"), array("q")
    counted = False
    for row in rows:
        count += 1
        if row["reward"] is None:
            continue
        rewards.append(row["reward"])
        prompts.append(digest(row["rendered"], row["input"]))
        truncated += row.get("truncated", False)
        tokens += row.get("response_tokens", 0)
        counted = counted or "response_tokens" in row
        if isinstance(end := row.get("finish_reason"), str):
            ends[end] += 1
    return {
        "rows": count,
        "truncated": truncated,
        "finish_reasons": dict(ends),
        "mean_length": tokens / len(rewards) if counted else None,
        **reward_figures(np.array(rewards), np.array(prompts)),
    }


def digest(*texts: str) -> int:
    """A number of 64 bits that stands for some texts."""
    hashed = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(hashed.digest(), "big", signed=True)


def reward_figures(rewards: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Figures of rewards.

    Args:
        rewards: float64 `[N]`.
        prompts: int64 `[N]`, the same for responses to the same prompt.
    """
    if not len(rewards):
        return {"scored": 0, "mean": None, "std": None, "min": None, "max": None, "quantiles": {}, "prompts": 0,
                "mean_best": None}  # fmt: skip
    different, which = np.unique(prompts, return_inverse=True)
    best = np.full(len(different), -np.inf)
    np.maximum.at(best, which, rewards)
    return {
        "scored": len(rewards),
        "mean": float(rewards.mean()),
        "std": float(rewards.std(ddof=1)) if len(rewards) > 1 else None,
        "min": float(rewards.min()),
        "max": float(rewards.max()),
        "quantiles": {name: float(np.quantile(rewards, place)) for name, place in QUANTILES.items()},
        "prompts": len(different),
        "mean_best": float(best.mean()),
    }
