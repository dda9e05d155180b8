#!/bin/bash
# Iterative DPO: write several responses to each prompt, score them, prefer the best to the worst, and again; the reference
# stays the first model. The script and its options are those of OpenRLHF's users; sizes are for the quickstart's models.
# The same as one command, which can also be killed and continued: `rlhf recipe iterative-dpo`.
#
#   uv run rlhf quickstart        # once: makes the fine-tuned model, the reward model and the questions
#   uv run bash examples/iterative_dpo.sh
#
# The variables below take your own, for example PROMPT_OPTIONS="--input_key context_messages --apply_chat_template".
QUICKSTART=${QUICKSTART:-quickstart}
DATA=${DATA:-./$QUICKSTART/questions}
PROMPT_OPTIONS=${PROMPT_OPTIONS:-"--input_key question --input_template 'Question: {}\nAnswer:'"}
REWARD_MODEL_PATH=${REWARD_MODEL_PATH:-$QUICKSTART/rm}
OUT=${OUT:-$QUICKSTART/examples/iter_dpo}
ENGINE=${ENGINE:-generate_vllm} # or generate, without vLLM: then ENGINE_OPTIONS=
ENGINE_OPTIONS=${ENGINE_OPTIONS-"--tp_size 1 --enable_prefix_caching --max_num_seqs 64"}
BEST_OF_N=${BEST_OF_N:-8}
MAX_LEN=${MAX_LEN:-32}
LEARNING_RATE=${LEARNING_RATE:-1e-4}

checkSuccess() {
   if [[ $? != 0 ]]; then
      echo "FAILED $1"
      exit 1
   fi
}

mkdir -p $OUT
GENERATE_OUTPUT=$OUT/generate.jsonl
RM_OUTPUT=$OUT/rm.jsonl
MODEL_OUTPUT_PATH=$OUT/checkpoint
ITER_LOG_PATH=${ITER_LOG_PATH:-null}

TRAINING_ITERS=${TRAINING_ITERS:-2}
ROLLOUT_BATCH_SIZE=${ROLLOUT_BATCH_SIZE:-256}

POLICY_MODEL_PATH=${POLICY_MODEL_PATH:-$QUICKSTART/sft}
REF_MODEL_PATH=$POLICY_MODEL_PATH

iter=0
if [ -f $ITER_LOG_PATH ]; then
   iter=$(cat $ITER_LOG_PATH)
fi

# Without a log every start begins at iteration 0, also where a later one was killed: what that left is thrown away
ANEW=$(if [[ "$ITER_LOG_PATH" == "null" ]]; then echo --overwrite; fi)

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
   --max_new_tokens $MAX_LEN \
   --prompt_max_len $MAX_LEN \
   --dataset $DATA \
   $PROMPT_OPTIONS \
   --temperature 1.0 \
   --best_of_n $BEST_OF_N \
   $ENGINE_OPTIONS \
   --iter $iter \
   --rollout_batch_size $ROLLOUT_BATCH_SIZE \
   $ANEW \
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
   --post_processor iter_dpo \
   --micro_batch_size 4 \
   $ANEW \
   --output_path $RM_OUTPUT
EOF
   echo $get_rewards_commands
   eval rlhf $get_rewards_commands
   checkSuccess "RM"

   read -r -d '' dpo_commands <<EOF
train dpo \
   --max_len $((2 * MAX_LEN)) \
   --dataset $RM_OUTPUT \
   --dataset_probs 1.0 \
   --prompt_key prompt \
   --train_batch_size 16 \
   --micro_train_batch_size 2 \
   --pretrain $POLICY_MODEL_PATH \
   --ref_pretrain $REF_MODEL_PATH \
   --save_path $MODEL_OUTPUT_PATH \
   --zero_stage 3 \
   --max_epochs 1 \
   --bf16 \
   --learning_rate $LEARNING_RATE \
   --gradient_checkpointing
EOF
   echo $dpo_commands
   eval rlhf $dpo_commands
   checkSuccess "DPO"

   iter=$((iter + 1))
   if [[ "$ITER_LOG_PATH" != "null" ]]; then
      echo $iter >$ITER_LOG_PATH
   fi
done
