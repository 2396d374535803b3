"""Latencies of the networks that finished runs left, measured alone on a machine that is quiet."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.benchmark.records import Records
from examples.benchmark.registry import NETWORKS
from lightning_wgsef import measure_latency
from lightning_wgsef.utils.files import atomic_write

BATCHES = (1, 64)
REPEATS = 100

Latencies = dict[str, list[list[float]]]
"""For every run, for every batch size, median and quartiles of the time slim over dense."""


def small_networks(work: Path) -> Path:
    """Where those of finished runs lie."""
    return work / "small-networks"


def save_small(path: Path, small: nn.Module, example: Tensor) -> None:
    """Keep what is needed to measure a network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        torch.save((small, example), temporary)


def read_latencies(folder: Path) -> Latencies:
    """What was measured so far."""
    path = folder / "latencies.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def measure_all(records: Records, work: Path, device: str) -> None:
    """Time each network against the dense one in turns, those that are built alike once.

    Args:
        records: of the suite; ``latencies.json`` is written beside them.
        work: the suite's folder of work.
        device: "cpu" or "cuda".
    """
    folder = records.path.parent
    known = read_latencies(folder)
    by_build: dict[str, list[list[float]]] = {}
    for path in tqdm(sorted(small_networks(work).glob("*")), unit="network"):
        record = records.get(path.name)
        if record is None:
            continue
        # What it reads was written by this benchmark on this machine.
        small, example = torch.load(path, map_location=device, weights_only=False)
        shapes = [tuple(weight.shape) for weight in small.parameters()]
        task = record["task"]
        build = repr((task["network"], task["arguments"], small, shapes))
        if build not in by_build:
            dense = NETWORKS[task["network"]](**task["arguments"]).to(device)
            report = measure_latency(
                small, example, against=dense, batch_sizes=BATCHES, repeats=REPEATS
            )
            ratios = [batch.ratio for batch in report.batches]
            by_build[build] = [[x.median, x.lower, x.upper] for x in ratios if x is not None]
        known[path.name] = by_build[build]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "latencies.json") as temporary:
        temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
