#!/bin/sh
# PPO on Ray with vLLM engines, as OpenRLHF's users launch it, on what `rlhf quickstart` left: a fine-tuned model, a reward
# model and prompts. `ray job submit -- sh examples/ppo.sh` runs it on a cluster. Further options are passed on.
set -e
: "${QUICKSTART:=./quickstart}" "${OUT:=./quickstart/examples/ppo}"

rlhf train ppo \
   --ref_num_nodes 1 \
   --ref_num_gpus_per_node 1 \
   --reward_num_nodes 1 \
   --reward_num_gpus_per_node 1 \
   --critic_num_nodes 1 \
   --critic_num_gpus_per_node 1 \
   --actor_num_nodes 1 \
   --actor_num_gpus_per_node 1 \
   --vllm_num_engines 2 \
   --vllm_tensor_parallel_size 1 \
   --colocate_critic_reward \
   --colocate_actor_ref \
   --pretrain "$QUICKSTART/sft" \
   --reward_pretrain "$QUICKSTART/rm" \
   --save_path "$OUT" \
   --micro_train_batch_size 8 \
   --train_batch_size 16 \
   --micro_rollout_batch_size 16 \
   --rollout_batch_size 32 \
   --max_samples 64 \
   --max_epochs 1 \
   --prompt_max_len 64 \
   --generate_max_len 16 \
   --zero_stage 3 \
   --actor_learning_rate 5e-5 \
   --critic_learning_rate 9e-5 \
   --init_kl_coef 0.01 \
   --prompt_data "$QUICKSTART/questions" \
   --input_template 'Question: {}\nAnswer:' \
   --normalize_reward \
   --flash_attn \
   --gradient_checkpointing \
   "$@"
