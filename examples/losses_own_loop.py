"""rlhf-losses in a loop of your own: torch, and no other package of this repository.

A small network learns to say a sequence backwards. Its head and log-softmax are one function, so `[tokens, vocabulary]`
logits never exist; the loss is a sum, divided once by the count of the whole step, so that micro-batches of different
sizes add up to exactly the loss of the whole batch.

    python examples/losses_own_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlhf_losses import linear_cross_entropy_sum, linear_token_logps

VOCABULARY, LENGTH, HIDDEN = 50, 6, 64
START = 0
"""Token that stands between a sequence and its reverse."""


class Network(nn.Module):
    """Token ids `[B, L]` to hidden states `[B, L, H]`, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.position = nn.Embedding(2 * LENGTH + 1, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, 4, 2 * HIDDEN, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        hidden = self.embedding(ids) + self.position.weight[:length]
        return self.layers(hidden, mask=nn.Transformer.generate_square_subsequent_mask(length), is_causal=True)


def batch(size: int) -> Tensor:
    """Sequences, START, and the same backwards, `[size, 2 * LENGTH + 1]`."""
    sequence = torch.randint(1, VOCABULARY, (size, LENGTH))
    return torch.cat([sequence, torch.full((size, 1), START), sequence.flip(1)], dim=1)


def targets(network: Network, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict the reversed half, `[M, H]`, and what they predict, `[M]`."""
    hidden = network(ids[:, :-1])[:, LENGTH:]
    return hidden.flatten(0, 1), ids[:, LENGTH + 1 :].flatten()


torch.manual_seed(0)
network = Network()
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
for step in range(1, 61):
    ids = batch(64)
    count = 64 * LENGTH  # target tokens of the whole step
    summed = 0.0
    for part in ids.split([40, 24]):  # micro-batches need not be equal
        hidden, labels = targets(network, part)
        total, _ = linear_cross_entropy_sum(hidden, network.head.weight, labels)
        (total / count).backward()
        summed += total.item()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {summed / count:.3f} nats per token")

with torch.no_grad():
    hidden, labels = targets(network, batch(256))
    logps = linear_token_logps(hidden, network.head.weight, labels)
print(f"probability of the right token, geometric mean: {logps.mean().exp():.2f}")
