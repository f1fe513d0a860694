"""From results to text: RESULTS.md with targets, losses and one table per workload.

`python -m bench.report results.json` writes it again from an earlier run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.figures import Figures, figures, floors, shares_by_gap, verdict
from bench.targets import DIFFERENTIAL, FLOOR, OWN, SIZE, STORE, Measured, Target

MB = 1e6
NOISE = 1.02
"""A figure within 2 % of another is no loss."""

FACTOR_MAX = 100
"""Beyond this the other figure is next to nothing, and the factor says nothing."""

MAPPING = frozenset({"safetensors"})
"""Contestants whose load returns before the file is read: their bytes are read at the first touch."""

TOUCHED = "load_touch"
"""The workload that touches them."""

TITLES = {
    "full_finetune": "Full fine-tune of all-MiniLM-L6-v2",
    "bf16_copy": "The same with a bf16 copy of the weights",
    "frozen_body": "Last two layers trained, rest frozen",
    "lora": "LoRA r=8",
    "gpt_scratch": "Small GPT from scratch, with EMA",
    "sparse_embeddings": "Sparse embeddings",
    "decayed_embeddings": "The same embeddings under AdamW",
    "resave": "Re-save: nothing changed",
    "fork": "Fork: a save ten steps after leaving a history",
    "load_all": "Load all of one full fine-tune state",
    "load_touch": "Load all of it and touch every page",
    "load_one_leaf": "Load one weight matrix",
    "smoke": "Smoke test of the harness (synthetic)",
}

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("first save", "first_share", "{:.1%}".format),
    ("later save", "later_share", lambda share: f"{share:.1%}" if share >= 0.1 else f"{share:.2%}"),
    ("call s", "later_call_s", "{:.3f}".format),
    ("durable s", "later_durable_s", "{:.3f}".format),
    ("first durable s", "first_durable_s", "{:.3f}".format),
    ("load s", "load_s", "{:.3f}".format),
    ("cold load s", "cold_load_s", "{:.3f}".format),
    ("cold read MB", "cold_read_bytes", lambda size: f"{size / MB:.1f}"),
    ("save peak MB", "save_peak_bytes", lambda size: f"{size / MB:.0f}"),
    ("load peak MB", "load_peak_bytes", lambda size: f"{size / MB:.0f}"),
)

COMPARED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("first save stored", "first_share", "{:.1%}".format),
    ("later save stored", "later_share", "{:.2%}".format),
    ("first save durable", "first_durable_s", "{:.3f} s".format),
    ("later save durable", "later_durable_s", "{:.3f} s".format),
    ("call of a later save", "later_call_s", "{:.3f} s".format),
    ("load", "load_s", "{:.3f} s".format),
    ("cold load", "cold_load_s", "{:.3f} s".format),
    ("peak memory of a save", "save_peak_bytes", lambda size: f"{size / MB:.0f} MB"),
)
"""What a loss can be in; less is better in all of them."""


def markdown(results: dict[str, Any]) -> str:
    """All of RESULTS.md."""
    measured = _measured(results)
    sections = [
        "# Benchmark results",
        _about(results["about"]),
        _targets("Targets of the store", STORE, measured),
        _targets("Targets of differential and asynchronous saves", DIFFERENTIAL, measured),
        "## Losses\n\n" + losses(results),
        *(_workload(name, workload) for name, workload in results["workloads"].items()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def losses(results: dict[str, Any]) -> str:
    """Where another contestant did better than castore, in plain words, computed from the figures."""
    if OWN not in results["about"]["contestants"]:
        return "castore took no part in this run."
    lost = {
        TITLES[name]: list(_losses(workload, touched=name == TOUCHED))
        for name, workload in results["workloads"].items()
    }
    if not any(lost.values()):
        return "None in what was measured here."
    bullets = [f"- {title}: {'; '.join(items)}." for title, items in lost.items() if items]
    return "Another contestant did better by more than 2 % in:\n\n" + "\n".join(bullets)


def _losses(workload: dict[str, Any], *, touched: bool) -> Iterator[str]:
    """The call is taken from whichever of castore and castore_async returns earlier. `touched`: loads include the
    first touch of what is mapped.
    """
    all_figures = {contestant: figures(workload, contestant) for contestant in workload["trials"]}
    if not all_figures[OWN]:
        yield "castore failed"
        return
    for label, metric, form in COMPARED:
        users = (OWN, "castore_async") if metric == "later_call_s" else (OWN,)
        own = [all_figures[c][metric] for c in users if metric in all_figures.get(c, {})]
        others = [(f[metric], c) for c, f in all_figures.items() if not c.startswith(OWN) and metric in f]
        if not own or not others:
            continue
        best, winner = min(others)
        if min(own) > max(best, 0) * NOISE:
            factor = f", {min(own) / best:.2f}x" if min(own) < best * FACTOR_MAX else ""
            maps = "load" in label and winner in MAPPING and not touched
            how = f"{winner}, which only maps its file" if maps else winner
            yield f"{label} {form(min(own))} against {form(best)} ({how}){factor}"


def _measured(results: dict[str, Any]) -> Measured:
    measured: dict[tuple[str, str], Figures] = {}
    for name, workload in results["workloads"].items():
        measured[name, FLOOR] = floors(workload)
        measured[name, SIZE] = {"raw_bytes": workload["raw_bytes"]}
        for contestant in workload["trials"]:
            measured[name, contestant] = figures(workload, contestant)
    return measured


METHOD = """\
Shares are of the raw bytes of all tensors. *Later* figures are means over the later saves. *Durable* is
after fsync. *Load* opens the store and reads the newest state completely; *cold* means with its files
dropped from the page cache. safetensors and castore_none only map their files: most is then read at the
first touch, which only load_touch has in its figures. *Peak* is the highest resident size above
that before the store was opened: what a contestant keeps between saves counts, and for a load the loaded
state counts too. `bench/peers.py` says how each contestant is used, `bench/workloads.py` what is saved."""


def _about(about: dict[str, Any]) -> str:
    machine = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"""\
Measured on {about["date"]} with `{about["command"]}`: medians of {about["repeat"]}, contestants alternated
within each repetition, every repetition in a fresh directory on a disk.

- Machine: {machine["processor"]}, {machine["cores"]} cores, {machine["memory_bytes"] / 2**30:.0f} GiB
- System: {machine["system"]}, {machine["file_system"]}; memory {about["memory"]}
- Load average at the end: {machine["load_average"]:.1f}
- Versions: {versions}; torch uses {machine["torch_threads"]} threads

{METHOD}"""


def _targets(title: str, targets: Sequence[Target], measured: Measured) -> str:
    rows = []
    for target in targets:
        value = target.found(measured)
        limit = ("≥ " if target.at_least else "≤ ") + target.form.format(target.limit)
        if value is None:
            continue
        held = "held" if target.held(value) else "**missed**"
        rows.append((target.workload, target.text, limit, target.form.format(value), held))
    if not rows:
        return ""
    return f"## {title}\n\n" + _table(("workload", "what", "to reach", "found", ""), rows)


def _workload(name: str, workload: dict[str, Any]) -> str:
    raw, floor = workload["raw_bytes"], floors(workload)
    all_figures = {contestant: figures(workload, contestant) for contestant in workload["trials"]}
    columns = [column for column in COLUMNS if any(column[1] in f for f in all_figures.values())]
    rows = [
        (
            contestant,
            *(_cell(f.get(metric), form) for _, metric, form in columns),
            verdict(workload, contestant),
        )
        for contestant, f in all_figures.items()
    ]
    parts = [
        f"## {TITLES[name]} (`{name}`, {raw / MB:.0f} MB)",
        _table(("contestant", *(title for title, _, _ in columns), "bit-equal"), rows),
        f"Floors: a warm copy in memory {floor['copy_s']:.3f} s, one synced file {floor['write_s']:.3f} s.",
    ]
    gaps = _gaps(workload)
    return "\n\n".join([*parts, gaps] if gaps else parts)


def _gaps(workload: dict[str, Any]) -> str:
    """Shares by the number of steps between two saves, where there are several."""
    rows: dict[str, list[tuple[int, float]]] = {
        contestant: shares_by_gap(workload, contestant) for contestant in workload["trials"]
    }
    gaps = next(([gap for gap, _ in shares] for shares in rows.values() if shares), [])
    if len(gaps) < 2 or workload["trunk_saves"] > 1:
        return ""
    header = ("stored when saved … steps apart", *(str(gap) for gap in gaps))
    return _table(header, [(name, *(f"{share:.2%}" for _, share in shares)) for name, shares in rows.items()])


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *lines])


if __name__ == "__main__":
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text())))
