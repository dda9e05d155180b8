"""What a recipe tells about itself: the numbers of each iteration, a table of them, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a JSON lines file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def scored_file(folder: Path, name: str = "score") -> Path:
    """Where all scored rows of a step are: beside what its post-processor made, or, without one, in its output."""
    beside = folder / f"{name}.jsonl.scored.jsonl"
    return beside if beside.exists() else folder / f"{name}.jsonl"


def own_reward(row: Row) -> float:
    """The scorer's own number, also where `--normalize_reward` gave another."""
    return row.get("raw_reward", row["reward"])


def reward_numbers(rows: Iterable[Row]) -> dict[str, Any]:
    """Responses, prompts, and means of the reward over all responses and over the best response to each prompt."""
    total, responses, best = 0.0, 0, {}
    for row in rows:
        if row["reward"] is None:
            continue
        reward, prompt = own_reward(row), (row["rendered"], row["input"])
        total, responses = total + reward, responses + 1
        best[prompt] = max(best.get(prompt, reward), reward)
    return {
        "prompts": len(best),
        "responses": responses,
        "mean_reward": total / responses if responses else None,
        "best_reward": sum(best.values()) / len(best) if best else None,
    }


def length_numbers(rows: Iterable[Row]) -> dict[str, Any]:
    """Mean length of responses in tokens, and the share that was cut off."""
    tokens, cut, responses = 0, 0, 0
    for row in rows:
        responses += 1
        tokens += len(row["output_ids"])
        cut += row["finish_reason"] == "length"
    return {"tokens": tokens / responses, "cut_off": cut / responses} if responses else {}


def mean_loss(trained: Path) -> float | None:
    """Mean training loss over the logged steps of a run."""
    losses = [row["loss"] for row in rows_of(trained / "run/metrics.jsonl") if "loss" in row]
    return sum(losses) / len(losses) if losses else None


def iteration_numbers(folder: Path) -> Row:
    """What came out of an iteration, read from its files."""
    numbers = reward_numbers(rows_of(scored_file(folder))) | {"kept": count(folder / "score.jsonl")}
    if (folder / "generate.jsonl").exists():
        numbers |= length_numbers(rows_of(folder / "generate.jsonl"))
    return numbers | {"loss": mean_loss(folder / ("adapter" if (folder / "adapter").exists() else "model"))}


def answer_numbers(folder: Path, number: int, reward: float) -> Row:
    """What the model answered when it was asked for a reward."""
    rewards = reward_numbers(rows_of(scored_file(folder, f"ask-{number}-score")))
    return {"asked": reward} | rewards | length_numbers(rows_of(folder / f"ask-{number}-generate.jsonl"))


COLUMNS = {
    "prompts": ("prompts", "{:,}"),
    "responses": ("responses", "{:,}"),
    "mean_reward": ("mean reward", "{:.4g}"),
    "best_reward": ("best reward", "{:.4g}"),
    "kept": ("trained on", "{:,}"),
    "tokens": ("response length", "{:.1f}"),
    "cut_off": ("cut off", "{:.0%}"),
    "loss": ("training loss", "{:.4g}"),
}
"""What is shown of an iteration: title and format, by key."""

NOTES = {
    "rejection-sampling": "Rewards are of what the policy wrote in that iteration, before it was trained in it. ",
    "iterative-dpo": "Rewards are of what the policy wrote in that iteration, before it was trained in it. ",
    "conditional-sft": "",
}


def report(recipe: str, history: list[Row], normalised: bool) -> str:
    """The report in Markdown."""
    lines = [f"# {recipe}", "", table("iteration", [(str(n), row) for n, row in enumerate(history)]), ""]
    asked = [(f"{row['asked']:z.2f}", row) for done in history for row in done.get("asked", [])]
    if asked:
        lines += ["What the trained model answered when it was asked for a reward:", "", table("asked for", asked), ""]
    note = NOTES[recipe]
    if normalised:
        note += "Rewards are the scorer's own; those asked for, and trained on, are normalised. "
    note += "Best reward: mean of the best response to each prompt. Lengths are in tokens."
    return "\n".join([*lines, note, ""])


def table(first: str, rows: list[tuple[str, Row]]) -> str:
    """A Markdown table that can also be read as it is."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for _, row in rows)]
    cells = [[first, *(COLUMNS[key][0] for key in keys)]]
    cells += [[name, *(cell(key, row.get(key)) for key in keys)] for name, row in rows]
    widths = [max(len(line[n]) for line in cells) for n in range(len(keys) + 1)]
    cells.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(
        "| " + " | ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    )


def cell(key: str, value: Any) -> str:
    return "" if value is None else COLUMNS[key][1].format(value)


def picture(recipe: str, history: list[Row], path: Path) -> None:
    """Draw the numbers of the table over the iterations, or over the rewards that were asked for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    asked = [row for done in history for row in done.get("asked", [])]
    rows, places, label = (
        (asked, [row["asked"] for row in asked], "reward asked for")
        if asked
        else (history, list(range(len(history))), "iteration")
    )
    keys = [key for key in ("mean_reward", "best_reward", "tokens", "loss") if any(key in row for row in rows)]
    figure, panels = pyplot.subplots(1, len(keys), figsize=(4 * len(keys), 3.5), layout="constrained", squeeze=False)
    for axes, key in zip(panels[0], keys, strict=True):
        axes.plot(places, [row.get(key) for row in rows], "o-")
        axes.set(title=COLUMNS[key][0] + (" (tokens)" if key == "tokens" else ""), xlabel=label)
        axes.grid(alpha=0.3)
        if not asked:
            axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(recipe)
    part = path.with_name(f".{path.name}")
    figure.savefig(part, dpi=120, format="png")
    part.replace(path)
    pyplot.close(figure)
