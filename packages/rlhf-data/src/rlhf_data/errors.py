"""The one exception that means: the input is at fault, not the program."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message says what is wrong, where (option, file, row, value) and the way out, in one line that needs no
    traceback. The command line prints it and exits with code 2.
    """
