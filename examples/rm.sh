#!/bin/sh
# A reward model from pairs of a better and a worse response, on one rank. The options are those of OpenRLHF's train_rm;
# sizes are for the quickstart's model.
#
#   uv run rlhf quickstart        # once: makes the fine-tuned model and the pairs
#   uv run sh examples/rm.sh
#
# MODEL, DATA and OUT take your own. Everything after the script's name is passed on, e.g. --dry_run.
set -eu
QUICKSTART=${QUICKSTART:-quickstart}
MODEL=${MODEL:-$QUICKSTART/sft}
DATA=${DATA:-./$QUICKSTART/pairs}
OUT=${OUT:-$QUICKSTART/examples/rm}

rlhf train rm \
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
   --learning_rate 1e-3 \
   --dataset "$DATA" \
   --chosen_key chosen \
   --rejected_key rejected \
   --input_template 'Question: {}\nAnswer:' \
   --flash_attn \
   --gradient_checkpointing \
   "$@"
