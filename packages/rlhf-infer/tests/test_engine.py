"""Generation with transformers: ids in, ids out, the reason of each end kept."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rlhf_infer.config import SamplingConfig
from rlhf_infer.engine import TransformersEngine

EOS = 3


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """Token by token, without cache or padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


PROMPTS = [[1, 5, 6], [1, 9], [1, 4, 4, 8, 12, 7], [1, 16]]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_greedy_answers_are_those_of_the_model_alone_whatever_the_batching(model, micro_batch_size):
    engine = TransformersEngine(model, [EOS], micro_batch_size)
    written = engine.generate(PROMPTS, SamplingConfig(max_new_tokens=9, greedy_sampling=True))
    assert [c.prompt for c in written] == [0, 1, 2, 3]
    assert [list(c.token_ids) for c in written] == [greedy(model, prompt, 9) for prompt in PROMPTS]
    for completion in written:
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == EOS else "length")
        assert EOS not in completion.token_ids[:-1]


def test_several_samples_per_prompt_and_the_same_seed_gives_the_same(model):
    engine = TransformersEngine(model, [EOS])
    sampling = SamplingConfig(max_new_tokens=6, best_of_n=3, temperature=2.0, seed=5)
    first, again = engine.generate(PROMPTS, sampling), engine.generate(PROMPTS, sampling)
    assert first == again
    assert [c.prompt for c in first] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({c.token_ids for c in first}) > 4
    assert engine.generate(PROMPTS, sampling.model_copy(update={"seed": 6})) != first


def test_an_end_of_text_ends_a_response_and_a_limit_cuts_it(model):
    engine = TransformersEngine(model, [EOS])
    assert engine._cut(2, [5, EOS, EOS]).token_ids == (5, EOS)
    assert engine._cut(2, [5, 6]).finish_reason == "length"


def test_importing_the_package_needs_no_engine():
    code = "import rlhf_infer.config, rlhf_infer.engine, sys; print([m for m in ('torch', 'vllm', 'transformers', 'ray') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() == "[]"
    )
