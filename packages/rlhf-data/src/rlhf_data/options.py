"""Options by flat name: what a config asks for, and a config from what was given.

A config is a pydantic model whose model-typed fields are groups of options; every other field is one option, named after
it. Groups flatten: `SFTConfig.data.max_len` is the option `max_len`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from typing import Any, TypeGuard, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rlhf_data.errors import InputError

C = TypeVar("C", bound=BaseModel)


def options(config: type[BaseModel], panel: str | None = None) -> Iterator[tuple[str, FieldInfo, str | None]]:
    """Name, field and help panel of every option of `config`, groups flattened."""
    for name, field in config.model_fields.items():
        if is_group(field.annotation):
            yield from options(field.annotation, (inspect.getdoc(field.annotation) or name).rstrip("."))
        else:
            yield name, field, panel


def is_group(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return inspect.isclass(annotation) and issubclass(annotation, BaseModel)


def build(config: type[C], given: dict[str, Any]) -> C:
    """The config from flat option values, the inverse of `options`.

    Raises:
        InputError: a name is unknown, a required option is missing, or a value is not allowed; every problem is named.
    """
    known = {name for name, _, _ in options(config)}
    for name in given:
        if name not in known:
            raise InputError(f"unknown option `{name}`{nearest(name, known)}")
    try:
        return config(**nest(config, given))
    except ValidationError as error:
        raise InputError("\n".join(problem(entry) for entry in error.errors())) from error


def nest(config: type[BaseModel], given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: nest(field.annotation, given) if is_group(field.annotation) else given[name]
        for name, field in config.model_fields.items()
        if is_group(field.annotation) or name in given
    }


def problem(entry: Any) -> str:
    """One validation error in the user's words: option, what is wrong, value."""
    if entry["type"] == "value_error" and len(entry["loc"]) < 2:
        return str(entry["ctx"]["error"])
    option = next((part for part in reversed(entry["loc"]) if isinstance(part, str) and part.islower()), "?")
    if entry["type"] == "missing":
        return f"--{option} is required"
    message = str(entry["ctx"]["error"]) if entry["type"] == "value_error" else entry["msg"].replace("Input", "it", 1)
    return message if message.startswith("--") else f"--{option}: {message}, got {entry['input']!r}"


def nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
