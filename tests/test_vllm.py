"""What we export is what vLLM serves, and vLLM writes what transformers writes: tokens, log-probabilities, ends, rewards."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_infer.config import SamplingConfig
from rlhf_infer.engines.engine import Completion, answer_all

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "models" / "stories260K"

SCRIPT = """
import dataclasses, json, sys
from transformers import AutoConfig
from rlhf_data.errors import InputError, RunError
from rlhf_data.options import build
from rlhf_data.tokenizer import load_tokenizer
from rlhf_infer.config import GenerateConfig, SamplingConfig
from rlhf_infer.engines.choose import check_engine, make_engine
from rlhf_infer.engines.engine import Request, answer_all

work, found = json.load(open(sys.argv[1])), {}

def engine_of(folder, **options):
    flat = {"pretrain": folder, "dataset": "rows.jsonl", "output_path": "out.jsonl", "engine": "vllm", "max_num_seqs": 32}
    config, architecture = build(GenerateConfig, flat | options), AutoConfig.from_pretrained(folder)
    check_engine(config, architecture)
    return make_engine(config, architecture, load_tokenizer(folder))

def plain(answers):
    return [[dataclasses.asdict(one) for one in some] for some in answers]

def refusal(act):
    try:
        act()
    except (InputError, RunError) as error:
        return str(error)

prompts, greedy = work["prompts"], SamplingConfig(max_new_tokens=8, greedy_sampling=True)
several = SamplingConfig(max_new_tokens=8, best_of_n=3, temperature=1.5, top_p=0.9, repetition_penalty=1.2)
single = several.model_copy(update={"best_of_n": 1})

engine = engine_of(work["policy"], prompt_max_len=20, max_new_tokens=100)
found["greedy"] = plain(answer_all(engine, prompts, greedy))
found["samples"] = plain(answer_all(engine, prompts, several))
found["again"] = plain(answer_all(engine, prompts, several))
found["other seed"] = plain(answer_all(engine, prompts, several, seed=1))
requests = [Request(prompts[0], one["seed"]) for one in found["samples"][0]]
found["one by one"] = plain(answer for _, answer in sorted(engine.generate(requests, single)))
# many times what vLLM takes in one step, and what it writes at the same time
answers = engine.generate([Request([*prompts[0], *[5] * 45], seed) for seed in range(200)], single)
found["many"] = sorted(number for number, _ in answers)
next(engine.generate([Request(prompt, 0) for prompt in prompts], greedy))
found["after one was left"] = plain(answer_all(engine, prompts, greedy))
full = work["context"] * [5]
found["at the end"] = plain(answer_all(engine, [full[:-3]], SamplingConfig(max_new_tokens=8)))
found["too long"] = refusal(lambda: answer_all(engine, [full], greedy))
found["after an error"] = plain(answer_all(engine, prompts, greedy))
engine.close()

engine = engine_of(work["policy"], enable_prefix_caching=True, max_num_seqs=4, prompt_max_len=20, max_new_tokens=100)
found["prefix caching"] = plain(answer_all(engine, prompts, several))
engine.close()
if "stories" in work:
    engine = engine_of(work["stories"], prompt_max_len=128, max_new_tokens=64)
    found["stories"] = plain(answer_all(engine, work["story prompts"], greedy.model_copy(update={"max_new_tokens": 64})))
    engine.close()
found["no model"] = refusal(lambda: engine_of(work["broken"]))

from vllm import LLM, TokensPrompt
judge = LLM(work["reward model"], runner="pooling", dtype="float32", enforce_eager=True, max_model_len=work["context"])
scored = judge.classify([TokensPrompt(prompt_token_ids=ids) for ids in work["samples"]], use_tqdm=False)
found["rewards"] = [output.outputs.probs[0] for output in scored]
print("RESULT", json.dumps(found))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A policy and a reward model that the quickstart trained, prompts, and samples to judge."""
    from rlhf_cli.quickstart import MAX_LEN, QuickstartConfig, make_inputs, train
    from rlhf_cli.quickstart_answers import encoder_of
    from rlhf_data.rows import Pair
    from rlhf_data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("quickstart")
    config = QuickstartConfig(rows=400, epochs=5)
    held_out = make_inputs(folder, config)[:8]
    train(folder, config)
    train(folder, config, "rm")
    encoder = encoder_of(load_tokenizer(str(folder / "sft")))
    prompts = encoder.prompts([Pair(row["question"], "") for row in held_out])
    samples = encoder.encode([Pair(row["question"], row["answer"]) for row in held_out])
    broken = folder / "broken"
    broken.mkdir()
    for path in (folder / "sft").glob("*.json"):
        text = path.read_text()
        (broken / path.name).write_text(text.replace("LlamaForCausalLM", "NobodysModel"))
    (broken / "model.safetensors").symlink_to(folder / "sft" / "model.safetensors")
    return {
        "policy": str(folder / "sft"),
        "reward model": str(folder / "rm"),
        "broken": str(broken),
        "context": MAX_LEN,
        "prompts": [prompt.ids for prompt in prompts],
        "samples": [sample.input_ids.tolist() for (sample,) in samples],
    } | stories()


def stories() -> dict[str, Any]:
    """A real model and prompts for it, where they are."""
    from rlhf_data.tokenizer import load_tokenizer

    if not STORIES.is_dir():
        return {}
    tokenizer = load_tokenizer(str(STORIES))
    lines = (SHARED / "data" / "story_prompts.jsonl").read_text().splitlines()[:32]
    return {
        "stories": str(STORIES),
        "story prompts": [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines],
    }


@pytest.fixture(scope="module")
def found(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM wrote, in one process of its own: starting it takes long."""
    work = tmp_path_factory.mktemp("work") / "work.json"
    work.write_text(json.dumps(models))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(work)],
        capture_output=True, text=True, timeout=360, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stdout[-500:] + done.stderr[-3000:]
    result = json.loads(lines[0].removeprefix("RESULT"))
    return {name: answers(value) if is_answers(value) else value for name, value in result.items()}


def is_answers(value: Any) -> bool:
    return isinstance(value, list) and isinstance(value[0], list)


def answers(value: list[list[dict[str, Any]]]) -> list[tuple[Completion, ...]]:
    """Responses to each prompt, out of JSON."""
    return [tuple(Completion(**one | {"token_ids": tuple(one["token_ids"])}) for one in some) for some in value]


def written(answers: list[tuple[Completion, ...]]) -> list[list[tuple[int, ...]]]:
    return [[one.token_ids for one in some] for some in answers]


def by_transformers(folder: str, prompts: list[list[int]], max_new_tokens: int) -> list[tuple[Completion, ...]]:
    """The same greedy answers from the other engine."""
    from rlhf_data.tokenizer import load_tokenizer
    from rlhf_infer.engines.engine import stop_ids
    from rlhf_infer.engines.transformers import TransformersEngine, load

    model = load(folder)
    engine = TransformersEngine(model, stop_ids(folder, model.config, load_tokenizer(folder)))
    return answer_all(engine, prompts, SamplingConfig(max_new_tokens=max_new_tokens, greedy_sampling=True))


def same(one: list[tuple[Completion, ...]], other: list[tuple[Completion, ...]]) -> None:
    """Tokens and ends are equal, log-probabilities to a thousandth."""
    assert written(one) == written(other)
    for (mine,), (theirs,) in zip(one, other, strict=True):
        assert mine.finish_reason == theirs.finish_reason and mine.logp == pytest.approx(theirs.logp, abs=1e-3)


def test_greedy_answers_of_an_exported_policy_are_those_of_transformers(models, found):
    ours = by_transformers(models["policy"], models["prompts"], 8)
    same(found["greedy"], ours)
    assert len(set(map(str, written(ours)))) > 1


@pytest.mark.real
def test_greedy_stories_are_those_of_transformers(models, found):
    if "stories" not in models:
        pytest.skip("../shared is not there")
    same(found["stories"], by_transformers(models["stories"], models["story prompts"], 64))


def test_log_probs_of_samples_are_the_models_own(models, found):
    """Before temperature, top_p and penalty: those of a plain forward pass."""
    import torch

    from rlhf_infer.engines.transformers import load

    model = load(models["policy"])
    for prompt, some in zip(models["prompts"], found["samples"], strict=True):
        for one in some:
            ids = torch.tensor([[*prompt, *one.token_ids]])
            with torch.no_grad():
                logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert one.logp == pytest.approx(float(logps.gather(1, ids[0, len(prompt) :, None]).sum()), abs=1e-3)


def test_prefix_caching_and_batch_size_change_nothing(found):
    assert written(found["prefix caching"]) == written(found["samples"])


def test_the_same_seed_gives_the_same_samples_and_another_one_others(found):
    assert found["again"] == found["samples"]
    assert written(found["other seed"]) != written(found["samples"])
    assert len({ids for some in written(found["samples"]) for ids in some}) > 12


def test_n_samples_of_one_request_are_n_requests_with_seeds_that_count_up(found):
    (first, *_), alone = found["samples"], found["one by one"]
    assert [one.seed for one in first] == [first[0].seed + k for k in range(3)]
    assert [one.token_ids for (one,) in alone] == [one.token_ids for one in first]


def test_every_request_is_answered_when_there_are_more_than_vllm_takes_at_once(found):
    assert found["many"] == list(range(200))


def test_answers_that_were_cut_off_are_marked(models, found):
    from rlhf_data.tokenizer import load_tokenizer

    eos = load_tokenizer(models["policy"]).eos_token_id
    every = [one for name in ("greedy", "samples", "other seed") for some in found[name] for one in some]
    for one in every:
        assert (one.finish_reason == "stop") == (one.token_ids[-1] == eos) and eos not in one.token_ids[:-1]
        assert one.finish_reason == "stop" or len(one.token_ids) == 8
    assert {one.finish_reason for one in every} == {"stop", "length"}
    ((last,),) = found["at the end"]
    assert len(last.token_ids) == 3 and last.finish_reason == "length"


def test_an_engine_goes_on_after_a_prompt_that_is_too_long_and_after_answers_nobody_waited_for(models, found):
    assert f"a prompt of {models['context']} tokens leaves no room" in found["too long"]
    assert found["after an error"] == found["after one was left"] == found["greedy"]


def test_a_model_that_vllm_does_not_know_is_an_error_in_one_line(found):
    assert found["no model"].startswith("vLLM does not start with --pretrain") and "\n" not in found["no model"]


def test_rewards_of_an_exported_reward_model_are_those_of_transformers(models, found):
    import torch
    from transformers import AutoModelForSequenceClassification

    reward_model = AutoModelForSequenceClassification.from_pretrained(models["reward model"]).eval()
    with torch.no_grad():
        rewards = [reward_model(torch.tensor([ids])).logits.item() for ids in models["samples"]]
    assert found["rewards"] == pytest.approx(rewards, abs=1e-4) and max(rewards) - min(rewards) > 1e-3
