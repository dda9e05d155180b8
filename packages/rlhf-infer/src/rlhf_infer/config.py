"""The options of generation and scoring, declared once. Light: the command line reads them before anything is imported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlhf_core.config import Folder, RanksConfig
from rlhf_data.config import Config, Count, ResponseDataConfig, SeedConfig, SlicedPromptDataConfig

REWARD_TEMPLATE = "{input} <rm_score>: {reward} "
"""How a prompt is conditioned on a reward, in training and when it is asked for one."""

EngineName = Literal["vllm", "transformers"]


class InferenceModelConfig(Config):
    """Model."""

    pretrain: Folder
    """Model to run: a folder in Hugging Face format, or a Hub id."""

    bf16: bool = False
    """Compute in bfloat16. Without it, in float32."""

    micro_batch_size: Count = 16
    """Sequences in a forward pass, where vLLM does not schedule for itself. It bounds memory and does not change the result."""

    disable_fast_tokenizer: bool = False
    """Use the slow (Python) tokenizer."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


class SamplingConfig(Config):
    """Sampling."""

    max_new_tokens: Count = 1024
    """Longest response, in tokens. One that is cut off there is marked (`finish_reason: length`), never finished by force."""

    best_of_n: Count = 1
    """Responses per prompt."""

    greedy_sampling: bool = False
    """Take the most probable token at every step."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits; below 1 sharpens the distribution, above 1 flattens it."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that has this probability."""

    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides the positive logits of tokens that prompt or response already have, and multiplies negative ones (Keskar et
    al. 2019); 1 for none."""

    @model_validator(mode="after")
    def _greedy_draws_nothing(self) -> SamplingConfig:
        if self.greedy_sampling:
            drawn = [f"--{name}" for name in ("temperature", "top_p") if name in self.model_fields_set]
            if drawn:
                raise ValueError(
                    f"--greedy_sampling draws nothing, so {' and '.join(drawn)} would do nothing: give one of them"
                )
            if self.best_of_n > 1:
                raise ValueError(
                    f"--greedy_sampling with --best_of_n {self.best_of_n} would write the same response every time"
                )
        return self


class EngineConfig(Config):
    """Engine."""

    engine: EngineName | None = None
    """What writes: `vllm`, or `transformers` for machines without it; by default vLLM where it is installed."""

    num_engines: Count = 1
    """Copies of the engine that share the prompts, run by Ray Data: one per GPU (or `--tp_size` GPUs), on all nodes of the
    Ray cluster if there is one. A single one runs in this process, without Ray."""

    tp_size: Count = 1
    """GPUs that one model is split over (vLLM tensor parallelism)."""

    max_num_seqs: Count = 256
    """Most responses that vLLM writes at the same time."""

    enable_prefix_caching: bool = False
    """Compute a prefix that prompts share once (vLLM). It changes no token."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that vLLM may take."""

    @model_validator(mode="after")
    def _transformers_is_one_device(self) -> EngineConfig:
        if self.engine == "transformers":
            for name in ("tp_size", "max_num_seqs", "enable_prefix_caching", "gpu_memory_utilization"):
                if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"--{name} is for vLLM, and the engine is transformers: leave it out")
        return self


class ConditioningConfig(Config):
    """Conditioning on a reward."""

    reward_template: str = REWARD_TEMPLATE
    """How a prompt is conditioned on a reward: `{input}` stands for the prompt as it is written out, `{reward}` for the
    reward with two decimals. The same in training (`--post_processor csft`) and when a reward is asked for (`--csft_reward`)."""

    @model_validator(mode="after")
    def _both_have_a_place(self) -> ConditioningConfig:
        for slot in ("{input}", "{reward}"):
            if self.reward_template.count(slot) != 1:
                raise ValueError(f"--reward_template must contain {slot} exactly once, got {self.reward_template!r}")
        return self


class AskedConditioningConfig(ConditioningConfig):
    """Conditioning on a reward."""

    csft_reward: float | None = None
    """Ask a model that conditional fine-tuning trained for responses of this reward: prompts go through `--reward_template`."""

    @model_validator(mode="after")
    def _the_template_is_used(self) -> AskedConditioningConfig:
        if "reward_template" in self.model_fields_set and self.csft_reward is None:
            raise ValueError("--reward_template writes a reward into the prompt: say which one with --csft_reward")
        return self


class OutputConfig(Config):
    """Output."""

    output_path: Folder
    """JSON lines file to write. What is finished is in `OUTPUT.partial` while it goes on, and a run that was killed goes on
    from there; `OUTPUT.job.json` says how the file was made."""

    overwrite: bool = False
    """Start anew: throw away an unfinished output, and replace a finished one that another command made."""


class GenerateConfig(Config):
    """Write responses to the prompts of a data set, with vLLM or transformers."""

    model: InferenceModelConfig
    data: SlicedPromptDataConfig
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    conditioning: AskedConditioningConfig = AskedConditioningConfig()
    randomness: SeedConfig = SeedConfig()
    output: OutputConfig


class RewardConfig(Config):
    """Rewards."""

    value_head_prefix: str | None = None
    """Name of the reward head in the checkpoint; by default it is found by looking."""

    normalize_reward: bool = False
    """Write (reward - mean) / deviation, with the statistics that training left in the reward model, or with those of this
    data (`--calibrate`)."""

    calibrate: bool = False
    """Take mean and deviation for `--normalize_reward` from the rewards of this data."""

    reward_engine: EngineName = "transformers"
    """What computes rewards: `transformers` without padding, on `--num_procs` ranks, or `vllm`'s reward runner."""

    flash_attn: bool = True
    """Lay samples end to end instead of padding them, and compute a prompt that several responses share once; FlashAttention
    2 where it is installed. `--no_flash_attn` pads."""

    @model_validator(mode="after")
    def _statistics_are_used(self) -> RewardConfig:
        if self.calibrate and not self.normalize_reward:
            raise ValueError("--calibrate is where --normalize_reward takes its statistics from: give both or neither")
        return self


PostProcessor = Literal["rs", "raft", "iter_dpo", "dpo_pairs", "csft", "filter"]


class ProcessorConfig(ConditioningConfig):
    """What is made of the rewards."""

    post_processor: Annotated[
        PostProcessor | None, BeforeValidator(lambda value: None if value in ("None", "none", "null", "") else value)
    ] = None
    """`rs` the best response to each prompt, `raft` the best `--top_fraction` of all those, `iter_dpo` the best against the
    worst, `dpo_pairs` all pairs at least `--min_margin` apart, `csft` prompts conditioned on the reward
    (`--reward_template`), `filter` responses of at least `--reward_threshold`. Without it, all rows with their rewards."""

    top_fraction: Annotated[float | None, Field(gt=0, le=1)] = None
    """Share of the prompts that `raft` keeps, those with the best responses."""

    min_margin: Annotated[float | None, Field(ge=0)] = None
    """Least difference of two rewards that `iter_dpo` and `dpo_pairs` make a pair of; equal ones never are."""

    max_pairs: Count | None = None
    """Most pairs per prompt that `dpo_pairs` makes, those furthest apart first; by default all."""

    reward_threshold: float | None = None
    """Least reward that `filter` keeps."""

    @model_validator(mode="after")
    def _options_are_used(self) -> ProcessorConfig:
        users = {
            "top_fraction": ("raft",), "min_margin": ("iter_dpo", "dpo_pairs"), "max_pairs": ("dpo_pairs",),
            "reward_threshold": ("filter",), "reward_template": ("csft",),
        }  # fmt: skip
        for name, processors in users.items():
            if (
                name in self.model_fields_set
                and getattr(self, name) is not None
                and self.post_processor not in processors
            ):
                raise ValueError(f"--{name} is for --post_processor {' or '.join(processors)}: give both or neither")
        for processor, name in (("raft", "top_fraction"), ("filter", "reward_threshold"), ("dpo_pairs", "min_margin")):
            if self.post_processor == processor and getattr(self, name) is None:
                raise ValueError(f"--post_processor {processor} needs --{name}")
        return self


class ScoringRanksConfig(RanksConfig):
    """Parallelism."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """3 splits the weights over the ranks, for reward models too big for one device; below that every rank has them whole."""


class ScoreConfig(Config):
    """Score responses with a reward model or a Python function, and make training data of the rewards."""

    model: InferenceModelConfig
    data: ResponseDataConfig
    reward: RewardConfig = RewardConfig()
    processor: ProcessorConfig = ProcessorConfig()
    parallel: ScoringRanksConfig = ScoringRanksConfig()
    randomness: SeedConfig = SeedConfig()
    output: OutputConfig
