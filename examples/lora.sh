#!/bin/sh
# DPO with a LoRA adapter, then the adapter folded into its base model. The base model with the adapter switched off is
# the reference, so there is no second model in memory.
#
#   uv run rlhf quickstart        # once: makes the fine-tuned model and the pairs
#   uv run sh examples/lora.sh
#
# MODEL, DATA and OUT take your own.
set -eu
QUICKSTART=${QUICKSTART:-quickstart}
MODEL=${MODEL:-$QUICKSTART/sft}
DATA=${DATA:-./$QUICKSTART/pairs}
OUT=${OUT:-$QUICKSTART/examples/dpo_lora}

rlhf train dpo \
   --save_path "$OUT" \
   --pretrain "$MODEL" \
   --lora_rank 8 \
   --lora_alpha 16 \
   --dataset "$DATA" \
   --input_template 'Question: {}\nAnswer:' \
   --max_len 64 \
   --max_samples 320 \
   --train_batch_size 32 \
   --micro_train_batch_size 8 \
   --learning_rate 1e-3 \
   --packing_samples

rlhf merge --adapter "$OUT" --save_path "$OUT-merged"
