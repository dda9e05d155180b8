"""Our losses against those of TRL 1.16, on the same numbers: its own code runs, on trainers without models or data.

TRL is no dependency of ours: install it (`uv sync --group bench`) to run these. Gradients are compared as well as means,
which tells every sequence and token apart.
"""

from __future__ import annotations

from collections import defaultdict
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_losses as ours

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.skipif(not trl.__version__.startswith("1.16."), reason="written against TRL 1.16")

B, T, V, PROMPT = 12, 9, 7, 2
BETA = 0.3


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # Some trainers import vLLM where there is one, to generate, and TRL warns of versions it does not know.
    monkeypatch.setattr(import_module("trl.import_utils"), "is_vllm_available", lambda *_, **__: False)


def trainer_of(cls: type, **attributes: Any) -> Any:
    """A trainer that was never set up: only what its loss reads."""

    def same(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=same, gather_for_metrics=same, reduce=same
    )
    trainer = cls.__new__(cls)
    usual = {
        "accelerator": accelerator, "model": SimpleNamespace(training=True), "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0, "_tp_size": 1, "aux_loss_enabled": False, "is_encoder_decoder": False,
    }  # fmt: skip
    vars(trainer).update(usual | attributes)
    return trainer


def outputs(logps: Tensor) -> SimpleNamespace:
    """What TRL's fused head returns, of which its losses read the log-probs and its metrics the rest."""
    blank = torch.zeros_like(logps, requires_grad=False)
    return SimpleNamespace(log_probs=logps, entropy=blank, mean_logits=blank, is_top1=blank.bool())


def responses(rows: int) -> tuple[Tensor, Tensor]:
    """Response masks `[rows, T]` of different lengths, and log-probs of the targets `[rows, T − 1]`, 0 elsewhere."""
    mask = torch.arange(T) < torch.randint(PROMPT + 1, T + 1, (rows, 1))
    mask[:, :PROMPT] = False
    logps = -torch.rand(rows, T - 1).mul(3).masked_fill(~mask[:, 1:], 0)
    return mask, logps.requires_grad_()


def check(theirs: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], **tolerance: Any) -> None:
    """Same value and same gradients."""
    torch.testing.assert_close(theirs, expected, **tolerance)
    gradients = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (theirs, expected))
    torch.testing.assert_close(*gradients, **tolerance)


# Preferences


class Pairs:
    """A batch of pairs, for TRL's DPO trainer and for us."""

    def __init__(self, pairs: int = B) -> None:
        self.mask, self.logps = responses(2 * pairs)
        self.reference = self.logps.detach().sum(1) + 3 * torch.randn(2 * pairs)

    def trl(self, loss_type: str, label_smoothing: float = 0.0) -> Tensor:
        trainer = trainer_of(
            trl.DPOTrainer, loss_types=[loss_type], loss_weights=[1.0], beta=BETA, label_smoothing=label_smoothing,
            ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
        )  # fmt: skip
        reference_chosen, reference_rejected = self.reference.chunk(2)
        inputs = {
            "input_ids": torch.ones_like(self.mask, dtype=torch.int64), "attention_mask": torch.ones_like(self.mask).long(),
            "completion_mask": self.mask.long(), "ref_chosen_logps": reference_chosen, "ref_rejected_logps": reference_rejected,
        }  # fmt: skip
        return trainer.compute_loss(lambda **_: outputs(self.logps), inputs)

    def margin(self, of_means: bool = False) -> Tensor:
        lengths = self.mask.sum(1) if of_means else 1
        policy, reference = self.logps.sum(1) / lengths, self.reference / lengths
        return ours.preference_margin(*policy.chunk(2), *reference.chunk(2))


def test_dpo():
    pairs = Pairs()
    check(pairs.trl("sigmoid"), ours.dpo_loss(pairs.margin(), BETA).mean(), (pairs.logps,))


def test_conservative_dpo():
    """TRL's DPO trainer smooths no labels under "sigmoid". Its "aot" does, and is cDPO for one pair: it sorts pairs."""
    pairs = Pairs(1)
    expected = ours.dpo_loss(pairs.margin(), BETA, label_smoothing=0.1).mean()
    check(pairs.trl("aot", 0.1), expected, (pairs.logps,))
    check(pairs.trl("sigmoid", 0.1), ours.dpo_loss(pairs.margin(), BETA).mean(), (pairs.logps,))
    assert abs(pairs.trl("sigmoid", 0.1) - expected) > 1e-3


def test_conservative_dpo_without_a_reference():
    """TRL's CPO is cDPO whose reference finds everything equally likely."""
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = (-10 * torch.rand(2, B)).requires_grad_().unbind()
    trainer = trainer_of(CPOTrainer, loss_type="sigmoid", beta=BETA, label_smoothing=0.1, alpha=0.0)
    theirs, *_ = trainer.cpo_loss(chosen, rejected)
    check(theirs.sum(), ours.dpo_loss(chosen - rejected, BETA, label_smoothing=0.1).sum(), (chosen, rejected))


def test_robust_dpo():
    pairs = Pairs()
    expected = ours.robust_dpo_loss(pairs.margin(), BETA, label_smoothing=0.1).mean()
    check(pairs.trl("robust", 0.1), expected, (pairs.logps,))


def test_ipo():
    """TRL's IPO is of log-probs per token, which ours is when the margin is; the paper's, of sums, is another loss."""
    pairs = Pairs()
    check(pairs.trl("ipo"), ours.ipo_loss(pairs.margin(of_means=True), BETA).mean(), (pairs.logps,))
    assert abs(pairs.trl("ipo") - ours.ipo_loss(pairs.margin(), BETA).mean()) > 1


def test_hinge():
    pairs = Pairs()
    assert 0 < (ours.hinge_loss(pairs.margin(), BETA) == 0).sum() < B
    check(pairs.trl("hinge"), ours.hinge_loss(pairs.margin(), BETA).mean(), (pairs.logps,))


def labelled() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch as TRL's reference-free trainers take it, its labels `[2B, T]`, and logits of all of it."""
    mask, _ = responses(2 * B)
    ids, attended = torch.randint(V, (2 * B, T)), torch.ones(2 * B, T).long()
    labels = ids.masked_fill(~mask, -100)
    halves = zip(("chosen", "rejected"), ids.chunk(2), attended.chunk(2), labels.chunk(2), strict=True)
    batch = {
        f"{side}_{name}": x
        for side, *tensors in halves
        for name, x in zip(("input_ids", "attention_mask", "labels"), tensors, strict=True)
    }
    return batch, labels, torch.randn(2 * B, T, V, requires_grad=True)


def mean_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per token, of chosen and rejected responses."""
    targets = labels[:, 1:]
    logps = ours.token_logps(logits[:, :-1], targets.clamp(min=0)).masked_fill(targets == -100, 0)
    chosen, rejected = (logps.sum(1) / (targets != -100).sum(1)).chunk(2)
    return chosen, rejected


def test_simpo():
    from trl.experimental.cpo import CPOTrainer

    batch, labels, logits = labelled()
    trainer = trainer_of(
        CPOTrainer, loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=0.0, alpha=0.0, cpo_alpha=0.0,
        pad_token_id=0,
    )  # fmt: skip
    theirs, _ = trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)
    check(theirs, ours.simpo_loss(*mean_logps(logits, labels), beta=2.0, gamma=0.7).mean(), (logits,))


def test_orpo():
    """TRL's beta is the paper's λ; its NLL is per token of all chosen sequences, the prompts' too, as in the paper."""
    from trl.experimental.orpo import ORPOTrainer

    batch, labels, logits = labelled()
    trainer = trainer_of(ORPOTrainer, beta=0.4, padding_value=0)
    theirs, _ = trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)
    nll = -ours.token_logps(logits[:B, :-1], batch["chosen_input_ids"][:, 1:]).mean()
    check(theirs, nll + 0.4 * ours.orpo_loss(*mean_logps(logits, labels)).mean(), (logits,))


def test_orpo_of_a_certain_response():
    """At log-prob 0 the odds are infinite: TRL's loss becomes infinite or NaN, ours keeps to −1e-6 and is finite."""
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = torch.tensor([0.0, -1.0, 0.0]), torch.tensor([-1.0, 0.0, 0.0])
    theirs, *_ = trainer_of(ORPOTrainer, beta=1.0).odds_ratio_loss(chosen, rejected)
    assert theirs[1].isinf() and theirs[2].isnan()
    assert ours.orpo_loss(chosen, rejected).isfinite().all()


@pytest.mark.parametrize("drift", [0.5, -0.5])
def test_kto(drift):
    """TRL's reference point is the mean over unrelated pairs and ranks, then at least 0; without gradient."""
    mask, logps = responses(B)
    kl_mask, kl_logps = responses(B)
    reference, labels = -10 * torch.rand(B), torch.arange(B) % 3 > 0
    kl_reference = kl_logps.detach().sum(1) - drift
    ids, kl_ids = torch.ones(2, B, T, dtype=torch.int64).unbind()
    attended = torch.ones(B, T, dtype=torch.int64)
    inputs = {
        "label": labels, "input_ids": ids, "attention_mask": attended, "completion_mask": mask.long(),
        "KL_input_ids": kl_ids, "KL_attention_mask": attended, "KL_completion_mask": kl_mask.long(),
        "ref_logps": reference, "ref_KL_logps": kl_reference,
    }  # fmt: skip
    trainer = trainer_of(
        trl.KTOTrainer, loss_type="kto", beta=BETA, desirable_weight=1.3, undesirable_weight=0.8, calculate_KL=True,
        precompute_ref_logps=True,
    )  # fmt: skip
    theirs = trainer.compute_loss(lambda input_ids, **_: outputs(logps if input_ids is ids else kl_logps), inputs)
    kl = ours.kto_kl(kl_logps.sum(1), kl_reference)
    assert (kl > 0) == (drift > 0)
    expected = ours.kto_loss(logps.sum(1), reference, labels, kl, BETA, desirable_weight=1.3, undesirable_weight=0.8)
    check(theirs, expected.mean(), (logps,))


@pytest.mark.parametrize("with_margin", [False, True])
def test_reward_models(with_margin):
    rewards, margin = torch.randn(2 * B, 1, requires_grad=True), torch.rand(B) if with_margin else None
    trainer = trainer_of(trl.RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"attention_mask": torch.ones(2 * B, T)} | ({} if margin is None else {"margin": margin})
    theirs = trainer.compute_loss(lambda **_: SimpleNamespace(logits=rewards), inputs)
    expected = ours.pairwise_sigmoid_loss(*rewards[:, 0].chunk(2), margin)
    check(theirs, expected.mean(), (rewards,))
    check(theirs, ours.pairwise_logexp_loss(*rewards[:, 0].chunk(2), margin).mean(), (rewards,))


# Distillation. TRL's beta is ours, the teacher's share in the mixture, except that TRL's limits are the two KLs (our
# `jsd` has none: it tends to 0 there, see its docstring). Neither multiplies by T².

GKD = [("forward_kl", 0.0), ("jsd", 0.3), ("jsd", 0.5), ("reverse_kl", 1.0)]


@pytest.mark.parametrize(("kind", "beta"), GKD)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_generalised_knowledge_distillation(kind, beta, temperature):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = torch.randn(B, T, V, requires_grad=True), torch.randn(B, T, V)
    labels = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.4, -100)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature)
    how = {"beta": beta} if kind == "jsd" else {}
    expected = getattr(ours, kind)(student, teacher, temperature=temperature, **how)
    check(theirs, ours.masked_mean(expected, labels != -100), (student,))


@pytest.mark.parametrize(("kind", "beta"), GKD)
def test_distillation_of_heads(kind, beta):
    """TRL's fused divergence, of heads with bias, scale and soft cap."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    h, w, b = (torch.randn(shape, requires_grad=True) for shape in [(B, T, 4), (V, 4), (V,)])
    teacher_h, teacher_w, teacher_b = (torch.randn(shape) for shape in [(B, T, 6), (V, 6), (V,)])
    mask = torch.rand(B, T) < 0.6
    theirs, *_ = _chunked_divergence_loss(
        h, teacher_h, w, teacher_w, mask, beta, student_lm_head_bias=b, teacher_lm_head_bias=teacher_b,
        student_logit_scale=0.7, teacher_logit_scale=1.2, student_final_logit_softcapping=3.0,
        teacher_final_logit_softcapping=2.0, temperature=1.7,
    )  # fmt: skip
    weights = mask.flatten() / mask.sum()
    expected, *_ = ours.linear_distillation_sum(
        h.flatten(0, 1), w, teacher_h.flatten(0, 1), teacher_w, torch.zeros(B * T, dtype=torch.int64),
        ce_weights=torch.zeros(B * T), kd_weights=weights, kind=kind, beta=beta if kind == "jsd" else 0.5,
        temperature=1.7, student_bias=b, teacher_bias=teacher_b, student_logit_scale=0.7, teacher_logit_scale=1.2,
        student_softcap=3.0, teacher_softcap=2.0,
    )  # fmt: skip
    torch.testing.assert_close(theirs, expected)
    gradients = (torch.autograd.grad(loss, (h, w, b)) for loss in (theirs, expected))
    torch.testing.assert_close(*gradients)


# Policy gradients


class Group:
    """Completions with log-probs of the old and of the reference policy, for TRL's GRPO trainer and for us."""

    def __init__(self, spread: float = 0.5) -> None:
        self.mask, self.logps = responses(B)
        self.mask = self.mask[:, 1:]
        self.advantages = torch.randn(B)
        self.old, self.reference = (
            (self.logps.detach() + spread * torch.randn(B, T - 1)).masked_fill(~self.mask, 0) for _ in range(2)
        )

    def trl(self, **attributes: Any) -> Tensor:
        """The mean over tokens, but over the tokens of each sequence first for its "grpo"."""
        usual = {
            "loss_type": "bnpo", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28, "delta": None,
            "importance_sampling_level": "token",
        }  # fmt: skip
        delta = (usual | attributes).pop("delta")
        trainer = trainer_of(
            trl.GRPOTrainer, args=SimpleNamespace(use_bias_correction_kl=False, delta=delta, steps_per_generation=1),
            top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
            current_gradient_accumulation_steps=1, **usual | attributes,
        )  # fmt: skip
        blank = torch.zeros_like(self.old)
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (self.logps, blank, None)
        ones = torch.ones_like(self.mask).long()
        inputs = {
            "prompt_ids": ones, "prompt_mask": ones, "completion_ids": ones, "completion_mask": self.mask.long(),
            "advantages": self.advantages, "old_per_token_logps": self.old, "ref_per_token_logps": self.reference,
            "num_items_in_batch": self.mask.sum(),
        }  # fmt: skip
        return trainer._compute_loss(trainer.model, inputs)

    def mean(self, losses: Tensor) -> Tensor:
        return ours.masked_mean(losses, self.mask)


@pytest.mark.parametrize("delta", [None, 1.5])
def test_ppo(delta):
    """TRL's delta is the bound of dual clip."""
    group = Group(1.0)
    advantages = group.advantages[:, None].expand(B, T - 1)
    expected = ours.ppo_loss(group.logps, group.old, advantages, clip_low=0.2, clip_high=0.28, dual_clip=delta)
    check(group.trl(delta=delta), group.mean(expected), (group.logps,))


def test_gspo():
    """Ours is per token: the mean over a sequence is that sequence's loss, in value and gradient."""
    group = Group(0.1)
    logps, old = group.logps[group.mask], group.old[group.mask]
    lengths = group.mask.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    advantages = group.advantages.repeat_interleave(lengths)
    losses = ours.gspo_loss(logps, old, advantages, cu_seqlens, clip_low=0.03, clip_high=0.04)
    theirs = group.trl(importance_sampling_level="sequence", loss_type="grpo", epsilon_low=0.03, epsilon_high=0.04)
    check(theirs, ours.segment_mean(losses, cu_seqlens).mean(), (group.logps,))


def test_cispo():
    """TRL's epsilon_high is the largest weight itself, ours how far it is above 1, as in the paper."""
    group = Group(1.0)
    expected = ours.cispo_loss(group.logps, group.old, group.advantages[:, None], clip_high=0.5)
    check(group.trl(loss_type="cispo", epsilon_high=1.5), group.mean(expected), (group.logps,))


def test_the_kl_of_grpo_is_k3():
    """TRL's is not clamped, ours is at 10 nats unless told otherwise."""
    group = Group()
    group.advantages.zero_()
    expected = group.mean(ours.kl_estimate(group.logps, group.reference, "k3"))
    check(group.trl(beta=0.04), 0.04 * expected, (group.logps,))
    with torch.no_grad():
        group.reference += 12 * group.mask
    unlimited = group.mean(ours.kl_estimate(group.logps, group.reference, "k3", clamp=None))
    check(group.trl(beta=0.04), 0.04 * unlimited, (group.logps,))
    assert group.mean(ours.kl_estimate(group.logps, group.reference, "k3")) < 0.5 * unlimited


def test_log_probs_and_entropies():
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits, labels = torch.randn(B, T, V, requires_grad=True), torch.randint(V, (B, T))
    check(selective_log_softmax(logits, labels).sum(), ours.token_logps(logits, labels).sum(), (logits,))
    torch.testing.assert_close(entropy_from_logits(logits), ours.entropy(logits))
