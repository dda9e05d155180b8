"""From options to a trained policy: what is checked, what is started, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.libraries import settle
from rlhf_data.errors import InputError
from rlhf_ray.cluster.backend import Backend, Place
from rlhf_ray.cluster.group import WorkerGroup, start_group, wait_all
from rlhf_ray.config import PPOConfig
from rlhf_ray.prompts import PromptData

if TYPE_CHECKING:
    from rlhf_ray.engines.pool import VLLMEngines
    from rlhf_ray.rewards import Rewards, Source
    from rlhf_ray.roles import Roles


@dataclass(frozen=True)
class Prepared:
    """What is known of a run before anything is started."""

    config: PPOConfig
    tokenizer: Any
    model_config: Any
    data: PromptData
    context: int
    """Longest sequence, in tokens."""
    rollouts: int
    steps: int
    """Optimizer steps of the run."""

    def format(self, sources: Sequence[Source]) -> str:
        """What will be done, for people."""
        config, rollout, batch = self.config, self.config.rollout, self.config.batch
        per_rollout = self.steps // self.rollouts
        price = f"KL at {config.experience.init_kl_coef:g} per nat"
        lines = {
            "rollout": f"{rollout.rollout_batch_size:,} samples = {config.prompts_per_rollout:,} prompts x "
            f"{rollout.n_samples_per_prompt} responses of at most {rollout.generate_max_len:,} tokens",
            "run": f"{self.rollouts:,} rollouts, {self.rollouts * config.prompts_per_rollout:,} of "
            f"{rollout.num_episodes * len(self.data.train):,} prompts ({rollout.num_episodes} episode(s))",
            "update": f"{per_rollout} optimizer step(s) of {batch.train_batch_size:,} samples per rollout, {self.steps:,} in all",
            "method": f"{config.experience.advantage_estimator}, {config.ppo.policy_loss}, "
            + (
                f"{price} in the {'loss' if config.experience.use_kl_loss else 'rewards'}"
                if config.needs_reference
                else "no KL"
            ),
            "rewards": ", ".join(
                f"{source.name} ({source.kind}{'' if source.weight == 1 else f' x {source.weight:g}'})"
                for source in sources
            ),
            "writes": f"{config.checkpoint.save_path}: the final {'adapter' if config.lora.lora_rank else 'model'}, and run/ "
            "(options, metrics, samples)",
        }
        return "\n".join(["Plan", *(f"  {name:12}{text}" for name, text in lines.items())])


def prepare(config: PPOConfig) -> Prepared:
    """Check everything that can be checked without a model's weights, and read the prompts.

    Raises:
        InputError: naming option, value and the way out.
    """
    from rlhf_core.models.load import check_ragged, load_model_config
    from rlhf_core.vocabulary import check_vocabulary, shared_vocabulary
    from rlhf_data.tokenizer import load_tokenizer
    from rlhf_ray.prompts import read_prompts
    from rlhf_ray.rewards import check_rewards
    from rlhf_ray.workers.critic import critic_source
    from rlhf_ray.workers.policy import layout

    settle()
    check_folders(config)
    model_config = load_model_config(config.model)
    tokenizer = load_tokenizer(
        config.model.pretrain,
        use_fast=not config.model.disable_fast_tokenizer,
        chat_template=config.data.tokenizer_chat_template,
        trust_remote_code=config.model.trust_remote_code,
    )
    context = context_of(config, model_config)
    models = {"--pretrain": (config.model.pretrain, model_config)}
    if config.needs_reference and config.model.ref_pretrain:
        models["--ref_pretrain"] = other_model(config, config.model.ref_pretrain, "--ref_pretrain")
    if config.needs_critic:
        option, name, _ = critic_source(config)
        models.setdefault(option, other_model(config, name, option))
    for option, (name, architecture) in models.items():
        check_vocabulary(option, name, architecture, len(tokenizer))
        if option != "--pretrain":  # they read the policy's token ids
            shared_vocabulary(config.model, tokenizer, name, option)
        if layout(config)[0]:
            check_ragged(name, architecture.get_text_config(), context, option)
    check_rewards(config)
    check_engines(config, model_config)
    data = read_prompts(config, tokenizer, context)
    if config.data.pretrain_data:
        from rlhf_ray.workers.pretraining import Pretraining

        Pretraining(config, tokenizer)  # tokenised now, and found in the cache by the policy's ranks
    rollouts = count_rollouts(config, len(data.train))
    per_rollout = config.rollout.rollout_batch_size // config.batch.train_batch_size * config.batch.max_epochs
    return Prepared(config, tokenizer, model_config, data, context, rollouts, rollouts * per_rollout)


def check_folders(config: PPOConfig) -> None:
    """Find out now whether folders can be written, and whether they hold another run's checkpoints."""
    from rlhf_core.plan import check_can_write, check_no_checkpoints

    for option, name in (
        ("--save_path", config.checkpoint.save_path),
        ("--ckpt_path", config.checkpoint.ckpt_path),
        ("--use_tensorboard", config.logging.use_tensorboard),
    ):
        if name is not None:
            check_can_write(option, name)
    if config.lora.lora_rank and Path(config.checkpoint.save_path).resolve() == Path(config.model.pretrain).resolve():
        raise InputError(
            f"--save_path {config.checkpoint.save_path} is --pretrain: an adapter needs its base model, save it elsewhere"
        )
    check_no_checkpoints(config.checkpoint)


def context_of(config: PPOConfig, model_config: Any) -> int:
    """Longest prompt and response together, in tokens: what the options say, or less where the model's context ends."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if limit and config.rollout.max_len and config.rollout.max_len > limit:
        raise InputError(f"--max_len {config.rollout.max_len}: {config.model.pretrain} takes {limit} tokens")
    return min(config.longest, limit or config.longest)


def other_model(config: PPOConfig, name: str, option: str) -> tuple[str, Any]:
    """A model beside the policy, and its architecture."""
    from rlhf_core.models.load import load_model_config

    return name, load_model_config(config.model.model_copy(update={"pretrain": name}), option)


def check_engines(config: PPOConfig, model_config: Any) -> None:
    """Make sure that vLLM is there and can run the policy, if it is wanted."""
    if config.engines.vllm_num_engines:
        from rlhf_infer.engines.vllm import check_model
        from rlhf_ray.engines.vllm import check

        check(config)
        check_model(config.model.pretrain, model_config.get_text_config(), "set --vllm_num_engines 0")


def count_rollouts(config: PPOConfig, prompts: int) -> int:
    """Rollouts of the run.

    Raises:
        InputError: the prompts do not fill one.
    """
    from rlhf_ray.rollouts import total_rollouts

    total, size, n = total_rollouts(config, prompts), config.prompts_per_rollout, config.rollout.n_samples_per_prompt
    if not total:
        episodes = -(-size // prompts)
        raise InputError(
            f"--rollout_batch_size {config.rollout.rollout_batch_size} with --n_samples_per_prompt {n} takes {size:,} prompts, "
            f"and there are {prompts:,}: give --rollout_batch_size {prompts * n} or less, or --num_episodes {episodes} or more"
        )
    return total


def train(config: PPOConfig, *, dry_run: bool = False, backend: Backend | None = None) -> None:
    """Train `config.model.pretrain` by PPO or a relative of it, and write the result to `config.checkpoint.save_path`.

    Args:
        config: the run's options.
        dry_run: stop after the plan, before anything is started.
        backend: runs the roles, each as a single rank, instead of a Ray cluster.

    Raises:
        InputError: options, data or models are at fault.
        RunError: the run cannot go on.
    """
    from rlhf_ray.cluster import placement
    from rlhf_ray.rewards import needs_workers, sources_of

    prepared = prepare(config)
    sources = needs_workers(config)
    print(prepared.data.report.format(), prepared.format(sources_of(config)), sep="\n\n", flush=True)
    if dry_run:
        print(placement.plan(config, sources, placement.this_machine()).format(), flush=True)
        return
    if backend is None:
        from rlhf_ray.cluster.ray import connect

        with connect(config.cluster) as cluster:
            plan = placement.plan(config, sources, cluster.nodes())
            print(plan.format(), flush=True)
            run(prepared, cluster, cluster.reserve(plan))
    else:
        run(prepared, backend, {})


def run(prepared: Prepared, backend: Backend, places: Mapping[str, Sequence[Place]]) -> None:
    """Start all roles, train, and write what was trained.

    Args:
        prepared: what is known of the run.
        backend: runs the roles.
        places: of the ranks of each role; of a role that is not in it, a single rank anywhere.
    """
    from rlhf_core.report import write_report
    from rlhf_ray.ppo import PPO

    config, saving = prepared.config, prepared.config.checkpoint
    roles = start_roles(prepared, backend, places)
    try:
        PPO(config, roles, prepared.data, prepared.context, identity_of(prepared, roles)).run()
        roles.policy.call("export", saving.save_path)
        print(f"saved {saving.save_path}", flush=True)
        write_report(Path(saving.save_path) / "run")
        if roles.critic is not None and config.critic.save_value_network:
            roles.critic.call("export", f"{saving.save_path}_critic")
            print(f"saved {saving.save_path}_critic", flush=True)
    finally:
        roles.close()


def start_roles(prepared: Prepared, backend: Backend, places: Mapping[str, Sequence[Place]]) -> Roles:
    """Start the processes of all roles and wait until all are ready; the first failure ends the run with its cause."""
    from rlhf_ray.engines.policy import PolicyEngines
    from rlhf_ray.rewards import Rewards, connect_servers, needs_workers
    from rlhf_ray.roles import Roles
    from rlhf_ray.workers.critic import CriticWorker
    from rlhf_ray.workers.policy import PolicyWorker
    from rlhf_ray.workers.reference import ReferenceWorker
    from rlhf_ray.workers.reward import RewardWorker

    config = prepared.config
    timeout, patience = config.cluster.start_timeout, config.cluster.call_timeout
    servers = connect_servers(config)
    sources = needs_workers(config)
    frozen = max(0, config.ppo.freezing_actor_steps) * prepared.steps // prepared.rollouts
    steps = max(1, prepared.steps - frozen)  # which the schedule of the policy spans
    wanted: dict[str, tuple[type, tuple[Any, ...]]] = {"policy": (PolicyWorker, (steps,))}
    if config.starts_reference:
        wanted["reference"] = ReferenceWorker, ()
    if config.needs_critic:
        wanted["critic"] = CriticWorker, (prepared.steps,)
    wanted |= {f"reward {source.name}": (RewardWorker, (source.where,)) for source in sources}
    started = {
        role: start_group(backend, role, worker, places.get(role, [Place()]), patience)
        for role, (worker, _) in wanted.items()
    }
    groups = {role: group for role, (group, _) in started.items()}
    engines, pendings = None, []
    if config.engines.vllm_num_engines:
        engines = start_engines(prepared, backend, places, groups["policy"])
        pendings.append(engines.ready)
    if engines is not None and config.cluster.colocate_all:
        wait_all(pendings, timeout, "starting the engines")  # they take their memory and sleep before others load
        pendings = []
    pendings += [groups[role].start("setup", config, started[role][1], *own) for role, (_, own) in wanted.items()]
    facts = [found[0] for found in wait_all(pendings, timeout, "getting ready")[-len(wanted) :]]
    judges = [(source.name, groups[f"reward {source.name}"]) for source in sources]
    rewards = Rewards(judges, config, prepared.tokenizer, servers)
    print(ready(dict(zip(wanted, facts, strict=True)), rewards), flush=True)
    return Roles(
        backend,
        groups["policy"],
        engines or PolicyEngines(groups["policy"]),
        rewards,
        groups.get("critic"),
        groups.get("reference"),
    )


def ready(facts: Mapping[str, Mapping[str, Any]], rewards: Rewards) -> str:
    """What roles say of themselves when they are ready, for people."""
    said = {
        role: ", ".join(
            f"{key.replace('_', ' ')} {shown(value)}" for key, value in own.items() if key != "pretrain_data"
        )
        for role, own in facts.items()
        if not role.startswith("reward ")
    }
    lines = [f"  {role:12}{text}" for role, text in said.items()] + [f"  {'reward':12}{x}" for x in rewards.describe()]
    return "\n".join(["Ready", *lines])


def shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def start_engines(
    prepared: Prepared, backend: Backend, places: Mapping[str, Sequence[Place]], policy: WorkerGroup
) -> VLLMEngines:
    """Start the processes of the vLLM engines."""
    from rlhf_infer.engines.engine import stop_ids
    from rlhf_ray.cluster.placement import ENGINES
    from rlhf_ray.engines.pool import PROBES, VLLMEngines
    from rlhf_ray.engines.vllm import VLLMWorker

    config, train = prepared.config, prepared.data.train

    def start(number: int) -> Any:
        place = places.get(ENGINES, [Place()] * config.engines.vllm_num_engines)[number]
        return backend.start(VLLMWorker, place=place, name=f"vLLM engine {number}")

    ends = list(stop_ids(config.model.pretrain, prepared.model_config, prepared.tokenizer))
    probes = [train.ids(number) for number in range(min(PROBES, len(train)))]
    return VLLMEngines(config, backend, policy, start, (config, ends, prepared.context), probes)


def identity_of(prepared: Prepared, roles: Roles) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    config = prepared.config
    return {
        "method": "ppo",
        "pretrain": config.model.pretrain,
        "ref_pretrain": config.model.ref_pretrain,
        "prompts": prepared.data.train.fingerprint,
        "ranks": [len(group) for group in roles.trained],
        "zero_stage": config.parallel.zero_stage,
        "rollouts": prepared.rollouts,
        "rollout_batch_size": config.rollout.rollout_batch_size,
        "n_samples_per_prompt": config.rollout.n_samples_per_prompt,
        "train_batch_size": config.batch.train_batch_size,
        "max_epochs": config.batch.max_epochs,
        "seed": config.batch.seed,
        "bf16": config.model.bf16,
        "lora": config.lora.model_dump(),
        "advantage_estimator": config.experience.advantage_estimator,
        "policy_loss": config.ppo.policy_loss,
        "enable_ema": config.ppo.enable_ema,
    }
