"""The policy: a rank of the model that writes, is updated, and is saved at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.cluster.group import Part
from rlhf_ray.config import PPOConfig
from rlhf_ray.engines.request import Answer, Request, Response
from rlhf_ray.workers.step import Step
from rlhf_ray.workers.trained import TrainedWorker

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.generate import Draft
    from rlhf_core.metrics import Meter
    from rlhf_ray.engines.transfer import Described, WeightSender

STATE = "policy.json"
"""In a checkpoint: what else there is to know of the policy."""


def average_file(rank: int) -> str:
    """In a checkpoint: what a rank has of the moving average."""
    return f"average_rank{rank}.safetensors"


class PolicyWorker(TrainedWorker):
    """One rank of the policy."""

    role, learning_rate_option = "policy", "--actor_learning_rate"
    ways_out = ", a smaller --reward_clip_range or a higher --init_kl_coef"

    def setup(self, config: PPOConfig, meeting: tuple[str, int] | None, total_steps: int) -> dict[str, Any]:
        """Meet the other ranks, read pretraining text, load the model and prepare it for training.

        Args:
            config: the run's options.
            meeting: what `meet` of rank 0 returned; None for a single rank.
            total_steps: optimizer steps of the whole run, which the learning rate's schedule spans.

        Returns:
            Facts for the plan and the record: `parameters` and `trained_parameters`, `device`, `layout`, and with pretraining
            text its report as `pretrain_data`.

        Raises:
            InputError: text or model cannot be read, or an option does not fit the model.
        """
        self.strategy = self.join_to_train(config, config.optim.of(config.optim.actor_learning_rate), meeting)
        from rlhf_core.ema import EMA
        from rlhf_core.models.load import load_model_config
        from rlhf_core.models.loader import Models
        from rlhf_data.tokenizer import load_tokenizer
        from rlhf_infer.engines.engine import stop_ids
        from rlhf_ray.workers.pretraining import Pretraining

        self.config, self.updates = config, 0
        self.sender: WeightSender | None = None
        self.ragged, self.share = layout(config)
        model_config = load_model_config(config.model)
        self.tokenizer = load_tokenizer(
            config.model.pretrain,
            use_fast=not config.model.disable_fast_tokenizer,
            chat_template=config.data.tokenizer_chat_template,
            trust_remote_code=config.model.trust_remote_code,
        )
        self.stop_ids = stop_ids(config.model.pretrain, model_config, self.tokenizer)
        self.text = Pretraining(config, self.tokenizer) if config.data.pretrain_data else None
        models = Models(config.model, self.strategy, ragged=self.ragged, share_prefix=self.share, lora=config.lora)
        self.prepare(models, model_config, total_steps)
        if config.ppo.enable_ema:
            self.average = EMA(self.model, config.ppo.ema_beta, is_first=self.strategy.is_first)
        facts = model_facts(self.model, self.strategy.device, self.ragged, self.share)
        return facts | ({"pretrain_data": self.text.report.to_dict()} if self.text else {})

    def token_logps(self, parts: list[Part]) -> list[tuple[NDArray[np.float32]]]:
        """Log-probs of the response tokens of some micro-batches, at the sampling temperature, `[M]` each."""
        self.reload()
        self.engine.eval()
        return list(token_logps(self.engine, parts, self.config, self.share, self.strategy.device))

    def reference_logps(self, parts: list[Part]) -> list[tuple[NDArray[np.float32]]]:
        """The same of the model that training started from: with the adapter off."""
        self.reload()
        self.engine.eval()
        return list(token_logps(self.engine, parts, self.config, self.share, self.strategy.device, adapter=False))

    def update(self, steps: list[Step]) -> list[dict[str, float]]:
        """See `TrainedWorker.update`; afterwards the weights are another version."""
        figures = super().update(steps)
        self.updates += 1
        return figures

    def optimizer_step(self, step: Step) -> dict[str, float]:
        """One optimizer step: a backward pass for each micro-batch, with one of pretraining text if there is such text."""
        from rlhf_core.metrics import Meter

        meter, peaks = Meter(), {}
        window = self.text.window(step.number) if self.text else None
        texts = list(self.text.micro_batches(window, self.strategy)) if self.text and window else []
        count = max(len(step.parts), len(texts))
        for number, (part, text) in enumerate(zip_longest(step.parts, texts), start=1):
            loss: Any = 0.0
            if part is not None:
                loss = loss + self.policy_loss(part, step, meter, peaks)
            if text is not None and self.text and window:
                loss = loss + self.text_loss(text, meter) * (step.divisor / self.text.targets(window))
            self.strategy.backward(self.engine, loss, step.divisor, last=number == count)
        stepped = self.step(step.number)
        if self.average:
            self.average.update()
        names = sorted(peaks)
        most = self.strategy.max([float(peaks[name]) for name in names])
        return meter.means(self.strategy) | dict(zip(names, most, strict=True)) | stepped

    def policy_loss(self, part: Part, step: Step, meter: Meter, peaks: dict[str, Tensor]) -> Tensor:
        """The summed loss of a micro-batch of experience; its figures go to `meter` and `peaks`."""
        from rlhf_ray.collate import collate_part
        from rlhf_ray.workers.objective import COLUMNS, policy_objective, policy_slope

        batch = collate_part(part, share=self.share, columns=COLUMNS).to(self.strategy.device)
        how = {"with_entropy": True, "slope": policy_slope(batch, self.config, step.kl_coef)}
        (logps, entropies), _ = self.engine("token_logps", batch, self.config.rollout.temperature, **how)
        found = policy_objective(logps, entropies, batch, self.config, step.kl_coef)
        meter.add(found.sums)
        for name, peak in found.peaks.items():
            peaks[name] = peak.maximum(peaks[name]) if name in peaks else peak
        return found.loss

    def text_loss(self, batch: Any, meter: Meter) -> Tensor:
        """The weighted, summed cross-entropy of a micro-batch of pretraining text."""
        total, _, _ = self.engine("cross_entropy", batch)
        meter.add({"ptx_loss": (total, batch.num_targets)})
        return self.config.ppo.ptx_coef * total

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Write responses with the weights as they are; under ZeRO-3 all ranks must be told to, with requests or without.

        Returns:
            This rank's answers, in the order of the requests.
        """
        from rlhf_core.generate import write_with_policy

        self.reload()
        self.engine.eval()
        drafts = [drafts_of(request) for request in requests]
        for how in self.ways(requests):
            write_with_policy(
                self.model,
                [draft for request, own in zip(requests, drafts, strict=True) if way(request) == how for draft in own],
                sampling_of(*how),
                self.strategy,
                stop_ids=self.stop_ids,
                size=self.config.rollout.micro_rollout_batch_size,
                vocabulary=len(self.tokenizer),
            )
        return [
            (request.number, tuple(response_of(draft, request.seed + k, self.updates) for k, draft in enumerate(own)))
            for request, own in zip(requests, drafts, strict=True)
        ]

    def ways(self, requests: Sequence[Request]) -> list[tuple[float, float]]:
        """How responses are to be drawn on any rank: temperatures with their `top_p`."""
        mine = {way(request) for request in requests}
        ranks = self.strategy.gather(mine)
        return self.strategy.share(lambda: sorted(set().union(*ranks)))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that engines are given, on the first rank; the others must run through them too, and get none."""
        from rlhf_core.weights import weights

        self.reload()
        return weights(self.model, tied=True, wanted=self.strategy.is_first)

    def open_sync(self, world_size: int) -> tuple[str, int]:
        """Open a place where engines meet the first rank, which leaves an older one; returns its address and port. Rank 0 only.

        Args:
            world_size: this rank and all devices of the engines.
        """
        from rlhf_ray.engines.transfer import WeightSender, sync_backend

        backend = sync_backend(self.config, on_gpu=self.strategy.device.type == "cuda")
        self.sender = WeightSender(backend, self.config.cluster.call_timeout)
        return self.address, self.sender.open(self.address, world_size)

    def connect(self) -> None:
        """Meet the engines at the place that `open_sync` opened; returns when all are there. Rank 0 only."""
        assert self.sender is not None
        self.sender.connect()

    def describe_weights(self) -> list[Described] | None:
        """What every update of the engines consists of, as the first rank says it; on all ranks."""
        seen = self.weights()
        return self.sender.describe(seen) if self.sender is not None else finish(seen)

    def send_weights(self) -> dict[str, int] | None:
        """Give the weights to the engines, which must listen; their checksums from the first rank. On all ranks."""
        sent = self.weights()
        return self.sender.send(sent) if self.sender is not None else finish(sent)

    def save(self, folder: str) -> None:
        """See `TrainedWorker.save`; with the moving average and the version of the weights."""
        self.reload()
        if self.average and self.average.averages:
            self.average.save(Path(folder) / average_file(self.rank))
        if self.strategy.is_first:
            (Path(folder) / STATE).write_text(json.dumps({"updates": self.updates}))
        super().save(folder)

    def load(self, folder: str) -> None:
        """See `TrainedWorker.load`."""
        super().load(folder)
        if self.average and self.average.averages:
            self.average.load(Path(folder) / average_file(self.rank))
        self.updates = int(json.loads((Path(folder) / STATE).read_text())["updates"])


def finish(weights: Iterator[tuple[str, Tensor]]) -> None:
    """Take part in gathering weights that this rank does not want."""
    for _ in weights:
        pass


def layout(config: PPOConfig) -> tuple[bool, bool]:
    """Whether samples are laid end to end, and whether a prompt is laid once for several responses."""
    ragged = config.model.flash_attn or config.batch.packing_samples
    return ragged, ragged and config.rollout.n_samples_per_prompt > 1


def token_logps(
    model: Any, parts: Sequence[Part], config: PPOConfig, share: bool, device: Any, *, adapter: bool = True
) -> Iterator[tuple[NDArray[np.float32]]]:
    """Log-probs of the response tokens of each micro-batch, at the sampling temperature, without gradient."""
    import torch

    from rlhf_ray.collate import collate_part

    verb = ("token_logps",) if adapter else ("without_adapter", "token_logps")
    for part in parts:
        with torch.no_grad():
            logps, _ = model(*verb, collate_part(part, share=share).to(device), config.rollout.temperature)
        yield (logps.float().cpu().numpy(),)


def model_facts(model: Any, device: Any, ragged: bool, share: bool) -> dict[str, Any]:
    """What there is to say of a loaded model."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
        "device": str(device),
        "layout": "end to end, shared prompts once" if share else "end to end" if ragged else "padded",
    }


def way(request: Request) -> tuple[float, float]:
    """How its responses are drawn."""
    return request.temperature, request.top_p


def sampling_of(temperature: float, top_p: float) -> Any:
    """The same, as the writer takes it; temperature 0 takes the most probable token."""
    from rlhf_core.generate import Sampling

    if temperature == 0:
        return Sampling(greedy=True)
    return Sampling(temperature=temperature, top_p=top_p, logps_at_temperature=True)


def drafts_of(request: Request) -> list[Draft]:
    """The responses to write for a request."""
    from rlhf_core.generate import Draft

    prompt = tuple(request.prompt_ids.tolist())
    return [Draft(prompt, request.seed + k, request.max_new_tokens) for k in range(request.n)]


def response_of(draft: Draft, seed: int, version: int) -> Response:
    """A finished draft."""
    return Response(
        np.array(draft.written, np.int32),
        np.array(draft.logps, np.float32),
        draft.finish_reason == "length",
        seed,
        version,
    )
