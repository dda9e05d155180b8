"""A tiny model with its tokenizer, made once; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

TEXTS = ["the old bird by the river saw a red star", "a green stone and a blue moon", "dogs and cats like the sun"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer language model with its tokenizer."""
    from rlhf_core.libraries import settle

    settle()
    from rlhf_core.tiny import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer(TEXTS, folder, vocab_size=300)
    make_model(tokenizer, folder, hidden_size=32, max_len=128, initializer_range=0.3)
    return folder
