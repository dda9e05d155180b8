"""Roles as processes of a Ray cluster: one that runs already, or one of this run's own on this machine.

Errors that are written for people travel in answers: as exceptions, Ray would bury them in its own.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import secrets
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_data.errors import InputError, RunError
from rlhf_infer.engines.own_ray import same_environment
from rlhf_ray.cluster.backend import Place, Unexpected, WorkerDied
from rlhf_ray.cluster.placement import Node, Plan, Slot, cores, counted
from rlhf_ray.config import ClusterConfig

OWN = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_gcs_rpc_server_connect_timeout_s": "60",
}
"""Environment of a Ray of our own: it reports nothing, takes orders from this run only, listens on this machine only (the
variable that says so is named after the systems where that is usual), and may take longer than 5 seconds to start, as it does
where all cores are busy."""

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which a launcher that has started Ray would tell torch of ranks that are none of ours."""

ANSWER = 10.0
"""Seconds in which a cluster must answer at its address."""

LEAST_STORE = 200_000_000
"""Bytes of the object store of a Ray of our own, at least."""

STORE_SHARE = 0.1
"""Share of the memory that it may take: rollouts pass through it, weights and models do not."""

SHM = Path("/dev/shm")

KILLED = 143
"""Exit code of a program that SIGTERM has ended."""


@dataclass(frozen=True)
class Outcome:
    """What a call came to."""

    value: Any = None

    error: Exception | None = None
    """What it raised, as `portable` makes it."""

    where: str = ""
    """Where it was raised: the traceback."""


class RemoteTraceback(Exception):
    """Where an error was raised in another process, as text. It is the cause of that error."""


class Process:
    """A worker in its process. Made with its first call, so that what its constructor raises is an answer too.

    Args:
        name: what people call it.
        folder: where the driver is; relative paths count from there, on nodes that have it.
        environment: variables that are set before the worker's module is imported.
        worker: the pickled pair of a class and the arguments of its constructor.
    """

    def __init__(self, name: str, folder: str, environment: dict[str, str], worker: bytes) -> None:
        self.name, self.pickled = name, worker
        self.worker: Any = None
        for variable in LAUNCHER:
            os.environ.pop(variable, None)
        os.environ.update(environment)
        if Path(folder).is_dir():
            os.chdir(folder)

    def __repr__(self) -> str:
        return self.name

    def run(self, verb: str, *args: Any) -> Outcome:
        """Call a method of the worker."""
        try:
            if self.worker is None:
                make, own = pickle.loads(self.pickled)
                self.worker = make(*own)
            return Outcome(getattr(self.worker, verb)(*args))
        except Exception as error:
            return Outcome(error=portable(error), where=traceback.format_exc())


def portable(error: Exception) -> Exception:
    """An error as another process can read it: itself if it is written for people, else an `Unexpected` one that names it."""
    if not isinstance(error, InputError | RunError):
        return Unexpected(f"{type(error).__name__}: {one_line(error) or 'no message'}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its own constructor makes of the arguments of another
        return (InputError if isinstance(error, InputError) else RunError)(str(error))
    return error


class RayBackend:
    """Runs each worker in a process of its own, as a Ray actor. See `Backend`.

    Args:
        timeout: seconds in which a plan must get its places.
        leave: what ends the connection to the cluster.
    """

    def __init__(self, timeout: float, leave: Callable[[], None]) -> None:
        self.timeout, self.leave = timeout, leave
        self.actors: list[Any] = []
        self.groups: list[Any] = []
        self.is_closed = False

    def __enter__(self) -> RayBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def nodes(self) -> list[Node]:
        """All nodes that are alive, that of the driver first."""
        import ray
        from ray._private.state import available_resources_per_node

        own, free = ray.get_runtime_context().get_node_id(), available_resources_per_node()
        rows = sorted((row for row in ray.nodes() if row["Alive"]), key=lambda row: row["NodeID"] != own)
        addresses = Counter(row["NodeManagerAddress"] for row in rows)
        return [node_of(row, free.get(row["NodeID"]), addresses) for row in rows]

    def reserve(self, plan: Plan) -> dict[str, list[Place]]:
        """Take everything that a plan needs, all of it or nothing; returns the places of the processes of each role.

        Raises:
            RunError: it is not to be had in time.
        """
        from ray.util.placement_group import placement_group

        bundles = [
            {name: amount for name, amount in (("CPU", bundle.cpus), ("GPU", bundle.gpus)) if amount}
            for bundle in plan.bundles
        ]
        where = [{"ray.io/node-id": bundle.node.id} for bundle in plan.bundles]
        group = placement_group(bundles, strategy="PACK", bundle_label_selector=where)
        self.groups.append(group)
        if not group.wait(self.timeout):
            free = ", ".join(
                f"{node.name} {node.free_gpus or 0:g} of {counted(node.gpus, 'GPU')}, "
                f"{node.free_cpus or 0:g} of {counted(node.cpus, 'CPU')}"
                for node in self.nodes()
            )
            raise RunError(
                f"the cluster did not give its places to the run in {self.timeout:g} s (--start_timeout); free are: {free}. "
                f"`ray status` shows who uses the rest. Wanted was:\n{plan.format()}"
            )
        devices = self._devices(plan, group)
        return {role: [place_of(slot, group, devices) for slot in slots] for role, slots in plan.slots.items()}

    def start(self, worker: Callable[..., Any], *args: Any, place: Place, name: str) -> Any:
        """See `Backend.start`."""
        import ray
        from ray.cloudpickle import cloudpickle

        process: Any = ray.remote(Process)
        actor = process.options(
            num_cpus=place.cpus, num_gpus=place.gpus, max_restarts=0, scheduling_strategy=strategy(place)
        ).remote(name, str(Path.cwd()), place.environment, cloudpickle.dumps((worker, args)))
        self.actors.append(actor)
        return actor

    def call(self, handle: Any, verb: str, *args: Any) -> Any:
        """See `Backend.call`."""
        return handle.run.remote(verb, *args)

    def put(self, value: Any) -> Any:
        """See `Backend.put`."""
        import ray

        return ray.put(value)

    def wait(self, references: Sequence[Any], timeout: float) -> list[Any]:
        """See `Backend.wait`."""
        import ray

        if not references:
            return []
        try:
            ready, left = ray.wait(list(references), num_returns=1, timeout=timeout)
        except SystemExit:
            raise SystemExit(KILLED) from None  # of `exit_by_exception`: Ray loses the code
        if ready and left:
            more, _ = ray.wait(left, num_returns=len(left), timeout=0)
            ready += more
        return ready

    def result(self, reference: Any) -> Any:
        """See `Backend.result`."""
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, WorkerCrashedError

        try:
            outcome: Outcome = ray.get(reference)
        except (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError) as error:
            raise WorkerDied(cause_of_death(str(error))) from error
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            raise RunError(
                f"{type(cause).__name__}: {one_line(cause)} (all nodes need the same Python packages)"
            ) from error
        if outcome.error is not None:
            raise outcome.error from RemoteTraceback(f"\n{outcome.where}")
        return outcome.value

    def stop(self, handle: Any) -> None:
        """See `Backend.stop`."""
        import ray

        if handle in self.actors:
            self.actors.remove(handle)
            ray.kill(handle)

    def close(self) -> None:
        """See `Backend.close`. A Ray of our own ends too."""
        from ray.util.placement_group import remove_placement_group

        if self.is_closed:
            return
        self.is_closed = True
        for actor in list(self.actors):
            self.stop(actor)
        for group in self.groups:
            remove_placement_group(group)
        self.leave()

    def _devices(self, plan: Plan, group: Any) -> dict[int, str]:
        """What the GPU of each bundle is called on its node, for the bundles of processes that take several."""
        import ray

        spanned = {
            number for row in plan.slots.values() for slot in row if len(slot.bundles) > 1 for number in slot.bundles
        }
        task = ray.remote(visible_devices)
        names = {
            number: task.options(num_cpus=0, num_gpus=1, scheduling_strategy=strategy(Place(group, number))).remote()
            for number in sorted(spanned if any(bundle.gpus for bundle in plan.bundles) else ())
        }
        return dict(zip(names, ray.get(list(names.values()), timeout=self.timeout), strict=True))


def strategy(place: Place) -> Any:
    """How Ray is told of a place."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    if place.group is None:
        return "DEFAULT"
    return PlacementGroupSchedulingStrategy(place.group, place.bundle)


def place_of(slot: Slot, group: Any, devices: dict[int, str]) -> Place:
    """The place that was reserved for a process. One that takes the GPUs of several bundles is told which these are."""
    first, *others = slot.bundles
    environment = dict(slot.environment)
    if devices and others:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[number] for number in slot.bundles)
    return Place(group, first, slot.cpus, slot.gpus, environment)


def visible_devices() -> str:
    """The GPUs that Ray has given to this process, as CUDA is told of them."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


def node_of(row: dict[str, Any], free: dict[str, float] | None, addresses: Counter[str]) -> Node:
    """A node from what Ray says of it, of what is free there, and of how many nodes have an address."""
    has, address = row["Resources"], row["NodeManagerAddress"]
    left = has if free is None else free
    return Node(
        address if addresses[address] == 1 else f"{address}/{row['NodeID'][:6]}",
        cpus=has.get("CPU", 0),
        gpus=has.get("GPU", 0),
        free_cpus=left.get("CPU", 0),
        free_gpus=left.get("GPU", 0),
        id=row["NodeID"],
    )


def cause_of_death(text: str) -> str:
    """Why a worker is gone, in one line, from what Ray says of it in several."""
    flat = " ".join(text.split())
    if "low on memory" in flat or "OUT_OF_MEMORY" in flat:
        cause = "Ray has ended its process because the node ran out of memory: give it more, or smaller batches"
    elif "node has died" in flat or "node is dead" in flat:
        cause = "its node has died, or cannot be reached"
    elif found := re.search(r"exit code (\d+)", flat):
        cause = f"its process has ended with exit code {found[1]}"
    elif "connection error code 2" in flat:
        cause = "its process was killed (by the system if memory was short) or has crashed"
    elif "ray.kill" in flat:
        cause = "its process was ended"
    else:
        cause = f"its process has died: {flat[:300]}"
    return cause + written_in(re.search(r"pid: (\d+)", flat))


def written_in(pid: re.Match[str] | None) -> str:
    """Where the last words of a process are, if they are on this machine."""
    import ray

    if pid is None or not ray.is_initialized():
        return ""
    from ray._private.worker import global_worker

    node: Any = global_worker.node
    files = list(Path(node.get_logs_dir_path()).glob(f"worker-*-{pid[1]}.err"))
    return f" (its last words: {files[0]})" if files and files[0].stat().st_size else ""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def connect(config: ClusterConfig) -> RayBackend:
    """Join a Ray cluster, or start a Ray of this run's own on this machine, which ends with it.

    What workers print stays in Ray's logs, unless Ray's own variable RAY_LOG_TO_DRIVER=1 asks for it.

    Args:
        config: which cluster, and how long to wait for places there. Without an address it is the one of RAY_ADDRESS, which
            `ray job submit` sets; without that, or with `local`, a Ray of this run's own. A script that has joined a cluster
            itself goes on using that.

    Raises:
        InputError: no cluster answers at the address.
        RunError: Ray does not start here.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return RayBackend(config.start_timeout, lambda: None)
    given = (
        f"--ray_address {config.ray_address}" if config.ray_address else f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}"
    )
    address = config.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    return RayBackend(config.start_timeout, start_own() if address == "local" else join(address, given))


def join(address: str, given: str) -> Callable[[], None]:
    """Join a cluster, whose address was given in some way; returns what leaves it."""
    if address.startswith("ray://"):
        raise InputError(
            f"{given}: a run is driven from a node of its cluster: start it there with --ray_address auto, or with `ray job "
            "submit`"
        )
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        host, _, port = canonicalize_bootstrap_address_or_die(address).rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()  # Ray would try for minutes
        return initialise(address)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{given}: no Ray cluster answers ({one_line(error)[:300]}); start one with `ray start --head`, or "
            "give --ray_address local for a Ray of this run's own"
        ) from error


def start_own() -> Callable[[], None]:
    """Start a Ray on this machine; returns what ends it."""
    given = OWN | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in given}

    def restore() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        forget_token()

    os.environ.update(given)
    forget_token()
    try:
        with same_environment():
            leave = initialise("local", num_cpus=cores(), include_dashboard=False, object_store_memory=store_size())
    except Exception as error:  # Ray's start fails in many ways, each with errors of its own
        restore()
        raise RunError(f"Ray does not start on this machine: {one_line(error)[:500]}") from error

    def end() -> None:
        leave()
        restore()

    return end


def forget_token() -> None:
    """Have Ray look at its environment again: it does so when it is imported, and remembers the token that it has used."""
    from ray import _raylet

    compiled: Any = _raylet
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()


def initialise(address: str, **options: Any) -> Callable[[], None]:
    """Have Ray join or start a cluster, without a word; SIGTERM ends this process by an exception, so that all is cleared up.

    Returns:
        What undoes it.
    """
    import ray
    from ray._private import worker

    before, on_main = signal.getsignal(signal.SIGTERM), threading.current_thread() is threading.main_thread()
    shown = os.environ.get("RAY_LOG_TO_DRIVER") == "1"
    ray.init(address, log_to_driver=shown, logging_level=logging.ERROR, **options)
    worker._worker_logs_enabled = shown  # of a worker that dies Ray would say so, at length, beside our own error
    if on_main:
        signal.signal(signal.SIGTERM, exit_by_exception)

    def leave() -> None:
        ray.shutdown()
        worker._worker_logs_enabled = True
        if on_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    return leave


def exit_by_exception(*_: object) -> None:
    raise SystemExit(KILLED)


def store_size() -> int:
    """Bytes of the object store of a Ray of our own: a share of the memory, and what shared memory has room for."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared = shutil.disk_usage(SHM).free if SHM.exists() else memory
    return max(LEAST_STORE, int(min(memory * STORE_SHARE, shared * 0.9)))
