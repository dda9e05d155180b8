"""Loading a model, with every way in which that can go wrong said in the user's words."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config import LoraConfig, ModelConfig
from rlhf_core.models.attention import padded_implementation, ragged_implementation
from rlhf_core.models.reward import HEAD, RewardHead, RewardModel, find_head, initialise_head
from rlhf_data.errors import InputError

if TYPE_CHECKING:
    import torch

PRETRAIN = "--pretrain"

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
OTHER_ROUTERS = ("n_routed_experts", "n_group", "scoring_func")
"""Configs with one of these choose experts by something else than the top of a softmax."""

MASKED_WINDOWS = ("phimoe", "doge", "qwen2_moe")
"""Models whose sliding window is in the attention mask only."""


def load_model_config(model: ModelConfig, option: str = PRETRAIN) -> Any:
    """The model's architecture, without its weights.

    Args:
        model: which model.
        option: the option that named it, for errors.

    Raises:
        InputError: there is no such folder or model, its config cannot be read, or an option does not fit it.
    """
    from transformers import AutoConfig

    if looks_local(model.pretrain):
        check_folder(Path(model.pretrain).expanduser(), option)
    try:
        config = AutoConfig.from_pretrained(model.pretrain, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers checks configs in many ways, each with errors of its own
        raise InputError(f"{option} {model.pretrain}: {' '.join(str(error).split())[:500]}") from error
    text = config.get_text_config()
    if model.aux_loss_coef and not any(getattr(text, name, None) for name in EXPERTS):
        raise InputError(
            f"--aux_loss_coef {model.aux_loss_coef} balances experts, and {model.pretrain} ({text.model_type}) has none: leave it out"
        )
    if model.aux_loss_coef and any(getattr(text, name, None) for name in OTHER_ROUTERS):
        raise InputError(
            f"--aux_loss_coef {model.aux_loss_coef}: the router of {model.pretrain} ({text.model_type}) is not a plain softmax, "
            "and its load balance is not known here: leave it out"
        )
    return config


def check_ragged(name: str, text_config: Any, longest: int, option: str = PRETRAIN) -> None:
    """Refuse attention without padding where a model's limits are in the mask alone, which it does not have."""
    chunk, window = (getattr(text_config, key, None) for key in ("attention_chunk_size", "sliding_window"))
    limit = chunk or (window if text_config.model_type in MASKED_WINDOWS else None)
    if limit and limit < longest:
        raise InputError(
            f"{option} {name} attends {limit} tokens back, which attention without padding cannot do for its "
            f"{text_config.model_type} layers and samples of {longest} tokens: leave out --flash_attn and --packing_samples"
        )


def looks_local(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~", ".")) or Path(name).expanduser().is_dir()


def check_folder(folder: Path, option: str = PRETRAIN) -> None:
    """Look at a model folder closely enough to refuse a broken one before anything is loaded."""
    if not folder.is_dir():
        raise InputError(f"{option} {folder}: there is no such folder")
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{option} {folder} is an adapter, not a whole model: merge it into its base model first, with `rlhf merge`"
        )
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{option} {folder}: there is no config.json, so this is not a model folder in Hugging Face format"
        )
    try:
        json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise InputError(f"{option} {folder}: config.json is not valid JSON ({error})") from error
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not list(folder.glob("*.bin")):
        raise InputError(f"{option} {folder}: there are no weights (*.safetensors) in it")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{option} {folder}: {index.name} is not a readable index of weights ({error})") from error
        if missing := sorted(path.name for path in named if not path.is_file()):
            raise InputError(f"{option} {folder}: {index.name} names {', '.join(missing)}, which is not there")
    for path in weights:
        check_safetensors(path, option)


def check_safetensors(path: Path, option: str) -> None:
    """Compare a file's size with what its header promises: a cut-off download is told apart without reading it."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("the header is cut off")
            header = json.loads(file.read(length))
        end = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{option}: {path} is not a readable safetensors file ({error})") from error
    if size != end:
        raise InputError(f"{option}: {path} is damaged: it has {size} bytes and should have {end}")


def load_model(
    model: ModelConfig,
    lora: LoraConfig | None,
    *,
    attn_implementation: str | None,
    deepspeed: dict[str, Any] | None = None,
    option: str = PRETRAIN,
    head: RewardHead | None = None,
) -> Any:
    """A model ready to train: number format, attention, quantisation, adapters, checkpointing.

    Args:
        model: which model and how.
        lora: adapters, if any; None for a frozen model.
        attn_implementation: transformers' name of the attention; None for its own choice.
        deepspeed: the DeepSpeed configuration when its ZeRO stage is 3, so that weights are split while loading.
        option: the option that named the model, for errors.
        head: of a reward model; None for a causal language model.

    Raises:
        InputError: the weights cannot be loaded, or an option does not fit the model.
    """
    import torch

    dtype = torch.bfloat16 if model.bf16 else torch.float32
    quantised = lora is not None and lora.load_in_4bit
    try:
        with split_while_loading(deepspeed), unreported():
            loaded, found = auto_class(head).from_pretrained(
                model.pretrain,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=model.trust_remote_code,
                quantization_config=four_bit(dtype) if quantised else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **(head.loading() if head else {}),
            )
    except ImportError as error:
        needs = (
            "--load_in_4bit needs bitsandbytes: pip install 'rlhf-core[qlora]'"
            if quantised
            else f"{option} {model.pretrain}"
        )
        raise InputError(f"{needs} ({first_line(error)})") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{option} {model.pretrain}: the model cannot be loaded: {first_line(error)}") from error
    check_complete(f"{option} {model.pretrain}", found, new=(f"{HEAD}.weight",) if head and head.found is None else ())
    if head and f"{HEAD}.weight" in found["missing_keys"]:
        initialise_head(loaded, head.seed)
    if head:
        forget_renaming(loaded, head)
    loaded.config.use_cache = False
    if lora is None:
        return loaded.eval().requires_grad_(False)
    if lora.lora_rank:
        loaded = with_adapter(loaded, lora, "SEQ_CLS" if head else "CAUSAL_LM")
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": model.gradient_checkpointing_use_reentrant})
        if lora.lora_rank or model.gradient_checkpointing_use_reentrant:
            loaded.enable_input_require_grads()
    return loaded


def forget_renaming(loaded: Any, head: RewardHead) -> None:
    """Have the model saved under transformers' names: it would give a renamed head its old name back."""
    renamed = head.loading().get("key_mapping", {})
    kept = [change for change in loaded._weight_conversions or () if not set(change.source_patterns) & set(renamed)]
    loaded._weight_conversions = kept


def auto_class(head: RewardHead | None) -> Any:
    """The class of transformers that loads a language model, or a reward model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if head else AutoModelForCausalLM


def load_reward_model(
    model: ModelConfig,
    prefix: str | None = None,
    option: str = "--reward_pretrain",
    *,
    device: torch.device | None = None,
    deepspeed: dict[str, Any] | None = None,
) -> RewardModel:
    """A reward model ready to score, on the CPU; without a head there is nothing to load.

    Args:
        model: which model. With `flash_attn` samples are laid end to end, and a prefix that several share may be laid once;
            otherwise they are padded.
        prefix: `--value_head_prefix`, the head's name; by default it is found by looking.
        option: the option that named the model, for errors.
        device: where it will compute; by default the CPU.
        deepspeed: the DeepSpeed configuration when its ZeRO stage is 3, so that weights are split while loading.

    Raises:
        InputError: the folder is broken, or holds no reward model.
    """
    import torch

    config, head = reward_model_config(model, prefix, option)
    if model.flash_attn:
        dtype = torch.bfloat16 if model.bf16 else torch.float32
        attention, _ = ragged_implementation(device or torch.device("cpu"), dtype, share_prefix=True)
    else:
        attention = padded_implementation(config.get_text_config())
    loaded = load_model(model, None, attn_implementation=attention, deepspeed=deepspeed, option=option, head=head)
    return RewardModel(loaded, ragged=model.flash_attn).eval()


def reward_model_config(model: ModelConfig, prefix: str | None, option: str) -> tuple[Any, RewardHead]:
    """The architecture of a reward model and where its head is, without its weights.

    Raises:
        InputError: as `load_reward_model`.
    """
    config = load_model_config(model, option)
    found = find_head(model.pretrain, prefix, option)
    if found is None:
        raise InputError(
            f"{option} {model.pretrain} has no reward head: it is a language model, not a reward model; train one with "
            "`rlhf train rm`"
        )
    return config, RewardHead(found, pad_token_id=config.get_text_config().pad_token_id)


@contextmanager
def split_while_loading(deepspeed: dict[str, Any] | None) -> Iterator[None]:
    """Have transformers split weights over the ranks as it loads them, by a ZeRO-3 configuration; nothing to do without.

    It finds the configuration in a global weak reference, which an error's traceback would keep alive.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(deepspeed) if deepspeed else None
    try:
        yield
    finally:
        if alive:
            unset_hf_deepspeed_config()


@contextmanager
def unreported() -> Iterator[None]:
    """Without transformers' progress bar and its report of missing weights: `check_complete` has the last word on them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_complete(name: str, found: dict[str, Any], new: tuple[str, ...] = ()) -> None:
    """Refuse to train what transformers made up: it fills in weights that the files lack at random, and only warns.

    Args:
        name: option and model, for the error.
        found: what transformers says of its loading.
        new: weights that may be missing, because they are made anew.
    """
    if found["mismatched_keys"]:
        weight, there, wanted = sorted(found["mismatched_keys"])[0]
        raise InputError(
            f"{name}: the weights do not fit config.json: {weight} is {list(there)} in the files and {list(wanted)} by the config"
        )
    if missing := sorted(set(found["missing_keys"]) - set(new)):
        raise InputError(
            f"{name}: the files lack {len(missing)} of the weights that config.json asks for, such as {missing[0]}"
        )


def four_bit(dtype: Any) -> Any:
    """NF4 with double quantisation. Source: Dettmers et al. 2023, section 3 (arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", HEAD],
    )


def with_adapter(model: Any, lora: LoraConfig, task: str) -> Any:
    """Freeze the model and add LoRA matrices; a reward model's head is trained whole. Source: Hu et al. 2021, eq. 3 (arXiv:2106.09685)."""
    import peft

    whole = lora.target_modules == ["all-linear"]
    if lora.load_in_4bit:
        for module in model.modules():
            # On some CPUs bitsandbytes repacks a weight for inference the first time it is used in evaluation mode: it
            # fails for sizes that are not multiples of 32, and training would go on with the repacked weight.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapter = peft.LoraConfig(
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules="all-linear" if whole else lora.target_modules,
        task_type=task,
    )
    try:
        return peft.get_peft_model(
            model, adapter, autocast_adapter_dtype=False
        )  # master weights are DeepSpeed's business
    except ValueError as error:
        raise InputError(f"--target_modules {' '.join(lora.target_modules)}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first sentence of an error that was not written for our users."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
