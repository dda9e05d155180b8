"""What the benchmarks beside TRL share: the model, the clock, one process per measurement, ratios pair by pair.

Both sides get the same model (a random Llama of 15 M parameters at a vocabulary of 32 000), the same samples and batches,
AdamW, float32 on CPU (bfloat16 on a GPU), no gradient checkpointing. Each measurement is a process of its own; ours and
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
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

WARMUP = 2
LLAMA = {"hidden_size": 288, "layers": 6, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6}
FIRST_WORD = 2
"""The ids before it are end of sequence and padding; id i from here on is the word `wi`."""


def make_model(folder: Path, vocabulary: int, max_len: int, **changed: int) -> None:
    """The model (with other sizes where they are given), and a tokenizer that reads words back to their ids one to one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rlhf_core import tiny

    words = {"</s>": 0, "<pad>": 1, **{f"w{i}": i for i in range(FIRST_WORD, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    tiny.make_model(tokenizer, folder, max_len=max_len, **(LLAMA | changed))


def text(ids: Iterable[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def write_rows(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Clock:
    """Seconds, memory growth, and what was done in the counted steps.

    Args:
        steps: to count, after those of the warm-up.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.marks: list[tuple[float, int, int]] = []
        self.memory = peak_memory()

    def mark(self, items: int, tokens: int) -> None:
        """A step is over; so many items and tokens were trained up to now. Ends the process after the last one."""
        self.marks.append((time.perf_counter(), items, tokens))
        if len(self.marks) == WARMUP + self.steps:
            self.report()

    def report(self) -> None:
        import torch

        seconds, items, tokens = (b - a for a, b in zip(self.marks[WARMUP - 1], self.marks[-1], strict=True))
        grown = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory() - self.memory
        figures = {"items": items / seconds, "tokens": tokens / seconds, "gb": grown / 1e9, "length": tokens / items}
        print(json.dumps({"measured": figures}), flush=True)
        os._exit(0)


def peak_memory() -> float:
    """Largest resident size of this process so far; Linux counts KiB, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train_ours(
    steps: int, train: Callable[[Any], None], config: type, options: dict[str, Any], tokens: Callable[[Any], int]
) -> None:
    """Run one of our methods until the clock ends it.

    Args:
        steps: to count.
        train: of the method, `rlhf_core.methods.dpo.train` for one.
        config: of the method.
        options: of the method.
        tokens: of a sample of its training data, both sides of a pair in full.
    """
    import numpy as np
    import torch

    from rlhf_cli.options import build
    from rlhf_core.fit import Fit
    from rlhf_core.libraries import deepspeed

    deepspeed()
    clock, plain, done = Clock(steps), Fit.step, [0, 0]

    def step(self: Fit, window: np.ndarray) -> float:
        norm = plain(self, window)
        done[0] += len(window)
        done[1] += sum(tokens(self.method.train[int(number)]) for number in window)
        clock.mark(*done)
        return norm

    Fit.step = step
    folder = Path(options["pretrain"])
    train(build(config, {
        "dataset": str(folder / "data.jsonl"), "learning_rate": 1e-4, "eval_ratio": 0, "max_epochs": 1,
        "save_path": str(folder / "ours"), "data_cache_dir": str(folder / "cache"), "bf16": torch.cuda.is_available(),
    } | options))  # fmt: skip
    raise SystemExit("the data ran out before the last step")


def train_trl(
    steps: int,
    make_trainer: Callable[..., Any],
    config: Callable[..., Any],
    folder: Path,
    options: dict[str, Any],
    tokens: Callable[[dict[str, Any]], int],
    model_class: Any = None,
    as_it_comes: bool = False,
) -> None:
    """Run one of TRL's trainers until the clock ends it.

    Args:
        steps: to count.
        make_trainer: the trainer's class.
        config: the class of its arguments.
        folder: of model and data.
        options: of the config, beside those that all have.
        tokens: of a sample as the data collator gets it, both sides of a pair in full.
        model_class: how the model is loaded, as a causal language model by default.
        as_it_comes: leave TRL's defaults for number format and gradient checkpointing alone.
    """
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    cuda = torch.cuda.is_available()
    clock, seen = Clock(steps), [0, 0]

    class Mark(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.mark(*seen)

    load, model_options = (
        (model_class or AutoModelForCausalLM).from_pretrained,
        {"num_labels": 1} if model_class else {},
    )
    same = {} if as_it_comes else {"bf16": cuda, "gradient_checkpointing": False}
    trainer = make_trainer(
        model=load(folder, dtype=torch.bfloat16 if cuda else torch.float32, **model_options),
        args=config(
            output_dir=str(folder / "trl"), learning_rate=1e-4, use_cpu=not cuda,
            report_to=[], save_strategy="no", logging_steps=1, num_train_epochs=1, disable_tqdm=True,
            max_steps=WARMUP + steps, **same, **options,
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "data.jsonl"), split="train", cache_dir=str(folder / "hf")),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Mark()],
    )  # fmt: skip
    collate = trainer.data_collator

    def counted(features):
        seen[0] += len(features)
        seen[1] += sum(map(tokens, features))
        return collate(features)

    trainer.data_collator = counted
    trainer.train()
    raise SystemExit("the data ran out before the last step")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with those that all these benchmarks have."""
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    parser.add_argument("--steps", type=int, default=20, help="counted optimizer steps per measurement")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--zero_stage", type=int, default=2, help="of ours")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(side: str, folder: Path) -> dict[str, float]:
    """One measurement, in a process of its own: this script with the same options."""
    out = subprocess.run(
        [sys.executable, *sys.argv, "--side", side, "--folder", str(folder)],
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    lines = [line for line in out.stdout.splitlines() if line.startswith('{"measured"')]
    if not lines:
        raise SystemExit(f"{side} failed:\n{out.stdout[-2000:]}\n{out.stderr[-4000:]}")
    return json.loads(lines[0])["measured"]


def compare(
    options: argparse.Namespace,
    make_inputs: Callable[[Path], None],
    sides: dict[str, Callable[[Path], None]],
    rows: dict[str, str],
    title: str,
    same_length: bool = True,
) -> None:
    """Measure both sides in turn and print a table; in a process started for a measurement, run that side.

    Args:
        options: as `parse` returned them.
        make_inputs: writes model and data into a folder.
        sides: what runs for `ours` and for `trl`.
        rows: the figures to show (`items` per second, `tokens` per second, `gb`), and what they are called.
        title: of the table.
        same_length: refuse to compare if the samples of the two sides differ in length.
    """
    if options.side:
        sides[options.side](options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        runs = [(measure("ours", Path(name)), measure("trl", Path(name))) for _ in range(options.repeats)]
    lengths = [{run[side]["length"] for run in runs} for side in (0, 1)]
    if same_length and lengths[0] != lengths[1]:
        raise SystemExit(f"tokens per sample differ: ours {lengths[0]}, TRL {lengths[1]}")
    print(
        f"{title}, vocabulary {options.vocabulary}, {options.steps} steps, median of {options.repeats} pairs of runs "
        "(each pair in brackets)\n"
    )
    print(f"{'':24}{'ours':>12}{'TRL':>12}   ratio")
    for key, label in rows.items():
        ratios = [ours[key] / trl[key] for ours, trl in runs]
        left, right = (median(run[side][key] for run in runs) for side in (0, 1))
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{label:24}{left:12.4g}{right:12.4g}   {median(ratios):.2f} ({each})")
