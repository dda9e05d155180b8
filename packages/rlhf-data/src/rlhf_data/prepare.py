"""From options to training data: what sources, mixtures, held-out rows and the report have in common for all kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from rlhf_data.config import DataConfig
from rlhf_data.dataset import TokenDataset
from rlhf_data.encode import encode_options_of
from rlhf_data.errors import InputError
from rlhf_data.mixture import hold_out, limit, mix, parse_probs
from rlhf_data.pairs import PairOptions
from rlhf_data.report import DataReport, Facts, Lengths, SourceReport, dropped_lines
from rlhf_data.shapes import RowOptions
from rlhf_data.sources import Source, Splits, open_splits, pick, split_specs
from rlhf_data.store import TokenStore, cache_dir
from rlhf_data.tokenise import Tokeniser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

D = TypeVar("D")


@dataclass(frozen=True)
class Prepared(Generic[D]):
    """Everything a run reads."""

    train: D
    eval: D | None
    report: DataReport


@dataclass(frozen=True)
class Kind(Generic[D]):
    """What tells one kind of training data from another.

    Attributes:
        rows: how rows are read.
        view: a data set of rows (int64 `[N]`, counted through all stores).
        samples: the samples of such a data set, whose lengths are reported.
        describe: for the report, its first row by heading, and what else is to be known.
        multiturn: every assistant turn is trained.
    """

    rows: RowOptions | PairOptions
    view: Callable[[Sequence[TokenStore], np.ndarray], D]
    samples: Callable[[D], TokenDataset]
    describe: Callable[[D, PreTrainedTokenizerBase], tuple[dict[str, str], Facts | None]]
    multiturn: bool = False


def prepare(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, kind: Kind[D], *, seed: int, progress: bool = True
) -> Prepared[D]:
    """Read, check and tokenise all data of a run; what was tokenised before is taken from the cache.

    The same arguments give the same rows in the same order, in every process.

    Args:
        config: the options.
        tokenizer: of the model to be trained.
        kind: what the rows are.
        seed: of mixing and of the choice of rows held out.
        progress: show a progress bar on stderr while many rows are tokenised.

    Raises:
        InputError: the data or the options are at fault; the message names file, row, key, option.
    """
    return _Preparation(config, tokenizer, kind, seed, progress).run()


class _Preparation(Generic[D]):
    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, kind: Kind[D], seed: int, progress: bool
    ):
        self.config, self.tokenizer, self.kind, self.seed = config, tokenizer, kind, seed
        self.tokeniser = Tokeniser(
            tokenizer,
            encode_options_of(config, kind.multiturn),
            kind.rows,
            cache_dir(config.data_cache_dir),
            config.strict_data,
            progress,
        )
        self.reports: list[SourceReport] = []
        self.notes: list[str] = []

    def run(self) -> Prepared[D]:
        config = self.config
        specs = split_specs(config.dataset)
        probs = parse_probs(config.dataset_probs, specs)
        opened = [open_splits(spec) for spec in specs]
        sources = [pick(splits, spec, config.train_split) for splits, spec in zip(opened, specs, strict=True)]
        stores = self._stores(sources, config.max_samples)
        rows = mix([store.num_rows for store in stores], probs, self.seed)
        if probs is not None and len(stores) > 1:
            self.notes.append(f"{len(rows):,} rows drawn by --dataset_probs until one data set ran out")
        kept = limit(rows, config.max_samples, self.seed, in_order=probs is not None or len(stores) == 1)
        if len(kept) < len(rows):
            self.notes.append(f"{len(kept):,} of {len(rows):,} mixed rows kept (--max_samples)")
        kept, evaluation = self._evaluation(stores, kept, list(zip(specs, opened, strict=True)))
        train = self.kind.view(stores, kept)
        return Prepared(train, evaluation, self._report(train, evaluation))

    def _stores(self, sources: list[Source], max_rows: int | None) -> list[TokenStore]:
        """Token stores of sources; that none of them keeps a row is an error."""
        stores, reports = [], []
        for source in sources:
            store, report = self.tokeniser.store(source, max_rows)
            if not report.rows_kept:
                raise InputError(_nothing_left(report))
            stores.append(store)
            reports.append(report)
        self.reports += reports
        return stores

    def _evaluation(
        self, stores: list[TokenStore], rows: np.ndarray, opened: list[tuple[str, Splits]]
    ) -> tuple[np.ndarray, D | None]:
        """Training rows that are left, and the evaluation data: given, the evaluation split, or rows held out."""
        config = self.config
        if config.eval_dataset is not None:
            return rows, self._given_evaluation(config.eval_dataset)
        with_split = [splits[config.eval_split] for _, splits in opened if config.eval_split in splits]
        without = [spec for spec, splits in opened if config.eval_split not in splits]
        if with_split and config.eval_split != config.train_split:
            if without:
                self.notes.append(
                    f"{', '.join(without)} has no split `{config.eval_split}`: not part of the evaluation"
                )
            return rows, self._whole(with_split)
        why = (
            f"no split `{config.eval_split}` in {', '.join(without)}"
            if without
            else "--eval_split is the training split"
        )
        if config.eval_ratio == 0:
            self.notes.append(f"no evaluation: {why}, and --eval_ratio is 0")
            return rows, None
        if len(rows) == 1:
            self.notes.append(f"no evaluation: {why}, and the only row is trained on")
            return rows, None
        left, held = hold_out(rows, config.eval_ratio, self.seed)
        self.notes.append(
            f"{why}: {len(held):,} of {len(rows):,} rows held out for evaluation "
            f"(--eval_ratio {config.eval_ratio:g}, seed {self.seed})"
        )
        return left, self.kind.view(stores, held)

    def _given_evaluation(self, value: str) -> D:
        """`--eval_dataset`: its evaluation split; a data set with one split only is taken whole."""
        sources = []
        for spec in split_specs(value, "--eval_dataset"):
            splits = open_splits(spec)
            only = next(iter(splits)) if len(splits) == 1 else self.config.eval_split
            sources.append(pick(splits, spec, only))
        return self._whole(sources)

    def _whole(self, sources: list[Source]) -> D:
        """All rows of evaluation sources."""
        stores = self._stores(sources, None)
        return self.kind.view(stores, np.arange(sum(store.num_rows for store in stores)))

    def _report(self, train: D, evaluation: D | None) -> DataReport:
        samples = self.kind.samples
        examples, facts = self.kind.describe(train, self.tokenizer)
        return DataReport(
            sources=self.reports,
            notes=self.notes,
            train=Lengths.of(samples(train)),
            eval=None if evaluation is None else Lengths.of(samples(evaluation)),
            examples=examples,
            facts=facts,
        )


def _nothing_left(report: SourceReport) -> str:
    reasons = "; ".join(line.strip() for line in dropped_lines(report.dropped))
    return f"{report.name} [{report.split}]: none of {report.rows_read:,} rows can be used: {reasons}"
