#!/bin/sh
# The same on two ranks: weights, gradients and optimizer states split over them (ZeRO stage 3), rows packed, and a
# checkpoint every four steps. Run it again with --load_checkpoint to continue from the newest one.
#
#   uv run rlhf quickstart        # once: makes the model and the questions
#   uv run sh examples/sft_two_ranks.sh
#
# On GPUs leave out --num_procs: there is one rank per GPU.
set -eu
QUICKSTART=${QUICKSTART:-quickstart}
MODEL=${MODEL:-$QUICKSTART/model}
DATA=${DATA:-$QUICKSTART/questions/train.jsonl}
OUT=${OUT:-$QUICKSTART/examples/sft_two_ranks}

rlhf train sft \
   --num_procs 2 \
   --zero_stage 3 \
   --packing_samples \
   --max_len 64 \
   --dataset "$DATA" \
   --input_key question \
   --output_key answer \
   --input_template 'Question: {}\nAnswer:' \
   --train_batch_size 32 \
   --micro_train_batch_size 8 \
   --max_samples 320 \
   --max_epochs 1 \
   --learning_rate 1e-3 \
   --save_steps 4 \
   --pretrain "$MODEL" \
   --save_path "$OUT" \
   "$@"
