"""Which engine writes: chosen, checked and made from the options of a job."""

from __future__ import annotations

from typing import Any

from rlhf_data.errors import InputError
from rlhf_infer.config import EngineConfig, EngineName, GenerateConfig
from rlhf_infer.engines.engine import Engine, context_of, stop_ids
from rlhf_infer.engines.vllm import LEAST_TEMPERATURE, check_gpus, check_installed, check_model, is_installed


def engine_name(options: EngineConfig) -> EngineName:
    """The engine that was asked for; else vLLM where it is installed."""
    return options.engine or ("vllm" if is_installed() else "transformers")


def check_engine(config: GenerateConfig, model_config: Any) -> None:
    """Find what an engine could not do, before weights are loaded.

    Args:
        config: the job.
        model_config: the model's architecture.

    Raises:
        InputError: an option does not fit the engine, the model or this machine.
    """
    given = config.data.model_fields_set
    context, longest = context_of(model_config), config.data.prompt_max_len
    if context and longest >= context and "prompt_max_len" in given:
        raise InputError(
            f"--prompt_max_len {longest}: the context of {config.model.pretrain} is {context:,} tokens for prompt and response "
            f"together: give at most {context - 1}"
        )
    name = engine_name(config.engine)
    if name == "vllm":
        check_vllm(config, model_config.get_text_config())
    elif config.engine.engine is None:
        # the config itself refuses vLLM's options beside --engine transformers
        for option in ("tp_size", "max_num_seqs", "enable_prefix_caching", "gpu_memory_utilization"):
            if getattr(config.engine, option) != EngineConfig.model_fields[option].default:
                raise InputError(f"--{option} is for vLLM, which is not installed: install it, or leave --{option} out")


def check_vllm(config: GenerateConfig, text_config: Any) -> None:
    """Find what vLLM could not do. Machines that run one of several engines are checked when these start."""
    if config.engine.num_engines == 1:
        check_installed()
        check_gpus(config.engine.tp_size)
        check_model(config.model.pretrain, text_config)
    temperature = config.sampling.temperature
    if temperature < LEAST_TEMPERATURE:
        raise InputError(
            f"--temperature {temperature:g}: vLLM draws at {LEAST_TEMPERATURE} or above: give --greedy_sampling, or --engine "
            "transformers"
        )


def cut_note(config: GenerateConfig, model_config: Any) -> str | None:
    """What to tell people if responses to the longest prompts cannot reach `--max_new_tokens`."""
    context, longest = context_of(model_config), config.data.prompt_max_len
    if context is None or longest + config.sampling.max_new_tokens <= context:
        return None
    return (
        f"prompts of more than {max(0, context - config.sampling.max_new_tokens):,} tokens get responses shorter than "
        f"--max_new_tokens, cut and marked where the model's context of {context:,} tokens ends"
    )


def make_engine(config: GenerateConfig, model_config: Any, tokenizer: Any) -> Engine:
    """The engine of a job, with the model loaded.

    Args:
        config: the job.
        model_config: the model's architecture.
        tokenizer: its tokenizer.
    """
    model = config.model
    ends = stop_ids(model.pretrain, model_config, tokenizer)
    if engine_name(config.engine) == "transformers":
        from rlhf_infer.engines.transformers import TransformersEngine, load

        loaded = load(model.pretrain, bf16=model.bf16, trust_remote_code=model.trust_remote_code)
        return TransformersEngine(loaded, ends, model.micro_batch_size)
    from rlhf_infer.engines.vllm import VLLMEngine

    context, longest = context_of(model_config), config.data.prompt_max_len + config.sampling.max_new_tokens
    return VLLMEngine(model, config.engine, ends, min(longest, context or longest))
