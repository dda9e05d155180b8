"""The exceptions whose message is written for the person at the keyboard: one line, no traceback needed."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message says what is wrong, where (option, file, row, value) and the way out. The command line prints it and exits
    with code 2.
    """


class RunError(RuntimeError):
    """A run cannot go on, through no fault of its options.

    The message says what happened and how to continue. The command line prints it and exits with code 1.
    """


def strict_error(where: str, reason: str) -> InputError:
    """What `--strict_data` makes of a row that cannot be used, or be used whole."""
    return InputError(f"{where}: {reason} (--strict_data: no row may be dropped)")
