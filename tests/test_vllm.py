"""What we export is what vLLM serves: the same greedy tokens as transformers, and the same rewards, from the same folders."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt
how = dict(dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4, disable_log_stats=True)
policy, reward_model = sys.argv[1:3]
prompts, samples = ([TokensPrompt(prompt_token_ids=ids) for ids in json.loads(given)] for given in sys.argv[3:5])
outputs = LLM(policy, **how).generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
written = [list(output.outputs[0].token_ids) for output in outputs]
scored = LLM(reward_model, runner="pooling", **how).classify(samples, use_tqdm=False)
print("RESULT", json.dumps([written, [output.outputs.probs[0] for output in scored]]))
"""


@pytest.mark.timeout(400)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_loads_trained_models_and_says_the_same(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf_cli.quickstart import QuickstartConfig, encoder_of, make_inputs, train
    from rlhf_data.rows import Pair
    from rlhf_data.tokenizer import load_tokenizer
    from rlhf_infer.config import SamplingConfig
    from rlhf_infer.engine import TransformersEngine

    config = QuickstartConfig(rows=400, epochs=1)
    held_out = make_inputs(tmp_path, config)[:4]
    train(tmp_path, config)
    train(tmp_path, config, "rm")
    tokenizer = load_tokenizer(str(tmp_path / "sft"))
    encoder = encoder_of(tokenizer)
    prompts = [encoder.prompt_ids(Pair(row["question"], "")) for row in held_out]
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(tmp_path / "sft").eval(), [tokenizer.eos_token_id])
    ours = engine.generate(prompts, SamplingConfig(max_new_tokens=8, greedy_sampling=True))
    encoded = encoder.encode([Pair(row["question"], row["answer"]) for row in held_out])
    samples = [sample.input_ids.tolist() for (sample,) in encoded]
    reward_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    with torch.no_grad():
        rewards = [reward_model(torch.tensor([ids])).logits.item() for ids in samples]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in ("sft", "rm")), *map(json.dumps, (prompts, samples))],
        capture_output=True, text=True, timeout=360, env=environment,
    )  # fmt: skip
    (line,) = [line for line in out.stdout.splitlines() if line.startswith("RESULT")] or [
        out.stdout[-500:] + out.stderr[-2000:]
    ]
    written, scored = json.loads(line.removeprefix("RESULT"))
    assert written == [list(completion.token_ids) for completion in ours]
    assert scored == pytest.approx(rewards, abs=1e-4) and max(rewards) - min(rewards) > 1e-3
