"""Running a step: a fresh process, whose output is shown and logged, and which never outlives the recipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from codecs import getincrementaldecoder
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import BinaryIO, TextIO

TERMINATED = 143
"""Exit code of a program that SIGTERM has ended."""

GRACE = 45.0
"""Seconds that a step has to end when it is told to, before it is killed: more than torch's launcher gives its ranks, which only
it can end."""


def execute(arguments: list[str], log: Path, environment: dict[str, str], lock: int) -> int:
    """Run `rlhf` with some arguments to its end.

    Args:
        arguments: what follows `rlhf`.
        log: its output is added to this file, and shown here.
        environment: added to this process's own.
        lock: a file descriptor that it inherits.

    Returns:
        The exit code; negative if a signal killed it.
    """
    alive, held = os.pipe()  # nobody else holds the second end: the first one ends with this process
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(alive), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        pass_fds=(lock, alive),
        start_new_session=True,  # so that the whole family can be told to end
    )
    os.close(alive)
    with log.open("ab", buffering=0) as file:
        pumps = [
            Thread(target=pump, args=(source, file, shown), daemon=True)
            for source, shown in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        for thread in pumps:
            thread.start()
        try:
            return process.wait()
        except BaseException:
            end(process)
            raise
        finally:
            os.close(held)
            for thread in pumps:
                thread.join(timeout=5)  # a server that the step left behind may hold its output open


def pump(source: BinaryIO, log: BinaryIO, shown: TextIO) -> None:
    """Copy what a step says, as it comes."""
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    with source:
        while block := os.read(source.fileno(), 1 << 16):
            log.write(block)
            shown.write(decoder.decode(block))
            shown.flush()


def end_with(parent: int) -> None:
    """Have this process and all that it has started in its group end when its parent does, even of SIGKILL.

    Args:
        parent: a pipe that ends with the parent.
    """

    def wait() -> None:
        os.read(parent, 1)
        os.killpg(0, signal.SIGTERM)

    Thread(target=wait, daemon=True).start()


def end(process: subprocess.Popen[bytes]) -> None:
    """Tell a step and all its processes to end, and kill what does not."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


@contextmanager
def terminable() -> Iterator[None]:
    """Leave by an exception on SIGTERM, so that a running step is ended too."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    from rlhf_cli.main import main

    end_with(int(sys.argv.pop(1)))
    main()
