#!/bin/bash
# Conditional SFT: score given responses, and fine-tune on them with the reward in the prompt. The script and its options
# are those of OpenRLHF's users; sizes are for the quickstart's models. The same as one command, which can also be killed
# and continued: `rlhf recipe conditional-sft`.
#
#   uv run rlhf quickstart        # once: makes the fine-tuned model, the reward model and the questions
#   uv run bash examples/conditional_sft.sh
#
# Then ask the model for good answers:
#
#   rlhf generate --pretrain quickstart/examples/csft --csft_reward 2 --dataset ./quickstart/questions --input_key question \
#      --input_template 'Question: {}\nAnswer:' --max_new_tokens 32 --output_path answers.jsonl
#
# The variables below take your own, for example DATA_OPTIONS="--input_key chosen --apply_chat_template".
QUICKSTART=${QUICKSTART:-quickstart}
DATA=${DATA:-./$QUICKSTART/questions}
DATA_OPTIONS=${DATA_OPTIONS:-"--input_key question --output_key answer --input_template 'Question: {}\nAnswer:'"}
REWARD_MODEL_PATH=${REWARD_MODEL_PATH:-$QUICKSTART/rm}
POLICY_MODEL_PATH=${POLICY_MODEL_PATH:-$QUICKSTART/sft}
OUT=${OUT:-$QUICKSTART/examples/csft}
MAX_SAMPLES=${MAX_SAMPLES:-320}
MAX_LEN=${MAX_LEN:-64}
LEARNING_RATE=${LEARNING_RATE:-5e-4}

checkSuccess() {
   if [[ $? != 0 ]]; then
      echo "FAILED $1"
      exit 1
   fi
}

RM_OUTPUT=$OUT/rm.jsonl

read -r -d '' get_rewards_commands <<EOF
infer \
   --eval_task rm \
   --pretrain $REWARD_MODEL_PATH \
   --bf16 \
   --max_len $MAX_LEN \
   --dataset $DATA \
   $DATA_OPTIONS \
   --max_samples $MAX_SAMPLES \
   --zero_stage 0 \
   --post_processor csft \
   --normalize_reward \
   --micro_batch_size 4 \
   --output_path $RM_OUTPUT
EOF

read -r -d '' sft_commands <<EOF
train sft \
   --max_len $MAX_LEN \
   --dataset $RM_OUTPUT \
   --dataset_probs 1.0 \
   --train_batch_size 16 \
   --micro_train_batch_size 2 \
   --pretrain $POLICY_MODEL_PATH \
   --save_path $OUT \
   --zero_stage 2 \
   --max_epochs 1 \
   --bf16 \
   --learning_rate $LEARNING_RATE \
   --gradient_checkpointing
EOF

if [ ! -e $RM_OUTPUT ]; then
   eval rlhf $get_rewards_commands
   checkSuccess "RM"
fi
eval rlhf $sft_commands
checkSuccess "SFT"
