"""What we export is what vLLM serves: the same greedy tokens as transformers, from the same folder."""

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
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4, disable_log_stats=True)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(sys.argv[2])]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
print("RESULT", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.timeout(400)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_loads_a_trained_model_and_says_the_same(tmp_path):
    from transformers import AutoModelForCausalLM

    from rlhf_cli.quickstart import TEMPLATE, QuickstartConfig, make_inputs, train
    from rlhf_data.encode import EncodeOptions, Encoder
    from rlhf_data.rows import Pair
    from rlhf_data.tokenizer import load_tokenizer
    from rlhf_infer.config import SamplingConfig
    from rlhf_infer.engine import TransformersEngine

    config = QuickstartConfig(rows=400, epochs=1)
    held_out = make_inputs(tmp_path, config)[:4]
    train(tmp_path, config)
    folder = tmp_path / "sft"
    tokenizer = load_tokenizer(str(folder))
    encoder = Encoder(tokenizer, EncodeOptions(max_len=64, input_template=TEMPLATE))
    prompts = [encoder.prompt_ids(Pair(row["question"], "")) for row in held_out]
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(folder).eval(), [tokenizer.eos_token_id])
    ours = engine.generate(prompts, SamplingConfig(max_new_tokens=8, greedy_sampling=True))
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(prompts)],
        capture_output=True, text=True, timeout=360, env=environment,
    )  # fmt: skip
    (line,) = [line for line in out.stdout.splitlines() if line.startswith("RESULT")] or [
        out.stdout[-500:] + out.stderr[-2000:]
    ]
    assert json.loads(line.removeprefix("RESULT")) == [list(completion.token_ids) for completion in ours]
