"""What the quickstart leaves to look at: a page, and a picture of the curves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from rlhf_cli.quickstart_answers import Way
from rlhf_cli.quickstart_data import CHEER, Row, is_preferred, is_right
from rlhf_core.html import Html, page, section, table, tag

SHOWN_QUESTIONS = 12


@dataclass(frozen=True)
class Done:
    """A stage that was trained, now or in an earlier quickstart."""

    title: str

    folder: Path
    """Where its model is, with the record in `run/`."""

    command: str
    """The command line that does the same."""

    seconds: float | None
    """How long it took; None in an earlier quickstart."""

    curves: tuple[str, ...]
    """Metrics to draw, the first of them in the picture too."""


def write_report(path: Path, made: str, ways: list[Way], rows: list[Row], done: list[Done]) -> None:
    """Write the page.

    Args:
        path: where.
        made: what was made, a sentence.
        ways: ways of answering, compared; may be none.
        rows: the questions that they were asked.
        done: the stages.
    """
    from rlhf_core.metrics import environment
    from rlhf_core.report import settings_table, write_page

    compared = [before_and_after(ways, len(rows)), answers(ways, rows)] if ways else []
    parts = [tag("p", made, class_="soft"), *compared, *map(stage, done), settings_table("Versions", environment())]
    write_page(path, page("rlhf quickstart", *parts))


def before_and_after(ways: list[Way], count: int) -> Html:
    """The table of the whole pipeline."""
    titles = ("", "reward", "wins", f"right with a {CHEER}", "right")
    shares = ((way.name, way.reward, way.wins, way.preferred, way.right) for way in ways)
    told = (
        f"Answers drawn at random to the {count:,} questions that were held out: one of the fine-tuned model, the best of "
        "several by the reward model, and one after each way of learning from preferences. Reward is the mean by the reward "
        "model. An answer wins when its reward is above that of another answer of the fine-tuned model."
    )
    cells = ((name, f"{reward:.2f}", *(f"{share:.0%}" for share in rest)) for name, reward, *rest in shares)
    return section("Before and after", tag("p", told, class_="soft"), table(titles, cells))


def answers(ways: list[Way], rows: list[Row]) -> Html:
    """Some answers side by side."""
    cells = (
        (row["question"], *(verdict(row, way.answers[n], way.rewards[n]) for way in ways))
        for n, row in enumerate(rows[:SHOWN_QUESTIONS])
    )
    key = tag("p", f"✓ is right, ✓✓ is right with a {CHEER}, ✗ is wrong; below it the reward.", class_="soft")
    return section("Answers", key, table(("question", *(way.name for way in ways)), cells, numbers=False))


def verdict(row: Row, given: str, reward: float) -> Html:
    """An answer, whether it is right, and its reward."""
    right = is_right(row, given)
    mark = "✓✓" if is_preferred(row, given) else "✓" if right else "✗"
    said = tag("span", mark, " ", tag("span", given.strip(), class_="text"), class_="good" if right else "bad")
    return tag("div", said, tag("div", f"{reward:.2f}", class_="soft"))


def stage(done: Done) -> Html:
    """What a stage did: its command and its curves."""
    from rlhf_core.report import charts, columns, rows_of

    run = done.folder / "run"
    took = "From an earlier quickstart." if done.seconds is None else f"Took {done.seconds:.0f} s."
    own = run / "report.html"
    more = tag("a", "more curves and samples", href=f"{done.folder.name}/run/{own.name}") if own.is_file() else None
    drawn = charts(list(rows_of(run / "metrics.jsonl")), done.curves)
    return section(
        done.title,
        tag("p", took, " " if more else None, more, class_="soft"),
        tag("pre", dedent(done.command)),
        columns(*drawn.values()),
    )


def plot(path: Path, done: list[Done]) -> None:
    """Draw the first curve of each stage as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not done:
        return
    figure, panels = pyplot.subplots(1, len(done), figsize=(4.7 * len(done), 4), layout="constrained", squeeze=False)
    for axes, one in zip(panels[0], done, strict=True):
        for label, style, points in lines(one):
            axes.plot(*zip(*points, strict=True), style, label=label)
        axes.set(xlabel="optimizer step", ylabel=one.curves[0], title=one.title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def lines(done: Done) -> Iterator[tuple[str, str, list[tuple[float, float]]]]:
    """Name, style and points of a stage's first metric, on training and on held-out data."""
    from rlhf_core.report import EVALUATION, metric_lines, rows_of

    found = metric_lines(list(rows_of(done.folder / "run/metrics.jsonl")))
    for name, label, style in ((done.curves[0], "training", "-"), (EVALUATION + done.curves[0], "held out", "o-")):
        if name in found:
            yield label, style, found[name]
