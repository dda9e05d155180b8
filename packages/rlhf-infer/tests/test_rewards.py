"""Scorers: a reward model gives transformers' own rewards however samples are laid out; a Python function is called right."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest

from rlhf_core.libraries import settle
from rlhf_data.encode import Sample
from rlhf_data.errors import InputError, RunError
from rlhf_infer.rewards.model import ModelScorer, plan, tokens
from rlhf_infer.rewards.scorer import Answer, Scorer, ScorerOptions, check_scorer, is_function, make_scorer

settle()

PAD = 2


def sample(prompt: list[int], response: list[int]) -> Sample:
    ids = np.array([*prompt, *response], np.int32)
    return Sample(ids, np.arange(len(ids)) >= len(prompt))


def samples(count: int) -> list[Sample]:
    """Samples of very different lengths, up to five to a prompt and not side by side; some are equal."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 90, length).tolist() for length in (1, 4, 9, 30, 60)]
    responses = [rng.integers(3, 90, length).tolist() for length in (1, 2, 7, 11, 40, 3, 25)]
    return [sample(prompts[n % 5], responses[(n * 3 + n // 7) % 7]) for n in range(count)]


def answers(given: list[Sample]) -> list[Answer]:
    return [Answer("", "", sample=one) for one in given]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Random reward models of several architectures; `renamed` has its head under another name."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        LlamaConfig,
        LlamaForSequenceClassification,
        MistralConfig,
        MistralForSequenceClassification,
        MixtralConfig,
        MixtralForSequenceClassification,
    )

    small = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 128, "num_labels": 1, "problem_type": "regression",
        "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    kinds = {
        "llama": (LlamaForSequenceClassification, LlamaConfig(**small)),
        "window": (MistralForSequenceClassification, MistralConfig(**small, sliding_window=12)),
        "experts": (
            MixtralForSequenceClassification,
            MixtralConfig(**small, num_local_experts=4, num_experts_per_tok=2),
        ),
    }
    root, made = tmp_path_factory.mktemp("models"), {}
    for name, (kind, config) in kinds.items():
        torch.manual_seed(0)
        kind(config).save_pretrained(root / name)
        made[name] = str(root / name)
    renamed = shutil.copytree(root / "llama", root / "renamed")
    weights = load_file(root / "llama/model.safetensors")
    weights["value_head.weight"] = weights.pop("score.weight")
    save_file(weights, renamed / "model.safetensors", metadata={"format": "pt"})
    return made | {"renamed": str(renamed)}


def alone(folder: str, given: list[Sample]) -> list[float]:
    """Rewards by transformers' own class, one sample at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.from_numpy(one.input_ids).long()[None]).logits.item() for one in given]


@pytest.mark.parametrize("kind", ["llama", "window", "experts"])
def test_rewards_are_those_of_the_model_alone_however_samples_are_laid_out(folders, kind):
    given = samples(37)
    wanted = alone(folders[kind], given)
    shuffled = np.random.default_rng(1).permutation(len(given)).tolist()
    for size in (1, 3, 16):
        for flash_attn in (True, False):
            options = ScorerOptions(pretrain=folders[kind], micro_batch_size=size, flash_attn=flash_attn)
            scorer = make_scorer(options)
            assert scorer.score(answers(given)) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
            mixed = scorer.score(answers([given[n] for n in shuffled]))
            assert mixed == pytest.approx([wanted[n] for n in shuffled], rel=1e-5, abs=1e-5)


def test_a_head_of_another_name_gives_the_same_rewards(folders):
    given = samples(8)
    wanted = make_scorer(ScorerOptions(pretrain=folders["llama"])).score(answers(given))
    for prefix in (None, "value_head"):
        options = ScorerOptions(pretrain=folders["renamed"], value_head_prefix=prefix)
        assert make_scorer(options).score(answers(given)) == wanted


def test_bfloat16_rewards_are_near_those_in_float32(folders):
    given = samples(12)
    exact, rounded = (
        make_scorer(ScorerOptions(pretrain=folders["llama"], bf16=bf16)).score(answers(given)) for bf16 in (False, True)
    )
    assert rounded == pytest.approx(exact, abs=0.05) and rounded != exact


def test_normalised_rewards_use_the_statistics_of_the_model(folders, tmp_path):
    from transformers import AutoConfig

    folder = shutil.copytree(folders["llama"], tmp_path / "calibrated")
    with pytest.raises(InputError, match=r"--normalize_reward: .* does not say"):
        check_scorer(ScorerOptions(pretrain=str(folder), normalize_reward=True))
    config = AutoConfig.from_pretrained(folder)
    config.mean, config.std = 0.25, 4.0
    config.save_pretrained(folder)
    raw, normalised = (
        make_scorer(ScorerOptions(pretrain=str(folder), normalize_reward=asked)).score(answers(samples(5)))
        for asked in (False, True)
    )
    assert normalised == pytest.approx([(reward - 0.25) / 4 for reward in raw])


def test_nothing_to_score_needs_no_forward_pass(folders):
    assert make_scorer(ScorerOptions(pretrain=folders["llama"])).score([]) == []


@pytest.mark.parametrize("count", [1, 2, 3, 16, 61])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_every_sample_is_in_one_forward_pass_and_all_ranks_make_as_many(count, world_size, size, share_prefix):
    given = samples(count)
    ranks = plan(given, size, world_size, share_prefix)
    assert len(ranks) == world_size and len({len(passes) for passes in ranks}) == 1
    passes = [units for rank in ranks for units in rank]
    assert sorted(place for units in passes for places, _ in units for place in places) == list(range(count))
    assert all(sum(len(places) for places, _ in units) <= size for units in passes)
    for units in passes:
        for places, shared in units:
            assert len({given[place].input_ids[:shared].tobytes() for place in places}) == 1
            assert all(len(given[place]) > shared for place in places)


def test_ranks_get_about_as_many_tokens(folders):
    given = samples(200)
    loads = [
        sum(tokens(given, unit) for units in rank for unit in units) for rank in plan(given, 4, 2, share_prefix=True)
    ]
    assert max(loads) <= 1.05 * min(loads)


def test_a_prompt_of_several_responses_is_computed_once():
    prompt = list(range(3, 43))
    given = [sample(prompt, [50 + n]) for n in range(4)]
    (passes,) = plan(given, 16, 1, share_prefix=True)
    assert [tokens(given, unit) for units in passes for unit in units] == [44]
    (passes,) = plan(given, 2, 1, share_prefix=True)
    assert [tokens(given, unit) for units in passes for unit in units] == [42, 42]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"sliding_window": 12, "model_type": "phimoe"}, "give --no_flash_attn"),
        ({"num_labels": 2}, "classifier of 2 labels"),
    ],
)
def test_models_that_cannot_be_scored_are_refused_before_their_weights_are_loaded(folders, tmp_path, model, reason):
    import json

    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["llama"], tmp_path / "odd")
    if "num_labels" in model:
        weights = load_file(folder / "model.safetensors") | {"score.weight": torch.zeros(2, 64)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | model
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=reason):
        check_scorer(ScorerOptions(pretrain=str(folder)))


def test_a_language_model_is_no_reward_model(folders, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig.from_pretrained(folders["llama"])).save_pretrained(tmp_path / "lm")
    with pytest.raises(InputError, match=r"--pretrain .*has no reward head"):
        check_scorer(ScorerOptions(pretrain=str(tmp_path / "lm")))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("my.py", True), ("some/where/my.py:best", True), ("package.module:best", True), ("my.py:", True),
        ("org/model", False), ("model", False), ("./model", False), ("org/model:", False),
    ],
)  # fmt: skip
def test_functions_are_told_from_models_by_their_name(name, function):
    assert is_function(name) is function


def test_a_folder_is_a_model_whatever_its_name(tmp_path):
    (tmp_path / "my.py").mkdir()
    assert not is_function(str(tmp_path / "my.py"))


@pytest.fixture
def scorer(tmp_path: Path):
    """A scorer of a function from source text."""

    def make(source: str, name: str = "", **options) -> Scorer:
        path = tmp_path / "my_rewards.py"
        path.write_text(textwrap.dedent(source))
        return make_scorer(ScorerOptions(pretrain=str(path) + name, **options))

    return make


GIVEN = [Answer(f"prompt {n}", f"response {n}", label=n, row={"number": n}) for n in range(5)]


def test_a_function_gets_the_arguments_that_it_names(scorer):
    assert scorer("def reward(responses): return [len(r) for r in responses]").score(GIVEN) == [10.0] * 5
    everything = """
        def best(**given):
            assert set(given) == {"prompts", "responses", "labels", "rows"}
            return [label + row["number"] + len(p) * 100 + len(r) * 10000
                    for p, r, label, row in zip(*(given[k] for k in ("prompts", "responses", "labels", "rows")))]
    """
    assert scorer(everything, ":best").score(GIVEN) == [100800.0 + 2 * n for n in range(5)]
    assert scorer("def reward(labels, bonus=1): return [label + bonus for label in labels]").score(GIVEN) == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip


def test_a_function_is_asked_about_a_batch_at_a_time_and_may_return_arrays_and_metrics(scorer):
    source = """
        import numpy as np
        def reward(responses, labels):
            return {"rewards": np.array(labels, dtype=np.float32), "asked": [len(responses)] * len(responses)}
    """
    judged = scorer(source, micro_batch_size=2).judge(GIVEN)
    assert judged.rewards == [0.0, 1.0, 2.0, 3.0, 4.0] and judged.metrics == {"asked": [2, 2, 2, 2, 1]}


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("[1.0] * 4", "returned 4 values as `rewards` for 5 responses"),
        ("[1.0] * 6", "returned 6 values"),
        ("None", "must return a list as `rewards`, got None"),
        ("1.0", "must return a list as `rewards`, got 1.0"),
        ("'11111'", "must return a list"),
        ("[1.0, 2.0, float('nan'), 0.0, 0.0]", "finite numbers, got nan for the response 'response 2' to 'prompt 2'"),
        ("[1.0, float('inf'), 0.0, 0.0, 0.0]", "finite numbers, got inf for the response 'response 1'"),
        ("[None] * 5", "finite numbers, got None"),
        ("['1'] * 5", "finite numbers, got '1'"),
        ("[1 + 2j] * 5", "finite numbers"),
        ("[10 ** 400] * 5", "finite numbers"),
        ("{'scores': [1.0] * 5}", "a dict without `rewards`, with `scores`"),
        ("{'rewards': [1.0] * 5, 'length': [1]}", "returned 1 values as `length`"),
    ],
)
def test_what_a_function_returns_is_checked(scorer, returned, reason):
    with pytest.raises(RunError, match=reason.replace("(", r"\(")):
        scorer(f"def reward(responses): return {returned}").score(GIVEN)


def test_a_function_that_exits_is_an_error_and_ends_nothing(scorer):
    with pytest.raises(RunError, match=r"my_rewards.py failed .*SystemExit: 0"):
        scorer("import sys\ndef reward(responses): sys.exit(0)").score(GIVEN)
    with pytest.raises(InputError, match=r"cannot be run: .*SystemExit"):
        scorer("raise SystemExit(0)")


def test_a_file_is_run_once_and_is_the_module_that_pickle_finds(scorer, tmp_path):
    source = f"""
        import pickle
        with open({str(tmp_path / "runs")!r}, "a") as runs:
            runs.write("x")
        def length(text):
            return len(text)
        def reward(responses):
            return [pickle.loads(pickle.dumps(length))(text) for text in responses]
    """
    made = scorer(source)
    check_scorer(ScorerOptions(pretrain=str(tmp_path / "my_rewards.py")))
    assert made.score(GIVEN) == [10.0] * 5 and (tmp_path / "runs").read_text() == "x"
    assert scorer(source + "        # changed").score(GIVEN) == [10.0] * 5
    assert (tmp_path / "runs").read_text() == "xx"


def test_an_error_in_a_function_is_reported_with_the_users_own_line(scorer):
    source = """
        import json

        def reward(responses):
            return [parsed(r) for r in responses]

        def parsed(text):
            return json.loads(text)["score"]
    """
    with pytest.raises(RunError, match=r"my_rewards.py failed in .*my_rewards.py, line 8: JSONDecodeError: Expecting"):
        scorer(source).score(GIVEN)


def test_a_function_that_needs_what_is_not_there_is_refused(tmp_path):
    """A server has no rows, a conversation neither rows nor labels."""
    path = tmp_path / "my_rewards.py"
    path.write_text("def reward(responses, rows): ...\n\ndef free(responses, rows=None, **more): ...")
    with pytest.raises(InputError, match=r"needs `rows`, which nobody gives it; .* any of prompts, responses, labels$"):
        check_scorer(ScorerOptions(pretrain=str(path), missing=("rows",)))
    check_scorer(ScorerOptions(pretrain=f"{path}:free", missing=("rows",)))
    check_scorer(ScorerOptions(pretrain=str(path)))


@pytest.mark.parametrize(
    ("source", "name", "reason"),
    [
        ("def best(responses): ...", "", "there is no function `reward` in .*my_rewards.py; it has best"),
        ("def reward(responses): ...", ":other", "there is no function `other` .*; it has reward"),
        ("reward = 3", "", "`reward` in .* is no function"),
        ("def reward(texts): ...", "", "takes none of its arguments; it is called by name with any of prompts"),
        ("def reward(responses, key): ...", "", "needs `key`, which nobody gives it"),
        ("def reward(responses, /): ...", "", "takes none of its arguments"),
        ("async def reward(responses): ...", "", "`async` and `yield` are not awaited"),
        ("def reward(responses): yield 1", "", "`async` and `yield` are not awaited"),
        ("import nothing_of_that_name", "", "cannot be run: .*line 1: ModuleNotFoundError"),
        ("def reward(:", "", "cannot be run: SyntaxError"),
    ],
)
def test_functions_that_cannot_be_called_are_refused_before_anything_else(scorer, source, name, reason):
    with pytest.raises(InputError, match=reason):
        scorer(source, name)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bf16": True}, "--bf16"), ({"flash_attn": False}, "--no_flash_attn"),
        ({"value_head_prefix": "score"}, "--value_head_prefix"), ({"reward_engine": "vllm"}, "--reward_engine vllm"),
        ({"normalize_reward": True}, "--normalize_reward"), ({"trust_remote_code": True}, "--trust_remote_code"),
    ],
)  # fmt: skip
def test_options_of_reward_models_are_refused_with_a_function(scorer, options, named):
    with pytest.raises(InputError, match=named):
        scorer("def reward(responses): return [0.0] * len(responses)", **options)


def test_missing_files_and_modules_are_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*gone.py"):
        check_scorer(ScorerOptions(pretrain=str(tmp_path / "gone.py")))
    with pytest.raises(InputError, match=r"the module nowhere\.at_all cannot be imported"):
        check_scorer(ScorerOptions(pretrain="nowhere.at_all:reward"))


def test_a_model_scorer_needs_token_ids_and_a_function_texts(folders, scorer):
    assert ModelScorer.needs_tokens
    assert not scorer("def reward(responses): return [0.0] * len(responses)").needs_tokens
