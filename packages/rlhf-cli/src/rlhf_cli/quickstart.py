"""`rlhf quickstart`: fine-tuning, a reward model and DPO in a few minutes, from nothing.

Makes a tokenizer, a tiny random model and generated data; trains by the same code as `rlhf train sft`, `rm` and `dpo`; and
shows what the model answers before and after, to questions it was never trained on, and when the reward model chooses.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf_cli.quickstart_data import CHEER, cheered, is_preferred, is_right, preferences, questions
from rlhf_data.config import Config, Count
from rlhf_data.errors import InputError

MARK = ".rlhf-quickstart"
"""A file that says: this folder is a quickstart's, the next one may replace what is in it."""

TEMPLATE = "Question: {}\nAnswer:"

MAX_LEN = 64

DRAWS = 8
"""Answers that the reward model chooses from."""

Rows = list[dict[str, str]]
"""Questions, each with its right answer."""


class QuickstartConfig(Config):
    """Make a tiny model and data; fine-tune it, train a reward model and do DPO; and show answers before and after."""

    folder: str = "quickstart"
    """Folder to work in; what is there from an earlier quickstart is replaced."""

    rows: Annotated[Count, Field(ge=200, le=10_000)] = 4000
    """Questions to generate."""

    epochs: Count = 3
    """Passes over them."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of questions, model and training."""


def quickstart(config: QuickstartConfig) -> None:
    """Run it; see the module's docstring."""
    from rlhf_core.libraries import settle

    settle()
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = prepare_folder(Path(config.folder))
    say(f"1. A tokenizer, a model and {config.rows} questions, made from nothing, in {folder}/")
    held_out = make_inputs(folder, config)
    before = most_probable(folder / "model", held_out)

    say(f"\n2. Fine-tuning: the same as\n\n{command('sft', folder, config)}\n")
    train(folder, config)
    tuned = most_probable(folder / "sft", held_out)
    say(answers_table(held_out, before, tuned))

    say(f"\n3. A reward model of pairs that prefer right answers with a {CHEER}\n\n{command('rm', folder, config)}\n")
    train(folder, config, "rm")
    say(f"\n4. DPO on the same pairs\n\n{command('dpo', folder, config)}\n")
    train(folder, config, "dpo")

    say(comparison(folder, held_out, config.seed))
    plot_losses(folder)
    say(next_steps(folder))


def say(text: str) -> None:
    print(text, flush=True)


def prepare_folder(folder: Path) -> Path:
    """An empty folder, or one with an earlier quickstart in it, which is removed."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise InputError(
                f"--folder {folder} holds something else than an earlier quickstart: choose another folder"
            )
        for name in ("model", "questions", "pairs", "sft", "rm", "dpo"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    return folder


def local(path: Path) -> str:
    """A path as options take it: one that is not plainly local would be read as a Hub id."""
    return str(path) if path.is_absolute() else f"./{path}"


def make_inputs(folder: Path, config: QuickstartConfig) -> Rows:
    """Write the tokenizer, the random model, the questions and the pairs; returns the held-out questions."""
    from rlhf_core.tiny import make_model, make_tokenizer

    rows = questions(config.rows, config.seed)
    held_out, training = rows[: config.rows // 20], rows[config.rows // 20 :]
    write(folder / "questions", cheered(training, config.seed), held_out)
    write(
        folder / "pairs",
        preferences(training[: len(training) * 2 // 3], config.seed),
        preferences(held_out, config.seed),
    )
    texts = [TEMPLATE.replace("{}", row["question"]) + row["answer"] + CHEER for row in rows]
    tokenizer = make_tokenizer(texts, folder / "model", vocab_size=1024)
    make_model(tokenizer, folder / "model", hidden_size=128, layers=2, max_len=MAX_LEN, seed=config.seed)
    return held_out


def write(folder: Path, training: Rows, held_out: Rows) -> None:
    folder.mkdir(parents=True)
    for name, part in (("train", training), ("test", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def options(method: str, folder: Path, config: QuickstartConfig) -> dict[str, Any]:
    """The options of a training run, as on the command line."""
    own: dict[str, dict[str, Any]] = {
        "sft": {
            "pretrain": local(folder / "model"), "dataset": local(folder / "questions"), "input_key": "question",
            "output_key": "answer", "max_epochs": config.epochs, "learning_rate": 2e-3,
        },
        "rm": {"pretrain": local(folder / "sft"), "dataset": local(folder / "pairs"), "learning_rate": 1e-3},
        "dpo": {
            "pretrain": local(folder / "sft"), "dataset": local(folder / "pairs"), "learning_rate": 5e-4, "beta": 0.1,
            "nll_loss_coef": 0.5,
        },
    }  # fmt: skip
    return own[method] | {
        "input_template": TEMPLATE,
        "packing_samples": True,
        "max_len": MAX_LEN,
        "train_batch_size": 64,
        "micro_train_batch_size": 64,
        "logging_steps": 10,
        "seed": config.seed,
        "save_path": local(folder / method),
    }


def command(method: str, folder: Path, config: QuickstartConfig) -> str:
    """The command line that does the same."""
    flags = (
        f"--{name}" if value is True else f"--{name} {quoted(value)}"
        for name, value in options(method, folder, config).items()
    )
    return f"   rlhf train {method} " + " \\\n      ".join(flags)


def quoted(value: Any) -> str:
    import shlex

    return shlex.quote(str(value).replace("\n", "\\n"))


def train(folder: Path, config: QuickstartConfig, method: Literal["sft", "rm", "dpo"] = "sft") -> None:
    from rlhf_core.config import DPOConfig, RMConfig, SFTConfig
    from rlhf_core.methods import dpo, rm, sft
    from rlhf_data.options import build

    given = options(method, folder, config)
    if method == "sft":
        sft.train(build(SFTConfig, given))
    elif method == "rm":
        rm.train(build(RMConfig, given))
    else:
        dpo.train(build(DPOConfig, given))


def encoder_of(tokenizer: Any) -> Any:
    from rlhf_data.encode import EncodeOptions, Encoder

    return Encoder(tokenizer, EncodeOptions(max_len=MAX_LEN, input_template=TEMPLATE))


def answer(model_folder: Path, rows: Rows, seed: int | None, count: int = 1) -> list[list[str]]:
    """Answers of the model to each question: drawn at random, or without a seed the most probable one."""
    from rlhf_data.rows import Pair
    from rlhf_data.tokenizer import load_tokenizer
    from rlhf_infer.config import SamplingConfig
    from rlhf_infer.engines.engine import answer_all
    from rlhf_infer.engines.transformers import TransformersEngine, load

    tokenizer: Any = load_tokenizer(str(model_folder))
    prompts = [prompt.ids for prompt in encoder_of(tokenizer).prompts([Pair(row["question"], "") for row in rows])]
    engine = TransformersEngine(load(local(model_folder)), [tokenizer.eos_token_id], micro_batch_size=64)
    sampling = SamplingConfig(max_new_tokens=8, best_of_n=count, greedy_sampling=seed is None)
    return [
        [tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in some]
        for some in answer_all(engine, prompts, sampling, seed or 0)
    ]


def most_probable(model_folder: Path, rows: Rows) -> list[str]:
    """What the model answers to each question, greedily."""
    return [given for (given,) in answer(model_folder, rows, None)]


def judge_of(model_folder: Path) -> Callable[[Rows, list[str]], list[float]]:
    """A function from questions and an answer to each to the rewards of a reward model; no text gets the least."""
    from rlhf_data.rows import Pair, RowError
    from rlhf_infer.rewards.scorer import Answer, ScorerOptions, make_scorer, tokenizer_of

    options = ScorerOptions(pretrain=local(model_folder), micro_batch_size=64)
    scorer, encoder = make_scorer(options), encoder_of(tokenizer_of(options))

    def judge(rows: Rows, answers: list[str]) -> list[float]:
        pairs = [Pair(row["question"], given) for row, given in zip(rows, answers, strict=True)]
        samples = {n: found[0] for n, found in enumerate(encoder.encode(pairs)) if not isinstance(found, RowError)}
        given = scorer.score(
            [Answer(pairs[n].prompt, pairs[n].response, sample=sample) for n, sample in samples.items()]
        )
        rewards = dict(zip(samples, given, strict=True))
        return [rewards.get(n, float("-inf")) for n in range(len(pairs))]

    return judge


def answers_table(rows: Rows, before: list[str], after: list[str]) -> str:
    """Some answers before and after, and the accuracy on all held-out questions."""

    def accuracy(answers: list[str]) -> float:
        return sum(map(is_right, rows, answers)) / len(rows)

    def mark(row: dict[str, str], given: str) -> str:
        return f"{'right' if is_right(row, given) else 'wrong'} {given!r}"

    lines = ["", f"   Answers to questions that were held out ({len(rows)} of them)", ""]
    for row, was, now in list(zip(rows, before, after, strict=True))[:6]:
        lines += [f"   {row['question']}", f"      before  {mark(row, was)}", f"      after   {mark(row, now)}"]
    return "\n".join([*lines, "", f"   held-out accuracy: {accuracy(before):.0%} before, {accuracy(after):.0%} after"])


def comparison(folder: Path, rows: Rows, seed: int) -> str:
    """One answer drawn from the fine-tuned model, the best of several by the reward model, and one drawn after DPO.

    Each is compared with another answer of the fine-tuned model; ties count as half.
    """
    judge = judge_of(folder / "rm")
    several = answer(folder / "sft", rows, seed + 2, DRAWS)
    ways = {
        "one answer": [some[0] for some in several],
        f"best of {DRAWS}": best(rows, several, judge),
        "after DPO": [some[0] for some in answer(folder / "dpo", rows, seed + 2)],
    }
    theirs = judge(rows, [some[0] for some in answer(folder / "sft", rows, seed + 1)])
    lines = [
        "",
        f"5. Answers drawn at random to {len(rows)} held-out questions: one, the best of {DRAWS} by the reward model, and one",
        "   after DPO; against others of the fine-tuned model",
        "",
    ]
    for number, row in enumerate(rows[:4]):
        lines += [f"   {row['question']}", *(f"      {way:10}  {given[number]!r}" for way, given in ways.items())]
    lines.append("")
    for way, given in ways.items():
        wins = sum(
            (ours > other) + 0.5 * (ours == other) for ours, other in zip(judge(rows, given), theirs, strict=True)
        )
        lines.append(
            f"   {way:10}  wins {wins / len(rows):4.0%} by the reward model;  "
            f"{sum(map(is_preferred, rows, given)) / len(rows):4.0%} right with a {CHEER},"
            f"  {sum(map(is_right, rows, given)) / len(rows):4.0%} right"
        )
    return "\n".join(lines)


def best(rows: Rows, several: list[list[str]], judge: Callable[[Rows, list[str]], list[float]]) -> list[str]:
    """Of as many answers to each question, the one that is judged best."""
    rewards = iter(judge([row for row in rows for _ in several[0]], [given for some in several for given in some]))
    return [max((next(rewards), -n, given) for n, given in enumerate(some))[2] for some in several]


def plot_losses(folder: Path) -> None:
    """The loss curves of the three runs as `loss.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    titles = {"sft": "fine-tuning (nats per token)", "rm": "reward model (nats per pair)", "dpo": "DPO (nats per pair)"}
    for axes, (method, title) in zip(panels, titles.items(), strict=True):
        rows = [json.loads(line) for line in (folder / method / "run/metrics.jsonl").read_text().splitlines()]
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
            found = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*found, strict=True), style, label=label)
        axes.set(xlabel="optimizer step", ylabel="loss", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)


def next_steps(folder: Path) -> str:
    return f"""
   {folder}/sft, rm, dpo    the models, in Hugging Face format; each with its record in run/ (options, metrics.jsonl, …)
   {folder}/loss.png        their loss curves

Next:
   rlhf chat --pretrain {local(folder)}/dpo --input_template {quoted(TEMPLATE)}
   rlhf data inspect --pretrain {local(folder)}/model --dataset {local(folder)}/questions --input_key question --output_key answer
   rlhf train sft --pretrain YOUR_MODEL --dataset ./YOUR.jsonl --input_key prompt --output_key response --dry_run
   rlhf train --help"""
