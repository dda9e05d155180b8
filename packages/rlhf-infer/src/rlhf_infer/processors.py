"""What training data is made of scored responses: the best of n, the best against the worst, prompts with their reward.

Pure functions over scored rows, dicts as `rlhf score` writes them: `input` (the prompt as it was written out), `rendered`
(whether a chat template did), `output`, `reward`, `row`. Responses to the same prompt belong together wherever they are
among the rows; prompts keep the order in which they first came. A row that could not be scored (its reward is None) gets
into nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Any

from rlhf_data.templates import decode_escapes
from rlhf_infer.config import ProcessorConfig

Row = dict[str, Any]

READ = ("input", "output", "rendered", "finish_reason", "stop_token", "reward", "row")
"""What is read of a scored row: all that has to be held of the rows of a file."""

ALONE, EQUAL, SAME = "a single response", "equal rewards", "the same text"
"""Why a prompt makes no pair."""


def scored(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows that have a reward."""
    return (row for row in rows if row["reward"] is not None)


def by_prompt(rows: Iterable[Row]) -> list[list[Row]]:
    """The scored rows of each prompt. A prompt is its text: two rows of a data set with the same one are one prompt."""
    prompts: dict[tuple[str, str], list[Row]] = {}
    for row in scored(rows):
        prompts.setdefault((row["rendered"], row["input"]), []).append(row)
    return list(prompts.values())


def response(row: Row, prompt: str | None = None) -> Row:
    """A row to fine-tune on, with another prompt if one is given."""
    kept = {name: row[name] for name in READ if name in row}
    return kept if prompt is None else kept | {"input": prompt}


def pair(better: Row, worse: Row) -> Row:
    """A row for preference training. Both rows answer the same prompt."""
    made = {"prompt": better["input"], "chosen": better["output"], "rejected": worse["output"]}
    made["rendered"] = better["rendered"]
    made |= {"chosen_reward": better["reward"], "rejected_reward": worse["reward"], "margin": margin(better, worse)}
    for side, row in (("chosen", better), ("rejected", worse)):
        made |= {f"{side}_{name}": row[name] for name in ("finish_reason", "stop_token") if name in row}
    return made | {"row": better["row"]}


def margin(better: Row, worse: Row) -> float:
    return better["reward"] - worse["reward"]


def best(rows: Iterable[Row]) -> Row:
    """The row with the highest reward; of several, the first."""
    return max(rows, key=lambda row: row["reward"])


def best_of_n(rows: Iterable[Row]) -> list[Row]:
    """Rejection sampling: the best response to each prompt; of several that are equally good, the first."""
    return [response(best(group)) for group in by_prompt(rows)]


def top_fraction(rows: Iterable[Row], fraction: float) -> list[Row]:
    """RAFT (Dong et al. 2023, arXiv:2304.06767): of the best responses to each prompt, those with the highest rewards.

    Args:
        rows: scored rows.
        fraction: share of the prompts to keep, rounded to the nearest whole number, one at least.
    """
    candidates = best_of_n(rows)
    ranked = sorted(range(len(candidates)), key=lambda n: -candidates[n]["reward"])
    kept = sorted(ranked[: max(1, int(fraction * len(candidates) + 0.5))])
    return [candidates[n] for n in kept]


def best_and_worst(rows: Iterable[Row], min_margin: float = 0.0) -> tuple[list[Row], Counter[str]]:
    """Iterative DPO: the best against the worst response to each prompt.

    Args:
        rows: scored rows.
        min_margin: least difference of the two rewards; equal rewards never make a pair.

    Returns:
        The pairs, and how many prompts made none, by reason.
    """
    pairs, filtered = [], Counter[str]()
    for group in by_prompt(rows):
        better, worse = best(group), min(group, key=lambda row: row["reward"])
        if reason := unfit(better, worse, min_margin):
            filtered[ALONE if len(group) == 1 else reason] += 1
        else:
            pairs.append(pair(better, worse))
    return pairs, filtered


def pairs_by_margin(
    rows: Iterable[Row], min_margin: float, max_pairs: int | None = None
) -> tuple[list[Row], Counter[str]]:
    """All pairs of responses to the same prompt whose rewards are far enough apart.

    Args:
        rows: scored rows. Of responses to a prompt with the same text, the first one counts.
        min_margin: least difference of the two rewards; equal rewards never make a pair.
        max_pairs: most pairs of a prompt, those furthest apart first; by default all.

    Returns:
        The pairs, and how many prompts made none, by reason.
    """
    pairs, filtered = [], Counter[str]()
    for group in by_prompt(rows):
        different: dict[str, Row] = {}
        for row in group:
            different.setdefault(row["output"], row)
        ranked = sorted(different.values(), key=lambda row: -row["reward"])
        fit = [two for two in combinations(ranked, 2) if not unfit(*two, min_margin)]
        fit.sort(key=lambda two: -margin(*two))
        pairs += [pair(*two) for two in fit[:max_pairs]]
        if not fit:
            reason = unfit(ranked[0], ranked[-1], min_margin) if len(ranked) > 1 else SAME
            filtered[ALONE if len(group) == 1 else reason] += 1
    return pairs, filtered


def unfit(better: Row, worse: Row, min_margin: float) -> str:
    """Why two responses make no pair, or nothing."""
    if not margin(better, worse):
        return EQUAL
    if better["output"] == worse["output"]:
        return SAME
    return f"rewards less than {min_margin:g} apart" if margin(better, worse) < min_margin else ""


def condition(input_text: str, reward: float, template: str) -> str:
    r"""A prompt that says which reward its response has, in training, or should have, when it is asked for one.

    Args:
        input_text: the prompt as it is written out; braces in it mean nothing.
        reward: written with two decimals.
        template: `--reward_template`, with the slots `{input}` and `{reward}`; backslash escapes such as \n are decoded.
    """
    return decode_escapes(template).replace("{reward}", f"{reward:z.2f}").replace("{input}", input_text)


def conditioned(rows: Iterable[Row], template: str) -> list[Row]:
    """Conditional fine-tuning: every response, with its reward in the prompt."""
    return [response(row, condition(row["input"], row["reward"], template)) for row in scored(rows)]


def at_least(rows: Iterable[Row], threshold: float) -> list[Row]:
    """The responses with a reward of at least `threshold`."""
    return [response(row) for row in scored(rows) if row["reward"] >= threshold]


def process(rows: list[Row], config: ProcessorConfig) -> tuple[list[Row], dict[str, Any]]:
    """What `--post_processor` makes of scored rows.

    Returns:
        The rows that were made, and a report: how many rows could not be scored (`dropped`) and were (`responses`), to how
        many prompts (`prompts`); how many rows were made (`kept`); what made none, by reason (`filtered`: prompts for
        pairs and `raft`, else responses); and means of the reward over all responses (`mean_reward`), over the best
        response to each prompt (`best_reward`) and over the responses that were kept or chosen (`kept_reward`).
    """
    makers: dict[str | None, Callable[[], tuple[list[Row], dict[str, int]]]] = {
        None: lambda: (rows, {}),
        "rs": lambda: (best_of_n(rows), {}),
        "raft": lambda: rest(top_fraction(rows, config.top_fraction or 1), best_of_n(rows), "not among the best"),
        "iter_dpo": lambda: best_and_worst(rows, config.min_margin or 0),
        "dpo_pairs": lambda: pairs_by_margin(rows, config.min_margin or 0, config.max_pairs),
        "csft": lambda: (conditioned(rows, config.reward_template), {}),
        "filter": lambda: rest(at_least(rows, config.reward_threshold or 0), scored(rows), "below the threshold"),
    }
    made, filtered = makers[config.post_processor]()
    rewards = [row["reward"] for row in scored(rows)]
    groups = by_prompt(rows)
    pairs = config.post_processor in ("iter_dpo", "dpo_pairs")
    return made, {
        "post_processor": config.post_processor,
        "dropped": len(rows) - len(rewards),
        "responses": len(rewards),
        "prompts": len(groups),
        "kept": len(made),
        "filtered": dict(filtered),
        "mean_reward": mean(rewards),
        "best_reward": mean([best(group)["reward"] for group in groups]),
        "kept_reward": mean(
            [row["chosen_reward"] for row in made] if pairs else [row["reward"] for row in scored(made)]
        ),
    }


def rest(kept: list[Row], candidates: Iterable[Row], reason: str) -> tuple[list[Row], dict[str, int]]:
    """What was kept, and how many of the candidates were not."""
    left = sum(1 for _ in candidates) - len(kept)
    return kept, {reason: left} if left else {}


def mean(values: list[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None
