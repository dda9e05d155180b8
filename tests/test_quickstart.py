"""`rlhf quickstart`, small: every step runs, the reward model chooses, and the models it leaves can be talked to."""

from __future__ import annotations

import io
import re
import shlex

from rlhf_cli.quickstart import best, judge_of


def test_the_quickstart_trains_compares_and_leaves_what_it_says(rlhf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = rlhf(["quickstart", "--rows", "400", "--epochs", "1"])
    assert answer.code == 0, answer.err
    rows = re.findall(
        r"^   (one answer|best of 8|after DPO) +wins +(\d+)% .* (\d+)% right with a !, +(\d+)% right$", answer.out, re.M
    )
    assert [way for way, *_ in rows] == ["one answer", "best of 8", "after DPO"]
    wins = {way: int(share) for way, share, *_ in rows}
    assert wins["best of 8"] > wins["one answer"], "the best of eight must do better by what chose it"
    folder = tmp_path / "quickstart"
    assert {"model", "questions", "pairs", "sft", "rm", "dpo", "loss.png"} <= {path.name for path in folder.iterdir()}
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


def test_of_equal_answers_the_first_is_the_best():
    def judge(rows, answers):
        return [float(len(answer)) for answer in answers]

    rows = [{"question": "one", "answer": ""}, {"question": "two", "answer": ""}]
    assert best(rows, [["a", "bb", "cc"], ["dd", "e", "f"]], judge) == ["bb", "dd"]
