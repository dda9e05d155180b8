from __future__ import annotations

import pytest

from rlhf_data.errors import InputError
from rlhf_data.rows import Chat, Pair, RowError, Text
from rlhf_data.shapes import RowOptions

USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}
TURNS = [USER, REPLY]
SYSTEM = {"role": "system", "content": "s"}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def read(row, first=None, **options):
    (reader,) = RowOptions(**options).recognise(first or row, "data.jsonl:1").readers
    return reader(row)


SHAPES = {
    "messages": ({"messages": TURNS}, {}, Chat(TURNS)),
    "messages in another column": ({"talk": TURNS}, {"input_key": "talk"}, Chat(TURNS)),
    "response column with chat": ({"chosen": TURNS, "prompt": "q"}, {"output_key": "chosen"}, Chat(TURNS)),
    "prompt text, response the whole chat": (
        {"chosen": TURNS, "prompt": "q"},
        {"input_key": "prompt", "output_key": "chosen"},
        Chat(TURNS),
    ),
    "prompt text, response the whole chat with a system turn": (
        {"chosen": [SYSTEM, *TURNS], "prompt": "q"},
        {"input_key": "prompt", "output_key": "chosen"},
        Chat([SYSTEM, *TURNS]),
    ),
    "prompt asked again in what follows": (
        {"prompt": "q", "response": [REPLY, USER, REPLY]},
        {},
        Chat([USER, REPLY, USER, REPLY]),
    ),
    "prompt chat, response text": ({"prompt": [USER], "completion": "a"}, {}, Chat(TURNS)),
    "prompt chat, response chat": ({"prompt": [USER], "completion": [REPLY]}, {}, Chat(TURNS)),
    "prompt text, response message": ({"prompt": "q", "response": REPLY}, {}, Chat(TURNS)),
    "sharegpt": ({"conversations": SHAREGPT}, {}, Chat(TURNS)),
    "sharegpt in another column": ({"c": SHAREGPT}, {"row_format": "sharegpt", "input_key": "c"}, Chat(TURNS)),
    "roles in a conversations column": ({"conversations": TURNS}, {}, Chat(TURNS)),
    "alpaca": ({"instruction": "q", "output": "a"}, {}, Pair("q", "a")),
    "alpaca with everything": (
        {"instruction": "q", "input": "x", "output": "a", "system": "s"},
        {},
        Pair("q\nx", "a", "s"),
    ),
    "alpaca with empty input": ({"instruction": "q", "input": "", "output": "a", "system": None}, {}, Pair("q", "a")),
    "prompt, completion": ({"prompt": "q", "completion": "a", "id": 1}, {}, Pair("q", "a")),
    "prompt, response": ({"prompt": "q", "response": "a"}, {}, Pair("q", "a")),
    "question, answer": ({"question": "q", "answer": "a"}, {}, Pair("q", "a")),
    "instruction, response": ({"instruction": "q", "response": "a", "score": 1}, {}, Pair("q", "a")),
    "input, output": ({"input": "q", "output": "a"}, {}, Pair("q", "a")),
    "forced columns": ({"input": "x", "output": "y", "p": "q", "r": "a"}, {"input_key": "p", "output_key": "r"}, None),
    "forced shape": ({"messages": TURNS, "prompt": "q", "response": "a"}, {"row_format": "prompt_completion"}, None),
    "text": ({"text": "all of it"}, {"pretrain": True}, Text("all of it")),
    "text in another column": ({"story": "all", "text": "no"}, {"pretrain": True, "input_key": "story"}, Text("all")),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_recognised_by_its_columns(name):
    row, options, expected = SHAPES[name]
    assert read(row, **options) == (expected or Pair("q", "a"))


def test_what_was_recognised_is_said():
    def describe(row, **options):
        return RowOptions(**options).recognise(row, "f:1").describe

    assert describe({"question": "q", "answer": "a"}) == "prompt `question`, response `answer`"
    assert (
        describe({"instruction": "q", "input": "", "output": "a"})
        == "prompt `instruction` with `input`, response `output`"
    )
    assert describe({"messages": TURNS}) == "messages `messages`"
    assert describe({"text": "t"}, pretrain=True) == "text `text`"


def test_who_speaks_in_sharegpt_is_mapped_to_roles():
    names = ["system", "human", "gpt", "function_call", "observation", "narrator"]
    row = {"conversations": [{"from": name, "value": "x"} for name in names], "tools": '[{"name": "f"}]'}
    chat = read(row)
    assert [message["role"] for message in chat.messages] == [
        "system",
        "user",
        "assistant",
        "assistant",
        "tool",
        "narrator",
    ]
    assert chat.tools == [{"name": "f"}]


def test_content_parts_are_joined_and_nulls_of_parquet_forgotten():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    chat = read({"messages": [{"role": "user", "content": parts, "name": None}, call]})
    assert chat.messages == [{"role": "user", "content": "ab"}, call | {"content": ""}]


PAIR = {"prompt": "q", "response": "a"}
BAD_ROWS = {
    "null": (PAIR | {"response": None}, PAIR, "`response` is null"),
    "number": (PAIR | {"response": 7}, PAIR, "`response` is a number, not text"),
    "true": (PAIR | {"prompt": True}, PAIR, "`prompt` is true or false, not text"),
    "empty": (PAIR | {"prompt": "  \n"}, PAIR, "`prompt` is empty"),
    "object": (PAIR | {"prompt": {"a": 1}}, PAIR, "`prompt` is an object, not text"),
    "missing": ({"prompt": "q"}, PAIR, "no key `response`"),
    "half a surrogate": (PAIR | {"response": "\ud83d"}, PAIR, "`response` has a broken character"),
    "messages null": ({"messages": None}, {"messages": TURNS}, "`messages` is null"),
    "messages text": ({"messages": "hi"}, {"messages": TURNS}, "`messages` is text, not a list of messages"),
    "messages empty": ({"messages": []}, {"messages": TURNS}, "`messages` is an empty list"),
    "no assistant": ({"messages": [USER]}, {"messages": TURNS}, "`messages` has no assistant turn"),
    "no message": ({"messages": ["hi"]}, {"messages": TURNS}, "`messages` has text among its messages"),
    "null message": ({"messages": [None]}, {"messages": TURNS}, "`messages` has null among its messages"),
    "no role": ({"messages": [{"content": "x"}]}, {"messages": TURNS}, "a message of `messages` has no role"),
    "odd role": ({"messages": [{"from": [1], "value": "x"}]}, {"messages": TURNS}, "has no role"),
    "no content": ({"messages": [{"role": "user"}]}, {"messages": TURNS}, "a message of `messages` has no content"),
    "odd content": ({"messages": [USER | {"content": 3}]}, {"messages": TURNS}, "has content that is not text"),
    "image": ({"messages": [USER | {"content": [{"type": "image"}]}]}, {"messages": TURNS}, "content that is not text"),
    "empty reply": ({"messages": [USER, REPLY | {"content": " "}]}, {"messages": TURNS}, "an assistant turn"),
    "another question": (
        PAIR | {"prompt": "p", "response": TURNS},
        PAIR,
        "begins with a user turn that is not `prompt`",
    ),
    "tools no JSON": ({"messages": TURNS, "tools": "f()"}, {"messages": TURNS}, "`tools` is text that is not JSON"),
    "tools no list": ({"messages": TURNS, "tools": {"f": 1}}, {"messages": TURNS}, "`tools` is not a list"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_say_why(name):
    row, first, reason = BAD_ROWS[name]
    with pytest.raises(RowError) as error:
        read(row, first)
    assert reason in str(error.value)


TWO = {"question": "q", "answer": "a"}
REFUSED = {
    "typo": (
        TWO,
        {"input_key": "questoin", "output_key": "answer"},
        ["--input_key questoin", "`questoin`", "`answer`", "did you mean `question`?"],
    ),
    "wrong key": (
        TWO,
        {"input_key": "question", "output_key": "xyz"},
        ["--output_key xyz", "no key `xyz`", "name one of them"],
    ),
    "nothing known": ({"foo": "x", "bar": "y"}, {}, ["`foo`, `bar`", "--input_key and --output_key"]),
    "no columns": ({}, {}, ["columns are none"]),
    "preference pairs": ({"prompt": "q", "chosen": "a"}, {}, ["--input_key prompt --output_key chosen"]),
    "chat pairs": ({"chosen": TURNS, "rejected": TURNS}, {}, ["give --output_key chosen"]),
    "text without pre-training": ({"text": "t"}, {}, ["--pretrain_mode"]),
    "text by format": (TWO, {"row_format": "text"}, ["--row_format text"]),
    "forced shape": (TWO, {"row_format": "alpaca"}, ["--row_format alpaca", "`question`, `answer`"]),
    "prompt alone": (TWO, {"input_key": "question"}, ["--input_key question", "needs --output_key"]),
    "response alone": (TWO, {"output_key": "answer"}, ["--output_key answer", "needs --input_key"]),
    "no text column": (TWO, {"pretrain": True}, ["--pretrain_mode", "no key `text`", "--input_key"]),
    "pre-training on chats": (
        TWO,
        {"pretrain": True, "row_format": "messages"},
        ["--row_format messages", "--row_format text"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_first_row_that_cannot_be_read_is_an_error_with_the_way_out(name):
    row, options, parts = REFUSED[name]
    with pytest.raises(InputError) as error:
        RowOptions(**options).recognise(row, "data.jsonl:1")
    for part in ["data.jsonl:1" if name != "pre-training on chats" else "", *parts]:
        assert part in str(error.value)
