"""A run that was killed and continued is the run that was not: same weights, same metrics, same data order, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_core.checkpoint import CheckpointError, damage
from rlhf_data.errors import InputError

pytestmark = pytest.mark.slow

TIMED = {"tokens_per_second"}


def same_rows(one: list[dict], other: list[dict]) -> bool:
    return [{k: v for k, v in row.items() if k not in TIMED} for row in one] == [
        {k: v for k, v in row.items() if k not in TIMED} for row in other
    ]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


class Stopped(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """End a run in the middle of an optimizer step, as if the machine had gone."""
    from rlhf_core.fit import Fit

    def arm(step: int) -> None:
        plain = Fit.step

        def stopping(self, window):
            if self.position.step > step:
                raise Stopped
            return plain(self, window)

        monkeypatch.setattr(Fit, "step", stopping)

    yield arm


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("sft", {}),
        ("sft", {"zero_stage": 0, "packing_samples": True}),
        ("sft", {"zero_stage": 3, "bf16": True}),
        ("sft", {"lora_rank": 4, "lora_dropout": 0.3}),
        ("rm", {"packing_samples": True}),
        ("dpo", {"zero_stage": 3, "nll_loss_coef": 0.1}),
        ("dpo", {"precompute_ref": True, "zero_stage": 0}),
        ("kto", {"lora_rank": 4, "lora_dropout": 0.3}),
        ("kd", {"cache_teacher": True, "zero_stage": 0}),
        ("kd", {"on_policy_fraction": 0.5, "generate_max_len": 6}),
    ],
    ids=str,
)
def test_a_continued_run_equals_the_uninterrupted_one(train, tmp_path, stop_after, monkeypatch, method, given):
    given = given | {"max_epochs": 2, "save_steps": 3, "eval_steps": 2, "logging_steps": 2}
    whole = train(method, save_path=str(tmp_path / "whole"), **given)
    with monkeypatch.context():
        stop_after(7 if method == "sft" else 4)
        with pytest.raises(Stopped):
            train(method, save_path=str(tmp_path / "cut"), **given)
    monkeypatch.undo()
    continued = train(method, save_path=str(tmp_path / "cut"), load_checkpoint=True, **given)
    assert same_rows(whole, continued)
    name = "adapter_model.safetensors" if "lora_rank" in given else "model.safetensors"
    one, other = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize(
    ("method", "then", "now", "said"),
    [
        ("dpo", {}, {"beta": 0.2}, "'beta': 0.2"),
        ("kto", {}, {"desirable_loss_weight": 2.0}, "'desirable_loss_weight': 2.0"),
        ("kd", {}, {"kd_coef": 0.5}, "'kd_coef': 0.5"),
    ],
)
def test_a_checkpoint_with_another_loss_is_refused(train, method, then, now, said):
    train(method, save_steps=2, zero_stage=0, **then)
    with pytest.raises(InputError, match=said):
        train(method, save_steps=2, zero_stage=0, load_checkpoint=True, **now)


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(train, tmp_path, capsys):
    given = {"save_path": str(tmp_path / "out"), "save_steps": 2}
    whole = train(**given)
    newest = tmp_path / "out" / "checkpoints" / "global_step4"
    victim = max(newest.rglob("*.pt"), key=lambda p: p.stat().st_size)
    with victim.open("r+b") as file:
        file.seek(100)
        file.write(b"\0\1\2\3")
    assert "other content" in damage(newest)
    capsys.readouterr()
    continued = train(load_checkpoint=True, **given)
    said = capsys.readouterr().out
    assert "global_step4 is damaged" in said and "continuing from" in said and "global_step2" in said
    assert same_rows(whole, continued)


def test_when_all_checkpoints_are_damaged_nothing_is_overwritten(train, tmp_path):
    given = {"save_path": str(tmp_path / "out"), "save_steps": 3}
    train(**given)
    (tmp_path / "out/checkpoints/global_step3/state.json").write_text("{}")
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        train(load_checkpoint=True, **given)


def test_without_a_checkpoint_it_says_so_and_starts(train, tmp_path, capsys):
    assert len(train(load_checkpoint=True)) == 6
    assert "no checkpoint in" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_refused(train, tmp_path):
    train(save_steps=2)
    with pytest.raises(InputError, match="seed was 7 and is 8"):
        train(save_steps=2, seed=8, load_checkpoint=True)


def test_old_checkpoints_go_after_the_new_one_is_there_and_foreign_folders_stay(train, tmp_path):
    foreign = tmp_path / "ckpt" / "global_step1_mine"
    foreign.mkdir(parents=True)
    train(ckpt_path=str(tmp_path / "ckpt"), save_steps=1, max_ckpt_num=2, save_hf_ckpt=True)
    left = sorted(path.name for path in (tmp_path / "ckpt").iterdir())
    assert left == ["global_step1_mine", "global_step4", "global_step4_hf", "global_step5", "global_step5_hf"]
    assert not damage(tmp_path / "ckpt/global_step5")


def test_checkpoints_behind_which_the_run_went_back_are_replaced(train, tmp_path):
    """The newest is damaged, so the run goes on from the one before, and writes one with a smaller number."""
    given = {"save_path": str(tmp_path / "out"), "max_ckpt_num": 1}
    train(save_steps=1, **(given | {"max_ckpt_num": 9}))
    folder = tmp_path / "out/checkpoints"
    for step in (5, 4):
        (folder / f"global_step{step}/state.json").write_text("{}")
    for step in (3, 2):
        shutil.rmtree(folder / f"global_step{step}")
    train(save_steps=3, load_checkpoint=True, **given)
    assert [path.name for path in folder.iterdir()] == ["global_step3"] and not damage(folder / "global_step3")


def test_a_memory_limit_keeps_the_newest(train, tmp_path):
    train(save_steps=1, max_ckpt_mem=1e-6)
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["global_step5"]


def test_a_full_disk_ends_the_run_and_leaves_earlier_checkpoints(train, tmp_path, monkeypatch):
    """The file size limit of the process stands in for the disk: the same error comes from the same system calls."""
    import resource

    from rlhf_core.checkpoint import Checkpoints

    plain = Checkpoints.save

    def save(self, engine, step, state):
        if step < 4:
            return plain(self, engine, step, state)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            return plain(self, engine, step, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(CheckpointError, match=r"step 4 could not be written .* earlier checkpoints are intact"):
        train(save_steps=2)
    folder = tmp_path / "out" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["global_step2"] and not damage(folder / "global_step2")


SCRIPT = """
import sys
from rlhf_core.config import SFTConfig
from rlhf_core.methods import sft
sft.train(SFTConfig.model_validate_json(sys.argv[1]))
"""


def killed(config, step: int) -> int:
    """Run SFT in a process of its own, and end it by SIGKILL while the checkpoint of a step is being written; its status."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, config.model_dump_json()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    staging = Path(config.checkpoint.save_path) / "checkpoints" / f".writing-global_step{step}"
    deadline = time.monotonic() + 120
    while not staging.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait(timeout=120)


def test_kill_minus_nine_while_a_checkpoint_is_written(options, train, tmp_path, monkeypatch):
    """SIGKILL twice while a checkpoint is written, each time continued: the end is that of the uninterrupted run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = {"max_epochs": 2, "save_steps": 1, "max_ckpt_num": 2}
    train("sft", save_path=str(tmp_path / "whole"), **given)
    cut = {"save_path": str(tmp_path / "cut"), "load_checkpoint": True, **given}
    for step in (3, 7):
        assert killed(options(**cut), step) == -signal.SIGKILL
    train("sft", **cut)
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    read = [
        [json.loads(line) for line in (tmp_path / r / "run/metrics.jsonl").read_text().splitlines()]
        for r in ("whole", "cut")
    ]
    assert same_rows(*read)
    assert not list((tmp_path / "cut").rglob(".writing-*"))
