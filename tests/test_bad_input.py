"""Bad input: one message that says what is wrong, where, and the way out; the right exit code; nothing half-written.

Every case goes through the command line. Exit code 2 is the user's to mend, 1 is everything else.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Bench = Callable[..., Any]


def case(name: str, options: dict[str, Any] | Bench, *says: str, more: tuple[str, ...] = ()) -> Any:
    """A row of a table: options that differ from a good command's, and what the message must contain."""
    return pytest.param(options, more, says, id=name.replace(" ", "-"))


@pytest.fixture
def no_weight_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded before the input was refused")

    monkeypatch.setattr("rlhf_core.models.loader.load_model", refuse)


early = pytest.mark.usefixtures("no_weight_is_loaded")
"""Bad input is found before the slow part."""


def refused(answer: Any, says: tuple[str, ...], code: int = 2) -> None:
    """Check the exit code and the message: one block of `error:` lines that contains every phrase of `says`."""
    assert "Traceback" not in answer.err + answer.out
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert answer.code == code, answer.err
    assert len(errors) == 1, answer.err
    for phrase in says:
        assert phrase in errors[0], f"{phrase!r} is not in: {errors[0]}"


def untouched(save_path: Path) -> None:
    assert not save_path.exists(), f"written before the input was refused: {sorted(save_path.rglob('*'))}"


def no_model_in(save_path: Path) -> None:
    """A run that fails on its way may leave its record, but nothing that looks like a model, and no leftovers."""
    found = [path.name for path in save_path.rglob("*") if path.name.startswith((".writing-", ".rlhf-"))]
    found += [path.name for path in save_path.glob("*") if path.name not in ("run", "checkpoints")]
    assert not found


@pytest.fixture
def bench(tmp_path: Path, model: Callable[..., Path]) -> Bench:
    """What cases make their broken things with."""

    class Tools:
        tmp = tmp_path
        copy = staticmethod(model)

        @staticmethod
        def file(name: str, content: str | bytes) -> Path:
            path = tmp_path / name
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            return path

        @staticmethod
        def rows(*rows: Any, name: str = "rows.jsonl") -> Path:
            return Tools.file(name, "".join(json.dumps(row) + "\n" for row in rows))

    return Tools  # type: ignore[return-value]


OPTIONS = [
    case("misspelt flag", {}, "--max_lne", "did you mean --max_len?", more=("--max_lne", "3")),
    case("unknown flag", {}, "--xyzzy", "--help", more=("--xyzzy", "3")),
    case("flag without its value", {}, "--lora_rank", "requires an argument", more=("--lora_rank",)),
    case("switch with a value", {}, "--bf16", "does not take a value", more=("--bf16=maybe",)),
    case("argument that belongs nowhere", {}, "unexpected extra argument", "everything", more=("everything",)),
    case("no pretrain", {"pretrain": None}, "--pretrain is required"),
    case("no dataset", {"dataset": None}, "--dataset is required"),
    case("text for a number", {"max_len": "many"}, "--max_len", "integer", "'many'"),
    case("fraction for a whole number", {"train_batch_size": 2.5}, "--train_batch_size", "integer", "got 2.5"),
    case("zero epochs", {"max_epochs": 0}, "--max_epochs", "greater than or equal to 1", "'0'"),
    case("negative learning rate", {"learning_rate": -1e-3}, "--learning_rate", "greater than 0", "'-0.001'"),
    case("learning rate that is no number", {"learning_rate": "nan"}, "--learning_rate", "'nan'"),
    case("infinite norm", {"max_norm": "inf"}, "--max_norm", "'inf'"),
    case("dropout of one", {"lora_dropout": 1}, "--lora_dropout", "less than 1", "'1'"),
    case("stage four", {"zero_stage": 4}, "--zero_stage", "less than or equal to 3", "'4'"),
    case("adam beta above one", {}, "--adam_betas", "less than 1", "'1.5'", more=("--adam_betas", "0.9", "1.5")),
    case("adam beta that is text", {}, "--adam_betas", "number", "'high'", more=("--adam_betas", "0.9", "high")),
    case("one adam beta", {}, "--adam_betas", "requires 2", more=("--adam_betas", "0.9")),
    case("unknown scheduler", {"lr_scheduler": "cosin"}, "--lr_scheduler", "'cosin'", "'cosine'", "'linear'"),
    case("save every zero steps", {"save_steps": 0}, "--save_steps", "1 or more", "-1", "got '0'"),
    case("evaluate every zero steps", {"eval_steps": 0}, "--eval_steps", "1 or more", "-1", "got '0'"),
    case("log every zero steps", {"logging_steps": 0}, "--logging_steps", "1", "got '0'"),
    case(
        "template without a place",
        {"input_template": "User:"},
        "--input_template",
        "exactly once",
        "'User:'",
        'give "" to',
    ),
    case("template with two places", {"input_template": "{} {}"}, "--input_template", "exactly once", "'{} {}'"),
    case(
        "batch that does not divide",
        {"train_batch_size": 10},
        "--train_batch_size 10",
        "--micro_train_batch_size 4",
        "8 or 12",
    ),
    case(
        "batch below its part",
        {"train_batch_size": 3},
        "--train_batch_size 3",
        "--micro_train_batch_size 4",
        "nearest that is: 4",
    ),
    case("4 bits and nothing to train", {"load_in_4bit": True}, "--load_in_4bit", "set --lora_rank"),
    case(
        "4 bits split", {"load_in_4bit": True, "lora_rank": 4, "zero_stage": 3}, "--load_in_4bit", "use --zero_stage 2"
    ),
    case(
        "offload without sharding",
        {"adam_offload": True, "zero_stage": 0},
        "--adam_offload",
        "set --zero_stage 1, 2 or 3",
    ),
    case("zpg below stage 3", {"zpg": 2}, "--zpg 2", "--zero_stage 3"),
    case(
        "overlap without sharding",
        {"overlap_comm": True, "zero_stage": 0},
        "--overlap_comm",
        "set --zero_stage 1, 2 or 3",
    ),
    case("node past the last", {"num_nodes": 2, "node_rank": 2}, "--node_rank 2", "--num_nodes 2", "from 0"),
    case(
        "plain text as chat",
        {"pretrain_mode": True, "apply_chat_template": True},
        "--pretrain_mode",
        "--apply_chat_template",
    ),
    case("turns without a chat", {"multiturn": True}, "--multiturn", "--apply_chat_template"),
    case("row below its samples", {"packing_tokens": 64}, "--packing_tokens 64", "--max_len 96"),
    case("no room for a target", {"max_len": 1}, "--max_len 1", "at least 2"),
    case(
        "modules that are not there",
        {"lora_rank": 4, "target_modules": "q_prj"},
        "--target_modules q_prj",
        "q_proj",
        "down_proj",
    ),
    case("experts of a dense model", {"aux_loss_coef": 0.01}, "--aux_loss_coef 0.01", "llama", "leave it out"),
    case(
        "save path under a file", lambda b: {"save_path": b.file("taken", "") / "out"}, "--save_path", "taken is a file"
    ),
    case(
        "checkpoint path that is a file", lambda b: {"ckpt_path": b.file("taken", "")}, "--ckpt_path", "taken is a file"
    ),
    case(
        "save path that cannot be written",
        {"save_path": "/proc/nowhere/out"},
        "--save_path /proc/nowhere/out",
        "cannot write to /proc",
    ),
]

YAML = [
    case("misspelt key", "max_lne: 3\n", "run.yaml", "`max_lne`", "did you mean `max_len`?"),
    case("misspelt key in a group", "optim:\n  learning_rte: 3\n", "`learning_rte`", "did you mean `learning_rate`?"),
    case("a list", "- max_len\n", "run.yaml", "`option: value`", "list"),
    case("nothing", "", "run.yaml", "`option: value`"),
    case("syntax error", "max_len: [1\n", "--config", "run.yaml", "line 2"),
    case("wrong type", "max_epochs: [1, 2]\n", "--max_epochs", "[1, 2]"),
    case("out of bounds", "max_epochs: 0\n", "--max_epochs", "greater than or equal to 1"),
    case("not text", b"\xff\xfe\x00", "--config", "run.yaml"),
    case("group that holds no options", "optim: 3\n", "run.yaml", "optim"),
]


@early
@pytest.mark.parametrize(("options", "more", "says"), OPTIONS)
def test_options_that_cannot_work_are_refused(options, more, says, bench, sft, rlhf, tmp_path):
    given = options(bench) if callable(options) else options
    refused(rlhf(sft(*more, **given)), says)
    untouched(Path(given.get("save_path", tmp_path / "out")))


@early
@pytest.mark.parametrize(("content", "more", "says"), YAML)
def test_option_files_that_cannot_work_are_refused(content, more, says, bench, sft, rlhf, tmp_path):
    refused(rlhf(sft(config=bench.file("run.yaml", content), max_epochs=None)), says)
    untouched(tmp_path / "out")


@early
def test_an_option_file_that_is_not_there_is_refused(sft, rlhf, tmp_path):
    refused(rlhf(sft(config=tmp_path / "run.yaml")), ("--config", "no file", "run.yaml"))
    refused(rlhf(sft(config=tmp_path)), ("--config", str(tmp_path)))


@early
def test_every_problem_of_a_command_line_is_named_at_once(sft, rlhf):
    answer = rlhf(sft(pretrain=None, max_epochs=0, save_steps=0))
    assert answer.code == 2
    assert [line.split()[1].rstrip(":") for line in answer.err.splitlines()] == [
        "--pretrain",
        "--max_epochs",
        "--save_steps",
    ]


@early
def test_flags_win_over_the_option_file(bench, sft, rlhf):
    answer = rlhf(
        sft("--dry_run", config=bench.file("run.yaml", "train_batch_size: 7\nmax_epochs: 3\n"), max_epochs=None)
    )
    assert answer.code == 0, answer.err
    assert "3 epoch(s)" in answer.out and "8 samples =" in answer.out


GOOD = {"question": "Say red", "response": "red"}
CHAT = {"input_key": "messages", "output_key": None, "apply_chat_template": True}

DATA = [
    case(
        "malformed line",
        lambda b: {"dataset": b.file("d.jsonl", json.dumps(GOOD) + '\n{"question": "Say\n')},
        "d.jsonl:2",
        "not valid JSON",
    ),
    case(
        "line that is no object", lambda b: {"dataset": b.file("d.jsonl", "[1, 2]\n")}, "d.jsonl:1", "object", "[1, 2]"
    ),
    case(
        "not UTF-8", lambda b: {"dataset": b.file("d.jsonl", b'{"question": "\xe9"}\n')}, "d.jsonl:1", "UTF-8", "0xe9"
    ),
    case("empty file", lambda b: {"dataset": b.file("d.jsonl", "")}, "d.jsonl is empty"),
    case("empty array", lambda b: {"dataset": b.file("d.json", "[]")}, "d.json is empty"),
    case(
        "malformed array", lambda b: {"dataset": b.file("d.json", '[\n{"question": 1\n]')}, "d.json:3", "not valid JSON"
    ),
    case(
        "csv with a value too many",
        lambda b: {"dataset": b.file("d.csv", "question,response\na,b,c\n")},
        "d.csv:2",
        "2 columns",
    ),
    case(
        "parquet that is none",
        lambda b: {"dataset": b.file("d.parquet", b"PAR1 and then nothing")},
        "d.parquet",
        "cannot be read",
    ),
    case(
        "missing key",
        {"input_key": "qestion"},
        "train.jsonl:1",
        "--input_key qestion",
        "`question`, `response`",
        "did you mean `question`?",
    ),
    case("missing response key", {"output_key": "answer"}, "--output_key answer", "`question`, `response`"),
    case("key of the text alone", {"output_key": None}, "--input_key question", "--output_key", "--pretrain_mode"),
    case(
        "columns that say nothing",
        lambda b: {"dataset": b.rows({"a": "x", "b": "y"}), "input_key": None, "output_key": None},
        "`a`, `b`",
        "--input_key",
    ),
    case(
        "null prompts",
        lambda b: {"dataset": b.rows(*[GOOD | {"question": None}] * 3)},
        "none of 3 rows",
        "`question` is null",
        "rows.jsonl:1",
    ),
    case(
        "numbers for text",
        lambda b: {"dataset": b.rows(*[GOOD | {"response": 3.5}] * 3)},
        "none of 3 rows",
        "`response` is a number",
    ),
    case(
        "empty responses",
        lambda b: {"dataset": b.rows(*[GOOD | {"response": " "}] * 3)},
        "none of 3 rows",
        "`response` is empty",
    ),
    case(
        "empty list of messages",
        lambda b: CHAT | {"dataset": b.rows({"messages": []})},
        "`messages` is an empty list",
        "rows.jsonl:1",
    ),
    case(
        "messages without a role",
        lambda b: CHAT | {"dataset": b.rows({"messages": [{"content": "a"}]})},
        "a message of `messages` has no role",
    ),
    case(
        "messages that are no objects",
        lambda b: CHAT | {"dataset": b.rows({"messages": ["a"]})},
        "`messages` has text among its messages",
    ),
    case(
        "messages without a reply",
        lambda b: CHAT | {"dataset": b.rows({"messages": [{"role": "user", "content": "a"}]})},
        "no assistant turn",
    ),
    case(
        "chat rows without a template",
        lambda b: (
            CHAT
            | {
                "apply_chat_template": None,
                "dataset": b.rows(
                    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
                ),
            }
        ),
        "rows.jsonl:1",
        "give --apply_chat_template",
    ),
    case(
        "tokenizer without a chat template",
        lambda b: {"apply_chat_template": True, "pretrain": b.copy(without=("chat_template.jinja",))},
        "no chat template",
        "--tokenizer_chat_template",
    ),
    case(
        "chat template with a mistake",
        {"apply_chat_template": True, "tokenizer_chat_template": "{% for %}"},
        "not valid Jinja",
        "line 1",
    ),
    case(
        "chat template that is nowhere",
        {"tokenizer_chat_template": "nowhere.jinja"},
        "--tokenizer_chat_template 'nowhere.jinja'",
        "file",
    ),
    case("unknown split", {"train_split": "trian"}, "no split `trian`", "its splits: train"),
    case(
        "misspelt file",
        lambda b: {"dataset": b.rows(GOOD).with_name("row.jsonl")},
        "row.jsonl does not exist",
        "did you mean",
        "rows.jsonl?",
    ),
    case("file in no folder", lambda b: {"dataset": b.tmp / "nowhere/rows.jsonl"}, "does not exist", "no folder"),
    case(
        "file of another type",
        lambda b: {"dataset": b.file("rows.txt", "x")},
        "rows.txt",
        ".jsonl, .json, .csv, .parquet",
    ),
    case("folder without data", lambda b: {"dataset": b.tmp}, "holds no data files", ".jsonl"),
    case(
        "data set script",
        lambda b: {"dataset": b.file("load.py", "raise SystemExit(0)")},
        "load.py",
        "scripts are not run",
    ),
    case(
        "name that is empty", lambda b: {"dataset": f"{b.rows(GOOD)},"}, "--dataset", "empty data set", "single commas"
    ),
    case(
        "one probability for two",
        lambda b: {"dataset": f"{b.rows(GOOD)},{b.rows(GOOD)}", "dataset_probs": "1.0"},
        "--dataset_probs 1.0",
        "1 probabilities for 2 data sets",
    ),
    case("probabilities in words", {"dataset_probs": "half"}, "--dataset_probs 'half'", "such as 0.7,0.3"),
    case(
        "negative probability",
        lambda b: {"dataset": f"{b.rows(GOOD)},{b.rows(GOOD)}", "dataset_probs": "-0.5,1.5"},
        "--dataset_probs -0.5,1.5",
        "from 0 to 1",
    ),
    case(
        "probabilities of nothing",
        lambda b: {"dataset": f"{b.rows(GOOD)},{b.rows(GOOD)}", "dataset_probs": "0.2,0.2"},
        "sums to 0.4",
        "must sum to 1",
    ),
    case("prompts longer than the limit", {"max_len": 5}, "none of 26 rows", "prompt longer than --max_len"),
    case(
        "samples longer than the model",
        lambda b: {"dataset": b.rows(*[GOOD | {"response": "red " * 300}] * 3), "max_len": 512},
        "322 tokens",
        "takes 128",
        "set --max_len 128 or less",
    ),
    case(
        "a dropped row when none may be",
        lambda b: {"dataset": b.rows(GOOD, GOOD | {"response": None}), "strict_data": True},
        "rows.jsonl:2",
        "`response` is null",
        "--strict_data",
    ),
    case("cache that cannot be written", {"data_cache_dir": "/proc/nowhere"}, "/proc/nowhere", "--data_cache_dir"),
]


@early
@pytest.mark.parametrize(("options", "more", "says"), DATA)
def test_data_that_cannot_be_used_is_refused(options, more, says, bench, sft, rlhf, tmp_path):
    given = options(bench) if callable(options) else options
    refused(rlhf(sft(*more, **given)), says)
    untouched(tmp_path / "out")


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path.parent


def over(path: Path, content: bytes) -> Path:
    path.write_bytes(content + path.read_bytes()[len(content) :])
    return path.parent


def adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    return folder


def sharded(folder: Path) -> Path:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def with_tokens(folder: Path) -> Path:
    """Give the tokenizer more tokens than the model has."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    tokenizer.save_pretrained(folder)
    return folder


MODELS = [
    case("folder that is not there", lambda b: b.tmp / "model", "there is no such folder"),
    case("file", lambda b: b.file("model", ""), "model", "folder"),
    case("folder without config", lambda b: b.copy(without=("config.json",)), "no config.json"),
    case("config that is no JSON", lambda b: cut(b.copy() / "config.json", 50), "config.json is not valid JSON"),
    case("config that is a list", lambda b: over(b.copy() / "config.json", b"[]" + b" " * 2000), "config.json"),
    case("unknown architecture", lambda b: b.copy(config={"model_type": "lllama"}), "lllama"),
    case("no architecture", lambda b: b.copy(config={"model_type": None}), "model_type"),
    case("config with a word for a number", lambda b: b.copy(config={"hidden_size": "big"}), "hidden_size"),
    case("model of another kind", lambda b: b.copy(config={"model_type": "vit", "architectures": None}), "vit"),
    case("no weights", lambda b: b.copy(without=("model.safetensors",)), "no weights (*.safetensors)"),
    case("weights cut off", lambda b: cut(b.copy() / "model.safetensors", 100_000), "model.safetensors is damaged", "100000 bytes"),
    case("empty weights", lambda b: cut(b.copy() / "model.safetensors", 0), "model.safetensors", "not a readable safetensors file"),
    case("header of nonsense", lambda b: over(b.copy() / "model.safetensors", struct.pack("<Q", 64) + b"\xff" * 64), "model.safetensors", "not a readable"),
    case("header of another length", lambda b: over(b.copy() / "model.safetensors", struct.pack("<Q", 2**60)), "not a readable", "cut off"),
    case("missing shard", lambda b: sharded(b.copy()), "names model-00001-of-00002.safetensors", "not there"),
    case("index that is no JSON", lambda b: over(sharded(b.copy()) / "model.safetensors.index.json", b"{{"), "model.safetensors.index.json"),
    case("adapter", lambda b: adapter(b.copy()), "is an adapter", "merge it"),
    case("no tokenizer", lambda b: b.copy(without=("tokenizer.json", "tokenizer_config.json")), "no tokenizer", "it has no tokenizer files"),
    case("tokenizer of nonsense", lambda b: cut(b.copy() / "tokenizer.json", 300), "no tokenizer can be loaded", "tokenizer.json"),
    case("tokenizer without an end", lambda b: b.copy(tokenizer_config={"eos_token": None}), "no EOS token", '"eos_token"', "tokenizer_config.json"),
    case("tokenizer of a larger model", lambda b: with_tokens(b.copy()), "tokens and the model only"),
]  # fmt: skip


@early
@pytest.mark.parametrize(("folder", "more", "says"), MODELS)
def test_model_folders_that_cannot_be_used_are_refused(folder, more, says, bench, sft, rlhf, tmp_path):
    pretrain = folder(bench)
    refused(rlhf(sft(pretrain=pretrain)), (*says, str(pretrain)))
    untouched(tmp_path / "out")


PREFERRED = {"question": "Say red", "response": "red", "chosen": "red", "rejected": "blue", "margin": 1, "label": True}
TURNS = {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}  # fmt: skip
SHUFFLED = "uno dos tres cuatro cinco seis siete"


def learn(method: str, name: str, options: dict[str, Any] | Bench, *says: str) -> Any:
    """A row of a table: a method, options that differ from a good command's, and what the message must contain."""
    return pytest.param(method, options, says, id=f"{method}-{name.replace(' ', '-')}")


def unlike(*changes: dict[str, Any], **options: Any) -> Bench:
    """A data set of a good row and a row for each of `changes`."""
    return lambda b: {"dataset": b.rows(PREFERRED, *[PREFERRED | change for change in changes])} | options


def all_unlike(change: dict[str, Any], **options: Any) -> Bench:
    """A data set of three rows, all with the same fault."""
    return lambda b: {"dataset": b.rows(*[PREFERRED | change] * 3)} | options


def lacking(*columns: str, **options: Any) -> Bench:
    """A data set without these columns."""
    return lambda b: {"dataset": b.rows({k: v for k, v in PREFERRED.items() if k not in columns})} | options


def turns(**options: Any) -> Bench:
    """Pairs of whole conversations."""
    return lambda b: {"dataset": b.rows(TURNS), "prompt_key": None, "apply_chat_template": True} | options


def headed(folder: Path, *names: str, outputs: int = 1) -> Path:
    """Add heads to a model's weights."""
    import torch
    from safetensors.torch import load_file, save_file

    heads = {f"{name}.weight": torch.zeros(outputs, 64) for name in names}
    save_file(load_file(folder / "model.safetensors") | heads, folder / "model.safetensors", {"format": "pt"})
    return folder


def stranger(folder: Path) -> Path:
    """Make a model whose tokenizer learnt another language."""
    from rlhf_core.tiny import make_model, make_tokenizer

    make_model(make_tokenizer([SHUFFLED], folder, vocab_size=300), folder, hidden_size=32, layers=1)
    return folder


PAIRS = [
    learn("dpo", "misspelt chosen", {"chosen_key": "chosn"}, "preferred.jsonl:1: --chosen_key chosn: no key", "did you mean `chosen`?"),
    learn("rm", "misspelt rejected", {"rejected_key": "rejcted"}, "--rejected_key rejcted: no key", "did you mean `rejected`?"),
    learn("rm", "no rejected", lacking("rejected"), "rows.jsonl:1: --rejected_key rejected: no key", "`chosen`, `margin`, `label`"),
    learn("dpo", "misspelt prompt", {"prompt_key": "qestion"}, "--prompt_key qestion: no key", "did you mean `question`?"),
    learn("dpo", "no prompt", {"prompt_key": None}, "`chosen` holds no prompt before the response", "--prompt_key", "columns are `question`"),
    learn("dpo", "whole texts as chat", {"prompt_key": None, "apply_chat_template": True}, "preferred.jsonl:1", "--prompt_key"),
    learn("rm", "whole texts as chat", {"prompt_key": None, "apply_chat_template": True}, "whole texts", "--prompt_key, or leave them out"),
    learn("dpo", "numbers for text", all_unlike({"chosen": 3}), "none of 3 rows", "`chosen` is a number, not text", "rows.jsonl:1"),
    learn("rm", "null", all_unlike({"rejected": None}), "none of 3 rows", "`rejected` is null", "rows.jsonl:1"),
    learn("rm", "list of text", all_unlike({"rejected": ["a"]}), "`rejected` has text among its messages", "rows.jsonl:1"),
    learn("dpo", "empty response", all_unlike({"chosen": " "}), "`chosen` is empty", "rows.jsonl:1"),
    learn("rm", "both sides the same", all_unlike({"rejected": "red"}), "none of 3 rows", "chosen and rejected are the same (first:"),
    learn("dpo", "the same once cut", all_unlike({"chosen": "red " * 99 + "a", "rejected": "red " * 99 + "b"}, max_len=32), "are the same once cut at --max_len", "rows.jsonl:1"),
    learn("dpo", "prompts longer than the limit", {"max_len": 4}, "none of 26 rows", "prompt longer than --max_len"),
    learn("dpo", "one bad pair when none may be", unlike({"rejected": "red"}, strict_data=True), "rows.jsonl:2", "chosen and rejected are the same", "--strict_data"),
    learn("dpo", "chat without a template", turns(apply_chat_template=None), "rows.jsonl:1", "give --apply_chat_template"),
    learn("rm", "chat without a template", turns(apply_chat_template=None), "rows.jsonl:1", "give --apply_chat_template"),
    learn("dpo", "two prompts", lambda b: turns()(b) | {"dataset": b.rows(TURNS | {"rejected": [{"role": "user", "content": "x"}, TURNS["rejected"][1]]})}, "answer different prompts", "rows.jsonl:1"),
    learn("dpo", "another prompt than its column", lambda b: {"apply_chat_template": True, "dataset": b.rows({"question": "x"} | TURNS)}, "`chosen` begins with a user turn that is not `question`"),
    learn("rm", "rows of another method", lambda b: {"dataset": b.rows(GOOD)}, "--chosen_key chosen: no key", "`question`, `response`"),
    learn("rm", "misspelt margin", {"margin_loss": True, "margin_key": "magrin"}, "--margin_key magrin: no key", "did you mean `margin`?"),
    learn("rm", "no margin", lacking("margin", margin_loss=True), "rows.jsonl:1: --margin_key margin: no key"),
    learn("rm", "margin that is text", unlike({"margin": "much"}, margin_loss=True), "rows.jsonl:2: `margin` is 'much'", "finite number", "--margin_key"),
    learn("rm", "margin that is null", unlike({}, {"margin": None}, margin_loss=True), "rows.jsonl:3: `margin` is", "without --margin_loss"),
    learn("rm", "margin that is no number", unlike({"margin": float("nan")}, margin_loss=True), "rows.jsonl:2: `margin` is nan", "finite number"),
    learn("rm", "margin that is infinite", unlike({"margin": float("inf")}, margin_loss=True), "rows.jsonl:2: `margin` is inf", "finite number"),
    learn("rm", "margin that is true", unlike({"margin": True}, margin_loss=True), "rows.jsonl:2: `margin` is", "finite number"),
    learn("rm", "margin column for nothing", {"margin_key": "gap"}, "--margin_key gap is for --margin_loss"),
]  # fmt: skip

LABELS = [
    learn("kto", "misspelt label", {"label_key": "lable"}, "preferred.jsonl:1: --label_key lable: no key", "did you mean `label`?"),
    learn("kto", "no label", lacking("label"), "rows.jsonl:1: --label_key label: no key", "`question`, `response`"),
    learn("kto", "misspelt response", {"output_key": "respnse"}, "--output_key respnse: no key", "did you mean `response`?"),
    learn("kto", "two", unlike({"label": 2}), "rows.jsonl:2: `label` is 2", "true or false, or 1 or 0", "--label_threshold"),
    learn("kto", "a half", unlike({"label": 0.5}), "rows.jsonl:2: `label` is 0.5", "--label_threshold"),
    learn("kto", "a word", unlike({"label": "yes"}), "rows.jsonl:2: `label` is 'yes'", "true or false", "--label_key"),
    learn("kto", "null", unlike({}, {"label": None}), "rows.jsonl:3: `label` is", "true or false", "--label_key"),
    learn("kto", "a list", unlike({"label": [True]}), "rows.jsonl:2: `label` is [True]", "true or false"),
    learn("kto", "words beside a threshold", lambda b: {"label_threshold": 3, "dataset": b.rows(PREFERRED | {"label": "good"})}, "rows.jsonl:1: `label` is 'good'", "--label_threshold 3", "finite number"),
    learn("kto", "truths beside a threshold", {"label_threshold": 0.5}, "preferred.jsonl:1: `label` is", "true or false need no threshold"),
    learn("kto", "a threshold in words", {"label_threshold": "high"}, "--label_threshold", "number", "'high'"),
    learn("kto", "chat without a template", lambda b: {"dataset": b.rows({"messages": TURNS["chosen"], "label": True}), "input_key": "messages", "output_key": None}, "rows.jsonl:1", "give --apply_chat_template"),
    learn("kto", "rows of pairs", lambda b: {"dataset": b.rows({"prompt": "a", "chosen": "b", "rejected": "c"}), "input_key": None, "output_key": None}, "--label_key label: no key", "`prompt`, `chosen`, `rejected`"),
]  # fmt: skip

CONTRADICTIONS = [
    learn("dpo", "shared prompts of padded rows", {"share_prefix": True}, "--share_prefix", "--flash_attn or --packing_samples"),
    learn("rm", "shared prompts of padded rows", {"share_prefix": True}, "--share_prefix", "--flash_attn or --packing_samples"),
    learn("dpo", "ipo and another loss", {"ipo": True, "loss_type": "hinge"}, "--ipo and --loss_type hinge", "one of them"),
    learn("dpo", "smoothing for ipo", {"ipo": True, "label_smoothing": 0.1}, "--label_smoothing 0.1", "ipo", "leave it out"),
    learn("dpo", "smoothing for hinge", {"loss_type": "hinge", "label_smoothing": 0.1}, "--label_smoothing 0.1", "hinge"),
    learn("dpo", "smoothing for simpo", {"loss_type": "simpo", "label_smoothing": 0.1}, "--label_smoothing 0.1", "simpo"),
    learn("dpo", "labels that say nothing", {"label_smoothing": 0.5}, "--label_smoothing", "less than 0.5", "'0.5'"),
    learn("dpo", "robust to nothing", {"loss_type": "robust"}, "--loss_type robust needs --label_smoothing", "e.g. 0.1"),
    learn("dpo", "gamma without simpo", {"simpo_gamma": 1}, "--simpo_gamma 1", "--loss_type simpo, not dpo"),
    learn("dpo", "nll twice", {"loss_type": "orpo", "nll_loss_coef": 0.1}, "--nll_loss_coef", "orpo", "leave the option out"),
    learn("dpo", "reference of simpo", {"loss_type": "simpo", "ref_pretrain": "x", "ref_offload": True}, "--ref_pretrain and --ref_offload", "simpo has no reference"),
    learn("dpo", "computed reference of orpo", {"loss_type": "orpo", "precompute_ref": True}, "--precompute_ref", "orpo has no reference"),
    learn("dpo", "computed and offloaded", {"precompute_ref": True, "ref_offload": True}, "--ref_offload", "--precompute_ref", "one of them"),
    learn("dpo", "adapter and offloaded", {"lora_rank": 4, "ref_offload": True}, "--ref_offload", "LoRA", "nothing to offload"),
    learn("kto", "adapter and offloaded", {"lora_rank": 4, "ref_offload": True}, "--ref_offload", "LoRA", "nothing to offload"),
    learn("dpo", "row below its pair", {"packing_samples": True, "packing_tokens": 100}, "--packing_tokens 100", "2 times --max_len 96", "a pair of that length"),
    learn("rm", "row below its pair", {"packing_samples": True, "packing_tokens": 191}, "--packing_tokens 191", "2 times --max_len 96"),
    learn("kto", "row below its sample", {"packing_samples": True, "packing_tokens": 95}, "--packing_tokens 95", "less than --max_len 96"),
    learn("kto", "nothing to compare with", {"train_batch_size": 1, "micro_train_batch_size": 1}, "--train_batch_size 1", "at least 2"),
    learn("dpo", "negative beta", {"beta": -0.1}, "--beta", "greater than 0", "'-0.1'"),
    learn("kto", "zero beta", {"beta": 0}, "--beta", "greater than 0", "'0'"),
    learn("kto", "zero weight", {"desirable_loss_weight": 0}, "--desirable_loss_weight", "greater than 0"),
    learn("dpo", "unknown loss", {"loss_type": "simp"}, "--loss_type", "'simp'", "'simpo'"),
    learn("rm", "unknown loss", {"loss": "sigmod"}, "--loss", "'sigmod'", "'sigmoid'"),
    learn("kd", "unknown loss", {"kd_loss": "forwardkl"}, "--kd_loss", "'forwardkl'", "'forward_kl'"),
    learn("rm", "option of another method", {"input_key": "question"}, "no option --input_key", "did you mean --prompt_key?"),
    learn("kto", "option of another method", {"precompute_ref": True}, "--precompute_ref", "--help"),
    learn("kd", "no teacher", {"teacher_model": None}, "--teacher_model is required"),
    learn("kd", "no use of the teacher", {"kd_coef": 0}, "--kd_coef 0", "rlhf train sft"),
    learn("kd", "more than all of the teacher", {"kd_coef": 2}, "--kd_coef", "less than or equal to 1", "'2'"),
    learn("kd", "beta without jsd", {"kd_beta": 0.5}, "--kd_beta is for --kd_loss jsd, not forward_kl"),
    learn("kd", "alpha without skew", {"kd_alpha": 0.5, "kd_loss": "jsd"}, "--kd_alpha is for --kd_loss skew_kl, not jsd"),
    learn("kd", "beta of one", {"kd_beta": 1, "kd_loss": "jsd"}, "--kd_beta", "less than 1", "'1'"),
    learn("kd", "no temperature", {"kd_temperature": 0}, "--kd_temperature", "greater than 0"),
    learn("kd", "cache of another loss", {"cache_teacher": True, "kd_loss": "reverse_kl"}, "--cache_teacher", "reverse_kl", "use --kd_loss forward_kl"),
    learn("kd", "cache of new responses", {"cache_teacher": True, "on_policy_fraction": 0.5}, "--on_policy_fraction", "--cache_teacher", "one of them"),
    learn("kd", "cached and offloaded", {"cache_teacher": True, "teacher_offload": True}, "--teacher_offload", "--cache_teacher", "one of them"),
    learn("kd", "top tokens of no cache", {"teacher_top_k": 4}, "--teacher_top_k is for --cache_teacher"),
    learn("kd", "length of no responses", {"generate_max_len": 4}, "--generate_max_len", "set --on_policy_fraction"),
    learn("kd", "temperature of no responses", {"on_policy_temperature": 0.7}, "--on_policy_temperature", "set --on_policy_fraction"),
    learn("kd", "responses to no prompts", {"on_policy_fraction": 0.5, "pretrain_mode": True}, "--on_policy_fraction", "--pretrain_mode has none"),
]  # fmt: skip

OTHER_MODELS = [
    learn("dpo", "no such reference", lambda b: {"ref_pretrain": b.tmp / "model"}, "--ref_pretrain", "there is no such folder"),
    learn("kto", "reference without weights", lambda b: {"ref_pretrain": b.copy(without=("model.safetensors",))}, "--ref_pretrain", "no weights (*.safetensors)"),
    learn("dpo", "reference cut off", lambda b: {"ref_pretrain": cut(b.copy() / "model.safetensors", 100_000)}, "--ref_pretrain", "is damaged", "100000 bytes"),
    learn("kto", "adapter as reference", lambda b: {"ref_pretrain": adapter(b.copy())}, "--ref_pretrain", "is an adapter", "rlhf merge"),
    learn("dpo", "reference of a short context", lambda b: {"ref_pretrain": b.copy(config={"max_position_embeddings": 8})}, "takes 8: set --max_len 8 or less"),
    learn("kd", "no such teacher", lambda b: {"teacher_model": b.tmp / "model"}, "--teacher_model", "folder"),
    learn("kd", "teacher without weights", lambda b: {"teacher_model": b.copy(without=("model.safetensors",))}, "--teacher_model", "no weights (*.safetensors)"),
    learn("kd", "teacher cut off", lambda b: {"teacher_model": cut(b.copy() / "model.safetensors", 100_000)}, "--teacher_model", "is damaged", "100000 bytes"),
    learn("kd", "adapter as teacher", lambda b: {"teacher_model": adapter(b.copy())}, "--teacher_model", "is an adapter", "rlhf merge"),
    learn("kd", "teacher of a short context", lambda b: {"teacher_model": b.copy(config={"max_position_embeddings": 8})}, "takes 8: set --max_len 8 or less"),
    learn("kd", "teacher without a tokenizer", lambda b: {"teacher_model": b.copy(without=("tokenizer.json", "tokenizer_config.json"))}, "--teacher_model: no tokenizer can be loaded", "it has no tokenizer files"),
    learn("kd", "teacher of another language", lambda b: {"teacher_model": stranger(b.tmp / "model")}, "--teacher_model", "has another vocabulary than --pretrain", "tokens differ, the first being"),
    learn("kd", "teacher of fewer tokens", lambda b: {"pretrain": with_tokens(b.copy(config={"vocab_size": 329}))}, "--teacher_model", "does not know 9 tokens", "'<0>'"),
    learn("rm", "classifier", lambda b: {"pretrain": headed(b.copy(), "score", outputs=2)}, "--pretrain", "classifier of 2 labels"),
    learn("rm", "another head", lambda b: {"pretrain": headed(b.copy(), "score"), "value_head_prefix": "value_head"}, "--value_head_prefix value_head", "has another head: score"),
    learn("rm", "two heads", lambda b: {"pretrain": headed(b.copy(), "v_head", "value_head")}, "has these heads: v_head, value_head", "--value_head_prefix"),
    learn("rm", "no sequence classification", lambda b: {"pretrain": b.copy(config={"model_type": "bamba", "architectures": None})}, "--pretrain", "(bamba) is no sequence classification model"),
]  # fmt: skip


@early
@pytest.mark.parametrize(("method", "options", "says"), [*PAIRS, *LABELS, *CONTRADICTIONS, *OTHER_MODELS])
def test_what_no_method_can_learn_from_is_refused(method, options, says, bench, train, rlhf, tmp_path):
    refused(rlhf(train(method, **(options(bench) if callable(options) else options))), says)
    untouched(tmp_path / "out")


@early
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_reference_of_another_language_is_refused(method, train, rlhf, tmp_path):
    refused(rlhf(train(method, ref_pretrain=stranger(tmp_path / "model"))), ("--ref_pretrain", "vocabulary"))
    untouched(tmp_path / "out")


def test_a_new_head_has_the_name_that_transformers_looks_for(train, rlhf, tmp_path):
    """`--value_head_prefix` names the head of a checkpoint; where there is none, the log says that a new one is made."""
    from safetensors import safe_open

    answer = rlhf(train("rm", value_head_prefix="value_head"))
    assert answer.code == 0 and "head: a new one, saved as `score`" in answer.out, answer.err
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as weights:
        assert [name for name in weights.keys() if "head" in name or "score" in name] == ["score.weight"]  # noqa: SIM118


def test_labels_and_margins_may_be_written_as_text(bench, train, rlhf):
    """All that a CSV file holds is text."""
    table = bench.file(
        "d.csv", "question,response,chosen,rejected,margin,label\nSay a,a,a,b,0.5,TRUE\nSay b,b,b,c,1e-1,0\n"
    )
    for method, options in (("rm", {"margin_loss": True}), ("kto", {})):
        answer = rlhf(train(method, "--dry_run", dataset=table, **options))
        assert answer.code == 0 and "2 of 2 rows kept" in answer.out, answer.err


@early
def test_a_missing_model_or_data_set_of_the_hub_is_refused(sft, rlhf, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    refused(rlhf(sft(pretrain="nobody/nothing")), ("--pretrain nobody/nothing",))
    refused(rlhf(sft(dataset="nobody/nothing")), ("nobody/nothing", "Hub", "does not start with ./"))
    untouched(tmp_path / "out")


@early
def test_commands_that_are_misspelt_are_answered_with_the_nearest(rlhf):
    refused(rlhf(["trian", "sft"]), ("'trian'", "'train'"))
    refused(rlhf(["train", "stf"]), ("'stf'", "'sft'"))


@early
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_save_path_without_permission_is_refused(sft, rlhf, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(rlhf(sft(save_path=tmp_path / "locked/out")), ("--save_path", "Permission denied"))


@early
def test_more_ranks_than_gpus_are_refused(sft, rlhf, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    refused(rlhf(sft(num_procs=2)), ("--num_procs 2", "1 GPU"))


@early
def test_debug_shows_where_an_error_came_from(sft, rlhf, capfd, monkeypatch):
    from rlhf_data.errors import InputError

    with pytest.raises(InputError, match="no split `trian`"):
        rlhf(sft(train_split="trian", debug=True))


@early
def test_an_error_that_is_not_the_users_has_exit_code_1_and_points_to_debug(sft, rlhf):
    refused(rlhf(sft()), ("AssertionError: weights were loaded", "--debug"), code=1)


def test_rows_that_are_dropped_are_counted_and_the_rest_is_trained(bench, sft, rlhf, tmp_path):
    answer = rlhf(sft(dataset=bench.rows(*[GOOD] * 8, GOOD | {"response": None}), eval_ratio=0))
    assert answer.code == 0, answer.err
    assert "8 of 9 rows kept" in answer.out and "dropped 1: `response` is null (first: " in answer.out
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_tokenizer_without_a_pad_token_is_as_good_as_any(tiny, sft, rlhf, tmp_path):
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tiny).pad_token is None
    answer = rlhf(sft())
    assert answer.code == 0, answer.err
    assert (tmp_path / "out/model.safetensors").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token is None


def test_weights_that_do_not_fit_their_config_are_refused(model, sft, rlhf, tmp_path):
    refused(
        rlhf(sft(pretrain=model(config={"intermediate_size": 64}))),
        (str(tmp_path / "model"), "mlp.down_proj.weight is [64, 192] in the files and [64, 64]"),
    )
    no_model_in(tmp_path / "out")


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_that_lack_a_layer_are_refused(stage, model, sft, rlhf, tmp_path):
    refused(
        rlhf(sft(pretrain=model(config={"num_hidden_layers": 3}), zero_stage=stage)),
        (str(tmp_path / "model"), "layers.2"),
    )
    no_model_in(tmp_path / "out")


def test_a_checkpoint_of_another_run_is_refused(sft, rlhf, tmp_path):
    assert rlhf(sft(save_steps=2, seed=1)).code == 0
    before = (tmp_path / "out/run/metrics.jsonl").read_bytes()
    answer = rlhf(sft(save_steps=2, seed=2, load_checkpoint=True))
    refused(answer, ("--load_checkpoint", "another run", "seed was 1 and is 2"))
    assert (tmp_path / "out/run/metrics.jsonl").read_bytes() == before


def test_checkpoints_that_are_all_damaged_are_refused(sft, rlhf, tmp_path):
    assert rlhf(sft(save_steps=2)).code == 0
    for manifest in (tmp_path / "out/checkpoints").glob("*/manifest.json"):
        manifest.write_text("{")
    refused(rlhf(sft(load_checkpoint=True)), ("every checkpoint in", str(tmp_path / "out/checkpoints"), "remove them"))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(sft, rlhf, tmp_path):
    answer = rlhf(sft(learning_rate=1e30, max_norm=0, lr_warmup_ratio=0))
    refused(answer, ("optimizer step 2", "learning rate"), code=1)
    no_model_in(tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"save_steps": 2}], ids=["final-model", "checkpoint"])
def test_a_disk_that_is_full_leaves_nothing_half_written(options, start, finish, sft, tmp_path, monkeypatch):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # the model has 500 kB

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: popen(*a, **k, preexec_fn=small_files))
    answer = finish(start([sys.executable, "-m", "rlhf_cli", *sft(**options)]), 120)
    refused(
        answer, (str(tmp_path / "out"), "could not be written", "checkpoint" if options else "File too large"), code=1
    )
    no_model_in(tmp_path / "out")
