"""Rows of several data sets as one stream, one at a time: for work that reads each row once and keeps none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from rlhf_data.config import InferenceDataConfig
from rlhf_data.errors import InputError, RunError, strict_error
from rlhf_data.mixture import mix, parse_probs
from rlhf_data.prompts import PromptOptions
from rlhf_data.readers import Place
from rlhf_data.rows import Conversation, Row, RowError
from rlhf_data.shapes import RowFormat, RowOptions
from rlhf_data.sources import Source, open_source, split_specs
from rlhf_data.templates import read_chat_template


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """One row of a stream.

    Attributes:
        number: counted from 0 through the whole stream.
        place: where it was read.
        row: all its columns.
        conversation: what was read of it, or the reason why it cannot be used.
    """

    number: int
    place: Place
    row: Row
    conversation: Conversation | RowError


class RowStream:
    """The rows of all data sets, in the order of the mixture, the same every time they are read.

    Memory does not grow with the rows, but by two bytes for each where data sets are mixed by `--dataset_probs` (and by
    a whole file where that is a .json array).

    Args:
        config: the options.
        rows: how rows are read.
        seed: of the mixture.

    Raises:
        InputError: a data set cannot be opened, or its first row not be recognised.
    """

    def __init__(self, config: InferenceDataConfig, rows: RowOptions | PromptOptions, seed: int):
        self._config, self._rows, self._seed = config, rows, seed
        specs = split_specs(config.dataset)
        self._probs = parse_probs(config.dataset_probs, specs)
        self._sources = [open_source(spec, config.dataset_split) for spec in specs]
        self._formats = [self._recognise(source) for source in self._sources]

    @property
    def describe(self) -> str:
        """What was recognised, for people."""
        return "; ".join(
            f"{source.name} [{source.split}]: {row_format.describe}"
            for source, row_format in zip(self._sources, self._formats, strict=True)
        )

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[StreamedRow]:
        """Rows from number `start` up to number `stop` (or the end).

        Raises:
            InputError: a line of a file is no row or, with `--strict_data`, a row cannot be used.
        """
        rows = islice(self._places(), self._config.max_samples)
        for number, (source, (place, row)) in enumerate(islice(rows, start, stop), start=start):
            yield StreamedRow(number, place, row, self._conversation(source, place, row))

    def count(self) -> int:
        """Number of rows: a pass over the files where it is not known."""
        return self._count

    def identity(self) -> dict[str, Any]:
        """Everything that decides the rows and how they are written out, as JSON: it changes when they do."""
        return self._identity

    @cached_property
    def _count(self) -> int:
        total = len(self._order) if self._mixed else sum(self._counts)
        most = self._config.max_samples
        return total if most is None else min(total, most)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        config = self._config
        own = config.tokenizer_chat_template
        return {
            "sources": [source.content_key() for source in self._sources],
            "dataset_probs": None if self._probs is None else self._probs.tolist(),
            "dataset_split": config.dataset_split,
            "max_samples": config.max_samples,
            "seed": self._seed,
            "rows": {"kind": type(self._rows).__name__, **asdict(self._rows)},
            "input_template": config.input_template,
            "apply_chat_template": config.apply_chat_template,
            "tokenizer_chat_template": None if own is None else read_chat_template(own),
        }

    @property
    def _mixed(self) -> bool:
        return self._probs is not None and len(self._sources) > 1

    @cached_property
    def _counts(self) -> list[int]:
        """Rows of each data set."""
        return [self._count_rows(source) for source in self._sources]

    @cached_property
    def _order(self) -> np.ndarray:
        """int16 `[rows]`, the data set that gives each row of a mixture; each gives its own in their order."""
        rows = mix(self._counts, self._probs, self._seed)
        ends = np.cumsum(self._counts)
        return np.searchsorted(ends, rows, side="right").astype(np.int16)

    def _recognise(self, source: Source) -> RowFormat:
        first = next(source.rows(), None)
        if first is None:
            raise InputError(f"{source.name} [{source.split}] has no rows")
        place, row = first
        return self._rows.recognise(row, str(place))

    def _count_rows(self, source: Source) -> int:
        most = self._config.max_samples
        count = source.count if source.count is not None else sum(1 for _ in islice(source.rows(), most))
        return count if most is None else min(count, most)

    def _places(self) -> Iterator[tuple[int, tuple[Place, Row]]]:
        """Rows with their places and the number of their data set, in the order of the mixture."""
        most = self._config.max_samples
        if not self._mixed:
            for number, source in enumerate(self._sources):
                yield from ((number, row) for row in islice(source.rows(), most))
            return
        opened = [source.rows() for source in self._sources]
        for number in self._order.tolist():
            row = next(opened[number], None)
            if row is None:
                raise RunError(f"{self._sources[number].name} changed while it was read: it has lost rows; start again")
            yield number, row

    def _conversation(self, source: int, place: Place, row: Row) -> Conversation | RowError:
        (read,) = self._formats[source].readers
        try:
            return read(row)
        except RowError as reason:
            if self._config.strict_data:
                raise strict_error(str(place), str(reason)) from None
            return reason
