"""Rewards by a reward model: no padding, prompts that several responses share once, on one rank or on many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_core.config import ModelConfig
from rlhf_core.libraries import settle
from rlhf_data.encode import Sample
from rlhf_data.errors import InputError
from rlhf_infer.rewards.scorer import Answer, Judgement, Scorer, ScorerOptions

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.batch import Batch
    from rlhf_core.ranks import Ranks

WORTH_SHARING = 8
"""Tokens from which on a common prefix is laid once: it costs an attention call of its own."""

Unit = tuple[tuple[int, ...], int]
"""Places of samples that are computed together, and how many leading tokens of theirs are laid once."""


def check_reward_model(options: ScorerOptions) -> Any:
    """Find what is wrong with a reward model, without its weights.

    Returns:
        Its architecture.

    Raises:
        InputError: the folder is broken or holds no reward model, or an option does not fit it.
    """
    settle()
    from rlhf_core.models.load import check_ragged, reward_model_config
    from rlhf_core.models.reward import Calibration

    config, _ = reward_model_config(model_config(options), options.value_head_prefix, options.option)
    if options.normalize_reward:
        Calibration.of(config, options.pretrain)
    text = config.get_text_config()
    longest = options.max_len or getattr(text, "max_position_embeddings", None) or 0
    if options.flash_attn:
        try:
            check_ragged(options.pretrain, text, longest, options.option)
        except InputError as error:
            raise InputError(with_way_out(error)) from error
    return config


def model_head(options: ScorerOptions) -> str:
    """The name of a reward model's head in its checkpoint."""
    from rlhf_core.models.load import reward_model_config

    return str(reward_model_config(model_config(options), options.value_head_prefix, options.option)[1].found)


def model_config(options: ScorerOptions) -> ModelConfig:
    """How rlhf-core is told which model."""
    return ModelConfig(
        pretrain=options.pretrain, bf16=options.bf16, flash_attn=options.flash_attn,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip


def with_way_out(error: Exception) -> str:
    """What training says of attention without padding, with the option of scoring that leaves it out."""
    said = str(error)
    for training in ("leave out --flash_attn and --packing_samples", "try without --flash_attn and --packing_samples"):
        said = said.replace(training, "give --no_flash_attn")
    return said.replace("try --no_share_prefix", "give --no_flash_attn")


class ModelScorer(Scorer):
    """A reward model.

    On several ranks the first one is asked; the others run `follow`, and each computes its share of what is asked.

    Args:
        options: which model, and how it computes.
        ranks: that share the work, and, at their ZeRO stage 3, the weights; None for this process alone.

    Raises:
        InputError: the model cannot be loaded, or does not pass the start-up check.
    """

    needs_tokens = True

    def __init__(self, options: ScorerOptions, ranks: Ranks | None = None) -> None:
        import torch

        from rlhf_core.models.check import check_model
        from rlhf_core.models.load import load_reward_model
        from rlhf_core.models.reward import Calibration

        config = check_reward_model(options)
        self.calibration = Calibration.of(config, options.pretrain) if options.normalize_reward else None
        self.size, self.share_prefix, self.ranks = options.micro_batch_size, options.flash_attn, ranks
        self.device = ranks.device if ranks else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        splits = bool(ranks and (ranks.zero_stage == 3 or options.offload))
        model = load_reward_model(
            model_config(options), options.value_head_prefix, options.option, device=self.device,
            deepspeed=ranks.frozen_config(options.offload) if ranks and splits else None,
        )  # fmt: skip
        self.model = ranks.prepare_frozen(model, offload=options.offload) if ranks else model.to(self.device)
        self.vocab_size = int(config.get_text_config().vocab_size)
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        try:
            check_model(self.model, "rewards", self.vocab_size, self.device, dtype, self.share_prefix)
        except ValueError as error:
            raise InputError(f"{options.option} {options.pretrain}: {with_way_out(error)}") from error

    def judge(self, answers: Sequence[Answer]) -> Judgement:
        samples = [answer.sample for answer in answers]
        return Judgement(self.rewards([sample for sample in samples if sample is not None]))

    def rewards(self, samples: Sequence[Sample]) -> list[float]:
        """Rewards of samples, in their order. Only on the first rank."""
        if not samples:
            return []
        if self.ranks and self.ranks.world_size > 1:
            self.ranks.share(lambda: samples)
        return self.compute(samples)

    def follow(self) -> None:
        """Take part in what the first rank is asked, until it closes. Only on the others."""
        assert self.ranks is not None
        while samples := self.ranks.share(lambda: None):
            self.compute(samples)

    def close(self) -> None:
        """Let the other ranks go."""
        if self.ranks and self.ranks.world_size > 1 and self.ranks.is_first:
            self.ranks.share(lambda: None)

    def compute(self, samples: Sequence[Sample]) -> list[float]:
        """Rewards of samples, in their order. Every rank must be given the same ones at the same time."""
        import torch

        rank, world_size = (self.ranks.rank, self.ranks.world_size) if self.ranks else (0, 1)
        found = torch.zeros(len(samples), dtype=torch.float32)
        with torch.no_grad():
            for units in plan(samples, self.size, world_size, self.share_prefix)[rank]:
                batch = lay(samples, units) if units else lay(samples, [((0,), 0)]).without_targets()
                places = [place for members, _ in units for place in members]
                found[places] = self.model("rewards", batch.to(self.device))[0].cpu()
        rewards = self._everywhere(found)
        if self.calibration:
            rewards = self.calibration.normalise(rewards)
        return rewards.tolist()

    def _everywhere(self, found: Tensor) -> Tensor:
        """What all ranks found, each for other samples, `[N]` float64."""
        import torch

        if not self.ranks or self.ranks.world_size == 1:
            return found.double()
        return torch.tensor(self.ranks.sum(found), dtype=torch.float64)


def plan(samples: Sequence[Sample], size: int, world_size: int, share_prefix: bool) -> list[list[list[Unit]]]:
    """Divide samples into forward passes, and these among ranks.

    Samples with the same prompt are computed together, so that the prompt is laid once. Passes hold samples of about equal
    lengths, the longest first; a round of passes that run at the same time on different ranks has about equal numbers of
    tokens. The plan depends on the arguments only.

    Args:
        samples: N samples.
        size: most samples of a forward pass.
        world_size: number of ranks.
        share_prefix: whether prompts are laid once.

    Returns:
        For each rank its forward passes, as many as every other rank has; one without units is a dummy. Every sample is in
        one of them.
    """
    size = max(1, min(size, -(-len(samples) // world_size)))
    units = shared_units(samples, size) if share_prefix else [((place,), 0) for place in range(len(samples))]
    units.sort(key=lambda unit: (-tokens(samples, unit), unit))
    passes = list(fill(units, size))
    passes.sort(key=lambda units: -sum(tokens(samples, unit) for unit in units))
    passes += [[] for _ in range(-len(passes) % world_size)]
    rounds = [passes[start : start + world_size] for start in range(0, len(passes), world_size)]
    # the rank with the most tokens of a round has the least of the next
    dealt = [round if number % 2 == 0 else round[::-1] for number, round in enumerate(rounds)]
    return [[round[rank] for round in dealt] for rank in range(world_size)]


def shared_units(samples: Sequence[Sample], size: int) -> list[Unit]:
    """Samples with the same prompt as units of at most `size`; a sample that shares nothing is a unit of its own."""
    prompts: dict[bytes, list[int]] = {}
    for place, sample in enumerate(samples):
        prompts.setdefault(sample.input_ids[: prompt_length(sample)].tobytes(), []).append(place)
    units: list[Unit] = []
    for places in prompts.values():
        shared = prompt_length(samples[places[0]])
        if shared < WORTH_SHARING:
            units += [((place,), 0) for place in places]
            continue
        for start in range(0, len(places), size):
            members = tuple(places[start : start + size])
            units.append((members, shared if len(members) > 1 else 0))
    return units


def prompt_length(sample: Sample) -> int:
    """Tokens before the first target."""
    return int(sample.target_mask.argmax())


def tokens(samples: Sequence[Sample], unit: Unit) -> int:
    """Tokens that are computed for a unit."""
    places, shared = unit
    return shared + sum(len(samples[place]) - shared for place in places)


def fill(units: Sequence[Unit], size: int) -> Iterator[list[Unit]]:
    """Units to forward passes of at most `size` samples, each unit to the first that has room among the open ones."""
    open_passes: list[tuple[list[Unit], int]] = []
    for unit in units:
        count = len(unit[0])
        for number, (members, room) in enumerate(open_passes):
            if room >= count:
                members.append(unit)
                open_passes[number] = (members, room - count)
                break
        else:
            open_passes.append(([unit], size - count))
        if open_passes[0][1] == 0:
            yield open_passes.pop(0)[0]
    yield from (members for members, _ in open_passes)


def lay(samples: Sequence[Sample], units: Sequence[Unit]) -> Batch:
    """The samples of some units as a batch."""
    from rlhf_core.batch import Batch

    return Batch.from_groups([([untrained(samples[place]) for place in places], shared) for places, shared in units])


def untrained(sample: Sample) -> Sample:
    """The same tokens without targets: a reward is read at the last one, and nothing is predicted."""
    return Sample(sample.input_ids, np.zeros(len(sample), np.bool_))
