"""Word vectors from hashed character n-grams (skip-gram, negative samples): a large, sparsely touched table.

Ids follow the power law of the text. The table is `nn.Embedding(sparse=True)` under SparseAdam, the pair that
PyTorch offers for this: rows without a gradient keep their weights and their moments, and rows never met keep
moments of zero.
"""

from __future__ import annotations

from collections import Counter
from zlib import crc32

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # as everywhere

from bench.train import loop, text

ROWS = 120_000
WIDTH = 128
NGRAM_LENGTHS = (3, 4, 5, 6)
NGRAMS_MAX = 24
WINDOW = 5
BATCH_WORDS = 2048
NEGATIVES = 5
LEARNING_RATE = 1e-3
CORPUS_BYTES = 12_000_000


def embeddings() -> loop.Run:
    loop.begin()
    stream = text.words(CORPUS_BYTES)
    counts = Counter(stream)
    vocabulary = {word: index for index, (word, _) in enumerate(counts.most_common())}
    ids = torch.tensor([vocabulary[word] for word in stream])
    ngrams = torch.tensor([_ngram_rows(word) for word in vocabulary])
    noise = torch.tensor([float(counts[word]) ** 0.75 for word in vocabulary])
    model = SkipGram(len(vocabulary))
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=LEARNING_RATE)

    def loss() -> torch.Tensor:
        centre = torch.randint(WINDOW, len(ids) - WINDOW, (BATCH_WORDS,))
        shift = torch.randint(1, WINDOW + 1, (BATCH_WORDS,)) * (torch.randint(2, (BATCH_WORDS,)) * 2 - 1)
        negative = torch.multinomial(noise, BATCH_WORDS * NEGATIVES, replacement=True)
        targets = torch.cat([ids[centre + shift].unsqueeze(1), negative.view(BATCH_WORDS, NEGATIVES)], dim=1)
        scores = model(ngrams[ids[centre]], targets)
        truth = torch.zeros_like(scores)
        truth[:, 0] = 1.0
        return F.binary_cross_entropy_with_logits(scores, truth, reduction="sum") / BATCH_WORDS

    return loop.Run(model=model, optimizer=optimizer, loss=loss, clip_norm=None)


class SkipGram(nn.Module):
    """A word is the sum of its n-gram vectors; row 0 of the table is the padding."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.ngrams = nn.EmbeddingBag(ROWS, WIDTH, mode="sum", sparse=True, padding_idx=0)
        self.targets = nn.Embedding(vocabulary_size, WIDTH, sparse=True)
        nn.init.normal_(self.ngrams.weight, std=WIDTH**-0.5)
        nn.init.normal_(self.targets.weight, std=WIDTH**-0.5)

    def forward(self, ngrams: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        words = self.ngrams(ngrams)
        out: torch.Tensor = (self.targets(targets) @ words.unsqueeze(-1)).squeeze(-1)
        return out


def _ngram_rows(word: str) -> list[int]:
    """Rows of the word and its n-grams, padded with 0 to NGRAMS_MAX; crc32 is the same everywhere."""
    marked = f"<{word}>"
    grams = [marked, *(marked[i : i + n] for n in NGRAM_LENGTHS for i in range(len(marked) - n + 1))]
    rows = [1 + crc32(gram.encode()) % (ROWS - 1) for gram in grams[:NGRAMS_MAX]]
    return rows + [0] * (NGRAMS_MAX - len(rows))
