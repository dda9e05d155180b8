from __future__ import annotations

import numpy as np
import pytest

from rlhf_data.encode import Sample
from rlhf_data.errors import InputError
from rlhf_data.pairs import SAME, SAME_ONCE_CUT, PairOptions, compare
from rlhf_data.rows import Chat, Pair, RowError

USER = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "s"}
MORE = [{"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}]


def read(row, first=None, **options):
    found = PairOptions(**options).recognise(first or row, "data.jsonl:1")
    return tuple(reader(row) for reader in found.readers)


TEXTS = {"prompt": "q", "chosen": "good", "rejected": "bad"}
TWO_CHATS = (Chat([USER, GOOD]), Chat([USER, BAD]))
SHAPES = {
    "text": (TEXTS, {}, (Pair("q", "good"), Pair("q", "bad"))),
    "text in other columns": (
        {"question": "q", "best": "good", "worst": "bad"},
        {"prompt_key": "question", "chosen_key": "best", "rejected_key": "worst"},
        (Pair("q", "good"), Pair("q", "bad")),
    ),
    "another prompt column than `prompt`": (
        TEXTS | {"question": "q3"},
        {"prompt_key": "question"},
        (Pair("q3", "good"), Pair("q3", "bad")),
    ),
    "whole texts": ({"chosen": "q good", "rejected": "q bad"}, {}, (Pair("", "q good"), Pair("", "q bad"))),
    "whole chats": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}, TWO_CHATS),
    "whole chats for DPO": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"same_prompt": True}, TWO_CHATS),
    "several turns": (
        {"chosen": [USER, *MORE, GOOD], "rejected": [USER, *MORE, BAD]},
        {},
        (Chat([USER, *MORE, GOOD]), Chat([USER, *MORE, BAD])),
    ),
    "prompt text, whole chats": ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}, TWO_CHATS),
    "prompt text, whole chats with a system turn": (
        {"prompt": "q", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        {},
        (Chat([SYSTEM, USER, GOOD]), Chat([SYSTEM, USER, BAD])),
    ),
    "prompt text, messages": ({"prompt": "q", "chosen": GOOD, "rejected": BAD}, {}, TWO_CHATS),
    "prompt text, what follows": ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, {}, TWO_CHATS),
    "prompt chat, text": ({"prompt": [USER], "chosen": "good", "rejected": "bad"}, {}, TWO_CHATS),
    "prompt chat, what follows": (
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": BAD},
        {},
        (Chat([SYSTEM, USER, GOOD]), Chat([SYSTEM, USER, BAD])),
    ),
    "messages alone": ({"chosen": GOOD, "rejected": BAD}, {}, (Chat([GOOD]), Chat([BAD]))),
    "sharegpt": (
        {
            "chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}],
            "rejected": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad"}],
        },
        {},
        TWO_CHATS,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_a_pair_is_read(name):
    row, options, expected = SHAPES[name]
    assert read(row, **options) == expected


def test_what_was_recognised_is_said():
    def describe(row, **options):
        return PairOptions(**options).recognise(row, "f:1").describe

    assert describe(TEXTS) == "prompt `prompt`, chosen `chosen`, rejected `rejected`"
    assert describe({"chosen": "a", "rejected": "b"}) == "no prompt column, chosen `chosen`, rejected `rejected`"
    assert describe(TEXTS | {"m": 1}, margin_key="m").endswith("rejected `rejected`, margin `m`")


BAD_ROWS = {
    "null": (TEXTS | {"rejected": None}, "`rejected` is null"),
    "number": (TEXTS | {"chosen": 3}, "`chosen` is a number, not text"),
    "no prompt": (TEXTS | {"prompt": None}, "`prompt` is null"),
    "empty prompt": (TEXTS | {"prompt": ""}, "`prompt` is empty"),
    "missing": ({"prompt": "q", "chosen": "a"}, "no key `rejected`"),
    "another question": (
        {"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "`chosen` begins with a user turn that is not `prompt`",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_say_why(name):
    row, reason = BAD_ROWS[name]
    with pytest.raises(RowError) as error:
        read(row, TEXTS)
    assert str(error.value) == reason


REFUSED = {
    "chosen": ({"choosen": "a", "rejected": "b"}, {}, ["--chosen_key chosen", "did you mean `choosen`?"]),
    "rejected": ({"chosen": "a", "other": "b"}, {}, ["--rejected_key rejected", "`chosen`, `other`"]),
    "prompt": (TEXTS, {"prompt_key": "promt"}, ["--prompt_key promt", "did you mean `prompt`?"]),
    "margin": (TEXTS | {"margins": 1}, {"margin_key": "margin"}, ["--margin_key margin", "did you mean `margins`?"]),
    "DPO on whole texts": (
        {"chosen": "a", "rejected": "b", "question": "q"},
        {"same_prompt": True},
        ["`chosen` holds no prompt", "--prompt_key", "`question`"],
    ),
    "DPO on messages": ({"chosen": GOOD, "rejected": BAD}, {"same_prompt": True}, ["--prompt_key"]),
    "DPO on bare replies": ({"chosen": [GOOD], "rejected": [BAD]}, {"same_prompt": True}, ["--prompt_key"]),
    "DPO, one side": (
        {"chosen": [USER, GOOD], "rejected": "bad"},
        {"same_prompt": True},
        ["`rejected` holds no prompt"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_first_row_that_cannot_be_read_is_an_error_with_the_way_out(name):
    row, options, parts = REFUSED[name]
    with pytest.raises(InputError) as error:
        PairOptions(**options).recognise(row, "data.jsonl:1")
    for part in ["data.jsonl:1", *parts]:
        assert part in str(error.value)


def test_a_later_row_without_a_prompt_is_dropped_for_dpo():
    first = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    with pytest.raises(RowError, match="`chosen` holds no prompt before the response"):
        read({"chosen": [GOOD], "rejected": [BAD]}, first, same_prompt=True)
    broken = {"chosen": None, "rejected": [USER, BAD]}  # says nothing about the others
    assert read(first, broken, same_prompt=True) == TWO_CHATS


@pytest.mark.parametrize(("value", "margin"), [(1, 1.0), (-0.5, -0.5), (0, 0.0), ("2.5", 2.5), (" 3 ", 3.0)])
def test_a_margin_is_a_number(value, margin):
    row = TEXTS | {"margin": value}
    assert PairOptions(margin_key="margin").recognise(row, "f:1").value(row) == margin
    assert PairOptions().recognise(row, "f:1").value(row) == 0.0


@pytest.mark.parametrize("value", [None, True, False, "x", "", "nan", float("nan"), float("inf"), 1e300, 10**400, [1]])
def test_any_other_margin_is_refused_with_the_way_out(value):
    row = TEXTS | {"margin": value}
    with pytest.raises(InputError, match=r"`margin` is .*finite number.*--margin_key.*--margin_loss"):
        PairOptions(margin_key="margin").recognise(row, "f:1").value(row)


def side(prompt: list[int], response: list[int], truncated: bool = False) -> Sample:
    ids = np.array(prompt + response, np.int32)
    return Sample(ids, np.arange(len(ids)) >= len(prompt), truncated)


def test_two_sides_share_what_their_prompts_begin_with():
    assert compare(side([1, 2, 3], [7, 8]), side([1, 2, 3], [7, 9])) == (3, True)  # equal responses are no prompt
    assert compare(side([1, 2, 3], [7]), side([1, 2, 4], [7])) == (2, False)
    assert compare(side([1, 2], [3, 7]), side([1, 2, 3], [8])) == (2, False)
    assert compare(side([1], [7]), side([2], [7])) == (0, False)


def test_sides_without_a_difference_are_no_pair():
    for truncated, reason in ((False, SAME), (True, SAME_ONCE_CUT)):
        with pytest.raises(RowError) as error:
            compare(side([1, 2], [3], truncated), side([1, 2], [3]))
        assert str(error.value) == reason
    with pytest.raises(RowError):
        compare(side([1, 2], [3]), side([1], [2, 3]))
    assert compare(side([1, 2], [3]), side([1, 2], [3, 4])) == (2, True)
