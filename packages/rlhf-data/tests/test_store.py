from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rlhf_data.dataset import TokenDataset, samples_of_rows
from rlhf_data.encode import Sample
from rlhf_data.errors import InputError
from rlhf_data.store import RowSamples, TokenStore, cache_dir, open_store, store_key


def sample(*ids: int, truncated: bool = False) -> Sample:
    mask = np.ones(len(ids), np.bool_)
    mask[0] = False
    return Sample(np.array(ids, np.int32), mask, truncated)


# two rows, the second of two samples
FIRST = [RowSamples([sample(1, 2, 3)]), RowSamples([sample(4, 5), sample(5, 6, 7, 8, truncated=True)], 0.5, 1)]
SECOND = [RowSamples([sample(9, 10)], 1.0), RowSamples([sample(11, 12, 13)])]


def build(folder: Path, key: str, *blocks) -> TokenStore:
    def fill(writer):
        for block in blocks:
            writer.add(block)
        return {}

    return open_store(folder, key, fill)[0]


def test_samples_come_back_as_they_were_written(tmp_path):
    store = build(tmp_path, "k", FIRST, [], SECOND)
    written = [item for row in FIRST + SECOND for item in row.samples]
    assert len(store) == 5
    assert store.num_rows == 4
    assert store.rows.tolist() == [0, 1, 3, 4, 5]
    assert store.values.tolist() == [0, 0.5, 1, 0]
    assert store.shared.tolist() == [0, 1, 0, 0]
    for number, expected in enumerate(written):
        found = store.sample(number)
        assert found.input_ids.tolist() == expected.input_ids.tolist()
        assert found.target_mask.tolist() == expected.target_mask.tolist()
        assert found.truncated == expected.truncated
        assert found.input_ids.dtype == np.int32
    assert isinstance(store.ids, np.memmap)


def test_a_view_joins_stores_in_its_own_order(tmp_path):
    stores = [build(tmp_path, "a", FIRST), build(tmp_path, "b", SECOND)]
    whole = TokenDataset(stores)
    assert whole.lengths.tolist() == [3, 2, 4, 2, 3]
    assert whole.longest == 4
    assert whole.num_targets.tolist() == [2, 1, 3, 1, 2]
    assert whole.truncated.tolist() == [False, False, True, False, False]
    assert [whole[number].input_ids[0] for number in range(5)] == [1, 4, 5, 9, 11]
    part = whole.subset(np.array([4, 0])).subset(np.array([0]))
    assert len(part) == 1
    assert part[0].input_ids.tolist() == [11, 12, 13]
    assert part.fingerprint == whole.subset(np.array([4])).fingerprint != whole.fingerprint


def test_rows_bring_all_their_samples(tmp_path):
    stores = [build(tmp_path, "a", FIRST), build(tmp_path, "b", SECOND)]
    assert samples_of_rows(stores, np.array([2, 1])).tolist() == [3, 1, 2]
    assert samples_of_rows(stores, np.arange(4)).tolist() == [0, 1, 2, 3, 4]
    assert samples_of_rows(stores, np.zeros(0, np.int64)).tolist() == []


def test_an_empty_store_opens(tmp_path):
    store = build(tmp_path, "empty")
    assert len(store) == store.num_rows == 0
    assert len(TokenDataset([store])) == 0


def test_a_store_is_built_once_even_by_many_at_once(tmp_path):
    built = []

    def fill(writer):
        built.append(1)
        writer.add(FIRST)
        return {"rows": 2}

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: open_store(tmp_path, "k", fill), range(8)))
    assert len(built) == 1
    assert sorted(cached for _, cached in results) == [False] + [True] * 7
    assert {store.meta["report"]["rows"] for store, _ in results} == {2}


@pytest.mark.parametrize("damage", ["cut", "missing", "garbled", "meta", "other sizes"])
def test_a_damaged_store_is_built_again(tmp_path, damage):
    folder = build(tmp_path, "k", FIRST).folder
    ids = folder / "ids.npy"
    if damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "missing":
        ids.unlink()
    elif damage == "garbled":
        ids.write_bytes(b"x" * 200)
    elif damage == "meta":
        (folder / "meta.json").write_text("{")
    else:
        shutil.copy(folder / "offsets.npy", folder / "rows.npy")
    assert len(build(tmp_path, "k", SECOND)) == 2


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    def fill(writer):
        writer.add(FIRST)
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        open_store(tmp_path, "k", fill)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert len(build(tmp_path, "k", FIRST)) == 3


def test_a_cache_that_cannot_be_written_names_its_option(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match="--data_cache_dir"):
        build(file / "cache", "k", FIRST)

    def full(writer):
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"No space left on device.*--data_cache_dir"):
        open_store(tmp_path / "cache", "k", full)


def test_the_cache_lies_where_the_user_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir(None) == tmp_path / "rlhf" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir(None) == Path.home() / ".cache" / "rlhf" / "tokens"
    assert cache_dir("~/x") == Path.home() / "x"


def test_a_key_depends_on_each_part():
    assert store_key(a=1, b=[2]) == store_key(b=[2], a=1) != store_key(a=1, b=[3])
