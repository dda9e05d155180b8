"""What `rlhf data inspect` does: the validation report of a data set, without training on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from rlhf_data.config import Config, SFTDataConfig

if TYPE_CHECKING:
    from rlhf_data.report import DataReport


class InspectConfig(Config):
    """Show what training would see of a data set: rows kept, dropped and cut, lengths, a sample with its targets."""

    pretrain: str
    """Model whose tokenizer is used: a folder in Hugging Face format, or a Hub id."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of mixing and of the rows held out."""

    trust_remote_code: bool = False
    """Run tokenizer code that comes with the model. Only for models whose code you have read."""

    data: SFTDataConfig


def inspect(config: InspectConfig) -> DataReport:
    """Read, check and tokenise the data as training would.

    Raises:
        InputError: as in `rlhf_data.sft.prepare_sft`.
    """
    from rlhf_data.sft import prepare_sft
    from rlhf_data.tokenizer import load_tokenizer

    template = config.data.tokenizer_chat_template
    tokenizer = load_tokenizer(config.pretrain, chat_template=template, trust_remote_code=config.trust_remote_code)
    return prepare_sft(config.data, tokenizer, seed=config.seed).report
