#!/bin/sh
# Distillation on one rank: the quickstart's random model learns from its fine-tuned one. The options are those of
# OpenRLHF's train_kd, and --cache_teacher, which asks the teacher once; sizes are for the quickstart's model.
#
#   uv run rlhf quickstart        # once: makes both models and the questions
#   uv run sh examples/kd.sh
#
# MODEL, TEACHER, DATA and OUT take your own. Everything after the script's name is passed on, e.g. --dry_run.
set -eu
QUICKSTART=${QUICKSTART:-quickstart}
MODEL=${MODEL:-$QUICKSTART/model}
TEACHER=${TEACHER:-$QUICKSTART/sft}
DATA=${DATA:-./$QUICKSTART/questions}
OUT=${OUT:-$QUICKSTART/examples/kd}

rlhf train kd \
   --max_len 64 \
   --dataset "$DATA" \
   --input_key question \
   --output_key answer \
   --input_template 'Question: {}\nAnswer:' \
   --train_batch_size 32 \
   --micro_train_batch_size 8 \
   --max_samples 320 \
   --pretrain "$MODEL" \
   --teacher_model "$TEACHER" \
   --save_path "$OUT" \
   --save_steps -1 \
   --logging_steps 1 \
   --eval_steps -1 \
   --zero_stage 3 \
   --max_epochs 1 \
   --bf16 \
   --flash_attn \
   --kd_coef 0.4 \
   --cache_teacher \
   --learning_rate 1e-3 \
   --gradient_checkpointing \
   "$@"
