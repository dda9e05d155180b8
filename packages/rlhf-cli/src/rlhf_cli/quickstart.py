"""`rlhf quickstart`: the whole of fine-tuning in a minute, from nothing.

Makes a tokenizer, a tiny random model and a generated data set, fine-tunes by the same code as `rlhf train sft`, and shows
what the model answers before and after, on questions it was never trained on.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rlhf_data.config import Config, Count
from rlhf_data.errors import InputError

WORDS = """
apple bear boat book bridge castle cloud coin door drum eagle field fish garden glass horse
island lamp leaf lion moon mouse piano river rose ship snow star stone tiger tree wolf
""".split()
MARK = ".rlhf-quickstart"
"""A file that says: this folder is a quickstart's, the next one may replace what is in it."""

TEMPLATE = "Question: {}\nAnswer:"


class QuickstartConfig(Config):
    """Make a tiny model and a data set, fine-tune, and show answers before and after."""

    folder: str = "quickstart"
    """Folder to work in; what is there from an earlier quickstart is replaced."""

    rows: Annotated[Count, Field(ge=200, le=10_000)] = 4000
    """Questions to generate."""

    epochs: Count = 3
    """Passes over them."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of questions, model and training."""


def question(rng: random.Random) -> dict[str, str]:
    """One question with its answer: things that need the question to be read, not remembered."""
    first, second, third = rng.sample(WORDS, 3)
    return rng.choice(
        (
            {"question": f"Say {first} and {second} the other way round.", "answer": f" {second} and {first}"},
            {"question": f"What is the last of {first}, {second}, {third}?", "answer": f" {third}"},
            {
                "question": f"Which word is between {first} and {third}: {first} {second} {third}?",
                "answer": f" {second}",
            },
            {"question": f"Say {first} {second} and {first} again.", "answer": f" {first} {second} {first}"},
        )
    )


def questions(count: int, seed: int) -> list[dict[str, str]]:
    """Different questions, in random order."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        row = question(rng)
        found.setdefault(row["question"], row)
    rows = list(found.values())
    rng.shuffle(rows)
    return rows


def quickstart(config: QuickstartConfig) -> None:
    """Run it; see the module's docstring."""
    from rlhf_core.libraries import settle

    settle()
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = prepare_folder(Path(config.folder))
    print(f"1. A tokenizer, a model and {config.rows} questions, made from nothing, in {folder}/", flush=True)
    held_out = make_inputs(folder, config)
    before = answer(folder / "model", held_out)
    print(f"\n2. Fine-tuning: the same as\n\n{command(folder, config)}\n", flush=True)
    train(folder, config)
    after = answer(folder / "sft", held_out)
    plot_loss(folder)
    print(table(held_out, before, after), next_steps(folder), sep="\n", flush=True)


def prepare_folder(folder: Path) -> Path:
    """An empty folder, or one with an earlier quickstart in it, which is removed."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise InputError(
                f"--folder {folder} holds something else than an earlier quickstart: choose another folder"
            )
        for name in ("model", "questions", "sft"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    return folder


def local(path: Path) -> str:
    """A path as options take it: one that is not plainly local would be read as a Hub id."""
    return str(path) if path.is_absolute() else f"./{path}"


def make_inputs(folder: Path, config: QuickstartConfig) -> list[dict[str, str]]:
    """Write the tokenizer, the random model and the questions; returns the held-out ones."""
    from rlhf_core.tiny import make_model, make_tokenizer

    rows = questions(config.rows, config.seed)
    held_out = rows[: config.rows // 20]
    data = folder / "questions"
    data.mkdir(parents=True)
    for name, part in (("train", rows[len(held_out) :]), ("test", held_out)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    texts = [TEMPLATE.replace("{}", row["question"]) + row["answer"] for row in rows]
    tokenizer = make_tokenizer(texts, folder / "model", vocab_size=1024)
    make_model(tokenizer, folder / "model", hidden_size=128, layers=2, max_len=64, seed=config.seed)
    return held_out


def options(folder: Path, config: QuickstartConfig) -> dict[str, Any]:
    """The options of the fine-tuning run, as on the command line."""
    return {
        "pretrain": local(folder / "model"),
        "dataset": local(folder / "questions"),
        "input_key": "question",
        "output_key": "answer",
        "input_template": TEMPLATE,
        "packing_samples": True,
        "max_len": 64,
        "train_batch_size": 64,
        "micro_train_batch_size": 64,
        "max_epochs": config.epochs,
        "learning_rate": 2e-3,
        "logging_steps": 10,
        "seed": config.seed,
        "save_path": local(folder / "sft"),
    }


def command(folder: Path, config: QuickstartConfig) -> str:
    """The command line that does the same."""
    flags = (
        f"--{name}" if value is True else f"--{name} {quoted(value)}" for name, value in options(folder, config).items()
    )
    return "   rlhf train sft " + " \\\n      ".join(flags)


def quoted(value: Any) -> str:
    import shlex

    return shlex.quote(str(value).replace("\n", "\\n"))


def train(folder: Path, config: QuickstartConfig) -> None:
    from rlhf_cli.options import build
    from rlhf_core.config import SFTConfig
    from rlhf_core.methods import sft

    sft.train(build(SFTConfig, options(folder, config)))


def answer(model_folder: Path, rows: list[dict[str, str]]) -> list[str]:
    """What the model answers, greedily."""
    from transformers import AutoModelForCausalLM

    from rlhf_data.encode import EncodeOptions, Encoder
    from rlhf_data.rows import Pair
    from rlhf_data.tokenizer import load_tokenizer
    from rlhf_infer.config import SamplingConfig
    from rlhf_infer.engine import TransformersEngine

    tokenizer = load_tokenizer(str(model_folder))
    encoder = Encoder(tokenizer, EncodeOptions(max_len=64, input_template=TEMPLATE))
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    engine = TransformersEngine(model, [tokenizer.eos_token_id], micro_batch_size=64)
    prompts = [encoder.prompt_ids(Pair(row["question"], "")) for row in rows]
    written = engine.generate(prompts, SamplingConfig(max_new_tokens=8, greedy_sampling=True))
    return [tokenizer.decode(completion.token_ids, skip_special_tokens=True) for completion in written]


def plot_loss(folder: Path) -> None:
    """The loss curve as `loss.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "sft/run/metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        found = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*found, strict=True), style, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)", title="rlhf quickstart: fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)


def table(rows: list[dict[str, str]], before: list[str], after: list[str]) -> str:
    """Some answers before and after, and the accuracy on all held-out questions."""

    def accuracy(answers: list[str]) -> float:
        return sum(row["answer"] == given for row, given in zip(rows, answers, strict=True)) / len(rows)

    def mark(row: dict[str, str], given: str) -> str:
        return f"{'right' if given == row['answer'] else 'wrong'} {given!r}"

    lines = ["", f"3. Answers to questions that were held out ({len(rows)} of them)", ""]
    for row, was, now in list(zip(rows, before, after, strict=True))[:6]:
        lines += [f"   {row['question']}", f"      before  {mark(row, was)}", f"      after   {mark(row, now)}"]
    return "\n".join([*lines, "", f"   held-out accuracy: {accuracy(before):.0%} before, {accuracy(after):.0%} after"])


def next_steps(folder: Path) -> str:
    return f"""
   {folder}/sft             the fine-tuned model, in Hugging Face format
   {folder}/sft/run         its record: options, metrics.jsonl, data report, plan
   {folder}/loss.png        the loss curve

Next:
   rlhf data inspect --pretrain {local(folder)}/model --dataset {local(folder)}/questions --input_key question --output_key answer
   rlhf train sft --pretrain YOUR_MODEL --dataset ./YOUR.jsonl --input_key prompt --output_key response --dry_run
   rlhf train sft --help"""
