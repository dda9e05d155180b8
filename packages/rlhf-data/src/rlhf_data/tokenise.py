"""Rows of a source to a token store: read, encode in blocks, count what is dropped, and never twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_data.encode import EncodeOptions, Encoder, Sample
from rlhf_data.errors import InputError, strict_error
from rlhf_data.pairs import OTHER_PROMPTS, SAME, PairOptions, compare
from rlhf_data.readers import Place, Rows
from rlhf_data.report import SourceReport
from rlhf_data.rows import Chat, Conversation, Pair, Row, RowError, Text, is_whole_text
from rlhf_data.shapes import RowFormat, RowOptions
from rlhf_data.sources import Source
from rlhf_data.store import RowSamples, StoreWriter, TokenStore, open_store, store_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK = 1000
"""Rows handed to the tokenizer at once: enough to keep all its threads busy, few enough to hold in memory."""

SHOW_PROGRESS = 2000
"""Rows from which on a progress bar is worth its line."""


@dataclass(frozen=True)
class Tokeniser:
    """What is the same for all sources of a run.

    Attributes:
        tokenizer: gives the ids.
        encode: options that decide the ids.
        rows: options that decide how rows are read.
        folder: where stores are kept.
        strict: a dropped row is an error.
        progress: show a progress bar while many rows are tokenised.
    """

    tokenizer: PreTrainedTokenizerBase
    encode: EncodeOptions
    rows: RowOptions | PairOptions
    folder: Path
    strict: bool = False
    progress: bool = True

    def store(self, source: Source, max_rows: int | None = None) -> tuple[TokenStore, SourceReport]:
        """Token store of (the first `max_rows` rows of) a source, built if it is not there, and its report.

        Raises:
            InputError: rows cannot be read or recognised, or (when strict) one of them cannot be used.
        """

        def fill(writer: StoreWriter) -> dict[str, Any]:
            return asdict(_Filling(self, source, writer, max_rows).run())

        store, cached = open_store(self.folder, self._key(source, max_rows), fill)
        report = SourceReport.from_dict(store.meta["report"])
        report.cached = cached
        if self.strict and report.dropped:
            reason, drop = next(iter(report.dropped.items()))
            raise strict_error(drop.first, reason)
        return store, report

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer with the options that decide ids."""
        return Encoder(self.tokenizer, self.encode)

    def _key(self, source: Source, max_rows: int | None) -> str:
        encoder = self.encoder  # first: its errors are about the options, not the data
        return store_key(
            name=source.name,  # places in the report name it
            split=source.split,
            content=source.content_key(),
            **encoder.identity,
            encode=asdict(self.encode),
            kind=type(self.rows).__name__,
            rows=asdict(self.rows),
            max_rows=max_rows,
        )


@dataclass(frozen=True, slots=True)
class _Read:
    """A row that was read: its conversations and its number."""

    place: Place
    conversations: list[Conversation]
    value: float


class _Filling:
    """One pass over the rows of one source, into a writer."""

    def __init__(self, tokeniser: Tokeniser, source: Source, writer: StoreWriter, limit: int | None):
        self.options, self.encoder = tokeniser, tokeniser.encoder
        self.source, self.writer, self.limit = source, writer, limit
        self.report = SourceReport(source.name, source.split)

    def run(self) -> SourceReport:
        rows = self.source.rows()
        first = next(rows, None)
        if first is None:
            raise InputError(f"{self.source.name} [{self.source.split}] has no rows")
        row_format = self.options.rows.recognise(first[1], str(first[0]))
        self.report.recognised = row_format.describe
        counted = self._with_bar(islice(chain([first], rows), self.limit))
        while block := list(islice(counted, BLOCK)):
            read = self._read(block, row_format)
            conversations = [conversation for row in read for conversation in row.conversations]
            if not self.report.rows_kept:
                self.report.unwritable = "".join(sorted(self.encoder.unwritable(_trained_texts(conversations))))
            self._add(read, self.encoder.encode(conversations), row_format.same_prompt)
        return self.report

    def _read(self, block: list[tuple[Place, Row]], row_format: RowFormat) -> list[_Read]:
        kept = []
        for place, row in block:
            self.report.rows_read += 1
            try:
                conversations = [read(row) for read in row_format.readers]
                for conversation in conversations:
                    self.encoder.check(conversation)
                kept.append(_Read(place, conversations, row_format.value(row)))
            except RowError as reason:
                self._drop(reason, place)
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
        return kept

    def _add(self, rows: list[_Read], encoded: list[list[Sample] | RowError], same_prompt: bool) -> None:
        kept: list[RowSamples] = []
        results = iter(encoded)
        for row in rows:
            try:
                kept.append(self._join(row, list(islice(results, len(row.conversations))), same_prompt))
            except RowError as reason:
                self._drop(reason, row.place)
                continue
            self.report.unfinished += sum(
                not isinstance(conversation, Text) and not conversation.complete for conversation in row.conversations
            )
        samples = [sample for row in kept for sample in row.samples]
        self.report.rows_kept += len(kept)
        self.report.samples += len(samples)
        self.report.truncated += sum(sample.truncated for sample in samples)
        self.writer.add(kept)

    def _join(self, row: _Read, encoded: list[list[Sample] | RowError], same_prompt: bool) -> RowSamples:
        """What is stored of a row; raises the first reason why it cannot be used."""
        samples: list[Sample] = []
        for result in encoded:
            if isinstance(result, RowError):
                raise result
            samples += result
        if len(encoded) == 1:
            return RowSamples(samples, row.value)
        chosen, rejected = row.conversations
        if chosen == rejected:
            raise RowError(SAME)
        shared, alike = compare(*samples)
        if not alike and same_prompt:
            raise RowError(OTHER_PROMPTS)
        self.report.different_prompts += not alike and not is_whole_text(chosen)
        return RowSamples(samples, row.value, shared)

    def _drop(self, reason: RowError, place: Place) -> None:
        if self.options.strict:
            raise strict_error(str(place), str(reason))
        self.report.drop(str(reason), place)

    def _with_bar(self, rows: Rows) -> Iterator[tuple[Place, Row]]:
        """The same rows, with a progress bar from row `SHOW_PROGRESS` on."""
        head = list(islice(rows, SHOW_PROGRESS))
        yield from head
        if len(head) < SHOW_PROGRESS:
            return
        from tqdm import tqdm

        total = min(filter(None, (self.source.count, self.limit)), default=None)
        name = f"tokenising {self.source.name}"
        with tqdm(rows, name, total, initial=len(head), unit=" rows", disable=not self.options.progress) as bar:
            yield from bar


def _trained_texts(conversations: list[Conversation]) -> list[str]:
    """Texts that are trained on, for a look at whether the tokenizer can write them."""
    texts: list[str] = []
    for conversation in conversations:
        if isinstance(conversation, Chat):
            texts += [message["content"] for message in conversation.messages if message["role"] == "assistant"]
        else:
            texts.append(conversation.response if isinstance(conversation, Pair) else conversation.text)
    return texts
