"""Tiny tokenizers of every kind that matters, made on the spot, and a fresh cache for every test."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a typo in a test must not wait for the network

import pytest

from rlhf_data.config import DataConfig, SFTDataConfig

CORPUS = [
    "User: where is the cat?\nAssistant: the cat sat on the mat.",
    "User: what is the time?\nAssistant: it is the time of the cat.",
    "the cat sat on the mat and the dog sat on the cat. ünïcode too",
] * 20

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _byte_level(add_prefix_space: bool = False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _sentencepiece_like(kind: str):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = sorted(set("".join(CORPUS)) | {"▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, max_token_length=8, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for line in CORPUS for word in line.split()})
    vocab = {word: number for number, word in enumerate(["<unk>", *SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    return backend


BACKENDS: dict[str, Callable] = {
    "byte-level": _byte_level,
    "byte-level with prefix space": lambda: _byte_level(add_prefix_space=True),
    "prepend": lambda: _sentencepiece_like("prepend"),
    "metaspace first": lambda: _sentencepiece_like("first"),
    "metaspace always": lambda: _sentencepiece_like("always"),
    "words": _words,
}


@pytest.fixture(scope="session")
def make_tokenizer():
    """Makes a tokenizer: a kind of `BACKENDS`, with or without BOS policy, EOS and chat template."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    def make(
        kind: str = "byte-level", *, bos: bool = True, eos: str | None = "</s>", chat_template: str | None = None
    ) -> PreTrainedTokenizerFast:
        backend = BACKENDS[kind]()
        if bos:
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
            )
        names = {"bos_token": "<s>", "eos_token": eos} if eos else {"bos_token": "<s>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chat_templates() -> dict[str, str]:
    """ChatML, without and with marks around what the assistant says."""
    return {"chatml": CHATML, "marked": MARKED}


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    """A byte-level tokenizer that puts `<s>` first and ends in `</s>`; no chat template, no pad token."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer(make_tokenizer):
    """A byte-level tokenizer with ChatML, whose EOS is `<|im_end|>`."""
    return make_tokenizer(bos=False, eos="<|im_end|>", chat_template=CHATML)


@pytest.fixture
def write(tmp_path: Path):
    """Writes a file: text or bytes as they are, a list as JSON lines (or, for .json, as an array)."""

    def write_(name: str, content: str | bytes | list) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            lines = "".join(json.dumps(row) + "\n" for row in content)
            content = json.dumps(content) if name.endswith(".json") else lines
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_


@pytest.fixture
def config(tmp_path: Path):
    """Makes a config, of the kind given, with its cache in the test's own folder."""

    def make(dataset: str, kind: type[DataConfig] = SFTDataConfig, **options) -> DataConfig:
        return kind(dataset=dataset, **{"data_cache_dir": str(tmp_path / "cache"), **options})

    return make
