"""`rlhf chat`: talk to a model in the terminal, or have it answer the lines of a script."""

from __future__ import annotations

import sys
from typing import Annotated

from pydantic import Field, model_validator

from rlhf_core.config import Folder
from rlhf_data.config import Config, Count, check_template


class ChatConfig(Config):
    """Talk to a model in the terminal."""

    pretrain: Folder
    """Model to talk to: a folder in Hugging Face format, or a Hub id."""

    system: str | None = None
    """System prompt. `/system TEXT` gives another one."""

    apply_chat_template: bool | None = None
    """Write the conversation out with the tokenizer's chat template; by default if it has one and no `--input_template` is
    given."""

    tokenizer_chat_template: str | None = None
    """Chat template (Jinja text, or the path of a file with it) to use instead of the tokenizer's own."""

    input_template: str | None = "User: {}\nAssistant: "
    """How a prompt is written out without a chat template: one `{}` stands for it; backslash escapes such as \\n are decoded;
    "" or None switches it off."""

    max_new_tokens: Count = 1024
    """Longest answer, in tokens."""

    max_len: Count = 4096
    """Longest conversation, in tokens, if the model's context is not shorter: the oldest exchanges are left out of what the
    model sees when it would be longer."""

    greedy_sampling: bool = False
    """Take the most probable token at every step."""

    temperature: Annotated[float, Field(gt=0)] = 0.7
    """Divides the logits; below 1 sharpens the distribution, above 1 flattens it."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Sample from the smallest set of tokens that has this probability."""

    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides the positive logits of tokens that were already used, and multiplies negative ones; 1 for none."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the answers: the same prompts are answered the same. `/again` uses the next one."""

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

    @model_validator(mode="after")
    def _options_are_used(self) -> ChatConfig:
        check_template(self)  # type: ignore[arg-type]  # it has the two options that are looked at
        chat = bool(self.apply_chat_template or self.tokenizer_chat_template)
        if self.tokenizer_chat_template and self.apply_chat_template is False:
            raise ValueError(
                "--tokenizer_chat_template is what --no_apply_chat_template switches off: give one of them"
            )
        if chat and "input_template" in self.model_fields_set:
            raise ValueError(
                "--input_template is for models without a chat template: leave it out, or the chat template"
            )
        if self.greedy_sampling:
            if drawn := [f"--{name}" for name in ("temperature", "top_p", "seed") if name in self.model_fields_set]:
                raise ValueError(
                    f"--greedy_sampling draws nothing, so {' and '.join(drawn)} would do nothing: give one of them"
                )
            if self.best_of_n > 1:
                raise ValueError(
                    f"--greedy_sampling with --best_of_n {self.best_of_n} would write the same answer every time"
                )
        if self.best_of_n > 1 and not self.reward_pretrain:
            raise ValueError(
                f"--best_of_n {self.best_of_n} needs --reward_pretrain: somebody has to say which answer is the best"
            )
        if self.reward_pretrain and self.best_of_n == 1:
            raise ValueError("--reward_pretrain chooses among several answers: say how many with --best_of_n")
        if self.value_head_prefix and not self.reward_pretrain:
            raise ValueError("--value_head_prefix is for --reward_pretrain: give both or neither")
        return self


def chat(config: ChatConfig) -> None:
    """Answer a person at a terminal, or the lines of standard input.

    Args:
        config: with whom, and how.

    Raises:
        InputError: something that was given cannot be used; found before any weight is loaded. In a script also: a line
            cannot be answered or done.
    """
    from rlhf_core.libraries import settle

    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(f"[loading {config.pretrain}]", file=sys.stderr, flush=True)
    settle()
    from rlhf_infer.talk.terminal import Talk, typed_lines
    from rlhf_infer.talk.voice import ModelVoice

    talk = Talk(ModelVoice(config), config.system or "", config.seed, at_terminal=at_terminal)
    # what a terminal or pipe cannot write is spelled out, and what is no text is told apart when it is read
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    if at_terminal:
        talk.note("/help shows what you can do, Ctrl-D leaves")
    talk.run(typed_lines() if at_terminal else sys.stdin)
