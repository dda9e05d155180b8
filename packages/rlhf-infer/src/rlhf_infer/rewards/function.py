"""Rewards by a Python function of the user's own: rules, unit tests, calls to whatever judges answers.

    def reward(prompts: list[str], responses: list[str], labels: list, rows: list[dict]) -> list[float]:
        return [float(response.strip() == label) for response, label in zip(responses, labels)]

It is called with those of these four arguments that it names (all, where it takes `**kwargs`), each a list of the same
length, and returns as many finite numbers; or a dict with these under `rewards` and more lists of that length, whose values
are kept in the scored rows.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import numbers
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from rlhf_data.errors import InputError, RunError
from rlhf_infer.rewards.scorer import Answer, Judgement, Scorer, ScorerOptions

ARGUMENTS = ("prompts", "responses", "labels", "rows")
"""What a function may ask for."""

REWARDS = "rewards"
DEFAULT_NAME = "reward"


class FunctionScorer(Scorer):
    """A Python reward function.

    Args:
        options: which one.

    Raises:
        InputError: it cannot be found or called.
    """

    needs_tokens = False

    def __init__(self, options: ScorerOptions) -> None:
        check_options(options)
        self.name = options.pretrain
        self.function, self.size = find_function(options.pretrain, options.option), options.micro_batch_size
        self.arguments = arguments_of(self.function, options)

    def judge(self, answers: Sequence[Answer]) -> Judgement:
        judged = Judgement([])
        for start in range(0, len(answers), self.size):
            part = self._call(answers[start : start + self.size])
            if start and part.metrics.keys() != judged.metrics.keys():
                raise RunError(
                    f"{self.name} returned {named(part.metrics)} for some rows and {named(judged.metrics)} for others"
                )
            judged.rewards.extend(part.rewards)
            for name, values in part.metrics.items():
                judged.metrics.setdefault(name, []).extend(values)
        return judged

    def _call(self, answers: Sequence[Answer]) -> Judgement:
        everything = {
            "prompts": [answer.prompt for answer in answers],
            "responses": [answer.response for answer in answers],
            "labels": [answer.label for answer in answers],
            "rows": [dict(answer.row) for answer in answers],
        }
        try:
            returned = self.function(**{name: everything[name] for name in self.arguments})
        except (Exception, SystemExit) as error:  # a grader that runs what a model wrote may be told to exit
            raise RunError(f"{self.name} failed {place_of(error, self.function)}: {in_words(error)}") from error
        columns = dict(returned) if isinstance(returned, Mapping) else {REWARDS: returned}
        if REWARDS not in columns:
            raise RunError(f"{self.name} returned a dict without `{REWARDS}`, with {named(columns)}")
        lists = {str(name): self._list(str(name), values, len(answers)) for name, values in columns.items()}
        rewards = lists.pop(REWARDS)
        return Judgement([self._number(*pair) for pair in zip(rewards, answers, strict=True)], lists)

    def _list(self, name: str, values: Any, count: int) -> list[Any]:
        """A returned list, tuple, array or tensor with one plain value for each answer."""
        if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
            raise RunError(f"{self.name} must return a list as `{name}`, got {values!r:.80}")
        if len(values) != count:
            raise RunError(f"{self.name} returned {len(values)} values as `{name}` for {count} responses")
        return [value.item() if hasattr(value, "item") else value for value in values]

    def _number(self, value: Any, answer: Answer) -> float:
        if not is_finite(value):
            raise RunError(
                f"{self.name} must return finite numbers, got {value!r:.80} for the response {answer.response!r:.80} to "
                f"{answer.prompt[-80:]!r}"
            )
        return float(value)


def is_finite(value: Any) -> bool:
    """Whether it is a real number that a float can hold; fractions and numpy's scalars are such numbers too."""
    return isinstance(value, numbers.Real) and abs(cast(float, value)) <= sys.float_info.max


def check_function(options: ScorerOptions) -> None:
    """Find what is wrong with a reward function, without calling it.

    Raises:
        InputError: it cannot be found or called, or an option does not fit it.
    """
    check_options(options)
    arguments_of(find_function(options.pretrain, options.option), options)


def check_options(options: ScorerOptions) -> None:
    """Refuse options that are about models."""
    foreign = {
        "--value_head_prefix": options.value_head_prefix is not None,
        "--bf16": options.bf16,
        "--no_flash_attn": not options.flash_attn,
        "--reward_engine vllm": options.reward_engine == "vllm",
        "--trust_remote_code": options.trust_remote_code,
    }
    for option, given in foreign.items():
        if given:
            raise InputError(
                f"{option} is about reward models, and {options.option} {options.pretrain} is a Python function: leave "
                "it out"
            )
    if options.normalize_reward:
        raise InputError(
            f"--normalize_reward: {options.option} {options.pretrain} is a Python function, which has no mean and deviation "
            "of its own"
        )


def find_function(name: str, option: str) -> Callable[..., Any]:
    """Import a reward function.

    Args:
        name: `my_rewards.py`, `my_rewards.py:function` or `module:function`.
        option: the option that named it, for errors.

    Raises:
        InputError: there is no such file, module or function, or importing it fails.
    """
    where, _, function = name.rpartition(":") if not name.endswith(".py") else (name, "", DEFAULT_NAME)
    module = (
        import_file(Path(where).expanduser(), name, option)
        if where.endswith(".py")
        else import_named(where, name, option)
    )
    found = getattr(module, function, None)
    if found is None:
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise InputError(
            f"{option} {name}: there is no function `{function}` in {where}"
            + (f"; it has {', '.join(sorted(own))}" if own else "")
        )
    if not callable(found):
        raise InputError(f"{option} {name}: `{function}` in {where} is no function")
    return found


FILES: dict[tuple[Path, int, int], ModuleType] = {}
"""Files that were run as modules, by path, time of their last change, and size."""


def import_file(path: Path, name: str, option: str) -> ModuleType:
    """Run a file as a module of its own name, once; what lies beside it can be imported, as if the file was run."""
    if not path.is_file():
        raise InputError(f"{option} {name}: there is no file {path}")
    read = path.resolve(), path.stat().st_mtime_ns, path.stat().st_size
    if read in FILES:
        return FILES[read]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    before = sys.modules.get(path.stem)
    if before is None or before in FILES.values():
        sys.modules[path.stem] = module  # where the file defines classes, pickle and dataclasses look here
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        if sys.modules.get(path.stem) is module:
            del sys.modules[path.stem]
        if isinstance(error, Exception | SystemExit):
            raise InputError(f"{option} {name}: {path} cannot be run: {at(error)}{in_words(error)}") from error
        raise
    FILES[read] = module
    return module


def import_named(where: str, name: str, option: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{option} {name}: the module {where} cannot be imported: {at(error)}{in_words(error)}"
        ) from error


def arguments_of(function: Callable[..., Any], options: ScorerOptions) -> tuple[str, ...]:
    """Which of the four arguments a function takes.

    Raises:
        InputError: it takes none of them, needs another one, or is asynchronous.
    """
    said = f"{options.option} {options.pretrain}"
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise InputError(f"{said}: the function must return its rewards; `async` and `yield` are not awaited")
    parameters = inspect.signature(function).parameters.values()
    taken = offered = tuple(name for name in ARGUMENTS if name not in options.missing)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        taken = tuple(p.name for p in parameters if p.name in offered and p.kind is not p.POSITIONAL_ONLY)
    known = f"it is called by name with any of {', '.join(offered)}"
    if not taken:
        raise InputError(f"{said}: the function takes none of its arguments; {known}")
    for parameter in parameters:
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if needed and (parameter.name not in offered or parameter.kind is parameter.POSITIONAL_ONLY):
            raise InputError(f"{said}: the function needs `{parameter.name}`, which nobody gives it; {known}")
    return taken


def named(columns: Mapping[Any, Any]) -> str:
    return ", ".join(f"`{name}`" for name in columns) or "nothing"


def in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def place_of(error: BaseException, function: Callable[..., Any]) -> str:
    """File and line of the user's code where an error came from: of the deepest call in the function's own file."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    calls = traceback.extract_tb(error.__traceback__)
    own = [call for call in calls if code is not None and call.filename == code.co_filename]
    return (
        f"in {own[-1].filename}, line {own[-1].lineno}" if own else f"in {calls[-1].filename}, line {calls[-1].lineno}"
    )


def at(error: BaseException) -> str:
    """File and line where importing failed, if it is in Python code."""
    if isinstance(error, SyntaxError):
        return ""  # says it itself
    calls = [call for call in traceback.extract_tb(error.__traceback__) if "importlib" not in call.filename]
    return f"{calls[-1].filename}, line {calls[-1].lineno}: " if len(calls) > 1 else ""
