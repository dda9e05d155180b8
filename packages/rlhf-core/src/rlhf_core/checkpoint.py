"""Resumable checkpoints that are whole or not there.

A checkpoint is written beside, synced, and renamed; only then are old ones removed. Its manifest lists every file with
size and checksum, so that a damaged one is recognised before anything is loaded from it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf_core.config import CheckpointConfig
from rlhf_core.strategy import Alone, Strategy
from rlhf_data.errors import InputError, RunError

NAME = re.compile(r"global_step(\d+)")
MANIFEST, STATE, ENGINE = "manifest.json", "state.json", "engine"


class CheckpointError(RunError):
    """A checkpoint could not be written. What was there before is intact."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        config: where, how many, how large.
        strategy: the ranks that write together.
    """

    def __init__(self, config: CheckpointConfig, strategy: Strategy | Alone) -> None:
        self.folder = self.folder_of(config)
        self.config = config
        self.strategy = strategy

    def save(self, write: Callable[[Path], None], step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint, then remove those that are too many.

        Args:
            write: called on all ranks with the folder to write into.
            step: it is named after.
            state: what else there is to know, small.

        Raises:
            CheckpointError: the disk is full or cannot be written.
        """
        final, staging = self.folder / f"global_step{step}", self.folder / f".writing-global_step{step}"
        try:
            if self.strategy.is_first:
                for leftover in self.folder.glob(".writing-*"):
                    shutil.rmtree(leftover)
                staging.mkdir(parents=True)
            self.strategy.barrier()
            write(staging)
            self.strategy.barrier()
            if self.strategy.is_first:
                (staging / STATE).write_text(json.dumps(state, indent=2))
                seal(staging)
                publish(staging, final)
                self.prune(final)
        except (OSError, RuntimeError) as error:
            if self.strategy.is_first:
                shutil.rmtree(staging, ignore_errors=True)
            free = shutil.disk_usage(nearest_existing(self.folder)).free / 1e9
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}, where {free:.1f} GB are free "
                f"({' '.join(str(error).split())[:200]}); earlier checkpoints are intact: "
                "free some space or choose another --ckpt_path, then continue with --load_checkpoint"
            ) from error
        self.strategy.barrier()
        return final

    def prune(self, newest: Path) -> None:
        """Remove what `newest` replaces: later steps (the run went back behind them) and the oldest over the limits.

        Nothing goes that is not one of ours.
        """
        kept, size = 0, 0.0
        for path in self.find(self.folder):
            later = step_of(path) > step_of(newest)
            if not later:
                kept, size = kept + 1, size + (disk_use(path) + disk_use(exported(path))) / 1e9
            over = kept > self.config.max_ckpt_num or size > self.config.max_ckpt_mem
            if later or (over and path != newest):
                shutil.rmtree(path)
                shutil.rmtree(exported(path), ignore_errors=True)

    def check_shared(self) -> None:
        """Make sure that all ranks write to one folder: parts of a checkpoint on the disks of several nodes are none.

        Raises:
            InputError: some ranks do not see what the first one writes.
        """
        check_shared(self.folder, "--ckpt_path", self.strategy)

    @staticmethod
    def folder_of(config: CheckpointConfig) -> Path:
        """Where a run's checkpoints are."""
        return Path(config.ckpt_path or Path(config.save_path) / "checkpoints")

    @staticmethod
    def find(folder: Path) -> list[Path]:
        """Checkpoints in `folder`, newest first."""
        found = [p for p in folder.glob("global_step*") if NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
        return sorted(found, key=step_of, reverse=True)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its state. Damaged ones are passed over, and said so.

        Raises:
            InputError: there are checkpoints and all are damaged.
        """

        def choose() -> tuple[list[str], Path | None]:
            notes = []
            for path in self.find(self.folder):
                if not (problem := damage(path)):
                    return notes, path
                notes.append(f"warning: {path} is damaged ({problem}); trying the one before")
            return notes, None

        notes, path = self.strategy.share(choose)
        for note in notes:
            self.strategy.say(note)
        if path is None and notes:
            raise InputError(
                f"--load_checkpoint: every checkpoint in {self.folder} is damaged; remove them to start anew"
            )
        return None if path is None else (path, json.loads((path / STATE).read_text()))


def write_engine(engine: Any, folder: Path, rank: int) -> None:
    """Write the trained weights and the optimizer of `engine`, and this rank's random state; on all ranks."""
    engine.save_checkpoint(str(folder), tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
    save_file(random_state(), folder / f"random_rank{rank}.safetensors")


def read_engine(engine: Any, folder: Path, rank: int) -> None:
    """Put `engine` and this rank's random state back to where they were; the inverse of `write_engine`.

    The learning rate goes on along its schedule, from the peak that the run has now.
    """
    peaks = list(engine.lr_scheduler.base_lrs)
    adapters = any(not p.requires_grad for p in engine.module.parameters())  # frozen weights are not in a checkpoint
    found, _ = engine.load_checkpoint(str(folder), tag=ENGINE, load_module_strict=not adapters)
    assert found, f"DeepSpeed found no checkpoint in {folder}"
    set_peaks(engine, peaks)
    restore_random_state(load_file(folder / f"random_rank{rank}.safetensors"))


def set_peaks(engine: Any, peaks: list[float]) -> None:
    """Give a schedule that is under way other peak learning rates; nothing changes if they are the same."""
    schedule = engine.lr_scheduler
    if schedule.base_lrs == peaks:
        return
    schedule.base_lrs = peaks
    schedule._last_lr = [
        peak * shape(schedule.last_epoch) for peak, shape in zip(peaks, schedule.lr_lambdas, strict=True)
    ]
    for group, peak, now in zip(engine.optimizer.param_groups, peaks, schedule._last_lr, strict=True):
        group["initial_lr"], group["lr"] = peak, now


def check_shared(folder: Path, option: str, strategy: Strategy | Alone) -> None:
    """Make sure that all ranks see one folder, creating it if it is not there.

    Raises:
        InputError: some ranks do not see what the first one writes.
    """
    token = folder / strategy.share(lambda: f".writing-check-{secrets.token_hex(8)}")
    if strategy.is_first:
        token.mkdir(parents=True)
    strategy.barrier()
    (seen,) = strategy.sum([float(token.is_dir())])
    if strategy.is_first:
        token.rmdir()
    if seen < strategy.world_size:
        raise InputError(
            f"{option} {folder} is not one folder for all ranks: {strategy.world_size - int(seen)} of "
            f"{strategy.world_size} do not see what the first one writes; choose a folder that all nodes share"
        )


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("global_step"))


def disk_use(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def nearest_existing(path: Path) -> Path:
    """The path itself, or the closest folder above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def exported(checkpoint: Path) -> Path:
    """Where the Hugging Face export beside a checkpoint goes (`--save_hf_ckpt`)."""
    return checkpoint.with_name(checkpoint.name + "_hf")


def random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
    return total


def seal(folder: Path) -> None:
    """Sync every file of `folder` to disk and list them, with size and checksum, in its manifest."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "crc32": checksum(path)}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2))
    sync(folder / MANIFEST)
    sync(folder)


def publish(staging: Path, final: Path) -> None:
    """Give a finished folder its name. An older one of that name (from before a restart) makes way."""
    old = final.with_name(f".writing-old-{final.name}")
    if final.exists():
        final.rename(old)
    staging.rename(final)
    sync(final.parent)
    if old.exists():
        shutil.rmtree(old)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files, or nothing."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read: {error}"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if checksum(path) != entry["crc32"]:
            return f"{name} has other content than was written"
    return ""
