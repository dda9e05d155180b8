"""Supervised fine-tuning beside TRL's `SFTTrainer`, in one run: tokens per second and peak memory growth.

    uv run --group bench python benchmarks/sft.py

Samples of random words, lengths log-normal around 100 tokens, batches of 8. Everything else is in `common.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common import FIRST_WORD, WARMUP, compare, make_model, parse, text, train_ours, train_trl, write_rows

BATCH = 8


def make_inputs(folder: Path, vocabulary: int, samples: int) -> None:
    make_model(folder, vocabulary, max_len=1024)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(100), 0.8, samples), 8, 1000).astype(int)
    write_rows(folder, ({"text": text(rng.integers(FIRST_WORD, vocabulary, length))} for length in lengths))


def ours(folder: Path, steps: int, zero_stage: int) -> None:
    from rlhf_core.config import SFTConfig
    from rlhf_core.methods import sft

    train_ours(steps, sft.train, SFTConfig, {
        "pretrain": str(folder), "pretrain_mode": True, "max_len": 1024, "train_batch_size": BATCH,
        "micro_train_batch_size": BATCH, "packing_samples": True, "zero_stage": zero_stage,
    }, tokens=len)  # fmt: skip


def trl(folder: Path, steps: int) -> None:
    from trl import SFTConfig, SFTTrainer

    options = {"per_device_train_batch_size": BATCH, "max_length": 1024}
    train_trl(steps, SFTTrainer, SFTConfig, folder, options, tokens=lambda sample: len(sample["input_ids"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = parse(parser)
    compare(
        options,
        lambda folder: make_inputs(folder, options.vocabulary, BATCH * (WARMUP + options.steps + 1)),
        {
            "ours": lambda folder: ours(folder, options.steps, options.zero_stage),
            "trl": lambda folder: trl(folder, options.steps),
        },
        {"tokens": "tokens per second", "gb": "peak memory growth, GB"},
        f"SFT, batch {BATCH}",
        same_length=False,
    )


if __name__ == "__main__":
    main()
