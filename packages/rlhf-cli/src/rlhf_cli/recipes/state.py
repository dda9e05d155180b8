"""How far a recipe is: a small file in its folder, and a lock so that no two work there."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.recipes.config import RecipeConfig
from rlhf_cli.recipes.steps import as_json, values_of
from rlhf_data.errors import InputError

VERSION = 1

FREE = {
    "training_iters", "keep_models",
    "micro_train_batch_size", "micro_batch_size", "gradient_checkpointing", "gradient_checkpointing_use_reentrant", "ref_offload",
    "num_engines", "tp_size", "max_num_seqs", "enable_prefix_caching", "gpu_memory_utilization",
    "save_steps", "max_ckpt_num", "max_ckpt_mem", "load_checkpoint", "dist_timeout",
    "logging_steps", "use_wandb", "wandb_org", "wandb_group", "wandb_project", "wandb_run_name", "use_tensorboard",
}  # fmt: skip
"""Options that may change when a recipe goes on: how long, in what portions, and what is told of it. They decide no result."""

PATIENCE = 10.0
"""Seconds to wait for a folder whose recipe was killed: its step ends with it, a moment later."""


@dataclass
class State:
    """What has been done.

    Attributes:
        path: the file.
        recipe: name of the recipe.
        options: its options, with their defaults; a secret is only said to be there.
        iteration: the one that is going on, counted from 0.
        done: names of its steps that are complete.
        history: what came out of each complete iteration.
        begun: whether there is anything that was made with these options.
    """

    path: Path
    recipe: str
    options: dict[str, Any]
    iteration: int = 0
    done: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    begun: bool = False

    @classmethod
    def open(cls, name: str, config: RecipeConfig) -> State:
        """The state in the folder of a recipe, or a new one.

        Raises:
            InputError: the folder is that of another recipe, or of this one with other options, or of something else.
        """
        folder = Path(config.checkpoint.save_path)
        state = cls(folder / "recipe.json", name, options_of(config))
        if not state.path.exists():
            if there := [entry for entry in ("iterations", "model") if os.path.lexists(folder / entry)]:
                raise InputError(
                    f"--save_path {folder}: there is no recipe.json in it, but {' and '.join(there)}: choose another folder"
                )
            return state
        found = read(state.path)
        if found["recipe"] != name:
            raise InputError(f"--save_path {folder} holds the recipe {found['recipe']}: choose another folder")
        state.iteration, state.done, state.history = found["iteration"], found["done"], found["history"]
        iterations = folder / "iterations"
        state.begun = bool(state.done or state.history or has_rows(iterations / "0"))
        if state.begun:
            # the steps of an iteration name the model of the one before
            under_way = (iterations / str(state.iteration)).exists()
            check_same(state.path, found["options"], state.options, FREE if under_way else FREE | {"save_path"})
        return state

    def save(self) -> None:
        """Write it, whole or not at all."""
        content = {
            "version": VERSION, "recipe": self.recipe, "options": self.options, "iteration": self.iteration,
            "done": self.done, "history": self.history,
        }  # fmt: skip
        write(self.path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def options_of(config: RecipeConfig) -> dict[str, Any]:
    return {name: as_json(value) for name, value in values_of(config).items()}


def read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): choose another --save_path, or remove it") from error
    if version != VERSION:
        raise InputError(f"{path} is of version {version}, this program writes {VERSION}: choose another --save_path")
    return found


def has_rows(folder: Path) -> bool:
    """Whether a step has written rows there, or begun to."""
    return any(folder.glob("*.jsonl")) or any(index.stat().st_size for index in folder.glob("*.partial.index"))


def check_same(path: Path, before: dict[str, Any], now: dict[str, Any], free: set[str]) -> None:
    """Refuse to go on with other options than those that the recipe was started with; some are free.

    Raises:
        InputError: naming them.
    """
    changed = [name for name in now if name not in free and name in before and before[name] != now[name]]
    if changed:
        differ = "; ".join(f"--{name} was {before[name]!r} and is {now[name]!r}" for name in changed)
        raise InputError(
            f"{path} says that this recipe was started with other options: {differ}. Give those to go on, or another "
            "--save_path to start anew; only --training_iters may grow, and what decides no result may change"
        )


def write(path: Path, text: str) -> None:
    """Write a small file, whole or not at all, and safely on disk."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder of a recipe. Steps inherit the lock's file, so that the folder is held as long as one runs.

    Yields:
        The lock's file descriptor.

    Raises:
        InputError: another recipe holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".recipe.lock").open("w") as file:
        until = time.monotonic() + PATIENCE
        while not try_lock(file.fileno()):
            if time.monotonic() > until:
                raise InputError(
                    f"--save_path {folder}: another recipe is at work in it, or a step that it left behind"
                )
            time.sleep(0.1)
        yield file.fileno()


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
