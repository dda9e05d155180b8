"""The whole loop in this process: what it converges to, that it resumes, and that the layout of work does not change it."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_core.checkpoint import Checkpoints, damage
from rlhf_data.errors import InputError, RunError
from rlhf_data.options import build
from rlhf_ray.cluster.backend import LocalBackend
from rlhf_ray.config import PPOConfig
from rlhf_ray.run import prepare, run

pytestmark = pytest.mark.slow

ARMS = "ab"
REWARD = """
from pathlib import Path

def reward(responses):
    fuse = Path(__file__).with_name("fuse")
    if fuse.exists():
        left = int(fuse.read_text()) - 1
        fuse.write_text(str(left))
        if left == 0:
            raise RuntimeError("burnt out")
    return {"rewards": [float(response == "b") for response in responses], "empty": [response == "" for response in responses]}
"""
"""Pays for one answer. With a number in the file `fuse`, its call of that number fails."""

ESTIMATORS = ("gae", "reinforce", "rloo", "reinforce_baseline", "grpo", "dr_grpo")


@pytest.fixture(scope="session")
def bandit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows two words, and prompts to which it answers with one of them."""
    from rlhf_core.libraries import settle

    settle()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rlhf_core.tiny import make_model

    folder = tmp_path_factory.mktemp("bandit")
    words = {"</s>": 0, **{word: number for number, word in enumerate([*ARMS, "p", "q"], start=1)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="q"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="</s>")
    tokenizer.save_pretrained(folder)
    make_model(tokenizer, folder, hidden_size=32, layers=1, max_len=32, initializer_range=0.2)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "p " * (1 + n % 3)}) + "\n" for n in range(24)))
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture
def options(bandit: Path, tmp_path: Path) -> Callable[..., PPOConfig]:
    """The options of a short run on it."""

    def make(**given: Any) -> PPOConfig:
        flat = {
            "pretrain": str(bandit), "prompt_data": str(bandit / "prompts.jsonl"),
            "reward_pretrain": str(bandit / "reward.py"), "save_path": str(tmp_path / "out"), "zero_stage": 0,
            "rollout_batch_size": 32, "train_batch_size": 16, "micro_train_batch_size": 16, "n_samples_per_prompt": 4,
            "micro_rollout_batch_size": 32, "generate_max_len": 1, "prompt_max_len": 8, "num_episodes": 5,
            "actor_learning_rate": 0.02, "critic_learning_rate": 0.02, "init_kl_coef": 0.0, "lr_warmup_ratio": 0.0,
            "advantage_estimator": "grpo", "logging_steps": 1,
        }  # fmt: skip
        return build(PPOConfig, flat | given)

    return make


def train(config: PPOConfig) -> list[dict[str, float]]:
    """Run in this process; the rows of its record."""
    run(prepare(config), LocalBackend(), {})
    return rows(config)


def rows(config: PPOConfig) -> list[dict[str, float]]:
    text = (Path(config.checkpoint.save_path) / "run/metrics.jsonl").read_text()
    timed = ("seconds", "samples_per_second", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in text.splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_bandit_is_solved_under_every_estimator(options, estimator):
    found = train(options(advantage_estimator=estimator))
    assert found[0]["reward"] < 0.6
    assert found[-1]["reward"] > 0.9, [row["reward"] for row in found]


@pytest.mark.parametrize(
    "given",
    [
        {"policy_loss": "gspo"},
        {"policy_loss": "cispo"},
        {"advantage_estimator": "gae", "max_epochs": 2, "init_kl_coef": 0.01, "kl_target": 0.1, "dual_clip": 3.0},
        {"use_kl_loss": True, "init_kl_coef": 0.01, "eps_clip_high": 0.28, "entropy_coef": 1e-3},
        {"lora_rank": 4, "init_kl_coef": 0.01, "actor_learning_rate": 0.1, "importance_cap": 2.0},
    ],
    ids=lambda given: next(iter(given)),
)
def test_it_is_solved_under_every_loss(options, given):
    found = train(options(**given))
    assert max(row["reward"] for row in found[-3:]) > 0.8, [row["reward"] for row in found]


def test_the_first_update_sees_the_weights_that_wrote_the_rollout(options):
    first = train(options(max_rollouts=1, temperature=0.7, train_batch_size=32, init_kl_coef=0.01))[0]
    assert first["ratio_mean"] == pytest.approx(1, abs=1e-4) and first["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert first["rollout_logp_gap_max"] < 1e-4 and first["kl"] == pytest.approx(0, abs=1e-5)


LAYOUT = {"max_rollouts": 3, "init_kl_coef": 0.05, "generate_max_len": 4, "actor_learning_rate": 1e-3}


@pytest.mark.parametrize(
    "other",
    [
        {"micro_train_batch_size": 2, "micro_rollout_batch_size": 3},
        {"flash_attn": False},
        {"packing_samples": True, "packing_tokens": 20},
        {"zero_stage": 3},
    ],
    ids=["micro-batches", "padded", "packed", "ZeRO 3"],
)
def test_how_work_is_laid_out_does_not_change_the_run(options, tmp_path, other):
    plain = train(options(**LAYOUT))
    same = train(options(**LAYOUT, **other, save_path=str(tmp_path / "other")))
    for one, two in zip(plain, same, strict=True):
        assert {key: pytest.approx(value, rel=2e-4, abs=2e-5) for key, value in one.items()} == two


@pytest.mark.parametrize(
    "given",
    [
        {"advantage_estimator": "gae", "init_kl_coef": 0.05, "kl_target": 0.01, "enable_ema": True, "max_epochs": 2},
        {"zero_stage": 2, "lora_rank": 2, "lora_dropout": 0.1, "init_kl_coef": 0.01},
    ],
    ids=["critic", "adapter"],
)
@pytest.mark.parametrize("call", [9, 10])
def test_a_run_that_broke_off_goes_on_as_if_it_had_not(options, bandit, tmp_path, given, call):
    """It breaks off while a rollout is judged; every phase has the same state behind it, that of the last checkpoint."""
    settings = {
        **given, "max_rollouts": 5, "generate_max_len": 3, "micro_rollout_batch_size": 16, "save_steps": 2, "eval_ratio": 0.2,
        "eval_steps": 2, "actor_learning_rate": 5e-3,
    }  # fmt: skip
    whole = options(**settings, save_path=str(tmp_path / "whole"))
    expected = train(whole)
    (bandit / "fuse").write_text(str(call))
    try:
        with pytest.raises(RunError, match="burnt out"):
            train(options(**settings))
    finally:
        (bandit / "fuse").unlink()
    config = options(**settings, load_checkpoint=True)
    assert train(config) == expected
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    for name in names:
        one, two = load_file(tmp_path / "whole" / name), load_file(tmp_path / "out" / name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert (
        names and (tmp_path / "whole/run/samples.jsonl").read_text() == (tmp_path / "out/run/samples.jsonl").read_text()
    )


def test_a_checkpoint_of_another_run_is_refused(options):
    train(options(max_rollouts=2, save_steps=1))
    with pytest.raises(InputError, match="holds checkpoints of an earlier run"):
        train(options(max_rollouts=2, save_steps=1))
    with pytest.raises(InputError, match="advantage_estimator was grpo and is rloo"):
        train(options(max_rollouts=2, save_steps=1, load_checkpoint=True, advantage_estimator="rloo"))


def test_held_out_prompts_are_answered_and_parts_of_rewards_logged(options):
    found = train(options(eval_ratio=0.25, eval_steps=2, eval_at_start=True, max_rollouts=3, eval_n_samples_per_prompt=2,
                          eval_temperature=1.0))  # fmt: skip
    evaluated = [row for row in found if "eval_reward" in row]
    assert [row["rollout"] for row in evaluated] == [0, 2, 3]
    assert all(row["eval_best_reward"] >= row["eval_reward"] for row in evaluated)
    assert {"reward_reward", "reward_reward.empty", "eval_reward_reward"} <= {key for row in found for key in row}


def test_the_price_of_divergence_follows_its_target(options):
    given = {"init_kl_coef": 0.05, "kl_target": 1e-4, "kl_horizon": 100, "max_rollouts": 4, "generate_max_len": 3}
    found = train(options(**given))
    prices = [row["kl_coef"] for row in found]
    assert prices[0] == 0.05 and prices[-1] > prices[1], "what is far above its target costs more"


def test_responses_that_are_all_cut_off_and_masked_have_no_figures(options):
    found = train(options(advantage_estimator="rloo", truncated_responses="mask", generate_max_len=2, train_batch_size=4,
                          max_rollouts=6, seed=3))  # fmt: skip
    assert all("grad_norm" in row and row["truncated"] > 0 for row in found)


def test_a_learning_rate_may_change_when_a_run_goes_on(options):
    settings = {"max_rollouts": 4, "save_steps": 2, "lr_scheduler": "constant"}
    train(options(**settings))
    for folder in (Path(options().checkpoint.save_path) / "checkpoints").glob("global_step4"):
        folder.rename(folder.with_name("later"))
    found = train(options(**settings, load_checkpoint=True, actor_learning_rate=1e-3))
    assert [row["learning_rate"] for row in found] == [0.02, 0.02, 1e-3, 1e-3]


def test_the_actor_waits_for_the_critic(options, bandit):
    found = train(options(advantage_estimator="gae", freezing_actor_steps=2, max_rollouts=3, save_value_network=True))
    assert ["policy_loss" in row for row in found] == [False, False, True]
    assert [row["weight_version"] for row in found] == [0, 0, 1]
    critic = Path(options().checkpoint.save_path + "_critic")
    assert json.loads((critic / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


def test_prompts_whose_responses_are_worth_the_same_are_left_out(options):
    found = train(options(dynamic_filtering=True, max_rollouts=3, max_filtered=100, actor_learning_rate=2e-3))
    assert all(row["groups_without_spread"] == 0 and row["samples"] == 32 * row["rollout"] for row in found)
    assert any(row["filtered"] > 0 for row in found)


def test_rewards_that_never_differ_end_a_filtered_run_with_the_reason(options, tmp_path):
    constant = tmp_path / "constant.py"
    constant.write_text("def reward(responses):\n    return [1.0] * len(responses)\n")
    with pytest.raises(RunError, match=r"--dynamic_filtering: rollout 0 has asked 16 prompts.*--max_filtered 2"):
        train(options(reward_pretrain=str(constant), dynamic_filtering=True, max_filtered=2))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kl_horizon": 5}, "--kl_horizon would do nothing without --kl_target"),
        ({"max_num_seqs": 5}, "--max_num_seqs would do nothing without --vllm_num_engines of 1 or more"),
        ({"gamma": 0.9}, "--gamma would do nothing without an estimator over time"),
        ({"value_clip": 0.5}, "--value_clip would do nothing without a critic"),
        ({"kl_estimator": "k2"}, "--kl_estimator would do nothing without --init_kl_coef above 0"),
        ({"packing_tokens": 99}, "--packing_tokens would do nothing without --packing_samples"),
        ({"remote_rm_retries": 2}, "--remote_rm_retries would do nothing without --remote_rm_url"),
        ({"max_staleness": 3}, "--max_staleness would do nothing without --async"),
        ({"advantage_estimator": "reinforce", "normalize_advantages": False}, "reinforce is whitened by definition"),
        ({"async_rollouts": True}, "--async writes beside the policy's training: set --vllm_num_engines"),
        ({"rollout_batch_size": 30}, "not a multiple of --n_samples_per_prompt 4; the nearest that is: 28 or 32"),
        ({"train_batch_size": 12}, "not a multiple of --train_batch_size 12; the nearest that is: 24 or 36"),
        ({"actor_num_gpus_per_node": 3}, "cannot be divided among the 3 ranks of the actor"),
        ({"n_samples_per_prompt": 1}, "--advantage_estimator grpo compares the responses to one prompt"),
        ({"save_value_network": True}, "--save_value_network: --advantage_estimator grpo has no critic"),
        ({"reward_weights": "1,2"}, "--reward_weights has 2 weights for 1 reward models"),
        ({"reward_weights": "a"}, "--reward_weights must be numbers"),
        ({"use_kl_loss": True}, "--use_kl_loss needs a price of the divergence"),
        ({"policy_loss": "gspo", "dual_clip": 3.0}, "--dual_clip is for --policy_loss ppo"),
        ({"eps_clip": 1.5}, "a ratio cannot fall by more than 1"),
        ({"reward_clip_range": (1.0, -1.0)}, "--reward_clip_range must be two numbers"),
        ({"overlong_buffer_len": 9}, "--overlong_buffer_len 9 is more than --generate_max_len 1"),
        ({"pretrain_key": "text"}, "--pretrain_key is about --pretrain_data"),
        ({"lora_rank": 4, "load_in_4bit": True, "zero_stage": 3}, "--load_in_4bit weights cannot be split"),
        (
            {"advantage_estimator": "gae", "dynamic_filtering": True},
            "--dynamic_filtering is for estimators that compare",
        ),
        ({"aux_loss_coef": 0.1}, "--aux_loss_coef is not for PPO"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_contradict_each_other_are_refused(options, given, said):
    with pytest.raises(InputError, match=said):
        options(**given)


def test_too_few_prompts_are_refused_with_numbers(options):
    with pytest.raises(InputError, match="takes 256 prompts, and there are 24: give --rollout_batch_size 96 or less"):
        prepare(options(rollout_batch_size=1024))


@pytest.fixture
def nonsense() -> Iterator[str]:
    """URL of a reward server that answers every request with the same nonsense."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"as good as it gets")

        def log_message(self, format: str, *args: object) -> None:
            """Nothing to the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_reward_server_that_answers_nonsense_ends_the_run_with_its_url_and_its_words(options, nonsense):
    with pytest.raises(RunError) as caught:
        train(options(reward_pretrain=None, remote_rm_url=nonsense, remote_rm_retries=0))
    assert nonsense in str(caught.value) and "as good as it gets" in str(caught.value)


def test_a_reward_that_is_no_number_ends_the_run_and_names_the_function(options, tmp_path):
    function = tmp_path / "silly.py"
    function.write_text("def reward(responses):\n    return [0.5] * (len(responses) - 1) + [float('nan')]\n")
    with pytest.raises(RunError, match=rf"{function}.* nan"):
        train(options(reward_pretrain=str(function)))


def test_a_loss_that_is_no_number_ends_the_run_and_the_last_checkpoint_is_good(options):
    """The policy waits for a rollout, so that there is a checkpoint before its first step."""
    given = {"advantage_estimator": "gae", "freezing_actor_steps": 1, "max_rollouts": 3, "save_steps": 1}
    with pytest.raises(
        RunError, match=r"gradient norm of optimizer step \d+ of the policy is (nan|inf); nothing of it"
    ):
        train(options(**given, actor_learning_rate=1e30))
    folder = Path(options().checkpoint.save_path)
    (newest,) = (folder / "checkpoints").iterdir()
    assert not damage(newest) and not list(folder.glob("*.safetensors"))
    assert train(options(**given, load_checkpoint=True))[-1]["rollout"] == 3


def test_a_full_disk_ends_the_run_and_leaves_earlier_checkpoints(options, tmp_path, monkeypatch):
    save = Checkpoints.save

    def on_a_small_disk(self: Checkpoints, write: Any, number: int, state: dict[str, Any]) -> Path:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if number == 4 else soft, hard))
        try:
            return save(self, write, number, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    given = {"max_rollouts": 5, "save_steps": 2, "advantage_estimator": "gae", "init_kl_coef": 0.01}
    expected = train(options(**given, save_path=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", on_a_small_disk)
        with pytest.raises(RunError, match=r"checkpoint of .*4 could not be written .* earlier checkpoints are intact"):
            train(options(**given))
    folder = tmp_path / "out/checkpoints"
    assert [path.name for path in folder.iterdir()] == ["global_step2"] and not damage(folder / "global_step2")
    assert train(options(**given, load_checkpoint=True)) == expected
