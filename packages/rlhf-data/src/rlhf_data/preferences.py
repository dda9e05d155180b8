"""Preference data: pairs for reward models and DPO, labelled single rows for KTO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_data.config import LabelledDataConfig, PairDataConfig, RewardDataConfig
from rlhf_data.dataset import LabelledDataset, PairDataset
from rlhf_data.labels import LabelledOptions
from rlhf_data.pairs import PairOptions
from rlhf_data.prepare import Kind, Prepared, prepare
from rlhf_data.report import Facts, LabelFacts, PairFacts, mark_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PairData = Prepared[PairDataset]
"""Everything that a run on pairs reads."""

LabelledData = Prepared[LabelledDataset]
"""Everything that a run on labelled rows reads."""


def prepare_pairs(
    config: PairDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    same_prompt: bool,
    share_prefix: bool,
    progress: bool = True,
) -> PairData:
    """Read, check and tokenise all pairs of a run; see `rlhf_data.prepare.prepare`.

    Args:
        config: the options; those of a reward model may bring a margin.
        tokenizer: of the model to be trained.
        seed: of mixing and of the choice of rows held out.
        same_prompt: drop pairs whose sides answer different prompts, as DPO must; a reward model need not.
        share_prefix: the prompt tokens that both sides begin with are to be laid out once.
        progress: show a progress bar on stderr while many rows are tokenised.
    """
    margin_key = config.margin_key if isinstance(config, RewardDataConfig) and config.margin_loss else None
    kind = Kind(
        rows=PairOptions(config.prompt_key, config.chosen_key, config.rejected_key, margin_key, same_prompt),
        view=lambda stores, rows: PairDataset(stores, rows, share_prefix),
        samples=lambda dataset: dataset.samples,
        describe=_describe_pairs,
    )
    return prepare(config, tokenizer, kind, seed=seed, progress=progress)


def prepare_labelled(
    config: LabelledDataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, progress: bool = True
) -> LabelledData:
    """Read, check and tokenise all labelled rows of a run; see `rlhf_data.prepare.prepare`."""
    kind = Kind(
        rows=LabelledOptions(
            config.row_format,
            config.input_key,
            config.output_key,
            label_key=config.label_key,
            label_threshold=config.label_threshold,
        ),
        view=LabelledDataset,
        samples=lambda dataset: dataset.samples,
        describe=_describe_labelled,
    )
    return prepare(config, tokenizer, kind, seed=seed, progress=progress)


def _describe_pairs(train: PairDataset, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, str], Facts]:
    first = train[0]
    sides = {"chosen": first.chosen, "rejected": first.rejected}
    examples = {f"first pair, {name}": mark_trained(side, tokenizer) for name, side in sides.items()}
    return examples, PairFacts.of(train)


def _describe_labelled(train: LabelledDataset, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, str], Facts]:
    first = train[0]
    heading = f"first sample, {'desirable' if first.label else 'undesirable'}"
    return {heading: mark_trained(first.sample, tokenizer)}, LabelFacts.of(train)
