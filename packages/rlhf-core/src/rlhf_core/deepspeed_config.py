"""Options to a DeepSpeed configuration: a pure function, and the only place that knows DeepSpeed's key names."""

from __future__ import annotations

from typing import Any

from rlhf_core.config import OptimConfig, ZeroConfig


def deepspeed_config(parallel: ZeroConfig, optim: OptimConfig, *, bf16: bool, world_size: int) -> dict[str, Any]:
    """The configuration of a trained model.

    DeepSpeed's own batch sizes are nominal (one sample per rank): micro-batches, accumulation and the division by the
    global count are the loop's business, which tells DeepSpeed when a step is complete.
    """
    device = "cpu" if parallel.adam_offload else "none"
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "offload_optimizer": {"device": device, "pin_memory": False},
        "overlap_comm": parallel.overlap_comm,
        "contiguous_gradients": True,
    }
    if parallel.zero_stage == 3:
        zero |= {
            "zero_hpz_partition_size": parallel.zpg,
            "stage3_gather_16bit_weights_on_model_save": False,
            "stage3_param_persistence_threshold": 10_000,
        }
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "gradient_clipping": optim.max_norm if clips_gradients(parallel, bf16) else 0.0,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": grad_accum_dtype(parallel, bf16)},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
    }


def frozen_config(*, bf16: bool, world_size: int, offload: bool) -> dict[str, Any]:
    """The configuration of a model that is only called: its weights are split over the ranks, or kept on the CPU."""
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu" if offload else "none", "pin_memory": False},
            "stage3_param_persistence_threshold": 10_000,
        },
        "wall_clock_breakdown": False,
    }


def clips_gradients(parallel: ZeroConfig, bf16: bool) -> bool:
    """Whether DeepSpeed clips. With plain float32 and no ZeRO it does not report the norm, so the strategy clips there."""
    return bf16 or parallel.zero_stage > 0


def grad_accum_dtype(parallel: ZeroConfig, bf16: bool) -> str:
    """Gradients add up over micro-batches in float32, except where DeepSpeed cannot: bfloat16 without ZeRO."""
    if parallel.grad_accum_dtype:
        return parallel.grad_accum_dtype
    return "bf16" if bf16 and parallel.zero_stage == 0 else "fp32"
