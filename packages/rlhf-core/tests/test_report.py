"""Charts and reports: what is drawn is what was measured, and what was written is shown as text."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rlhf_core.chart import MOST_POINTS, Axis, figure, line_chart, thinned, tick_label, ticks
from rlhf_core.html import page, tag
from rlhf_core.report import charts, write_report


def drawn(*args: object) -> ElementTree.Element:
    """A chart as an XML tree, which its HTML also is."""
    return ElementTree.fromstring(line_chart(*args))


def record(folder: Path, metrics: list[dict], samples: list[dict] | None = None) -> Path:
    folder.mkdir()
    for name, rows in (("metrics", metrics), ("samples", samples)):
        if rows is not None:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_text_is_escaped_everywhere_but_in_what_was_made_here():
    cell = tag("td", "a < b & c", tag("b", "<i>"), None, title='"quoted"', class_="x", stroke_width=2, id=None)
    assert cell == ('<td title="&quot;quoted&quot;" class="x" stroke-width="2">a &lt; b &amp; c<b>&lt;i&gt;</b></td>')
    assert "<title>&lt;script&gt;</title>" in page("<script>")
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.13, 2.2, [-0.5, 0, 0.5, 1, 1.5, 2, 2.5]),
        (3, 97, [0, 20, 40, 60, 80, 100]),
        (1e-7, 5e-7, [1e-7, 2e-7, 3e-7, 4e-7, 5e-7]),
        (-1007, -993, [-1010, -1005, -1000, -995, -990]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "0"), (1.23456, "1.235"), (12345.6, "12,346"), (5e-6, "5e-6"), (2.5e8, "2.5e8"), (math.nan, "nan")],
)
def test_figures_are_written_with_four_digits(value, written):
    assert figure(value) == written


@pytest.mark.parametrize(
    ("tick", "step", "written"),
    [
        (0.6000000000000001, 0.2, "0.6"),
        (-1e-17, 0.5, "0.0"),
        (1500, 500, "1,500"),
        (3e-7, 1e-7, "3e-7"),
        (0, 1e-7, "0"),
    ],
)
def test_ticks_are_written_as_exactly_as_their_distance_asks_for(tick, step, written):
    assert tick_label(tick, step) == written


def test_a_line_goes_through_its_points():
    chart = drawn("reward", {"training": [(0, 1.0), (5, 2.0), (10, 0.0)]}, "step", "reward")
    (line,) = chart.iter("polyline")
    places = [tuple(map(float, place.split(","))) for place in line.get("points").split()]
    x, y = Axis(0, 10, 62, 526), Axis(0, 2, 254, 14)
    assert places == [(x.place(a), y.place(b)) for a, b in ((0, 1), (5, 2), (10, 0))]
    assert places[1][1] < places[0][1] < places[2][1], "larger values are higher up, where y is smaller"


def test_a_chart_tells_its_values_to_the_mouse_and_to_screen_readers():
    chart = drawn("reward", {"training": [(1, 0.5), (2, 1.5)], "held out": [(2, 1.0)]}, "step", "reward")
    assert chart.find("svg").get("role") == "img" and chart.find("svg/title").text == "reward"
    assert chart.find("svg/desc").text == (
        "training: 0.5 at step 1, 1.5 at step 2. held out: 1 at step 2, 1 at step 2."
    )
    assert [title.text for title in chart.findall("svg/circle/title")] == [
        "step 1: training 0.5", "step 2: training 1.5", "step 2: held out 1",
    ]  # fmt: skip
    assert {"step", "reward"} <= {text.text for text in chart.iter("text")}
    assert re.findall(r"training|held out", "".join(chart.find("figcaption").itertext())) == ["training", "held out"]


def test_a_line_has_a_gap_where_a_value_is_not_a_number():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, math.inf), (4, 2.0), (5, 1.0), (6, math.nan), (7, 3.0)]
    chart = drawn("loss", {"training": points}, "step", "loss")
    assert len(list(chart.iter("polyline"))) == 2
    dots = [dot for dot in chart.iter("circle") if dot.get("class").startswith("dot")]
    assert len(dots) == 5 and not re.search("nan|inf", "".join(dot.get("cy") for dot in dots))


def test_many_points_are_drawn_as_means_and_the_caption_says_so():
    points = [(float(n), float(n % 4)) for n in range(4 * MOST_POINTS)]
    assert thinned(points) == [(4 * n + 1.5, 1.5) for n in range(MOST_POINTS)]
    caption = drawn("loss", {"training": points}, "step", "loss").find("figcaption")
    assert "points are means of up to 4" in "".join(caption.itertext())


@pytest.mark.parametrize("points", [[(3, 2.0)], [(0, 0.0), (9, 0.0)], [(0, -1e-9), (1, 1e9)]])
def test_lines_without_height_or_width_are_drawn_inside_the_plot(points):
    chart = drawn("loss", {"training": points}, "step", "loss")
    for dot in chart.iter("circle"):
        assert 62 <= float(dot.get("cx")) <= 526 and 14 <= float(dot.get("cy")) <= 254


def test_a_chart_of_nothing_or_of_too_many_lines_is_refused():
    for lines in ({}, {"training": []}, {"training": [(0, math.nan)]}, {str(n): [(0, 1.0)] for n in range(5)}):
        with pytest.raises(ValueError, match="1 to 4 lines"):
            line_chart("loss", lines, "step", "loss")


def test_held_out_and_training_values_of_a_metric_share_a_chart():
    rows = [{"step": 1, "loss": 2.0, "note": "x"}, {"step": 2, "loss": 1.0, "eval_loss": 1.5, "eval_accuracy": 0.5}]
    found = charts(rows)
    assert list(found) == ["loss", "accuracy"]
    assert "held out" in found["loss"] and "<title>eval_accuracy</title>" in found["accuracy"]
    assert list(charts(rows, ["accuracy", "kl"])) == ["accuracy"]


def test_the_report_shows_the_first_and_the_last_samples_best_reward_first(tmp_path):
    samples = [
        {"step": step, "prompt": "p", "response": f"{step}-{reward}", "reward": reward, "truncated": step == 9}
        for step in (1, 5, 9)
        for reward in (None, 0.25, 0.75)
    ]
    metrics = [{"step": step, "rollout": step, "reward": 0.5} for step in (1, 5, 9)]
    text = write_report(record(tmp_path / "run", metrics, samples), "PPO").read_text()
    assert re.findall(r">(\d-[\d.None]+)<", text) == ["1-0.75", "1-0.25", "1-None", "9-0.75", "9-0.25", "9-None"]
    assert "<h1>PPO</h1>" in text and "reward 0.75 · cut off" in text and "9 optimizer steps of 9 rollouts." in text


def test_a_report_of_a_run_that_has_logged_nothing_says_so(tmp_path):
    assert "Nothing has been logged yet." in write_report(record(tmp_path / "run", [])).read_text()


def test_a_row_that_a_killed_run_left_unfinished_is_left_out(tmp_path):
    run = record(tmp_path / "run", [{"step": 1, "loss": 0.5}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert "1 optimizer step." in write_report(run).read_text()


def test_the_report_lists_the_options_that_were_set(tmp_path):
    run = record(tmp_path / "run", [{"step": 1, "loss": 0.5}])
    (run / "config.json").write_text('{"model": {"pretrain": "a<b", "bf16": null}, "batch": {"seed": 42}}')
    text = write_report(run).read_text()
    assert "a&lt;b" in text and ">seed<" in text and "bf16" not in text


def test_a_page_asks_for_nothing_from_outside(tmp_path):
    text = write_report(record(tmp_path / "run", [{"step": 1, "loss": 0.5}])).read_text()
    assert "default-src 'none'" in html.unescape(text) and "<script" not in text
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text)) == {"data:,"} and "url(" not in text
