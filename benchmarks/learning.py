"""That it learns: the runs whose curves stand in docs/ppo.md, and the commands that made them.

    python benchmarks/learning.py FOLDER [--only grpo] [--draw]

FOLDER takes the runs; it must hold (or be given by `--model` and `--data`) a small pretrained model of stories, and prompts. A
run that is there already is not repeated; `--draw` writes docs/images/ppo_*.png of those that are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = """
    --pretrain {model} --prompt_data {prompts} --input_template "" --vllm_num_engines 1 --zero_stage 0
    --rollout_batch_size 128 --train_batch_size 64 --micro_train_batch_size 32 --micro_rollout_batch_size 64
    --generate_max_len 48 --prompt_max_len 64 --num_episodes 20 --max_rollouts 30 --lr_warmup_ratio 0.1
    --actor_learning_rate 1e-4 --logged_samples 4 --check_sync_steps 10 --save_path {out}
"""
GROUPED = "--n_samples_per_prompt 8 --init_kl_coef 0.1 --use_kl_loss"
RUNS = {
    "ppo": "--reward_pretrain {animals} --advantage_estimator gae --critic_learning_rate 1e-3 --init_kl_coef 0.03",
    "grpo": f"--reward_pretrain {{animals}} --advantage_estimator grpo {GROUPED}",
    "rloo": f"--reward_pretrain {{animals}} --advantage_estimator rloo {GROUPED}",
    "model": "--reward_pretrain {reward} --advantage_estimator gae --critic_learning_rate 1e-3 --init_kl_coef 0.03",
}
"""What is different from run to run."""

REWARD_MODEL = """rlhf train rm --pretrain {model} --dataset {pairs} --learning_rate 5e-4 --max_epochs 1
    --train_batch_size 16 --micro_train_batch_size 16 --zero_stage 0 --save_path {reward}"""
"""The reward model of the last run, trained on pairs of stories."""


def command(name: str, options: argparse.Namespace) -> list[str]:
    """The command line of a run."""
    places = {
        "model": options.model, "prompts": options.data, "out": options.folder / name, "reward": options.folder / "reward",
        "animals": ROOT / "examples/animal_reward.py", "pairs": options.pairs,
    }  # fmt: skip
    text = REWARD_MODEL if name == "reward" else f"rlhf train ppo {SHARED} {RUNS[name]}"
    return shlex.split(text.format(**places))


def rows_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def draw(folder: Path, target: Path) -> None:
    """One picture of reward, KL and response length of the runs on the rule, and one of the run on the reward model."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels = (("reward", "reward"), ("kl", "KL from the start, nats per token"), ("response_length", "tokens"))
    target.mkdir(parents=True, exist_ok=True)
    for picture, names in (("rule", ("ppo", "grpo", "rloo")), ("model", ("model",))):
        there = [name for name in names if (folder / name / "run/metrics.jsonl").is_file()]
        if not there:
            continue
        figure, axes = plt.subplots(1, len(panels), figsize=(10, 2.8), layout="constrained")
        for axis, (key, label) in zip(axes, panels, strict=True):
            for name in there:
                rows = rows_of(folder / name)
                axis.plot([row["rollout"] for row in rows], [row[key] for row in rows], label=name)
            axis.set(xlabel="rollout", ylabel=label)
            axis.grid(alpha=0.3)
        if len(there) > 1:
            axes[0].legend(frameon=False)
        figure.savefig(target / f"ppo_{picture}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="prompts")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs for the reward model")
    parser.add_argument("--only", choices=RUNS)
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    for name in [options.only] if options.only else list(RUNS):
        for needed in ["reward", name] if name == "model" else [name]:
            done = options.folder / needed / ("config.json" if needed == "reward" else "run/metrics.jsonl")
            if not done.is_file():
                line = command(needed, options)
                print(shlex.join(line), flush=True)
                subprocess.run(line, check=True)
        rows = rows_of(options.folder / name)
        ends = [sum(row[key] for row in part) / len(part) for key in ("reward", "kl") for part in (rows[:3], rows[-3:])]
        print("{}: reward {:.2f} to {:.2f}, KL {:.3f} to {:.3f} nats per token, first and last three rollouts".format(
            name, *ends), flush=True)  # fmt: skip
    if options.draw:
        draw(options.folder, ROOT / "docs/images")


if __name__ == "__main__":
    main()
