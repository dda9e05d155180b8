from __future__ import annotations

import pytest

from rlhf_data.errors import InputError
from rlhf_data.labels import BALANCED, LabelledOptions, read_label, suggest_kto_weights
from rlhf_data.rows import Chat, Pair

DESIRABLE = [True, 1, 1.0, "true", "True", "TRUE", " true ", "1", " 1\n"]
UNDESIRABLE = [False, 0, 0.0, -0.0, "false", "False", " FALSE", "0"]
NO_LABELS = [None, "", "yes", "good", 2, -1, 0.5, 3.5, "0.5", float("nan"), float("inf"), [1], {"a": 1}, b"1"]


@pytest.mark.parametrize("value", DESIRABLE, ids=repr)
def test_desirable_labels(value):
    assert read_label(value) is True


@pytest.mark.parametrize("value", UNDESIRABLE, ids=repr)
def test_undesirable_labels(value):
    assert read_label(value) is False


@pytest.mark.parametrize("value", NO_LABELS, ids=repr)
def test_nothing_else_is_a_label(value):
    assert read_label(value) is None


def test_with_a_threshold_labels_are_scores():
    assert [read_label(value, 0.5) for value in (0.5, 1, "0.7", 1e9)] == [True] * 4
    assert [read_label(value, 0.5) for value in (0.49, 0, "-3", -1e9)] == [False] * 4
    assert [read_label(value, 0.5) for value in (None, True, False, "good", float("nan"), float("inf"), "")] == [
        None
    ] * 7
    assert read_label(0, 0.0) is True


def label_error(value, threshold=None) -> str:
    row = {"prompt": "q", "response": "a", "score": value}
    with pytest.raises(InputError) as error:
        LabelledOptions(label_key="score", label_threshold=threshold).recognise(row, "f:1").value(row)
    return str(error.value)


def test_a_label_that_says_nothing_is_refused_with_the_way_out():
    assert "`score` is 0.7; a label is true or false, or 1 or 0" in label_error(0.7)
    assert "--label_threshold" in label_error(0.7)
    assert "--label_threshold" in label_error("3")
    for value in (None, "good"):
        assert f"`score` is {value!r}; " in label_error(value)
        assert "--label_key" in label_error(value)
        assert "--label_threshold" not in label_error(value)
    assert "with --label_threshold 2 it must be a finite number" in label_error("good", 2.0)
    assert "true or false need no threshold" in label_error(True, 2.0)


def test_labelled_rows_are_conversations_with_a_label():
    def read(row, **options):
        found = LabelledOptions(**options).recognise(row, "f:1")
        (reader,) = found.readers
        return found.describe, reader(row), found.value(row)

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read({"messages": turns, "label": True}) == ("messages `messages`, label `label`", Chat(turns), 1.0)
    assert read({"prompt": "q", "completion": "a", "label": "false"})[1:] == (Pair("q", "a"), 0.0)
    options = {"input_key": "p", "output_key": "r", "label_key": "s", "label_threshold": 3.0}
    assert read({"p": "q", "r": "a", "s": 4}, **options) == (
        "prompt `p`, response `r`, label `s`",
        Pair("q", "a"),
        1.0,
    )
    with pytest.raises(InputError, match=r"f:1: --label_key label: no key `label`.*did you mean `labels`"):
        read({"prompt": "q", "response": "a", "labels": 1})
    for row, options in (({"text": "t", "label": 1}, {}), ({"text": "t", "label": 1}, {"input_key": "text"})):
        with pytest.raises(InputError) as error:
            read(row, **options)
        assert "--output_key" in str(error.value)
        assert "--pretrain_mode" not in str(error.value)


def test_suggested_weights_balance_every_mixture():
    for desirable in range(1, 60):
        for undesirable in [*range(1, 60), 1000, 12345]:
            weights = suggest_kto_weights(desirable, undesirable)
            first, second = weights or (1.0, 1.0)
            assert BALANCED[0] <= first / second * (desirable / undesirable) <= BALANCED[1]
            assert 1 in (first, second)
            assert min(first, second) == 1  # the weaker kind is raised
            assert (weights is None) == (1 <= desirable / undesirable <= 4 / 3)
    assert suggest_kto_weights(0, 5) is suggest_kto_weights(5, 0) is None
    assert suggest_kto_weights(2001, 3275) == (2.0, 1.0)
