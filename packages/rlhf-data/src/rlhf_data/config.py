"""The options of everything that reads data, declared once.

A field is an option: its name is the flag, its type the parser, its default the default, the string below it the
help. The command line, YAML files, the saved `config.json`, the docs and the Python API all come from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Config(BaseModel):
    """A group of options: frozen, typed, bounded; unknown names are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    def given(self) -> dict[str, Any]:
        """The options that were set, groups flattened: what is not in it has its default."""
        flat: dict[str, Any] = {}
        for name in self.model_fields_set:
            value = getattr(self, name)
            flat |= value.given() if isinstance(value, Config) else {name: value}
        return flat


@dataclass(frozen=True)
class Alias:
    """Another flag for the same option, for those who know it under that name: `Annotated[int, Alias("max_epoch")]`."""

    name: str


def whole_number(value: Any) -> Any:
    """Read `1e6` as 1000000: whole numbers may be written the way people write large ones."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(whole_number), Field(ge=1)]
"""A whole number of at least one; `1e6` is accepted."""

DISABLED = ("", '""', "''", "None", "none", "null")
"""The ways in which `--input_template` is switched off (shell here-documents deliver the quotes themselves)."""


class DataConfig(Config):
    """Data."""

    dataset: str
    """Training data: a Hub id, `id@subset`, a local .json, .jsonl, .csv, .parquet or .arrow file, a `save_to_disk`
    folder or a folder of such files. A comma separates several."""

    dataset_probs: str | None = None
    """Mixing probabilities, one per data set, separated by commas: rows are drawn by them until one data set runs out.
    Without it, several data sets are joined whole."""

    train_split: str = "train"
    """Split to train on."""

    eval_dataset: str | None = None
    """Evaluation data, in the same forms as `--dataset`; without it the evaluation split of `--dataset` is used."""

    eval_split: str = "test"
    """Split to evaluate on. A data set without it has `--eval_ratio` of its training rows held out instead."""

    eval_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the training rows held out for evaluation (and removed from training) when there is no evaluation split;
    0 for no evaluation."""

    max_samples: Count | None = None
    """Most training rows to read from each data set, and to keep after mixing. Without it, all."""

    max_len: Count = 2048
    """Longest sample (prompt and response), in tokens."""

    input_template: str | None = "User: {}\nAssistant: "
    """How a plain prompt is written out: one `{}` stands for it; backslash escapes such as \\n are decoded; "" or None
    switches it off. Not used with `--apply_chat_template`."""

    apply_chat_template: bool = False
    """Write rows out with the tokenizer's chat template."""

    tokenizer_chat_template: str | None = None
    """Chat template (Jinja text, or the path of a file with it) to use instead of the tokenizer's own."""

    strict_data: bool = False
    """Make any dropped row an error; otherwise dropped rows are counted and reported by reason."""

    data_cache_dir: str | None = None
    """Folder for tokenised data; by default the user's cache folder."""

    @model_validator(mode="after")
    def _template_has_one_slot(self) -> DataConfig:
        check_template(self)
        return self


class ConversationDataConfig(DataConfig):
    """Data."""

    row_format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """Shape of the rows; `auto` recognises it from the column names and says what it found. `--input_key` and the other
    key options force the columns."""

    input_key: str | None = None
    """Column of the prompt (text or a list of chat messages), or of the messages."""

    output_key: str | None = None
    """Column of the response. Without it, the last assistant turn of a chat row is the response."""


class PackedDataConfig(DataConfig):
    """Data."""

    packing_samples: bool = False
    """Lay samples end to end instead of padding them: rows are filled by best fit up to `--packing_tokens`. Samples
    never see each other."""

    packing_tokens: Count | None = None
    """Token budget of a packed row; by default `--micro_train_batch_size` times `--max_len`."""

    samples_per_row: ClassVar[int] = 1
    """Most samples of `max_len` tokens that one row of data brings, and that a packed row must hold together."""

    @model_validator(mode="after")
    def _a_row_of_data_fits(self) -> PackedDataConfig:
        times = "" if self.samples_per_row == 1 else f"{self.samples_per_row} times "
        if self.packing_tokens is not None and self.packing_tokens < self.samples_per_row * self.max_len:
            what = "a sample of that length" if self.samples_per_row == 1 else "a pair of that length"
            raise ValueError(
                f"--packing_tokens {self.packing_tokens} is less than {times}--max_len {self.max_len}: {what} would fit "
                "into no row; raise the one or lower the other"
            )
        return self


class SFTDataConfig(PackedDataConfig, ConversationDataConfig):
    """Data."""

    input_key: str | None = None
    """Column of the prompt (text or a list of chat messages), of the messages, or (`--pretrain_mode`) of the text."""

    pretrain_mode: bool = False
    """Continue pre-training: rows are plain text (`--input_key`, or the column `text`), every token is trained, long
    documents are cut into pieces of `--max_len`, none of it is lost."""

    multiturn: bool = False
    """Train on every assistant turn of a chat row, not on the last one only."""

    @model_validator(mode="after")
    def _options_agree(self) -> SFTDataConfig:
        if self.pretrain_mode and self.apply_chat_template:
            raise ValueError("--pretrain_mode trains on plain text: give it without --apply_chat_template")
        if self.multiturn and not self.apply_chat_template:
            raise ValueError("--multiturn is about chat rows: give it with --apply_chat_template")
        return self


class PairKeys(Config):
    """Pairs."""

    prompt_key: str | None = None
    """Column of the prompt of a pair (text or a list of chat messages). Without it, the column `prompt` if there is
    one; else both sides carry the prompt themselves."""

    chosen_key: str = "chosen"
    """Column of the preferred side: a response, or a whole conversation whose last assistant turn is the response. Text,
    a chat message, or a list of them."""

    rejected_key: str = "rejected"
    """Column of the other side, in the same forms."""


class MarginKeys(PairKeys):
    """Pairs."""

    margin_loss: bool = False
    """Subtract the margin column inside the loss: the chosen side must win by as much."""

    margin_key: str = "margin"
    """Column of the margin, a number; for `--margin_loss`."""

    @model_validator(mode="after")
    def _margin_is_used(self) -> MarginKeys:
        if self.margin_key != "margin" and not self.margin_loss:
            raise ValueError(f"--margin_key {self.margin_key} is for --margin_loss: give both, or neither")
        return self


class LabelKeys(Config):
    """Labels."""

    label_key: str = "label"
    """Column of the label: whether the response is desirable. True or false, 1 or 0."""

    label_threshold: float | None = None
    """Labels are scores: those at or above this number are desirable, all others are not."""


class PairDataConfig(PairKeys, PackedDataConfig):
    """Data."""

    max_len: Count = 512
    """Longest sample (prompt and response of one side of a pair), in tokens."""

    input_template: str | None = None
    """How a plain prompt is written out: one `{}` stands for it; backslash escapes such as \\n are decoded. Without it,
    a plain prompt and its response are joined as they are. Not used with `--apply_chat_template`."""

    packing_tokens: Count | None = None
    """Token budget of a packed row; by default 2 times `--micro_train_batch_size` times `--max_len`, because a pair is
    two samples."""

    samples_per_row: ClassVar[int] = 2


class RewardDataConfig(PairDataConfig, MarginKeys):
    """Data."""


class LabelledDataConfig(PackedDataConfig, LabelKeys, ConversationDataConfig):
    """Data."""


class InferenceDataConfig(Config):
    """Data."""

    dataset: str
    """Data: a Hub id, `id@subset`, a local .json, .jsonl, .csv, .parquet or .arrow file, a `save_to_disk` folder or a
    folder of such files. A comma separates several."""

    dataset_probs: str | None = None
    """Mixing probabilities, one per data set, separated by commas: rows are drawn by them until one data set runs out.
    Without it, several data sets follow each other."""

    dataset_split: str = "train"
    """Split to read."""

    max_samples: Count | None = None
    """Most rows to read from each data set, and to keep after mixing: the first ones. Without it, all."""

    input_key: str | None = None
    """Column of the prompt (text or a list of chat messages), or of a whole conversation; by default it is found by name."""

    input_template: str | None = None
    """How a plain prompt is written out: one `{}` stands for it; backslash escapes such as \\n are decoded. Rows that
    `rlhf generate` wrote are written out already and get no template."""

    apply_chat_template: bool = False
    """Write rows out with the tokenizer's chat template."""

    tokenizer_chat_template: str | None = None
    """Chat template (Jinja text, or the path of a file with it) to use instead of the tokenizer's own."""

    strict_data: bool = False
    """Make any row that cannot be used an error; otherwise such rows are counted and reported by reason."""

    @model_validator(mode="after")
    def _template_has_one_slot(self) -> InferenceDataConfig:
        check_template(self)
        return self


class PromptDataConfig(InferenceDataConfig):
    """Data."""

    rollout_batch_size: Count = 2048
    """Prompts of an iteration: rows `[iteration * rollout_batch_size, (iteration + 1) * rollout_batch_size)`."""

    prompt_max_len: Count = 1024
    """Longest prompt, in tokens; rows with a longer one are left out and counted."""


class SlicedPromptDataConfig(PromptDataConfig):
    """Data."""

    iter: Annotated[int, Field(ge=0)] | None = None
    """Use only the prompts of this iteration, counted from 0; an error past the end of the data. Without it, all prompts."""

    @model_validator(mode="after")
    def _a_slice_has_a_number(self) -> SlicedPromptDataConfig:
        if "rollout_batch_size" in self.model_fields_set and self.iter is None:
            raise ValueError(
                f"--rollout_batch_size {self.rollout_batch_size} is the size of an --iter slice: give --iter too, or the first "
                "rows with --max_samples"
            )
        return self


class ResponseDataConfig(InferenceDataConfig):
    """Data."""

    row_format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """Shape of the rows; `auto` recognises it from the column names and says what it found. `--input_key` and
    `--output_key` force the columns."""

    output_key: str | None = None
    """Column of the response. Without it, the last assistant turn of a chat row is the response."""

    max_len: Count = 2048
    """Longest sample (prompt and response), in tokens; a longer one is cut at its end, marked and counted."""


def check_template(config: DataConfig | InferenceDataConfig) -> None:
    """Make sure that `--input_template` has one place for the prompt; the ways to switch it off become None.

    Raises:
        ValueError: it has none, or several.
    """
    from rlhf_data.templates import decode_escapes

    if config.input_template is not None and not config.apply_chat_template:
        if config.input_template in DISABLED:
            object.__setattr__(config, "input_template", None)
        elif decode_escapes(config.input_template).count("{}") != 1:
            raise ValueError(
                f"--input_template must contain `{{}}` exactly once, where the prompt goes, got "
                f'{config.input_template!r}; give "" to switch the template off'
            )


class SeedConfig(Config):
    """Seed."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of mixing and of samples: sample k of row n is drawn with a seed made of this, n and k, whatever else is drawn."""
