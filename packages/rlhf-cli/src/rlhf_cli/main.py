"""The `rlhf` command: one Typer app, one command per config, heavy imports only inside commands."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module
from typing import Annotated, Any

import typer

from rlhf_cli.errors import usage_reported
from rlhf_cli.infer import InferConfig, job_of
from rlhf_cli.options import RUN, command
from rlhf_cli.quickstart import QuickstartConfig
from rlhf_cli.recipes.config import RECIPES, RecipeConfig
from rlhf_core.config import DPOConfig, KDConfig, KTOConfig, MergeConfig, RMConfig, SFTConfig, TrainConfig
from rlhf_data.inspection import InspectConfig
from rlhf_infer.chat import ChatConfig
from rlhf_infer.config import GenerateConfig, ScoreConfig
from rlhf_infer.serve.config import ServeConfig
from rlhf_ray.config import PPOConfig

app = typer.Typer(
    name="rlhf",
    help="Post-training for language models: from one laptop CPU to a cluster of GPUs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("-", "_"),
    },
)
train = typer.Typer(help="Train a model.", no_args_is_help=True)
data = typer.Typer(help="Look at data.", no_args_is_help=True)
app.add_typer(train, name="train")
recipe = typer.Typer(
    help="Loops of writing, scoring and training, which can be killed and continued.", no_args_is_help=True
)
app.add_typer(data, name="data")
app.add_typer(recipe, name="recipe")

METHODS = {"sft": SFTConfig, "rm": RMConfig, "dpo": DPOConfig, "kto": KTOConfig, "kd": KDConfig}
"""Training methods, in the order in which `--help` shows them."""

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry_run", help="Check everything, print the plan, and stop before any weight is loaded.", rich_help_panel=RUN
    ),
]


@command(app, "quickstart", QuickstartConfig)
def quickstart(config: QuickstartConfig) -> None:
    from rlhf_cli.quickstart import quickstart

    quickstart(config)


def call(module: str, function: str, *args: Any, **options: Any) -> None:
    """Import a function and call it: only ranks need what it imports, not the process that starts them."""
    getattr(import_module(module), function)(*args, **options)


def add_training(name: str, config: type[TrainConfig]) -> None:
    """`rlhf train NAME`: the function `train` of `rlhf_core.methods.NAME`, on every rank."""

    @command(train, name, config)
    def run(config: TrainConfig, dry_run: DryRun = False) -> None:
        from rlhf_cli.launch import launch

        launch(config.parallel, partial(call, f"rlhf_core.methods.{name}", "train", config), dry_run=dry_run)


for name, config in METHODS.items():
    add_training(name, config)


@command(train, "ppo", PPOConfig)
def ppo(config: PPOConfig, dry_run: DryRun = False) -> None:
    from rlhf_cli.launch import hide_key
    from rlhf_ray.run import train

    sys.argv[1:] = hide_key(sys.argv[1:])
    train(config, dry_run=dry_run)


@command(app, "generate", GenerateConfig)
def generate(config: GenerateConfig, dry_run: DryRun = False) -> None:
    from rlhf_infer.generate import generate

    generate(config, dry_run=dry_run)


@command(app, "score", ScoreConfig)
def score(config: ScoreConfig, dry_run: DryRun = False) -> None:
    from rlhf_cli.launch import launch

    launch(config.parallel, partial(call, "rlhf_infer.score", "score", config), dry_run=dry_run)


@command(app, "infer", InferConfig)
def infer(config: InferConfig, dry_run: DryRun = False) -> None:
    job, notes = job_of(config)
    print("\n".join(notes), end="\n" * bool(notes))
    score(job, dry_run) if isinstance(job, ScoreConfig) else generate(job, dry_run)


def add_recipe(name: str, config: type[RecipeConfig]) -> None:
    """`rlhf recipe NAME`."""

    @command(recipe, name, config)
    def run(config: RecipeConfig, dry_run: DryRun = False) -> None:
        from rlhf_cli.recipes.loop import run

        run(name, config, dry_run=dry_run)


for name, config in RECIPES.items():
    add_recipe(name, config)


@command(app, "serve", ServeConfig)
def serve(config: ServeConfig) -> None:
    from rlhf_infer.serve.app import serve

    serve(config)


@command(app, "chat", ChatConfig)
def chat(config: ChatConfig) -> None:
    from rlhf_infer.chat import chat

    chat(config)


@command(app, "merge", MergeConfig)
def merge(config: MergeConfig) -> None:
    from rlhf_core.merge import merge

    merge(config)


@command(data, "inspect", InspectConfig)
def inspect(config: InspectConfig) -> None:
    from rlhf_data.inspection import inspect

    print(inspect(config).format())


def version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        print(f"rlhf {version('rlhf-cli')}")
        raise typer.Exit


@app.callback()
def top(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
    local_rank: Annotated[
        int, typer.Option("--local_rank", hidden=True, help="What `deepspeed` puts first; LOCAL_RANK says it too.")
    ] = 0,
) -> None:
    """Post-training for language models: from one laptop CPU to a cluster of GPUs."""


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: always, with the exit code.
    """
    # How long a CPU thread spins for its next piece of work (libgomp): its default starves every other process, and
    # itself when cores are shared. Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "5")  # seconds; a progress bar in a log file is read afterwards
    with usage_reported():
        raise SystemExit(app(standalone_mode=False))
