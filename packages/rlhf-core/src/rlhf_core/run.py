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
    from rlhf_core.plan import check_run, make_plan
    from rlhf_data.tokenizer import load_tokenizer

    settle()
    strategy = None
    if not dry_run:
        from rlhf_core.strategy import Strategy

        strategy = Strategy(config)
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
    if len(tokenizer) > model_config.get_text_config().vocab_size:
        raise InputError(
            f"--pretrain {config.model.pretrain}: its tokenizer has {len(tokenizer)} tokens and the model only "
            f"{model_config.get_text_config().vocab_size}: they do not belong together"
        )
    if strategy:
        check_same_data(strategy, method)
    plan = make_plan(config, model_config, method.train, method.evaluation, world_size, method.token_budget)
    if plan.layout != "padded":
        check_ragged(config.model.pretrain, model_config.get_text_config(), int(method.train.lengths.max()))
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
    import torch

    from rlhf_core.export import check_export, export
    from rlhf_core.fit import Fit
    from rlhf_core.models.attention import padded_implementation, ragged_implementation
    from rlhf_core.models.load import load_model
    from rlhf_core.models.policy import Policy, check_policy

    text_config = model_config.get_text_config()
    dtype = torch.bfloat16 if config.model.bf16 else torch.float32
    attention = padded_implementation(text_config)
    if plan.layout != "padded":
        attention, why = ragged_implementation(strategy.device, dtype)
        strategy.say(f"attention: {why}")
    stage3 = strategy.deepspeed_config() if config.parallel.zero_stage == 3 else None
    model = load_model(config.model, config.lora, attn_implementation=attention, deepspeed=stage3)
    policy = Policy(model, ragged=plan.layout != "padded", balance=bool(config.model.aux_loss_coef))
    if strategy.is_first:
        check_export(policy, tokenizer)
    engine = strategy.prepare(policy, plan.total_steps)
    engine.eval()
    check_policy(engine, text_config.vocab_size, strategy.device, dtype)
    Fit(method, engine, tokenizer, strategy, config, plan).run()
    export(policy, tokenizer, Path(config.checkpoint.save_path), strategy)
    strategy.say(f"saved {config.checkpoint.save_path}")
