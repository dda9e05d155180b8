"""What a recipe is made of: the commands of an iteration, each with its options and where it writes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr

from rlhf_cli.quickstart_data import local
from rlhf_cli.recipes.config import ConditionalSFTConfig, IterativeDPOConfig, RecipeConfig, RejectionSamplingConfig
from rlhf_core.config import REFERENCE_FREE, DPOConfig, MergeConfig, SFTConfig
from rlhf_data.config import Config, InferenceDataConfig, ResponseDataConfig
from rlhf_data.options import build, options
from rlhf_infer.config import GenerateConfig, ScoreConfig
from rlhf_infer.rewards.scorer import is_function

READING = (set(InferenceDataConfig.model_fields) | set(ResponseDataConfig.model_fields)) - {"max_len"}
"""Options about the recipe's own data: they are not for the steps that read what a step before them wrote."""

FOR_MODELS = {"bf16", "flash_attn", "max_len", "num_procs", "disable_fast_tokenizer", "trust_remote_code"}
"""Options that go to scoring when a model does it: a Python function reads texts, in one process."""


@dataclass(frozen=True)
class Step:
    """A command of `rlhf`, to be run in a process of its own."""

    name: str
    """What its files are called."""

    command: tuple[str, ...]
    """For example `("train", "sft")`."""

    config: type[Config]
    """What the command reads."""

    options: dict[str, Any]
    """Its options, flat, as JSON has them."""

    def check(self) -> Config:
        """The config of the step.

        Raises:
            InputError: an option cannot be used; which one, and why.
        """
        return build(self.config, self.options)


def iteration_folder(config: RecipeConfig, number: int) -> Path:
    return Path(config.checkpoint.save_path) / "iterations" / str(number)


def policy_of(config: RecipeConfig, number: int) -> str:
    """The model that iteration `number` starts from: the one that the iteration before has trained."""
    return local(iteration_folder(config, number - 1) / "model") if number else config.model.pretrain


def iteration(config: RecipeConfig, number: int) -> list[Step]:
    """The steps of an iteration, counted from 0."""
    if isinstance(config, ConditionalSFTConfig):
        writing = []
    else:
        writing = [generate(config, number)]
    return [*writing, score(config, number), *training(config, number)]


def generate(config: RecipeConfig, number: int) -> Step:
    """Write responses to the prompts of this iteration with the newest policy."""
    own = {
        "pretrain": policy_of(config, number),
        "iter": number,
        "rollout_batch_size": config.data.rollout_batch_size,  # type: ignore[attr-defined]
        "output_path": local(iteration_folder(config, number) / "generate.jsonl"),
    }
    return Step("generate", ("generate",), GenerateConfig, chosen(config, GenerateConfig, own))


def score(config: RecipeConfig, number: int) -> Step:
    """Score them (or the responses of the data), and make training data of them."""
    folder = iteration_folder(config, number)
    given = isinstance(config, ConditionalSFTConfig)
    own = scorer(config) | {"output_path": local(folder / "score.jsonl"), "post_processor": processor_of(config)}
    if not given:
        own["dataset"] = local(folder / "generate.jsonl")
    return Step("score", ("score",), ScoreConfig, chosen(config, ScoreConfig, own, set() if given else READING))


def scorer(config: RecipeConfig) -> dict[str, Any]:
    """The options of scoring that have another name in the recipe, another meaning, or no use for a function."""
    recipe = config.recipe  # type: ignore[attr-defined]
    own = {
        "pretrain": recipe.reward_pretrain,
        "zero_stage": recipe.reward_zero_stage or None,
        "flash_attn": config.given().get("flash_attn"),
    }
    if recipe.reward_engine == "vllm":
        own["num_procs"] = None  # it runs in one process
    return own | dict.fromkeys(FOR_MODELS) if is_function(recipe.reward_pretrain) else own


def processor_of(config: RecipeConfig) -> str:
    if isinstance(config, ConditionalSFTConfig):
        return "csft"
    if isinstance(config, RejectionSamplingConfig):
        return "raft" if config.top_fraction is not None else "rs"
    return "iter_dpo"


def training(config: RecipeConfig, number: int) -> list[Step]:
    """Train on them; an adapter is merged, so that the next iteration has a whole model to write with."""
    folder, saving, log = iteration_folder(config, number), config.checkpoint, config.logging
    model = local(folder / "model")
    trained = local(folder / "adapter") if config.lora.lora_rank else model
    dpo = isinstance(config, IterativeDPOConfig)
    method = DPOConfig if dpo else SFTConfig
    own = {
        "pretrain": policy_of(config, number),
        "dataset": local(folder / "score.jsonl"),
        "tokenizer_chat_template": config.data.tokenizer_chat_template,  # type: ignore[attr-defined]
        "data_cache_dir": local(folder / "cache"),
        "save_path": trained,
        "ckpt_path": saving.ckpt_path and checkpoints_of(config, number),
        "load_checkpoint": saving.save_steps > 0 or None,
        "use_tensorboard": log.use_tensorboard and local(Path(log.use_tensorboard) / f"iteration-{number}"),
        "wandb_run_name": log.wandb_run_name and f"{log.wandb_run_name}-{number}",
    }
    if isinstance(config, IterativeDPOConfig):
        own |= {"prompt_key": "prompt", "ref_pretrain": reference_of(config)}
    else:
        own |= {"input_key": "input", "output_key": "output"}
    steps = [Step("train", ("train", "dpo" if dpo else "sft"), method, chosen(config, method, own, READING))]
    if config.lora.lora_rank:
        own = {"adapter": trained, "pretrain": policy_of(config, number), "save_path": model, "bf16": None}
        steps.append(Step("merge", ("merge",), MergeConfig, chosen(config, MergeConfig, own)))
    return steps


def checkpoints_of(config: RecipeConfig, number: int) -> str:
    """Where an iteration keeps its checkpoints under `--ckpt_path`, which several recipes may share."""
    own = hashlib.blake2b(str(Path(config.checkpoint.save_path).resolve()).encode(), digest_size=4).hexdigest()
    return local(Path(config.checkpoint.ckpt_path or "") / f"recipe-{own}" / f"iteration-{number}")


def reference_of(config: IterativeDPOConfig) -> str | None:
    """The reference stays the first policy through all iterations; some losses have none."""
    if config.reference.ref_pretrain is None and config.preference.kind in REFERENCE_FREE:
        return None
    return config.reference.ref_pretrain or config.model.pretrain


def ask(config: ConditionalSFTConfig, number: int, reward: float, longest: int | None = None) -> tuple[Step, Step]:
    """Ask the trained model for responses of a reward, and score these as answers to the prompt without it.

    Args:
        config: the recipe.
        number: which of the rewards that are asked for.
        reward: what is asked for.
        longest: the longest prompt to ask with, in tokens.
    """
    folder = iteration_folder(config, 0)
    writing = {
        "pretrain": local(folder / "model"),
        "dataset": local(folder / "prompts.jsonl"),
        "csft_reward": reward,
        "prompt_max_len": longest,
        "reward_template": config.conditioning.reward_template,
        "output_path": local(folder / f"ask-{number}-generate.jsonl"),
    }
    scoring = scorer(config) | {
        "dataset": local(folder / f"ask-{number}-answers.jsonl"),
        "output_path": local(folder / f"ask-{number}-score.jsonl"),
        "normalize_reward": None,
        "calibrate": None,
        "reward_template": None,
    }
    return (
        Step(f"ask-{number}-generate", ("generate",), GenerateConfig, chosen(config, GenerateConfig, writing, READING)),
        Step(f"ask-{number}-score", ("score",), ScoreConfig, chosen(config, ScoreConfig, scoring, READING)),
    )


def chosen(
    config: RecipeConfig, step: type[Config], own: dict[str, Any], without: set[str] | frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The options of a step, as JSON has them.

    An option of the recipe goes to every step that has it, if it was given or the recipe's default is another one.

    Args:
        config: the recipe.
        step: the config of the step.
        own: options that the recipe decides for this step; None leaves one out.
        without: options of the recipe that are not for this step.
    """
    given, values = config.given(), values_of(config)
    result = {}
    for name, field, _ in options(step):
        if name in own:
            result[name] = own[name]
        elif name in values and name not in without:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            if name in given or values[name] != default:
                result[name] = values[name]
    return {name: as_json(value) for name, value in result.items() if value is not None}


def values_of(config: BaseModel) -> dict[str, Any]:
    """All options with their values, groups flattened."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        flat |= values_of(value) if isinstance(value, BaseModel) else {name: value}
    return flat


def as_json(value: Any) -> Any:
    """An option's value as JSON has it. Of a secret, that there is one: the secret itself goes through the environment."""
    if isinstance(value, SecretStr):
        return "True"
    return list(value) if isinstance(value, tuple) else value


def shown(step: Step) -> str:
    """The command line of a step, to be pasted."""
    return " \\\n   ".join(
        [" ".join(("rlhf", *step.command)), *(flag(step.config, *one) for one in step.options.items())]
    )


def flag(config: type[Config], name: str, value: Any) -> str:
    """An option as it is written in a shell."""
    from shlex import join

    from rlhf_cli.options import plain_type

    kind = next(field.annotation for known, field, _ in options(config) if known == name)
    if plain_type(kind) is bool:
        return f"--{name}" if value else f"--no_{name}"
    return join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])
