"""Supervised fine-tuning from Python: the same options, the same code path as `rlhf train sft`.

uv run rlhf quickstart        # once: makes the model and the questions
uv run python examples/sft_python.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from rlhf_core.config import BatchConfig, CheckpointConfig, LoggingConfig, ModelConfig, OptimConfig, SFTConfig
from rlhf_core.methods import sft
from rlhf_data.config import SFTDataConfig

quickstart = Path(os.environ.get("QUICKSTART", "quickstart"))
folder = quickstart / "examples" / "sft_python"

config = SFTConfig(
    model=ModelConfig(pretrain=str(quickstart / "model")),
    data=SFTDataConfig(
        dataset=str(quickstart / "questions" / "train.jsonl"),
        input_key="question",
        output_key="answer",
        input_template="Question: {}\nAnswer:",
        packing_samples=True,
        max_len=64,
        max_samples=320,
    ),
    batch=BatchConfig(train_batch_size=32, micro_train_batch_size=16, max_epochs=2),
    optim=OptimConfig(learning_rate=2e-3),
    logging=LoggingConfig(logging_steps=2),
    checkpoint=CheckpointConfig(save_path=str(folder)),
)
sft.train(config)

rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
for row in rows:
    if "eval_loss" in row:
        print(f"step {row['step']}: held-out loss {row['eval_loss']:.2f} nats per token")
