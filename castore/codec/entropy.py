"""What a sample says of the size that entropy coding will reach, so that work is only spent where it pays."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from castore.codec.transform import kernel

SAMPLE_BYTES_MAX = 32 * 1024
"""Longest row of a sample."""


def order0_shares(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Order-0 entropy (Shannon) of each row as a share of 8 bits, with the Miller-Madow correction for samples.

    Rows have at most SAMPLE_BYTES_MAX bytes and lie in C order.
    """
    row_count, length = rows.shape
    if length == 0:
        return np.zeros(row_count)
    counts = np.empty((row_count, 256), np.uint32)
    for row, row_counts in zip(rows, counts, strict=True):
        kernel.count(row.data, row_counts.data)
    bits = length * math.log2(length) - _X_LOG_X[counts].sum(axis=1)
    correction = (np.count_nonzero(counts, axis=1) - 1) / (2 * math.log(2))
    shares: npt.NDArray[np.float64] = (bits + correction) / (8 * length)
    return shares


def _table() -> npt.NDArray[np.float64]:
    counts = np.arange(SAMPLE_BYTES_MAX + 1, dtype=np.float64)
    counts[1:] *= np.log2(counts[1:])
    return counts


_X_LOG_X = _table()
"""n log2 n for every count that a sample can have: the entropy of N bytes is N log2 N - sum of n log2 n, in bits."""
