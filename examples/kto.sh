#!/bin/sh
# KTO on single responses that are labelled desirable or not, on one rank. The options are those of OpenRLHF's train_kto;
# sizes are for the quickstart's model.
#
#   uv run rlhf quickstart        # once: makes the fine-tuned model and the pairs, from which the labels are made
#   uv run sh examples/kto.sh
#
# MODEL, DATA and OUT take your own. Everything after the script's name is passed on, e.g. --dry_run.
set -eu
QUICKSTART=${QUICKSTART:-quickstart}
MODEL=${MODEL:-$QUICKSTART/sft}
DATA=${DATA:-./$QUICKSTART/labelled}
OUT=${OUT:-$QUICKSTART/examples/kto}

# Both sides of every pair as a row of its own: the better one is desirable, the worse one is not.
if [ "$DATA" = "./$QUICKSTART/labelled" ]; then
   python - "$QUICKSTART" <<'EOF'
import json, sys
from pathlib import Path

quickstart = Path(sys.argv[1])
(quickstart / "labelled").mkdir(exist_ok=True)
for name in ("train", "test"):
    with (quickstart / "labelled" / f"{name}.jsonl").open("w") as file:
        for line in (quickstart / "pairs" / f"{name}.jsonl").read_text().splitlines():
            pair = json.loads(line)
            for side, score in (("chosen", 1), ("rejected", 0)):
                file.write(json.dumps({"question": pair["prompt"], "answer": pair[side], "score": score}) + "\n")
EOF
fi

rlhf train kto \
   --save_path "$OUT" \
   --save_steps -1 \
   --logging_steps 1 \
   --eval_steps -1 \
   --train_batch_size 32 \
   --micro_train_batch_size 8 \
   --pretrain "$MODEL" \
   --bf16 \
   --max_epochs 1 \
   --max_len 64 \
   --max_samples 320 \
   --zero_stage 3 \
   --learning_rate 1e-4 \
   --dataset "$DATA" \
   --input_key question \
   --output_key answer \
   --label_key score \
   --input_template 'Question: {}\nAnswer:' \
   --flash_attn \
   --beta 0.1 \
   --gradient_checkpointing \
   "$@"
