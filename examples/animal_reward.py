"""A reward function: how many different animals a story names, at most three.

rlhf score --pretrain examples/animal_reward.py --dataset ./generate.jsonl --output_path scored.jsonl
"""

from __future__ import annotations

import re

ANIMALS = set(
    """ant bear bee bird bug bunny butterfly cat chicken cow crab crocodile deer dog dolphin dragon duck elephant fish fly fox
    frog giraffe goat goose hen horse kitten kitty lion lizard monkey mouse octopus owl parrot penguin pig pony puppy rabbit
    rat shark sheep snail snake spider squirrel swan tiger turtle whale wolf worm zebra""".split()
)


def reward(responses: list[str]) -> list[float]:
    """One number per response, from 0 to 3."""
    return [float(min(3, len(animals_in(response)))) for response in responses]


def animals_in(text: str) -> set[str]:
    words = re.findall(r"[a-z]+", text.lower())
    return {singular for word in words for singular in (word, word.removesuffix("s")) if singular in ANIMALS}
