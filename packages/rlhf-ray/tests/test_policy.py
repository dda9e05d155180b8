"""The policy's worker: log-probs, updates, rollouts, weights and checkpoints of a tiny model, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ray.cluster.group import Part, parts_of
from rlhf_ray.config import PPOConfig
from rlhf_ray.engines.request import Request
from rlhf_ray.rollout import Experience, Rollout
from rlhf_ray.workers.policy import PolicyWorker
from rlhf_ray.workers.reference import ReferenceWorker
from rlhf_ray.workers.step import Step

pytestmark = pytest.mark.slow

TEXTS = ["the old bird by the river saw a red star", "a green stone and a blue moon", "dogs and cats like the sun"]
SAMPLES, GROUP = 8, 4


@pytest.fixture
def config(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Build the options of a run from flat ones, on the tiny model unless told otherwise."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(**given: Any) -> PPOConfig:
        flat = {
            "pretrain": str(tiny), "prompt_data": "unread.jsonl", "reward_pretrain": "unread.py", "zero_stage": 0,
            "train_batch_size": SAMPLES, "rollout_batch_size": SAMPLES, "n_samples_per_prompt": GROUP,
            "micro_train_batch_size": 4, "micro_rollout_batch_size": 8, "advantage_estimator": "rloo",
            "generate_max_len": 12, "prompt_max_len": 16, "temperature": 0.7, "actor_learning_rate": 1e-3,
            "lr_warmup_ratio": 0.0, "lr_scheduler": "constant", "seed": 7,
        } | given  # fmt: skip
        groups = {
            name: {key: flat[key] for key in field.annotation.model_fields if key in flat}  # type: ignore[union-attr]
            for name, field in PPOConfig.model_fields.items()
        }
        assert set(flat) == {key for group in groups.values() for key in group}
        return PPOConfig(**groups)

    return make


@pytest.fixture
def worker(config):
    """A policy of one rank."""

    def make(**given: Any) -> PolicyWorker:
        made = PolicyWorker(0, 1)
        made.setup(config(**given), None, 10)
        return made

    return make


def rollout(vocabulary: int = 300) -> Rollout:
    """Two prompts of 10 and 9 tokens with four responses each, of different lengths."""
    rng = np.random.default_rng(3)
    lengths = np.array([3, 12, 1, 6, 12, 2, 5, 9])
    prompts = [rng.integers(5, vocabulary, 10), rng.integers(5, vocabulary, 9)]
    pieces = [x for n, length in enumerate(lengths) for x in (prompts[n // GROUP], rng.integers(5, vocabulary, length))]
    return Rollout(
        input_ids=np.concatenate(pieces).astype(np.int32),
        prompt_lengths=np.repeat([10, 9], GROUP),
        response_lengths=lengths,
        truncated=lengths == 12,
        rollout_logps=rng.normal(-3, 1, lengths.sum()).astype(np.float32),
        prompts=np.repeat([0, 1], GROUP),
        groups=np.repeat([0, 1], GROUP),
        seeds=np.arange(SAMPLES),
        versions=np.zeros(SAMPLES, np.int64),
    )


def experience(worker: PolicyWorker | None = None, **columns: Any) -> Experience:
    """An experience whose last response but one is masked; with a worker, with log-probs near its own."""
    given, rng = rollout(), np.random.default_rng(4)
    if worker is not None:
        (logps,) = worker.token_logps([Part(given)])[0]
        columns = {"logps": logps + rng.normal(0, 0.3, len(logps)).astype(np.float32)} | columns
    mask = given.per_target(np.arange(SAMPLES) != SAMPLES - 2)
    made = {
        "scores": np.zeros(SAMPLES, np.float32),
        "mask": mask,
        "advantages": rng.normal(0, 1, given.num_targets).astype(np.float32),
        "reference_logps": rng.normal(-3, 1, given.num_targets).astype(np.float32),
    }
    return Experience.of(given, **(made | columns))


def divisor(data: Experience, reduction: str) -> float:
    """What the loss of these samples is divided by."""
    trained = data.by_sample(data.mask.astype(int)) > 0
    return float({"token": data.mask.sum(), "sequence": trained.sum(), "constant": SAMPLES * 12}[reduction])


def step(worker: PolicyWorker, data: Experience, split: list[list[int]] | None = None, number: int = 0) -> Step:
    """An optimizer step over these samples, in micro-batches as told; an empty one idles."""
    split = [list(range(SAMPLES))] if split is None else split
    parts = parts_of(data, [np.array(places, np.int64) for places in split])
    return Step(parts, divisor(data, worker.config.loss_reduction), 0.1, number)


def gradient(worker: PolicyWorker, step: Step) -> dict[str, torch.Tensor]:
    """Gradient of the weights, before clipping, as an optimizer step makes it."""
    found: dict[str, torch.Tensor] = {}

    def take(engine: Any) -> float:
        found.update({name: p.grad.clone() for name, p in worker.model.named_parameters()})
        engine.optimizer.zero_grad()
        return 1.0

    worker.strategy.step = take  # type: ignore[method-assign]
    worker.update([step])
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Gradients agree, relative to the largest."""
    assert one.keys() == other.keys()
    largest = max(x.abs().max().item() for x in one.values())
    assert largest > 1e-3
    for name in one:
        assert (one[name] - other[name]).abs().max().item() < tolerance * largest, name


def whole(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in worker.weights()}


def as_batch(data: Experience) -> Any:
    from rlhf_ray.collate import collate_part
    from rlhf_ray.workers.objective import COLUMNS

    return collate_part(parts_of(data, [np.arange(SAMPLES)])[0], share=False, columns=COLUMNS)


@pytest.mark.parametrize("updated", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"loss_reduction": "sequence"},
        {"loss_reduction": "constant"},
        {"policy_loss": "cispo"},
        {"dual_clip": 1.5, "eps_clip_high": 0.4},
        {"importance_cap": 1.5},
        {"use_kl_loss": True, "kl_estimator": "k3"},
        {"use_kl_loss": True, "kl_estimator": "k2", "importance_cap": 2.0, "loss_reduction": "sequence"},
    ],
    ids=lambda given: " ".join(f"{name}={value}" for name, value in given.items()) or "default",
)
def test_the_slope_told_from_a_log_prob_is_that_of_the_loss(config, given, updated):
    from rlhf_ray.workers.objective import policy_objective, policy_slope

    options = config(**given)
    rng = np.random.default_rng(6)
    old = rng.normal(-3, 1, rollout().num_targets).astype(np.float32)
    batch = as_batch(experience(**({"logps": old} if updated else {})))
    logps = torch.from_numpy(old + rng.normal(0, 0.3, len(old)).astype(np.float32)).requires_grad_()
    entropies = torch.zeros_like(logps)
    (expected,) = torch.autograd.grad(policy_objective(logps, entropies, batch, options, 0.1).loss, logps)
    slope = policy_slope(batch, options, 0.1)
    assert slope is not None
    places = torch.randperm(len(old))
    torch.testing.assert_close(slope(logps.detach()[places], places), expected[places])


@pytest.mark.parametrize("given", [{"policy_loss": "gspo"}, {"entropy_coef": 0.01}])
def test_a_slope_that_takes_more_than_a_log_prob_is_not_told(config, given):
    from rlhf_ray.workers.objective import policy_slope

    assert policy_slope(as_batch(experience()), config(**given), 0.1) is None


@pytest.mark.parametrize("given", [{}, {"importance_cap": 2.0}, {"use_kl_loss": True, "loss_reduction": "sequence"}])
def test_the_slope_of_an_update_comes_true(worker, monkeypatch, given):
    from rlhf_losses import linear

    found = []
    compare = linear._factor
    monkeypatch.setattr(linear, "_factor", lambda *both: found.append(compare(*both)) or found[-1])
    made = worker(**given)
    for data in (experience(), experience(made)):
        made.update([step(made, data, [[0, 1, 2], [3, 4, 5, 6, 7]])])
    assert len(found) == 4
    assert all(factor is not None for factor in found)


def test_log_probs_are_those_of_the_plain_formula_at_the_sampling_temperature(worker, tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    given = rollout()
    made = worker()
    (logps,) = made.token_logps([Part(given)])[0]
    for number in range(SAMPLES):
        ids = torch.tensor(given.sample(number)).long()
        with torch.no_grad():
            plain = (model(ids[None]).logits[0] / 0.7).log_softmax(-1)
        start = int(given.prompt_lengths[number])
        expected = plain[torch.arange(start, len(ids)) - 1, ids[start:]]
        own = logps[given.target_bounds[number] : given.target_bounds[number + 1]]
        assert own == pytest.approx(expected.numpy(), abs=1e-5)
    idle = made.token_logps([Part(given, idle=True)])
    assert [len(part[0]) for part in idle] == [0]


def test_the_reference_starts_as_the_policy_and_says_the_same(worker, config):
    reference = ReferenceWorker(0, 1)
    facts = reference.setup(config(), None)
    assert facts["trained_parameters"] == 0 < facts["parameters"]
    parts = [Part(rollout())]
    assert np.abs(reference.token_logps(parts)[0][0] - worker().token_logps(parts)[0][0]).max() < 1e-6


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_loss_and_gradient_do_not_depend_on_how_samples_are_laid_out(worker, loss, reduction):
    options = {
        "policy_loss": loss, "loss_reduction": reduction, "importance_cap": 1.5, "entropy_coef": 0.01,
        "use_kl_loss": True, "init_kl_coef": 0.1,
    }  # fmt: skip
    shared, padded = worker(**options), worker(flash_attn=False, **options)
    data = experience(shared)
    expected = gradient(shared, step(shared, data))
    figures = shared.update([step(shared, data)])[0]
    assert shared.share
    assert not padded.ragged
    for made in (shared, padded):
        for split in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[5], [0, 7, 2], [], [3, 6], [4, 1]]):
            same(expected, gradient(made, step(made, data, split)))
            other = made.update([step(made, data, split)])[0]
            assert other == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in figures.items()}


def test_masked_tokens_count_for_nothing(worker):
    made = worker()
    data = experience(made)
    noise = np.where(data.mask, 0, np.nan).astype(np.float32)
    broken = data.with_columns(advantages=data.advantages + noise, logps=data.logps + noise)
    same(gradient(made, step(made, data)), gradient(made, step(made, broken)))


def test_without_earlier_log_probs_the_ratio_is_exactly_one(worker):
    made = worker()
    figures = made.update([step(made, experience())])[0]
    assert figures["ratio_mean"] == figures["ratio_max"] == 1
    assert figures["clip_fraction"] == figures["approx_kl"] == 0
    assert figures["rollout_logp_gap_max"] > figures["rollout_logp_gap"] > 0


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_the_logged_loss_is_the_one_that_is_minimised(worker, reduction):
    made = worker(loss_reduction=reduction)
    data = experience(made)
    seen: list[float] = []
    made.strategy.backward = lambda engine, loss, count, last: seen.append(loss.item() / count)
    made.strategy.step = lambda engine: 1.0
    figures = made.update([step(made, data, [[0, 1, 2], [3, 4, 5, 6, 7]])])[0]
    assert figures["policy_loss"] == pytest.approx(sum(seen), rel=1e-5)


def requests(temperature: float = 0.7, n: int = GROUP) -> list[Request]:
    rng = np.random.default_rng(5)
    return [
        Request(number, rng.integers(5, 300, 4 + number).astype(np.int32), 100 * number, n, temperature, 1.0, 12)
        for number in range(3)
    ]


def rollout_of(answers: Any, asked: list[Request]) -> Rollout:
    prompts = {request.number: request.prompt_ids for request in asked}
    flat = [(prompts[number], response) for number, responses in answers for response in responses]
    return Rollout(
        input_ids=np.concatenate([x for ids, response in flat for x in (ids, response.token_ids)]),
        prompt_lengths=np.array([len(ids) for ids, _ in flat]),
        response_lengths=np.array([len(response.token_ids) for _, response in flat]),
        truncated=np.array([response.truncated for _, response in flat]),
        rollout_logps=np.concatenate([response.logps for _, response in flat]),
        prompts=np.repeat([number for number, _ in answers], [len(responses) for _, responses in answers]),
        groups=np.repeat([number for number, _ in answers], [len(responses) for _, responses in answers]),
        seeds=np.array([response.seed for _, response in flat]),
        versions=np.array([response.version for _, response in flat]),
    )


def test_the_first_update_after_a_rollout_sees_the_log_probs_that_it_was_drawn_with(worker):
    made, asked = worker(), requests()
    written = rollout_of(made.generate(asked), asked)
    (logps,) = made.token_logps([Part(written)])[0]
    assert np.abs(np.exp(logps - written.rollout_logps) - 1).max() < 1e-4
    assert written.truncated.any()
    assert set(written.versions) == {0}


def test_responses_do_not_depend_on_what_else_is_written(worker):
    made, asked = worker(), requests()
    together = dict(made.generate(asked))
    for request in asked:
        ((_, alone),) = made.generate([request])
        for one, other in zip(alone, together[request.number], strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert one.seed == other.seed
    assert [response.seed for response in together[2]] == [200, 201, 202, 203]


def test_greedy_and_drawn_responses_can_be_asked_for_together(worker):
    made = worker()
    greedy, drawn = requests(0.0, n=1)[0], requests()[1]
    answers = dict(made.generate([greedy, drawn]))
    plain = rollout_of([(0, answers[0])], [greedy])
    ((logps,),) = made.token_logps([Part(plain)])
    assert [len(responses) for responses in answers.values()] == [1, GROUP]
    assert plain.rollout_logps.max() <= 0
    assert np.abs(plain.rollout_logps - logps).max() > 1e-3, "the model's own log-probs, and not those at 0.7"


def test_updates_make_the_version_of_later_responses(worker):
    made = worker()
    made.update([step(made, experience(made)) for _ in range(2)])
    assert {response.version for _, responses in made.generate(requests()) for response in responses} == {1}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_saved_policy_goes_on_bit_for_bit(worker, tmp_path, stage):
    options = {"zero_stage": stage, "enable_ema": True, "lr_scheduler": "linear"}
    first = worker(**options)
    data = experience(first)
    first.update([step(first, data), step(first, data)])
    first.save(str(tmp_path))
    expected = first.update([step(first, data)]), whole(first), first.average.averages
    resumed = worker(**options)
    resumed.load(str(tmp_path))
    assert resumed.update([step(resumed, data)]) == expected[0]
    assert resumed.updates == first.updates == 2
    for found, wanted in zip((whole(resumed), resumed.average.averages), expected[1:], strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_moving_average_is_the_plain_one_and_is_what_is_exported(worker, tmp_path, stage):
    from safetensors.torch import load_file

    made = worker(enable_ema=True, ema_beta=0.75, zero_stage=stage)
    data = experience(made)
    expected = whole(made)
    for _ in range(3):
        made.update([step(made, data)])
        now = whole(made)
        expected = {name: 0.75 * expected[name] + 0.25 * now[name] for name in now}
    made.export(str(tmp_path))
    exported = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == expected.keys() - {"lm_head.weight"}
    for name in exported:
        assert (exported[name] - expected[name]).abs().max() < 1e-6
        assert (exported[name] - now[name]).abs().max() > 1e-5
        assert torch.equal(whole(made)[name], now[name]), "the policy is as it was"
    assert made.update([step(made, data)])[0]["grad_norm"] > 0


@pytest.mark.parametrize("stage", [0, 3])
def test_an_adapter_is_merged_in_the_weights_that_engines_get_and_exported_as_it_is(worker, tmp_path, tiny, stage):
    import peft
    from transformers import AutoModelForCausalLM

    made = worker(lora_rank=4, lora_alpha=8, zero_stage=stage, actor_learning_rate=0.05)
    data = experience(made)
    made.update([step(made, data), step(made, data)])
    before = made.token_logps([Part(data)])[0][0]
    found = whole(made)
    made.export(str(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(tiny)
    start = {name: weight.clone() for name, weight in base.state_dict().items()}
    merged: Any = peft.PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload()
    expected = merged.state_dict()
    assert found.keys() == expected.keys()
    assert all((found[name] - expected[name]).abs().max() < 1e-6 for name in found)
    assert (found["model.layers.0.mlp.up_proj.weight"] - start["model.layers.0.mlp.up_proj.weight"]).abs().max() > 1e-2
    assert np.array_equal(made.token_logps([Part(data)])[0][0], before), "the model itself is unchanged"


def test_engines_are_given_a_tied_head_under_its_own_name(worker):
    found = dict(worker().weights())
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def text_file(folder: Path) -> str:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": TEXTS[n % 3] + f" {n}"}) + "\n" for n in range(11)))
    return str(path)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_pretraining_text_adds_its_gradient_and_no_optimizer_step(worker, tmp_path, stage):
    from rlhf_core.batch import Batch

    text = text_file(tmp_path)
    made = worker(pretrain_data=text, ptx_coef=0.5, zero_stage=stage, micro_train_batch_size=2)
    data = experience(made)
    count = made.engine.global_steps
    figures = made.update([step(made, data, [[0, 1, 2, 3], [4, 5, 6, 7]])])[0]
    assert made.engine.global_steps == count + 1
    assert figures["ptx_loss"] > 0
    if stage:
        return
    alone = worker()
    window = made.text.window(3)
    total, each, _ = alone.model("cross_entropy", Batch.from_samples([window[n] for n in range(len(window))]))
    assert made.text.targets(window) == len(each)
    (0.5 * total / len(each)).backward()
    expected = {name: p.grad.clone() for name, p in alone.model.named_parameters()}
    alone.model.zero_grad()
    both = worker(pretrain_data=text, ptx_coef=0.5, micro_train_batch_size=2)
    policy = gradient(alone, step(alone, data, number=3))
    same({name: policy[name] + expected[name] for name in policy}, gradient(both, step(both, data, number=3)))


def test_the_text_of_a_step_depends_on_its_number_alone_and_every_epoch_has_all_of_it(worker, tmp_path):
    made = worker(pretrain_data=text_file(tmp_path))
    windows = [made.text.window(number).numbers.tolist() for number in (0, 1, 2, 3)]
    assert [len(window) for window in windows] == [8, 3, 8, 3]
    assert sorted(windows[0] + windows[1]) == sorted(windows[2] + windows[3]) == list(range(11))
    assert windows[0] != windows[2]
    assert made.text.window(2).numbers.tolist() == windows[2]


def test_a_gradient_that_is_no_number_ends_the_run_and_names_the_step(worker):
    from rlhf_core.fit import NonFiniteLoss

    made = worker()
    data = experience(made)
    broken = data.with_columns(advantages=data.advantages * np.float32(np.nan))
    with pytest.raises(NonFiniteLoss, match=r"optimizer step 5 of the policy is nan.*--actor_learning_rate"):
        made.update([step(made, broken, number=4)])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_policy_that_was_put_away_goes_on_as_if_nothing_had_been(worker, monkeypatch, stage):
    from rlhf_core import offload

    away, stayed = worker(zero_stage=stage), worker(zero_stage=stage)
    data = experience(stayed)
    for made in (away, stayed):
        made.update([step(made, data)])
    monkeypatch.setattr(offload, "leaves", lambda storage: storage.device.type == "cpu" and storage.resizable())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    away.offload()
    assert len(away.memory.away) > 10
    assert all(storage.nbytes() == 0 for storage, _ in away.memory.away)
    away.reload()
    assert away.update([step(away, data)]) == stayed.update([step(stayed, data)])
    assert all(torch.equal(weight, whole(stayed)[name]) for name, weight in whole(away).items())
