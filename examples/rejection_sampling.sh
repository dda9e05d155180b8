#!/bin/bash
# Rejection sampling: write several responses to each prompt, score them, fine-tune on the best of each, and again. The
# script and its options are those of OpenRLHF's users; sizes are for the quickstart's models. The same as one command,
# which can also be killed and continued: `rlhf recipe rejection-sampling`.
#
#   uv run rlhf quickstart        # once: makes the fine-tuned model, the reward model and the questions
#   uv run bash examples/rejection_sampling.sh
#
# The variables below take your own, for example PROMPT_OPTIONS="--input_key context_messages --apply_chat_template".
QUICKSTART=${QUICKSTART:-quickstart}
DATA=${DATA:-./$QUICKSTART/questions}
PROMPT_OPTIONS=${PROMPT_OPTIONS:-"--input_key question --input_template 'Question: {}\nAnswer:'"}
REWARD_MODEL_PATH=${REWARD_MODEL_PATH:-$QUICKSTART/rm}
OUT=${OUT:-$QUICKSTART/examples/rejection}
ENGINE=${ENGINE:-generate_vllm} # or generate, without vLLM: then ENGINE_OPTIONS=
ENGINE_OPTIONS=${ENGINE_OPTIONS-"--enable_prefix_caching --tp_size 1"}
BEST_OF_N=${BEST_OF_N:-4}
MAX_LEN=${MAX_LEN:-32}
LEARNING_RATE=${LEARNING_RATE:-2e-4}

checkSuccess() {
   if [[ $? != 0 ]]; then
      echo "FAILED $1"
      exit 1
   fi
}

mkdir -p $OUT
GENERATE_OUTPUT=$OUT/generate.jsonl
RM_OUTPUT=$OUT/rm.jsonl
ITER_LOG_PATH=${ITER_LOG_PATH:-$OUT/iter.log}
MODEL_OUTPUT_PATH=$OUT

TRAINING_ITERS=${TRAINING_ITERS:-2}
ROLLOUT_BATCH_SIZE=${ROLLOUT_BATCH_SIZE:-256}

POLICY_MODEL_PATH=${POLICY_MODEL_PATH:-$QUICKSTART/sft}

iter=0
if [ -f $ITER_LOG_PATH ]; then
   iter=$(cat $ITER_LOG_PATH)
fi

while (($iter < $TRAINING_ITERS)); do
   echo "Iter: $iter"
   # Use latest model if past first iteration
   if ((iter > 0)); then
      POLICY_MODEL_PATH=$MODEL_OUTPUT_PATH
   fi

   read -r -d '' generate_commands <<EOF
infer \
   --eval_task $ENGINE \
   --pretrain $POLICY_MODEL_PATH \
   --bf16 \
   --max_new_tokens $MAX_LEN \
   --prompt_max_len $MAX_LEN \
   --dataset $DATA \
   $PROMPT_OPTIONS \
   --temperature 0.9 \
   --best_of_n $BEST_OF_N \
   $ENGINE_OPTIONS \
   --micro_batch_size 64 \
   --iter $iter \
   --rollout_batch_size $ROLLOUT_BATCH_SIZE \
   --output_path $GENERATE_OUTPUT
EOF
   echo $generate_commands
   eval rlhf $generate_commands
   checkSuccess "GENERATE"

   read -r -d '' get_rewards_commands <<EOF
infer \
   --eval_task rm \
   --pretrain $REWARD_MODEL_PATH \
   --bf16 \
   --max_len $((2 * MAX_LEN)) \
   --dataset $GENERATE_OUTPUT  \
   --dataset_probs 1.0 \
   --zero_stage 0 \
   --post_processor rs \
   --micro_batch_size 4 \
   --output_path $RM_OUTPUT
EOF
   echo $get_rewards_commands
   eval rlhf $get_rewards_commands
   checkSuccess "RM"

   read -r -d '' sft_commands <<EOF
train sft \
   --max_len $((2 * MAX_LEN)) \
   --dataset $RM_OUTPUT \
   --dataset_probs 1.0 \
   --train_batch_size 16 \
   --micro_train_batch_size 2 \
   --pretrain $POLICY_MODEL_PATH \
   --save_path $MODEL_OUTPUT_PATH \
   --input_template "" \
   --input_key input \
   --output_key output \
   --zero_stage 2 \
   --max_epochs 1 \
   --bf16 \
   --learning_rate $LEARNING_RATE \
   --gradient_checkpointing
EOF
   echo $sft_commands
   eval rlhf $sft_commands
   checkSuccess "SFT"

   iter=$((iter + 1))
   if [[ "$ITER_LOG_PATH" != "null" ]]; then
      echo $iter >$ITER_LOG_PATH
   fi
done
