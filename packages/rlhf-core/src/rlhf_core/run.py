"""From options to a trained model: the order of things that every method shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_core.config import TrainConfig
from rlhf_core.libraries import settle
from rlhf_data.errors import InputError


def run(
    config: TrainConfig, make_method: Callable[[TrainConfig, Any], Any], *, dry_run: bool = False, world_size: int = 1
) -> None:
    """Check everything, load the model, train, and write the result.

    Args:
        config: the run's options.
        make_method: reads and tokenises the data, given the options and the tokenizer.
        dry_run: stop after the plan, before any weight is loaded.
        world_size: ranks of the run, for a dry run (a real one knows).
    """
    from rlhf_core.models.load import check_ragged, load_model_config
    from rlhf_core.plan import check_context, check_run, make_plan
    from rlhf_core.vocabulary import check_vocabulary
    from rlhf_data.tokenizer import load_tokenizer

    settle()
    strategy = None
    if not dry_run:
        from rlhf_core.strategy import Strategy

        strategy = Strategy.of(config)
        world_size = strategy.world_size
    check_run(config, world_size)
    model_config = load_model_config(config.model)
    tokenizer = load_tokenizer(
        config.model.pretrain,
        use_fast=not config.model.disable_fast_tokenizer,
        chat_template=config.data.tokenizer_chat_template,
        trust_remote_code=config.model.trust_remote_code,
    )
    method = make_method(config, tokenizer)
    if strategy:
        check_same_data(strategy, method)
    models = {"--pretrain": (config.model.pretrain, model_config)}
    if method.frozen:
        frozen = method.frozen
        models[frozen.option] = (frozen.name, load_model_config(frozen.options(config.model), frozen.option))
    for option, (name, architecture) in models.items():
        check_vocabulary(option, name, architecture, len(tokenizer))
        check_context(option, name, architecture, method.longest)
    plan = make_plan(
        config, model_config, method, world_size, models[method.frozen.option][1] if method.frozen else None
    )
    if plan.layout != "padded":
        for option, (name, architecture) in models.items():
            check_ragged(name, architecture.get_text_config(), method.longest, option)
    if strategy is None or strategy.is_first:
        print(method.data_report.format(), plan.format(config), sep="\n\n", flush=True)
    if strategy:
        train(config, strategy, method, tokenizer, model_config, plan)
        strategy.close()


def check_same_data(strategy: Any, method: Any) -> None:
    """Make sure that all ranks read the same samples: their micro-batches would not match otherwise.

    Raises:
        InputError: some nodes have other data.
    """
    mine = [data.fingerprint for data in (method.train, method.evaluation) if data is not None]
    (different,) = strategy.sum([float(mine != strategy.share(lambda: mine))])
    if different:
        raise InputError(
            f"--dataset: {int(different)} of {strategy.world_size} ranks read other data than the first one"
        )


def train(config: TrainConfig, strategy: Any, method: Any, tokenizer: Any, model_config: Any, plan: Any) -> None:
    """Load, train, export."""
    from rlhf_core.export import check_export, export
    from rlhf_core.fit import Fit
    from rlhf_core.models.loader import Models

    models = Models(
        config.model,
        strategy,
        ragged=plan.layout != "padded",
        share_prefix=method.share_prefix,
        head=method.head,
        lora=config.lora,
    )
    method.prepare(models)
    model = models.trained(model_config)
    if strategy.is_first:
        check_export(model, tokenizer)
    engine = strategy.prepare(model, plan.total_steps)
    engine.eval()
    models.check(engine, model_config, "rewards" if method.head else "token_logps")
    if method.frozen:
        method.frozen_model = models.frozen(method.frozen)
    fit = Fit(method, engine, tokenizer, strategy, config, plan)
    fit.run()
    method.finish(fit)
    export(model, tokenizer, Path(config.checkpoint.save_path), strategy)
    strategy.say(f"saved {config.checkpoint.save_path}")
