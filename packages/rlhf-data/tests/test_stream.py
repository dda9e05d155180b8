from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from rlhf_data.config import InferenceDataConfig
from rlhf_data.errors import InputError, RunError
from rlhf_data.mixture import mix
from rlhf_data.prompts import PromptOptions
from rlhf_data.rows import Pair, RowError
from rlhf_data.shapes import RowOptions
from rlhf_data.stream import RowStream


def prompts(name: str, count: int) -> list[dict]:
    return [{"prompt": f"{name}{number}", "id": number} for number in range(count)]


@pytest.fixture
def stream(write):
    """Makes a stream of files with the rows given (or files there are), in their order."""

    def make(files: dict[str, list], rows=None, seed: int = 42, **options) -> RowStream:
        paths = [write(name, content) for name, content in files.items()]
        config = InferenceDataConfig(dataset=",".join(paths), **options)
        return RowStream(config, rows or PromptOptions(), seed)

    return make


def texts(stream: RowStream, *span) -> list[str]:
    return [row.row["prompt"] for row in stream.read(*span)]


def test_data_sets_follow_each_other_with_numbers_places_and_rows(stream):
    both = stream({"a.jsonl": prompts("a", 2), "b.json": prompts("b", 2)})
    rows = list(both.read())
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert [Path(row.place.file).name for row in rows] == ["a.jsonl"] * 2 + ["b.json"] * 2
    assert [row.place.number for row in rows] == [1, 2, 1, 2]
    assert [row.conversation for row in rows] == [Pair(text, "") for text in ("a0", "a1", "b0", "b1")]
    assert rows[3].row == {"prompt": "b1", "id": 1}
    assert both.count() == 4
    assert both.describe.count("prompt `prompt`") == 2
    assert "a.jsonl [train]: prompt `prompt`; " in both.describe


@pytest.mark.parametrize("options", [{}, {"dataset_probs": "0.3,0.7"}, {"max_samples": 9}])
def test_any_part_is_what_the_whole_has_there(stream, options):
    both = stream({"a.jsonl": prompts("a", 12), "b.jsonl": prompts("b", 20)}, **options)
    whole = list(both.read())
    assert [row.number for row in whole] == list(range(both.count()))
    for start, stop in ((0, 0), (0, 3), (3, 7), (5, None), (len(whole), None), (len(whole) + 5, None), (4, 1000)):
        assert list(both.read(start, stop)) == whole[start:stop]


def test_rows_are_drawn_as_in_training(stream):
    counts = [300, 500]
    files = {"a.jsonl": prompts("a", 300), "b.jsonl": prompts("b", 500)}
    mixed = stream(files, dataset_probs="0.4,0.6", seed=7)
    everything = [row["prompt"] for rows in files.values() for row in rows]
    order = mix(counts, np.array([0.4, 0.6]), seed=7)
    assert texts(mixed) == [everything[number] for number in order]
    assert mixed.count() == len(order)
    assert texts(mixed) != texts(stream(files, dataset_probs="0.4,0.6", seed=8))
    few = stream(files, dataset_probs="0.4,0.6", seed=7, max_samples=100)
    everything = [row["prompt"] for rows in files.values() for row in rows[:100]]
    order = mix([100, 100], np.array([0.4, 0.6]), seed=7)[:100]
    assert texts(few) == [everything[number] for number in order]
    assert few.count() == 100


def test_a_data_set_with_no_chance_gives_nothing_and_one_alone_is_whole(stream):
    files = {"a.jsonl": prompts("a", 3), "b.jsonl": prompts("b", 4)}
    assert texts(stream(files, dataset_probs="0,1")) == ["b0", "b1", "b2", "b3"]
    assert texts(stream({"a.jsonl": prompts("a", 3)}, dataset_probs="1.0")) == ["a0", "a1", "a2"]


def test_a_limit_takes_the_first_rows(stream):
    files = {"a.jsonl": prompts("a", 3), "b.jsonl": prompts("b", 4)}
    assert texts(stream(files, max_samples=2)) == ["a0", "a1"]
    assert texts(stream(files, max_samples=5)) == ["a0", "a1", "a2", "b0", "b1"]
    assert stream(files, max_samples=5).count() == 5
    assert stream(files, max_samples=50).count() == 7


def test_rows_are_counted_where_their_number_is_known(tmp_path):
    from datasets import Dataset

    paths = [str(tmp_path / name) for name in "ab"]
    for path in paths:
        Dataset.from_list(prompts("x", 20)).save_to_disk(path)

    def count(**options) -> int:
        stream = RowStream(InferenceDataConfig(dataset=",".join(paths), **options), PromptOptions(), 42)
        assert sum(1 for _ in stream.read()) == stream.count()
        return stream.count()

    assert count() == 40
    assert count(max_samples=30) == 30
    assert count(max_samples=10, dataset_probs="0.5,0.5") == 10
    assert count(max_samples=19, dataset_probs="1,0") == 19


def test_a_row_that_cannot_be_used_keeps_its_number_and_says_why(stream):
    rows = [{"prompt": "a"}, {"prompt": " "}, {"prompt": "c"}]
    read = list(stream({"a.jsonl": rows}).read())
    assert [row.number for row in read] == [0, 1, 2]
    assert isinstance(read[1].conversation, RowError)
    assert str(read[1].conversation) == "`prompt` is empty"
    strict = stream({"a.jsonl": rows}, strict_data=True).read()
    assert next(strict).conversation == Pair("a", "")
    with pytest.raises(InputError, match=r"a\.jsonl:2: `prompt` is empty \(--strict_data"):
        next(strict)


def test_rows_with_responses_are_read_too(stream):
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": None}]
    first, second = stream({"a.jsonl": rows}, RowOptions()).read()
    assert first.conversation == Pair("q", "a")
    assert str(second.conversation) == "`answer` is null"


def test_each_data_set_has_its_own_columns(stream):
    both = stream(
        {"a.jsonl": [{"question": "q"}], "b.jsonl": [{"context_messages": [{"role": "user", "content": "x"}]}]}
    )
    assert [type(row.conversation).__name__ for row in both.read()] == ["Pair", "Chat"]
    assert "prompt `question`" in both.describe
    assert "messages `context_messages`" in both.describe


def test_what_is_skipped_is_not_made_into_conversations(stream, monkeypatch):
    everything = stream({"a.jsonl": prompts("a", 50)})
    calls = []
    monkeypatch.setattr(everything, "_conversation", lambda source, place, row: calls.append(row["id"]))
    assert [row.number for row in everything.read(40, 43)] == [40, 41, 42]
    assert calls == [40, 41, 42]


BAD = {
    "split": ({"a.jsonl": prompts("a", 1)}, {"dataset_split": "valid"}, "has no split `valid`; its splits: train"),
    "probs": ({"a.jsonl": prompts("a", 1)}, {"dataset_probs": "0.5,0.5"}, "gives 2 probabilities for 1 data sets"),
    "empty": ({"a.jsonl": ""}, {}, "a.jsonl is empty"),
    "columns": ({"a.jsonl": prompts("a", 1), "b.jsonl": [{"foo": 1}]}, {}, "b.jsonl:1: no prompt is found in the rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_data_that_cannot_be_streamed_is_refused_at_once(stream, name):
    files, options, message = BAD[name]
    with pytest.raises(InputError) as error:
        stream(files, **options)
    assert message in str(error.value)


def test_a_line_that_is_no_row_is_an_error_where_it_is(stream):
    broken = stream({"a.jsonl": '{"prompt": "a"}\n{"prompt": \n'})
    with pytest.raises(InputError, match=r"a\.jsonl:2: not valid JSON"):
        broken.count()
    rows = broken.read()
    assert next(rows).row == {"prompt": "a"}
    with pytest.raises(InputError, match=r"a\.jsonl:2: not valid JSON"):
        next(rows)


def test_a_file_that_loses_rows_meanwhile_is_noticed(stream, write):
    files = {"a.jsonl": prompts("a", 50), "b.jsonl": prompts("b", 50)}
    mixed = stream(files, dataset_probs="0.5,0.5")
    assert mixed.count() > 50
    write("a.jsonl", prompts("a", 5))
    with pytest.raises(RunError, match=r"a\.jsonl changed while it was read"):
        list(mixed.read())


def test_the_identity_changes_with_everything_that_decides_the_rows(stream):
    files = {"a.jsonl": prompts("a", 5), "b.jsonl": prompts("b", 5)}
    identity = stream(files).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert stream({f"other/{name}": rows for name, rows in files.items()}).identity() == identity
    assert stream(files, strict_data=True).identity() == identity
    changed = [
        stream(files, seed=43),
        stream(files, max_samples=4),
        stream(files, dataset_probs="0.5,0.5"),
        stream(files, input_template="Q: {}"),
        stream(files, apply_chat_template=True),
        stream(files, tokenizer_chat_template="{{ messages }}"),
        stream(files, PromptOptions("prompt")),
        stream(files, RowOptions(input_key="prompt", output_key="id")),
        stream({"b.jsonl": files["b.jsonl"], "a.jsonl": files["a.jsonl"]}),
        stream({"a.jsonl": prompts("a", 5), "b.jsonl": prompts("c", 5)}),
    ]
    seen = [json.dumps(other.identity(), sort_keys=True) for other in changed]
    assert len({json.dumps(identity, sort_keys=True), *seen}) == len(changed) + 1


def test_the_identity_holds_the_template_and_not_its_file(stream, write):
    files = {"a.jsonl": prompts("a", 1)}
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    given = stream(files, tokenizer_chat_template=text).identity()
    assert stream(files, tokenizer_chat_template=write("t.jinja", text)).identity() == given
    assert stream(files, tokenizer_chat_template=write("t.jinja", text + " ")).identity() != given


def test_memory_does_not_grow_with_the_rows(write):
    def peak(count: int, **options) -> int:
        paths = [write(f"{name}{count}.jsonl", prompts(name * 200, count)) for name in "ab"]
        stream = RowStream(InferenceDataConfig(dataset=",".join(paths), **options), PromptOptions(), 0)
        tracemalloc.start()
        try:
            assert sum(1 for _ in stream.read()) == stream.count()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is imported on the way
    assert peak(4000) < peak(400) + 50_000  # the larger files hold 1.8 MB
    few, many = (peak(count, dataset_probs="0.5,0.5") for count in (400, 4000))
    assert many < few + 50_000 + 40 * 8000  # while the order is drawn; two bytes a row remain
