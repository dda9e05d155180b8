"""The report of a run: its record as one HTML page, with curves and samples. It needs no browser, network or library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_core.chart import figure, line_chart
from rlhf_core.html import Html, folded, page, section, table, tag

Row = dict[str, Any]

COUNTERS = ("step", "rollout", "epoch", "tokens", "samples")
"""Keys that say where in the run a row is."""

FIRST = (
    "reward", "loss", "accuracy", "reward_margin", "kl", "response_length", "entropy", "policy_loss", "value_loss",
    "kd_loss",
)  # fmt: skip
"""Metrics that are drawn first, in this order; the others are folded away."""

EVALUATION = "eval_"
"""What names of metrics on held-out data begin with; they are drawn with those of training."""

SHOWN_SAMPLES = 8


def write_report(folder: Path, title: str | None = None) -> Path:
    """Make `report.html` of the record of a run, beside it; one that is there is replaced, whole or not at all.

    It shows what is there: of `metrics.jsonl` the first and last value of every metric and its curve; of `samples.jsonl`,
    if there is one, the first and the last samples side by side, best reward first; of `config.json` and
    `environment.json` the options and versions.

    Args:
        folder: the record, `save_path/run`.
        title: of the page; by default the name of the save path.

    Returns:
        The page.

    Raises:
        FileNotFoundError: there is no `metrics.jsonl`.
    """
    rows = list(rows_of(folder / "metrics.jsonl"))
    title = title or f"Run {folder.absolute().parent.name}"
    parts = [tag("p", progress(rows), class_="soft"), *curves(rows)]
    if (folder / "samples.jsonl").exists():
        parts.append(samples(folder / "samples.jsonl"))
    parts += [section("Metrics", figures(rows))] if rows else []
    parts += [settings(folder / name, caption) for name, caption in SETTINGS.items() if (folder / name).exists()]
    return write_page(folder / "report.html", page(title, *parts))


def write_page(path: Path, content: str) -> Path:
    """Write a page, whole or not at all."""
    part = path.with_name(f".{path.name}")
    part.write_text(content, encoding="utf-8")
    return part.replace(path)


def rows_of(path: Path) -> Iterator[Row]:
    """Rows of a JSON lines file, one that a killed run left unfinished excepted."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def progress(rows: list[Row]) -> str:
    """How far the run came."""
    if not rows:
        return "Nothing has been logged yet."
    units = {"step": "optimizer step", "rollout": "rollout"}
    reached = {unit: max((row[name] for row in rows if name in row), default=0) for name, unit in units.items()}
    counted = [f"{count:,} {unit}{'s' * (count != 1)}" for unit, count in reached.items() if count]
    return f"{' of '.join(counted)}." if counted else "Before the first step."


def metric_lines(rows: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """Points of each metric over optimizer steps, in the order in which metrics appear."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in COUNTERS and isinstance(value, (int, float)) and "step" in row:
                lines.setdefault(name, []).append((row["step"], value))
    return lines


def charts(rows: list[Row], keys: Iterable[str] | None = None) -> dict[str, Html]:
    """A chart of each metric, that of held-out data in the same.

    Args:
        rows: of `metrics.jsonl`.
        keys: the metrics wanted, in this order, where they are there; by default all.
    """
    lines = metric_lines(rows)
    names = dict.fromkeys(name.removeprefix(EVALUATION) for name in lines) if keys is None else keys
    drawn = {}
    for name in names:
        both = {
            label: lines[key]
            for label, key in (("training", name), ("held out", EVALUATION + name))
            if any(math.isfinite(y) for _, y in lines.get(key, []))
        }
        if both:
            title = name if name in lines else EVALUATION + name
            drawn[name] = line_chart(title, both, "optimizer step", name)
    return drawn


def curves(rows: list[Row]) -> list[Html]:
    """The section of curves: the main ones, and the others folded."""
    drawn = charts(rows)
    main = [drawn.pop(name) for name in FIRST if name in drawn]
    others = [folded(f"{len(drawn)} more curves", columns(*drawn.values()))] if drawn else []
    return [section("Curves", columns(*main), *others)] if main or others else []


def columns(*children: Html) -> Html:
    """Side by side, as many as there is room for."""
    return tag("div", *children, class_="columns")


def figures(rows: list[Row]) -> Html:
    """The first and the last value of each metric."""
    lines = metric_lines(rows)
    values = ((name, figure(points[0][1]), figure(points[-1][1])) for name, points in lines.items())
    return folded("First and last values", table(("metric", "first", "last"), values))


def samples(path: Path) -> Html:
    """The first and the last samples of a run, side by side."""
    first: list[Row] = []
    last: list[Row] = []
    for row in rows_of(path):
        if not first or row["step"] == first[0]["step"]:
            first.append(row)
        last = [*last, row] if last and row["step"] == last[0]["step"] else [row]
    groups = [first] if not first or first[0]["step"] == last[0]["step"] else [first, last]
    return section("Samples", columns(*(tag("div", *sample_cards(group)) for group in groups if group)))


def sample_cards(group: list[Row]) -> Iterator[Html]:
    """Samples of one step, best reward first."""
    yield tag("h3", f"After {group[0]['step']:,} optimizer steps")
    best = sorted(group, key=lambda row: -math.inf if row.get("reward") is None else row["reward"], reverse=True)
    for row in best[:SHOWN_SAMPLES]:
        yield tag(
            "div",
            tag("p", str(row["prompt"]), class_="text soft"),
            tag("p", str(row["response"]), class_="text"),
            tag("p", sample_facts(row), class_="soft"),
            class_="sample",
        )


def sample_facts(row: Row) -> str:
    """Reward, its parts, length and whether the end is missing, as far as they were recorded."""
    reward, parts = row.get("reward"), row.get("parts") or {}
    facts = [] if reward is None else [f"reward {figure(reward)}"]
    facts += [f"{name} {figure(value)}" for name, value in parts.items() if isinstance(value, (int, float))]
    facts += [f"{row['length']:,} tokens"] if "length" in row else []
    facts += ["cut off"] if row.get("truncated") else []
    facts += [f"label {row['label']}"] if row.get("label") is not None else []
    return " · ".join(facts)


SETTINGS = {"config.json": "Options", "environment.json": "Versions"}
"""Files of a record that hold settings, and what they are called on the page."""


def settings(path: Path, caption: str) -> Html:
    """What a JSON file holds, groups flattened, those that are not set left out."""
    return settings_table(caption, json.loads(path.read_text(encoding="utf-8")))


def settings_table(caption: str, content: Row) -> Html:
    """Settings by name, groups flattened, those that are not set left out."""
    flat = flattened(content)
    rows = [(name, tag("code", value)) for name, value in flat.items() if value is not None]
    return folded(caption, table(("name", "value"), rows, numbers=False))


def flattened(content: Row) -> Row:
    flat: Row = {}
    for name, value in content.items():
        flat |= flattened(value) if isinstance(value, dict) else {name: value}
    return flat
