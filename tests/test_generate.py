"""`rlhf generate` as a program: killed and started again, on several engines, and under the name `rlhf infer`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rlhf_infer.config import GenerateConfig

SECONDS = 120
"""How long a program may take to come to a certain point."""


@pytest.fixture
def generate(tiny: Path, data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a small generation, with options changed, added, or (None) left out."""

    def make(*more: str, command: tuple[str, ...] = ("generate",), **options: Any) -> list[str]:
        usual = {
            "pretrain": tiny, "dataset": data, "input_key": "question", "output_path": tmp_path / "out.jsonl",
            "engine": "transformers", "max_new_tokens": 8, "prompt_max_len": 64, "best_of_n": 2,
        }  # fmt: skip
        given = {f"--{name}": str(value) for name, value in (usual | options).items() if value is not None}
        return [*command, *(part for option in given.items() for part in option), *more]

    return make


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for_lines(path: Path, count: int, process: Any) -> None:
    """Wait until a program has written so many lines; it must not end before."""
    end = time.monotonic() + SECONDS
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_a_killed_generation_goes_on_to_the_result_of_an_uninterrupted_one(
    generate, start, rlhf, tmp_path, micro_batch_size
):
    """To its bytes where nobody is computed with others; else to its tokens, and to the rounding of their log-probs."""
    options = {"max_new_tokens": 48, "micro_batch_size": micro_batch_size, "repetition_penalty": 1.1}
    command = generate(output_path=tmp_path / "killed.jsonl", **options)
    killed = start([sys.executable, "-m", "rlhf_cli", *command])
    wait_for_lines(tmp_path / "killed.jsonl.partial", 6, killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed.jsonl").exists()
    again = rlhf(command)
    assert again.code == 0, again.err
    assert "this one goes on behind them" in again.out
    whole = rlhf(generate(output_path=tmp_path / "whole.jsonl", **options))
    assert whole.code == 0, whole.err
    if micro_batch_size == 1:
        assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    lines, expected = lines_of(tmp_path / "killed.jsonl"), lines_of(tmp_path / "whole.jsonl")
    assert len(lines) == 52
    assert [line.pop("logp") for line in lines] == pytest.approx([line.pop("logp") for line in expected], abs=1e-3)
    assert lines == expected


def test_infer_with_the_options_of_the_recipes_is_generate(generate, rlhf, tmp_path):
    """`batch_inference` as usage.rst calls it, `--micro_batch_size` and all, with the engine that needs no vLLM."""
    answer = rlhf(
        generate(
            "--enable_prefix_caching", command=("infer", "--eval_task", "generate"), engine=None, output_path=tmp_path / "a.jsonl",
            temperature=0.9, micro_batch_size=64, iter=1, rollout_batch_size=10,
        )
    )  # fmt: skip
    assert answer.code == 2
    assert "--enable_prefix_caching is for vLLM" in answer.err
    answer = rlhf(
        generate(
            command=("infer", "--eval_task", "generate"), engine=None, output_path=tmp_path / "a.jsonl", temperature=0.9,
            micro_batch_size=64, iter=1, rollout_batch_size=10,
        )
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert rlhf(generate(output_path=tmp_path / "b.jsonl", temperature=0.9, iter=1, rollout_batch_size=10)).code == 0
    infer, plain = lines_of(tmp_path / "a.jsonl"), lines_of(tmp_path / "b.jsonl")
    assert [line["row"] for line in infer] == [row for row in range(10, 20) for _ in range(2)]
    assert [line["output_ids"] for line in infer] == [line["output_ids"] for line in plain]


def test_the_command_of_usage_rst_is_understood_as_written(tiny, rlhf, tmp_path, monkeypatch):
    """Apart from names, models and sizes. What vLLM has no use for is said, and does not stop it."""
    pytest.importorskip("vllm")
    monkeypatch.setattr("rlhf_core.models.load.load_model", None)
    chats = tmp_path / "prompts.jsonl"
    chats.write_text(json.dumps({"context_messages": [{"role": "user", "content": "red"}]}) + "\n")
    answer = rlhf(
        f"infer --eval_task generate_vllm --pretrain {tiny} --bf16 --max_new_tokens 16 --prompt_max_len 64 --dataset {chats} "
        "--input_key context_messages --apply_chat_template --temperature 0.9 --best_of_n 4 --enable_prefix_caching --tp_size 1 "
        f"--micro_batch_size 64 --iter 0 --rollout_batch_size 10240 --output_path {tmp_path}/generate.jsonl --dry_run".split()
    )
    assert answer.code == 0, answer.err
    assert "--micro_batch_size: not used (vLLM schedules for itself" in answer.out
    assert "engine:    vllm" in answer.out and "4 each" in answer.out


def test_a_dry_run_prints_the_plan_and_writes_nothing(generate, rlhf, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_core.models.load.load_model", None)
    answer = rlhf(generate("--dry_run"))
    assert answer.code == 0, answer.err
    assert "26 prompts" in answer.out and "2 each, at most 8 tokens" in answer.out
    assert list(tmp_path.iterdir()) == []


class Mortal:
    """An engine whose process dies once, in the middle of a block."""

    def __init__(self, engine: Any, mark: Path) -> None:
        self.engine, self.mark = engine, mark

    def generate(self, requests: Any, sampling: Any) -> Iterator[Any]:
        for number, answer in enumerate(self.engine.generate(requests, sampling)):
            if number == 1 and self._first():
                os.kill(os.getpid(), signal.SIGKILL)
            yield answer

    def _first(self) -> bool:
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def make_mortal(mark: Path, config: GenerateConfig, folder: Path) -> Mortal:
    from rlhf_infer.engines.choose import make_engine
    from rlhf_infer.generate import describe_model

    assert folder == Path.cwd()
    return Mortal(make_engine(config, *describe_model(config)), mark)


def run_with_mortals(mark: str, *arguments: str) -> None:
    """`rlhf` with those arguments, in a process of its own: Ray forks, and this file is not a module that it could import."""
    from ray import cloudpickle

    from rlhf_cli.main import main

    import_module("rlhf_infer.generate").make_copy = partial(make_mortal, Path(mark))
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    sys.argv = ["rlhf", *arguments]
    main()


RUN = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("mortals", sys.argv[1])
sys.modules["mortals"] = mortals = module_from_spec(spec)
spec.loader.exec_module(mortals)
mortals.run_with_mortals(*sys.argv[2:])
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_two_engines_on_ray_of_which_one_dies_write_what_one_engine_writes(generate, rlhf, start, finish, tmp_path):
    assert rlhf(generate(output_path=tmp_path / "one.jsonl")).code == 0
    mark = tmp_path / "died"
    options = generate(output_path=tmp_path / "two.jsonl", num_engines=2)
    answer = finish(start([sys.executable, "-c", RUN, __file__, str(mark), *options], RAY_ADDRESS="local"), 240)
    assert answer.code == 0, answer.err
    assert mark.exists()
    one, two = lines_of(tmp_path / "one.jsonl"), lines_of(tmp_path / "two.jsonl")
    assert [line.pop("logp") for line in two] == pytest.approx([line.pop("logp") for line in one], abs=1e-4)
    assert two == one
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith("two.jsonl")]
    assert sorted(left) == ["two.jsonl", "two.jsonl.job.json"]
