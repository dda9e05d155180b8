"""The `rlhf` command: one Typer app, one command per config, heavy imports only inside commands."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from rlhf_cli.options import RUN, command
from rlhf_core.config import SFTConfig

app = typer.Typer(
    name="rlhf",
    help="Post-training for language models.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("-", "_")},
)
train = typer.Typer(help="Train a model.", no_args_is_help=True)
app.add_typer(train, name="train")

DryRun = Annotated[
    bool,
    typer.Option("--dry_run", help="Check everything, print the plan, and stop before any weight is loaded.", rich_help_panel=RUN),
]


@command(train, "sft", SFTConfig)
def sft(config: SFTConfig, dry_run: DryRun = False) -> None:
    """Supervised fine-tuning."""
    from rlhf_cli.launch import launch
    from rlhf_core.methods import sft

    launch(config.parallel, partial(sft.train, config), dry_run=dry_run)


def main() -> None:
    app()
