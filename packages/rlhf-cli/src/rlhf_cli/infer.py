"""`rlhf infer`: generation and scoring as one command, for scripts of OpenRLHF's `batch_inference`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf_data.config import Config, ResponseDataConfig, SeedConfig, SlicedPromptDataConfig
from rlhf_data.errors import InputError
from rlhf_data.options import build, options
from rlhf_infer.config import (
    AskedConditioningConfig,
    EngineConfig,
    GenerateConfig,
    InferenceModelConfig,
    OutputConfig,
    ProcessorConfig,
    RewardConfig,
    SamplingConfig,
    ScoreConfig,
    ScoringRanksConfig,
)

UNUSED = {
    "generate_vllm": {
        "micro_batch_size": "vLLM schedules for itself, see --max_num_seqs",
        "flash_attn": "vLLM chooses its attention itself",
    },
    "generate": {"flash_attn": "transformers chooses its attention itself when it writes"},
    "rm": {},
}
"""Options that scripts give though the task has no use for them, with what is said of it."""


class TaskConfig(Config):
    """Task."""

    eval_task: Literal["generate_vllm", "generate", "rm"]
    """`generate_vllm` or `generate` (transformers) is `rlhf generate`, `rm` is `rlhf score`; options of the other task are
    refused."""


class InferDataConfig(SlicedPromptDataConfig, ResponseDataConfig):
    """Data."""


class InferProcessorConfig(ProcessorConfig, AskedConditioningConfig):
    """Rewards in prompts, and what is made of rewards."""

    @model_validator(mode="after")
    def _options_are_used(self) -> InferProcessorConfig:
        return self  # the task's own config checks them

    @model_validator(mode="after")
    def _the_template_is_used(self) -> InferProcessorConfig:
        return self


class InferConfig(Config):
    """Batch inference: write responses (`--eval_task generate_vllm`, `generate`) or score them (`rm`)."""

    task: TaskConfig
    model: InferenceModelConfig
    data: InferDataConfig
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    reward: RewardConfig = RewardConfig()
    processor: InferProcessorConfig = InferProcessorConfig()
    parallel: ScoringRanksConfig = ScoringRanksConfig()
    randomness: SeedConfig = SeedConfig()
    output: OutputConfig


def job_of(config: InferConfig) -> tuple[GenerateConfig | ScoreConfig, list[str]]:
    """The job that was asked for, and lines that say which options it does not use.

    Raises:
        InputError: an option belongs to the other task.
    """
    given = config.given()
    task = given.pop("eval_task")
    job = ScoreConfig if task == "rm" else GenerateConfig
    known = {name for name, _, _ in options(job)}
    notes = [f"--{name}: not used ({UNUSED[task][name]})" for name in given if name in UNUSED[task]]
    kept = {name: value for name, value in given.items() if name not in UNUSED[task]}
    if foreign := sorted(name for name in kept if name not in known):
        named = ", ".join(f"--{name}" for name in foreign)
        does = "writes nothing" if task == "rm" else "scores nothing"
        raise InputError(f"{named}: --eval_task {task} {does}; leave out what belongs to the other task")
    if job is GenerateConfig:
        wanted = "vllm" if task == "generate_vllm" else "transformers"
        if kept.setdefault("engine", wanted) != wanted:
            raise InputError(f"--engine {kept['engine']} and --eval_task {task} say two things: leave out --engine")
    return build(job, kept), notes
