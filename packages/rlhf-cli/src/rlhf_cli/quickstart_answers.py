"""What the quickstart's models answer to questions that were held out, and how good that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.quickstart_data import CHEER, MAX_LEN, TEMPLATE, Row, is_preferred, is_right, local

DRAWS = 8
"""Answers that the reward model chooses from."""

Judge = Callable[[list[Row], list[str]], list[float]]
"""From questions and an answer to each to rewards."""


def encoder_of(tokenizer: Any) -> Any:
    from rlhf_data.encode import EncodeOptions, Encoder

    return Encoder(tokenizer, EncodeOptions(max_len=MAX_LEN, input_template=TEMPLATE))


def answer(model_folder: Path, rows: list[Row], seed: int | None, count: int = 1) -> list[list[str]]:
    """Answers of the model to each question: drawn at random, or without a seed the most probable one."""
    from rlhf_data.rows import Pair
    from rlhf_data.tokenizer import load_tokenizer
    from rlhf_infer.config import SamplingConfig
    from rlhf_infer.engines.engine import answer_all
    from rlhf_infer.engines.transformers import TransformersEngine, load

    tokenizer: Any = load_tokenizer(str(model_folder))
    prompts = [prompt.ids for prompt in encoder_of(tokenizer).prompts([Pair(row["question"], "") for row in rows])]
    engine = TransformersEngine(load(local(model_folder)), [tokenizer.eos_token_id], micro_batch_size=64)
    sampling = SamplingConfig(max_new_tokens=8, best_of_n=count, greedy_sampling=seed is None)
    return [
        [tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in some]
        for some in answer_all(engine, prompts, sampling, seed or 0)
    ]


def most_probable(model_folder: Path, rows: list[Row]) -> list[str]:
    """What the model answers to each question, greedily."""
    return [given for (given,) in answer(model_folder, rows, None)]


def judge_of(model_folder: Path) -> Judge:
    """A function from questions and an answer to each to the rewards of a reward model; no text gets the least."""
    from rlhf_data.rows import Pair, RowError
    from rlhf_infer.rewards.scorer import Answer, ScorerOptions, make_scorer, tokenizer_of

    options = ScorerOptions(pretrain=local(model_folder), micro_batch_size=64)
    scorer, encoder = make_scorer(options), encoder_of(tokenizer_of(options))

    def judge(rows: list[Row], answers: list[str]) -> list[float]:
        pairs = [Pair(row["question"], given) for row, given in zip(rows, answers, strict=True)]
        samples = {n: found[0] for n, found in enumerate(encoder.encode(pairs)) if not isinstance(found, RowError)}
        given = scorer.score(
            [Answer(pairs[n].prompt, pairs[n].response, sample=sample) for n, sample in samples.items()]
        )
        rewards = dict(zip(samples, given, strict=True))
        return [rewards.get(n, float("-inf")) for n in range(len(pairs))]

    return judge


def answers_table(rows: list[Row], before: list[str], after: list[str]) -> str:
    """Some answers before and after, and the accuracy on all held-out questions."""

    def accuracy(answers: list[str]) -> float:
        return sum(map(is_right, rows, answers)) / len(rows)

    def mark(row: Row, given: str) -> str:
        return f"{'right' if is_right(row, given) else 'wrong'} {given!r}"

    lines = ["", f"   Answers to questions that were held out ({len(rows)} of them)", ""]
    for row, was, now in list(zip(rows, before, after, strict=True))[:6]:
        lines += [f"   {row['question']}", f"      before  {mark(row, was)}", f"      after   {mark(row, now)}"]
    return "\n".join([*lines, "", f"   held-out accuracy: {accuracy(before):.0%} before, {accuracy(after):.0%} after"])


@dataclass(frozen=True)
class Way:
    """A way of answering the held-out questions, and what became of it."""

    name: str

    answers: list[str]

    rewards: list[float]
    """Of each answer, by the reward model; -inf without any text."""

    reward: float
    """Mean of those that have any text; NaN if none has."""

    wins: float
    """Share of comparisons with another answer of the fine-tuned model; ties count as half."""

    preferred: float
    """Share of answers that are right, in the preferred style."""

    right: float
    """Share of answers that are right."""


def compare(sft: Path, rm: Path, trained: Mapping[str, Path], rows: list[Row], seed: int) -> list[Way]:
    """One answer drawn from each model, and the best of several by the reward model, to the same questions.

    Args:
        sft: the fine-tuned model.
        rm: the reward model.
        trained: what became of the fine-tuned model, by a name for it.
        rows: the questions.
        seed: of the answers.
    """
    judge = judge_of(rm)
    several = answer(sft, rows, seed + 2, DRAWS)
    ways = {"one answer": [some[0] for some in several], f"best of {DRAWS}": best(rows, several, judge)}
    ways |= {name: [some[0] for some in answer(model, rows, seed + 2)] for name, model in trained.items()}
    theirs = judge(rows, [some[0] for some in answer(sft, rows, seed + 1)])
    return [way_of(name, given, judge(rows, given), theirs, rows) for name, given in ways.items()]


def way_of(name: str, given: list[str], rewards: list[float], theirs: list[float], rows: list[Row]) -> Way:
    said = [reward for reward in rewards if math.isfinite(reward)]
    wins = sum((ours > other) + 0.5 * (ours == other) for ours, other in zip(rewards, theirs, strict=True))
    return Way(
        name,
        given,
        rewards,
        reward=sum(said) / len(said) if said else math.nan,
        wins=wins / len(rows),
        preferred=sum(map(is_preferred, rows, given)) / len(rows),
        right=sum(map(is_right, rows, given)) / len(rows),
    )


def comparison(ways: list[Way], rows: list[Row]) -> str:
    """The table of the whole pipeline, for the terminal."""
    lines = [
        "",
        f"   Answers drawn at random to {len(rows)} held-out questions: one, the best of {DRAWS} by the reward model, and one",
        "   after each way of learning from preferences; against others of the fine-tuned model",
        "",
    ]
    for number, row in enumerate(rows[:4]):
        lines += [f"   {row['question']}", *(f"      {way.name:10}  {way.answers[number]!r}" for way in ways)]
    lines.append("")
    lines += [
        f"   {way.name:10}  wins {way.wins:4.0%} by the reward model;  reward {way.reward:5.2f};  "
        f"{way.preferred:4.0%} right with a {CHEER},  {way.right:4.0%} right"
        for way in ways
    ]
    return "\n".join(lines)


def best(rows: list[Row], several: list[list[str]], judge: Judge) -> list[str]:
    """Of as many answers to each question, the one that is judged best."""
    rewards = iter(judge([row for row in rows for _ in several[0]], [given for some in several for given in some]))
    return [max((next(rewards), -n, given) for n, given in enumerate(some))[2] for some in several]
