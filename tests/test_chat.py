"""`rlhf chat` as people and scripts use it: at a pseudo-terminal, and with lines on standard input."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

LETTERS = """
def reward(prompts, responses):
    return [float(sum("a" <= letter <= "z" for letter in response)) for response in responses]
"""
"""A reward function that likes letters."""


def letters(text):
    return sum("a" <= letter <= "z" for letter in text)


@pytest.fixture
def chat(tiny, rlhf, monkeypatch):
    """Talk to the tiny model, line by line on standard input, in this process."""

    def run(lines, *more):
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode("utf-8", "surrogateescape")), "utf-8")
        )
        return rlhf(["chat", "--pretrain", str(tiny), "--max_new_tokens", "8", *more])

    return run


def test_a_script_gets_an_answer_to_every_line_and_the_same_ones_each_time(chat):
    first = chat("Say cat and dog\n\nSay red and blue")
    assert first.code == 0 and first.out.strip(), first.err
    assert chat("Say cat and dog\n\nSay red and blue") == first
    assert chat("Say cat and dog", "--seed", "1").out != chat("Say cat and dog").out


def test_what_is_forgotten_and_taken_back_changes_no_later_answer(chat):
    plain = chat("Say cat and dog\nSay red and blue\n").out
    answer = chat("Say cat and dog\n").out
    assert plain.startswith(answer) and len(plain) > len(answer)
    assert chat("Say cat and dog\n/clear\nSay cat and dog").out == answer * 2
    undone = chat("Say cat and dog\nSay moon\n/undo\nSay red and blue\nexit\nSay moon\n").out
    assert undone == answer + chat("Say cat and dog\nSay moon\n").out.removeprefix(answer) + plain.removeprefix(answer)


def test_another_answer_and_another_system_prompt_are_other_ones(chat):
    answer = chat("Say cat and dog").out
    assert chat("Say cat and dog\n/again").out.removeprefix(answer) not in ("", answer)
    changed = chat("/system Be the moon and the river\nSay cat and dog\n").out
    assert changed != answer
    assert changed == chat("Say cat and dog", "--system", "Be the moon and the river").out


def test_templates_decide_how_a_conversation_is_written_out(chat):
    own, plain = chat("Say cat").out, chat("Say cat", "--no_apply_chat_template").out
    assert own == chat("Say cat", "--apply_chat_template").out
    assert len({own, plain, chat("Say cat", "--input_template", "{}").out}) == 3
    assert plain == chat("Say cat", "--input_template", r"User: {}\nAssistant: ").out


def test_a_saved_conversation_can_be_trained_on(chat, rlhf, tiny, tmp_path):
    file = tmp_path / "talk.jsonl"
    answer = chat(f"Say cat\nSay dog\n/save {file}\n/undo\n/save {file}")
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [[message["role"] for message in row["messages"]] for row in rows] == [
        ["user", "assistant"] * 2,
        ["user", "assistant"],
    ]
    trained = [
        "train",
        "sft",
        "--pretrain",
        str(tiny),
        "--dataset",
        str(file),
        "--apply_chat_template",
        "--max_len",
        "96",
    ]
    planned = rlhf(
        [*trained, "--train_batch_size", "1", "--micro_train_batch_size", "1", "--eval_ratio", "0", "--dry_run"]
    )
    assert planned.code == 0 and "2 samples" in planned.out, planned.err


def test_the_answer_that_a_function_likes_best_is_given_with_its_reward(chat, tmp_path):
    function = tmp_path / "letters.py"
    function.write_text(LETTERS)
    several = chat("Say cat\n/again\n", "--best_of_n", "3", "--reward_pretrain", str(function))
    assert several.code == 0, several.err
    singles = chat("Say cat\n" + "/again\n" * 5).out.strip("\n").split("\n")  # the same six, one by one
    assert len(singles) == 6, "an answer holds a line end: take another prompt"
    best = [max(part, key=letters) for part in (singles[:3], singles[3:])]
    assert several.out == "".join(f"{answer}\n" for answer in best)
    assert [f"reward {letters(answer)}, the best of 3" in several.err for answer in best] == [True, True]


@pytest.mark.parametrize(
    ("lines", "said"),
    [("Say cat\n/sing\n", "line 2: there is no command /sing"), ("Say \udcff", "line 1: this is not UTF-8"), ("word " * 200, "shorten")],
    ids=["command", "bytes", "long"],
)  # fmt: skip
def test_a_line_that_cannot_be_answered_ends_a_script(lines, said, chat):
    answer = chat(lines)
    assert answer.code == 2 and said in answer.err


def refused(name):
    """Options that are refused before any weight is loaded, and what is said."""
    return {
        "no folder": (["--pretrain", "./nothing"], "there is no such folder"),
        "no chat template": (["--pretrain", "TEMPLATELESS", "--apply_chat_template"], "has no chat template"),
        "no judge": (["--best_of_n", "2"], "--reward_pretrain"),
        "nothing to judge": (["--reward_pretrain", "TINY"], "--best_of_n"),
        "no reward model": (["--best_of_n", "2", "--reward_pretrain", "TINY"], "no reward head"),
        "no function": (["--best_of_n", "2", "--reward_pretrain", "./none.py"], "none.py"),
        "greedy": (["--best_of_n", "2", "--reward_pretrain", "TINY", "--greedy_sampling"], "the same answer"),
        "broken template": (["--tokenizer_chat_template", "{% for %}"], "not valid Jinja"),
    }[name]


@pytest.mark.parametrize(
    "case", ["no folder", "no chat template", "no judge", "nothing to judge", "no reward model", "no function", "greedy", "broken template"]
)  # fmt: skip
def test_what_cannot_work_is_refused_before_any_weight_is_loaded(case, chat, model, tiny, monkeypatch):
    monkeypatch.setattr("rlhf_infer.talk.voice.load", lambda *given, **options: pytest.fail("weights were loaded"))
    options, said = refused(case)
    if "TEMPLATELESS" in options:
        folder = model(without=("chat_template.jinja",), tokenizer_config={"chat_template": None})
        options = [str(folder) if option == "TEMPLATELESS" else option for option in options]
    answer = chat("Say cat", *(str(tiny) if option == "TINY" else option for option in options))
    assert answer.code == 2 and said in answer.err, answer.err


class Terminal:
    """A program at a pseudo-terminal."""

    def __init__(self, command, folder):
        self.end, theirs = pty.openpty()
        # tests that run in the background ignore Ctrl-C, and would hand that on
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, start_new_session=True,
            env=os.environ | {"TERM": "dumb"}
        )  # fmt: skip
        signal.signal(signal.SIGINT, before)
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text, seconds=120):
        """Read until `text` is there; returns what came up to its end."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.end], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come within {seconds} s; it said:\n{self.seen[-500:]}"
            try:
                self.seen += os.read(self.end, 4096).decode(errors="replace")
            except OSError:  # the program has closed its end
                pytest.fail(f"{text!r} did not come; the program ended with:\n{self.seen[-500:]}")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text):
        os.write(self.end, text.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.end)


@pytest.fixture
def terminal(tmp_path):
    """Start programs at pseudo-terminals; whatever is left of them is killed."""
    opened = []

    def start(command):
        opened.append(Terminal(command, tmp_path))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_person_at_a_terminal_can_stop_an_answer_and_go_on(terminal, model):
    folder = model(config={"max_position_embeddings": 1_000_000})
    endless = ["--greedy_sampling", "--max_new_tokens", "1000000", "--max_len", "1000000"]
    there = terminal([sys.executable, "-m", "rlhf_cli", "chat", "--pretrain", str(folder), *endless])
    there.wait_for("> ")
    there.type("Say cat and dog\n")
    there.wait_for("Say cat and dog\r\n")
    there.wait_for("<|assistant|>" * 3)  # what this model says for ever
    os.kill(there.process.pid, signal.SIGINT)
    there.wait_for("[stopped]\r\n> ")
    there.type("/sing\n")
    there.wait_for("[there is no command /sing")
    there.wait_for("> ")
    there.type("/undo\n")
    there.wait_for("[taken back: Say cat and dog]\r\n> ")
    there.type("/save talk.jsonl\n")
    there.wait_for("nothing to save]\r\n> ")
    there.type("\x04")
    assert there.process.wait(timeout=60) == 0
