"""The options of training, declared once, in groups that methods compose (`SFTConfig` is the first).

Light on purpose: importing this module imports pydantic and nothing heavier, so that `--help` is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, field_validator, model_validator

from rlhf_data.config import Alias, Config, Count, DataConfig, SFTDataConfig

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


class OptimConfig(Config):
    """Optimizer."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    """Peak learning rate of AdamW."""

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


class ParallelConfig(Config):
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
    def _stages_that_can(self) -> ParallelConfig:
        if self.adam_offload and self.zero_stage == 0:
            raise ValueError("--adam_offload needs DeepSpeed's sharded optimizer: set --zero_stage 1, 2 or 3")
        if self.zpg > 1 and self.zero_stage != 3:
            raise ValueError(f"--zpg {self.zpg} splits weights a second time, which only --zero_stage 3 does at all")
        if self.overlap_comm and self.zero_stage == 0:
            raise ValueError("--overlap_comm overlaps ZeRO's gradient reduction: set --zero_stage 1, 2 or 3")
        if self.node_rank >= self.num_nodes:
            raise ValueError(
                f"--node_rank {self.node_rank} must be below --num_nodes {self.num_nodes}; nodes count from 0"
            )
        return self


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
