"""Plots of runs and reports."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_wgsef import WGSEFCallback, network_report, plot_report, plot_sparsity
from tests.helpers.trainers import loader, make_module, make_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    kinds = {"board": TensorBoardLogger, "csv": CSVLogger}
    loggers = [kind(folder, name="", version=name) for name, kind in kinds.items()]
    callback = WGSEFCallback(k=0.25)
    trainer = make_trainer([callback], max_epochs=2, logger=loggers, log_every_n_steps=5)
    trainer.fit(make_module(), loader())
    return folder


def test_both_loggers_give_the_same_curves(folder: Path) -> None:
    lines = {}
    for name in ("board", "csv"):
        upper, lower = plot_sparsity(folder / name).axes
        assert upper.get_ylabel() == "zero groups, %"
        lines[name] = {line.get_label(): line.get_xydata() for line in upper.lines + lower.lines}
    assert set(lines["board"]) == {
        "conv2",
        "fc",
        "all grouped weights",
        "all layers",
        "the mask is fixed",
    }
    for label, points in lines["board"].items():
        torch.testing.assert_close(
            torch.tensor(points), torch.tensor(lines["csv"][label]), rtol=1e-5, atol=1e-5
        )
    assert lines["csv"]["conv2"][-1][1] == 75


def test_a_report_of_networks() -> None:
    networks = {"dense": nn.Linear(4, 8), "slim": nn.Linear(4, 2)}
    axes = plot_report(network_report(networks, torch.ones(1, 4))).axes
    assert [bar.get_height() for bar in axes[0].patches] == [40, 10]
    assert [bar.get_height() for bar in axes[1].patches] == [64, 16]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "nothing", "a log folder with metrics.csv or event files"),
        (lambda folder: {"loss": [(0, 1.0)]}, r"no scalars 'wgsef/...'.*\['loss'\]"),
    ],
)
def test_what_is_no_log_is_named(folder: Path, make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plot_sparsity(make(folder))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-wgsef\[plots\]"'):
        plot_sparsity({"wgsef/gap": [(0, 1.0)]})
