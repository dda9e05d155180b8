"""What travels between roles: responses as they were written, and what was made of them.

Both batches are ragged and frozen: nothing is padded, lengths come from the engine and are never read off the values of
tokens. Arrays are numpy's, which Ray hands over without a copy.

Shapes: N responses, T tokens of prompts and responses, M tokens of responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

TOKENS, TARGETS, SAMPLES = "tokens", "targets", "samples"


def per(what: str, *, optional: bool = False) -> Any:
    """A field that has one entry per token `[T]`, per response token `[M]`, or per response `[N]`."""
    return field(metadata={"per": what}, default=None) if optional else field(metadata={"per": what})


@dataclass(frozen=True, eq=False, kw_only=True)
class Rollout:
    """N responses with their prompts, end to end.

    Two of them, `[7, 8 | 9, 2]` and `[5 | 6, 6, 6]`, the second cut off:

        input_ids       7 8 9 2 5 6 6 6
        prompt_lengths  2 1
        response_lengths 2 3
        truncated       False True
        rollout_logps   -0.1 -0.5 -2.0 -0.3 -0.3        of 9 2 6 6 6

    Raises:
        ValueError: lengths do not add up.
    """

    input_ids: NDArray[np.int32] = per(TOKENS)
    """Prompt and response of each sample in turn, `[T]`."""

    prompt_lengths: NDArray[np.int64] = per(SAMPLES)
    """Tokens of each prompt, `[N]`, at least 1."""

    response_lengths: NDArray[np.int64] = per(SAMPLES)
    """Tokens of each response, `[N]`, at least 1, with the one that ended it if one did."""

    truncated: NDArray[np.bool_] = per(SAMPLES)
    """Whether a response was cut off, by a length limit, `[N]`. It then has no EOS, and gets none."""

    rollout_logps: NDArray[np.float32] = per(TARGETS)
    """What the engine says of each response token, at the sampling temperature, in nats, `[M]`."""

    prompts: NDArray[np.int64] = per(SAMPLES)
    """Number of the prompt in its data set, `[N]`."""

    groups: NDArray[np.int64] = per(SAMPLES)
    """Number of the request in the run, `[N]`: responses of one group answer one prompt at one time."""

    seeds: NDArray[np.int64] = per(SAMPLES)
    """What each response was drawn with, `[N]`."""

    versions: NDArray[np.int64] = per(SAMPLES)
    """Updates that the weights had seen which began each response, `[N]`."""

    def __post_init__(self) -> None:
        for name, size in self._sizes().items():
            values = getattr(self, name)
            if values is not None and len(values) != size:
                raise ValueError(f"{name} has {len(values)} entries and should have {size}")

    def _sizes(self) -> dict[str, int]:
        sizes = {
            TOKENS: int(self.prompt_lengths.sum() + self.response_lengths.sum()),
            TARGETS: int(self.response_lengths.sum()),
            SAMPLES: len(self.prompt_lengths),
        }
        return {name: sizes[what] for name, what in columns_of(type(self))}

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_targets(self) -> int:
        """M."""
        return int(self.response_lengths.sum())

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, `[N]`."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def cu_seqlens(self) -> NDArray[np.int64]:
        """Where each sample starts in `[T]`, and the end, `[N+1]`."""
        return offsets(self.lengths)

    @cached_property
    def target_bounds(self) -> NDArray[np.int64]:
        """Where each response starts in `[M]`, and the end, `[N+1]`."""
        return offsets(self.response_lengths)

    def sample(self, number: int) -> NDArray[np.int32]:
        """Token ids of one sample, prompt and response."""
        return self.input_ids[self.cu_seqlens[number] : self.cu_seqlens[number + 1]]

    def response(self, number: int) -> NDArray[np.int32]:
        """Token ids of one response."""
        return self.sample(number)[self.prompt_lengths[number] :]

    def by_sample(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sums of `[M]` values over each response, `[N]`."""
        return np.add.reduceat(values, self.target_bounds[:-1]) if len(self) else values[:0]

    def per_target(self, values: NDArray[Any]) -> NDArray[Any]:
        """`[N]` values, each given to every token of its response, `[M]`."""
        return np.repeat(values, self.response_lengths)

    def select(self, places: Sequence[int] | NDArray[np.int64]) -> Self:
        """Some of the samples, in the order given."""
        places = np.asarray(places, np.int64)
        runs = runs_of(places)
        slices = {TOKENS: slices_of(self.cu_seqlens, runs), TARGETS: slices_of(self.target_bounds, runs)}
        chosen: dict[str, Any] = {}
        for name, what in columns_of(type(self)):
            values = getattr(self, name)
            if values is not None:
                values = values[places] if what == SAMPLES else joined(values, slices[what])
            chosen[name] = values
        return type(self)(**chosen)

    def cut(self, counts: Sequence[int]) -> Iterator[Self]:
        """All samples in consecutive pieces of so many each, whose columns are views."""
        ends = offsets(np.asarray(counts, np.int64))
        bounds = {TOKENS: self.cu_seqlens, TARGETS: self.target_bounds, SAMPLES: np.arange(len(self) + 1)}
        places = {what: bound[ends].tolist() for what, bound in bounds.items()}
        columns = [(name, getattr(self, name), places[what]) for name, what in columns_of(type(self))]
        for number in range(len(counts)):
            yield type(self)(**{
                name: None if values is None else values[ends[number] : ends[number + 1]] for name, values, ends in columns
            })  # fmt: skip

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """All samples of some batches, one batch after the other. What one of them lacks, all do."""
        columns: dict[str, Any] = {name: [getattr(part, name) for part in parts] for name, _ in columns_of(cls)}
        lacking = {name for name, values in columns.items() if any(value is None for value in values)}
        whole: dict[str, Any] = {name: np.concatenate(v) for name, v in columns.items() if name not in lacking}
        return cls(**whole | dict.fromkeys(lacking))


@dataclass(frozen=True, eq=False, kw_only=True)
class Experience(Rollout):
    """A rollout with everything that an update needs; columns that a configuration does not need are None.

    For the two responses above, with scores 1.0 and -0.5, `rloo`, and the second response masked for being cut off:

        scores      1.0 -0.5
        logps       -0.1 -0.5 -2.0 -0.3 -0.3
        advantages  1.5 1.5 -1.5 -1.5 -1.5
        mask        True True False False False
    """

    scores: NDArray[np.float32] = per(SAMPLES)
    """Reward of each response: normalised, weighted, added up, clipped, and less the penalty for length, `[N]`."""

    mask: NDArray[np.bool_] = per(TARGETS)
    """Response tokens that are trained, `[M]`."""

    advantages: NDArray[np.float32] = per(TARGETS)
    """`[M]`."""

    returns: NDArray[np.float32] | None = per(TARGETS, optional=True)
    """What values are fitted to, `[M]`; with a critic."""

    values: NDArray[np.float32] | None = per(TARGETS, optional=True)
    """Value of the state in which each response token was chosen, before the update, `[M]`; with a critic."""

    logps: NDArray[np.float32] | None = per(TARGETS, optional=True)
    """Log-probs of the policy before the update, at the sampling temperature, `[M]`; None where the only update of a
    rollout computes them anyway (`PPOConfig.recomputes_logps`)."""

    reference_logps: NDArray[np.float32] | None = per(TARGETS, optional=True)
    """Log-probs of the reference model, at the sampling temperature, `[M]`; with a KL penalty."""

    @classmethod
    def of(cls, rollout: Rollout, **columns: Any) -> Experience:
        """A rollout with more columns."""
        own: dict[str, Any] = {name: getattr(rollout, name) for name, _ in columns_of(Rollout)}
        return cls(**own, **columns)

    def with_columns(self, **columns: Any) -> Experience:
        """The same with some columns replaced."""
        return replace(self, **columns)


@cache
def columns_of(batch: type[Rollout]) -> tuple[tuple[str, str], ...]:
    """Names of the columns of a batch, each with what it has one entry for."""
    return tuple((f.name, f.metadata["per"]) for f in fields(batch))


def offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where parts of these lengths start when they are laid end to end, and the end, `[N+1]`."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def take(values: NDArray[Any], bounds: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[Any]:
    """Some of the parts that lie end to end, in the order given.

    Args:
        values: all parts.
        bounds: where each starts, and the end, `[N+1]`.
        places: which.
    """
    return joined(values, slices_of(bounds, runs_of(places)))


def put(values: NDArray[Any], bounds: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[Any]:
    """All parts end to end, from parts in another order: the inverse of `take` for all of them.

    Args:
        values: parts, in the order of `places`.
        bounds: where each shall start, and the end, `[N+1]`.
        places: which they are; each is there once.
    """
    out, done = np.empty_like(values), 0
    for start, stop in slices_of(bounds, runs_of(places)):
        out[start:stop] = values[done : done + stop - start]
        done += stop - start
    return out


def joined(values: NDArray[Any], slices: Sequence[tuple[int, int]]) -> NDArray[Any]:
    """Slices of an array, end to end."""
    return np.concatenate([values[start:stop] for start, stop in slices]) if slices else values[:0]


def runs_of(places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where runs of consecutive places begin, and where they end (the place behind the last)."""
    if not len(places):
        return places, places
    breaks = np.flatnonzero(places[1:] - places[:-1] != 1) + 1
    return places[np.append(0, breaks)], places[np.append(breaks, len(places)) - 1] + 1


def slices_of(bounds: NDArray[np.int64], runs: tuple[NDArray[np.int64], NDArray[np.int64]]) -> list[tuple[int, int]]:
    """Where the parts of each run start and stop; `bounds` as of `take`."""
    first, end = runs
    return list(zip(bounds[first].tolist(), bounds[end].tolist(), strict=True))
