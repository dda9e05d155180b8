"""What `rlhf data inspect` does: the validation report of a data set, without training on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from rlhf_data.config import (
    Config,
    DataConfig,
    LabelKeys,
    LabelledDataConfig,
    MarginKeys,
    PackedDataConfig,
    RewardDataConfig,
    SFTDataConfig,
)

if TYPE_CHECKING:
    from rlhf_data.report import DataReport

KINDS: dict[str, type[DataConfig]] = {"sft": SFTDataConfig, "pairs": RewardDataConfig, "kto": LabelledDataConfig}
"""The data options of each kind of training."""


class InspectConfig(Config):
    """Show what training would see of a data set: rows kept, dropped and cut, lengths, a sample with its targets."""

    pretrain: str
    """Model whose tokenizer is used: a folder in Hugging Face format, or a Hub id."""

    kind: Literal["sft", "pairs", "kto"] = "sft"
    """What the rows are: conversations (and documents) for SFT, pairs for reward models and DPO, labelled rows for KTO.
    Defaults are those of that training (pairs: `--max_len 512` and no `--input_template`)."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of mixing and of the rows held out."""

    trust_remote_code: bool = False
    """Run tokenizer code that comes with the model. Only for models whose code you have read."""

    data: SFTDataConfig
    pairs: MarginKeys = MarginKeys()
    labels: LabelKeys = LabelKeys()

    @model_validator(mode="after")
    def _options_are_of_the_kind(self) -> InspectConfig:
        for name in self._given():
            if name not in KINDS[self.kind].model_fields:
                kinds = " or ".join(kind for kind, config in KINDS.items() if name in config.model_fields)
                raise ValueError(f"--{name} is no option of --kind {self.kind}; leave it out, or give --kind {kinds}")
        return self

    def data_of_kind(self) -> DataConfig:
        """The data options as training of this kind would have them."""
        packing = PackedDataConfig.model_fields.keys() - DataConfig.model_fields.keys()  # moves samples, changes none
        return KINDS[self.kind](**{name: value for name, value in self._given().items() if name not in packing})

    def _given(self) -> dict[str, Any]:
        """Data options that were given, of all kinds."""
        groups: tuple[BaseModel, ...] = (self.data, self.pairs, self.labels)
        return {name: getattr(group, name) for group in groups for name in group.model_fields_set}


def inspect(config: InspectConfig) -> DataReport:
    """Read, check and tokenise the data as training would.

    Raises:
        InputError: as in `rlhf_data.prepare.prepare`.
    """
    from rlhf_data.preferences import prepare_labelled, prepare_pairs
    from rlhf_data.sft import prepare_sft
    from rlhf_data.tokenizer import load_tokenizer

    template = config.data.tokenizer_chat_template
    tokenizer = load_tokenizer(config.pretrain, chat_template=template, trust_remote_code=config.trust_remote_code)
    data, seed = config.data_of_kind(), config.seed
    if isinstance(data, RewardDataConfig):
        return prepare_pairs(data, tokenizer, seed=seed, same_prompt=False, share_prefix=True).report
    if isinstance(data, LabelledDataConfig):
        return prepare_labelled(data, tokenizer, seed=seed).report
    return prepare_sft(config.data, tokenizer, seed=seed).report
