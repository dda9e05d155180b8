"""The scoring job: every row once and in order, dropped ones with the reason, restartable, nothing templated twice."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.libraries import settle
from rlhf_data.errors import InputError, RunError
from rlhf_data.rows import Chat
from rlhf_infer import progress, score
from rlhf_infer.rewards import model as model_rewards
from rlhf_infer.rewards.figures import ScoreSummary
from rlhf_infer.rewards.function import FunctionScorer
from rlhf_infer.rewards.responses import prompt_messages
from rlhf_infer.score import source_of

settle()

WORDS = "red blue green cat dog bird sun moon star tree river stone".split()

FUNCTION = """
def reward(responses, labels):
    return {"rewards": [len(r) + (l or 0) for r, l in zip(responses, labels)], "words": [len(r.split()) for r in responses]}
"""


def generated(count: int) -> list[dict[str, Any]]:
    """Rows as `rlhf generate` writes them, three responses to a prompt; every fifth was cut off."""
    return [
        {
            "row": n // 3,
            "sample": n % 3,
            "input": f"User: say {WORDS[n // 3 % 12]}{' please' * (n // 3 % 4)}\nAssistant: ",
            "output": " ".join(WORDS[(n * 5 + k) % 12] for k in range(1 + n * 7 % 6)),
            "rendered": "text",
            "finish_reason": "length" if n % 5 == 0 else "stop",
            "logp": -float(n),
            "output_ids": [1, 2],
            "source": {"label": n % 2},
        }
        for n in range(count)
    ]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory) -> Path:
    """Folder of a tiny random reward model with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from transformers.utils import logging

    from rlhf_core.tiny import make_tokenizer

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = make_tokenizer([f"{row['input']} {row['output']}" for row in generated(60)], folder, vocab_size=320)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=96, num_labels=1, problem_type="regression", pad_token_id=None, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(reward_model, tmp_path):
    """Score rows with options; returns the summary."""

    def make(rows: list[Any] | None = None, **options: Any) -> ScoreSummary:
        usual = {"pretrain": str(reward_model), "output_path": str(tmp_path / "out.jsonl")}
        if rows is not None or "dataset" not in options:
            options["dataset"] = write(tmp_path / "rows.jsonl", generated(20) if rows is None else rows)
        summary = score(**(usual | options))
        assert summary is not None
        return summary

    return make


@pytest.fixture
def function(tmp_path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(FUNCTION)
    return str(path)


def rewards_alone(folder: Path, texts: list[tuple[str, str, bool]]) -> list[float]:
    """Rewards by transformers' own class of prompt and response encoded apart, with BOS and, where complete, EOS."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt, response, complete in texts:
        ids = tokenizer.encode(prompt) + tokenizer.encode(response, add_special_tokens=False)
        ids += [tokenizer.eos_token_id] * complete
        with torch.no_grad():
            found.append(model(torch.tensor([ids])).logits.item())
    return found


def test_generated_rows_are_scored_as_they_are_and_never_templated_again(run, reward_model, tmp_path):
    """A response that was cut off has no EOS; a template is for rows that are not written out yet."""
    rows = generated(20)
    summary = run(rows, input_template="Once more: {}")
    scored = read(tmp_path / "out.jsonl")
    wanted = rewards_alone(reward_model, [(r["input"], r["output"], r["finish_reason"] == "stop") for r in rows])
    assert [row["reward"] for row in scored] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    for row, made in zip(rows, scored, strict=True):
        kept = {name: row[name] for name in row if name != "output_ids"}
        assert {name: made[name] for name in kept} == kept and "output_ids" not in made
    assert (summary.rows, summary.scored, summary.prompts) == (20, 20, 7)
    assert summary.finish_reasons == {"length": 4, "stop": 16} and summary.dropped == {}
    assert summary.mean == pytest.approx(sum(wanted) / 20, rel=1e-5)
    best = [max(wanted[n : n + 3]) for n in range(0, 20, 3)]
    assert summary.mean_best == pytest.approx(sum(best) / 7, rel=1e-4)
    assert [summary.min, summary.max] == pytest.approx([min(wanted), max(wanted)], rel=1e-5, abs=1e-6)


def test_scoring_scored_rows_again_changes_nothing(run, tmp_path):
    run()
    once = (tmp_path / "out.jsonl").read_bytes()
    run(dataset=str(tmp_path / "out.jsonl"), output_path=str(tmp_path / "again.jsonl"))
    assert sorted(read(tmp_path / "again.jsonl")[3]) == sorted(json.loads(once.splitlines()[3]))
    assert [row["reward"] for row in read(tmp_path / "again.jsonl")] == [
        row["reward"] for row in map(json.loads, once.splitlines())
    ]


@pytest.mark.parametrize(
    "changed", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"flash_attn": False}, {"zero_stage": 2}]
)
def test_how_the_work_is_divided_changes_no_reward(run, tmp_path, changed):
    run(generated(30))
    run(generated(30), output_path=str(tmp_path / "other.jsonl"), **changed)
    first, second = read(tmp_path / "out.jsonl"), read(tmp_path / "other.jsonl")
    assert [row.pop("reward") for row in first] == pytest.approx([row.pop("reward") for row in second], abs=1e-5)
    assert first == second


def test_plain_and_chat_rows_are_written_out_once_and_scored_rows_say_how(run, reward_model, tmp_path):
    plain = [{"question": "say cat", "answer": "cat", "label": 1}, {"question": "say dog", "answer": "sun", "label": 0}]
    run(plain, input_template="Q: {}\\nA: ")
    scored = read(tmp_path / "out.jsonl")
    assert [(row["row"], row["input"], row["output"], row["rendered"]) for row in scored] == [
        (0, "Q: say cat\nA: ", "cat", "text"), (1, "Q: say dog\nA: ", "sun", "text"),
    ]  # fmt: skip
    assert [row["source"] for row in scored] == [{"label": 1}, {"label": 0}]
    chats = [
        {"messages": [{"role": "user", "content": "say cat"}, {"role": "assistant", "content": "cat"}], "by": "me"},
        {"messages": [
            {"role": "user", "content": "say"}, {"role": "assistant", "content": "what"},
            {"role": "user", "content": "sun"}, {"role": "assistant", "content": "sun"},
            {"role": "user", "content": "thanks"},
        ]},
    ]  # fmt: skip
    run(chats, apply_chat_template=True, output_path=str(tmp_path / "chat.jsonl"))
    scored = read(tmp_path / "chat.jsonl")
    assert [row["input"] for row in scored] == [
        "<|user|>say cat<|assistant|>", "<|user|>say<|assistant|>what</s><|user|>sun<|assistant|>",
    ]  # fmt: skip
    assert [row["output"] for row in scored] == ["cat", "sun"]
    assert scored[0]["messages"] == chats[0]["messages"][:1] and scored[1]["messages"] == chats[1]["messages"][:3]
    assert scored[0]["source"] == {"by": "me"} and {row["rendered"] for row in scored} == {"chat"}
    again = run(dataset=str(tmp_path / "chat.jsonl"), output_path=str(tmp_path / "again.jsonl"))
    assert again.scored == 2
    assert [row["reward"] for row in read(tmp_path / "again.jsonl")] == pytest.approx(
        [row["reward"] for row in scored], abs=1e-5
    )


def test_every_row_comes_out_once_in_order_with_the_reason_where_it_has_no_reward(run, tmp_path):
    rows: list[Any] = generated(8)
    rows[1]["output"] = " "
    rows[4] = {"row": 1, "sample": 1, "reward": None, "dropped": "once before"}
    rows[6]["input"] = "say " + "cat " * 200
    rows[7]["output"] = "cat " * 200
    summary = run(rows, max_len=64)
    scored = read(tmp_path / "out.jsonl")
    assert [(row["row"], row["sample"]) for row in scored] == [(n // 3, n % 3) for n in range(8)]
    assert {n: row["dropped"] for n, row in enumerate(scored) if row["reward"] is None} == {
        1: "`output` is empty", 4: "no key `input`", 6: "prompt longer than --max_len",
    }  # fmt: skip
    assert [row.get("truncated") for row in scored] == [None] * 7 + [True]
    assert summary.scored == 5 and summary.truncated == 1
    assert summary.dropped["`output` is empty"] == (1, f"{tmp_path / 'rows.jsonl'}:2")
    with pytest.raises(InputError, match=r"rows.jsonl:2: `output` is empty \(--strict_data"):
        run(rows, max_len=64, strict_data=True, output_path=str(tmp_path / "strict.jsonl"))


def test_a_reward_model_with_another_template_leaves_the_prompts_of_the_policy_as_they_are(run, tmp_path):
    """What is trained on is what the policy was asked with, byte for byte, whatever the reward model was given."""
    ask = [{"role": "user", "content": "say red"}]
    rows = [row | {"input": "<POLICY>say red<BOT>", "rendered": "chat", "messages": ask} for row in generated(6)]
    keys = {"input_key": "messages", "output_key": "output", "apply_chat_template": True}
    for number, processor in enumerate((None, "rs", "iter_dpo", "csft")):
        run(
            rows,
            output_path=str(tmp_path / f"{number}.jsonl"),
            **keys,
            **({"post_processor": processor} if processor else {}),
        )
        for line in read(tmp_path / f"{number}.jsonl"):
            assert (
                line.get("input", line.get("prompt")).startswith("<POLICY>say red<BOT>") and line["rendered"] == "chat"
            )
    plain = run(rows, output_path=str(tmp_path / "plain.jsonl"))
    assert plain.mean != pytest.approx(run(rows, output_path=str(tmp_path / "other.jsonl"), **keys).mean, rel=1e-4)


def test_a_prompt_that_asked_for_a_reward_is_scored_without_it(run, tmp_path):
    rows = generated(6)
    run(rows, output_path=str(tmp_path / "plain.jsonl"))
    asked = [
        row | {"input": f"{row['input']} <rm_score>: 2.00 ", "plain_input": row["input"], "asked_reward": 2.0}
        for row in rows
    ]
    run(asked, output_path=str(tmp_path / "asked.jsonl"))
    for one, other in zip(read(tmp_path / "plain.jsonl"), read(tmp_path / "asked.jsonl"), strict=True):
        assert (one["reward"], one["input"]) == (other["reward"], other["input"]) and other["asked_reward"] == 2.0


def test_a_file_whose_first_row_was_dropped_can_be_read_again(run, tmp_path):
    rows = generated(6)
    rows[0]["output"] = ""
    run(rows)
    first = read(tmp_path / "out.jsonl")[0]
    assert first["reward"] is None and first["input"] == rows[0]["input"] and first["source"] == rows[0]["source"]
    assert run(dataset=str(tmp_path / "out.jsonl"), output_path=str(tmp_path / "again.jsonl")).scored == 5


def test_a_job_that_was_killed_within_a_window_computes_the_same_rows_together(run, tmp_path, monkeypatch):
    """Who is computed with whom decides the last bits of a reward."""
    judge, asked = model_rewards.ModelScorer.judge, []

    def counting(self, answers):
        asked.append(len(answers))
        return judge(self, answers)

    run(generated(40), micro_batch_size=16)
    whole, job = (tmp_path / "out.jsonl").read_bytes(), json.loads((tmp_path / "out.jsonl.job.json").read_text())
    lines = whole.splitlines(keepends=True)
    for done in (1, 7, 39, 40):
        (tmp_path / "out.jsonl").unlink()
        (tmp_path / "out.jsonl.job.json").unlink()
        (tmp_path / "out.jsonl.partial").write_bytes(b"".join(lines[:done]))
        ends = [sum(map(len, lines[: n + 1])) for n in range(done)]
        (tmp_path / "out.jsonl.partial.index").write_text("".join(f"[{end}, null]\n" for end in ends))
        (tmp_path / "out.jsonl.partial.job.json").write_text(json.dumps({"job": job["job"], "replaces": False}))
        with monkeypatch.context() as patch:
            patch.setattr(model_rewards.ModelScorer, "judge", counting)
            run(generated(40), micro_batch_size=16)
        assert asked == [40] * (done < 40) and (tmp_path / "out.jsonl").read_bytes() == whole
        asked.clear()


def test_a_job_that_stopped_in_the_middle_goes_on_and_gives_the_same_bytes(run, tmp_path, monkeypatch):
    rows = generated(70)
    rows[2]["output"] = ""
    run(rows, micro_batch_size=1, output_path=str(tmp_path / "whole.jsonl"))
    judge, asked = model_rewards.ModelScorer.judge, []

    def failing(self, answers):
        asked.append(len(answers))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return judge(self, answers)

    monkeypatch.setattr(model_rewards.ModelScorer, "judge", failing)
    with pytest.raises(KeyboardInterrupt):
        run(rows, micro_batch_size=1)
    assert not (tmp_path / "out.jsonl").exists() and len(read(tmp_path / "out.jsonl.partial")) == 32
    summary = run(rows, micro_batch_size=1)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert asked == [31, 32, 32, 6] and summary.rows == 70 and summary.dropped.keys() == {"`output` is empty"}
    again = run(rows, micro_batch_size=1)  # nothing is left to do
    assert len(asked) == 4 and again.mean == summary.mean


def test_another_post_processor_scores_nothing_again(run, tmp_path, monkeypatch):
    best = run(post_processor="rs")
    assert best.processed is not None and best.processed["kept"] == 7 == len(read(tmp_path / "out.jsonl"))
    assert len(read(tmp_path / "out.jsonl.scored.jsonl")) == 20
    monkeypatch.setattr(model_rewards.ModelScorer, "__init__", lambda *given: pytest.fail("a model was loaded"))
    pairs = run(post_processor="iter_dpo")
    assert pairs.processed is not None and pairs.mean == best.mean and pairs.seconds == 0
    assert {"prompt", "chosen", "rejected"} <= read(tmp_path / "out.jsonl")[0].keys()


def test_processing_that_was_missing_is_made_up_for(run, tmp_path, monkeypatch):
    from rlhf_infer import processors

    run(post_processor="rs", output_path=str(tmp_path / "whole.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(processors, "process", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(post_processor="rs")
    assert not (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl.scored.jsonl").exists()
    monkeypatch.setattr(model_rewards.ModelScorer, "__init__", lambda *given: pytest.fail("a model was loaded"))
    run(post_processor="rs")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_rewards_are_normalised_with_the_models_statistics_or_those_of_the_data(run, reward_model, tmp_path):
    from transformers import AutoConfig

    with pytest.raises(InputError, match="--normalize_reward"):
        run(normalize_reward=True)
    run()
    raw = [row["reward"] for row in read(tmp_path / "out.jsonl")]
    folder = shutil.copytree(reward_model, tmp_path / "calibrated")
    config = AutoConfig.from_pretrained(folder)
    config.mean, config.std = 0.5, 2.0
    config.save_pretrained(folder)
    run(pretrain=str(folder), normalize_reward=True, output_path=str(tmp_path / "model.jsonl"))
    rows = read(tmp_path / "model.jsonl")
    assert [row["raw_reward"] for row in rows] == raw
    assert [row["reward"] for row in rows] == pytest.approx([(reward - 0.5) / 2 for reward in raw])
    summary = run(
        normalize_reward=True, calibrate=True, post_processor="csft", output_path=str(tmp_path / "data.jsonl")
    )
    rows = read(tmp_path / "data.jsonl.scored.jsonl")
    assert [row["raw_reward"] for row in rows] == raw and summary.mean == pytest.approx(0, abs=1e-9)
    assert summary.std == pytest.approx(1) and summary.calibration is not None
    assert [f"{row['reward']:z.2f} " for row in rows] == [
        row["input"].partition("<rm_score>: ")[2] for row in read(tmp_path / "data.jsonl")
    ]


def test_rewards_that_are_all_equal_cannot_be_calibrated_with(run, tmp_path):
    path = tmp_path / "same.py"
    path.write_text("def reward(responses): return [1.0] * len(responses)")
    with pytest.raises(InputError, match="--calibrate: all 20 rewards are 1"):
        run(pretrain=str(path), normalize_reward=True, calibrate=True)
    with pytest.raises(InputError, match="--calibrate: a deviation needs two rewards"):
        run(generated(1), pretrain=str(path), normalize_reward=True, calibrate=True, overwrite=True)


def test_a_function_reads_texts_and_labels_and_what_else_it_says_is_kept(run, function, tmp_path):
    summary = run(pretrain=function)
    rows = read(tmp_path / "out.jsonl")
    assert [row["reward"] for row in rows] == [len(r["output"]) + r["source"]["label"] for r in generated(20)]
    assert [row["words"] for row in rows] == [len(row["output"].split()) for row in rows]
    assert summary.mean_length is None and "response_tokens" not in rows[0]
    plain = [{"prompt": "say cat", "response": "cat", "label": 5}]
    run(plain, pretrain=function, input_template="Q: {}", output_path=str(tmp_path / "plain.jsonl"))
    (row,) = read(tmp_path / "plain.jsonl")
    assert (row["input"], row["reward"], row["source"]) == ("Q: say cat", 8.0, {"label": 5})


def test_a_function_cannot_write_over_a_scored_row(run, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def reward(responses):\n    return {'rewards': [0.0] * len(responses), 'output': responses}")
    with pytest.raises(RunError, match="returned `output`, which a scored row has already"):
        run(pretrain=str(path))


def test_another_function_in_the_same_file_is_another_job(run, function, monkeypatch):
    judge, asked = FunctionScorer.judge, []

    def killed(self, answers):
        asked.append(len(answers))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return judge(self, answers)

    rows = generated(70)
    with monkeypatch.context() as patch:
        patch.setattr(FunctionScorer, "judge", killed)
        with pytest.raises(KeyboardInterrupt):
            run(rows, pretrain=function, micro_batch_size=1)
    Path(function).write_text(FUNCTION.replace("len(r) +", "2 * len(r) +"))
    with pytest.raises(InputError, match=r"unfinished output of another command .*--pretrain"):
        run(rows, pretrain=function, micro_batch_size=1)
    assert run(rows, pretrain=function, overwrite=True).rows == 70


def test_a_function_made_of_another_one_is_told_by_the_file_that_was_named(function):
    made = FUNCTION + "from functools import partial\nreward = partial(reward)\n"
    Path(function).write_text(made)
    before = source_of(function)
    Path(function).write_text(made + "# changed\n")
    assert source_of(function) != before


def test_scored_rows_are_not_replaced_by_those_that_are_made_of_them(run, function, tmp_path):
    run(pretrain=function, post_processor="rs")
    scored = tmp_path / "out.jsonl.scored.jsonl"
    before = scored.read_bytes()
    with pytest.raises(InputError, match=r"--output_path .*out\.jsonl\.scored\.jsonl is \(in\) --dataset"):
        run(dataset=str(scored), pretrain=function, post_processor="filter", reward_threshold=1.0)
    assert scored.read_bytes() == before


def test_a_broken_line_far_on_is_said_before_the_first_row_is_scored(function, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write(path, generated(3000))
    with path.open("a") as file:
        file.write("{\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:3001"):
        score(pretrain=function, dataset=str(path), output_path=str(tmp_path / "out.jsonl"), dry_run=True)
    monkeypatch.setattr(progress, "PATIENCE", 0)  # counted while it is scored
    with pytest.raises(InputError, match=r"rows\.jsonl:3001"):
        score(pretrain=function, dataset=str(path), output_path=str(tmp_path / "out.jsonl"), micro_batch_size=1)


def test_what_json_cannot_hold_in_messages_is_written_as_text():
    asked = {"role": "user", "content": "hi", "at": datetime(2026, 1, 2), "score": float("nan")}
    chat = Chat([asked, {"role": "assistant", "content": "ho"}])
    (message,) = prompt_messages(chat, has_chat_template=True)["messages"]
    assert (message["at"], message["score"]) == ("2026-01-02 00:00:00", None)


def test_in_a_chat_a_reward_model_reads_no_more_than_its_own_context(reward_model, tmp_path):
    from rlhf_infer.chat import ChatConfig
    from rlhf_infer.talk.voice import scorer_of

    config = ChatConfig(pretrain="any", reward_pretrain=str(reward_model), best_of_n=2)
    assert [options and options.max_len for options in (scorer_of(config, 4096), scorer_of(config, 50))] == [96, 50]
    small = shutil.copytree(reward_model, tmp_path / "small")
    architecture = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(architecture | {"vocab_size": 9}))
    with pytest.raises(InputError, match=r"--reward_pretrain .*the model only 9"):
        scorer_of(config.model_copy(update={"reward_pretrain": str(small)}), 50)


CHAT = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        (None, {"pretrain": "no/such/folder"}, r"--pretrain"),
        (None, {"pretrain": "./gone"}, r"--pretrain gone|--pretrain ./gone: there is no such folder"),
        (None, {"pretrain": "gone.py"}, "there is no file gone.py"),
        (None, {"max_len": 97}, "--max_len 97: .* takes 96 tokens; give --max_len 96 or less"),
        (None, {"max_len": 1}, "--max_len 1 leaves no room"),
        (None, {"apply_chat_template": True}, "written out already"),
        (CHAT, {}, "give --apply_chat_template"),
        (None, {"value_head_prefix": "critic"}, "--value_head_prefix critic"),
        (None, {"calibrate": True}, "--calibrate"),
        (None, {"post_processor": "raft"}, "--post_processor raft needs --top_fraction"),
        (None, {"output_key": "gone"}, "`gone`"),
        ([{"text": "hello"}], {}, "rows.jsonl"),
        ([], {}, "rows.jsonl is empty"),
        ([{"input": "a", "output": "", "rendered": "text"}] * 2, {}, r"no row can be scored: `output` is empty \(2, the"),
        (None, {"temperature": 1.0}, "unknown option `temperature`"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_any_weight_is_loaded(run, monkeypatch, rows, options, reason):
    monkeypatch.setattr(model_rewards.ModelScorer, "__init__", lambda *given: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=reason):
        run(rows, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_procs": 2}, "--num_procs 2"), ({"zero_stage": 3}, "--zero_stage 3"), ({"max_len": 64}, "--max_len"),
        ({"apply_chat_template": True}, "--apply_chat_template"), ({"bf16": True}, "--bf16"),
        ({"normalize_reward": True}, "--normalize_reward"), ({"flash_attn": False}, "--no_flash_attn"),
        ({"disable_fast_tokenizer": True}, "--disable_fast_tokenizer"), ({"num_nodes": 2}, "--num_nodes 2"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_to_a_function_are_refused(run, function, options, named):
    with pytest.raises(InputError, match=named):
        run(pretrain=function, **options)


def test_chat_rows_have_no_template_with_a_function(run, function):
    with pytest.raises(InputError, match="chat messages, which a Python function has no template for"):
        run(CHAT, pretrain=function)


def test_a_dry_run_loads_and_writes_nothing(reward_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_rewards.ModelScorer, "__init__", lambda *given: pytest.fail("a model was loaded"))
    data = write(tmp_path / "rows.jsonl", generated(20))
    given = {"pretrain": str(reward_model), "dataset": data, "output_path": str(tmp_path / "new/out.jsonl")}
    assert score(dry_run=True, world_size=2, zero_stage=3, **given) is None
    said = capsys.readouterr().out
    assert "20 rows" in said and "2 ranks" in said and "ZeRO-3" in said
    assert not (tmp_path / "new").exists()


def test_the_data_is_not_written_over(run, tmp_path):
    with pytest.raises(InputError, match="is read: write to another place"):
        run(output_path=str(tmp_path / "rows.jsonl"))
