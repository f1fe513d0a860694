"""From trials to figures: medians over repetitions, by workload, contestant and metric.

first_share     bytes of the first save, as a share of the raw bytes
later_share     bytes of a later save, mean over the later saves, as a share of the raw bytes
first_call_s, first_durable_s      until the call returns, until the state is durable
later_call_s, later_durable_s      the same for later saves, mean over them
load_s, cold_load_s                opening the store and reading, from the page cache and from the disk
cold_read_bytes                    what the cold read took from the disk
save_peak_bytes, load_peak_bytes   highest resident size above that before the store was opened
later_stored_bytes, later_written_bytes, fork_s
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

from bench.states import EQUALITIES

Figures = dict[str, float]
Trial = dict[str, Any]


def figures(workload: dict[str, Any], contestant: str) -> Figures:
    """The medians of one contestant on one workload; a metric without a measurement is absent."""
    trials = _finished(workload, contestant)
    columns = [_of_trial(trial, workload["raw_bytes"], workload["trunk_saves"]) for trial in trials]
    names = {name for column in columns for name in column}
    return {name: median(column[name] for column in columns if name in column) for name in sorted(names)}


def shares_by_gap(workload: dict[str, Any], contestant: str) -> list[tuple[int, float]]:
    """Steps since the save before, and the median share that such a save stored; in the order of saving."""
    trials = _finished(workload, contestant)
    saves = zip(*(trial["saves"] for trial in trials), strict=True)
    return [
        (same[0]["gap_steps"], median(save["stored_bytes"] for save in same) / workload["raw_bytes"])
        for same in list(saves)[1:]
    ]


def floors(workload: dict[str, Any]) -> Figures:
    """What the machine needs for a copy in memory (`copy_s`) and for one synced file (`write_s`)."""
    return {name: median(floor[name] for floor in workload["floors"]) for name in ("copy_s", "write_s")}


def verdict(workload: dict[str, Any], contestant: str) -> str:
    """Bit-equality over all repetitions, the worst one counting; or the error."""
    trials = workload["trials"][contestant]
    error = next((trial["error"] for trial in trials if trial["error"]), "")
    if error:
        return f"failed: {error}"
    worst: str = max((trial["equal"] for trial in trials), key=EQUALITIES.index)
    return worst


def _finished(workload: dict[str, Any], contestant: str) -> list[Trial]:
    return [trial for trial in workload["trials"].get(contestant, []) if not trial["error"]]


def _of_trial(trial: Trial, raw_bytes: int, trunk_saves: int) -> Figures:
    saves, later = trial["saves"], trial["saves"][trunk_saves:]
    out = {
        "first_share": saves[0]["stored_bytes"] / raw_bytes,
        "first_call_s": saves[0]["call_s"],
        "first_durable_s": saves[0]["durable_s"],
        "save_peak_bytes": max(save["peak_bytes"] for save in saves),
    }
    if later:
        out |= {
            "later_share": _mean(later, "stored_bytes") / raw_bytes,
            "later_stored_bytes": _mean(later, "stored_bytes"),
            "later_call_s": _mean(later, "call_s"),
            "later_durable_s": _mean(later, "durable_s"),
        }
        if all(save["written_bytes"] is not None for save in later):
            out["later_written_bytes"] = _mean(later, "written_bytes")
    if trial["warm"]:
        out |= {"load_s": trial["warm"]["seconds"], "load_peak_bytes": trial["warm"]["peak_bytes"]}
    if trial["cold"]:
        out["cold_load_s"] = trial["cold"]["seconds"]
        if trial["cold"]["disk_bytes"] is not None:
            out["cold_read_bytes"] = trial["cold"]["disk_bytes"]
    if trial["fork_s"] is not None:
        out["fork_s"] = trial["fork_s"]
    return out


def _mean(saves: Iterable[dict[str, Any]], name: str) -> float:
    return fmean(save[name] for save in saves)
