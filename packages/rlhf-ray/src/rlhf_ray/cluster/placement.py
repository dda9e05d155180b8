"""Who computes where: which process gets which share of which node. Only planned here, and checked, before anything starts."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_data.errors import InputError
from rlhf_ray.config import PPOConfig

if TYPE_CHECKING:
    from rlhf_ray.rewards import Source

ENGINES = "engines"
"""The vLLM engines, as a role: one process each."""

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
    def shape(self) -> tuple[int, int]:
        return self.nodes, self.per_node

    @property
    def size(self) -> str:
        """The options that say how large it is."""
        if self.name == ENGINES:
            return f"--vllm_num_engines {self.nodes} x --vllm_tensor_parallel_size {self.gpus}"
        return f"--{self.option}_num_nodes {self.nodes} x --{self.option}_num_gpus_per_node {self.per_node}"

    @property
    def wants(self) -> int:
        """GPUs, over all its processes."""
        return self.nodes * self.per_node * self.gpus


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
        title = f"Placement on {', '.join(map(str, self.nodes[:4]))}"
        title += f" and {len(self.nodes) - 4} more" if len(self.nodes) > 4 else ""
        return "\n".join([title, *(f"  {line}" for line in [*lines, *self.notes])])


def plan(config: PPOConfig, sources: Sequence[Source], nodes: Sequence[Node]) -> Plan:
    """Give every process its place.

    Where there are GPUs, every rank has one of its own, or a share of one that colocated roles have in common, and a role of
    several nodes is spread over as many. Without any, ranks share the CPUs: all roles fit on whatever there is.

    Args:
        config: the run's options.
        sources: reward models and functions that run in processes of their own, see `rlhf_ray.rewards.needs_workers`.
        nodes: of the cluster, alive; that of the driver first.

    Raises:
        InputError: colocated roles differ in shape, or the cluster is too small; the message names the options.
    """
    roles = roles_of(config, sources)
    hosts = colocated(config, roles)
    sites = [role for role in roles if role.name not in hosts]
    has_gpus = any(node.gpus >= 1 for node in nodes)
    free = True
    chosen = choose(sites, nodes, has_gpus, free=True)
    if chosen is None:
        free = False
        chosen = choose(sites, nodes, has_gpus, free=False)
    if chosen is None:
        raise InputError(too_small(sites, nodes, has_gpus))
    layout = lay_out(config, roles, hosts, chosen)
    bundles, slots = divide(config, roles, layout, has_gpus, free=free)
    used = {slot.node: None for row in slots.values() for slot in row}
    return Plan(tuple(used), bundles, slots, hosts, tuple(notes(config, roles, chosen, has_gpus, free=free)))


def roles_of(config: PPOConfig, sources: Sequence[Source]) -> list[Role]:
    """All roles that have processes of their own."""
    cluster, engines = config.cluster, config.engines

    def sized(name: str, option: str) -> Role:
        shape = getattr(cluster, f"{option}_num_nodes"), getattr(cluster, f"{option}_num_gpus_per_node")
        return Role(name, option, *shape)

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
    """Which roles share the devices of which other one.

    Raises:
        InputError: their shapes differ.
    """
    cluster, by_name = config.cluster, {role.name: role for role in roles}
    models = [role for role in roles if role.option == "reward"]
    hosts: dict[str, str] = {}

    def share(option: str, guest: Role, host: str) -> None:
        if guest.shape != by_name[host].shape:
            raise InputError(
                f"{option} puts the {by_name[host].name} and the {guest.name} on the same devices, and they differ: "
                f"{by_name[host].size}, {guest.size}; make them equal"
            )
        hosts[guest.name] = host

    if cluster.colocate_all:
        for role in roles[1:]:
            if role.name == ENGINES:
                check_engines_fit(by_name["policy"], role)
                hosts[ENGINES] = "policy"
            elif role.option:
                share("--colocate_all", role, "policy")
        return hosts
    if cluster.colocate_actor_ref and "reference" in by_name:
        share("--colocate_actor_ref", by_name["reference"], "policy")
    if cluster.colocate_critic_reward:
        for role in models:
            share("--colocate_critic_reward", role, "critic")
    return hosts


def check_engines_fit(policy: Role, engines: Role) -> None:
    """Make sure that every engine finds GPUs of the policy for itself."""
    room = policy.nodes * (policy.per_node // engines.gpus)
    if engines.nodes > room:
        raise InputError(
            f"--colocate_all puts engines on the devices of the policy: {engines.size}, and {policy.size} has room for "
            f"{room} such engines"
        )


def choose(sites: Sequence[Role], nodes: Sequence[Node], has_gpus: bool, *, free: bool) -> dict[str, list[Node]] | None:
    """The node of each process of each site: of a role with devices of its own.

    GPUs are filled by the best fit, the largest demands first; CPUs evenly. None if something finds no room.
    """
    left = {node: node.has(free=free) for node in nodes}
    load: Counter[Node] = Counter()
    chosen: dict[str, list[Node]] = {}
    for site in sorted(sites, key=lambda role: -role.per_node * role.gpus) if has_gpus else sites:
        needs = site.per_node * site.gpus if has_gpus else 0
        fitting = [node for node, (cpus, gpus) in left.items() if (gpus >= needs if needs else cpus > 0)]
        pieces = site.nodes
        chosen[site.name] = []
        while pieces:
            fitting = [node for node in fitting if not needs or left[node][1] >= needs]
            if needs:
                fitting.sort(key=lambda node: left[node][1])
            elif site.gpus:
                fitting.sort(key=lambda node: load[node] / left[node][0])
            # Engines may share a node, and so may the nodes of a role where there are no GPUs
            apart = has_gpus and site.name != ENGINES
            taken = fitting[: pieces if site.name != ENGINES else 1]
            if not taken or (apart and len(taken) < pieces):
                return None
            for node in taken:
                left[node] = left[node][0], left[node][1] - needs
                load[node] += site.per_node
                chosen[site.name] += [node] * site.per_node
            pieces -= len(taken)
    return chosen
