"""What a long job shows: how much there is to do, counted beside it, and a bar on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread

from tqdm import tqdm

from rlhf_data.errors import InputError

PATIENCE = 2.0
"""Seconds that a plan waits for a count; large files are counted while the model is loaded."""


class Count:
    """The number of rows, found in the background.

    Args:
        count: a pass over the data.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self.total: int | None = None
        self.error: InputError | None = None
        self._work = count
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def said(self, unit: str) -> str:
        """For the plan: the number, or that it is not known yet.

        Raises:
            InputError: the data has a line that is no row.
        """
        self._thread.join(PATIENCE)
        self.check()
        return f"{unit} are being counted" if self.total is None else f"{self.total:,} {unit}"

    def check(self) -> None:
        """Raise what was found: better now than after hours, when whoever reads the rows comes to it.

        Raises:
            InputError: the data has a line that is no row.
        """
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self.total = self._work()
        except InputError as error:
            self.error = error


class Bar:
    """A bar with tokens per second, and the time left once the rows are counted.

    Args:
        name: of the job.
        unit: of what it counts.
        done: what an earlier run has done.
        count: of all there is.
    """

    def __init__(self, name: str, unit: str, done: int, count: Count) -> None:
        self._bar = tqdm(initial=done, total=count.total, desc=name, unit=f" {unit}", dynamic_ncols=True)
        self._count, self._tokens, self._start = count, 0, time.perf_counter()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, items: int, tokens: int) -> None:
        """So many items are done, with so many tokens.

        Raises:
            InputError: the data has a line that is no row, further on.
        """
        self._count.check()
        self._tokens += tokens
        self._bar.total = self._count.total
        pace = self._tokens / max(time.perf_counter() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{pace:,.0f} tokens/s" if self._tokens else "", refresh=False)
        self._bar.update(items)
