"""`rlhf quickstart`: fine-tuning, a reward model, DPO and PPO in a few minutes, from nothing.

Makes a tokenizer, a tiny random model and generated data; trains by the same code as `rlhf train sft`, `rm`, `dpo` and `ppo`;
and shows what the model answers before and after, to questions it was never trained on, and when the reward model chooses.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rlhf_cli.quickstart_data import CHEER, cheered, is_preferred, is_right, preferences, questions
from rlhf_data.config import Config, Count
from rlhf_data.errors import InputError

MARK = ".rlhf-quickstart"
"""A file that says: this folder is a quickstart's, the next one may replace what is in it."""

TEMPLATE = "Question: {}\nAnswer:"

MAX_LEN = 64

DRAWS = 8
"""Answers that the reward model chooses from."""

ROLLOUTS = 16
"""Rollouts of PPO."""

Rows = list[dict[str, str]]
"""Questions, each with its right answer."""

Stage = Literal["sft", "rm", "dpo", "ppo"]

STAGES: dict[Stage, str] = {
    "sft": "Fine-tuning",
    "rm": f"A reward model of pairs that prefer right answers with a {CHEER}",
    "dpo": "DPO on the same pairs",
    "ppo": "{} against the reward model, on Ray",
}
"""What is trained, in this order."""

NEEDS: dict[Stage, tuple[Stage, ...]] = {"sft": (), "rm": ("sft",), "dpo": ("sft",), "ppo": ("sft", "rm")}
"""What each stage starts from."""


class QuickstartConfig(Config):
    """Make a tiny model and data; fine-tune it, train a reward model, do DPO and PPO; and show answers before and after."""

    folder: str = "quickstart"
    """Folder to work in; what is there from an earlier quickstart is replaced."""

    algorithm: Literal["ppo", "grpo"] = "ppo"
    """How the policy learns from the reward model: PPO with a critic, or GRPO without."""

    skip: list[str] = Field(default=[])
    """Stages to leave out, of `sft`, `rm`, `dpo` and `ppo`. One that a later stage starts from must be there from an earlier
    quickstart."""

    rows: Annotated[Count, Field(ge=200, le=10_000)] = 4000
    """Questions to generate."""

    epochs: Count = 3
    """Passes over them."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of questions, model and training."""

    @field_validator("skip")
    @classmethod
    def _stages_that_are(cls, value: list[str]) -> list[str]:
        if unknown := [name for name in value if name not in STAGES]:
            raise ValueError(f"--skip {' '.join(unknown)}: the stages are {', '.join(STAGES)}")
        return value


def quickstart(config: QuickstartConfig) -> None:
    """Run it; see the module's docstring."""
    from rlhf_core.libraries import settle

    settle()
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = prepare_folder(Path(config.folder), config)
    say(f"1. A tokenizer, a model and {config.rows} questions, made from nothing, in {folder}/")
    held_out = make_inputs(folder, config)
    seconds: dict[Stage, float] = {}
    for number, stage in enumerate(stages(config), start=2):
        title = STAGES[stage].format(config.algorithm.upper())
        say(f"\n{number}. {title}: the same as\n\n{command(stage, folder, config)}\n")
        start = time.monotonic()
        train(folder, config, stage)
        seconds[stage] = time.monotonic() - start
        if stage == "sft":
            before, after = (most_probable(folder / name, held_out) for name in ("model", "sft"))
            say(answers_table(held_out, before, after))
    compared = compare(folder, held_out, config)
    if compared:
        say(comparison(compared, held_out))
    plot_losses(folder)
    write_report(folder, config, compared, held_out, seconds)
    say(next_steps(folder))


def stages(config: QuickstartConfig) -> list[Stage]:
    """What is trained now."""
    return [stage for stage in STAGES if stage not in config.skip]


def there(folder: Path) -> list[Stage]:
    """What has been trained, now or in an earlier quickstart."""
    return [stage for stage in STAGES if (folder / stage / "config.json").is_file()]


def say(text: str) -> None:
    print(text, flush=True)


def prepare_folder(folder: Path, config: QuickstartConfig) -> Path:
    """A folder with nothing in it, or with an earlier quickstart, of which all goes but the stages that are skipped."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise InputError(f"--folder {folder} holds something else than an earlier quickstart: choose another folder")
    ready = there(folder)
    for stage in stages(config):
        for needed in NEEDS[stage]:
            if needed in config.skip and needed not in ready:
                raise InputError(
                    f"--skip {needed}: {stage} starts from it, and {folder} has none from an earlier quickstart; do not skip "
                    f"it, or skip {stage} too"
                )
    for name in ("model", "questions", "pairs", "ppo_critic", *stages(config)):
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


def options(stage: Stage, folder: Path, config: QuickstartConfig) -> dict[str, Any]:
    """The options of a training run, as on the command line."""
    own: dict[Stage, dict[str, Any]] = {
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
    shared = {"input_template": TEMPLATE, "seed": config.seed, "save_path": local(folder / stage)}
    if stage == "ppo":
        return ppo_options(folder, config) | shared
    batches = {"packing_samples": True, "max_len": MAX_LEN, "train_batch_size": 64, "micro_train_batch_size": 64}
    return own[stage] | batches | {"logging_steps": 10} | shared


def ppo_options(folder: Path, config: QuickstartConfig) -> dict[str, Any]:
    """The options of PPO, or of GRPO. Without vLLM the policy writes its responses itself."""
    from rlhf_infer.engines.vllm import is_installed

    algorithm = {"advantage_estimator": "gae", "critic_learning_rate": 1e-3}
    if config.algorithm == "grpo":
        algorithm = {"advantage_estimator": "grpo", "use_kl_loss": True}
    return {
        "pretrain": local(folder / "sft"), "reward_pretrain": local(folder / "rm"), "normalize_reward": True,
        "prompt_data": local(folder / "questions"), "input_key": "question", **algorithm, "init_kl_coef": 0.02,
        "actor_learning_rate": 2e-4, "rollout_batch_size": 256, "n_samples_per_prompt": 4, "max_rollouts": ROLLOUTS,
        "num_episodes": 8, "train_batch_size": 64, "micro_train_batch_size": 64, "micro_rollout_batch_size": 128,
        "generate_max_len": 8, "prompt_max_len": MAX_LEN - 8, "zero_stage": 0, "vllm_num_engines": int(is_installed()),
        "eval_steps": ROLLOUTS // 2, "eval_at_start": True,
    }  # fmt: skip


def command(stage: Stage, folder: Path, config: QuickstartConfig) -> str:
    """The command line that does the same."""
    flags = (
        f"--{name}" if value is True else f"--{name} {quoted(value)}"
        for name, value in options(stage, folder, config).items()
    )
    return f"   rlhf train {stage} " + " \\\n      ".join(flags)


def quoted(value: Any) -> str:
    import shlex

    return shlex.quote(str(value).replace("\n", "\\n"))


def train(folder: Path, config: QuickstartConfig, stage: Stage = "sft") -> None:
    from rlhf_core.config import DPOConfig, RMConfig, SFTConfig
    from rlhf_core.methods import dpo, rm, sft
    from rlhf_data.options import build

    given = options(stage, folder, config)
    match stage:
        case "sft":
            sft.train(build(SFTConfig, given))
        case "rm":
            rm.train(build(RMConfig, given))
        case "dpo":
            dpo.train(build(DPOConfig, given))
        case "ppo":
            from rlhf_ray.config import PPOConfig
            from rlhf_ray.run import train as train_ppo

            train_ppo(build(PPOConfig, given))


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


@dataclass(frozen=True)
class Way:
    """A way of answering the held-out questions, and what became of it."""

    name: str
    answers: list[str]
    reward: float
    """Mean, by the reward model, of those that have any text."""
    wins: float
    """Share of comparisons with another answer of the fine-tuned model; ties count as half."""
    preferred: float
    """Share of answers that are right, in the preferred style."""
    right: float


def compare(folder: Path, rows: Rows, config: QuickstartConfig) -> list[Way]:
    """One answer drawn from each model, and the best of several by the reward model, to the same questions."""
    ready, seed = there(folder), config.seed
    if "sft" not in ready or "rm" not in ready:
        return []
    judge = judge_of(folder / "rm")
    several = answer(folder / "sft", rows, seed + 2, DRAWS)
    ways = {"one answer": [some[0] for some in several], f"best of {DRAWS}": best(rows, several, judge)}
    for stage, name in (("dpo", "after DPO"), ("ppo", f"after {config.algorithm.upper()}")):
        if stage in ready:
            ways[name] = [some[0] for some in answer(folder / stage, rows, seed + 2)]
    theirs = judge(rows, [some[0] for some in answer(folder / "sft", rows, seed + 1)])
    return [way_of(name, given, judge(rows, given), theirs, rows) for name, given in ways.items()]


def way_of(name: str, given: list[str], rewards: list[float], theirs: list[float], rows: Rows) -> Way:
    wins = sum((ours > other) + 0.5 * (ours == other) for ours, other in zip(rewards, theirs, strict=True))
    said = [reward for reward in rewards if math.isfinite(reward)]
    return Way(
        name,
        given,
        sum(said) / max(1, len(said)),
        wins / len(rows),
        sum(map(is_preferred, rows, given)) / len(rows),
        sum(map(is_right, rows, given)) / len(rows),
    )


def comparison(ways: list[Way], rows: Rows) -> str:
    """The table of the whole pipeline, for the terminal."""
    lines = [
        "",
        f"   Answers drawn at random to {len(rows)} held-out questions: one, the best of {DRAWS} by the reward model, and one",
        "   after each way of learning from preferences; against others of the fine-tuned model",
        "",
    ]
    for number, row in enumerate(rows[:4]):
        lines += [f"   {row['question']}", *(f"      {way.name:10}  {way.answers[number]!r}" for way in ways)]
    lines.append("")
    lines += [
        f"   {way.name:10}  wins {way.wins:4.0%} by the reward model;  reward {way.reward:5.2f};  "
        f"{way.preferred:4.0%} right with a {CHEER},  {way.right:4.0%} right"
        for way in ways
    ]
    return "\n".join(lines)


def best(rows: Rows, several: list[list[str]], judge: Callable[[Rows, list[str]], list[float]]) -> list[str]:
    """Of as many answers to each question, the one that is judged best."""
    rewards = iter(judge([row for row in rows for _ in several[0]], [given for some in several for given in some]))
    return [max((next(rewards), -n, given) for n, given in enumerate(some))[2] for some in several]


def write_report(
    folder: Path, config: QuickstartConfig, ways: list[Way], rows: Rows, seconds: dict[Stage, float]
) -> None:
    """What happened, as one page: `report.html`."""
    from rlhf_core.html import page, section, table, tag
    from rlhf_core.metrics import environment
    from rlhf_core.report import charts, columns, rows_of, settings_table, write_page

    titles = {stage: title.format(config.algorithm.upper()) for stage, title in STAGES.items()}
    parts = [
        tag("p", "A tiny model, made from nothing, and what it learnt on the way.", class_="soft"),
        section(
            "Before and after",
            tag("p", f"Answers drawn at random to {len(rows)} questions that were held out.", class_="soft"),
            table(
                ("", "reward", "wins", f"right with a {CHEER}", "right"),
                (
                    (way.name, f"{way.reward:.2f}", f"{way.wins:.0%}", f"{way.preferred:.0%}", f"{way.right:.0%}")
                    for way in ways
                ),
            ),
        ),
        section(
            "Answers",
            table(
                ("question", *(way.name for way in ways)),
                ((row["question"], *(way.answers[n] for way in ways)) for n, row in enumerate(rows[:8])),
                numbers=False,
            ),
        ),
    ]
    for stage in there(folder):
        drawn = charts(list(rows_of(folder / stage / "run/metrics.jsonl")), CURVES[stage])
        took = f"Took {seconds[stage]:.0f} s." if stage in seconds else "From an earlier quickstart."
        parts.append(
            section(
                titles[stage],
                tag("p", took, class_="soft"),
                tag("pre", command(stage, folder, config)),
                columns(*drawn.values()),
            )
        )
    parts.append(settings_table("Versions", environment()))
    write_page(folder / "report.html", page("rlhf quickstart", *(parts if ways else [parts[0], *parts[3:]])))


CURVES: dict[Stage, tuple[str, ...]] = {
    "sft": ("loss", "grad_norm"),
    "rm": ("loss", "accuracy"),
    "dpo": ("loss", "accuracy"),
    "ppo": ("reward", "kl", "response_length", "entropy"),
}
"""What of each stage is drawn in the report."""


def plot_losses(folder: Path) -> None:
    """The curves of the runs as `loss.png`: losses, and for PPO the reward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [stage for stage in PANELS if stage in there(folder)]
    if not drawn:
        return
    figure, panels = pyplot.subplots(1, len(drawn), figsize=(4.7 * len(drawn), 4), layout="constrained", squeeze=False)
    for axes, stage in zip(panels[0], drawn, strict=True):
        key, title = PANELS[stage]
        rows = [json.loads(line) for line in (folder / stage / "run/metrics.jsonl").read_text().splitlines()]
        for name, label, style in ((key, "training", "-"), (f"eval_{key}", "held out", "o-")):
            found = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*found, strict=True), style, label=label)
        axes.set(xlabel="optimizer step", ylabel=key, title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)


PANELS: dict[Stage, tuple[str, str]] = {
    "sft": ("loss", "fine-tuning (nats per token)"),
    "rm": ("loss", "reward model (nats per pair)"),
    "dpo": ("loss", "DPO (nats per pair)"),
    "ppo": ("reward", "PPO (normalised reward)"),
}
"""What of each stage is drawn in `loss.png`."""


def next_steps(folder: Path) -> str:
    last = next((stage for stage in ("ppo", "dpo", "sft") if stage in there(folder)), "model")
    return f"""
   {folder}/{", ".join(there(folder))}    the models, in Hugging Face format; each with its record in run/ (options, metrics.jsonl, …)
   {folder}/report.html    everything above with curves, as a page for the browser; {folder}/loss.png the curves alone

Next:
   rlhf chat --pretrain {local(folder)}/{last} --input_template {quoted(TEMPLATE)}
   rlhf data inspect --pretrain {local(folder)}/model --dataset {local(folder)}/questions --input_key question --output_key answer
   rlhf train sft --pretrain YOUR_MODEL --dataset ./YOUR.jsonl --input_key prompt --output_key response --dry_run
   rlhf train --help"""
