"""Which process gets which share of which node, and what is said where that cannot be."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from rlhf_data.errors import InputError
from rlhf_ray.cluster.backend import Place
from rlhf_ray.cluster.placement import Node, Plan, Slot, plan, this_machine
from rlhf_ray.cluster.ray import connect, place_of
from rlhf_ray.config import ClusterConfig, PPOConfig
from rlhf_ray.rewards import Source

SIZED = ("actor", "ref", "critic", "reward")
MODEL, SECOND, FUNCTION = (
    Source("rm", "rm", "model"),
    Source("other", "other", "model"),
    Source("f", "f.py", "function"),
)
LAPTOP = [Node("laptop", cpus=2)]


def gpu_nodes(count: int, gpus: int = 8) -> list[Node]:
    return [Node(f"node{n}", cpus=64, gpus=gpus) for n in range(count)]


def sizes(nodes: int, per_node: int) -> dict[str, int]:
    """The same nodes and GPUs for all roles."""
    return {f"{role}_num_nodes": nodes for role in SIZED} | {f"{role}_num_gpus_per_node": per_node for role in SIZED}


def make_config(engines: int = 0, tensor_parallel: int = 1, estimator: str = "gae", kl: float = 0.01, **cluster: Any):
    """Build the options of a run from those of the cluster, and a few others."""
    given = {
        "model": {"pretrain": "unread"},
        "data": {"prompt_data": "unread.jsonl"},
        "rewards": {"reward_pretrain": "unread"},
        "rollout": {"n_samples_per_prompt": 2},
        "experience": {"advantage_estimator": estimator, "init_kl_coef": kl},
        "engines": {"vllm_num_engines": engines, "vllm_tensor_parallel_size": tensor_parallel},
        "cluster": cluster,
    }
    return PPOConfig.model_validate(given)


def taken(made: Plan) -> dict[int, list[float]]:
    """GPUs and CPUs that the processes of each bundle take of it, all together."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for slot in (slot for row in made.slots.values() for slot in row):
        sums[slot.bundles[0]][1] += slot.cpus
        for bundle in slot.bundles:
            sums[bundle][0] += slot.gpus if len(slot.bundles) > 1 else min(slot.gpus, made.bundles[bundle].gpus)
    return sums


def check_shares(made: Plan) -> None:
    """No bundle gives more than it has, and no node more than it has."""
    for number, (gpus, cpus) in taken(made).items():
        assert gpus <= made.bundles[number].gpus + 1e-9 and cpus <= made.bundles[number].cpus + 1e-9, number
    for node in made.nodes:
        own = [bundle for bundle in made.bundles if bundle.node == node]
        assert (
            sum(bundle.gpus for bundle in own) <= node.gpus and sum(bundle.cpus for bundle in own) <= node.cpus + 1e-9
        )
    assert {bundle for row in made.slots.values() for slot in row for bundle in slot.bundles} == set(
        range(len(made.bundles))
    )


@pytest.mark.parametrize(("per_node", "engines"), [(1, 0), (1, 1), (2, 2)])
@pytest.mark.parametrize(
    "colocation", [{}, {"colocate_actor_ref": True}, {"colocate_critic_reward": True}, {"colocate_all": True}]
)
def test_a_whole_run_fits_on_two_cores(colocation: dict[str, bool], per_node: int, engines: int):
    config = make_config(engines, **sizes(1, per_node), **colocation)
    made = plan(config, [MODEL, SECOND, FUNCTION], LAPTOP)
    check_shares(made)
    assert {name: len(slots) for name, slots in made.slots.items()} == {
        "policy": per_node, "reference": per_node, "critic": per_node, "reward rm": per_node, "reward other": per_node,
        "reward f": 1,
    } | ({"engines": engines} if engines else {})  # fmt: skip
    assert all(slot.cpus > 0 and slot.gpus == 0 for row in made.slots.values() for slot in row)


@pytest.mark.parametrize("models", [1, 2, 5])
def test_any_number_of_reward_models_shares_the_gpus_of_the_critic(models: int):
    sources = [Source(f"rm{n}", f"rm{n}", "model") for n in range(models)]
    config = make_config(**sizes(1, 2), colocate_actor_ref=True, colocate_critic_reward=True)
    made = plan(config, sources, gpu_nodes(1, gpus=4))
    check_shares(made)
    critic = made.slots["critic"]
    for source in sources:
        assert [slot.bundles for slot in made.slots[f"reward {source.name}"]] == [slot.bundles for slot in critic]
    assert critic[0].gpus == pytest.approx(1 / (1 + models), abs=1e-4)
    assert [slot.bundles for slot in made.slots["reference"]] == [slot.bundles for slot in made.slots["policy"]]
    assert not {slot.bundles for slot in made.slots["policy"]} & {slot.bundles for slot in critic}


def test_without_colocation_every_rank_and_every_engine_has_gpus_of_its_own():
    config = make_config(2, 2, **sizes(1, 2))
    made = plan(config, [MODEL, FUNCTION], gpu_nodes(2))
    check_shares(made)
    bundles = [slot.bundles for row in made.slots.values() for slot in row]
    assert len(bundles) == len(set(bundles)) and all(len(own) == 1 for own in bundles)
    assert [made.bundles[slot.bundles[0]].gpus for slot in made.slots["engines"]] == [2, 2]
    assert [slot.gpus for slot in made.slots["engines"]] == [2, 2]
    assert [slot.gpus for slot in made.slots["policy"]] == [1, 1]
    assert [slot.gpus for slot in made.slots["reward f"]] == [0]


def test_the_nodes_of_a_role_are_different_ones_and_the_ranks_of_a_node_are_adjacent():
    made = plan(make_config(**sizes(2, 4), colocate_actor_ref=True), [MODEL], gpu_nodes(3))
    check_shares(made)
    for name, slots in made.slots.items():
        names = [slot.node.name for slot in slots]
        assert len(set(names)) == 2 and names == [names[0]] * 4 + [names[4]] * 4, name


def test_large_pieces_get_their_node_before_small_ones_break_it():
    """Three roles of two GPUs would leave no node with six, if each went where most is free."""
    config = make_config(
        estimator="rloo", actor_num_gpus_per_node=2, ref_num_gpus_per_node=2, reward_num_gpus_per_node=6
    )
    made = plan(config, [MODEL], gpu_nodes(2, gpus=6))
    check_shares(made)
    assert {slot.node for slot in made.slots["policy"]} == {slot.node for slot in made.slots["reference"]}


def test_engines_among_the_ranks_of_the_policy_are_split_over_gpus_of_one_node():
    config = make_config(3, 4, **sizes(2, 8), colocate_all=True)
    made = plan(config, [MODEL, SECOND, FUNCTION], gpu_nodes(2))
    check_shares(made)
    engines = made.slots["engines"]
    assert len({bundle for slot in engines for bundle in slot.bundles}) == 12
    for slot in engines:
        assert {made.bundles[bundle].node for bundle in slot.bundles} == {slot.node}
    assert {slot.node.name for slot in engines} == {"node0", "node1"}
    assert 0 < engines[0].gpus < 1


def test_an_engine_that_shares_several_gpus_is_told_which_they_are():
    """Ray tells a process of the GPU of one bundle only."""
    slot = Slot(LAPTOP[0], (2, 3), cpus=0.5, gpus=0.25, environment={"LOCAL_RANK": "0"})
    told = {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "6,1"}
    assert place_of(slot, "group", {2: "6", 3: "1"}) == Place("group", 2, 0.5, 0.25, told)
    assert place_of(slot, "group", {}).environment == {"LOCAL_RANK": "0"}
    alone = Slot(LAPTOP[0], (2,), cpus=0.5, gpus=0.25)
    assert place_of(alone, "group", {2: "6", 3: "1"}).environment == {}


def test_a_role_that_the_options_do_not_need_gets_no_process():
    assert set(plan(make_config(estimator="rloo", kl=0), [FUNCTION], LAPTOP).slots) == {"policy", "reward f"}
    assert "critic" not in plan(make_config(estimator="rloo"), [MODEL], LAPTOP).slots


def test_a_reward_function_runs_where_the_driver_is_and_takes_no_gpu():
    nodes = [Node("driver", cpus=4), *gpu_nodes(1)]
    made = plan(make_config(), [FUNCTION], nodes)
    (slot,) = made.slots["reward f"]
    assert slot.node.name == "driver" and slot.gpus == 0
    assert {slot.node.name for slot in made.slots["policy"]} == {"node0"}


def test_without_gpus_the_nodes_of_a_role_are_different_ones_if_there_are_as_many():
    config = make_config(estimator="rloo", kl=0, actor_num_nodes=2)
    apart = plan(config, [], [Node("a", cpus=2), Node("b", cpus=2)])
    assert [slot.node.name for slot in apart.slots["policy"]] == ["a", "b"] and apart.notes == ()
    together = plan(config, [], LAPTOP)
    assert [slot.node.name for slot in together.slots["policy"]] == ["laptop", "laptop"]
    assert "the 2 nodes of the policy are 1 node" in together.format()


def test_nodes_without_gpus_get_processes_in_proportion_to_their_cpus():
    made = plan(make_config(6, estimator="rloo", kl=0), [], [Node("small", cpus=2), Node("large", cpus=12)])
    check_shares(made)
    assert sum(slot.node.name == "large" for row in made.slots.values() for slot in row) == 6


def test_what_others_use_is_left_to_them_as_long_as_the_rest_is_enough():
    busy, idle = Node("busy", 8, 2, free_cpus=1, free_gpus=0), Node("idle", 8, 2, free_cpus=8, free_gpus=2)
    config = make_config(estimator="rloo", kl=0)
    made = plan(config, [], [busy, idle])
    assert made.nodes == (idle,) and made.notes == ()
    waiting = plan(config, [], [busy])
    assert waiting.nodes == (busy,) and "waiting" in waiting.format()


def test_every_process_gets_as_many_threads_as_its_role_leaves_it():
    nodes = [Node("here", cpus=8)]
    made = plan(make_config(2, actor_num_gpus_per_node=2), [MODEL], nodes)
    threads = {name: {slot.environment["OMP_NUM_THREADS"] for slot in slots} for name, slots in made.slots.items()}
    assert threads == {"policy": {"4"}, "reference": {"8"}, "critic": {"8"}, "reward rm": {"8"}, "engines": {"4"}}
    config = make_config(2, actor_num_gpus_per_node=2)
    beside = config.model_copy(update={"rollout": config.rollout.model_copy(update={"async_rollouts": True})})
    made = plan(beside, [MODEL], nodes)
    assert {made.slots[name][0].environment["OMP_NUM_THREADS"] for name in ("policy", "engines")} == {"2"}
    crowded = plan(make_config(**sizes(1, 4)), [MODEL], LAPTOP)
    assert crowded.slots["policy"][0].environment["OMP_NUM_THREADS"] == "1"


def test_processes_are_told_that_there_is_no_gpu_only_where_there_is_none():
    (slot, *_) = plan(make_config(1), [MODEL], LAPTOP).slots["engines"]
    assert slot.environment["DS_ACCELERATOR"] == "cpu" and slot.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    for row in plan(make_config(1), [MODEL], gpu_nodes(1)).slots.values():
        assert not {"DS_ACCELERATOR", "VLLM_CPU_OMP_THREADS_BIND"} & set(row[0].environment)
        assert row[0].environment["LOCAL_RANK"] == "0"


def test_the_plan_says_where_everything_goes():
    config = make_config(1, estimator="rloo", colocate_actor_ref=True)
    assert plan(config, [MODEL], LAPTOP).format().splitlines() == [
        "Placement on laptop (0 GPUs, 2 CPUs)",
        "  policy     1 process  laptop  0.5 CPU, 2 threads",
        "  reference  1 process  laptop  0.5 CPU, 2 threads (shared with policy)",
        "  reward rm  1 process  laptop  0.5 CPU, 2 threads",
        "  engines    1 process  laptop  0.5 CPU, 2 threads",
        "  no GPU: weights reach the engines over gloo, not nccl",
    ]


@pytest.mark.parametrize(
    ("config", "nodes", "message"),
    [
        (
            make_config(colocate_actor_ref=True, ref_num_gpus_per_node=2),
            LAPTOP,
            r"--colocate_actor_ref .* --actor_num_gpus_per_node 1 and --ref_num_nodes 1 x --ref_num_gpus_per_node 2 must",
        ),
        (
            make_config(colocate_critic_reward=True, critic_num_nodes=2),
            LAPTOP,
            r"--colocate_critic_reward .* --critic_num_nodes 2 x .* and --reward_num_nodes 1 x",
        ),
        (
            make_config(colocate_all=True, critic_num_gpus_per_node=2),
            LAPTOP,
            r"--colocate_all .* --critic_num_gpus_per_node 2 must be equal",
        ),
        (
            make_config(3, 2, colocate_all=True, **sizes(1, 4)),
            gpu_nodes(1),
            r"--vllm_num_engines 3 x --vllm_tensor_parallel_size 2, .*--actor_num_gpus_per_node 4 has room for 2",
        ),
        (make_config(1, 16), gpu_nodes(4), r"--vllm_tensor_parallel_size 16: the engines need 1 node with 16 GPUs, and the cluster has 0 such"),
        (make_config(actor_num_nodes=4), gpu_nodes(2), r"--actor_num_nodes 4 .*: the policy needs 4 nodes with 1 GPU, and the cluster has 2 such"),
        (
            make_config(4, 2, **sizes(1, 2)),
            gpu_nodes(1),
            r"(?s)want 16 GPUs, and the cluster has 8: .*\n  policy +2 .*\n  engines +8  --vllm_num_engines 4 .*--colocate_all",
        ),
        (
            make_config(2, 3, estimator="rloo", kl=0, actor_num_gpus_per_node=1),
            [*gpu_nodes(1, gpus=3), *(Node(f"small{n}", 8, 2) for n in range(3))],
            r"(?s)want 7 GPUs, and there is no way to fit them on its nodes: .*\n  policy +1 .*\n  engines +6 ",
        ),
        (make_config(), [], r"no node of the cluster has a CPU to give"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_names_the_options_that_ask_for_it(config: PPOConfig, nodes: list[Node], message: str):
    with pytest.raises(InputError, match=message):
        plan(config, [MODEL] if config.needs_critic else [], nodes)


def test_this_machine_is_a_cluster_of_one_node():
    (node,) = this_machine()
    assert node.cpus >= 1


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "127.0.0.1:1",
            r"127.0.0.1:1: no Ray cluster answers \(.*refused\); start one with `ray start --head`, or give",
        ),
        ("nowhere", r"nowhere: no Ray cluster answers .*; start one with `ray start --head`, or give"),
        ("ray://127.0.0.1:10001", r"ray://127.0.0.1:10001: a run is driven from a node of its cluster: start it there"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_named_with_the_way_out(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(InputError, match=f"^--ray_address {message}"):
        connect(ClusterConfig(ray_address=address))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=f"^RAY_ADDRESS={message}"):
        connect(ClusterConfig())
