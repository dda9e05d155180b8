from __future__ import annotations

from dataclasses import asdict

import numpy as np

from rlhf_data.encode import EncodeOptions, Encoder, Sample
from rlhf_data.report import MAX_REASONS, DataReport, Lengths, PairFacts, SourceReport, mark_trained
from rlhf_data.rows import Pair


class Measured:
    """The columns of a data set that a report looks at."""

    def __init__(self, lengths: list[int]):
        self.lengths = np.array(lengths)
        self.num_targets = self.lengths // 2
        self.truncated = self.lengths > 90


def report_of(sources: list[SourceReport], example: str = "⟦x⟧", lengths: list[int] | None = None) -> DataReport:
    measured = Lengths.of(Measured(lengths or [1, 10, 100]))  # type: ignore[arg-type]
    return DataReport(sources, ["a note"] * 9, measured, measured, {"first sample": example})


def test_lengths_are_measured_in_tokens():
    lengths = Lengths.of(Measured(list(range(1, 102))))  # type: ignore[arg-type]
    assert (lengths.samples, lengths.tokens, lengths.trained_tokens, lengths.truncated) == (101, 5151, 2550, 11)
    assert lengths.quantiles == {"shortest": 1, "5%": 6, "median": 51, "95%": 96, "longest": 101}
    assert sum(lengths.counts) == 101
    assert lengths.edges[0] == 0
    assert lengths.edges[-1] == 102
    assert "█" in "".join(lengths.histogram())


def test_a_report_fits_on_a_screen_whatever_happened():
    sources = [SourceReport(f"s{number}", "train", "text", 10, 5, 5, 3, "é") for number in range(9)]
    for source in sources:
        for number in range(200):
            source.drop(f"reason {number}", f"f:{number}")
        assert len(source.dropped) == MAX_REASONS + 1
        assert sum(drop.count for drop in source.dropped.values()) == 200
    report = report_of(sources, "⟦" + "word " * 5000 + "\n" * 50 + "⟧", [1, 2])
    report.packing = {"rows": 12, "utilisation": 0.9987}
    shown = report.format().split("\n")
    assert len(shown) <= 40
    assert any("utilisation 0.9987" in line for line in shown)
    assert any("more lines in the saved report" in line for line in shown)


def test_a_report_of_pairs_fits_on_a_screen_too():
    long = "⟦" + "word " * 5000 + "\n" * 50 + "⟧"
    report = report_of([SourceReport(f"s{number}", "train") for number in range(30)], lengths=list(range(1, 100)))
    report.examples = {"first pair, chosen": long, "first pair, rejected": long}
    report.facts = PairFacts(10, 100, 20, 4, (0.0, 1.5))
    report.packing = {"rows": 12}
    shown = report.format().split("\n")
    assert len(shown) == 40
    assert (
        "pairs: 10; 20% of the tokens are shared prompts; chosen is the longer response in 4 (40%); margins from 0 to 1.5"
        in shown
    )


def test_source_reports_survive_the_cache():
    source = SourceReport("s", "train", "text", 10, 5, 5)
    source.drop("why", "f:1")
    assert SourceReport.from_dict(asdict(source)) == source


def test_trained_runs_are_marked_with_their_spaces(make_tokenizer):
    for kind in ("byte-level", "prepend", "metaspace first"):
        tokenizer = make_tokenizer(kind)
        (result,) = Encoder(tokenizer, EncodeOptions(64, "Q: {} A:")).encode([Pair("the cat", " sat  on")])
        assert isinstance(result, list)
        assert mark_trained(result[0], tokenizer).endswith("Q: the cat A:⟦ sat  on</s>⟧")


def test_a_run_that_cuts_a_character_is_still_shown(tokenizer):
    ids = tokenizer.encode("é", add_special_tokens=False)
    assert len(ids) == 2
    shown = mark_trained(Sample(np.array(ids), np.array([False, True])), tokenizer)
    assert shown.count("⟦") == shown.count("⟧") == 1
