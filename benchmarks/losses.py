"""Time and memory of the fused head next to full logits, and time of GAE.

Every case of the head runs in its own process, so that its peak memory is its own. Times are the best of several runs:
on a shared machine the others measure the neighbours.

    python benchmarks/losses.py --tokens 1024 --hidden 288 --vocabularies 32000 128000
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_losses import gae, linear_cross_entropy_sum, linear_token_logps


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")


def fused_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy_sum(hidden, weight, labels)[0]


def fused_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -linear_token_logps(hidden, weight, labels).sum()


LOSSES = {
    "full logits": full_logits,
    "linear_cross_entropy_sum": fused_sum,
    "linear_token_logps": fused_logps,
}


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_bytes() -> int:
    """Largest resident size of this process so far; Linux counts KiB, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str, tokens: int, width: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Seconds of one forward and backward pass, and peak bytes beyond the inputs."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    # In place: a temporary of the weight's size would raise the peak before the first step and hide part of it.
    weight = torch.empty(vocabulary, width).normal_(std=width**-0.5).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))

    def step() -> None:
        hidden.grad = weight.grad = None
        LOSSES[name](hidden, weight, labels).backward()

    before = peak_bytes()
    step()
    return {"bytes": peak_bytes() - before, "seconds": best_seconds(step, repeats)}


def measure_apart(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", json.dumps(arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare_heads(tokens: int, width: int, vocabularies: list[int], repeats: int) -> None:
    threads = torch.get_num_threads()
    print(f"Cross entropy, forward and backward: {tokens} tokens, width {width}, float32, {threads} threads")
    print(f"{'vocabulary':>10}  {'function':<26}{'time':>10}{'ratio':>8}{'memory':>12}{'ratio':>8}")
    for vocabulary in vocabularies:
        plain = None
        for name in LOSSES:
            result = measure_apart(name, tokens, width, vocabulary, repeats)
            plain = plain or result
            time_ratio, memory_ratio = (result[key] / plain[key] for key in ("seconds", "bytes"))
            print(
                f"{vocabulary:>10}  {name:<26}{result['seconds'] * 1e3:>7.0f} ms{time_ratio:>8.2f}"
                f"{result['bytes'] / 2**20:>8.0f} MiB{memory_ratio:>8.2f}"
            )


def naive_gae(rewards: Tensor, values: Tensor, lambda_: float = 0.95) -> Tensor:
    advantages, following, running = [], torch.zeros(len(rewards)), torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + following - values[:, t] + lambda_ * running
        following = values[:, t]
        advantages.append(running)
    return torch.stack(advantages[::-1], 1)


def compare_gae(batch: int, lengths: list[int], repeats: int) -> None:
    print(f"\nGAE, {batch} episodes\n{'length':>10}{'gae':>12}{'loop':>12}{'ratio':>8}")
    for length in lengths:
        rewards, values = torch.randn(2, batch, length)
        ours = best_seconds(lambda r=rewards, v=values: gae(r, v), 3 * repeats)
        loop = best_seconds(lambda r=rewards, v=values: naive_gae(r, v), repeats)
        print(f"{length:>10}{ours * 1e3:>9.1f} ms{loop * 1e3:>9.1f} ms{ours / loop:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=288)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*json.loads(arguments.case))))
        return
    compare_heads(arguments.tokens, arguments.hidden, arguments.vocabularies, arguments.repeats)
    compare_gae(64, arguments.lengths, arguments.repeats)


if __name__ == "__main__":
    main()
