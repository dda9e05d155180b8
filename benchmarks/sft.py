"""Supervised fine-tuning beside TRL's `SFTTrainer`, in one run: tokens per second and peak memory growth.

    uv run --group bench python benchmarks/sft.py

Same model (a random 15 M-parameter Llama with a vocabulary of 32 000), same samples (lengths log-normal around 100
tokens), same batch of 8, AdamW, float32 on CPU (bfloat16 on a GPU). Each measurement is a process of its own; ours and
TRL's alternate, and the ratio is taken pair by pair, because machines drift. Start-up and the first steps are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

BATCH, WARMUP = 8, 2
LLAMA = {"hidden_size": 288, "layers": 6, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6}


def make_inputs(folder: Path, vocabulary: int, samples: int) -> None:
    """A model, and samples of random token ids as text that the tokenizer reads back one to one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rlhf_core.tiny import make_model

    words = {"</s>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(folder)
    make_model(tokenizer, folder, max_len=1024, **LLAMA)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(100), 0.8, samples), 8, 1000).astype(int)
    rows = [{"text": " ".join(f"w{i}" for i in rng.integers(1, vocabulary, length))} for length in lengths]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Clock:
    """Seconds and memory growth of the counted steps."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.memory = peak_memory()

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def report(self, tokens: int) -> None:
        import torch

        seconds = self.marks[-1] - self.marks[WARMUP - 1]
        grown = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory() - self.memory
        print(json.dumps({"tokens_per_second": tokens / seconds, "gb": grown / 1e9}), flush=True)
        os._exit(0)


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(folder: Path, steps: int, zero_stage: int) -> None:
    import torch

    from rlhf_cli.options import build
    from rlhf_core.config import SFTConfig
    from rlhf_core.fit import Fit
    from rlhf_core.libraries import deepspeed
    from rlhf_core.methods import sft

    deepspeed()
    clock, plain, counted = Clock(), Fit.step, []

    def step(self: Fit, window: np.ndarray) -> float:
        norm = plain(self, window)
        clock.mark()
        if len(clock.marks) > WARMUP:
            counted.append(int(self.method.train.lengths[window].sum()))
        if len(counted) == steps:
            clock.report(sum(counted))
        return norm

    Fit.step = step
    sft.train(build(SFTConfig, {
        "pretrain": str(folder), "dataset": str(folder / "data.jsonl"), "pretrain_mode": True, "max_len": 1024,
        "train_batch_size": BATCH, "micro_train_batch_size": BATCH, "packing_samples": True, "learning_rate": 1e-4,
        "zero_stage": zero_stage, "eval_ratio": 0, "save_path": str(folder / "ours"), "bf16": torch.cuda.is_available(),
        "max_epochs": 1, "data_cache_dir": str(folder / "cache"),
    }))  # fmt: skip


def trl(folder: Path, steps: int) -> None:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock, cuda = Clock(), torch.cuda.is_available()

    class Stop(TrainerCallback):
        tokens = 0

        def on_step_end(self, args, state, control, **kwargs):
            clock.mark()
            if state.global_step == WARMUP:
                self.tokens = seen["tokens"]
            if state.global_step == WARMUP + steps:
                clock.report(seen["tokens"] - self.tokens)

    seen = {"tokens": 0}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if cuda else torch.float32),
        args=SFTConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=BATCH, max_length=1024, learning_rate=1e-4,
            use_cpu=not cuda, bf16=cuda, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1,
            num_train_epochs=1, disable_tqdm=True, max_steps=WARMUP + steps,
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "data.jsonl"), split="train", cache_dir=str(folder / "hf")),
        processing_class=tokenizer,
        callbacks=[Stop()],
    )  # fmt: skip
    collate = trainer.data_collator

    def counted(features):
        seen["tokens"] += sum(len(feature["input_ids"]) for feature in features)
        return collate(features)

    trainer.data_collator = counted
    trainer.train()


def measure(side: str, folder: Path, steps: int, zero_stage: int) -> dict[str, float]:
    arguments = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--folder",
        str(folder),
        "--steps",
        str(steps),
        "--zero_stage",
        str(zero_stage),
    ]
    out = subprocess.run(
        arguments, capture_output=True, text=True, timeout=900, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    )
    lines = [line for line in out.stdout.splitlines() if line.startswith('{"tokens_per_second"')]
    if not lines:
        raise SystemExit(f"{side} failed:\n{out.stdout[-2000:]}\n{out.stderr[-4000:]}")
    return json.loads(lines[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each side")
    parser.add_argument("--steps", type=int, default=20, help="counted optimizer steps per measurement")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        ours(options.folder, options.steps, options.zero_stage) if options.side == "ours" else trl(
            options.folder, options.steps
        )
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options.vocabulary, BATCH * (WARMUP + options.steps + 1))
        runs = [
            (measure("ours", folder, options.steps, options.zero_stage), measure("trl", folder, options.steps, 0))
            for _ in range(options.pairs)
        ]
    print(
        f"vocabulary {options.vocabulary}, batch {BATCH}, {options.steps} steps, median of {options.pairs} pairs (each pair in brackets)\n"
    )
    print(f"{'':24}{'ours':>12}{'TRL':>12}   ratio")
    for key, label, ratio in (
        ("tokens_per_second", "tokens per second", lambda a, b: a / b),
        ("gb", "peak memory growth, GB", lambda a, b: a / b),
    ):
        pairs = [ratio(a[key], b[key]) for a, b in runs]
        left, right = (median(run[i][key] for run in runs) for i in (0, 1))
        print(f"{label:24}{left:12.4g}{right:12.4g}   {median(pairs):.2f} ({', '.join(f'{p:.2f}' for p in pairs)})")


if __name__ == "__main__":
    main()
