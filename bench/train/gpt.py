"""A small GPT trained from scratch on bytes, with an exponential moving average of its weights in the state.

Every weight changes at every step at a high learning rate: the least favourable case for anything that stores
differences.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as everywhere

from bench.train import loop, text

LAYERS = 6
WIDTH = 320
HEADS = 5
CONTEXT = 128
BATCH = 6
VOCABULARY = 256
LEARNING_RATE = 3e-4
EMA_DECAY = 0.999
CORPUS_BYTES = 8_000_000


def from_scratch() -> loop.Run:
    loop.begin()
    model = Gpt()
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    data = torch.frombuffer(bytearray(text.corpus(CORPUS_BYTES)), dtype=torch.uint8)
    window = torch.arange(CONTEXT + 1)

    def loss() -> torch.Tensor:
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1))
        tokens = data[starts + window].long()
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def update_average() -> None:
        for name, tensor in model.state_dict().items():
            average[name].lerp_(tensor, 1 - EMA_DECAY)

    return loop.Run(
        model=model, optimizer=optimizer, loss=loss, after_step=update_average, extra=lambda: {"ema": average}
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.attention(self.norm_1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        out: torch.Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return out


class Gpt(nn.Module):
    """Pre-norm decoder; the output layer is tied to the token embedding, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1])
        out: torch.Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(positions))))
        return out
