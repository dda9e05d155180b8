"""The options of training, declared once, in groups that methods compose (`SFTConfig` is the first).

Light on purpose: importing this module imports pydantic and nothing heavier, so that `--help` is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, field_validator, model_validator

from rlhf_data.config import (
    Alias,
    Config,
    Count,
    DataConfig,
    LabelledDataConfig,
    PairDataConfig,
    RewardDataConfig,
    SFTDataConfig,
)

Interval = Annotated[int, Field(ge=-1)]
"""Every so many steps; -1 for the documented default. 0 is refused by `_interval`."""

Folder = Annotated[str, AfterValidator(lambda path: str(Path(path).expanduser()) if path.startswith("~") else path)]
"""A path, or for models a Hub id; `~` is the home folder."""

Key = Annotated[
    SecretStr | None, BeforeValidator(lambda value: {"true": "True", "false": None}.get(str(value).lower(), value))
]
"""A secret key; True for the one that is set up already, False for none."""

Scheduler = Literal[
    "cosine_with_min_lr",
    "cosine",
    "cosine_with_restarts",
    "linear",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


class ModelConfig(Config):
    """Model."""

    pretrain: Folder
    """Model to start from: a folder in Hugging Face format, or a Hub id."""

    bf16: bool = False
    """Compute in bfloat16, with float32 master weights and optimizer states. Without it, everything is float32."""

    flash_attn: bool = False
    """Ragged attention without padding: FlashAttention 2 where it is installed, else torch's variable-length attention
    (CUDA) or one attention call per sample (CPU); the log says which."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    gradient_checkpointing_use_reentrant: bool = False
    """Use torch's re-entrant variant of gradient checkpointing."""

    aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the load-balancing loss of mixture-of-experts models; refused for dense models."""

    disable_fast_tokenizer: bool = False
    """Use the slow (Python) tokenizer."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    @model_validator(mode="after")
    def _the_balance_has_a_gradient(self) -> ModelConfig:
        if self.aux_loss_coef and self.gradient_checkpointing_use_reentrant:
            raise ValueError(
                "--aux_loss_coef gets no gradient through --gradient_checkpointing_use_reentrant: leave the latter out"
            )
        return self


class LoraConfig(Config):
    """LoRA."""

    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the adapter matrices; 0 trains the whole model."""

    lora_alpha: Annotated[float, Field(gt=0)] = 16
    """Scale of the adapter: its output is multiplied by alpha / rank."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapter, as a probability."""

    target_modules: list[str] = Field(default=["all-linear"], min_length=1)
    """Modules that get an adapter, by name; `all-linear` is every linear layer but the head."""

    load_in_4bit: bool = False
    """QLoRA: keep the frozen base weights in 4 bits (NF4, double quantisation). Needs `--lora_rank`."""

    @model_validator(mode="after")
    def _four_bits_need_an_adapter(self) -> LoraConfig:
        if self.load_in_4bit and not self.lora_rank:
            raise ValueError(
                "--load_in_4bit freezes the base weights, so there is nothing to train: set --lora_rank, e.g. 16"
            )
        return self


class ScheduleConfig(Config):
    """What optimizers have in common but for the peak of their learning rate."""

    lr_scheduler: Scheduler = "cosine_with_min_lr"
    """Shape of the learning rate over the run."""

    lr_warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the optimizer steps spent warming up from 0 to the peak."""

    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where `cosine_with_min_lr` ends, as a share of the peak."""

    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""

    l2: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; norms and biases are exempt."""

    max_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm, larger ones are scaled down; 0 switches clipping off."""


class PeakConfig(Config):
    """Learning rate."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    """Peak learning rate of AdamW."""


class OptimConfig(ScheduleConfig, PeakConfig):
    """Optimizer."""


class BatchConfig(Config):
    """Batches."""

    train_batch_size: Count = 128
    """Samples per optimizer step, over all ranks."""

    micro_train_batch_size: Count = 8
    """Samples per rank and forward pass. It bounds memory and does not change the result."""

    max_epochs: Annotated[Count, Alias("max_epoch")] = 2
    """Passes over the training data."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the data order, the held-out rows, dropout and new weights."""


class RanksConfig(Config):
    """Parallelism."""

    num_procs: Annotated[Count | None, Alias("num_gpus")] = None
    """Ranks to start on this node: by default one per GPU, or one on a machine without."""

    num_nodes: Count = 1
    """Nodes that take part; run the same command on each."""

    node_rank: Annotated[int, Field(ge=0)] = 0
    """This node's number, from 0."""

    master_addr: str = "127.0.0.1"
    """Address of node 0."""

    master_port: Annotated[int, Field(ge=0, le=65535)] = 29500
    """Port on node 0 where the nodes meet. Unused on a single node."""

    dist_timeout: Annotated[float, Field(gt=0)] = 60
    """Minutes that ranks wait for each other before the run is ended."""

    @model_validator(mode="after")
    def _nodes_count_from_zero(self) -> RanksConfig:
        if self.node_rank >= self.num_nodes:
            raise ValueError(
                f"--node_rank {self.node_rank} must be below --num_nodes {self.num_nodes}; nodes count from 0"
            )
        return self


class ZeroConfig(Config):
    """Parallelism."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """What DeepSpeed ZeRO splits over the ranks: 1 optimizer states, 2 and gradients, 3 and weights."""

    adam_offload: bool = False
    """Keep the optimizer states and its step on the CPU. Needs `--zero_stage` 1 or more."""

    zpg: Count = 1
    """ZeRO++ secondary partition: ranks that share a second copy of the weights in the backward pass, usually the GPUs of
    a node. Needs `--zero_stage 3`."""

    overlap_comm: bool = False
    """Overlap gradient reduction with the backward pass (needs some more memory)."""

    grad_accum_dtype: Literal["fp32", "bf16"] | None = None
    """Number format in which gradients add up over micro-batches; by default fp32, or bf16 for `--bf16` with `--zero_stage 0`."""

    @model_validator(mode="after")
    def _stages_that_can(self) -> ParallelConfig:
        if self.adam_offload and self.zero_stage == 0:
            raise ValueError("--adam_offload needs DeepSpeed's sharded optimizer: set --zero_stage 1, 2 or 3")
        if self.zpg > 1 and self.zero_stage != 3:
            raise ValueError(f"--zpg {self.zpg} splits weights a second time, which only --zero_stage 3 does at all")
        if self.overlap_comm and self.zero_stage == 0:
            raise ValueError("--overlap_comm overlaps ZeRO's gradient reduction: set --zero_stage 1, 2 or 3")
        return self


class ParallelConfig(ZeroConfig, RanksConfig):
    """Parallelism."""


def _interval(value: int) -> int:
    if value == 0:
        raise ValueError("must be a number of optimizer steps (1 or more), or -1")
    return value


class CheckpointConfig(Config):
    """Saving."""

    save_path: Folder = "./ckpt"
    """Folder of the final model in Hugging Face format, with the record of the run in `run/`."""

    save_steps: Interval = -1
    """Write a resumable checkpoint every so many optimizer steps; -1 for never."""

    save_hf_ckpt: bool = False
    """Beside every checkpoint, also export the model in Hugging Face format."""

    ckpt_path: Folder | None = None
    """Folder of the checkpoints, shared by all nodes; by default `checkpoints` in `--save_path`."""

    max_ckpt_num: Count = 3
    """Checkpoints to keep; older ones are removed after a new one is complete."""

    max_ckpt_mem: Annotated[float, Field(gt=0)] = 1e8
    """Most disk space that checkpoints may take together, in GB; the newest is always kept."""

    load_checkpoint: bool = False
    """Continue from the newest complete checkpoint in `--ckpt_path`; without one, start from the beginning."""

    _interval = field_validator("save_steps")(_interval)


class LoggingConfig(Config):
    """Logging."""

    logging_steps: Count = 1
    """Log every so many optimizer steps."""

    eval_steps: Interval = -1
    """Evaluate every so many optimizer steps; -1 for at the end of every epoch."""

    eval_at_start: bool = False
    """Evaluate also before the first step, to have something to compare with."""

    use_wandb: Key = None
    """Log to Weights & Biases: an API key, or True after `wandb login` (or with WANDB_MODE=offline). The key is never written down."""

    wandb_org: str | None = None
    """Weights & Biases entity."""

    wandb_group: str | None = None
    """Weights & Biases group."""

    wandb_project: str = "rlhf"
    """Weights & Biases project."""

    wandb_run_name: str | None = None
    """Weights & Biases run name; by default the method and the start time."""

    use_tensorboard: Folder | None = None
    """Folder for TensorBoard logs."""

    _interval = field_validator("eval_steps")(_interval)


class TrainConfig(Config):
    """What every training method has; a method adds its data and its own options."""

    model: ModelConfig
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _gradients_add_up_in_a_format_that_can(self) -> TrainConfig:
        own, wanted = "bf16" if self.model.bf16 else "fp32", self.parallel.grad_accum_dtype
        if self.parallel.zero_stage == 0 and wanted not in (None, own):
            raise ValueError(
                f"--grad_accum_dtype {wanted} with {own} weights needs DeepSpeed's sharded optimizer: set --zero_stage 1, 2 or 3"
            )
        return self

    @model_validator(mode="after")
    def _four_bits_are_not_sharded(self) -> TrainConfig:
        if self.lora.load_in_4bit and self.parallel.zero_stage == 3:
            raise ValueError("--load_in_4bit weights cannot be split by --zero_stage 3: use --zero_stage 2 (or 0, 1)")
        return self


class SFTConfig(TrainConfig):
    """Supervised fine-tuning: learn to give the responses of a data set."""

    data: SFTDataConfig

    @model_validator(mode="after")
    def _text_has_no_turns(self) -> SFTConfig:
        if self.data.pretrain_mode and self.data.apply_chat_template:
            raise ValueError(
                "--pretrain_mode trains on plain text and --apply_chat_template on conversations: give one of them"
            )
        return self


class OneEpochBatchConfig(BatchConfig):
    """Batches."""

    max_epochs: Annotated[Count, Alias("max_epoch")] = 1
    """Passes over the training data."""


class SharedPrefixConfig(Config):
    """Pairs."""

    share_prefix: bool | None = None
    """Compute the prompt of a pair once for both responses: the same numbers for less work. By default wherever samples
    are laid end to end (`--flash_attn` or `--packing_samples`) and experts are not balanced."""


class ReferenceConfig(Config):
    """Reference model."""

    ref_pretrain: Folder | None = None
    """Reference model, never trained: a folder or a Hub id; by default `--pretrain`. With LoRA and without this, it is the
    base model with the adapter switched off, and takes no memory of its own."""

    ref_offload: bool = False
    """Keep the reference model's weights on the CPU and bring them to the GPU layer by layer; at every ZeRO stage."""


class PrecomputedReferenceConfig(ReferenceConfig):
    """Reference model."""

    precompute_ref: bool = False
    """Compute the reference model's log-probs once before training and keep them on disk, for all epochs and later runs
    on the same model and data: no reference model is held while training."""


class RewardOptimConfig(OptimConfig):
    """Optimizer."""

    learning_rate: Annotated[float, Field(gt=0)] = 9e-6
    """Peak learning rate of AdamW."""


class PairBatchConfig(OneEpochBatchConfig):
    """Batches."""

    train_batch_size: Count = 128
    """Pairs per optimizer step, over all ranks."""

    micro_train_batch_size: Count = 8
    """Pairs per rank and forward pass. It bounds memory and does not change the result."""


class RewardBatchConfig(PairBatchConfig):
    """Batches."""

    micro_train_batch_size: Count = 1
    """Pairs per rank and forward pass. It bounds memory and does not change the result."""


class RewardModelConfig(SharedPrefixConfig):
    """Reward model."""

    loss: Literal["sigmoid", "logexp"] = "sigmoid"
    """How the loss is computed: -log sigmoid(margin), or log(1 + exp(-margin)). They are the same function."""

    value_head_prefix: str | None = None
    """Name of the head in `--pretrain`, if that is a reward model already; by default it is found by looking. A new head
    is made if there is none. Saved models call it `score`, as transformers and vLLM do."""

    compute_fp32_loss: bool = False
    """For scripts that give it: rewards and loss are always computed in float32, also without."""


class RMConfig(TrainConfig):
    """Reward model: learn to give the better of two responses the higher number."""

    data: RewardDataConfig
    batch: RewardBatchConfig = RewardBatchConfig()
    optim: RewardOptimConfig = RewardOptimConfig()
    reward: RewardModelConfig = RewardModelConfig()

    @model_validator(mode="after")
    def _pairs_can_share(self) -> RMConfig:
        check_sharing(self.model, self.data, self.reward)
        return self


class PreferenceOptimConfig(OptimConfig):
    """Optimizer."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of AdamW."""


PreferenceLoss = Literal["dpo", "ipo", "ipo_avg", "robust", "hinge", "simpo", "orpo"]
REFERENCE_FREE = ("simpo", "orpo")


class PreferenceConfig(SharedPrefixConfig):
    """Preference loss."""

    beta: Annotated[float | None, Field(gt=0)] = None
    """How strongly the policy is held at the reference: higher means closer; by default 0.1. For `simpo` the scale of the
    rewards, by default 2; for `orpo` the weight of the odds ratio."""

    loss_type: PreferenceLoss = "dpo"
    """`dpo` (with `--label_smoothing` cDPO), `ipo` on summed and `ipo_avg` on averaged log-probs, `robust` DPO, `hinge`
    (SLiC), and without a reference `simpo` and `orpo`."""

    ipo: bool = False
    """The same as `--loss_type ipo`."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong: conservative DPO for `dpo`, the unbiased loss for `robust`."""

    nll_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen response's negative log-probability per token (as in Llama 3.1); keeps it from falling."""

    simpo_gamma: Annotated[float | None, Field(ge=0)] = None
    """Reward margin that `simpo` aims at; by default 1."""

    @property
    def kind(self) -> PreferenceLoss:
        """The loss, `--ipo` considered."""
        return "ipo" if self.ipo else self.loss_type

    @property
    def strength(self) -> float:
        """`--beta`, or what it is by default for the loss."""
        return self.beta or (2.0 if self.kind == "simpo" else 0.1)

    @model_validator(mode="after")
    def _options_agree(self) -> PreferenceConfig:
        if self.ipo and self.loss_type not in ("dpo", "ipo"):
            raise ValueError(f"--ipo and --loss_type {self.loss_type} are two losses: give one of them")
        if self.label_smoothing and self.kind not in ("dpo", "robust"):
            raise ValueError(f"--label_smoothing {self.label_smoothing} has no meaning for {self.kind}: leave it out")
        if self.kind == "robust" and not self.label_smoothing:
            raise ValueError("--loss_type robust needs --label_smoothing, how often labels are wrong, e.g. 0.1")
        if self.simpo_gamma is not None and self.kind != "simpo":
            raise ValueError(f"--simpo_gamma {self.simpo_gamma} is for --loss_type simpo, not {self.kind}")
        if self.nll_loss_coef and self.kind == "orpo":
            raise ValueError("--nll_loss_coef: orpo already has that term, with weight 1; leave the option out")
        return self


class DPOConfig(TrainConfig):
    """Direct preference optimisation (DPO) and its relatives: learn from pairs of a better and a worse response."""

    data: PairDataConfig
    batch: PairBatchConfig = PairBatchConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    preference: PreferenceConfig = PreferenceConfig()
    reference: PrecomputedReferenceConfig = PrecomputedReferenceConfig()

    @model_validator(mode="after")
    def _pairs_can_share(self) -> DPOConfig:
        check_sharing(self.model, self.data, self.preference)
        return self

    @model_validator(mode="after")
    def _the_reference_is_of_use(self) -> DPOConfig:
        reference, kind = self.reference, self.preference.kind
        given = [f"--{name}" for name in ("ref_pretrain", "ref_offload", "precompute_ref") if getattr(reference, name)]
        if kind in REFERENCE_FREE and given:
            raise ValueError(f"{' and '.join(given)}: {kind} has no reference model; leave it out")
        if reference.precompute_ref and reference.ref_offload:
            raise ValueError("--ref_offload: with --precompute_ref no reference model is held; give one of them")
        check_offload(reference, self.lora)
        if reference.precompute_ref and self.lora.load_in_4bit and reference.ref_pretrain is None:
            raise ValueError(
                "--precompute_ref would compute with the base model before its weights are cut to 4 bits: with --load_in_4bit "
                "leave it out, the base with the adapter off is the reference and takes no memory of its own"
            )
        return self


class KTOLossConfig(Config):
    """KTO."""

    beta: Annotated[float, Field(gt=0)] = 0.01
    """How strongly the policy is held at the reference: higher means closer."""

    desirable_loss_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of desirable rows."""

    undesirable_loss_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of undesirable rows."""


class KTOConfig(TrainConfig):
    """Kahneman-Tversky optimisation (KTO): learn from single responses that are labelled desirable or not."""

    data: LabelledDataConfig
    batch: OneEpochBatchConfig = OneEpochBatchConfig()
    optim: PreferenceOptimConfig = PreferenceOptimConfig()
    kto: KTOLossConfig = KTOLossConfig()
    reference: ReferenceConfig = ReferenceConfig()

    @model_validator(mode="after")
    def _the_reference_is_of_use(self) -> KTOConfig:
        check_offload(self.reference, self.lora)
        if self.batch.train_batch_size < 2:
            raise ValueError(
                "--train_batch_size 1: KTO compares each prompt with another sample's response; give at least 2"
            )
        return self


class TeacherConfig(Config):
    """Teacher."""

    teacher_model: Folder
    """Model to learn from, with the student's tokenizer: a folder or a Hub id."""

    teacher_offload: bool = False
    """Keep the teacher's weights on the CPU and bring them to the GPU layer by layer; at every ZeRO stage."""

    cache_teacher: bool = False
    """Compute the teacher's most likely tokens once before training and keep them on disk, for all epochs and later runs:
    no teacher is held while training. For `--kd_loss forward_kl`."""

    teacher_top_k: Count | None = None
    """How many tokens `--cache_teacher` keeps at each place, by default 64; the others count as one."""


class DistillationConfig(Config):
    """Distillation."""

    kd_coef: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Weight of the divergence from the teacher; 1 - kd_coef is the weight of the labels' cross-entropy."""

    kd_loss: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = "forward_kl"
    """Divergence: KL(teacher, student), KL(student, teacher), Jensen-Shannon (`--kd_beta`), or the forward KL from a mixture
    (`--kd_alpha`)."""

    kd_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of both in the divergence, which is multiplied by its square to keep its weight."""

    kd_beta: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Weight of the teacher in `jsd`; by default 0.5."""

    kd_alpha: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Share of the teacher in the mixture of `skew_kl`; by default 0.1."""

    on_policy_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the samples of each step whose responses the student writes itself, for the teacher to score."""

    on_policy_temperature: Annotated[float | None, Field(gt=0)] = None
    """Sampling temperature of the student's own responses; by default 1."""

    generate_max_len: Count | None = None
    """Longest response that the student writes itself, in tokens; by default what is left of `--max_len`, at most 256."""

    @model_validator(mode="after")
    def _options_agree(self) -> DistillationConfig:
        for name, kind in (("kd_beta", "jsd"), ("kd_alpha", "skew_kl")):
            if getattr(self, name) is not None and self.kd_loss != kind:
                raise ValueError(f"--{name} is for --kd_loss {kind}, not {self.kd_loss}: leave it out")
        for name in ("on_policy_temperature", "generate_max_len"):
            if getattr(self, name) is not None and not self.on_policy_fraction:
                raise ValueError(f"--{name} is about the student's own responses: set --on_policy_fraction, e.g. 0.5")
        if not self.kd_coef:
            raise ValueError("--kd_coef 0 would not use the teacher at all: that is `rlhf train sft`")
        return self


class KDConfig(TrainConfig):
    """Knowledge distillation: learn to predict what a larger model predicts."""

    data: SFTDataConfig
    batch: OneEpochBatchConfig = OneEpochBatchConfig()
    teacher: TeacherConfig
    distillation: DistillationConfig = DistillationConfig()

    @model_validator(mode="after")
    def _the_cache_can_serve(self) -> KDConfig:
        teacher, distillation = self.teacher, self.distillation
        if teacher.cache_teacher and distillation.kd_loss != "forward_kl":
            raise ValueError(
                f"--cache_teacher keeps the teacher's likeliest tokens, which {distillation.kd_loss} cannot be computed from: "
                "use --kd_loss forward_kl"
            )
        if teacher.cache_teacher and distillation.on_policy_fraction:
            raise ValueError(
                "--on_policy_fraction writes new responses, which --cache_teacher cannot know: give one of them"
            )
        if teacher.cache_teacher and teacher.teacher_offload:
            raise ValueError("--teacher_offload: with --cache_teacher no teacher is held; give one of them")
        if teacher.teacher_top_k is not None and not teacher.cache_teacher:
            raise ValueError("--teacher_top_k is for --cache_teacher: give both or neither")
        if distillation.on_policy_fraction and self.data.pretrain_mode:
            raise ValueError("--on_policy_fraction answers prompts, and --pretrain_mode has none: give one of them")
        return self


class MergeConfig(Config):
    """Fold a LoRA adapter (of a language model or a reward model) into its base model."""

    adapter: Annotated[Folder, Alias("lora_path")]
    """Folder of the adapter, as `--lora_rank` training saves it."""

    save_path: Annotated[Folder, Alias("output_path")]
    """Folder of the whole model in Hugging Face format."""

    pretrain: Annotated[Folder | None, Alias("model_path")] = None
    """Base model, a folder or a Hub id; by default the one that the adapter names."""

    bf16: bool = False
    """Save in bfloat16; by default in the number format of the base model. The sum is computed in float32."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


def check_sharing(model: ModelConfig, data: PairDataConfig, options: SharedPrefixConfig) -> None:
    """Refuse `--share_prefix` where it cannot be."""
    if options.share_prefix and not (model.flash_attn or data.packing_samples):
        raise ValueError("--share_prefix needs samples laid end to end: give --flash_attn or --packing_samples with it")
    if options.share_prefix and model.aux_loss_coef:
        raise ValueError("--share_prefix: --aux_loss_coef balances experts over whole samples; give one of them")


def shares_prefix(model: ModelConfig, data: PairDataConfig, options: SharedPrefixConfig) -> bool:
    """Whether prompts of pairs are computed once."""
    if options.share_prefix is None:
        return (model.flash_attn or data.packing_samples) and not model.aux_loss_coef
    return options.share_prefix


def check_offload(reference: ReferenceConfig, lora: LoraConfig) -> None:
    """Refuse to offload a reference that is the trained model itself."""
    if reference.ref_offload and lora.lora_rank and reference.ref_pretrain is None:
        raise ValueError(
            "--ref_offload: with LoRA the reference is the base model with the adapter off, and there is nothing to offload"
        )
