"""The reward model: a transformer that gives a whole sample one number.

It is transformers' sequence classification with one label. Shapes: N samples, H hidden size.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_core.models.backbone import Backbone, Head
from rlhf_data.errors import InputError

HEAD = "score"
"""What transformers (and vLLM) call the head; every reward model that is saved here has it under this name."""


class RewardModel(Backbone):
    """A transformer with a head of one output, read at the last token of a sample."""

    @property
    def head(self) -> Head:
        return getattr(self.base, HEAD)

    def rewards(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The reward of every sample, `[N]` float32; and the load balance `[N]`."""
        hidden, balance = self.hidden_states(batch)
        places = batch.ends if batch.num_samples else batch.cu_seqlens[:1].long()
        return self.head(hidden[places], score)[: batch.num_samples], balance

    def values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As a critic: the value of the state in which each target was chosen, which is read at the token before it, `[M]`
        float32; and of the state after the last token of each sample, `[N]`.
        """
        hidden, _ = self.hidden_states(batch)
        places = torch.cat([batch.predictors, batch.ends])
        if not len(places):
            places = batch.cu_seqlens[:1].long()  # the head is always called: ranks make the same calls
        values = self.head(hidden[places], score)
        targets = batch.num_targets
        return values[:targets], values[targets : targets + batch.num_samples]

    def full_rewards(self, input_ids: Tensor) -> Tensor:
        """The reward of one sample by the model's own call and head, `[L]` to `[1]`; only to check ours against."""
        hidden = self.base.base_model(input_ids=input_ids[None], use_cache=False).last_hidden_state[0]
        return self.head(hidden)[-1].float()


def score(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The head in float32: rewards are compared with each other, and bfloat16 has three digits."""
    return torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())[:, 0]


@dataclass(frozen=True)
class RewardHead:
    """Where the head of a reward model comes from."""

    found: str | None
    """Its name in the checkpoint; None if there is none, so that a new one is made."""
    seed: int = 0
    """Of a new head."""
    pad_token_id: int | None = None
    """The token that transformers takes for padding, see `settle_padding`."""

    def loading(self) -> dict[str, Any]:
        """What transformers is told, to find the head under the name that it has."""
        renamed = {} if self.found in (None, HEAD) else {"key_mapping": {rf"^{re.escape(self.found)}\.": f"{HEAD}."}}
        # vLLM reads from the kind of problem that a reward is not to be squashed
        return {"num_labels": 1, "problem_type": "regression", "pad_token_id": self.pad_token_id} | renamed


def settle_padding(tokenizer: Any) -> int | None:
    """Choose the padding token of a reward model, and set it in the tokenizer that is saved with it.

    Transformers reads a reward at the last token that is not padding. Where EOS is the padding, that is one token too
    early, so padding must be a token that ends no sample: the tokenizer's own, one that is called so, or the unknown token.

    Returns:
        Its id; None if there is none, so that transformers refuses padded batches instead of misreading them.
    """
    padding = [token for token in map(str, tokenizer.added_tokens_decoder.values()) if "pad" in token.lower()]
    for token in (tokenizer.pad_token, *padding, tokenizer.unk_token):
        if token is not None and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return int(tokenizer.pad_token_id)
    tokenizer.pad_token = None
    return None


def find_head(name: str, prefix: str | None, option: str) -> str | None:
    """Find a head by looking at the checkpoint: a weight of one output on no layer.

    Args:
        name: a model folder, or a Hub id.
        prefix: `--value_head_prefix`, the head's name if the user gave it.
        option: the option that named the model, for errors.

    Returns:
        The head's name, or None if the checkpoint has none, also if one was named.

    Raises:
        InputError: the checkpoint has another head than was named, several, or one with more than one output.
    """
    shapes = checkpoint_shapes(name)
    if len(shapes.get(f"{HEAD}.weight", (1,))) == 2 and shapes[f"{HEAD}.weight"][0] != 1:
        outputs = shapes[f"{HEAD}.weight"][0]
        raise InputError(f"{option} {name} is a classifier of {outputs} labels; a reward model has one")
    heads = [key.removesuffix(".weight") for key, shape in shapes.items()
             if key.endswith(".weight") and len(shape) == 2 and shape[0] == 1 and not re.search(r"\.\d+\.", key)]  # fmt: skip
    if not heads:
        return None
    wanted = prefix or (HEAD if HEAD in heads else heads[0])
    if wanted not in heads or (prefix is None and len(heads) > 1 and HEAD not in heads):
        said = f"--value_head_prefix {prefix}: " if prefix else ""
        raise InputError(
            f"{said}{option} {name} has {'another head' if len(heads) == 1 else 'these heads'}: {', '.join(heads)}; "
            "name the one to use with --value_head_prefix"
        )
    return wanted


def checkpoint_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of a checkpoint, from the headers of its safetensors files, or of older ones without data."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(file: str) -> str | None:
        return cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )

    whole, index = find("model.safetensors"), find("model.safetensors.index.json")
    files = [whole] if whole else []
    if index and not whole:
        parts = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        files = [path for part in parts if (path := find(part))]
    shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    older = sorted(Path(name).expanduser().glob("*.bin")) if not files else []
    for path in older:
        weights = torch.load(path, map_location="meta", weights_only=True)
        shapes |= {key: tuple(weight.shape) for key, weight in weights.items() if isinstance(weight, Tensor)}
    return shapes


@dataclass(frozen=True)
class Calibration:
    """How a model's rewards are distributed, to bring them to mean 0 and deviation 1; and where these numbers come from."""

    mean: float
    std: float
    """Standard deviation (of the sample, divided by n - 1)."""
    responses: int
    """How many responses were scored."""
    dataset: str
    """What data they are from."""

    @classmethod
    def of(cls, config: Any, name: str) -> Calibration:
        """Read it from a reward model's config.

        Raises:
            InputError: the model has none, so `--normalize_reward` has nothing to normalise with.
        """
        mean, std = getattr(config, "mean", None), getattr(config, "std", None)
        if mean is None or std is None:
            raise InputError(
                f"--normalize_reward: {name} does not say its rewards' mean and standard deviation; train it with "
                "held-out data (--eval_dataset or --eval_ratio), or leave the option out"
            )
        origin = getattr(config, "calibration", None) or {}
        return cls(float(mean), float(std), int(origin.get("responses", 0)), str(origin.get("dataset", "")))

    def write(self, config: Any) -> None:
        """Keep it in a model's config: `mean` and `std`, where others look for them too, and `calibration`."""
        config.mean, config.std = self.mean, self.std
        config.calibration = {key: value for key, value in asdict(self).items() if key not in ("mean", "std")}

    def normalise(self, rewards: Tensor) -> Tensor:
        """(r − mean) / std."""
        return (rewards - self.mean) / self.std


def forget_calibration(config: Any) -> None:
    """Remove what `Calibration.write` wrote: it is about other weights."""
    for name in ("mean", "std", "calibration"):
        if hasattr(config, name):
            delattr(config, name)


def initialise_head(model: Any, seed: int) -> None:
    """Draw a new head, N(0, 1 / (H + 1)), the same on every rank and at every ZeRO stage.

    Source: Stiennon et al. 2020, appendix B.1 (arXiv:2009.01325).
    """
    from rlhf_core.libraries import gathered

    head = getattr(model, HEAD)
    with gathered([head.weight], write=True):
        shape = head.weight.shape
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / (shape[-1] + 1) ** 0.5
        head.weight.data.copy_(values)
