"""Talking in a terminal, or line by line in a script: commands, what is shown and what is noted."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TextIO

from rlhf_data.errors import InputError
from rlhf_infer.engines.engine import sample_seed
from rlhf_infer.talk.dialogue import Dialogue, Ending, Exchange, latest_that_fit, printable

if TYPE_CHECKING:
    from rlhf_data.encode import Prompt


class Choice(NamedTuple):
    """The best of several answers."""

    text: str
    ending: Ending
    rewards: list[float]
    """Of all answers that have one, in any order."""


class Voice(Protocol):
    """What answers."""

    best_of_n: int
    greedy: bool
    max_new_tokens: int
    limit: int
    """Longest conversation with its answer, in tokens."""
    limit_name: str
    """What sets it."""

    def write_out(self, system: str, exchanges: Sequence[Exchange], prompt: str) -> Prompt:
        """The conversation as the model reads it."""
        ...

    def stream(self, asked: Prompt, room: int, seed: int) -> Iterator[tuple[str, Ending | None]]:
        """An answer of at most `room` tokens as it is written, piece by piece; how it ended comes with the last piece."""
        ...

    def best(self, asked: Prompt, room: int, seed: int) -> Choice:
        """The best of `best_of_n` answers, each of at most `room` tokens; answer k is drawn with `seed + k`."""
        ...


HELP = """/help         this
/clear        forget the conversation (also: clear)
/system TEXT  give another system prompt; without TEXT, none
/undo         take back the last prompt and its answer
/again        another answer to the last prompt
/save FILE    append the conversation to FILE, as a row with `messages`
/exit         leave (also: exit, Ctrl-D)
Ctrl-C stops an answer. A prompt that begins with / is written with two."""


class Talk:
    """A conversation with a voice: what is said to it is answered, or done if it is a command.

    Answers go to `out`; whatever else is to be said goes to `notes`.

    Args:
        voice: what answers.
        system: system prompt, "" for none.
        seed: of the answers.
        at_terminal: a person is there: what cannot be done is said, and Ctrl-C stops an answer; otherwise both end it all.
        out: where answers go.
        notes: where notes go.
    """

    def __init__(
        self,
        voice: Voice,
        system: str,
        seed: int,
        *,
        at_terminal: bool,
        out: TextIO | None = None,
        notes: TextIO | None = None,
    ) -> None:
        self.voice, self.seed, self.at_terminal = voice, seed, at_terminal
        self.out, self.notes = out or sys.stdout, notes or sys.stderr
        self.dialogue = Dialogue(system)
        self.told_of_limit = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.note(HELP), "/clear": self.clear, "/system": self.change_system, "/undo": self.undo,
            "/again": self.again, "/save": self.save,
        }  # fmt: skip

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line, until there is none or one says `exit`.

        Raises:
            InputError: a line cannot be answered or done, and nobody is there to be told.
        """
        for number, line in enumerate(lines, start=1):
            said = line.strip()
            if said in ("exit", "/exit"):
                break
            try:
                self.take(said)
            except InputError as error:
                if not self.at_terminal:
                    raise InputError(f"line {number}: {error}") from error
                self.note(str(error))

    def take(self, said: str) -> None:
        """Answer a prompt, or do what a command says.

        Raises:
            InputError: it cannot be answered or done.
        """
        try:
            said.encode()
        except UnicodeEncodeError:
            raise InputError("this is not UTF-8 text") from None
        if said == "clear":
            said = "/clear"
        if said.startswith("//"):
            self.answer(said[1:])
        elif said.startswith("/"):
            name, _, argument = said.partition(" ")
            if name not in self.commands:
                raise InputError(
                    f"there is no command {name}; /help names those there are, and // begins a prompt with /"
                )
            self.commands[name](argument.strip())
        elif said:
            self.answer(said)

    def clear(self, _: str) -> None:
        self.dialogue.exchanges.clear()
        self.told_of_limit = False
        self.note("forgotten")

    def change_system(self, text: str) -> None:
        self.dialogue.system = text
        self.note("the system prompt is changed" if text else "no system prompt")

    def undo(self, _: str) -> None:
        self.note(f"taken back: {printable(self.dialogue.undo().prompt)}")

    def again(self, _: str) -> None:
        if self.voice.greedy:
            raise InputError("--greedy_sampling would give the same answer again: start without it")
        last, answered = self.dialogue.undo(), False
        try:
            answered = self.answer(last.prompt, last.tries + 1)
        finally:
            if not answered:
                self.dialogue.exchanges.append(last)

    def save(self, name: str) -> None:
        if not name:
            raise InputError("/save needs the name of a file")
        self.dialogue.save(Path(name))
        cut = sum(exchange.ending != "stop" for exchange in self.dialogue.exchanges)
        rest = f"; {cut} of the answers were cut off or stopped, and training would end them there" if cut else ""
        self.note(f"{len(self.dialogue.exchanges)} exchange(s) appended to {name}{rest}")

    def answer(self, prompt: str, tries: int = 0) -> bool:
        """Answer a prompt and remember it, unless it is stopped before there is anything to remember.

        Args:
            prompt: what was said.
            tries: how many answers to it were thrown away.

        Returns:
            Whether there is an answer.
        """
        voice = self.voice
        asked, left_out = latest_that_fit(
            self.dialogue.exchanges, prompt, partial(voice.write_out, self.dialogue.system), voice.limit,
            reserve=min(voice.max_new_tokens, voice.limit // 2),
        )  # fmt: skip
        if left_out and not self.told_of_limit:
            self.told_of_limit = True
            self.note(
                f"the conversation is longer than {voice.limit} tokens ({voice.limit_name}) with its answer: from now on the "
                "oldest exchanges are left out of what the model sees"
            )
        room = min(voice.max_new_tokens, voice.limit - len(asked.ids))
        seed = sample_seed(self.seed, len(self.dialogue.exchanges)) + tries * voice.best_of_n
        text, ending = (self.choose if voice.best_of_n > 1 else self.stream)(asked, room, seed)
        if ending == "interrupted" and not text:
            self.note("stopped")
            return False
        self.dialogue.exchanges.append(Exchange(prompt, text, ending, tries))
        if ending == "interrupted":
            self.note("stopped")
        elif ending == "length":
            self.note(
                "cut at --max_new_tokens" if room == voice.max_new_tokens else f"cut at the end of {voice.limit_name}"
            )
        elif not text.strip():
            self.note("the answer is empty")
        return True

    def stream(self, asked: Prompt, room: int, seed: int) -> tuple[str, Ending]:
        """An answer, shown as it is written; stopped, as far as it got."""
        text = ""
        ending: Ending = "interrupted"
        try:
            for piece, end in self.voice.stream(asked, room, seed):
                text, ending = text + piece, end or ending
                self.show(piece)
        except KeyboardInterrupt:
            if not self.at_terminal:
                raise
        self.show("\n")
        return text, ending

    def choose(self, asked: Prompt, room: int, seed: int) -> tuple[str, Ending]:
        """The best of several answers; stopped, there is none."""
        self.note(f"writing {self.voice.best_of_n} answers")
        try:
            choice = self.voice.best(asked, room, seed)
        except KeyboardInterrupt:
            if not self.at_terminal:
                raise
            return "", "interrupted"
        self.show(choice.text + "\n")
        self.note(spread(choice.rewards))
        return choice.text, choice.ending

    def show(self, text: str) -> None:
        self.out.write(printable(text))
        self.out.flush()

    def note(self, text: str) -> None:
        lines = text.splitlines()
        print(f"[{text}]" if len(lines) == 1 else text, file=self.notes, flush=True)


def spread(rewards: Sequence[float]) -> str:
    """Rewards of several answers, for people."""
    if not rewards:
        return "no answer has any text, so there is no reward"
    mean = sum(rewards) / len(rewards)
    return f"reward {max(rewards):.3g}, the best of {len(rewards)} (mean {mean:.3g}, least {min(rewards):.3g})"


def typed_lines() -> Iterator[str]:
    """What a person types, until Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` line editing and a history, where Python has it)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
