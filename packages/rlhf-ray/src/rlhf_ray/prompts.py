"""The prompts of a run: read once, encoded once, and kept in a few flat arrays for as long as the run asks them."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf_data.config import InferenceDataConfig
from rlhf_data.continuation import continuation_texts
from rlhf_data.encode import EncodeOptions, Encoder, Prompt
from rlhf_data.errors import InputError, strict_error
from rlhf_data.mixture import hold_out, parse_probs
from rlhf_data.prompts import PromptOptions
from rlhf_data.report import Drop, SourceReport, dropped_lines
from rlhf_data.rows import Rendered, RowError
from rlhf_data.sources import open_splits, pick, split_specs
from rlhf_data.stream import RowStream, StreamedRow
from rlhf_infer.generate import as_json
from rlhf_infer.prompts import BLOCK, fitting
from rlhf_ray.config import PPOConfig, PPODataConfig
from rlhf_ray.rollout import Rollout, offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLE = 500
"""Characters of the first prompt that the report shows."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts, numbered from 0, in the order of their data. What they hold in common is not copied when some are selected.

    Three of them, the second with a label:

        ids(1)    [1, 403, 407]
        text(1)   "Once upon"
        label(1)  "a cat"
        row(1)    {"prompt": "Once upon", "label": "a cat"}
    """

    tokenizer: PreTrainedTokenizerBase
    """What wrote them out, and reads the responses to them."""

    label_key: str
    """Column of the label."""

    input_ids: NDArray[np.int32]
    """Token ids of all prompts, end to end."""

    id_bounds: NDArray[np.int64]
    """Where each prompt starts among them, and the end."""

    written: bytes
    """Of each prompt a JSON list, end to end: its text, how that was written out, and its row."""

    written_bounds: NDArray[np.int64]
    """Where each starts among them, and the end."""

    places: NDArray[np.int64]
    """Of these prompts among all that the arrays hold, `[N]`."""

    def __len__(self) -> int:
        return len(self.places)

    def ids(self, number: int) -> NDArray[np.int32]:
        """Token ids of a prompt, at least one, as the policy is asked."""
        place = self.places[number]
        return self.input_ids[self.id_bounds[place] : self.id_bounds[place + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt, `[N]`."""
        return np.diff(self.id_bounds)[self.places]

    def text(self, number: int) -> str:
        """A prompt as it was written out, without the tokenizer's BOS."""
        return str(self._written(number)[0])

    def rendered(self, number: int) -> Rendered:
        """How it was written out, see `rlhf_data.encode.Prompt`."""
        return self._written(number)[1]

    def row(self, number: int) -> dict[str, Any]:
        """All columns of its row, as JSON holds them."""
        return self._written(number)[2]

    def label(self, number: int) -> Any:
        """The label column of its row, or of the row that a generated one answers; None if it has none."""
        return label_of(self.row(number), self.label_key)

    def select(self, numbers: Sequence[int] | NDArray[np.int64]) -> Prompts:
        """Some of them, numbered anew."""
        return replace(self, places=self.places[np.asarray(numbers, np.int64)])

    def responses(self, rollout: Rollout) -> list[str]:
        """Responses to these prompts as text, without the token that ended them, `N` of them."""
        prompts, responses = [], []
        stops = rollout.response_lengths - ~rollout.truncated
        for number, stop in enumerate(stops.tolist()):
            sample, start = rollout.sample(number), int(rollout.prompt_lengths[number])
            prompts.append(sample[:start].tolist())
            responses.append(sample[start : start + stop].tolist())
        return continuation_texts(self.tokenizer, prompts, responses)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any token, text, row, or their order does."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.input_ids, self.id_bounds, self.written, self.written_bounds, self.places):
            digest.update(part if isinstance(part, bytes) else part.tobytes())
        return digest.hexdigest()

    def _written(self, number: int) -> list[Any]:
        place = self.places[number]
        return json.loads(self.written[self.written_bounds[place] : self.written_bounds[place + 1]])


def label_of(row: dict[str, Any], key: str) -> Any:
    """The label of a row: its own, or that of the row which a generated one answers."""
    source = row.get("source")
    return row[key] if key in row else source.get(key) if isinstance(source, dict) else None


@dataclass
class PromptReport:
    """What became of the rows of a run's prompts."""

    sources: list[SourceReport] = field(default_factory=list)
    """Of training, then of evaluation."""

    notes: list[str] = field(default_factory=list)
    """Decisions taken on the way, such as prompts held out for evaluation."""

    train: dict[str, int] = field(default_factory=dict)
    """How many prompts there are to train on, and their lengths in tokens."""

    eval: dict[str, int] = field(default_factory=dict)
    """The same of held-out prompts; empty without any."""

    example: str = ""
    """The first prompt to train on, as it was written out."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON, for the run's folder."""
        return asdict(self)

    def format(self) -> str:
        """For people."""
        lines: list[str] = []
        for source in self.sources:
            lines.append(f"{source.recognised}; {source.rows_kept:,} of {source.rows_read:,} prompts kept")
            lines += dropped_lines(source.dropped)
        lines += [f"note: {note}" for note in self.notes]
        for name, figures in (("train", self.train), ("eval", self.eval)):
            if figures:
                lengths = "shortest {shortest:,}, median {median:,}, longest {longest:,}".format_map(figures)
                lines.append(f"{name + ':':<6} {figures['prompts']:,} prompts; tokens of each: {lengths}")
        shown = self.example if len(self.example) <= EXAMPLE else f"{self.example[:EXAMPLE]}…"
        return "\n".join([*lines, "first prompt:", *(f"  │{line}" for line in shown.split("\n"))])


@dataclass(frozen=True)
class PromptData:
    """The prompts of a run."""

    train: Prompts
    """To train on."""

    evaluation: Prompts | None
    """Held out; None without any."""

    report: PromptReport


def read_prompts(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, context: int | None) -> PromptData:
    """Read all prompts of a run.

    Args:
        config: the run's options.
        tokenizer: of the policy.
        context: longest sequence of the policy, in tokens, if it has one.

    Raises:
        InputError: data or options are at fault, or no prompt can be used; the message names file, row, column or option.
    """
    return _Reading(config, tokenizer, context).run()


class _Reading:
    """The reading of a run's prompts, with what is said of it on the way."""

    def __init__(self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, context: int | None) -> None:
        data = config.data
        self.data, self.seed, self.tokenizer, self.context = data, config.batch.seed, tokenizer, context
        self.report = PromptReport()
        self.encoder = Encoder(tokenizer, EncodeOptions(
            max_len=data.prompt_max_len + config.rollout.generate_max_len,
            input_template=data.input_template,
            apply_chat_template=data.apply_chat_template,
            tokenizer_chat_template=data.tokenizer_chat_template,
        ))  # fmt: skip

    def run(self) -> PromptData:
        data = self.data
        specs = split_specs(data.prompt_data, "--prompt_data")
        parse_probs(data.prompt_data_probs, specs, "--prompt_data_probs")
        train = self._read(
            [stream_options(data, data.prompt_data, data.prompt_split, of_training=True)], "--prompt_data"
        )
        train, evaluation = self._evaluation(train, specs)
        self.report.train = figures_of(train)
        self.report.eval = {} if evaluation is None else figures_of(evaluation)
        self.report.example = train.text(0)
        return PromptData(train, evaluation, self.report)

    def _evaluation(self, train: Prompts, specs: list[str]) -> tuple[Prompts, Prompts | None]:
        """Prompts that are left to train on, and those to evaluate on: given, the evaluation split, or some held out."""
        data, notes = self.data, self.report.notes
        split = data.eval_prompt_split
        if data.eval_prompt_data is not None:
            return train, self._given(data.eval_prompt_data)
        with_split = [spec for spec in specs if split != data.prompt_split and split in open_splits(spec)]
        without = [spec for spec in specs if spec not in with_split]
        if with_split:
            if without:
                notes.append(f"{', '.join(without)} has no split `{split}`: not part of the evaluation")
            options = [stream_options(data, spec, split) for spec in with_split]
            return train, self._read(options, f"--eval_prompt_split {split}")
        same = split == data.prompt_split
        why = "--eval_prompt_split is the training split" if same else f"no split `{split}` in {', '.join(without)}"
        if data.eval_ratio == 0:
            notes.append(f"no evaluation: {why}, and --eval_ratio is 0")
            return train, None
        if len(train) == 1:
            raise InputError(f"--eval_ratio {data.eval_ratio:g}: there is only one prompt, and it is trained on")
        left, held = hold_out(np.arange(len(train)), data.eval_ratio, self.seed)
        notes.append(
            f"{why}: {len(held):,} of {len(train):,} prompts held out for evaluation (--eval_ratio {data.eval_ratio:g}, "
            f"seed {self.seed})"
        )
        return train.select(left), train.select(held)

    def _given(self, value: str) -> Prompts:
        """`--eval_prompt_data`: its evaluation split; a data set with one split only is taken whole."""
        options = []
        for spec in split_specs(value, "--eval_prompt_data"):
            splits = open_splits(spec)
            only = next(iter(splits)) if len(splits) == 1 else self.data.eval_prompt_split
            options.append(stream_options(self.data, spec, pick(splits, spec, only).split))
        return self._read(options, "--eval_prompt_data")

    def _read(self, options: list[InferenceDataConfig], option: str) -> Prompts:
        """All usable prompts of some streams, one after the other."""
        keeper, reports = _Keeper(), []
        for stream_config in options:
            stream = RowStream(stream_config, PromptOptions(self.data.input_key), self.seed)
            reports.append(self._read_stream(stream, stream_config, keeper))
        self.report.sources += reports
        if not keeper.lengths:
            dropped = {reason: drop for report in reports for reason, drop in report.dropped.items()}
            raise InputError(f"{option}: no prompt can be used: {reasons(dropped)}")
        return keeper.prompts(self.tokenizer, self.data.label_key)

    def _read_stream(self, stream: RowStream, config: InferenceDataConfig, keeper: _Keeper) -> SourceReport:
        report = SourceReport(config.dataset, config.dataset_split, stream.describe)
        rows = stream.read()
        while block := list(islice(rows, BLOCK)):
            readable = [row.conversation for row in block if not isinstance(row.conversation, RowError)]
            if not report.rows_read and readable:
                self.encoder.check(readable[0])
            prompts = iter(self.encoder.prompts(readable))
            for row in block:
                reason = row.conversation
                prompt = reason if isinstance(reason, RowError) else next(prompts)
                prompt = fitting(prompt, self.data.prompt_max_len, self.context)
                report.rows_read += 1
                if isinstance(prompt, RowError):
                    if config.strict_data:
                        raise strict_error(str(row.place), str(prompt)) from None
                    report.drop(str(prompt), row.place)
                    continue
                report.rows_kept += 1
                keeper.add(prompt, row)
        report.samples = report.rows_kept
        return report


class _Keeper:
    """Collects prompts."""

    def __init__(self) -> None:
        self.ids, self.lengths = array("i"), array("q")
        self.written, self.sizes = bytearray(), array("q")

    def add(self, prompt: Prompt, row: StreamedRow) -> None:
        self.ids.extend(prompt.ids)
        self.lengths.append(len(prompt.ids))
        line = json.dumps([prompt.text, prompt.rendered, as_json(dict(row.row))], separators=(",", ":"))
        self.written += line.encode()
        self.sizes.append(len(line))

    def prompts(self, tokenizer: PreTrainedTokenizerBase, label_key: str) -> Prompts:
        return Prompts(
            tokenizer,
            label_key,
            np.array(self.ids, np.int32),
            offsets(np.array(self.lengths, np.int64)),
            bytes(self.written),
            offsets(np.array(self.sizes, np.int64)),
            np.arange(len(self.lengths)),
        )


def stream_options(data: PPODataConfig, dataset: str, split: str, *, of_training: bool = False) -> InferenceDataConfig:
    """How one stream of prompts is read. Only training data is mixed, and cut at `--max_samples`."""
    return InferenceDataConfig(
        dataset=dataset,
        dataset_split=split,
        dataset_probs=data.prompt_data_probs if of_training else None,
        max_samples=data.max_samples if of_training else None,
        input_key=data.input_key,
        input_template=data.input_template,
        apply_chat_template=data.apply_chat_template,
        tokenizer_chat_template=data.tokenizer_chat_template,
        strict_data=data.strict_data,
    )


def figures_of(prompts: Prompts) -> dict[str, int]:
    """How many prompts there are, and their lengths in tokens."""
    lengths = prompts.lengths
    return {
        "prompts": len(prompts),
        "tokens": int(lengths.sum()),
        "shortest": int(lengths.min()),
        "median": int(np.median(lengths)),
        "longest": int(lengths.max()),
    }


def reasons(dropped: dict[str, Drop]) -> str:
    """Why rows were dropped, in one line."""
    return "; ".join(f"{reason} ({drop.count:,}, the first: {drop.first})" for reason, drop in dropped.items())
