"""What castore has set itself to reach, checked against the figures of one run.

`STORE` was set for the store itself, `DIFFERENTIAL` for deltas, asynchronous saves and fast loads. A
target is a figure or a quotient of two, and a limit; what a run did not measure is left out of its
report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.figures import Figures

KIB, MIB = 1024, 1024 * 1024
OWN = "castore"
FLOOR, SIZE = "floor", "size"

Measured = Mapping[tuple[str, str], Figures]
"""Figures by workload and contestant; FLOOR and SIZE stand beside the contestants."""


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to reach."""

    workload: str
    text: str
    value: Callable[[Measured], float]
    """Raises KeyError for what was not measured, ZeroDivisionError for what was too small to measure."""
    limit: float
    form: str
    at_least: bool = False

    def found(self, measured: Measured) -> float | None:
        try:
            return self.value(measured)
        except (KeyError, ZeroDivisionError):
            return None

    def held(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def _against(
    workload: str, text: str, metric: str, peer: str, limit: float, *, peer_metric: str = "", own: str = OWN
) -> Target:
    """Our figure divided by a peer's."""

    def quotient(measured: Measured) -> float:
        return measured[workload, own][metric] / measured[workload, peer][peer_metric or metric]

    return Target(workload, text, quotient, limit, "{:.2f}x")


def _share(workload: str, text: str, metric: str, limit: float) -> Target:
    return Target(workload, text, lambda measured: measured[workload, OWN][metric], limit, "{:.2%}")


def _resave_rate(measured: Measured) -> float:
    return measured["resave", SIZE]["raw_bytes"] / measured["resave", OWN]["later_durable_s"] / 1e9


def _resave_kib(measured: Measured) -> float:
    return measured["resave", OWN]["later_stored_bytes"] / KIB


def _leaf_share(measured: Measured) -> float:
    return measured["load_one_leaf", OWN]["cold_read_bytes"] / measured["load_one_leaf", SIZE]["raw_bytes"]


def _first_save_peak_mib(measured: Measured) -> float:
    return measured["load_all", OWN]["save_peak_bytes"] / MIB


def _peak_beyond_base_mib(measured: Measured) -> float:
    """What is kept for deltas counts as one copy of the state."""
    peak, raw = (
        measured["full_finetune", OWN]["save_peak_bytes"],
        measured["full_finetune", SIZE]["raw_bytes"],
    )
    return (peak - raw) / MIB


STORE = (
    _against("full_finetune", "first save durable / torch.save, fsync", "first_durable_s", "torch_save", 1.0),
    _against("full_finetune", "first save bytes / torch.save", "first_share", "torch_save", 0.57),
    Target("resave", "raw bytes per second, GB/s", _resave_rate, 4.0, "{:.2f}", at_least=True),
    Target("resave", "bytes stored, KiB", _resave_kib, 64.0, "{:.1f}"),
    _against("load_all", "load / torch.load", "load_s", "torch_save", 2.0),
    Target("load_one_leaf", "read from a cold disk, share of the state", _leaf_share, 0.05, "{:.1%}"),
    Target("load_all", "peak extra memory of the save, MiB", _first_save_peak_mib, 128.0, "{:.0f}"),
)

_SHARE_LIMITS = {
    "full_finetune": 0.85,
    "bf16_copy": 0.78,
    "frozen_body": 0.90,
    "lora": 0.95,
    "gpt_scratch": 0.96,
    "sparse_embeddings": 0.67,
    "decayed_embeddings": 0.67,
}
"""Stored share of a later save against moonclip's, by workload."""


def _differential(workload: str) -> tuple[Target, ...]:
    dense_from_scratch, sparse = workload == "gpt_scratch", workload.endswith("_embeddings")
    return (
        _against(workload, "later save bytes / moonclip", "later_share", "moonclip", _SHARE_LIMITS[workload]),
        _against(workload, "later save durable / moonclip", "later_durable_s", "moonclip", 1.0),
        _against(
            workload,
            "later save durable / torch.save, fsync",
            "later_durable_s",
            "torch_save",
            2.0 if dense_from_scratch else 1.0,
        ),
        _against(
            workload,
            "save_async returns / copy into warm buffers",
            "later_call_s",
            FLOOR,
            1.3,
            peer_metric="copy_s",
            own="castore_async",
        ),
        _against(workload, "load / moonclip", "load_s", "moonclip", 0.8 if sparse else 0.6),
        _against(workload, "load / torch.load", "load_s", "torch_save", 3.0),
        _against(workload, "cold load / torch.load", "cold_load_s", "torch_save", 1.0),
    )


DIFFERENTIAL = (
    *(target for workload in _SHARE_LIMITS for target in _differential(workload)),
    _share("full_finetune", "later save, share of raw", "later_share", 0.40),
    _share("lora", "later save, share of raw", "later_share", 0.01),
    _against("load_all", "compression none, mapped / safetensors", "load_s", "safetensors", 3.0, own="castore_none"),
    Target("full_finetune", "peak memory beyond the base, MiB", _peak_beyond_base_mib, 128.0, "{:.0f}"),
)
