"""A rank of a role: what all workers with a model have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_ray.config import PPOConfig

if TYPE_CHECKING:
    from rlhf_core.ranks import Meeting, Ranks


class RankWorker:
    """One rank of a role, in a process of its own. Making it is cheap: models come with `setup`.

    Args:
        rank: of this worker, from 0.
        world_size: ranks of its role.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.store: Any = None

    def meet(self) -> tuple[str, int]:
        """Open a place where the ranks of the role meet, and keep it open; returns its address and port. Rank 0 only."""
        from rlhf_core.ranks import open_meeting

        self.store = open_meeting(self.address, self.world_size)
        return self.address, self.store.port

    @property
    def address(self) -> str:
        """Of this node, as others reach it."""
        from ray.util import get_node_ip_address

        return get_node_ip_address()

    def meeting_of(self, meeting: tuple[str, int] | None) -> Meeting | None:
        """Where this rank goes, given what `meet` returned; None for a single rank."""
        from rlhf_core.ranks import Meeting

        return Meeting(*meeting, self.rank, self.world_size) if meeting else None

    def join(self, config: PPOConfig, meeting: tuple[str, int] | None) -> Ranks:
        """Meet the other ranks of a role whose model is not trained."""
        from rlhf_core.libraries import settle

        settle()
        from rlhf_core.ranks import Ranks

        return Ranks(
            config.parallel,
            seed=config.batch.seed,
            bf16=config.model.bf16,
            zero_stage=config.parallel.zero_stage,
            meeting=self.meeting_of(meeting),
        )
