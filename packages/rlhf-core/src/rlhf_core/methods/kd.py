"""Knowledge distillation: predict what a teacher predicts, on given responses or on the student's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.cache import Cached, Rows, precompute
from rlhf_core.config import KDConfig
from rlhf_core.generate import Draft, Sampling, write_with_policy
from rlhf_core.method import Frozen, InMemory, Method, Window
from rlhf_core.methods.terms import balanced, is_training, perplexity, prompt_length, token_budget
from rlhf_core.metrics import Sums
from rlhf_core.run import run
from rlhf_core.vocabulary import shared_vocabulary
from rlhf_data.encode import Sample
from rlhf_data.sft import prepare_sft
from rlhf_losses import linear_distillation_sum, linear_topk_distillation_sum, linear_topk_logps

OWN_LENGTH = 256
"""Longest response that the student writes itself, unless told otherwise."""

TOP_K = 64
"""Tokens that `--cache_teacher` keeps at each place, unless told otherwise."""


class KD(Method):
    """(1 - c) cross-entropy of the labels + c T² divergence from the teacher at temperature T, mean over all targets of a step.

    Both terms are taken at the same places: those that predict a target, the first response token and EOS included.
    Responses that the student wrote itself have no labels, only the divergence.
    """

    name = "kd"

    def __init__(self, config: KDConfig, tokenizer: Any) -> None:
        teacher = config.teacher
        self.frozen = Frozen(
            "teacher", "--teacher_model", teacher.teacher_model, teacher.teacher_offload, teacher.cache_teacher
        )
        self.vocabulary = shared_vocabulary(config.model, tokenizer, teacher.teacher_model, "--teacher_model")
        data = prepare_sft(config.data, tokenizer, seed=config.batch.seed)
        self.train, self.evaluation, self.data_report = data.train, data.eval, data.report
        self.config, self.options = config, config.distillation
        self.token_budget = token_budget(config)
        self.eos_id = int(tokenizer.eos_token_id)

    def prepare(self, models: Any) -> None:
        """With `--cache_teacher`, the teacher's likeliest tokens at every target, from the cache or computed now."""
        if not (self.frozen and self.frozen.cached):
            return
        teacher_vocabulary = models.config_of(self.frozen).get_text_config().vocab_size
        k = min(self.config.teacher.teacher_top_k or TOP_K, self.vocabulary, teacher_vocabulary)
        columns = {"logps": (np.dtype("f4"), k), "tokens": (np.dtype("i4"), k)}
        key = {"k": k, "vocabulary": self.vocabulary, "temperature": self.options.kd_temperature}
        rows = partial(self.teacher_rows, k)
        precompute(
            self.config, self, models, rows, Batch.from_samples, lambda dataset: dataset.num_targets, columns, **key
        )

    def teacher_rows(self, k: int, teacher: Any, batch: Batch) -> Iterator[Rows]:
        """The teacher's `k` likeliest tokens at the targets of every sample."""

        def likeliest(hidden: Tensor, weight: Tensor, labels: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
            return linear_topk_logps(
                hidden, weight, k, temperature=self.options.kd_temperature, vocabulary=self.vocabulary, **head
            )

        (logps, tokens), _ = teacher("at_targets", batch, likeliest)
        logps, tokens, bounds = logps.cpu().numpy(), tokens.cpu().numpy(), batch.target_bounds.tolist()
        for start, stop in pairwise(bounds):
            yield {"logps": logps[start:stop], "tokens": tokens[start:stop]}

    def begin_step(self, engine: Any, window: Window, run: Any) -> Window:
        """With `--on_policy_fraction`, some of the samples with responses that the student writes now."""
        count = round(self.options.on_policy_fraction * len(window))
        if not (count and is_training(engine)):
            return window
        step, seed = run.position.step, self.config.batch.seed
        chosen = np.sort(np.random.default_rng([seed, step]).choice(len(window), count, replace=False))
        own = self.own_samples(engine, [window[int(place)] for place in chosen], chosen, run)
        replaced = dict(zip(chosen.tolist(), own, strict=True))
        samples = [
            (replaced[place], False) if place in replaced else (window[place], True) for place in range(len(window))
        ]
        lengths = np.array([len(sample) for sample, _ in samples])
        targets = np.array([int(sample.target_mask.sum()) for sample, _ in samples])
        return InMemory(samples, lengths, targets).window()

    def own_samples(self, engine: Any, samples: list[Sample], places: np.ndarray, run: Any) -> list[Sample]:
        """The prompts of some samples with responses that the student writes: each rank its part, all ranks get all."""
        config, strategy = self.config, run.strategy
        prompts = [sample.input_ids[: prompt_length(sample)] for sample in samples]
        longest = self.options.generate_max_len or OWN_LENGTH
        each = -(-len(prompts) // strategy.world_size)
        drafts = [
            Draft(
                tuple(prompts[n].tolist()),
                [config.batch.seed, run.position.step, int(places[n])],
                min(longest, config.data.max_len - len(prompts[n])),
            )
            for n in (m % len(prompts) for m in range(strategy.rank * each, (strategy.rank + 1) * each))
        ]
        engine.eval()
        write_with_policy(
            engine.module,
            drafts,
            Sampling(temperature=self.options.on_policy_temperature or 1.0),
            strategy,
            stop_ids=[self.eos_id],
            size=config.batch.micro_train_batch_size,
            vocabulary=self.vocabulary,
        )
        engine.train()
        parts = strategy.gather([np.array(draft.written, np.int32) for draft in drafts])
        responses = strategy.share(lambda: [response for part in parts for response in part])[: len(prompts)]
        return [own_sample(prompt, response, self.eos_id) for prompt, response in zip(prompts, responses, strict=True)]

    @property
    def longest(self) -> int:
        """With the student's own responses, what they can come to."""
        given = super().longest
        own = given + (self.options.generate_max_len or OWN_LENGTH)
        return max(given, min(own, self.config.data.max_len)) if self.options.on_policy_fraction else given

    @property
    def cache_bytes(self) -> int:
        targets = sum(int(data.num_targets.sum()) for data in (self.train, self.evaluation) if data is not None)
        return 8 * targets * min(self.config.teacher.teacher_top_k or TOP_K, self.vocabulary)

    def divisor(self, window: Window) -> float:
        return float(window.num_targets.sum())

    def collate(self, samples: list[Any]) -> Batch:
        if isinstance(self.train, Cached):
            columns = {
                name: torch.from_numpy(np.concatenate([rows[name] for _, rows in samples]))
                for name in ("logps", "tokens")
            }
            return Batch.from_samples([sample for sample, _ in samples], **columns)
        pairs = [sample if isinstance(sample, tuple) else (sample, True) for sample in samples]
        labelled = torch.tensor([float(has_labels) for _, has_labels in pairs])
        return Batch.from_samples([sample for sample, _ in pairs], labelled=labelled)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Sums]:
        labelled = batch.columns.get("labelled", torch.ones(batch.num_samples, device=batch.input_ids.device))
        counts = batch.targets_per_sample
        has_label = labelled.repeat_interleave(counts)
        ((total, divergence, nll), balance) = model("at_targets", batch, partial(self.objective, batch, has_label))
        labels = has_label.sum()
        sums: Sums = {
            "loss": (total, batch.num_targets),
            "ce_loss": ((nll * has_label).sum(), labels),
            "kd_loss": (divergence.sum(), batch.num_targets),
        }
        if self.options.on_policy_fraction and is_training(model):
            sums["on_policy_length"] = ((counts * (1 - labelled)).sum(), (1 - labelled).sum())
        return balanced(total, sums, balance, counts, self.config.model.aux_loss_coef)

    def objective(
        self, batch: Batch, has_label: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, **head: Any
    ) -> Any:
        """Both terms in one pass over the student's logits; called where the student's head weight is."""
        options, real = self.options, (labels >= 0).float()
        has_label = has_label if batch.num_targets else real
        weights = {
            "ce_weights": (1 - options.kd_coef) * has_label * real,
            "kd_weights": options.kd_coef * options.kd_temperature**2 * real,
        }
        if "logps" in batch.columns:
            logps, tokens = batch.columns["logps"], batch.columns["tokens"].long()
            if not batch.num_targets:
                logps, tokens = logps.new_zeros(1, 1), tokens.new_zeros(1, 1)
            own = {f"student_{name}": value for name, value in head.items()}
            return linear_topk_distillation_sum(
                hidden, weight, logps, tokens, labels, temperature=options.kd_temperature,
                shared_vocab=min(self.vocabulary, len(weight)), **weights, **own,
            )  # fmt: skip

        found: list[Any] = []

        def with_teacher(teacher_hidden: Tensor, teacher_weight: Tensor, _: Tensor, **teacher_head: Any) -> Tensor:
            out = linear_distillation_sum(
                hidden,
                weight,
                teacher_hidden,
                teacher_weight,
                labels,
                kind=options.kd_loss,
                beta=options.kd_beta or 0.5,
                alpha=options.kd_alpha or 0.1,
                temperature=options.kd_temperature,
                shared_vocab=min(self.vocabulary, len(weight), len(teacher_weight)),
                **weights,
                **{f"student_{name}": value for name, value in head.items()},
                **{f"teacher_{name}": value for name, value in teacher_head.items()},
            )
            found.append(out)  # not returned: the teacher's modules would wait for a backward pass through them
            return teacher_hidden.new_zeros(())

        self.frozen_model("at_targets", batch, with_teacher)
        return found[0]

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return means | perplexity(means, "ce_loss")

    def identity(self) -> dict[str, Any]:
        teacher = self.config.teacher
        top_k = (teacher.teacher_top_k or TOP_K) if teacher.cache_teacher else None
        return {
            "distillation": self.options.model_dump(),
            "teacher_model": teacher.teacher_model,
            "teacher_top_k": top_k,
        }


def own_sample(prompt: np.ndarray, response: np.ndarray, eos_id: int) -> Sample:
    """A prompt with a response as a sample, the response being its targets."""
    ids = np.concatenate([prompt, response]).astype(np.int32)
    return Sample(ids, np.arange(len(ids)) >= len(prompt), truncated=bool(response[-1] != eos_id))


def train(config: KDConfig, *, dry_run: bool = False, world_size: int = 1) -> None:
    """Distil `config.teacher.teacher_model` into `config.model.pretrain` and write the result to `config.checkpoint.save_path`."""
    run(config, KD, dry_run=dry_run, world_size=world_size)
