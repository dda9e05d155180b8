"""An output that is written in order and survives being killed at any byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_data.errors import InputError, RunError
from rlhf_infer.output import JobOutput, as_line

JOB = {"command": "generate", "temperature": 1.0, "dataset": ["0123"]}

ITEMS = [
    ([{"row": 0, "output": "a"}, {"row": 0, "output": "b"}], None, ""),
    ([], "too long", "data.jsonl:2"),
    ([{"row": 2, "output": "ünïcode 漢字 \n\u2028 end"}], None, ""),
    ([], "`prompt` is empty", "data.jsonl:4"),
    ([], "too long", "data.jsonl:5"),
    ([{"row": 5, "output": "half a pair: \ud83d"}], None, ""),
]

LINES = b"".join(as_line(line) for lines, _, _ in ITEMS for line in lines)


def write(output: JobOutput, stop: int | None = None) -> None:
    """Append the items that are left, up to number `stop`."""
    for lines, dropped, place in ITEMS[output.done : stop]:
        output.append(lines, dropped, place)


def begin(path: Path, items: int, job: dict = JOB) -> None:
    """Leave an output unfinished after some items, as a kill does."""
    with JobOutput(path, job) as output:
        write(output, items)


def complete(path: Path, job: dict = JOB) -> JobOutput:
    with JobOutput(path, job) as output:
        write(output)
        output.finish({"items": output.done})
    return output


def left_beside(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir() if file != path)


def test_a_finished_output_has_its_lines_in_order_and_a_record_of_the_job(tmp_path):
    path = tmp_path / "new" / "folder" / "out.jsonl"
    output = complete(path)
    assert path.read_bytes() == LINES
    assert [json.loads(line) for line in LINES.splitlines(keepends=True)[:1]] == [ITEMS[0][0][0]]
    record = json.loads((tmp_path / "new/folder/out.jsonl.job.json").read_text())
    assert record["job"] == JOB | {"version": 1}
    assert record["summary"] == {"items": 6}
    assert left_beside(path) == ["out.jsonl.job.json"]
    assert output.finished


def test_half_a_surrogate_pair_is_written_as_json_that_reads_back(tmp_path):
    complete(path := tmp_path / "out.jsonl")
    assert json.loads(path.read_bytes().rsplit(b"\n", 2)[1])["output"] == "half a pair: \ud83d"


def test_dropped_items_are_counted_by_reason_with_the_first_place_also_after_a_restart(tmp_path):
    expected = {"too long": (2, "data.jsonl:2"), "`prompt` is empty": (1, "data.jsonl:4")}
    assert complete(tmp_path / "whole.jsonl").dropped == expected
    for stop in range(len(ITEMS)):
        path = tmp_path / f"{stop}.jsonl"
        begin(path, stop)
        assert complete(path).dropped == expected


def test_a_job_that_is_finished_leaves_nothing_to_do(tmp_path):
    complete(path := tmp_path / "out.jsonl")
    before = path.stat().st_mtime_ns
    again = JobOutput(path, JOB)
    assert again.finished
    assert again.summary == {"items": 6}
    with again:
        assert [row["row"] for row in again.rows()] == [0, 0, 2, 5]
    assert path.stat().st_mtime_ns == before
    assert left_beside(path) == ["out.jsonl.job.json"]


def test_the_finished_items_can_be_read_back_before_the_rest_is_written(tmp_path):
    begin(path := tmp_path / "out.jsonl", 3)
    with JobOutput(path, JOB) as output:
        assert output.done == 3
        assert [row["row"] for row in output.rows()] == [0, 0, 2]
        write(output)
        output.finish({})
    assert path.read_bytes() == LINES


def test_a_run_that_was_killed_at_any_byte_goes_on_to_the_same_output(tmp_path):
    """Every prefix of the two files that writing leaves, whichever of them reached the disk."""
    begin(path := tmp_path / "out.jsonl", len(ITEMS))
    data = (tmp_path / "out.jsonl.partial").read_bytes()
    index = (tmp_path / "out.jsonl.partial.index").read_bytes()
    ends = [json.loads(line)[0] for line in index.splitlines()]
    for data_cut in range(len(data) + 1):
        for index_cut in {0, len(index), len(index) * data_cut // len(data), max(0, len(index) - 1)}:
            (tmp_path / "out.jsonl.partial").write_bytes(data[:data_cut])
            (tmp_path / "out.jsonl.partial.index").write_bytes(index[:index_cut])
            with JobOutput(path, JOB) as output:
                whole = index[:index_cut].count(b"\n")
                assert output.done == sum(end <= data_cut for end in ends[:whole])
                write(output)
            assert (tmp_path / "out.jsonl.partial").read_bytes() == data
            assert (tmp_path / "out.jsonl.partial.index").read_bytes() == index
    assert complete(path).done == len(ITEMS)
    assert path.read_bytes() == LINES


def test_every_byte_of_the_index_may_be_the_last_one(tmp_path):
    begin(path := tmp_path / "out.jsonl", len(ITEMS))
    index_path = tmp_path / "out.jsonl.partial.index"
    index = index_path.read_bytes()
    for cut in range(len(index)):
        index_path.write_bytes(index[:cut])
        begin(path, len(ITEMS))
        assert index_path.read_bytes() == index


@pytest.mark.parametrize("name", ["out.jsonl.partial", "out.jsonl.partial.index"])
def test_an_unfinished_output_that_lost_a_file_starts_anew(name, tmp_path):
    begin(path := tmp_path / "out.jsonl", 4)
    (tmp_path / name).unlink()
    assert JobOutput(path, JOB).done == 0
    complete(path)
    assert path.read_bytes() == LINES


@pytest.mark.parametrize("step", ["rename", "record"])
def test_a_kill_while_the_files_are_put_in_place_is_completed_by_the_next_run(step, tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    whole = Path.replace
    moved = []

    def killed(self: Path, target: Path) -> Path:
        if Path(target).name == {"rename": "out.jsonl", "record": "out.jsonl.job.json"}[step]:
            raise KeyboardInterrupt
        moved.append(Path(target).name)
        return whole(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        complete(path)
    assert ("out.jsonl" in moved) == (step == "record")
    monkeypatch.undo()
    seen = JobOutput(path, JOB)
    assert seen.finished
    with seen:
        assert list(map(as_line, seen.rows())) == LINES.splitlines(keepends=True)
    assert path.read_bytes() == LINES
    assert left_beside(path) == ["out.jsonl.job.json"]


def test_the_old_output_stays_until_the_new_one_is_whole(tmp_path):
    complete(path := tmp_path / "out.jsonl")
    with JobOutput(path, JOB | {"temperature": 0.5}) as output:
        assert output.done == 0
        output.append([{"row": 0}])
        assert path.read_bytes() == LINES
        output.finish({})
    assert path.read_bytes() == b'{"row": 0}\n'
    assert JobOutput(path, JOB | {"temperature": 0.5}).finished
    assert not JobOutput(path, JOB).finished


def test_the_unfinished_output_of_another_command_is_refused_with_the_options_that_differ(tmp_path):
    begin(path := tmp_path / "out.jsonl", 2)
    with pytest.raises(InputError, match=r"--temperature was 1\.0 and is 0\.5.*--overwrite") as refused:
        JobOutput(path, JOB | {"temperature": 0.5})
    assert "--dataset" not in str(refused.value)
    with pytest.raises(InputError, match="--dataset stands for something else now; --top_p was null and is 1"):
        JobOutput(path, JOB | {"dataset": ["4567"], "top_p": 1})
    assert JobOutput(path, JOB).done == 2


def test_another_command_that_had_written_nothing_yet_leaves_its_place(tmp_path):
    path = tmp_path / "out.jsonl"
    begin(path, 0, JOB | {"temperature": 0.5})
    complete(path)
    assert path.read_bytes() == LINES
    path.write_text("somebody's")
    (tmp_path / "out.jsonl.job.json").unlink()
    with JobOutput(path, JOB | {"temperature": 0.5}, overwrite=True):
        pass
    with pytest.raises(
        InputError, match="was not written by this program"
    ):  # that one might replace it, this one may not
        JobOutput(path, JOB)


def test_overwrite_throws_an_unfinished_output_away(tmp_path):
    begin(path := tmp_path / "out.jsonl", 2)
    other = JOB | {"temperature": 0.5}
    with JobOutput(path, other, overwrite=True) as output:
        assert output.done == 0
        output.append([{"row": 7}])
    assert list(JobOutput(path, other).rows()) == [{"row": 7}]


def test_overwrite_writes_a_finished_output_anew(tmp_path):
    complete(path := tmp_path / "out.jsonl")
    with JobOutput(path, JOB, overwrite=True) as output:
        assert not output.finished
        output.append([{"row": 7}])
        output.finish({})
    assert path.read_bytes() == b'{"row": 7}\n'


def test_somebody_elses_file_is_replaced_only_with_overwrite(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("mine\n")
    with pytest.raises(InputError, match=r"out\.jsonl.*not written by this program.*--overwrite"):
        JobOutput(path, JOB)
    with JobOutput(path, JOB, overwrite=True) as output:
        write(output, 3)
    assert path.read_text() == "mine\n"
    with JobOutput(path, JOB) as output:  # that it may be replaced was said when the job began
        assert output.done == 3
        write(output)
        output.finish({})
    assert path.read_bytes() == LINES


def test_an_output_that_was_changed_by_hand_is_nobodys_to_replace(tmp_path):
    complete(path := tmp_path / "out.jsonl")
    path.write_bytes(LINES + b'{"row": 9}\n')
    with pytest.raises(InputError, match="has been changed since it was written"):
        JobOutput(path, JOB)


def test_an_output_that_was_removed_is_written_again(tmp_path):
    complete(path := tmp_path / "out.jsonl")
    path.unlink()
    assert not JobOutput(path, JOB).finished
    complete(path)
    assert path.read_bytes() == LINES


def test_a_partial_file_of_unknown_origin_is_refused(tmp_path):
    (tmp_path / "out.jsonl.partial").write_text("mine\n")
    with pytest.raises(InputError, match=r"out\.jsonl\.partial is in the way"):
        JobOutput(tmp_path / "out.jsonl", JOB)


def test_two_runs_do_not_write_the_same_output(tmp_path):
    path = tmp_path / "out.jsonl"
    with JobOutput(path, JOB) as output:
        with pytest.raises(InputError, match="another run is writing it"), JobOutput(path, JOB):
            pass
        write(output)
        output.finish({})
    assert path.read_bytes() == LINES


def test_a_run_sees_what_another_one_finished_since_it_looked(tmp_path):
    early = JobOutput(path := tmp_path / "out.jsonl", JOB)
    complete(path)
    with early:
        assert early.finished


@pytest.mark.parametrize(("name", "says"), [("", "is a folder"), ("taken/out.jsonl", "taken is a file")])
def test_a_path_that_cannot_become_a_file_is_refused(name, says, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match=says):
        JobOutput(tmp_path / name, JOB)


def test_looking_changes_nothing(tmp_path):
    JobOutput(tmp_path / "new" / "out.jsonl", JOB)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(tmp_path):
    """The disk takes half of an item's lines; what was complete before is kept."""

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(bytes(data)[:10])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = tmp_path / "out.jsonl"
    with (
        pytest.raises(RunError, match=r"No space left on device.*2 items.*run the same command again"),
        JobOutput(path, JOB) as output,
    ):
        write(output, 2)
        output._data = Full(output._data)
        write(output)
    assert JobOutput(path, JOB).done == 2
    complete(path)
    assert path.read_bytes() == LINES


def test_a_number_that_json_does_not_have_is_an_error_and_not_a_broken_line(tmp_path):
    with JobOutput(tmp_path / "out.jsonl", JOB) as output:
        with pytest.raises(ValueError, match="JSON"):
            output.append([{"reward": float("nan")}])
        output.append([{"reward": 1.0}])
    assert (tmp_path / "out.jsonl.partial").read_bytes() == b'{"reward": 1.0}\n'
