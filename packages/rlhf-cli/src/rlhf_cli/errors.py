"""How an error reaches the person at the keyboard: one message, an exit code, no traceback unless asked for."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_data.errors import InputError, RunError

USER, PROGRAM = 2, 1
"""Exit codes: the input is at fault, anything else is."""

UNREAD = 141
"""Exit code where nobody reads what is printed, as a shell reports SIGPIPE."""


@contextmanager
def reported(debug: bool = False) -> Iterator[None]:
    """Turn an exception into `error: …` on standard error and an exit code; with `debug`, show where it came from."""
    try:
        yield
    except InputError as error:
        if debug:
            raise
        fail(str(error), USER)
    except RunError as error:
        if debug:
            raise
        fail(str(error), PROGRAM)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_unread():
            raise SystemExit(UNREAD) from None
        if debug:
            raise
        fail(f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'} (--debug shows where)", PROGRAM)


def is_unread() -> bool:
    """Whether nobody reads standard output any more, as behind `| head`; what is left of it then goes nowhere."""
    stdout = 1
    poll = select.poll()
    poll.register(stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stdout)
    os.close(nowhere)
    return True


@contextmanager
def usage_reported() -> Iterator[None]:
    """Report what Typer's parser refuses (a misspelt flag, a missing value) in the same way, instead of in a box."""
    from typer.exceptions import TyperException

    try:
        yield
    except TyperException as error:
        context, message = getattr(error, "ctx", None), error.format_message()
        if not message:  # no arguments at all: the help has been shown
            raise SystemExit(USER) from None
        if close := getattr(error, "possibilities", None):
            message = f"there is no option {error.option_name}; did you mean {close[0]}?"  # type: ignore[attr-defined]
        see = f" (`{context.command_path} --help` shows what there is)" if context else ""
        fail(message.replace("Value error, ", "").rstrip(".") + see, USER)


def fail(message: str, code: int) -> None:
    """Say `message` and exit. A rank that we started leaves it to its launcher, which shows the first failure only."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": "", "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    else:
        say(message)
    raise SystemExit(code)


def say(message: str) -> None:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
