"""Chat: what is remembered, what still fits, commands, text out of ids; against a voice that needs no model."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch

from rlhf_data.continuation import continuation_text, piece_encoders
from rlhf_data.encode import EncodeOptions, Encoder, Prompt
from rlhf_data.errors import InputError
from rlhf_data.options import build
from rlhf_data.rows import Pair
from rlhf_infer.chat import ChatConfig
from rlhf_infer.engines.engine import Request, sample_seed
from rlhf_infer.talk.dialogue import Detokeniser, Dialogue, Exchange, latest_that_fit, messages_of, printable
from rlhf_infer.talk.terminal import Choice, Talk
from rlhf_infer.talk.voice import ConversationWriter


def plainly(system, exchanges, prompt):
    """One token per character."""
    before = f"{system}." if system else ""
    text = before + "".join(f"{one.prompt}{one.answer}." for one in exchanges) + prompt
    return Prompt(text, list(text.encode()), "text")


class Echo:
    """Says the last prompt in capitals, one character at a time, and how often it was asked before."""

    def __init__(self, **changes):
        self.best_of_n, self.greedy, self.max_new_tokens, self.limit, self.limit_name = 1, False, 20, 100, "--max_len"
        self.asked, self.seeds, self.stop_after = [], [], None
        self.__dict__ |= changes

    def write_out(self, system, exchanges, prompt):
        return plainly(system, exchanges, prompt)

    def stream(self, asked, room, seed):
        self.asked.append(asked.text)
        self.seeds.append(seed)
        said = asked.text.rpartition(".")[2].upper()
        for number, letter in enumerate(said[:room]):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield letter, None
        yield "", "stop" if len(said) <= room else "length"

    def best(self, asked, room, seed):
        self.seeds.append(seed)
        return Choice(f"best of {self.best_of_n}", "stop", [0.25, 1.5, -1.0])


def talk(lines, at_terminal=True, system="", **changes):
    """What answers, what was shown, and what was noted, after some lines."""
    out, notes, voice = io.StringIO(), io.StringIO(), Echo(**changes)
    talk = Talk(voice, system, 7, at_terminal=at_terminal, out=out, notes=notes)
    talk.run(lines)
    return talk, out.getvalue(), notes.getvalue()


def test_every_answer_sees_what_was_said_before():
    talked, shown, _ = talk(["one", "", "two", "/exit", "three"])
    assert shown == "ONE\nTWO\n"
    assert talked.voice.asked == ["one", "oneONE.two"]
    assert talked.dialogue.messages() == [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "ONE"},
        {"role": "user", "content": "two"}, {"role": "assistant", "content": "TWO"},
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["clear", "/clear"])
def test_clear_forgets_everything_but_the_system_prompt(word):
    talked, _, notes = talk(["one", word, "two"], system="be brief")
    assert talked.voice.asked == ["be brief.one", "be brief.two"]
    assert "forgotten" in notes


@pytest.mark.parametrize("word", ["exit", "/exit"])
def test_exit_ends_it(word):
    assert talk([word, "one"])[0].voice.asked == []


def test_undo_takes_one_exchange_back():
    talked, _, notes = talk(["one", "two", "/undo", "three"])
    assert talked.voice.asked[-1] == "oneONE.three"
    assert "taken back: two" in notes


def test_again_answers_the_same_prompt_with_another_seed_in_place_of_the_first_answer():
    talked, _, _ = talk(["one", "two", "/again", "/again", "three"])
    first, second, third, fourth, fifth = talked.voice.seeds
    assert talked.voice.asked[1:] == ["oneONE.two"] * 3 + ["oneONE.twoTWO.three"]
    assert (third, fourth) == (second + 1, second + 2)
    assert [first, second, fifth] == [sample_seed(7, number) for number in range(3)]


def test_again_draws_none_of_the_answers_that_were_there_to_choose_from():
    talked, _, _ = talk(["one", "/again"], best_of_n=4)
    assert talked.voice.seeds == [sample_seed(7, 0), sample_seed(7, 0) + 4]


def test_again_says_that_greedy_answers_do_not_change():
    talked, shown, notes = talk(["one", "/again"], greedy=True)
    assert shown == "ONE\n" and "--greedy_sampling" in notes and len(talked.dialogue.exchanges) == 1


def test_the_system_prompt_can_be_changed_and_removed():
    assert talk(["/system  be  brief ", "one", "/system", "two"])[0].voice.asked == ["be  brief.one", "oneONE.two"]


def test_two_slashes_begin_a_prompt_with_one():
    assert talk(["//etc"])[0].voice.asked == ["/etc"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/undo", "nothing was said"),
        ("/again", "nothing was said"),
        ("/save it.jsonl", "nothing to save"),
        ("/save", "the name of a file"),
        ("/sing", "no command /sing"),
        ("x" * 100, "100 tokens"),
        ("broken \udcff", "not UTF-8"),
    ],
)
def test_what_cannot_be_done_is_said_to_a_person_and_ends_a_script(line, said):
    talked, shown, notes = talk([line, "one"])
    assert said in notes and shown == "ONE\n" and len(talked.dialogue.exchanges) == 1
    with pytest.raises(InputError, match=f"line 2: .*{said}"):
        talk(["clear", line, "one"], at_terminal=False)


def test_help_names_every_command():
    talked, _, notes = talk(["/help"])
    assert [name for name in talked.commands if name not in notes] == []


def test_a_stopped_answer_is_kept_as_far_as_it_got():
    talked, shown, notes = talk(["hello", "/undo"], stop_after=2)
    assert shown == "HE\n" and "stopped" in notes
    talked, _, _ = talk(["hello"], stop_after=2)
    assert talked.dialogue.exchanges == [Exchange("hello", "HE", "interrupted")]


def test_an_answer_stopped_before_its_first_word_is_not_remembered_and_the_one_before_it_stays():
    assert talk(["hello"], stop_after=0)[0].dialogue.exchanges == []
    talked, _, _ = talk(["hello"])
    talked.voice.stop_after = 0
    talked.take("/again")
    assert talked.dialogue.exchanges == [Exchange("hello", "HELLO", "stop")]


def test_an_answer_that_cannot_be_given_again_stays():
    talked, _, _ = talk(["hello"])
    talked.dialogue.system = "x" * 100
    with pytest.raises(InputError, match="the prompt has 106 tokens"):
        talked.take("/again")
    assert talked.dialogue.exchanges == [Exchange("hello", "HELLO", "stop")]


def test_a_script_is_interrupted_as_a_whole():
    with pytest.raises(KeyboardInterrupt):
        talk(["hello"], at_terminal=False, stop_after=2)


def test_a_cut_answer_says_at_which_limit():
    assert "cut at --max_new_tokens" in talk(["hello"], max_new_tokens=3)[2]
    _, shown, notes = talk(["hello"], limit=9)
    assert shown == "HELL\n" and "cut at the end of --max_len" in notes


def test_an_empty_answer_is_remembered_and_said():
    class Silent(Echo):
        def stream(self, asked, room, seed):
            yield "", "stop"

    notes = io.StringIO()
    talked = Talk(Silent(), "", 7, at_terminal=True, out=io.StringIO(), notes=notes)
    talked.run(["one"])
    assert talked.dialogue.exchanges == [Exchange("one", "", "stop")] and "empty" in notes.getvalue()


def test_the_best_of_several_is_shown_with_its_reward_and_how_the_others_did():
    talked, shown, notes = talk(["one"], best_of_n=3)
    assert shown == "best of 3\n"
    assert "writing 3 answers" in notes and "reward 1.5, the best of 3 (mean 0.25, least -1)" in notes
    assert talked.dialogue.exchanges == [Exchange("one", "best of 3", "stop")]


def test_the_oldest_exchanges_are_left_out_when_no_more_fits_and_that_is_said_once():
    talked, _, notes = talk(["aaaaa", "bbbbb", "ccccc", "ddddd"], limit=40, max_new_tokens=10)
    assert talked.voice.asked[2:] == ["aaaaaAAAAA.bbbbbBBBBB.ccccc", "bbbbbBBBBB.cccccCCCCC.ddddd"]
    assert notes.count("left out") == 1
    assert len(talked.dialogue.exchanges) == 4


def test_room_is_kept_for_an_answer_only_as_far_as_leaving_exchanges_out_can_make_it():
    said = [Exchange("aaa", "bbb", "stop"), Exchange("cc", "dd", "stop")]

    def fits(limit, reserve):
        written, left_out = latest_that_fit(said, "ee", lambda some, prompt: plainly("", some, prompt), limit, reserve)
        return written.text, left_out

    assert fits(15, 1) == ("aaabbb.ccdd.ee", 0)
    assert fits(14, 1) == ("ccdd.ee", 1)
    assert fits(7, 6) == ("ee", 2)
    with pytest.raises(InputError, match="2 tokens"):
        fits(2, 1)


def test_a_saved_conversation_is_appended_as_messages_and_says_whether_its_last_answer_is_whole(tmp_path):
    file = tmp_path / "talk.jsonl"
    dialogue = Dialogue("be brief", [Exchange("hé", "HÉ", "stop")])
    dialogue.save(file)
    dialogue.exchanges.append(Exchange("two", "TW", "interrupted"))
    dialogue.save(file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["finish_reason"] for row in rows] == ["stop", "length"]
    assert rows[1]["messages"] == messages_of("be brief", dialogue.exchanges)
    assert rows[0]["messages"][:2] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hé"}]
    with pytest.raises(InputError, match="cannot save"):
        dialogue.save(tmp_path)


def test_saving_answers_that_were_cut_says_what_training_would_learn(tmp_path):
    _, _, notes = talk(["hello", f"/save {tmp_path / 'talk.jsonl'}"], max_new_tokens=3)
    assert "1 exchange(s) appended" in notes and "1 of the answers" in notes


def test_nothing_a_model_says_can_drive_the_terminal():
    said = "a\x1b[31mb\x07\r\x9b2J\x7fc\n\td\x00é"
    assert printable(said) == "a[31mb2Jc\n\tdé"
    _, shown, notes = talk(["x\x1b[2Jy", "/undo"])
    assert shown == "X[2JY\n" and "\x1b" not in notes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from rlhf_core.tiny import make_tokenizer

    return make_tokenizer(["one two three"] * 3, tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


def test_without_a_chat_template_exchanges_are_the_samples_that_training_makes_of_them(tokenizer):
    write = ConversationWriter(tokenizer, "Q: {}\\nA: ", apply_chat_template=False)
    said = [Exchange("one", "two", "stop"), Exchange("three", "", "stop"), Exchange("two", "one tw", "length")]
    written = write("be brief", said, "three")
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    encoder = Encoder(tokenizer, EncodeOptions(max_len=64, input_template="Q: {}\\nA: "))
    first, third = (
        sample[0].input_ids.tolist()
        for sample in encoder.encode([Pair("one", "two", "be brief"), Pair("two", "one tw")])
    )
    second, last = (prompt.ids for prompt in encoder.prompts([Pair("three", ""), Pair("three", "")]))
    assert first[0] == bos and first[-1] == eos == third[-1]
    assert written.ids == [*first, *second[1:], eos, *third[1:], *last[1:]]
    assert written.text == ("Q: be brief\n\none\nA: two</s>Q: three\nA: </s>Q: two\nA: one tw</s>Q: three\nA: ")
    assert written.rendered == "text"


def test_with_a_chat_template_the_conversation_is_what_the_template_makes_of_its_messages(tokenizer):
    write = ConversationWriter(tokenizer, None, apply_chat_template=True)
    written = write("be brief", [Exchange("one", "two", "stop")], "three")
    assert written.text == "<|system|>be brief<|user|>one<|assistant|>two</s><|user|>three<|assistant|>"
    assert written.rendered == "chat"
    assert tokenizer.decode(written.ids) == written.text


def test_a_conversation_that_the_chat_template_refuses_is_an_error(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{{ raise_exception('no system prompt, please') if messages[0].role == 'system' }}{{ messages }}"
    )
    write = ConversationWriter(strict, None, apply_chat_template=True)
    with pytest.raises(InputError, match="no system prompt, please"):
        write("be brief", [], "one")


def byte_fallback():
    """A tokenizer in Llama's manner: `▁` for spaces, stripped at the start of a text, and bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    model = models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TEXT = "one  two – héllo 日本語 👩‍👩‍👧 a\n b"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_streamed_text_never_shows_half_a_character_and_adds_up(kind, tokenizer):
    tokenizer = tokenizer if kind == "byte_level" else byte_fallback()
    first, continuation = piece_encoders(tokenizer)
    (before,), (ids,) = first(["a 日"]), continuation([TEXT])
    stream = Detokeniser(tokenizer, before)
    pieces = [stream.add(token) for token in ids]
    assert len(ids) > len(TEXT) - 5 and "" in pieces
    assert "".join(pieces) == TEXT
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) and stream.rest() == ""


def test_half_a_character_is_held_back_until_nothing_follows(tokenizer):
    ids = tokenizer.encode("é", add_special_tokens=False)
    assert len(ids) == 2
    stream = Detokeniser(tokenizer, tokenizer.encode("one"))
    assert stream.add(ids[0]) == ""
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"best_of_n": 2}, "--reward_pretrain"),
        ({"reward_pretrain": "./rm"}, "--best_of_n"),
        ({"best_of_n": 2, "reward_pretrain": "./rm", "greedy_sampling": True}, "same answer"),
        ({"greedy_sampling": True, "temperature": 0.5}, "--temperature"),
        ({"greedy_sampling": True, "seed": 1, "top_p": 0.5}, "--top_p and --seed"),
        ({"value_head_prefix": "score"}, "--reward_pretrain"),
        ({"input_template": "no place"}, "--input_template"),
        ({"input_template": "{}", "apply_chat_template": True}, "--input_template"),
        ({"input_template": "{}", "tokenizer_chat_template": "{{messages}}"}, "--input_template"),
        ({"apply_chat_template": False, "tokenizer_chat_template": "{{messages}}"}, "--no_apply_chat_template"),
        ({"temperature": 0}, "--temperature"),
        ({"max_new_tokens": 0}, "--max_new_tokens"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        build(ChatConfig, {"pretrain": "./model"} | given)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A small random model, of which the tokenizer is a part."""
    from rlhf_core.tiny import make_model

    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    make_model(tokenizer, folder, hidden_size=32, layers=1, max_len=64)
    return folder


@pytest.mark.parametrize("given", [{}, {"greedy_sampling": True}, {"repetition_penalty": 1.3, "bf16": True}])
def test_a_streamed_answer_is_what_the_engine_writes_with_the_same_seed(given, folder):
    from rlhf_infer.talk.voice import ModelVoice

    voice = ModelVoice(build(ChatConfig, {"pretrain": str(folder), "max_len": 48} | given))
    assert (voice.limit, voice.limit_name) == (48, "--max_len")
    asked = voice.write_out("", [], "one")
    pieces = list(voice.stream(asked, room=12, seed=5))
    ((_, (written,)),) = voice.engine.generate([Request(asked.ids, 5)], voice._sampling(12))
    ids = written.token_ids[:-1] if written.finish_reason == "stop" else written.token_ids
    assert "".join(text for text, _ in pieces) == continuation_text(voice.tokenizer, asked.ids, ids) != ""
    assert [end for _, end in pieces] == [None] * (len(pieces) - 1) + [written.finish_reason]


def test_the_best_answer_is_the_one_that_the_reward_model_gives_most(folder, tokenizer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from rlhf_infer.talk.voice import ModelVoice

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = {
        "pretrain": str(folder),
        "best_of_n": 4,
        "reward_pretrain": str(tmp_path),
        "temperature": 1.0,
        "top_p": 1.0,
    }
    voice = ModelVoice(build(ChatConfig, config))
    asked = voice.write_out("", [Exchange("one", "two", "stop")], "three")
    choice = voice.best(asked, room=6, seed=3)
    ((_, completions),) = voice.engine.generate([Request(asked.ids, 3)], voice._sampling(6))
    texts = []
    for one in completions:
        ids = one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids
        texts.append(continuation_text(tokenizer, asked.ids, ids))
    samples = Encoder(tokenizer, EncodeOptions(max_len=64)).encode(
        [
            Pair(asked.text, text, rendered=asked.rendered, complete=one.finish_reason == "stop")
            for text, one in zip(texts, completions, strict=True)
        ]
    )
    with torch.no_grad():
        rewards = [model(torch.tensor(sample[0].input_ids[None]).long()).logits.item() for sample in samples]
    assert choice.rewards == pytest.approx(rewards, abs=1e-5) and max(rewards) > min(rewards)
    best = max(range(4), key=rewards.__getitem__)
    assert (choice.text, choice.ending) == (texts[best], completions[best].finish_reason)


def test_an_answer_without_any_token_has_no_reward_from_a_model(tokenizer):
    from rlhf_infer.rewards.scorer import Judgement
    from rlhf_infer.talk.voice import Judge

    class Length:
        needs_tokens = True

        def score(self, answers):
            return Judgement([float(len(answer.sample)) for answer in answers]).rewards

    judge = Judge.__new__(Judge)
    judge.scorer, judge.encoder = Length(), Encoder(tokenizer, EncodeOptions(max_len=10))
    asked = Prompt("one", [0, 1], "text")
    whole, none, cut = judge.rewards(asked, [("two", "stop"), ("", "stop"), ("two", "length")])
    assert none is None and whole == cut + 1  # the EOS of a whole answer
    with pytest.raises(InputError, match="10 tokens"):
        judge.rewards(asked, [("two one three " * 5, "stop")])
