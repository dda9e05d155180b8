"""What became of the data: rows kept and dropped and why, lengths in tokens, and one sample as it is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_data.encode import Sample
from rlhf_data.labels import suggest_kto_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_data.dataset import LabelledDataset, PairDataset, TokenDataset

SOURCE_LINES = 11
EXAMPLE_LINES = 10
MAX_REASONS = 50
OTHER = "other reasons"
BAR = 24
QUANTILES = {"shortest": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "longest": 1.0}


@dataclass
class Drop:
    """Rows dropped for one reason: how many, and where the first is."""

    count: int
    first: str


@dataclass
class SourceReport:
    """What became of the rows of one source."""

    name: str
    split: str
    recognised: str = ""
    rows_read: int = 0
    rows_kept: int = 0
    samples: int = 0
    truncated: int = 0
    unwritable: str = ""
    dropped: dict[str, Drop] = field(default_factory=dict)
    cached: bool = False
    different_prompts: int = 0
    unfinished: int = 0

    def drop(self, reason: str, where: object) -> None:
        """Count a dropped row."""
        if reason not in self.dropped and len(self.dropped) >= MAX_REASONS:
            reason = OTHER
        if reason in self.dropped:
            self.dropped[reason].count += 1
        else:
            self.dropped[reason] = Drop(1, str(where))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SourceReport:
        """Inverse of `dataclasses.asdict`."""
        dropped = {reason: Drop(**drop) for reason, drop in values["dropped"].items()}
        return cls(**{**values, "dropped": dropped})

    def lines(self) -> list[str]:
        """For people."""
        kept = f"{self.rows_kept:,} of {self.rows_read:,} rows kept"
        pieces = f", {self.samples:,} samples" if self.samples != self.rows_kept else ""
        cached = ", tokenised before" if self.cached else ""
        shown = [f"{self.name} [{self.split}]: {self.recognised}; {kept}{pieces}{cached}"]
        shown += dropped_lines(self.dropped)
        if self.truncated:
            shown.append(f"  cut at --max_len: {self.truncated:,} (they do not end in EOS)")
        if self.unfinished:
            shown.append(f"  cut off when they were generated: {self.unfinished:,} (they do not end in EOS)")
        if self.different_prompts:
            shown.append(f"  pairs whose sides answer different prompts: {self.different_prompts:,} (for DPO, dropped)")
        if self.unwritable:
            more = "" if len(self.unwritable) <= 20 else f" and {len(self.unwritable) - 20} more"
            shown.append(f"  characters this tokenizer drops or changes: {' '.join(self.unwritable[:20])}{more}")
        return shown


def dropped_lines(dropped: dict[str, Drop], most: int = 6) -> list[str]:
    """A line for each of the commonest reasons."""
    ranked = sorted(dropped.items(), key=lambda item: -item[1].count)
    lines = [f"  dropped {drop.count:,}: {reason} (first: {drop.first})" for reason, drop in ranked[:most]]
    rest = ranked[most:]
    return lines + ([f"  dropped {sum(drop.count for _, drop in rest):,} for {len(rest)} more reasons"] if rest else [])


@dataclass(frozen=True)
class Lengths:
    """Sample lengths of a data set, in tokens."""

    samples: int
    tokens: int
    trained_tokens: int
    truncated: int
    quantiles: dict[str, int]
    edges: list[int]
    counts: list[int]

    @classmethod
    def of(cls, dataset: TokenDataset, num_bins: int = 8) -> Lengths:
        """Measure a data set."""
        lengths = dataset.lengths
        edges = np.unique(np.linspace(0, int(lengths.max()) + 1, num_bins + 1).round().astype(np.int64))
        counts, _ = np.histogram(lengths, edges)
        marks = np.quantile(lengths, list(QUANTILES.values()), method="nearest")
        return cls(
            samples=len(lengths),
            tokens=int(lengths.sum()),
            trained_tokens=int(dataset.num_targets.sum()),
            truncated=int(dataset.truncated.sum()),
            quantiles={name: int(mark) for name, mark in zip(QUANTILES, marks, strict=True)},
            edges=edges.tolist(),
            counts=counts.tolist(),
        )

    def line(self) -> str:
        """For people."""
        share = 100 * self.trained_tokens / self.tokens
        return (
            f"{self.samples:,} samples, {self.tokens:,} tokens, {self.trained_tokens:,} of them trained ({share:.0f}%)"
        )

    def histogram(self) -> list[str]:
        """Text bars, one for each range of lengths."""
        quantiles = ", ".join(f"{name} {mark:,}" for name, mark in self.quantiles.items())
        most, width = max(self.counts), len(f"{self.edges[-1] - 1:,}")
        lines = [f"length in tokens: {quantiles}"]
        for start, stop, count in zip(self.edges, self.edges[1:], self.counts, strict=False):
            bar = "█" * max(round(BAR * count / most), 1 if count else 0)
            lines.append(f"  {start:>{width},} to {stop - 1:>{width},}  {bar:<{BAR}} {count:,}")
        return lines


@dataclass(frozen=True)
class PairFacts:
    """What is to be known of pairs.

    Attributes:
        pairs: how many there are.
        tokens: of both sides of all of them.
        shared_tokens: those of them that sharing prompts saves.
        longer_chosen: in how many the chosen response is the longer one, in trained tokens.
        margins: the smallest and the largest margin.
    """

    pairs: int
    tokens: int
    shared_tokens: int
    longer_chosen: int
    margins: tuple[float, float]

    @classmethod
    def of(cls, dataset: PairDataset) -> PairFacts:
        """Measure pairs."""
        chosen, rejected = dataset.samples.num_targets.reshape(-1, 2).T
        return cls(
            pairs=len(dataset),
            tokens=int(dataset.samples.lengths.sum()),
            shared_tokens=int(dataset.common.sum()),
            longer_chosen=int((chosen > rejected).sum()),
            margins=(float(dataset.margins.min()), float(dataset.margins.max())),
        )

    def lines(self) -> list[str]:
        """For people."""
        margins = f"; margins from {self.margins[0]:g} to {self.margins[1]:g}" if any(self.margins) else ""
        return [
            f"pairs: {self.pairs:,}; {100 * self.shared_tokens / self.tokens:.0f}% of the tokens are shared prompts; "
            f"chosen is the longer response in {self.longer_chosen:,} "
            f"({100 * self.longer_chosen / self.pairs:.0f}%){margins}"
        ]


@dataclass(frozen=True)
class LabelFacts:
    """How many rows are desirable, and how many are not."""

    desirable: int
    undesirable: int

    @classmethod
    def of(cls, dataset: LabelledDataset) -> LabelFacts:
        """Count labels."""
        desirable = int(dataset.labels.sum())
        return cls(desirable, len(dataset) - desirable)

    def lines(self) -> list[str]:
        """For people: the counts, and weights where they are unbalanced."""
        counts = f"labels: {self.desirable:,} desirable, {self.undesirable:,} undesirable"
        if not self.desirable or not self.undesirable:
            missing = "undesirable" if self.desirable else "desirable"
            return [f"{counts}; with no {missing} row, responses are only {'raised' if self.desirable else 'lowered'}"]
        weights = suggest_kto_weights(self.desirable, self.undesirable)
        if weights is None:
            return [counts]
        name, weight = ("desirable", weights[0]) if weights[1] == 1 else ("undesirable", weights[1])
        return [f"{counts}; to balance them, give --{name}_loss_weight {weight:g}"]


Facts = PairFacts | LabelFacts


@dataclass
class DataReport:
    """What became of all data of a run.

    Attributes:
        sources: of training, then of evaluation.
        notes: decisions taken on the way, such as rows held out for evaluation.
        train: lengths of the training samples.
        eval: lengths of the evaluation samples, None without evaluation.
        examples: the first training row, by headings such as `first sample`: trained runs in ⟦…⟧, special tokens visible.
        facts: what is to be known of training pairs or labels; None for conversations.
        packing: filled in by whoever packs: rows, tokens per row, utilisation.
    """

    sources: list[SourceReport]
    notes: list[str]
    train: Lengths
    eval: Lengths | None
    examples: dict[str, str]
    facts: Facts | None = None
    packing: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON, for the run's folder."""
        return asdict(self)

    def format(self) -> str:
        """For the terminal, at most 40 lines."""
        lines = [line for source in self.sources for line in source.lines()]
        if len(lines) > SOURCE_LINES:
            left = len(lines) - SOURCE_LINES + 1
            lines = [*lines[: SOURCE_LINES - 1], f"  … {left} more lines in the saved report"]
        lines += [f"note: {note}" for note in self.notes[:4]]
        lines.append(f"train: {self.train.line()}")
        if self.eval is not None:
            lines.append(f"eval:  {self.eval.line()}")
        lines += self.facts.lines() if self.facts is not None else []
        lines += self.train.histogram()
        if self.packing is not None:
            lines.append("packing: " + ", ".join(f"{name} {value:,.4g}" for name, value in self.packing.items()))
        for heading, text in self.examples.items():
            lines += [f"{heading}, trained tokens in ⟦ ⟧:", *_excerpt(text, EXAMPLE_LINES // len(self.examples))]
        return "\n".join(lines)


def mark_trained(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a sample as the model sees it, special tokens visible, each run of trained tokens in ⟦…⟧."""
    ends = [*(np.flatnonzero(np.diff(sample.target_mask)) + 1).tolist(), len(sample)]
    text, start, before = "", 0, ""
    for end in ends:
        # decoded from the beginning, because tokenizers drop a space at the start of what they decode
        through = str(tokenizer.decode(sample.input_ids[:end].tolist(), clean_up_tokenization_spaces=False))
        if through.startswith(before):
            run = through[len(before) :]
        else:
            run = str(tokenizer.decode(sample.input_ids[start:end].tolist(), clean_up_tokenization_spaces=False))
        text += f"⟦{run}⟧" if sample.target_mask[start] else run
        start, before = end, through
    return text


def _excerpt(text: str, most_lines: int, width: int = 110) -> list[str]:
    """The beginning and, because the end matters most (EOS), the end of a text."""
    lines = [line[at : at + width] for line in text.split("\n") for at in range(0, max(len(line), 1), width)]
    if len(lines) > most_lines:
        last = most_lines // 3
        first = most_lines - last - 1
        lines = [*lines[:first], f"… {len(lines) - first - last} lines …", *lines[-last:]]
    return [f"  │{line}" for line in lines]
