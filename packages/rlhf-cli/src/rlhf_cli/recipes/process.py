"""Running a step: a fresh process, whose output is shown and logged, and which never outlives the recipe."""

from __future__ import annotations

import ctypes
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

GRACE = 15.0
"""Seconds that a step has to end when it is told to, before it is killed."""

SET_PARENT_DEATH_SIGNAL = 1
"""`PR_SET_PDEATHSIG` of Linux's prctl."""


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
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid()), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        pass_fds=(lock,),
        start_new_session=True,  # so that the whole family can be told to end
    )
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


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent dies, even of SIGKILL.

    The child asks for it, not the parent before the exec: that would be a fork, for which a large parent may lack memory.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        raise SystemExit(TERMINATED)


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

    end_with_parent(int(sys.argv.pop(1)))
    main()
