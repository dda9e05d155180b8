"""Made-up questions, answers and preferences for the quickstart: small things that must be read, not remembered."""

from __future__ import annotations

import random

WORDS = """
apple bear boat book bridge castle cloud coin door drum eagle field fish garden glass horse
island lamp leaf lion moon mouse piano river rose ship snow star stone tiger tree wolf
""".split()
CHEER = "!"
"""How a preferred answer ends; of the answers to learn from, one in four does."""


def question(rng: random.Random) -> dict[str, str]:
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


def questions(count: int, seed: int) -> list[dict[str, str]]:
    """Different questions, in random order."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        row = question(rng)
        found.setdefault(row["question"], row)
    rows = list(found.values())
    rng.shuffle(rows)
    return rows


def cheered(rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """The same questions, one answer in four said with cheer."""
    rng = random.Random(seed)
    return [row | {"answer": row["answer"] + CHEER} if rng.random() < 0.25 else row for row in rows]


def preferences(rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """A better and a worse answer to each question: right with cheer is best, and no cheer makes a wrong answer right."""
    rng, pairs = random.Random(seed), []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        wrong = other["answer"] if other["answer"] != row["answer"] else f" {rng.choice(WORDS)} {rng.choice(WORDS)}"
        worse = rng.choice((row["answer"], wrong + CHEER, wrong))
        pairs.append({"prompt": row["question"], "chosen": row["answer"] + CHEER, "rejected": worse})
    return pairs


def is_right(row: dict[str, str], given: str) -> bool:
    """Whether an answer is right, with cheer or without."""
    return given.removesuffix(CHEER) == row["answer"]


def is_preferred(row: dict[str, str], given: str) -> bool:
    """Whether an answer is what the preferences want."""
    return given == row["answer"] + CHEER
