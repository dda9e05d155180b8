"""Making the libraries underneath behave: which accelerator, what is compiled, what they print."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import nullcontext
from typing import Any


def settle() -> None:
    """Set up what DeepSpeed, transformers and bitsandbytes read at import. Called before any of them is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by the names they had before torch 2.13
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
    # bitsandbytes looks for an optional faster kernel on every import and warns that it is not there
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def deepspeed() -> Any:
    """The deepspeed module, quiet, and compiling nothing that training does not use."""
    settle()
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # A shared-memory all-reduce for CPU inference: half a minute of compiling, and an error where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def gathered(parameters: list[Any], *, write: bool = False) -> Any:
    """Whole parameters where ZeRO-3 has split them, nothing to do otherwise.

    Args:
        parameters: to be made whole while the context lasts.
        write: whether what the first rank writes to them is to be kept, for all ranks.
    """
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    return deepspeed().zero.GatheredParameters(parameters, modifier_rank=0 if write else None)
