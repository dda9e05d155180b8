from __future__ import annotations

import json
from collections.abc import Callable
from itertools import takewhile

import numpy as np
import pytest
from pydantic import ValidationError

from rlhf_data.config import LabelledDataConfig, PairDataConfig, RewardDataConfig
from rlhf_data.encode import EncodeOptions, Encoder
from rlhf_data.errors import InputError
from rlhf_data.preferences import PairData, prepare_labelled, prepare_pairs
from rlhf_data.rows import Pair, RowError

PAIRS = [
    {"prompt": f"where is {number}? ", "chosen": f"the mat {number}", "rejected": f"the dog {number} on it"}
    for number in range(40)
]
LABELLED = [
    {"prompt": f"where is {number}?", "response": f"the mat {number}", "label": number % 4 == 0} for number in range(40)
]


@pytest.fixture
def pairs(config, tokenizer) -> Callable[..., PairData]:
    """Prepares pairs, for a reward model unless something else is said."""

    def prepare(path, tokenizer=tokenizer, seed=0, same_prompt=False, share_prefix=True, **options) -> PairData:
        given = config(path, RewardDataConfig, **options)
        return prepare_pairs(given, tokenizer, seed=seed, same_prompt=same_prompt, share_prefix=share_prefix)

    return prepare


@pytest.fixture
def labelled(config, tokenizer):
    """Prepares labelled rows."""

    def prepare(path, tokenizer=tokenizer, seed=0, **options):
        return prepare_labelled(config(path, LabelledDataConfig, **options), tokenizer, seed=seed)

    return prepare


def reasons(data) -> dict[str, int]:
    return {reason: drop.count for reason, drop in data.report.sources[0].dropped.items()}


def refused(prepare, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        prepare(*arguments, **options)
    return str(error.value)


def decode(tokenizer, sample, trained: bool) -> str:
    return tokenizer.decode(sample.input_ids[sample.target_mask == trained].tolist())


def test_pairs_are_what_encoding_their_sides_gives(write, pairs, tokenizer):
    data = pairs(write("a.jsonl", PAIRS), eval_ratio=0)
    encoder = Encoder(tokenizer, EncodeOptions(512))
    assert len(data.train) == 40
    for number, row in enumerate(PAIRS):
        pair = data.train[number]
        for side, found in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            (encoded,) = encoder.encode([Pair(row["prompt"], row[side])])
            assert isinstance(encoded, list)
            assert found.input_ids.tolist() == encoded[0].input_ids.tolist()
            assert found.target_mask.tolist() == encoded[0].target_mask.tolist()
        (prompt,) = encoder.prompts([Pair(row["prompt"], "")])
        assert not isinstance(prompt, RowError)
        assert pair.shared == len(prompt.ids)
        assert pair.margin == 0.0
    assert decode(tokenizer, data.train[3].chosen, trained=True) == "the mat 3</s>"
    assert isinstance(data.train.samples._stores[0].ids, np.memmap)
    with pytest.raises(IndexError):
        data.train[40]
    assert data.train[-1].chosen.input_ids.tolist() == data.train[39].chosen.input_ids.tolist()


@pytest.mark.parametrize("kind", ["byte-level", "prepend", "metaspace always", "words"])
def test_shared_tokens_are_counted_right(write, pairs, make_tokenizer, kind):
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "dog"]
    rows = []
    for _ in range(60):
        prompt, chosen, rejected = (" ".join(rng.choice(words, rng.integers(1, 5))) for _ in range(3))
        rows.append({"chosen": _turns(prompt, chosen), "rejected": _turns(prompt, rejected)})
        rows.append({"chosen": _turns(prompt, chosen), "rejected": _turns(chosen, prompt)})
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = make_tokenizer(kind, chat_template=template)
    data = pairs(write("a.jsonl", rows), tokenizer, apply_chat_template=True, eval_ratio=0)
    assert len(data.train) > 60
    for pair in (data.train[number] for number in range(len(data.train))):
        sides = [side.input_ids.tolist() for side in (pair.chosen, pair.rejected)]
        prompts = [side.target_mask.tolist().index(True) for side in (pair.chosen, pair.rejected)]
        same = list(takewhile(lambda both: both[0] == both[1], zip(*sides, strict=False)))
        assert pair.shared == min(len(same), *prompts)


def _turns(prompt: str, response: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def test_lengths_are_those_of_a_batch(write, pairs):
    path = write("a.jsonl", PAIRS)
    sharing, apart = pairs(path).train, pairs(path, share_prefix=False).train
    for dataset in (sharing, apart):
        both = [dataset[number] for number in range(len(dataset))]
        assert dataset.lengths.tolist() == [len(pair.chosen) + len(pair.rejected) - pair.shared for pair in both]
        assert dataset.num_targets.tolist() == [
            int(pair.chosen.target_mask.sum() + pair.rejected.target_mask.sum()) for pair in both
        ]
        assert dataset.longest == max(len(side) for pair in both for side in (pair.chosen, pair.rejected))
        assert dataset.lengths.dtype == dataset.num_targets.dtype == np.int64
        assert dataset.shared.tolist() == [pair.shared for pair in both]
    assert (sharing.shared > 0).all()
    assert not apart.shared.any()
    assert (apart.lengths - sharing.lengths == sharing.shared).all()
    assert apart.fingerprint == sharing.fingerprint
    samples = sharing.samples
    assert len(samples) == 2 * len(sharing)
    assert samples[5].input_ids.tolist() == sharing[2].rejected.input_ids.tolist()
    part = sharing.subset(np.array([4, 1])).subset(np.array([0]))
    assert len(part) == 1
    assert part.fingerprint == sharing.subset(np.array([4])).fingerprint != sharing.fingerprint
    assert part[0].chosen.input_ids.tolist() == sharing[4].chosen.input_ids.tolist()
    assert part.lengths[0] == sharing.lengths[4]
    assert len(part.samples) == 2


def test_pairs_without_a_preference_are_dropped_and_counted(write, pairs, make_tokenizer):
    long = "the cat sat on the mat " * 20
    path = write(
        "a.jsonl",
        [
            *PAIRS[:5],
            PAIRS[0] | {"rejected": PAIRS[0]["chosen"]},
            {"prompt": "x ", "chosen": long + "a", "rejected": long + "b"},
            {"prompt": "x ", "chosen": long, "rejected": long},
            {"prompt": long, "chosen": "a", "rejected": "b"},
            {"prompt": "x ", "chosen": long, "rejected": "b"},
            {"prompt": "x", "chosen": "a", "rejected": ""},
        ],
    )
    data = pairs(path, max_len=40, eval_ratio=0, same_prompt=True)
    assert reasons(data) == {
        "chosen and rejected are the same": 2,
        "chosen and rejected are the same once cut at --max_len": 1,
        "prompt longer than --max_len": 1,
        "`rejected` is empty": 1,
    }
    assert data.report.sources[0].dropped["chosen and rejected are the same"].first == f"{path}:6"
    assert data.train.truncated.tolist() == [False] * 5 + [True]
    assert data.report.sources[0].truncated == 1
    assert (data.report.sources[0].rows_kept, data.report.sources[0].samples) == (6, 12)
    strict = write("s.jsonl", [*PAIRS[:5], PAIRS[0] | {"rejected": PAIRS[0]["chosen"]}])
    wanted = f"{strict}:6: chosen and rejected are the same (--strict_data: no row may be dropped)"
    assert refused(pairs, strict, strict_data=True) == wanted
    pairs(strict)  # and the same from the cache
    assert refused(pairs, strict, strict_data=True) == wanted
    assert "none of 1 rows" in refused(pairs, write("b.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "a"}]))
    # <unk> both: told apart by nobody who reads ids
    alike = pairs(
        write("c.jsonl", [*PAIRS, {"prompt": "the", "chosen": "é", "rejected": "è"}]), make_tokenizer("words")
    )
    assert reasons(alike)["chosen and rejected are the same"] >= 1


def test_dpo_needs_one_prompt_and_a_reward_model_does_not(write, pairs, chat_tokenizer):
    rows = [
        {"chosen": _turns("the cat", "sat"), "rejected": _turns("the cat", "on")},
        {"chosen": _turns("the cat", "sat"), "rejected": _turns("the dog", "on")},
        {"chosen": [*_turns("the cat", "sat"), *_turns("and", "on")], "rejected": _turns("the cat", "on")},
    ]
    path = write("a.jsonl", rows)
    options = {"tokenizer": chat_tokenizer, "apply_chat_template": True, "eval_ratio": 0}
    dpo, reward = pairs(path, same_prompt=True, **options), pairs(path, **options)
    assert len(dpo.train) == 1
    assert reasons(dpo) == {"chosen and rejected answer different prompts": 2}
    assert len(reward.train) == 3
    assert reward.report.sources[0].different_prompts == 2
    assert "pairs whose sides answer different prompts: 2" in reward.report.format()
    assert 0 < reward.train.shared[1] < reward.train.shared[0]
    assert decode(chat_tokenizer, reward.train[2].chosen, trained=True) == "on<|im_end|>"


@pytest.mark.parametrize("bos", [True, False])
def test_whole_texts_are_for_reward_models(write, pairs, make_tokenizer, bos):
    tokenizer = make_tokenizer("prepend", bos=bos)
    path = write("a.jsonl", [{"chosen": "the cat sat", "rejected": "the cat on"}, {"chosen": "the", "rejected": "cat"}])
    data = pairs(path, tokenizer, eval_ratio=0)
    chosen = data.train[0].chosen
    assert chosen.input_ids.tolist() == [*tokenizer.encode("the cat sat"), tokenizer.eos_token_id]
    assert chosen.target_mask.tolist() == [False] + [True] * (len(chosen) - 1)
    assert data.train.shared.tolist() == [1, 1]
    assert data.report.sources[0].different_prompts == 0
    assert "no prompt column" in data.report.format()
    assert "--prompt_key" in refused(pairs, path, tokenizer, same_prompt=True)
    assert "--prompt_key" in refused(pairs, path, tokenizer, input_template="Q: {} A: ")
    assert f"{path}:1" in refused(pairs, path, tokenizer, input_template="Q: {} A: ")
    templated = make_tokenizer("prepend", chat_template="{{ messages[0].content }}")
    assert "--prompt_key" in refused(pairs, path, templated, apply_chat_template=True)


def test_chat_pairs_need_a_chat_template(write, pairs):
    path = write("a.jsonl", [{"chosen": _turns("q", "a"), "rejected": _turns("q", "b")}])
    assert f"{path}:1: the rows hold chat messages: give --apply_chat_template" in refused(pairs, path)


def test_margins_come_with_margin_loss_only(write, pairs, labelled, config):
    rows = [row | {"margin": number / 8} for number, row in enumerate(PAIRS)]
    path = write("a.jsonl", rows)
    data = pairs(path, margin_loss=True, eval_ratio=0)
    assert data.train.margins.tolist() == [number / 8 for number in range(40)]
    assert data.train[3].margin == 0.375
    assert "margins from 0 to 4.875" in data.report.format()
    assert not pairs(path).train.margins.any()
    assert "margins from" not in pairs(path).report.format()
    csv = write("a.csv", "prompt,chosen,rejected,gap\nq,a,b,0.5\nq,c,d,2\n")
    assert pairs(csv, margin_loss=True, margin_key="gap", eval_ratio=0).train.margins.tolist() == [0.5, 2.0]
    broken = write("b.jsonl", [*rows, rows[0] | {"margin": None}])
    assert f"{broken}:41: `margin` is None" in refused(pairs, broken, margin_loss=True)
    assert "--margin_key margin: no key `margin`" in refused(pairs, write("c.jsonl", PAIRS), margin_loss=True)
    with pytest.raises(ValidationError, match="--margin_key gap is for --margin_loss"):
        config(path, RewardDataConfig, margin_key="gap")


def test_fingerprints_change_with_the_data_and_not_with_its_layout(write, pairs, labelled):
    def of(rows, **options):
        return pairs(write("a.jsonl", rows), eval_ratio=0.25, **options).train.fingerprint

    rows = [row | {"margin": 1.0} for row in PAIRS]
    first = of(rows)
    assert of(rows) == of(rows, share_prefix=False) == first
    swapped = rows[0] | {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    others = [
        of(rows, seed=1),
        of(rows[::-1]),
        of([swapped, *rows[1:]]),
        of(rows, margin_loss=True),
        of([rows[0] | {"margin": 2.0}, *rows[1:]], margin_loss=True),
        of(rows, max_samples=20),
    ]
    assert len({first, *others}) == 1 + len(others)

    def labels(rows, **options):
        return labelled(write("b.jsonl", rows), **options).train.fingerprint

    scores = [row | {"label": float(row["label"])} for row in LABELLED]
    once = labels(scores)
    assert labels(scores) == once
    assert len({once, labels([scores[0] | {"label": 0.0}, *scores[1:]]), labels(scores, label_threshold=2.0)}) == 3


def test_fingerprints_see_the_numbers_themselves(tmp_path):
    from rlhf_data.dataset import LabelledDataset
    from rlhf_data.encode import Sample
    from rlhf_data.store import RowSamples, open_store

    sample = Sample(np.array([1, 2], np.int32), np.array([False, True]))

    def build(folder, value):
        def fill(writer):
            writer.add([RowSamples([sample], value)])
            return {}

        return LabelledDataset([open_store(tmp_path / folder, "k", fill)[0]]).fingerprint

    assert build("a", 1.0) == build("b", 1.0) != build("c", 0.0)


def test_pairs_are_tokenised_once(write, pairs):
    path = write("a.jsonl", [row | {"margin": 1, "other": row["chosen"]} for row in PAIRS])
    assert not pairs(path).report.sources[0].cached
    assert pairs(path, share_prefix=False, seed=3).report.sources[0].cached
    for options in (
        {"same_prompt": True},
        {"margin_loss": True},
        {"chosen_key": "other"},
        {"prompt_key": "prompt"},
        {"max_len": 100},
    ):
        assert not pairs(path, **options).report.sources[0].cached, options


def test_pairs_are_mixed_and_held_out_like_all_data(write, pairs, tokenizer, tmp_path):
    first = write("a.jsonl", PAIRS)
    second = write("b.jsonl", [row | {"chosen": "dog " + row["chosen"]} for row in PAIRS[:20]])
    mixed = pairs(f"{first},{second}", dataset_probs="0.5,0.5", eval_ratio=0.25)
    assert mixed.eval is not None
    assert 20 < len(mixed.train) + len(mixed.eval) < 60
    assert "drawn by --dataset_probs" in mixed.report.notes[0]
    train, held = (
        {part[number].chosen.input_ids.tobytes() for number in range(len(part))} for part in (mixed.train, mixed.eval)
    )
    assert not train & held
    limited = pairs(f"{first},{second}", max_samples=10, eval_ratio=0)
    assert len(limited.train) == 10
    given = pairs(first, eval_dataset=second)
    assert given.eval is not None
    assert (len(given.train), len(given.eval)) == (40, 20)
    assert decode(tokenizer, given.eval[0].chosen, trained=True) == "dog the mat 0</s>"
    assert given.eval.lengths[0] == len(given.eval[0].chosen) + len(given.eval[0].rejected) - given.eval[0].shared


def test_the_report_of_pairs_shows_both_sides(write, pairs):
    data = pairs(write("a.jsonl", PAIRS))
    shown = data.report.format()
    assert "pairs: 39; " in shown
    share = data.train.shared.sum() / data.train.samples.lengths.sum()
    assert f"{100 * share:.0f}% of the tokens are shared prompts" in shown
    assert "chosen is the longer response in 0 (0%)" in shown
    assert "first pair, chosen, trained tokens in ⟦ ⟧:" in shown
    assert "? ⟦the mat" in shown
    assert "? ⟦the dog" in shown
    assert len(shown.split("\n")) <= 40
    assert pairs(write("a.jsonl", PAIRS), share_prefix=False).report.facts == data.report.facts
    saved = json.loads(json.dumps(data.report.to_dict()))
    assert saved["facts"]["pairs"] == 39
    assert saved["train"]["samples"] == 78


def test_labelled_rows_keep_their_labels(write, labelled, tokenizer):
    data = labelled(write("a.jsonl", LABELLED), eval_ratio=0.25)
    assert data.eval is not None
    assert (len(data.train), len(data.eval)) == (30, 10)
    for part in (data.train, data.eval):
        for number in range(len(part)):
            found = part[number]
            text = decode(tokenizer, found.sample, trained=True).removesuffix("</s>")
            (row,) = (row for row in LABELLED if row["response"] == text)
            assert found.label is row["label"]
            assert part.labels[number] == row["label"]
            assert part.samples[number].input_ids.tolist() == found.sample.input_ids.tolist()
            assert part.lengths[number] == len(found.sample)
        assert part.labels.dtype == np.bool_
        assert part.longest == part.lengths.max()
    assert "User: where is" in data.report.format()
    part = data.train.subset(np.array([3, 2]))
    assert part.labels.tolist() == data.train.labels[[3, 2]].tolist()


def test_the_report_of_labels_counts_them(write, labelled):
    def lines(rows):
        data = labelled(write("a.jsonl", rows), eval_ratio=0)
        (line,) = (line for line in data.report.format().split("\n") if line.startswith("labels: "))
        return line

    def rows(desirable, undesirable):
        return [row | {"label": number < desirable} for number, row in enumerate(LABELLED[: desirable + undesirable])]

    assert lines(rows(10, 9)) == "labels: 10 desirable, 9 undesirable"
    assert lines(rows(10, 30)).endswith("10 desirable, 30 undesirable; to balance them, give --desirable_loss_weight 3")
    assert lines(rows(30, 10)).endswith("to balance them, give --undesirable_loss_weight 3")
    assert lines(rows(5, 0)).endswith("5 desirable, 0 undesirable; with no undesirable row, responses are only raised")
    assert lines(rows(0, 5)).endswith("0 desirable, 5 undesirable; with no desirable row, responses are only lowered")


def test_a_bad_label_stops_with_its_place(write, labelled):
    path = write("a.jsonl", [*LABELLED, LABELLED[0] | {"label": 0.7}])
    assert f"{path}:41: `label` is 0.7; " in refused(labelled, path)
    assert f"{path}:1: `label` is True; " in refused(labelled, path, label_threshold=0.5)
    nothing = write("b.jsonl", [*LABELLED, {"prompt": "q", "response": "a"}])
    assert f"{nothing}:41: `label` is None; " in refused(labelled, nothing)
    scores = write("c.csv", "prompt,response,score\nq,a,4.5\nq,b,2\n")
    data = labelled(scores, label_key="score", label_threshold=3, eval_ratio=0)
    assert data.train.labels.tolist() == [True, False]


@pytest.mark.parametrize(
    ("kind", "options", "part"),
    [
        (PairDataConfig, {"packing_tokens": 1023}, "--packing_tokens 1023 is less than 2 times --max_len 512"),
        (LabelledDataConfig, {"packing_tokens": 100}, "--packing_tokens 100 is less than --max_len 2048"),
        (LabelledDataConfig, {"label_threshold": float("nan")}, "finite"),
        (PairDataConfig, {"row_format": "messages"}, "row_format"),
        (LabelledDataConfig, {"multiturn": True}, "multiturn"),
    ],
)
def test_options_that_do_not_fit_are_refused(config, kind, options, part):
    with pytest.raises(ValidationError) as error:
        config("a.jsonl", kind, **options)
    assert part in str(error.value)


def test_a_packed_row_holds_a_pair(config):
    assert config("a.jsonl", PairDataConfig, packing_tokens=1024).packing_tokens == 1024
    assert config("a.jsonl", LabelledDataConfig, packing_tokens=2048).packing_tokens == 2048
