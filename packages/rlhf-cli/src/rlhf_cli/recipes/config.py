"""The options of the recipes: those of their steps, and of the loop around them.

An option that several steps have (`--bf16`, `--max_len`, `--num_procs`, …) goes to each of them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from rlhf_core.config import (
    BatchConfig,
    CheckpointConfig,
    Folder,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OneEpochBatchConfig,
    OptimConfig,
    ParallelConfig,
    PreferenceConfig,
    PreferenceOptimConfig,
    ReferenceConfig,
)
from rlhf_data.config import Config, Count, PromptDataConfig, ResponseDataConfig, whole_number
from rlhf_infer.config import ConditioningConfig, EngineConfig, EngineName, SamplingConfig


class ScorerConfig(Config):
    """Rewards."""

    reward_pretrain: Folder
    """Reward model: a folder in Hugging Face format, a Hub id, or a Python reward function (`my_rewards.py`,
    `my_rewards.py:function` or `module:function`)."""

    value_head_prefix: str | None = None
    """Name of the reward head in the checkpoint; by default it is found by looking."""

    normalize_reward: bool = False
    """Write (reward - mean) / deviation, with the statistics that training left in the reward model, or with those of this
    data (`--calibrate`)."""

    calibrate: bool = False
    """Take mean and deviation for `--normalize_reward` from the rewards of this data."""

    reward_engine: EngineName = "transformers"
    """What computes rewards: `transformers` without padding, on `--num_procs` ranks, or `vllm`'s reward runner."""

    reward_zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """3 splits the reward model over the ranks."""

    micro_batch_size: Count = 16
    """Sequences in a forward pass that scores, or that writes without vLLM."""


class LoopConfig(ScorerConfig):
    """Recipe."""

    training_iters: Count = 10
    """Iterations: each writes, scores and trains once, from the policy of the one before."""

    max_len: Count = 2048
    """Longest sample (prompt and response), in tokens, when it is scored and when it is trained on."""

    keep_models: bool = False
    """Keep the model of every iteration; otherwise the one before is removed when the next is complete."""


class SeveralResponsesConfig(SamplingConfig):
    """Sampling."""

    best_of_n: Annotated[int, BeforeValidator(whole_number), Field(ge=2)] = 4
    """Responses per prompt, of which the best (and the worst) is trained on."""


class TrainingRowsConfig(Config):
    """Training."""

    packing_samples: bool = False
    """Lay samples end to end instead of padding them while training."""

    eval_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the training rows held out for evaluation; 0 for no evaluation."""


class SavingConfig(CheckpointConfig):
    """Saving."""

    save_path: Folder = "./ckpt"
    """Folder of the recipe: `model` is the newest complete model, `report.md` and `report.png` say how it went, and
    `iterations` holds the options, the output and the log of every step."""

    ckpt_path: Folder | None = None
    """Folder of the checkpoints of training, with a folder for each iteration; by default beside the model that is trained.
    They are removed when the iteration is complete."""

    load_checkpoint: bool = False
    """For scripts that give it: the same command always goes on where it stopped, also without."""


class RecipeConfig(Config):
    """What all recipes have."""

    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = OneEpochBatchConfig()
    lora: LoraConfig = LoraConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: SavingConfig = SavingConfig()
    logging: LoggingConfig = LoggingConfig()
    rows: TrainingRowsConfig = TrainingRowsConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _stages_run_on_one_node(self) -> RecipeConfig:
        if self.parallel.num_nodes > 1:
            raise ValueError(
                f"--num_nodes {self.parallel.num_nodes}: a recipe starts its steps on one node; on several, run the steps of "
                "examples/rejection_sampling.sh under your launcher"
            )
        return self


class RejectionSamplingConfig(RecipeConfig):
    """Rejection sampling (RAFT): fine-tune on the best of several responses to each prompt, again and again."""

    recipe: LoopConfig
    data: PromptDataConfig
    batch: OneEpochBatchConfig = OneEpochBatchConfig()
    sampling: SeveralResponsesConfig = SeveralResponsesConfig()

    top_fraction: Annotated[float | None, Field(gt=0, le=1)] = None
    """RAFT: keep only the prompts with the best responses, this share of them."""


class IterativeDPOConfig(RecipeConfig):
    """Iterative DPO: prefer the best of several responses to each prompt to the worst, again and again."""

    recipe: LoopConfig
    data: PromptDataConfig
    batch: OneEpochBatchConfig = OneEpochBatchConfig()
    sampling: SeveralResponsesConfig = SeveralResponsesConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    preference: PreferenceConfig = PreferenceConfig()
    reference: ReferenceConfig = ReferenceConfig()

    min_margin: Annotated[float | None, Field(ge=0)] = None
    """Least difference of two rewards that makes a pair; equal ones never do."""


class AskConfig(ScorerConfig):
    """Recipe."""

    ask_rewards: list[float] | None = None
    """Rewards to ask the trained model for at the end; by default the 10th and the 90th percentile of those in the data."""

    ask_prompts: Annotated[int, Field(ge=0)] = 64
    """How many prompts of the data to ask it with; 0 leaves this out."""


class ConditionalSFTConfig(RecipeConfig):
    """Conditional SFT: fine-tune on responses with their reward in the prompt, and then ask for a high one."""

    recipe: AskConfig
    data: ResponseDataConfig
    conditioning: ConditioningConfig = ConditioningConfig()
    batch: OneEpochBatchConfig = OneEpochBatchConfig()


RECIPES = {
    "rejection-sampling": RejectionSamplingConfig,
    "iterative-dpo": IterativeDPOConfig,
    "conditional-sft": ConditionalSFTConfig,
}
"""The recipes, in the order in which `--help` shows them."""
