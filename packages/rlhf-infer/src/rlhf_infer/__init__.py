"""Generation and scoring for post-training. Light: engines and their libraries are imported where they are used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_infer.generate import generate
    from rlhf_infer.score import score

__all__ = ["generate", "score"]


def __getattr__(name: str) -> Any:
    """Import `generate` and `score` when they are first used."""
    if name in __all__:
        return getattr(import_module(f"{__name__}.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """The two functions are in modules of their names. Importing a module sets it on its package: here, the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in __all__ and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
