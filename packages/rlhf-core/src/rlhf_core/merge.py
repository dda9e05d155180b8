"""Folding an adapter into its base model, and making sure that the sum answers as the two did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_core.config import MergeConfig, ModelConfig
from rlhf_data.errors import InputError, RunError

TASKS = ("CAUSAL_LM", "SEQ_CLS")
"""PEFT's names of what is trained here: language models, and reward models."""

TOLERANCE = 1e-4
"""Largest difference of a logit, of the largest logit, that float32 arithmetic explains."""


def merge(config: MergeConfig) -> None:
    """Load base and adapter, add the adapter up, compare logits before and after, and write the model.

    The base is taken in its own number format also for an adapter that was trained on it in 4 bits (QLoRA).

    Raises:
        InputError: the folder is no adapter, its base model cannot be loaded or is not its base.
        RunError: the merged model answers differently.
    """
    from rlhf_core.libraries import settle

    settle()
    import torch

    from rlhf_core.export import CALIBRATION, export
    from rlhf_core.models.load import load_model, load_model_config
    from rlhf_core.models.policy import Policy
    from rlhf_core.models.reward import RewardHead, RewardModel, find_head, settle_padding
    from rlhf_core.plan import check_can_write
    from rlhf_core.strategy import Alone

    folder = Path(config.adapter)
    task, base = read_adapter(folder)
    options = ModelConfig(pretrain=config.pretrain or base, trust_remote_code=config.trust_remote_code)
    option = "--pretrain" if config.pretrain else f"the base model of --adapter {folder},"
    if Path(config.save_path).resolve() in (folder.resolve(), Path(options.pretrain).resolve()):
        raise InputError(
            f"--save_path {config.save_path} holds the adapter or its base model: save the merged model elsewhere"
        )
    check_can_write("--save_path", config.save_path)
    architecture = load_model_config(options, option)
    tokenizer = tokenizer_of(folder, options)
    head = None
    if task == "SEQ_CLS":
        head = RewardHead(find_head(options.pretrain, None, option), pad_token_id=settle_padding(tokenizer))
    print(f"adapter {folder} + base model {options.pretrain}", flush=True)
    model = load_model(options, None, attn_implementation=None, option=option, head=head)
    merged = merged_and_checked(model, folder, architecture.get_text_config().vocab_size)
    if head and (folder / CALIBRATION).is_file():
        for name, value in json.loads((folder / CALIBRATION).read_text()).items():
            setattr(merged.config, name, value)
    whole = (RewardModel if head else Policy)(merged, ragged=False)
    whole.to(torch.bfloat16 if config.bf16 else architecture.dtype or torch.float32)
    export(whole, tokenizer, Path(config.save_path), Alone())
    print(f"saved {config.save_path}", flush=True)


def read_adapter(folder: Path) -> tuple[str, str]:
    """Task and base model of an adapter."""
    if not (folder / "adapter_config.json").is_file():
        what = "is a whole model already" if (folder / "config.json").is_file() else "has no adapter_config.json"
        raise InputError(f"--adapter {folder} {what}: give the folder of a LoRA adapter")
    try:
        found = json.loads((folder / "adapter_config.json").read_text())
        task, base = found["task_type"], found["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--adapter {folder}: adapter_config.json cannot be read ({error})") from error
    if task not in TASKS:
        raise InputError(f"--adapter {folder} is for the task {task}; only {' and '.join(TASKS)} can be merged here")
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"--adapter {folder}: there is no adapter_model.safetensors in it")
    return task, str(base)


def tokenizer_of(folder: Path, options: ModelConfig) -> Any:
    """The adapter's tokenizer, or its base model's."""
    from rlhf_data.tokenizer import load_tokenizer

    own = (folder / "tokenizer_config.json").is_file()
    return load_tokenizer(str(folder) if own else options.pretrain, trust_remote_code=options.trust_remote_code)


def merged_and_checked(model: Any, folder: Path, vocab_size: int) -> Any:
    """The base model with the adapter added to its weights."""
    import peft
    import torch

    try:
        adapted = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"--adapter {folder} does not fit its base model: {str(error).splitlines()[0]}") from error
    probe = torch.randint(vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = adapted(input_ids=probe).logits.float()
        merged: Any = adapted.merge_and_unload(safe_merge=True)
        together = merged(input_ids=probe).logits.float()
    difference, scale = (together - apart).abs().max().item(), apart.abs().max().item()
    if not difference <= TOLERANCE * max(scale, 1.0):
        raise RunError(
            f"the merged model's logits differ by {difference:.3g} from base and adapter (their size is {scale:.3g}): "
            "nothing was written"
        )
    print(f"merged: logits differ by at most {difference:.2g} (their size is {scale:.3g})", flush=True)
    return merged
