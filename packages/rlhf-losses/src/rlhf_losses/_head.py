"""A language-model head and its transpose, on one chunk of tokens at a time.

Shapes: M tokens, c tokens of a chunk, H hidden width, V vocabulary. Nothing here is larger than `[c, V]` or `[V, H]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Big enough that matrix products run at full speed (64 to 512 rows were timed at a vocabulary of 32 000 on 2 cores: 512
# took three quarters of the time of 64) and small enough to matter little beside the model.
CPU_BUFFER_BYTES = 64 * 2**20
GPU_BUFFER_BYTES = 512 * 2**20
MIN_ROWS, MAX_ROWS = 64, 4096

# Rows that stay in a core's cache while one operation after the other passes over them: two to three times as fast.
CPU_CACHE_BYTES = 512 * 2**10

# float32 results of half-precision factors; CUDA only, from torch 2.8 on.
_MM_TO_FLOAT32 = getattr(torch.ops.aten.mm, "dtype_out", None)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, softmax and sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What a head does around its matrix product: z = cap · tanh(s · (h Wᵀ + b) / cap) / T.

    Args:
        temperature: T, the sampling temperature.
        softcap: cap, the bound of the logits before the temperature; None leaves them unbounded.
        logit_scale: s, a constant factor of the model.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; use argmax for greedy decoding")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}; pass None for a head without one")

    @property
    def gain(self) -> float:
        """Slope of the logits in h Wᵀ where tanh is linear."""
        return self.logit_scale / self.temperature

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """Write the logits of `hidden` `[c, H]` into `out` `[c, V]`, and return it."""
        if hidden.dtype == out.dtype:
            torch.mm(hidden, weight.t(), out=out)
        elif hidden.is_cuda and _MM_TO_FLOAT32 is not None:
            _MM_TO_FLOAT32(hidden, weight.t(), out.dtype, out=out)
        else:
            out.copy_(hidden @ weight.t())
        if bias is not None:
            out.add_(bias)
        if self.softcap is not None:
            return out.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return out if self.gain == 1 else out.mul_(self.gain)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the soft cap at `logits`, relative to `gain`, `[c, V]`; None where it is 1 everywhere."""
        if self.softcap is None:
            return None
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1)


@dataclass(frozen=True, slots=True)
class BufferedHead:
    """A head and the buffer `[c, V]` of its logits; of its vocabulary as many tokens as the buffer has columns."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_map: LogitMap
    buffer: Tensor

    def logits(self, rows: Tensor) -> Tensor:
        """Of these rows `[c]`, in the buffer."""
        vocabulary = self.buffer.shape[1]
        bias = None if self.bias is None else self.bias[:vocabulary]
        return self.logit_map.logits(self.hidden[rows], self.weight[:vocabulary], bias, self.buffer[: len(rows)])


class HeadGradient:
    """Gradients of a head's inputs, summed over chunks.

    The gradient of the weight is a sum over all tokens and is held in float32: sums in bfloat16 stop growing once a
    term is 2⁻⁹ of the sum.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool], gain: float
    ) -> None:
        dtype = accumulation_dtype(weight.dtype)
        self.gain, self.dtype = gain, weight.dtype
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        self.weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needed[1] else None
        self.bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device) if needed[2] and bias is not None else None

    def cast(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, weight and bias, in the dtype of the inputs."""
        return self.hidden, _to(self.weight, self.dtype), _to(self.bias, self.dtype)

    def add(
        self, dlogits: Tensor, row_scale: Tensor, slope: Tensor | None, rows: Tensor, hidden: Tensor, weight: Tensor
    ) -> None:
        """Add the chunk whose logits have the gradient `row_scale · dlogits`; `dlogits` is overwritten.

        Args:
            dlogits: `[c, V]`.
            row_scale: factor of each row, `[c, 1]`. It multiplies rows of width H and not of width V.
            slope: of the soft cap, see `LogitMap.slope`, `[c, V]`.
            rows: which tokens these are, `[c]`.
            hidden: their hidden states, `[c, H]`.
            weight: of the head, or as many of its first rows as there are columns in `dlogits`, `[V, H]`.
        """
        row_scale = row_scale * self.gain
        vocabulary = dlogits.shape[1]
        if slope is not None:
            dlogits.mul_(slope)
        if self.bias is not None:
            self.bias[:vocabulary].addmv_(dlogits.t(), row_scale[:, 0])
        if dlogits.dtype == weight.dtype:
            if self.hidden is not None:
                self.hidden.index_copy_(0, rows, (dlogits @ weight).mul_(row_scale))
            if self.weight is not None:
                self.weight[:vocabulary].addmm_(dlogits.t(), hidden * row_scale)
        else:
            # Half precision: scale first, since float16 could hold neither an unscaled term nor a scaled hidden state.
            dlogits = dlogits.mul_(row_scale).to(weight.dtype)
            if self.hidden is not None:
                self.hidden.index_copy_(0, rows, dlogits @ weight)
            if self.weight is not None:
                self.weight[:vocabulary].add_(dlogits.t() @ hidden)


class GradientInForward(torch.autograd.Function):
    """A scalar of hidden states, weight and bias that makes their gradients next to itself and keeps only them.

    `forward` takes these three first and returns the scalar first; it ends with `keep`.
    """

    @staticmethod
    def keep(ctx: Any, gradient: HeadGradient) -> None:
        """Save the gradient of the scalar."""
        ctx.save_for_backward(gradient.hidden, gradient.weight, gradient.bias)
        ctx.dtype = gradient.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # In place: the saved tensor's version then refuses a second pass, instead of scaling twice.
        grads = (None if grad is None else grad.mul_(grad_sum).to(ctx.dtype) for grad in ctx.saved_tensors)
        return *grads, *(None,) * (len(ctx.needs_input_grad) - 3)


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def chunks_of(rows: Tensor, vocabulary: int, chunk_size: int | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Split the row indices `[m]` into chunks of nearly equal size, by default as many rows as fit a fixed buffer."""
    if chunk_size is None:
        budget = CPU_BUFFER_BYTES if rows.device.type == "cpu" else GPU_BUFFER_BYTES
        chunk_size = min(max(budget // (vocabulary * dtype.itemsize), MIN_ROWS), MAX_ROWS)
    elif chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}; pass None to let the function choose")
    if not len(rows):
        return ()
    count = -(-len(rows) // chunk_size)
    return rows.split(-(-len(rows) // count))


def buffer_for(chunks: tuple[Tensor, ...], vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The one logits buffer that all chunks share, `[max(c), V]`."""
    return torch.empty(max(map(len, chunks), default=0), vocabulary, dtype=dtype, device=device)


def blocks_of(logits: Tensor) -> tuple[Tensor, ...]:
    """Views of a few rows each, for operations that follow one another; on a GPU, where launches count, of all rows."""
    if logits.device.type != "cpu":
        return (logits,)
    return logits.split(max(1, CPU_CACHE_BYTES // (logits.shape[1] * logits.itemsize)))


def exponentiate_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits z `[c, V]` into exp(z − max z), in place.

    Returns:
        max z and Σ exp(z − max z), `[c, 1]` each.
    """
    peaks, totals = [], []
    for block in blocks_of(logits):
        peaks.append(block.amax(1, keepdim=True))
        totals.append(block.sub_(peaks[-1]).exp_().sum(1, keepdim=True))
    return torch.cat(peaks), torch.cat(totals)


def exponentiate_with_entropy_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with the entropy log Σ eᶻ − Σ π z of each row's distribution, `[c, 1]`."""
    peaks, totals, entropies = [], [], []
    for block in blocks_of(logits):
        peaks.append(block.amax(1, keepdim=True))
        shifted = block.sub_(peaks[-1]).clone()
        totals.append(block.exp_().sum(1, keepdim=True))
        entropies.append(totals[-1].log() - shifted.mul_(block).sum(1, keepdim=True) / totals[-1])
    return torch.cat(peaks), torch.cat(totals), torch.cat(entropies)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, name: str = "") -> None:
    """Raise if the shapes cannot be those of hidden states `[M, H]` and their head `[V, H]`."""
    if weight.ndim != 2:
        raise ValueError(
            f"{name}weight must be [V, H], got {list(weight.shape)}; under DeepSpeed ZeRO-3 gather the parameter first"
        )
    if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}hidden must be [M, {weight.shape[1]}], got {list(hidden.shape)}; "
            "flatten the batch and pass the states that enter the head"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}bias must be [{weight.shape[0]}], got {list(bias.shape)}; pass None for a plain head")


def check_heads(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
) -> None:
    """Raise if these cannot be the heads of a student and a teacher that read the same tokens."""
    check_head(student_hidden, student_weight, student_bias, "student_")
    check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher_")
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"teacher_hidden must have {len(student_hidden)} rows like student_hidden, got {len(teacher_hidden)}; "
            "both models must read the same tokens"
        )
