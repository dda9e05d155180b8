"""Writing responses to the prompts of a data set: every row once, in order, whatever the engine does and however often it dies."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rlhf_infer
from rlhf_data.encode import EncodeOptions, Encoder
from rlhf_data.errors import InputError, RunError
from rlhf_data.rows import Pair
from rlhf_data.tokenizer import load_tokenizer
from rlhf_infer.config import SamplingConfig
from rlhf_infer.engines import choose
from rlhf_infer.engines.engine import Completion, Request, sample_seed
from rlhf_infer.generate import as_json, in_order, source_columns
from rlhf_infer.output import JobOutput

WORDS = "red blue green cat dog bird sun moon star tree river stone".split()
EOS = 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer model with its tokenizer."""
    from rlhf_core.libraries import settle
    from rlhf_core.tiny import make_model, make_tokenizer

    settle()
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer([" ".join(WORDS), "Say please and thank you to the tree"], folder, vocab_size=300)
    make_model(tokenizer, folder, hidden_size=64, max_len=64)
    return folder


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {WORDS[n % 12]} {'please ' * (n % 5)}{n}", "id": n} for n in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    def write(content: Iterable[dict[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return path

    return write


class Shuffling:
    """An engine that answers from memory, out of order: what it says follows from the seed alone."""

    def __init__(self, window: int = 9) -> None:
        self.window, self.asked, self.closed = window, [], False

    def generate(
        self, requests: Iterable[Request], sampling: SamplingConfig
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        waiting, draws = [], random.Random(0)
        for number, request in enumerate(requests):
            self.asked.append(request)
            waiting.append((number, request))
            if len(waiting) == self.window:
                yield self._answer(*waiting.pop(draws.randrange(self.window)), sampling)
        for number, request in reversed(waiting):
            yield self._answer(number, request, sampling)

    def _answer(self, number: int, request: Request, sampling: SamplingConfig) -> tuple[int, tuple[Completion, ...]]:
        return number, tuple(self._draw(request.seed + k, sampling) for k in range(sampling.best_of_n))

    def _draw(self, seed: int, sampling: SamplingConfig) -> Completion:
        draws = random.Random(seed)
        ids = [draws.randrange(40, 250) for _ in range(draws.randrange(1, sampling.max_new_tokens))]
        return (
            Completion((*ids, EOS), "stop", -0.25 * len(ids), seed)
            if seed % 3
            else Completion(tuple(ids), "length", -1.5, seed)
        )

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Shuffling:
    """Takes the place of every engine."""
    made = Shuffling()
    monkeypatch.setattr(choose, "make_engine", lambda config, model_config, tokenizer: made)
    return made


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Callable[..., Any]:
    """Generate with small defaults; returns the lines of the output."""

    def generate(dataset: Path | str, out: str = "out.jsonl", **options: Any) -> list[dict[str, Any]]:
        usual = {"pretrain": str(tiny), "engine": "transformers", "max_new_tokens": 6, "prompt_max_len": 40}
        rlhf_infer.generate(dataset=str(dataset), output_path=str(tmp_path / out), **usual | options)
        return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]

    return generate


def no_engine(*args: Any) -> Any:
    raise AssertionError("an engine was made")


def test_every_prompt_has_its_responses_in_the_order_of_the_rows(run, data, engine, tiny):
    source = rows(40)
    lines = run(data(source), best_of_n=3)
    assert [(line["row"], line["sample"]) for line in lines] == [(n, k) for n in range(40) for k in range(3)]
    assert [line["input"] for line in lines] == [row["prompt"] for row in source for _ in range(3)]
    assert [line["source"] for line in lines] == [{"id": n} for n in range(40) for _ in range(3)]
    assert [line["seed"] for line in lines] == [sample_seed(42, n) + k for n in range(40) for k in range(3)]
    assert {line["model"] for line in lines} == {str(tiny)}
    assert engine.closed


def test_a_line_holds_what_the_engine_wrote_and_its_text_without_the_stop_token(run, data, engine, tiny):
    tokenizer = load_tokenizer(str(tiny))
    lines = run(data(rows(30)))
    reasons = {line["finish_reason"] for line in lines}
    assert reasons == {"stop", "length"}
    for line in lines:
        said = engine._draw(line["seed"], SamplingConfig(max_new_tokens=6))
        assert line["output_ids"] == list(said.token_ids)
        assert (line["finish_reason"], line["logp"]) == (said.finish_reason, said.logp)
        text = said.token_ids[:-1] if said.finish_reason == "stop" else said.token_ids
        assert line["output"] == tokenizer.decode(text)
        assert list(line) == [
            "row", "sample", "input", "output", "rendered", "finish_reason", "logp", "seed", "model", "output_ids", "source",
        ]  # fmt: skip


def test_the_engine_is_asked_with_the_ids_that_training_sees(run, data, engine, tiny):
    lines = run(data(rows(12)), input_template=r"Q: {}\nA:")
    encoder = Encoder(load_tokenizer(str(tiny)), EncodeOptions(max_len=64))
    for line, request in zip(lines, engine.asked, strict=True):
        assert line["input"].startswith("Q: Say ") and line["input"].endswith("\nA:")
        ((sample,),) = encoder.encode([Pair(line["input"], "x", rendered=line["rendered"])])
        assert list(request.prompt_ids) == sample.input_ids[~sample.target_mask].tolist()


def test_rows_that_cannot_be_used_are_counted_by_reason_with_the_first_place(run, data, engine, tmp_path, capsys):
    source = rows(12)
    source[3] = {"prompt": "", "id": 3}
    source[5] = {"prompt": "please " * 60}
    source[9] = {"prompt": "please " * 50}
    path = data(source)
    lines = run(path, best_of_n=2)
    assert [line["row"] for line in lines] == [n for n in range(12) if n not in (3, 5, 9) for _ in range(2)]
    summary = json.loads((tmp_path / "out.jsonl.job.json").read_text())["summary"]
    assert summary["prompts"] == 12 and summary["responses"] == 18
    assert summary["dropped"] == {
        "`prompt` is empty": [1, f"{path}:4"], "prompt longer than --prompt_max_len 40": [2, f"{path}:6"],
    }  # fmt: skip
    assert f"dropped 2: prompt longer than --prompt_max_len 40 (first: {path}:6)" in capsys.readouterr().out


def test_a_prompt_that_fills_the_models_context_is_dropped(run, data, engine, tmp_path):
    source = [{"prompt": "tree " * 20}, {"prompt": "tree " * 64}]
    lines = run(data(source), prompt_max_len=63)
    assert [line["row"] for line in lines] == [0]
    (reason,) = json.loads((tmp_path / "out.jsonl.job.json").read_text())["summary"]["dropped"]
    assert reason == "prompt longer than --prompt_max_len 63"


def test_the_summary_is_about_the_whole_output(run, data, engine, tmp_path):
    lines = run(data(rows(30)), best_of_n=2)
    summary = json.loads((tmp_path / "out.jsonl.job.json").read_text())["summary"]
    lengths = [len(line["output_ids"]) for line in lines]
    assert summary["tokens"] == sum(lengths)
    assert summary["mean_length"] == sum(lengths) / 60
    assert summary["truncated"] == sum(line["finish_reason"] == "length" for line in lines) / 60
    assert summary["engine"] == "transformers"
    assert {"rlhf-infer", "torch", "transformers"} == set(summary["versions"])


def test_slices_are_the_parts_of_the_whole_and_the_last_one_may_be_shorter(run, data, engine):
    path = data(rows(11))
    whole = run(path, "whole.jsonl")
    slices = [run(path, f"{n}.jsonl", iter=n, rollout_batch_size=4) for n in range(3)]
    assert [len(part) for part in slices] == [4, 4, 3]
    assert [line for part in slices for line in part] == whole


@pytest.mark.parametrize(
    ("rows_there", "says"), [(11, "11 prompts.*3 iterations.*--iter 0 to 2"), (4, "4 prompts.*only --iter 0")]
)
def test_a_slice_past_the_end_says_how_many_there_are(rows_there, says, run, data, monkeypatch, tmp_path):
    monkeypatch.setattr(choose, "make_engine", no_engine)
    with pytest.raises(InputError, match=f"--iter 7 is past the end of the data: .*{says}"):
        run(data(rows(rows_there)), iter=7, rollout_batch_size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_run_that_was_killed_anywhere_goes_on_to_the_same_bytes(run, data, engine, tmp_path):
    source = rows(24)
    source[2] = source[11] = {"prompt": None}
    path = data(source)
    run(path, "whole.jsonl", best_of_n=2)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    summary = json.loads((tmp_path / "whole.jsonl.job.json").read_text())["summary"]
    draws, engine.window = random.Random(1), 3
    for _ in range(12):
        stop = draws.randrange(1, 22)

        def dying(requests, sampling, stop=stop):
            for answered, answer in enumerate(Shuffling.generate(engine, requests, sampling)):
                if answered == stop:
                    raise KeyboardInterrupt
                yield answer

        engine.generate = dying
        with pytest.raises(KeyboardInterrupt):
            run(path, best_of_n=2)
        del engine.generate
        for name in ("out.jsonl.partial", "out.jsonl.partial.index"):  # a kill may come between any two bytes
            file = tmp_path / name
            content = file.read_bytes()
            file.write_bytes(content[: len(content) - draws.choice([0, 0, 1, 5, 40, 400])] if content else b"")
        run(path, best_of_n=2)
        assert (tmp_path / "out.jsonl").read_bytes() == whole
        resumed = json.loads((tmp_path / "out.jsonl.job.json").read_text())["summary"]
        for name in ("prompts", "dropped", "responses", "truncated", "mean_length", "tokens"):
            assert resumed[name] == summary[name]
        (tmp_path / "out.jsonl").unlink()


def test_a_restart_asks_only_for_what_is_missing(run, data, engine, tmp_path):
    path = data(rows(20))
    lines = run(path)
    engine.asked.clear()
    job = json.loads((tmp_path / "out.jsonl.job.json").read_text())["job"]
    (tmp_path / "out.jsonl").unlink()
    del job["version"]
    with JobOutput(tmp_path / "out.jsonl", job) as output:
        for line in lines[:15]:
            output.append([line])
    assert run(path) == lines
    assert [request.seed for request in engine.asked] == [line["seed"] for line in lines[15:]]


def test_a_finished_output_loads_nothing_and_says_so(run, data, engine, monkeypatch, capsys, tmp_path):
    path = data(rows(6))
    lines = run(path)
    capsys.readouterr()
    monkeypatch.setattr(choose, "make_engine", no_engine)
    assert run(path) == lines
    assert "finished already" in capsys.readouterr().out


def test_a_run_that_was_killed_after_its_last_row_is_finished_without_an_engine(
    run, data, engine, monkeypatch, tmp_path
):
    path = data(rows(6))

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(JobOutput, "finish", killed)
        run(path)
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.setattr(choose, "make_engine", no_engine)
    assert len(run(path)) == 6


def test_batch_sizes_do_not_make_it_another_job(run, data, engine, monkeypatch):
    path = data(rows(6))
    lines = run(path)
    monkeypatch.setattr(choose, "make_engine", no_engine)
    assert run(path, micro_batch_size=3) == lines


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"temperature": 0.5}, "--temperature was 1.0 and is 0.5"),
        ({"best_of_n": 2}, "--best_of_n was 1 and is 2"),
        ({"seed": 1}, "--seed was 42 and is 1"),
        ({"csft_reward": 1.0}, "--csft_reward was null and is 1.0"),
        ({"input_template": "{}!"}, "--input_template was null"),
        ({"iter": 0, "rollout_batch_size": 3}, "--iter was null and is 0; --rollout_batch_size was null and is 3"),
        ({"max_samples": 5}, "--max_samples was null and is 5"),
    ],
)
def test_an_unfinished_output_is_not_continued_with_other_options(
    changed, says, run, data, engine, monkeypatch, tmp_path
):
    path = data(rows(6))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(JobOutput, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        run(path)
    monkeypatch.setattr(choose, "make_engine", no_engine)
    with pytest.raises(InputError) as refused:
        run(path, **changed)
    assert says in str(refused.value)


def test_other_rows_or_another_model_make_it_another_job(run, data, engine, monkeypatch, tmp_path, tiny):
    path = data(rows(6))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(JobOutput, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        run(path)
    data(rows(7))
    with pytest.raises(InputError, match=r"\(--dataset stands for something else now\)"):
        run(path)
    data(rows(6))
    config = tiny / "config.json"
    before = config.stat().st_mtime_ns
    config.touch()
    assert config.stat().st_mtime_ns != before
    with pytest.raises(InputError, match=r"\(--pretrain stands for something else now\)"):
        run(path)


def test_another_chat_template_makes_it_another_job(run, data, engine, tiny, monkeypatch):
    run(data(rows(6)), apply_chat_template=True)
    template = tiny / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before.replace("<|assistant|>", "<|user|>"))
    try:
        with monkeypatch.context() as patch, pytest.raises(AssertionError, match="an engine was made"):
            patch.setattr(choose, "make_engine", no_engine)
            run(data(rows(6)), apply_chat_template=True)
    finally:
        template.write_text(before)


def test_what_else_lies_in_the_models_folder_is_no_part_of_the_model(tiny):
    from rlhf_core.cache import model_identity

    before = model_identity(str(tiny), None)
    (tiny / "recipe.json").write_text("{}")
    try:
        assert model_identity(str(tiny), None) == before and "config.json" in before
    finally:
        (tiny / "recipe.json").unlink()


def test_an_end_token_that_is_not_the_tokenizers_eos_is_kept_apart(run, data, engine, monkeypatch):
    monkeypatch.setattr(engine, "_draw", lambda seed, sampling: Completion((50, 4), "stop", -1.0, seed))
    (line,) = run(data(rows(1)))
    assert line["stop_token"] == "<|assistant|>" and "<|assistant|>" not in line["output"]
    assert line["output_ids"] == [50, 4]


def test_an_output_in_the_models_folder_does_not_make_it_another_model(data, engine, tiny):
    """The recipes of OpenRLHF write there."""
    path, out = data(rows(6)), tiny / "generate.jsonl"
    options = {"pretrain": str(tiny), "dataset": str(path), "engine": "transformers", "prompt_max_len": 40}
    for temperature in (1.0, 0.5, 0.5):
        summary = rlhf_infer.generate(output_path=str(out), temperature=temperature, **options)
        assert summary.prompts == 6
    asked = len(engine.asked)
    rlhf_infer.generate(output_path=str(out), temperature=0.5, **options)
    assert len(engine.asked) == asked == 12


def test_a_dry_run_checks_and_writes_nothing(tiny, data, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(choose, "make_engine", no_engine)
    path = data(rows(6))
    options = {"pretrain": str(tiny), "dataset": str(path), "engine": "transformers", "prompt_max_len": 40}
    assert rlhf_infer.generate(dry_run=True, output_path=str(tmp_path / "new/out.jsonl"), **options) is None
    assert "6 prompts" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


def test_prompts_are_conditioned_on_a_reward_as_training_does_it(run, data, engine, tiny):
    lines = run(data(rows(8)), csft_reward=4.5, input_template="Q: {}")
    assert lines[3]["input"] == f"Q: {rows(8)[3]['prompt']} <rm_score>: 4.50 "
    assert lines[3]["plain_input"] == f"Q: {rows(8)[3]['prompt']}" and lines[3]["asked_reward"] == 4.5
    encoder = Encoder(load_tokenizer(str(tiny)), EncodeOptions(max_len=64))
    trained = encoder.encode([Pair(line["input"], "tree", rendered=line["rendered"]) for line in lines])
    for (sample,), request in zip(trained, engine.asked, strict=True):
        assert list(request.prompt_ids) == sample.input_ids[~sample.target_mask].tolist()


def test_chat_rows_keep_their_messages_and_are_asked_without_a_last_reply(run, data, engine):
    tools = [{"name": "look"}]
    chats = [
        {
            "messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "cat"}],
            "tools": tools,
            "id": 7,
        },
        {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "dog"}], "id": 8},
    ]
    lines = run(data(chats), apply_chat_template=True)
    assert [line["input"] for line in lines] == ["<|user|>red<|assistant|>", "<|system|>be<|user|>dog<|assistant|>"]
    assert [line["rendered"] for line in lines] == ["chat", "chat"]
    assert [line["messages"] for line in lines] == [chats[0]["messages"][:1], chats[1]["messages"]]
    assert lines[0]["tools"] == tools and "tools" not in lines[1]
    assert [line["source"] for line in lines] == [{"id": 7}, {"id": 8}]


def test_plain_prompts_that_a_chat_template_wrote_out_have_messages_too(run, data, engine):
    lines = run(data([{"prompt": "red"}]), apply_chat_template=True)
    assert lines[0]["input"] == "<|user|>red<|assistant|>"
    assert lines[0]["messages"] == [{"role": "user", "content": "red"}]


def test_generated_rows_can_be_asked_again_and_are_not_written_out_twice(run, data, engine, tmp_path):
    first = run(data(rows(4)), input_template="Q: {}")
    again = run(tmp_path / "out.jsonl", "again.jsonl")
    assert [line["input"] for line in again] == [line["input"] for line in first]
    with pytest.raises(InputError, match="written out already"):
        run(tmp_path / "out.jsonl", "chat.jsonl", apply_chat_template=True)


def test_a_slow_answer_holds_the_others_back_and_no_longer():
    answers = [(1, ("b",)), (2, ("c",)), (0, ("a",)), (4, ("e",)), (3, ("d",))]
    assert list(in_order(iter(answers))) == [("a",), ("b",), ("c",), ("d",), ("e",)]
    assert list(in_order(iter(answers[:2]))) == []


def test_an_engine_that_ends_early_is_an_error_and_what_came_is_kept(run, data, engine, tmp_path):
    path = data(rows(20))
    engine.generate = lambda requests, sampling: (
        Shuffling._answer(engine, 0, next(requests), sampling) for _ in range(1)
    )
    with pytest.raises(RunError, match=r"without an answer to .*data\.jsonl:2"):
        run(path)
    assert engine.closed
    del engine.generate
    assert len(run(path)) == 20


def test_a_model_that_computes_no_numbers_is_an_error(run, data, engine):
    engine._draw = lambda seed, sampling: Completion((50, 51), "length", float("nan"), seed)
    with pytest.raises(RunError, match=r"log-probability of response 0 to .*data\.jsonl:1 is nan"):
        run(data(rows(3)))


def test_what_json_cannot_hold_is_written_as_text_or_null():
    from datetime import date

    assert as_json({"a": [1, 2.5, None, True], 3: (date(2024, 1, 2), float("inf"))}) == {
        "a": [1, 2.5, None, True], "3": ["2024-01-02", None],
    }  # fmt: skip


def test_source_columns_are_those_besides_the_prompt():
    row = {"instruction": "a", "input": "b", "output": "c", "id": 1}
    assert source_columns(row, None) == {"output": "c", "id": 1}
    assert source_columns(row, "input") == {"instruction": "a", "output": "c", "id": 1}
    assert source_columns({"prompt": "a"}, None) == {}


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ([{"prompt": ""}] * 3, {}, r"no row can be used: `prompt` is empty \(3, the first: .*data.jsonl:1\)"),
        ([{"prompt": "a"}, {"prompt": ""}], {"strict_data": True}, r"data\.jsonl:2: `prompt` is empty .*--strict_data"),
        ([*rows(3), {"prompt": "tree " * 50}], {"strict_data": True}, r":4: prompt longer than --prompt_max_len 40"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "--apply_chat_template"),
        ([{"something": "a"}], {}, "--input_key"),
    ],
)
def test_data_that_cannot_be_used_is_refused_before_an_engine_is_made(
    content, options, says, run, data, monkeypatch, tmp_path
):
    monkeypatch.setattr(choose, "make_engine", no_engine)
    with pytest.raises(InputError, match=says):
        run(data(content), **options)
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


def test_options_by_name_are_checked_like_flags():
    with pytest.raises(InputError, match="did you mean `best_of_n`"):
        rlhf_infer.generate(pretrain="m", dataset="d.jsonl", output_path="o.jsonl", best_of=2)
    with pytest.raises(InputError, match="--output_path is required"):
        rlhf_infer.generate(pretrain="m", dataset="d.jsonl")


def test_one_of_several_ranks_is_refused(run, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="--num_engines 4"):
        run(data(rows(3)))


def test_several_engines_need_ray(run, data, monkeypatch):
    from rlhf_infer.engines import replicas

    monkeypatch.setattr(replicas, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--num_engines 2.*rlhf-infer\[ray\]"):
        run(data(rows(3)), num_engines=2)


def test_the_transformers_engine_writes_the_same_whatever_the_batches(run, data):
    path = data(rows(10))
    one = run(path, "one.jsonl", micro_batch_size=1, best_of_n=2)
    many = run(path, "many.jsonl", micro_batch_size=8, best_of_n=2)
    exact = ("row", "sample", "input", "output", "output_ids", "seed", "finish_reason")
    assert [[line[name] for name in exact] for line in one] == [[line[name] for name in exact] for line in many]
    assert [line["logp"] for line in one] == pytest.approx([line["logp"] for line in many], abs=1e-4)
    assert len({line["output"] for line in one}) > 10


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(tiny, data, monkeypatch):
    """Five times the rows, of two kilobytes each, in the same room. The engine is one that remembers nothing."""

    class Forgetful(Shuffling):
        def generate(self, requests, sampling):
            for answer in super().generate(requests, sampling):
                self.asked.clear()
                yield answer

    monkeypatch.setattr(choose, "make_engine", lambda *args: Forgetful(64))

    def peak(count: int) -> int:
        path = data(({"prompt": f"Say {n}", "text": f"{n:05}" * 400} for n in range(count)), f"{count}.jsonl")
        tracemalloc.start()
        options = {"dataset": str(path), "output_path": str(path.with_suffix(".out.jsonl"))}
        rlhf_infer.generate(**usual | options)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    usual = {"pretrain": str(tiny), "engine": "transformers", "max_new_tokens": 4, "prompt_max_len": 40}
    peak(300)
    few, many = peak(1000), peak(5000)
    assert many - few < 1_500_000, f"{few:,} bytes for 1,000 prompts and {many:,} for 5,000"


def test_importing_the_package_imports_nothing_heavy_and_its_names_stay_functions():
    program = (
        "import sys, rlhf_infer\n"
        "assert not {'torch', 'transformers', 'vllm', 'ray'} & set(sys.modules)\n"
        "from rlhf_infer.generate import generate\n"
        "import rlhf_infer.generate\n"
        "assert rlhf_infer.generate is generate, rlhf_infer.generate\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        rlhf_infer.generat  # noqa: B018
