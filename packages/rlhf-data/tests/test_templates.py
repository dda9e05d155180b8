from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf_data.encode import EncodeOptions, Encoder
from rlhf_data.errors import InputError
from rlhf_data.rows import Chat, Pair, RowError
from rlhf_data.templates import ChatTemplate, Piece, decode_escapes, plain_pieces, read_chat_template

TURNS = [
    {"role": "system", "content": "sys"},
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": "the mat"},
    {"role": "user", "content": "when?"},
    {"role": "assistant", "content": "the time"},
    {"role": "user", "content": "never answered"},
]
STRIPS_EARLIER_TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ 'A:' + m.content.split('|')[-1] }}"
    "{% else %}{{ m.role[0] | upper + ':' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


def encode(tokenizer, messages, **options):
    encoder = Encoder(tokenizer, EncodeOptions(**{"max_len": 512, "apply_chat_template": True, **options}))
    (result,) = encoder.encode([Chat(messages)])
    if isinstance(result, RowError):
        return result
    (sample,) = result
    return sample


def trained_runs(tokenizer, sample) -> list[str]:
    runs, current = [], []
    for token, target in zip(sample.input_ids.tolist(), sample.target_mask.tolist(), strict=True):
        if target:
            current.append(token)
        elif current:
            runs, current = [*runs, tokenizer.decode(current)], []
    return [*runs, tokenizer.decode(current)] if current else runs


def test_only_typed_escapes_are_decoded():
    assert decode_escapes(r"a\nb\tc\rd\\e\"f\'") == "a\nb\tc\rd\\e\"f'"
    assert decode_escapes(r"ü \u00e9 \x41 \d 日本 \\n") == "ü \\u00e9 \\x41 \\d 日本 \\n"


def test_a_plain_prompt_may_hold_braces():
    pieces = plain_pieces(Pair("a {} {0} {x}", "r", system="S"), "{{Q}} {} ")
    assert pieces == [Piece("{{Q}} S\n\na {} {0} {x} ", False), Piece("r", True)]
    assert plain_pieces(Pair("p", "r"), None) == [Piece("p", False), Piece("r", True)]


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_the_last_assistant_turn_is_trained_or_all_of_them(make_tokenizer, chat_templates, template):
    tokenizer = make_tokenizer(bos=True, eos="<|im_end|>", chat_template=chat_templates[template])
    sample = encode(tokenizer, TURNS)
    assert trained_runs(tokenizer, sample) == ["the time<|im_end|>"]
    every = encode(tokenizer, TURNS, multiturn=True)
    assert trained_runs(tokenizer, every) == ["the mat<|im_end|>", "the time<|im_end|>"]
    assert tokenizer.decode(every.input_ids.tolist()) == tokenizer.apply_chat_template(
        TURNS[:5], tokenize=False
    ).rstrip("\n")
    assert tokenizer.bos_token_id not in every.input_ids  # the template writes none


def test_marks_around_bare_content_end_in_one_eos(make_tokenizer, chat_templates):
    template = chat_templates["marked"].replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    tokenizer = make_tokenizer(bos=False, eos="<|im_end|>", chat_template=template)
    assert trained_runs(tokenizer, encode(tokenizer, TURNS)) == ["the time<|im_end|>"]
    assert trained_runs(tokenizer, encode(tokenizer, TURNS, multiturn=True)) == ["the mat", "the time<|im_end|>"]


def test_a_template_without_eos_gets_one_at_the_end_only(make_tokenizer, chat_templates):
    tokenizer = make_tokenizer(
        bos=False, chat_template=chat_templates["chatml"]
    )  # its EOS is </s>, which ChatML does not write
    runs = trained_runs(tokenizer, encode(tokenizer, TURNS, multiturn=True))
    assert runs == ["the mat<|im_end|>\n", "the time<|im_end|>\n</s>"]


def test_a_template_that_rewrites_earlier_turns_is_not_guessed_at(make_tokenizer):
    tokenizer = make_tokenizer(bos=False, chat_template=STRIPS_EARLIER_TURNS)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "think|b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "think|d"},
    ]
    assert trained_runs(tokenizer, encode(tokenizer, turns)) == ["think|d</s>"]
    refused = encode(tokenizer, turns, multiturn=True)
    assert isinstance(refused, RowError)
    assert "{% generation %}" in str(refused)


def test_what_a_template_refuses_drops_the_row_with_its_words(make_tokenizer, chat_templates):
    template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first, please') }}{% endif %}"
        + chat_templates["chatml"]
    )
    tokenizer = make_tokenizer(chat_template=template)
    assert "user first, please" in str(encode(tokenizer, TURNS))
    assert "chat template refuses" in str(encode(tokenizer, [{"role": "assistant", "content": "x"}]))


def test_broken_templates_and_missing_ones_are_named(tokenizer, chat_templates, tmp_path):
    with pytest.raises(InputError, match=r"not valid Jinja.*line 1"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(InputError, match=r"no chat template.*--tokenizer_chat_template"):
        Encoder(tokenizer, EncodeOptions(64, apply_chat_template=True))
    with pytest.raises(InputError, match=r"--tokenizer_chat_template 'chatml'.*neither Jinja"):
        read_chat_template("chatml")
    file = tmp_path / "chat.jinja"
    file.write_text(chat_templates["chatml"])
    assert read_chat_template(str(file)) == chat_templates["chatml"]


def test_plain_pairs_become_user_and_assistant_turns(chat_tokenizer):
    encoder = Encoder(chat_tokenizer, EncodeOptions(512, apply_chat_template=True))
    (result,) = encoder.encode([Pair("where?", "the mat", system="sys")])
    assert not isinstance(result, RowError)
    assert result[0].input_ids.tolist() == encode(chat_tokenizer, TURNS[:3]).input_ids.tolist()


def test_cut_conversations_keep_the_turns_that_fit(chat_tokenizer):
    full = encode(chat_tokenizer, TURNS, multiturn=True)
    cut = encode(chat_tokenizer, TURNS, multiturn=True, max_len=len(full) - 2)
    assert cut.truncated
    assert cut.target_mask[-1]
    assert len(encode(chat_tokenizer, TURNS, multiturn=True, max_len=len(full) - 8)) < len(full) - 8
    assert trained_runs(chat_tokenizer, cut)[0] == "the mat<|im_end|>"
    assert "longer than --max_len" in str(encode(chat_tokenizer, TURNS, max_len=8))


def test_a_broken_character_anywhere_in_a_chat_drops_the_row(chat_tokenizer):
    assert "broken character" in str(encode(chat_tokenizer, [{"role": "u\ud800", "content": "x"}, *TURNS[1:3]]))


def test_configs_and_escapes_need_no_heavy_import():
    code = (
        "import sys; from rlhf_data.config import SFTDataConfig; SFTDataConfig(dataset='x'); "
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'jinja2'} & set(sys.modules); "
        "print(*heavy)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
