"""The options of PPO's placement and rollouts, declared once. The driver that reads them is built on top of this."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf_data.config import Config, Count


class ClusterConfig(Config):
    """Cluster.

    On a machine without an accelerator the `*_num_gpus_per_node` options count CPU ranks.
    """

    actor_num_nodes: Count = 1
    """Nodes of the policy."""

    actor_num_gpus_per_node: Count = 1
    """GPUs of the policy on each of its nodes."""

    critic_num_nodes: Count = 1
    """Nodes of the critic."""

    critic_num_gpus_per_node: Count = 1
    """GPUs of the critic on each of its nodes."""

    ref_num_nodes: Count = 1
    """Nodes of the reference model."""

    ref_num_gpus_per_node: Count = 1
    """GPUs of the reference model on each of its nodes."""

    reward_num_nodes: Count = 1
    """Nodes of each reward model."""

    reward_num_gpus_per_node: Count = 1
    """GPUs of each reward model on each of its nodes."""

    colocate_actor_ref: bool = False
    """Put policy and reference model on the same GPUs."""

    colocate_critic_reward: bool = False
    """Put critic and reward model on the same GPUs."""


class RolloutConfig(Config):
    """Rollouts."""

    vllm_num_engines: Annotated[int, Field(ge=0)] = 0
    """vLLM engines; 0 writes rollouts with transformers in the policy's own workers."""

    vllm_tensor_parallel_size: Count = 1
    """GPUs per vLLM engine."""

    vllm_sync_backend: Literal["nccl", "gloo"] = "nccl"
    """How new weights reach the engines."""

    rollout_batch_size: Count = 1024
    """Samples in the replay buffer; prompts per rollout are this divided by `--n_samples_per_prompt`."""

    n_samples_per_prompt: Count = 1
    """Responses per prompt."""

    prompt_max_len: Count = 1024
    """Longest prompt, in tokens."""

    generate_max_len: Count = 1024
    """Longest response, in tokens."""
