"""A JSON lines file that a long job writes in order, and that a killed job goes on with where it stopped.

While a job goes on there are, beside OUTPUT:

- `OUTPUT.partial`, the lines so far;
- `OUTPUT.partial.index`, one JSON line per finished item: `[end of its lines in bytes, null]`, or
  `[end, reason, place]` for an item that was dropped;
- `OUTPUT.partial.job.json`, what the job is.

An item's lines are written first and its index line second, so what the index names is there. After a kill, the index
says how far the job got, and whatever lies behind that is cut off. At the end the first file becomes OUTPUT, the last
becomes `OUTPUT.job.json`, and the index is removed; readers never see half an output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf_data.errors import InputError, RunError

VERSION = 1
"""Of the files above; a job whose files have another version is another job."""

SHORT = 60
"""Longest value, in characters, that a message about two jobs shows."""

NO_OPTIONS = ("command", "version")
"""Parts of a job that are no options."""


class JobOutput:
    """The output of one job, by one process.

    The constructor only looks, and changes nothing; a `with` block takes the lock, makes the files whole and opens them.

    Args:
        path: OUTPUT.
        job: everything that decides the lines, as JSON, by the names of options where there are any.
        overwrite: throw away what is unfinished, and replace what this program did not write.

    Attributes:
        done: items that are complete, from an earlier run and this one; the next `append` is for item `done`.
        finished: the same job has completed, so there is nothing to do.
        dropped: for every reason why items were dropped, how many were, and where the first one is.
        summary: what `finish` was given, by the run that finished.

    Raises:
        InputError: OUTPUT cannot be written, is somebody else's file, or another job has begun to write it.
    """

    def __init__(self, path: Path, job: dict[str, Any], overwrite: bool = False) -> None:
        self.path, self.overwrite = path, overwrite
        self.job: dict[str, Any] = json.loads(json.dumps(job)) | {"version": VERSION}
        self.partial = beside(path, ".partial")
        self._index_path = beside(path, ".partial.index")
        self._record_path = beside(path, ".partial.job.json")
        self._lock_path = beside(path, ".partial.lock")
        self.done, self.finished = 0, False
        self.dropped: dict[str, tuple[int, str]] = {}
        self.summary: dict[str, Any] = {}
        self._replaces = overwrite
        self._check_place()
        self._examine()

    def __enter__(self) -> JobOutput:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self._lock_path)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"--output_path {self.path}: another run is writing it; wait for it, or name another file"
            ) from None
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._complete()
            self._examine()  # again: another run may have written since
            if not self.finished:
                self._open()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.finished:
            self._data.close()
            self._index.close()
        else:
            self._lock_path.unlink(missing_ok=True)
        self._lock.release()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines of the finished items, in order, read back one at a time."""
        with (self.path if self.finished else self.partial).open("rb") as file:
            for line in file:
                yield json.loads(line)

    def append(self, lines: Sequence[dict[str, Any]], dropped: str | None = None, place: object = "") -> None:
        """Write the next item.

        Args:
            lines: its lines; there may be none.
            dropped: the reason why it could not be used, if it could not.
            place: where such an item is, for people.

        Raises:
            RunError: the disk is full, or fails.
        """
        data = b"".join(map(as_line, lines))
        entry: list[Any] = [self._end + len(data), dropped]
        if dropped is not None:
            entry.append(str(place))
        try:
            write_all(self._data, data)
            write_all(self._index, as_line(entry))
        except OSError as error:
            raise self._unwritable(error) from error
        self._end += len(data)
        self._count(entry)

    def finish(self, summary: dict[str, Any]) -> None:
        """Put OUTPUT in its place, with `OUTPUT.job.json` that holds the job and this summary of it.

        Raises:
            RunError: the disk is full, or fails.
        """
        try:
            os.fsync(self._data.fileno())
            # From here on the job has finished: what a kill leaves undone, the next run completes.
            self._write_record({"bytes": self._end, "summary": summary})
            self._data.close()
            self._index.close()
            self._complete()
        except OSError as error:
            raise self._unwritable(error) from error
        self.finished, self.summary = True, summary

    def _check_place(self) -> None:
        """Refuse a path that cannot become a file."""
        from rlhf_core.plan import check_can_write

        if self.path.is_dir() or not self.path.name:
            raise InputError(f"--output_path {self.path} is a folder: name a file in it, such as {self.path}/out.jsonl")
        check_can_write("--output_path", str(self.path.parent))

    def _examine(self) -> None:
        """Find out what is there: nothing, this job, or something else."""
        record, final = read_record(self._record_path), read_record(beside(self.path, ".job.json"))
        if record is not None and "summary" in record:  # killed while it put its files in place
            record, final, intact = None, record, True
        else:
            intact = final is not None and self.path.is_file() and self.path.stat().st_size == final["bytes"]
        self.done, self.dropped, self._end, self._index_end = 0, {}, 0, 0
        self.finished = intact and final is not None and final["job"] == self.job and not self.overwrite
        if self.finished and final is not None:
            self.summary = final["summary"]
        if self.finished or self.overwrite:
            return
        unfinished = self.partial.exists()
        if record is not None and record["job"] != self.job and next(self._whole_lines(), None) is None:
            record, unfinished = None, False  # another job that had no item yet: this one takes its place
        if self.path.exists() and not intact and not (record and record["replaces"]):
            how = "has been changed since it was written" if final else "was not written by this program"
            raise InputError(
                f"--output_path {self.path} is there and {how}; name another file, or replace it with --overwrite"
            )
        if record is None:
            if unfinished:
                raise InputError(
                    f"{self.partial} is in the way: there is no {self._record_path.name} that says which job left it; "
                    "remove it, or throw it away with --overwrite"
                )
            return
        if record["job"] != self.job:
            raise InputError(
                f"{self.partial} is the unfinished output of another command ({differences(record['job'], self.job)}); "
                "run that one again to finish it, name another --output_path, or throw it away with --overwrite"
            )
        self._replaces = record["replaces"]
        for line in self._whole_lines():
            entry = json.loads(line)
            self._count(entry)
            self._end = entry[0]
            self._index_end += len(line)

    def _whole_lines(self) -> Iterator[bytes]:
        """Index lines that were written to their end, and whose data is there."""
        if not (self._index_path.is_file() and self.partial.is_file()):
            return
        size = self.partial.stat().st_size
        with self._index_path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)[0] > size:
                    return
                yield line

    def _count(self, entry: list[Any]) -> None:
        self.done += 1
        if entry[1] is not None:
            count, first = self.dropped.get(entry[1], (0, entry[2]))
            self.dropped[entry[1]] = (count + 1, first)

    def _open(self) -> None:
        """Begin, or go on behind the last item that is whole."""
        record = read_record(self._record_path)
        if self.overwrite or record is None or record["job"] != self.job:
            self._index_path.unlink(missing_ok=True)  # first: without it, whatever else is there counts for nothing
            self.partial.unlink(missing_ok=True)
            self._write_record({})
        # Unbuffered: a line that was appended survives the process, and a full disk is noticed at once.
        self._index = self._index_path.open("ab", buffering=0)
        self._data = self.partial.open("ab", buffering=0)
        self._index.truncate(self._index_end)
        self._data.truncate(self._end)

    def _write_record(self, more: dict[str, Any]) -> None:
        """Write what the job is, all of it or nothing."""
        part = beside(self.path, ".partial.job.json.new")
        with part.open("w", encoding="utf-8") as file:
            json.dump({"job": self.job, "replaces": self._replaces} | more, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._record_path)

    def _complete(self) -> None:
        """Move the files of a job that has finished to their places."""
        record = read_record(self._record_path)
        if record is None or "summary" not in record:
            return
        if self.partial.exists():
            self.partial.replace(self.path)
        self._index_path.unlink(missing_ok=True)
        self._record_path.replace(beside(self.path, ".job.json"))

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"{self.partial} cannot be written ({error.strerror or error}); {self.done:,} items are complete and kept: free "
            "some space and run the same command again (without --overwrite), it goes on from there"
        )


def beside(path: Path, ending: str) -> Path:
    """`out.jsonl` and `.partial` to `out.jsonl.partial`."""
    return path.with_name(path.name + ending)


def as_line(value: Any) -> bytes:
    """One JSON line in UTF-8; text that UTF-8 cannot hold (half of a surrogate pair) is escaped."""
    try:
        return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value, allow_nan=False) + "\n").encode()


def write_all(file: Any, data: bytes) -> None:
    """Write to an unbuffered file, which may take a part at a time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def read_record(path: Path) -> dict[str, Any] | None:
    """What a job left about itself; None if there is nothing, or nothing that a job of ours left."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("job"), dict) else None


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """In which options two jobs differ, with both values where they are short."""
    found = []
    for name in sorted(theirs.keys() | ours.keys()):
        before, now = theirs.get(name), ours.get(name)
        if before == now:
            continue
        option = name if name in NO_OPTIONS else f"--{name}"
        shown = [json.dumps(value, ensure_ascii=False) for value in (before, now)]
        short = all(len(text) <= SHORT and text[0] not in "[{" for text in shown)
        found.append(
            f"{option} was {shown[0]} and is {shown[1]}" if short else f"{option} stands for something else now"
        )
    return "; ".join(found)


def model_identity(name: str, config: Any) -> dict[str, Any]:
    """What tells a model from all others, for a job.

    A model on the Hub without a known commit goes by its name.

    Args:
        name: folder or Hub id.
        config: the model's architecture.
    """
    from rlhf_core.cache import model_identity as identity

    if not Path(name).expanduser().is_dir() and getattr(config, "_commit_hash", None) is None:
        return {"name": name}
    return identity(name, config)
