"""The loop of every recipe: its steps one after another, each a process, again and again; killed, it goes on there."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_cli.errors import PROGRAM, fail
from rlhf_cli.launch import ranks_on_this_node
from rlhf_cli.recipes.config import ConditionalSFTConfig, RecipeConfig
from rlhf_cli.recipes.process import execute, terminable
from rlhf_cli.recipes.report import (
    answer_numbers,
    count,
    iteration_numbers,
    picture,
    report,
    rows_of,
    scored_file,
)
from rlhf_cli.recipes.state import State, locked, write
from rlhf_cli.recipes.steps import Step, ask, checkpoints_of, iteration, iteration_folder, score, shown
from rlhf_core.config import TrainConfig
from rlhf_data.errors import InputError, RunError
from rlhf_infer.config import EngineConfig, GenerateConfig, SamplingConfig, ScoreConfig
from rlhf_infer.output import as_line

PERCENTILES = (10, 90)
"""Of the rewards in the data: what a conditional model is asked for."""

RECORD = "run"
"""What is kept of a model that is removed: the record of its training."""


def run(name: str, config: RecipeConfig, *, dry_run: bool = False) -> None:
    """Run a recipe, or go on with it.

    Args:
        name: which one.
        config: its options.
        dry_run: check everything, print the steps as command lines, and write nothing.

    Raises:
        InputError: an option of the recipe or of a step cannot be used, or the folder is another recipe's.
        RunError: an iteration has nothing to train on.
        SystemExit: a step failed; with its exit code.
    """
    folder = Path(config.checkpoint.save_path)
    state = State.open(name, config)
    if len(state.history) < iterations_of(config):
        check(config, started=state.begun)
    if dry_run:
        print("\n\n".join(commands(config)))
        return
    with terminable(), locked(folder) as lock:
        recipe = Recipe(config, State.open(name, config), lock)
        recipe.run()


def iterations_of(config: RecipeConfig) -> int:
    return 1 if isinstance(config, ConditionalSFTConfig) else config.recipe.training_iters  # type: ignore[attr-defined]


def check(config: RecipeConfig, *, started: bool = False) -> None:
    """Find out before the first step what would stop a later one, without loading any weight.

    Args:
        config: the recipe.
        started: whether it passed this before; then only what may have changed is looked at.

    Raises:
        InputError: naming the option, the value and the way out.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise InputError("a recipe starts its steps and their ranks itself: run it without torchrun or deepspeed")
    check_outside(config)
    steps = [step.check() for number in range(min(2, iterations_of(config))) for step in iteration(config, number)]
    if isinstance(config, ConditionalSFTConfig):
        check_ask(config)
    else:
        check_prompts(config)
    if not started:
        check_checkpoints(config)
        check_models(config, next(step for step in steps if isinstance(step, TrainConfig)))
        check_rewards(config)
        check_writing(config, next((step for step in steps if isinstance(step, GenerateConfig)), None))


def check_models(config: RecipeConfig, training: TrainConfig) -> None:
    """Look at models, batches and folders."""
    from rlhf_core.libraries import settle

    settle()
    from rlhf_core.memory import count_parameters
    from rlhf_core.models.load import load_model_config
    from rlhf_core.plan import check_run
    from rlhf_core.vocabulary import check_vocabulary
    from rlhf_data.tokenizer import load_tokenizer

    check_run(training, ranks_on_this_node(config.parallel))
    model = config.model
    architectures = {"--pretrain": (model.pretrain, load_model_config(model))}
    reference = getattr(config, "reference", None)
    if reference and (name := reference.ref_pretrain):
        option = "--ref_pretrain"
        architectures[option] = name, load_model_config(model.model_copy(update={"pretrain": name}), option)
    tokenizer = load_tokenizer(
        model.pretrain, use_fast=not model.disable_fast_tokenizer, trust_remote_code=model.trust_remote_code
    )
    for option, (name, architecture) in architectures.items():
        check_vocabulary(option, name, architecture, len(tokenizer))
    count_parameters(training, architectures["--pretrain"][1])  # finds modules to adapt that do not exist


def check_writing(config: RecipeConfig, first: GenerateConfig | None) -> None:
    """Look at what writes: the first step, or, where a model is only asked at the end, what it is asked with."""
    from rlhf_core.models.load import load_model_config
    from rlhf_infer.engines.choose import check_engine
    from rlhf_infer.engines.replicas import check_replicas
    from rlhf_infer.generate import Job

    if first:
        Job(first)
    elif config.recipe.ask_prompts:  # type: ignore[attr-defined]
        assert isinstance(config, ConditionalSFTConfig)
        asking = ask(config, 0, 0.0)[0].check()
        assert isinstance(asking, GenerateConfig)
        # the trained model is not there yet; it will be like the one that it comes of
        named = asking.model.model_copy(update={"pretrain": config.model.pretrain})
        check_engine(asking.model_copy(update={"model": named}), load_model_config(config.model))
        if asking.engine.num_engines > 1:
            check_replicas(asking.engine)


def check_checkpoints(config: RecipeConfig) -> None:
    """Refuse checkpoints of an earlier recipe, which training would go on from."""
    if not config.checkpoint.ckpt_path:
        return
    folder = Path(checkpoints_of(config, 0)).parent
    if folder.exists():
        raise InputError(
            f"--ckpt_path {config.checkpoint.ckpt_path}: {folder} has checkpoints of an earlier recipe in the same --save_path: "
            "remove it, or name another folder"
        )


def check_outside(config: RecipeConfig) -> None:
    """Models of the recipe's folder come and go, so that none of them can be what it starts from."""
    if "," in config.checkpoint.save_path:
        raise InputError(
            f"--save_path {config.checkpoint.save_path}: steps read what others wrote there as data sets, whose names are "
            "separated by commas: choose a folder without one"
        )
    folder = Path(config.checkpoint.save_path).resolve()
    reference = getattr(config, "reference", None)
    models = {
        "pretrain": config.model.pretrain,
        "reward_pretrain": config.recipe.reward_pretrain,  # type: ignore[attr-defined]
        "ref_pretrain": reference and reference.ref_pretrain,
    }
    for option, name in models.items():
        if name and Path(name).exists() and folder in (Path(name).resolve(), *Path(name).resolve().parents):
            raise InputError(
                f"--{option} {name} is (in) --save_path {folder}, where models come and go: give another --save_path, or copy the model elsewhere"
            )


def check_prompts(config: Any) -> None:
    """Make sure that there are prompts for every iteration."""
    from rlhf_data.prompts import PromptOptions
    from rlhf_data.stream import RowStream

    size, wanted = config.data.rollout_batch_size, config.recipe.training_iters
    if wanted > 1:
        prompts = RowStream(config.data, PromptOptions(config.data.input_key), config.batch.seed).count()
        allowed = -(-prompts // size)
        if wanted > allowed:
            raise InputError(
                f"--training_iters {wanted} with --rollout_batch_size {size} takes more than {(wanted - 1) * size:,} prompts, and "
                f"--dataset {config.data.dataset} has {prompts:,}: give --training_iters {allowed} or less, or "
                f"--rollout_batch_size {max(1, prompts // wanted)}"
            )


def check_ask(config: ConditionalSFTConfig) -> None:
    """Build what the model will be asked with."""
    if config.recipe.ask_rewards and not config.recipe.ask_prompts:
        raise InputError("--ask_rewards asks prompts, and --ask_prompts 0 has none: leave out one of them")
    only_asked = config.given().keys() & {*SamplingConfig.model_fields, *EngineConfig.model_fields}
    if only_asked and not config.recipe.ask_prompts:
        raise InputError(
            f"--{min(only_asked)} is for asking the trained model, and --ask_prompts 0 asks nothing: leave out one of them"
        )
    for step in ask(config, 0, 0.0):
        step.check()


def check_rewards(config: Any) -> None:
    """Find out whether there is such a reward model or function, and whether the options of scoring fit it."""
    from rlhf_infer.rewards.scorer import check_scorer, is_function
    from rlhf_infer.score import check_parallel, check_reading, scorer_options, statistics

    recipe, scoring = config.recipe, score(config, 0).check()
    assert isinstance(scoring, ScoreConfig)
    options = replace(scorer_options(scoring), option="--reward_pretrain")
    if is_function(recipe.reward_pretrain):
        named = f"--reward_pretrain {recipe.reward_pretrain} is a Python function"
        if recipe.reward_zero_stage:
            raise InputError(
                f"--reward_zero_stage {recipe.reward_zero_stage}: {named}, which has no weights: leave it out"
            )
        if recipe.normalize_reward and not recipe.calibrate:
            raise InputError(f"--normalize_reward: {named}, which has no statistics: give --calibrate with it")
        check_scorer(options)
        return
    if recipe.reward_zero_stage and recipe.reward_engine == "vllm":
        raise InputError(
            f"--reward_zero_stage {recipe.reward_zero_stage}: --reward_engine vllm runs in one process: leave one of them out"
        )
    check_parallel(scoring)
    check_scorer(options)
    architecture, *_ = check_reading(scoring, options)
    if recipe.normalize_reward and not recipe.calibrate:
        statistics(architecture, recipe.reward_pretrain)


def commands(config: RecipeConfig) -> list[str]:
    """The command lines of all steps."""
    lines = []
    for number in range(iterations_of(config)):
        lines += [f"# iteration {number}", *map(shown, iteration(config, number))]
    if isinstance(config, ConditionalSFTConfig) and config.recipe.ask_prompts:
        rewards = config.recipe.ask_rewards
        named = (
            " and ".join(f"{reward:z.2f}" for reward in rewards or [])
            or "the 10th and the 90th percentile of the rewards"
        )
        lines.append(
            f"# then {config.recipe.ask_prompts} prompts ask the model for {named}; the recipe writes the files of prompts and answers"
        )
        for place, reward in enumerate(rewards or []):
            lines += map(shown, ask(config, place, reward))
    return lines


class Recipe:
    """A recipe that is going on.

    Args:
        config: its options.
        state: how far it is.
        lock: the descriptor of its folder's lock.
    """

    def __init__(self, config: RecipeConfig, state: State, lock: int) -> None:
        self.config, self.state, self.lock = config, state, lock
        self.folder = Path(config.checkpoint.save_path)
        self.iterations = iterations_of(config)

    def run(self) -> None:
        """Do what is left, and show how it went."""
        if len(self.state.history) >= self.iterations:
            print(f"{self.folder}: all {len(self.state.history)} iteration(s) are done")
        elif self.state.history or self.state.done:
            print(f"{self.folder}: going on with iteration {self.state.iteration}", flush=True)
        self.state.save()
        while len(self.state.history) < self.iterations:
            self.iterate()
        self.tidy()
        table = self.write_report()
        print(
            f"\n{table}\n{self.folder}/model is the newest model; {self.folder}/report.png shows the numbers",
            flush=True,
        )

    def iterate(self) -> None:
        """One iteration, from where it is."""
        number = self.state.iteration
        folder = iteration_folder(self.config, number)
        folder.mkdir(parents=True, exist_ok=True)
        for step in iteration(self.config, number):
            if step.name == "train":
                self.check_kept(folder)
            self.do(step)
        self.publish(folder / "model")
        numbers = iteration_numbers(folder)
        if isinstance(self.config, ConditionalSFTConfig):
            numbers["asked"] = self.ask(self.config, folder)
        self.state.history.append(numbers)
        self.state.iteration, self.state.done = number + 1, []
        self.state.save()
        self.tidy()
        self.write_report()

    def do(self, step: Step) -> None:
        """Run a step, if it is not done yet.

        Raises:
            SystemExit: it failed; with its exit code.
        """
        if step.name in self.state.done:
            return
        number = self.state.iteration
        folder = iteration_folder(self.config, number)
        print(f"\n== iteration {number + 1} of {self.iterations}: {' '.join(step.command)}", flush=True)
        options = folder / f"{step.name}.json"
        write(options, json.dumps(step.options, indent=2, ensure_ascii=False) + "\n")
        log = folder / f"{step.name}.log"
        code = execute([*step.command, "--config", str(options)], log, secrets_of(self.config, step), self.lock)
        if code:
            how = f"with exit code {code}" if code > 0 else f"by signal {signal.Signals(-code).name}"
            fail(
                f"iteration {number}: `rlhf {' '.join(step.command)}` ended {how}; its options are in {options}, what it said "
                f"in {log}. The same command goes on there.",
                code if code > 0 else PROGRAM,
            )
        self.state.done.append(step.name)
        self.state.save()

    def check_kept(self, folder: Path) -> None:
        """Make sure that there is something to train on."""
        if not count(folder / "score.jsonl"):
            raise RunError(
                f"iteration {self.state.iteration} has nothing to train on: no row of {scored_file(folder)} was kept. If all rewards of "
                "a prompt are equal, raise --temperature or --best_of_n, or use a reward that tells responses apart; start "
                "again in another --save_path"
            )

    def ask(self, config: ConditionalSFTConfig, folder: Path) -> list[dict[str, Any]]:
        """Ask the trained model for rewards, and see what the answers get."""
        if not config.recipe.ask_prompts:
            return []
        prompts = first_prompts(scored_file(folder), config.recipe.ask_prompts)
        write_rows(folder / "prompts.jsonl", prompts)
        answers, longest = [], longest_prompt(config)
        for number, reward in enumerate(config.recipe.ask_rewards or percentiles(scored_file(folder))):
            writing, scoring = ask(config, number, reward, longest)
            self.do(writing)
            if scoring.name not in self.state.done:
                written = rows_of(folder / f"ask-{number}-generate.jsonl")
                write_rows(folder / f"ask-{number}-answers.jsonl", [unasked(row, prompts) for row in written])
            self.do(scoring)
            answers.append(answer_numbers(folder, number, reward))
        return answers

    def publish(self, model: Path) -> None:
        """Make `save_path/model` the newest complete model: a link, replaced at once."""
        part = self.folder / ".model.part"
        part.unlink(missing_ok=True)
        part.symlink_to(model.relative_to(self.folder), target_is_directory=True)
        part.replace(self.folder / "model")

    def tidy(self) -> None:
        """Remove what complete iterations have left and nothing needs: caches, checkpoints, and older models."""
        saving, newest = self.config.checkpoint, len(self.state.history) - 1
        for number in range(newest + 1):
            folder = iteration_folder(self.config, number)
            leftovers = [folder / "cache", folder / "model/checkpoints", folder / "adapter/checkpoints"]
            if saving.ckpt_path:
                leftovers.append(Path(checkpoints_of(self.config, number)))
            if number < newest and not getattr(self.config.recipe, "keep_models", False):  # type: ignore[attr-defined]
                leftovers += [
                    path for name in ("model", "adapter") for path in (folder / name).glob("*") if path.name != RECORD
                ]
            for path in leftovers:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def write_report(self) -> str:
        """Write the table and the picture of what is complete; returns the table."""
        history = self.state.history
        text = report(self.state.recipe, history, self.config.recipe.normalize_reward)  # type: ignore[attr-defined]
        write(self.folder / "report.md", text)
        picture(self.state.recipe, history, self.folder / "report.png")
        return text


def secrets_of(config: RecipeConfig, step: Step) -> dict[str, str]:
    """What a step must know and no file may hold, as environment variables."""
    key = config.logging.use_wandb
    known = key is None or "use_wandb" not in step.options or key.get_secret_value() == "True"
    return {} if known else {"WANDB_API_KEY": key.get_secret_value()}  # type: ignore[union-attr]


def first_prompts(scored: Path, most: int) -> list[dict[str, Any]]:
    """The first prompts of some scored rows, each once."""
    found = {}
    for row in rows_of(scored):
        if row["reward"] is not None:
            prompt = {"input": row["input"], "rendered": row["rendered"]}
            found.setdefault(tuple(prompt.values()), row.get("source", {}) | prompt)
        if len(found) == most:
            break
    return list(found.values())


def longest_prompt(config: ConditionalSFTConfig) -> int:
    """The longest prompt that the model was trained with and has room to answer, in tokens."""
    from rlhf_core.models.load import load_model_config
    from rlhf_infer.engines.engine import context_of

    context = context_of(load_model_config(config.model))
    return min(config.data.max_len, context - 1) if context else config.data.max_len


def unasked(row: dict[str, Any], prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An answer to a prompt that asked for a reward, as an answer to the prompt alone: the scorer need not know."""
    return row | {"input": prompts[row["row"]]["input"]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write(path, b"".join(map(as_line, rows)).decode())


def percentiles(scored: Path) -> list[float]:
    """The rewards that are asked for by default, with the two decimals that a prompt has; one where they are the same."""
    rewards = sorted(row["reward"] for row in rows_of(scored) if row["reward"] is not None)
    places = (round(share / 100 * (len(rewards) - 1)) for share in PERCENTILES)
    return sorted({round(rewards[place], 2) for place in places})
