"""The word vectors of sparse.py under AdamW, as `nn.Embedding` comes: the gradient is dense, so every step decays the
moments of all rows and moves every row that ever had a gradient, though few have one now.
"""

from __future__ import annotations

import torch

from bench.train import loop, sparse


def embeddings() -> loop.Run:
    sparsely = sparse.embeddings()
    model = sparsely.model
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            module.sparse = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=sparse.LEARNING_RATE)
    return loop.Run(model=model, optimizer=optimizer, loss=sparsely.loss)
