"""The options of `rlhf train ppo`, declared once. Light: the command line reads them before anything is imported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_core.config import (
    CheckpointConfig,
    Folder,
    Interval,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    ZeroConfig,
    _interval,
)
from rlhf_data.config import Alias, Config, Count, check_template

Estimator = Literal["gae", "reinforce", "rloo", "reinforce_baseline", "grpo", "dr_grpo"]

GROUPED: tuple[Estimator, ...] = ("rloo", "reinforce_baseline", "grpo", "dr_grpo")
"""Estimators that compare the responses to one prompt with each other, and so need several."""


def names(value: str | None) -> list[str]:
    """What a comma-separated option names."""
    return [name.strip() for name in (value or "").split(",") if name.strip()]


class ClusterConfig(Config):
    """Cluster.

    On a machine without an accelerator the `*_num_gpus_per_node` options count CPU ranks.
    """

    actor_num_nodes: Count = 1
    """Nodes of the policy."""

    actor_num_gpus_per_node: Count = 1
    """GPUs of the policy on each of its nodes."""

    critic_num_nodes: Count = 1
    """Nodes of the critic."""

    critic_num_gpus_per_node: Count = 1
    """GPUs of the critic on each of its nodes."""

    ref_num_nodes: Count = 1
    """Nodes of the reference model."""

    ref_num_gpus_per_node: Count = 1
    """GPUs of the reference model on each of its nodes."""

    reward_num_nodes: Count = 1
    """Nodes of each reward model."""

    reward_num_gpus_per_node: Count = 1
    """GPUs of each reward model on each of its nodes."""

    colocate_actor_ref: bool = False
    """Put policy and reference model on the same GPUs; their nodes and GPUs must then be equal."""

    colocate_critic_reward: bool = False
    """Put critic and reward models on the same GPUs; their nodes and GPUs must then be equal."""

    colocate_all: bool = False
    """Put all roles and the engines on the GPUs of the policy: engines sleep while models train, and these make room while
    engines write. The way to run on a single node."""

    ref_reward_offload: bool = False
    """Keep the weights of reference and reward models on the CPU and bring them to the GPU layer by layer; at every ZeRO
    stage."""

    ray_address: str | None = None
    """Ray cluster to join: `auto`, or `HOST:PORT`. By default the one that RAY_ADDRESS names (as under `ray job
    submit`); without that, a Ray of this run's own on this machine."""

    start_timeout: Annotated[float, Field(gt=0)] = 600
    """Seconds in which all roles must be placed and ready; the error says which are not."""

    call_timeout: Annotated[float, Field(gt=0)] = 1800
    """Seconds that a role or an engine may take for one piece of work; the error says which did not answer."""


class EngineConfig(Config):
    """Rollout engines."""

    vllm_num_engines: Annotated[int, Field(ge=0)] = 0
    """vLLM engines; 0 writes rollouts with transformers in the policy's own workers."""

    vllm_tensor_parallel_size: Count = 1
    """GPUs per vLLM engine."""

    vllm_sync_backend: Literal["nccl", "gloo"] = "nccl"
    """How new weights reach the engines. On a machine without GPUs it is always gloo."""

    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of a GPU's memory that an engine may take."""

    max_num_seqs: Count = 256
    """Most responses that an engine writes at the same time."""

    enable_prefix_caching: bool = False
    """Compute a prefix that prompts share once. The cache is emptied at every update of the weights."""

    enforce_eager: bool = False
    """Run engines without CUDA graphs."""

    check_sync_steps: Annotated[int, Field(ge=-1)] = 50
    """Compare log-probs of policy and engines at the start, after the first update, and then every so many updates; -1 only the
    first two times, 0 never."""

    engine_restarts: Annotated[int, Field(ge=0)] = 3
    """How often engines that die are started anew in a run; after that the run ends."""


class RolloutConfig(Config):
    """Rollouts."""

    rollout_batch_size: Count = 1024
    """Samples in the replay buffer; prompts per rollout are this divided by `--n_samples_per_prompt`."""

    micro_rollout_batch_size: Count = 8
    """Samples per rank and forward pass when experience is made (and, without vLLM, when it is written). It bounds memory and
    does not change the result."""

    n_samples_per_prompt: Count = 1
    """Responses per prompt."""

    generate_max_len: Count = 1024
    """Longest response, in tokens. One that is cut off there is marked, never finished by force."""

    max_len: Count | None = None
    """Longest prompt and response together, in tokens; by default `--prompt_max_len` plus `--generate_max_len`."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits when responses are drawn, and in all log-probs of the policy and the reference model."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that has this probability. Below 1, the log-probs of training are still those
    of all tokens."""

    num_episodes: Count = 1
    """Passes over the prompts."""

    max_rollouts: Count | None = None
    """End after so many rollouts, before `--num_episodes` are through."""

    dynamic_filtering: bool = False
    """Leave out prompts whose responses all have the same reward, and write for further prompts until the rollout is full
    (DAPO)."""

    max_filtered: Count = 8
    """With `--dynamic_filtering`, give up after so many times the prompts of a rollout."""

    async_rollouts: Annotated[bool, Alias("async")] = False
    """Write the next rollouts while the policy trains (`--vllm_num_engines` of 1 or more)."""

    max_staleness: Count = 1
    """With `--async`, most updates between the weights that began a response and those that train on it."""


class ExperienceConfig(Config):
    """Rewards and advantages."""

    advantage_estimator: Estimator = "gae"
    """`gae` (with a critic); without one: `reinforce` (REINFORCE++: returns, whitened), `rloo`, `reinforce_baseline`
    (REINFORCE++-baseline), `grpo`, `dr_grpo`."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount per token."""

    lambd: Annotated[float, Field(ge=0, le=1)] = 0.95
    """λ of `gae`: 0 trusts the critic, 1 the returns."""

    normalize_advantages: bool | None = None
    """Whiten advantages over all tokens of a rollout; by default for `gae`. `reinforce` and `reinforce_baseline` are whitened by
    definition."""

    init_kl_coef: Annotated[float, Field(ge=0)] = 0.01
    """Price of a nat of KL divergence from the reference model; 0 loads no reference model."""

    kl_target: Annotated[float | None, Field(gt=0)] = None
    """KL per token that the coefficient is steered to, in nats; without it the coefficient stays as it is."""

    kl_horizon: Count = 10_000
    """Samples in which the coefficient can change by a factor of e^0.2, with `--kl_target`."""

    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimate of the KL divergence; by default k1 in the reward and k2 in the loss, whose gradients are right."""

    use_kl_estimator_k3: bool = False
    """The same as `--kl_estimator k3`."""

    use_kl_loss: bool = False
    """Add the KL divergence to the loss instead of taking it from the rewards."""

    reward_clip_range: tuple[float, float] = (-10.0, 10.0)
    """Least and greatest reward of a response, before the KL penalty."""

    truncated_responses: Literal["bootstrap", "penalise", "mask", "keep"] = "keep"
    """What becomes of responses that were cut off: `keep` takes their reward as it is, `bootstrap` also credits what the
    critic expects after the cut (`gae`), `penalise` subtracts `--overlong_penalty`, `mask` trains on none of their tokens."""

    overlong_buffer_len: Count | None = None
    """Tokens before `--generate_max_len` over which a penalty grows from 0 to `--overlong_penalty` (DAPO's soft overlong
    punishment)."""

    overlong_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Largest penalty for length, in units of the reward."""

    importance_cap: Annotated[float | None, Field(gt=0)] = None
    """Weight tokens by how much likelier the policy finds them than the engine that drew them did, at most this much
    (truncated importance sampling); by default 2 with `--async`, else off."""


class PPOLossConfig(Config):
    """PPO."""

    policy_loss: Literal["ppo", "gspo", "cispo"] = "ppo"
    """`ppo` clips the ratio of every token, `gspo` that of every response, `cispo` clips weights and keeps all gradients."""

    eps_clip: Annotated[float | None, Field(gt=0)] = None
    """How far the ratio may fall below 1; by default 0.2 (`gspo`: 3e-4, `cispo`: no limit)."""

    eps_clip_high: Annotated[float | None, Field(gt=0)] = None
    """How far the ratio may rise above 1; by default as `--eps_clip` (`gspo`: 4e-4, `cispo`: 0.2)."""

    dual_clip: Annotated[float | None, Field(gt=1)] = None
    """Largest ratio that counts against a token with a negative advantage."""

    loss_reduction: Literal["token", "sequence", "constant"] | None = None
    """What the loss is a mean of: all tokens of an optimizer step, or responses each of which is a mean over its tokens, or
    tokens over a constant length (`--generate_max_len`). By default `token`; `sequence` for `grpo` and `gspo`, `constant`
    for `dr_grpo`, as in their papers."""

    value_clip: Annotated[float | None, Field(gt=0)] = 0.2
    """How far a value may move from the one that made the advantages, in units of the return."""

    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy of the policy, which is made larger."""

    freezing_actor_steps: Annotated[int, Field(ge=-1)] = -1
    """Train only the critic in the first so many rollouts; -1 for none."""

    ptx_coef: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the language-model loss on `--pretrain_data`."""

    enable_ema: bool = False
    """Keep a moving average of the policy's weights; it is what is saved at the end."""

    ema_beta: Annotated[float, Field(ge=0, lt=1)] = 0.992
    """What is kept of the average at every optimizer step."""


class RewardsConfig(Config):
    """Reward models."""

    reward_pretrain: str | None = None
    """Reward models: folders, Hub ids, or Python functions (`my_rewards.py`, `my_rewards.py:function`, `module:function`); a
    comma separates several, whose rewards are added up."""

    remote_rm_url: str | None = None
    """Reward servers (`rlhf serve`), in place of or beside `--reward_pretrain`; a comma separates several. A bearer token is
    taken from the environment variable RLHF_REMOTE_RM_TOKEN."""

    reward_weights: str | None = None
    """Weights of the reward models, then of the servers, separated by commas; by default 1 each."""

    reward_fn: str | None = None
    """Python function `module:function` (or `file.py:function`) that makes one reward of several: it takes a list with the
    rewards of each reward model for N responses, and returns N numbers. Instead of `--reward_weights`."""

    normalize_reward: bool = False
    """Take (reward - mean) / deviation, with the statistics that training left in the reward model; the critic that starts
    from it is scaled alike."""

    value_head_prefix: str | None = None
    """Name of the head in reward model and critic; by default it is found by looking."""

    remote_rm_timeout: Annotated[float, Field(gt=0)] = 180
    """Seconds that a reward server may take for one request."""

    remote_rm_retries: Annotated[int, Field(ge=0)] = 5
    """How often a request to a reward server is repeated, with growing pauses, before the run ends."""


class CriticConfig(Config):
    """Critic."""

    critic_pretrain: Folder | None = None
    """Model that the critic starts from; by default the first reward model, or `--pretrain` with a new head where rewards
    come from functions or servers."""

    save_value_network: bool = False
    """Save the critic too, to `SAVE_PATH_critic`."""


class PPODataConfig(Config):
    """Data."""

    prompt_data: str
    """Prompts: a Hub id, `id@subset`, a local .json, .jsonl, .csv, .parquet or .arrow file, a `save_to_disk` folder or a
    folder of such files. A comma separates several."""

    prompt_data_probs: str | None = None
    """Mixing probabilities, one per data set, separated by commas: rows are drawn by them until one data set runs out.
    Without it, several data sets are joined whole."""

    prompt_split: str = "train"
    """Split of `--prompt_data`."""

    input_key: str | None = None
    """Column of the prompt (text or a list of chat messages); by default it is found by name."""

    label_key: str = "label"
    """Column of what reward functions and servers are told beside prompt and response, for example the right answer."""

    input_template: str | None = None
    """How a plain prompt is written out: one `{}` stands for it; backslash escapes such as \\n are decoded."""

    apply_chat_template: bool = False
    """Write prompts out with the tokenizer's chat template."""

    tokenizer_chat_template: str | None = None
    """Chat template (Jinja text, or the path of a file with it) to use instead of the tokenizer's own."""

    max_samples: Count | None = None
    """Most prompts to read from each data set, and to keep after mixing: the first ones. Without it, all."""

    prompt_max_len: Count = 1024
    """Longest prompt, in tokens; longer ones are left out and counted."""

    strict_data: bool = False
    """Make any row that cannot be used an error; otherwise such rows are counted and reported by reason."""

    eval_prompt_data: str | None = None
    """Prompts to evaluate on, in the same forms; without it the split `--eval_prompt_split` of `--prompt_data`, if it has
    one."""

    eval_prompt_split: str = "test"
    """Split to evaluate on. Without such a split, `--eval_ratio` of the prompts are held out."""

    eval_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the prompts held out for evaluation (and removed from training) when there is no evaluation split."""

    eval_n_samples_per_prompt: Count = 1
    """Responses per held-out prompt."""

    eval_temperature: Annotated[float, Field(ge=0)] = 0.0
    """Temperature of held-out responses; 0 takes the most probable tokens."""

    pretrain_data: str | None = None
    """Text whose language-model loss is added to PPO's (`--ptx_coef`), in the forms of `--prompt_data`."""

    pretrain_data_probs: str | None = None
    """Mixing probabilities of `--pretrain_data`."""

    pretrain_split: str = "train"
    """Split of `--pretrain_data`."""

    pretrain_key: str | None = None
    """Column of the text of `--pretrain_data`; by default `text`."""

    data_cache_dir: str | None = None
    """Folder for tokenised data; by default the user's cache folder."""

    @model_validator(mode="after")
    def _template_has_one_slot(self) -> PPODataConfig:
        check_template(self)  # type: ignore[arg-type]
        return self


class PeaksConfig(Config):
    """Learning rates."""

    actor_learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of the policy."""

    critic_learning_rate: Annotated[float, Field(gt=0)] = 9e-6
    """Peak learning rate of the critic."""


class PPOOptimConfig(ScheduleConfig, PeaksConfig):
    """Optimizer."""

    def of(self, learning_rate: float) -> OptimConfig:
        """The options of one model's optimizer."""
        shared = self.model_dump(include=set(ScheduleConfig.model_fields))
        return OptimConfig(learning_rate=learning_rate, **shared)


class PPOBatchConfig(Config):
    """Batches."""

    train_batch_size: Count = 128
    """Samples per optimizer step, over all ranks."""

    micro_train_batch_size: Count = 4
    """Samples per rank and forward pass in training. It bounds memory and does not change the result."""

    max_epochs: Annotated[Count, Alias("max_epoch")] = 1
    """Passes over each rollout."""

    packing_samples: bool = False
    """Lay samples end to end and fill micro-batches by tokens instead of samples."""

    packing_tokens: Count | None = None
    """Token budget of a micro-batch with `--packing_samples`; by default `--micro_train_batch_size` times the longest
    sample."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the order of prompts, of responses, of mini-batches, dropout and new weights."""


class PPOModelConfig(ModelConfig):
    """Model."""

    flash_attn: bool = True
    """Lay samples end to end instead of padding them, and compute a prompt that several responses share once; FlashAttention 2
    where it is installed. `--no_flash_attn` pads."""

    ref_pretrain: Folder | None = None
    """Reference model, never trained: a folder or a Hub id; by default `--pretrain`. With LoRA and without this, it is the
    base model with the adapter switched off, and takes no memory of its own."""


class PPOParallelConfig(ZeroConfig):
    """Parallelism."""

    dist_timeout: Annotated[float, Field(gt=0)] = 60
    """Minutes that the ranks of a role wait for each other before the run is ended."""


class PPOCheckpointConfig(CheckpointConfig):
    """Saving."""

    save_steps: Interval = -1
    """Write a resumable checkpoint every so many rollouts; -1 for never."""


class PPOLoggingConfig(LoggingConfig):
    """Logging."""

    logging_steps: Count = 1
    """Log every so many rollouts."""

    eval_steps: Interval = -1
    """Evaluate every so many rollouts; -1 for at the end of every episode."""

    logged_samples: Annotated[int, Field(ge=0)] = 8
    """Samples of each logged rollout that are written to `run/samples.jsonl` (and a W&B table), with their rewards."""

    _interval = field_validator("eval_steps")(_interval)


class PPOConfig(Config):
    """PPO and its critic-free relatives on Ray: learn to write responses of high reward."""

    model: PPOModelConfig
    data: PPODataConfig
    rewards: RewardsConfig = RewardsConfig()
    critic: CriticConfig = CriticConfig()
    rollout: RolloutConfig = RolloutConfig()
    engines: EngineConfig = EngineConfig()
    experience: ExperienceConfig = ExperienceConfig()
    ppo: PPOLossConfig = PPOLossConfig()
    batch: PPOBatchConfig = PPOBatchConfig()
    optim: PPOOptimConfig = PPOOptimConfig()
    lora: LoraConfig = LoraConfig()
    parallel: PPOParallelConfig = PPOParallelConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: PPOCheckpointConfig = PPOCheckpointConfig()
    logging: PPOLoggingConfig = PPOLoggingConfig()

    @property
    def longest(self) -> int:
        """Most tokens that a prompt and its response may have together, as far as the options say."""
        return self.rollout.max_len or self.data.prompt_max_len + self.rollout.generate_max_len

    @property
    def needs_critic(self) -> bool:
        return self.experience.advantage_estimator == "gae"

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of the reference model are needed."""
        return self.experience.init_kl_coef > 0

    @property
    def starts_reference(self) -> bool:
        """Whether the reference is a model of its own: with LoRA it is the policy with the adapter off."""
        return self.needs_reference and not (self.lora.lora_rank and self.model.ref_pretrain is None)

    @property
    def prompts_per_rollout(self) -> int:
        return self.rollout.rollout_batch_size // self.rollout.n_samples_per_prompt

    @property
    def max_staleness(self) -> int:
        """Most updates between the weights that began a response and those that train on it."""
        return self.rollout.max_staleness if self.rollout.async_rollouts else 0

    @property
    def importance_cap(self) -> float | None:
        cap = self.experience.importance_cap
        return 2.0 if cap is None and self.rollout.async_rollouts else cap

    @property
    def kl_estimator(self) -> Literal["k1", "k2", "k3"]:
        own = "k3" if self.experience.use_kl_estimator_k3 else self.experience.kl_estimator
        return own or ("k2" if self.experience.use_kl_loss else "k1")

    @property
    def loss_reduction(self) -> Literal["token", "sequence", "constant"]:
        if self.ppo.loss_reduction:
            return self.ppo.loss_reduction
        if self.experience.advantage_estimator == "dr_grpo":
            return "constant"
        grouped = self.experience.advantage_estimator == "grpo" or self.ppo.policy_loss == "gspo"
        return "sequence" if grouped else "token"

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the ratio may fall below and rise above 1."""
        low, high = self.ppo.eps_clip, self.ppo.eps_clip_high
        match self.ppo.policy_loss:
            case "ppo":
                own = (0.2 if low is None else low,) * 2
            case "gspo":
                own = (3e-4, 4e-4) if low is None else (low, low)
            case "cispo":
                own = (1.0, 0.2) if low is None else (low, low)
        return own[0], own[1] if high is None else high

    @property
    def recomputes_logps(self) -> bool:
        """Whether the policy's log-probs are needed before it is updated: for a KL penalty in the rewards, or because a
        rollout makes several updates, of which only the first sees the weights that wrote it.
        """
        steps = self.rollout.rollout_batch_size // self.batch.train_batch_size * self.batch.max_epochs
        in_reward = self.needs_reference and not self.experience.use_kl_loss
        return steps > 1 or in_reward or self.max_staleness > 0

    @model_validator(mode="after")
    def _batches_divide(self) -> PPOConfig:
        size, n, step = (
            self.rollout.rollout_batch_size,
            self.rollout.n_samples_per_prompt,
            self.batch.train_batch_size,
        )
        if size % n:
            raise ValueError(
                f"--rollout_batch_size {size} counts samples, and is not a multiple of --n_samples_per_prompt {n}; the "
                f"nearest that is: {nearest(size, n)}"
            )
        if size % step:
            raise ValueError(
                f"--rollout_batch_size {size} is not a multiple of --train_batch_size {step}; the nearest that is: "
                f"{nearest(size, step)}"
            )
        for role in ("actor", "critic") if self.needs_critic else ("actor",):
            ranks = getattr(self.cluster, f"{role}_num_nodes") * getattr(self.cluster, f"{role}_num_gpus_per_node")
            if step % ranks:
                raise ValueError(
                    f"--train_batch_size {step} cannot be divided among the {ranks} ranks of the {role} "
                    f"(--{role}_num_nodes x --{role}_num_gpus_per_node); the nearest that can: {nearest(step, ranks)}"
                )
        return self

    @model_validator(mode="after")
    def _options_fit_the_estimator(self) -> PPOConfig:
        estimator, n = self.experience.advantage_estimator, self.rollout.n_samples_per_prompt
        if estimator in GROUPED and n < 2:
            raise ValueError(
                f"--advantage_estimator {estimator} compares the responses to one prompt: set --n_samples_per_prompt to 2 or "
                "more"
            )
        if self.rollout.dynamic_filtering and n < 2:
            raise ValueError(
                "--dynamic_filtering compares the responses to one prompt: set --n_samples_per_prompt to 2 or more"
            )
        if not self.needs_critic:
            given = {
                "--save_value_network": self.critic.save_value_network,
                "--critic_pretrain": self.critic.critic_pretrain,
                "--freezing_actor_steps": self.ppo.freezing_actor_steps > 0,
                "--colocate_critic_reward": self.cluster.colocate_critic_reward,
                "--truncated_responses bootstrap": self.experience.truncated_responses == "bootstrap",
            }
            if wrong := [option for option, value in given.items() if value]:
                raise ValueError(
                    f"{', '.join(wrong)}: --advantage_estimator {estimator} has no critic: leave it out, or take gae"
                )
        if self.experience.normalize_advantages is not None and estimator in ("reinforce", "reinforce_baseline"):
            raise ValueError(f"--normalize_advantages: {estimator} is whitened by definition; leave it out")
        if self.rollout.dynamic_filtering and estimator == "gae":
            raise ValueError("--dynamic_filtering is for estimators that compare responses to one prompt, such as grpo")
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> PPOConfig:
        """Refuse what was given and would do nothing."""
        experience = self.experience
        needs = {
            "--vllm_num_engines of 1 or more": (
                bool(self.engines.vllm_num_engines),
                self.engines,
                ("vllm_gpu_memory_utilization", "max_num_seqs", "check_sync_steps", "engine_restarts"),
            ),
            "--async": (self.rollout.async_rollouts, self.rollout, ("max_staleness",)),
            "--dynamic_filtering": (self.rollout.dynamic_filtering, self.rollout, ("max_filtered",)),
            "--kl_target": (experience.kl_target is not None, experience, ("kl_horizon",)),
            "--enable_ema": (self.ppo.enable_ema, self.ppo, ("ema_beta",)),
            "--advantage_estimator gae": (self.needs_critic, experience, ("lambd",)),
            "a critic (--advantage_estimator gae)": (self.needs_critic, self.ppo, ("value_clip",)),
            "an estimator over time, gae or reinforce": (
                experience.advantage_estimator not in GROUPED, experience, ("gamma",),
            ),
            "--init_kl_coef above 0": (self.needs_reference, experience, ("kl_estimator", "use_kl_estimator_k3")),
            "a reference model (--init_kl_coef above 0)": (self.needs_reference, self.model, ("ref_pretrain",)),
            "--packing_samples": (self.batch.packing_samples, self.batch, ("packing_tokens",)),
            "--remote_rm_url": (
                bool(self.rewards.remote_rm_url), self.rewards, ("remote_rm_timeout", "remote_rm_retries"),
            ),
            "--pretrain_data": (self.data.pretrain_data is not None, self.ppo, ("ptx_coef",)),
            "--overlong_buffer_len or --truncated_responses penalise": (
                experience.overlong_buffer_len is not None or experience.truncated_responses == "penalise",
                experience,
                ("overlong_penalty",),
            ),
        }  # fmt: skip
        for needed, (there, group, options) in needs.items():
            given = [
                f"--{name}"
                for name in options
                if name in group.model_fields_set and getattr(group, name) != type(group).model_fields[name].default
            ]
            if given and not there:
                raise ValueError(f"{', '.join(given)} would do nothing without {needed}: give both or neither")
        return self

    @model_validator(mode="after")
    def _losses_agree(self) -> PPOConfig:
        low, _ = self.clip_range
        if low > 1:
            raise ValueError(f"--eps_clip {low}: a ratio cannot fall by more than 1")
        if self.ppo.dual_clip is not None and self.ppo.policy_loss != "ppo":
            raise ValueError(f"--dual_clip is for --policy_loss ppo, not {self.ppo.policy_loss}")
        if self.experience.use_kl_loss and not self.needs_reference:
            raise ValueError("--use_kl_loss needs a price of the divergence: set --init_kl_coef above 0")
        if self.experience.kl_target is not None and not self.needs_reference:
            raise ValueError("--kl_target steers the coefficient from its start: set --init_kl_coef above 0")
        if self.experience.use_kl_estimator_k3 and self.experience.kl_estimator not in (None, "k3"):
            raise ValueError(
                f"--use_kl_estimator_k3 and --kl_estimator {self.experience.kl_estimator}: give one of them"
            )
        if self.experience.reward_clip_range[0] >= self.experience.reward_clip_range[1]:
            raise ValueError("--reward_clip_range must be two numbers, the smaller one first")
        buffer, longest = self.experience.overlong_buffer_len, self.rollout.generate_max_len
        if buffer is not None and buffer > longest:
            raise ValueError(f"--overlong_buffer_len {buffer} is more than --generate_max_len {longest}")
        if self.model.aux_loss_coef:
            raise ValueError("--aux_loss_coef is not for PPO: experts are balanced while they learn from data")
        return self

    @model_validator(mode="after")
    def _rewards_come_from_somewhere(self) -> PPOConfig:
        sources = names(self.rewards.reward_pretrain) + names(self.rewards.remote_rm_url)
        if not sources:
            raise ValueError("there is nothing to learn from: give --reward_pretrain or --remote_rm_url")
        if self.rewards.reward_weights is not None:
            if self.rewards.reward_fn is not None:
                raise ValueError(
                    "--reward_fn makes one reward of several, and so does --reward_weights: give one of them"
                )
            try:
                weights = [float(weight) for weight in self.rewards.reward_weights.split(",")]
            except ValueError:
                raise ValueError(
                    f"--reward_weights must be numbers separated by commas, got {self.rewards.reward_weights!r}"
                ) from None
            if len(weights) != len(sources):
                raise ValueError(
                    f"--reward_weights has {len(weights)} weights for {len(sources)} reward models: {', '.join(sources)}"
                )
        return self

    @model_validator(mode="after")
    def _engines_fit(self) -> PPOConfig:
        if not self.engines.vllm_num_engines:
            if self.rollout.async_rollouts:
                raise ValueError("--async writes beside the policy's training: set --vllm_num_engines to 1 or more")
            for name in ("vllm_tensor_parallel_size", "enable_prefix_caching", "enforce_eager"):
                if getattr(self.engines, name) != EngineConfig.model_fields[name].default:
                    raise ValueError(f"--{name} is for vLLM: set --vllm_num_engines to 1 or more, or leave it out")
        if self.cluster.colocate_all and self.rollout.async_rollouts:
            raise ValueError(
                "--colocate_all takes turns, and --async writes and trains at the same time: give one of them"
            )
        return self

    @model_validator(mode="after")
    def _pretraining_data_is_there(self) -> PPOConfig:
        if self.data.pretrain_data is None:
            for name in ("pretrain_data_probs", "pretrain_key"):
                if getattr(self.data, name) is not None:
                    raise ValueError(f"--{name} is about --pretrain_data: give both or neither")
        return self

    @model_validator(mode="after")
    def _four_bits_are_not_sharded(self) -> PPOConfig:
        if self.lora.load_in_4bit and self.parallel.zero_stage == 3:
            raise ValueError("--load_in_4bit weights cannot be split by --zero_stage 3: use --zero_stage 2 (or 0, 1)")
        return self


def nearest(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`."""
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else f"{above}"
