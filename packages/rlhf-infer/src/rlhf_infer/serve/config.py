"""The options of the reward server, declared once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rlhf_core.config import Folder
from rlhf_data.config import Config, Count


class ServedModelConfig(Config):
    """Model."""

    reward_pretrain: str
    """Reward model: a folder in Hugging Face format, a Hub id, or a Python reward function (`my_rewards.py`,
    `my_rewards.py:function` or `module:function`)."""

    value_head_prefix: str | None = None
    """Name of the reward head in the checkpoint; by default it is found by looking."""

    normalize_reward: bool = False
    """Answer (reward - mean) / deviation, with the statistics that training left in the reward model."""

    bf16: bool = False
    """Compute in bfloat16. Without it, in float32."""

    flash_attn: bool = True
    """Lay samples end to end instead of padding them; FlashAttention 2 where it is installed. `--no_flash_attn` pads."""

    disable_fast_tokenizer: bool = False
    """Use the slow (Python) tokenizer."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


class LimitsConfig(Config):
    """Limits."""

    max_len: Count | None = None
    """Longest sample, in tokens; a longer one is refused unless `--truncate`. By default 2048, or the model's context if
    that is shorter."""

    truncate: bool = False
    """Cut samples at `--max_len` instead of refusing them."""

    batch_size: Count = 16
    """Most samples in a forward pass (or in a call of a Python function), of as many requests as are waiting."""

    max_queries: Count = 1024
    """Most samples in one request."""

    max_body_bytes: Count = 16 * 1024 * 1024
    """Largest request body, in bytes."""

    max_waiting: Count = 8192
    """Most samples that may wait; further requests are answered with 503 until there is room."""

    request_timeout: Annotated[float, Field(gt=0)] = 60
    """Seconds after which a request without all its rewards is answered with 504. A body must be there in as many."""

    @model_validator(mode="after")
    def _a_full_request_may_wait(self) -> LimitsConfig:
        if self.max_queries > self.max_waiting:
            raise ValueError(
                f"--max_queries {self.max_queries} samples may come in one request, but only --max_waiting "
                f"{self.max_waiting} may wait: it could never be answered; raise --max_waiting or lower --max_queries"
            )
        return self


class AddressConfig(Config):
    """Address."""

    host: str = "127.0.0.1"
    """Address to listen on; other machines can only reach the server on one of theirs, or on 0.0.0.0."""

    port: Annotated[int, Field(ge=0, le=65535)] = 5000
    """Port to listen on; 0 takes a free one and says which."""

    token_file: Folder | None = None
    """File that holds a bearer token which clients must send; without it the environment variable `RLHF_SERVE_TOKEN` is
    looked at, and without that anybody who reaches the port may ask."""


class ServeConfig(Config):
    """Answer requests for rewards over HTTP: a reward model, or a Python function."""

    model: ServedModelConfig
    limits: LimitsConfig = LimitsConfig()
    address: AddressConfig = AddressConfig()
