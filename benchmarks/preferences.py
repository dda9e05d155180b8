"""DPO, reward models and KTO beside TRL's `DPOTrainer`, `RewardTrainer` and `KTOTrainer`: samples per second and peak
memory growth.

    uv run --group bench python benchmarks/preferences.py --method dpo

Prompts of 200 random words, responses of 100, batches of 4 pairs (KTO: 8 rows, every other one desirable). All samples
are as long, so TRL pads nothing; `--spread` makes lengths log-normal around these, as those of real data are. Reference
models are held on both sides. Everything else is in `common.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import FIRST_WORD, WARMUP, compare, make_model, parse, text, train_ours, train_trl, write_rows

BATCH = {"dpo": 4, "rm": 4, "kto": 8}
PROMPT, RESPONSE, MAX_LEN = 200, 100, 512
BETA = 0.1


def make_inputs(folder: Path, method: str, vocabulary: int, steps: int, spread: float = 0.0) -> None:
    make_model(folder, vocabulary, MAX_LEN)
    rng = np.random.default_rng(0)

    def words(typical: int) -> str:
        longest = MAX_LEN * typical // (PROMPT + RESPONSE + 1)
        number = int(np.clip(rng.lognormal(np.log(typical), spread), 8, longest)) if spread else typical
        return text(rng.integers(FIRST_WORD, vocabulary, number))

    def row(number: int) -> dict[str, Any]:
        prompt = words(PROMPT)
        if method == "kto":
            return {"prompt": prompt, "completion": f" {words(RESPONSE)}", "label": number % 2 == 0}
        return {"prompt": prompt, "chosen": f" {words(RESPONSE)}", "rejected": f" {words(RESPONSE)}"}

    write_rows(folder, map(row, range(BATCH[method] * (WARMUP + steps + 1))))


def ours(folder: Path, options: argparse.Namespace) -> None:
    from rlhf_core import config
    from rlhf_core.methods import dpo, kto, rm

    batch = BATCH[options.method]
    given = {"pretrain": str(folder), "flash_attn": True, "max_len": MAX_LEN, "train_batch_size": batch,
             "micro_train_batch_size": batch, "input_template": "", "zero_stage": options.zero_stage}  # fmt: skip
    if options.method != "rm":
        given["beta"] = BETA
    if options.no_share_prefix:
        given["share_prefix"] = False
    if options.precompute_ref:
        given["precompute_ref"] = True
    if options.method == "kto":
        train_ours(options.steps, kto.train, config.KTOConfig, given, tokens=lambda row: len(row.sample))
    else:
        train, kind = (dpo.train, config.DPOConfig) if options.method == "dpo" else (rm.train, config.RMConfig)
        train_ours(options.steps, train, kind, given, tokens=lambda pair: len(pair.chosen) + len(pair.rejected))


def trl(folder: Path, options: argparse.Namespace) -> None:
    given = {"per_device_train_batch_size": BATCH[options.method], "max_length": MAX_LEN}
    how = {"as_it_comes": options.trl_defaults}
    if options.method == "dpo":
        from trl import DPOConfig, DPOTrainer

        train_trl(options.steps, DPOTrainer, DPOConfig, folder, given | {"beta": BETA}, tokens=lambda pair: (
            2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])
        ), **how)  # fmt: skip
    elif options.method == "kto":
        from trl import KTOConfig, KTOTrainer

        train_trl(options.steps, KTOTrainer, KTOConfig, folder, given | {"beta": BETA}, tokens=lambda row: (
            len(row["prompt_ids"]) + len(row["completion_ids"])
        ), **how)  # fmt: skip
    else:
        from transformers import AutoModelForSequenceClassification
        from trl import RewardConfig, RewardTrainer

        train_trl(options.steps, RewardTrainer, RewardConfig, folder, given, tokens=lambda pair: (
            len(pair["chosen_ids"]) + len(pair["rejected_ids"])
        ), model_class=AutoModelForSequenceClassification, **how)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(BATCH), default="dpo")
    parser.add_argument("--no_share_prefix", action="store_true", help="ours: each prompt once per response (dpo, rm)")
    parser.add_argument("--precompute_ref", action="store_true", help="ours: no reference model in the steps (dpo)")
    parser.add_argument("--spread", type=float, default=0.0, help="deviation of the logarithm of lengths, e.g. 0.5")
    parser.add_argument(
        "--trl_defaults", action="store_true", help="TRL's own number format and gradient checkpointing"
    )
    options = parse(parser)
    if options.precompute_ref and options.method != "dpo":
        parser.error("--precompute_ref is for --method dpo")
    if options.no_share_prefix and options.method == "kto":
        parser.error("--no_share_prefix is for --method dpo and rm")
    unit = "rows" if options.method == "kto" else "pairs"
    compare(
        options,
        lambda folder: make_inputs(folder, options.method, options.vocabulary, options.steps, options.spread),
        {"ours": lambda folder: ours(folder, options), "trl": lambda folder: trl(folder, options)},
        {"items": f"{unit} per second", "tokens": "tokens per second", "gb": "peak memory growth, GB"},
        f"{options.method.upper()}, batch of {BATCH[options.method]} {unit}",
        same_length=not options.spread,
    )


if __name__ == "__main__":
    main()
