"""The critic's worker: where it starts, its values, updates and checkpoints, of a tiny model in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_data.errors import InputError, RunError
from rlhf_data.options import build
from rlhf_ray.cluster.group import Part, parts_of
from rlhf_ray.config import PPOConfig
from rlhf_ray.rollout import Experience
from rlhf_ray.workers.critic import CriticWorker, critic_source
from rlhf_ray.workers.step import Step

LENGTHS = (3, 12, 1, 6, 12, 2, 5, 9)
"""Of responses to two prompts."""
MEAN, STD = 0.7, 2.5
"""Of the reward model's rewards, as its config says."""


@pytest.fixture(scope="session")
def reward_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random, calibrated reward model whose head is called `value_head`."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    config = AutoConfig.from_pretrained(tiny, num_labels=1)
    config.mean, config.std = MEAN, STD
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["value_head.weight"] = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture
def options(tiny: Path, reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The options of a run on them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(**given: Any) -> PPOConfig:
        flat = {
            "pretrain": str(tiny), "prompt_data": "unread.jsonl", "reward_pretrain": str(reward_model), "zero_stage": 0,
            "train_batch_size": 8, "rollout_batch_size": 8, "n_samples_per_prompt": 4, "micro_train_batch_size": 4,
            "generate_max_len": 12, "prompt_max_len": 16, "critic_learning_rate": 1e-3, "lr_warmup_ratio": 0.0,
            "lr_scheduler": "constant", "seed": 7,
        }  # fmt: skip
        return build(PPOConfig, flat | given)

    return make


@pytest.fixture
def worker(options) -> Callable[..., CriticWorker]:
    """A critic of one rank."""

    def make(**given: Any) -> CriticWorker:
        made = CriticWorker(0, 1)
        made.facts = made.setup(options(**given), None, 10)  # type: ignore[attr-defined]
        return made

    return make


def experience(made: CriticWorker | None = None) -> Experience:
    """Eight responses of which one is masked; with a critic, with values near its own."""
    rng, lengths = np.random.default_rng(3), np.array(LENGTHS)
    prompts, tokens = [rng.integers(5, 300, 10), rng.integers(5, 300, 9)], int(lengths.sum())
    pieces = [x for n, length in enumerate(lengths) for x in (prompts[n // 4], rng.integers(5, 300, length))]
    given = Experience(
        input_ids=np.concatenate(pieces).astype(np.int32),
        prompt_lengths=np.repeat([10, 9], 4),
        response_lengths=lengths,
        truncated=lengths == 12,
        rollout_logps=np.zeros(tokens, np.float32),
        prompts=np.repeat([0, 1], 4),
        groups=np.repeat([0, 1], 4),
        seeds=np.arange(8),
        versions=np.zeros(8, np.int64),
        scores=np.zeros(8, np.float32),
        mask=np.repeat(np.arange(8) != 6, lengths),
        advantages=np.zeros(tokens, np.float32),
        returns=rng.normal(0, 1, tokens).astype(np.float32),
        values=rng.normal(0, 0.3, tokens).astype(np.float32),
    )
    if made is None or given.values is None:
        return given
    return given.with_columns(values=given.values + made.values([Part(given)])[0][0])


def step(data: Experience, split: list[list[int]] | None = None, number: int = 0) -> Step:
    """An optimizer step over these samples, in micro-batches as told; an empty one idles."""
    split = [list(range(len(data)))] if split is None else split
    return Step(parts_of(data, [np.array(places, np.int64) for places in split]), float(data.mask.sum()), 0.0, number)


def gradient(made: CriticWorker, step: Step) -> dict[str, torch.Tensor]:
    """Gradient of the weights, before clipping, as an optimizer step makes it."""
    found: dict[str, torch.Tensor] = {}

    def take(engine: Any) -> float:
        found.update({name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None})
        engine.optimizer.zero_grad()
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.strategy, "step", take)
        made.update([step])
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Gradients agree, relative to the largest."""
    assert one.keys() == other.keys()
    largest = max(x.abs().max().item() for x in one.values())
    assert largest > 1e-3
    for name in one:
        assert (one[name] - other[name]).abs().max().item() < tolerance * largest, name


def weights(made: CriticWorker) -> dict[str, torch.Tensor]:
    from rlhf_core.libraries import gathered

    with gathered(list(made.model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


def plain_rewards(folder: Path, data: Experience) -> list[torch.Tensor]:
    """What transformers says of every token of each response and of the one before it, `[length + 1]` each."""
    from transformers import LlamaForSequenceClassification

    model: Any = LlamaForSequenceClassification.from_pretrained(folder, key_mapping={r"^value_head\.": "score."})
    found = []
    for n, prompt in enumerate(data.prompt_lengths):
        with torch.no_grad():
            hidden = model.model(torch.tensor(data.sample(n)).long()[None], use_cache=False).last_hidden_state[0]
            found.append(model.score(hidden)[prompt - 1 :, 0])
    return found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"critic_pretrain": "own", "reward_pretrain": "one,two"}, ("--critic_pretrain", "own", False)),
        ({"reward_pretrain": "rewards.py, one,two"}, ("--reward_pretrain", "one", True)),
        ({"reward_pretrain": "rewards:judge", "pretrain": "model"}, ("--pretrain", "model", False)),
        ({"reward_pretrain": None, "remote_rm_url": "http://x", "pretrain": "model"}, ("--pretrain", "model", False)),
    ],
)
def test_it_starts_from_the_first_model_that_knows_rewards(options, given, expected):
    assert critic_source(options(**given)) == expected


@pytest.mark.parametrize(
    ("normalise", "given"),
    [(True, {}), (False, {"flash_attn": False}), (True, {"zero_stage": 3})],
    ids=["laid out", "padded", "ZeRO 3"],
)
def test_values_are_what_the_reward_model_says_of_responses_so_far(worker, reward_model, normalise, given):
    """On the scale of the rewards; after the last token it is the reward of the whole."""
    made, data = worker(**given, normalize_reward=normalise), experience()
    assert made.facts["head"] == "value_head"
    parts = parts_of(data, [np.array(places, np.int64) for places in ([0, 1, 2, 3, 4], [5, 6, 7], [])])
    values, after = (np.concatenate(each) for each in zip(*made.values(parts), strict=True))
    expected = plain_rewards(reward_model, data)
    if normalise:
        expected = [(reward - MEAN) / STD for reward in expected]
    assert values == pytest.approx(torch.cat([reward[:-1] for reward in expected]).numpy(), abs=2e-5)
    assert after == pytest.approx(torch.stack([reward[-1] for reward in expected]).numpy(), abs=2e-5)
    assert values.dtype == after.dtype == np.float32


def test_a_language_model_gets_a_new_head_of_the_seed(worker):
    first, same_seed, other = (worker(reward_pretrain="unread.py", seed=seed) for seed in (7, 7, 8))
    assert first.facts["head"] == "a new one"
    values = [made.values([Part(experience())])[0][0] for made in (first, same_seed, other)]
    assert values[0].std() > 0.1
    assert values[0].tolist() == values[1].tolist() != values[2].tolist()


def test_a_reward_model_without_statistics_cannot_be_normalised(worker, reward_model, tmp_path):
    import shutil

    shutil.copytree(reward_model, tmp_path / "plain")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    (tmp_path / "plain/config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("mean", "std")})
    )
    with pytest.raises(InputError, match="--normalize_reward"):
        worker(reward_pretrain=str(tmp_path / "plain"), normalize_reward=True)


def test_a_head_that_is_named_otherwise_is_an_error_with_the_way_out(worker, reward_model):
    with pytest.raises(InputError, match=r"--value_head_prefix nothing: --reward_pretrain .* value_head"):
        worker(value_head_prefix="nothing")
    assert worker(value_head_prefix="value_head").facts["head"] == "value_head"


@pytest.mark.parametrize("clip", [0.2, None])
def test_loss_and_figures_are_those_of_the_plain_formula(worker, clip):
    made = worker(value_clip=clip)
    data = experience(made)
    values = made.values([Part(data)])[0][0]
    assert data.values is not None and data.returns is not None
    free = (values - data.returns) ** 2
    held = (data.values + np.clip(values - data.values, -0.2, 0.2) - data.returns) ** 2
    loss = (np.maximum(free, held) if clip else free) / 2
    figures = made.update([step(data)])[0]
    assert figures["value_loss"] == pytest.approx(loss[data.mask].mean(), rel=1e-4)
    assert figures["critic_learning_rate"] == 1e-3 and figures["critic_grad_norm"] > 0
    assert ("value_clip_fraction" in figures) == (clip is not None)
    if clip:
        share = (held > free)[data.mask].mean()
        assert 0 < share < 1 and figures["value_clip_fraction"] == pytest.approx(share, rel=1e-6)


def test_loss_and_gradient_do_not_depend_on_how_samples_are_laid_out(worker):
    shared, padded = worker(normalize_reward=True), worker(normalize_reward=True, flash_attn=False)
    data = experience(shared)
    expected = gradient(shared, step(data))
    assert shared.share and not padded.ragged
    mixed = [[5], [0, 7, 2], [], [3, 6], [4, 1]]
    for split in ([[0, 1, 2, 3], [4, 5, 6, 7]], mixed):
        same(expected, gradient(shared, step(data, split)))
        same(expected, gradient(padded, step(data, split)))
    figures = shared.update([step(data)])[0]
    assert padded.update([step(data, mixed)])[0] == pytest.approx(figures, rel=1e-4)


def test_the_gradient_is_that_of_the_mean_over_trained_tokens(worker, reward_model):
    """Against autograd on transformers' own model; the loss is divided once, whatever the micro-batches."""
    from transformers import LlamaForSequenceClassification

    made, data = worker(value_clip=None), experience()
    found = gradient(made, step(data, [[0, 1], [2, 3, 4], [5, 6, 7]]))
    model: Any = LlamaForSequenceClassification.from_pretrained(reward_model, key_mapping={r"^value_head\.": "score."})
    assert data.returns is not None
    total: Any = 0.0
    for n, prompt in enumerate(data.prompt_lengths):
        hidden = model.model(torch.tensor(data.sample(n)).long()[None], use_cache=False).last_hidden_state[0]
        returns, mask = (np.split(each, data.target_bounds[1:-1])[n] for each in (data.returns, data.mask))
        values = model.score(hidden)[prompt - 1 : -1, 0]
        total = total + ((values - torch.tensor(returns))[torch.tensor(mask)] ** 2).sum() / 2
    (total / data.mask.sum()).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    same(expected, {name.removeprefix("model."): grad for name, grad in found.items()})


def test_masked_tokens_count_for_nothing(worker):
    made = worker()
    data = experience(made)
    assert data.returns is not None and data.values is not None
    noise = np.where(data.mask, 0, np.nan).astype(np.float32)
    broken = data.with_columns(returns=data.returns + noise, values=data.values + noise)
    same(gradient(made, step(data)), gradient(made, step(broken)))
    assert np.isfinite(list(made.update([step(broken)])[0].values())).all()


def test_a_step_of_which_nothing_is_trained_has_no_figures_of_tokens(worker):
    made, data = worker(), experience()
    nothing = data.with_columns(mask=np.zeros_like(data.mask))
    (figures,) = made.update([Step([Part(nothing)], 1.0, 0.0, 0)])
    assert figures["critic_grad_norm"] == 0 and "value_loss" not in figures


def test_values_learn_the_returns(worker):
    made, data = worker(value_clip=None, critic_learning_rate=1e-2), experience()
    figures = made.update([step(data, number=number) for number in range(15)])
    assert figures[-1]["value_loss"] < 0.5 * figures[0]["value_loss"]


@pytest.mark.parametrize("given", [{}, {"zero_stage": 3}, {"zero_stage": 2, "lora_rank": 2, "lora_dropout": 0.1}])
def test_a_saved_critic_goes_on_bit_for_bit(worker, tmp_path, given):
    settings = given | {"lr_scheduler": "linear", "normalize_reward": True}
    first = worker(**settings)
    data = experience(first)
    first.update([step(data), step(data)])
    first.save(str(tmp_path))
    expected = first.update([step(data)]), weights(first)
    resumed = worker(**settings)
    resumed.load(str(tmp_path))
    assert resumed.update([step(data)]) == expected[0]
    found = weights(resumed)
    assert found.keys() == expected[1].keys()
    assert all(torch.equal(found[name], expected[1][name]) for name in found)


@pytest.mark.parametrize("given", [{"normalize_reward": True}, {"zero_stage": 3}], ids=["scaled", "ZeRO 3"])
def test_an_exported_critic_is_a_reward_model_from_which_a_critic_starts_again(worker, tmp_path, given):
    made = worker(**given)
    data = experience(made)
    made.update([step(data) for _ in range(3)])
    values, after = made.values([Part(data)])[0]
    made.export(str(tmp_path / "critic"))
    config = json.loads((tmp_path / "critic/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    again = worker(**given, critic_pretrain=str(tmp_path / "critic"))
    assert again.facts["head"] == "score"
    for found, expected in zip(again.values([Part(data)])[0], (values, after), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_an_adapter_is_trained_with_a_whole_head(worker):
    made = worker(lora_rank=2, lora_alpha=4)
    before = weights(made)
    data = experience(made)
    made.update([step(data), step(data)])
    moved = {name for name, weight in weights(made).items() if not torch.equal(weight, before[name])}
    assert made.facts["trained_parameters"] < made.facts["parameters"] / 4
    assert any("score" in name for name in moved) and any("lora_B" in name for name in moved)
    assert all("score" in name or "lora" in name for name in moved)


def test_a_loss_that_is_no_number_ends_the_run_and_names_step_and_options(worker):
    made, data = worker(), experience()
    assert data.returns is not None
    broken = data.with_columns(returns=np.full_like(data.returns, np.nan))
    with pytest.raises(RunError, match=r"optimizer step 5 of the critic is nan; .*--critic_learning_rate"):
        made.update([step(broken, number=4)])
