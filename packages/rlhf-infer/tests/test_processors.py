"""Post-processors: pure functions over scored rows, each with the cases that go wrong elsewhere."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from rlhf_infer.config import REWARD_TEMPLATE, ProcessorConfig
from rlhf_infer.processors import (
    at_least,
    best_and_worst,
    best_of_n,
    condition,
    conditioned,
    pairs_by_margin,
    process,
    top_fraction,
)


def row(prompt: str, output: str, reward: float | None, number: int = 0, **more: Any) -> dict[str, Any]:
    """A row as `rlhf score` writes it."""
    scored = {"row": number, "input": prompt, "output": output, "rendered": "text", "reward": reward}
    return scored | ({"dropped": "no response"} if reward is None else {}) | more


ROWS = [
    row("p", "one", 0.5, 0, sample=0, finish_reason="stop", logp=-3.0),
    row("q", "two", -1.0, 1, finish_reason="stop"),
    row("p", "three", 2.0, 0, sample=1, finish_reason="length"),
    row("p", "four", None),
    row("q", "five", -0.5, 1, finish_reason="stop"),
    row("p", "six", 2.0, 0, finish_reason="stop"),
    row("r", "seven", 1.0, 2, finish_reason="stop"),
]
"""Three prompts, interleaved; a tie for the best of the first; one row without a reward."""


def outputs(rows: list[dict[str, Any]]) -> list[str]:
    return [made["output"] for made in rows]


def test_the_best_of_n_is_the_first_of_the_best_wherever_its_prompt_comes_back():
    assert best_of_n(ROWS) == [
        {"input": "p", "output": "three", "rendered": "text", "finish_reason": "length", "reward": 2.0, "row": 0},
        {"input": "q", "output": "five", "rendered": "text", "finish_reason": "stop", "reward": -0.5, "row": 1},
        {"input": "r", "output": "seven", "rendered": "text", "finish_reason": "stop", "reward": 1.0, "row": 2},
    ]


def test_the_same_text_is_another_prompt_when_a_chat_template_wrote_it():
    rows = [row("p", "one", 0.0), row("p", "two", 1.0, rendered="chat")]
    assert outputs(best_of_n(rows)) == ["one", "two"]


def test_the_order_of_the_rows_changes_which_prompt_comes_first_and_nothing_else():
    forward, backward = best_and_worst(ROWS)[0], best_and_worst(ROWS[::-1])[0]
    assert {made["prompt"]: made["rejected"] for made in forward} == {
        made["prompt"]: made["rejected"] for made in backward
    }
    assert [made["prompt"] for made in backward] == ["p", "q"]
    assert backward[0]["chosen"] == "six", "the first of two that are equally good"


@pytest.mark.parametrize(("fraction", "kept"), [(1, "1 2 3 4"), (0.5, "3 4"), (0.4, "3 4"), (0.25, "4"), (0.01, "4")])
def test_raft_keeps_the_best_prompts_in_their_order_and_one_at_least(fraction, kept):
    rows = [row(str(n), str(n), float(n), n) for n in (1, 2, 3, 4)]
    rows += [row(str(n), "worse", -9.0, n) for n in (1, 2, 3, 4)]
    assert outputs(top_fraction(rows, fraction)) == kept.split()


def test_of_equally_good_prompts_raft_keeps_the_first():
    assert outputs(top_fraction([row("a", "1", 1.0), row("b", "2", 1.0)], 0.5)) == ["1"]


def test_best_and_worst_are_a_pair_with_everything_training_needs():
    pairs, filtered = best_and_worst(ROWS)
    assert pairs[0] == {
        "prompt": "p", "chosen": "three", "rejected": "one", "rendered": "text", "chosen_reward": 2.0, "rejected_reward": 0.5,
        "margin": 1.5, "chosen_finish_reason": "length", "rejected_finish_reason": "stop", "row": 0,
    }  # fmt: skip
    assert filtered == {"a single response": 1}


def test_prompts_that_make_no_pair_are_counted_by_reason():
    rows = [
        row("alone", "x", 1.0), row("dropped", "x", 1.0), row("dropped", "y", None),
        row("equal", "x", 1.0), row("equal", "y", 1.0),
        row("same", "x", 1.0), row("same", "x", 1.0 + 1e-7),
        row("near", "x", 1.0), row("near", "y", 1.4),
        row("far", "x", 1.0), row("far", "y", 1.5),
    ]  # fmt: skip
    pairs, filtered = best_and_worst(rows, min_margin=0.5)
    assert [made["prompt"] for made in pairs] == ["far"]
    assert filtered == {
        "a single response": 2,
        "equal rewards": 1,
        "the same text": 1,
        "rewards less than 0.5 apart": 1,
    }
    assert pairs_by_margin(rows, 0.5) == (pairs, filtered)


def test_pairs_by_margin_are_all_that_are_far_enough_apart_the_furthest_first():
    rows = [row("p", name, reward) for name, reward in (("a", 1.0), ("b", 3.0), ("c", 0.0), ("b", 2.5), ("d", 1.0))]
    pairs, filtered = pairs_by_margin(rows, 1.0)
    made = [(pair["chosen"], pair["rejected"], pair["margin"]) for pair in pairs]
    assert made == [("b", "c", 3.0), ("b", "a", 2.0), ("b", "d", 2.0), ("a", "c", 1.0), ("d", "c", 1.0)]
    assert not filtered
    assert pairs_by_margin(rows, 1.0, max_pairs=2)[0] == pairs[:2]


def test_equal_rewards_make_no_pair_also_without_a_margin():
    rows = [row("p", "a", 1.0), row("p", "b", 1.0)]
    assert best_and_worst(rows, 0.0) == pairs_by_margin(rows, 0.0) == ([], {"equal rewards": 1})


@pytest.mark.parametrize(
    ("prompt", "reward", "template", "text"),
    [
        ("Hello", 1.005, REWARD_TEMPLATE, "Hello <rm_score>: 1.00 "),
        ("Hello", -0.001, REWARD_TEMPLATE, "Hello <rm_score>: 0.00 "),
        ("Hello", -1.5, REWARD_TEMPLATE, "Hello <rm_score>: -1.50 "),
        ("a {reward} and {input} and {0}", 2, REWARD_TEMPLATE, "a {reward} and {input} and {0} <rm_score>: 2.00 "),
        ("p", 12345.678, "[{reward}] {input}", "[12345.68] p"),
        ("p\\n", 0.0, r"{input}\n{reward}:\t{x}", "p\\n\n0.00:\t{x}"),
    ],
)
def test_a_prompt_is_conditioned_by_plain_replacement_with_two_decimals(prompt, reward, template, text):
    assert condition(prompt, reward, template) == text


def test_conditional_rows_differ_from_scored_ones_in_their_prompt_only():
    made = conditioned(ROWS, REWARD_TEMPLATE)
    assert [one["input"] for one in made[:2]] == ["p <rm_score>: 0.50 ", "q <rm_score>: -1.00 "]
    kept = [one for one in ROWS if one["reward"] is not None]
    assert [one | {"input": ""} for one in made] == [
        {name: one[name] for name in ("output", "rendered", "finish_reason", "reward", "row")} | {"input": ""}
        for one in kept
    ]


def test_a_threshold_keeps_what_reaches_it():
    assert outputs(at_least(ROWS, 1.0)) == ["three", "six", "seven"]


PROCESSORS = {
    "rs": {}, "raft": {"top_fraction": 0.5}, "iter_dpo": {}, "dpo_pairs": {"min_margin": 0.4}, "csft": {},
    "filter": {"reward_threshold": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_leaves_its_rows_alone_and_makes_plain_json(name):
    rows = copy.deepcopy(ROWS)
    made, report = process(rows, ProcessorConfig(post_processor=name, **PROCESSORS[name]))
    assert rows == ROWS
    assert json.loads(json.dumps([made, report])) == [made, report]
    assert report["kept"] == len(made) > 0 and report["post_processor"] == name


@pytest.mark.parametrize("name", [None, *PROCESSORS])
def test_nothing_but_dropped_rows_makes_nothing(name):
    config = ProcessorConfig(post_processor=name, **PROCESSORS.get(name, {}))
    made, report = process([row("p", "one", None)], config)
    assert [one for one in made if one["reward"] is not None] == []
    assert (report["dropped"], report["responses"], report["prompts"], report["mean_reward"]) == (1, 0, 0, None)


@pytest.mark.parametrize(
    ("name", "filtered", "kept", "reward"),
    [
        (None, {}, 7, 4 / 6),
        ("rs", {}, 3, 2.5 / 3),
        ("raft", {"not among the best": 1}, 2, 1.5),
        ("iter_dpo", {"a single response": 1}, 2, 0.75),
        ("dpo_pairs", {"a single response": 1}, 3, 3.5 / 3),
        ("csft", {}, 6, 4 / 6),
        ("filter", {"below the threshold": 3}, 3, 5 / 3),
    ],
)
def test_the_report_counts_what_was_kept_and_what_was_not(name, filtered, kept, reward):
    _, report = process(ROWS, ProcessorConfig(post_processor=name, **PROCESSORS.get(name, {})))
    assert report == {
        "post_processor": name, "dropped": 1, "responses": 6, "prompts": 3, "kept": kept, "filtered": filtered,
        "mean_reward": pytest.approx(4 / 6), "best_reward": pytest.approx(2.5 / 3), "kept_reward": pytest.approx(reward),
    }  # fmt: skip
