"""A reward model or a Python reward function: what responses are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_infer.rewards.scorer import Answer, Judgement, Scorer, is_function, make_scorer
from rlhf_ray.config import PPOConfig
from rlhf_ray.rewards import scorer_options
from rlhf_ray.workers.rank import RankWorker


class RewardWorker(RankWorker):
    """One rank of a source of rewards. A process that runs a Python function imports nothing that models need."""

    scorer: Scorer

    def setup(self, config: PPOConfig, meeting: tuple[str, int] | None, source: str) -> dict[str, Any]:
        """Load what scores, and check it.

        Args:
            config: the run's options.
            meeting: what `meet` of rank 0 returned; None for a single rank, and for functions, whose ranks share nothing.
            source: the reward model, or the function.

        Returns:
            Facts for the plan and the record: `source`, and of a model `parameters` (a count) and `device`.

        Raises:
            InputError: it cannot be loaded, or an option does not fit it.
        """
        options = scorer_options(config, source)
        if is_function(source):
            self.scorer = make_scorer(options)
            return {"source": source}
        ranks = self.join(config, meeting)
        self.scorer = make_scorer(options, ranks)
        from rlhf_infer.rewards.model import ModelScorer

        assert isinstance(self.scorer, ModelScorer)
        sizes = [getattr(p, "ds_numel", p.numel()) for p in self.scorer.model.parameters()]
        return {"source": source, "parameters": sum(sizes), "device": str(ranks.device)}

    def judge(self, answers: Sequence[Answer]) -> Judgement:
        """Rewards of some answers.

        Args:
            answers: for a model the same ones on every rank, each with its `sample`; every rank returns the rewards of all.
        """
        if not self.scorer.needs_tokens:
            return self.scorer.judge(answers)
        from rlhf_infer.rewards.model import ModelScorer

        assert isinstance(self.scorer, ModelScorer)
        return Judgement(self.scorer.compute([answer.sample for answer in answers if answer.sample is not None]))
