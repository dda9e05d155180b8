"""One command-line option per config field.

A command's config is a pydantic model. Its model-typed fields are groups of options; every other field is one option,
named after it, with the string below it as help. Groups flatten: `SFTConfig.data.max_len` is `--max_len`.

Only what the user gave is collected, so that defaults, YAML and flags meet in one place: the config itself.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from rlhf_cli.errors import reported
from rlhf_data.config import Alias
from rlhf_data.errors import InputError
from rlhf_data.options import build, is_group, nearest, options

C = TypeVar("C", bound=BaseModel)
RUN = "This command"


def parameter(name: str, field: FieldInfo, panel: str | None) -> inspect.Parameter:
    """The Typer parameter of one field. Its default is None (not given): the field's own default applies later."""
    kind, flags = plain_type(field.annotation), [f"--{name}"]
    flags += [f"--{alias}" for alias in aliases_of(field)]
    if kind is bool:  # also where the default is off: flags win over a file
        flags[0] += f"/--no_{name}"
    option = typer.Option(
        *flags,
        help=" ".join((field.description or "").split()) + (" [red]\\[required][/red]" if field.is_required() else ""),
        rich_help_panel=panel,
        show_default=show(field),
        **bounds(field, kind),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def markers(field: FieldInfo) -> Iterator[Any]:
    """Bounds and aliases of a field, also those inside `X | None`."""
    yield from field.metadata
    for inner in get_args(field.annotation):
        if get_origin(inner) is Annotated:
            yield from inner.__metadata__
            yield from (m for nested in inner.__metadata__ if isinstance(nested, FieldInfo) for m in nested.metadata)


def aliases_of(field: FieldInfo) -> list[str]:
    return [marker.name for marker in markers(field) if isinstance(marker, Alias)]


def plain_type(annotation: Any) -> Any:
    """What Typer parses: no bounds, no `| None`; whole numbers and secrets are text until the config reads them."""
    if get_origin(annotation) is Annotated:
        return plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = [inner for inner in get_args(annotation) if inner is not types.NoneType]
        return plain_type(annotation)
    if get_origin(annotation) is tuple:
        return tuple[(str,) * len(get_args(annotation))]  # several numbers: the config reads them
    return str if annotation is SecretStr else annotation


def bounds(field: FieldInfo, kind: Any) -> dict[str, Any]:
    """What `--help` says of a number's range. The config checks it (and reads `1e6`, which Typer's int would not)."""
    if get_origin(kind) is list:
        return {"metavar": "NAME ..."}
    if kind not in (int, float):
        return {}
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    ranges = [f"{sign} {getattr(m, name)}" for m in markers(field) for name, sign in signs.items() if hasattr(m, name)]
    return {"parser": str, "metavar": " ".join(["N" if kind is int else "X", ", ".join(ranges)]).strip()}


def show(field: FieldInfo) -> str | bool:
    """The default as `--help` shows it."""
    if field.is_required():
        return False
    default = field.get_default(call_default_factory=True)
    if default is None or default is False:
        return False
    if default is True:
        return "on"
    if isinstance(default, (list, tuple)):
        return " ".join(map(str, default))
    return repr(default) if isinstance(default, str) and ("\n" in default or " " in default) else str(default)


def read_yaml(path: Path, config: type[BaseModel]) -> dict[str, Any]:
    """Flat option values from a YAML (or JSON) file; groups may be written out, as in a run's own `config.json`."""
    import yaml

    try:
        content = yaml.load(path.read_text(), Loader=yaml_loader(yaml))
    except FileNotFoundError:
        raise InputError(f"--config: there is no file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config: cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config: {path} must hold `option: value` lines, got {type(content).__name__}")
    groups = {name for name, field in config.model_fields.items() if is_group(field.annotation)}
    secrets = {
        name for name, field, _ in options(config) if SecretStr in (field.annotation, *get_args(field.annotation))
    }
    aliases = {alias: name for name, field, _ in options(config) for alias in aliases_of(field)}
    known, flat = {name for name, _, _ in options(config)}, {}
    for key, value in content.items():
        inner = value if key in groups and isinstance(value, dict) else {key: value}
        for name, item in inner.items():
            name = aliases.get(name := str(name).replace("-", "_"), name)
            if name not in known:
                raise InputError(f"--config: {path}: unknown option `{name}`{nearest(name, known)}")
            if not (name in secrets and item and set(str(item)) == {"*"}):  # a record does not hold the secret
                flat[name] = item
    return {name: value for name, value in flat.items() if value is not None}


def yaml_loader(yaml: Any) -> Any:
    """YAML that reads `5e-6` as a number: YAML 1.1 wants `5.0e-6`, people do not write that."""
    import re

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    return Loader


def spread_lists(arguments: list[str], config: type[BaseModel]) -> list[str]:
    """Let list options take several values, `--target_modules q_proj v_proj`, as argparse users write them."""
    lists = {f"--{name}" for name, field, _ in options(config) if get_origin(field.annotation) is list}
    spread: list[str] = []
    flag, taken = None, 0
    for argument in arguments:
        if argument.startswith("--"):
            flag, taken = argument.replace("-", "_").replace("__", "--", 1), 0
        elif flag in lists:
            if taken:
                spread.append(flag)
            taken += 1
        spread.append(argument)
    return spread


def command(app: typer.Typer, name: str, config: type[C]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated function `run(config, dry_run=…)` as `name`, with one option per field of `config`."""

    class Command(typer.core.TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, spread_lists(args, config))

    def register(run: Callable[..., None]) -> Callable[..., None]:
        flags = [flag for name, field, _ in options(config) for flag in (name, *aliases_of(field))]
        if shared := {flag for flag in flags if flags.count(flag) > 1}:
            raise ValueError(f"two options of {config.__name__} share a flag: {', '.join(sorted(shared))}")
        extra = [p for p in inspect.signature(run).parameters.values() if p.name != "config"]

        def callback(**values: Any) -> None:
            with reported(debug=values.pop("debug")):
                path = values.pop("config")
                own = {parameter.name: values.pop(parameter.name) for parameter in extra}
                flags = {key: value for key, value in values.items() if value is not None and value != []}
                given = (read_yaml(path, config) if path else {}) | flags
                run(build(config, given), **own)

        signature = [parameter(*option) for option in options(config)]
        file = Annotated[
            Path | None,
            typer.Option(
                "--config",
                help="YAML or JSON file of options, e.g. a run's own `run/config.json`; flags win.",
                rich_help_panel=RUN,
            ),
        ]
        debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUN)]
        signature.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file))
        signature.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=debug))
        signature += [
            p.replace(
                kind=inspect.Parameter.KEYWORD_ONLY, annotation=typing.get_type_hints(run, include_extras=True)[p.name]
            )
            for p in extra
        ]
        callback.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        required = any(field.is_required() for _, field, _ in options(config))
        app.command(name, cls=Command, help=inspect.getdoc(config), no_args_is_help=required)(callback)
        return run

    return register
