"""Starting ranks. One rank runs in this process; more are started by torch's elastic launcher, used as a library."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from rlhf_core.config import ParallelConfig
from rlhf_data.errors import InputError


def ranks_on_this_node(parallel: ParallelConfig) -> int:
    """How many ranks to start: what was asked for, or one per GPU, or one."""
    import torch

    gpus = torch.cuda.device_count()
    if parallel.num_procs and gpus and parallel.num_procs > gpus:
        raise InputError(f"--num_procs {parallel.num_procs}: this machine has {gpus} GPU(s)")
    return parallel.num_procs or gpus or 1


def launch(parallel: ParallelConfig, work: Callable[..., None], *, dry_run: bool = False) -> None:
    """Run `work` on every rank.

    Under `torchrun` or `deepspeed` this process already is a rank. Otherwise the ranks of this node are started with this
    very command line; the first that fails ends the others, and its message is the one that is shown.

    Args:
        parallel: how many ranks, and where the nodes meet.
        work: the command; takes `dry_run` and `world_size`.
        dry_run: only plan, in this process, as if all ranks were there.
    """
    sys.argv[1:] = hide_key(sys.argv[1:])
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return work(dry_run=dry_run, world_size=int(os.environ["WORLD_SIZE"]))
    here = ranks_on_this_node(parallel)
    if dry_run or here * parallel.num_nodes == 1:
        return work(dry_run=dry_run, world_size=here * parallel.num_nodes)
    start_ranks(parallel, here)


def start_ranks(parallel: ParallelConfig, here: int) -> None:
    """Start this node's ranks and wait for them.

    Raises:
        SystemExit: a rank failed; with its message shown and its exit code. Or this process was told to end.
        KeyboardInterrupt: it was interrupted; its ranks have ended.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `report` says it, once
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // here)))
    alone = parallel.num_nodes == 1
    config = LaunchConfig(
        min_nodes=parallel.num_nodes,
        max_nodes=parallel.num_nodes,
        nproc_per_node=here,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0" if alone else f"{parallel.master_addr}:{parallel.master_port}",
        rdzv_configs={
            "is_host": alone or parallel.node_rank == 0,
            "join_timeout": int(parallel.dist_timeout * 60),
            "read_timeout": int(parallel.dist_timeout * 60),
        },
        run_id="rlhf",
        local_addr="127.0.0.1" if alone else None,
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "rlhf_cli", *sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise SystemExit(report(rank, failure)) from None
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + error.sigval) from None


def report(rank: int, failure: Any) -> int:
    """Show why the first failed rank failed; returns the exit code."""
    from rlhf_cli.errors import PROGRAM, USER, say

    if failure.exitcode < 0:
        message = (
            f"rank {rank} was killed by signal {signal.Signals(-failure.exitcode).name}; the other ranks were ended"
        )
    elif failure.error_file_data.get("message"):
        message = failure.message if isinstance(failure.message, str) else failure.message["message"]
    else:
        message = f"rank {rank} ended with exit code {failure.exitcode}; the other ranks were ended"
    say(message)
    return failure.exitcode if failure.exitcode in (PROGRAM, USER) else PROGRAM


def hide_key(arguments: list[str]) -> list[str]:
    """Move a Weights & Biases key from the command line to the environment.

    Other users of the machine see the ranks' command lines, and wandb writes its own process's down.
    """
    hidden = list(arguments)
    for i, argument in enumerate(hidden):
        flag, _, value = argument.replace("-", "_").partition("=")
        if flag == "__use_wandb":
            place = i if value else i + 1
            key = argument.partition("=")[2] if value else hidden[i + 1]
            if key.lower() not in ("true", "false"):
                os.environ["WANDB_API_KEY"] = key
                hidden[place] = f"{argument.partition('=')[0]}=True" if value else "True"
    return hidden
