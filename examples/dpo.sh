#!/bin/sh
# DPO on pairs of a better and a worse response, on one rank. The options are those of OpenRLHF's train_dpo, and
# --precompute_ref, which computes the reference model's log-probs once; sizes are for the quickstart's model.
#
#   uv run rlhf quickstart        # once: makes the fine-tuned model and the pairs
#   uv run sh examples/dpo.sh
#
# MODEL, DATA and OUT take your own. Everything after the script's name is passed on, e.g. --dry_run.
set -eu
QUICKSTART=${QUICKSTART:-quickstart}
MODEL=${MODEL:-$QUICKSTART/sft}
DATA=${DATA:-./$QUICKSTART/pairs}
OUT=${OUT:-$QUICKSTART/examples/dpo}

rlhf train dpo \
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
   --beta 0.1 \
   --dataset "$DATA" \
   --prompt_key prompt \
   --chosen_key chosen \
   --rejected_key rejected \
   --input_template 'Question: {}\nAnswer:' \
   --flash_attn \
   --precompute_ref \
   --gradient_checkpointing \
   "$@"
