"""Speed and memory of batch inference.

    python benchmarks/inference.py generate   VLLMEngine beside a bare `vllm.LLM.generate`, the same requests, one process
    python benchmarks/inference.py score      rlhf_infer's scorer beside a loop of transformers: padded, in arrival order
    python benchmarks/inference.py memory     `rlhf generate` over a million prompts, with an engine that only counts

`generate` and `score` run both sides in turn, several times, start-up apart, and take the ratio round by round. Without
`--model` and `--data` they make a random model of 15 M parameters (vocabulary 32 000), and prompts or responses of log-normal
lengths; with them, any model, and JSON lines with `prompt` (and for `score` `chosen` and `rejected`, of which responses to the
same prompt follow each other).
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import FIRST_WORD, make_model, text

MAX_LEN = 512


def rounds(count: int, sides: dict[str, Callable[[], int]], unit: str) -> None:
    """Run the sides in turn, the order changing, and print what each does per second and the ratios of the first to the second."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()  # not counted
    for number in range(count):
        for name in sorted(sides, reverse=bool(number % 2)):
            start = time.perf_counter()
            done = sides[name]()
            speeds[name].append(done / (time.perf_counter() - start))
    ours, other = speeds.values()
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    for name, values in speeds.items():
        print(f"{name:34}{median(values):12,.1f} {unit} per second")
    print(f"{'ratio':34}{median(ratios):12.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})", flush=True)


def inputs(options: argparse.Namespace, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """The model and the rows: those that were named, or made ones."""
    import numpy as np

    if options.data:
        rows = [json.loads(line) for line in options.data.read_text().splitlines()][: options.rows]
        return str(options.model or folder), rows
    make_model(folder, vocabulary=32_000, max_len=MAX_LEN)
    rng = np.random.default_rng(0)

    def words(mean: float) -> str:
        length = int(np.clip(rng.lognormal(np.log(mean), 0.6), 4, MAX_LEN // 2 - 1))
        return text(rng.integers(FIRST_WORD, 32_000, length))

    rows = [{"prompt": words(60), **{f"response{n}": words(80) for n in range(4)}} for _ in range(options.rows)]
    return str(options.model or folder), rows


def generate(options: argparse.Namespace, folder: Path) -> None:
    """Beside bare vLLM, with the same sampling parameters."""
    from transformers import AutoConfig

    from rlhf_data.tokenizer import load_tokenizer
    from rlhf_infer.config import EngineConfig, InferenceModelConfig, SamplingConfig
    from rlhf_infer.engines.engine import answer_all, sample_seed, stop_ids
    from rlhf_infer.engines.vllm import VLLMEngine

    model, rows = inputs(options, folder)
    tokenizer = load_tokenizer(model)
    ends = stop_ids(model, AutoConfig.from_pretrained(model), tokenizer)
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    engine = VLLMEngine(InferenceModelConfig(pretrain=model), EngineConfig(max_num_seqs=options.max_num_seqs), ends)
    from vllm import SamplingParams, TokensPrompt

    shared: dict[str, Any] = {
        "max_tokens": options.max_new_tokens, "stop_token_ids": list(ends), "ignore_eos": True, "logprobs": 0,
        "flat_logprobs": True, "detokenize": False,
    }  # fmt: skip

    def bare() -> int:
        how = [SamplingParams(seed=sample_seed(0, number), **shared) for number in range(len(prompts))]
        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        return sum(len(one.outputs[0].token_ids) for one in engine.llm.generate(asked, how, use_tqdm=False))

    def ours() -> int:
        sampling = SamplingConfig(max_new_tokens=options.max_new_tokens)
        return sum(len(answers[0].token_ids) for answers in answer_all(engine, prompts, sampling))

    print(f"{len(prompts)} prompts, at most {options.max_new_tokens} new tokens, {options.max_num_seqs} at a time")
    rounds(options.repeats, {"rlhf": ours, "bare vllm.LLM.generate": bare}, "tokens")
    engine.close()


def score(options: argparse.Namespace, folder: Path) -> None:
    """Beside `AutoModelForSequenceClassification` called on padded batches in the order in which samples come."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlhf_data.encode import EncodeOptions, Encoder
    from rlhf_data.rows import Pair, RowError
    from rlhf_data.tokenizer import load_tokenizer
    from rlhf_infer.rewards.scorer import Answer, ScorerOptions, make_scorer

    name, rows = inputs(options, folder)
    tokenizer = load_tokenizer(name)
    reward_model = folder / "reward"
    loaded = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, problem_type="regression", pad_token_id=tokenizer.pad_token_id or 0
    )
    loaded.eval().save_pretrained(reward_model)
    tokenizer.save_pretrained(reward_model)
    pairs = [Pair(row["prompt"], response) for row in rows for key, response in row.items() if is_response(key)]
    encoded = Encoder(tokenizer, EncodeOptions(max_len=MAX_LEN)).encode(pairs)
    samples = [one[0] for one in encoded if not isinstance(one, RowError)]
    answers = [Answer("", "", sample=sample) for sample in samples]
    scorer = make_scorer(ScorerOptions(pretrain=str(reward_model), micro_batch_size=options.batch))

    def padded() -> list[float]:
        rewards: list[float] = []
        for start in range(0, len(samples), options.batch):
            ids = [torch.from_numpy(sample.input_ids).long() for sample in samples[start : start + options.batch]]
            mask = [torch.ones_like(row) for row in ids]
            batch, attended = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (ids, mask))
            with torch.inference_mode():
                out = loaded.base_model(input_ids=batch, attention_mask=attended).last_hidden_state
                last = out[torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in ids])]
                rewards += loaded.score(last)[:, 0].tolist()
        return rewards

    def ours() -> list[float]:
        window = 32 * options.batch
        return [
            reward
            for start in range(0, len(answers), window)
            for reward in scorer.score(answers[start : start + window])
        ]

    furthest = max(abs(a - b) for a, b in zip(ours(), padded(), strict=True))
    tokens = sum(map(len, samples))
    print(
        f"{len(samples)} samples of {tokens / len(samples):.0f} tokens, batches of {options.batch}; rewards differ by {furthest:.1g}"
    )
    rounds(options.repeats, {"rlhf": lambda: len(ours()), "transformers, padded": lambda: len(padded())}, "rows")


def is_response(key: str) -> bool:
    return key in ("chosen", "rejected") or key.startswith("response")


def memory(options: argparse.Namespace, folder: Path) -> None:
    """All of `rlhf generate` but the model: reading, encoding, ordering, writing; resident memory as it goes on."""
    from rlhf_infer import generate as job
    from rlhf_infer.engines import choose

    make_model(folder, vocabulary=1000, max_len=64)
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(options.rows):
            file.write(
                json.dumps({"prompt": text([FIRST_WORD + number % 900, FIRST_WORD + number // 900 % 900])}) + "\n"
            )
    counting = Counting(max(1, options.rows // 10))
    choose.make_engine = lambda *_: counting  # type: ignore[assignment]
    start = time.perf_counter()
    job(
        pretrain=str(folder), dataset=str(folder / "prompts.jsonl"), input_key="prompt", engine="transformers",
        output_path=str(folder / "out.jsonl"), max_new_tokens=4,
    )  # fmt: skip
    print(f"{options.rows / (time.perf_counter() - start):,.0f} prompts per second")
    print("resident memory in MB: " + ", ".join(f"{size / 1e6:,.0f}" for size in counting.sizes))


class Counting:
    """An engine that answers every prompt with the same token, a window of 512 requests at a time, the last one first."""

    def __init__(self, every: int) -> None:
        self.every, self.sizes = every, list[float]()

    def generate(self, requests: Iterator[Any], sampling: Any) -> Iterator[tuple[int, Sequence[Any]]]:
        from rlhf_infer.engines.engine import Completion

        waiting: list[tuple[int, Any]] = []
        for number, request in enumerate(requests):
            if number % self.every == 0:
                self.sizes.append(resident())
            waiting.append((number, request))
            if len(waiting) == 512:
                yield from ((n, (Completion((5,), "length", -1.0, r.seed),)) for n, r in reversed(waiting))
                waiting = []
        yield from ((n, (Completion((5,), "length", -1.0, r.seed),)) for n, r in reversed(waiting))
        self.sizes.append(resident())

    def close(self) -> None:
        """Nothing to give back."""


def resident() -> float:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["generate", "score", "memory"])
    parser.add_argument("--model", type=str, help="a language model; `score` gives it a random head")
    parser.add_argument("--data", type=Path, help="JSON lines")
    parser.add_argument("--rows", type=int, help="rows to take; by default 256, a million for `memory`")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds")
    parser.add_argument("--batch", type=int, default=16, help="samples in a forward pass")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--max_num_seqs", type=int, default=256)
    options = parser.parse_args()
    options.rows = options.rows or (1_000_000 if options.what == "memory" else 256)
    from rlhf_core.libraries import settle

    settle()
    with tempfile.TemporaryDirectory() as name:
        {"generate": generate, "score": score, "memory": memory}[options.what](options, Path(name))


if __name__ == "__main__":
    main()
