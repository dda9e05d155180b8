"""Supervised fine-tuning data: conversations and documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_data.config import SFTDataConfig
from rlhf_data.dataset import TokenDataset, samples_of_rows
from rlhf_data.prepare import Kind, Prepared, prepare
from rlhf_data.report import mark_trained
from rlhf_data.shapes import RowOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SFTData = Prepared[TokenDataset]
"""Everything a supervised fine-tuning run reads."""


def prepare_sft(
    config: SFTDataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, progress: bool = True
) -> SFTData:
    """Read, check and tokenise all data of a supervised fine-tuning run; see `rlhf_data.prepare.prepare`."""
    kind = Kind(
        rows=RowOptions(config.row_format, config.input_key, config.output_key, config.pretrain_mode),
        view=lambda stores, rows: TokenDataset(stores, samples_of_rows(stores, rows)),
        samples=lambda dataset: dataset,
        describe=lambda train, tokenizer: ({"first sample": mark_trained(train[0], tokenizer)}, None),
        multiturn=config.multiturn,
    )
    return prepare(config, tokenizer, kind, seed=seed, progress=progress)
