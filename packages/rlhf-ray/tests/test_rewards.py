"""Rewards of a run: every source asked about every response, one finite number from each, and one of all."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_core.tiny import make_tokenizer
from rlhf_data.errors import InputError, RunError
from rlhf_data.options import build
from rlhf_infer.rewards.remote import Asked
from rlhf_ray.cluster.backend import LocalBackend, Place
from rlhf_ray.cluster.group import WorkerGroup
from rlhf_ray.config import PPOConfig
from rlhf_ray.prompts import Prompts, read_prompts
from rlhf_ray.rewards import (
    Responses,
    Rewards,
    check_rewards,
    different,
    longest_sample,
    needs_models,
    needs_workers,
    own_encoder,
    sources_of,
)
from rlhf_ray.rollout import Rollout
from rlhf_ray.workers.reward import RewardWorker

STORIES = [f"Once upon a time there was a {animal}." for animal in ("cat", "dog", "fox")]
RESPONSES = [" A cat.", " A dog", "", " A fox and a hen."]
NUMBERS = [0, 0, 1, 2]
"""The prompts that they answer; the second is cut off."""

FUNCTIONS = """
def reward(responses):
    return [float(len(response)) for response in responses]

def labelled(prompts, responses, labels, rows):
    return {
        "rewards": [row["worth"] for row in rows],
        "long": [len(prompt + response) > 40 for prompt, response in zip(prompts, responses)],
        "label": labels,
    }

def few(responses):
    return [1.0] * (len(responses) - 1)

def wrong(responses):
    return [float("nan")] * len(responses)

def huge(responses):
    return [1e39] * len(responses)

def total(rewards):
    return rewards[0] + 10 * rewards[1]

def short(rewards):
    return rewards[0][:-1]

def broken(rewards):
    raise KeyError("nothing")

def two(rewards, more):
    return rewards
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a policy's tokenizer and model, two reward models, prompts, and functions.

    `same` reads with the policy's tokenizer, `other` with one of its own.
    """
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from rlhf_core.tiny import make_model

    root = tmp_path_factory.mktemp("rewards")
    policy = make_tokenizer(STORIES + RESPONSES, root / "policy", 320)
    make_model(policy, root / "policy", hidden_size=32, layers=1, max_len=64)
    for name, texts, size in (("same", STORIES + RESPONSES, 320), ("other", ["something else entirely"], 280)):
        tokenizer = make_tokenizer(texts, root / name, size)
        torch.manual_seed(0)
        LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                num_attention_heads=1, max_position_embeddings=128, num_labels=1, problem_type="regression",
                pad_token_id=None, bos_token_id=0, eos_token_id=1,
            )
        ).save_pretrained(root / name)  # fmt: skip
    (root / "functions.py").write_text(FUNCTIONS)
    rows = [{"prompt": story, "label": f"label {n}", "worth": n} for n, story in enumerate(STORIES)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def tokenizer(root) -> Any:
    from rlhf_data.tokenizer import load_tokenizer

    return load_tokenizer(str(root / "policy"))


@pytest.fixture
def prompts(root, tokenizer) -> Prompts:
    return read_prompts(config_of(root, "functions.py"), tokenizer, None).train


def config_of(root: Path, *sources: str, **options: Any) -> PPOConfig:
    given = {
        "pretrain": str(root / "policy"),
        "prompt_data": str(root / "prompts.jsonl"),
        "prompt_max_len": 32,
        "generate_max_len": 32,
        "micro_rollout_batch_size": 2,
    }
    if sources:
        given["reward_pretrain"] = ",".join(str(root / source) for source in sources)
    return build(PPOConfig, given | options)


def rollout_of(prompts: Prompts, tokenizer: Any, closing: int | None = None) -> Rollout:
    """`RESPONSES`, the second cut off, the others ended by `closing` or EOS."""
    end = tokenizer.eos_token_id if closing is None else closing
    bodies = [tokenizer.encode(text, add_special_tokens=False) for text in RESPONSES]
    responses = [body if place == 1 else [*body, end] for place, body in enumerate(bodies)]
    asked = [prompts.ids(number) for number in NUMBERS]
    pieces = [np.asarray(part) for pair in zip(asked, responses, strict=True) for part in pair]
    lengths = np.array([len(response) for response in responses], np.int64)
    return Rollout(
        input_ids=np.concatenate(pieces).astype(np.int32),
        prompt_lengths=np.array([len(ids) for ids in asked], np.int64),
        response_lengths=lengths,
        truncated=np.arange(len(responses)) == 1,
        rollout_logps=np.zeros(int(lengths.sum()), np.float32),
        prompts=np.array(NUMBERS, np.int64),
        groups=np.array(NUMBERS, np.int64),
        seeds=np.arange(len(responses)),
        versions=np.zeros(len(responses), np.int64),
    )


class Server:
    """Stands in for a reward server."""

    describe = "a stand-in"
    futures = ()

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def start(self, asked: Sequence[Asked]) -> Server:
        self.asked += asked
        return self

    def result(self) -> list[float]:
        return [float(one.complete) for one in self.asked]

    def close(self) -> None:
        return


def rewards_of(config: PPOConfig, tokenizer: Any, ranks: int = 1, servers: Any = None) -> Rewards:
    """All sources, in this process."""
    backend, groups = LocalBackend(), []
    for source in needs_workers(config):
        handles = [backend.start(RewardWorker, rank, ranks, place=Place(), name="reward") for rank in range(ranks)]
        group = WorkerGroup(f"reward {source.kind} {source.name}", backend, handles, 60)
        group.call("setup", config, None, source.where)
        groups.append((source.name, group))
    return Rewards(groups, config, tokenizer, servers)


def test_sources_have_short_and_different_names_kinds_and_weights(root):
    config = config_of(
        root,
        "same", "functions.py", "functions.py:labelled", "deep/same",
        remote_rm_url="http://rewards.example:5000/get_reward,https://rewards.example:5000/other",
        reward_weights="1,2,3,4,5,0.5",
    )  # fmt: skip
    sources = sources_of(config)
    assert [source.name for source in sources] == [
        "same-1", "functions", "labelled", "same-2", "rewards.example:5000-1", "rewards.example:5000-2",
    ]  # fmt: skip
    assert [source.kind for source in sources] == ["model", "function", "function", "model", "server", "server"]
    assert [source.weight for source in sources] == [1, 2, 3, 4, 5, 0.5]
    assert needs_models(config) == [str(root / "same"), str(root / "deep/same")]
    assert [source.name for source in needs_workers(config)] == ["same-1", "functions", "labelled", "same-2"]
    assert different(["a", "b", "a"]) == ["a-1", "b", "a-2"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_function_is_asked_with_texts_labels_and_rows_however_many_ranks_run_it(root, tokenizer, prompts, ranks):
    rewards = rewards_of(config_of(root, "functions.py:labelled"), tokenizer, ranks)
    scores, parts = rewards.start(rollout_of(prompts, tokenizer), prompts).result()
    assert scores.dtype == np.float32
    assert scores.tolist() == NUMBERS
    assert sorted(parts) == ["labelled", "labelled.long"]  # a label is no number
    assert parts["labelled"].tolist() == NUMBERS
    assert parts["labelled.long"].tolist() == [
        len(STORIES[n] + text) > 40 for n, text in zip(NUMBERS, RESPONSES, strict=True)
    ]
    assert rewards.start(rollout_of(prompts, tokenizer), prompts).result()[0].tolist() == NUMBERS


def test_sources_are_added_up_with_their_weights_and_shown_apart(root, tokenizer, prompts):
    config = config_of(
        root,
        "functions.py", "functions.py:labelled",
        remote_rm_url="http://host/x", reward_weights="1,-2,0.5",
    )  # fmt: skip
    server = Server()
    rewards = rewards_of(config, tokenizer, servers={"host": server})
    scores, parts = rewards.start(rollout_of(prompts, tokenizer), prompts).result()
    lengths, ends = [len(text) for text in RESPONSES], [1.0, 0.0, 1.0, 1.0]
    assert parts["functions"].tolist() == lengths
    assert parts["host"].tolist() == ends
    assert scores.tolist() == [a - 2 * b + 0.5 * c for a, b, c in zip(lengths, NUMBERS, ends, strict=True)]
    assert [(one.answer.prompt, one.answer.response, one.rendered) for one in server.asked] == [
        (STORIES[number], text, "text") for number, text in zip(NUMBERS, RESPONSES, strict=True)
    ]
    assert rewards.describe()[1:] == [
        f"labelled: the Python function {root}/functions.py:labelled, times -2", "host: the server a stand-in, times 0.5",
    ]  # fmt: skip


def test_a_function_of_the_user_makes_one_reward_of_several(root, tokenizer, prompts):
    sources = ("functions.py", "functions.py:labelled")
    rewards = rewards_of(config_of(root, *sources, reward_fn=f"{root}/functions.py:total"), tokenizer)
    scores, _ = rewards.start(rollout_of(prompts, tokenizer), prompts).result()
    assert scores.tolist() == [len(text) + 10 * number for text, number in zip(RESPONSES, NUMBERS, strict=True)]


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("functions.py:few", {}, "returned 1 values as `rewards` for 2 responses"),
        ("functions.py:wrong", {}, "must return finite numbers, got nan"),
        ("functions.py:huge", {}, r"function .*functions.py:huge: the reward of response 0 of 4 is 1e\+39"),
        ("functions.py", {"reward_fn": "short"}, r"--reward_fn .*short: 3 rewards for 4 responses"),
        ("functions.py", {"reward_fn": "broken"}, r"--reward_fn .* failed in .*functions.py, line \d+: KeyError"),
    ],
)
def test_anything_but_one_finite_number_for_each_response_ends_the_run_with_its_source(
    root, tokenizer, prompts, source, options, said
):
    options = {name: f"{root}/functions.py:{value}" for name, value in options.items()}
    rewards = rewards_of(config_of(root, source, **options), tokenizer)
    with pytest.raises(RunError, match=said):
        rewards.start(rollout_of(prompts, tokenizer), prompts).result()


def test_metrics_that_a_function_leaves_out_later_are_not_made_up(root, tokenizer, prompts):
    (root / "fickle.py").write_text(
        textwrap.dedent("""
            calls = []
            def reward(responses):
                calls.append(1)
                said = {"rewards": [0.0] * len(responses), "kept": [1] * len(responses), "lost": [2] * len(responses)}
                if len(calls) > 2:
                    said["kept"] = [None] * len(responses)
                if len(calls) > 4:
                    del said["lost"]
                return said
        """)
    )
    rewards = rewards_of(config_of(root, "fickle.py"), tokenizer)
    rollout = rollout_of(prompts, tokenizer)
    assert rewards.start(rollout, prompts).result()[1]["fickle.kept"].tolist() == [1] * 4
    parts = rewards.start(rollout, prompts).result()[1]
    assert "fickle.kept" not in parts and parts["fickle.lost"].tolist() == [2] * 4
    assert set(rewards.start(rollout, prompts).result()[1]) == {"fickle"}


def alone(folder: Path, ids: list[int]) -> float:
    """The reward of one sample by transformers' own class."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state
        return float(model.score(hidden)[0, -1, 0])


def test_a_model_with_the_policys_tokenizer_reads_the_ids_that_the_policy_wrote(root, tokenizer, prompts):
    rewards = rewards_of(config_of(root, "same"), tokenizer)
    assert "which reads the policy's token ids" in rewards.describe()[0]
    rollout = rollout_of(prompts, tokenizer)
    scores, _ = rewards.start(rollout, prompts).result()
    expected = [alone(root / "same", rollout.sample(number).tolist()) for number in range(4)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    assert rollout.sample(1)[-1] != tokenizer.eos_token_id  # it was cut off, and gets none


def test_a_response_that_another_token_ended_gets_eos_behind_it(root, tokenizer, prompts):
    closing = tokenizer.convert_tokens_to_ids("<|user|>")
    rollout = rollout_of(prompts, tokenizer, closing)
    samples = Responses(rollout, prompts).samples
    for place, sample in enumerate(samples):
        ended = [] if place == 1 else [tokenizer.eos_token_id]
        assert sample.input_ids.tolist() == [*rollout.sample(place).tolist(), *ended]
        assert np.flatnonzero(sample.target_mask).tolist() == list(range(rollout.prompt_lengths[place], len(sample)))


def test_a_model_with_another_tokenizer_reads_the_texts_as_scoring_would(root, tokenizer, prompts):
    from rlhf_data.tokenizer import load_tokenizer

    config = config_of(root, "other")
    rewards = rewards_of(config, tokenizer)
    assert "which reads texts with its own tokenizer" in rewards.describe()[0]
    own = load_tokenizer(str(root / "other"))
    eos = own.eos_token_id
    expected = [
        [*own.encode(STORIES[number]), *own.encode(text, add_special_tokens=False), *([] if place == 1 else [eos])]
        for place, (number, text) in enumerate(zip(NUMBERS, RESPONSES, strict=True))
    ]
    rollout = rollout_of(prompts, tokenizer)
    encoder = own_encoder(config, sources_of(config)[0], tokenizer)
    assert encoder is not None
    assert [sample.input_ids.tolist() for sample in Responses(rollout, prompts).encoded(encoder)] == expected
    scores, _ = rewards.start(rollout, prompts).result()
    np.testing.assert_allclose(scores, [alone(root / "other", ids) for ids in expected], rtol=1e-5, atol=1e-6)


def test_rewards_do_not_depend_on_what_is_judged_together(root, tokenizer, prompts):
    rewards = rewards_of(config_of(root, "same", "functions.py"), tokenizer)
    rollout = rollout_of(prompts, tokenizer)
    whole, _ = rewards.start(rollout, prompts).result()
    apart = [rewards.start(rollout.select([place]), prompts).result()[0] for place in (3, 1, 0, 2)]
    np.testing.assert_allclose(np.concatenate(apart), whole[[3, 1, 0, 2]], rtol=1e-5, atol=1e-6)


def test_everything_that_fits_passes_the_check(root):
    check_rewards(config_of(root, "same", "other", "functions.py", remote_rm_url="http://host:1/get_reward"))
    check_rewards(config_of(root, "functions.py", "functions.py:labelled", reward_fn=f"{root}/functions.py:total"))
    assert longest_sample(config_of(root, "same", generate_max_len=1000)) == 64  # the policy's context
    assert longest_sample(config_of(root, "same", max_len=50)) == 50


@pytest.mark.parametrize(
    ("sources", "options", "said"),
    [
        (["policy"], {}, "--reward_pretrain .*policy has no reward head"),
        (["nosuch"], {}, "--reward_pretrain .*nosuch"),
        (["functions.py:nosuch"], {}, "there is no function `nosuch`"),
        (["nosuch.py"], {}, "there is no file"),
        (["same"], {"normalize_reward": True}, "--normalize_reward: .*same does not say .*leave the option out"),
        (["functions.py"], {"normalize_reward": True}, "--normalize_reward takes .* is none: leave it out"),
        ([], {"remote_rm_url": "ftp://host/x"}, "--remote_rm_url ftp://host/x must be a URL"),
        (["functions.py"], {"reward_fn": "nosuch.py:total"}, "--reward_fn nosuch.py:total: there is no file"),
        (["functions.py"], {"reward_weights": "nan"}, "--reward_weights: the weight .* is nan"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_loaded(root, sources, options, said):
    with pytest.raises(InputError, match=said):
        check_rewards(config_of(root, *sources, **options))


def test_a_combining_function_that_needs_more_than_the_rewards_is_refused(root):
    with pytest.raises(InputError, match=r"--reward_fn .*:two: it is called with one argument"):
        check_rewards(config_of(root, "functions.py", reward_fn=f"{root}/functions.py:two"))


def test_a_url_among_the_models_is_told_its_option(root):
    with pytest.raises(InputError, match="give it as --remote_rm_url"):
        check_rewards(config_of(root, reward_pretrain="http://host:5000/get_reward"))


def test_a_model_that_takes_shorter_samples_than_there_may_be_is_refused(root, tmp_path):
    folder = tmp_path / "short"
    folder.mkdir()
    for file in (root / "same").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    with pytest.raises(InputError, match=r"takes 48 tokens, and samples may have 64 .*give --max_len 48 or less"):
        check_rewards(config_of(root, reward_pretrain=str(folder)))


def test_a_process_that_runs_a_function_imports_neither_torch_nor_deepspeed(root):
    code = f"""
import sys
from rlhf_data.options import build
from rlhf_infer.rewards.scorer import Answer
from rlhf_ray.config import PPOConfig
from rlhf_ray.workers.reward import RewardWorker
worker = RewardWorker(0, 1)
where = {str(root / "functions.py")!r}
worker.setup(build(PPOConfig, dict(pretrain="x", prompt_data="x", reward_pretrain=where)), None, where)
print(worker.judge([Answer("a", "bcd")]).rewards, [name for name in ("torch", "deepspeed", "ray") if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "[3.0] []", ran.stderr
