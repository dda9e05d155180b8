"""The protocol of the reward server, version 1: what a request may say, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from rlhf_data.rows import Pair

VERSION = 1
"""Of the protocol. It changes when a client of the version before would not understand an answer any more."""


@dataclass(frozen=True, slots=True)
class Question:
    """One sample of a request."""

    pair: Pair
    """What a reward model reads."""

    prompt: str
    """What a Python function gets as the prompt; empty where nobody said where it ends."""

    response: str
    """What a Python function gets as the response."""

    label: Any = None
    """What a Python function gets as the label."""


class RewardRequest(BaseModel):
    """Samples to score: whole texts (`query`), or prompts and their responses apart."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"query": ["Question: 1 + 1?\nAnswer: 2"]}]},
    )

    query: list[str] | None = None
    """Whole texts, each a prompt with its response, as the reference system sends them. Special tokens are written out."""

    prompts: list[str] | None = None
    """Prompts, one per response. Beside `query` only a Python function reads them: to know where the response begins."""

    responses: list[str] | None = None
    """Responses, one per prompt, without the token that ends them. Prompt and response are encoded apart."""

    labels: list[JsonValue] | None = None
    """What a Python function may want to know of each sample, for example the right answer; a model reads none."""

    rendered: Literal["text", "chat"] = "text"
    """How the prompts were written out: as text, which the tokenizer's BOS is put before, or by a chat template, which
    writes BOS itself."""

    finish_reasons: list[Literal["stop", "length"]] | None = None
    """How each response ended: `stop`, or `length` for one that was cut off, which gets no EOS. By default all ended."""

    @model_validator(mode="after")
    def _one_shape(self) -> RewardRequest:
        if (self.query is None) == (self.responses is None):
            raise ValueError("give either `query` (whole texts) or `prompts` and `responses`")
        if self.responses is not None and self.prompts is None:
            raise ValueError("`responses` need `prompts`; a text whose prompt nobody knows is a `query`")
        if self.query is not None and (self.rendered != "text" or self.finish_reasons is not None):
            raise ValueError("`rendered` and `finish_reasons` are for `prompts` and `responses`, not for `query`")
        samples = self.query if self.query is not None else self.responses
        for name in ("prompts", "labels", "finish_reasons"):
            values = getattr(self, name)
            if values is not None and len(values) != len(samples or ()):
                raise ValueError(f"`{name}` has {len(values)} values for {len(samples or ())} samples")
        return self

    def questions(self) -> list[Question]:
        """The samples, in order."""
        texts = self.query if self.query is not None else self.responses or []
        prompts = self.prompts or [""] * len(texts)
        labels = self.labels or [None] * len(texts)
        if self.query is not None:
            return [
                Question(Pair("", text), prompt if text.startswith(prompt) else "", text.removeprefix(prompt), label)
                for text, prompt, label in zip(texts, prompts, labels, strict=True)
            ]
        ends = self.finish_reasons or ["stop"] * len(texts)
        return [
            Question(Pair(prompt, text, rendered=self.rendered, complete=end == "stop"), prompt, text, label)
            for text, prompt, label, end in zip(texts, prompts, labels, ends, strict=True)
        ]


class RewardAnswer(BaseModel):
    """Rewards of the samples of a request."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    rewards: list[float]
    """One finite number per sample, in their order."""

    model: str
    """What scored them."""

    version: Literal[1] = VERSION
    """Of the protocol."""

    truncated: list[int] = Field(default=[])
    """Samples, counted from 0, that were cut at the server's `--max_len`."""


class Health(BaseModel):
    """That the server can score."""

    status: Literal["ok"] = "ok"
    model: str


class Refusal(BaseModel):
    """Why a request was not answered."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    detail: str
    """The reason, in words."""

    indices: list[int] = Field(default=[])
    """Samples, counted from 0, that are the reason."""
