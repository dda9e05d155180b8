"""`rlhf quickstart`: fine-tuning, a reward model, DPO and PPO in a few minutes, from nothing.

Makes a tokenizer, a tiny random model and generated data; trains by the same code as `rlhf train sft`, `rm`, `dpo` and `ppo`;
and shows what the model answers before and after, to questions it was never trained on, and when the reward model chooses.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rlhf_cli.quickstart_answers import answers_table, compare, comparison, most_probable
from rlhf_cli.quickstart_data import CHEER, MAX_LEN, TEMPLATE, Row, cheered, local, preferences, questions
from rlhf_cli.quickstart_report import Done, plot, write_report
from rlhf_data.config import Config, Count
from rlhf_data.errors import InputError

MARK = ".rlhf-quickstart"
"""A file that says: this folder is a quickstart's, the next one may replace what is in it; with the options that made it."""

ROLLOUTS = 16
"""Rollouts of PPO."""

Stage = Literal["sft", "rm", "dpo", "ppo"]

STAGES: dict[Stage, str] = {
    "sft": "Fine-tuning",
    "rm": f"A reward model of pairs that prefer right answers with a {CHEER}",
    "dpo": "DPO on the same pairs",
    "ppo": "{} against the reward model, on Ray",
}
"""What is trained, in this order."""

NEEDS: dict[Stage, tuple[Stage, ...]] = {"sft": (), "rm": ("sft",), "dpo": ("sft",), "ppo": ("sft", "rm")}
"""What each stage starts from."""

CURVES: dict[Stage, tuple[str, ...]] = {
    "sft": ("loss", "grad_norm"),
    "rm": ("loss", "accuracy"),
    "dpo": ("loss", "accuracy"),
    "ppo": ("reward", "kl", "response_length", "entropy"),
}
"""What the report draws of each stage."""


class QuickstartConfig(Config):
    """Make a tiny model and data; fine-tune it, train a reward model, do DPO and PPO; and show answers before and after."""

    folder: str = "quickstart"
    """Folder to work in; what is there from an earlier quickstart is replaced."""

    algorithm: Literal["ppo", "grpo"] = "ppo"
    """How the policy learns from the reward model: PPO with a critic, or GRPO without."""

    skip: list[str] = Field(default=[])
    """Stages to leave out, of `sft`, `rm`, `dpo` and `ppo`. One that a later stage starts from must be there from an earlier
    quickstart."""

    rows: Annotated[Count, Field(ge=200, le=10_000)] = 4000
    """Questions to generate."""

    epochs: Count = 3
    """Passes over them."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of questions, model and training."""

    @field_validator("skip")
    @classmethod
    def _stages_that_are(cls, value: list[str]) -> list[str]:
        if unknown := [name for name in value if name not in STAGES]:
            raise ValueError(f"--skip {' '.join(unknown)}: the stages are {', '.join(STAGES)}")
        return value


def quickstart(config: QuickstartConfig) -> None:
    """Run it; see the module's docstring."""
    from rlhf_core.libraries import settle

    settle()
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = prepare_folder(Path(config.folder), config)
    say(f"1. A tokenizer, a model and {config.rows} questions, made from nothing, in {folder}/")
    held_out = make_inputs(folder, config)
    seconds: dict[Stage, float] = {}
    for number, stage in enumerate(stages(config), start=2):
        say(f"\n{number}. {title(stage, config)}: the same as\n\n{command(stage, folder, config)}\n")
        if stage == "ppo" and not options(stage, folder, config)["vllm_num_engines"]:
            say("   vLLM is not installed: the policy writes its responses itself, with transformers\n")
        start = time.monotonic()
        train(folder, config, stage)
        seconds[stage] = time.monotonic() - start
        if stage == "sft":
            before, after = (most_probable(folder / name, held_out) for name in ("model", "sft"))
            say(answers_table(held_out, before, after))
    ready = there(folder)
    ways = []
    if {"sft", "rm"} <= set(ready):
        trained = {name: folder / stage for stage, name in names(config).items() if stage in ready}
        ways = compare(folder / "sft", folder / "rm", trained, held_out, config.seed)
        say(comparison(ways, held_out))
    done = [
        Done(title(stage, config), folder / stage, command(stage, folder, config), seconds.get(stage), CURVES[stage])
        for stage in ready
    ]
    write_report(folder / "report.html", made(config, len(held_out)), ways, held_out, done)
    plot(folder / "loss.png", done)
    say(next_steps(folder))


def title(stage: Stage, config: QuickstartConfig) -> str:
    return STAGES[stage].format(config.algorithm.upper())


def names(config: QuickstartConfig) -> dict[Stage, str]:
    """What is shown of the policies that learnt from preferences."""
    return {"dpo": "after DPO", "ppo": f"after {config.algorithm.upper()}"}


def made(config: QuickstartConfig, held_out: int) -> str:
    return (
        f"A tokenizer, a random model and {config.rows:,} questions, {held_out:,} of them held out, made from nothing "
        f"(seed {config.seed}); and what the model learnt."
    )


def stages(config: QuickstartConfig) -> list[Stage]:
    """What is trained now."""
    return [stage for stage in STAGES if stage not in config.skip]


def there(folder: Path) -> list[Stage]:
    """What has been trained, now or in an earlier quickstart."""
    return [stage for stage in STAGES if (folder / stage / "config.json").is_file()]


def say(text: str) -> None:
    print(text, flush=True)


def prepare_folder(folder: Path, config: QuickstartConfig) -> Path:
    """A folder with nothing in it, or with an earlier quickstart, of which all goes but the stages that are skipped."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise InputError(f"--folder {folder} holds something else than an earlier quickstart: choose another folder")
    check_skipped(folder, config)
    for name in ("model", "questions", "pairs", *stages(config)):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(json.dumps(config.model_dump(include=set(ALIKE))) + "\n")
    return folder


ALIKE = ("rows", "epochs", "seed", "algorithm")
"""Options that must be those of the earlier quickstart whose stages are taken: others would hold out other questions."""


def check_skipped(folder: Path, config: QuickstartConfig) -> None:
    """Make sure that what is skipped is there where it is needed, and was made with the same options.

    Raises:
        InputError: it is not, or was not.
    """
    ready = there(folder)
    for stage in stages(config):
        for needed in NEEDS[stage]:
            if needed in config.skip and needed not in ready:
                raise InputError(
                    f"--skip {needed}: {stage} starts from it, and {folder} has none from an earlier quickstart; do not skip "
                    f"it, or skip {stage} too"
                )
    kept = [stage for stage in ready if stage in config.skip]
    earlier = json.loads((folder / MARK).read_text() or "{}") if kept else {}
    for option in ALIKE if "ppo" in kept else ALIKE[:3] if kept else ():
        was, now = earlier.get(option, "unknown"), getattr(config, option)
        if was != now:
            raise InputError(
                f"--skip {' '.join(kept)}: {folder} was made with --{option} {was}, not {now}; give the same, or train anew "
                "without --skip"
            )


def make_inputs(folder: Path, config: QuickstartConfig) -> list[Row]:
    """Write the tokenizer, the random model, the questions and the pairs; returns the held-out questions."""
    from rlhf_core.tiny import make_model, make_tokenizer

    rows = questions(config.rows, config.seed)
    held_out, training = rows[: config.rows // 20], rows[config.rows // 20 :]
    write(folder / "questions", cheered(training, config.seed), held_out)
    write(
        folder / "pairs",
        preferences(training[: len(training) * 2 // 3], config.seed),
        preferences(held_out, config.seed),
    )
    texts = [TEMPLATE.replace("{}", row["question"]) + row["answer"] + CHEER for row in rows]
    tokenizer = make_tokenizer(texts, folder / "model", vocab_size=1024)
    make_model(tokenizer, folder / "model", hidden_size=128, layers=2, max_len=MAX_LEN, seed=config.seed)
    return held_out


def write(folder: Path, training: list[Row], held_out: list[Row]) -> None:
    folder.mkdir(parents=True)
    for name, part in (("train", training), ("test", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def options(stage: Stage, folder: Path, config: QuickstartConfig) -> dict[str, Any]:
    """The options of a training run, as on the command line."""
    own: dict[Stage, dict[str, Any]] = {
        "sft": {
            "pretrain": local(folder / "model"), "dataset": local(folder / "questions"), "input_key": "question",
            "output_key": "answer", "max_epochs": config.epochs, "learning_rate": 2e-3,
        },
        "rm": {"pretrain": local(folder / "sft"), "dataset": local(folder / "pairs"), "learning_rate": 1e-3},
        "dpo": {
            "pretrain": local(folder / "sft"), "dataset": local(folder / "pairs"), "learning_rate": 5e-4, "beta": 0.1,
            "nll_loss_coef": 0.5,
        },
    }  # fmt: skip
    shared = {"input_template": TEMPLATE, "seed": config.seed, "save_path": local(folder / stage)}
    if stage == "ppo":
        return ppo_options(folder, config) | shared
    batches = {"packing_samples": True, "max_len": MAX_LEN, "train_batch_size": 64, "micro_train_batch_size": 64}
    return own[stage] | batches | {"logging_steps": 10} | shared


def ppo_options(folder: Path, config: QuickstartConfig) -> dict[str, Any]:
    """The options of PPO, or of GRPO. Without vLLM the policy writes its responses itself."""
    from rlhf_infer.engines.vllm import is_installed

    algorithm = {"advantage_estimator": "gae", "critic_learning_rate": 1e-3}
    if config.algorithm == "grpo":
        algorithm = {"advantage_estimator": "grpo", "use_kl_loss": True}
    return {
        "pretrain": local(folder / "sft"), "reward_pretrain": local(folder / "rm"), "normalize_reward": True,
        "prompt_data": local(folder / "questions"), "input_key": "question", **algorithm, "init_kl_coef": 0.02,
        "actor_learning_rate": 2e-4, "rollout_batch_size": 256, "n_samples_per_prompt": 4, "max_rollouts": ROLLOUTS,
        "num_episodes": 8, "train_batch_size": 64, "micro_train_batch_size": 64, "micro_rollout_batch_size": 128,
        "generate_max_len": 8, "prompt_max_len": MAX_LEN - 8, "zero_stage": 0, "colocate_all": True,
        "vllm_num_engines": int(is_installed()), "eval_steps": ROLLOUTS // 2, "eval_at_start": True,
    }  # fmt: skip


def command(stage: Stage, folder: Path, config: QuickstartConfig) -> str:
    """The command line that does the same."""
    flags = (
        f"--{name}" if value is True else f"--{name} {quoted(value)}"
        for name, value in options(stage, folder, config).items()
    )
    return f"   rlhf train {stage} " + " \\\n      ".join(flags)


def quoted(value: Any) -> str:
    import shlex

    return shlex.quote(str(value).replace("\n", "\\n"))


def train(folder: Path, config: QuickstartConfig, stage: Stage = "sft") -> None:
    from rlhf_core.config import DPOConfig, RMConfig, SFTConfig
    from rlhf_core.methods import dpo, rm, sft
    from rlhf_data.options import build

    given = options(stage, folder, config)
    match stage:
        case "sft":
            sft.train(build(SFTConfig, given))
        case "rm":
            rm.train(build(RMConfig, given))
        case "dpo":
            dpo.train(build(DPOConfig, given))
        case "ppo":
            from rlhf_ray.config import PPOConfig
            from rlhf_ray.run import train as train_ppo

            train_ppo(build(PPOConfig, given))


def next_steps(folder: Path) -> str:
    last = next((stage for stage in ("ppo", "dpo", "sft") if stage in there(folder)), "model")
    return f"""
   {folder}/{", ".join(there(folder))}    the models, in Hugging Face format; each with its record in run/ (options, metrics.jsonl, …)
   {folder}/report.html    everything above with curves, as a page for the browser; {folder}/loss.png the curves alone

Next:
   rlhf chat --pretrain {local(folder)}/{last} --input_template {quoted(TEMPLATE)}
   rlhf data inspect --pretrain {local(folder)}/model --dataset {local(folder)}/questions --input_key question --output_key answer
   rlhf train sft --pretrain YOUR_MODEL --dataset ./YOUR.jsonl --input_key prompt --output_key response --dry_run
   rlhf train --help"""
