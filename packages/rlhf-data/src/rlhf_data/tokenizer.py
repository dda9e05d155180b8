"""Loading a tokenizer, with messages that name what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_data.errors import InputError
from rlhf_data.templates import read_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    path_or_id: str, use_fast: bool = True, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer as it is: nothing is added to its vocabulary.

    A missing pad token stays missing: samples are ragged, and no mask is ever read off token values.

    Args:
        path_or_id: folder of a model or tokenizer, or a Hub id.
        use_fast: prefer the Rust implementation.
        chat_template: Jinja text, or path of a file with it, to put in place of the tokenizer's own.
        trust_remote_code: run tokenizer code that comes with the model.
    """
    from transformers import AutoTokenizer

    folder = Path(path_or_id).expanduser()
    if not folder.is_dir() and (path_or_id.startswith((".", "/", "~")) or folder.is_file()):
        what = "is a file; give the folder it is in" if folder.is_file() else "does not exist"
        raise InputError(f"the tokenizer folder {path_or_id} {what}")
    target = str(folder) if folder.is_dir() else path_or_id
    try:
        tokenizer = AutoTokenizer.from_pretrained(target, use_fast=use_fast, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for a corrupt file
        raise InputError(_explain(path_or_id, folder, error)) from error
    if not hasattr(tokenizer, "eos_token_id"):
        raise InputError(f"{path_or_id} has no text tokenizer, but a {type(tokenizer).__name__}")
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    return tokenizer


def _explain(path_or_id: str, folder: Path, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0][:300]
    if folder.is_dir():
        present = sorted(file.name for file in folder.iterdir() if "token" in file.name or file.suffix == ".model")
        found = f"it has {', '.join(present)}" if present else "it has no tokenizer files"
        return f"no tokenizer can be loaded from {path_or_id} ({found}): {reason}"
    return (
        f"no tokenizer can be loaded from {path_or_id}, neither a folder here nor (if the Hub can be reached at all) "
        f"a model on the Hub: {reason}"
    )
