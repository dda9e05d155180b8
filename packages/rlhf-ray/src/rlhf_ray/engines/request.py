"""The protocol of what writes rollouts: requests in, responses out as they finish, new weights in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """A prompt to answer n times."""

    number: int
    """Of the request in the run; held-out prompts have negative ones."""

    prompt_ids: NDArray[np.int32]
    """The prompt, at least one token."""

    seed: int
    """Of the first response; response k is drawn with `seed + k`, whatever else is written at the same time."""

    n: int
    """Responses to write."""

    temperature: float
    """Divides the logits; 0 takes the most probable token."""

    top_p: float
    """Draw from the smallest set of tokens that has this probability."""

    max_new_tokens: int
    """Longest response, in tokens."""


@dataclass(frozen=True, eq=False, slots=True)
class Response:
    """One response."""

    token_ids: NDArray[np.int32]
    """At least one token, with the one that ended it if one did."""

    logps: NDArray[np.float32]
    """Log-probability of each token at the sampling temperature, in nats, as the engine sees it."""

    truncated: bool
    """Whether it was cut off by a length limit."""

    seed: int
    """What it was drawn with."""

    version: int
    """Updates that the weights had seen which began it."""


Answer = tuple[int, tuple[Response, ...]]
"""The number of a request, and its responses."""


class Engines(Protocol):
    """All that writes responses for a run."""

    def submit(self, requests: Sequence[Request], turn: int = 0) -> None:
        """Have requests answered, before those that wait with a later turn and after those with the same."""
        ...

    def collect(self) -> list[Answer]:
        """Requests that are answered; waits for the first. Nothing only if none is outstanding.

        Raises:
            RunError: engines do not answer in time, or die too often.
        """
        ...

    @property
    def references(self) -> Sequence[object]:
        """Calls of engines that go on, for `Backend.wait`; none where engines do not write by themselves."""
        ...

    def advance(self) -> None:
        """See to engines whose calls have ended, without waiting: what they answered is kept for `collect`."""
        ...

    def sync(self, version: int) -> dict[str, float]:
        """Give the policy's weights, which have seen `version` updates, to all engines.

        Responses that are being written go on with the new weights. Returns figures for the log.
        """
        ...

    @property
    def outstanding(self) -> int:
        """Requests that are not answered yet."""
        ...

    def figures(self) -> dict[str, float]:
        """What there is to log since the last time: queue depth, restarts, …."""
        ...

    def sleep(self) -> None:
        """Make room on the devices for models that train."""
        ...

    def wake(self) -> None:
        """Take it back."""
        ...

    def close(self) -> None:
        """End all engines."""
        ...
