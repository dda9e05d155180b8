"""What a reference says is computed once, goes on after a kill, and is computed again when its files are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from rlhf_core.cache import SampleCache, model_identity

OPTIONS = {"precompute_ref": True, "zero_stage": 0, "beta": 0.1}


class Killed(Exception):
    pass


@pytest.fixture
def computed(monkeypatch):
    """The first sample of every window that is computed; setting `kill` ends the run in that window."""
    from rlhf_core import cache

    class Windows(list):
        kill: int | None = None

    plain, windows = cache.micro_batches, Windows()

    def counting(window, *rest):
        yield from plain(window, *rest)
        if len(windows) == windows.kill:
            raise Killed
        windows.append((len(window.dataset), int(window.numbers[0])))

    monkeypatch.setattr(cache, "WINDOW", 8)
    monkeypatch.setattr(cache, "micro_batches", counting)
    return windows


@pytest.fixture
def run(train, tmp_path, other):
    def make(name: str, cache: str = "cache"):
        folders = {"save_path": str(tmp_path / name), "data_cache_dir": str(tmp_path / cache)}
        rows = train("dpo", ref_pretrain=str(other), **folders, **OPTIONS)
        for row in rows:
            row.pop("tokens_per_second", None)
        return rows, load_file(tmp_path / name / "model.safetensors")

    return make


def assert_identical(one, other) -> None:
    assert one[0] == other[0]
    assert all(one[1][name].equal(other[1][name]) for name in one[1])


def test_a_kill_costs_a_window(run, computed, tmp_path):
    whole = run("whole", cache="another")
    assert computed == [(23, 0), (23, 8), (23, 16), (3, 0)]
    computed.clear()
    computed.kill = 1
    with pytest.raises(Killed):
        run("cut")
    assert computed == [(23, 0)] and not (tmp_path / "cut/run").exists()
    computed.kill = None
    assert_identical(whole, run("cut"))
    assert computed == [(23, 0), (23, 8), (23, 16), (3, 0)]
    assert_identical(whole, run("again"))
    assert len(computed) == 4


def missing(folder: Path) -> None:
    (folder / "logps.npy").unlink()


def cut_off(folder: Path) -> None:
    array = folder / "logps.npy"
    array.write_bytes(array.read_bytes()[:-4])


def empty(folder: Path) -> None:
    (folder / "logps.npy").write_bytes(b"")


def of_another_shape(folder: Path) -> None:
    np.save(folder / "logps.npy", np.zeros(3, np.float32))


def mark_ahead(folder: Path) -> None:
    (folder / "done.json").write_text(json.dumps({"samples": 1000}))


def mark_broken(folder: Path) -> None:
    (folder / "done.json").write_text('{"samp')


def mark_of_another_kind(folder: Path) -> None:
    (folder / "done.json").write_text("[1]")


@pytest.mark.parametrize(
    "damage",
    [missing, cut_off, empty, of_another_shape, mark_ahead, mark_broken, mark_of_another_kind],
    ids=lambda f: f.__name__,
)
def test_a_damaged_cache_is_not_trusted(tmp_path, damage):
    """Nothing of it is complete, and filling it again makes it whole."""

    class Alone:
        is_first, world_size = True, 1

        def share(self, compute):
            return compute()

        def gather(self, value):
            return [value]

        def sum(self, values):
            return values

        def barrier(self):
            pass

    def cache() -> SampleCache:
        return SampleCache(tmp_path, "key", np.full(5, 2), {"logps": (np.dtype("f4"), 0)})

    def compute():
        return lambda window: ((n, {"logps": np.array([n, -n], np.float32)}) for n in range(len(window)))

    def fail():
        raise AssertionError("it was complete")

    cache().fill(range(5), compute, Alone(), "test")
    cache().fill(range(5), fail, Alone(), "test")
    damage(tmp_path / "key")
    assert cache().done() == 0
    again = cache()
    again.fill(range(5), compute, Alone(), "test")
    assert again.done() == 5 and again[3]["logps"].tolist() == [3, -3]


def test_a_damaged_cache_of_a_run_is_computed_again(run, computed, tmp_path):
    whole = run("whole")
    for array in (tmp_path / "cache").rglob("logps.npy"):
        array.unlink()
    computed.clear()
    assert_identical(whole, run("again"))
    assert len(computed) == 4


def test_a_model_is_told_apart_by_its_files(tiny, other, tmp_path):
    import shutil

    assert model_identity(str(tiny), None) == model_identity(str(tiny), None) != model_identity(str(other), None)
    copy = shutil.copytree(tiny, tmp_path / "copy")
    before = model_identity(str(copy), None)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_identity(str(copy), None) != before


def test_a_model_of_the_hub_is_told_by_its_commit():
    from types import SimpleNamespace

    one, other = (model_identity("some/model", SimpleNamespace(_commit_hash=commit)) for commit in ("aa", "bb"))
    assert one == model_identity("some/model", SimpleNamespace(_commit_hash="aa")) != other
    assert model_identity("some/model", None) != model_identity("some/model", None)


def test_a_full_disk_is_an_error_before_anything_is_written_into_a_map(run, monkeypatch, tmp_path):
    import errno

    from rlhf_data.errors import RunError

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_core.cache.os.posix_fallocate", full)
        with pytest.raises(RunError, match=r"cannot be written \(No space left on device\).*--data_cache_dir"):
            run("full")
    assert not (tmp_path / "full" / "model.safetensors").exists()
    assert run("again")[0]
