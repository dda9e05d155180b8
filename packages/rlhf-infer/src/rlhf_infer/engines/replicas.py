"""Several copies of an engine on Ray Data: an actor pool over blocks of prompts, streaming, with its fault tolerance.

Prompts wait in Parquet files in a folder that all nodes see, one file per block, so that memory does not grow with their
number. An actor that dies is started again, and the blocks it was answering are answered again: with the same seeds, so to
the same responses.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_data.errors import InputError, RunError
from rlhf_infer.config import EngineConfig, EngineName, GenerateConfig, SamplingConfig
from rlhf_infer.engines.engine import Completion, Engine, Request
from rlhf_infer.engines.own_ray import same_environment

ROUNDS = 8
"""How many times over a block of prompts fills an engine: at the end of a block the engine is not full."""

BLOCKS_EACH = 4
"""Least blocks that a copy answers, where there are prompts enough."""

RESTARTS = 3
"""How often an actor that died is started again."""

STORE = 512 * 1024 * 1024
"""Bytes of the object store of a Ray cluster that is started here; Ray's own choice is a third of the memory."""


class Replicas:
    """An engine that is several copies of another one.

    Args:
        make: makes a copy; called in each actor.
        config: how many copies, and the GPUs of each.
        block: prompts of a block.
        folder: for the blocks, in a place that all nodes share; created, and removed at the end.

    Raises:
        InputError: Ray is not installed, or the machines have no room for the copies.
    """

    def __init__(self, make: Callable[[], Engine], config: EngineConfig, block: int, folder: Path) -> None:
        check_replicas(config)
        self._make, self._config, self._block, self._folder = make, config, block, folder
        self._joined = join_ray()
        try:
            self._resources = resources(config)
        except InputError:
            self.close()
            raise

    def generate(
        self, requests: Iterable[Request], sampling: SamplingConfig
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Answer all requests; those of a block come together, blocks in their order. See `Engine`.

        Raises:
            InputError: what an engine found wrong.
            RunError: an engine failed, or its process died again and again.
        """
        import ray
        from ray.data import ActorPoolStrategy
        from ray.exceptions import RayError, UserCodeException

        files = self._write(requests)
        if not files:
            return
        blocks = ray.data.from_items([{"file": str(file)} for file in files], override_num_blocks=len(files))
        with warnings.catch_warnings():
            # Ray 2.60 announces the end of this argument for 2.64 and has no other way to bound restarts
            warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
            answers = blocks.map_batches(
                Worker,
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=min(self._config.num_engines, len(files))),
                fn_constructor_args=(self._make, sampling),
                ray_remote_args_fn=lambda: {"max_restarts": RESTARTS, "max_task_retries": RESTARTS},
                **self._resources,
            )
        answers.context.execution_options.preserve_order = True
        answers.context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            tables: Any = answers.iter_batches(batch_size=None, batch_format="pyarrow")
            for table in tables:
                yield from answers_of(table)
        except (RayError, UserCodeException) as error:
            raise RunError(
                f"an engine failed ({type(error).__name__}: {first_line(error)}); run the same command again to go on"
            ) from error

    def close(self) -> None:
        """Leave the cluster, or end it if it is our own, and remove the blocks."""
        import ray

        shutil.rmtree(self._folder, ignore_errors=True)
        if self._joined:
            ray.shutdown()
            self._joined = False

    def _write(self, requests: Iterable[Request]) -> list[Path]:
        """Write the requests down, a file per block."""
        import pyarrow
        import pyarrow.parquet

        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        numbered, files = enumerate(requests), []
        while block := list(islice(numbered, self._block)):
            columns = {
                "number": pyarrow.array([number for number, _ in block], pyarrow.int64()),
                "prompt_ids": pyarrow.array([list(r.prompt_ids) for _, r in block], pyarrow.list_(pyarrow.int32())),
                "seed": pyarrow.array([r.seed for _, r in block], pyarrow.int64()),
            }
            files.append(self._folder / f"{len(files):08}.parquet")
            try:
                pyarrow.parquet.write_table(pyarrow.table(columns), files[-1])
            except OSError as error:
                raise RunError(f"{files[-1]} cannot be written ({error.strerror or error}): free some space") from error
        return files


class Worker:
    """One copy, in an actor of its own.

    Errors that are written for people travel in the answers: as exceptions, Ray would bury them in its own.
    """

    def __init__(self, make: Callable[[], Engine], sampling: SamplingConfig) -> None:
        self._sampling = sampling
        self._failure: Exception | None = None
        try:
            self._engine = make()
        except (InputError, RunError) as error:
            self._failure = error

    def __call__(self, batch: Any) -> Any:
        """Answer the prompts of a block.

        Args:
            batch: a table of one row, with the block's file.

        Returns:
            A table of one row per prompt, with its `number` and in `answer` its completions; or of one row that says in
            `error` what went wrong, and in `kind` whose fault it is.
        """
        import pyarrow

        (file,) = batch["file"].to_pylist()
        try:
            if self._failure:
                raise self._failure
            rows = self._answer(file)
        except (InputError, RunError) as error:
            rows = [{"number": -1, "answer": [], "kind": type(error).__name__, "error": str(error)}]
        completion = {
            "token_ids": pyarrow.list_(pyarrow.int32()),
            "finish_reason": pyarrow.string(),
            "logp": pyarrow.float64(),
            "seed": pyarrow.int64(),
        }
        schema = {
            "number": pyarrow.int64(),
            "answer": pyarrow.list_(pyarrow.struct(completion)),
            "kind": pyarrow.string(),
            "error": pyarrow.string(),
        }
        return pyarrow.Table.from_pylist(rows, pyarrow.schema(schema))

    def _answer(self, file: str) -> list[dict[str, Any]]:
        import pyarrow.parquet

        prompts = pyarrow.parquet.read_table(file).to_pylist()
        requests = [Request(prompt["prompt_ids"], prompt["seed"]) for prompt in prompts]
        answers = sorted(self._engine.generate(requests, self._sampling), key=lambda answer: answer[0])
        return [
            {"number": prompts[place]["number"], "answer": list(map(asdict, written))} for place, written in answers
        ]


def answers_of(table: Any) -> Iterator[tuple[int, tuple[Completion, ...]]]:
    """What a worker answered.

    Raises:
        InputError: what the worker found wrong.
        RunError: as well.
    """
    for row in table.to_pylist():
        if row["error"] is not None:
            raise {"InputError": InputError, "RunError": RunError}[row["kind"]](row["error"])
        yield row["number"], tuple(Completion(**c | {"token_ids": tuple(c["token_ids"])}) for c in row["answer"])


def block_size(config: GenerateConfig, engine: EngineName, prompts: int) -> int:
    """Prompts of a block: enough to keep an engine full, few enough that all copies have some and end together."""
    at_once = config.engine.max_num_seqs if engine == "vllm" else config.model.micro_batch_size
    full = ROUNDS * at_once // config.sampling.best_of_n
    return max(1, min(full, -(-prompts // (BLOCKS_EACH * config.engine.num_engines))))


def check_replicas(config: EngineConfig) -> None:
    """Refuse several engines without Ray. Whether the machines have room for them is found out when Ray is joined."""
    if find_spec("ray") is None:
        raise InputError(
            f"--num_engines {config.num_engines} runs on Ray Data, and Ray is not installed: pip install 'rlhf-infer[ray]'"
        )


def join_ray() -> bool:
    """Join the running cluster (`RAY_ADDRESS`, or one that is found), or start one on this machine; says which.

    Returns:
        Whether it was joined here; a script that did so itself goes on using it.

    Raises:
        InputError: the cluster at `RAY_ADDRESS` does not answer.
    """
    import ray

    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray Data makes it warn of something that does not apply
    address = os.environ.get("RAY_ADDRESS")
    if address != "local":
        try:
            ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address:
                raise InputError(
                    f"RAY_ADDRESS={address}: no Ray cluster answers ({first_line(error)}); start it, or set "
                    "RAY_ADDRESS=local for one of this run's own"
                ) from error
        else:
            nodes = sum(node["Alive"] for node in ray.nodes())
            print(f"joined the running Ray cluster of {nodes} node{'s' * (nodes != 1)}", flush=True)
            return True
    with same_environment():
        ray.init(
            "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=STORE,  # prompts are in files: only answers pass through it
        )
    print("started a Ray cluster on this machine", flush=True)
    return True


def resources(config: EngineConfig) -> dict[str, Any]:
    """What an actor reserves: its GPUs, or its share of the CPUs where there are none.

    Raises:
        InputError: the cluster has no room for all copies.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    if gpus:
        room = sum(int(node.get("GPU", 0)) // config.tp_size for node in nodes)
        if config.num_engines > room:
            raise InputError(too_many(config, f"the nodes of the Ray cluster have {gpus:g} GPUs", room))
        return {"num_gpus": config.tp_size, "num_cpus": 0}
    cores = sum(node.get("CPU", 0) for node in nodes) / config.num_engines
    share = max(1, int(cores))
    # vLLM would bind the threads of all copies to the same cores
    threads = {"OMP_NUM_THREADS": str(share), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {"num_cpus": share if cores >= 1 else cores, "runtime_env": {"env_vars": threads}}


def too_many(config: EngineConfig, there: str, room: int) -> str:
    each = f" of --tp_size {config.tp_size}" if config.tp_size > 1 else ""
    return f"--num_engines {config.num_engines}{each}: {there}, room for {room}"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
