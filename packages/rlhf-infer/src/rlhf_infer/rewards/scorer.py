"""The protocol of everything that gives responses a reward: a reward model, vLLM's reward runner, or a Python function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_data.errors import InputError
from rlhf_infer.config import EngineName

if TYPE_CHECKING:
    from rlhf_core.ranks import Ranks
    from rlhf_data.encode import Sample


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, with all that a scorer may want to know of it."""

    prompt: str
    """The prompt, as it is written out for a model."""

    response: str
    """What was answered to it, without the token that ends it."""

    label: Any = None
    """What the row's `label` column holds, for example the right answer; None if it has none."""

    row: Mapping[str, Any] = field(default_factory=dict)
    """The whole row of the data set."""

    sample: Sample | None = None
    """Prompt and response as token ids, for scorers that read these (`Scorer.needs_tokens`)."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a scorer says of N answers."""

    rewards: list[float]
    """N finite numbers, in the order of the answers."""

    metrics: dict[str, list[Any]] = field(default_factory=dict)
    """What else a Python function said of each answer, N values by name."""


class Scorer(ABC):
    """Something that gives responses a reward. The order of answers, and what else is scored with one, change none."""

    needs_tokens: ClassVar[bool]
    """Whether `Answer.sample` must be there; otherwise prompt and response are read."""

    @abstractmethod
    def judge(self, answers: Sequence[Answer]) -> Judgement:
        """Rewards of some answers, and what else is known of them.

        Raises:
            RunError: an answer has no reward (a Python function fails, or returns no finite number).
        """

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Rewards of some answers, see `judge`."""
        return self.judge(answers).rewards

    def close(self) -> None:
        """Give memory and devices back."""
        return


@dataclass(frozen=True, kw_only=True)
class ScorerOptions:
    """What decides a scorer: the options of the same names."""

    pretrain: str
    """A reward model (a folder in Hugging Face format, or a Hub id), or a Python function (see `is_function`)."""

    option: str = "--pretrain"
    """The option that named it, for errors."""

    reward_engine: EngineName = "transformers"
    value_head_prefix: str | None = None
    normalize_reward: bool = False
    """With the statistics in the reward model's config."""

    bf16: bool = False
    flash_attn: bool = True
    micro_batch_size: int = 16
    trust_remote_code: bool = False
    offload: bool = False
    """Keep a reward model's weights on the CPU and bring them to the device layer by layer; with `ranks` only."""
    max_len: int | None = None
    """Longest sample there will be, in tokens, where it is known."""
    missing: tuple[str, ...] = ()
    """Arguments of Python functions that there is nothing for here; a function that cannot do without is refused."""


def is_function(name: str) -> bool:
    """Whether what was named as a reward model is a Python function: `my_rewards.py`, `my_rewards.py:function` or
    `module:function`, where no folder has that name.
    """
    from pathlib import Path

    if Path(name).expanduser().is_dir():
        return False
    module, _, function = name.rpartition(":")
    return name.endswith(".py") or module.endswith(".py") or bool(module and function.isidentifier())


def check_scorer(options: ScorerOptions) -> None:
    """Find what is wrong with the options of a scorer, without loading any weight.

    Raises:
        InputError: there is no such model or function, it is no reward model, or an option does not fit it.
    """
    if is_function(options.pretrain):
        from rlhf_infer.rewards.function import check_function

        check_function(options)
    elif options.reward_engine == "vllm":
        from rlhf_infer.rewards.vllm import check_vllm

        check_vllm(options)
    else:
        from rlhf_infer.rewards.model import check_reward_model

        check_reward_model(options)


def make_scorer(options: ScorerOptions, ranks: Ranks | None = None) -> Scorer:
    """A scorer, ready: weights are loaded and the start-up check has passed.

    Args:
        options: which one.
        ranks: that share the work, each of which calls `judge` with the same answers; None for this process alone.

    Raises:
        InputError: as `check_scorer`, or the weights cannot be loaded.
    """
    if is_function(options.pretrain):
        from rlhf_infer.rewards.function import FunctionScorer

        return FunctionScorer(options)
    if options.reward_engine == "vllm":
        from rlhf_infer.rewards.vllm import VLLMScorer

        return VLLMScorer(options)
    from rlhf_infer.rewards.model import ModelScorer

    return ModelScorer(options, ranks)


def tokenizer_of(options: ScorerOptions, *, slow: bool = False) -> Any:
    """The tokenizer that a reward model reads with, as it was trained: `encode` answers with it.

    Raises:
        InputError: the model has none.
    """
    from rlhf_data.tokenizer import load_tokenizer

    if is_function(options.pretrain):
        raise InputError(f"{options.option} {options.pretrain} is a Python function: it reads texts, not tokens")
    return load_tokenizer(options.pretrain, use_fast=not slow, trust_remote_code=options.trust_remote_code)
