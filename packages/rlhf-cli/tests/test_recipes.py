"""Recipes without their steps: which commands are run with which options, and what happens between them.

The steps themselves are replaced by something that writes the files they would write.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rlhf_cli.options import command
from rlhf_cli.recipes import loop, state
from rlhf_cli.recipes.config import RECIPES
from rlhf_cli.recipes.process import execute
from rlhf_cli.recipes.report import picture, report, table
from rlhf_cli.recipes.steps import ask, iteration, shown
from rlhf_data.errors import InputError, RunError
from rlhf_data.options import build

USUAL = {
    "rejection-sampling": {"training_iters": 3, "rollout_batch_size": 4, "best_of_n": 2},
    "iterative-dpo": {"training_iters": 3, "rollout_batch_size": 4, "best_of_n": 2},
    "conditional-sft": {"ask_prompts": 2},
}
SAMPLED = ("rejection-sampling", "iterative-dpo")


@pytest.fixture
def config(tmp_path) -> Callable[..., Any]:
    """The config of a recipe, with options changed, added or (None) left out."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(10)))

    def make(name: str, **options: Any) -> Any:
        usual = {
            "pretrain": "some/model", "reward_pretrain": "rewards.py", "dataset": str(tmp_path / "prompts.jsonl"),
            "save_path": str(tmp_path / "out"),
        }  # fmt: skip
        given = usual | USUAL[name] | options
        return build(RECIPES[name], {key: value for key, value in given.items() if value is not None})

    return make


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


class Steps:
    """Stands for the processes: notes how each was started, and writes what it would have written."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.environments: list[dict[str, str]] = []
        self.codes: dict[int, int] = {}
        self.rewards: Callable[[dict[str, Any]], float | None] = lambda row: float(row["sample"])

    def __call__(self, arguments: list[str], log: Path, environment: dict[str, str], lock: int) -> int:
        assert arguments[-2] == "--config"
        options = json.loads(Path(arguments[-1]).read_text())
        self.commands.append(" ".join(arguments[:-2]))
        self.options.append(options)
        self.environments.append(environment)
        if code := self.codes.get(len(self.commands) - 1, 0):
            return code
        getattr(self, arguments[0])(options)
        return 0

    def generate(self, options: dict[str, Any]) -> None:
        prompts = [json.loads(line) for line in Path(options["dataset"]).read_text().splitlines()]
        start = options.get("iter", 0) * options.get("rollout_batch_size", 0)
        write_rows(options["output_path"], [
            {"row": start + n, "sample": k, "input": row.get("input", row.get("prompt")), "output": f"{n} {k}", "rendered": "text",
             "finish_reason": "length" if k else "stop", "output_ids": [1] * (k + 1)}
            for n, row in enumerate(prompts[start : start + options.get("rollout_batch_size", len(prompts))])
            for k in range(options.get("best_of_n", 1))
        ])  # fmt: skip

    def score(self, options: dict[str, Any]) -> None:
        rows = [json.loads(line) for line in Path(options["dataset"]).read_text().splitlines()]
        if "input" not in rows[0]:
            rows = [
                {"row": n, "sample": n, "input": row["prompt"], "output": "x", "rendered": "text"}
                for n, row in enumerate(rows)
            ]
        scored = [row | {"reward": self.rewards(row)} for row in rows]
        if "post_processor" in options:
            write_rows(options["output_path"] + ".scored.jsonl", scored)
            scored = [row for row in scored if row["reward"]]
        write_rows(options["output_path"], scored)

    def train(self, options: dict[str, Any]) -> None:
        folder = Path(options["save_path"])
        (folder / "run").mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_text(options["dataset"])
        write_rows(
            str(folder / "run/metrics.jsonl"), [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"eval_loss": 9.0}]
        )
        Path(options["data_cache_dir"]).mkdir(exist_ok=True)
        if options.get("save_steps", -1) > 0:
            checkpoints = Path(options.get("ckpt_path", folder / "checkpoints"))
            (checkpoints / "global_step1").mkdir(parents=True)

    def merge(self, options: dict[str, Any]) -> None:
        Path(options["save_path"]).mkdir()
        (Path(options["save_path"]) / "model.safetensors").write_text("merged")


@pytest.fixture
def steps(monkeypatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(loop, "execute", steps)
    monkeypatch.setattr(loop, "check", lambda config, started: None)
    monkeypatch.setattr(loop, "longest_prompt", lambda config: 64)
    monkeypatch.setattr(loop, "picture", lambda recipe, history, path: None)
    return steps


def test_rejection_sampling_writes_scores_and_trains_from_the_newest_policy(config, steps, tmp_path):
    loop.run("rejection-sampling", config("rejection-sampling"))
    assert steps.commands == ["generate", "score", "train sft"] * 3
    out = tmp_path / "out/iterations"
    for number in range(3):
        writing, scoring, training = steps.options[3 * number : 3 * number + 3]
        policy = str(out / str(number - 1) / "model") if number else "some/model"
        assert (writing["iter"], writing["rollout_batch_size"], writing["pretrain"]) == (number, 4, policy)
        assert (scoring["pretrain"], scoring["post_processor"]) == ("rewards.py", "rs")
        assert scoring["dataset"] == writing["output_path"] == str(out / str(number) / "generate.jsonl")
        assert training["dataset"] == scoring["output_path"] == str(out / str(number) / "score.jsonl")
        assert (training["pretrain"], training["save_path"]) == (policy, str(out / str(number) / "model"))


def test_iterative_dpo_holds_every_policy_at_the_first_one(config, steps):
    loop.run("iterative-dpo", config("iterative-dpo"))
    assert steps.commands == ["generate", "score", "train dpo"] * 3
    assert [options["post_processor"] for options in steps.options[1::3]] == ["iter_dpo"] * 3
    assert [options["ref_pretrain"] for options in steps.options[2::3]] == ["some/model"] * 3
    pretrained = [options["pretrain"] for options in steps.options[2::3]]
    assert pretrained[0] == "some/model" and len(set(pretrained)) == 3


@pytest.mark.parametrize(
    ("options", "reference"),
    [({}, "some/model"), ({"ref_pretrain": "other"}, "other"), ({"loss_type": "simpo"}, None)],
    ids=str,
)
def test_the_reference_is_the_first_policy_or_what_was_given_or_none_where_the_loss_has_none(
    config, options, reference
):
    (_, _, training) = iteration(config("iterative-dpo", **options), 1)
    assert training.options.get("ref_pretrain") == reference
    training.check()


def test_raft_is_rejection_sampling_of_the_best_prompts(config):
    (_, scoring, _) = iteration(config("rejection-sampling", top_fraction=0.25), 0)
    assert (scoring.options["post_processor"], scoring.options["top_fraction"]) == ("raft", 0.25)
    scoring.check()


def test_conditional_sft_trains_once_and_asks_for_a_low_and_a_high_reward(config, steps, tmp_path):
    loop.run(
        "conditional-sft",
        config("conditional-sft", reward_template="{input} [{reward}] ", max_new_tokens=7),
    )
    assert steps.commands == ["score", "train sft"] + ["generate", "score"] * 2
    out = tmp_path / "out/iterations/0"
    scoring, training, low, low_scores, high, _ = steps.options
    assert (scoring["post_processor"], scoring["reward_template"]) == ("csft", "{input} [{reward}] ")
    assert "reward_template" not in training
    assert (low["csft_reward"], high["csft_reward"]) == (1.0, 8.0), "percentiles of 0, 1, …, 9"
    for asked in (low, high):
        assert asked["pretrain"] == str(out / "model") and asked["dataset"] == str(out / "prompts.jsonl")
        assert asked["reward_template"] == "{input} [{reward}] "
        assert asked["max_new_tokens"] == 7
    assert "post_processor" not in low_scores
    assert [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()] == [
        {"input": "p0", "rendered": "text"},
        {"input": "p1", "rendered": "text"},
    ]


def test_answers_are_scored_without_the_reward_that_was_asked_for(config, steps, tmp_path):
    whole = Steps.generate

    def asked(self: Steps, options: dict[str, Any]) -> None:
        whole(self, options)
        rows = [json.loads(line) for line in Path(options["output_path"]).read_text().splitlines()]
        write_rows(options["output_path"], [row | {"input": row["input"] + " [9.00] "} for row in rows])

    steps.generate = asked.__get__(steps)  # type: ignore[method-assign]
    loop.run("conditional-sft", config("conditional-sft", ask_rewards=[9.0]))
    out = tmp_path / "out/iterations/0"
    assert json.loads((out / "ask-0-generate.jsonl").read_text().splitlines()[0])["input"] == "p0 [9.00] "
    scored = [json.loads(line) for line in (out / "ask-0-score.jsonl").read_text().splitlines()]
    assert [row["input"] for row in scored] == ["p0", "p1"]


def test_asking_can_be_left_out(config, steps):
    loop.run("conditional-sft", config("conditional-sft", ask_prompts=0))
    assert steps.commands == ["score", "train sft"]


GIVEN = {
    "bf16": True, "flash_attn": True, "micro_batch_size": 3, "num_procs": 2, "seed": 7, "max_len": 64, "zero_stage": 3,
    "reward_zero_stage": 1, "disable_fast_tokenizer": True, "trust_remote_code": True, "train_batch_size": 6,
    "micro_train_batch_size": 3, "max_epochs": 2, "learning_rate": 1e-4, "adam_betas": (0.8, 0.9), "eval_ratio": 0.0,
    "packing_samples": True, "input_template": "Q: {} A:", "input_key": "prompt", "max_samples": 9,
    "normalize_reward": True, "calibrate": True, "value_head_prefix": "head", "temperature": 0.5, "engine": "vllm",
    "max_num_seqs": 5, "logging_steps": 2, "eval_steps": 3, "reward_engine": "transformers",
}  # fmt: skip
"""Options of which each says in how many steps it should be found."""

WHERE = {
    "generate": "bf16 micro_batch_size seed disable_fast_tokenizer trust_remote_code input_template input_key max_samples "
    "temperature engine max_num_seqs",
    "score": "bf16 flash_attn micro_batch_size num_procs seed max_len disable_fast_tokenizer trust_remote_code "
    "normalize_reward calibrate value_head_prefix reward_engine",
    "train": "bf16 flash_attn num_procs seed max_len zero_stage disable_fast_tokenizer trust_remote_code train_batch_size "
    "micro_train_batch_size max_epochs learning_rate adam_betas eval_ratio packing_samples logging_steps eval_steps",
}


@pytest.mark.parametrize("name", SAMPLED)
def test_an_option_goes_to_every_step_that_has_it_and_to_no_other(config, name):
    for step in iteration(config(name, reward_pretrain="some/reward-model", **GIVEN), 1):
        found = {key for key in GIVEN if key in step.options and step.options[key] == as_list(GIVEN[key])}
        own = {"zero_stage"} if step.name == "score" else set()
        assert found == set(WHERE[step.name].split()), step.name
        assert {key for key in GIVEN if key in step.options} - found - own <= {"input_key"}, step.name
        if step.name == "score":
            assert step.options["zero_stage"] == 1
        step.check()


def test_a_reward_function_gets_no_option_that_is_for_models(config):
    (_, scoring, _) = iteration(config("rejection-sampling", **GIVEN | {"reward_zero_stage": 0}), 0)
    assert not scoring.options.keys() & {
        "bf16",
        "flash_attn",
        "max_len",
        "num_procs",
        "zero_stage",
        "trust_remote_code",
    }
    assert scoring.options["micro_batch_size"] == 3


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_the_data_of_conditional_sft_is_read_by_its_first_step_only(config):
    given = {
        "input_key": "chosen",
        "apply_chat_template": True,
        "max_samples": 5,
        "dataset_split": "all",
        "strict_data": True,
    }
    scoring, training = iteration(config("conditional-sft", **given), 0)
    assert scoring.options.items() >= given.items()
    assert not given.keys() & {"apply_chat_template", "max_samples", "strict_data"} & training.options.keys()
    writing, answers = ask(config("conditional-sft", **given), 0, 1.0)
    assert not given.keys() & (writing.options.keys() | answers.options.keys())


@pytest.mark.parametrize("name", RECIPES)
def test_a_default_of_the_recipe_holds_where_the_step_has_another(config, name):
    *_, training = iteration(config(name), 0)
    built = training.check()
    assert built.batch.max_epochs == 1 and built.data.max_len == 2048  # type: ignore[attr-defined]


def test_a_chat_template_of_one_s_own_is_for_the_prompts_and_is_saved_with_the_model(config):
    writing, scoring, training = iteration(config("rejection-sampling", tokenizer_chat_template="{{messages}}"), 0)
    assert ["tokenizer_chat_template" in step.options for step in (writing, scoring, training)] == [True, False, True]


def test_an_adapter_is_merged_before_it_writes(config, steps, tmp_path):
    loop.run("rejection-sampling", config("rejection-sampling", lora_rank=4, training_iters=2, bf16=True))
    assert steps.commands == ["generate", "score", "train sft", "merge"] * 2
    out = tmp_path / "out/iterations"
    training, merging, writing = steps.options[2:5]
    assert training["save_path"] == merging["adapter"] == str(out / "0/adapter")
    assert merging["save_path"] == writing["pretrain"] == str(out / "0/model")
    assert merging["pretrain"] == "some/model" and "bf16" not in merging
    assert not (out / "0/adapter/model.safetensors").exists() and (out / "0/adapter/run/metrics.jsonl").exists()
    assert (out / "1/adapter/model.safetensors").exists()


def test_only_the_newest_model_is_kept_and_the_record_of_each(config, steps, tmp_path):
    loop.run("rejection-sampling", config("rejection-sampling"))
    out = tmp_path / "out"
    assert [(out / f"iterations/{n}/model/model.safetensors").exists() for n in range(3)] == [False, False, True]
    assert all((out / f"iterations/{n}/model/run/metrics.jsonl").exists() for n in range(3))
    assert (out / "model").is_symlink() and (out / "model/model.safetensors").read_text().endswith("2/score.jsonl")
    assert not list(out.glob("iterations/*/cache"))


def test_all_models_are_kept_on_request(config, steps, tmp_path):
    loop.run("rejection-sampling", config("rejection-sampling", keep_models=True))
    assert len(list((tmp_path / "out/iterations").glob("*/model/model.safetensors"))) == 3


@pytest.mark.parametrize("elsewhere", [True, False])
def test_training_with_checkpoints_goes_on_from_them_and_they_go_with_the_iteration(config, steps, tmp_path, elsewhere):
    folder = str(tmp_path / "checkpoints") if elsewhere else None
    loop.run("rejection-sampling", config("rejection-sampling", save_steps=1, ckpt_path=folder, use_tensorboard="tb"))
    training = steps.options[5]
    assert training["load_checkpoint"] is True and training["use_tensorboard"] == "./tb/iteration-1"
    if elsewhere:
        assert Path(training["ckpt_path"]).match("checkpoints/recipe-*/iteration-1"), "recipes may share a folder"
    else:
        assert "ckpt_path" not in training
    assert not list(tmp_path.rglob("global_step1"))


def test_a_failing_step_ends_the_recipe_with_its_code_and_the_same_command_goes_on_there(config, steps, capfd):
    steps.codes = {4: 2}
    with pytest.raises(SystemExit) as ended:
        loop.run("rejection-sampling", config("rejection-sampling"))
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert "iteration 1: `rlhf score` ended with exit code 2" in said and "score.log" in said
    assert steps.commands == ["generate", "score", "train sft", "generate", "score"]
    loop.run("rejection-sampling", config("rejection-sampling"))
    assert steps.commands[5:] == ["score", "train sft", "generate", "score", "train sft"]
    assert "going on with iteration 1" in capfd.readouterr().out


def test_a_step_that_a_signal_killed_is_said_so(config, steps, capfd):
    steps.codes = {0: -signal.SIGKILL}
    with pytest.raises(SystemExit) as ended:
        loop.run("rejection-sampling", config("rejection-sampling"))
    assert ended.value.code == 1 and "ended by signal SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_every_place_to_stop_leads_to_the_same_end(config, steps, name, tmp_path):
    def history(folder: str) -> Any:
        loop.run(name, config(name, save_path=str(tmp_path / folder)))
        return json.loads((tmp_path / folder / "recipe.json").read_text())["history"]

    whole = history("whole")
    for stop in range(len(steps.commands)):
        steps.codes = {len(steps.commands) + stop: 1}
        with pytest.raises(SystemExit):
            history(f"stopped-{stop}")
        before = len(steps.commands)
        assert history(f"stopped-{stop}") == whole
        assert len(steps.commands) - before == len(whole) * (6 if name == "conditional-sft" else 3) - stop


def test_more_iterations_go_on_and_a_finished_recipe_shows_its_table(config, steps, capfd):
    loop.run("rejection-sampling", config("rejection-sampling", training_iters=1))
    loop.run("rejection-sampling", config("rejection-sampling", training_iters=2, keep_models=True))
    assert len(steps.commands) == 6
    capfd.readouterr()
    loop.run("rejection-sampling", config("rejection-sampling", training_iters=2))
    said = capfd.readouterr().out
    assert "all 2 iteration(s) are done" in said and "mean reward" in said
    assert len(steps.commands) == 6


def test_other_options_than_those_it_was_started_with_are_refused_by_name(config, steps, tmp_path):
    loop.run("rejection-sampling", config("rejection-sampling", training_iters=1))
    with pytest.raises(
        InputError, match=r"--learning_rate was 5e-06 and is 0.5; --best_of_n was 2 and is 3.*--save_path"
    ):
        loop.run("rejection-sampling", config("rejection-sampling", learning_rate=0.5, best_of_n=3))
    with pytest.raises(InputError, match="holds the recipe rejection-sampling"):
        loop.run("iterative-dpo", config("iterative-dpo"))
    assert len(steps.commands) == 3
    (tmp_path / "out/recipe.json").write_text("{")
    with pytest.raises(InputError, match=r"recipe\.json cannot be read"):
        loop.run("rejection-sampling", config("rejection-sampling"))


def test_options_may_change_as_long_as_nothing_has_been_written(config, steps, tmp_path):
    steps.codes = {0: 2}
    with pytest.raises(SystemExit):
        loop.run("rejection-sampling", config("rejection-sampling", engine="vllm"))
    loop.run("rejection-sampling", config("rejection-sampling", engine="transformers"))
    assert [options["engine"] for options in steps.options if "engine" in options] == ["vllm", *["transformers"] * 3]
    assert json.loads((tmp_path / "out/recipe.json").read_text())["options"]["engine"] == "transformers"


def test_rows_that_were_written_hold_the_options_also_if_their_step_is_not_done(config, steps, tmp_path):
    steps.codes = {0: 1}
    with pytest.raises(SystemExit):
        loop.run("rejection-sampling", config("rejection-sampling"))
    (tmp_path / "out/iterations/0/generate.jsonl.partial.index").write_text("[9, null]\n")
    with pytest.raises(InputError, match=r"--temperature was 1.0 and is 0.5"):
        loop.run("rejection-sampling", config("rejection-sampling", temperature=0.5))


def test_what_decides_no_result_may_change_in_the_middle_and_the_place_only_between_iterations(config, steps, tmp_path):
    def run(folder: str, **options: Any) -> None:
        usual = {"save_path": str(tmp_path / folder), "training_iters": 2, "train_batch_size": 8}
        loop.run("rejection-sampling", config("rejection-sampling", **usual | options))

    steps.codes = {5: 1}
    with pytest.raises(SystemExit):
        run("out", micro_train_batch_size=4)
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="--save_path was"):
        run("moved")
    (tmp_path / "moved").rename(tmp_path / "out")
    run("out", micro_train_batch_size=2)
    assert [options["micro_train_batch_size"] for options in steps.options[5:7]] == [4, 2]
    (tmp_path / "out").rename(tmp_path / "moved")
    run("moved", training_iters=3)


def test_the_report_is_there_after_every_iteration(config, steps, tmp_path):
    steps.codes = {4: 1}
    with pytest.raises(SystemExit):
        loop.run("rejection-sampling", config("rejection-sampling"))
    assert (tmp_path / "out/report.md").read_text().count("\n|") == 3, "a head, a rule, an iteration"


def test_half_a_surrogate_pair_in_another_column_is_asked_with_too(config, steps, tmp_path):
    def scored(options: dict[str, Any]) -> None:
        Steps.score(steps, options)
        if (beside := Path(options["output_path"] + ".scored.jsonl")).exists():
            rows = [json.loads(line) | {"source": {"id": "\ud83d"}} for line in beside.read_text().splitlines()]
            write_rows(str(beside), rows)

    steps.score = scored  # type: ignore[method-assign]
    loop.run("conditional-sft", config("conditional-sft"))
    prompts = (tmp_path / "out/iterations/0/prompts.jsonl").read_text().splitlines()
    assert json.loads(prompts[0])["id"] == "\ud83d"


def test_somebody_else_s_folder_is_left_alone(config, steps, tmp_path):
    (tmp_path / "out/model").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no recipe\.json in it, but model"):
        loop.run("rejection-sampling", config("rejection-sampling"))
    assert steps.commands == []


def test_two_recipes_do_not_work_in_one_folder(config, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "PATIENCE", 0)
    with state.locked(tmp_path / "out"), pytest.raises(InputError, match="another recipe is at work in it"):
        loop.run("rejection-sampling", config("rejection-sampling"))
    loop.run("rejection-sampling", config("rejection-sampling"))
    assert steps.commands


def test_an_iteration_with_nothing_to_train_on_says_so_before_training(config, steps):
    steps.rewards = lambda row: 0.0
    with pytest.raises(RunError, match=r"iteration 0 has nothing to train on.*--best_of_n"):
        loop.run("iterative-dpo", config("iterative-dpo"))
    assert steps.commands == ["generate", "score"]


def test_a_key_reaches_training_through_the_environment_and_no_file(config, steps, tmp_path, capfd):
    loop.run("rejection-sampling", config("rejection-sampling", use_wandb="s3cret-key", training_iters=1))
    assert steps.environments == [{}, {}, {"WANDB_API_KEY": "s3cret-key"}]
    assert steps.options[2]["use_wandb"] == "True"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    loop.run("rejection-sampling", config("rejection-sampling", use_wandb="s3cret-key", training_iters=1), dry_run=True)
    out, err = capfd.readouterr()
    assert "s3cret" not in out + err and "--use_wandb True" in out


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_prints_commands_that_say_the_same_and_writes_nothing(config, steps, name, tmp_path, capfd):
    given = config(
        name, input_template="Q: {}\\nA: 'x'", adam_betas=(0.8, 0.9), target_modules=["q", "v"], lora_rank=2, bf16=True
    )
    loop.run(name, given, dry_run=True)
    assert steps.commands == [] and not (tmp_path / "out").exists()
    printed = capfd.readouterr().out
    for step in [step for n in range(len(USUAL[name]) and 1) for step in iteration(given, n)]:
        assert shown(step) in printed
        assert parsed(step) == step.check()


def parsed(step: Any) -> Any:
    """What the command line makes of a step's command."""
    app, built = typer.Typer(), []
    app.callback()(lambda: None)

    @command(app, "it", step.config)
    def run(config: Any) -> None:
        built.append(config)

    words = shlex.split(shown(step).replace("\\\n", " "))
    result = CliRunner().invoke(app, ["it", *words[1 + len(step.command) :]])
    assert result.exit_code == 0, result.output
    return built.pop()


def test_prompts_that_do_not_last_are_an_error_before_the_first_step(config):
    with pytest.raises(InputError, match=r"has 10: give --training_iters 3 or less, or --rollout_batch_size 2"):
        loop.check_prompts(config("rejection-sampling", training_iters=4))
    loop.check_prompts(config("rejection-sampling", training_iters=3))
    loop.check_prompts(config("rejection-sampling", training_iters=1, rollout_batch_size=1000))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"best_of_n": 1}, "--best_of_n"),
        ({"num_nodes": 2}, "one node"),
        ({"learning_rate": -1}, "--learning_rate"),
        ({"training_iters": 0}, "--training_iters"),
        ({"greedy_sampling": True}, "the same response every time"),
        ({"top_fraction": 2}, "--top_fraction"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(config, options, said):
    with pytest.raises(InputError, match=said):
        config("rejection-sampling", **options)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("rejection-sampling", {"engine": "transformers", "tp_size": 2}, "--tp_size is for vLLM"),
        ("rejection-sampling", {"reward_pretrain": "OUT/model"}, r"--reward_pretrain .* is \(in\) --save_path"),
        ("rejection-sampling", {"pretrain": "OUT/model"}, r"--pretrain .* is \(in\) --save_path"),
        ("rejection-sampling", {"pretrain": "OUT"}, r"--pretrain .* is \(in\) --save_path"),
        (
            "rejection-sampling",
            {"pretrain": "TINY", "reward_pretrain": "TINY", "reward_engine": "vllm", "reward_zero_stage": 3},
            "--reward_zero_stage 3: --reward_engine vllm runs in one process",
        ),
        ("rejection-sampling", {"pretrain": "TINY", "reward_pretrain": "TINY"}, "--reward_pretrain .* no reward head"),
        (
            "rejection-sampling",
            {"pretrain": "TINY", "reward_pretrain": "REWARD", "max_len": 1024},
            "--max_len 1024: --reward_pretrain .* takes 256 tokens",
        ),
        (
            "rejection-sampling",
            {"pretrain": "TINY", "reward_pretrain": "REWARD", "normalize_reward": True},
            "--normalize_reward: .* with --calibrate",
        ),
        (
            "rejection-sampling",
            {"pretrain": "TINY", "reward_zero_stage": 3},
            "--reward_zero_stage 3.* is a Python function",
        ),
        (
            "rejection-sampling",
            {"pretrain": "TINY", "normalize_reward": True},
            "--normalize_reward: .* give --calibrate",
        ),
        ("rejection-sampling", {"pretrain": "TINY"}, "--reward_pretrain rewards.py"),
        ("rejection-sampling", {"pretrain": "./nowhere"}, "--pretrain nowhere: there is no such folder"),
        ("iterative-dpo", {"pretrain": "TINY", "ref_pretrain": "./nowhere"}, "--ref_pretrain nowhere"),
        ("rejection-sampling", {"train_batch_size": 6, "micro_train_batch_size": 4}, "--train_batch_size 6"),
        ("iterative-dpo", {"ipo": True, "label_smoothing": 0.1}, "--label_smoothing"),
        ("iterative-dpo", {"loss_type": "simpo", "ref_pretrain": "x"}, "simpo has no reference model"),
        ("iterative-dpo", {"share_prefix": True}, "--share_prefix"),
        ("conditional-sft", {"ask_rewards": [1.0], "ask_prompts": 0}, "--ask_rewards"),
        ("conditional-sft", {"temperature": 0.5, "ask_prompts": 0}, "--temperature is for asking .*--ask_prompts 0"),
        (
            "conditional-sft",
            {"pretrain": "TINY", "reward_pretrain": "REWARD", "max_len": 64, "tp_size": 64},
            "--tp_size",
        ),
        (
            "rejection-sampling",
            {"pretrain": "TINY", "reward_pretrain": "REWARD", "max_len": 64, "prompt_max_len": 999},
            "--prompt_max_len 999: the context",
        ),
        ("rejection-sampling", {"save_path": "OUT,more"}, r"--save_path .*/out,more: .* without one"),
        ("rejection-sampling", {"ckpt_path": "USED"}, "--ckpt_path .* checkpoints of an earlier recipe"),
        (
            "rejection-sampling",
            {"pretrain": "TINY", "lora_rank": 2, "target_modules": ["qproj"]},
            "--target_modules qproj: no module",
        ),
        ("iterative-dpo", {"pretrain": "TINY", "ref_pretrain": "SMALL"}, "--ref_pretrain .*the model only 9"),
        ("conditional-sft", {"reward_template": "{input}"}, "--reward_template must contain {reward}"),
    ],
    ids=str,
)
def test_what_no_step_could_do_is_refused_before_the_first(config, name, options, said, tmp_path):
    (tmp_path / "out/model").mkdir(parents=True)
    tiny_model(tmp_path / "TINY")
    reward_model(tmp_path / "TINY", tmp_path / "REWARD")
    shutil.copytree(tmp_path / "TINY", tmp_path / "SMALL")
    architecture = json.loads((tmp_path / "TINY/config.json").read_text())
    (tmp_path / "SMALL/config.json").write_text(json.dumps(architecture | {"vocab_size": 9}))
    earlier = iteration(config(name, ckpt_path=str(tmp_path / "used")), 0)[-1].options["ckpt_path"]
    Path(earlier).mkdir(parents=True)
    for word, path in {"OUT": "out", "TINY": "TINY", "REWARD": "REWARD", "SMALL": "SMALL", "USED": "used"}.items():
        options = {
            key: value.replace(word, str(tmp_path / path)) if isinstance(value, str) else value
            for key, value in options.items()
        }
    with pytest.raises(InputError, match=said):
        loop.check(config(name, **options))


def tiny_model(folder: Path) -> None:
    """A folder that looks like a model, as far as its config."""
    from rlhf_core.tiny import make_model, make_tokenizer

    make_model(make_tokenizer(["a story of a cat"], folder, vocab_size=300), folder, hidden_size=32)


def reward_model(base: Path, folder: Path) -> None:
    """A reward model without statistics, made of a language model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, problem_type="regression").save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def test_scoring_with_vllm_leaves_the_ranks_to_training(config):
    step = iteration(config("rejection-sampling", num_procs=2, reward_engine="vllm", reward_pretrain="some/reward"), 0)[
        1
    ]
    assert "num_procs" not in step.options and step.check().reward.reward_engine == "vllm"


def test_a_recipe_does_not_start_on_ranks(config, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun or deepspeed"):
        loop.check(config("rejection-sampling"))


def test_the_table_has_the_numbers_of_every_iteration(config, steps, tmp_path):
    loop.run("rejection-sampling", config("rejection-sampling", training_iters=2))
    (first, _) = json.loads((tmp_path / "out/recipe.json").read_text())["history"]
    assert first == {
        "prompts": 4, "responses": 8, "mean_reward": 0.5, "best_reward": 1.0, "kept": 4, "tokens": 1.5, "cut_off": 0.5, "loss": 1.5,
    }  # fmt: skip
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    assert (
        lines[2].split()
        == "| iteration | prompts | responses | mean reward | best reward | trained on | response length | cut off | training loss |".split()
    )
    assert lines[4].split() == "| 0 | 4 | 8 | 0.5 | 1 | 4 | 1.5 | 50% | 1.5 |".split()
    assert len({len(line) for line in lines[2:6]}) == 1


@pytest.mark.parametrize("name", ["rejection-sampling", "conditional-sft"])
def test_the_numbers_are_drawn(config, steps, tmp_path, name):
    loop.run(name, config(name))
    history = json.loads((tmp_path / "out/recipe.json").read_text())["history"]
    picture(name, history, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_normalised_rewards_are_shown_as_the_scorer_gave_them(config, steps, tmp_path):
    score = Steps.score

    def normalised(self: Steps, options: dict[str, Any]) -> None:
        score(self, options)
        for path in Path(options["output_path"]).parent.glob("score.jsonl*"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            write_rows(str(path), [row | {"raw_reward": row["reward"] + 10} for row in rows])

    steps.score = normalised.__get__(steps)  # type: ignore[method-assign]
    loop.run(
        "rejection-sampling", config("rejection-sampling", normalize_reward=True, calibrate=True, training_iters=1)
    )
    (first,) = json.loads((tmp_path / "out/recipe.json").read_text())["history"]
    assert (first["mean_reward"], first["best_reward"]) == (10.5, 11.0)


def test_dropped_rows_count_for_nothing(config, steps, tmp_path):
    steps.rewards = lambda row: None if row["row"] == 0 else float(row["sample"])
    loop.run("rejection-sampling", config("rejection-sampling", training_iters=1))
    (first,) = json.loads((tmp_path / "out/recipe.json").read_text())["history"]
    assert (first["prompts"], first["responses"], first["mean_reward"]) == (3, 6, 0.5)


def test_a_column_that_no_row_has_is_not_shown():
    assert table("iteration", [("0", {"loss": 1.0, "tokens": None})]).splitlines()[0] == "| iteration | training loss |"
    assert "normalised" in report("conditional-sft", [{"loss": 1.0}], normalised=True)


@pytest.fixture
def here(tmp_path):
    """Run a step as a process; returns its exit code and its log."""

    def run(*arguments: str, **environment: str) -> tuple[int, str]:
        with (tmp_path / "lock").open("w") as lock:
            code = execute(list(arguments), tmp_path / "log", environment, lock.fileno())
        return code, (tmp_path / "log").read_text()

    return run


def test_what_a_step_says_is_shown_and_logged(here, capfd):
    code, log = here("--version")
    out, err = capfd.readouterr()
    assert code == 0 and log == out and out.startswith("rlhf ") and err == ""
    code, log = here("no_such_command")
    out, err = capfd.readouterr()
    assert code == 2 and log.endswith(err) and "no_such_command" in err and out == ""


def test_a_step_that_is_killed_has_the_signal_as_its_code(here, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert here("--version", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))[0] == -signal.SIGKILL


def test_a_step_and_what_it_has_started_end_with_a_recipe_that_was_killed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, pathlib, subprocess\n"
        "def stay():\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        f"    part = pathlib.Path({str(tmp_path / 'part')!r})\n"
        "    part.write_text(f'{os.getpid()} {child.pid}')\n"
        f"    part.rename({str(tmp_path / 'pids')!r})\n"
        "    child.wait()\n"
        "atexit.register(stay)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    started = (
        "from pathlib import Path; from rlhf_cli.recipes.process import execute; "
        f"execute(['--version'], Path({str(tmp_path / 'log')!r}), {{'PYTHONPATH': {path!r}}}, 0)"
    )
    recipe = subprocess.Popen([sys.executable, "-c", started], stdout=subprocess.DEVNULL)
    try:
        until((tmp_path / "pids").exists)
    finally:
        recipe.kill()
        recipe.wait()
    for pid in (tmp_path / "pids").read_text().split():
        until(lambda pid=pid: ended(pid))


def until(there: Callable[[], bool]) -> None:
    """Wait for something that happens within a minute."""
    for _ in range(600):
        if there():
            return
        time.sleep(0.1)
    raise AssertionError("it does not happen")


def ended(pid: str) -> bool:
    """Whether a process has ended; nobody may have asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True
