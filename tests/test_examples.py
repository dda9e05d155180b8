"""The examples run as they are on the quickstart's model and data, and leave what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
MODEL = {"model.safetensors", "config.json", "tokenizer.json", "run/config.json", "run/metrics.jsonl"}
ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "run/metrics.jsonl"}


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with a small `quickstart/` in it: the model and the data, nothing trained; `sft/` is the model again."""
    from rlhf_cli.quickstart import QuickstartConfig, make_inputs

    folder = tmp_path_factory.mktemp("examples")
    make_inputs(folder / "quickstart", QuickstartConfig(rows=400))
    shutil.copytree(folder / "quickstart/model", folder / "quickstart/sft")
    return folder


@pytest.fixture(scope="session")
def run(place, tmp_path_factory):
    """Run a command beside `quickstart/`; it must exit with 0. Returns its standard output."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "VLLM_CACHE_ROOT": str(tmp_path_factory.getbasetemp().parent / "vllm"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }

    def start(*command: str, **extra: str) -> str:
        done = subprocess.run(
            command, cwd=place, env=environment | extra, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return start


NOTE = """#!/bin/sh
printf '%s\\037' "$@" >> "$NOTED"
printf '\\036' >> "$NOTED"
"""
"""An `rlhf` that only writes down how it was called."""


@pytest.fixture
def replay(run, rlhf, place, tmp_path, monkeypatch) -> Callable[..., str]:
    """Run a script, and the `rlhf` commands in it in this process, which has imported torch already; vLLM in one of its own."""
    (tmp_path / "rlhf").write_text(NOTE)
    (tmp_path / "rlhf").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.chdir(place)

    def start(*command: str, **extra: str) -> str:
        noted, shown = tmp_path / "noted", ""
        noted.unlink(missing_ok=True)
        run(*command, PATH=path, NOTED=str(noted), **extra)
        for line in noted.read_text().split("\036")[:-1]:
            arguments = line.split("\037")[:-1]
            if "generate_vllm" in arguments:
                shown += run("rlhf", *arguments)
                continue
            answer = rlhf(arguments)
            assert answer.code == 0, answer.out[-2000:] + answer.err[-2000:]
            shown += answer.out
        return shown

    return start


def python_on(page: str) -> str:
    """All Python of a page."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    return "\n".join(blocks)


def there(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_example_is_tested():
    tested = set(re.findall(r'EXAMPLES / "([\w.]+)"', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested


def test_the_command_of_openrlhf_s_users_runs(run, place):
    run("sh", str(EXAMPLES / "sft.sh"))
    assert there(place / "quickstart/examples/sft") >= MODEL


def test_an_example_takes_its_inputs_from_the_environment(replay, place):
    absolute = str(place / "quickstart")
    shown = replay("sh", str(EXAMPLES / "sft.sh"), "--dry_run", QUICKSTART=absolute, OUT="elsewhere")
    assert "Plan" in shown and f"{absolute}/questions" in shown and "elsewhere" in shown
    assert not (place / "elsewhere").exists()


def test_two_ranks_write_checkpoints_and_continue_from_them(run, place):
    run("sh", str(EXAMPLES / "sft_two_ranks.sh"))
    folder = place / "quickstart/examples/sft_two_ranks"
    assert there(folder) >= MODEL | {"checkpoints/global_step8/manifest.json"}
    before = (folder / "run/metrics.jsonl").read_text().splitlines()
    assert "global_step8" in run("sh", str(EXAMPLES / "sft_two_ranks.sh"), "--load_checkpoint")
    assert len((folder / "run/metrics.jsonl").read_text().splitlines()) == len(before)


def test_a_file_of_options_runs(rlhf, place, monkeypatch):
    monkeypatch.chdir(place)
    assert rlhf(["train", "sft", "--config", str(EXAMPLES / "sft.yaml")]).code == 0
    assert there(place / "quickstart/examples/lora") >= ADAPTER


def test_a_file_of_options_is_a_config():
    from rlhf_cli.options import build, read_yaml
    from rlhf_core.config import SFTConfig

    config = build(SFTConfig, read_yaml(EXAMPLES / "sft.yaml", SFTConfig))
    assert config.optim.learning_rate == 1e-3
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.data.dataset.startswith("./")


def test_training_from_python_runs_and_learns(run, place):
    shown = run(sys.executable, str(EXAMPLES / "sft_python.py"))
    folder = place / "quickstart/examples/sft_python"
    assert there(folder) >= MODEL
    losses = [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", shown)]
    assert len(losses) == 2 and losses[1] < losses[0]
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, 21, 2))


def test_the_losses_work_in_a_loop_of_one_s_own(run):
    source = (EXAMPLES / "losses_own_loop.py").read_text(encoding="utf-8")
    assert re.findall(r"^(?:from|import) (rlhf_\w+)", source, flags=re.MULTILINE) == ["rlhf_losses"]
    shown = run(sys.executable, str(EXAMPLES / "losses_own_loop.py"))
    assert float(shown.split()[-1]) > 0.9


def test_a_reward_model_is_trained_and_read_by_transformers(replay, place, capfd):
    replay("sh", str(EXAMPLES / "rm.sh"), "--max_samples", "64")
    folder = place / "quickstart/examples/rm"
    assert there(folder) >= MODEL
    config = json.loads((folder / "config.json").read_text())
    assert config["calibration"]["responses"] == 40 and config["std"] > 0
    exec(python_on("docs/reward-models.md"), {})
    assert "normalised" in capfd.readouterr().out


def test_dpo_computes_its_reference_once(replay, place, metrics, capfd):
    replay("sh", str(EXAMPLES / "dpo.sh"), "--max_samples", "64")
    folder = place / "quickstart/examples/dpo"
    assert there(folder) >= MODEL
    first = metrics(folder)[0]
    assert abs(first["loss"] - 0.6931) < 0.05 and abs(first["kl"]) < 0.5
    exec(python_on("docs/dpo.md"), {})
    assert capfd.readouterr().out.strip()


def test_kto_makes_its_labels_from_pairs(replay, place, metrics):
    shown = replay("sh", str(EXAMPLES / "kto.sh"), "--max_samples", "64")
    assert "label `score`" in shown and "desirable" in shown
    folder = place / "quickstart/examples/kto"
    assert there(folder) >= MODEL
    assert abs(metrics(folder)[0]["loss"] - 0.5) < 0.05


def test_a_student_learns_from_a_teacher(replay, place, metrics):
    replay("sh", str(EXAMPLES / "kd.sh"), "--max_samples", "64")
    folder = place / "quickstart/examples/kd"
    assert there(folder) >= MODEL
    assert {"kd_loss", "ce_loss"} <= metrics(folder)[0].keys()


def test_an_adapter_is_trained_and_merged(replay, place, metrics):
    shown = replay("sh", str(EXAMPLES / "lora.sh"))
    assert "merged: logits differ by at most" in shown
    assert there(place / "quickstart/examples/dpo_lora") >= ADAPTER
    first = metrics(place / "quickstart/examples/dpo_lora")[0]
    assert first["kl"] == 0 and first["accuracy"] == 0  # the reference is the base model with the adapter off
    assert there(place / "quickstart/examples/dpo_lora-merged") >= {"model.safetensors", "config.json"}


def test_a_file_of_options_runs_simpo(rlhf, place, metrics, monkeypatch):
    monkeypatch.chdir(place)
    answer = rlhf(["train", "dpo", "--config", str(EXAMPLES / "simpo.yaml"), "--max_samples", "64"])
    assert answer.code == 0, answer.err
    rows = metrics(place / "quickstart/examples/simpo")
    assert "nll_loss" in rows[0] and "kl" not in rows[0]


SMALL = {"BEST_OF_N": "2", "ROLLOUT_BATCH_SIZE": "16"}
WITHOUT_VLLM = {"ENGINE": "generate", "ENGINE_OPTIONS": ""}


@pytest.fixture
def scored(replay, place) -> Path:
    """The folder `quickstart/` with a reward model in it."""
    if not (place / "quickstart/rm").exists():
        replay("sh", str(EXAMPLES / "rm.sh"), "--max_samples", "64", OUT="quickstart/rm")
    return place / "quickstart"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_rejection_sampling_runs_with_vllm_and_goes_on_from_its_log(replay, scored):
    shown = replay("bash", str(EXAMPLES / "rejection_sampling.sh"), TRAINING_ITERS="1", **SMALL)
    folder = scored / "examples/rejection"
    assert there(folder) >= MODEL | {"generate.jsonl", "rm.jsonl"} and "engine:    vllm" in shown
    assert (folder / "iter.log").read_text() == "1\n"
    rewards = [json.loads(line)["reward"] for line in (folder / "rm.jsonl").read_text().splitlines()]
    assert len(rewards) == 16
    shown = replay("bash", str(EXAMPLES / "rejection_sampling.sh"), TRAINING_ITERS="2", **WITHOUT_VLLM, **SMALL)
    assert "model:     quickstart/examples/rejection" in shown and "iteration 1 of 16 each" in shown
    assert (folder / "iter.log").read_text() == "2\n"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_command_of_openrlhf_s_ppo_users_fits_what_the_quickstart_leaves(replay, scored):
    """Up to its plan; `test_ppo.py` runs the same script to its end."""
    shown = replay("sh", str(EXAMPLES / "ppo.sh"), "--dry_run")
    assert "Question: " in shown and "rewards     rm (model)" in shown
    assert re.search(r"engines +2 processes", shown) and re.search(r"critic +1 process .*\n.*shared with critic", shown)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_iterative_dpo_runs_with_vllm(replay, scored):
    shown = replay(
        "bash", str(EXAMPLES / "iterative_dpo.sh"), TRAINING_ITERS="1", OUT="quickstart/examples/vllm", **SMALL
    )
    assert "engine:    vllm" in shown and there(scored / "examples/vllm/checkpoint") >= MODEL


def test_iterative_dpo_trains_on_the_best_against_the_worst(replay, scored, metrics):
    replay("bash", str(EXAMPLES / "iterative_dpo.sh"), **WITHOUT_VLLM, **SMALL)
    folder = scored / "examples/iter_dpo"
    pairs = [json.loads(line) for line in (folder / "rm.jsonl").read_text().splitlines()]
    assert pairs and all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    assert there(folder / "checkpoint") >= MODEL
    assert metrics(folder / "checkpoint")[0]["kl"] != 0, "the second iteration started from the model of the first"


def test_conditional_sft_trains_with_the_reward_in_the_prompt(replay, scored):
    replay("bash", str(EXAMPLES / "conditional_sft.sh"), MAX_SAMPLES="64")
    folder = scored / "examples/csft"
    first = json.loads((folder / "rm.jsonl").read_text().splitlines()[0])
    assert re.fullmatch(r"(?s)Question: .*\nAnswer: <rm_score>: -?\d+\.\d\d ", first["input"])
    assert there(folder) >= MODEL


def test_a_reward_function_counts_different_animals(rlhf, tmp_path):
    stories = {
        " The cat saw two dogs and a catfish.": 2,
        " No one.": 0,
        " A dog, dogs, DOG!": 1,
        " Ant bee cat cow.": 3,
    }
    rows = "".join(json.dumps({"input": "Once.", "output": story}) + "\n" for story in stories)
    (tmp_path / "stories.jsonl").write_text(rows)
    answer = rlhf([
        "score", "--pretrain", str(EXAMPLES / "animal_reward.py"), "--dataset", str(tmp_path / "stories.jsonl"),
        "--output_path", str(tmp_path / "scored.jsonl"),
    ])  # fmt: skip
    assert answer.code == 0, answer.err
    scored = [json.loads(line)["reward"] for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert scored == list(stories.values())


@pytest.mark.parametrize(
    "page", ["packages/rlhf-core/README.md", "packages/rlhf-infer/README.md", "packages/rlhf-ray/README.md",
             "packages/rlhf-cli/README.md", "docs/getting-started.md"],
)  # fmt: skip
def test_the_python_on_a_page_runs(run, place, monkeypatch, page):
    if page == "packages/rlhf-infer/README.md":  # vLLM has a process of its own
        run(sys.executable, "-c", python_on(page))
        return
    monkeypatch.chdir(place)
    exec(python_on(page), {})
