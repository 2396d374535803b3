"""Lightning's private names are what they are taken for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from lightning_wgsef.lightning.private import (
    average_models,
    hold_back_hparams,
    logged_step,
    logs_are_due,
    release_hparams,
)
from tests.helpers.groups import dense_network
from tests.helpers.plain_loops import RATE, Dense, data
from tests.helpers.trainers import make_trainer


class Logging(Dense):
    """Logs a number of its own at every batch."""

    def training_step(self, *arguments: Any) -> Any:
        self.log("number", 1.0, on_step=True, on_epoch=False)
        return super().training_step(*arguments)


class Recorder(pl.Callback):
    """What the private names say after every batch."""

    def __init__(self) -> None:
        self.due: list[int] = []
        self.averages: list[nn.Module] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if logs_are_due(trainer):
            self.due.append(logged_step(trainer))
        self.averages = list(average_models(trainer))


class WrittenTo(TensorBoardLogger):
    """Remembers the steps under which Lightning writes."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.written: dict[str, list[int]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for name in metrics:
            self.written.setdefault(name, []).append(step)
        super().log_metrics(metrics, step)


def fit(folder: Path, callbacks: list[pl.Callback], **settings: Any) -> WrittenTo:
    logger = WrittenTo(folder, name="", version="run")
    module = Logging()
    module.save_hyperparameters({"width": 8})
    settings = {"max_epochs": 4, "log_every_n_steps": 3, **settings}
    trainer = make_trainer(callbacks, logger=logger, **settings)
    trainer.fit(module, data(6))
    return logger


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_steps_at_which_lightning_logs(accumulated: int, tmp_path: Path) -> None:
    recorder = Recorder()
    logger = fit(tmp_path, [recorder], accumulate_grad_batches=accumulated)
    assert len(recorder.due) >= 4
    assert sorted(set(recorder.due)) == sorted(set(logger.written["number"]))


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_are_found_where_callbacks_keep_them(kind: str, tmp_path: Path) -> None:
    averaging: pl.Callback = EMAWeightAveraging(decay=0.5)
    if kind == "swa":
        averaging = StochasticWeightAveraging(RATE, swa_epoch_start=1, annealing_epochs=1)
    recorder = Recorder()
    fit(tmp_path, [averaging, recorder])
    (average,) = recorder.averages
    found = {name.removeprefix("module.") for name, _ in average.named_parameters()}
    assert found == {f"net.{name}" for name, _ in dense_network().named_parameters()}
    assert all(bool(torch.isfinite(p).all()) for p in average.parameters())


def test_hparams_are_held_back_and_released(tmp_path: Path) -> None:
    class Hold(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.held = hold_back_hparams(trainer)

    hold = Hold()
    assert "hp_metric" not in fit(tmp_path / "held", [hold]).written
    (logger,) = hold.held
    logger.log_hyperparams({"width": 8})
    assert "hp_metric" not in logger.written
    release_hparams(hold.held)
    assert hold.held == []
    logger.log_hyperparams({"width": 8})
    assert "hp_metric" in logger.written
    assert "hp_metric" in fit(tmp_path / "free", []).written
