"""A GRPO step of ours beside one of TRL's `GRPOTrainer`, on the same model, prompts and lengths.

    python benchmarks/ppo.py                    a random Llama of 15 M parameters, vocabulary 32 000
    python benchmarks/ppo.py --model FOLDER --data PROMPTS.jsonl

Groups of 8, 32 responses of at most 48 tokens in an optimizer step, no KL penalty, temperature 1, a reward function that costs
nothing, float32. TRL writes with transformers; ours with transformers in the policy (`--vllm_num_engines 0`) and with one vLLM
engine. Every measurement is a process of its own (ours with its Ray), the sides take turns, start-up and the first steps are not
counted, and the ratio is taken round by round. TRL is in the dependency group `bench`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import FIRST_WORD, make_model, text

GROUP, RESPONSES, LENGTH, WARMUP = 8, 32, 48, 3
PHASES = ("generate", "judge", "update", "sync")


def spread(completions: list[str]) -> list[float]:
    """How many different letters a response has."""
    return [len(set(completion)) / 10 for completion in completions]


REWARD = """def reward(responses):
    return [len(set(response)) / 10 for response in responses]
"""


def ours(options: argparse.Namespace, engines: int) -> dict[str, Any]:
    """Train with ours; samples per second, and the seconds of each phase of a step."""
    from rlhf_data.options import build
    from rlhf_ray.config import PPOConfig
    from rlhf_ray.run import train

    with tempfile.TemporaryDirectory() as folder:
        reward = Path(folder) / "reward.py"
        reward.write_text(REWARD)
        given = {
            "pretrain": str(options.model), "prompt_data": str(options.data), "reward_pretrain": str(reward), "save_path": folder,
            "vllm_num_engines": engines, "rollout_batch_size": RESPONSES, "train_batch_size": RESPONSES,
            "micro_train_batch_size": RESPONSES, "micro_rollout_batch_size": RESPONSES, "n_samples_per_prompt": GROUP,
            "generate_max_len": LENGTH, "prompt_max_len": 128, "advantage_estimator": "grpo", "init_kl_coef": 0.0,
            "zero_stage": 0, "max_rollouts": WARMUP + options.steps, "num_episodes": 1_000, 
        }  # fmt: skip
        if engines:
            given |= {"max_num_seqs": RESPONSES, "check_sync_steps": -1}
        train(build(PPOConfig, given))
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()][WARMUP:]
    phases = {phase: sum(row.get(f"seconds_{phase}", 0.0) for row in rows) / len(rows) for phase in PHASES}
    length = sum(row["response_length"] for row in rows) / len(rows)
    return {"samples": RESPONSES / sum(phases.values()), "phases": phases, "length": length}


def trl(options: argparse.Namespace) -> dict[str, Any]:
    """Train with TRL; the same figures."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks: list[float] = []
    lengths: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **others: Any) -> None:
            marks.append(time.perf_counter())

        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            lengths.extend(logs[key] for key in ("completions/mean_length",) if key in logs)

    rows = [json.loads(line)["prompt"] for line in options.data.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, per_device_train_batch_size=RESPONSES, num_generations=GROUP, max_completion_length=LENGTH, use_cpu=True,
            bf16=False, gradient_checkpointing=False, max_steps=WARMUP + options.steps, report_to=[], save_strategy="no",
            logging_steps=1, temperature=1.0, learning_rate=1e-6, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            str(options.model),
            reward_funcs=lambda completions, **others: spread(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": rows}),
            processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
            callbacks=[Watch()],
        )
        trainer.train()
    seconds = (marks[-1] - marks[WARMUP - 1]) / (len(marks) - WARMUP)
    return {"samples": RESPONSES / seconds, "phases": {"step": seconds}, "length": sum(lengths) / len(lengths)}


SIDES = {
    "trl": trl,
    "ours, transformers": lambda options: ours(options, 0),
    "ours, vLLM": lambda options: ours(options, 1),
}


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--model", str(options.model), "--data", str(options.data)]
    done = subprocess.run([*command, "--steps", str(options.steps)], capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"measured"')]
    if done.returncode or not found:
        raise SystemExit(f"{side} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return json.loads(found[0])["measured"]


def make_inputs(folder: Path) -> None:
    """A random model, and prompts of words."""
    import numpy as np

    # heads of 32, which vLLM's attention for CPUs can do
    make_model(folder, vocabulary=32_000, max_len=256, num_attention_heads=9, num_key_value_heads=9)
    rng = np.random.default_rng(0)
    rows = [{"prompt": text(rng.integers(FIRST_WORD, 32_000, 16))} for _ in range(256)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; by default a random one is made")
    parser.add_argument("--data", type=Path, help="JSON lines with `prompt`")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps that are counted")
    parser.add_argument("--rounds", type=int, default=3, help="times that every side runs")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"measured": SIDES[options.side](options)}), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            make_inputs(Path(folder))
            options.model, options.data = Path(folder), Path(folder) / "prompts.jsonl"
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in sorted(SIDES, reverse=bool(number % 2)):
                found[side].append(measure(side, options))
    for side, runs in found.items():
        ratios = [run["samples"] / other["samples"] for run, other in zip(runs, found["trl"], strict=True)]
        phases = {phase: median(run["phases"][phase] for run in runs) for phase in runs[0]["phases"]}
        whole = sum(phases.values())
        shares = ", ".join(f"{phase} {seconds:.2f} s ({seconds / whole:.0%})" for phase, seconds in phases.items())
        print(f"{side:20} {median(run['samples'] for run in runs):7.1f} samples/s  {median(ratios):5.2f}x "
              f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})  {median(run['length'] for run in runs):.0f} tokens  {shares}")  # fmt: skip


if __name__ == "__main__":
    main()
