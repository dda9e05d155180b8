#!/bin/sh
# Supervised fine-tuning on one rank. The options are those of OpenRLHF's train_sft; sizes are for the quickstart's model.
#
#   uv run rlhf quickstart        # once: makes the model and the questions
#   uv run sh examples/sft.sh
#
# MODEL, DATA and OUT take your own. Everything after the script's name is passed on, e.g. --dry_run.
set -eu
QUICKSTART=${QUICKSTART:-quickstart}
MODEL=${MODEL:-$QUICKSTART/model}
DATA=${DATA:-$QUICKSTART/questions/train.jsonl}
OUT=${OUT:-$QUICKSTART/examples/sft}

rlhf train sft \
   --max_len 64 \
   --dataset "$DATA" \
   --input_key question \
   --output_key answer \
   --input_template 'User: {}\nAssistant: ' \
   --train_batch_size 32 \
   --micro_train_batch_size 16 \
   --max_samples 320 \
   --pretrain "$MODEL" \
   --save_path "$OUT" \
   --save_steps -1 \
   --logging_steps 1 \
   --eval_steps -1 \
   --zero_stage 2 \
   --max_epochs 1 \
   --bf16 \
   --flash_attn \
   --learning_rate 1e-3 \
   --gradient_checkpointing \
   "$@"
