from __future__ import annotations

import pytest

from rlhf_data.encode import NEEDS_TEMPLATE, EncodeOptions, Encoder
from rlhf_data.errors import InputError
from rlhf_data.prompts import PromptOptions
from rlhf_data.rows import Chat, Pair, RowError, Text
from rlhf_data.templates import NO_PROMPT

LOSSLESS = ["byte-level", "byte-level with prefix space", "prepend", "metaspace first", "metaspace always"]
USER = {"role": "user", "content": "where is the cat?"}
REPLY = {"role": "assistant", "content": "the cat sat"}
SYSTEM = {"role": "system", "content": "it is the time"}
SHAREGPT = [{"from": "human", "value": "where is the cat?"}]
BARE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
"""Marks, but no generation prompt."""


def read(row, first=None, **options):
    (reader,) = PromptOptions(**options).recognise(first or row, "data.jsonl:1").readers
    return reader(row)


SHAPES = {
    "prompt": ({"prompt": "q", "answer": "a"}, {}, Pair("q", "")),
    "prompt of messages": ({"prompt": [USER]}, {}, Chat([USER])),
    "question": ({"question": "q", "answer": "a"}, {}, Pair("q", "")),
    "input": ({"input": "q"}, {}, Pair("q", "")),
    "alpaca": ({"instruction": "q", "input": "x", "output": "a", "system": "s"}, {}, Pair("q\nx", "", "s")),
    "alpaca without input": ({"instruction": "q", "input": ""}, {}, Pair("q", "")),
    "messages": ({"messages": [USER], "prompt": "q"}, {}, Chat([USER])),
    "a whole conversation": ({"messages": [USER, REPLY], "tools": [{"a": 1}]}, {}, Chat([USER, REPLY], [{"a": 1}])),
    "sharegpt": ({"conversations": SHAREGPT}, {}, Chat([USER])),
    "context messages": ({"context_messages": [USER]}, {}, Chat([USER])),
    "another column": ({"prompt": "no", "ask": "q"}, {"input_key": "ask"}, Pair("q", "")),
    "another column of messages": ({"prompt": "no", "chosen": [USER, REPLY]}, {"input_key": "chosen"}, None),
    "instruction alone": ({"instruction": "q", "input": "x"}, {"input_key": "instruction"}, Pair("q", "")),
    "written out": ({"input": "q", "messages": [USER], "rendered": "chat"}, {}, Pair("q", "", rendered="chat")),
    "written out pairs": ({"prompt": "q", "chosen": "a", "rendered": "text"}, {}, Pair("q", "", rendered="text")),
    "messages of written out": (
        {"input": "q", "messages": [USER], "rendered": "chat"},
        {"input_key": "messages"},
        Chat([USER]),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_prompt_is_recognised_by_its_columns(name):
    row, options, expected = SHAPES[name]
    assert read(row, **options) == (expected or Chat([USER, REPLY]))


def test_what_was_recognised_is_said():
    def describe(row, **options):
        return PromptOptions(**options).recognise(row, "f:1").describe

    assert describe({"prompt": "q"}) == "prompt `prompt`"
    assert describe({"context_messages": [USER]}) == "messages `context_messages`"
    assert describe({"instruction": "q", "input": "x"}) == "prompt `instruction` with `input`"
    assert describe({"input": "q", "rendered": "text"}) == "prompt `input` (written out already)"
    assert describe({"input": "q", "rendered": "text"}, input_key="input") == "prompt `input` (written out already)"


BAD_ROWS = {
    "null": ({"prompt": None}, "`prompt` is null"),
    "number": ({"prompt": 7}, "`prompt` is a number, not text"),
    "empty": ({"prompt": " "}, "`prompt` is empty"),
    "missing": ({"question": "q"}, "no key `prompt`"),
    "no messages": ({"prompt": []}, "`prompt` is an empty list"),
    "texts": ({"prompt": ["q"]}, "`prompt` has text among its messages"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_prompts_say_why(name):
    row, reason = BAD_ROWS[name]
    with pytest.raises(RowError) as error:
        read(row, {"prompt": "q"})
    assert reason in str(error.value)


REFUSED = {
    "typo": ({"question": "q"}, {"input_key": "questoin"}, ["--input_key questoin", "did you mean `question`?"]),
    "nothing known": ({"foo": "x", "bar": "y"}, {}, ["`foo`, `bar`", "--input_key"]),
    "pairs": ({"chosen": [USER, REPLY], "rejected": [USER]}, {}, ["--input_key chosen", "last reply is left out"]),
    "no columns": ({}, {}, ["columns are none"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_without_a_prompt_are_an_error_with_the_way_out(name):
    row, options, parts = REFUSED[name]
    with pytest.raises(InputError) as error:
        PromptOptions(**options).recognise(row, "data.jsonl:1")
    for part in ["data.jsonl:1", *parts]:
        assert part in str(error.value)


def check(tokenizer, conversations, response="the cat sat", **options):
    """A prompt is what training puts before the response, and, written out, is encoded to the same ids again."""
    encoder = Encoder(tokenizer, EncodeOptions(512, **options))
    again = Encoder(tokenizer, EncodeOptions(512))
    prompts = encoder.prompts(conversations)
    for prompt, trained in zip(prompts, encoder.encode(conversations), strict=True):
        assert not isinstance(prompt, RowError), prompt
        assert not isinstance(trained, RowError), trained
        before = int(trained[0].target_mask.argmax())
        assert trained[0].input_ids[:before].tolist() == prompt.ids
        (written,) = again.encode([Pair(prompt.text, response, rendered=prompt.rendered)])
        assert not isinstance(written, RowError)
        assert written[0].input_ids[: len(prompt.ids)].tolist() == prompt.ids
        assert int(written[0].target_mask.argmax()) == len(prompt.ids)
    return prompts


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", ["User: {}\\nAssistant: ", "{}", "<s>{}", None])
def test_a_plain_prompt_is_what_training_puts_before_the_response(make_tokenizer, kind, bos, template):
    pairs = [Pair("where is the cat?", "the cat"), Pair(" 🐈\n", " x"), Pair("the", "cat", "it is"), Pair("a ", "b")]
    prompts = check(make_tokenizer(kind, bos=bos), pairs, input_template=template)
    assert {prompt.rendered for prompt in prompts} == {"text"}
    assert prompts[0].text == (template or "{}").replace("\\n", "\n").replace("{}", "where is the cat?")
    assert prompts[2].text == (template or "{}").replace("\\n", "\n").replace("{}", "it is\n\nthe")


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", ["chatml", "marked", "bare", "with bos"])
def test_a_chat_prompt_is_what_training_puts_before_the_reply(make_tokenizer, chat_templates, kind, bos, name):
    template = {"bare": BARE, "with bos": "{{ bos_token }}" + chat_templates["chatml"], **chat_templates}[name]
    tokenizer = make_tokenizer(kind, bos=bos, eos="<|im_end|>", chat_template=template)
    chats = [
        Chat([USER, REPLY]),
        Chat([SYSTEM, USER, REPLY]),
        Chat([USER, REPLY, USER, REPLY]),
        Pair("where is the cat?", "the cat sat"),
        Pair("where is the cat?", "the cat sat", "it is"),
    ]
    prompts = check(tokenizer, chats, apply_chat_template=True)
    assert {prompt.rendered for prompt in prompts} == {"chat"}
    assert prompts[0] == prompts[3]
    assert prompts[0].text.endswith("where is the cat?<|im_end|>" + "\n" * (name != "bare") + "<|im_start|>assistant\n")
    assert prompts[0].text.startswith("<s>" if name == "with bos" else "<|im_start|>")


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_only_a_reply_at_the_end_is_left_out(make_tokenizer, chat_templates, template):
    tokenizer = make_tokenizer(chat_template=chat_templates[template])
    encoder = Encoder(tokenizer, EncodeOptions(64, apply_chat_template=True))
    turns = [USER, REPLY, USER]
    open_, answered, pair, empty = encoder.prompts(
        [Chat(turns), Chat([*turns, REPLY]), Pair("where is the cat?", ""), Pair("where is the cat?", "any")]
    )
    assert open_ == answered
    assert not isinstance(open_, RowError)
    assert open_.text.count("the cat sat") == 1
    assert pair == empty


def test_written_out_prompts_are_taken_as_they_are(tokenizer):
    encoder = Encoder(tokenizer, EncodeOptions(64, input_template="Q: {}"))
    text, chat = encoder.prompts([Pair("the cat", "", rendered="text"), Pair("<s>the cat", "", rendered="chat")])
    assert not isinstance(text, RowError)
    assert not isinstance(chat, RowError)
    assert (text.text, text.rendered) == ("the cat", "text")
    assert (chat.text, chat.rendered) == ("<s>the cat", "chat")
    assert text.ids == chat.ids == tokenizer.encode("the cat")


def test_a_conversation_without_a_prompt_says_so_and_harms_no_other(chat_tokenizer):
    encoder = Encoder(chat_tokenizer, EncodeOptions(64, apply_chat_template=True))
    results = encoder.prompts([Text("all"), Pair("", "all"), Chat([REPLY]), Chat([USER])])
    assert [str(result) for result in results[:3]] == [NO_PROMPT] * 3
    assert not isinstance(results[3], RowError)
    (plain,) = Encoder(chat_tokenizer, EncodeOptions(64)).prompts([Chat([USER])])
    assert str(plain) == NEEDS_TEMPLATE
    assert encoder.prompts([]) == []


def test_a_template_that_marks_no_reply_gives_no_prompt(make_tokenizer):
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'tool' %}{% generation %}{% endgeneration %}" + (
        "{% endif %}{% endfor %}"
    )
    encoder = Encoder(make_tokenizer(chat_template=template), EncodeOptions(64, apply_chat_template=True))
    (prompt,) = encoder.prompts([Chat([USER])])
    assert "marks no assistant text" in str(prompt)


def test_prompts_are_encoded_with_one_call_to_the_tokenizer(tokenizer, monkeypatch):
    encoder = Encoder(tokenizer, EncodeOptions(64))
    first, calls = encoder._first, []
    monkeypatch.setattr(encoder, "_first", lambda texts: calls.append(len(texts)) or first(texts))
    assert len(encoder.prompts([Pair(f"the {number}", "") for number in range(100)])) == 100
    assert calls == [100]
