"""Recipes with their real steps: they learn, they can be killed anywhere, and the same files come out."""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
STORIES = SHARED / "models/stories260K"
PROMPTS = SHARED / "data/story_prompts.jsonl"
ANIMALS = ROOT / "examples/animal_reward.py"

real = pytest.mark.skipif(not STORIES.is_dir(), reason="there is no ../shared")
vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

LETTERS = """
import os
import time
from pathlib import Path

calls = 0


def reward(responses):
    global calls
    calls += 1
    gate = Path(os.environ.get("GATE", ""))
    if calls == 3 and gate.name and not gate.exists():
        gate.touch()
        time.sleep(600)
    return [len(set(response)) / 8 for response in responses]
"""
"""Likes responses of different letters. With GATE, its third call makes that file and hangs, if the file was not there."""


@pytest.fixture
def answer_of(rlhf, monkeypatch) -> Callable[..., Any]:
    """Run a recipe in this process, which has imported torch already; steps named in `apart` in processes of their own."""
    from rlhf_cli.main import main
    from rlhf_cli.recipes import loop

    whole = loop.execute

    def run(name: str, *options: str, out: Path, apart: tuple[str, ...] = ()) -> Any:
        def execute(arguments: list[str], log: Path, environment: dict[str, str], lock: int) -> int:
            if arguments[0] in apart:
                return whole(arguments, log, environment, lock)
            monkeypatch.setattr(sys, "argv", ["rlhf", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
            return ended.value.code or 0

        monkeypatch.setattr(loop, "execute", execute)
        return rlhf(["recipe", name, *options, "--save_path", str(out)])

    return run


@pytest.fixture
def recipe(answer_of) -> Callable[..., list[dict[str, Any]]]:
    """Run a recipe to its end; returns what its state file says of the iterations."""

    def run(name: str, *options: str, out: Path, apart: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        answer = answer_of(name, *options, out=out, apart=apart)
        assert answer.code == 0, answer.out[-3000:] + answer.err[-3000:]
        return json.loads((out / "recipe.json").read_text())["history"]

    return run


LEARNING = [
    "--pretrain", str(STORIES), "--reward_pretrain", str(ANIMALS), "--train_batch_size", "16", "--eval_ratio", "0",
    "--packing_samples",
]  # fmt: skip
SAMPLING = ["--dataset", str(PROMPTS), "--training_iters", "3", "--rollout_batch_size", "80", "--best_of_n", "6",
            "--max_new_tokens", "24", "--max_epochs", "2"]  # fmt: skip


def rises(history: list[dict[str, Any]]) -> bool:
    first, second, third = (row["mean_reward"] for row in history)
    return first < 0.3 and second > 1.3 * first and third > 3 * first


@real
@vllm
@pytest.mark.real
@pytest.mark.timeout(400)
def test_rejection_sampling_with_vllm_raises_the_reward(recipe, tmp_path):
    out = tmp_path / "out"
    history = recipe(
        "rejection-sampling", *LEARNING, *SAMPLING, "--learning_rate", "2e-3", out=out, apart=("generate",)
    )
    assert rises(history), history
    assert "engine:    vllm" in (out / "iterations/2/generate.log").read_text()
    assert (out / "report.md").read_text().count("\n|") == 5 and (out / "report.png").is_file()
    model = json.loads((out / "model/config.json").read_text())
    assert model["architectures"] == ["LlamaForCausalLM"] and (out / "model/tokenizer_config.json").is_file()


@real
@pytest.mark.real
def test_iterative_dpo_raises_the_reward(recipe, tmp_path):
    history = recipe(
        "iterative-dpo", *LEARNING, *SAMPLING, "--learning_rate", "1e-3", "--nll_loss_coef", "0.5", "--engine", "transformers",
        "--micro_batch_size", "256", out=tmp_path / "out",
    )  # fmt: skip
    assert rises(history), history


@real
@pytest.mark.real
def test_a_conditional_model_answers_a_high_reward_with_a_higher_one_than_a_low_one(recipe, tmp_path):
    draw, rows = random.Random(0), []
    animals, things = "dog cat bird frog fish duck bear mouse".split(), "ball hat box tree car book cake boat".split()
    for number, line in enumerate(PROMPTS.read_text().splitlines()[:480]):
        named = draw.sample(animals, number % 3) + draw.sample(things, 2 - number % 3)
        rows.append(json.loads(line) | {"story": f" There was a {named[0]} and a {named[1]}."})
    data = tmp_path / "stories.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (done,) = recipe(
        "conditional-sft", *LEARNING, "--dataset", str(data), "--input_key", "prompt", "--output_key", "story",
        "--learning_rate", "3e-3", "--max_epochs", "3", "--max_new_tokens", "20", "--engine", "transformers",
        "--micro_batch_size", "256", out=tmp_path / "out",
    )  # fmt: skip
    low, high = done["asked"]
    assert (low["asked"], high["asked"]) == (0.0, 2.0), "the 10th and the 90th percentile"
    assert high["mean_reward"] > low["mean_reward"] + 0.6, done
    assert low["prompts"] == high["prompts"] == 64


@pytest.fixture
def small(tiny, tmp_path) -> list[str]:
    """Options of a recipe of one small iteration."""
    prompts, rewards = tmp_path / "prompts.jsonl", tmp_path / "letters.py"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(48)))
    rewards.write_text(LETTERS)
    return [
        "--pretrain", str(tiny), "--reward_pretrain", str(rewards), "--dataset", str(prompts), "--rollout_batch_size", "16",
        "--training_iters", "1", "--best_of_n", "2", "--max_new_tokens", "12", "--engine", "transformers",
        "--micro_batch_size", "4", "--train_batch_size", "4", "--micro_train_batch_size", "4",
        "--max_epochs", "2", "--learning_rate", "1e-3",
    ]  # fmt: skip


def results(out: Path) -> dict[str, bytes]:
    """What a recipe is run for."""
    folder = out / "iterations/0"
    names = ("generate.jsonl", "score.jsonl", "score.jsonl.scored.jsonl", "model/model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def interrupt(start, finish) -> Callable[..., int]:
    """Start a command, end it once `there` is there, and make sure that nothing of it runs on. Returns the exit code."""
    import psutil

    def run(command: list[str], there: Callable[[], bool], how: str, **environment: str) -> int:
        process = start(command, **environment)
        while not there():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        parent = psutil.Process(process.pid)
        family = parent.children(recursive=True)
        assert family, "no step was running"
        for one in [parent, *family] if how == "all killed" else [parent]:
            one.send_signal(signal.SIGTERM if how == "terminated" else signal.SIGKILL)
        code = finish(process, 60).code
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
        return code

    return run


def test_a_recipe_that_is_ended_in_every_step_ends_as_an_uninterrupted_one(
    recipe, answer_of, small, interrupt, tmp_path
):
    small = [*small, "--rollout_batch_size", "48", "--save_steps", "2"]
    history = recipe("rejection-sampling", *small, out=tmp_path / "whole")
    out, gate = tmp_path / "ended", tmp_path / "gate"
    folder = out / "iterations/0"
    command = [sys.executable, "-m", "rlhf_cli", "recipe", "rejection-sampling", *small, "--save_path", str(out)]

    def written(name: str) -> Callable[[], bool]:
        return lambda: (folder / name).is_file() and (folder / name).stat().st_size > 0

    assert interrupt(command, written("generate.jsonl.partial.index"), "killed") == -signal.SIGKILL
    assert interrupt(command, gate.is_file, "all killed", GATE=str(gate)) == -signal.SIGKILL
    assert len((folder / "score.jsonl.scored.jsonl.partial").read_text().splitlines()) in range(1, 96)
    assert interrupt(command, written("model/checkpoints/global_step2/manifest.json"), "terminated") == 143
    answer = answer_of("rejection-sampling", *small, out=out, apart=("train",))
    assert answer.code == 0, answer.err
    assert "going on with iteration 0" in answer.out and "global_step" in (folder / "train.log").read_text()
    assert json.loads((out / "recipe.json").read_text())["history"] == history
    assert results(out) == results(tmp_path / "whole")
    assert not (folder / "model/checkpoints").exists()


def test_a_step_that_was_complete_when_the_recipe_was_killed_changes_nothing_again(recipe, small, tmp_path):
    out = tmp_path / "out"
    history = recipe("rejection-sampling", *small, out=out)
    before, state = results(out), json.loads((out / "recipe.json").read_text())
    for done in ([], ["generate"], ["generate", "score"]):
        killed = state | {"iteration": 0, "done": done, "history": []}
        (out / "recipe.json").write_text(json.dumps(killed))
        assert recipe("rejection-sampling", *small, out=out) == history
        assert results(out) == before


def test_an_adapter_writes_in_the_next_iteration(recipe, small, tmp_path):
    out = tmp_path / "out"
    options = [*small, "--lora_rank", "4", "--training_iters", "2", "--rollout_batch_size", "8"]
    recipe("iterative-dpo", *options, out=out)
    writing = json.loads((out / "iterations/1/generate.json").read_text())
    assert writing["pretrain"] == str(out / "iterations/0/model")
    assert {"adapter_model.safetensors"} == {path.name for path in (out / "iterations/1/adapter").glob("*.safetensors")}
    assert (out / "model/model.safetensors").is_file() and not (out / "model/adapter_config.json").exists()
    first, second = (json.loads((out / f"iterations/{n}/train.json").read_text()) for n in (0, 1))
    assert first["ref_pretrain"] == second["ref_pretrain"] == first["pretrain"] != second["pretrain"]


def test_a_step_that_cannot_go_on_ends_the_recipe_with_its_message_and_its_code(answer_of, small, tmp_path):
    (tmp_path / "letters.py").write_text("def reward(responses):\n    return [float('nan')] * len(responses)")
    answer = answer_of("rejection-sampling", *small, out=tmp_path / "out")
    assert answer.code == 1
    first, last = (line for line in answer.err.splitlines() if line.startswith("error:"))
    assert "must return finite numbers, got nan" in first
    assert "`rlhf score` ended with exit code 1" in last and "score.log" in last
    assert json.loads((tmp_path / "out/recipe.json").read_text())["done"] == ["generate"]
