"""Bad input of generation, scoring and recipes: one message that says what is wrong, where, and the way out; nothing written.

Every case goes through the command line. Exit code 2 is the user's to mend.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Bench = SimpleNamespace


def case(
    name: str, options: dict[str, Any] | Callable[[Bench], dict[str, Any]], *says: str, more: tuple[str, ...] = ()
) -> Any:
    """A row of a table: options that differ from a good command's, and what the message must contain."""
    return pytest.param(options, more, says, id=name.replace(" ", "-"))


@pytest.fixture(autouse=True)
def _no_weight_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input is found before the slow part: nothing here may load weights or start an engine."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded before the input was refused")

    from rlhf_core.models import load
    from rlhf_infer.engines import choose

    monkeypatch.setattr(load, "load_model", refuse)
    monkeypatch.setattr(choose, "make_engine", refuse)


@pytest.fixture
def bench(tmp_path: Path, tiny: Path, data: Path, model: Callable[..., Path], reward: Path) -> Bench:
    """What cases make their broken things with."""

    def file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def rows(*rows: Any, name: str = "rows.jsonl") -> Path:
        return file(name, "".join(json.dumps(row) + "\n" for row in rows))

    return Bench(tmp=tmp_path, tiny=tiny, data=data, copy=model, reward=reward, file=file, rows=rows)


@pytest.fixture(scope="session")
def reward(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random reward model."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def flags(usual: dict[str, Any], options: dict[str, Any]) -> list[str]:
    given = {f"--{name}": value for name, value in (usual | options).items() if value is not None}
    return [part for name, value in given.items() for part in ([name] if value is True else [name, str(value)])]


def refused(answer: Any, says: tuple[str, ...]) -> None:
    """Check the exit code and the message: one line of `error:` that contains every phrase of `says`."""
    assert "Traceback" not in answer.err + answer.out
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert answer.code == 2, answer.err
    assert len(errors) == 1, answer.err
    for phrase in says:
        assert phrase in errors[0], f"{phrase!r} is not in: {errors[0]}"


PROMPTS = {"engine": "transformers", "input_key": "question", "prompt_max_len": 64}
"""Of a good command, besides its model, data and output."""

OPTIONS = [
    case("misspelt flag", {}, "--best_of_m", "did you mean --best_of_n?", more=("--best_of_m", "3")),
    case("no output", {"output_path": None}, "--output_path is required"),
    case("no pretrain", {"pretrain": None}, "--pretrain is required"),
    case("no prompts each", {"best_of_n": 0}, "--best_of_n", "greater than or equal to 1", "'0'"),
    case("freezing temperature", {"temperature": 0}, "--temperature", "greater than 0", "'0'"),
    case("share above one", {"top_p": 1.5}, "--top_p", "less than or equal to 1", "'1.5'"),
    case("no penalty at all", {"repetition_penalty": 0}, "--repetition_penalty", "greater than 0"),
    case("greedy and hot", {"greedy_sampling": True, "temperature": 0.5}, "--greedy_sampling", "--temperature"),
    case("greedy and several", {"greedy_sampling": True, "best_of_n": 4}, "--greedy_sampling", "--best_of_n 4"),
    case("unknown engine", {"engine": "vlm"}, "--engine", "'vlm'", "'vllm'"),
    case("vllm option without vllm", {"max_num_seqs": 8}, "--max_num_seqs", "vLLM"),
    case("slice without a number", {"rollout_batch_size": 8}, "--rollout_batch_size 8", "--iter"),
    case("negative slice", {"iter": -1}, "--iter", "greater than or equal to 0"),
    case("slice past the end", {"iter": 3, "rollout_batch_size": 10}, "--iter 3", "26 prompts", "--iter 0 to 2"),
    case("template for no reward", {"reward_template": "{input}{reward}"}, "--reward_template", "--csft_reward"),
    case(
        "template without its reward", {"reward_template": "{input}", "csft_reward": 1}, "--reward_template", "{reward}"
    ),
    case("template without a place", {"input_template": "User:"}, "--input_template", "exactly once", "'User:'"),
    case("room for no prompt", {"prompt_max_len": 128}, "--prompt_max_len 128", "128 tokens", "at most 127"),
    case("no folder of a model", {"pretrain": "./nowhere"}, "--pretrain nowhere", "no such folder"),
    case(
        "model without weights",
        lambda b: {"pretrain": b.copy(without=("model.safetensors",))},
        "--pretrain",
        "no weights",
    ),
    case(
        "model without tokenizer",
        lambda b: {"pretrain": b.copy(without=("tokenizer.json", "tokenizer_config.json"))},
        "no tokenizer can be loaded",
    ),
    case("model that only scores", lambda b: {"pretrain": b.reward}, "--pretrain", "reward model", "rlhf score"),
    case(
        "tokenizer of another model",
        lambda b: {"pretrain": b.copy(config={"vocab_size": 100})},
        "--pretrain",
        "do not belong",
    ),
    case("output that is a folder", lambda b: {"output_path": b.tmp}, "--output_path", "is a folder"),
    case(
        "output under a file",
        lambda b: {"output_path": b.file("taken", "") / "out.jsonl"},
        "--output_path",
        "taken is a file",
    ),
    case(
        "output that cannot be written",
        {"output_path": "/proc/nowhere/out.jsonl"},
        "--output_path",
        "cannot write to /proc",
    ),
    case("output of somebody else", lambda b: {"output_path": b.file("mine.txt", "mine")}, "mine.txt", "--overwrite"),
    case("output that is the data", lambda b: {"output_path": b.data}, "--output_path", "--dataset", "another place"),
    case(
        "output in the data",
        lambda b: {"dataset": b.rows({"question": "a"}).parent, "output_path": b.tmp / "out.jsonl"},
        "--output_path",
        "which is read",
    ),
]

DATA = [
    case("no such file", {"dataset": "./nowhere.jsonl"}, "nowhere.jsonl does not exist"),
    case("empty file", lambda b: {"dataset": b.file("rows.jsonl", "")}, "rows.jsonl", "empty"),
    case("no such split", {"dataset_split": "tests"}, "has no split `tests`"),
    case("no such column", {"input_key": "questoin"}, "--input_key questoin", "question"),
    case("broken line", lambda b: {"dataset": b.file("rows.jsonl", '{"question": "a"}\n{"question"\n')}, "rows.jsonl:2", "JSON"),
    case("not one usable row", lambda b: {"dataset": b.rows({"question": ""}, {"question": " "})}, "no row can be used", "(2, the first:", "rows.jsonl:1"),
    case("only prompts that are too long", {"prompt_max_len": 2}, "no row can be used", "longer than --prompt_max_len 2"),
    case("strict and one bad row", lambda b: {"strict_data": True, "dataset": b.rows({"question": "a"}, {"question": 3})}, "rows.jsonl:2", "`question` is a number", "--strict_data"),
    case("chats without a template", lambda b: {"dataset": b.rows({"question": [{"role": "user", "content": "a"}]})}, "--apply_chat_template"),
    case("template that the tokenizer lacks", lambda b: {"apply_chat_template": True, "pretrain": without_template(b)}, "no chat template", "--tokenizer_chat_template"),
    case("template that is not Jinja", {"apply_chat_template": True, "tokenizer_chat_template": "{% if %}"}, "chat template", "Jinja"),
    case("probabilities for no mixture", {"dataset_probs": "0.5,0.5"}, "--dataset_probs 0.5,0.5", "2 probabilities for 1"),
    case(
        "written out twice",
        lambda b: {"apply_chat_template": True, "input_key": "input", "dataset": b.rows({"input": "a", "rendered": "chat"})},
        "written out already",
        "--input_key messages",
    ),
]  # fmt: skip


def without_template(bench: Bench) -> Path:
    folder = bench.copy()
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(("options", "more", "says"), [*OPTIONS, *DATA])
def test_generation_that_cannot_work_is_refused(options, more, says, bench, rlhf, tmp_path):
    usual = PROMPTS | {"pretrain": bench.tiny, "dataset": bench.data, "output_path": tmp_path / "new" / "out.jsonl"}
    given = options(bench) if callable(options) else options
    before = sorted(tmp_path.rglob("*"))
    refused(rlhf(["generate", *flags(usual, given), *more]), says)
    assert sorted(tmp_path.rglob("*")) == before


SCORING = [
    case("a language model", lambda b: {"pretrain": b.tiny}, "--pretrain", "no reward head", "rlhf train rm"),
    case("no folder of a model", {"pretrain": "./nowhere"}, "--pretrain", "nowhere"),
    case("no such function", lambda b: {"pretrain": f"{b.file('mine.py', 'x = 1')}:judge"}, "judge"),
    case("unknown processor", {"post_processor": "best"}, "--post_processor", "'best'", "'rs'"),
    case("fraction for another processor", {"post_processor": "rs", "top_fraction": 0.5}, "--top_fraction", "raft"),
    case("raft without its fraction", {"post_processor": "raft"}, "--post_processor raft", "--top_fraction"),
    case("filter without its threshold", {"post_processor": "filter"}, "--post_processor filter", "--reward_threshold"),
    case("pairs without their margin", {"post_processor": "dpo_pairs"}, "--post_processor dpo_pairs", "--min_margin"),
    case("calibrated and not normalised", {"calibrate": True}, "--calibrate", "--normalize_reward"),
    case(
        "normalised by a model that was not",
        {"normalize_reward": True},
        "--normalize_reward",
        "mean and standard deviation",
    ),
    case("head of another name", {"value_head_prefix": "v_head"}, "--value_head_prefix v_head"),
    case("stage four", {"zero_stage": 4}, "--zero_stage", "less than or equal to 3"),
    case("rows without responses", lambda b: {"dataset": b.rows({"question": "a"})}, "--output_key response"),
    case("output that is the data", lambda b: {"output_path": b.data}, "--output_path", "--dataset"),
    case("output of somebody else", lambda b: {"output_path": b.file("mine.txt", "mine")}, "mine.txt", "--overwrite"),
    case(
        "not one usable row",
        lambda b: {"dataset": b.rows({"question": "a", "response": ""})},
        "rows.jsonl:1",
        "`response`",
    ),
]


@pytest.mark.parametrize(("options", "more", "says"), SCORING)
def test_scoring_that_cannot_work_is_refused(options, more, says, bench, rlhf, tmp_path):
    usual = {
        "pretrain": bench.reward, "dataset": bench.data, "input_key": "question", "output_key": "response", "max_len": 96,
        "output_path": tmp_path / "new" / "out.jsonl",
    }  # fmt: skip
    given = options(bench) if callable(options) else options
    before = sorted(tmp_path.rglob("*"))
    refused(rlhf(["score", *flags(usual, given), *more]), says)
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before


TASKS = [
    case("no task", {"eval_task": None}, "--eval_task is required"),
    case("unknown task", {"eval_task": "score"}, "--eval_task", "'score'", "'rm'"),
    case("reward options of a writer", {"post_processor": "rs"}, "--post_processor", "scores nothing"),
    case("sampling options of a scorer", {"eval_task": "rm", "best_of_n": 4}, "--best_of_n", "writes nothing"),
    case("two engines", {"engine": "vllm"}, "--engine vllm", "--eval_task generate", "leave out --engine"),
    case("slice of a scorer", {"eval_task": "rm", "iter": 1, "rollout_batch_size": 4}, "--iter, --rollout_batch_size"),
]


@pytest.mark.parametrize(("options", "more", "says"), TASKS)
def test_tasks_that_cannot_work_are_refused(options, more, says, bench, rlhf, tmp_path):
    usual = {
        "eval_task": "generate",
        "pretrain": bench.tiny,
        "dataset": bench.data,
        "output_path": tmp_path / "out.jsonl",
    }
    refused(rlhf(["infer", *flags(usual, options), *more]), says)
    assert not (tmp_path / "out.jsonl").exists()


RECIPES = [
    case("no reward", {"reward_pretrain": None}, "--reward_pretrain is required"),
    case("no iterations", {"training_iters": 0}, "--training_iters", "greater than or equal to 1"),
    case("several nodes", {"num_nodes": 2, "master_addr": "host"}, "--num_nodes 2", "one node"),
    case("slice of a loop", {}, "--iter", more=("--iter", "1")),
    case("greedy candidates", {"greedy_sampling": True, "best_of_n": 4}, "--greedy_sampling"),
]


@pytest.mark.parametrize("recipe", ["rejection-sampling", "iterative-dpo"])
@pytest.mark.parametrize(("options", "more", "says"), RECIPES)
def test_recipes_that_cannot_work_are_refused(options, more, says, recipe, bench, rlhf, tmp_path):
    usual = {
        "pretrain": bench.tiny, "reward_pretrain": bench.reward, "dataset": bench.data, "input_key": "question",
        "save_path": tmp_path / "out",
    }  # fmt: skip
    refused(rlhf(["recipe", recipe, *flags(usual, options), *more]), says)
    assert not (tmp_path / "out").exists()


def test_one_of_several_ranks_is_refused(bench, rlhf, tmp_path, monkeypatch):
    """As those start it who had `deepspeed --module openrlhf.cli.batch_inference --eval_task generate`."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    usual = {
        "eval_task": "generate",
        "pretrain": bench.tiny,
        "dataset": bench.data,
        "output_path": tmp_path / "out.jsonl",
    }
    refused(rlhf(["infer", *flags(usual, {})]), ("one of 8 ranks", "--num_engines 8"))


def test_several_engines_without_ray_name_the_extra(bench, rlhf, tmp_path, monkeypatch):
    from rlhf_infer.engines import replicas

    monkeypatch.setattr(replicas, "find_spec", lambda name: None)
    usual = PROMPTS | {"pretrain": bench.tiny, "dataset": bench.data, "output_path": tmp_path / "out.jsonl"}
    refused(
        rlhf(["generate", *flags(usual, {"num_engines": 2})]),
        ("--num_engines 2", "pip install 'rlhf-infer[ray]'"),
    )


def test_the_unfinished_output_of_another_command_is_refused(bench, rlhf, tmp_path, monkeypatch):
    usual = PROMPTS | {"pretrain": bench.tiny, "dataset": bench.data, "output_path": tmp_path / "out.jsonl"}
    job = import_module("rlhf_infer.generate").Job

    def killed(self: Any) -> None:
        with self.output as output:
            output.append([{"row": 0}])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "run", killed)
        assert rlhf(["generate", *flags(usual, {})]).code == 130
    refused(
        rlhf(["generate", *flags(usual, {"temperature": 0.7})]),
        ("out.jsonl.partial", "--temperature was 1.0 and is 0.7", "--overwrite"),
    )
