"""Labels of single rows: whether a response is desirable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from rlhf_data.errors import InputError
from rlhf_data.rows import Row, finite_number
from rlhf_data.shapes import RowFormat, RowOptions, require_key

WORDS = {"true": True, "1": True, "false": False, "0": False}
BALANCED = (1.0, 4 / 3)
"""Where the weighted ratio of desirable to undesirable rows should lie (Ethayarajh et al., 2024, section 4.2)."""


@dataclass(frozen=True)
class LabelledOptions(RowOptions):
    """What the user said about labelled rows: as of conversations, and `--label_key` and `--label_threshold`."""

    label_key: str = "label"
    label_threshold: float | None = None

    whole_texts: ClassVar[bool] = False

    def recognise(self, row: Row, where: str) -> RowFormat:
        """Decide from the first row how all rows of a source are read, as `RowOptions.recognise` does."""
        require_key(row, self.label_key, "--label_key", where)
        found = super().recognise(row, where)
        return replace(found, describe=f"{found.describe}, label `{self.label_key}`", value=self._label)

    def _label(self, row: Row) -> float:
        value = row.get(self.label_key)
        label = read_label(value, self.label_threshold)
        if label is None:
            raise InputError(f"`{self.label_key}` is {value!r}; {_way_out(value, self.label_threshold)}")
        return float(label)


def read_label(value: Any, threshold: float | None = None) -> bool | None:
    """Whether a label says desirable; None if it says nothing.

    Args:
        value: true or false, 1 or 0, or one of these as text; with a threshold a finite number, or one as text.
        threshold: from where on scores are desirable.
    """
    if threshold is not None:
        score = finite_number(value)
        return None if score is None else score >= threshold
    if isinstance(value, str):
        return WORDS.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def suggest_kto_weights(num_desirable: int, num_undesirable: int) -> tuple[float, float] | None:
    """Weights of desirable and undesirable rows that balance them, one of the two being 1.

    They put `desirable_weight * num_desirable / (undesirable_weight * num_undesirable)` inside [1, 4/3], with as few
    digits as that takes.

    Returns:
        The weights; None where weights of 1 do, or one of the two kinds is missing.

    Source: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization" (2024), section 4.2.

    >>> suggest_kto_weights(100, 300), suggest_kto_weights(145, 100), suggest_kto_weights(110, 100)
    ((3.0, 1.0), (1.0, 1.2), None)
    """
    if not num_desirable or not num_undesirable:
        return None
    ratio = num_desirable / num_undesirable
    if BALANCED[0] <= ratio <= BALANCED[1]:
        return None
    middle = sum(BALANCED) / 2
    wanted = max(middle / ratio, ratio / middle)
    rounded = [float(f"{wanted:.{digits}g}") for digits in (1, 2)]
    options = [(weight, 1.0) if ratio < 1 else (1.0, weight) for weight in rounded]
    return next(pair for pair in options if BALANCED[0] <= ratio * pair[0] / pair[1] <= BALANCED[1])


def _way_out(value: Any, threshold: float | None) -> str:
    if threshold is not None:
        spelled = "; labels that are true or false need no threshold" if isinstance(value, bool) else ""
        return f"with --label_threshold {threshold:g} it must be a finite number{spelled}"
    if finite_number(value) is not None:
        return (
            "a label is true or false, or 1 or 0; if these are scores, give --label_threshold X: those at or above X are "
            "desirable"
        )
    return "a label is true or false, or 1 or 0: correct the row, or name another column with --label_key"
