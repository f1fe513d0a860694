"""Says once what torch says once a process, so that no test fails of a warning that another would have swallowed."""

from __future__ import annotations

import copy
import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.eye(2).to_sparse_csr()
    torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (1,), check_invariants=True)
    torch.empty(1, dtype=torch.complex32)
    copy.deepcopy(torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8))
