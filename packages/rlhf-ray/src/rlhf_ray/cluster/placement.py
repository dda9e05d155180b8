"""Who computes where: which process gets which share of which node. Only planned here, and checked, before anything starts."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_data.errors import InputError
from rlhf_ray.config import PPOConfig

if TYPE_CHECKING:
    from rlhf_ray.rewards import Source

ENGINES = "engines"
"""The vLLM engines, as a role: one process each."""

LEAST_CPUS = 0.05
"""CPUs of a node, or those left of it, that are worth sharing."""

UNITS = 10_000
"""Shares of a CPU or GPU that Ray tells apart."""


@dataclass(frozen=True)
class Node:
    """A machine that can be computed on."""

    name: str
    """Its address."""

    cpus: float
    gpus: float = 0

    free_cpus: float | None = None
    """Those that nobody uses now; None for all."""

    free_gpus: float | None = None
    """Those that nobody uses now; None for all."""

    id: str = ""
    """What Ray knows it by."""

    def has(self, *, free: bool) -> tuple[float, float]:
        """CPUs and GPUs, all or the free ones."""
        cpus = self.free_cpus if free and self.free_cpus is not None else self.cpus
        gpus = self.free_gpus if free and self.free_gpus is not None else self.gpus
        return cpus, gpus

    def __str__(self) -> str:
        return f"{self.name} ({counted(self.gpus, 'GPU')}, {counted(self.cpus, 'CPU')})"


@dataclass(frozen=True)
class Role:
    """Processes that do the same."""

    name: str
    """`policy`, `critic`, `reference`, `reward NAME` or `engines`."""

    option: str = ""
    """What its options begin with: `actor` of `--actor_num_nodes`; empty for a reward function."""

    nodes: int = 1

    per_node: int = 1
    """Processes on each node."""

    gpus: int = 1
    """Of each process, where there are GPUs."""

    @property
    def size(self) -> str:
        """The options that say how large it is."""
        if self.name == ENGINES:
            return f"--vllm_num_engines {self.nodes} x --vllm_tensor_parallel_size {self.gpus}"
        return f"--{self.option}_num_nodes {self.nodes} x --{self.option}_num_gpus_per_node {self.per_node}"

    @property
    def piece(self) -> int:
        """GPUs that it needs together on one node."""
        return self.per_node * self.gpus

    @property
    def spread(self) -> int:
        """Different nodes that it needs: engines may be on one."""
        return 1 if self.name == ENGINES else self.nodes

    @property
    def wants(self) -> int:
        """GPUs, over all its processes."""
        return self.nodes * self.piece


@dataclass(frozen=True)
class Bundle:
    """A piece of a node that is reserved as a whole, for one process or for several that share it."""

    node: Node
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Slot:
    """What one process gets."""

    node: Node

    bundles: tuple[int, ...]
    """Numbers of its bundles: one, or those of all the GPUs that an engine is split over when it shares them."""

    cpus: float
    """CPUs, or a share of one."""

    gpus: float
    """GPUs, or a share of one."""

    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the process."""


@dataclass(frozen=True)
class Plan:
    """Where all processes of a run go."""

    nodes: tuple[Node, ...]
    """Those that are used."""

    bundles: tuple[Bundle, ...]

    slots: dict[str, list[Slot]]
    """Of the processes of each role, in the order of their ranks."""

    hosts: dict[str, str]
    """Roles that share the devices of another one, and that one."""

    notes: tuple[str, ...] = ()
    """What is otherwise than the options say, or needs patience."""

    def format(self) -> str:
        """The plan as a person reads it."""
        rows = [(name, *described(slots, self.hosts.get(name))) for name, slots in self.slots.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"Placement on {listed(self.nodes)}", *(f"  {line}" for line in [*lines, *self.notes])])


def plan(config: PPOConfig, sources: Sequence[Source], nodes: Sequence[Node]) -> Plan:
    """Give every process its place.

    Where there are GPUs, every rank has one of its own, or a share of one that colocated roles have in common, and a role of
    several nodes is spread over as many. Without any, ranks share the CPUs: all roles fit on whatever there is.

    Args:
        config: the run's options.
        sources: reward models and functions that run in processes of their own, see `rlhf_ray.rewards.needs_workers`.
        nodes: of the cluster, that of the driver first.

    Raises:
        InputError: colocated roles differ in shape, or the cluster is too small; the message names the options.
    """
    roles = roles_of(config, sources)
    hosts = colocated(config, roles)
    sites = [role for role in roles if role.name not in hosts]
    has_gpus = any(node.gpus >= 1 for node in nodes)
    for free in (True, False):
        chosen = choose(sites, hosts, nodes, has_gpus, free=free)
        if chosen is not None:
            break
    else:
        raise InputError(too_small(sites, nodes))
    pieces = [(node, role.gpus if has_gpus else 0) for role in sites for node in chosen[role.name]]
    bundles, slots = divide(config, roles, spans_of(roles, hosts), pieces, has_gpus, free=free)
    used = tuple(node for node in nodes if any(bundle.node is node for bundle in bundles))
    return Plan(used, bundles, slots, hosts, tuple(notes(config, roles, chosen, has_gpus, free=free)))


def roles_of(config: PPOConfig, sources: Sequence[Source]) -> list[Role]:
    """All roles that have processes of their own, the policy first."""
    cluster, engines = config.cluster, config.engines

    def sized(name: str, option: str) -> Role:
        nodes, gpus = (getattr(cluster, f"{option}_num_{what}") for what in ("nodes", "gpus_per_node"))
        return Role(name, option, nodes, gpus)

    roles = [sized("policy", "actor")]
    if config.starts_reference:
        roles.append(sized("reference", "ref"))
    if config.needs_critic:
        roles.append(sized("critic", "critic"))
    for source in sources:
        name = f"reward {source.name}"
        roles.append(sized(name, "reward") if source.kind == "model" else Role(name, gpus=0))
    if engines.vllm_num_engines:
        roles.append(Role(ENGINES, "vllm", engines.vllm_num_engines, 1, engines.vllm_tensor_parallel_size))
    return roles


def colocated(config: PPOConfig, roles: Sequence[Role]) -> dict[str, str]:
    """Roles that share the devices of another one, and that one.

    Raises:
        InputError: their shapes differ.
    """
    cluster, by_name = config.cluster, {role.name: role for role in roles}
    hosts: dict[str, str] = {}
    for role in roles[1:]:
        if (role.option and cluster.colocate_all) or (role.option == "ref" and cluster.colocate_actor_ref):
            hosts[role.name] = "policy"
        elif role.option == "reward" and cluster.colocate_critic_reward:
            hosts[role.name] = "critic"
    for guest, host in hosts.items():
        check_fit(config, by_name[guest], by_name[host])
    return hosts


def check_fit(config: PPOConfig, guest: Role, host: Role) -> None:
    """Make sure that a role fits on the devices of another one."""
    pair = "critic_reward" if host.name == "critic" else "actor_ref"
    option = "--colocate_all" if config.cluster.colocate_all else f"--colocate_{pair}"
    if guest.name == ENGINES:
        room = host.nodes * (host.per_node // guest.gpus)
        if guest.nodes > room:
            raise InputError(
                f"{option} puts the engines on the devices of the policy: {guest.size}, and {host.size} has room for {room}"
            )
    elif (guest.nodes, guest.per_node) != (host.nodes, host.per_node):
        raise InputError(
            f"{option} puts {host.name} and {guest.name} on the same devices: {host.size} and {guest.size} must be equal"
        )


def choose(
    sites: Sequence[Role], hosts: Mapping[str, str], nodes: Sequence[Node], has_gpus: bool, *, free: bool
) -> dict[str, list[Node]] | None:
    """The node of each process of the roles that have devices of their own; None if there is no room for one."""
    cpus = {node: has for node in nodes if (has := node.has(free=free)[0]) >= LEAST_CPUS}
    devices = [role for role in sites if role.gpus]
    if has_gpus:
        taken = on_gpus(devices, {node: node.has(free=free)[1] for node in nodes})
    else:
        taken = on_cpus(devices, Counter(hosts.values()), cpus)
    if taken is None or (not cpus and (not has_gpus or len(devices) < len(sites))):
        return None
    driver = list(cpus)[:1]  # functions run where their file is
    return {role.name: [node for node in taken.get(role.name, driver) for _ in range(role.per_node)] for role in sites}


def on_gpus(roles: Sequence[Role], left: Mapping[Node, float]) -> dict[str, list[Node]] | None:
    """Nodes for roles that have GPUs of their own; None if no way is found.

    Large pieces come first, each where the fewest GPUs are left over. Where that leaves no room, since the nodes of a role must
    be different ones, those with many nodes come first, or each goes where the most GPUs are left over.
    """
    orders = [lambda role: (role.piece, role.spread), lambda role: (role.spread, role.piece)]
    for order, fit in product(orders, (min, max)):
        found = filled(sorted(roles, key=order, reverse=True), dict(left), fit)
        if found is not None:
            return found
    return None


def filled(roles: Sequence[Role], left: dict[Node, float], fit: Callable[..., Node]) -> dict[str, list[Node]] | None:
    """Nodes for one role after the other; None as soon as there is no room.

    Args:
        roles: in their order.
        left: GPUs of each node; taken away from.
        fit: `min` to take a node of which little is left, `max` for one of which much is.
    """
    found: dict[str, list[Node]] = {}
    for role in roles:
        own = found[role.name] = []
        for _ in range(role.nodes):
            able = [node for node in left if left[node] >= role.piece and (role.spread == 1 or node not in own)]
            if not able:
                return None
            own.append(fit(able, key=left.__getitem__))
            left[own[-1]] -= role.piece
    return found


def on_cpus(roles: Sequence[Role], guests: Mapping[str, int], cpus: Mapping[Node, float]) -> dict[str, list[Node]]:
    """Nodes for roles that share the CPUs: each where there is then least to do; different ones as long as there are any.

    Args:
        roles: that have places of their own.
        guests: how many others share those of a role.
        cpus: of each node that has some.
    """
    load, found = Counter[Node](), dict[str, list[Node]]()
    for role in roles:
        own, weight = found.setdefault(role.name, []), role.per_node * (1 + guests[role.name])
        for _ in range(role.nodes if cpus else 0):
            fresh = [node for node in cpus if role.spread == 1 or node not in own] or list(cpus)
            own.append(min(fresh, key=lambda node: (load[node] + weight) / cpus[node]))
            load[own[-1]] += weight
    return found


def spans_of(roles: Sequence[Role], hosts: Mapping[str, str]) -> dict[str, list[tuple[int, ...]]]:
    """Numbers of the bundles of each process of each role. Engines among the policy's ranks are dealt out over its nodes."""
    spans: dict[str, list[tuple[int, ...]]] = {}
    count = 0
    for role in roles:
        if role.name not in hosts:
            spans[role.name] = [(count + n,) for n in range(role.nodes * role.per_node)]
            count += len(spans[role.name])
    for role in roles:
        if role.name not in hosts:
            continue
        spans[role.name] = spans[hosts[role.name]]
        if role.name == ENGINES:
            policy = roles[0]
            starts = [(n % policy.nodes) * policy.per_node + n // policy.nodes * role.gpus for n in range(role.nodes)]
            spans[ENGINES] = [tuple(range(start, start + role.gpus)) for start in starts]
    return {role.name: spans[role.name] for role in roles}


def divide(
    config: PPOConfig,
    roles: Sequence[Role],
    spans: Mapping[str, list[tuple[int, ...]]],
    pieces: Sequence[tuple[Node, int]],
    has_gpus: bool,
    *,
    free: bool,
) -> tuple[tuple[Bundle, ...], dict[str, list[Slot]]]:
    """Cut bundles into shares: each process gets the same share of its node's CPUs, at most one, and of its GPU.

    Args:
        config: the run's options.
        roles: all of them.
        spans: of each process of each role, its bundles.
        pieces: of each bundle, its node and its GPUs.
        has_gpus: whether models compute on GPUs.
        free: whether what others use is left to them.
    """
    processes = [span for row in spans.values() for span in row]
    started, sharing = Counter(span[0] for span in processes), Counter(n for span in processes for n in span)
    crowd = Counter(pieces[span[0]][0] for span in processes)
    cpus = {node: share(node.has(free=free)[0], count) for node, count in crowd.items()}
    gpus = [float(whole) if sharing[n] == 1 else share(whole, sharing[n]) for n, (_, whole) in enumerate(pieces)]
    bundles = (Bundle(node, round(cpus[node] * started[n], 4), whole) for n, (node, whole) in enumerate(pieces))
    slots: dict[str, list[Slot]] = {}
    for role in roles:
        nodes = [pieces[span[0]][0] for span in spans[role.name]]
        ranks = Counter(nodes)
        slots[role.name] = [
            Slot(node, span, cpus[node], gpus[span[0]], environment(config, role, node, ranks[node], has_gpus))
            for node, span in zip(nodes, spans[role.name], strict=True)
        ]
    return tuple(bundles), slots


def share(whole: float, processes: int) -> float:
    """What each of some processes gets of a device that they share, at most one, in units that Ray can tell apart."""
    return min(1.0, math.floor(whole * UNITS / processes) / UNITS)


def environment(config: PPOConfig, role: Role, node: Node, ranks: int, has_gpus: bool) -> dict[str, str]:
    """Environment variables of a process.

    Roles take turns, so each may use all CPUs of a node; with `--async` engines and models compute at the same time.

    Args:
        config: the run's options.
        role: what it does.
        node: where.
        ranks: processes of the role on that node.
        has_gpus: whether models compute on GPUs.
    """
    cores = node.cpus / 2 if config.rollout.async_rollouts else node.cpus
    each = ranks * role.gpus if role.name == ENGINES else ranks
    variables = {"LOCAL_RANK": "0", "OMP_NUM_THREADS": str(max(1, int(cores) // each))}
    if not has_gpus:
        variables["DS_ACCELERATOR"] = "cpu"
        if role.name == ENGINES:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # vLLM would bind the threads of all to the same cores
    return variables


def too_small(sites: Sequence[Role], nodes: Sequence[Node]) -> str:
    """Why there is no room, role by role, and the way out."""
    there = listed(nodes)
    if not any(node.cpus for node in nodes):
        return f"no node of the cluster has a CPU to give: {there}"
    for role in sites:
        able = sum(node.gpus >= role.piece for node in nodes)
        if role.gpus and able < role.spread:
            return (
                f"{role.size}: the {role.name} need{'s' * (role.name != ENGINES)} {counted(role.spread, 'node')} with "
                f"{counted(role.piece, 'GPU')}, and the cluster has {counted(able, 'such node')}: {there}"
            )
    rows = [(role.name, f"{role.wants:g}", role.size) for role in sites if role.gpus]
    widths = [max(len(row[n]) for row in rows) for n in range(2)]
    table = [f"  {name:{widths[0]}}  {wants:>{widths[1]}}  {size}" for name, wants, size in rows]
    wanted, has = sum(role.wants for role in sites), sum(node.gpus for node in nodes)
    problem = f"and the cluster has {has:g}" if wanted > has else "and there is no way to fit them on its nodes"
    return "\n".join(
        [
            f"the roles want {counted(wanted, 'GPU')}, {problem}: {there}",
            *table,
            "give some of them fewer, or let roles share: --colocate_actor_ref, --colocate_critic_reward, --colocate_all",
        ]
    )


def notes(
    config: PPOConfig, roles: Sequence[Role], chosen: Mapping[str, list[Node]], has_gpus: bool, *, free: bool
) -> Iterator[str]:
    """What is otherwise than the options say."""
    there = {role.option for role in roles}
    if config.cluster.colocate_actor_ref and "ref" not in there:
        yield "--colocate_actor_ref: there is no reference model of its own"
    if config.cluster.colocate_critic_reward and "reward" not in there:
        yield "--colocate_critic_reward: there is no reward model of its own"
    if not has_gpus:
        if ENGINES in {role.name for role in roles} and config.engines.vllm_sync_backend == "nccl":
            yield "no GPU: weights reach the engines over gloo, not nccl"
        for role in roles:
            if role.name in chosen and role.name != ENGINES and (count := len(set(chosen[role.name]))) < role.nodes:
                yield f"no GPU: the {role.nodes} nodes of the {role.name} are {counted(count, 'node')}"
    if not free:
        yield "others use what is needed: waiting for it"


def described(slots: Sequence[Slot], host: str | None) -> tuple[str, str, str]:
    """What a plan says of a role: how many processes, where, and what each has."""
    where = listed(list(dict.fromkeys(slot.node.name for slot in slots)))
    each = slots[0]
    threads = int(each.environment["OMP_NUM_THREADS"])
    gpus = f"{each.gpus:.3g} GPU, " if each.gpus else ""
    if len(each.bundles) > 1:
        gpus = f"{each.gpus:.3g} of {len(each.bundles)} GPUs, "
    having = f"{gpus}{each.cpus:.3g} CPU, {counted(threads, 'thread')}" + (f" (shared with {host})" if host else "")
    return counted(len(slots), "process"), where, having


def listed(things: Sequence[object], most: int = 4) -> str:
    """The first few of some things, and how many more there are."""
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return (", ".join(map(str, things[:most])) or "there is none") + more


def counted(count: float, what: str) -> str:
    """`1 GPU`, `2 GPUs`."""
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{count:g} {what if count == 1 else plural}"


def this_machine() -> list[Node]:
    """This machine as a cluster of one node."""
    import torch

    return [Node("this machine", cores(), torch.cuda.device_count())]


def cores() -> int:
    """CPUs that this process may use: those that it may run on, and no more than its container is given time of."""
    allowed = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limit.read_text().partition(" ") if limit.exists() else ("max", "", "")
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
