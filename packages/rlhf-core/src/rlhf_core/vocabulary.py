"""Whether two models mean the same by a token id."""

from __future__ import annotations

from typing import Any

from rlhf_core.config import ModelConfig
from rlhf_core.models.load import load_model_config
from rlhf_data.errors import InputError
from rlhf_data.tokenizer import load_tokenizer


def check_vocabulary(option: str, name: str, model_config: Any, tokens: int) -> None:
    """Refuse a model that does not know all tokens of the tokenizer."""
    known = model_config.get_text_config().vocab_size
    if tokens > known:
        raise InputError(
            f"{option} {name}: the tokenizer has {tokens} tokens and the model only {known}: they do not belong together"
        )


def shared_vocabulary(options: ModelConfig, tokenizer: Any, name: str, option: str) -> int:
    """How many first tokens mean the same to the trained model and to another one; all that the data can hold are among them.

    Args:
        options: of the trained model.
        tokenizer: its tokenizer.
        name: folder or Hub id of the other model.
        option: the option that names it, for errors.

    Raises:
        InputError: the other model cannot be read, numbers its tokens differently, or does not know some of them.
    """
    load_model_config(options.model_copy(update={"pretrain": name, "aux_loss_coef": 0.0}), option)
    try:
        other = load_tokenizer(
            name, use_fast=not options.disable_fast_tokenizer, trust_remote_code=options.trust_remote_code
        )
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    theirs = {number: token for token, number in other.get_vocab().items()}
    ours = {number: token for token, number in tokenizer.get_vocab().items()}
    shared = min(len(other), len(tokenizer))
    different = [n for n in range(shared) if ours.get(n) != theirs.get(n)]
    if different:
        n = different[0]
        raise InputError(
            f"{option} {name} has another vocabulary than --pretrain {options.pretrain}: {len(different):,} of {shared:,} "
            f"tokens differ, the first being {n}, {theirs.get(n)!r} and {ours.get(n)!r}; both must have the same tokenizer"
        )
    if len(tokenizer) > len(other):
        extra = [ours[n] for n in range(len(other), len(tokenizer)) if n in ours]
        raise InputError(
            f"{option} {name} does not know {len(extra)} tokens of --pretrain {options.pretrain}, such as {extra[0]!r}: it "
            "cannot read what the trained model reads"
        )
    return shared
