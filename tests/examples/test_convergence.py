"""The runs with a number for lam: what is written down of one, and the page made from all."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from examples import convergence
from examples.convergence import RESULTS, Run, Task, five_layers, main, read, report, runs
from examples.data.modules import InMemory


class Noise(InMemory):
    image_shape = (1, 8, 8)

    def __init__(self, folder: Path, batch_size: int) -> None:
        super().__init__(batch_size)

    def read(self) -> None:
        generator = torch.Generator().manual_seed(0)
        sets = [
            (torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 10)
            for n in (320, 40, 40)
        ]
        self.train_set, self.val_set, self.test_set = sets


def test_a_run_is_written_down_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(lambda: five_layers(4, 4, 4, 4, 4), Noise, 0.5, 320, 16, 2, 0.05)
    chosen = [Run("noise", "sgd", "channel", lam, 0) for lam in ("dense", "1e-2")]
    path = tmp_path / "runs.jsonl"
    monkeypatch.setattr(convergence, "TASKS", {"noise": task})
    monkeypatch.setattr(convergence, "runs", lambda: iter(chosen))
    monkeypatch.setattr(sys, "argv", ["convergence", "--records", str(path)])
    flushes, threads = torch.set_flush_denormal, torch.get_num_threads()
    try:
        main()
        first = path.read_text(encoding="utf-8")
        main()
    finally:
        flushes(False)
        torch.set_num_threads(threads)
    assert path.read_text(encoding="utf-8") == first
    dense, pruned = read(path)
    assert {name: dense[name] for name in asdict(chosen[0])} == asdict(chosen[0])
    assert len(pruned["alive"]) == 5  # all layers but the first
    assert set(map(tuple, pruned["alive"].values())) == {(2, 4)}
    last, dead = pruned["deaths"]
    assert dead == sum(total - alive for alive, total in pruned["alive"].values())
    assert 0 <= last <= dead
    assert pruned["frozen_at"] == 0.5
    assert pruned["sparsity"][-1] == [1.0, 0.5]
    assert [share for share, *_ in pruned["way"]] == [0.25]  # at 0.5 the mask is fixed
    assert len(pruned["way"][0]) == 4
    if last == 0:
        assert pruned["with_mask"] == pruned["without_mask"]


def test_the_page_is_made_from_the_records(tmp_path: Path) -> None:
    report(read(RESULTS / "runs.jsonl"), tmp_path)
    assert (tmp_path / "README.md").read_text() == (RESULTS / "README.md").read_text()
    assert (tmp_path / "curves.svg").exists()
    planned = [json.dumps(asdict(run)) for run in runs()]
    assert len(planned) == len(set(planned))
    for record in read(RESULTS / "runs.jsonl"):
        assert json.dumps({name: record[name] for name in Run.__dataclass_fields__}) in planned
