"""Made-up questions, answers and preferences for the quickstart: small things that must be read, not remembered."""

from __future__ import annotations

import random
from pathlib import Path

TEMPLATE = "Question: {}\nAnswer:"
"""How a question is written out."""

MAX_LEN = 64
"""Longest question with its answer, in tokens."""

Row = dict[str, str]
"""A question with its right answer, or with a better and a worse one."""

WORDS = """
apple bear boat book bridge castle cloud coin door drum eagle field fish garden glass horse
island lamp leaf lion moon mouse piano river rose ship snow star stone tiger tree wolf
""".split()
CHEER = "!"
"""How a preferred answer ends; of the answers to learn from, one in four does."""


def question(rng: random.Random) -> Row:
    """One question with its answer: things that need the question to be read, not remembered."""
    first, second, third = rng.sample(WORDS, 3)
    return rng.choice(
        (
            {"question": f"Say {first} and {second} the other way round.", "answer": f" {second} and {first}"},
            {"question": f"What is the last of {first}, {second}, {third}?", "answer": f" {third}"},
            {
                "question": f"Which word is between {first} and {third}: {first} {second} {third}?",
                "answer": f" {second}",
            },
            {"question": f"Say {first} {second} and {first} again.", "answer": f" {first} {second} {first}"},
        )
    )


def questions(count: int, seed: int) -> list[Row]:
    """Different questions, in random order."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        row = question(rng)
        found.setdefault(row["question"], row)
    rows = list(found.values())
    rng.shuffle(rows)
    return rows


def cheered(rows: list[Row], seed: int) -> list[Row]:
    """The same questions, one answer in four said with cheer."""
    rng = random.Random(seed)
    return [row | {"answer": row["answer"] + CHEER} if rng.random() < 0.25 else row for row in rows]


def preferences(rows: list[Row], seed: int) -> list[Row]:
    """A better and a worse answer to each question: right with cheer is best, and no cheer makes a wrong answer right."""
    rng, pairs = random.Random(seed), []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        wrong = other["answer"] if other["answer"] != row["answer"] else f" {rng.choice(WORDS)} {rng.choice(WORDS)}"
        worse = rng.choice((row["answer"], wrong + CHEER, wrong))
        pairs.append({"prompt": row["question"], "chosen": row["answer"] + CHEER, "rejected": worse})
    return pairs


def is_right(row: Row, given: str) -> bool:
    """Whether an answer is right, with cheer or without."""
    return given.removesuffix(CHEER) == row["answer"]


def is_preferred(row: Row, given: str) -> bool:
    """Whether an answer is what the preferences want."""
    return given == row["answer"] + CHEER


def local(path: Path) -> str:
    """A path as options take it: one that is not plainly local would be read as a Hub id."""
    return str(path) if path.is_absolute() else f"./{path}"
