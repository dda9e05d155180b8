"""The options of generation, declared once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_data.config import Config, Count


class SamplingConfig(Config):
    """Sampling."""

    max_new_tokens: Count = 1024
    """Longest response, in tokens."""

    greedy_sampling: bool = False
    """Take the most probable token at every step."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits; below 1 sharpens the distribution, above 1 flattens it."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that has this probability."""

    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of tokens that were already used (Keskar et al. 2019); 1 for none."""

    best_of_n: Count = 1
    """Responses per prompt."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the samples."""


class EngineConfig(Config):
    """Engine."""

    pretrain: str
    """Model that writes: a folder in Hugging Face format, or a Hub id."""

    bf16: bool = False
    """Compute in bfloat16."""

    prompt_max_len: Count = 1024
    """Longest prompt, in tokens."""

    tp_size: Count = 1
    """GPUs that one model is split over (vLLM tensor parallelism)."""

    max_num_seqs: Count = 256
    """Most responses written at the same time."""

    enable_prefix_caching: bool = False
    """Compute a prefix that prompts share once (vLLM)."""

    micro_batch_size: Count = 16
    """Prompts per forward pass where the engine does not schedule for itself."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
