"""`rlhf chat`: talk to a model in the terminal."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_core.config import Folder
from rlhf_data.config import Config, Count


class ChatConfig(Config):
    """Talk to a model in the terminal."""

    pretrain: Folder
    """Model to talk to: a folder in Hugging Face format, or a Hub id."""

    system: str | None = None
    """System prompt."""

    apply_chat_template: bool | None = None
    """Write the conversation out with the tokenizer's chat template; by default if it has one."""

    tokenizer_chat_template: str | None = None
    """Chat template (Jinja text, or the path of a file with it) to use instead of the tokenizer's own."""

    input_template: str = "User: {}\nAssistant: "
    """How a prompt is written out without a chat template: one `{}` stands for it; backslash escapes such as \\n are decoded."""

    max_new_tokens: Count = 1024
    """Longest answer, in tokens."""

    max_len: Count = 4096
    """Longest conversation, in tokens: the oldest turns are left out of what the model sees when it would be longer."""

    greedy_sampling: bool = False
    """Take the most probable token at every step."""

    temperature: Annotated[float, Field(gt=0)] = 0.7
    """Divides the logits; below 1 sharpens the distribution, above 1 flattens it."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Sample from the smallest set of tokens that has this probability."""

    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides the positive logits of tokens that were already used, and multiplies negative ones; 1 for none."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the answers."""

    best_of_n: Count = 1
    """Answers to write each time; the one that `--reward_pretrain` likes best is given."""

    reward_pretrain: str | None = None
    """Reward model, or Python reward function, that chooses among `--best_of_n` answers."""

    value_head_prefix: str | None = None
    """Name of the reward head in the checkpoint; by default it is found by looking."""

    bf16: bool = False
    """Compute in bfloat16. Without it, in float32."""

    disable_fast_tokenizer: bool = False
    """Use the slow (Python) tokenizer."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
