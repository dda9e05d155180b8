"""`rlhf quickstart`, small: every step runs, the reward model chooses, and the models it leaves can be talked to."""

from __future__ import annotations

import io
import math
import re
import shlex
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_cli.quickstart_answers import best, judge_of, way_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")


@pytest.fixture
def alone(monkeypatch):
    """PPO runs in this process, without Ray and vLLM; tests/test_ppo.py has both."""
    from rlhf_ray import run
    from rlhf_ray.cluster.backend import LocalBackend

    monkeypatch.setattr("rlhf_infer.engines.vllm.is_installed", lambda: False)
    monkeypatch.setattr("rlhf_cli.quickstart.ROLLOUTS", 2)
    monkeypatch.setattr(run, "train", partial(run.train, backend=LocalBackend()))


def test_the_quickstart_trains_compares_and_leaves_what_it_says(rlhf, tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    answer = rlhf(["quickstart", "--rows", "400", "--epochs", "1"])
    assert answer.code == 0, answer.err
    rows = re.findall(r"^   (\w+ \w+(?: 8)?) +wins +(\d+)% .* (\d+)% right with a !, +(\d+)% right$", answer.out, re.M)
    assert [way for way, *_ in rows] == ["one answer", "best of 8", "after DPO", "after PPO"]
    wins = {way: int(share) for way, share, *_ in rows}
    assert wins["best of 8"] > wins["one answer"], "the best of eight must do better by what chose it"
    folder = tmp_path / "quickstart"
    made = {"model", "questions", "pairs", "sft", "rm", "dpo", "ppo", "loss.png", "report.html"}
    assert made <= {path.name for path in folder.iterdir()}
    seen = read(folder / "report.html")
    assert seen.open == [] and seen.counts["svg"] >= 8 and seen.counts["script"] == 0
    assert {"after PPO", "Fine-tuning", "PPO against the reward model, on Ray"} <= set(seen.texts)
    assert "vLLM is not installed" in answer.out and "--vllm_num_engines 0" in answer.out
    if browser():
        opens(folder / "report.html", tmp_path)
    stages_that_are_skipped(rlhf, folder)
    questions = io.BytesIO(b"Say boat and rose the other way round.\nWhat is the last of eagle, drum, apple?\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(questions, "utf-8"))
    (next_step,) = re.findall(r"^   rlhf (chat .*)$", answer.out, re.M)
    talked = rlhf(shlex.split(next_step))
    assert talked.code == 0 and len(talked.out.splitlines()) == 2, talked.err
    judge = judge_of(folder / "rm")
    asked = [{"question": "Say boat and rose the other way round.", "answer": ""}]
    given = [[" boat", "", " rose and boat!", " star"]]
    rewards = judge(asked * 4, given[0])
    assert rewards[1] == float("-inf") and len(set(rewards)) == 4
    assert best(asked, given, judge) == [given[0][max(range(4), key=rewards.__getitem__)]]


def stages_that_are_skipped(rlhf, folder: Path) -> None:
    """They are taken from the earlier quickstart, or refused."""
    before = (folder / "dpo/model.safetensors").read_bytes()
    alike = ["quickstart", "--rows", "400", "--epochs", "1"]
    again = rlhf([*alike, "--skip", "sft", "rm", "dpo", "--algorithm", "grpo"])
    assert again.code == 0, again.err
    assert "after GRPO" in again.out and (folder / "dpo/model.safetensors").read_bytes() == before
    assert "From an earlier quickstart." in read(folder / "report.html").texts
    made = "quickstart was made with"
    for given, told in {
        ("quickstart", "--epochs", "1", "--skip", "sft"): f"--skip sft: {made} --rows 400, not 4000",
        (*alike, "--seed", "1", "--skip", "dpo"): f"--skip dpo: {made} --seed 0, not 1",
        (*alike, "--skip", "ppo"): f"--skip ppo: {made} --algorithm grpo, not ppo",
        ("quickstart", "--skip", "rl"): "--skip rl: the stages are sft, rm, dpo, ppo",
    }.items():
        refused = rlhf(list(given))
        assert refused.code == 2 and told in refused.err
    (folder / "rm").rename(folder.parent / "rm")
    refused = rlhf([*alike, "--skip", "rm"])
    assert refused.code == 2 and "--skip rm: ppo starts from it" in refused.err
    (folder.parent / "rm").rename(folder / "rm")
    assert (folder / "ppo/config.json").is_file() and (folder / "sft/config.json").is_file(), "refused too late"


class Page(HTMLParser):
    """What is on a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.counts: dict[str, int] = {"script": 0, "svg": 0}

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(path: Path) -> Page:
    found = Page()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def browser() -> str | None:
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def opens(page: Path, folder: Path) -> None:
    """A browser shows a page that is not blank, and has nothing to complain of."""
    from PIL import Image

    picture = folder / "page.png"
    command = [str(browser()), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", page.as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr
    assert len(Image.open(picture).convert("RGB").getcolors(1 << 24) or []) > 20


@pytest.mark.skipif(browser() is None, reason="there is no browser")
def test_a_report_opens_in_a_browser(tmp_path):
    """What a model wrote is shown as text; nothing of it runs."""
    from rlhf_core.report import write_report

    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 1.5}\n')
    sample = '{"step": 2, "prompt": "Say <b>", "response": "<script>console.log(1)</script>", "reward": 1.5}\n'
    (run / "samples.jsonl").write_text(sample)
    opens(write_report(run), tmp_path)


@pytest.mark.skipif(browser() is None, reason="there is no browser")
def test_a_page_that_logs_an_error_is_noticed(tmp_path):
    (tmp_path / "page.html").write_text("<script>console.error('no')</script>")
    with pytest.raises(AssertionError, match="CONSOLE"):
        opens(tmp_path / "page.html", tmp_path)


def test_what_a_model_wrote_is_text_in_a_report(tmp_path):
    from rlhf_core.report import write_report

    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "kl": NaN}\n{"step": 2, "reward": 1.5}\n{"step": 3,')
    (run / "samples.jsonl").write_text(
        '{"step": 2, "prompt": "Say <b>", "response": "<script>alert(1)</script>", "reward": 1.5, "length": 4}\n'
    )
    seen = read(write_report(run))
    assert seen.open == [] and seen.counts["script"] == 0
    assert "<script>alert(1)</script>" in seen.texts and "reward 1.5 · 4 tokens" in seen.texts


def test_ties_count_as_half_and_answers_without_text_lose():
    rows = [{"question": "?", "answer": " a"}] * 4
    way = way_of("one", [" a!", " a", " b", ""], [2.0, 1.0, 0.0, -math.inf], [1.0, 1.0, 1.0, -5.0], rows)
    assert (way.reward, way.wins, way.preferred, way.right) == (1.0, 1.5 / 4, 1 / 4, 2 / 4)


def test_of_equal_answers_the_first_is_the_best():
    def judge(rows, answers):
        return [float(len(answer)) for answer in answers]

    rows = [{"question": "one", "answer": ""}, {"question": "two", "answer": ""}]
    assert best(rows, [["a", "bb", "cc"], ["dd", "e", "f"]], judge) == ["bb", "dd"]
