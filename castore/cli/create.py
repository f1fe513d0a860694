"""`castore init`, `castore save` and `castore export`."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from castore.cli.command import REPOSITORY_VARIABLE, App, command, snapshot_fields
from castore.cli.render import ID_DIGITS, clean, cost_text, plural, size
from castore.errors import SkippedSnapshotWarning, UsageError
from castore.format.paths import compile_glob, encode_key, last_component
from castore.options import COMPRESSIONS, HASH_NAMES, Compression, HashName

if TYPE_CHECKING:
    from castore.api import Repository
    from castore.cli.command import Progress
    from castore.snapshots import Leaf, Snapshot

METADATA_KEY = "safetensors"
"""Key of a snapshot's metadata that keeps `__metadata__` of a .safetensors file, for the way back."""

_ARRAY_KINDS = frozenset({"tensor", "ndarray", "view", "alias"})
_NAMED_MAX = 3


@command(
    "init",
    examples="""
castore init runs/store
castore init runs/store --hash blake3      weights of strangers will be stored
castore init runs/store --compression none
""",
)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option(
    "--hash",
    "hash_name",
    type=click.Choice(HASH_NAMES),
    default="xxh3-128",
    show_default=True,
    help="Digest of chunks; blake3 where weights of strangers are stored or the repository is shared.",
)
@click.option(
    "--compression",
    type=click.Choice(COMPRESSIONS),
    default="auto",
    show_default=True,
    help="auto chooses for each chunk.",
)
def init_command(app: App, path: Path | None, hash_name: HashName, compression: Compression) -> None:
    """Create a repository in the directory PATH, which must be absent or empty.

    Without PATH: -R, else CASTORE_REPO, else the current directory.
    """
    from castore.api import init

    given = app.repo or os.environ.get(REPOSITORY_VARIABLE) or "."
    with init(path or Path(given), hash=hash_name, compression=compression) as repository:
        if app.as_json:
            app.document({"path": str(repository.path), "hash": hash_name, "compression": compression})
        else:
            app.line(f"created {clean(str(repository.path))} ({hash_name}, compression {compression})")


# ---- save --------------------------------------------------------------------------------------------------


@command(
    "save",
    examples="""
castore save model.pt --step 100 --metric loss=1.2
castore save model.safetensors --branch exp/lr --tag v1 -m "first good one"
castore save model.pt --meta lr=2e-5 --meta host=gpu1
""",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-b", "--branch", default="main", show_default=True, help="The branch to continue; made if it is new.")
@click.option("--parent", metavar="REF", help="Continue from REF instead of the branch's newest snapshot.")
@click.option("--step", type=int, help="Training step.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=NUMBER", help="A number to choose snapshots by.")
@click.option("--meta", "metadata", multiple=True, metavar="NAME=VALUE", help="JSON, or else plain text.")
@click.option("-m", "--message", default="", help="A remark.")
@click.option("-t", "--tag", "tags", multiple=True, metavar="NAME", help="Tag the snapshot.")
@click.option("--allow-pickle", is_flag=True, help="Trust FILE: reading a pickle can run any code.")
def save_command(
    app: App,
    *,
    file: Path,
    branch: str,
    parent: str | None,
    step: int | None,
    metrics: Sequence[str],
    metadata: Sequence[str],
    message: str,
    tags: Sequence[str],
    allow_pickle: bool,
) -> None:
    """Save FILE (.pt, .pth, .ckpt, .bin of torch.save; .safetensors) as a new snapshot.

    A .pt file is read without running code from it, unless --allow-pickle is given.
    """
    from castore.cli.files import read_file

    numbers, values = parse_metrics(metrics), parse_metadata(metadata)
    with app.open() as repository:
        began = time.perf_counter()
        contents = read_file(file, allow_pickle=allow_pickle)
        if contents.metadata:
            values = {METADATA_KEY: dict(contents.metadata)} | values
        with app.progress("saving") as progress:
            snapshot = repository.save(
                contents.state,
                branch=branch,
                step=step,
                metrics=numbers,
                metadata=values,
                message=message,
                tags=tags,
                parent=parent,
                allow_pickle=allow_pickle,
                progress=progress,
            )
        seconds = time.perf_counter() - began
    if app.as_json:
        app.document(snapshot_fields(snapshot) | {"tags": list(tags), "seconds": seconds})
        return
    at = clean(", ".join([branch, *(f"tag {tag}" for tag in tags)]))
    leaves = plural(snapshot.leaf_count, "leaf", "leaves")
    app.line(f"saved {snapshot.id[:ID_DIGITS]} ({at}), {leaves} in {seconds:.1f} s")
    app.line(cost_text(snapshot))


def parse_metrics(texts: Iterable[str]) -> dict[str, float]:
    """From "loss=1.2" to {"loss": 1.2}; whole numbers stay whole. Raises UsageError."""
    metrics: dict[str, float] = {}
    for name, text in _pairs(texts, "--metric"):
        try:
            metrics[name] = int(text)
        except ValueError:
            try:
                metrics[name] = float(text)
            except ValueError:
                raise UsageError(f"--metric {name}: expected a number, found {text!r}") from None
    return metrics


def parse_metadata(texts: Iterable[str]) -> dict[str, Any]:
    """From "lr=2e-5" to {"lr": 2e-05}, from "host=gpu1" to {"host": "gpu1"}. Raises UsageError."""
    metadata: dict[str, Any] = {}
    for name, text in _pairs(texts, "--meta"):
        try:
            metadata[name] = json.loads(text, parse_constant=_no_json)
        except ValueError:
            metadata[name] = text
    return metadata


def _no_json(constant: str) -> Any:
    raise ValueError(constant)


def _pairs(texts: Iterable[str], option: str) -> Iterable[tuple[str, str]]:
    seen: set[str] = set()
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"{option}: expected NAME=VALUE, found {text!r}")
        if name in seen:
            raise UsageError(f"{option} {name} is given twice")
        seen.add(name)
        yield name, value


# ---- export ------------------------------------------------------------------------------------------------


@command(
    "export",
    examples="""
castore export main model.pt
castore export best weights.safetensors --path 'model/**'
castore export main@1200 all.safetensors --tensors-only --separator /
""",
)
@click.argument("ref")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-p", "--path", "paths", multiple=True, metavar="GLOB", help="Only leaves that match.")
@click.option(
    "--separator",
    type=click.Choice([".", "/"]),
    default=".",
    show_default=True,
    help="Joins the keys of nested values to a name in a .safetensors file.",
)
@click.option("--tensors-only", is_flag=True, help="Leave out what .safetensors cannot hold, instead of refusing.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option(
    "--classes-as-dicts",
    is_flag=True,
    help="Write namedtuples and dataclasses, which need their code, as dicts.",
)
@click.option("--allow-pickle", is_flag=True, help="Trust the repository: load leaves that are pickles.")
@click.option("--latest-valid", is_flag=True, help="Of REF's history the newest snapshot that is whole.")
def export_command(
    app: App,
    *,
    ref: str,
    file: Path,
    paths: Sequence[str],
    separator: Literal[".", "/"],
    tensors_only: bool,
    force: bool,
    classes_as_dicts: bool,
    allow_pickle: bool,
    latest_valid: bool,
) -> None:
    """Write the state of REF to FILE (.pt, .pth, .ckpt, .bin as torch.save does; .safetensors).

    FILE appears whole or not at all. A .safetensors file holds named tensors and nothing else: numbers, texts
    and sparse or quantized tensors are refused, aliases are written once for each name.
    """
    from castore.cli.files import check_absent, format_of, write_pt, write_safetensors

    kind = format_of(file)
    if not force:
        check_absent(file)
    skipped: tuple[tuple[str, str], ...] = ()
    with app.open() as repository:
        as_dicts: Literal["dict", "error"] = "dict" if classes_as_dicts or kind == "safetensors" else "error"
        with app.progress("loading") as progress:
            if latest_valid:
                snapshot, state, skipped = _load_valid(
                    app, repository, ref, paths, allow_pickle=allow_pickle, missing_classes=as_dicts, progress=progress
                )
            else:
                snapshot = repository.snapshot(ref)
                if kind == "safetensors" and not tensors_only:
                    check_leaves(snapshot.leaves, paths)
                state = repository.load(
                    snapshot.id,
                    paths=list(paths) or None,
                    allow_pickle=allow_pickle,
                    missing_classes=as_dicts,
                    progress=progress,
                )
        if kind == "safetensors":
            tensors = name_tensors(state, separator=separator, leave_out=tensors_only)
            write_safetensors(file, tensors, _file_metadata(snapshot.metadata), force=force)
        else:
            write_pt(file, state, force=force)
    written = file.stat().st_size
    if app.as_json:
        fields = {"snapshot": snapshot.id, "file": str(file), "format": kind, "file_bytes": written}
        app.document(fields | ({"skipped": dict(skipped)} if latest_valid else {}))
    else:
        app.line(f"wrote {clean(str(file))}, {size(written)}, from {snapshot.id[:ID_DIGITS]}")


def _load_valid(
    app: App,
    repository: Repository,
    ref: str,
    paths: Sequence[str],
    *,
    allow_pickle: bool,
    missing_classes: Literal["dict", "error"],
    progress: Progress | None,
) -> tuple[Snapshot, Any, tuple[tuple[str, str], ...]]:
    """The newest snapshot that is whole, its state, and what was passed over, which is said on stderr too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedSnapshotWarning)
        found = repository.load_latest_valid(
            ref,
            paths=list(paths) or None,
            allow_pickle=allow_pickle,
            missing_classes=missing_classes,
            progress=progress,
        )
    for name, why in found.skipped:
        app.note(f"passed over {clean(name[:ID_DIGITS])}: {clean(why)}")
    return found.snapshot, found.state, found.skipped


def check_leaves(leaves: Iterable[Leaf], globs: Sequence[str]) -> None:
    """Refuse, before anything is loaded, what a .safetensors file cannot hold. Raises UsageError."""
    matches = [compile_glob(glob) for glob in globs]
    wanted = [leaf for leaf in leaves if not matches or any(match(leaf.path) for match in matches)]
    misfits = [f"{leaf.path} ({leaf.kind})" for leaf in wanted if leaf.kind not in _ARRAY_KINDS]
    misfits += [f"{leaf.path} (part of a sparse or quantized tensor)" for leaf in wanted if _is_part(leaf.path)]
    if misfits:
        raise UsageError(_misfits_text(misfits))


def name_tensors(state: Any, *, separator: str, leave_out: bool) -> dict[str, Any]:
    """The tensors and arrays of a nested state by name.

    Raises UsageError for other leaves, unless they are left out.
    """
    tensors: dict[str, Any] = {}
    misfits: list[str] = []
    for keys, value in _walk(state, ()):
        name = separator.join(keys)
        if not _is_plain_array(value):
            misfits.append(f"{name} ({type(value).__name__})")
        elif not name:
            raise UsageError("the state is one tensor without a name, which .safetensors cannot hold; export to .pt")
        elif name in tensors:
            raise UsageError(
                f"two leaves would both be called {name!r}; choose the other --separator, or export to .pt"
            )
        else:
            tensors[name] = value
    if misfits and not leave_out:
        raise UsageError(_misfits_text(misfits))
    if not tensors:
        raise UsageError("no leaf is a tensor: there is nothing to write")
    return tensors


def _misfits_text(misfits: Sequence[str]) -> str:
    more = f" and {len(misfits) - _NAMED_MAX} more" if len(misfits) > _NAMED_MAX else ""
    return (
        f".safetensors holds plain tensors only, not {', '.join(misfits[:_NAMED_MAX])}{more}; choose leaves "
        "with --path, leave these out with --tensors-only, or export to .pt"
    )


def _is_part(path: str) -> bool:
    """Whether it is a part of a composite tensor: `~indices`, but no escaped key like `~s:12` or `~n`."""
    last = last_component(path)
    return last.startswith("~") and last != "~n" and last[2:3] != ":"


def _is_plain_array(value: Any) -> bool:
    """Whether the value is an array or a tensor that is neither sparse nor quantized."""
    # Here and not above: castore.tensors needs numpy, which `castore init` can do without.
    from castore.tensors.lazy import is_torch_tensor

    if is_torch_tensor(value):
        return str(value.layout) == "torch.strided" and not value.is_quantized
    import numpy as np

    return isinstance(value, np.ndarray)


def _walk(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Leaves with the keys that lead to them; ints and indices as decimals."""
    if isinstance(value, Mapping):
        children = [(key if isinstance(key, str) else encode_key(key), item) for key, item in value.items()]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, list | tuple):
        names = getattr(value, "_fields", None) or map(str, range(len(value)))
        children = list(zip(names, value, strict=True))
    else:
        yield keys, value
        return
    for key, item in children:
        yield from _walk(item, (*keys, key))


def _file_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What a .safetensors file said about itself when it was saved."""
    kept = metadata.get(METADATA_KEY)
    if not isinstance(kept, Mapping):
        return {}
    return {key: value for key, value in kept.items() if isinstance(value, str)}
